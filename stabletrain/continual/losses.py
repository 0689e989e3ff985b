"""Losses of one task's examples. One head covers all classes; a mask says among which of them an example is told.

logits [B, C], labels int [B], mask [B, C] with 1 for the classes that compete, weight [B] (0 for padding). Means are
over the weights, so that a partly filled batch counts as one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array

COSINE_SCALE = 20.0
CLASS_MARGIN = 0.01
TASK_MARGIN = 0.01


def weighted_mean(values: Array, weight: Array) -> Array:
    """sum(values weight) / sum(weight); 0 where all weights are 0."""
    total = jnp.sum(weight)
    return jnp.sum(values * weight) / jnp.where(total > 0, total, 1.0)


def cross_entropy(logits: Array, labels: Array, mask: Array, weight: Array) -> Array:
    """Softmax cross-entropy among the classes of the mask.

    Differs: the released code adds 1e-7 to the softmax's denominator and to its logarithm.
    """
    allowed = jnp.where(mask > 0, logits, -jnp.inf)
    # Padding has no class that competes: any finite value will do, its weight is 0.
    allowed = jnp.where(jnp.any(mask > 0, -1, keepdims=True), allowed, 0.0)
    log_probability = jax.nn.log_softmax(allowed)
    picked = jnp.take_along_axis(log_probability, labels[:, None], 1)[:, 0]
    return weighted_mean(-jnp.where(weight > 0, picked, 0.0), weight)


def margin_cross_entropy(logits: Array, labels: Array, mask: Array, weight: Array, same_task: Array) -> Array:
    """Cross-entropy of scaled cosines, the label's angle enlarged by a margin, other tasks' angles diminished by one.

    `logits` are cosines, `same_task` [B, C] marks the classes of the example's own task.

    Source: MDMT-R (Lyu et al. 2021), margins 0.01 and scale 20 as in the code released with stable parallel continual
    learning. Differs: where the task margin is applied is a reconstruction, since the published code is not at hand.
    """
    # The derivative of the angle is infinite at a cosine of 1.
    angles = jnp.arccos(jnp.clip(logits, -1 + 1e-6, 1 - 1e-6))
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    shifted = angles + CLASS_MARGIN * own - TASK_MARGIN * (1 - same_task)
    return cross_entropy(COSINE_SCALE * jnp.cos(shifted), labels, mask, weight)


def icarl_loss(logits: Array, labels: Array, mask: Array, weight: Array, old: Array, old_logits: Array) -> Array:
    """Sum over the classes of the mask of binary cross-entropies, in the mean over examples.

    Targets: the old network's sigmoid for the classes `old` [C] of finished tasks, the label for all others.

    Source: Rebuffi et al. 2017 (iCaRL), Algorithm 3.
    """
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    targets = jnp.where(old > 0, jax.nn.sigmoid(old_logits), targets)
    # -t log s(z) - (1 - t) log (1 - s(z))
    each = jax.nn.softplus(logits) - targets * logits
    return weighted_mean(jnp.sum(each * mask, -1), weight)


def logit_distance(logits: Array, stored: Array, weight: Array) -> Array:
    """Mean squared distance to the stored logits. Source: Buzzega et al. 2020 (DER), Eq. 6, as mean over classes."""
    return weighted_mean(jnp.mean(jnp.square(logits - stored), -1), weight)


def predictions(logits: Array, mask: Array) -> Array:
    """The class with the largest logit among those of the mask [..., C]."""
    return jnp.argmax(jnp.where(mask > 0, logits, -jnp.inf), -1)
