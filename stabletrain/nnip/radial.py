"""Envelopes of radial functions. Distances in units of the cutoff."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def polynomial_envelope(x: jax.Array, p: int) -> jax.Array:
    """1 at x = 0 and 0 from x = 1 on, with two continuous derivatives there. Source: Gasteiger et al. 2020, Eq. 8."""
    a, b, c = -(p + 1) * (p + 2) / 2, p * (p + 2), -p * (p + 1) / 2
    x = jnp.minimum(x, 1.0)
    return 1.0 + a * x**p + b * x ** (p + 1) + c * x ** (p + 2)
