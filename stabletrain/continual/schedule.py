"""What each step of a run gets: a row of slots, one for each gradient. A pure function of (seed, timeline, step).

Every step has the same number of slots K, as many as the fullest step needs; those that a step does not use are off.
Slot by slot: the memory first (with DER++ a second draw of it, with GEM one slot for each finished task), then the
active tasks by rising number. Each gradient has an identity that outlives its place: 0 for the memory, 1 + t for task
t, T + 1 for the second draw; by it aggregators remember.

Imports no JAX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabletrain.continual.buffer import RehearsalBuffer
from stabletrain.continual.presets import AT_TASK_END, FROM_STREAM
from stabletrain.continual.streams import Indices, Streams

DIP_WINDOW = 4
"""Updates after a task's start in which a dip is looked for."""

EVENTS_PER_TASK = 5
"""Measurements at a task's end, before its start, and one, two and four updates after it."""


@dataclass(frozen=True)
class Slot:
    """One gradient of a step: its identity, its examples, and for a memory's the slots of the buffer they lie in."""

    identity: int
    examples: Indices
    places: Indices | None = None


class Schedule:
    """Slots, masks and events of every step."""

    def __init__(
        self,
        streams: Streams,
        buffer: RehearsalBuffer | None,
        *,
        num_classes: int,
        second_draw: bool = False,
        by_task: bool = False,
        measure_every: int = 0,
    ) -> None:
        """`by_task`: a memory slot for each finished task, as GEM needs; `second_draw`: two of all, as DER++ does."""
        self.streams, self.buffer, self.timeline = streams, buffer, streams.timeline
        self.num_classes = num_classes
        self._second_draw, self._by_task = second_draw, by_task
        self.identities = self.timeline.tasks + 2
        self.width = max(self._slot_count(step) for step in range(self.timeline.steps))
        self.measured = self._measured(measure_every)
        self.rows = max(len(self.measured), EVENTS_PER_TASK * self.timeline.tasks)
        """Room for the measurements of any windows of so many tasks, so that seeds share their compiled programs."""
        self._event_at = {step: number for number, step in enumerate(self.measured)}

    # --- slots --------------------------------------------------------------------------------------------------------

    def _memory_slots(self, step: int) -> int:
        if self.buffer is None:
            return 0
        finished = self.timeline.finished(step)
        if self._by_task:
            return len(finished) if self.buffer.rule in AT_TASK_END else len(self.timeline.begun(step - 1))
        available = bool(finished) if self.buffer.rule in AT_TASK_END else step > 0
        return (2 if self._second_draw else 1) * available

    def _slot_count(self, step: int) -> int:
        return len(self.timeline.active(step)) + self._memory_slots(step)

    def slots(self, step: int) -> list[Slot]:
        """The gradients of a step, the memory's first. Nothing after the last step."""
        if step >= self.timeline.steps:
            return []
        found = self._replayed(step)
        return found + [Slot(1 + task, self.streams.batch(task, step)) for task in self.timeline.active(step)]

    def _replayed(self, step: int) -> list[Slot]:
        if self.buffer is None or not self._memory_slots(step):
            return []
        size, content = self.streams.batch_size, self.buffer.content(step)
        if self._by_task:
            past = self.timeline.finished(step) if self.buffer.rule in AT_TASK_END else self.timeline.begun(step - 1)
            draws = [(0, self.buffer.replay(step, size, classes=self.timeline.classes[task])) for task in past]
        else:
            draws = [(0, self.buffer.replay(step, size))]
            if self._second_draw:
                draws.append((self.timeline.tasks + 1, self.buffer.replay(step, size, draw=1)))
        return [Slot(identity, content[places], places) for identity, places in draws if len(places)]

    # --- events -------------------------------------------------------------------------------------------------------

    def _measured(self, every: int) -> tuple[int, ...]:
        """Numbers of updates after which accuracies are measured: before each start, shortly after it, at each end."""
        timeline, last = self.timeline, self.timeline.steps
        chosen = {end + 1 for end in timeline.ends} | {last}
        for start in timeline.starts:
            if start:
                chosen |= {start, *(min(start + k, last) for k in (1, 2, DIP_WINDOW))}
        if every:
            chosen |= set(range(every, last, every))
        return tuple(sorted(chosen))

    # --- arrays -------------------------------------------------------------------------------------------------------

    def batch(self, step: int) -> dict[str, Any]:
        """The arrays of a step. K slots of B examples, C classes:

        `index` [K, B] training examples, `weight` [K, B] (0: padding), `identity` [K], `kind` [K] (0 off, 1 memory,
        2 second draw, 3 task), `begun` [C] and `old` [C] (classes of begun and of finished tasks), `event` (which
        measurement follows the update, -1: none), `restart`, `ended` (a task starts here; one ended at the step
        before); with a buffer `place` [K, B] (slot of the buffer that a replayed example lies in, else 0), and where
        the stream fills it `arrive` [K, B] (slot that an example takes, -1: none).
        """
        width, size = self.width, self.streams.batch_size
        index, weight = np.zeros((width, size), np.int32), np.zeros((width, size), np.float32)
        place, arrive = np.zeros((width, size), np.int32), np.full((width, size), -1, np.int32)
        identity, kind = np.zeros(width, np.int32), np.zeros(width, np.int32)
        for k, slot in enumerate(self.slots(step)):
            count = len(slot.examples)
            # Padding repeats the slot's own examples, so that batch statistics are those of its task.
            index[k], weight[k, :count], identity[k] = np.resize(slot.examples, size), 1.0, slot.identity
            if slot.places is not None:
                place[k] = np.resize(slot.places, size)
                kind[k] = 2 if slot.identity == self.timeline.tasks + 1 else 1
            else:
                kind[k] = 3
                if self.buffer is not None and self.buffer.rule in FROM_STREAM:
                    arrive[k, :count] = self.buffer.arrivals(step, slot.examples)
        batch: dict[str, Any] = {
            "index": index, "weight": weight, "identity": identity, "kind": kind,
            "begun": self._classes_of(self.timeline.begun(step)), "old": self._classes_of(self.timeline.finished(step)),
            "event": np.int32(self._event_at.get(step + 1, -1)), "restart": np.bool_(step in self.timeline.starts),
            "ended": np.bool_(step - 1 in self.timeline.ends), "position": np.uint32(step),
        }  # fmt: skip
        if self.buffer is not None:
            batch["place"] = place
            if self.buffer.rule in FROM_STREAM:
                batch["arrive"] = arrive
        return batch

    def _classes_of(self, tasks: list[int]) -> NDArray[np.float32]:
        mask = np.zeros(self.num_classes, np.float32)
        for task in tasks:
            mask[list(self.timeline.classes[task])] = 1.0
        return mask
