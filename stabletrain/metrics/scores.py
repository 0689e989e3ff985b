"""The scores that can be asked for by name, from what was kept of generated and of real images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabletrain.data.spec import Dataset
from stabletrain.errors import DataError
from stabletrain.metrics import classification_accuracy, frechet, inception_score, kid, prd, precision_recall
from stabletrain.metrics.progress import Progress
from stabletrain.metrics.protocol import SCORES, Protocol
from stabletrain.metrics.reference import Reference

FROM_FEATURES = {"kd", "pr", "dc", "prd", "intra-fd"}
"""Metrics that need all features at once. The others need their sums only."""
LABELLED = {"intra-fd", "cas"}
"""Metrics that need a generator which gives labels."""


@dataclass(frozen=True)
class Generated:
    """What is kept of the generated images: sums, and more only where a metric asks for it."""

    moments: frechet.Moments | None = None
    features: NDArray[np.float32] | None = None
    logits: NDArray[np.float32] | None = None
    labels: NDArray[np.int32] | None = None
    images: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Real:
    """What is kept of the real images."""

    reference: Reference | None = None
    features: NDArray[np.float32] | None = None
    labels: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class Scores:
    """Computes scores under their full names. `seed` draws subsets of features and starts of k-means."""

    protocol: Protocol
    dataset: Dataset
    seed: int
    tick: Progress

    def names(self, wanted: frozenset[str]) -> list[str]:
        """The names of the scores that are asked for."""
        name = self.protocol.name
        of_metric = {
            "fd": [name("fd")],
            "kd": [name("kd")],
            "cs": self._cs_names(),
            "pr": [name("precision"), name("recall")],
            "dc": [name("density"), name("coverage")],
            "prd": [name("prd-f8"), name("prd-f1of8")],
            "intra-fd": [name("intra-fd")],
            "cas": [self._cas_name()],
        }
        return [name for metric in SCORES if metric in wanted for name in of_metric[metric]]

    def compute(self, wanted: frozenset[str], generated: Generated, real: Real) -> dict[str, float]:
        """Every score that is asked for, in the order of `SCORES`. Raises: `DataError` where one cannot be."""
        computed = {
            "fd": self._fd, "kd": self._kd, "cs": self._cs, "pr": self._pr, "dc": self._dc, "prd": self._prd,
            "intra-fd": self._intra_fd, "cas": self._cas,
        }  # fmt: skip
        found: dict[str, float] = {}
        for metric in SCORES:
            if metric in wanted:
                self.tick(SCORES[metric], 0, 1)
                found.update(computed[metric](generated, real))
        return found

    def _fd(self, generated: Generated, real: Real) -> dict[str, float]:
        assert generated.moments is not None
        assert real.reference is not None
        return {self.protocol.name("fd"): frechet.frechet_distance(generated.moments, real.reference.moments)}

    def _kd(self, generated: Generated, real: Real) -> dict[str, float]:
        """The standard deviation only where there is more than one subset: see `kernel_distance`."""
        found = kid.kernel_distance(*_features(generated, real), seed=self.seed, progress=self.tick)
        std = {} if found.std is None else {self.protocol.name("kd", part="std"): found.std}
        return {self.protocol.name("kd"): found.mean, **std}

    def _cs_names(self) -> list[str]:
        name = self.protocol.name
        return [name("cs", place="10splits"), name("cs", place="10splits", part="std"), name("cs", place="1split")]

    def _cs(self, generated: Generated, real: Real) -> dict[str, float]:
        assert generated.logits is not None
        ten, one = (inception_score.inception_score(generated.logits, splits=splits) for splits in (10, 1))
        assert ten.std is not None
        return dict(zip(self._cs_names(), (ten.mean, ten.std, one.mean), strict=True))

    def _pairs(self, generated: Generated, real: Real) -> tuple[NDArray[Any], NDArray[Any]]:
        """Equally many real and generated features: all of the smaller set, a random part of the larger one."""
        both = _features(generated, real)
        count = min(map(len, both))
        generator = np.random.Generator(np.random.Philox(key=np.array([self.seed, 1], np.uint64)))

        def part(features: NDArray[Any]) -> NDArray[Any]:
            if len(features) == count:
                return features
            return features[np.sort(generator.choice(len(features), count, replace=False))]

        return part(both[0]), part(both[1])

    def _pr(self, generated: Generated, real: Real) -> dict[str, float]:
        found = precision_recall.precision_recall(*self._pairs(generated, real), progress=self.tick)
        return {self.protocol.name("precision"): found.precision, self.protocol.name("recall"): found.recall}

    def _dc(self, generated: Generated, real: Real) -> dict[str, float]:
        found = precision_recall.density_coverage(*self._pairs(generated, real), progress=self.tick)
        return {self.protocol.name("density"): found.density, self.protocol.name("coverage"): found.coverage}

    def _prd(self, generated: Generated, real: Real) -> dict[str, float]:
        curve = prd.prd_curve(*self._pairs(generated, real), seed=self.seed, progress=self.tick)
        return {self.protocol.name("prd-f8"): curve.f_score(8), self.protocol.name("prd-f1of8"): curve.f_score(1 / 8)}

    def _intra_fd(self, generated: Generated, real: Real) -> dict[str, float]:
        assert generated.labels is not None
        assert real.labels is not None
        of_real, of_generated = _features(generated, real)
        try:
            mean, _ = frechet.intra_class_frechet_distance(of_real, real.labels, of_generated, generated.labels)
        except ValueError as error:
            raise DataError(f"no intra-class distance on {self.dataset.name}: {error}") from error
        return {self.protocol.name("intra-fd"): mean}

    def _cas_name(self) -> str:
        return self.protocol.name("cas", place="test", extractor="small-classifier")

    def _cas(self, generated: Generated, real: Real) -> dict[str, float]:
        assert generated.images is not None
        assert generated.labels is not None
        accuracy = classification_accuracy.classification_accuracy_score(
            generated.images, generated.labels, self.dataset, seed=self.seed, progress=self.tick
        )
        return {self._cas_name(): accuracy}


def _features(generated: Generated, real: Real) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(real, generated)."""
    assert generated.features is not None
    assert real.features is not None
    return real.features, generated.features
