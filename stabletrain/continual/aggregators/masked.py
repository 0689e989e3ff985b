"""Arithmetic on gradients of which some may be absent or zero, at a fixed width."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def norms(gram: Array) -> Array:
    """Lengths [T] of the gradients with Gram matrix [T, T]."""
    return jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0.0))


def over(values: Array, divisor: Array) -> Array:
    """values / divisor, 0 where the divisor is 0."""
    return jnp.where(divisor > 0, values / jnp.where(divisor > 0, divisor, 1.0), 0.0)


def mean_weights(mask: Array) -> Array:
    """1 / n for each of the n gradients of the mask [T]; zeros for none."""
    return mask / jnp.maximum(jnp.sum(mask), 1)


def normalized(gram: Array) -> Array:
    """The Gram matrix over its largest diagonal element, so that iterations mean the same at any scale."""
    largest = jnp.max(jnp.diagonal(gram))
    return gram / jnp.where(largest > 0, largest, 1.0)


def cosines(gram: Array) -> Array:
    """Gram matrix [T, T] of the unit gradients; zero rows and columns for zero gradients."""
    inverse = over(jnp.ones(len(gram), gram.dtype), norms(gram))
    return inverse[:, None] * gram * inverse[None, :]
