"""The convolutional UNets of DDPM and its successors, one network with a `Style`, with a choice of skip scalings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stabletrain.diffusion.skips import SkipMerge, multiplier_of, skip_scales, watch
from stabletrain.methods.scalelong import SQRT_HALF, LearnedScale
from stabletrain.nn.attention import attend
from stabletrain.nn.convolution import Convolution
from stabletrain.nn.embeddings import sinusoidal
from stabletrain.nn.initializers import fan_average, torch_uniform
from stabletrain.nn.resampling import doubled, halved


@dataclass(frozen=True)
class Style:
    """What tells the published UNets apart besides their sizes."""

    epsilon: float = 1e-6
    """Of every GroupNorm; 1e-5 is PyTorch's default."""
    scale_shift: bool = False
    """The time scales and shifts the second norm's output, h (1 + scale) + shift, instead of being added before it."""
    residual_resampling: bool = False
    """Resolutions change within a residual block, in both branches, instead of by a convolution of their own."""
    project_resampled: bool = False
    """Such a block has a 1x1 shortcut though its width stays."""
    resample_filter: tuple[int, ...] = (1, 1)
    """Taps of such a block's separable filter: (1, 1) averages and repeats, (1, 3, 3, 1) is NCSN++'s."""
    pad_both_sides: bool = False
    """A strided convolution pads a pixel at every side, as PyTorch does, instead of "SAME", at the far sides only."""
    residual_scale: float = 1.0
    """Of each sum of a residual or attention block. It has nothing to do with the long skip connections."""
    attend_last_only: bool = False
    """In the decoder, attention after the last block of a resolution instead of after each."""
    attention_scale: float = 1.0
    """Variance of the first q, k and v matrices, beside that of the others."""
    torch_init: bool = False
    """PyTorch's default initialisation and exact zeros, instead of fan-average uniform and almost zeros."""
    time_order: str = "sin-cos"
    """Of the sinusoidal embedding, see `sinusoidal`."""
    label_before_mlp: bool = False
    """A label is a Linear layer's image of its one-hot vector, added to the sinusoids; no label is the zero vector."""

    def kernel(self, scale: float = 1.0) -> Any:
        """Initialiser of a kernel; `scale` 0 is that of the layers that start at zero."""
        if not self.torch_init:
            return fan_average(scale)
        return nn.initializers.variance_scaling(scale / 3, "fan_in", "uniform") if scale else nn.initializers.zeros

    def bias(self, fan_in: int, scale: float = 1.0) -> Any:
        """Initialiser of a bias."""
        return torch_uniform(fan_in) if self.torch_init and scale else nn.initializers.zeros

    def variance(self, fan_in: int, fan_out: int) -> float:
        """Of an entry of a new kernel."""
        return 1.0 / (3.0 * fan_in) if self.torch_init else 2.0 / (fan_in + fan_out)


DDPM = Style()
IDDPM = Style(epsilon=1e-5, scale_shift=True, pad_both_sides=True, torch_init=True, time_order="cos-sin")
ADM = Style(epsilon=1e-5, scale_shift=True, residual_resampling=True, torch_init=True, time_order="cos-sin")
DDPMPP = Style(
    residual_resampling=True,
    project_resampled=True,
    residual_scale=SQRT_HALF,
    attend_last_only=True,
    attention_scale=0.2,
    label_before_mlp=True,
)
STYLES: Mapping[str, Style] = {"ddpm": DDPM, "iddpm": IDDPM, "adm": ADM, "ddpm++": DDPMPP}
"""By the name of the option `--block-style`. Sources: Ho et al. 2020; Nichol and Dhariwal 2021; Dhariwal and Nichol
2021; Karras et al. 2022 (its DDPM++ after Song et al. 2021). From the released codes come the epsilons, paddings,
initialisations and the order of sines and cosines, which the papers do not state."""


def group_count(channels: int) -> int:
    """32 groups, or the most that leave at least four channels each."""
    return max(g for g in range(1, min(32, max(1, channels // 4)) + 1) if channels % g == 0)


def group_norm(channels: int, epsilon: float, dtype: Any, name: str) -> nn.GroupNorm:
    """GroupNorm of `group_count` groups, with statistics in float32."""
    return nn.GroupNorm(group_count(channels), epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def convolved(
    x: jax.Array, features: int, name: str, style: Style, dtype: Any, *, scale: float = 1.0, **options: Any
) -> jax.Array:
    """A `Convolution` (its `options`: size, stride, padding) as a style initialises it, applied to x."""
    fan_in = options.get("size", 3) ** 2 * x.shape[-1]
    return Convolution(
        features,
        kernel_init=style.kernel(scale),
        bias_init=style.bias(fan_in, scale),
        dtype=dtype,
        name=name,
        **options,
    )(x)


def projected(x: jax.Array, features: int, name: str, style: Style, dtype: Any, *, scale: float = 1.0) -> jax.Array:
    """A Dense layer as a style initialises it, applied to x."""
    kernel, bias = style.kernel(scale), style.bias(x.shape[-1], scale)
    return nn.Dense(features, kernel_init=kernel, bias_init=bias, dtype=dtype, name=name)(x)


class ResBlock(nn.Module):
    """GroupNorm-SiLU-[resampling]-conv, plus the time, GroupNorm-SiLU-dropout-conv(zero); 1x1 shortcut where the width
    changes. With `style.scale_shift` the time enters behind the second norm."""

    features: int
    dropout: float
    style: Style
    dtype: Any
    resample: str = ""
    """"down" halves the resolution, "up" doubles it."""

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, train: bool) -> jax.Array:
        style, dtype = self.style, self.dtype
        h = nn.silu(group_norm(x.shape[-1], style.epsilon, dtype, "norm1")(x))
        if self.resample:
            change = {"down": halved, "up": doubled}[self.resample]
            h, x = change(h, style.resample_filter), change(x, style.resample_filter)
        h = convolved(h, self.features, "conv1", style, dtype)
        told = projected(nn.silu(time), self.features * (1 + style.scale_shift), "time", style, dtype)[:, None, None]
        norm = group_norm(self.features, style.epsilon, dtype, "norm2")
        if style.scale_shift:
            scale, shift = jnp.split(told, 2, axis=-1)
            h = nn.silu(norm(h) * (1.0 + scale) + shift)
        else:
            h = nn.silu(norm(h + told))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = convolved(h, self.features, "conv2", style, dtype, scale=0)
        if x.shape[-1] != self.features or (self.resample and style.project_resampled):
            x = convolved(x, self.features, "shortcut", style, dtype, size=1)
        return residual(x, h, style)


def residual(x: jax.Array, h: jax.Array, style: Style) -> jax.Array:
    """The sum of both branches, scaled as the style has it."""
    return x + h if style.residual_scale == 1.0 else (x + h) * jnp.asarray(style.residual_scale, x.dtype)


class AttentionBlock(nn.Module):
    """x + project(attention(GroupNorm(x))) over the pixels; one 1x1 matrix each for q, k, v."""

    heads: int
    style: Style
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        style, dtype = self.style, self.dtype
        h = group_norm(channels, style.epsilon, dtype, "norm")(x).reshape(batch, height * width, channels)
        split = (batch, height * width, self.heads, channels // self.heads)
        q, k, v = (
            projected(h, channels, name, style, dtype, scale=style.attention_scale).reshape(split) for name in "qkv"
        )
        h = attend(q, k, v).reshape(batch, height * width, channels)
        return residual(x, projected(h, channels, "proj", style, dtype, scale=0).reshape(x.shape), style)


class UNet(nn.Module):
    """Predicts the noise in `images` at `times`; with `learned_variance` its variance too, in as many channels more.

    Each of the levels has `blocks` residual blocks of `channels * multiplier`, with attention where the resolution is
    in `attention_resolutions`, and halves the resolution after it but for the last. Each decoder level has one block
    more. All this is common to the four networks of `STYLES`. There is one long skip connection from the stem, from
    every encoder block and from every downsampling: 1 + levels * blocks + levels - 1.

    Shapes and the collection "features" as in `UViT`. The image must be divisible by 2^(levels - 1).
    Source: Ho et al. 2020, Appendix B, and those of `STYLES`; Huang et al. 2023 for the scalings.
    Raises: `ValueError` for images that the levels do not divide, or missing labels.
    Differs: kappa counted per skip reaches kappa^11 on twelve skips; `kappa_indexing="level"` counts resolutions
    instead. Which of the two the paper used is not known. A class label is added to the embedded time, as in later
    conditional UNets; that of Ho et al. has none. EDM's CIFAR-10 network is also told how an image was augmented, by
    a 9 x 128 matrix which is not here.
    """

    image_channels: int = 3
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    heads: int = 1
    head_channels: int = 0
    """Where it is not 0, there are as many heads of so many channels as the width has, and `heads` is not used."""
    dropout: float = 0.0
    num_classes: int = 0
    null_label: bool = True
    skip_scaling: str = "none"
    kappa: float = 0.7
    kappa_indexing: str = "skip"
    """What the exponent of `cs` counts: "skip", from the outermost, or "level"."""
    style: Style = DDPM
    learned_variance: bool = False
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
        x = convolved(images.astype(dtype), self.channels, "stem", self.style, self.dtype)
        skips = [x]
        for level, multiplier in enumerate(self.multipliers):
            for block in range(self.blocks):
                x = self._block(x, time, self.channels * multiplier, f"down_{level}_{block}", train)
                skips.append(x)
            if level + 1 < len(self.multipliers):
                x = self._downsampled(x, time, level, train)
                skips.append(x)
        x = ResBlock(x.shape[-1], self.dropout, self.style, self.dtype, name="mid_block_0")(x, time, train)
        x = AttentionBlock(self.heads_of(x.shape[-1]), self.style, self.dtype, name="mid_attention")(x)
        x = ResBlock(x.shape[-1], self.dropout, self.style, self.dtype, name="mid_block_1")(x, time, train)
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
                attends = block == self.blocks or not self.style.attend_last_only
                x = jnp.concatenate([h, s], axis=-1)
                x = self._block(x, time, width, f"up_{level}_{block}", train, attends)
                watch(self, f"skip_{i}", x)
            if level:
                x = self._upsampled(x, time, level, train)
        x = nn.silu(group_norm(x.shape[-1], self.style.epsilon, self.dtype, "norm")(x))
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        outputs = self.image_channels * (1 + self.learned_variance)
        return convolved(x, outputs, "final", self.style, None, scale=0)

    def heads_of(self, width: int) -> int:
        """Attention heads at so many channels."""
        return width // self.head_channels if self.head_channels else self.heads

    def _time(self, times: jax.Array, labels: jax.Array | None) -> jax.Array:
        style, width = self.style, 4 * self.channels
        embedded = sinusoidal(times, self.channels, order=style.time_order)
        if self.num_classes and labels is None:
            raise ValueError("this network is class-conditional: labels are needed")
        if self.num_classes and style.label_before_mlp:
            one_hot = jax.nn.one_hot(labels, self.num_classes, dtype=embedded.dtype)  # zeros for the null label
            embedded = embedded + projected(
                one_hot * self.num_classes**0.5, self.channels, "label_projection", style, None
            )
        time = projected(embedded, width, "time_0", style, self.dtype)
        time = projected(nn.silu(time), width, "time_1", style, self.dtype)
        if self.num_classes and not style.label_before_mlp:
            time = time + nn.Embed(
                self.num_classes + self.null_label,
                width,
                embedding_init=nn.initializers.normal(1.0),
                name="label_embedding",
            )(labels).astype(time.dtype)
        return time

    def _block(
        self, x: jax.Array, time: jax.Array, features: int, name: str, train: bool, attends: bool = True
    ) -> jax.Array:
        x = ResBlock(features, self.dropout, self.style, self.dtype, name=name)(x, time, train)
        if attends and x.shape[1] in self.attention_resolutions:
            x = AttentionBlock(self.heads_of(features), self.style, self.dtype, name=f"{name}_attention")(x)
        return x

    def _downsampled(self, x: jax.Array, time: jax.Array, level: int, train: bool) -> jax.Array:
        name, width = f"downsample_{level}", x.shape[-1]
        if self.style.residual_resampling:
            return ResBlock(width, self.dropout, self.style, self.dtype, "down", name=name)(x, time, train)
        padding = ((1, 1), (1, 1)) if self.style.pad_both_sides else "SAME"
        return convolved(x, width, name, self.style, self.dtype, stride=2, padding=padding)

    def _upsampled(self, x: jax.Array, time: jax.Array, level: int, train: bool) -> jax.Array:
        name, width = f"upsample_{level}", x.shape[-1]
        if self.style.residual_resampling:
            return ResBlock(width, self.dropout, self.style, self.dtype, "up", name=name)(x, time, train)
        return convolved(doubled(x), width, name, self.style, self.dtype)
