"""Arrays of a published checkpoint, taken one by one into our layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from stabletrain.errors import DataError


class CheckpointReader:
    """Takes arrays by name, each once, in float32 and of the shape that is due."""

    def __init__(self, path: Path, arrays: Mapping[str, np.ndarray], network: str) -> None:
        self.path = path
        self.left = dict(arrays)
        self.network = network

    def take(self, name: str, shape: tuple[int | None, ...] | None = None) -> np.ndarray:
        """Raises: `DataError` for a missing array, or one of another shape (None stands for any length)."""
        if name not in self.left:
            raise DataError(f"{self.path} lacks {name}, which every {self.network} has")
        array = self.left.pop(name)
        fits = shape is None or (
            array.ndim == len(shape) and all(due in (None, found) for due, found in zip(shape, array.shape))
        )
        if not fits:
            raise DataError(f"{self.path}: {name} has shape {array.shape}, but {shape} is due")
        return np.ascontiguousarray(array, np.float32)

    def linear(self, name: str, inputs: int, outputs: int, bias: bool = True) -> dict[str, np.ndarray]:
        kernel = self.take(f"{name}.weight", (outputs, inputs)).T
        return {"kernel": kernel, "bias": self.take(f"{name}.bias", (outputs,))} if bias else {"kernel": kernel}

    def convolution(self, name: str, inputs: int | None, outputs: int | None, size: int = 3) -> dict[str, np.ndarray]:
        kernel = self.take(f"{name}.weight", (outputs, inputs, size, size)).transpose(2, 3, 1, 0)
        return {"kernel": kernel, "bias": self.take(f"{name}.bias", (kernel.shape[-1],))}

    def norm(self, name: str, width: int) -> dict[str, np.ndarray]:
        return {"scale": self.take(f"{name}.weight", (width,)), "bias": self.take(f"{name}.bias", (width,))}

    def refuse_leftovers(self) -> None:
        """Nothing in a checkpoint is dropped silently."""
        if self.left:
            shown = ", ".join(sorted(self.left)[:3])
            raise DataError(
                f"{self.path} has {len(self.left)} arrays that our {self.network.split()[0]} has no place for: {shown}"
            )
