"""Streams: single pass, every example once, the same whenever it is asked."""

from __future__ import annotations

import numpy as np
import pytest

from stabletrain.continual.streams import Streams
from stabletrain.continual.timeline import Timeline

LABELS = np.array([0, 1, 2, 3] * 11 + [0, 1, 2], np.int32)  # 12, 12, 12, 11 examples
TIMELINE = Timeline(((0, 1), (2, 3)), (0, 2), (5, 5))  # 24 and 23 examples in batches of 5


def streams(seed: int = 0, epochs: int = 1, timeline: Timeline = TIMELINE) -> Streams:
    return Streams(LABELS, timeline, batch_size=5, epochs=epochs, seed=seed)


def test_a_window_brings_every_example_of_its_task_once():
    for task in range(2):
        batches = [streams().batch(task, step) for step in range(TIMELINE.starts[task], TIMELINE.ends[task] + 1)]
        assert [len(batch) for batch in batches] == [5, 5, 5, 5, 4 - task]
        np.testing.assert_array_equal(np.sort(np.concatenate(batches)), streams().examples(task))


def test_a_batch_depends_on_seed_task_and_step_alone():
    whole = streams()
    for step in (4, 2, 3):  # in any order
        np.testing.assert_array_equal(whole.batch(1, step), streams().batch(1, step))
    assert not np.array_equal(whole.batch(0, 0), streams(seed=1).batch(0, 0))
    with pytest.raises(ValueError, match="not active"):
        whole.batch(0, 5)


def test_passes_have_orders_of_their_own():
    timeline = Timeline(((0, 1), (2, 3)), (0, 0), (10, 10))
    both = streams(epochs=2, timeline=timeline)
    seen = np.concatenate([both.batch(0, step) for step in range(10)])
    assert len(seen) == 48
    np.testing.assert_array_equal(np.sort(seen[:24]), np.sort(seen[24:]))
    assert not np.array_equal(seen[:24], seen[24:])


def test_arrivals_are_all_batches_in_order():
    examples, steps = streams().arrivals()
    assert len(examples) == 47
    assert (np.diff(steps) >= 0).all()
    np.testing.assert_array_equal(examples[steps == 2], np.concatenate([streams().batch(0, 2), streams().batch(1, 2)]))


def test_a_window_may_be_shorter_or_longer_than_a_pass():
    short = streams(timeline=Timeline(((0, 1), (2, 3)), (0, 0), (3, 9)))
    assert (short.length(0), short.length(1)) == (15, 45)
    assert len(short.seen(0)) == 15
    assert len(short.seen(1)) == 23
