"""Published UNet checkpoints (`.pt`, `.pth`, `.safetensors`, `.npz`) as parameters of our UNet; read without PyTorch.

Two ways of naming are known. "improved": improved DDPM's and ADM's released models (`input_blocks.3.0.in_layers.2`, one
kernel for queries, keys and values). "ddpm": the PyTorch ports of DDPM (`down.1.block.0.conv1`, three kernels). Linear
weights are [out, in], convolutions [out, in, h, w]. A checkpoint says neither the image's size nor the number of heads.

Source: Ho et al. 2020, Nichol and Dhariwal 2021, Dhariwal and Nichol 2021, and the names in their released code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.diffusion.checkpoint_reader import Checkpoint, CheckpointReader, refuse_no_pictures
from stabletrain.errors import DataError

WIDTH_OF_32_GROUPS = 128
QKV_ORDERS = ("head", "whole")
"""Rows of the one kernel for queries, keys and values: three parts per head (improved DDPM, most of ADM's), or three
parts of all heads (ADM with its "new attention order", as its ImageNet-64 model)."""


@dataclass(frozen=True)
class ImportedUNet:
    """What a checkpoint says of its network, and the parameters in our layout."""

    block_style: str
    channels: int
    width: int
    multipliers: tuple[int, ...]
    blocks: int
    attention_levels: tuple[int, ...]
    learned_variance: bool
    embeddings: int
    """Label embeddings; 0 without labels."""
    params: dict[str, Any]


def is_unet(names: Iterable[str]) -> bool:
    """Whether these are the array names of a UNet that `read_unet` knows."""
    present = set(names)
    return "input_blocks.0.0.weight" in present or {"conv_in.weight", "temb.dense.0.weight"} <= present


def block_style_of(names: Iterable[str]) -> str:
    """`ddpm`, `iddpm` or `adm`, by the array names of a UNet."""
    names = set(names)
    if "conv_in.weight" in names:
        return "ddpm"
    return "iddpm" if any(re.match(r"input_blocks\.\d+\.0\.op\.", name) for name in names) else "adm"


def read_unet(
    checkpoint: Checkpoint, *, heads: int = 0, head_channels: int = 0, qkv_order: str = "head"
) -> ImportedUNet:
    """The network of a UNet checkpoint. `heads` or `head_channels` divide its attention.

    Raises: `DataError` of one line: another network, a UNet with parts that ours has not (named), or arrays of shapes
    that do not fit each other.
    """
    path, arrays = checkpoint.path, dict(checkpoint.arrays)
    if not is_unet(arrays):
        raise DataError(f"{path} is no UNet checkpoint: its arrays are called {', '.join(sorted(arrays)[:3])}, ...")
    if "conv_in.weight" in arrays:
        return _DDPM(path, arrays).network()
    return _Improved(path, arrays, heads, head_channels, qkv_order).network()


class _Names:
    """Walks through our UNet's parts in order and asks a way of naming for each."""

    style = ""

    def __init__(self, path: Path, arrays: Mapping[str, np.ndarray], kind: str) -> None:
        self.reader = CheckpointReader(path, arrays, f"UNet named as {kind}'s")
        self.params: dict[str, Any] = {}
        self.time_width = 0

    def block(self, theirs: str, inputs: int, outputs: int) -> dict[str, Any]:
        """A residual block of theirs with so many channels in and out."""
        raise NotImplementedError

    def attention(self, theirs: str, width: int) -> dict[str, Any]:
        """An attention block of theirs."""
        raise NotImplementedError

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix + ".") for name in self.reader.left)

    def block_with_attention(self, ours: str, block: str, attention: str, inputs: int, outputs: int) -> bool:
        """Puts both in place; whether there was attention."""
        self.params[ours] = self.block(block, inputs, outputs)
        attends = self.has(f"{attention}.norm")
        if attends:
            self.params[f"{ours}_attention"] = self.attention(attention, outputs)
        return attends

    def pointwise(self, name: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
        """A 1x1 convolution as a Dense layer, whichever number of spatial axes it was kept with."""
        kernel = self.reader.take(f"{name}.weight").reshape(outputs, inputs)
        return {"kernel": kernel.T, "bias": self.reader.take(f"{name}.bias", (outputs,))}


class _Improved(_Names):
    def __init__(
        self, path: Path, arrays: Mapping[str, np.ndarray], heads: int, head_channels: int, qkv_order: str
    ) -> None:
        super().__init__(path, arrays, "improved DDPM")
        self.heads, self.head_channels, self.qkv_order = heads, head_channels, qkv_order

    def network(self) -> ImportedUNet:
        take = self.reader
        outputs = _count(take.left, r"output_blocks\.(\d+)\.")
        # A decoder level ends with an upsampling: a convolution, or a second residual block.
        resampled = {
            int(found.group(1))
            for name in take.left
            if (found := re.match(r"output_blocks\.(\d+)\.[12]\.(conv\.weight|in_layers\.2\.weight)$", name))
        }
        levels = len(resampled) + 1
        if not outputs or outputs % levels:
            raise DataError(f"{take.path}: {outputs} decoder blocks do not divide into {levels} levels")
        blocks = outputs // levels - 1
        self.style = block_style_of(take.left)
        convolutional = self.style == "iddpm"

        stem = take.convolution("input_blocks.0.0", None, None)
        channels, width = stem["kernel"].shape[2:]
        self.time_width = 4 * width
        self.params |= {
            "stem": stem,
            "time_0": take.linear("time_embed.0", width, self.time_width),
            "time_1": take.linear("time_embed.2", self.time_width, self.time_width),
        }
        embeddings = 0
        if "label_emb.weight" in take.left:
            table = take.take("label_emb.weight", (None, self.time_width))
            self.params["label_embedding"], embeddings = {"embedding": table}, len(table)

        skips, widths, attending, place, now = [width], list[int](), set[int](), 1, width
        for level in range(levels):
            for block in range(blocks):
                weight = take.left.get(f"input_blocks.{place}.0.out_layers.3.weight")
                if weight is None:
                    raise DataError(f"{take.path} lacks input_blocks.{place}.0.out_layers.3.weight")
                following = len(weight)
                ours, theirs = f"down_{level}_{block}", f"input_blocks.{place}"
                if self.block_with_attention(ours, f"{theirs}.0", f"{theirs}.1", now, following):
                    attending.add(level)
                now, place = following, place + 1
                skips.append(now)
            widths.append(now)
            if level + 1 < levels:
                theirs = f"input_blocks.{place}.0"
                self.params[f"downsample_{level}"] = (
                    take.convolution(f"{theirs}.op", now, now) if convolutional else self.block(theirs, now, now)
                )
                skips.append(now)
                place += 1
        self.params |= {
            "mid_block_0": self.block("middle_block.0", now, now),
            "mid_attention": self.attention("middle_block.1", now),
            "mid_block_1": self.block("middle_block.2", now, now),
        }
        place = 0
        for level in reversed(range(levels)):
            for block in range(blocks + 1):
                theirs = f"output_blocks.{place}"
                attends = self.block_with_attention(
                    f"up_{level}_{block}", f"{theirs}.0", f"{theirs}.1", now + skips.pop(), widths[level]
                )
                now = widths[level]
                if level and block == blocks:
                    theirs = f"{theirs}.{1 + attends}"
                    self.params[f"upsample_{level}"] = (
                        take.convolution(f"{theirs}.conv", now, now) if convolutional else self.block(theirs, now, now)
                    )
                place += 1
        final = take.convolution("out.2", now, None)
        self.params |= {"norm": take.norm("out.0", now), "final": final}
        take.refuse_leftovers()
        return _found(self, channels, width, widths, blocks, attending, final, embeddings)

    def block(self, theirs: str, inputs: int, outputs: int) -> dict[str, Any]:
        take = self.reader
        if len(take.left.get(f"{theirs}.emb_layers.1.bias", ())) == outputs:
            raise DataError(f"{take.path}: the time is added in {theirs}; here such blocks are those of DDPM only")
        block = {
            "norm1": take.norm(f"{theirs}.in_layers.0", inputs),
            "conv1": take.convolution(f"{theirs}.in_layers.2", inputs, outputs),
            "time": take.linear(f"{theirs}.emb_layers.1", self.time_width, 2 * outputs),
            "norm2": take.norm(f"{theirs}.out_layers.0", outputs),
            "conv2": take.convolution(f"{theirs}.out_layers.3", outputs, outputs),
        }
        if self.has(f"{theirs}.skip_connection"):
            block["shortcut"] = take.convolution(f"{theirs}.skip_connection", inputs, outputs, size=1)
        return block

    def attention(self, theirs: str, width: int) -> dict[str, Any]:
        take = self.reader
        heads = width // self.head_channels if self.head_channels else self.heads
        if not heads or width % heads:
            raise DataError(
                f"{take.path}: {width} channels of attention are not divided by {heads} heads; a checkpoint does not "
                "say how many there are"
            )
        together = self.pointwise(f"{theirs}.qkv", width, 3 * width)
        layout = (heads, 3, -1) if self.qkv_order == "head" else (1, 3, -1)
        kernels = together["kernel"].reshape(width, *layout)
        biases = together["bias"].reshape(layout)
        parts = {
            name: {"kernel": kernels[:, :, i].reshape(width, width), "bias": biases[:, i].reshape(width)}
            for i, name in enumerate("qkv")
        }
        norm = take.norm(f"{theirs}.norm", width)
        return {"norm": norm, **parts, "proj": self.pointwise(f"{theirs}.proj_out", width, width)}


class _DDPM(_Names):
    style = "ddpm"

    def __init__(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__(path, arrays, "DDPM")

    def network(self) -> ImportedUNet:
        take = self.reader
        stem = take.convolution("conv_in", None, None)
        channels, width = stem["kernel"].shape[2:]
        self.time_width = 4 * width
        self.params |= {
            "stem": stem,
            "time_0": take.linear("temb.dense.0", width, self.time_width),
            "time_1": take.linear("temb.dense.1", self.time_width, self.time_width),
        }
        levels = _count(take.left, r"down\.(\d+)\.")
        blocks = _count(take.left, r"down\.0\.block\.(\d+)\.")
        skips, widths, attending, now = [width], list[int](), set[int](), width
        for level in range(levels):
            weight = take.left.get(f"down.{level}.block.0.conv1.weight")
            if weight is None:
                raise DataError(f"{take.path} lacks down.{level}.block.0.conv1.weight")
            for block in range(blocks):
                theirs = f"down.{level}"
                if self.block_with_attention(
                    f"down_{level}_{block}", f"{theirs}.block.{block}", f"{theirs}.attn.{block}", now, len(weight)
                ):
                    attending.add(level)
                now = len(weight)
                skips.append(now)
            widths.append(now)
            if level + 1 < levels:
                self.params[f"downsample_{level}"] = take.convolution(f"down.{level}.downsample.conv", now, now)
                skips.append(now)
        self.params |= {
            "mid_block_0": self.block("mid.block_1", now, now),
            "mid_attention": self.attention("mid.attn_1", now),
            "mid_block_1": self.block("mid.block_2", now, now),
        }
        for level in reversed(range(levels)):
            for block in range(blocks + 1):
                theirs, inputs = f"up.{level}", now + skips.pop()
                self.block_with_attention(
                    f"up_{level}_{block}", f"{theirs}.block.{block}", f"{theirs}.attn.{block}", inputs, widths[level]
                )
                now = widths[level]
            if level:
                self.params[f"upsample_{level}"] = take.convolution(f"up.{level}.upsample.conv", now, now)
        final = take.convolution("conv_out", now, None)
        self.params |= {"norm": take.norm("norm_out", now), "final": final}
        take.refuse_leftovers()
        return _found(self, channels, width, widths, blocks, attending, final, 0)

    def block(self, theirs: str, inputs: int, outputs: int) -> dict[str, Any]:
        take = self.reader
        block = {
            "norm1": take.norm(f"{theirs}.norm1", inputs),
            "conv1": take.convolution(f"{theirs}.conv1", inputs, outputs),
            "time": take.linear(f"{theirs}.temb_proj", self.time_width, outputs),
            "norm2": take.norm(f"{theirs}.norm2", outputs),
            "conv2": take.convolution(f"{theirs}.conv2", outputs, outputs),
        }
        if self.has(f"{theirs}.nin_shortcut"):
            block["shortcut"] = take.convolution(f"{theirs}.nin_shortcut", inputs, outputs, size=1)
        return block

    def attention(self, theirs: str, width: int) -> dict[str, Any]:
        layers = {name: self.pointwise(f"{theirs}.{name}", width, width) for name in ("q", "k", "v")}
        norm = self.reader.norm(f"{theirs}.norm", width)
        return {"norm": norm, **layers, "proj": self.pointwise(f"{theirs}.proj_out", width, width)}


def _count(names: Iterable[str], pattern: str) -> int:
    return len({int(found.group(1)) for name in names if (found := re.match(pattern, name))})


def _found(
    names: _Names,
    channels: int,
    width: int,
    widths: list[int],
    blocks: int,
    attending: set[int],
    final: Mapping[str, np.ndarray],
    embeddings: int,
) -> ImportedUNet:
    refuse_no_pictures(names.reader.path, channels)
    outputs = final["kernel"].shape[-1]
    if outputs not in (channels, 2 * channels):
        raise DataError(
            f"{names.reader.path} makes {outputs} channels of {channels}: neither noise nor noise and variance"
        )
    if any(at % width for at in widths):
        raise DataError(f"{names.reader.path}: the levels' channels {widths} are no multiples of {width}")
    if width < WIDTH_OF_32_GROUPS:
        raise DataError(
            f"{names.reader.path} is {width} channels wide: below {WIDTH_OF_32_GROUPS} our norms have fewer groups "
            "than the published 32"
        )
    return ImportedUNet(
        block_style=names.style,
        channels=channels,
        width=width,
        multipliers=tuple(at // width for at in widths),
        blocks=blocks,
        attention_levels=tuple(sorted(attending)),
        learned_variance=outputs == 2 * channels,
        embeddings=embeddings,
        params=names.params,
    )
