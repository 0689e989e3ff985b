"""The course of StABlE Training: when to simulate, when to learn, which replicas go back, when a cycle ends.

One *epoch* is one window of dynamics of all replicas. In the **simulation** phase nothing is learnt: replicas that
were unstable in the last window start it again, the others go on. As soon as a share `max_unstable` of them is
unstable, the **learning** phase begins: every replica goes back to the start of its last window in each epoch, and
after each window the parameters take one step. It ends when no more than `min_unstable` of the replicas are unstable,
or when the learning rate, lowered whenever that share has not fallen for `patience` epochs, has been lowered once
more than `reductions` times: the cycle is over and simulation begins again.

Here are only the decisions, as functions of plain numbers: `begin` before a window, `finish` after one.

Source: Raja et al. 2025, Algorithm 1, and the released code for what it leaves open.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

BETTER = 1e-4
"""A share counts as fallen when it is smaller by this part of itself: the default of PyTorch's ReduceLROnPlateau."""


@dataclass(frozen=True)
class Schedule:
    """The numbers that the decisions depend on; defaults are the released configurations'."""

    learning_rate: float
    max_unstable: float = 0.75
    min_unstable: float = 0.0
    restart_share: float = 0.05
    """Of the stable replicas, at the first window of a simulation phase: these go to a random earlier start."""
    factor: float = 0.2
    patience: int = 10
    reductions: int = 2
    """The learning phase ends below learning_rate * factor ** reductions: at the reduction after that."""


@dataclass(frozen=True)
class Progress:
    """Where in the course a run is."""

    learning: bool = False
    cycle: int = 0  # learning phases that are over
    epoch: int = 0  # windows of this phase that are over
    lowered: int = 0  # reductions of the learning rate in this phase
    best: float = math.inf  # smallest unstable share of this learning phase
    waiting: int = 0  # epochs since then, or since the last reduction


@dataclass(frozen=True)
class Plan:
    """What the next window is."""

    learning: bool
    begins_learning: bool
    unstable_share: float
    rewind: np.ndarray  # bool [R]: back to the start of the last window
    restart: int  # how many of the others go to a random earlier start
    learning_rate: float


@dataclass(frozen=True)
class Verdict:
    """What a learning window changed."""

    lowered: bool = False
    ended: bool = False


def begin(schedule: Schedule, progress: Progress, unstable: np.ndarray) -> tuple[Progress, Plan]:
    """Decides on the next window by which replicas were unstable in the last one: bool [R]."""
    share = float(np.mean(unstable))
    begins = not progress.learning and share >= schedule.max_unstable
    if begins:
        progress = Progress(learning=True, cycle=progress.cycle)
    rewind = np.ones_like(unstable) if progress.learning else unstable.copy()
    first = not progress.learning and progress.epoch == 0
    restart = math.ceil(schedule.restart_share * int(np.sum(~unstable))) if first else 0
    rate = schedule.learning_rate * schedule.factor**progress.lowered if progress.learning else 0.0
    return progress, Plan(progress.learning, begins, share, rewind, restart, rate)


def finish(schedule: Schedule, progress: Progress, unstable_share: float) -> tuple[Progress, Verdict]:
    """Decides after a window; `unstable_share` is the share that it began with."""
    progress = dataclasses.replace(progress, epoch=progress.epoch + 1)
    if not progress.learning:
        return progress, Verdict()
    lowered = False
    if unstable_share < progress.best * (1 - BETTER):
        progress = dataclasses.replace(progress, best=unstable_share, waiting=0)
    else:
        lowered = progress.waiting + 1 > schedule.patience
        waiting = 0 if lowered else progress.waiting + 1
        progress = dataclasses.replace(progress, waiting=waiting, lowered=progress.lowered + lowered)
    if progress.lowered > schedule.reductions or unstable_share <= schedule.min_unstable:
        return Progress(learning=False, cycle=progress.cycle + 1), Verdict(lowered, ended=True)
    return progress, Verdict(lowered)
