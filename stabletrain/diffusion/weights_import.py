"""Published U-ViT checkpoints (`.pth`, `.safetensors`, `.npz`) as parameters of our U-ViT; read without PyTorch.

Source: the names and layouts of Bao et al. 2023's released code: Linear weights are [out, in], convolutions
[out, in, h, w], the decoder blocks are numbered from the innermost outwards (ours: by their skip, 0 the outermost).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.errors import DataError
from stabletrain.nn.torch_file import read_arrays

HEAD_SIZE = 64
"""Features of an attention head in every published U-ViT; a checkpoint does not say."""


@dataclass(frozen=True)
class ImportedUViT:
    """What a checkpoint says of its network, and the parameters in our layout."""

    image_size: int
    channels: int
    patch_size: int
    width: int
    depth: int
    embeddings: int
    """Label embeddings, the one for "none" included where there is one; 0 without labels."""
    params: dict[str, Any]


def read_uvit(path: Path) -> ImportedUViT:
    """The network of a U-ViT checkpoint.

    Raises: `DataError` of one line: no weights file, another network, a U-ViT with parts that ours has not (named), or
    arrays of shapes that do not fit each other.
    """
    arrays = dict(read_arrays(path))
    if not {"patch_embed.proj.weight", "pos_embed", "decoder_pred.weight"} <= set(arrays):
        first = ", ".join(sorted(arrays)[:3])
        raise DataError(f"{path} is no U-ViT checkpoint: its arrays are called {first}, ...")
    reader = _Reader(path, arrays)
    kernel = reader.take("patch_embed.proj.weight")
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        raise DataError(f"{path}: patch_embed.proj.weight has shape {kernel.shape}, but patches are square")
    width, channels, patch, _ = kernel.shape
    embedding = reader.take("label_emb.weight") if "label_emb.weight" in arrays else None
    positions = reader.take("pos_embed", (1, None, width))
    patches = positions.shape[1] - 1 - (embedding is not None)
    side = round(max(patches, 0) ** 0.5)
    if side * side != patches or not side:
        raise DataError(f"{path}: {positions.shape[1]} positions are not those of a square image of patches")
    numbers = {int(found.group(1)) for name in arrays if (found := re.match(r"in_blocks\.(\d+)\.", name))}
    count = len(numbers)

    params: dict[str, Any] = {
        "patch_kernel": kernel.transpose(2, 3, 1, 0),
        "patch_bias": reader.take("patch_embed.proj.bias", (width,)),
        "position_embedding": positions,
        "norm": reader.norm("norm", width),
        "decoder": reader.linear("decoder_pred", width, patch * patch * channels),
        "mid_block": reader.block("mid_block", width),
        "final_conv": {
            "kernel": reader.take("final_layer.weight", (channels, channels, 3, 3)).transpose(2, 3, 1, 0),
            "bias": reader.take("final_layer.bias", (channels,)),
        },
    }
    if embedding is not None:
        params["label_embedding"] = {"embedding": embedding}
    for i in range(count):
        theirs = f"out_blocks.{count - 1 - i}"
        params[f"in_block_{i}"] = reader.block(f"in_blocks.{i}", width)
        params[f"skip_linear_{i}"] = reader.linear(f"{theirs}.skip_linear", 2 * width, width)
        params[f"out_block_{i}"] = reader.block(theirs, width)
    reader.refuse_leftovers()
    return ImportedUViT(
        side * patch, channels, patch, width, 2 * count, 0 if embedding is None else len(embedding), params
    )


class _Reader:
    """Takes arrays by name, each once, in float32 and of the shape that is due."""

    def __init__(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        self.path = path
        self.left = dict(arrays)

    def take(self, name: str, shape: tuple[int | None, ...] | None = None) -> np.ndarray:
        """Raises: `DataError` for a missing array, or one of another shape (None stands for any length)."""
        if name not in self.left:
            raise DataError(f"{self.path} lacks {name}, which every U-ViT with a final convolution has")
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

    def norm(self, name: str, width: int) -> dict[str, np.ndarray]:
        return {"scale": self.take(f"{name}.weight", (width,)), "bias": self.take(f"{name}.bias", (width,))}

    def block(self, name: str, width: int) -> dict[str, Any]:
        hidden = len(self.left.get(f"{name}.mlp.fc1.bias", ())) or 4 * width
        return {
            "norm1": self.norm(f"{name}.norm1", width),
            "qkv": self.linear(f"{name}.attn.qkv", width, 3 * width, bias=False),
            "proj": self.linear(f"{name}.attn.proj", width, width),
            "norm2": self.norm(f"{name}.norm2", width),
            "fc1": self.linear(f"{name}.mlp.fc1", width, hidden),
            "fc2": self.linear(f"{name}.mlp.fc2", hidden, width),
        }

    def refuse_leftovers(self) -> None:
        """Nothing in a checkpoint is dropped silently."""
        if self.left:
            shown = ", ".join(sorted(self.left)[:3])
            raise DataError(f"{self.path} has {len(self.left)} arrays that our U-ViT has no place for: {shown}")
