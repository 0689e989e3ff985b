"""Point clouds in the plane: Gaussians in a circle or a grid, a Swiss roll, and what may be measured on them exactly.

In the plane the distance that a Wasserstein critic estimates can be computed: between two samples of equal size it is
the cost of the best assignment. Source: Gulrajani et al. 2017, Section 4 and Figure 1, with the released constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

TOY_NAMES = ("gaussians8", "gaussians25", "swissroll")
TRAINING_POINTS = 100_000
HELD_OUT_POINTS = 10_000
HIT_SIGMAS = 3.0
"""A sample within this many standard deviations of a centre is of high quality and belongs to its mode."""
HIT_SHARE = 20 / 2500
"""Share of the samples that a mode needs to count as covered."""

Points = NDArray[np.float32]


@dataclass(frozen=True)
class Mixture:
    """Equally likely Gaussians: `centres` [K, 2] and the standard deviation that they share."""

    centres: NDArray[np.floating]
    sigma: float


def mixture(name: str) -> Mixture | None:
    """The mixture behind a toy, in the units of its points; None for the Swiss roll, which has no modes.

    Raises: `ValueError` for an unknown name.
    """
    if name == "gaussians8":
        angles = np.arange(8) * np.pi / 4
        return Mixture(2 / 1.414 * np.stack([np.cos(angles), np.sin(angles)], axis=1), 0.02 / 1.414)
    if name == "gaussians25":
        grid = np.stack(np.meshgrid(np.arange(-2, 3), np.arange(-2, 3), indexing="ij"), axis=-1).reshape(-1, 2)
        return Mixture(2 / 2.828 * grid, 0.05 / 2.828)
    if name == "swissroll":
        return None
    raise ValueError(f"unknown toy {name!r}; valid: {', '.join(TOY_NAMES)}")


def toy_points(name: str, count: int, rng: np.random.Generator) -> Points:
    """`count` independent points [count, 2] of a toy; they lie within about [-2.2, 2.2].

    Source: the released gan_toy.py. Differs: every point is independent, where the release takes the modes in turn
    for the twenty-five Gaussians. Raises: `ValueError` for an unknown name.
    """
    shape = mixture(name)
    if shape is not None:
        centres = shape.centres[rng.integers(len(shape.centres), size=count)]
        return (centres + shape.sigma * rng.standard_normal((count, 2))).astype(np.float32)
    angle = 1.5 * np.pi * (1 + 2 * rng.random(count))
    roll = angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return ((roll + 0.25 * rng.standard_normal((count, 2))) / 7.5).astype(np.float32)


def training_points(name: str) -> Points:
    """The fixed training set [100000, 2], the same for every seed of a run."""
    return toy_points(name, TRAINING_POINTS, np.random.default_rng([1704, TOY_NAMES.index(name)]))


def held_out_points(name: str) -> Points:
    """Fixed points [10000, 2] that no training sees."""
    return toy_points(name, HELD_OUT_POINTS, np.random.default_rng([1705, TOY_NAMES.index(name)]))


# --- measures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModeReport:
    """`covered` of `modes` centres have samples, and the share of all samples that lies near some centre."""

    covered: int
    modes: int
    high_quality: float


def mode_report(points: NDArray[np.floating], shape: Mixture) -> ModeReport:
    """Modes covered and high-quality share of points [N, 2]; points that are not finite are of no mode.

    A point is near a centre within three standard deviations (of a real sample 98.9 % are: 1 - exp(-9/2)); a mode is
    covered when at least 0.8 % of the points, and at least one, are near it.
    """
    finite = np.isfinite(points).all(axis=1)
    distances = cdist(np.where(finite[:, None], points, 0.0), shape.centres)
    nearest = distances.argmin(axis=1)
    near = (distances.min(axis=1) <= HIT_SIGMAS * shape.sigma) & finite
    counts = np.bincount(nearest[near], minlength=len(shape.centres))
    covered = int((counts >= max(1.0, HIT_SHARE * len(points))).sum())
    return ModeReport(covered, len(shape.centres), float(near.mean()))


def exact_wasserstein(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """The 1-Wasserstein distance of two samples [N, D] of equal size: the mean distance under the best assignment.

    Exact for the samples, in about N^3 time; between two samples of one distribution it is above zero, so that a
    value says little without that of two real samples beside it. NaN when a point is not finite.

    Raises: `ValueError` for samples of different shape.
    """
    if first.shape != second.shape or first.ndim != 2 or not len(first):
        raise ValueError(f"the samples must have one shape [N, D], not {first.shape} and {second.shape}")
    costs = cdist(first, second)
    if not np.isfinite(costs).all():
        return float("nan")
    rows, columns = linear_sum_assignment(costs)
    return float(costs[rows, columns].mean())
