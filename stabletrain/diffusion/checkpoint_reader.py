"""Arrays of a published checkpoint, taken one by one into our layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stabletrain.errors import DataError
from stabletrain.nn.torch_file import read_arrays

FIRST_KERNELS = ("patch_embed.proj.weight", "input_blocks.0.0.weight", "conv_in.weight")
"""The array by which each known way of naming is told: U-ViT's, improved DDPM's and ADM's, DDPM's."""


@dataclass(frozen=True)
class Checkpoint:
    """The network of a file: its arrays by name, without what the file puts before the names."""

    path: Path
    arrays: Mapping[str, np.ndarray]
    chosen: str = ""
    """What the file calls this network, where it holds others too."""


def open_checkpoint(path: Path) -> Checkpoint:
    """The network that a file holds: alone, within a container, or beside others and the state of an optimiser.

    Of a network and its moving average the average is taken: what is called "ema", or the last of a list, as the
    released code of DDIM writes it: [network, optimiser, epoch, step, average]. "module." before names is dropped.
    Raises: `DataError` for no weights file, for no known network and for several of which none is an average.
    """
    arrays = read_arrays(path)
    before = [
        name.removesuffix(kernel)
        for name in arrays
        for kernel in FIRST_KERNELS
        if name == kernel or name.endswith(f".{kernel}")
    ]
    if not before:
        first = ", ".join(sorted(arrays)[:3])
        raise DataError(
            f"{path} is no checkpoint of U-ViT, DDPM, improved DDPM or ADM: its arrays are called {first}, ..."
        )
    if len(before) == 1:
        chosen = before[0]
    elif averages := [name for name in before if "ema" in re.split("[._]", name.lower())]:
        chosen = averages[0]
    elif all(name.split(".")[0].isdecimal() for name in before):
        chosen = max(before, key=lambda name: int(name.split(".")[0]))
    else:
        names = ", ".join(repr(name.rstrip(".")) for name in before)
        raise DataError(f"{path} holds {len(before)} networks, and none is called an average (ema): {names}")
    network = {name.removeprefix(chosen): array for name, array in arrays.items() if name.startswith(chosen)}
    return Checkpoint(path, network, chosen.rstrip(".") if len(before) > 1 else "")


def refuse_no_pictures(path: Path, channels: int) -> None:
    """Raises: `DataError` for a network of other channels than pictures have."""
    if channels not in (1, 3):
        raise DataError(
            f"{path} is a network of {channels} channels, and pictures have 1 or 3: networks of latents without texts, "
            "and those that enlarge a picture, cannot be used here"
        )


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
