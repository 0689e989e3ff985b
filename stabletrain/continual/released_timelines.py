"""The windows of the released parallel-continual-learning experiments, as data. Imports data only.

Source: the timelines published with "Towards stable training of parallel continual learning" (2024); a step is a batch.
CIFAR-100 and Tiny-ImageNet have the same three timelines for each of their three label sets; those of EMNIST ByClass
depend on the label set, because their tasks are of unequal length. `cifar100-l1-t0` has the second published label set,
`cifar100-t0` the same windows with label sets that the seed draws.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from stabletrain.continual.released_label_sets import RELEASED_LABEL_SETS


@dataclass(frozen=True)
class ReleasedTimeline:
    """First steps, classes of each task, and the batch size that they were made for.

    `classes`: the published label set; () where the seed draws one.
    """

    starts: tuple[int, ...]
    class_counts: tuple[int, ...]
    batch_size: int
    classes: tuple[tuple[int, ...], ...] = ()


_CIFAR = ((10,) * 10, 128)
_TINY = ((20,) * 10, 32)
_EMNIST = ((12, 12, 12, 13, 13), 128)

_WINDOWS: dict[str, ReleasedTimeline] = {
    "cifar100-t0": ReleasedTimeline((0, 19, 57, 69, 93, 108, 131, 157, 187, 217), *_CIFAR),
    "cifar100-t1": ReleasedTimeline((0, 11, 45, 47, 50, 57, 92, 108, 124, 126), *_CIFAR),
    "cifar100-t2": ReleasedTimeline((0, 35, 46, 63, 91, 122, 137, 170, 206, 239), *_CIFAR),
    "tiny-imagenet-t0": ReleasedTimeline((0, 303, 514, 808, 861, 1065, 1217, 1360, 1537, 1816), *_TINY),
    "tiny-imagenet-t1": ReleasedTimeline((0, 203, 493, 495, 734, 897, 951, 1072, 1344, 1616), *_TINY),
    "tiny-imagenet-t2": ReleasedTimeline((0, 35, 63, 119, 302, 402, 691, 892, 947, 966), *_TINY),
    "emnist-byclass-l0-t0": ReleasedTimeline((0, 815, 1538, 2856, 3933), *_EMNIST),
    "emnist-byclass-l0-t1": ReleasedTimeline((0, 203, 205, 444, 895), *_EMNIST),
    "emnist-byclass-l0-t2": ReleasedTimeline((0, 547, 878, 1418, 2419), *_EMNIST),
    "emnist-byclass-l1-t0": ReleasedTimeline((0, 815, 1538, 1832, 2909), *_EMNIST),
    "emnist-byclass-l1-t1": ReleasedTimeline((0, 203, 205, 444, 895), *_EMNIST),
    "emnist-byclass-l1-t2": ReleasedTimeline((0, 331, 871, 1439, 2430), *_EMNIST),
    "emnist-byclass-l2-t0": ReleasedTimeline((0, 815, 1538, 2615, 2819), *_EMNIST),
    "emnist-byclass-l2-t1": ReleasedTimeline((0, 203, 205, 444, 895), *_EMNIST),
    "emnist-byclass-l2-t2": ReleasedTimeline((0, 1571, 1902, 2442, 3010), *_EMNIST),
}


def _with_label_sets() -> dict[str, ReleasedTimeline]:
    """The windows with the label sets they were published for; of CIFAR-100 and Tiny-ImageNet also without."""
    found = {name: timeline for name, timeline in _WINDOWS.items() if "-l" not in name}
    for data, label_sets in RELEASED_LABEL_SETS.items():
        for number, classes in enumerate(label_sets):
            for window in range(3):
                name = f"{data}-l{number}-t{window}"
                found[name] = replace(_WINDOWS.get(name) or _WINDOWS[f"{data}-t{window}"], classes=classes)
    return found


RELEASED: dict[str, ReleasedTimeline] = _with_label_sets()


def released_name(data: str, seed: int) -> str | None:
    """The released timeline of a seed: seeds 0 to 8 are the nine combinations of label sets and windows, and so are 9
    to 17 and 18 to 26, so that 27 seeds are the published 27 runs. None for other data.
    """
    return f"{data}-l{seed % 3}-t{seed // 3 % 3}" if data in RELEASED_LABEL_SETS else None
