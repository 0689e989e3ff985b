"""Self-attention over tokens, with the softmax in at least float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attend(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v for [B, L, H, d] each -> [B, L, H, d]; products in the inputs' type."""
    scale = queries.shape[-1] ** -0.5
    scores = jnp.einsum("blhd,bmhd->bhlm", queries * scale, keys)
    wide = jnp.promote_types(scores.dtype, jnp.float32)
    weights = jax.nn.softmax(scores.astype(wide), axis=-1).astype(values.dtype)
    return jnp.einsum("bhlm,bmhd->blhd", weights, values)
