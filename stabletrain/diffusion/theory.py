"""The theorems of ScaleLong against measurement, on the network for which they are stated and on the real ones.

Three comparisons, each of another strength:
- forward norms (Theorem 3.1): on the paper's network an exact recursion for the expectation; on U-ViT and the UNet an
  exact expectation for each merge of a skip, and how much of the promised effect of kappa is left;
- robustness (Theorem 3.4): an inequality that must never be broken. For the paper's network with global Lipschitz
  constants; for the real networks, whose blocks have none (attention) or huge ones (normalisation), with the spectral
  norms of the blocks' Jacobians at the probed point, where by the chain rule the same inequality holds;
- gradients (Theorem 3.3): the ratio to a prediction, which must be of order one and the same for every scaling.

Skips are numbered from the outermost, index 0. Source: Huang et al. 2023, Section 3.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.diffusion.skip_chain import SkipChain, skip_chain
from stabletrain.diffusion.skip_mlp import SkipMLP
from stabletrain.diffusion.skips import skip_scales
from stabletrain.diffusion.unet import UNet, group_count
from stabletrain.diffusion.uvit import UViT
from stabletrain.methods.scalelong import theorem31_prediction, theorem33_ratio, theorem34_bound
from stabletrain.random_keys import random_key

Array = jax.Array
Params = Any
Floats = np.ndarray


@dataclass(frozen=True)
class Scaling:
    """One choice of constant coefficients."""

    label: str
    name: str
    kappa: float = 1.0

    def coefficients(self, count: int) -> tuple[float, ...]:
        """kappa_1 .. kappa_N."""
        return skip_scales(self.name, range(count), self.kappa)


SCALINGS = (
    Scaling("unscaled", "none"),
    Scaling("1/sqrt(2)", "sqrt2"),
    Scaling("CS 0.8", "cs", 0.8),
    Scaling("CS 0.5", "cs", 0.5),
)


# --- many initialisations ---------------------------------------------------------------------------------------------

Network = SkipMLP | UViT | UNet
Draw = tuple[Params, Array, Array, Array]
Measure = Callable[[SkipChain, Params, Array, Array, Array], Any]
"""(parts, parameters, image [1, H, W, C], time [1], key) of one draw -> arrays."""


def theorem_network(num_skips: int, width: int, gain: float = 1.0) -> SkipMLP:
    """The paper's network, [B, 1, 1, m] -> the same: no projections, no time, no coefficient but 1."""
    return SkipMLP(1, width, width, num_skips, gain=gain, time_embedding=False)


@functools.lru_cache(maxsize=8)
def draws(network: Network, count: int, seed: int, image_size: int = 8) -> list[Draw]:
    """`count` times parameters, a Gaussian image, a time in 0 .. 999, and a key."""
    size = getattr(network, "image_size", image_size)
    channels = network.channels if isinstance(network, UViT) else network.image_channels

    def draw(key: Array) -> Draw:
        keys = jax.random.split(key, 4)
        images = jax.random.normal(keys[0], (1, size, size, channels))
        times = 999.0 * jax.random.uniform(keys[1], (1,))
        return network.init(keys[2], images, times)["params"], images, times, keys[3]

    drawn = jax.jit(draw)
    return [drawn(key) for key in jax.random.split(random_key(seed), count)]


def measured(
    network: Network, scalings: Sequence[Scaling], measure: Measure, *, seeds: int, seed: int
) -> list[tuple[Floats, ...]]:
    """What `measure` returns for each draw, stacked, for each scaling; all scalings see the same draws.

    One compiled program, called for each draw and each scaling: inside a loop, XLA:CPU takes minutes to compile
    convolutions, and is slow at them.
    """

    def one(scales: Array, params: Params, images: Array, times: Array, key: Array) -> Any:
        parts = dataclasses.replace(skip_chain(network, params, images, times), scales=scales)
        return measure(parts, params, images, times, key)

    run = jax.jit(one)
    found = []
    for scaling in scalings:
        scales = jnp.asarray(scaling.coefficients(network.num_skips))
        results = [run(scales, *draw) for draw in draws(network, seeds, seed)]
        found.append(tuple(np.stack([np.asarray(array, np.float64) for array in arrays]) for arrays in zip(*results)))
    return found


# --- Theorem 3.1 ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForwardNorms:
    """||h_i||^2 / ||x||^2 of the paper's network, one for each initialisation [S, N + 1], and the prediction."""

    scaling: Scaling
    num_skips: int
    gain: float
    measured: Floats
    predicted: Floats

    @property
    def standard_error(self) -> Floats:
        """Of the mean, [N + 1]."""
        found: Floats = self.measured.std(axis=0, ddof=1) / np.sqrt(len(self.measured))
        return found

    @property
    def largest_deviation(self) -> float:
        """The largest distance of a mean from its prediction, in standard errors."""
        return float(np.max(np.abs(self.measured.mean(axis=0) - self.predicted) / self.standard_error))

    def numbers(self) -> dict[str, Any]:
        """Everything as plain values."""
        outermost = self.measured[:, 0]
        return {
            "scaling": self.scaling.label,
            "num_skips": self.num_skips,
            "gain": self.gain,
            "mean": self.measured.mean(axis=0).tolist(),
            "standard_error": self.standard_error.tolist(),
            "predicted": self.predicted.tolist(),
            "range_outermost": [float(outermost.min()), float(outermost.max())],
            "std_outermost": float(outermost.std(ddof=1)),
            "largest_deviation_in_standard_errors": self.largest_deviation,
        }


def forward_norms(
    num_skips: int, width: int, scalings: Sequence[Scaling], *, gain: float, seeds: int, seed: int
) -> list[ForwardNorms]:
    """Norms of `seeds` initialisations, each at a Gaussian input of its own; the same ones for every scaling."""

    def measure(parts: SkipChain, *_: Any) -> tuple[Array]:
        decoded = parts.features(parts.inputs)[1]
        return (jnp.stack([_square(h) for h in decoded]) / _square(parts.inputs),)

    network = theorem_network(num_skips, width, gain)
    arrays = measured(network, scalings, measure, seeds=seeds, seed=seed)
    found = []
    for scaling, (norms,) in zip(scalings, arrays, strict=True):
        predicted = theorem31_prediction(jnp.asarray(scaling.coefficients(num_skips)), gain=gain)
        found.append(ForwardNorms(scaling, num_skips, gain, norms, np.asarray(predicted, np.float64)))
    return found


@dataclass(frozen=True)
class MergeNorms:
    """What a real network's merges do to norms, at initialisation; arrays are [S, N], index 0 the outermost skip.

    `ratio`: ||merge(h, kappa s)||^2 over its exact expectation gain (||h||^2 + ||kappa s||^2); its mean over
    initialisations is 1. `norms`: ||h_i||^2, [S, N + 1].
    """

    network: str
    scaling: Scaling
    gains: tuple[float, ...]
    ratio: Floats
    norms: Floats
    skip_share: Floats
    """||kappa s||^2 over ||h||^2 + ||kappa s||^2."""

    @property
    def largest_deviation(self) -> float:
        """The largest distance of a mean ratio from 1, in standard errors."""
        error = self.ratio.std(axis=0, ddof=1) / np.sqrt(len(self.ratio))
        return float(np.max(np.abs(self.ratio.mean(axis=0) - 1) / error))

    def numbers(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "network": self.network,
            "scaling": self.scaling.label,
            "merge_gains": list(self.gains),
            "merge_ratio": self.ratio.mean(axis=0).tolist(),
            "merge_ratio_standard_error": (self.ratio.std(axis=0, ddof=1) / np.sqrt(len(self.ratio))).tolist(),
            "largest_deviation_in_standard_errors": self.largest_deviation,
            "norms_squared": self.norms.mean(axis=0).tolist(),
            "skip_share": self.skip_share.mean(axis=0).tolist(),
        }


def _square(x: Array) -> Array:
    return jnp.sum(x.astype(jnp.float32) ** 2)


def merge_norms(
    name: str, network: UViT | UNet, scalings: Sequence[Scaling], *, seeds: int, seed: int
) -> list[MergeNorms]:
    """Measured over `seeds` initialisations, each at a Gaussian image and a time of its own."""
    gains: list[tuple[float, ...]] = []

    def measure(parts: SkipChain, *_: Any) -> tuple[Array, Array, Array]:
        gains.append(parts.merge_gains)
        skips, decoded = parts.features(parts.inputs)
        ratio, share = [], []
        for i, skip in enumerate(skips):
            h, s = parts.before[i](decoded[i + 1]), parts.scales[i] * skip
            total = _square(h) + _square(s)
            ratio.append(_square(parts.merges[i](h, s)) / (parts.merge_gains[i] * total))
            share.append(_square(s) / total)
        return jnp.stack(ratio), jnp.stack([_square(h) for h in decoded]), jnp.stack(share)

    found = measured(network, scalings, measure, seeds=seeds, seed=seed)
    return [MergeNorms(name, scaling, gains[0], *arrays) for scaling, arrays in zip(scalings, found, strict=True)]


# --- Theorem 3.4 ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Robustness:
    """How far the output moves for each unit that the input moves, and the bounds on it; arrays are [S].

    `gain`: the largest over the probed perturbations and directions (for the real networks the Jacobian's spectral
    norm); `bound`: Theorem 3.4, with one M_0 for all blocks; `unrolled`: the same recursion with each block's own
    constant, also rigorous, and closer.
    """

    network: str
    scaling: Scaling
    num_skips: int
    gain: Floats
    bound: Floats
    unrolled: Floats

    @property
    def violations(self) -> int:
        """Measurements above a bound: none, but for rounding (one part in 10,000 is allowed)."""
        return int(np.sum(self.gain > 1.0001 * np.minimum(self.bound, self.unrolled)))

    def numbers(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "network": self.network,
            "scaling": self.scaling.label,
            "num_skips": self.num_skips,
            "gain": self.gain.tolist(),
            "bound": self.bound.tolist(),
            "unrolled_bound": self.unrolled.tolist(),
            "violations": self.violations,
        }


def unrolled_bound(
    scales: Array | Sequence[float], encoders: Array, decoders_h: Array, decoders_s: Array, middle: Array
) -> Array:
    """A bound on the Lipschitz constant of f_0 from those of its parts, each [N] from the outside in.

    L_N = middle; L_i = Lip(a_{i+1}) ( kappa_{i+1} Lip_s(b_{i+1}) + Lip_h(b_{i+1}) L_{i+1} ), where Lip_h and Lip_s are
    b's constants in its two arguments (the same where they are added). With every Lip(b_i) Lip(a_i) put at the largest
    it is the bound of Theorem 3.4.
    """
    bound, kappas = middle, jnp.abs(jnp.asarray(scales))
    for i in reversed(range(len(kappas))):
        bound = encoders[i] * (kappas[i] * decoders_s[i] + decoders_h[i] * bound)
    return bound


def _both_bounds(
    scales: Array | Sequence[float], a: Array, b_h: Array, b_s: Array, middle: Array
) -> tuple[Array, Array]:
    largest = jnp.max(a * jnp.maximum(b_h, b_s))
    return theorem34_bound(jnp.asarray(scales), largest, middle), unrolled_bound(scales, a, b_h, b_s, middle)


PERTURBATIONS = (1e-2, 1.0, 100.0)
"""Lengths of the perturbations relative to the input's."""


def theorem_network_robustness(
    num_skips: int, width: int, scalings: Sequence[Scaling], *, seeds: int, seed: int
) -> list[Robustness]:
    """Perturbations of three sizes and 16 directions, and the Jacobian at the input; global Lipschitz constants."""
    network = theorem_network(num_skips, width)

    def measure(parts: SkipChain, params: Params, images: Array, times: Array, key: Array) -> tuple[Array, ...]:
        def run(x: Array) -> Array:
            return parts.features(x)[1][0]

        x = images.reshape(width)
        directions = jax.random.normal(key, (16, width))
        gains = [_spectral_norm(run, parts.inputs)]
        for size in PERTURBATIONS:
            moved = size * directions
            change = run(x + moved) - run(jnp.broadcast_to(x, moved.shape))
            gains.append(jnp.max(jnp.linalg.norm(change, axis=1) / jnp.linalg.norm(moved, axis=1)))

        def constants(*names: str) -> Array:
            """Products of the spectral norms of a block's matrices; ReLU is 1-Lipschitz."""
            kernels = jnp.stack([jnp.stack([w["kernel"] for w in params[name].values()]) for name in names])
            return jnp.prod(jnp.linalg.norm(kernels, 2, axis=(-2, -1)), axis=-1)

        a = constants(*(f"in_block_{i}" for i in range(num_skips)))
        b = constants(*(f"out_block_{i}" for i in range(num_skips)))
        return jnp.max(jnp.stack(gains)), *_both_bounds(parts.scales, a, b, b, constants("mid_block")[0])

    found = measured(network, scalings, measure, seeds=seeds, seed=seed)
    return [
        Robustness("theorem MLP", scaling, num_skips, *arrays) for scaling, arrays in zip(scalings, found, strict=True)
    ]


def local_robustness(
    name: str, network: UViT | UNet, scalings: Sequence[Scaling], *, seeds: int, seed: int
) -> list[Robustness]:
    """The real networks, between the first encoder block's input and the last decoder block's output.

    Whole Jacobians are built: features of a few hundred numbers at most are meant.
    """

    def measure(parts: SkipChain, *_: Any) -> tuple[Array, ...]:
        skips, decoded = parts.features(parts.inputs)
        a, b_h, b_s = [], [], []
        for i, decode in enumerate(parts.decoders):
            a.append(_spectral_norm(parts.encoders[i], parts.inputs if i == 0 else skips[i - 1]))
            s = parts.scales[i] * skips[i]
            b_h.append(_spectral_norm(lambda h, s=s, decode=decode: decode(h, s), decoded[i + 1]))
            b_s.append(_spectral_norm(lambda s, h=decoded[i + 1], decode=decode: decode(h, s), s))
        whole = _spectral_norm(lambda x: parts.features(x)[1][0], parts.inputs)
        middle = _spectral_norm(parts.middle, skips[-1])
        return whole, *_both_bounds(parts.scales, jnp.stack(a), jnp.stack(b_h), jnp.stack(b_s), middle)

    found = measured(network, scalings, measure, seeds=seeds, seed=seed)
    return [
        Robustness(name, scaling, network.num_skips, *arrays) for scaling, arrays in zip(scalings, found, strict=True)
    ]


def _spectral_norm(function: Any, x: Array) -> Array:
    """Of the Jacobian of `function` at `x`."""
    matrix = jax.jacfwd(lambda flat: function(flat.reshape(x.shape)).reshape(-1))(x.reshape(-1))
    return jnp.linalg.norm(matrix, 2)


# --- Theorem 3.3 ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientRatios:
    """Squared gradient norms of the blocks over 4 l ||x||^2 (sum_{j >= i} kappa_j^2 + 1); arrays are [N].

    Mean over initialisations, for the encoder (a_i) and the decoder blocks (b_i); l is the summed squared error. In the
    paper's network it is the last matrix of each block, in the real ones every parameter of it.
    """

    network: str
    scaling: Scaling
    encoders: Floats
    decoders: Floats

    @property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest ratio of any block."""
        both = np.concatenate([self.encoders, self.decoders])
        return float(both.min()), float(both.max())

    def numbers(self) -> dict[str, Any]:
        """Everything as plain values."""
        low, high = self.extremes
        return {
            "network": self.network,
            "scaling": self.scaling.label,
            "encoders": self.encoders.tolist(),
            "decoders": self.decoders.tolist(),
            "smallest": low,
            "largest": high,
        }


def gradient_ratios(
    name: str, network: Network, scalings: Sequence[Scaling], *, seeds: int, seed: int
) -> list[GradientRatios]:
    """Measured over `seeds` initialisations with Gaussian images, times and noise.

    For the real networks the input x of the theorem is what their first encoder block is given.
    """
    count = network.num_skips
    encoders, decoders = _block_names(network)

    def measure(parts: SkipChain, params: Params, images: Array, times: Array, key: Array) -> tuple[Array, Array]:
        noise = jax.random.normal(key, images.shape)

        def loss_of(params: Params) -> Array:
            predicted: Any = network.apply({"params": params}, images, times, skip_multipliers=parts.scales)
            return jnp.sum((predicted - noise) ** 2)

        loss, gradient = jax.value_and_grad(loss_of)(params)
        size = _square(parts.inputs)

        def ratio(names: Sequence[str], i: int) -> Array:
            blocks = [gradient[block] for block in names]
            if isinstance(network, SkipMLP):
                blocks = [block[f"w{network.matrices - 1}"] for block in blocks]
            squared = sum((_square(leaf) for leaf in jax.tree.leaves(blocks)), jnp.zeros(()))
            return theorem33_ratio(squared, loss, size, jnp.asarray(parts.scales), i)

        return (
            jnp.stack([ratio(encoders[i], i) for i in range(count)]),
            jnp.stack([ratio(decoders[i], i) for i in range(count)]),
        )

    found = measured(network, scalings, measure, seeds=seeds, seed=seed)
    return [
        GradientRatios(name, scaling, of_encoders.mean(axis=0), of_decoders.mean(axis=0))
        for scaling, (of_encoders, of_decoders) in zip(scalings, found, strict=True)
    ]


def _block_names(network: Network) -> tuple[list[list[str]], list[list[str]]]:
    """The parameters' first keys of each encoder and each decoder block, index 0 the outermost skip."""
    if not isinstance(network, UNet):
        indices = range(network.num_skips)
        return [[f"in_block_{i}"] for i in indices], [[f"out_block_{i}"] for i in indices]
    encoders, decoders = [["stem"]], []
    levels = range(len(network.multipliers))
    for level in levels:
        encoders += [[f"down_{level}_{block}"] for block in range(network.blocks)]
        encoders += [[f"downsample_{level}"]] if level + 1 < len(levels) else []
        decoders += [[f"up_{level}_{block}"] for block in reversed(range(network.blocks + 1))]
    return encoders, decoders


# --- what GroupNorm leaves of a constant coefficient ------------------------------------------------------------------


@dataclass(frozen=True)
class Cancellation:
    """What is left of a skip coefficient behind the first GroupNorm of each UNet decoder block; arrays are [N].

    `aligned`: no group has channels of both h and s; the normalisation then divides a constant factor of s out again.
    `normalized`: ||N([h, kappa s]) - N([h, s])|| / ||N([h, s])||, N the GroupNorm; `merged`: the same without N, which
    is what the block's 1x1 shortcut is given.
    """

    kappa: float
    aligned: tuple[bool, ...]
    normalized: Floats
    merged: Floats

    def numbers(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "kappa": self.kappa,
            "aligned": list(self.aligned),
            "change_behind_group_norm": self.normalized.tolist(),
            "change_before_it": self.merged.tolist(),
        }


def aligned_decoders(network: UNet) -> tuple[bool, ...]:
    """For each skip, outermost first: whether every group of the decoder's GroupNorm lies within h or within s."""
    return tuple(h % ((h + s) // group_count(h + s)) == 0 for h, s in network.merge_widths)


def cancellation(network: UNet, kappa: float, *, seeds: int, seed: int) -> Cancellation:
    """Each decoder's own h and s at initialisation, with the skip scaled by `kappa` and not."""

    def measure(parts: SkipChain, *_: Any) -> tuple[Array, Array]:
        skips, decoded = parts.features(parts.inputs)
        behind, before = [], []
        for i, s in enumerate(skips):
            h = parts.before[i](decoded[i + 1])
            plain, scaled = jnp.concatenate([h, s], axis=-1), jnp.concatenate([h, kappa * s], axis=-1)
            norm = nn.GroupNorm(group_count(plain.shape[-1]), epsilon=network.style.epsilon, use_fast_variance=False)
            variables = {"params": {"scale": jnp.ones(plain.shape[-1]), "bias": jnp.zeros(plain.shape[-1])}}
            behind.append(_relative_change(norm.apply(variables, plain), norm.apply(variables, scaled)))
            before.append(_relative_change(plain, scaled))
        return jnp.stack(behind), jnp.stack(before)

    ((behind, before),) = measured(network, [Scaling("unscaled", "none")], measure, seeds=seeds, seed=seed)
    return Cancellation(kappa, aligned_decoders(network), behind.mean(axis=0), before.mean(axis=0))


def _relative_change(old: Any, new: Any) -> Array:
    return jnp.sqrt(_square(new - old) / _square(old))
