"""What a data set is to the rest of the program: two splits, a source of images each, and a short description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]  # [N, H, W, C]
Labels = NDArray[np.int32]  # [N]


class ImageSource(Protocol):
    """Images by index: held in memory, or decoded when they are asked for."""

    shape: tuple[int, int, int]
    """(H, W, C) of every image."""

    def __len__(self) -> int: ...

    def read(self, indices: NDArray[np.integer]) -> Images:
        """The images at `indices` [B], as uint8 [B, H, W, C]. Raises `DataError` naming a file that cannot be read."""

    def array(self) -> Images | None:
        """All images as one array, or None when they are too many to hold in memory."""


@dataclass(frozen=True)
class Split:
    """One split: images and, where there are any, a label per image."""

    images: ImageSource
    labels: Labels | None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class DataSpec:
    """The description that a run keeps, from which a network can be built without the data."""

    name: str
    image_size: int
    channels: int
    num_classes: int
    """0 for data without labels."""
    class_names: tuple[str, ...]
    fingerprint: str
    """SHA-256 of the content; independent of paths and times."""
    train_count: int
    test_count: int
    context_shape: tuple[int, ...] = ()
    """(L, D) of the text features beside each image of latents; () for everything else."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values for record.json."""
        values = {**asdict(self), "class_names": list(self.class_names)}
        context = values.pop("context_shape")
        return {**values, "context_shape": list(context)} if context else values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        context = tuple(values.get("context_shape", ()))
        return cls(**{**values, "class_names": tuple(values["class_names"]), "context_shape": context})


@dataclass(frozen=True)
class Dataset:
    """A named data set with a train and a test split (the test split may be empty)."""

    spec: DataSpec
    train: Split
    test: Split

    @property
    def name(self) -> str:
        """The name by which it was asked for."""
        return self.spec.name
