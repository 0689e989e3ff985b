"""Self-attention over tokens, with the softmax in at least float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, *, multiple: int = 1) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v for [B, L, H, d] each -> [B, L, H, d]; products in the inputs' type.

    The exponentials are divided by their sum after the product with the values, which touches [L, d] in place of
    [L, L], and so do its gradients; in a type narrower than the softmax's before it, which rounds once less.
    `multiple`: L is padded to a multiple of it and the padding masked, for devices whose products like whole tiles. The
    result is the same.
    """
    length = queries.shape[1]
    extra = -length % multiple
    if extra:
        queries, keys, values = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (queries, keys, values))
    scale = queries.shape[-1] ** -0.5
    scores = jnp.einsum("blhd,bmhd->bhlm", queries * scale, keys)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if extra:
        scores = jnp.where(jnp.arange(length + extra) < length, scores, -jnp.inf)
    largest = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))  # cancels, and so does its gradient
    weights = jnp.exp(scores - largest)
    sums = jnp.sum(weights, axis=-1, keepdims=True)
    narrow = values.dtype != scores.dtype
    if narrow:
        weights = (weights / sums).astype(values.dtype)
    out = jnp.einsum("bhlm,bmhd->blhd", weights, values)
    if not narrow:
        out = out / jnp.swapaxes(sums, 1, 2)
    return out[:, :length]
