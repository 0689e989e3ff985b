"""The metrics of training steps, as one packed array from the device and as one mapping per step on the host."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

Layout = Mapping[str, tuple[int, int | None]]
"""Metric name -> where its values begin in a packed row, and how many they are; None for a scalar."""


def layout_of(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Where each metric stands when all are flattened one behind the other. `shapes`: name -> shape, in that order."""
    layout: dict[str, tuple[int, int | None]] = {}
    start = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        layout[name] = (start, size if shape else None)
        start += size
    return layout


class StepRow(Mapping[str, Any]):
    """The metrics of one step by name: a float, or a list of floats for a vector.

    Of the hundreds of metrics of a step the loop reads a few, and all only at incidents: none is taken out of the
    packed row before it is asked for.
    """

    __slots__ = ("_values", "layout")

    def __init__(self, layout: Layout, values: Sequence[float]) -> None:
        self.layout = layout
        self._values = values

    def __getitem__(self, name: str) -> Any:
        start, size = self.layout[name]
        return self._values[start] if size is None else self._values[start : start + size]

    def get(self, name: str, default: Any = None) -> Any:
        """As a dictionary's, without the exception that `Mapping` would raise and catch."""
        return self[name] if name in self.layout else default

    def __contains__(self, name: object) -> bool:
        return name in self.layout

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def __repr__(self) -> str:
        return f"StepRow({dict(self)})"


class StepMetrics:
    """The metrics of the steps of one dispatch, still on the device: one array, so that fetching is one copy."""

    def __init__(self, packed: jax.Array, layout: Layout, count: int) -> None:
        self._packed = packed  # [at least count, sum of sizes] float32
        self._layout = layout
        self._count = count

    def __len__(self) -> int:
        return self._count

    def block_until_ready(self) -> StepMetrics:
        """Waits until the steps are done."""
        self._packed.block_until_ready()
        return self

    def rows(self) -> list[StepRow]:
        """The metrics of each step, in order. Waits for the steps."""
        return [StepRow(self._layout, values) for values in np.asarray(self._packed)[: self._count].tolist()]
