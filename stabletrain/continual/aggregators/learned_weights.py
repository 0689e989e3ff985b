"""Aggregators that learn a weight for each task while the network learns; what they know is part of their state.

The signatures are those of `gram_weights`. A task that is absent keeps its weight and its moments until it is back.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stabletrain.continual.aggregators.masked import norms, over

Array = jax.Array

DWA_TEMPERATURE = 2.0
GRADNORM_ALPHA = 1.5
WEIGHT_RATE = 0.025
"""Learning rate of the weights themselves: GradNorm's paper; used for UW too."""
LEAST_WEIGHT = 1e-3
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


def _adam_state(width: int) -> dict[str, Array]:
    zeros = jnp.zeros(width)
    return {"first": zeros, "second": zeros, "count": zeros}


def _adam(gradient: Array, mask: Array, state: dict[str, Array], rate: float) -> tuple[Array, dict[str, Array]]:
    """Adam's step [T], each task with a count of its own steps; nothing moves off the mask."""
    count = state["count"] + 1
    first = BETA_1 * state["first"] + (1 - BETA_1) * gradient
    second = BETA_2 * state["second"] + (1 - BETA_2) * jnp.square(gradient)
    step = -rate * (first / (1 - BETA_1**count)) / (jnp.sqrt(second / (1 - BETA_2**count)) + EPSILON)
    new = {"first": first, "second": second, "count": count}
    kept = {name: jnp.where(mask, value, state[name]) for name, value in new.items()}
    return jnp.where(mask, step, 0.0), kept


def uw_state(width: int) -> dict[str, Any]:
    """Log variances of 0, which weigh every loss with 1."""
    return {"log_variance": jnp.zeros(width), "moments": _adam_state(width)}


def uw(
    gram: Array, losses: Array, mask: Array, key: Array, state: Any, *, rate: float = WEIGHT_RATE
) -> tuple[Array, Any]:
    """Uncertainty weighting: w_i = exp(-s_i), where the s_i descend sum_i exp(-s_i) l_i + s_i / 2.

    Source: Kendall et al. 2018, Eq. 10 with s = log sigma^2. For constant losses w_i tends to 1 / (2 l_i). Differs:
    Adam moves s with a rate of its own, each task by its own count of steps.
    """
    del gram, key
    weights = jnp.where(mask, jnp.exp(-state["log_variance"]), 0.0)
    step, moments = _adam(0.5 - weights * losses, mask, state["moments"], rate)
    return weights, {"log_variance": state["log_variance"] + step, "moments": moments}


def gradnorm_state(width: int) -> dict[str, Any]:
    """Weights of 1; no first loss yet (0)."""
    return {"weight": jnp.ones(width), "first_loss": jnp.zeros(width), "moments": _adam_state(width)}


def gradnorm(
    gram: Array, losses: Array, mask: Array, key: Array, state: Any, *, rate: float = WEIGHT_RATE
) -> tuple[Array, Any]:
    """Weights that pull the lengths G_i = w_i ||g_i|| towards mean(G) r_i^1.5, with sum w = n over the n tasks there.

    r_i is the share of its first loss that a task has left, over the mean of these shares. The weights descend
    sum_i |G_i - mean(G) r_i^1.5| with the targets held fixed, and are used as they were before that step. Unless all
    r_i are 1 the targets' mean is above mean(G), so that no weights meet all of them.

    Source: Chen et al. 2018 (GradNorm), Algorithm 1. Differs: lengths are those of all parameters' gradients, not of
    the last shared layer's; the sum is over the tasks that are there; weights do not fall below 1e-3.
    """
    del key
    count = jnp.maximum(jnp.sum(mask), 1)
    total = jnp.sum(jnp.where(mask, state["weight"], 0.0))
    weights = jnp.where(mask, state["weight"] * count / jnp.where(total > 0, total, 1.0), 0.0)
    first_loss = jnp.where(mask & (state["first_loss"] == 0), losses, state["first_loss"])
    left = jnp.where(mask, over(losses, first_loss), 0.0)
    rate_of = over(left, jnp.sum(left) / count)
    lengths = norms(gram)
    target = jnp.sum(weights * lengths) / count * rate_of**GRADNORM_ALPHA
    slope = jnp.sign(weights * lengths - target) * lengths
    # Adam's epsilon is an absolute one: slopes relative to the largest length mean the same at any scale.
    step, moments = _adam(over(slope, jnp.max(lengths)), mask, state["moments"], rate)
    moved = jnp.where(mask, jnp.maximum(weights + step, LEAST_WEIGHT), 0.0)
    moved = moved * count / jnp.maximum(jnp.sum(moved), LEAST_WEIGHT)
    new = {"weight": jnp.where(mask, moved, state["weight"]), "first_loss": first_loss, "moments": moments}
    return weights, new


def dwa_state(width: int) -> dict[str, Array]:
    """No losses yet (0)."""
    return {"last": jnp.zeros(width), "before": jnp.zeros(width)}


def dwa(gram: Array, losses: Array, mask: Array, key: Array, state: Any) -> tuple[Array, Any]:
    """n softmax(r / 2), r = l_(k-1) / l_(k-2) of the task's own last two steps; r = 1 before.

    Source: Liu et al. 2019.
    """
    del gram, key
    one, two = state["last"], state["before"]
    rate = jnp.where((one > 0) & (two > 0), one / jnp.where(two > 0, two, 1.0), 1.0)
    logits = jnp.where(mask, rate / DWA_TEMPERATURE, -jnp.inf)
    weights = jnp.where(jnp.any(mask), jax.nn.softmax(logits) * jnp.sum(mask), 0.0)
    return weights, {"last": jnp.where(mask, losses, one), "before": jnp.where(mask, one, two)}
