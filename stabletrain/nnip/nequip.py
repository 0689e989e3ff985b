"""NequIP: E(3)-equivariant messages (Batzner et al. 2022, Nature Communications 13, 2453, arXiv 2101.03164).

An atom has features of several degrees and parities (0e scalars, 0o pseudoscalars, 1o vectors, 1e pseudovectors). A
message is the tensor product of a neighbour's features with the spherical harmonics of the direction to it, each path
of the product weighted by a network of the distance. Energies do not change under rotations and reflections.

With 32 features, 3 interactions, degree 1 and four elements it has 120,984 parameters, as the released network of the
StABlE paper. Layers by e3nn-jax; this module is imported when a NequIP is made, since e3nn takes a second to import.
"""

from __future__ import annotations

import e3nn_jax as e3nn
import flax.linen as nn
import jax
import jax.numpy as jnp

from stabletrain.nnip.pairs import Pairs
from stabletrain.nnip.radial import polynomial_envelope

SILU_MOMENT = 0.5964692112
TANH_MOMENT = 0.6279287303
"""sqrt(E[f(z)^2]) of silu and tanh over a standard normal z: activations are divided by it."""


def normalized_silu(x: jax.Array) -> jax.Array:
    """silu with second moment one."""
    return nn.silu(x) / SILU_MOMENT


def normalized_tanh(x: jax.Array) -> jax.Array:
    """tanh, which is odd, with second moment one."""
    return jnp.tanh(x) / TANH_MOMENT


class NequIP(nn.Module):
    """Energies of atoms [N], without unit, from their elements and pairs. Source: Batzner et al. 2022, Figure 1.

    `elements` are the atomic numbers that may occur; `average_neighbors` is the mean number of neighbours within the
    cutoff, whose root divides every sum of messages. Radial functions are 2 / cutoff * sin(w_k d / cutoff) / d with
    learnt w_k, starting from k pi, times a polynomial that goes to zero at the cutoff with two derivatives.
    Differs: initial weights are drawn by e3nn-jax, with the variances of the released code.
    """

    elements: tuple[int, ...]
    average_neighbors: float
    features: int = 32
    interactions: int = 3
    degree: int = 1
    radial: int = 8
    radial_features: int = 64
    radial_layers: int = 2
    cutoff: float = 5.0

    @nn.compact
    def __call__(self, species: jax.Array, pairs: Pairs) -> jax.Array:
        distance = pairs.distance[:, None]  # (P, 1)
        first = jnp.pi * jnp.arange(1, self.radial + 1, dtype=jnp.float32)
        frequency = self.param("frequencies", lambda key: first)
        waves = 2 / self.cutoff**2 * frequency * jnp.sinc(frequency * distance / (jnp.pi * self.cutoff))
        envelope = jnp.where(pairs.mask[:, None], polynomial_envelope(distance / self.cutoff, 6), 0.0)
        radial = waves * envelope  # (P, K)
        direction = pairs.vector / jnp.where(distance > 0, distance, 1.0)
        both = e3nn.IrrepsArray("1o", jnp.concatenate([direction, -direction]))  # (2P, 3): at the first, at the second
        harmonics = e3nn.spherical_harmonics(range(self.degree + 1), both, normalize=False, normalization="component")
        kind = jnp.searchsorted(jnp.asarray(self.elements), species)
        table = self.param("elements", nn.initializers.normal(1.0), (len(self.elements), self.features))
        scalars = (table[kind] / len(self.elements) ** 0.5).astype(direction.dtype)
        atoms = e3nn.IrrepsArray(f"{self.features}x0e", scalars)
        for number in range(self.interactions):
            atoms = Convolution(
                wanted=str(self._irreps()),
                kinds=len(self.elements),
                average_neighbors=self.average_neighbors,
                radial_sizes=(self.radial_features,) * self.radial_layers,
                name=f"convolution_{number}",
            )(atoms, kind, radial, harmonics, pairs)
        hidden = e3nn.flax.Linear(f"{max(1, self.features // 2)}x0e", name="hidden")(atoms)
        return e3nn.flax.Linear("0e", name="energy")(hidden).array[:, 0]

    def _irreps(self) -> e3nn.Irreps:
        """What an atom may carry: `features` of each degree and parity."""
        kinds = [(self.features, (degree, parity)) for degree in range(self.degree + 1) for parity in (1, -1)]
        return e3nn.Irreps(kinds)


class Convolution(nn.Module):
    """The features of atoms after one exchange of messages, gated."""

    wanted: str  # irreps; Flax would make a tuple of e3nn's
    kinds: int
    average_neighbors: float
    radial_sizes: tuple[int, ...]

    @nn.compact
    def __call__(
        self, atoms: e3nn.IrrepsArray, kind: jax.Array, radial: jax.Array, harmonics: e3nn.IrrepsArray, pairs: Pairs
    ) -> e3nn.IrrepsArray:
        reachable = e3nn.tensor_product(atoms.irreps, harmonics.irreps)
        kept = e3nn.Irreps(self.wanted).filter(keep=reachable)
        scalars, gated = kept.filter(lmax=0), kept.filter(drop=["0e", "0o"])
        # One even scalar opens each feature that is not a scalar.
        before_gate = (e3nn.Irreps([(gated.num_irreps, "0e")]) + kept).regroup()

        values = e3nn.flax.Linear(atoms.irreps, name="values")(atoms)
        paths = [ir for _, ir in before_gate]
        receiver = jnp.concatenate([pairs.first, pairs.second])
        sender = jnp.concatenate([pairs.second, pairs.first])
        products = e3nn.tensor_product(values[sender], harmonics, filter_ir_out=paths)
        weights = radial  # (P, K): a pair has the same distance seen from both of its ends
        for number, size in enumerate((*self.radial_sizes, products.irreps.num_irreps)):
            dense = nn.Dense(size, use_bias=False, kernel_init=nn.initializers.normal(1.0), name=f"radial_{number}")
            weights = dense(weights) / weights.shape[-1] ** 0.5
            weights = normalized_silu(weights) if number < len(self.radial_sizes) else weights
        messages = (products * jnp.concatenate([weights, weights])).array
        total = jnp.zeros((len(kind), messages.shape[-1]), messages.dtype).at[receiver].add(messages)
        total = e3nn.IrrepsArray(products.irreps, total / self.average_neighbors**0.5)

        mixed = e3nn.flax.Linear(before_gate, force_irreps_out=True, name="mix")(total)
        own = e3nn.flax.Linear(before_gate, force_irreps_out=True, num_indexed_weights=self.kinds, name="own")
        mixed = mixed + own(kind, atoms) / self.kinds**0.5
        return gate(mixed, scalars, gated)


def gate(x: e3nn.IrrepsArray, scalars: e3nn.Irreps, gated: e3nn.Irreps) -> e3nn.IrrepsArray:
    """silu of even scalars, tanh of odd ones; what is left of the even scalars opens the other features, by silu."""
    even = x.filter(keep="0e").array
    here = scalars.count("0e")
    parts = [e3nn.IrrepsArray(f"{here}x0e", normalized_silu(even[:, :here]))]
    if odd := scalars.count("0o"):
        parts.append(e3nn.IrrepsArray(f"{odd}x0o", normalized_tanh(x.filter(keep="0o").array)))
    if gated.dim:
        parts.append(x.filter(drop=["0e", "0o"]) * normalized_silu(even[:, here:]))
    return e3nn.concatenate(parts)
