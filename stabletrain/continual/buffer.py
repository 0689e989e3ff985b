"""The rehearsal buffer: which examples of the past lie in it at each step, and which of them are replayed.

A pure function of (seed, timeline, step): nothing of it needs to be saved, and a resumed run replays what an
uninterrupted one would have. Two kinds of rule fill it.

At the end of a task (nothing is stored while it runs), `quota` examples of each class of all finished tasks:
- `released`: drawn at random, quota = floor(capacity / classes of all finished tasks); classes that were there before
  are thinned to the new quota at random. Source: the released code of stable parallel continual learning.
- `herding`: the first `quota` examples whose running mean follows the class mean most closely (Rebuffi et al. 2017,
  Algorithm 4). Differs: in the space of pixels, not of the network's features, which would make the buffer depend on
  the course of training.

From the stream, as it arrives:
- `reservoir`: every example seen so far has the same chance to be in it (Vitter 1985).
- `class-balanced`: reservoirs of the classes, of sizes that are as equal as the stream allows (Chrysakis and Moens
  2020).

In the second kind an example keeps its slot until another one takes it, so that something may be stored with it: the
logits of DER, the edited pixels of GMED.

Imports no JAX.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stabletrain.continual.presets import AT_TASK_END, FROM_STREAM
from stabletrain.continual.streams import Indices, Streams, order_of
from stabletrain.errors import ConfigError

_FILL, _REPLAY = 21, 22  # which random stream


class RehearsalBuffer:
    """What can be replayed at each step.

    `features` [N, D] of all training examples are needed by herding only. Slots are 0 .. capacity - 1; an empty slot
    holds -1.
    """

    def __init__(
        self,
        rule: str,
        capacity: int,
        streams: Streams,
        labels: NDArray[np.int32],
        *,
        seed: int,
        features: NDArray[np.float32] | None = None,
    ) -> None:
        if capacity < 1:
            raise ConfigError(f"a rehearsal buffer of {capacity} examples holds nothing")
        if rule == "herding" and features is None:
            raise ValueError("herding needs the features of the training examples")
        self.rule, self.capacity = rule, capacity
        self._streams, self._labels, self._seed, self._features = streams, labels, seed, features
        self._timeline = streams.timeline
        if rule in FROM_STREAM:
            self._examples, self._steps = streams.arrivals()
            place = self._reservoir() if rule == "reservoir" else self._class_balanced()
            self._places: NDArray[np.int32] = place
            self._stored = np.flatnonzero(place >= 0)
        self._of_tasks = functools.lru_cache(maxsize=None)(self._after_tasks)

    def _empty(self) -> Indices:
        return np.full(self.capacity, -1, np.int32)

    # --- what lies in it ----------------------------------------------------------------------------------------------

    def content(self, step: int) -> Indices:
        """The example in each slot [capacity] before step `step` is taken, -1 for an empty one."""
        if self.rule in AT_TASK_END:
            return self._of_tasks(tuple(self._timeline.finished(step)))
        # Of stored examples only: about capacity (1 + ln(stream / capacity)) of them.
        seen = self._stored[: int(np.searchsorted(self._steps[self._stored], step))]
        content = self._empty()
        content[self._places[seen]] = self._examples[seen]  # of repeated slots the last one stays
        return content

    def arrivals(self, step: int, examples: Indices) -> NDArray[np.int32]:
        """The slot that each of these examples of step `step` takes, -1 for those that are not stored.

        An example whose slot is taken again within the same step is not stored either.
        """
        if self.rule in AT_TASK_END:
            return np.full(len(examples), -1, np.int32)
        low, high = np.searchsorted(self._steps, [step, step + 1])
        kept: dict[int, int] = {}
        for example, slot in zip(self._examples[low:high].tolist(), self._places[low:high].tolist(), strict=True):
            if slot >= 0:
                kept[slot] = example
        slot_of = {example: slot for slot, example in kept.items()}
        return np.array([slot_of.get(int(example), -1) for example in examples], np.int32)

    def _after_tasks(self, finished: tuple[int, ...]) -> Indices:
        """The content when these tasks have ended."""
        content = self._empty()
        if not finished:
            return content
        # Tasks that end at the same step come in by number.
        ends = self._timeline.ends
        last = max(finished, key=lambda task: (ends[task], task))
        before = self._of_tasks(tuple(task for task in finished if task != last))
        classes = [label for task in finished for label in self._timeline.classes[task]]
        quota = self.capacity // len(classes)
        kept: list[int] = []
        for task in sorted(finished, key=lambda task: (ends[task], task)):
            for label in self._timeline.classes[task]:
                if task == last:
                    seen = self._streams.seen(task)
                    pool = seen[self._labels[seen] == label]
                    kept += self._chosen(pool, label, quota, len(finished))
                else:
                    old = before[before >= 0]
                    kept += self._thinned(old[self._labels[old] == label], label, quota, len(finished))
        content[: len(kept)] = kept
        return content

    def _chosen(self, pool: Indices, label: int, quota: int, finished: int) -> list[int]:
        if self.rule == "herding":
            assert self._features is not None
            return pool[herd(self._features[pool], quota)].tolist()
        return pool[order_of(len(pool), self._seed, _FILL, label, finished)[:quota]].tolist()

    def _thinned(self, old: Indices, label: int, quota: int, finished: int) -> list[int]:
        if self.rule == "herding":  # in the order of choice: the first ones are the best of their number
            return old[:quota].tolist()
        return old[order_of(len(old), self._seed, _FILL, label, finished)[:quota]].tolist()

    def _reservoir(self) -> NDArray[np.int32]:
        """The slot of each arrival. Example n (from 0) takes slot r = U{0..n} where that is one."""
        count = len(self._examples)
        uniform = self._uniform(count)
        draws = np.floor(uniform * (np.arange(count) + 1)).astype(np.int64)
        first = np.arange(count) < self.capacity
        return np.where(first, np.arange(count), np.where(draws < self.capacity, draws, -1)).astype(np.int32)

    def _class_balanced(self) -> NDArray[np.int32]:
        """The slot of each arrival, by class-balancing reservoir sampling."""
        uniform = self._uniform(len(self._examples))
        slots_of: dict[int, list[int]] = {}
        seen: dict[int, int] = {}
        full: set[int] = set()  # classes that have been the largest once
        places = np.full(len(self._examples), -1, np.int32)
        for number, example in enumerate(self._examples.tolist()):
            label = int(self._labels[example])
            own = slots_of.setdefault(label, [])
            seen[label] = seen.get(label, 0) + 1
            if number < self.capacity:
                places[number] = number
                own.append(number)
                continue
            largest = max(len(slots) for slots in slots_of.values())
            full |= {one for one, slots in slots_of.items() if len(slots) == largest}
            if label not in full:
                giving = slots_of[min(one for one, slots in slots_of.items() if len(slots) == largest)]
                slot = giving.pop(int(uniform[number] * len(giving)))
                own.append(slot)
                places[number] = slot
            elif uniform[number] * seen[label] < len(own):
                places[number] = own[int(uniform[number] * seen[label])]
        return places

    def _uniform(self, count: int) -> NDArray[np.float64]:
        seed = np.random.SeedSequence([self._seed, _FILL]).generate_state(2, np.uint64)
        raw = np.random.Philox(key=seed).random_raw(count)
        return np.asarray(raw >> np.uint64(11), np.float64) / 2**53

    # --- what is replayed ---------------------------------------------------------------------------------------------

    def replay(self, step: int, size: int, *, draw: int = 0, classes: Sequence[int] | None = None) -> Indices:
        """Up to `size` slots to replay at `step`, drawn without replacement; of these classes only, where given.

        Two draws of one step (DER++ needs two) are independent. Empty before there is anything to replay.

        Differs: the released code walks through a shuffled buffer; each of its batches is such a draw too, but for the
        last one of a walk, which is partly filled.
        """
        content = self.content(step)
        filled = content >= 0
        if classes is not None:
            filled &= np.isin(self._labels[content], classes)
        slots = np.flatnonzero(filled).astype(np.int32)
        tag = -1 if classes is None else min(classes)
        return slots[order_of(len(slots), self._seed, _REPLAY, step, draw, tag + 1)[:size]]


def herd(features: NDArray[np.float32], count: int) -> list[int]:
    """The `count` rows whose running mean stays closest to the mean of all, in the order of choice.

    Source: Rebuffi et al. 2017 (iCaRL), Algorithm 4, on features as given (not normalised here).
    """
    values = features.astype(np.float64)
    mean, total = values.mean(0), np.zeros(values.shape[1])
    left, chosen = np.ones(len(values), bool), list[int]()
    for k in range(1, min(count, len(values)) + 1):
        distance = np.square(mean - (total + values) / k).sum(1)
        best = int(np.argmin(np.where(left, distance, np.inf)))
        left[best] = False
        total += values[best]
        chosen.append(best)
    return chosen
