"""The convolutional UNet of DDPM (Ho et al., NeurIPS 2020), with a choice of skip scalings."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stabletrain.diffusion.skips import SkipMerge, multiplier_of, skip_scales, watch
from stabletrain.methods.scalelong import LearnedScale
from stabletrain.nn.attention import attend
from stabletrain.nn.convolution import Convolution
from stabletrain.nn.embeddings import sinusoidal
from stabletrain.nn.initializers import fan_average


def group_count(channels: int) -> int:
    """32 groups, or the most that leave at least four channels each."""
    return max(g for g in range(1, min(32, max(1, channels // 4)) + 1) if channels % g == 0)


def group_norm(channels: int, epsilon: float, dtype: Any, name: str) -> nn.GroupNorm:
    """GroupNorm of `group_count` groups, with statistics in float32."""
    return nn.GroupNorm(group_count(channels), epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv, plus the time, GroupNorm-SiLU-dropout-conv(zero); 1x1 shortcut where the width changes."""

    features: int
    dropout: float
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, train: bool) -> jax.Array:
        h = nn.silu(group_norm(x.shape[-1], self.epsilon, self.dtype, "norm1")(x))
        h = Convolution(self.features, kernel_init=fan_average(), dtype=self.dtype, name="conv1")(h)
        shift = nn.Dense(self.features, kernel_init=fan_average(), dtype=self.dtype, name="time")(nn.silu(time))
        h = h + shift[:, None, None]
        h = nn.silu(group_norm(self.features, self.epsilon, self.dtype, "norm2")(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = Convolution(self.features, kernel_init=fan_average(0), dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Convolution(self.features, 1, kernel_init=fan_average(), dtype=self.dtype, name="shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """x + project(attention(GroupNorm(x))) over the pixels; one 1x1 matrix each for q, k, v."""

    heads: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        h = group_norm(channels, self.epsilon, self.dtype, "norm")(x).reshape(batch, height * width, channels)

        def project(name: str, scale: float = 1.0) -> nn.Dense:
            return nn.Dense(channels, kernel_init=fan_average(scale), dtype=self.dtype, name=name)

        split = (batch, height * width, self.heads, channels // self.heads)
        q, k, v = (project(name)(h).reshape(split) for name in ("q", "k", "v"))
        h = attend(q, k, v).reshape(batch, height * width, channels)
        return x + project("proj", 0)(h).reshape(x.shape)


class UNet(nn.Module):
    """Predicts the noise in `images` at `times`.

    Each of the levels has `blocks` residual blocks of `channels * multiplier`, with attention where the resolution is
    in `attention_resolutions`, and halves the resolution after it but for the last. Each decoder level has one block
    more. There is one long skip connection from the stem, from every encoder block and from every downsampling:
    1 + levels * blocks + levels - 1.

    Shapes and the collection "features" as in `UViT`. The image must be divisible by 2^(levels - 1).
    Source: Ho et al. 2020, Appendix B; Huang et al. 2023 for the scalings.
    Raises: `ValueError` for images that the levels do not divide, or missing labels.
    Differs: kappa counted per skip reaches kappa^11 on twelve skips; `kappa_indexing="level"` counts resolutions
    instead. Which of the two the paper used is not known. A class label is added to the embedded time, as in later
    conditional UNets; that of Ho et al. has none.
    """

    image_channels: int = 3
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    heads: int = 1
    dropout: float = 0.0
    num_classes: int = 0
    null_label: bool = True
    skip_scaling: str = "none"
    kappa: float = 0.7
    kappa_indexing: str = "skip"
    """What the exponent of `cs` counts: "skip", from the outermost, or "level"."""
    epsilon: float = 1e-6
    """Of every GroupNorm; 1e-5 in the ports that use PyTorch's default."""
    dtype: Any = None

    @property
    def skip_levels(self) -> tuple[int, ...]:
        """The level (resolution) of each skip, index 0 the outermost."""
        levels = [0]
        for level in range(len(self.multipliers)):
            levels += [level] * self.blocks
            if level + 1 < len(self.multipliers):
                levels.append(level + 1)
        return tuple(levels)

    @property
    def num_skips(self) -> int:
        """Long skip connections."""
        return len(self.skip_levels)

    @property
    def merge_widths(self) -> tuple[tuple[int, int], ...]:
        """Channels of the decoder's and of the skip's feature where they are merged, index 0 the outermost skip."""
        widths = [self.channels * multiplier for multiplier in self.multipliers]
        skips, decoded = [self.channels], [widths[-1]]
        for level, width in enumerate(widths):
            skips += [width] * (self.blocks + (level + 1 < len(widths)))
        for width in reversed(widths):
            decoded += [width] * (self.blocks + 1)
        return tuple(zip(reversed(decoded[:-1]), skips, strict=True))

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        times: jax.Array,
        labels: jax.Array | None = None,
        *,
        skip_multipliers: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        divisor = 2 ** (len(self.multipliers) - 1)
        if images.shape[1] % divisor or images.shape[2] % divisor:
            raise ValueError(
                f"{len(self.multipliers)} levels halve an image {len(self.multipliers) - 1} times, which one of "
                f"{images.shape[1]}x{images.shape[2]} does not allow"
            )
        if self.kappa_indexing not in ("skip", "level"):
            raise ValueError(f"unknown kappa_indexing {self.kappa_indexing!r}: skip or level")
        time = self._time(times, labels)
        dtype = self.dtype or jnp.result_type(images)
        x = Convolution(self.channels, kernel_init=fan_average(), dtype=self.dtype, name="stem")(images.astype(dtype))
        skips = [x]
        for level, multiplier in enumerate(self.multipliers):
            for block in range(self.blocks):
                x = self._block(x, time, self.channels * multiplier, f"down_{level}_{block}", train)
                skips.append(x)
            if level + 1 < len(self.multipliers):
                x = Convolution(
                    x.shape[-1], stride=2, kernel_init=fan_average(), dtype=self.dtype, name=f"downsample_{level}"
                )(x)
                skips.append(x)
        x = ResBlock(x.shape[-1], self.dropout, self.epsilon, self.dtype, name="mid_block_0")(x, time, train)
        x = AttentionBlock(self.heads, self.epsilon, self.dtype, name="mid_attention")(x)
        x = ResBlock(x.shape[-1], self.dropout, self.epsilon, self.dtype, name="mid_block_1")(x, time, train)
        watch(self, "middle", x)

        exponents = self.skip_levels if self.kappa_indexing == "level" else range(self.num_skips)
        scales = skip_scales(self.skip_scaling, exponents, self.kappa)
        shared: dict[int, LearnedScale] = {}  # "shared" can only mean: among skips of equal width
        for level in reversed(range(len(self.multipliers))):
            width = self.channels * self.multipliers[level]
            for block in range(self.blocks + 1):
                skip = skips.pop()
                i = len(skips)
                if self.skip_scaling == "ls" and skip.shape[-1] not in shared:
                    shared[skip.shape[-1]] = LearnedScale("channel", name=f"gate_{skip.shape[-1]}")
                merge = SkipMerge(self.skip_scaling, scales[i], name=f"merge_{i}")
                h, s = merge(x, skip, multiplier_of(skip_multipliers, i, self.num_skips), shared.get(skip.shape[-1]))
                x = self._block(jnp.concatenate([h, s], axis=-1), time, width, f"up_{level}_{block}", train)
                watch(self, f"skip_{i}", x)
            if level:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = Convolution(width, kernel_init=fan_average(), dtype=self.dtype, name=f"upsample_{level}")(x)
        x = nn.silu(group_norm(x.shape[-1], self.epsilon, self.dtype, "norm")(x))
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return Convolution(self.image_channels, kernel_init=fan_average(0), name="final")(x)

    def _time(self, times: jax.Array, labels: jax.Array | None) -> jax.Array:
        embedded = sinusoidal(times, self.channels, order="sin-cos")
        width = 4 * self.channels
        time = nn.Dense(width, kernel_init=fan_average(), dtype=self.dtype, name="time_0")(embedded)
        time = nn.Dense(width, kernel_init=fan_average(), dtype=self.dtype, name="time_1")(nn.silu(time))
        if self.num_classes:
            if labels is None:
                raise ValueError("this network is class-conditional: labels are needed")
            time = time + nn.Embed(
                self.num_classes + self.null_label,
                width,
                embedding_init=nn.initializers.normal(1.0),
                name="label_embedding",
            )(labels).astype(time.dtype)
        return time

    def _block(self, x: jax.Array, time: jax.Array, features: int, name: str, train: bool) -> jax.Array:
        x = ResBlock(features, self.dropout, self.epsilon, self.dtype, name=name)(x, time, train)
        if x.shape[1] in self.attention_resolutions:
            x = AttentionBlock(self.heads, self.epsilon, self.dtype, name=f"{name}_attention")(x)
        return x
