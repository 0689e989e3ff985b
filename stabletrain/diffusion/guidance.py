"""Classifier-free guidance: one network, with and without the label or text.

**Source** Ho and Salimans 2022. **Differs** in how strength is counted: here w is such that

    out = unconditional + w (conditional - unconditional),

so w = 1 is the conditional network alone, w = 0 the unconditional one, and w = 1 + (their w) above that. (U-ViT writes
conditional + s (conditional - unconditional): s = w - 1.)
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike

from stabletrain.diffusion.processes import Array, Network

LabelledNetwork = Callable[[Array, Array, Array], Array]
"""(noisy [B, H, W, C], network times [B], labels [B] or text features [B, L, D]) -> [B, H, W, C].

2 C channels with a learned variance.
"""


def guided(network: LabelledNetwork, labels: Array, nothing: ArrayLike, scale: float) -> Network:
    """The network that samplers follow, for images of the classes `labels` [B], or of texts [B, L, D].

    `nothing` is the label that means "none", or the features [L, D] of the empty text; `scale` is w. Both answers come
    from one evaluation on twice the batch; w = 0 and w = 1 need no second answer and cost no second half.
    """
    nothing = jnp.broadcast_to(jnp.asarray(nothing, labels.dtype), labels.shape)
    if scale == 1.0:
        return lambda noisy, times: network(noisy, times, labels)
    if scale == 0.0:
        return lambda noisy, times: network(noisy, times, nothing)

    def both(noisy: Array, times: Array) -> Array:
        out = network(
            jnp.concatenate([noisy, noisy]), jnp.concatenate([times, times]), jnp.concatenate([labels, nothing])
        )
        conditional, unconditional = jnp.split(out, 2)
        mixed = unconditional + scale * (conditional - unconditional)
        # A learned variance, in the channels behind the noise, is that of the labelled network.
        return jnp.concatenate([mixed[..., : noisy.shape[-1]], conditional[..., noisy.shape[-1] :]], axis=-1)

    return both
