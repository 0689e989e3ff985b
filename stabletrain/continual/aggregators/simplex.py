"""Aggregators that choose a convex combination: quadratic programs on the simplex, in the space of the tasks.

All take a Gram matrix M_ij = <g_i, g_j> [T, T] and a mask [T] of the gradients that are there, and return weights [T].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stabletrain.continual.aggregators.masked import cosines, mean_weights, normalized, norms, over

Array = jax.Array

PAIR_STEPS = 300
DISCREPANCY_ROUNDS = 8
"""Dinkelbach's iteration converges superlinearly; from the mean, 5 rounds reach float32's rounding."""
EMGD_DECAY = 0.9
EMGD_TEMPERATURE = 5.0
EMGD_LEAST_SHARE = 1e-4
"""Elastic factors below this are raised to it: the softmax of long gradients would round them to 0, and the weight of
a task whose factor is 0 has no bound."""


def minimize_on_simplex(
    quadratic: Array, linear: Array, mask: Array, start: Array | None = None, steps: int = PAIR_STEPS
) -> Array:
    """argmin of 1/2 y^T Q y + c^T y over y >= 0, sum y = 1, y = 0 off the mask.

    Each step moves weight between the pair of coordinates that violates optimality most, by exact line search; unlike
    Frank-Wolfe steps towards corners this converges linearly (Lacoste-Julien and Jaggi 2015). quadratic: [T, T]
    positive semidefinite; linear: [T]; `start` feasible, by default uniform. Zeros for an empty mask.
    """

    def step(_: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        y, slope = carry
        to = jnp.argmin(jnp.where(mask, slope, jnp.inf))
        away = jnp.argmax(jnp.where(mask & (y > 0), slope, -jnp.inf))
        curvature = quadratic[to, to] + quadratic[away, away] - 2 * quadratic[to, away]
        gain = jnp.maximum(slope[away] - slope[to], 0.0)
        # Without curvature the line goes down until the weight is spent.
        length = jnp.where(curvature > 0, gain / jnp.where(curvature > 0, curvature, 1.0), jnp.inf)
        length = jnp.where(gain > 0, jnp.minimum(length, y[away]), 0.0)
        spent = length >= y[away]
        y = y.at[to].add(length)
        y = y.at[away].set(jnp.where(spent & (to != away), 0.0, y[away] - length))
        return y, slope + length * (quadratic[:, to] - quadratic[:, away])

    y = mean_weights(mask).astype(quadratic.dtype) if start is None else start
    found, _ = lax.fori_loop(0, steps, step, (y, quadratic @ y + linear))
    return jnp.where(jnp.any(mask), found, 0.0)


def mgda(gram: Array, mask: Array) -> Array:
    """The shortest convex combination, argmin over the simplex of a^T M a. Source: Desideri 2012; Sener, Koltun 2018.

    Differs: exact steps between pairs of tasks in place of Frank-Wolfe's.
    """
    return minimize_on_simplex(normalized(gram), jnp.zeros(len(gram), gram.dtype), mask)


def nmgda(gram: Array, mask: Array) -> Array:
    """MGDA's weights of the unit gradients, on the gradients as they are."""
    return mgda(cosines(gram), mask)


def maxdo(gram: Array, mask: Array) -> Array:
    """The update whose largest asymmetric gradient distance to a task is least.

    AGD(d, g_i) = ||d - g_i|| / (||d - g_i|| + ||g_i||) rises with ||d - g_i|| / ||g_i||, so that the minimax is a
    smallest enclosing ball with radii in proportion to the gradients' lengths. Its centre is the convex combination
    that minimises w^T M w / sum_i w_i ||g_i||^2 (the Lagrange dual), which Dinkelbach's iteration solves: minimise
    w^T M w - theta sum_i w_i ||g_i||^2 on the simplex, theta <- the quotient. Zero gradients have weight 0.

    Source: Lyu et al. 2023 (MaxDO). Differs: the minimax of the paper's title is solved exactly; the related released
    code takes five gradient steps on the mean distance and then averages with MGDA's weights.
    """
    scaled = normalized(gram)
    squares = jnp.diagonal(scaled)
    there = mask & (squares > 0)

    def improve(_: int, w: Array) -> Array:
        theta = over(w @ scaled @ w, squares @ w)
        return minimize_on_simplex(2 * scaled, -theta * squares, there, w)

    return lax.fori_loop(0, DISCREPANCY_ROUNDS, improve, mean_weights(there).astype(gram.dtype))


def agd(gram: Array, weights: Array) -> Array:
    """AGD(d, g_i) [T] in [0, 1) of the update d = sum_j w_j g_j and each gradient; 0 for a zero gradient."""
    slopes = gram @ weights
    squares = jnp.diagonal(gram)
    distance = jnp.sqrt(jnp.maximum(weights @ slopes - 2 * slopes + squares, 0.0))
    return over(distance, distance + norms(gram)) * (squares > 0)


def emgd(gram: Array, losses: Array, mask: Array, key: Array, state: Any) -> tuple[Array, Any]:
    """argmin of c^T M c with sum_i sigma_i c_i = 1 and c_i >= 1 / (n + 1) for the n gradients that are there.

    sigma = softmax(m / 5) are the elastic factors, m the running mean (0.9) of a task's gradient length, from its first
    one. A factor that falls below 1e-4 is raised to it.

    Source: Lyu et al. 2024 (EMGD), as in the code released with stable parallel continual learning. Differs: its
    editing of the memory is left out; elastic factors have a lower bound.
    """
    del losses, key
    lengths = norms(gram)
    seen = state["length"] > 0
    now = jnp.where(seen, EMGD_DECAY * state["length"] + (1 - EMGD_DECAY) * lengths, lengths)
    factor = jax.nn.softmax(jnp.where(mask, now / EMGD_TEMPERATURE, -jnp.inf))
    factor = jnp.where(mask, jnp.maximum(jnp.where(mask, factor, 0.0), EMGD_LEAST_SHARE), 0.0)
    least = mask / (jnp.sum(mask) + 1.0)
    # c = least + slack y / sigma with y on the simplex.
    slack = jnp.maximum(1 - factor @ least, 0.0)
    stretch = over(slack * jnp.ones(len(gram), gram.dtype), factor)
    scaled = normalized(stretch[:, None] * normalized(gram) * stretch[None, :])
    size = jnp.max(jnp.square(stretch) * jnp.diagonal(normalized(gram)))
    linear = over(stretch * (normalized(gram) @ least), size)
    y = minimize_on_simplex(scaled, linear, mask)
    return jnp.where(mask, least + stretch * y, 0.0), {"length": jnp.where(mask, now, state["length"])}
