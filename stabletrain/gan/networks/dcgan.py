"""DCGAN: transposed convolutions up, strided convolutions down, in the form that SNGAN trains on CIFAR.

At 32 pixels the generator has 512, 256, 128 and 64 channels. Source: Radford et al. 2016; Miyato et al. 2018, Table 3.
Differs: the features are the sum over space after the last activation, as in PyTorch-StudioGAN.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from stabletrain.gan.channel_plan import BOTTOM, doublings
from stabletrain.gan.networks import NetworkOptions
from stabletrain.gan.networks.blocks import DiscriminatorNorm, GeneratorNorm
from stabletrain.nn.spectral_norm import SpectralConvolution, SpectralDense

Array = jax.Array
SLOPE = 0.1
WIDEST = 8
START = nn.initializers.normal(0.02)


class DCGANGenerator(nn.Module):
    """Latents [B, z_dim] and labels [B] to images in [-1, 1]; labels as in `ResNetGenerator`."""

    options: NetworkOptions

    @nn.compact
    def __call__(self, z: Array, labels: Array | None, *, train: bool) -> Array:
        """z [B, z_dim], labels [B] or None."""
        options = self.options
        spectral, dtype = options.generator_spectral, options.dtype
        count = doublings(options.sample_shape[0])
        widths = [options.generator_width * min(WIDEST, 2 ** (count - number)) for number in range(count + 1)]
        condition = jax.nn.one_hot(labels, options.num_classes, dtype=z.dtype) if options.num_classes else None
        if condition is not None and options.generator_norm == "none":
            z, condition = jnp.concatenate([z, condition], axis=-1), None
        size = BOTTOM * BOTTOM * widths[0]
        start = SpectralDense(size, kernel_init=START, spectral=spectral, dtype=dtype, name="start")
        hidden = start(z, train=train).reshape(-1, BOTTOM, BOTTOM, widths[0])
        for number, width in enumerate(widths[1:], start=1):
            # Two zeros in front and behind the spread input: 4x4, stride 2 and padding 1 of a transposed convolution.
            layer = SpectralConvolution(
                width, 4, stride=2, padding=((2, 2), (2, 2)), transposed=True, kernel_init=START, spectral=spectral,
                dtype=dtype, name=f"block_{number}",
            )  # fmt: skip
            hidden = layer(hidden, train=train)
            norm = GeneratorNorm(options.generator_norm, spectral, name=f"norm_{number}")
            hidden = jax.nn.relu(norm(hidden, condition, train=train))
        channels = options.sample_shape[-1]
        last = SpectralConvolution(channels, 3, kernel_init=START, spectral=spectral, dtype=dtype, name="out")
        out = last(hidden, train=train)
        return jnp.tanh(out.astype(jnp.promote_types(out.dtype, jnp.float32)))


class DCGANDiscriminator(nn.Module):
    """Images [B, H, W, C] to features [B, F]: pairs of 3x3 and 4x4 with stride 2 down to 4x4, a 3x3, sum over space."""

    options: NetworkOptions

    @nn.compact
    def __call__(self, samples: Array, *, train: bool) -> Array:
        """samples [B, H, W, C]."""
        options = self.options
        count = doublings(options.sample_shape[0])
        widths = [options.discriminator_width * min(WIDEST, 2**number) for number in range(count + 1)]

        def layer(name: str, width: int, size: int, stride: int, inputs: Array) -> Array:
            conv = SpectralConvolution(
                width, size, stride=stride, padding=((1, 1), (1, 1)), kernel_init=START,
                spectral=options.discriminator_spectral, dtype=options.dtype, name=name,
            )  # fmt: skip
            out = conv(inputs, train=train)
            # The layer that sees the image has no normalisation, which would take its brightness away.
            kind = "none" if name == "flat_1" else options.discriminator_norm
            out = DiscriminatorNorm(kind, name=f"norm_{name}")(out, train=train)
            return jax.nn.leaky_relu(out, SLOPE)

        hidden = samples
        for number, width in enumerate(widths[:-1], start=1):
            hidden = layer(f"flat_{number}", width, 3, 1, hidden)
            hidden = layer(f"down_{number}", width, 4, 2, hidden)
        hidden = layer("last", widths[-1], 3, 1, hidden)
        return jnp.sum(hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32)), axis=(1, 2))
