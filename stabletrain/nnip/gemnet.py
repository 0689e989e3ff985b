"""GemNet-T: messages between directed edges that see angles (Gasteiger, Becker, Günnemann 2021, arXiv 2106.08903).

Each atom has features, and each *arrival* of a neighbour at an atom has a message. A message c -> a is changed by those
of the other neighbours b -> a, by their distances and the angle between them: padded triplets, all pairs of the K
arrivals at each atom. In the size of the StABlE paper (128 features, 4 interactions) it has 1,891,025 parameters, 17 of
them scaling factors that are not learnt but measured on data once, see `fitted_scaling`.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from stabletrain.nnip.pairs import Pairs
from stabletrain.nnip.radial import polynomial_envelope

ELEMENTS = 83
FRAMES = "frames"
"""The mapped axis over which scaling factors are measured."""
HALF = 0.5**0.5


def scaled_silu(x: jax.Array) -> jax.Array:
    """silu over 0.6, which keeps the variance of a standard normal variable about one."""
    return nn.silu(x) / 0.6


def he_orthogonal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Orthogonal columns with mean zero and variance 1 / fan-in. Source: Gasteiger et al. 2021, released code."""
    flat = nn.initializers.orthogonal()(key, (math.prod(shape[:-1]), shape[-1]), dtype)
    flat = (flat - jnp.mean(flat, axis=0)) / jnp.sqrt(jnp.var(flat, axis=0) + 1e-6)
    return (flat / flat.shape[0] ** 0.5).reshape(shape)


class Dense(nn.Module):
    """A matrix without bias, and the activation unless `linear`."""

    size: int
    linear: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.size, use_bias=False, kernel_init=he_orthogonal, name="dense")(x)
        return x if self.linear else scaled_silu(x)


class Residual(nn.Module):
    """(x + two dense layers of x) / sqrt 2."""

    size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return HALF * (x + Dense(self.size, name="second")(Dense(self.size, name="first")(x)))


class Scaling(nn.Module):
    """Multiplies by a number that makes the variance of `value` that of `reference`; it is measured, not learnt.

    The variance is over the entries in the masks (and over frames), its mean over features. It is measured where the
    collection "scaling" is mutable, under a mapped axis `FRAMES`; elsewhere the parameter stands for it.
    """

    @nn.compact
    def __call__(self, reference: jax.Array, reference_mask: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
        scale = jax.lax.stop_gradient(self.param("scale", nn.initializers.ones, ()))
        if self.is_mutable_collection("scaling") and not self.is_initializing():
            own = _spread(value, mask)
            scale = jnp.where(own > 0, jnp.sqrt(_spread(reference, reference_mask) / jnp.where(own > 0, own, 1.0)), 1.0)
            self.variable("scaling", "scale", lambda: scale).value = scale
        return scale * value


def _spread(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over features (the last axis) of the variance over entries in the mask and over frames."""
    weights = mask[..., None].astype(x.dtype)
    axes = tuple(range(x.ndim - 1))

    def mean(y: jax.Array) -> jax.Array:
        total = jax.lax.psum(jnp.sum(y * weights, axis=axes), FRAMES)
        return total / jnp.maximum(jax.lax.psum(jnp.sum(weights, axis=axes), FRAMES), 1.0)

    return jnp.mean(mean((x - mean(x)) ** 2))


class Edges:
    """What all blocks need of the structure. Shapes: N atoms, K arrivals at each."""

    def __init__(self, pairs: Pairs, cutoff: float, radial: int, spherical: int) -> None:
        arrivals = pairs.arrivals
        if arrivals is None:
            raise ValueError("GemNet-T needs the pairs by atom: Potential gives them to networks with `triplets`")
        count, total = len(pairs.first), 2 * len(pairs.first)
        place = arrivals.place
        pair, at_second = place % max(count, 1), place >= count
        self.mask = arrivals.filled & pairs.mask[pair]  # (N, K)
        self.sender = jnp.where(at_second, pairs.first[pair], pairs.second[pair])  # (N, K)
        self.reverse = arrivals.slot[(place + count) % total]  # (N, K): slot of the same pair at its other end
        distance = jnp.where(self.mask, pairs.distance[pair], cutoff)[..., None] / cutoff
        centres = jnp.linspace(0.0, 1.0, radial)
        gaussians = jnp.exp(-0.5 * ((distance - centres) * (radial - 1)) ** 2)
        self.radial = jnp.where(self.mask[..., None], polynomial_envelope(distance, 5) * gaussians, 0.0)  # (N, K, R)
        length = jnp.where(pairs.distance > 0, pairs.distance, 1.0)
        towards = (pairs.vector / length[:, None])[pair] * jnp.where(at_second, -1.0, 1.0)[..., None]
        cosine = jnp.einsum("nkx,njx->nkj", towards, towards)
        others = self.mask[:, :, None] & self.mask[:, None, :] & ~jnp.eye(place.shape[1], dtype=bool)
        self.triplets = others  # (N, K, K): the message at k and the other at j
        self.spherical = jnp.where(others[..., None], zonal_harmonics(cosine, spherical), 0.0)  # (N, K, K, S)

    def swapped(self, x: jax.Array) -> jax.Array:
        """What stands at the other end of each pair: [N, K, F] -> [N, K, F]."""
        return x.reshape(-1, x.shape[-1])[self.reverse]


def zonal_harmonics(cosine: jax.Array, count: int) -> jax.Array:
    """Y_l0 of an angle for l < count, from its cosine: [...] -> [..., count]. Legendre polynomials by recurrence."""
    legendre = [jnp.ones_like(cosine), cosine]
    for degree in range(1, count - 1):
        legendre.append(((2 * degree + 1) * cosine * legendre[degree] - degree * legendre[degree - 1]) / (degree + 1))
    return jnp.stack(
        [((2 * degree + 1) / (4 * jnp.pi)) ** 0.5 * p for degree, p in enumerate(legendre[:count])], axis=-1
    )


class GemNetT(nn.Module):
    """Energies of atoms [N], without unit, from their elements and pairs. Source: Gasteiger et al. 2021, Figure 2.

    Radial functions are Gaussians on [0, 1] of distance / cutoff times a polynomial that goes to zero at the cutoff
    with two derivatives. Sizes as in the released water models: one residual layer before and one after the skip, one
    for messages and two in each update of atoms.
    Differs: every neighbour within the cutoff counts, where the released models keep the nearest 50 (energies then
    jump when two neighbours change places); forces are always minus the energy's gradient.
    """

    features: int = 128
    interactions: int = 4
    cutoff: float = 5.0
    radial: int = 6
    spherical: int = 7
    basis: int = 16
    triplets: bool = True
    """Tells `Potential` to give the pairs by atom."""

    @nn.compact
    def __call__(self, species: jax.Array, pairs: Pairs) -> jax.Array:
        edges = Edges(pairs, self.cutoff, self.radial, self.spherical)
        bases = {
            name: Dense(self.basis, linear=True, name=f"radial_{name}")(edges.radial)
            for name in ("triplets", "atoms", "output")
        }
        down = self.param("angular", he_orthogonal, (self.spherical, self.radial, self.basis))
        angular = jnp.einsum("nkr,sri->nkis", edges.radial, down)
        limit = 3**0.5
        table = self.param("elements", _uniform(limit), (ELEMENTS, self.features))
        atoms = table[species - 1].astype(edges.radial.dtype)
        messages = EdgeEmbedding(self.features, name="edges")(atoms, edges.radial, edges)
        energies = Output(self.features, name="output_0")(atoms, messages, bases["output"], edges)
        for number in range(self.interactions):
            atoms, messages = Interaction(self.features, name=f"interaction_{number}")(
                atoms, messages, bases, angular, edges
            )
            output = Output(self.features, name=f"output_{number + 1}")
            energies = energies + output(atoms, messages, bases["output"], edges)
        return energies


def _uniform(limit: float) -> Any:
    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return initialize


class EdgeEmbedding(nn.Module):
    """Messages [N, K, F] from the atoms at both ends and what is known of the edge."""

    features: int

    @nn.compact
    def __call__(self, atoms: jax.Array, known: jax.Array, edges: Edges) -> jax.Array:
        here = jnp.broadcast_to(atoms[:, None], (*known.shape[:-1], atoms.shape[-1]))
        return Dense(self.features, name="mix")(jnp.concatenate([atoms[edges.sender], here, known], axis=-1))


class AtomUpdate(nn.Module):
    """Features of atoms [N, F] from the messages that arrive: residual layers of their scaled sum."""

    features: int

    @nn.compact
    def __call__(self, messages: jax.Array, basis: jax.Array, edges: Edges) -> jax.Array:
        weighted = messages * Dense(self.features, linear=True, name="radial")(basis)
        total = jnp.sum(jnp.where(edges.mask[..., None], weighted, 0.0), axis=1)
        everyone = jnp.ones(len(total), bool)
        x = Scaling(name="sum")(messages, edges.mask, total, everyone)
        x = Dense(self.features, name="in")(x)
        for number in range(2):
            x = Residual(self.features, name=f"residual_{number}")(x)
        return x


class Output(nn.Module):
    """Energies of atoms [N] from the messages of one depth."""

    features: int

    @nn.compact
    def __call__(self, atoms: jax.Array, messages: jax.Array, basis: jax.Array, edges: Edges) -> jax.Array:
        x = AtomUpdate(self.features, name="atoms")(messages, basis, edges)
        return Dense(1, linear=True, name="energy")(x)[:, 0]


class Triplets(nn.Module):
    """What the messages [N, K, F] of an atom's other neighbours say of each. Source: Gasteiger et al. 2021, Eq. 7."""

    features: int

    @nn.compact
    def __call__(self, messages: jax.Array, basis: jax.Array, angular: jax.Array, edges: Edges) -> jax.Array:
        narrow = max(1, self.features // 2)
        x = Dense(self.features, name="in")(messages)
        weighted = x * Dense(self.features, linear=True, name="radial")(basis)
        x = Dense(narrow, name="down")(Scaling(name="radial_scaling")(x, edges.mask, weighted, edges.mask))
        # Over the other arrivals first, then over spherical functions: the triplets [N, K, K] have no features.
        gathered = jnp.einsum("nkjs,njf->nksf", edges.spherical, x)
        gathered = jnp.einsum("nkis,nksf->nkif", angular, gathered)
        bilinear = self.param("bilinear", he_orthogonal, (narrow, angular.shape[2], narrow))
        total = jnp.einsum("nkif,fio->nko", gathered, bilinear)
        total = Scaling(name="sum_scaling")(x, edges.mask, total, edges.mask)
        here = Dense(self.features, name="up")(total)
        there = Dense(self.features, name="up_swapped")(total)
        return HALF * (here + edges.swapped(there))


class Interaction(nn.Module):
    """Atoms [N, F] and messages [N, K, F] after one exchange. Source: Gasteiger et al. 2021, Figure 2."""

    features: int

    @nn.compact
    def __call__(
        self, atoms: jax.Array, messages: jax.Array, bases: dict[str, jax.Array], angular: jax.Array, edges: Edges
    ) -> tuple[jax.Array, jax.Array]:
        size = self.features
        x = Dense(size, name="skip")(messages)
        x = HALF * (x + Triplets(size, name="triplets")(messages, bases["triplets"], angular, edges))
        messages = HALF * (messages + Residual(size, name="before")(x))
        messages = Residual(size, name="after")(messages)
        atoms = HALF * (atoms + AtomUpdate(size, name="atoms")(messages, bases["atoms"], edges))
        mixed = EdgeEmbedding(size, name="mix")(atoms, messages, edges)
        messages = HALF * (messages + Residual(size, name="mixed")(mixed))
        return atoms, messages


def fitted_scaling(potential: Any, params: Any, positions: jax.Array) -> Any:
    """The parameters with every scaling factor measured on structures [B, N, 3], from the first layer to the last.

    Source: Gasteiger et al. 2021, Section 6: factors that keep the variance through sums and products, found once on
    data before training. Differs: all in one pass over one batch, each with those before it already in force; the
    released code stores files of factors, none of which is used here.
    """
    network, species = potential.network, jnp.asarray(potential.system.species)

    def measure(x: jax.Array) -> Any:
        pairs, _ = potential.pairs(x)
        return network.apply({"params": params}, species, pairs, mutable=["scaling"])[1]["scaling"]

    found = jax.jit(jax.vmap(measure, axis_name=FRAMES))(positions)
    flat = dict(traverse_util.flatten_dict(params))
    for path, values in traverse_util.flatten_dict(found).items():
        flat[path] = values[0].astype(flat[path].dtype)  # the same for every frame
    return traverse_util.unflatten_dict(flat)
