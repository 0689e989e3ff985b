"""Timelines: which classes each task has, and over which steps its data stream is open.

Task t has the classes Y_t (no class belongs to two tasks) and the access window [s_t, e_t] on one global axis of steps,
ends included: its data are streamed once (or `epochs` times), d_t = ceil(n_t epochs / B) batches, e_t = s_t + d_t - 1.
At step i the tasks with s_t <= i <= e_t are active. One task after the other is the special case s_(t+1) = e_t + 1
("serial"), all at once is s_t = 0 ("parallel"), and between the two lies what parallel continual learning is about.

Imports no JAX.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.continual.presets import ARRANGEMENTS
from stabletrain.continual.released_timelines import RELEASED
from stabletrain.errors import ConfigError


@dataclass(frozen=True)
class Timeline:
    """Classes, first step and number of steps of each task, in the order of the tasks' numbers."""

    classes: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    durations: tuple[int, ...]

    def __post_init__(self) -> None:
        for problem in _problems(self.classes, self.starts, self.durations):
            raise ConfigError(f"impossible timeline: {problem}")

    @property
    def tasks(self) -> int:
        """T."""
        return len(self.starts)

    @property
    def ends(self) -> tuple[int, ...]:
        """e_t: the last step of each task, itself included."""
        return tuple(start + duration - 1 for start, duration in zip(self.starts, self.durations, strict=True))

    @property
    def steps(self) -> int:
        """Steps until the last task has ended."""
        return max(self.ends) + 1

    def active(self, step: int) -> list[int]:
        """The tasks whose window holds `step`, by rising number."""
        return [t for t, (s, e) in enumerate(zip(self.starts, self.ends, strict=True)) if s <= step <= e]

    def finished(self, step: int) -> list[int]:
        """The tasks that ended before `step`, by rising number."""
        return [t for t, end in enumerate(self.ends) if end < step]

    def begun(self, step: int) -> list[int]:
        """The tasks that have started at `step` or before."""
        return [t for t, start in enumerate(self.starts) if start <= step]

    @property
    def most_active(self) -> int:
        """The largest number of tasks that are active at once; it can only rise where a task starts."""
        return max(len(self.active(start)) for start in self.starts)

    @property
    def mean_active(self) -> float:
        """Active tasks per step on average: how many times fewer steps than one task after the other."""
        return sum(self.durations) / self.steps

    def task_of_class(self, num_classes: int) -> np.ndarray:
        """int32 [C]: the task of each class, -1 for a class that no task has."""
        owner = np.full(num_classes, -1, np.int32)
        for task, classes in enumerate(self.classes):
            owner[list(classes)] = task
        return owner

    def to_dict(self) -> dict[str, Any]:
        """As a timeline file has it."""
        rows = zip(self.classes, self.starts, self.durations, strict=True)
        return {"task": [{"classes": list(c), "start": s, "steps": d} for c, s, d in rows]}


def _problems(classes: Sequence[Sequence[int]], starts: Sequence[int], durations: Sequence[int]) -> list[str]:
    found = []
    if not starts:
        found.append("it has no task")
    if not len(classes) == len(starts) == len(durations):
        found.append(f"{len(classes)} label sets, {len(starts)} starts and {len(durations)} lengths")
    owner: dict[int, int] = {}
    for task, own in enumerate(classes):
        if not own:
            found.append(f"task {task} has no class")
        for label in own:
            if label in owner:
                found.append(f"class {label} belongs to task {owner[label]} and to task {task}")
            owner[label] = task
    for task, (start, duration) in enumerate(zip(starts, durations, strict=False)):
        if start < 0 or duration < 1:
            found.append(f"task {task} starts at {start} and lasts {duration} steps")
    return found


# --- label sets -------------------------------------------------------------------------------------------------------


def split_classes(num_classes: int, tasks: int, rng: np.random.Generator) -> tuple[tuple[int, ...], ...]:
    """All classes in random order, cut into tasks of equal size (the last ones have one more where it does not divide).

    Raises: `ConfigError` for more tasks than classes.
    """
    if tasks > num_classes:
        raise ConfigError(f"--tasks {tasks} is more than the {num_classes} classes of the data")
    sizes = [num_classes // tasks + (task >= tasks - num_classes % tasks) for task in range(tasks)]
    return _cut(_permuted(num_classes, rng), sizes)


def unbalanced_classes(
    num_classes: int, tasks: int, smallest: int, largest: int, rng: np.random.Generator
) -> tuple[tuple[int, ...], ...]:
    """Tasks of U{smallest..largest} classes, drawn anew until all classes are given out.

    The released generator draws 20 tasks of U{2..14} classes for CIFAR-100 and of U{2..24} for Tiny-ImageNet.

    Raises: `ConfigError` when no such sizes add up to the number of classes.
    """
    if not tasks * smallest <= num_classes <= tasks * largest:
        raise ConfigError(
            f"{tasks} tasks of {smallest} to {largest} classes cannot add up to the {num_classes} classes of the data"
        )
    sizes: list[int] = []
    for task in range(tasks):
        left, after = num_classes - sum(sizes), tasks - task - 1
        low, high = max(smallest, left - after * largest), min(largest, left - after * smallest)
        sizes.append(int(rng.integers(low, high + 1)))
    rng.shuffle(sizes)
    return _cut(_permuted(num_classes, rng), sizes)


def _permuted(count: int, rng: np.random.Generator) -> list[int]:
    # Ranks of random numbers: what `permutation` makes of the stream may change between versions of NumPy (NEP 19).
    return np.argsort(rng.random(count), kind="stable").tolist()


def _cut(order: list[int], sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    bounds = np.cumsum([0, *sizes])
    return tuple(tuple(order[low:high]) for low, high in itertools.pairwise(bounds))


# --- windows ----------------------------------------------------------------------------------------------------------


def arrange(arrangement: str, durations: Sequence[int], rng: np.random.Generator, overlap: float = 0.5) -> list[int]:
    """First steps of windows of these lengths.

    `random` is the released generator: s_1 = 0 and s_i uniform on the whole numbers from s_(i-1) to the later of the
    ends so far, so that there is never an idle step. `serial`: one task after the other. `parallel`: all from step 0.
    `staggered`: each task starts when the share `overlap` of the one before it is still to come.

    Raises: `ConfigError` for an unknown arrangement.
    """
    starts: list[int] = [0]
    for i in range(1, len(durations)):
        last_end = max(start + length - 1 for start, length in zip(starts, durations, strict=False))
        if arrangement == "random":
            starts.append(int(rng.integers(starts[-1], last_end + 1)))
        elif arrangement == "serial":
            starts.append(last_end + 1)
        elif arrangement == "parallel":
            starts.append(0)
        elif arrangement == "staggered":
            starts.append(starts[-1] + durations[i - 1] - round(overlap * durations[i - 1]))
        else:
            raise ConfigError(f"unknown arrangement {arrangement!r}: {', '.join(ARRANGEMENTS)}")
    return starts


def make_timeline(
    name: str,
    class_counts: np.ndarray,
    *,
    batch_size: int,
    epochs: int,
    tasks: int,
    label_seed: int,
    timeline_seed: int,
    overlap: float = 0.5,
    class_range: tuple[int, int] | None = None,
) -> Timeline:
    """The timeline called `name` (an arrangement, or a released one), or the one that the file `name` holds.

    `class_counts` [C]: training examples of each class, from which the lengths follow. `label_seed` draws the label
    sets, `timeline_seed` the windows, so that three of each make the nine combinations of the published protocol.
    `class_range` (smallest, largest): unbalanced tasks; None: tasks of equal numbers of classes.

    Raises: `ConfigError` for an unknown name, a file that is none, and what the data do not allow.
    """
    labels_rng = np.random.Generator(np.random.Philox(key=np.array([label_seed, 1], np.uint64)))
    windows_rng = np.random.Generator(np.random.Philox(key=np.array([timeline_seed, 2], np.uint64)))
    if name.endswith(".toml"):
        return read_timeline(Path(name), class_counts, batch_size=batch_size, epochs=epochs)
    num_classes = len(class_counts)
    if name in RELEASED:
        return _released(name, class_counts, batch_size, epochs, labels_rng)
    if class_range is not None:
        classes = unbalanced_classes(num_classes, tasks, class_range[0], class_range[1], labels_rng)
    else:
        classes = split_classes(num_classes, tasks, labels_rng)
    durations = [_duration(own, class_counts, batch_size, epochs) for own in classes]
    return Timeline(classes, tuple(arrange(name, durations, windows_rng, overlap)), tuple(durations))


def _duration(classes: Sequence[int], class_counts: np.ndarray, batch_size: int, epochs: int) -> int:
    examples = int(class_counts[list(classes)].sum())
    if not examples:
        raise ConfigError(f"there is no training example of the classes {', '.join(map(str, classes))} of a task")
    return -(-examples * epochs // batch_size)


def _released(name: str, class_counts: np.ndarray, batch_size: int, epochs: int, rng: np.random.Generator) -> Timeline:
    """The released starts with the released label set, or with one drawn here where the name has none.

    Raises: `ConfigError` for data or a batch they are not made for.
    """
    starts, sizes, released_batch = RELEASED[name].starts, RELEASED[name].class_counts, RELEASED[name].batch_size
    if sum(sizes) != len(class_counts) or batch_size != released_batch or epochs != 1:
        raise ConfigError(
            f"timeline {name} is made for {sum(sizes)} classes, --batch-size {released_batch} and one epoch; here: "
            f"{len(class_counts)} classes, --batch-size {batch_size}, {epochs} epochs"
        )
    classes = RELEASED[name].classes or _cut(_permuted(len(class_counts), rng), sizes)
    return Timeline(classes, starts, tuple(_duration(own, class_counts, batch_size, 1) for own in classes))


def read_timeline(path: Path, class_counts: np.ndarray, *, batch_size: int, epochs: int) -> Timeline:
    """A timeline file: a `[[task]]` each with `classes`, `start`, and optionally `steps` (else one pass over its data).

    With `steps` fewer than a pass, the rest of the stream is never seen; more, and the stream goes round again.

    Raises: `ConfigError` for a file that is missing or wrong.
    """
    try:
        content: Mapping[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the timeline {path}: {error}") from error
    tasks = content.get("task")
    if not isinstance(tasks, list) or not tasks or set(content) != {"task"}:
        raise ConfigError(f"{path} is no timeline: expected a [[task]] for each task, and nothing else")
    classes, starts, durations = [], [], []
    for number, task in enumerate(tasks):
        if not isinstance(task, dict):
            raise ConfigError(f"{path}, task {number}: expected a table [[task]], got {task!r}")
        unknown = set(task) - {"classes", "start", "steps"}
        if unknown or not {"classes", "start"} <= set(task):
            raise ConfigError(f"{path}, task {number}: takes classes, start and optionally steps; has {sorted(task)}")
        if not isinstance(task["classes"], list):
            raise ConfigError(f"{path}, task {number}: classes are a list such as [0, 1], got {task['classes']!r}")
        whole = [*task["classes"], task["start"], task.get("steps", 1)]
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in whole):
            raise ConfigError(f"{path}, task {number}: classes, start and steps are whole numbers")
        for label in task["classes"]:
            if not 0 <= label < len(class_counts):
                raise ConfigError(f"{path}, task {number}: class {label} is not one of 0 to {len(class_counts) - 1}")
        classes.append(tuple(task["classes"]))
        starts.append(task["start"])
        if "steps" in task:
            durations.append(task["steps"])
        else:
            durations.append(_duration(classes[-1], class_counts, batch_size, epochs))
    return Timeline(tuple(classes), tuple(starts), tuple(durations))
