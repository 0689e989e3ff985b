"""Sinusoidal embeddings of diffusion times, in the orders that the published networks use."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def sinusoidal(times: jax.Array, size: int, *, order: str = "cos-sin", max_period: float = 10_000.0) -> jax.Array:
    """[B] -> [B, size]; an odd size ends with a zero.

    `cos-sin`: frequencies max_period^(-k/half), as in U-ViT and improved-diffusion. `sin-cos`: the last frequency is
    exactly 1/max_period (divisor half - 1), as in DDPM (Ho et al. 2020).
    """
    half = size // 2
    divisor = half if order == "cos-sin" else max(half - 1, 1)
    dtype = jnp.promote_types(times.dtype, jnp.float32)
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=dtype) / divisor)
    angles = times.astype(dtype)[:, None] * frequencies
    waves = (jnp.cos(angles), jnp.sin(angles))
    if order != "cos-sin":
        waves = waves[::-1]
    return jnp.pad(jnp.concatenate(waves, axis=-1), ((0, 0), (0, size - 2 * half)))
