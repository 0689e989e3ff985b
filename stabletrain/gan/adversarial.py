"""Adversarial losses: what discriminator and generator make of the scores of real and fake samples.

r are scores of real samples [B], q those of fake ones [B]; means run over the batch. The logistic loss is the same as
the non-saturating one of Goodfellow et al. 2014 and as binary cross-entropy with logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from stabletrain.methods.wgan_gp import critic_loss, generator_loss

Array = jax.Array


@dataclass(frozen=True)
class AdversarialLoss:
    """A pair of losses."""

    discriminator: Callable[[Array, Array], Array]
    """(r, q) -> scalar."""
    generator: Callable[[Array], Array]
    """q -> scalar."""


def _non_saturating(real: Array, fake: Array) -> Array:
    """softplus(-r) + softplus(q). Source: Goodfellow et al. 2014, Section 3."""
    return jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))


def _least_squares(real: Array, fake: Array) -> Array:
    """0.5 (r - 1)^2 + 0.5 q^2. Source: Mao et al. 2017, Eq. 9."""
    return 0.5 * jnp.mean((real - 1.0) ** 2) + 0.5 * jnp.mean(fake**2)


def _hinge(real: Array, fake: Array) -> Array:
    """[1 - r]_+ + [1 + q]_+. Source: Lim and Ye 2017; Miyato et al. 2018, Eq. 16."""
    return jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake))


ADVERSARIAL: dict[str, AdversarialLoss] = {
    "non-saturating": AdversarialLoss(_non_saturating, lambda fake: jnp.mean(jax.nn.softplus(-fake))),
    "least-squares": AdversarialLoss(_least_squares, lambda fake: 0.5 * jnp.mean((fake - 1.0) ** 2)),
    "hinge": AdversarialLoss(_hinge, lambda fake: -jnp.mean(fake)),
    "wasserstein": AdversarialLoss(critic_loss, generator_loss),
}
"""Every adversarial loss, by the name that `--adversarial` takes."""


def crammer_singer(logits: Array, classes: Array) -> Array:
    """Multi-class hinge loss mean_i [1 + max over k != t_i of z_ik - z_i,t_i]_+, a scalar.

    Shapes: logits [B, K], classes [B]. Source: Crammer and Singer 2001; for GANs Kavalerov et al. 2021, Eq. 4.
    """
    columns = jnp.arange(logits.shape[-1])
    asked = columns[None, :] == classes[:, None]
    target = jnp.sum(jnp.where(asked, logits, 0.0), axis=-1)
    strongest = jnp.max(jnp.where(asked, -jnp.inf, logits), axis=-1)
    return jnp.mean(jax.nn.relu(1.0 + strongest - target))
