"""Frechet distance between Gaussians fitted to features; means and covariances from a stream of batches.

Source: Heusel et al. 2017, Eq. 6: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Called FID only where the features
are the 2015 Inception's (see `protocol`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike, NDArray

CHUNK = 4096


@dataclass(frozen=True)
class Moments:
    """Mean and sample covariance (divided by N - 1) of `count` feature vectors, in float64."""

    count: int
    mean: NDArray[np.float64]  # [D]
    covariance: NDArray[np.float64]  # [D, D]


class MomentAccumulator:
    """Adds up mean and scatter over batches, in float64 on the device; holds D x D numbers and no features.

    Merging centred batches keeps the digits that sums of x and x x^T lose where the mean is large.
    Source: Chan, Golub and LeVeque 1979, Eqs. 2.1.
    """

    def __init__(self, dimension: int) -> None:
        with jax.enable_x64(True):
            self._mean = jnp.zeros(dimension, jnp.float64)
            self._scatter = jnp.zeros((dimension, dimension), jnp.float64)
        self.count = 0

    def add(self, features: ArrayLike) -> None:
        """Features [B, D]. Raises: `ValueError` when they are not, or not finite."""
        batch = np.asarray(features)
        if batch.ndim != 2 or batch.shape[1] != self._mean.shape[0]:
            raise ValueError(f"expected features [B, {self._mean.shape[0]}], not {list(batch.shape)}")
        if not np.isfinite(batch).all():
            raise ValueError("the features are not finite")
        if not len(batch):
            return
        with jax.enable_x64(True):
            self._mean, self._scatter = _merge(np.float64(self.count), self._mean, self._scatter, batch)
        self.count += len(batch)

    def moments(self) -> Moments:
        """Mean and sample covariance of what was added. Raises: `ValueError` for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two feature vectors, not {self.count}")
        scatter = np.asarray(self._scatter)
        return Moments(self.count, np.asarray(self._mean), (scatter + scatter.T) / (2.0 * (self.count - 1)))


@jax.jit
def _merge(count: jax.Array, mean: jax.Array, scatter: jax.Array, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
    features = batch.astype(jnp.float64)
    total = count + features.shape[0]
    batch_mean = jnp.mean(features, axis=0)
    centred = features - batch_mean
    delta = batch_mean - mean
    between = jnp.outer(delta, delta) * (count * features.shape[0] / total)
    within = jnp.matmul(centred.T, centred, precision=lax.Precision.HIGHEST)
    return mean + delta * (features.shape[0] / total), scatter + within + between


def moments(batches: Iterable[ArrayLike] | NDArray[Any]) -> Moments:
    """Mean and covariance of features: one array [N, D], or any number of batches of it.

    Raises: `ValueError` as `MomentAccumulator`.
    """
    if isinstance(batches, np.ndarray):
        whole = batches
        batches = (whole[start : start + CHUNK] for start in range(0, len(whole), CHUNK))
    accumulator: MomentAccumulator | None = None
    for batch in batches:
        features = np.asarray(batch)
        accumulator = accumulator or MomentAccumulator(features.shape[-1])
        accumulator.add(features)
    if accumulator is None:
        raise ValueError("a covariance needs at least two feature vectors, not 0")
    return accumulator.moments()


def frechet_distance(first: Moments, second: Moments) -> float:
    """The squared Frechet (Wasserstein-2) distance of two Gaussians; 0 for equal ones, up to rounding.

    The trace of the root of S1 S2 is the sum of the singular values of L1^T L2, with S = L L^T from the eigenvalues
    of S. No matrix root is taken, so singular covariances (fewer samples than dimensions) need no jitter on the
    diagonal, and an eigenvalue that is zero does not come back as the root of its rounding error.

    Raises: `ValueError` when the dimensions differ or a number is not finite.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features of {first.mean.size} and of {second.mean.size} dimensions have no distance")
    for one in (first, second):
        if not (np.isfinite(one.mean).all() and np.isfinite(one.covariance).all()):
            raise ValueError("the mean or the covariance is not finite")
    with jax.enable_x64(True):
        distance = _distance(first.mean, first.covariance, second.mean, second.covariance)
        # A square; rounding can leave -1e-13 between equal Gaussians.
        return max(float(distance), 0.0)


@jax.jit
def _distance(mean1: jax.Array, covariance1: jax.Array, mean2: jax.Array, covariance2: jax.Array) -> jax.Array:
    product = jnp.matmul(_factor(covariance1).T, _factor(covariance2), precision=lax.Precision.HIGHEST)
    root_trace = jnp.sum(jnp.linalg.svd(product, compute_uv=False))
    spread = jnp.trace(covariance1) + jnp.trace(covariance2) - 2.0 * root_trace
    return jnp.sum((mean1 - mean2) ** 2) + spread


def _factor(covariance: jax.Array) -> jax.Array:
    """L with L L^T = covariance. Eigenvalues within the rounding error of the largest one are zero."""
    values, vectors = jnp.linalg.eigh(covariance)
    floor = values[-1] * covariance.shape[0] * jnp.finfo(covariance.dtype).eps
    return vectors * jnp.sqrt(jnp.where(values > floor, values, 0.0))


def intra_class_frechet_distance(
    real: NDArray[Any], real_labels: NDArray[np.integer], fake: NDArray[Any], fake_labels: NDArray[np.integer]
) -> tuple[float, dict[int, float]]:
    """The mean over classes of the Frechet distance within a class, and the distance of each class.

    Every class of the real features counts once, however many examples it has.

    Shapes: features [N, D] and [M, D], labels [N] and [M].
    Raises: `ValueError` when a class of the real data has fewer than two real or two generated examples.
    """
    distances: dict[int, float] = {}
    for label in np.unique(real_labels).tolist():
        of_real, of_fake = real[real_labels == label], fake[fake_labels == label]
        if min(len(of_real), len(of_fake)) < 2:
            raise ValueError(
                f"class {label} has {len(of_real)} real and {len(of_fake)} generated examples: each needs two or more"
            )
        distances[label] = frechet_distance(moments(of_real), moments(of_fake))
    return float(np.mean(list(distances.values()))), distances
