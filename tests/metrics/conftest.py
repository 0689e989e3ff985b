"""Small data sets and a context, for the tests of the metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stabletrain.data.arrays import digits
from stabletrain.data.sources import ArraySource
from stabletrain.data.spec import Dataset, DataSpec, Split


class Context:
    """An evaluation context that remembers its ticks, and raises at the tick that it is told to."""

    def __init__(self, scratch: Path, stop_at: int | None = None) -> None:
        self.scratch = scratch
        self.ticks: list[tuple[str, int, int]] = []
        self.stop_at = stop_at

    def tick(self, label: str, done: int, total: int) -> None:
        self.ticks.append((label, done, total))
        if self.stop_at is not None and len(self.ticks) >= self.stop_at:
            raise KeyboardInterrupt


@pytest.fixture
def context(tmp_path: Path) -> Context:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Context(scratch)


def make_dataset(train, train_labels, test, test_labels, *, name="stripes", num_classes=None) -> Dataset:
    """A data set of given arrays; labels may be None."""
    classes = num_classes if num_classes is not None else (0 if train_labels is None else int(train_labels.max()) + 1)
    spec = DataSpec(
        name=name,
        image_size=train.shape[1],
        channels=train.shape[-1],
        num_classes=classes,
        class_names=tuple(map(str, range(classes))),
        fingerprint=f"{name}-{train.sum()}-{test.sum()}",
        train_count=len(train),
        test_count=len(test),
    )
    return Dataset(spec, Split(ArraySource(train), train_labels), Split(ArraySource(test), test_labels))


def stripes(count: int, size: int, channels: int, num_classes: int, seed: int = 0):
    """Images whose class is the direction and the width of their stripes, with noise: easy for a convolution."""
    generator = np.random.default_rng(seed)
    labels = (np.arange(count) % num_classes).astype(np.int32)
    angles = np.pi * labels / num_classes
    y, x = np.mgrid[:size, :size]
    phase = x[None] * np.cos(angles)[:, None, None] + y[None] * np.sin(angles)[:, None, None]
    wave = np.sin(phase * 1.5 + generator.uniform(0, 6, count)[:, None, None])
    images = 127 + 60 * wave[..., None] + generator.normal(0, 15, (count, size, size, channels))
    return np.clip(images, 0, 255).astype(np.uint8), labels


@pytest.fixture(scope="session")
def digits_dataset() -> Dataset:
    raw = digits()
    return make_dataset(
        raw.train_images, raw.train_labels, raw.test_images, raw.test_labels, name="digits", num_classes=10
    )
