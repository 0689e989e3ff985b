"""Timelines: label sets and windows, the released ones, and files."""

from __future__ import annotations

import numpy as np
import pytest

from stabletrain.continual.released_label_sets import RELEASED_LABEL_SETS
from stabletrain.continual.released_timelines import RELEASED, released_name
from stabletrain.continual.timeline import Timeline, arrange, make_timeline, split_classes, unbalanced_classes
from stabletrain.errors import ConfigError

DIGITS = np.full(10, 144)


def made(name: str, counts: np.ndarray = DIGITS, **options) -> Timeline:
    values = {"batch_size": 16, "epochs": 1, "tasks": 5, "label_seed": 0, "timeline_seed": 0, **options}
    return make_timeline(name, counts, **values)


def test_the_generator_leaves_no_step_idle_and_begins_tasks_in_order():
    durations = [5, 1, 9, 3, 3, 7]
    for seed in range(200):
        starts = arrange("random", durations, np.random.default_rng(seed))
        timeline = Timeline(tuple((i,) for i in range(6)), tuple(starts), tuple(durations))
        assert starts[0] == 0
        assert starts == sorted(starts)
        assert all(timeline.active(step) for step in range(timeline.steps))


def test_the_generator_reaches_both_ends_of_its_interval():
    """s_2 is uniform on 0..e_1: with e_1 = 2 all of 0, 1, 2 come, 3 (serial) does not."""
    assert {arrange("random", [3, 4], np.random.default_rng(seed))[1] for seed in range(100)} == {0, 1, 2}


def test_serial_parallel_and_staggered():
    rng = np.random.default_rng(0)
    assert arrange("serial", [3, 4, 5], rng) == [0, 3, 7]
    assert arrange("parallel", [3, 4, 5], rng) == [0, 0, 0]
    assert arrange("staggered", [10, 10, 10], rng, overlap=0.3) == [0, 7, 14]
    assert arrange("staggered", [10, 4, 10], rng, overlap=0.0) == arrange("serial", [10, 4, 10], rng)
    with pytest.raises(ConfigError, match="unknown arrangement"):
        arrange("sideways", [1, 2], rng)


def test_windows_include_their_ends():
    timeline = Timeline(((0,), (1,)), (0, 2), (3, 2))
    assert timeline.ends == (2, 3)
    assert timeline.steps == 4
    assert [timeline.active(step) for step in range(5)] == [[0], [0], [0, 1], [1], []]
    assert [timeline.finished(step) for step in range(5)] == [[], [], [], [0], [0, 1]]
    assert timeline.most_active == 2
    assert timeline.mean_active == 5 / 4


@pytest.mark.parametrize(("classes", "tasks"), [(10, 5), (62, 5), (47, 5), (7, 7)])
def test_label_sets_part_the_classes(classes, tasks):
    sets = split_classes(classes, tasks, np.random.default_rng(1))
    assert sorted(label for own in sets for label in own) == list(range(classes))
    sizes = [len(own) for own in sets]
    assert max(sizes) - min(sizes) <= 1
    if classes == 62:
        assert sizes == [12, 12, 12, 13, 13], "as released for EMNIST ByClass"


def test_unbalanced_tasks_stay_in_their_range_and_add_up():
    for seed in range(50):
        sizes = [len(own) for own in unbalanced_classes(100, 20, 2, 14, np.random.default_rng(seed))]
        assert sum(sizes) == 100
        assert min(sizes) >= 2
        assert max(sizes) <= 14
    with pytest.raises(ConfigError, match="cannot add up"):
        unbalanced_classes(100, 5, 2, 14, np.random.default_rng(0))


def test_durations_are_one_pass_over_the_data():
    timeline = made("serial", np.array([16, 17, 1, 1, 40, 40, 3, 3, 8, 8]))
    counts = np.array([16, 17, 1, 1, 40, 40, 3, 3, 8, 8])
    for own, duration in zip(timeline.classes, timeline.durations, strict=True):
        assert duration == -(-counts[list(own)].sum() // 16)
    twice = made("serial", epochs=2)
    assert sum(twice.durations) == 5 * (288 * 2 // 16)


def test_label_sets_and_windows_have_seeds_of_their_own():
    one, other_labels, other_windows = made("random"), made("random", label_seed=1), made("random", timeline_seed=1)
    assert one == made("random")
    assert other_labels.classes != one.classes
    assert other_labels.starts == one.starts
    assert other_windows.classes == one.classes
    assert other_windows.starts != one.starts


RELEASED_FACTS = {
    "cifar100-t0": (257, np.full(100, 500)), "cifar100-t1": (166, np.full(100, 500)),
    "cifar100-t2": (279, np.full(100, 500)), "tiny-imagenet-t0": (2129, np.full(200, 500)),
    "tiny-imagenet-t1": (1929, np.full(200, 500)), "tiny-imagenet-t2": (1279, np.full(200, 500)),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED_FACTS)
def test_released_timelines_have_their_published_length(name):
    steps, counts = RELEASED_FACTS[name]
    timeline = made(name, counts, batch_size=RELEASED[name].batch_size)
    assert timeline.steps == steps
    assert all(timeline.active(step) for step in range(steps)), "no idle step"
    assert timeline.most_active <= 5


@pytest.mark.parametrize("data", RELEASED_LABEL_SETS)
def test_released_label_sets_are_permutations_of_all_classes(data):
    """Three different ones, of the sizes that the windows were made for; the first and the last class as published."""
    sets, first_and_last = RELEASED_LABEL_SETS[data], []
    for number, classes in enumerate(sets):
        whole = [label for own in classes for label in own]
        assert sorted(whole) == list(range(len(whole)))
        assert tuple(len(own) for own in classes) == RELEASED[f"{data}-l{number}-t0"].class_counts
        first_and_last.append((whole[0], whole[-1]))
    assert first_and_last == PUBLISHED_ENDS[data]


PUBLISHED_ENDS = {
    "cifar100": [(40, 47), (13, 75), (59, 35)],
    "tiny-imagenet": [(197, 47), (77, 34), (69, 35)],
    "emnist-byclass": [(21, 47), (60, 11), (2, 35)],
}


def test_a_released_timeline_has_its_label_set_or_the_seed_s():
    counts = np.full(100, 500)
    published = made("cifar100-l1-t2", counts, batch_size=128)
    assert published.classes == RELEASED_LABEL_SETS["cifar100"][1]
    drawn = made("cifar100-t2", counts, batch_size=128)
    assert drawn.starts == published.starts
    assert drawn.classes != published.classes


def test_nine_seeds_are_the_nine_published_combinations():
    names = [released_name("emnist-byclass", seed) for seed in range(27)]
    assert len(set(names)) == 9
    assert set(names) <= set(RELEASED)
    assert all(names.count(name) == 3 for name in names)
    assert released_name("digits", 0) is None


def test_a_released_timeline_refuses_other_data_and_batches():
    with pytest.raises(ConfigError, match="100 classes, --batch-size 128"):
        made("cifar100-t0")
    with pytest.raises(ConfigError, match="--batch-size 128"):
        made("cifar100-t0", np.full(100, 500), batch_size=64)


def test_a_file_round_trips_and_may_cut_a_stream_short(tmp_path):
    import tomli_w

    timeline = made("random")
    path = tmp_path / "timeline.toml"
    path.write_text(tomli_w.dumps(timeline.to_dict()))
    assert made(str(path)) == timeline
    path.write_text("[[task]]\nclasses = [0, 1]\nstart = 0\nsteps = 4\n[[task]]\nclasses = [2]\nstart = 2\n")
    read = made(str(path))
    assert read.durations == (4, 9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[task]]\nclasses = [0]\n", "task 0: takes classes, start"),
        ("[[task]]\nclasses = [0]\nstart = 0\n[[task]]\nclasses = [0]\nstart = 1", "class 0 belongs to task 0 and"),
        ("[[task]]\nclasses = [12]\nstart = 0\n", "class 12 is not one of 0 to 9"),
        ("[[task]]\nclasses = []\nstart = 0\nsteps = 3", "task 0 has no class"),
        ("[[task]]\nclasses = [1]\nstart = -1\n", "starts at -1"),
        ("[[task]]\nclasses = [1.5]\nstart = 1\n", "whole numbers"),
        ("[[task]]\nclasses = 3\nstart = 1\n", "classes are a list"),
        ("[[task]]\nclasses = [1]\nstart = 1\nsteps = 0", "lasts 0 steps"),
        ("task = [3]", "expected a table"),
        ("tasks = 3", "is no timeline"),
        ("= 3", "cannot read"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        made(str(path))
