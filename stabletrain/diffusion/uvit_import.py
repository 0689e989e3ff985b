"""Published U-ViT checkpoints (`.pth`, `.safetensors`, `.npz`) as parameters of our U-ViT; read without PyTorch.

Source: the names and layouts of Bao et al. 2023's released code: Linear weights are [out, in], convolutions
[out, in, h, w], the decoder blocks are numbered from the innermost outwards (ours: by their skip, 0 the outermost).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from stabletrain.diffusion.checkpoint_reader import Checkpoint, CheckpointReader
from stabletrain.errors import DataError

HEAD_SIZE = 64
"""Features of an attention head in every published U-ViT; a checkpoint does not say."""
TEXT_TOKENS = 77
"""Tokens of a text in the published text-to-image networks, those of CLIP; a checkpoint says only how many in all."""


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
    context_shape: tuple[int, ...] = ()
    """(L, D) of the text features that a text-to-image network reads."""


def read_uvit(checkpoint: Checkpoint) -> ImportedUViT:
    """The network of a U-ViT checkpoint.

    Raises: `DataError` of one line: another network, a U-ViT with parts that ours has not (named), or arrays of shapes
    that do not fit each other.
    """
    path, arrays = checkpoint.path, dict(checkpoint.arrays)
    if not {"patch_embed.proj.weight", "pos_embed", "decoder_pred.weight"} <= set(arrays):
        first = ", ".join(sorted(arrays)[:3])
        raise DataError(f"{path} is no U-ViT checkpoint: its arrays are called {first}, ...")
    reader = CheckpointReader(path, arrays, "U-ViT with a final convolution")
    kernel = reader.take("patch_embed.proj.weight")
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        raise DataError(f"{path}: patch_embed.proj.weight has shape {kernel.shape}, but patches are square")
    width, channels, patch, _ = kernel.shape
    embedding = reader.take("label_emb.weight") if "label_emb.weight" in arrays else None
    positions = reader.take("pos_embed", (1, None, width))
    text = arrays["context_embed.weight"].shape[-1:] if "context_embed.weight" in arrays else ()
    context_shape = (TEXT_TOKENS, *text) if text else ()
    patches = positions.shape[1] - 1 - (embedding is not None) - (TEXT_TOKENS if text else 0)
    side = round(max(patches, 0) ** 0.5)
    if side * side != patches or not side:
        texts = f" and the {TEXT_TOKENS} tokens of a text" if text else ""
        raise DataError(f"{path}: {positions.shape[1]} positions are not those of a square image of patches{texts}")
    numbers = {int(found.group(1)) for name in arrays if (found := re.match(r"in_blocks\.(\d+)\.", name))}
    count = len(numbers)

    params: dict[str, Any] = {
        "patch_kernel": kernel.transpose(2, 3, 1, 0),
        "patch_bias": reader.take("patch_embed.proj.bias", (width,)),
        "position_embedding": positions,
        "norm": reader.norm("norm", width),
        "decoder": reader.linear("decoder_pred", width, patch * patch * channels),
        "mid_block": _block(reader, "mid_block", width),
        "final_conv": reader.convolution("final_layer", channels, channels),
    }
    if embedding is not None:
        params["label_embedding"] = {"embedding": embedding}
    if text:
        params["context_embedding"] = reader.linear("context_embed", text[0], width)
    for i in range(count):
        theirs = f"out_blocks.{count - 1 - i}"
        params[f"in_block_{i}"] = _block(reader, f"in_blocks.{i}", width)
        params[f"skip_linear_{i}"] = reader.linear(f"{theirs}.skip_linear", 2 * width, width)
        params[f"out_block_{i}"] = _block(reader, theirs, width)
    reader.refuse_leftovers()
    embeddings = 0 if embedding is None else len(embedding)
    return ImportedUViT(side * patch, channels, patch, width, 2 * count, embeddings, params, context_shape)


def _block(reader: CheckpointReader, name: str, width: int) -> dict[str, Any]:
    hidden = len(reader.left.get(f"{name}.mlp.fc1.bias", ())) or 4 * width
    return {
        "norm1": reader.norm(f"{name}.norm1", width),
        "qkv": reader.linear(f"{name}.attn.qkv", width, 3 * width, bias=False),
        "proj": reader.linear(f"{name}.attn.proj", width, width),
        "norm2": reader.norm(f"{name}.norm2", width),
        "fc1": reader.linear(f"{name}.mlp.fc1", width, hidden),
        "fc2": reader.linear(f"{name}.mlp.fc2", hidden, width),
    }
