"""Pairs of atoms within a cutoff: all of a molecule, or a padded list for a periodic cell.

A pair is there once (i < j); networks with directed edges double it. Entries beyond the cutoff and padding are masked,
and their vectors replaced *before* any square root, so that no gradient is NaN.

**Units**: A. **Shapes**: N atoms, P pairs (of which some are masked).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Neighbors:
    """Which pairs to look at. With `overflow` there were more than fit, and the list is of no use."""

    first: jax.Array  # int32 [P]
    second: jax.Array  # int32 [P]
    filled: jax.Array  # bool [P]: not padding
    count: jax.Array  # int32 []: the pairs that there are
    overflow: jax.Array  # bool []


@struct.dataclass
class Pairs:
    """The pairs with their geometry. Where `mask` is False the vector is (cutoff, 0, 0)."""

    first: jax.Array  # int32 [P]
    second: jax.Array  # int32 [P]
    vector: jax.Array  # [P, 3] from the first to the second atom
    distance: jax.Array  # [P]
    mask: jax.Array  # bool [P]: within the cutoff


def all_pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair i < j of `count` atoms, two int32 [P]."""
    first, second = np.triu_indices(count, 1)
    return first.astype(np.int32), second.astype(np.int32)


def displacement(positions: jax.Array, first: jax.Array, second: jax.Array, cell: np.ndarray | None) -> jax.Array:
    """Vectors [P, 3] from the first to the second atoms, to the nearest image where there is a cell."""
    vector = positions[second] - positions[first]
    if cell is None:
        return vector
    lattice = jnp.asarray(cell, positions.dtype)
    shifts = jnp.round(vector @ jnp.asarray(np.linalg.inv(cell), positions.dtype))
    return vector - jax.lax.stop_gradient(shifts) @ lattice


def find_neighbors(positions: jax.Array, cell: np.ndarray | None, *, cutoff: float, capacity: int) -> Neighbors:
    """The pairs within the cutoff, padded to `capacity`. All distances are looked at: cheap up to some 2,000 atoms.

    Pure and compilable, so that every force evaluation makes its own list: none is ever out of date.
    """
    first, second = all_pairs(len(positions))
    positions = jax.lax.stop_gradient(positions)
    squared = jnp.sum(displacement(positions, jnp.asarray(first), jnp.asarray(second), cell) ** 2, axis=-1)
    near = squared < cutoff**2
    count = jnp.sum(near, dtype=jnp.int32)
    (kept,) = jnp.nonzero(near, size=capacity, fill_value=0)
    filled = jnp.arange(capacity) < count
    return Neighbors(jnp.asarray(first)[kept], jnp.asarray(second)[kept], filled, count, count > capacity)


def pair_geometry(
    positions: jax.Array,
    first: jax.Array,
    second: jax.Array,
    filled: jax.Array | None,
    cell: np.ndarray | None,
    cutoff: float,
    strain: jax.Array | None = None,
) -> Pairs:
    """Vectors and distances of the listed pairs. `strain` [3, 3] deforms space: x -> x (1 + strain)."""
    vector = displacement(positions, first, second, cell)
    if strain is not None:
        vector = vector + vector @ strain
    squared = jnp.sum(vector**2, axis=-1)
    mask = squared < cutoff**2
    if filled is not None:
        mask = mask & filled
    aside = jnp.array([cutoff, 0.0, 0.0], vector.dtype)
    vector = jnp.where(mask[:, None], vector, aside)
    # Two atoms on one point have no direction; their distance is 0 and its gradient 0, not NaN.
    squared = jnp.sum(vector**2, axis=-1)
    apart = squared > 0
    distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)
    return Pairs(first, second, vector, distance, mask)
