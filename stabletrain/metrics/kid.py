"""Kernel distance: the unbiased squared maximum mean discrepancy with a cubic kernel, averaged over subsets.

Source: Binkowski et al. 2018, section 4: k(x, y) = (x . y / D + 1)^3. Called KID only where the features are the 2015
Inception's (see `protocol`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from stabletrain.metrics.progress import Progress, silent


@dataclass(frozen=True)
class KernelDistance:
    """Mean over subsets, and their standard deviation (None for one subset). Papers often print 1000 times it."""

    mean: float
    std: float | None
    subsets: int
    subset_size: int


def kernel_distance(
    real: NDArray[Any],
    fake: NDArray[Any],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    progress: Progress = silent,
) -> KernelDistance:
    """The unbiased estimate on `subsets` pairs of random subsets, drawn without replacement within each.

    Unbiased: it may be negative, and its expectation does not depend on the number of samples. Where neither set is
    larger than `subset_size`, every subset would be the whole set: then it is computed once on everything, and the
    result says so.

    Shapes: real [N, D], fake [M, D].
    Raises: `ValueError` when either has fewer than two vectors, or the dimensions differ.
    """
    if real.shape[1:] != fake.shape[1:] or min(len(real), len(fake)) < 2:
        raise ValueError(f"no kernel distance between features {list(real.shape)} and {list(fake.shape)}")
    sizes = min(subset_size, len(real)), min(subset_size, len(fake))
    if sizes == (len(real), len(fake)):
        return KernelDistance(unbiased_mmd2(real, fake), None, 1, min(sizes))
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64)))
    found = []
    for subset in range(subsets):
        progress("kernel distance", subset, subsets)
        of_real = generator.choice(len(real), sizes[0], replace=False)
        of_fake = generator.choice(len(fake), sizes[1], replace=False)
        found.append(unbiased_mmd2(real[of_real], fake[of_fake]))
    std = float(np.std(found)) if subsets > 1 else None
    return KernelDistance(float(np.mean(found)), std, subsets, min(sizes))


def unbiased_mmd2(real: NDArray[Any], fake: NDArray[Any]) -> float:
    """The unbiased squared MMD of two sets of features, in float64. Shapes: [N, D], [M, D]; N x M numbers are held."""
    with jax.enable_x64(True):
        return float(_unbiased_mmd2(np.asarray(real), np.asarray(fake)))


@jax.jit
def _unbiased_mmd2(real: jax.Array, fake: jax.Array) -> jax.Array:
    real, fake = real.astype(jnp.float64), fake.astype(jnp.float64)

    def kernel(x: jax.Array, y: jax.Array) -> jax.Array:
        return (jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST) / x.shape[1] + 1.0) ** 3

    def within(x: jax.Array) -> jax.Array:
        """The mean over pairs of different vectors."""
        diagonal = (jnp.sum(x**2, axis=1) / x.shape[1] + 1.0) ** 3
        return (jnp.sum(kernel(x, x)) - jnp.sum(diagonal)) / (x.shape[0] * (x.shape[0] - 1))

    return within(real) + within(fake) - 2.0 * jnp.mean(kernel(real, fake))
