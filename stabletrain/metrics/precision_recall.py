"""Precision and recall of generated samples by nearest neighbours; density and coverage.

Sources: Kynkaanniemi et al. 2019, Eqs. 1-3 (improved precision and recall); Naeem et al. 2020, Eqs. 3-6 (density and
coverage). Distances are Euclidean, in float64, computed in blocks: the N x N matrix never exists.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from stabletrain.metrics.progress import Progress, silent

ROWS, COLUMNS = 1024, 4096
"""Of a block of distances: 32 MiB in float64."""

Tell = Callable[[], None]


@dataclass(frozen=True)
class PrecisionRecall:
    """`precision`: share of generated samples inside the real manifold; `recall`: the reverse."""

    precision: float
    recall: float


@dataclass(frozen=True)
class DensityCoverage:
    """`density`: real balls around a generated sample, over k (may exceed 1); `coverage`: real balls that hold one."""

    density: float
    coverage: float


def precision_recall(
    real: NDArray[Any], fake: NDArray[Any], *, k: int = 3, progress: Progress = silent
) -> PrecisionRecall:
    """Improved precision and recall. A sample is inside when it is at most as far as the k-th neighbour of a centre.

    Use as many real as generated samples: both numbers depend on how many there are.

    Shapes: real [N, D], fake [M, D].
    Raises: `ValueError` when a set has no more than k vectors, or the dimensions differ.
    """
    tell = _counted(progress, "precision and recall", [real, fake, fake, real])
    real_radii, fake_radii = neighbour_radii(real, k, tell), neighbour_radii(fake, k, tell)
    inside_real = _inside(fake, real, real_radii, strict=False, tell=tell)
    inside_fake = _inside(real, fake, fake_radii, strict=False, tell=tell)
    return PrecisionRecall(float(np.mean(inside_real > 0)), float(np.mean(inside_fake > 0)))


def density_coverage(
    real: NDArray[Any], fake: NDArray[Any], *, k: int = 5, progress: Progress = silent
) -> DensityCoverage:
    """Density and coverage. A sample is inside when it is nearer than the k-th neighbour, as in the released code.

    Shapes: real [N, D], fake [M, D].
    Raises: `ValueError` when the real set has no more than k vectors, or the dimensions differ.
    """
    tell = _counted(progress, "density and coverage", [real, fake, real])
    radii = neighbour_radii(real, k, tell)
    density = float(np.mean(_inside(fake, real, radii, strict=True, tell=tell))) / k
    nearest = _nearest(real, fake, tell)
    return DensityCoverage(density, float(np.mean(nearest < radii)))


def neighbour_radii(vectors: NDArray[Any], k: int, tell: Tell = lambda: None) -> NDArray[np.float64]:
    """The squared distance of each vector to its k-th nearest other one. Shapes: [N, D] -> [N].

    Raises: `ValueError` when there are no more than k vectors.
    """
    if not 1 <= k < len(vectors):
        raise ValueError(f"{len(vectors)} vectors have no neighbour number {k}")

    def combine(smallest: jax.Array, block: jax.Array, row: int, column: int) -> jax.Array:
        return _keep_smallest(smallest, block, row, column, k)

    return _reduce(vectors, vectors, lambda rows: jnp.full((rows, k), jnp.inf), combine, tell)[:, -1]


def _inside(
    points: NDArray[Any], centres: NDArray[Any], radii: NDArray[Any], *, strict: bool, tell: Tell
) -> NDArray[np.float64]:
    """How many balls around `centres` hold each point. `radii` are squared."""
    padded = np.full(_padded(len(centres), COLUMNS), -np.inf)
    padded[: len(radii)] = radii

    def combine(count: jax.Array, block: jax.Array, row: int, column: int) -> jax.Array:
        return _count_inside(count, block, padded[column : column + block.shape[1]], strict)

    return _reduce(points, centres, lambda rows: jnp.zeros((rows, 1)), combine, tell)[:, 0]


def _nearest(points: NDArray[Any], others: NDArray[Any], tell: Tell) -> NDArray[np.float64]:
    """The squared distance of each point to the nearest of `others`."""

    def combine(smallest: jax.Array, block: jax.Array, row: int, column: int) -> jax.Array:
        return jnp.minimum(smallest, jnp.min(block, axis=1, keepdims=True))

    return _reduce(points, others, lambda rows: jnp.full((rows, 1), jnp.inf), combine, tell)[:, 0]


def _reduce(
    rows: NDArray[Any],
    columns: NDArray[Any],
    start: Callable[[int], jax.Array],
    combine: Callable[[jax.Array, jax.Array, int, int], jax.Array],
    tell: Tell,
) -> NDArray[np.float64]:
    """Folds every row of the matrix of squared distances, block by block. Columns past the end are infinitely far."""
    if rows.ndim != 2 or rows.shape[1:] != columns.shape[1:]:
        raise ValueError(f"no distances between features {list(rows.shape)} and {list(columns.shape)}")
    results = []
    with jax.enable_x64(True):
        for row in range(0, len(rows), ROWS):
            block_rows = _slice(rows, row, ROWS)
            folded = start(len(block_rows))
            for column in range(0, len(columns), COLUMNS):
                block_columns = _slice(columns, column, COLUMNS)
                block = _squared_distances(block_rows, block_columns, len(columns) - column)
                folded = combine(folded, block, row, column)
            results.append(np.asarray(folded)[: len(rows) - row])
            tell()
    return np.concatenate(results)


def _slice(vectors: NDArray[Any], start: int, size: int) -> NDArray[Any]:
    """`size` vectors from `start`, filled up with zeros; a small set is one block of a power of two."""
    part = vectors[start : start + size]
    filled = np.zeros((_padded(len(part), size) if start == 0 else size, vectors.shape[1]), vectors.dtype)
    filled[: len(part)] = part
    return filled


def _padded(count: int, size: int) -> int:
    """The number of vectors after filling up: whole blocks, or a power of two for less than one."""
    return 1 << (count - 1).bit_length() if count < size else -(-count // size) * size


@jax.jit
def _squared_distances(x: jax.Array, y: jax.Array, valid: jax.Array) -> jax.Array:
    """|x|^2 + |y|^2 - 2 x.y as [R, C]; infinite in the columns from `valid` on.

    Differences within rounding are zero, so that equal vectors are at distance 0 whatever the order of summation.
    """
    x, y = x.astype(jnp.float64), y.astype(jnp.float64)
    scale = jnp.sum(x**2, axis=1)[:, None] + jnp.sum(y**2, axis=1)[None, :]
    squared = scale - 2.0 * jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST)
    squared = jnp.where(squared > 1e-13 * scale, squared, 0.0)
    return jnp.where(jnp.arange(y.shape[0])[None, :] < valid, squared, jnp.inf)


@functools.partial(jax.jit, static_argnums=4)
def _keep_smallest(smallest: jax.Array, block: jax.Array, row: jax.Array, column: jax.Array, k: int) -> jax.Array:
    """The k smallest of those so far [R, k] and a block [R, C], in order, without each vector's distance to itself.

    k passes over the block: XLA's top_k of float64 sorts whole rows on the CPU, six times slower.
    """
    own = row + jnp.arange(block.shape[0])[:, None] == column + jnp.arange(block.shape[1])[None, :]
    left = jnp.concatenate([smallest, jnp.where(own, jnp.inf, block)], axis=1)
    places = jnp.arange(left.shape[1])[None, :]
    found = []
    for _ in range(k):
        place = jnp.argmin(left, axis=1)
        found.append(jnp.take_along_axis(left, place[:, None], axis=1))
        left = jnp.where(places == place[:, None], jnp.inf, left)
    return jnp.concatenate(found, axis=1)


@functools.partial(jax.jit, static_argnums=3)
def _count_inside(count: jax.Array, block: jax.Array, radii: jax.Array, strict: bool) -> jax.Array:
    inside = block < radii if strict else block <= radii
    return count + jnp.sum(inside, axis=1, keepdims=True)


def _counted(progress: Progress, label: str, passes: list[NDArray[Any]]) -> Tell:
    """A call after each block of rows, turned into how many of all of them are done."""
    total = sum(-(-len(rows) // ROWS) for rows in passes)
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        progress(label, done, total)

    return tell
