"""Regularisers of discriminator and generator: pure functions of scores, samples and networks as functions.

A critic is a function of a batch that returns scores [B], as in `stabletrain.methods.wgan_gp`, whose gradient penalty
and weight clipping are used as they are. Weights (lambda, gamma) are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from stabletrain.methods.wgan_gp import Critic, gradient_norms, gradient_norms_plain, gradient_penalty

Array = jax.Array


def r1(critic: Critic, real: Array, *, mixes_samples: bool) -> Array:
    """0.5 E[||grad_x D(x)||^2] at real samples [B, ...]: a scalar.

    `mixes_samples`: the score of a sample depends on others (minibatch statistics), so that the cheap derivative of
    norms does not hold; the gradient is then that of the sum of the scores. Source: Mescheder et al. 2018, Eq. 9.
    """
    norms = gradient_norms_plain(critic, real) if mixes_samples else gradient_norms(critic, real)
    return 0.5 * jnp.mean(norms**2)


def dragan(critic: Critic, real: Array, key: Array) -> Array:
    """E[(||grad D(x + alpha n)||_2 - 1)^2] with alpha uniform and n = 0.5 std(x) U[0, 1): a penalty around the data.

    std is that of the whole batch. Source: Kodali et al. 2017, Algorithm 1, with the noise of its released code, which
    is never negative.
    """
    noise_key, alpha_key = jax.random.split(key)
    noise = 0.5 * jnp.std(real) * jax.random.uniform(noise_key, real.shape)
    alpha = jax.random.uniform(alpha_key, real.shape[:1])
    return gradient_penalty(critic, real + noise, real, alpha)


def lecam(real_scores: Array, fake_scores: Array, mean_real: Array, mean_fake: Array) -> Array:
    """E[[D(x) - a_F]_+^2] + E[[a_R - D(G(z))]_+^2] with a_R, a_F moving averages of the scores: a scalar.

    Source: Tseng et al. 2021, Eq. 4. Differs: only the side that pulls the scores together is penalised, as in
    PyTorch-StudioGAN and the authors' code.
    """
    above = jnp.mean(jax.nn.relu(real_scores - mean_fake) ** 2)
    below = jnp.mean(jax.nn.relu(mean_real - fake_scores) ** 2)
    return above + below


def mean_square(first: Array, second: Array) -> Array:
    """Mean squared difference over all entries: the distance of consistency regularisation (Zhang et al. 2020)."""
    return jnp.mean((first - second) ** 2)


def orthogonality(params: Any) -> Array:
    """sum over kernels of ||W W^T * (1 - I)||_F^2, a scalar: how far from orthogonal the filters of each layer are.

    W is [outputs, all inputs]; a filter's own length is left free. Every parameter of two or more axes counts but the
    class embedding `shared`. Source: Brock et al. 2019, Eq. 3, which has it in the generator.
    """
    total = jnp.zeros(())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.ndim < 2 or path[0].key == "shared":
            continue
        matrix = leaf.reshape(-1, leaf.shape[-1])
        gram = matrix.T @ matrix  # (outputs, outputs)
        total = total + jnp.sum(gram**2) - jnp.sum(jnp.diagonal(gram) ** 2)
    return total


def path_length(
    synthesize: Callable[[Array], Array], styles: Array, key: Array, mean: Array, *, decay: float = 0.01
) -> tuple[Array, Array]:
    """E[(||J_w^T y||_2 - a)^2] of a generator's styles [B, L, D], and the moving average a after this batch.

    y is normal noise in the image's shape over sqrt(H W), so that the expected length does not depend on the size; the
    length is the root of the squares summed over D and averaged over the L layers. `mean` is a before this batch; the
    new average takes part in the penalty as a constant. Source: Karras et al. 2020, Section 3.2 and Eq. 4.
    """
    samples, pull_back = jax.vjp(synthesize, styles)
    noise = jax.random.normal(key, samples.shape, samples.dtype) / jnp.sqrt(samples.shape[1] * samples.shape[2])
    (gradient,) = pull_back(noise)
    squares = jnp.mean(jnp.sum(gradient.astype(jnp.float32) ** 2, axis=2), axis=1)  # (B,)
    zero = squares == 0
    lengths = jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squares)))
    moved = jax.lax.stop_gradient(mean + decay * (jnp.mean(lengths) - mean))
    return jnp.mean((lengths - moved) ** 2), moved
