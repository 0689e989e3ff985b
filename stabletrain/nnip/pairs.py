"""Pairs of atoms within a cutoff: all of a molecule, or a padded list for a periodic cell.

A pair is there once (i < j); networks with directed edges double it. Entries beyond the cutoff and padding are masked,
and their vectors replaced *before* any square root, so that no gradient is NaN.

Networks that look at triplets also get the pairs by atom: each pair is two *arrivals*, one at each of its ends, and an
atom has room for K of them. Arrival e < P is that of pair e at its first atom, P + e that at its second.

**Units**: A. **Shapes**: N atoms, P pairs (of which some are masked), K arrivals at an atom.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Arrivals:
    """The pairs again, by the atom that looks at them."""

    place: jax.Array  # int32 [N, K]: number of the arrival, 0 to 2 P
    filled: jax.Array  # bool [N, K]: not padding
    slot: jax.Array  # int32 [2 P]: where each arrival stands, n K + k


@struct.dataclass
class Neighbors:
    """Which pairs to look at. With `overflow` there were more than fit, and the list is of no use."""

    first: jax.Array  # int32 [P]
    second: jax.Array  # int32 [P]
    filled: jax.Array  # bool [P]: not padding
    count: jax.Array  # int32 []: the pairs that there are
    overflow: jax.Array  # bool []: of pairs, or of arrivals
    arrivals: Arrivals | None = None


@struct.dataclass
class Pairs:
    """The pairs with their geometry. Where `mask` is False the vector is (cutoff, 0, 0)."""

    first: jax.Array  # int32 [P]
    second: jax.Array  # int32 [P]
    vector: jax.Array  # [P, 3] from the first to the second atom
    distance: jax.Array  # [P]
    mask: jax.Array  # bool [P]: within the cutoff
    arrivals: Arrivals | None = None


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


def _near(positions: jax.Array, cell: np.ndarray | None, cutoff: float) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    """All pairs, and which of them are within the cutoff."""
    first, second = all_pairs(len(positions))
    vector = displacement(jax.lax.stop_gradient(positions), jnp.asarray(first), jnp.asarray(second), cell)
    return first, second, jnp.sum(vector**2, axis=-1) < cutoff**2


def count_neighbors(positions: jax.Array, cell: np.ndarray | None, cutoff: float) -> tuple[jax.Array, jax.Array]:
    """How many pairs there are within the cutoff, and how many neighbours the atom with the most has: int32 []."""
    first, second, near = _near(positions, cell, cutoff)
    ones = near.astype(jnp.int32)
    degree = jnp.zeros(len(positions), jnp.int32).at[first].add(ones).at[second].add(ones)
    return jnp.sum(ones), jnp.max(degree)


def find_neighbors(
    positions: jax.Array, cell: np.ndarray | None, *, cutoff: float, capacity: int, degree: int | None = None
) -> Neighbors:
    """The pairs within the cutoff, padded to `capacity`. All distances are looked at: cheap up to some 2,000 atoms.

    With `degree` also by atom, padded to that many neighbours. Pure and compilable, so that every force evaluation
    makes its own list: none is ever out of date.
    """
    all_first, all_second, near = _near(positions, cell, cutoff)
    count = jnp.sum(near, dtype=jnp.int32)
    (kept,) = jnp.nonzero(near, size=capacity, fill_value=0)
    filled = jnp.arange(capacity) < count
    first, second = jnp.asarray(all_first)[kept], jnp.asarray(all_second)[kept]
    overflow = count > capacity
    if degree is None:
        return Neighbors(first, second, filled, count, overflow)
    arrivals, crowded = arrivals_of(first, second, filled, len(positions), degree)
    return Neighbors(first, second, filled, count, overflow | crowded, arrivals)


def arrivals_of(
    first: jax.Array, second: jax.Array, filled: jax.Array, atoms: int, degree: int
) -> tuple[Arrivals, jax.Array]:
    """The listed pairs by atom, with room for `degree` neighbours; and whether some atom has more."""
    total = 2 * len(first)
    atom = jnp.where(jnp.concatenate([filled, filled]), jnp.concatenate([first, second]), atoms)
    order = jnp.argsort(atom, stable=True)
    by_atom = atom[order]
    rank = jnp.arange(total) - jnp.searchsorted(by_atom, by_atom)
    # What is past the end, padding and overflow, is dropped.
    at = by_atom, jnp.where(by_atom < atoms, rank, degree)
    place = jnp.zeros((atoms, degree), jnp.int32).at[at].set(order.astype(jnp.int32), mode="drop")
    occupied = jnp.zeros((atoms, degree), bool).at[at].set(True, mode="drop")
    kept = (by_atom < atoms) & (rank < degree)
    slot = jnp.zeros(total, jnp.int32).at[order].set(jnp.where(kept, by_atom * degree + rank, 0).astype(jnp.int32))
    return Arrivals(place, occupied, slot), jnp.any((by_atom < atoms) & (rank >= degree))


def all_arrivals(count: int) -> Arrivals:
    """Those of `all_pairs`: every atom looks at all others."""
    first, second = all_pairs(count)
    order = np.argsort(np.concatenate([first, second]), kind="stable").astype(np.int32)
    slot = np.empty_like(order)
    slot[order] = np.arange(len(order), dtype=np.int32)
    shape = (count, count - 1)
    return Arrivals(jnp.asarray(order.reshape(shape)), jnp.ones(shape, bool), jnp.asarray(slot))


def pair_geometry(
    positions: jax.Array,
    first: jax.Array,
    second: jax.Array,
    filled: jax.Array | None,
    cell: np.ndarray | None,
    cutoff: float,
    strain: jax.Array | None = None,
    arrivals: Arrivals | None = None,
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
    return Pairs(first, second, vector, distance, mask, arrivals)
