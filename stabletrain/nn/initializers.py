"""Initialisers of the published networks that Flax does not name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import initializers

Shape = tuple[int, ...]


def torch_uniform(fan_in: int) -> Any:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the default of PyTorch's Linear and Conv2d, for weight and bias alike."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def fan_average(scale: float = 1.0) -> Any:
    """Uniform with variance scale / fan_avg; scale 0 means 1e-10, as in DDPM, so that no gradient is exactly zero.

    Source: Ho et al. 2020 (released code).
    """
    return initializers.variance_scaling(1e-10 if scale == 0 else scale, "fan_avg", "uniform")
