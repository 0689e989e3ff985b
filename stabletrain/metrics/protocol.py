"""The protocol of a score: what it was measured with, in its name and in its record.

Two scores compare when their names are equal and their records agree. FID, KID and Inception Score are names of scores
on the 2015 Inception; on any other network the same mathematics is called FD, KD and classifier score (CS).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from stabletrain import __version__
from stabletrain.errors import ConfigError, nearest

INCEPTION = "inception2015"
INCEPTION_RESIZE = "tf1-bilinear"
WEIGHTS = ("ema", "raw")
BATCH_NORM = ("running", "batch", "standing")

SCORES = {
    "fd": "Frechet distance to the real split",
    "kd": "kernel distance to the real split: 100 subsets of 1000",
    "cs": "classifier score (the Inception Score's formula): ten splits and one",
    "pr": "improved precision and recall, k = 3",
    "dc": "density and coverage, k = 5",
    "prd": "F_8 and F_1/8 of precision and recall of distributions",
    "intra-fd": "mean Frechet distance within a class; needs labels",
    "cas": "accuracy on real test images of a classifier trained on the generated ones; needs labels",
}
"""What can be asked for, by name."""

STEMS: Mapping[str, tuple[str, str]] = {
    "fd": ("fd", "fid"),
    "kd": ("kd", "kid"),
    "cs": ("cs", "is"),
    "intra-fd": ("intra-fd", "intra-fid"),
    "precision": ("precision", "precision"),
    "recall": ("recall", "recall"),
    "density": ("density", "density"),
    "coverage": ("coverage", "coverage"),
    "prd-f8": ("prd-f8", "prd-f8"),
    "prd-f1of8": ("prd-f1of8", "prd-f1of8"),
    "cas": ("cas", "cas"),
}
"""Score -> what it is called on any network, and on the 2015 Inception."""


@dataclass(frozen=True)
class Protocol:
    """How scores of generated images are measured. `weights`: `ema`, `raw`, or None where there are no two.

    `batch_norm`: `running` statistics, those of the evaluation `batch`, `standing` ones; None without batch norm.
    """

    num_samples: int
    split: str
    """Of the real data: `train` or `test`."""
    extractor: str
    extractor_sha256: str
    resize: str
    dataset: str
    fingerprint: str
    """Of the data set's content."""
    weights: str | None = None
    batch_norm: str | None = None

    def __post_init__(self) -> None:
        _check("split", self.split, ("train", "test"))
        if self.weights is not None:
            _check("weights", self.weights, WEIGHTS)
        if self.batch_norm is not None:
            _check("batch_norm", self.batch_norm, BATCH_NORM)

    def name(self, score: str, *, place: str | None = None, extractor: str | None = None, part: str = "") -> str:
        """The name of a score: `fd5k_test_digits-classifier_ema`, `fid50k_train_inception2015`.

        Stem and number of samples, split, extractor, weights; then `bn-batch` or `bn-standing`, and a resize that is
        not the Inception's own. `place` stands where the split does (the number of splits of an Inception Score),
        `extractor` replaces it for a score that has its own network, `part` is `std` for a standard deviation.
        """
        stem = STEMS[score][self.extractor == INCEPTION]
        count = f"{self.num_samples // 1000}k" if self.num_samples % 1000 == 0 else str(self.num_samples)
        head = f"{stem}-{count}" if stem[-1].isdigit() else f"{stem}{count}"
        parts = [f"{head}-{part}" if part else head, place or self.split, extractor or self.extractor]
        if self.weights is not None:
            parts.append(self.weights)
        if self.batch_norm in ("batch", "standing"):
            parts.append(f"bn-{self.batch_norm}")
        if extractor is None and self.extractor == INCEPTION and self.resize != INCEPTION_RESIZE:
            parts.append(f"resize-{self.resize}")
        return "_".join(parts)

    def record(self) -> dict[str, Any]:
        """Everything by name, with the quantisation and the version of the library, for a file beside the scores."""
        return {**asdict(self), "quantisation": "uint8, rounded to nearest", "stabletrain": __version__}


def _check(what: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"unknown {what} {value!r}: {nearest(value, valid)}")
