"""Aggregators as the code released with stable parallel continual learning has them, where that is not their paper's.

Variants by name beside the textbook rules, so that what that code compares can be run. Signatures are those of
`gram_weights`. Not here: GradVac, whose released form adds nothing of any gradient when there are two or more (its
running goals are 0 whenever they are used); GradNorm, whose released form begins its weights anew at each step and
multiplies them with the lengths of all tasks instead of their own; UW, which it does not have.

Source: the released code, read for what it computes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stabletrain.continual.aggregators.elementwise import ElementwiseAggregator
from stabletrain.continual.aggregators.masked import mean_weights, norms, over
from stabletrain.continual.aggregators.simplex import mgda

Array = jax.Array

DISCREPANCY_STEPS = 5
DISCREPANCY_RATE, DISCREPANCY_RATE_OF_TWO = 50.0, 10.0
DISCREPANCY_FACTOR = 0.1


def pcgrad(gram: Array, losses: Array, mask: Array, key: Array, state: Any) -> tuple[Array, Any]:
    """The mean of g_i', each g_i projected on the normal plane of one other gradient, drawn for it, if they conflict.

    PCGrad takes all others in turn, and sums.
    """
    del losses
    count = len(gram)
    other = mask[None, :] & mask[:, None] & ~jnp.eye(count, dtype=bool)
    uniform = jax.random.uniform(key, (count, count))
    drawn = jax.nn.one_hot(jnp.argmax(jnp.where(other, uniform, -1.0), 1), count, dtype=gram.dtype)
    slopes = jnp.sum(gram * drawn, 1)
    share = over(jnp.minimum(slopes, 0.0), drawn @ jnp.diagonal(gram)) * jnp.any(other, 1)
    return mean_weights(mask) @ (jnp.eye(count) - share[:, None] * drawn), state


def rlw(gram: Array, losses: Array, mask: Array, key: Array, state: Any) -> tuple[Array, Any]:
    """softmax(U(0, 1)) of sum 1, where RLW has n softmax(normal)."""
    del losses
    drawn = jnp.where(mask, jax.random.uniform(key, (len(gram),)), -jnp.inf)
    return jnp.where(jnp.any(mask), jax.nn.softmax(drawn), 0.0), state


def dwa_state(width: int) -> dict[str, Array]:
    """No losses yet."""
    return {"sum": jnp.zeros(width), "count": jnp.zeros(width)}


def dwa(gram: Array, losses: Array, mask: Array, key: Array, state: Any) -> tuple[Array, Any]:
    """softmax(m) / n with m the mean of a task's losses before this step, -1 at its first one.

    DWA has n softmax(r / 2) with the ratio r of its last two losses. Differs: the memory enters by its mean loss, too.
    """
    del gram, key
    count = state["count"]
    mean = jnp.where(count > 0, state["sum"] / jnp.maximum(count, 1.0), -1.0)
    weights = jax.nn.softmax(jnp.where(mask, mean, -jnp.inf)) / jnp.maximum(jnp.sum(mask), 1)
    new = {"sum": state["sum"] + jnp.where(mask, losses, 0.0), "count": count + mask}
    return jnp.where(jnp.any(mask), weights, 0.0), new


def imtl_g(gram: Array, mask: Array) -> Array:
    """softmax of (1 - sum a, a), a = g_2 U^T (D U^T)^-1 with rows u_1 - u_i of U and g_1 - g_i of D.

    IMTL-G has g_1 in the place of g_2, and no softmax. 1 and 2 are the first gradients that are there. Uniform where D
    U^T has no inverse.
    """
    count = len(gram)
    # The gradients that are there come first, in their order.
    order = jnp.argsort(~mask, stable=True)
    there, ordered = mask[order], gram[order][:, order]
    inverse = over(jnp.ones(count, gram.dtype), norms(ordered))
    differences = jax.nn.one_hot(0, count)[None, :] - jnp.eye(count)  # row i: g_1 - g_i in terms of the gradients
    unit = differences * inverse[None, :]
    rest = there & (jnp.arange(count) > 0)
    system = jnp.where(rest[:, None] & rest[None, :], differences @ ordered @ unit.T, jnp.eye(count))
    right = jnp.where(rest, ordered[1 % count] @ unit.T, 0.0)
    alpha = jnp.where(rest, jnp.linalg.solve(system.T, right), 0.0)
    raw = alpha.at[0].set(1.0 - jnp.sum(alpha))
    weights = jax.nn.softmax(jnp.where(there, raw, -jnp.inf))
    weights = jnp.where(jnp.all(jnp.isfinite(weights)), weights, mean_weights(there))
    return jnp.zeros(count, gram.dtype).at[order].set(jnp.where(there, weights, 0.0))


def maxdo(gram: Array, mask: Array) -> Array:
    """Five gradient steps on how far each gradient is from a combination of the others, then MGDA's weights beside it.

    Rows of A: combinations of the other gradients. The loss is 0.1 mean ||(A G)_i - g_i|| / (mean ||(A G)_i|| + mean
    ||g_i||), the rate 50, rows are softmaxes; of two gradients the rate is 10 and rows are clipped to [0, 1]. Weights:
    the columns' sums with MGDA's added, over n + 1; of two gradients their softmax.

    Source: the predecessor of MaxDO in the released code, with the distance that it has switched on.
    """
    count, eye = jnp.sum(mask), jnp.eye(len(gram))
    others = (mask[:, None] & mask[None, :] & (eye == 0)).astype(gram.dtype)

    def rows_of(a: Array) -> Array:
        masked = jnp.exp(a - jnp.max(a, 1, keepdims=True)) * others
        several = masked / (jnp.sum(masked, 1, keepdims=True) + 1e-7)
        # The edges of the clip pass derivatives on, as the released code's operations do.
        inside = (a >= 0) & (a <= 1)
        return jnp.where(count > 2, several, jnp.where(inside, a, lax.stop_gradient(jnp.clip(a, 0.0, 1.0))) * others)

    def mean_length(a: Array) -> Array:
        squares = jnp.sum((a @ gram) * a, 1)
        return jnp.sum(jnp.where(mask & (squares > 0), jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)) / count

    def distance(a: Array) -> Array:
        rows = rows_of(a)
        return DISCREPANCY_FACTOR * mean_length(rows - eye) / (mean_length(rows) + mean_length(eye) + 1e-5)

    rate = jnp.where(count > 2, DISCREPANCY_RATE, DISCREPANCY_RATE_OF_TWO)

    def descend(_: int, a: Array) -> Array:
        return a - rate * jax.grad(distance)(a)

    start = jnp.full_like(gram, 1.0) / jnp.maximum(count - 1, 1)
    a = lax.fori_loop(0, DISCREPANCY_STEPS, descend, start)
    # The released code keeps the rows of the last step but one beside the last A where there are two gradients.
    before = lax.fori_loop(0, DISCREPANCY_STEPS - 1, descend, start)
    columns = jnp.sum(jnp.where(count > 2, rows_of(a), a * rows_of(before)), 0) + mgda(gram, mask)
    of_two = jax.nn.softmax(jnp.where(mask, columns, -jnp.inf))
    return jnp.where(mask, jnp.where(count > 2, columns / (count + 1), of_two), 0.0)


def _same_sign(gradient: Array, sums: tuple[Array, ...], uniform: Array) -> Array:
    """g where its sign is that of the sum: the released purity is infinite, so that nothing is drawn."""
    del uniform
    return jnp.where(jnp.sign(gradient) * jnp.sign(sums[0]) > 0, gradient, 0.0)


GRADDROP = ElementwiseAggregator(lambda gradient: (gradient,), _same_sign)
"""GradDrop draws the sign of each element by its purity."""
