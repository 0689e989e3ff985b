"""Lengths of pairs and angles of bonds in one frame.

**Units**: A; angles in degrees. **Shapes**: positions [n, 3]; a cell [3, 3] with the lattice vectors as rows, or None.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.nnip.pairs import displacement


def pair_lengths(positions: jax.Array, pairs: np.ndarray, cell: np.ndarray | None = None) -> jax.Array:
    """Distances of pairs of atoms to the nearest image. Shapes: positions [n, 3], pairs int [P, 2] -> [P]."""
    vectors = displacement(positions, jnp.asarray(pairs[:, 0]), jnp.asarray(pairs[:, 1]), cell)
    return jnp.sqrt(jnp.sum(vectors**2, axis=-1))


def angles_of(bonds: np.ndarray) -> np.ndarray:
    """Every pair of bonds that share an atom, as (end, centre, end): int [A, 3] from int [bonds, 2]."""
    neighbours: dict[int, list[int]] = {}
    for i, j in np.asarray(bonds).tolist():
        neighbours.setdefault(i, []).append(j)
        neighbours.setdefault(j, []).append(i)
    triples = [
        (a, centre, b)
        for centre, ends in sorted(neighbours.items())
        for k, a in enumerate(sorted(ends))
        for b in sorted(ends)[k + 1 :]
    ]
    return np.asarray(triples, int).reshape(-1, 3)


def bond_angles(positions: jax.Array, triples: np.ndarray, cell: np.ndarray | None = None) -> jax.Array:
    """Angles at the middle atom, 0 to 180 degrees. Shapes: positions [n, 3], triples int [A, 3] -> [A]."""
    ends, centre = jnp.asarray(triples[:, [0, 2]]), jnp.asarray(triples[:, 1])
    one = displacement(positions, centre, ends[:, 0], cell)
    other = displacement(positions, centre, ends[:, 1], cell)
    # atan2 is exact near 0 and 180 degrees, where the arc cosine is not.
    crossed = jnp.linalg.norm(jnp.cross(one, other), axis=-1)
    return jnp.degrees(jnp.arctan2(crossed, jnp.sum(one * other, axis=-1)))
