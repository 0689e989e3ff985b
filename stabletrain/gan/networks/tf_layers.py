"""Layers as the released TensorFlow code of WGAN-GP has them: its starts, its padding, its normalisations.

Weights start uniform with a standard deviation, biases at zero. Images are [B, H, W, C], text is [B, L, C]. `dtype` is
the type of products; None computes in the type of inputs and weights.
Source: Gulrajani et al. 2017, released code (tflib).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from stabletrain.nn.convolution import convolve

EPSILON = 1e-5
TINY_MATRIX = 1 << 17
"""Entries up to which a convolution is a product with its whole matrix: 16 channels of 4x4 pixels have half of it."""


def uniform(deviation: float) -> Any:
    """Uniform numbers of this standard deviation."""
    limit = deviation * np.sqrt(3)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


def fan_deviation(fan_in: float, fan_out: float, start: str | float) -> float:
    """The standard deviation of a start: "he" (variance 4 / (in + out)), "glorot" (half of it), or the number itself.

    Raises: `ValueError` for another name.
    """
    if isinstance(start, str):
        if start not in ("he", "glorot"):
            raise ValueError(f"unknown start {start!r}; valid: he, glorot, or a standard deviation")
        return float(np.sqrt((4 if start == "he" else 2) / (fan_in + fan_out)))
    return start


def convolve_same(images: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """[B, H, W, C] with [h, w, C, D] and TensorFlow's SAME padding -> [B, H', W', D].

    On a CPU two kinds of layers take another form of the same sum. Tiny ones are one product with the layer's whole
    matrix: a fourth of the time. A 5x5 convolution to fewer than 5x5 places works on blocks of 2x2 pixels, stride 1:
    XLA has no fast program for its gradient by the images, which takes fifteen times as long.
    """
    size, places = kernel.shape[0], -(-images.shape[1] // stride)
    square = images.shape[1] == images.shape[2] and kernel.shape[1] == size and images.shape[1] % stride == 0
    if square and jax.default_backend() == "cpu":
        if int(np.prod(images.shape[1:])) * places**2 * kernel.shape[-1] <= TINY_MATRIX:
            return _as_product(images, kernel, stride)
        if size == 5 and stride == 2 and places < size:
            return _on_blocks(images, kernel)
    return convolve(images, kernel, stride=stride)


def _as_product(images: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    batch, side, _, channels = images.shape
    size, features, places = kernel.shape[0], kernel.shape[-1], side // stride
    before = max((places - 1) * stride + size - side, 0) // 2
    tap, pixel, place = np.ogrid[:size, :side, :places]
    met = (pixel == place * stride + tap - before).astype(np.float32)  # which tap joins which pixel and place
    joined = np.einsum("apq,brt->abprqt", met, met).reshape(size * size, -1)
    matrix = jnp.asarray(joined.T, kernel.dtype) @ kernel.reshape(size * size, -1)
    matrix = matrix.reshape(side * side, places * places, channels, features).transpose(0, 2, 1, 3)
    products = images.reshape(batch, -1) @ matrix.reshape(side * side * channels, -1)
    return products.reshape(batch, places, places, features)


def _on_blocks(images: jax.Array, kernel: jax.Array) -> jax.Array:
    batch, side, _, channels = images.shape
    half = side // 2
    blocks = images.reshape(batch, half, 2, half, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    # SAME pads 1 before: with a zero tap in front, six taps are three blocks
    taps = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(3, 2, 3, 2, channels, -1)
    taps = taps.transpose(0, 2, 1, 3, 4, 5).reshape(3, 3, 4 * channels, -1)
    return convolve(blocks.reshape(batch, half, half, 4 * channels), taps)


class Linear(nn.Module):
    """[B, in] -> [B, features]; the start "he" is of variance 2 / in here, without the outputs."""

    features: int
    start: str | float = "glorot"
    dtype: Any = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        fan_in = inputs.shape[-1]
        fan_out = fan_in if self.start == "he" else self.features
        init = uniform(fan_deviation(fan_in, fan_out, self.start))
        return nn.Dense(self.features, kernel_init=init, dtype=self.dtype, name="linear")(inputs)


class Conv(nn.Module):
    """A convolution with TensorFlow's SAME padding: 5x5 with stride 2 on an even size pads 1 before and 2 behind."""

    features: int
    size: int = 3
    stride: int = 1
    start: str | float = "he"
    bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        channels, area = images.shape[-1], self.size**2
        deviation = fan_deviation(channels * area, self.features * area / self.stride**2, self.start)
        shape = (self.size, self.size, channels, self.features)
        images, kernel = promote_dtype(images, self.param("kernel", uniform(deviation), shape), dtype=self.dtype)
        if self.size == 1:
            images = images[:, :: self.stride, :: self.stride] @ kernel[0, 0]
        else:
            images = convolve_same(images, kernel, self.stride)
        return _biased(self, images) if self.bias else images


class Deconv(nn.Module):
    """A transposed convolution with stride 2, [B, H, W, C] -> [B, 2H, 2W, D]: the gradient of `Conv` by its input.

    For 5x5 it is PyTorch's ConvTranspose2d without padding, cropped to [1 : 1 + 2H], and neither its padding of 2 nor
    of 2 with an output padding of 1. The kernel is [h, w, D, C], as TensorFlow has it.
    """

    features: int
    size: int = 5
    start: str | float = "he"
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        channels, area = images.shape[-1], self.size**2
        deviation = fan_deviation(channels * area / 4, self.features * area, self.start)
        kernel = self.param("kernel", uniform(deviation), (self.size, self.size, self.features, channels))
        images, kernel = promote_dtype(images, kernel, dtype=self.dtype)
        batch, height, width, _ = images.shape
        doubled = jax.ShapeDtypeStruct((batch, 2 * height, 2 * width, self.features), images.dtype)
        (images,) = jax.linear_transpose(lambda larger: convolve_same(larger, kernel, 2), doubled)(images)
        return _biased(self, images)


class Conv1D(nn.Module):
    """A convolution along the length of [B, L, C], stride 1, an odd size, padded with zeros to keep the length.

    One product of the windows with the kernel [size, C, D], which on a CPU is several times faster than XLA's
    convolution in one dimension. Raises: `ValueError` for an even size.
    """

    features: int
    size: int
    start: str | float = "he"
    dtype: Any = None

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        if self.size % 2 == 0:
            raise ValueError(f"a window of even size {self.size} has no middle")
        channels, length = text.shape[-1], text.shape[1]
        deviation = fan_deviation(channels * self.size, self.features * self.size, self.start)
        kernel = self.param("kernel", uniform(deviation), (self.size, channels, self.features))
        text, kernel = promote_dtype(text, kernel, dtype=self.dtype)
        reach = self.size // 2
        padded = jnp.pad(text, ((0, 0), (reach, reach), (0, 0)))
        windows = jnp.concatenate([padded[:, place : place + length] for place in range(self.size)], axis=-1)
        return _biased(self, windows @ kernel.reshape(-1, self.features))


def _biased(layer: Any, outputs: jax.Array) -> jax.Array:
    bias = layer.param("bias", nn.initializers.zeros, (layer.features,))
    return outputs + bias.astype(outputs.dtype)


NORMS = ("batch", "layer", "none")


class Norm(nn.Module):
    """A normalisation by name: "batch", "layer" (see `LayerNorm`) or "none".

    `train`: "batch" takes the statistics of the batch and moves its running ones (collection `batch_stats`); otherwise
    it takes the running ones. Raises: `ValueError` for another name.
    """

    kind: str

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
        if self.kind not in NORMS:
            raise ValueError(f"unknown normalisation {self.kind!r}; valid: {', '.join(NORMS)}")
        if self.kind == "batch":
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=EPSILON, name="batch")(inputs)
        return LayerNorm(name="layer")(inputs) if self.kind == "layer" else inputs


class LayerNorm(nn.Module):
    """Mean and variance over all of a sample, a scale and an offset per channel. Not PyTorch's of the same name.

    Written out, and with the variance of the centred values: flax.linen.GroupNorm(num_groups=1) gives the same, but in
    it the compiler does not see that a pass of the gradient penalty is one that is already made.
    """

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (inputs.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (inputs.shape[-1],))
        wide = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
        axes = tuple(range(1, inputs.ndim))
        centred = wide - jnp.mean(wide, axes, keepdims=True)
        variance = jnp.mean(centred * centred, axes, keepdims=True)
        return centred * jax.lax.rsqrt(variance + EPSILON) * scale + bias


def depth_to_space(images: jax.Array) -> jax.Array:
    """[B, H, W, 4C] -> [B, 2H, 2W, C]; the channels are read as (dy, dx, c), as TensorFlow does for this layout."""
    batch, height, width, channels = images.shape
    images = images.reshape(batch, height, width, 2, 2, channels // 4)
    return images.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, channels // 4)
