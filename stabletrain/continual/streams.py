"""Data streams of the tasks: which training examples come at which step. A pure function of (seed, timeline, step)."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from stabletrain.continual.timeline import Timeline

Indices = NDArray[np.int32]


def order_of(count: int, *key: int) -> Indices:
    """A permutation of `count` numbers drawn from a key of whole numbers: the ranks of random 64-bit numbers."""
    seed = np.random.SeedSequence([*key, count]).generate_state(2, np.uint64)
    return np.argsort(np.random.Philox(key=seed).random_raw(count), kind="stable").astype(np.int32)


class Streams:
    """The streams of a timeline over labelled training examples: each task's own examples, shuffled, in batches of B.

    One pass after the other, each with an order of its own; only the last batch of a window may be partly filled.
    """

    def __init__(
        self, labels: NDArray[np.int32], timeline: Timeline, *, batch_size: int, epochs: int, seed: int
    ) -> None:
        self.timeline = timeline
        self.batch_size = batch_size
        self._seed = seed
        self._epochs = epochs
        owner = timeline.task_of_class(int(labels.max()) + 1 if len(labels) else 0)
        self._own = [np.flatnonzero(owner[labels] == task).astype(np.int32) for task in range(timeline.tasks)]
        self._pass = functools.lru_cache(maxsize=4 * timeline.tasks)(self._shuffled)

    def examples(self, task: int) -> Indices:
        """All training examples of a task, in the order of the data set."""
        return self._own[task]

    def _shuffled(self, task: int, epoch: int) -> Indices:
        return self._own[task][order_of(len(self._own[task]), self._seed, 11, task, epoch)]

    def length(self, task: int) -> int:
        """Examples that the stream of a task brings in its window."""
        own, window = len(self._own[task]), self.timeline.durations[task] * self.batch_size
        whole = own * self._epochs
        # A window that is longer than the passes asked for goes round again (timeline files with `steps`).
        return min(whole, window) if self.timeline.durations[task] <= -(-whole // self.batch_size) else window

    def batch(self, task: int, step: int) -> Indices:
        """The examples [<= B] of a task at a step of its window; fewer than B only in its last batch.

        Raises: `ValueError` for a step at which the task is not active.
        """
        if task not in self.timeline.active(step):
            raise ValueError(f"task {task} is not active at step {step}")
        first = (step - self.timeline.starts[task]) * self.batch_size
        places = np.arange(first, min(first + self.batch_size, self.length(task)))
        epochs, offsets = np.divmod(places, len(self._own[task]))
        parts = [self._pass(task, int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(parts)

    def seen(self, task: int) -> Indices:
        """The examples that a task's stream has brought by the end of its window, each once, in order of the data."""
        brought = min(self.length(task), len(self._own[task]))
        return np.sort(self._pass(task, 0)[:brought])

    def arrivals(self) -> tuple[Indices, NDArray[np.int32]]:
        """Every example in the order of arrival (by step, within a step by task), and the step of each."""
        examples, steps = [], []
        for step in range(self.timeline.steps):
            for task in self.timeline.active(step):
                batch = self.batch(task, step)
                examples.append(batch)
                steps.append(np.full(len(batch), step, np.int32))
        return np.concatenate(examples), np.concatenate(steps)
