"""The residual networks that WGAN-GP trains on CIFAR-10, with and without labels.

All blocks have one width. The generator doubles the side before the first convolution of a block (the paper's text says
the second, the released code the first); its labels act through the scale and offset of batch normalisation, but for
the last one. The critic has no normalisation and takes the mean over places at its end.
Source: Gulrajani et al. 2017, Section 5.3 and Appendix F, by the released gan_cifar_resnet.py.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stabletrain.errors import ConfigError
from stabletrain.gan.networks import NetworkOptions
from stabletrain.gan.networks.lsun import BASE, halvings
from stabletrain.gan.networks.tf_layers import EPSILON, Conv, Linear, Norm

SMALLEST = 16
PLAIN_BLOCKS = 2


def doubled(images: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, 2H, 2W, C], each pixel four times."""
    return jnp.repeat(jnp.repeat(images, 2, axis=1), 2, axis=2)


def halved(images: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H/2, W/2, C], the mean of each 2x2."""
    batch, height, width, channels = images.shape
    return images.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


class ClassNorm(nn.Module):
    """Batch normalisation over the whole batch with a scale and an offset for each class."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array, *, train: bool) -> jax.Array:
        channels = images.shape[-1]
        normed = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, epsilon=EPSILON, use_scale=False, use_bias=False, name="batch"
        )(images)
        scale = self.param("scale", nn.initializers.ones, (self.num_classes, channels))[labels]
        offset = self.param("offset", nn.initializers.zeros, (self.num_classes, channels))[labels]
        return normed * scale[:, None, None] + offset[:, None, None]


class ResNetGenerator(nn.Module):
    """Latent [B, Z] and labels [B] (None without) -> images [B, size, size, channels] in [-1, 1]."""

    size: int
    channels: int
    width: int = 128
    norm: str = "batch"
    num_classes: int = 0
    dtype: Any = None

    @nn.compact
    def __call__(self, latent: jax.Array, labels: jax.Array | None = None, *, train: bool) -> jax.Array:
        def normed(images: jax.Array, name: str) -> jax.Array:
            if self.num_classes:
                assert labels is not None, "a conditional generator needs labels"
                return ClassNorm(self.num_classes, name=name)(images, labels, train=train)
            return Norm(self.norm, name=name)(images, train=train)

        start = Linear(BASE**2 * self.width, dtype=self.dtype, name="start")(latent)
        images = start.reshape(-1, BASE, BASE, self.width)
        for number in range(halvings(self.size)):
            branch = nn.relu(normed(images, f"norm_{number}_first"))
            branch = Conv(self.width, dtype=self.dtype, name=f"conv_{number}_first")(doubled(branch))
            branch = nn.relu(normed(branch, f"norm_{number}_second"))
            branch = Conv(self.width, dtype=self.dtype, name=f"conv_{number}_second")(branch)
            shortcut = Conv(self.width, 1, start="glorot", dtype=self.dtype, name=f"shortcut_{number}")
            images = shortcut(doubled(images)) + branch
        images = nn.relu(Norm(self.norm, name="norm_last")(images, train=train))
        images = Conv(self.channels, start="glorot", dtype=self.dtype, name="image")(images)
        return jnp.tanh(images.astype(jnp.float32))


class ResNetCritic(nn.Module):
    """Images [B, size, size, C] -> features [B, width]: blocks that halve the side down to 8, then two plain ones."""

    width: int = 128
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        del train

        def conv(name: str, size: int = 3, start: str = "he") -> Conv:
            return Conv(self.width, size, start=start, dtype=self.dtype, name=name)

        branch = conv("conv_0_second")(nn.relu(conv("conv_0_first")(images)))
        images = conv("shortcut_0", 1, "glorot")(halved(images)) + halved(branch)
        downs = halvings(2 * images.shape[1]) - 1
        for number in range(1, downs + PLAIN_BLOCKS):
            branch = conv(f"conv_{number}_second")(nn.relu(conv(f"conv_{number}_first")(nn.relu(images))))
            if number < downs:
                images = halved(conv(f"shortcut_{number}", 1, "glorot")(images)) + halved(branch)
            else:
                images = images + branch
        return nn.relu(images).mean((1, 2))


def resnet_generator(options: NetworkOptions) -> ResNetGenerator:
    """The generator of the command line's options."""
    return ResNetGenerator(
        size=options.sample_shape[0],
        channels=options.sample_shape[2],
        width=options.generator_width,
        norm=options.generator_norm,
        num_classes=options.num_classes,
        dtype=options.dtype,
    )


def resnet_critic(options: NetworkOptions) -> ResNetCritic:
    """The critic of the command line's options."""
    return ResNetCritic(width=options.discriminator_width, dtype=options.dtype)


def check_wgan_gp_resnet(options: NetworkOptions) -> None:
    """Raises: `ConfigError` for images whose side is not 4 * 2^n, n at least 2; for labels without normalisation."""
    shape = options.sample_shape
    if len(shape) != 3 or shape[0] < SMALLEST or shape[0] != BASE << (shape[0] // BASE).bit_length() - 1:
        raise ConfigError(f"--network wgan-gp-resnet is for images of 16, 32, 64, ... pixels, not {shape}")
    if options.num_classes and options.generator_norm == "none":
        raise ConfigError("--network wgan-gp-resnet learns labels through --generator-norm batch")
