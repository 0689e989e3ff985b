"""Self-attention over tokens, with the softmax in at least float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, *, multiple: int = 1) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v for [B, L, H, d] each -> [B, L, H, d]; products in the inputs' type.

    `multiple`: L is padded to a multiple of it and the padding masked, for devices whose products like whole tiles.
    The result is the same.
    """
    length = queries.shape[1]
    extra = -length % multiple
    if extra:
        queries, keys, values = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (queries, keys, values))
    scale = queries.shape[-1] ** -0.5
    scores = jnp.einsum("blhd,bmhd->bhlm", queries * scale, keys)
    wide = jnp.promote_types(scores.dtype, jnp.float32)
    scores = scores.astype(wide)
    if extra:
        scores = jnp.where(jnp.arange(length + extra) < length, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bhlm,bmhd->blhd", weights, values)[:, :length]
