"""Parameters by formula: the same numbers on every machine and in every version, so that a file of outputs suffices."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import numpy as np

Tree = dict[str, Any]


def wave(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-1, 1] that depend on the name and the place, without pattern at the scale of a tensor."""
    phase = zlib.crc32(name.encode()) % 10_007
    return np.sin(0.37 * phase + 1.7 * np.arange(np.prod(shape, dtype=int)) ** 1.1).reshape(shape)


def value_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One parameter in float64: kernels of size 1/sqrt(fan-in), norms' scales around one, none of them zero."""
    values = wave(name, shape)
    leaf = name.rsplit("/", 1)[-1]
    if leaf == "scale":
        return 1.0 + 0.2 * values
    if leaf in ("bias", "patch_bias", "position_embedding"):
        return 0.2 * values
    if leaf == "coefficient":
        return 0.6 + 0.2 * values
    return 1.5 * values / np.sqrt(max(1, np.prod(shape[:-1], dtype=int)))


def by_name(tree: Tree) -> Tree:
    """{"a": {"b": x}} -> {"a/b": x}."""
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def filled(shapes: Tree) -> Tree:
    """A tree of parameters, given one of anything with shapes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: value_of("/".join(key.key for key in path), leaf.shape), shapes
    )


def summary_of(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Two numbers of each array, by name: its norm, and its product with a wave of its own name."""
    return np.array([[np.linalg.norm(a), np.sum(a * wave(key, a.shape))] for key, a in sorted(arrays.items())])


def inputs(size: int, channels: int, num_classes: int, batch: int = 3) -> tuple[np.ndarray, np.ndarray, Any]:
    """Images [B, H, W, C], times [B] and labels [B] (the null label last) or None."""
    images = wave("images", (batch, size, size, channels))
    times = np.array([0.0, 41.5, 999.0])[:batch]
    labels = np.array([0, 1, num_classes])[:batch] if num_classes else None
    return images, times, labels
