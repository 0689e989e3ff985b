"""Precision and recall of distributions (PRD): a curve over histograms on shared clusters, and its F scores.

Source: Sajjadi et al. 2018, Algorithm 1 and section 4.2. F_8 weighs recall, F_1/8 precision.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabletrain.metrics.progress import Progress, silent

ANGLES = 1001


@dataclass(frozen=True)
class Curve:
    """Pairs of precision and recall [A], from the angle that favours recall to the one that favours precision."""

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]

    def f_score(self, beta: float) -> float:
        """The largest F_beta on the curve: (1 + b^2) p r / (b^2 p + r)."""
        weight = beta**2
        below = weight * self.precision + self.recall
        return float(np.max((1 + weight) * self.precision * self.recall / np.where(below > 0, below, 1.0)))


def prd_curve(
    real: NDArray[Any],
    fake: NDArray[Any],
    *,
    clusters: int = 20,
    runs: int = 10,
    seed: int = 0,
    angles: int = ANGLES,
    progress: Progress = silent,
) -> Curve:
    """The PRD curve of generated features against real ones, averaged over `runs` clusterings of their union.

    Each clustering is mini-batch k-means with ten starts. Equally many real and generated samples, as in the paper.

    Shapes: real [N, D], fake [N, D].
    Raises: `ValueError` when the numbers of samples differ, or there are fewer than clusters.
    """
    if real.shape != fake.shape or real.ndim != 2:
        raise ValueError(f"PRD needs equally many features, not {list(real.shape)} and {list(fake.shape)}")
    if 2 * len(real) < clusters:
        raise ValueError(f"{2 * len(real)} features cannot make {clusters} clusters")
    union = np.concatenate([real, fake]).astype(np.float32)
    curves = []
    for run in range(runs):
        progress("precision and recall of distributions", run, runs)
        histograms = _histograms(union, len(real), clusters, seed + run)
        curves.append(curve_of_histograms(*histograms, angles=angles))
    return Curve(
        np.mean([curve.precision for curve in curves], axis=0), np.mean([curve.recall for curve in curves], axis=0)
    )


def curve_of_histograms(real: NDArray[Any], fake: NDArray[Any], *, angles: int = ANGLES) -> Curve:
    """The curve of two distributions over the same states: alpha = sum min(slope p, q), beta = alpha / slope.

    Shapes: real [K], fake [K], each summing to one. Raises: `ValueError` when they do not.
    """
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    for histogram in (real, fake):
        if histogram.shape != real.shape or not np.isclose(histogram.sum(), 1.0) or (histogram < 0).any():
            raise ValueError("PRD takes two distributions over the same states")
    # The ends of the quarter circle are the axes themselves, where one of the two numbers is 0 by definition.
    margin = 1e-10
    slopes = np.tan(np.linspace(margin, np.pi / 2 - margin, angles))
    precision = np.minimum(slopes[:, None] * real, fake).sum(axis=1)
    return Curve(np.minimum(precision, 1.0), np.minimum(precision / slopes, 1.0))


def _histograms(
    union: NDArray[np.float32], count_real: int, clusters: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # One thread: sums in one order give the same clusters on every machine, and on batches this small more threads
    # wait for each other (5,000 features of 128 dimensions on a busy machine of two cores: 0.2 s instead of 11).
    with threadpool_limits(1), warnings.catch_warnings():
        # A collapsed generator gives fewer distinct points than clusters. Empty clusters then change nothing.
        warnings.simplefilter("ignore", ConvergenceWarning)
        assigned = MiniBatchKMeans(n_clusters=clusters, n_init=10, random_state=seed).fit_predict(union)
    real = np.bincount(assigned[:count_real], minlength=clusters)
    fake = np.bincount(assigned[count_real:], minlength=clusters)
    return real / real.sum(), fake / fake.sum()
