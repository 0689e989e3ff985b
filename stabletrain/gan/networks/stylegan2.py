"""StyleGAN2: styles that scale the inputs of convolutions, a sum of images of all sizes, a residual discriminator.

Latent and label become a style w by a mapping network; each convolution of the generator sees its input scaled by an
affine function of w, and scales its outputs to the deviation that they would have for independent unit inputs. The
generator starts from learned numbers at 4x4; at each size an image is added to the one doubled from below.
Written from the paper. Source: Karras et al. 2020b (StyleGAN2): modulation and demodulation Section 2.2, networks
Section 4.1, configuration F; Karras et al. 2019 (StyleGAN): mapping, noise, mixing; Karras et al. 2020a (ADA): labels.
"""

from __future__ import annotations

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from stabletrain.errors import ConfigError
from stabletrain.gan.channel_plan import BOTTOM, SIZES, check_size
from stabletrain.gan.networks import NetworkOptions
from stabletrain.gan.networks.blocks import check_images
from stabletrain.nn.equalized import EqualizedConvolution, EqualizedDense, activate, unit_second_moment
from stabletrain.nn.low_pass import blur, upsample
from stabletrain.random_keys import random_key

Array = jax.Array
MAPPING_RATE = 0.01
"""Learning rate of the mapping network over that of all else."""
WIDEST_SIZE = 64
"""Pixels up to which all layers have the full width; beyond it doubling the size halves the width."""
GROUP, GROUP_CIFAR = 4, 32
"""Samples at most that a minibatch deviation is of, and up to 32 pixels. Source: StyleGAN2; ADA on CIFAR-10."""


def channels(size: int, width: int) -> int:
    """Channels at `size` pixels: min(64 width / size, width); the paper's 32768 / size, at most 512, for 512."""
    return min(WIDEST_SIZE * width // size, width)


def sizes(size: int) -> tuple[int, ...]:
    """4, 8, ..., `size`. Raises: `ConfigError` for a size without a plan."""
    check_size(size)
    return (BOTTOM, *(known for known in SIZES if known <= size))


def check_stylegan2(options: NetworkOptions) -> None:
    """Raises: `ConfigError` for samples that are no square images of a known size, or a width that cannot be halved."""
    check_images(options)
    parts = max(options.sample_shape[0] // WIDEST_SIZE, 1)
    for name in ("generator_width", "discriminator_width"):
        width = getattr(options, name)
        if width % parts:
            raise ConfigError(
                f"--{name.replace('_', '-')} {width}: at {options.sample_shape[0]} pixels StyleGAN2's width is divided "
                f"by {parts}; use {max(parts, round(width / parts) * parts)}"
            )


# --- modulated convolution --------------------------------------------------------------------------------------------


def modulated_convolution(
    images: Array, kernel: Array, styles: Array, *, demodulate: bool = True, up: bool = False
) -> Array:
    """Convolution with a kernel of its own for each sample: w'_ijk = s_i w_ijk / sqrt(sum over i, k of (s_i w_ijk)^2).

    Shapes: images [B, H, W, I], kernel [k, k, I, O] with k odd, styles [B, I] -> [B, H, W, O], or [B, 2H, 2W, O] with
    `up`: by a transposed convolution and the filter [1, 3, 3, 1]. Without `demodulate` the kernel is s_i w_ijk. One
    convolution serves the batch: scaling inputs by s and outputs by the root is the same. The styles' type, float32 in
    training, is that of the root. Source: Karras et al. 2020b, Eq. 1 to 3 and Appendix B.
    """
    dtype = images.dtype
    size = kernel.shape[0]
    scaled = images * styles[:, None, None, :].astype(dtype)
    if up:
        edge = size - 1
        out = lax.conv_general_dilated(
            scaled, kernel.astype(dtype), (1, 1), ((edge, edge), (edge, edge)), lhs_dilation=(2, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        out = blur(out, (5 - size) // 2, gain=4.0)
    elif size == 1:
        out = scaled @ kernel[0, 0].astype(dtype)
    else:
        out = lax.conv_general_dilated(
            scaled, kernel.astype(dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    if not demodulate:
        return out
    squares = jnp.sum(kernel.astype(styles.dtype) ** 2, axis=(0, 1))  # (I, O)
    root = lax.rsqrt(styles**2 @ squares + 1e-8)  # (B, O)
    return out * root[:, None, None, :].astype(dtype)


class StyledConvolution(nn.Module):
    """Style, modulated convolution, noise, bias, leaky ReLU: [B, H, W, I] -> [B, H or 2H, W or 2W, features].

    Noise is one number a pixel for all channels, times a learned strength that starts at 0.
    """

    features: int
    up: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, style: Array, *, constant_noise: bool) -> Array:
        kernel, scale = _modulation(self, images, style, self.features, 3)
        out = modulated_convolution(images, kernel, scale, up=self.up)
        strength = self.param("noise_strength", nn.initializers.zeros_init(), ())
        if constant_noise:
            # Of no key: the same for every sample, call and run. Sizes differ, and so do the two layers of a size.
            noise = jax.random.normal(random_key(2 * out.shape[1] + self.up), (1, *out.shape[1:3], 1))
        else:
            noise = jax.random.normal(self.make_rng("noise"), (*out.shape[:3], 1))
        out = out + (strength * noise).astype(out.dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return activate(out + bias.astype(out.dtype))


class ToImage(nn.Module):
    """Style and 1x1 modulated convolution without demodulation: [B, H, W, I] -> [B, H, W, channels]."""

    features: int

    @nn.compact
    def __call__(self, images: Array, style: Array) -> Array:
        kernel, scale = _modulation(self, images, style, self.features, 1)
        out = modulated_convolution(images, kernel, scale, demodulate=False)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return out.astype(style.dtype) + bias


def _modulation(layer: nn.Module, images: Array, style: Array, features: int, size: int) -> tuple[Array, Array]:
    """The kernel [size, size, I, features], scaled by its fan-in, and the scales [B, I] of a style, around 1."""
    inputs = images.shape[-1]
    scale = EqualizedDense(inputs, bias_start=1.0, name="style", parent=layer)(style)
    kernel = layer.param("kernel", nn.initializers.normal(1.0), (size, size, inputs, features))
    return kernel / (size * size * inputs) ** 0.5, scale


# --- the generator ----------------------------------------------------------------------------------------------------


class StyleGAN2Generator(nn.Module):
    """Latents [B, z_dim] and labels [B] to images around [-1, 1], which nothing bounds.

    Styles have the latent's size; there are two at each image size: one for the first convolution of a size and the
    image made at the size below, one for the second convolution, and a last one for the last image.
    """

    options: NetworkOptions

    def setup(self) -> None:
        options = self.options
        self._sizes = sizes(options.sample_shape[0])
        if options.num_classes:
            self.label = EqualizedDense(options.z_dim)
        self.mapping = {
            str(number): EqualizedDense(options.z_dim, learning_rate=MAPPING_RATE)
            for number in range(1, options.depth + 1)
        }
        widths = {size: channels(size, options.generator_width) for size in self._sizes}
        self.constant = self.param("constant", nn.initializers.normal(1.0), (BOTTOM, BOTTOM, widths[BOTTOM]))
        # The names tell what a monitor's group is: the convolutions and the image at so many pixels.
        self.first = {
            str(size): StyledConvolution(widths[size], up=True, dtype=options.dtype) for size in self._sizes[1:]
        }
        self.second = {str(size): StyledConvolution(widths[size], dtype=options.dtype) for size in self._sizes}
        self.image = {str(size): ToImage(options.sample_shape[2]) for size in self._sizes}

    def __call__(self, z: Array, labels: Array | None, *, train: bool, constant_noise: bool = False) -> Array:
        """z [B, z_dim], labels [B] or None. See `synthesize` for `constant_noise`."""
        return self.synthesize(self.styles(z, labels, train=train), train=train, constant_noise=constant_noise)

    def map(self, z: Array, labels: Array | None) -> Array:
        """The mapping network: [B, z_dim] -> styles w [B, z_dim]."""
        hidden = unit_second_moment(z)
        if self.options.num_classes:
            embedded = self.label(jax.nn.one_hot(labels, self.options.num_classes, dtype=z.dtype))
            hidden = jnp.concatenate([hidden, unit_second_moment(embedded)], axis=-1)
        for layer in self.mapping.values():
            hidden = activate(layer(hidden))
        return hidden

    def styles(self, z: Array, labels: Array | None, *, train: bool) -> Array:
        """[B, L, z_dim]: a style for each of the L = 2 log2(size) - 2 places.

        In training a share `style_mixing` of the samples takes the styles from a random place on from another latent
        with the same label. Source: Karras et al. 2019, Section 3.1.
        """
        count = 2 * len(self._sizes)
        styles = jnp.repeat(self.map(z, labels)[:, None], count, axis=1)
        if not (train and self.options.style_mixing):
            return styles
        keys = jax.random.split(self.make_rng("noise"), 3)
        other = self.map(jax.random.normal(keys[0], z.shape, z.dtype), labels)
        mixed = jax.random.bernoulli(keys[1], self.options.style_mixing, (len(z),))
        start = jnp.where(mixed, jax.random.randint(keys[2], (len(z),), 1, count), count)
        return jnp.where((jnp.arange(count) < start[:, None])[..., None], styles, other[:, None])

    def synthesize(self, styles: Array, *, train: bool, constant_noise: bool = False) -> Array:
        """Images [B, H, W, C] of styles [B, L, z_dim].

        Noise comes from the stream `noise`; with `constant_noise` it is the same for every sample and call, and the
        stream is not read.
        """
        del train  # nothing here is another in training
        dtype = self.options.dtype or styles.dtype
        hidden = jnp.broadcast_to(self.constant.astype(dtype), (len(styles), *self.constant.shape))
        image = None
        for number, size in enumerate(map(str, self._sizes)):
            if number:
                hidden = self.first[size](hidden, styles[:, 2 * number - 1], constant_noise=constant_noise)
            hidden = self.second[size](hidden, styles[:, 2 * number], constant_noise=constant_noise)
            made = self.image[size](hidden, styles[:, 2 * number + 1])
            image = made if image is None else upsample(image) + made
        assert image is not None
        return image


# --- the discriminator ------------------------------------------------------------------------------------------------


def minibatch_deviation(images: Array, group: int) -> Array:
    """[B, H, W, C] -> [B, H, W, C + 1]: beside each sample, how much the samples of its group differ.

    Groups are neighbours in the batch, as many as the largest divisor of B up to `group`. The new channel is the
    deviation over the group as a mean over pixels and channels, in float32. On any number of devices the groups are
    those of the whole batch. Source: Karras et al. 2018, Section 3; groups as in StyleGAN2.
    """
    batch, height, width, count = images.shape
    size = max(number for number in range(1, min(group, batch) + 1) if batch % number == 0)
    groups = images.reshape(batch // size, size, height, width, count)
    groups = groups.astype(jnp.promote_types(images.dtype, jnp.float32))
    deviation = jnp.mean(jnp.sqrt(jnp.var(groups, axis=1) + 1e-8), axis=(1, 2, 3))  # (B / size,)
    channel = jnp.broadcast_to(jnp.repeat(deviation, size)[:, None, None, None], (batch, height, width, 1))
    return jnp.concatenate([images, channel.astype(images.dtype)], axis=-1)


class DiscriminatorBlock(nn.Module):
    """Two 3x3 convolutions, of which the second halves the image, and with `shortcuts` a 1x1 beside them.

    The sum with the shortcut is divided by sqrt(2), which keeps its variance.
    """

    features: int
    shortcuts: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array) -> Array:
        hidden = activate(EqualizedConvolution(images.shape[-1], dtype=self.dtype, name="same")(images))
        hidden = activate(EqualizedConvolution(self.features, down=True, dtype=self.dtype, name="half")(hidden))
        if not self.shortcuts:
            return hidden
        shortcut = EqualizedConvolution(
            self.features, 1, down=True, use_bias=False, dtype=self.dtype, name="shortcut"
        )(images)  # fmt: skip
        return (hidden + shortcut) * jnp.asarray(0.5**0.5, hidden.dtype)


class StyleGAN2Discriminator(nn.Module):
    """Images [B, H, W, C] to features [B, F]: blocks down to 4x4, minibatch deviation, 3x3 and a linear layer."""

    options: NetworkOptions

    @nn.compact
    def __call__(self, samples: Array, *, train: bool) -> Array:
        """samples [B, H, W, C]."""
        del train  # nothing here is another in training
        options = self.options
        descending = sizes(options.sample_shape[0])[::-1]
        widths = {size: channels(size, options.discriminator_width) for size in descending}
        first = EqualizedConvolution(widths[descending[0]], 1, dtype=options.dtype, name="from_image")
        hidden = activate(first(samples))
        for size, below in itertools.pairwise(descending):
            block = DiscriminatorBlock(
                widths[below], options.discriminator_shortcuts, options.dtype, name=f"block_{size}"
            )
            hidden = block(hidden)
        last = EqualizedConvolution(widths[BOTTOM], dtype=options.dtype, name="last")
        group = GROUP_CIFAR if options.sample_shape[0] <= 32 else GROUP
        hidden = activate(last(minibatch_deviation(hidden, group)))
        hidden = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32)).reshape(len(samples), -1)
        return activate(EqualizedDense(widths[BOTTOM], name="features")(hidden))
