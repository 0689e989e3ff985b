"""The level of a noisy, drifting quantity and how far it may stray, by medians: outliers move neither."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array

MAD_TO_SIGMA = 1.4826  # the median absolute deviation of a normal distribution is sigma / 1.4826


def masked_median(values: Array, count: Array) -> Array:
    """Median along the last axis of the last `count` entries (at least one). `values` [..., W], `count` [...] or []."""
    size = values.shape[-1]
    count = jnp.broadcast_to(count, values.shape[:-1])[..., None]
    ordered = jnp.sort(jnp.where(jnp.arange(size) >= size - count, values, jnp.inf), axis=-1)
    middle = jnp.concatenate([(count - 1) // 2, count // 2], axis=-1)  # (..., 2)
    return jnp.mean(jnp.take_along_axis(ordered, middle, axis=-1), axis=-1)


def level_and_scale(window: Array, count: Array) -> tuple[Array, Array]:
    """Where the next value should be and how far it may stray: a robust line through the last `count` values.

    Shapes: `window` [..., W] -> two arrays [...]. The slope is the median rise between points half a window apart
    (Theil and Sen's estimate over W/2 pairs); it is zero until the window is full. The scale is `MAD_TO_SIGMA` times
    the median absolute deviation from the line.
    """
    size = window.shape[-1]
    half = size // 2
    rises = window[..., half : 2 * half] - window[..., :half]
    slope = jnp.where(count >= size, masked_median(rises, jnp.asarray(half)) / half, 0.0)
    age = jnp.arange(size, dtype=window.dtype) - (size - 1)  # 0 for the newest
    flat = window - slope[..., None] * age
    level = masked_median(flat, count)
    return level, MAD_TO_SIGMA * masked_median(jnp.abs(flat - level[..., None]), count)
