"""BigGAN checkpoints of PyTorch-StudioGAN (`.pth`) as parameters and statistics of our networks; read without PyTorch.

A layer with spectral normalisation has `weight_orig`, `weight_u` and `weight_v`; convolutions are [out, in, h, w] and
their v is in the order in, h, w (ours h, w, in); the generator's start is channel first. Blocks and attention are
numbered together. Source: Kang et al. 2021, names and layouts of the released code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.errors import ConfigError, DataError
from stabletrain.gan.channel_plan import BOTTOM, SIZES, residual_plan
from stabletrain.nn.torch_file import read_arrays

STATE_DICT = "state_dict."
"""Where a checkpoint has the network; optimiser and counters beside it are no part of an imported run."""

Trees = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class ImportedGenerator:
    """BigGAN's generator. `variables`: `params`, `batch_stats` and `spectral`, nested as ours."""

    image_size: int
    channels: int
    width: int
    z_dim: int
    num_classes: int
    shared_dim: int
    attention: tuple[int, ...]
    variables: Trees


@dataclass(frozen=True)
class ImportedDiscriminator:
    """BigGAN's discriminator with its head: the groups of the latter are named `head_...`."""

    blocks: int
    width: int
    attention: tuple[int, ...]
    head: str
    """`ac`, `embedding` (2C and D2D-CE) or `projection`."""
    num_classes: int
    embedding_dim: int
    """0 without embeddings."""
    variables: Trees


def read_generator(path: Path) -> ImportedGenerator:
    """The generator of a checkpoint (`model=G-...` or `model=G_ema-...`).

    Raises: `DataError` of one line: no weights file, another network, parts that ours has not (named), or arrays of
    shapes that do not fit each other.
    """
    reader = _Reader(path, "BigGAN generator", ("linear0.weight_orig", "shared.weight", "conv2d5.weight_orig"))
    blocks, attention = reader.blocks()
    size = BOTTOM * 2 ** len(blocks)
    if size not in SIZES:
        raise DataError(f"{path} has {len(blocks)} blocks, which make images of {size} pixels: known are {SIZES}")
    plan = residual_plan(size, 1, 1).generator
    rows, part = reader.shape("linear0.weight_orig", 2)
    width = rows // (BOTTOM * BOTTOM * plan[0])
    widths = tuple(width * multiple for multiple in plan)
    num_classes, shared_dim = reader.shape("shared.weight", 2)
    # Channel first in the file, channel last here.
    order = np.arange(rows).reshape(widths[0], BOTTOM * BOTTOM).T.reshape(-1) if rows == BOTTOM**2 * widths[0] else None
    if order is None:
        raise DataError(f"{path}: linear0 has {rows} rows, which are no start of BigGAN's at {size} pixels")
    reader.linear("linear0", "start", part, rows, order=order)
    reader.put("params", "shared/embedding", reader.take("shared.weight"))
    for number, (theirs, before, after) in enumerate(zip(blocks, widths[:-1], widths[1:], strict=True), start=1):
        ours = f"block_{number}"
        for place, channels in ((1, before), (2, after)):
            norm = f"{ours}/norm_{place}/batch"
            reader.running(f"{theirs}.bn{place}.bn", f"{norm}/norm", channels)
            for kind in ("gain", "bias"):
                reader.linear(f"{theirs}.bn{place}.{kind}", norm, part + shared_dim, channels, name=kind, bias=False)
        reader.convolution(f"{theirs}.conv2d0", f"{ours}/shortcut", before, after, 1)
        reader.convolution(f"{theirs}.conv2d1", f"{ours}/conv_1", before, after, 3)
        reader.convolution(f"{theirs}.conv2d2", f"{ours}/conv_2", after, after, 3)
    for place, theirs in attention.items():
        reader.attention(theirs, f"attention_{place}", widths[place])
    reader.running("bn4", "norm_out/batch", widths[-1])
    reader.put("params", "norm_out/batch/scale", reader.take("bn4.weight", (widths[-1],)))
    reader.put("params", "norm_out/batch/bias", reader.take("bn4.bias", (widths[-1],)))
    channels = reader.shape("conv2d5.weight_orig", 4)[0]
    reader.convolution("conv2d5", "out", widths[-1], channels, 3)
    reader.refuse_leftovers()
    z_dim = part * len(widths)
    return ImportedGenerator(size, channels, width, z_dim, num_classes, shared_dim, tuple(attention), reader.variables)


def read_discriminator(path: Path) -> ImportedDiscriminator:
    """The discriminator of a checkpoint (`model=D-...`) with the head of AC, 2C, D2D-CE or projection.

    Raises: `DataError`, as `read_generator` does.
    """
    reader = _Reader(path, "BigGAN discriminator", ("linear1.weight_orig", "blocks.0.0.conv2d1.weight_orig"))
    blocks, attention = reader.blocks()
    plans = {len(plan): plan for size in SIZES for plan in (residual_plan(size, 1, 1).discriminator,)}
    plan = plans.get(len(blocks))
    if plan is None:
        raise DataError(f"{path} has {len(blocks)} blocks, and no BigGAN discriminator has so many")
    after_first, channels, _, _ = reader.shape(f"{blocks[0]}.conv2d1.weight_orig", 4)
    width = after_first // plan[0]
    widths = (channels, *(width * multiple for multiple in plan))
    for number, (theirs, before, after) in enumerate(zip(blocks, widths[:-1], widths[1:], strict=True), start=1):
        ours = f"block_{number}"
        if f"{theirs}.conv2d0.weight_orig" in reader.left:
            reader.convolution(f"{theirs}.conv2d0", f"{ours}/shortcut", before, after, 1)
        reader.convolution(f"{theirs}.conv2d1", f"{ours}/conv_1", before, after, 3)
        reader.convolution(f"{theirs}.conv2d2", f"{ours}/conv_2", after, after, 3)
    for place, theirs in attention.items():
        reader.attention(theirs, f"attention_{place}", widths[place])
    reader.linear("linear1", "head_score", widths[-1], 1)
    embedding_dim = 0
    if "linear2.bias" in reader.left:
        head = "embedding"
        embedding_dim = reader.shape("linear2.weight_orig", 2)[0]
        reader.linear("linear2", "head_embedding", widths[-1], embedding_dim)
        num_classes = reader.table("embedding", "head_proxies", embedding_dim)
    elif "linear2.weight_orig" in reader.left:
        head = "ac"
        num_classes = reader.shape("linear2.weight_orig", 2)[0]
        reader.linear("linear2", "head_classifier", widths[-1], num_classes, bias=False)
    else:
        head = "projection"
        num_classes = reader.table("embedding", "head_label_embedding", widths[-1])
    reader.refuse_leftovers()
    return ImportedDiscriminator(
        len(blocks), width, tuple(attention), head, num_classes, embedding_dim, reader.variables
    )


@dataclass
class _Reader:
    """Takes arrays by name, each once, and puts them into our trees."""

    path: Path
    network: str
    marks: tuple[str, ...]
    left: dict[str, np.ndarray] = field(default_factory=dict)
    variables: Trees = field(default_factory=dict)

    def __post_init__(self) -> None:
        arrays = read_arrays(self.path)
        inside = {name.removeprefix(STATE_DICT): a for name, a in arrays.items() if name.startswith(STATE_DICT)}
        self.left = dict(inside or arrays)
        if not set(self.marks) <= set(self.left):
            first = ", ".join(sorted(self.left)[:3])
            raise DataError(
                f"{self.path} is no {self.network} with spectral normalisation: its arrays are called {first}, ..."
            )

    def blocks(self) -> tuple[list[str], dict[int, str]]:
        """Names of the residual blocks in order, and of attention by the number of the block that it follows."""
        numbers = {int(found.group(1)) for name in self.left if (found := re.match(r"blocks\.(\d+)\.0\.", name))}
        residual: list[str] = []
        attention: dict[int, str] = {}
        for number in sorted(numbers):
            name = f"blocks.{number}.0"
            if f"{name}.sigma" in self.left:
                attention[len(residual)] = name
            else:
                residual.append(name)
        return residual, attention

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Raises: `DataError` for an array that is missing or has another number of dimensions."""
        if name not in self.left:
            raise DataError(f"{self.path} lacks {name}, which every {self.network} of its kind has")
        shape = self.left[name].shape
        if len(shape) != dimensions or 0 in shape:
            raise DataError(f"{self.path}: {name} has shape {shape}, but {dimensions} dimensions are due")
        return shape

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Raises: `DataError` for a missing array, or one of another shape."""
        if name not in self.left:
            raise DataError(f"{self.path} lacks {name}, which every {self.network} of its kind has")
        array = self.left.pop(name)
        if shape is not None and array.shape != shape:
            raise DataError(f"{self.path}: {name} has shape {array.shape}, but {shape} is due")
        return np.ascontiguousarray(array, np.float32)

    def put(self, collection: str, name: str, value: np.ndarray) -> None:
        *groups, leaf = name.split("/")
        at = self.variables.setdefault(collection, {})
        for group in groups:
            at = at.setdefault(group, {})
        at[leaf] = np.ascontiguousarray(value)

    def linear(
        self, theirs: str, ours: str, inputs: int, outputs: int, *, name: str = "kernel", bias: bool = True,
        order: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """`order`: the rows in our order."""
        rows = np.arange(outputs) if order is None else order
        self.put("params", f"{ours}/{name}", self.take(f"{theirs}.weight_orig", (outputs, inputs))[rows].T)
        self.put("spectral", f"{ours}/{name}_u", self.take(f"{theirs}.weight_u", (outputs,))[rows])
        self.put("spectral", f"{ours}/{name}_v", self.take(f"{theirs}.weight_v", (inputs,)))
        if bias:
            self.put("params", f"{ours}/bias", self.take(f"{theirs}.bias", (outputs,))[rows])

    def table(self, theirs: str, ours: str, features: int) -> int:
        """An embedding table with spectral normalisation; returns its number of rows."""
        entries = self.shape(f"{theirs}.weight_orig", 2)[0]
        self.put("params", f"{ours}/embedding", self.take(f"{theirs}.weight_orig", (entries, features)))
        self.put("spectral", f"{ours}/embedding_u", self.take(f"{theirs}.weight_u", (entries,)))
        self.put("spectral", f"{ours}/embedding_v", self.take(f"{theirs}.weight_v", (features,)))
        return entries

    def convolution(self, theirs: str, ours: str, inputs: int, outputs: int, size: int, *, bias: bool = True) -> None:
        kernel = self.take(f"{theirs}.weight_orig", (outputs, inputs, size, size))
        v = self.take(f"{theirs}.weight_v", (inputs * size * size,)).reshape(inputs, size, size)
        self.put("params", f"{ours}/kernel", kernel.transpose(2, 3, 1, 0))
        self.put("spectral", f"{ours}/kernel_u", self.take(f"{theirs}.weight_u", (outputs,)))
        self.put("spectral", f"{ours}/kernel_v", v.transpose(1, 2, 0).reshape(-1))
        if bias:
            self.put("params", f"{ours}/bias", self.take(f"{theirs}.bias", (outputs,)))

    def attention(self, theirs: str, ours: str, channels: int) -> None:
        for name, inputs, outputs in (
            ("theta", channels, channels // 8), ("phi", channels, channels // 8), ("g", channels, channels // 2),
            ("attn", channels // 2, channels),
        ):  # fmt: skip
            here = "out" if name == "attn" else name
            self.convolution(f"{theirs}.conv1x1_{name}", f"{ours}/{here}", inputs, outputs, 1, bias=False)
        self.put("params", f"{ours}/sigma", self.take(f"{theirs}.sigma", (1,)))

    def running(self, theirs: str, ours: str, channels: int) -> None:
        """Running statistics; the number of batches that they are of plays no part where momentum is fixed."""
        self.put("batch_stats", f"{ours}/mean", self.take(f"{theirs}.running_mean", (channels,)))
        self.put("batch_stats", f"{ours}/var", self.take(f"{theirs}.running_var", (channels,)))
        self.left.pop(f"{theirs}.num_batches_tracked", None)

    def refuse_leftovers(self) -> None:
        """Nothing of a network is dropped silently."""
        if self.left:
            shown = ", ".join(sorted(self.left)[:3])
            raise DataError(
                f"{self.path} has {len(self.left)} arrays that our {self.network} has no place for: {shown}"
            )


HEADS: Mapping[str, str] = {"acgan": "ac", "contragan": "embedding", "reacgan": "embedding", "biggan": "projection"}
"""The methods whose checkpoints can be read, and the head of each."""


def check_pair(
    method: str, generator: ImportedGenerator, average: ImportedGenerator | None, critic: ImportedDiscriminator
) -> None:
    """Raises: `ConfigError` for files that are not of one GAN of this method."""
    if critic.head != HEADS[method]:
        fitting = " or ".join(name for name, head in HEADS.items() if head == critic.head)
        raise ConfigError(f"the discriminator has the head of {fitting}, not of {method}: say --method")
    described = [_described(generator), *([_described(average)] if average else [])]
    if len(set(described)) > 1:
        raise ConfigError("generator and averaged generator are of different networks")
    if critic.num_classes != generator.num_classes:
        raise ConfigError(
            f"the generator knows {generator.num_classes} classes and the discriminator {critic.num_classes}"
        )
    if len(residual_plan(generator.image_size, 1, 1).discriminator) != critic.blocks:
        raise ConfigError(
            f"the generator makes images of {generator.image_size} pixels, and a discriminator of {critic.blocks} "
            "blocks is for others"
        )


def _described(generator: ImportedGenerator) -> tuple[Any, ...]:
    return (
        generator.image_size, generator.channels, generator.width, generator.z_dim, generator.num_classes,
        generator.shared_dim, generator.attention,
    )  # fmt: skip
