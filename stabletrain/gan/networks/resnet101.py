"""Generator and critic of 101 layers: residual networks of 33 bottleneck blocks each, for images of 64x64.

A block is ReLU, 1x1, ReLU, 3x3, ReLU, 1x1, then the normalisation, times 0.3, beside the shortcut. Five or six equal
blocks stand at each resolution. They can be one compiled loop (`scan`: far less to compile; on a CPU convolutions in
a loop are slower, so that it is off there) and compute their activations again in the backward pass (`remat`).
Source: Gulrajani et al. 2017, Section 5.2 and Appendix E, by the released gan_64x64.py.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

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

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        channels = images.shape[-1]
        branch = Conv(channels // 2, 1, name="reduce")(nn.relu(images))
        branch = nn.relu(branch)
        if self.resample == "up":
            branch = Deconv(self.features // 2, 3, name="middle")(branch)
        else:
            branch = Conv(self.features // 2, 3, 2 if self.resample == "down" else 1, name="middle")(branch)
        branch = Conv(self.features, 1, bias=False, name="expand")(nn.relu(branch))
        branch = Norm(self.norm, name="norm")(branch, train=self.train)
        return self._shortcut(images, channels) + BRANCH_SCALE * branch

    def _shortcut(self, images: jax.Array, channels: int) -> jax.Array:
        if self.resample == "up":
            return depth_to_space(Conv(4 * self.features, 1, start="glorot", name="shortcut")(images))
        if self.resample == "down":
            return Conv(self.features, 1, 2, start="glorot", name="shortcut")(images)
        if channels != self.features:
            raise ValueError(f"a block that keeps the size keeps its {channels} channels, not {self.features}")
        return images


def equal_blocks(
    images: jax.Array, count: int, *, norm: str, train: bool, scan: bool, remat: bool, name: str
) -> jax.Array:
    """`count` blocks of the same shape, one after the other; to be called within a compact method."""
    block: Any = nn.remat(Bottleneck, prevent_cse=not scan) if remat else Bottleneck
    features = images.shape[-1]
    if not scan:
        for number in range(count):
            images = block(features, norm, "none", train, name=f"{name}_{number}")(images)
        return images
    loop: Any = nn.scan(
        lambda module, carry, _: (module(carry), None),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=count,
    )
    images, _ = loop(block(features, norm, "none", train, name=name), images, None)
    return images


class ResNet101Generator(nn.Module):
    """Latent [B, Z] -> images [B, 64, 64, channels] in [-1, 1]; 1 + 33 * 3 + 1 = 101 layers, without the shortcuts."""

    channels: int = 3
    width: int = 64
    norm: str = "batch"
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, latent: jax.Array, *, train: bool) -> jax.Array:
        widths = (8, 4, 2, 1, 0.5)
        images = Linear(4 * 4 * 8 * self.width, name="start")(latent).reshape(-1, 4, 4, 8 * self.width)
        for stage, factor in enumerate(widths):
            features = int(factor * self.width)
            if stage:
                images = Bottleneck(features, self.norm, "up", train, name=f"up_{stage}")(images)
            count = EQUAL_BLOCKS if stage < len(widths) - 1 else BLOCKS_AT_FULL_SIZE
            options: Any = {"norm": self.norm, "train": train, "scan": self.scan, "remat": self.remat}
            images = equal_blocks(images, count, **options, name=f"stage_{stage}")
        images = Conv(self.channels, 1, start="glorot", name="image")(images)
        return nn.tanh(OUTPUT_SCALE * images)


class ResNet101Critic(nn.Module):
    """Images [B, 64, 64, channels] -> scores [B]; 101 layers as the generator.

    With the penalty the normalisation must be "layer" or "none".
    """

    width: int = 64
    norm: str = "layer"
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        widths = (0.5, 1, 2, 4, 8)
        images = Conv(self.width // 2, 1, start="glorot", name="image")(images)
        for stage, factor in enumerate(widths):
            features = int(factor * self.width)
            if stage:
                images = Bottleneck(features, self.norm, "down", train, name=f"down_{stage}")(images)
            count = EQUAL_BLOCKS if stage else BLOCKS_AT_FULL_SIZE
            options: Any = {"norm": self.norm, "train": train, "scan": self.scan, "remat": self.remat}
            images = equal_blocks(images, count, **options, name=f"stage_{stage}")
        return OUTPUT_SCALE * Linear(1, name="score")(images.reshape(len(images), -1))[:, 0]
