"""Indicators of stability: of the gradients of several tasks (from their Gram matrix), of layers, of features.

With M_ij = <g_i, g_j> and a mask of the gradients that are there:

    condition number   sigma_1 / sigma_n of G = [g_1 .. g_n], the stability measure of Aligned-MTL and SPCL
    effective rank     exp(entropy of the shares of M's eigenvalues), Roy and Vetterli 2007
    cosines            mean and least over the pairs; the conflict rate is the share of pairs below 0
    magnitudes         2 ||g_i|| ||g_j|| / (||g_i||^2 + ||g_j||^2), mean over the pairs (Yu et al. 2020)
    least progress     min_i cos(d, g_i): an update d conflicts with no task where it is >= 0
    update share       ||d|| / ||sum_i g_i||: near 0 where an aggregator makes the step collapse
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

Array = jax.Array

SMALLEST_SHARE = 1e-12
"""Eigenvalues below this share of the largest are rounding: a condition number is at most 1e6."""


def _eigenvalues(gram: Array, mask: Array) -> Array:
    """The n largest eigenvalues in falling order, then zeros; n gradients are there. A zero matrix: zeros."""
    inside = mask[:, None] & mask[None, :]
    values = jnp.linalg.eigvalsh(jnp.where(inside, gram, 0.0))[::-1]
    return jnp.where(jnp.arange(len(gram)) < jnp.sum(mask), jnp.maximum(values, 0.0), 0.0)


def condition(gram: Array, mask: Array) -> Array:
    """Condition number of the gradients that are there; 1 for none or one, at most 1e6."""
    values, count = _eigenvalues(gram, mask), jnp.sum(mask)
    largest = values[0]
    least = values[jnp.maximum(count - 1, 0)]
    ratio = least / jnp.where(largest > 0, largest, 1.0)
    found = 1.0 / jnp.sqrt(jnp.maximum(ratio, SMALLEST_SHARE))
    return jnp.where((count > 1) & (largest > 0), found, 1.0)


def gram_indicators(gram: Array, mask: Array, slopes: Array, square: Array) -> dict[str, Array]:
    """The indicators of gradients `mask` [K] with Gram matrix [K, K] and of their update d.

    `slopes` [K]: <g_i, d>; `square`: ||d||^2. For d = sum_i w_i g_i they are M w and w^T M w.

    Pairs are those of two gradients that are there; with fewer than two, cosines and similarity are 1, the conflict
    rate is 0. Where the gradients' sum is 0 the update's share of it is told as 1.
    """
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0.0))
    present = mask & (norms > 0)
    pairs = present[:, None] & present[None, :] & (jnp.arange(len(gram))[:, None] < jnp.arange(len(gram))[None, :])
    count = jnp.sum(pairs)
    product = jnp.where(pairs, norms[:, None] * norms[None, :], 1.0)
    cosines = gram / product

    def mean(values: Array, otherwise: float) -> Array:
        total = jnp.sum(jnp.where(pairs, values, 0.0)) / jnp.maximum(count, 1)
        return jnp.where(count > 0, total, otherwise)

    squares = jnp.where(pairs, norms[:, None] ** 2 + norms[None, :] ** 2, 1.0)
    values = _eigenvalues(gram, mask)
    shares = values / jnp.where(values.sum() > 0, values.sum(), 1.0)
    entropy = -jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1.0)), 0.0))
    length = jnp.sqrt(jnp.maximum(square, 0.0))
    total = jnp.sqrt(jnp.maximum(jnp.sum(jnp.where(mask[:, None] & mask[None, :], gram, 0.0)), 0.0))
    progress = slopes / jnp.where(present & (length > 0), norms * length, 1.0)
    return {
        "condition": condition(gram, mask),
        "effective_rank": jnp.where(values.sum() > 0, jnp.exp(entropy), 0.0),
        "mean_cosine": mean(cosines, 1.0),
        "min_cosine": jnp.min(jnp.where(pairs, cosines, 1.0)),
        "conflict_rate": mean((cosines < 0).astype(jnp.float32), 0.0),
        "magnitude_similarity": mean(2 * product / squares, 1.0),
        "update_share": jnp.where(total > 0, length / jnp.where(total > 0, total, 1.0), 1.0),
        "least_progress": jnp.min(jnp.where(present & (length > 0), progress, 1.0)),
    }


# --- layers -----------------------------------------------------------------------------------------------------------


def layer_spectrum(kernel: NDArray[np.float32], size: int) -> NDArray[np.float64]:
    """Singular values of a layer as a linear map, in falling order.

    A dense kernel [in, out]: its own. A convolution [k, k, in, out] at stride 1 with circular boundary over size x size
    pixels: those of the in x out matrices of its Fourier transform at every frequency (Sedghi et al. 2019). The kernel
    must not be larger than the image. A layer with stride has other ones; these are those of its kernel.

    Raises: `ValueError` for a kernel larger than the image.
    """
    values = np.asarray(kernel, np.float64)
    if values.ndim == 2:
        return np.linalg.svd(values, compute_uv=False).astype(np.float64)
    if max(values.shape[:2]) > size:
        raise ValueError(f"a kernel of {values.shape[0]}x{values.shape[1]} on {size}x{size} pixels")
    transformed = np.fft.fft2(values, (size, size), axes=(0, 1))
    return np.sort(np.linalg.svd(transformed, compute_uv=False).ravel())[::-1].astype(np.float64)


# --- features ---------------------------------------------------------------------------------------------------------


def subspace_overlap(first: NDArray, second: NDArray, rank: int) -> float:
    """||U_a^T U_b||_F^2 / k of the k leading directions of two sets of features [N, D]: 0 apart, 1 the same plane.

    The directions are principal axes, each set centred at its own mean; k is `rank` or fewer where there are fewer
    examples or dimensions.
    """
    bases = []
    for features in (first, second):
        centred = np.asarray(features, np.float64) - np.mean(features, 0, dtype=np.float64)
        k = min(rank, len(centred) - 1, centred.shape[1])
        bases.append(np.linalg.svd(centred, full_matrices=False)[2][:k])
    k = min(len(bases[0]), len(bases[1]))
    return float(np.square(bases[0][:k] @ bases[1][:k].T).sum() / k)


def transition_dips(
    steps: NDArray[np.integer], accuracy: NDArray, starts: NDArray[np.integer], window: int
) -> list[float | None]:
    """How far the accuracy of the tasks that are there falls when another one starts.

    `steps` [S]: updates after which accuracies [S, T] were measured (NaN where they were not); `starts` [T]: updates
    before each task's first. For each start: the mean accuracy right before it, less the lowest within `window` updates
    after it, over the tasks that were measured before it. Positive = the accuracy fell. None for the tasks that start
    first, and where nothing was measured.
    """
    dips: list[float | None] = []
    for task, start in enumerate(starts):
        before = np.flatnonzero(steps == start)
        after = np.flatnonzero((steps > start) & (steps <= start + window))
        known = np.isfinite(accuracy[before[0]]) if len(before) else np.zeros(accuracy.shape[1], bool)
        known &= starts < starts[task]
        if not known.any() or not len(after):
            dips.append(None)
            continue
        dips.append(float(accuracy[before[0]][known].mean() - accuracy[after][:, known].mean(1).min()))
    return dips
