"""BigGAN-deep: bottleneck blocks, the whole latent in every normalisation, shortcuts that drop or add channels.

Source: Brock et al. 2019, Appendix B (Figure 16), as in PyTorch-StudioGAN: `depth` blocks per resolution, of which the
generator's last doubles the image and the discriminator's first halves it.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stabletrain.errors import ConfigError
from stabletrain.gan.channel_plan import BOTTOM, deep_plan
from stabletrain.gan.networks import NetworkOptions
from stabletrain.gan.networks.biggan import class_embedding
from stabletrain.gan.networks.blocks import (
    DiscriminatorNorm,
    GeneratorNorm,
    SelfAttention,
    check_attention,
    check_images,
    pool,
    sum_features,
    upsample,
)
from stabletrain.gan.networks.resnet import generator_end
from stabletrain.nn.spectral_norm import SpectralConvolution, SpectralDense

Array = jax.Array
RATIO = 4
"""Channels of a block over those of its bottleneck."""


def check_biggan_deep(options: NetworkOptions) -> None:
    """Raises: `ConfigError` for images without a plan, no blocks, or widths that the bottleneck does not divide."""
    check_images(options)
    plan = deep_plan(options.sample_shape[0], options.generator_width, options.discriminator_width)
    check_attention(options, len(plan.generator) - 1, len(plan.discriminator) - 1)
    if options.depth < 1:
        raise ConfigError("--depth 0: BigGAN-deep has at least one block per resolution; the paper's has 2")
    for name, widths in (("generator", plan.generator[:-1]), ("discriminator", plan.discriminator)):
        if any(width % RATIO for width in widths):
            raise ConfigError(f"--{name}-width must be a multiple of {RATIO}, which the bottlenecks divide by")


class DeepGeneratorBlock(nn.Module):
    """1x1, 3x3, 3x3, 1x1, each behind normalisation and ReLU; the shortcut keeps the first channels."""

    features: int
    double: bool
    norm: str
    spectral: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, condition: Array | None, *, train: bool) -> Array:
        def layer(number: int, features: int, size: int, inputs: Array, double: bool = False) -> Array:
            norm = GeneratorNorm(self.norm, self.spectral, name=f"norm_{number}")
            active = jax.nn.relu(norm(inputs, condition, train=train))
            conv = SpectralConvolution(features, size, spectral=self.spectral, dtype=self.dtype, name=f"conv_{number}")
            return conv(upsample(active) if double else active, train=train)

        narrow = images.shape[-1] // RATIO
        hidden = layer(1, narrow, 1, images)
        hidden = layer(2, narrow, 3, hidden, self.double)
        hidden = layer(3, narrow, 3, hidden)
        hidden = layer(4, self.features, 1, hidden)
        short = images[..., : self.features]
        return hidden + (upsample(short) if self.double else short)


class DeepDiscriminatorBlock(nn.Module):
    """ReLU before 1x1, 3x3, 3x3, 1x1; the shortcut is the input with further channels of a 1x1 beside it."""

    features: int
    halve: bool
    norm: str
    spectral: bool
    inplace_relu: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        def conv(name: str, features: int, size: int, inputs: Array) -> Array:
            layer = SpectralConvolution(features, size, spectral=self.spectral, dtype=self.dtype, name=name)
            return layer(inputs, train=train)

        def active(number: int, inputs: Array) -> Array:
            return jax.nn.relu(DiscriminatorNorm(self.norm, name=f"norm_{number}")(inputs, train=train))

        first = active(1, images)
        narrow = self.features // RATIO
        hidden = conv("conv_1", narrow, 1, first)
        hidden = conv("conv_2", narrow, 3, active(2, hidden))
        hidden = active(4, conv("conv_3", narrow, 3, active(3, hidden)))
        hidden = conv("conv_4", self.features, 1, pool(hidden) if self.halve else hidden)
        short = first if self.inplace_relu and self.norm == "none" else images
        short = pool(short) if self.halve else short
        added = self.features - images.shape[-1]
        if added:
            short = jnp.concatenate([short, conv("shortcut", added, 1, short)], axis=-1)
        return hidden + short


class DeepGenerator(nn.Module):
    """Latents [B, z_dim] and labels [B] to images in [-1, 1]; latent and class embedding enter every normalisation."""

    options: NetworkOptions

    @nn.compact
    def __call__(self, z: Array, labels: Array | None, *, train: bool) -> Array:
        """z [B, z_dim], labels [B] or None."""
        options = self.options
        norm, spectral, dtype = options.generator_norm, options.generator_spectral, options.dtype
        widths = deep_plan(options.sample_shape[0], options.generator_width, RATIO).generator
        condition = jnp.concatenate([*class_embedding(options, labels, z.dtype), z], axis=-1)
        start = SpectralDense(BOTTOM * BOTTOM * widths[0], spectral=spectral, dtype=dtype, name="start")
        hidden = start(condition, train=train).reshape(-1, BOTTOM, BOTTOM, widths[0])
        for stage, width in enumerate(widths[1:], start=1):
            for place in range(options.depth):
                last = place == options.depth - 1
                # A stage keeps its channels until the block that doubles the image, where it has more than one.
                features = width if last else hidden.shape[-1]
                block = DeepGeneratorBlock(features, last, norm, spectral, dtype, name=f"block_{stage}_{place + 1}")
                hidden = block(hidden, condition, train=train)
            if stage in options.generator_attention:
                hidden = SelfAttention(spectral, dtype, name=f"attention_{stage}")(hidden, train=train)
        return generator_end(hidden, options, train=train)


class DeepDiscriminator(nn.Module):
    """Images [B, H, W, C] to features [B, F], the sum over space after the last ReLU."""

    options: NetworkOptions

    @nn.compact
    def __call__(self, samples: Array, *, train: bool) -> Array:
        """samples [B, H, W, C]."""
        options = self.options
        norm, spectral, dtype = options.discriminator_norm, options.discriminator_spectral, options.dtype
        plan = deep_plan(options.sample_shape[0], 1, options.discriminator_width)
        first = SpectralConvolution(plan.discriminator[0], 3, spectral=spectral, dtype=dtype, name="start")
        hidden = first(samples, train=train)
        for stage, (width, halve) in enumerate(zip(plan.discriminator[1:], plan.halving, strict=True), start=1):
            for place in range(options.depth):
                name = f"block_{stage}_{place + 1}"
                block = DeepDiscriminatorBlock(
                    width, halve and place == 0, norm, spectral, options.inplace_relu, dtype, name=name
                )
                hidden = block(hidden, train=train)
            if stage in options.discriminator_attention:
                hidden = SelfAttention(spectral, dtype, name=f"attention_{stage}")(hidden, train=train)
        return sum_features(hidden)
