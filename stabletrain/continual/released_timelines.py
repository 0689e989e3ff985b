"""The windows of the released parallel-continual-learning experiments, as data. Imports nothing.

Source: the timelines published with "Towards stable training of parallel continual learning" (2024); a step is a batch.
CIFAR-100 and Tiny-ImageNet have the same three timelines for each of their three label sets; those of EMNIST ByClass
depend on the label set, because their tasks are of unequal length.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReleasedTimeline:
    """First steps, classes of each task, and the batch size that they were made for."""

    starts: tuple[int, ...]
    class_counts: tuple[int, ...]
    batch_size: int


_CIFAR = ((10,) * 10, 128)
_TINY = ((20,) * 10, 32)
_EMNIST = ((12, 12, 12, 13, 13), 128)

RELEASED: dict[str, ReleasedTimeline] = {
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
