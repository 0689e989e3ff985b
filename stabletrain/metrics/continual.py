"""Accuracy of every task over time in continual learning, and the numbers that are made of it, signs stated.

Tasks may overlap in time: task t ends at step e_t, several may end at the same step. With a_t(s) the test accuracy of
task t at step s, and the last step e:

    average at own end     mean_t a_t(e_t)
    final average          mean_t a_t(e)
    accuracy change        mean_t [a_t(e) - a_t(e_t)]              over all T tasks; negative = forgetting
    backward transfer      the same sum / (T - 1)                  Lopez-Paz and Ranzato 2017; negative = forgetting
    peak forgetting        mean over tasks that end before the last step of [max_s a_t(s) - a_t(e)]
                                                                   Chaudhry et al. 2018; positive = forgetting

The accuracy change is what stable parallel continual learning reports as forgetting F (over all tasks, with that sign).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass
class AccuracyMatrix:
    """Accuracies [S, T] at the steps at which they were measured: every end of a task, and any others.

    `ends`: the step e_t at which each task ends.
    """

    ends: tuple[int, ...]
    _rows: dict[int, NDArray[np.float64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ends = tuple(int(end) for end in self.ends)
        if not self.ends:
            raise ValueError("an accuracy matrix needs at least one task")

    def record(self, step: int, accuracies: Sequence[float] | NDArray[Any]) -> None:
        """The accuracy of each task at `step`; NaN for a task that is not measured there. Measured again: replaced.

        Raises: `ValueError` for another number of tasks, or an accuracy outside [0, 1].
        """
        row = np.array(accuracies, np.float64)
        if row.shape != (len(self.ends),):
            raise ValueError(f"{row.size} accuracies for {len(self.ends)} tasks")
        if ((row < 0) | (row > 1)).any():
            raise ValueError("an accuracy is a share in [0, 1]")
        self._rows[int(step)] = row

    @property
    def steps(self) -> list[int]:
        """Where accuracies were measured, in order."""
        return sorted(self._rows)

    @property
    def values(self) -> NDArray[np.float64]:
        """[S, T], a row for each of `steps`."""
        return np.array([self._rows[step] for step in self.steps]).reshape(-1, len(self.ends))

    @property
    def missing(self) -> list[int]:
        """The steps at which a task ends and its accuracy is not there yet."""
        return sorted({end for task, end in enumerate(self.ends) if not np.isfinite(self._at(end)[task])})

    @property
    def own_end(self) -> NDArray[np.float64]:
        """a_t(e_t) as [T]. Raises: `ValueError` naming a task whose accuracy at its end is missing."""
        return self._checked(np.array([self._at(end)[task] for task, end in enumerate(self.ends)]), "its own end")

    @property
    def final(self) -> NDArray[np.float64]:
        """a_t(e) as [T]. Raises: `ValueError` naming a task whose accuracy at the last end is missing."""
        return self._checked(self._at(max(self.ends)), f"the last end (step {max(self.ends)})")

    def _at(self, step: int) -> NDArray[np.float64]:
        return self._rows.get(step, np.full(len(self.ends), np.nan))

    def _checked(self, row: NDArray[np.float64], where: str) -> NDArray[np.float64]:
        for task, value in enumerate(row):
            if not np.isfinite(value):
                raise ValueError(f"the accuracy of task {task} at {where} was not measured")
        return row

    def average_at_own_end(self) -> float:
        """mean_t a_t(e_t): how well each task was learned, before later tasks touched it."""
        return float(np.mean(self.own_end))

    def final_average(self) -> float:
        """mean_t a_t(e): how well all tasks are known at the end."""
        return float(np.mean(self.final))

    def accuracy_change(self) -> float:
        """mean_t [a_t(e) - a_t(e_t)] over all tasks. Negative = forgetting."""
        return float(np.mean(self.final - self.own_end))

    def backward_transfer(self) -> float | None:
        """sum_t [a_t(e) - a_t(e_t)] / (T - 1). Negative = forgetting. None for a single task.

        Differs: Lopez-Paz and Ranzato sum over the first T - 1 tasks; the last one's term is zero there, and here so
        are those of all tasks that end at the last step.
        """
        tasks = len(self.ends)
        return float(np.sum(self.final - self.own_end)) / (tasks - 1) if tasks > 1 else None

    def peak_forgetting(self) -> float | None:
        """Mean of [max over steps from e_t on of a_t - a_t(e)]. Positive = forgetting, never negative. None: no task.

        Over the tasks that end before the last step. Differs: Chaudhry et al. take the maximum over earlier steps
        only, which is negative for a task that improves to the end; here the last step counts, as in released code.
        """
        earlier = [task for task, end in enumerate(self.ends) if end < max(self.ends)]
        if not earlier:
            return None
        final, steps, values = self.final, np.array(self.steps), self.values
        drops = []
        for task in earlier:
            after = (steps >= self.ends[task]) & (steps <= max(self.ends))
            drops.append(float(np.nanmax(values[after, task])) - final[task])
        return float(np.mean(drops))

    def scalars(self) -> dict[str, float]:
        """The numbers as metrics. `accuracy_change`, `backward_transfer`: negative = forgetting; the peak: positive."""
        found = {
            "average_accuracy_at_own_end": self.average_at_own_end(),
            "average_accuracy_final": self.final_average(),
            "accuracy_change": self.accuracy_change(),
        }
        optional = {"backward_transfer": self.backward_transfer(), "peak_forgetting": self.peak_forgetting()}
        return {**found, **{name: value for name, value in optional.items() if value is not None}}

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; null where nothing was measured."""
        rows = [[value if np.isfinite(value) else None for value in row] for row in self.values.tolist()]
        return {"ends": list(self.ends), "steps": self.steps, "accuracy": rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        matrix = cls(tuple(values["ends"]))
        for step, row in zip(values["steps"], values["accuracy"], strict=True):
            matrix.record(step, [np.nan if value is None else value for value in row])
        return matrix
