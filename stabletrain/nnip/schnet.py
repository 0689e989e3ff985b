"""SchNet: continuous-filter convolutions (Schütt et al. 2017, arXiv 1706.08566).

In the size of the StABlE paper (64 features, 6 interactions, 25 Gaussians, cutoff 5 A) it has 117,953 parameters.
Filters depend on distances alone, so that each pair is looked at once and serves both of its atoms.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from stabletrain.nnip.pairs import Pairs

ELEMENTS = 100


def shifted_softplus(x: jax.Array) -> jax.Array:
    """ln(e^x / 2 + 1 / 2): zero at zero. Source: Schütt et al. 2017, Section 4."""
    return nn.softplus(x) - math.log(2.0)


class SchNet(nn.Module):
    """Energies of atoms [N], without unit, from their elements and pairs.

    The filter's cosine goes to zero at the cutoff with its slope, so that forces are continuous there.
    Source: Schütt et al. 2017, with the filter envelope and the output head of PyTorch Geometric.
    """

    features: int = 64
    interactions: int = 6
    gaussians: int = 25
    cutoff: float = 5.0

    @nn.compact
    def __call__(self, species: jax.Array, pairs: Pairs) -> jax.Array:
        centres = jnp.linspace(0.0, self.cutoff, self.gaussians)
        width = self.cutoff / (self.gaussians - 1)
        distance = pairs.distance[:, None]  # (P, 1)
        radial = jnp.exp(-0.5 * ((distance - centres) / width) ** 2)  # (P, G)
        envelope = jnp.where(pairs.mask[:, None], 0.5 * (jnp.cos(jnp.pi * distance / self.cutoff) + 1.0), 0.0)
        features = nn.Embed(ELEMENTS, self.features, name="elements")(species)  # (N, F)
        for number in range(self.interactions):
            features = features + Interaction(self.features, name=f"interaction_{number}")(
                features, radial, envelope, pairs
            )
        hidden = shifted_softplus(nn.Dense(self.features // 2, name="hidden")(features))
        return nn.Dense(1, name="energy")(hidden)[:, 0]


class Interaction(nn.Module):
    """What an atom's features gain from its neighbours: (N, F)."""

    features: int

    @nn.compact
    def __call__(self, features: jax.Array, radial: jax.Array, envelope: jax.Array, pairs: Pairs) -> jax.Array:
        filters = shifted_softplus(nn.Dense(self.features, name="filter_in")(radial))
        filters = nn.Dense(self.features, name="filter_out")(filters) * envelope  # (P, F)
        values = nn.Dense(self.features, use_bias=False, name="values")(features)
        messages = jnp.zeros(features.shape, filters.dtype).at[pairs.first].add(filters * values[pairs.second])
        messages = messages.at[pairs.second].add(filters * values[pairs.first])
        hidden = shifted_softplus(nn.Dense(self.features, name="update_in")(messages))
        return nn.Dense(self.features, name="update_out")(hidden)
