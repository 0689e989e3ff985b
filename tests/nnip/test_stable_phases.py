"""The decisions of StABlE Training, against a simulator whose unstable replicas are written down beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stabletrain.nnip.stable_phases import Plan, Progress, Schedule, Verdict, begin, finish

SCHEDULE = Schedule(learning_rate=1e-3)


def mask(unstable: int, replicas: int = 8) -> np.ndarray:
    return np.arange(replicas) < unstable


def play(counts: list[int], schedule: Schedule = SCHEDULE) -> list[tuple[Progress, Plan, Verdict]]:
    """One window for each number of unstable replicas (of 8) that it begins with; what stood after each."""
    progress, course = Progress(), []
    for count in counts:
        progress, plan = begin(schedule, progress, mask(count))
        progress, verdict = finish(schedule, progress, plan.unstable_share)
        course.append((progress, plan, verdict))
    return course


def test_learning_begins_at_three_quarters() -> None:
    plans = [plan for _, plan, _ in play([0, 3, 5, 6, 5])]
    assert [plan.learning for plan in plans] == [False, False, False, True, True]
    assert [plan.begins_learning for plan in plans] == [False, False, False, True, False]
    assert [plan.learning_rate for plan in plans] == [0, 0, 0, 1e-3, 1e-3]


def test_in_simulation_the_unstable_go_back_and_in_learning_all() -> None:
    plans = [plan for _, plan, _ in play([0, 3, 6, 2])]
    assert [int(plan.rewind.sum()) for plan in plans] == [0, 3, 8, 8]
    np.testing.assert_array_equal(plans[1].rewind, mask(3))


def test_random_restarts_at_the_first_window_of_a_simulation_phase_only() -> None:
    """5 % of the stable replicas, rounded up; again after each learning phase."""
    plans = [plan for _, plan, _ in play([0, 0, 6, 0, 2, 2])]
    assert [plan.restart for plan in plans] == [1, 0, 0, 0, 1, 0]
    assert [plan.learning for plan in plans] == [False, False, True, True, False, False]
    none = [plan.restart for _, plan, _ in play([0, 0], Schedule(learning_rate=1.0, restart_share=0.0))]
    assert none == [0, 0]


def test_a_cycle_ends_when_nobody_is_unstable() -> None:
    course = play([6, 4, 2, 0, 0])
    assert [verdict.ended for _, _, verdict in course] == [False, False, False, True, False]
    assert course[3][0] == Progress(learning=False, cycle=1)
    assert course[4][0] == Progress(learning=False, cycle=1, epoch=1)


def test_a_cycle_ends_at_the_third_reduction() -> None:
    """Share 6/8 throughout: the first epoch sets the best, then each 11 lower the rate; the third ends the phase."""
    course = play([6] * 40)
    lowered = [number for number, (_, _, verdict) in enumerate(course) if verdict.lowered]
    assert lowered == [11, 22, 33]
    assert [number for number, (_, _, verdict) in enumerate(course) if verdict.ended] == [33]
    rates = [plan.learning_rate for _, plan, _ in course]
    np.testing.assert_allclose(rates[:34], [1e-3] * 12 + [2e-4] * 11 + [4e-5] * 11, rtol=1e-12)
    assert course[33][0].cycle == 1
    # 6 of 8 are still unstable: the next window is learning again, with the whole rate.
    assert course[34][1].begins_learning
    assert rates[34] == 1e-3


def test_a_falling_share_keeps_the_rate() -> None:
    """Every tenth epoch one replica fewer: never eleven without a fall."""
    counts = [8] * 10 + [7] * 10 + [6] * 10 + [5] * 10
    assert not any(verdict.lowered for _, _, verdict in play(counts))


@pytest.mark.torch
def test_plateau_agrees_with_pytorch() -> None:
    """Random shares through both: the same learning rates, epoch by epoch."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    schedule = Schedule(learning_rate=1e-3, min_unstable=-1.0, reductions=10**9, patience=3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.2, patience=3, eps=0.0)
    progress = Progress(learning=True)
    for share in rng.integers(1, 9, 200) / 8:
        theirs.step(float(share))
        progress, _ = finish(schedule, progress, float(share))
        assert math.isclose(1e-3 * 0.2**progress.lowered, optimizer.param_groups[0]["lr"], rel_tol=1e-9)
    assert progress.lowered > 10
