"""Residual blocks of SNGAN, SAGAN and BigGAN, their self-attention, and what they share with the deeper networks.

A linear 1x1 convolution changes place with nearest upsampling and with average pooling: shortcuts convolve at the
smaller size, which gives the same numbers for a quarter of the work.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stabletrain.errors import ConfigError
from stabletrain.gan.channel_plan import check_size
from stabletrain.gan.networks import NetworkOptions
from stabletrain.nn.conditional_norm import EPSILON, BatchNorm, ConditionalBatchNorm
from stabletrain.nn.spectral_norm import SpectralConvolution

Array = jax.Array


def check_images(options: NetworkOptions) -> None:
    """Raises: `ConfigError` for samples that are no square images of a size with a channel plan."""
    shape = options.sample_shape
    if len(shape) != 3 or shape[0] != shape[1]:
        raise ConfigError(f"this network is for square images, not for samples of shape {shape}")
    check_size(shape[0])


def check_attention(options: NetworkOptions, generator_blocks: int, discriminator_blocks: int) -> None:
    """Raises: `ConfigError` for attention behind a block that there is not, or on too few channels."""
    for name, places, blocks, width in (
        ("generator", options.generator_attention, generator_blocks, options.generator_width),
        ("discriminator", options.discriminator_attention, discriminator_blocks, options.discriminator_width),
    ):
        wrong = [place for place in places if not 1 <= place <= blocks]
        if wrong:
            raise ConfigError(f"--{name}-attention {wrong[0]}: the {name} has blocks 1 to {blocks} at this size")
        if places and width % 8:
            raise ConfigError(f"--{name}-attention needs a --{name}-width that is a multiple of 8, not {width}")


def upsample(images: Array) -> Array:
    """[B, H, W, C] -> [B, 2H, 2W, C], each pixel four times."""
    return jnp.repeat(jnp.repeat(images, 2, axis=1), 2, axis=2)


def pool(images: Array) -> Array:
    """[B, 2H, 2W, C] -> [B, H, W, C]: means of 2x2."""
    return jnp.mean(_windows(images), axis=(2, 4))


def max_pool(images: Array) -> Array:
    """[B, 2H, 2W, C] -> [B, H, W, C]: the largest of 2x2."""
    return jnp.max(_windows(images), axis=(2, 4))


def _windows(images: Array) -> Array:
    batch, height, width, channels = images.shape
    return images.reshape(batch, height // 2, 2, width // 2, 2, channels)


def sum_features(images: Array) -> Array:
    """ReLU and the sum over space, in float32: [B, H, W, C] -> [B, C]."""
    return jnp.sum(jax.nn.relu(images.astype(jnp.promote_types(images.dtype, jnp.float32))), axis=(1, 2))


class GeneratorNorm(nn.Module):
    """Normalisation of a generator: by a condition where there is one, else with a scale and shift, or none."""

    kind: str
    spectral: bool

    @nn.compact
    def __call__(self, images: Array, condition: Array | None, *, train: bool) -> Array:
        if self.kind == "none":
            return images
        if condition is None:
            return BatchNorm(name="batch")(images, train=train)
        return ConditionalBatchNorm(spectral=self.spectral, name="batch")(images, condition, train=train)


class DiscriminatorNorm(nn.Module):
    """Normalisation of a discriminator: `none`, `batch`, or `layer` (over a sample, with a scale per channel)."""

    kind: str

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        if self.kind == "batch":
            return BatchNorm(name="batch")(images, train=train)
        if self.kind == "layer":
            norm = nn.LayerNorm(epsilon=EPSILON, reduction_axes=(1, 2, 3), feature_axes=-1, name="layer")
            return norm(images).astype(images.dtype)
        return images


class SelfAttention(nn.Module):
    """x + sigma attention(x), sigma starting at 0; keys and values are max-pooled to half the size.

    Source: Zhang et al. 2019, Section 3, with the pooling and widths C/8 and C/2 of its released code.
    """

    spectral: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        batch, height, width, channels = images.shape

        def project(name: str, features: int, inputs: Array) -> Array:
            layer = SpectralConvolution(
                features, 1, use_bias=False, spectral=self.spectral, dtype=self.dtype, name=name
            )
            return layer(inputs, train=train)

        queries = project("theta", channels // 8, images).reshape(batch, height * width, -1)
        keys = max_pool(project("phi", channels // 8, images)).reshape(batch, height * width // 4, -1)
        values = max_pool(project("g", channels // 2, images)).reshape(batch, height * width // 4, -1)
        scores = jnp.einsum("bqd,bkd->bqk", queries, keys)
        wide = jnp.promote_types(scores.dtype, jnp.float32)
        weights = jax.nn.softmax(scores.astype(wide), axis=-1).astype(values.dtype)
        seen = jnp.einsum("bqk,bkd->bqd", weights, values).reshape(batch, height, width, -1)
        sigma = self.param("sigma", nn.initializers.zeros_init(), (1,))
        return images + (sigma * project("out", channels, seen)).astype(images.dtype)


class GeneratorBlock(nn.Module):
    """norm, ReLU, upsampling, 3x3, norm, ReLU, 3x3, and a shortcut of upsampling and 1x1: doubles the image."""

    features: int
    norm: str
    spectral: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, condition: Array | None, *, train: bool) -> Array:
        def conv(name: str, size: int, inputs: Array) -> Array:
            layer = SpectralConvolution(self.features, size, spectral=self.spectral, dtype=self.dtype, name=name)
            return layer(inputs, train=train)

        hidden = GeneratorNorm(self.norm, self.spectral, name="norm_1")(images, condition, train=train)
        hidden = conv("conv_1", 3, upsample(jax.nn.relu(hidden)))
        hidden = GeneratorNorm(self.norm, self.spectral, name="norm_2")(hidden, condition, train=train)
        return conv("conv_2", 3, jax.nn.relu(hidden)) + upsample(conv("shortcut", 1, images))


class FirstBlock(nn.Module):
    """3x3, ReLU, 3x3, pooling, and a shortcut of pooling and 1x1: the discriminator's block that sees the image."""

    features: int
    norm: str
    spectral: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        def conv(name: str, size: int, inputs: Array) -> Array:
            layer = SpectralConvolution(self.features, size, spectral=self.spectral, dtype=self.dtype, name=name)
            return layer(inputs, train=train)

        hidden = DiscriminatorNorm(self.norm, name="norm_1")(conv("conv_1", 3, images), train=train)
        hidden = pool(conv("conv_2", 3, jax.nn.relu(hidden)))
        short = DiscriminatorNorm(self.norm, name="norm_shortcut")(pool(images), train=train)
        return hidden + conv("shortcut", 1, short)


class DiscriminatorBlock(nn.Module):
    """norm, ReLU, 3x3, norm, ReLU, 3x3, perhaps pooling, and a shortcut, of 1x1 where size or channels change.

    `inplace_relu`: without normalisation the shortcut receives ReLU(x), as PyTorch-StudioGAN's in-place activation
    makes it (normalisation makes a copy, which hides the effect).
    """

    features: int
    halve: bool
    norm: str
    spectral: bool
    inplace_relu: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        def conv(name: str, size: int, inputs: Array) -> Array:
            layer = SpectralConvolution(self.features, size, spectral=self.spectral, dtype=self.dtype, name=name)
            return layer(inputs, train=train)

        active = jax.nn.relu(DiscriminatorNorm(self.norm, name="norm_1")(images, train=train))
        hidden = DiscriminatorNorm(self.norm, name="norm_2")(conv("conv_1", 3, active), train=train)
        hidden = conv("conv_2", 3, jax.nn.relu(hidden))
        short = active if self.inplace_relu and self.norm == "none" else images
        if self.halve:
            hidden = pool(hidden)
        if self.halve or images.shape[-1] != self.features:
            short = DiscriminatorNorm(self.norm, name="norm_shortcut")(short, train=train)
            short = conv("shortcut", 1, pool(short) if self.halve else short)
        return hidden + short
