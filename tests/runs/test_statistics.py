"""Summaries of few runs: against SciPy, closed forms and hand-made cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from stabletrain.runs import statistics


def test_summary_counts_runs_without_a_value() -> None:
    summary = statistics.summarize([1.0, 2.0, float("nan"), 4.0, float("inf")])
    assert summary.total == 5
    assert summary.missing == 2
    assert summary.mean == pytest.approx(7 / 3)
    assert summary.std == pytest.approx(np.std([1, 2, 4], ddof=1))


def test_summary_of_one_run_has_no_deviation() -> None:
    assert math.isnan(statistics.summarize([3.0]).std)
    assert math.isnan(statistics.summarize([]).mean)


def test_bootstrap_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(1).normal(size=40)
    reference = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=2).confidence_interval
    ours = statistics.bootstrap_interval(values)
    # Both are Monte Carlo: the interval's ends vary by about 1 % of its width at these sample counts.
    width = reference.high - reference.low
    assert ours == pytest.approx((reference.low, reference.high), abs=0.04 * width)


def test_student_interval_agrees_with_scipy() -> None:
    values = [1.0, 2.5, 2.0, 4.0, 3.5]
    reference = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert statistics.student_interval(values) == pytest.approx((reference.low, reference.high))


def test_paired_difference_ignores_what_seeds_share() -> None:
    seeds = np.array([10.0, -5.0, 3.0, 100.0, 7.0, 0.0])
    result = statistics.paired_difference(seeds - 1.0, seeds)
    assert result.mean == pytest.approx(-1.0)
    assert result.interval == pytest.approx((-1.0, -1.0))
    assert (result.wins, result.losses) == (6, 0)
    assert result.sign_p == pytest.approx(2 * 0.5**6)
    assert result.wilcoxon_p == pytest.approx(2 * 0.5**6)


def test_five_pairs_cannot_reach_five_percent() -> None:
    result = statistics.paired_difference([0.0, 1, 2, 3, 4], [1.0, 2.5, 4, 5.5, 7])
    assert result.sign_p == result.smallest_p == pytest.approx(0.0625)
    assert result.wilcoxon_p == pytest.approx(0.0625)


def test_a_diverged_run_breaks_its_pair_and_is_counted() -> None:
    result = statistics.paired_difference([1.0, float("nan"), 3.0], [2.0, 2.0, 2.0])
    assert (result.pairs, result.unpaired) == (2, 1)
    assert result.mean == pytest.approx(0.0)


def test_pairs_need_equal_lengths() -> None:
    with pytest.raises(ValueError, match="equal lengths"):
        statistics.paired_difference([1.0], [1.0, 2.0])


def test_confidence_band_leaves_out_missing_points() -> None:
    curves = np.array([[1.0, 2.0, np.nan], [3.0, 2.0, 5.0], [2.0, 2.0, np.nan]])
    mean, low, high = statistics.confidence_band(curves)
    assert mean == pytest.approx([2.0, 2.0, 5.0])
    assert (low[0], high[0]) == pytest.approx(statistics.student_interval([1.0, 3.0, 2.0]))
    assert low[2] == high[2] == 5.0


@pytest.mark.parametrize(
    ("mode", "threshold", "expected"), [("min", 0.5, 30), ("max", 0.9, 10), ("min", 0.1, math.inf)]
)
def test_first_step_reaching(mode: str, threshold: float, expected: float) -> None:
    assert statistics.first_step_reaching([10, 20, 30], [0.9, float("nan"), 0.5], threshold, mode=mode) == expected


def test_oscillation_does_not_see_a_straight_line() -> None:
    steps = list(range(100))
    line = [3.0 + 0.5 * step for step in steps]
    assert statistics.reduce_curve(steps, line, "oscillation") == pytest.approx(0.0, abs=1e-10)
    wave = [value + (-1) ** step for step, value in zip(steps, line, strict=True)]
    # +-1 around the line has standard deviation 1 (times sqrt(100/99), less the line's fit to the wave).
    assert statistics.reduce_curve(steps, wave, "oscillation") == pytest.approx(1.0, abs=0.01)


def test_reduction_leaves_out_the_warm_up() -> None:
    assert statistics.reduce_curve([0, 10, 20, 30, 40], [9.0, 9, 1, 1, 1], "mean", start=0.5) == 1.0


def test_reduction_of_a_diverged_curve_has_no_value() -> None:
    assert math.isnan(statistics.reduce_curve([1, 2], [1.0, float("nan")], "last"))
    assert math.isnan(statistics.reduce_curve([], [], "last"))


def test_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="oscillation"):
        statistics.reduce_curve([1], [1.0], "wobble")
