"""SNGAN's residual networks, and SAGAN's, which add self-attention.

Source: Miyato et al. 2018, Appendix B.4; Zhang et al. 2019; widths, conditional normalisation and the order of layers
as in PyTorch-StudioGAN, beyond 32 pixels those of BigGAN.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from stabletrain.gan.channel_plan import BOTTOM, residual_plan
from stabletrain.gan.networks import NetworkOptions
from stabletrain.gan.networks.blocks import (
    DiscriminatorBlock,
    FirstBlock,
    GeneratorBlock,
    GeneratorNorm,
    SelfAttention,
    check_attention,
    check_images,
    sum_features,
)
from stabletrain.nn.spectral_norm import SpectralConvolution, SpectralDense

Array = jax.Array


def check_resnet(options: NetworkOptions) -> None:
    """Raises: `ConfigError` for images without a plan and attention behind blocks that there are not."""
    check_images(options)
    plan = residual_plan(options.sample_shape[0], options.generator_width, options.discriminator_width)
    check_attention(options, len(plan.generator) - 1, len(plan.discriminator))


class ResNetGenerator(nn.Module):
    """Latents [B, z_dim] and labels [B] to images in [-1, 1]. Labels act through normalisation.

    Without normalisation they are concatenated with the latent as one-hot vectors.
    """

    options: NetworkOptions

    @nn.compact
    def __call__(self, z: Array, labels: Array | None, *, train: bool) -> Array:
        """z [B, z_dim], labels [B] or None."""
        options = self.options
        widths = residual_plan(options.sample_shape[0], options.generator_width, 1).generator
        condition = jax.nn.one_hot(labels, options.num_classes, dtype=z.dtype) if options.num_classes else None
        if condition is not None and options.generator_norm == "none":
            z, condition = jnp.concatenate([z, condition], axis=-1), None
        size = BOTTOM * BOTTOM * widths[0]
        start = SpectralDense(size, spectral=options.generator_spectral, dtype=options.dtype, name="start")
        hidden = start(z, train=train).reshape(-1, BOTTOM, BOTTOM, widths[0])
        return generator_body(hidden, [condition] * (len(widths) - 1), widths, options, train=train)


def generator_body(
    hidden: Array, conditions: list[Array | None], widths: tuple[int, ...], options: NetworkOptions, *, train: bool
) -> Array:
    """From 4x4 to the image, inside a module's call: a block for each condition."""
    norm, spectral, dtype = options.generator_norm, options.generator_spectral, options.dtype
    for number, (width, condition) in enumerate(zip(widths[1:], conditions, strict=True), start=1):
        hidden = GeneratorBlock(width, norm, spectral, dtype, name=f"block_{number}")(hidden, condition, train=train)
        if number in options.generator_attention:
            hidden = SelfAttention(spectral, dtype, name=f"attention_{number}")(hidden, train=train)
    return generator_end(hidden, options, train=train)


def generator_end(hidden: Array, options: NetworkOptions, *, train: bool) -> Array:
    """Normalisation without conditions, ReLU, 3x3 to the image's channels, tanh; inside a module's call."""
    hidden = GeneratorNorm(options.generator_norm, False, name="norm_out")(hidden, None, train=train)
    out = SpectralConvolution(
        options.sample_shape[-1], 3, spectral=options.generator_spectral, dtype=options.dtype, name="out"
    )(jax.nn.relu(hidden), train=train)
    return jnp.tanh(out.astype(jnp.promote_types(out.dtype, jnp.float32)))


class ResNetDiscriminator(nn.Module):
    """Images [B, H, W, C] to features [B, F], the sum over space after the last ReLU: SNGAN's, SAGAN's and BigGAN's."""

    options: NetworkOptions

    @nn.compact
    def __call__(self, samples: Array, *, train: bool) -> Array:
        """samples [B, H, W, C]."""
        options = self.options
        plan = residual_plan(options.sample_shape[0], 1, options.discriminator_width)
        norm, spectral, dtype = options.discriminator_norm, options.discriminator_spectral, options.dtype
        hidden = samples
        for number, (width, halve) in enumerate(zip(plan.discriminator, plan.halving, strict=True), start=1):
            name = f"block_{number}"
            block: nn.Module
            if number == 1:
                block = FirstBlock(width, norm, spectral, dtype, name=name)
            else:
                block = DiscriminatorBlock(width, halve, norm, spectral, options.inplace_relu, dtype, name=name)
            hidden = block(hidden, train=train)
            if number in options.discriminator_attention:
                hidden = SelfAttention(spectral, dtype, name=f"attention_{number}")(hidden, train=train)
        return sum_features(hidden)
