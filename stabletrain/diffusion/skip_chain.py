"""A network with long skip connections taken apart into what ScaleLong's theorems speak of: a_i, b_i and f_N.

The blocks are functions that close over the parameters and over whatever else the network hands them (time, label), so
that each can be measured and differentiated alone. Put together again they are the network (a test holds them to it).

Index 0 is the outermost skip: s_0 = a_1(x), s_i = a_{i+1}(s_{i-1}), h_N = f_N(s_{N-1}), and
h_i = b_{i+1}(h_{i+1}, kappa_{i+1} s_i). Where the paper adds the two arguments of b, the practical networks
concatenate them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stabletrain.diffusion.skip_mlp import MlpBlock, SkipMLP
from stabletrain.diffusion.skips import skip_scales
from stabletrain.diffusion.unet import AttentionBlock, ResBlock, UNet
from stabletrain.diffusion.uvit import Block, SkipLinear, UViT
from stabletrain.nn.convolution import Convolution
from stabletrain.nn.resampling import doubled

Array = jax.Array
Params = Any
CONSTANT = ("none", "sqrt2", "cs", "const")
"""The skip scalings that the theorems speak of: fixed coefficients."""


@dataclass(frozen=True)
class SkipChain:
    """The parts of one network with one set of parameters; every array has a leading batch axis.

    `before[i]` brings h_{i+1} to the shape of s_i (the UNet's upsampling; else nothing), `merges[i]` is the linear map
    with which the decoder block takes up the two, alone, and `merge_gains[i]` what it multiplies
    ||before(h)||^2 + ||kappa s||^2 by in expectation over its own initialisation, exactly: outputs times the variance
    of an entry (the bias with which some UNets start comes on top). All three are empty for the additive network,
    whose blocks have the gain of their last matrix.
    """

    inputs: Array
    encoders: tuple[Callable[[Array], Array], ...]
    middle: Callable[[Array], Array]
    decoders: tuple[Callable[[Array, Array], Array], ...]
    scales: tuple[float, ...] | Array
    before: tuple[Callable[[Array], Array], ...] = ()
    merges: tuple[Callable[[Array, Array], Array], ...] = ()
    merge_gains: tuple[float, ...] = ()

    def features(self, x: Array) -> tuple[list[Array], list[Array]]:
        """Skip features s_0 .. s_{N-1}, and decoder features h_0 .. h_N (the last is the middle block's)."""
        skips = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
        decoded = [self.middle(x)]
        for i in reversed(range(len(skips))):
            decoded.append(self.decoders[i](decoded[-1], self.scales[i] * skips[i]))
        return skips, decoded[::-1]


def skip_chain(
    network: nn.Module, params: Params, images: Array, times: Array, labels: Array | None = None
) -> SkipChain:
    """The parts of `network` at these images, times and labels.

    Raises: `ValueError` for a skip scaling other than the constant ones, or a network without long skips.
    """
    if not isinstance(network, (SkipMLP, UViT, UNet)):
        raise ValueError(f"{type(network).__name__} is none of the networks with long skip connections")
    if network.skip_scaling not in CONSTANT:
        raise ValueError(f"the theorems are about constant coefficients, not {network.skip_scaling!r}")
    if isinstance(network, SkipMLP):
        return _mlp_chain(network, params, images, times, labels)
    if isinstance(network, UViT):
        return _uvit_chain(network, params, images, times, labels)
    return _unet_chain(network, params, images, times, labels)


def _arguments_of(child: str, network: nn.Module, params: Params, *args: Any) -> tuple[Any, ...]:
    """What the network calls its submodule `child` with."""
    found: list[tuple[Any, ...]] = []

    def watch(next_function: Any, given: Any, named: Any, context: Any) -> Any:
        if context.module.name == child and context.method_name == "__call__":
            found.append(given)
        return next_function(*given, **named)

    with nn.intercept_methods(watch):
        network.apply({"params": params}, *args)
    return found[0]


def _bound(module: nn.Module, params: Params, *rest: Any) -> Callable[[Array], Array]:
    def run(x: Array) -> Array:
        out: Any = module.apply({"params": params}, x, *rest)
        return out

    return run


def _same(x: Array) -> Array:
    return x


def _mlp_chain(network: SkipMLP, params: Params, images: Array, times: Array, labels: Array | None) -> SkipChain:
    def block(name: str) -> Callable[[Array], Array]:
        return _bound(MlpBlock(network.matrices, network.gain, network.dtype), params[name])

    (inputs,) = _arguments_of("in_block_0", network, params, images, times, labels)
    encoders = tuple(block(f"in_block_{i}") for i in range(network.num_skips))
    outs = [block(f"out_block_{i}") for i in range(network.num_skips)]
    decoders = tuple((lambda h, s, out=out: out(h + s)) for out in outs)
    scales = skip_scales(network.skip_scaling, range(network.num_skips), network.kappa)
    return SkipChain(inputs, encoders, block("mid_block"), decoders, scales)


def _uvit_chain(network: UViT, params: Params, images: Array, times: Array, labels: Array | None) -> SkipChain:
    def block(name: str) -> Callable[[Array], Array]:
        return _bound(Block(network.heads, network.mlp_ratio, network.dtype), params[name])

    def merge(i: int) -> Callable[[Array, Array], Array]:
        linear = SkipLinear(network.width, network.dtype)
        return lambda h, s: linear.apply({"params": params[f"skip_linear_{i}"]}, h, s)  # type: ignore[return-value]

    count = network.num_skips
    (inputs,) = _arguments_of("in_block_0", network, params, images, times, labels)
    merges = tuple(merge(i) for i in range(count))
    outs = [block(f"out_block_{i}") for i in range(count)]
    decoders = tuple((lambda h, s, m=m, out=out: out(m(h, s))) for m, out in zip(merges, outs, strict=True))
    scales = skip_scales(network.skip_scaling, range(count), network.kappa)
    encoders = tuple(block(f"in_block_{i}") for i in range(count))
    gains = (network.width * 0.02**2,) * count
    return SkipChain(inputs, encoders, block("mid_block"), decoders, scales, (_same,) * count, merges, gains)


def _unet_chain(network: UNet, params: Params, images: Array, times: Array, labels: Array | None) -> SkipChain:
    _, time, _ = _arguments_of("mid_block_0", network, params, images, times, labels)
    dtype, style = network.dtype, network.style

    def stage(name: str, features: int) -> Callable[[Array], Array]:
        res = _bound(ResBlock(features, 0.0, style, dtype), params[name], time, False)
        if f"{name}_attention" not in params:
            return res
        heads = network.heads_of(features)
        attention = _bound(AttentionBlock(heads, style, dtype), params[f"{name}_attention"])
        return lambda x: attention(res(x))

    def shortcut(name: str) -> Callable[[Array, Array], Array]:
        kernel, bias = params[name]["shortcut"]["kernel"][0, 0], params[name]["shortcut"]["bias"]
        return lambda h, s: jnp.concatenate([h, s], axis=-1) @ kernel + bias

    widths = [network.channels * multiplier for multiplier in network.multipliers]

    def resampled(name: str, level: int, direction: str) -> Callable[[Array], Array]:
        block = ResBlock(widths[level], 0.0, style, dtype, direction)
        return _bound(block, params[f"{name}_{level}"], time, False)

    def downsampled(level: int) -> Callable[[Array], Array]:
        if style.residual_resampling:
            return resampled("downsample", level, "down")
        padding = ((1, 1), (1, 1)) if style.pad_both_sides else "SAME"
        convolution = Convolution(widths[level], stride=2, padding=padding, dtype=dtype)
        return _bound(convolution, params[f"downsample_{level}"])

    encoders: list[Callable[[Array], Array]] = [_bound(Convolution(network.channels, dtype=dtype), params["stem"])]
    for level, width in enumerate(widths):
        encoders += [stage(f"down_{level}_{block}", width) for block in range(network.blocks)]
        if level + 1 < len(widths):
            encoders.append(downsampled(level))

    def upsampled(level: int) -> Callable[[Array], Array]:
        if style.residual_resampling:
            return resampled("upsample", level, "up")
        convolution = _bound(Convolution(widths[level], dtype=dtype), params[f"upsample_{level}"])
        return lambda x: convolution(doubled(x))

    def decoder(name: str, width: int, before: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
        out = stage(name, width)
        return lambda h, s: out(jnp.concatenate([before(h), s], axis=-1))

    decoders, befores, merges, gains = [], [], [], []
    before: Callable[[Array], Array] = _same
    for level in reversed(range(len(widths))):
        for block in range(network.blocks + 1):
            name = f"up_{level}_{block}"
            decoders.append(decoder(name, widths[level], before))
            befores.append(before)
            merges.append(shortcut(name))
            fan_in = params[name]["shortcut"]["kernel"].shape[2]
            gains.append(widths[level] * style.variance(fan_in, widths[level]))
            before = _same
        if level:
            before = upsampled(level)

    mids = [
        _bound(ResBlock(widths[-1], 0.0, style, dtype), params["mid_block_0"], time, False),
        _bound(AttentionBlock(network.heads_of(widths[-1]), style, dtype), params["mid_attention"]),
        _bound(ResBlock(widths[-1], 0.0, style, dtype), params["mid_block_1"], time, False),
    ]
    exponents = network.skip_levels if network.kappa_indexing == "level" else range(network.num_skips)
    scales = skip_scales(network.skip_scaling, tuple(exponents), network.kappa)
    return SkipChain(
        images,
        tuple(encoders),
        lambda x: mids[2](mids[1](mids[0](x))),
        tuple(decoders[::-1]),
        scales,
        tuple(befores[::-1]),
        tuple(merges[::-1]),
        tuple(gains[::-1]),
    )
