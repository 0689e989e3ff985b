"""Doubling, halving and blurring of images with the low-pass filter [1, 3, 3, 1], as StyleGAN2 does it.

The filter is separable and short, so that sums of shifted images take the place of convolutions of one channel each,
which are slow on CPUs. Outside of the image there are zeros. Source: Karras et al. 2020b, Section 4.1 and Figure
7; the filter is that of the released configurations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array
TAPS = (1.0, 3.0, 3.0, 1.0)


def upsample(images: Array) -> Array:
    """[B, H, W, C] -> [B, 2H, 2W, C]: zeros between the pixels, then the filter with sum 4: brightness is kept.

    Along each axis pixel 2i is (x[i-1] + 3 x[i]) / 4 and pixel 2i+1 is (3 x[i] + x[i+1]) / 4.
    """
    for axis in (1, 2):
        before, after = _neighbours(images, axis)
        pairs = jnp.stack([0.25 * before + 0.75 * images, 0.75 * images + 0.25 * after], axis=axis + 1)
        shape = list(images.shape)
        shape[axis] *= 2
        images = pairs.reshape(shape)
    return images


def downsample(images: Array) -> Array:
    """[B, 2H, 2W, C] -> [B, H, W, C]: the filter with sum 1, then every other pixel.

    Along each axis pixel i is (x[2i-1] + 3 x[2i] + 3 x[2i+1] + x[2i+2]) / 8. Raises: `ValueError` for an odd size.
    """
    if images.shape[1] % 2 or images.shape[2] % 2:
        raise ValueError(f"images of {images.shape[1]}x{images.shape[2]} pixels cannot be halved")
    for axis in (1, 2):
        shape = list(images.shape)
        shape[axis : axis + 1] = [shape[axis] // 2, 2]
        pairs = images.reshape(shape)
        even, odd = (jax.lax.index_in_dim(pairs, number, axis + 1, keepdims=False) for number in (0, 1))
        before, _ = _neighbours(odd, axis)
        _, after = _neighbours(even, axis)
        images = 0.125 * (before + after) + 0.375 * (even + odd)
    return images


def blur(images: Array, padding: int, gain: float = 1.0) -> Array:
    """[B, H, W, C] -> [B, H + 2p - 3, W + 2p - 3, C]: the filter with sum `gain`, `padding` p zeros on each side."""
    images = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    taps = [tap * gain**0.5 / sum(TAPS) for tap in TAPS]
    for axis in (1, 2):
        size = images.shape[axis] - len(taps) + 1
        shifted = [jax.lax.slice_in_dim(images, start, start + size, axis=axis) for start in range(len(taps))]
        images = taps[0] * (shifted[0] + shifted[3]) + taps[1] * (shifted[1] + shifted[2])
    return images


def _neighbours(images: Array, axis: int) -> tuple[Array, Array]:
    """What lies before and behind each pixel along an axis, zeros at the ends."""
    size = images.shape[axis]
    pads = [(0, 0)] * images.ndim
    pads[axis] = (1, 1)
    wide = jnp.pad(images, pads)
    return (
        jax.lax.slice_in_dim(wide, 0, size, axis=axis),
        jax.lax.slice_in_dim(wide, 2, size + 2, axis=axis),
    )
