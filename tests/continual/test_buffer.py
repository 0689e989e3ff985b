"""The rehearsal buffer: quotas, uniformity, and that it is a function of (seed, timeline, step)."""

from __future__ import annotations

import numpy as np
import pytest

from stabletrain.continual.buffer import RehearsalBuffer, herd
from stabletrain.continual.presets import BUFFER_NAMES, FROM_STREAM
from stabletrain.continual.streams import Streams
from stabletrain.continual.timeline import Timeline
from stabletrain.errors import ConfigError

LABELS = np.arange(120, dtype=np.int32) % 6
TIMELINE = Timeline(((0, 1), (2, 3), (4, 5)), (0, 4, 4), (10, 10, 10))  # 40 examples a task, batches of 4
FEATURES = np.random.default_rng(0).standard_normal((120, 3)).astype(np.float32)


def buffer(rule: str, capacity: int = 18, seed: int = 0, timeline: Timeline = TIMELINE) -> RehearsalBuffer:
    streams = Streams(LABELS, timeline, batch_size=4, epochs=1, seed=seed)
    return RehearsalBuffer(rule, capacity, streams, LABELS, seed=seed, features=FEATURES)


@pytest.mark.parametrize("rule", ["released", "herding"])
def test_quotas_at_task_ends(rule):
    """18 examples: nothing before the first end, 9 a class after it; two tasks end together, then 3 a class."""
    rehearsal = buffer(rule)
    for step, classes, quota in ((9, 0, 0), (10, 2, 9), (13, 2, 9), (14, 6, 3), (20, 6, 3)):
        content = rehearsal.content(step)
        kept = content[content >= 0]
        assert len(kept) == classes * quota, step
        assert len(set(kept.tolist())) == len(kept)
        assert set(np.bincount(LABELS[kept], minlength=6).tolist()) <= {0, quota}
    # Classes that were there before are thinned, not drawn anew.
    first, later = rehearsal.content(10), rehearsal.content(14)
    assert set(later[(later >= 0) & (LABELS[later] < 2)]) <= set(first)


@pytest.mark.parametrize("rule", BUFFER_NAMES)
def test_the_content_is_a_function_of_the_step(rule):
    whole = buffer(rule)
    forward = [whole.content(step).copy() for step in range(15)]
    for step in (14, 3, 10):
        np.testing.assert_array_equal(buffer(rule).content(step), forward[step])
        np.testing.assert_array_equal(buffer(rule).replay(step, 5), whole.replay(step, 5))
    # Herding chooses by the examples alone: there is nothing to draw.
    assert np.array_equal(buffer(rule, seed=1).content(14), forward[14]) == (rule == "herding")


@pytest.mark.parametrize("rule", BUFFER_NAMES)
def test_nothing_is_in_it_that_was_not_seen_before(rule):
    rehearsal = buffer(rule)
    examples, steps = Streams(LABELS, TIMELINE, batch_size=4, epochs=1, seed=0).arrivals()
    for step in range(15):
        content = rehearsal.content(step)
        assert set(content[content >= 0]) <= set(examples[steps < step])
        assert len(content) == 18


@pytest.mark.parametrize("rule", FROM_STREAM)
def test_slots_of_arrivals_are_where_they_lie_afterwards(rule):
    """Carrying the slots forward step by step, as stored logits are, gives the content."""
    rehearsal = buffer(rule)
    streams = Streams(LABELS, TIMELINE, batch_size=4, epochs=1, seed=0)
    carried = np.full(18, -1)
    for step in range(TIMELINE.steps):
        np.testing.assert_array_equal(rehearsal.content(step), carried)
        for task in TIMELINE.active(step):
            batch = streams.batch(task, step)
            slots = rehearsal.arrivals(step, batch)
            carried[slots[slots >= 0]] = batch[slots >= 0]


def test_a_reservoir_holds_every_example_with_the_same_chance():
    """400 seeds, 18 of 120: an example is expected 60 times, with a deviation of 7.1; 5 deviations allowed."""
    counts = np.zeros(120)
    for seed in range(400):
        counts[buffer("reservoir", seed=seed).content(14)] += 1
    assert counts.sum() == 400 * 18
    assert abs(counts - 60).max() < 36


def test_class_balance_survives_an_unbalanced_stream():
    """Task 0 has ended before the others begin; a reservoir leaves its classes what they are of the stream."""
    serial = Timeline(((0,), (1, 2, 3, 4, 5)), (0, 5), (5, 25))
    content = buffer("class-balanced", timeline=serial).content(30)
    counts = np.bincount(LABELS[content], minlength=6)
    np.testing.assert_array_equal(counts, 3)


def test_replay_draws_without_replacement_and_draws_are_independent():
    rehearsal = buffer("reservoir")
    first, second = rehearsal.replay(12, 10), rehearsal.replay(12, 10, draw=1)
    assert len(set(first.tolist())) == 10
    assert not np.array_equal(first, second)
    assert len(buffer("released").replay(9, 5)) == 0
    only = rehearsal.content(12)[rehearsal.replay(12, 18, classes=(0, 1))]
    assert set(LABELS[only]) <= {0, 1}


def test_herding_follows_the_mean_closer_than_chance():
    rng = np.random.default_rng(3)
    features = rng.standard_normal((200, 8)).astype(np.float32)
    chosen = herd(features, 10)
    assert len(set(chosen)) == 10
    assert herd(features, 4) == chosen[:4], "a smaller quota is a beginning of a larger one"
    mean = features.mean(0)
    distance = np.linalg.norm(features[chosen].mean(0) - mean)
    random = [np.linalg.norm(features[rng.choice(200, 10, False)].mean(0) - mean) for _ in range(100)]
    assert distance < min(random) / 2


def test_an_empty_buffer_is_refused():
    with pytest.raises(ConfigError, match="holds nothing"):
        buffer("released", capacity=0)
