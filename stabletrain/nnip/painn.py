"""PaiNN: equivariant messages of scalars and vectors (Schütt, Unke and Gastegger 2021, arXiv 2102.03150).

Each atom has F scalars and F vectors. Vectors turn with the molecule because they are only ever scaled by invariants,
mixed among features, and added to directions of pairs: features of degree 0 and 1 and those products between them that
are scalar times vector and vector . vector. Energies are invariant under rotations and reflections.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from stabletrain.nnip.pairs import Pairs
from stabletrain.nnip.schnet import ELEMENTS

NORM_EPSILON = 1e-8
"""Under the square root of a vector's norm, whose gradient has no limit at zero."""


class PaiNN(nn.Module):
    """Energies of atoms [N], without unit, from their elements and pairs. Source: Schütt et al. 2021, Figure 2.

    Radial functions are sin(k pi d / cutoff) / d, k = 1, ..., `radial` (Gasteiger et al. 2020), and each filter has a
    cosine that goes to zero at the cutoff with its slope.
    """

    features: int = 128
    interactions: int = 3
    radial: int = 20
    cutoff: float = 5.0

    @nn.compact
    def __call__(self, species: jax.Array, pairs: Pairs) -> jax.Array:
        distance = pairs.distance[:, None]  # (P, 1)
        order = jnp.arange(1, self.radial + 1)
        waves = order * jnp.pi / self.cutoff * jnp.sinc(order * distance / self.cutoff)  # (P, K); finite at zero
        envelope = jnp.where(pairs.mask[:, None], 0.5 * (jnp.cos(jnp.pi * distance / self.cutoff) + 1.0), 0.0)
        direction = pairs.vector / jnp.where(distance > 0, distance, 1.0)  # (P, 3)
        scalars = nn.Embed(ELEMENTS, self.features, name="elements")(species)  # (N, F)
        vectors = jnp.zeros((len(species), 3, self.features), direction.dtype)
        for number in range(self.interactions):
            scalars, vectors = Message(self.features, name=f"message_{number}")(
                scalars, vectors, waves, envelope, direction, pairs
            )
            scalars, vectors = Update(self.features, name=f"update_{number}")(scalars, vectors)
        hidden = nn.silu(nn.Dense(self.features // 2, name="hidden")(scalars))
        return nn.Dense(1, name="energy")(hidden)[:, 0]


class Message(nn.Module):
    """Scalars [N, F] and vectors [N, 3, F] after what the neighbours send. Source: Schütt et al. 2021, Eq. 7 and 8."""

    features: int

    @nn.compact
    def __call__(
        self,
        scalars: jax.Array,
        vectors: jax.Array,
        waves: jax.Array,
        envelope: jax.Array,
        direction: jax.Array,
        pairs: Pairs,
    ) -> tuple[jax.Array, jax.Array]:
        size = self.features
        hidden = nn.silu(nn.Dense(size, name="in")(scalars))
        sent = nn.Dense(3 * size, name="out")(hidden)  # (N, 3F)
        filters = nn.Dense(3 * size, name="filter")(waves) * envelope  # (P, 3F)
        # Sums in the type of the geometry: parameters are float32 also where positions are float64.
        new_scalars = scalars.astype(filters.dtype)
        new_vectors = vectors.astype(filters.dtype)
        ends = ((pairs.first, pairs.second, 1.0), (pairs.second, pairs.first, -1.0))
        for receiver, sender, sign in ends:
            scalar, along, carried = jnp.split(filters * sent[sender], 3, axis=-1)  # (P, F) each
            towards = sign * direction[:, :, None] * along[:, None, :]
            new_scalars = new_scalars.at[receiver].add(scalar)
            new_vectors = new_vectors.at[receiver].add(towards + vectors[sender] * carried[:, None, :])
        return new_scalars, new_vectors


class Update(nn.Module):
    """Scalars [N, F] and vectors [N, 3, F] after mixing within each atom. Source: Schütt et al. 2021, Eq. 9 and 10."""

    features: int

    @nn.compact
    def __call__(self, scalars: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        size = self.features
        left = nn.Dense(size, use_bias=False, name="left")(vectors)  # (N, 3, F)
        right = nn.Dense(size, use_bias=False, name="right")(vectors)
        norm = jnp.sqrt(jnp.sum(right**2, axis=1) + NORM_EPSILON)  # (N, F)
        hidden = nn.silu(nn.Dense(size, name="in")(jnp.concatenate([scalars, norm], axis=-1)))
        gate, scale, shift = jnp.split(nn.Dense(3 * size, name="out")(hidden), 3, axis=-1)
        scalars = scalars + shift + scale * jnp.sum(left * right, axis=1)
        return scalars, vectors + gate[:, None, :] * left
