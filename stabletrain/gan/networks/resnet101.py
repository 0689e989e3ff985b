"""Generator and critic of 101 layers: residual networks of 33 bottleneck blocks each, for images of 64x64.

A block is ReLU, 1x1, ReLU, 3x3, ReLU, 1x1, then the normalisation, times 0.3, beside the shortcut. Five or six equal
blocks stand at each resolution. They can be one compiled loop (`scan`: far less to compile; on a CPU convolutions in
a loop are slower, so that it is off there) and compute their activations again in the backward pass (`remat`).
Source: Gulrajani et al. 2017, Section 5.2 and Appendix E, by the released gan_64x64.py.
"""

from __future__ import annotations

from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from stabletrain.errors import ConfigError
from stabletrain.gan.networks import NetworkOptions
from stabletrain.gan.networks.tf_layers import Conv, Deconv, Linear, Norm, depth_to_space

BRANCH_SCALE = 0.3
OUTPUT_SCALE = 0.2
EQUAL_BLOCKS = 6
BLOCKS_AT_FULL_SIZE = 5


class Bottleneck(nn.Module):
    """[B, H, W, in] -> [B, H', W', features]; `resample` is "none", "down" (half the size) or "up" (twice)."""

    features: int
    norm: str
    resample: str = "none"
    train: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        channels = images.shape[-1]
        branch = Conv(channels // 2, 1, dtype=self.dtype, name="reduce")(nn.relu(images))
        branch = nn.relu(branch)
        if self.resample == "up":
            branch = Deconv(self.features // 2, 3, dtype=self.dtype, name="middle")(branch)
        else:
            branch = Conv(self.features // 2, 3, 2 if self.resample == "down" else 1, dtype=self.dtype, name="middle")(
                branch
            )
        branch = Conv(self.features, 1, bias=False, dtype=self.dtype, name="expand")(nn.relu(branch))
        branch = Norm(self.norm, name="norm")(branch, train=self.train)
        shortcut = self._shortcut(images, channels)
        return shortcut + BRANCH_SCALE * branch.astype(shortcut.dtype)

    def _shortcut(self, images: jax.Array, channels: int) -> jax.Array:
        if self.resample == "up":
            return depth_to_space(Conv(4 * self.features, 1, start="glorot", dtype=self.dtype, name="shortcut")(images))
        if self.resample == "down":
            return Conv(self.features, 1, 2, start="glorot", dtype=self.dtype, name="shortcut")(images)
        if channels != self.features:
            raise ValueError(f"a block that keeps the size keeps its {channels} channels, not {self.features}")
        return images


class Blocks(Protocol):
    """What a network says about its blocks."""

    norm: str
    scan: bool
    remat: bool
    dtype: Any


def equal_blocks(images: jax.Array, count: int, network: Blocks, *, train: bool, name: str) -> jax.Array:
    """`count` blocks of the same shape, one after the other; to be called within a compact method."""
    block: Any = nn.remat(Bottleneck, prevent_cse=not network.scan) if network.remat else Bottleneck
    arguments = (images.shape[-1], network.norm, "none", train, network.dtype)
    if not network.scan:
        for number in range(count):
            images = block(*arguments, name=f"{name}_{number}")(images)
        return images
    loop: Any = nn.scan(
        lambda module, carry, _: (module(carry), None),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=count,
    )
    images, _ = loop(block(*arguments, name=name), images, None)
    return images


class ResNet101Generator(nn.Module):
    """Latent [B, Z] -> images [B, 64, 64, channels] in [-1, 1]; 1 + 33 * 3 + 1 = 101 layers, without the shortcuts."""

    channels: int = 3
    width: int = 64
    norm: str = "batch"
    scan: bool = False
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, latent: jax.Array, labels: jax.Array | None = None, *, train: bool) -> jax.Array:
        del labels
        widths = (8, 4, 2, 1, 0.5)
        start = Linear(4 * 4 * 8 * self.width, dtype=self.dtype, name="start")(latent)
        images = start.reshape(-1, 4, 4, 8 * self.width)
        for stage, factor in enumerate(widths):
            features = int(factor * self.width)
            if stage:
                images = Bottleneck(features, self.norm, "up", train, self.dtype, name=f"up_{stage}")(images)
            count = EQUAL_BLOCKS if stage < len(widths) - 1 else BLOCKS_AT_FULL_SIZE
            images = equal_blocks(images, count, self, train=train, name=f"stage_{stage}")
        images = Conv(self.channels, 1, start="glorot", dtype=self.dtype, name="image")(images)
        return nn.tanh(OUTPUT_SCALE * images.astype(jnp.float32))


class ResNet101Critic(nn.Module):
    """Images [B, 64, 64, channels] -> features [B, 4 * 4 * 8 width]: 100 layers, and the head that scores them is one.

    The release divides the score by 5; so it is of the features here, whose head has then the same law and slopes.
    With the penalty the normalisation must be "layer" or "none".
    """

    width: int = 64
    norm: str = "layer"
    scan: bool = False
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        widths = (0.5, 1, 2, 4, 8)
        images = Conv(self.width // 2, 1, start="glorot", dtype=self.dtype, name="image")(images)
        for stage, factor in enumerate(widths):
            features = int(factor * self.width)
            if stage:
                images = Bottleneck(features, self.norm, "down", train, self.dtype, name=f"down_{stage}")(images)
            count = EQUAL_BLOCKS if stage else BLOCKS_AT_FULL_SIZE
            images = equal_blocks(images, count, self, train=train, name=f"stage_{stage}")
        return OUTPUT_SCALE * images.reshape(len(images), -1)


def resnet101_generator(options: NetworkOptions) -> ResNet101Generator:
    """The generator of the command line's options."""
    return ResNet101Generator(
        channels=options.sample_shape[2],
        width=options.generator_width,
        norm=options.generator_norm,
        scan=options.scan_blocks,
        remat=options.remat,
        dtype=options.dtype,
    )


def resnet101_critic(options: NetworkOptions) -> ResNet101Critic:
    """The critic of the command line's options."""
    return ResNet101Critic(
        width=options.discriminator_width,
        norm=options.discriminator_norm,
        scan=options.scan_blocks,
        remat=options.remat,
        dtype=options.dtype,
    )


def check_resnet101(options: NetworkOptions) -> None:
    """Raises: `ConfigError` for other images than 64x64, for labels, and for widths that do not halve."""
    if options.sample_shape[:2] != (64, 64):
        raise ConfigError(f"resnet101 is for images of 64 pixels (--image-size 64), not {options.sample_shape}")
    if options.num_classes:
        raise ConfigError("--network resnet101 has no class-conditional layers: train it without labels")
    for width in (options.generator_width, options.discriminator_width):
        if width % 4:
            raise ConfigError(f"--network resnet101 halves its width twice: it must be a multiple of 4, not {width}")
