"""Rehearsal rules: the mean gradient of the active tasks, g_c, against what the memory says. As weights on gradients.

Every rule is a function of the Gram matrix M_ij = <g_i, g_j>, the losses, and two masks; it returns a weight for each
gradient, and the update is sum_i w_i g_i. `current` marks the active tasks' gradients, `memory` the memory's: one of
all of it, or (GEM) one for each finished task. A gradient under neither mask has weight 0, and where there is no memory
yet the update is g_c. All of it runs under jit.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Rule = Callable[[Array, Array, Array, Array], Array]

GEM_MARGIN = 0.5
"""The margin that the dual variables get in the reference code of GEM: it favours backward transfer."""
GEM_RIDGE = 1e-3
GEM_SWEEPS = 200
MEGA_EPSILON = 0.1


def _mean_of(mask: Array) -> Array:
    values = mask.astype(jnp.float32)
    return values / jnp.maximum(values.sum(), 1.0)


def _together(gram: Array, current: Array, memory: Array) -> tuple[Array, Array, Array, Array]:
    """Weights of g_c and of g_0, <g_c, g_0> and ||g_0||^2."""
    c, m = _mean_of(current), _mean_of(memory)
    return c, m, c @ gram @ m, m @ gram @ m


def current_mean(gram: Array, losses: Array, current: Array, memory: Array) -> Array:
    """g_c: the mean of the active tasks' gradients, whatever the memory says."""
    del gram, losses, memory
    return _mean_of(current)


def er(gram: Array, losses: Array, current: Array, memory: Array) -> Array:
    """(g_c + g_0) / 2; g_c alone while the memory is empty."""
    del gram, losses
    c, m = _mean_of(current), _mean_of(memory)
    return (c + m) / jnp.maximum(jnp.any(current).astype(jnp.float32) + jnp.any(memory), 1.0)


def replay_sum(gram: Array, losses: Array, current: Array, memory: Array) -> Array:
    """g_c + sum of the memory's gradients: the loss of the current examples plus those of the replayed ones."""
    del gram, losses
    return _mean_of(current) + memory.astype(jnp.float32)


def agem(gram: Array, losses: Array, current: Array, memory: Array) -> Array:
    """g_c where <g_c, g_0> >= 0, else g_c - <g_c, g_0> / ||g_0||^2 g_0. Source: Chaudhry et al. 2019, Eq. 11."""
    del losses
    c, m, product, square = _together(gram, current, memory)
    factor = jnp.where(square > 0, product / jnp.where(square > 0, square, 1.0), 0.0)
    return c - jnp.minimum(factor, 0.0) * m


def gem(gram: Array, losses: Array, current: Array, memory: Array) -> Array:
    """g_c + sum_k v_k g_k: the nearest update with <d, g_k> >= 0 for each finished task k.

    The dual: min_v 1/2 v^T (A A^T + 1e-3 I) v + (A g_c)^T v with v >= margin, A's rows the g_k, by projected
    coordinate descent. Gradients are scaled by the largest norm for it, so that the ridge means the same at any scale.
    Where no constraint is violated the update is g_c, as in the reference code.

    Source: Lopez-Paz and Ranzato 2017, Eq. 11. Differs: the reference solves the program with quadprog, on gradients as
    they are.
    """
    del losses
    c = _mean_of(current)
    scale = jnp.max(jnp.diagonal(gram))
    scaled = gram / jnp.where(scale > 0, scale, 1.0)
    inside = memory[:, None] & memory[None, :]
    quadratic = jnp.where(inside, scaled, 0.0) + GEM_RIDGE * jnp.eye(len(gram))
    linear = jnp.where(memory, scaled @ c, 0.0)

    def sweep(_: int, dual: Array) -> Array:
        def coordinate(k: Array, dual: Array) -> Array:
            slope = quadratic[k] @ dual + linear[k]
            best = jnp.maximum(dual[k] - slope / quadratic[k, k], GEM_MARGIN)
            return dual.at[k].set(jnp.where(memory[k], best, 0.0))

        return lax.fori_loop(0, len(gram), coordinate, dual)

    violated = jnp.any(memory & (linear < 0))
    dual = lax.fori_loop(0, GEM_SWEEPS, sweep, jnp.where(memory, GEM_MARGIN, 0.0))
    return c + jnp.where(violated, dual, 0.0)


def _mega(losses: Array, current: Array, memory: Array, *, swapped: bool) -> Array:
    c, m = _mean_of(current), _mean_of(memory)
    now, before = c @ losses, m @ losses
    ratio = before / jnp.maximum(now, MEGA_EPSILON)
    one, other = (m, c) if swapped else (c, m)
    weights = jnp.where(now > MEGA_EPSILON, one + ratio * other, m)
    return jnp.where(jnp.any(memory), weights, c)


def mega(gram: Array, losses: Array, current: Array, memory: Array) -> Array:
    """g_c + (l_0 / l_c) g_0 where l_c > 0.1, else g_0. Source: Guo et al. 2020, MEGA-I."""
    del gram
    return _mega(losses, current, memory, swapped=False)


def mega_released(gram: Array, losses: Array, current: Array, memory: Array) -> Array:
    """g_0 + (l_0 / l_c) g_c where l_c > 0.1, else g_c.

    Differs from `mega` as the code released with stable parallel continual learning does: both gradients have each
    other's weight.
    """
    del gram
    c = _mean_of(current)
    weights = _mega(losses, current, memory, swapped=True)
    return jnp.where((c @ losses > MEGA_EPSILON) | ~jnp.any(memory), weights, c)


RULES: dict[str, Rule] = {
    "current": current_mean,
    "er": er,
    "replay-sum": replay_sum,
    "agem": agem,
    "gem": gem,
    "mega": mega,
    "mega-released": mega_released,
}
"""Rehearsal rules by name."""
