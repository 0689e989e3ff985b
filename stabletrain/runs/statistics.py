"""What may be said of a handful of runs: means, intervals, paired differences, censored results.

A run that diverged has no score. It is never dropped in silence: every summary carries the count of runs
that were asked for, `diverged` of them without a value, and the mean is the mean of the survivors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

BOOTSTRAP_SAMPLES = 10_000


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (ddof=1; NaN below two values) of the runs that have a finite value."""

    mean: float
    std: float
    count: int
    total: int
    values: tuple[float, ...]

    @property
    def missing(self) -> int:
        """Runs without a finite value: diverged, failed or not finished."""
        return self.total - self.count


def summarize(values: ArrayLike) -> Summary:
    """Summary of one score over runs; non-finite entries count as runs without a value."""
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    finite = array[np.isfinite(array)]
    return Summary(
        mean=float(finite.mean()) if finite.size else float("nan"),
        std=float(finite.std(ddof=1)) if finite.size > 1 else float("nan"),
        count=int(finite.size),
        total=int(array.size),
        values=tuple(float(value) for value in finite),
    )


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    With fewer than two values there is no interval: (NaN, NaN). With five, the percentile interval is somewhat too
    narrow (Efron and Tibshirani 1993, ch. 13); `student_interval` assumes normality instead.
    """
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if array.size < 2:
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(0, array.size, size=(samples, array.size))
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(array[draws].mean(axis=1), [tail, 100.0 - tail])
    return float(low), float(high)


def student_interval(values: ArrayLike, *, confidence: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean; (NaN, NaN) below two values."""
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if array.size < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf(0.5 + confidence / 2, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size)
    return float(array.mean() - half), float(array.mean() + half)


@dataclass(frozen=True)
class PairedDifference:
    """Method minus baseline over runs that share seed, initialisation rule and data order.

    `wilcoxon_p` is NaN below five pairs with a difference, where the exact test cannot reach 0.05 two-sided
    (with five pairs the smallest possible value is 0.0625: said, not hidden).
    """

    mean: float
    interval: tuple[float, float]
    sign_p: float
    wilcoxon_p: float
    pairs: int
    wins: int
    losses: int
    unpaired: int

    @property
    def smallest_p(self) -> float:
        """The smallest two-sided p-value that the sign test can give with this many pairs."""
        return float(min(1.0, 2.0 * 0.5 ** (self.wins + self.losses)))


def paired_difference(method: ArrayLike, baseline: ArrayLike, *, seed: int = 0) -> PairedDifference:
    """Paired comparison; entry i of both belongs to the same seed.

    Pairs in which either has no finite value are left out of the mean and counted in `unpaired`. A win is a
    difference below zero: method smaller than baseline.

    Raises: `ValueError` when the lengths differ.
    """
    first = np.asarray(method, dtype=np.float64).reshape(-1)
    second = np.asarray(baseline, dtype=np.float64).reshape(-1)
    if first.shape != second.shape:
        raise ValueError(f"pairs need equal lengths, not {first.size} and {second.size}")
    both = np.isfinite(first) & np.isfinite(second)
    differences = first[both] - second[both]
    moved = differences[differences != 0.0]
    wins, losses = int((moved < 0).sum()), int((moved > 0).sum())
    sign_p = float(stats.binomtest(wins, wins + losses).pvalue) if moved.size else float("nan")
    wilcoxon_p = float(stats.wilcoxon(moved, method="auto").pvalue) if moved.size >= 5 else float("nan")
    return PairedDifference(
        mean=float(differences.mean()) if differences.size else float("nan"),
        interval=bootstrap_interval(differences, seed=seed),
        sign_p=sign_p,
        wilcoxon_p=wilcoxon_p,
        pairs=int(both.sum()),
        wins=wins,
        losses=losses,
        unpaired=int((~both).sum()),
    )


def confidence_band(curves: ArrayLike, *, confidence: float = 0.95) -> tuple[NDArray, NDArray, NDArray]:
    """Mean and Student's t band over the first axis of `curves` [runs, points], NaN entries left out point by point.

    Returns (mean, low, high), each [points]; with fewer than two runs at a point low = high = mean.
    """
    array = np.asarray(curves, dtype=np.float64)
    finite = np.isfinite(array)
    count = finite.sum(axis=0)
    total = np.where(finite, array, 0.0).sum(axis=0)
    mean = np.divide(total, count, out=np.full(array.shape[1], np.nan), where=count > 0)
    squares = np.where(finite, (array - mean) ** 2, 0.0).sum(axis=0)
    std = np.sqrt(np.divide(squares, count - 1, out=np.zeros(array.shape[1]), where=count > 1))
    factor = stats.t.ppf(0.5 + confidence / 2, np.maximum(count - 1, 1))
    half = np.where(count > 1, factor * std / np.sqrt(np.maximum(count, 1)), 0.0)
    return mean, mean - half, mean + half


def first_step_reaching(steps: Sequence[int], values: Sequence[float], threshold: float, *, mode: str = "min") -> float:
    """The first logged step at which a score is at least as good as `threshold`; infinity if it never is."""
    array = np.asarray(values, dtype=np.float64)
    reached = array <= threshold if mode == "min" else array >= threshold
    hits = np.flatnonzero(reached & np.isfinite(array))
    return float(np.asarray(steps)[hits[0]]) if hits.size else float("inf")


def detrended(values: ArrayLike) -> NDArray:
    """Residuals of a least-squares line through equally spaced values; non-finite values left out."""
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    array = array[np.isfinite(array)]
    if array.size < 3:
        return np.full(array.shape, np.nan)
    position = np.arange(array.size)
    return array - np.polyval(np.polyfit(position, array, 1), position)


REDUCTIONS = {
    "last": lambda steps, values: float(values[-1]),
    "first": lambda steps, values: float(values[0]),
    "mean": lambda steps, values: float(np.mean(values)),
    "median": lambda steps, values: float(np.median(values)),
    "min": lambda steps, values: float(np.min(values)),
    "max": lambda steps, values: float(np.max(values)),
    "range": lambda steps, values: float(np.ptp(values)),
    "oscillation": lambda steps, values: float(np.std(detrended(values), ddof=1)),
    "relative-oscillation": lambda steps, values: float(np.std(detrended(values), ddof=1) / np.mean(values)),
}
"""How a curve becomes one number. `oscillation`: standard deviation around a fitted line."""


def reduce_curve(
    steps: Sequence[int], values: Sequence[float], how: str, *, start: float = 0.0, mode: str = "min"
) -> float:
    """One number from a curve; `how` is a key of `REDUCTIONS` or `steps-to:<threshold>`.

    `start`: leave out this first fraction of the steps (warm-up). NaN when nothing is left, or when a value that the
    reduction needs is not finite. Raises: `ValueError` for an unknown reduction.
    """
    if how.startswith("steps-to:"):
        return first_step_reaching(steps, values, float(how.split(":", 1)[1]), mode=mode)
    if how not in REDUCTIONS:
        raise ValueError(f"unknown reduction {how!r}; valid: {', '.join(REDUCTIONS)}, steps-to:<threshold>")
    step_array, value_array = np.asarray(steps), np.asarray(values, dtype=np.float64)
    if step_array.size:
        kept = step_array >= start * step_array[-1]
        step_array, value_array = step_array[kept], value_array[kept]
    if not value_array.size or not np.isfinite(value_array).all():
        return float("nan")
    if "oscillation" in how and value_array.size < 4:
        return float("nan")
    return REDUCTIONS[how](step_array, value_array)
