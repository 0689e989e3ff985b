"""A random pair of networks from the paper's 9,216: who trains more of them is the more stable method.

Nonlinearity, depth and base width of generator and critic, and whether each is normalised. How the paper arranges a
depth is not published: here the DCGAN of four layers each gets further 3x3 convolutions at one middle resolution
(8x8 for images of 32x32, with twice the base width), as an earlier code of the first author does.
Source: Gulrajani et al. 2017, Section 5.1 and Table 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.errors import ConfigError
from stabletrain.gan.networks import NetworkOptions
from stabletrain.gan.networks.lsun import BASE, halvings, leaky
from stabletrain.gan.networks.tf_layers import Conv, Deconv, Linear, Norm

NONLINEARITIES = ("relu", "leaky-relu", "softplus", "tanh")
DEPTHS = (4, 8, 12, 20)
WIDTHS = (32, 64, 128)
BASE_WIDTH = 64
"""The width that `WIDTHS` are told for; networks of another base width have them in proportion."""
CHOICES = (NONLINEARITIES, NONLINEARITIES, DEPTHS, DEPTHS, (False, True), (False, True), WIDTHS, WIDTHS)
COUNT = int(np.prod([len(choice) for choice in CHOICES]))
ORDER_SEED = 1704


@dataclass(frozen=True)
class Architecture:
    """One entry of the paper's Table 1."""

    generator_nonlinearity: str
    critic_nonlinearity: str
    generator_depth: int
    critic_depth: int
    generator_norm: bool
    critic_norm: bool
    generator_width: int
    critic_width: int


def architecture_at(index: int) -> Architecture:
    """Entry `index` of the 9,216 in their plain order. Raises: `ValueError` outside 0 .. 9215."""
    if not 0 <= index < COUNT:
        raise ValueError(f"there are {COUNT:,} architectures, numbered from 0; there is no number {index}")
    chosen = np.unravel_index(index, [len(choice) for choice in CHOICES])
    values: list[Any] = [choice[int(place)] for choice, place in zip(CHOICES, chosen, strict=True)]
    return Architecture(*values)


def architecture(number: int) -> Architecture:
    """Architecture `number` of a fixed random order of all 9,216: the first n are a sample without replacement.

    Raises: `ValueError` outside 0 .. 9215.
    """
    if not 0 <= number < COUNT:
        raise ValueError(f"there are {COUNT:,} architectures, numbered from 0; there is no number {number}")
    return architecture_at(int(np.random.Generator(np.random.PCG64(ORDER_SEED)).permutation(COUNT)[number]))


def smooth_elu(inputs: jax.Array) -> jax.Array:
    """softplus(2x + 2) / 2 - 1: close to ELU, with a second derivative everywhere. Source: Appendix D."""
    return nn.softplus(2 * inputs + 2) / 2 - 1


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "leaky-relu": leaky,
    "softplus": smooth_elu,
    "tanh": jnp.tanh,
}


def middle_stage(size: int) -> int:
    """Where further layers stand: at 4x4 times two to this power, a quarter of the side but at least 4x4."""
    return max(halvings(size) - 2, 0)


class RandomGenerator(nn.Module):
    """Latent [B, Z] -> images [B, size, size, channels] in [-1, 1] with `depth` layers, the last one included.

    Raises: `ValueError` for a depth that the images' size alone needs more than.
    """

    size: int
    channels: int
    width: int
    depth: int
    nonlinearity: str
    norm: str
    dtype: Any = None

    @nn.compact
    def __call__(self, latent: jax.Array, labels: jax.Array | None = None, *, train: bool) -> jax.Array:
        del labels
        stages = halvings(self.size)
        extra = _extra_layers(self.depth, stages)
        activate = ACTIVATIONS[self.nonlinearity]
        middle = middle_stage(self.size)
        features = self.width << (stages - 1)
        start = Linear(features * BASE**2, start="he", dtype=self.dtype, name="start")(latent)
        images = start.reshape(-1, BASE, BASE, features)
        images = activate(Norm(self.norm, name="norm_start")(images, train=train))
        for stage in range(stages):
            if stage == middle:
                for number in range(extra):
                    images = Conv(images.shape[-1], 3, dtype=self.dtype, name=f"extra_{number}")(images)
                    images = activate(Norm(self.norm, name=f"norm_extra_{number}")(images, train=train))
            if stage < stages - 1:
                images = Deconv(self.width << (stages - 2 - stage), dtype=self.dtype, name=f"deconv_{stage}")(images)
                images = activate(Norm(self.norm, name=f"norm_{stage}")(images, train=train))
        images = Deconv(self.channels, dtype=self.dtype, name="image")(images)
        return jnp.tanh(images.astype(jnp.float32))


class RandomCritic(nn.Module):
    """Images -> features [B, F] with `depth - 1` layers (the head is one more), all but the first normalised."""

    width: int
    depth: int
    nonlinearity: str
    norm: str
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        size = images.shape[1]
        stages = halvings(size)
        extra = _extra_layers(self.depth, stages)
        activate = ACTIVATIONS[self.nonlinearity]
        middle = middle_stage(size)
        for stage in range(stages):
            images = Conv(self.width << stage, 5, 2, dtype=self.dtype, name=f"conv_{stage}")(images)
            if stage:
                images = Norm(self.norm, name=f"norm_{stage}")(images, train=train)
            images = activate(images)
            if stages - 1 - stage == middle:
                for number in range(extra):
                    images = Conv(images.shape[-1], 3, dtype=self.dtype, name=f"extra_{number}")(images)
                    images = activate(Norm(self.norm, name=f"norm_extra_{number}")(images, train=train))
        return images.reshape(len(images), -1)


def _extra_layers(depth: int, stages: int) -> int:
    extra = depth - 1 - stages
    if extra < 0:
        raise ValueError(f"images of side {BASE << stages} need at least {1 + stages} layers, not {depth}")
    return extra


def random_generator(options: NetworkOptions) -> RandomGenerator:
    """The generator of architecture `options.architecture`; its width is in proportion to `generator_width` / 64."""
    chosen = architecture(options.architecture)
    size, _, channels = options.sample_shape
    return RandomGenerator(
        size=size,
        channels=channels,
        width=_scaled(chosen.generator_width, options.generator_width),
        depth=chosen.generator_depth,
        nonlinearity=chosen.generator_nonlinearity,
        norm=options.generator_norm if chosen.generator_norm else "none",
        dtype=options.dtype,
    )


def random_critic(options: NetworkOptions) -> RandomCritic:
    """The critic of architecture `options.architecture`; normalised by `discriminator_norm` where it is normalised."""
    chosen = architecture(options.architecture)
    return RandomCritic(
        width=_scaled(chosen.critic_width, options.discriminator_width),
        depth=chosen.critic_depth,
        nonlinearity=chosen.critic_nonlinearity,
        norm=options.discriminator_norm if chosen.critic_norm else "none",
        dtype=options.dtype,
    )


def _scaled(width: int, base: int) -> int:
    return max(1, width * base // BASE_WIDTH)


def check_random(options: NetworkOptions) -> None:
    """Raises: `ConfigError` for images, a number or a base width that no architecture is for."""
    size = options.sample_shape[0]
    if len(options.sample_shape) != 3 or size not in (8, 16, 32):
        raise ConfigError(f"--network random is for images of 8, 16 or 32 pixels, not {options.sample_shape}")
    if not 0 <= options.architecture < COUNT:
        raise ConfigError(f"there are {COUNT:,} architectures, numbered from 0: --architecture {options.architecture}")
    if options.num_classes:
        raise ConfigError("--network random has no class-conditional layers: train it without labels")
