"""Halving and doubling the resolution of feature maps with a separable filter, [B, H, W, C]."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Taps = tuple[int, ...]


def filter_of(taps: Taps) -> np.ndarray:
    """[k, k], the outer product of the taps, with sum one. Raises: `ValueError` for an odd number or a sum of zero."""
    line = np.asarray(taps, np.float64)
    if not len(taps) or len(taps) % 2 or not line.sum():
        raise ValueError(f"a filter that halves or doubles has an even number of taps and no zero sum, not {taps}")
    return np.outer(line, line) / line.sum() ** 2


def halved(x: jax.Array, taps: Taps = (1, 1)) -> jax.Array:
    """[B, H, W, C] -> [B, H/2, W/2, C]: filtered, and every other pixel kept; (1, 1) averages 2x2 pixels.

    Zeros lie beyond the border. Raises: `ValueError` for a filter that `filter_of` refuses.
    """
    if taps == (1, 1):
        batch, height, width, channels = x.shape
        return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
    kernel, margin = filter_of(taps), (len(taps) - 1) // 2
    return _each_channel(x, kernel, window_strides=(2, 2), padding=((margin, margin),) * 2)


def doubled(x: jax.Array, taps: Taps = (1, 1)) -> jax.Array:
    """[B, H, W, C] -> [B, 2H, 2W, C]: zeros between the pixels, then filtered; (1, 1) repeats each pixel.

    Four times the transpose of `halved`, so that the mean stays. Raises: `ValueError` as `halved`.
    """
    if taps == (1, 1):
        return x.repeat(2, axis=1).repeat(2, axis=2)
    kernel, margin = 4.0 * filter_of(taps)[::-1, ::-1], len(taps) - 1 - (len(taps) - 1) // 2
    return _each_channel(x, kernel, window_strides=(1, 1), padding=((margin, margin),) * 2, lhs_dilation=(2, 2))


def _each_channel(x: jax.Array, kernel: np.ndarray, **how: Any) -> jax.Array:
    channels = x.shape[-1]
    weights = jnp.tile(jnp.asarray(kernel, x.dtype)[:, :, None, None], (1, 1, 1, channels))
    return lax.conv_general_dilated(
        x, weights, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=channels, **how
    )
