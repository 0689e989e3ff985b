"""Scores of a generator of images: generated and judged in batches, in bounded memory, resumable.

    scores = evaluate_generator(sample, dataset, extractor, num_samples=5000, context=context, weights="ema")

Images are quantised to uint8, turned into features, and let go of. Finished batches of features lie in the context's
scratch folder: an evaluation that was interrupted reads them, continues, and gives the same numbers to the bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from stabletrain.data.images import to_uint8
from stabletrain.data.spec import Dataset, Split
from stabletrain.errors import ConfigError, DataError, nearest
from stabletrain.metrics.extractor import Extractor
from stabletrain.metrics.files import Arrays, BatchFolder
from stabletrain.metrics.frechet import MomentAccumulator
from stabletrain.metrics.progress import Progress, silent
from stabletrain.metrics.protocol import SCORES, Protocol
from stabletrain.metrics.reference import Reference, check_reference, load_reference, reference_for, save_reference
from stabletrain.metrics.score_config import FEWEST
from stabletrain.metrics.scores import FROM_FEATURES, LABELLED, Generated, Real, Scores
from stabletrain.paths import cache_home
from stabletrain.training.experiment import EvaluationContext

BATCH = 256

log = logging.getLogger("stabletrain")

SampleFn = Callable[[NDArray[np.int64]], Any]
"""`sample(indices [B])` -> images, or (images, labels): [B, H, W, C], float in [-1, 1] or uint8. A pure function:
sample number i is the same whenever and in whatever batch it is asked for, up to rounding."""


def protocol_of(
    dataset: Dataset,
    extractor: Extractor,
    num_samples: int,
    *,
    split: str | None = None,
    weights: str | None = None,
    batch_norm: str | None = None,
) -> Protocol:
    """The protocol of an evaluation. `split`: by default `test` where there are test images, else `train`.

    Raises: `ConfigError` for an unknown value, or a split without images.
    """
    if split == "test" and not len(dataset.test):
        raise ConfigError(f"{dataset.name} has no test images: compare with the split 'train'")
    return Protocol(
        num_samples=num_samples,
        split=split or ("test" if len(dataset.test) else "train"),
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        resize=extractor.resize,
        dataset=dataset.name,
        fingerprint=dataset.spec.fingerprint,
        weights=weights,
        batch_norm=batch_norm,
    )


def evaluate_generator(
    sample_fn: SampleFn,
    dataset: Dataset,
    extractor: Extractor,
    *,
    num_samples: int,
    context: EvaluationContext | None,
    metrics: Sequence[str] = ("fd",),
    split: str | None = None,
    weights: str | None = None,
    batch_norm: str | None = None,
    reference: Path | None = None,
    batch_size: int = BATCH,
    tag: str = "",
    seed: int = 0,
) -> dict[str, float]:
    """Scores by name, `eval/` and the protocol: `eval/fd5k_test_digits-classifier_ema`. See `SCORES` for `metrics`.

    Statistics of the real split are computed once and kept in `cache_home()/"references"`, or read from `reference`.
    `tag` tells apart evaluations that share a context and a protocol (two samplers). `seed` draws the subsets of the
    kernel distance, of the pairs for neighbours and of k-means. Neighbour metrics and PRD compare equally many real
    and generated samples: the smaller number of the two.

    A generator whose images are not finite has no score: every one is NaN, and a warning says which sample it was.

    Raises: `ConfigError` for an unknown metric or a split without images, `DataError` for a reference that does not
    fit or a metric that the data set cannot have; what `context.tick` raises.
    """
    protocol = protocol_of(dataset, extractor, num_samples, split=split, weights=weights, batch_norm=batch_norm)
    _check(metrics, dataset, protocol)
    given = load_reference(reference) if reference is not None else None
    if given is not None:
        check_reference(given, protocol, str(reference))
    with _scratch(context) as scratch:
        evaluation = _Evaluation(
            dataset=dataset,
            extractor=extractor,
            protocol=protocol,
            wanted=frozenset(metrics),
            scratch=scratch,
            tick=context.tick if context is not None else silent,
            batch_size=batch_size,
        )
        generated = evaluation.generate(sample_fn, tag)
        scores = Scores(protocol, dataset, seed, evaluation.tick)
        if generated is None:
            return {f"eval/{name}": float("nan") for name in scores.names(evaluation.wanted)}
        found = scores.compute(evaluation.wanted, generated, evaluation.real(given))
        return {f"eval/{name}": value for name, value in found.items()}


def reference_statistics(
    dataset: Dataset, split: str, extractor: Extractor, *, context: EvaluationContext | None = None
) -> Reference:
    """The statistics of a split's real features, from `cache_home()/"references"` or computed now and kept there."""
    protocol = protocol_of(dataset, extractor, 0, split=split)
    with _scratch(context) as scratch:
        evaluation = _Evaluation(
            dataset=dataset, extractor=extractor, protocol=protocol, wanted=frozenset({"fd"}), scratch=scratch,
            tick=context.tick if context is not None else silent, batch_size=BATCH,
        )  # fmt: skip
        found = evaluation.real(None).reference
        assert found is not None
        return found


def reference_path(protocol: Protocol) -> Path:
    """Where the statistics of a split are kept; the name says what they are."""
    key = _key({name: getattr(protocol, name) for name in ("extractor_sha256", "fingerprint")})
    name = f"{protocol.dataset}-{protocol.split}-{protocol.extractor}-{protocol.resize}-{key[:8]}.npz"
    return cache_home() / "references" / name


def _check(metrics: Sequence[str], dataset: Dataset, protocol: Protocol) -> None:
    """Refuses before the first sample is made what could not be scored after the last one."""
    split = _split(dataset, protocol)
    for metric in metrics:
        if metric not in SCORES:
            raise ConfigError(f"unknown metric {metric!r}: {nearest(metric, SCORES)}")
        judged, name = (dataset.test, "test") if metric == "cas" else (split, protocol.split)
        if metric in LABELLED and (not len(judged) or judged.labels is None):
            raise DataError(f"{dataset.name} has no labelled {name} images, which the metric {metric!r} needs")
    if protocol.num_samples < FEWEST or len(split) < FEWEST:
        raise ConfigError(
            f"{protocol.num_samples} samples and {len(split)} real images are too few for a score: at least {FEWEST}"
        )


def _split(dataset: Dataset, protocol: Protocol) -> Split:
    return dataset.test if protocol.split == "test" else dataset.train


@contextlib.contextmanager
def _scratch(context: EvaluationContext | None) -> Iterator[Path]:
    if context is not None:
        yield context.scratch
    else:
        with tempfile.TemporaryDirectory(prefix="stabletrain-") as folder:
            yield Path(folder)


def _key(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class _Rows:
    """An array that is filled batch by batch; allocated when the first one tells its shape."""

    def __init__(self, count: int) -> None:
        self._count, self._filled = count, 0
        self.array: NDArray[Any] | None = None

    def add(self, rows: NDArray[Any]) -> None:
        if self.array is None:
            self.array = np.empty((self._count, *rows.shape[1:]), rows.dtype)
        self.array[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)


@dataclass(frozen=True)
class _Evaluation:
    """Turns generated and real images into what scores are made of."""

    dataset: Dataset
    extractor: Extractor
    protocol: Protocol
    wanted: frozenset[str]
    scratch: Path
    tick: Progress
    batch_size: int

    def generate(self, sample_fn: SampleFn, tag: str) -> Generated | None:
        """Generates and extracts every batch that is not there yet. None: an image was not finite."""
        count = self.protocol.num_samples
        keep = [name for name, metrics in (
            ("features", FROM_FEATURES | {"fd"}), ("logits", {"cs"}), ("images", {"cas"}), ("labels", LABELLED),
        ) if self.wanted & metrics]  # fmt: skip
        key = _key([self.protocol.record(), self.batch_size, keep, tag])
        folder = BatchFolder(self.scratch / f"generated-{key}")

        def compute(indices: NDArray[np.int64]) -> Arrays:
            return self._generated_batch(sample_fn, indices, keep)

        rows = {name: _Rows(count) for name in keep if name != "features" or self.wanted & FROM_FEATURES}
        accumulator: MomentAccumulator | None = None
        for arrays in self._batches(folder, count, f"samples for {self.protocol.name('fd')}", compute):
            if "nonfinite" in arrays:
                first = int(arrays["nonfinite"])
                log.warning("sample %d of %d is not finite: no scores", first, count)
                return None
            for name, kept in rows.items():
                kept.add(arrays[name])
            if "fd" in self.wanted:
                accumulator = accumulator or MomentAccumulator(arrays["features"].shape[1])
                accumulator.add(arrays["features"])
        found = {name: kept.array for name, kept in rows.items()}
        return Generated(accumulator.moments() if accumulator else None, **found)

    def real(self, reference: Reference | None) -> Real:
        """Statistics and, where a metric needs them, features of the real split: from the cache, or computed.

        `reference`: statistics that were given and fit.
        """
        split = _split(self.dataset, self.protocol)
        if "fd" not in self.wanted:
            reference = None
        elif reference is None:
            reference = self._kept_reference()
        all_features = bool(self.wanted & FROM_FEATURES)
        if not all_features and (reference is not None or "fd" not in self.wanted):
            return Real(reference)
        key = _key(
            [self.protocol.extractor_sha256, self.protocol.resize, self.protocol.fingerprint, self.protocol.split]
        )
        # Features of the real split serve every later evaluation; for sums alone they need not be kept.
        home = cache_home() / "features" if all_features else self.scratch
        folder = BatchFolder(home / f"real-{key}")
        rows = _Rows(len(split))
        accumulator: MomentAccumulator | None = None

        def compute(indices: NDArray[np.int64]) -> Arrays:
            return self._extracted(split.images.read(indices), ["features"])

        what = f"features of {self.dataset.name}'s {self.protocol.split} images"
        for arrays in self._batches(folder, len(split), what, compute, batch_size=BATCH):
            if all_features:
                rows.add(arrays["features"])
            if "fd" in self.wanted and reference is None:
                accumulator = accumulator or MomentAccumulator(arrays["features"].shape[1])
                accumulator.add(arrays["features"])
        if accumulator is not None:
            reference = reference_for(self.protocol, accumulator.moments())
            save_reference(reference_path(self.protocol), reference)
        return Real(reference, rows.array, split.labels)

    def _kept_reference(self) -> Reference | None:
        """The cache's statistics; None where there are none, or damaged ones, which is said."""
        path = reference_path(self.protocol)
        if not path.exists():
            return None
        try:
            found = load_reference(path)
            check_reference(found, self.protocol, str(path))
        except DataError as error:
            log.warning("%s: computing them again", error)
            return None
        return found

    def _batches(
        self,
        folder: BatchFolder,
        count: int,
        label: str,
        compute: Callable[[NDArray[np.int64]], Arrays],
        batch_size: int | None = None,
    ) -> Iterator[dict[str, NDArray]]:
        size = batch_size or self.batch_size
        for number, start in enumerate(range(0, count, size)):
            self.tick(label, start, count)
            indices = np.arange(start, min(start + size, count))
            yield folder.batch(number, lambda indices=indices: compute(indices))  # type: ignore[misc]
        self.tick(label, count, count)

    def _generated_batch(self, sample_fn: SampleFn, indices: NDArray[np.int64], keep: list[str]) -> Arrays:
        made = sample_fn(indices)
        images, labels = made if isinstance(made, tuple) else (made, None)
        images = np.asarray(images)
        expected = (len(indices), *self.dataset.train.images.shape)
        if images.shape != expected:
            raise ValueError(f"the generator made images {images.shape}, not {expected}")
        if images.dtype != np.uint8:
            broken = np.flatnonzero(~np.isfinite(images.astype(np.float32)).reshape(len(images), -1).all(axis=1))
            if broken.size:
                return {"nonfinite": np.array(indices[broken[0]])}
            images = to_uint8(images)
        arrays = dict(self._extracted(images, keep))
        if "labels" in keep:
            if labels is None or len(labels) != len(indices):
                raise ValueError("metrics within classes need a generator that gives (images, labels)")
            arrays["labels"] = np.asarray(labels, np.int32)
        if "images" in keep:
            arrays["images"] = images
        return arrays

    def _extracted(self, images: NDArray[np.uint8], keep: list[str]) -> Arrays:
        """Features and logits, those that are kept. On the CPU in small parts: large networks are slow."""
        part = 32 if jax.default_backend() == "cpu" else len(images)
        found: dict[str, list[NDArray]] = {name: [] for name in ("features", "logits") if name in keep}
        for start in range(0, len(images) if found else 0, part):
            if start:
                self.tick("extracting features", start, len(images))
            batch = images[start : start + part]
            if len(found) == 2:
                features, logits = self.extractor.outputs(batch)
                found["features"].append(features)
                found["logits"].append(logits)
            elif "features" in found:
                found["features"].append(self.extractor.features(batch))
            else:
                found["logits"].append(self.extractor.logits(batch))
        return {name: np.concatenate([np.asarray(row, np.float32) for row in rows]) for name, rows in found.items()}
