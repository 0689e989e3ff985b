"""Gradient aggregators as weights on gradients, from their Gram matrix: the update is sum_i w_i g_i.

An aggregator has `init(width)`, what it remembers before the first step, and
`weights(gram, losses, mask, key, state)` -> (weights [T], new state). gram: [T, T] with zero rows and columns for the
gradients that are off (`mask` False), whose weight is 0; the width is fixed, so that everything runs under jit. Rows
keep their identity from step to step. The rules are those of the papers named with them.

GradDrop needs more than the Gram matrix: `stabletrain.continual.aggregators.elementwise`. On pytrees of gradients, and
as an optax transformation: `stabletrain.continual.aggregators.transform`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stabletrain.continual.aggregators import learned_weights, released, simplex
from stabletrain.continual.aggregators.elementwise import GRADDROP, ElementwiseAggregator
from stabletrain.continual.aggregators.masked import cosines, mean_weights, normalized, norms, over
from stabletrain.methods import spcl

Array = jax.Array
Weigh = Callable[[Array, Array, Array, Array, Any], tuple[Array, Any]]

CAGRAD_STEPS = 400
DUAL_SWEEPS = 200
GRADVAC_RATE = 0.01
NASH_RIDGE = 1e-6
"""Added to the matrix of cosines: gradients that cancel have no Nash solution, and float32 resolves no less."""
NASH_STEPS = 60
NASH_LENGTH = 1.0


@dataclass(frozen=True)
class Aggregator:
    """A named rule; `init` and `weights` as above. `needs_losses`: without losses it cannot weigh anything.

    `columns(gram, mask)` -> (W [T, T], length), where the rule conditions the gradients before it sums them: G W are
    the conditioned ones, and the weights are the row sums of W times the length.
    """

    init: Callable[[int], Any]
    weights: Weigh
    needs_losses: bool = False
    columns: Callable[[Array, Array], tuple[Array, Array]] | None = None


def _nothing(width: int) -> dict[str, Array]:
    del width
    return {}


def _plain(rule: Callable[[Array, Array], Array]) -> Aggregator:
    """A rule of (gram, mask) that remembers and draws nothing."""

    def weights(gram: Array, losses: Array, mask: Array, key: Array, state: Any) -> tuple[Array, Any]:
        del losses, key
        inside = mask[:, None] & mask[None, :]
        return jnp.where(mask, rule(jnp.where(inside, gram, 0.0), mask), 0.0), state

    return Aggregator(_nothing, weights)


def _conditioned(columns: Callable[[Array], Array], length: Callable[[Array], Array]) -> Aggregator:
    """The sum of conditioned gradients G W, times a length."""

    def of_present(gram: Array, mask: Array) -> tuple[Array, Array]:
        inside = mask[:, None] & mask[None, :]
        there = jnp.where(inside, gram, 0.0)
        return jnp.where(inside, columns(there), 0.0), length(there)

    def rule(gram: Array, mask: Array) -> Array:
        found, scale = of_present(gram, mask)
        return scale * jnp.sum(found, 1)

    return replace(_plain(rule), columns=of_present)


def _sum_rule(gram: Array, mask: Array) -> Array:
    return mask.astype(gram.dtype)


def _mean_rule(gram: Array, mask: Array) -> Array:
    del gram
    return mean_weights(mask)


def _norm_rule(gram: Array, mask: Array) -> Array:
    del mask
    return over(jnp.ones(len(gram), gram.dtype), norms(gram))


def _aligned(*, scale: str = "min", floor: float = 0.0) -> Aggregator:
    """sigma V Sigma^-1 V^T 1. Source: Senushkin et al. 2023 (Aligned-MTL), with unit task weights."""
    return _conditioned(spcl.polar_weights, functools.partial(spcl.scale_of, rule=scale, floor=floor))


def _spcl(*, alpha: float = 10.0, scale: str = "min", floor: float = 0.0) -> Aggregator:
    """The exact decomposition: `spcl.orthogonal_decomposition`."""
    length = functools.partial(spcl.scale_of, rule=scale, floor=floor)
    return _conditioned(lambda gram: spcl.decomposition(gram, alpha=alpha)[0], length)


def _spcl_released(*, alpha: float = 10.0, scale: str = "min", floor: float = 0.0) -> Aggregator:
    """The released penalty loop: `spcl.released_decomposition`."""
    length = functools.partial(spcl.scale_of, rule=scale, floor=floor, tolerance=spcl.RELEASED_TOLERANCE)
    return _conditioned(functools.partial(spcl.released_columns, alpha=alpha), length)


def _imtl(gram: Array, mask: Array) -> Array:
    """Equal projections on all unit gradients: M a = ||g||, scaled to sum 1. Source: Liu et al. 2021 (IMTL-G)."""
    values, vectors = jnp.linalg.eigh(gram)
    inverse = jnp.where(values > 1e-7 * len(gram) * values[-1], 1.0 / jnp.where(values > 0, values, 1.0), 0.0)
    raw = vectors @ (inverse * (vectors.T @ norms(gram)))
    total = jnp.sum(raw)
    return jnp.where(jnp.abs(total) > 0, raw / jnp.where(total == 0, 1.0, total), mean_weights(mask))


def _cagrad(gram: Array, mask: Array, *, c: float) -> Array:
    """min over the simplex of g_w . g_0 + c ||g_0|| ||g_w||, then g_0 + c ||g_0|| / ||g_w|| g_w.

    Source: Liu et al. 2021 (CAGrad), without a final rescaling. Exponentiated gradient steps on the scaled Gram matrix.
    """
    mean = mean_weights(mask)
    scaled = normalized(gram)
    length = jnp.sqrt(jnp.maximum(mean @ scaled @ mean, 0.0))

    def step(i: int, w: Array) -> Array:
        slope = scaled @ mean + c * length * over(scaled @ w, jnp.sqrt(jnp.maximum(w @ scaled @ w, 1e-20)))
        log = jnp.where(mask, jnp.log(jnp.maximum(w, 1e-30)) - 2.0 * slope, -jnp.inf)
        return jnp.where(jnp.any(mask), jax.nn.softmax(log), w)

    w = lax.fori_loop(0, CAGRAD_STEPS, step, mean)
    return mean + c * length * over(w, jnp.sqrt(jnp.maximum(w @ scaled @ w, 0.0)))


def _project_on_dual_cone(gram: Array, target: Array, mask: Array) -> Array:
    """argmin over v >= target of v^T M v, by coordinate descent. target: [T]."""
    scaled = normalized(gram)

    def coordinate(k: Array, v: Array) -> Array:
        best = v[k] - over(scaled[k] @ v, scaled[k, k])
        return v.at[k].set(jnp.where(mask[k], jnp.maximum(best, target[k]), 0.0))

    return lax.fori_loop(0, DUAL_SWEEPS * len(gram), lambda i, v: coordinate(i % len(gram), v), target)


def _dual(gram: Array, mask: Array) -> Array:
    """The mean gradient projected on the dual cone: no task's loss rises."""
    return _project_on_dual_cone(gram, mean_weights(mask), mask)


def _upgrad(gram: Array, mask: Array) -> Array:
    """Each gradient projected on the dual cone, in the mean. Source: Quinton and Rey 2024 (Jacobian descent)."""
    each = jax.vmap(lambda row: _project_on_dual_cone(gram, row, mask))(jnp.diag(mask.astype(jnp.float32)))
    return jnp.sum(each, 0) / jnp.maximum(jnp.sum(mask), 1)


def _config(gram: Array, mask: Array) -> Array:
    """Equal cosines with all gradients, length the sum of the projections. Source: Liu et al. 2024 (ConFIG)."""
    inverse, unit = over(jnp.ones(len(gram), gram.dtype), norms(gram)), cosines(gram)
    values, vectors = jnp.linalg.eigh(unit)
    kept = values > 1e-6 * len(gram)
    direction = vectors @ (jnp.where(kept, 1.0 / jnp.where(kept, values, 1.0), 0.0) * (vectors.T @ mask))
    weights = inverse * direction
    length = jnp.sqrt(jnp.maximum(weights @ gram @ weights, 0.0))
    weights = over(weights, length)
    return weights * jnp.sum(jnp.where(mask, gram @ weights, 0.0))


def _nash(gram: Array, mask: Array) -> Array:
    """The Nash bargaining solution: M a = 1 / a with a > 0, the update shortened to length 1.

    It minimises 1/2 a^T M a - sum_i log a_i, which is strictly convex and self-concordant, so that damped Newton steps
    reach it from anywhere; with b_i = a_i ||g_i|| in place of a it knows cosines only. The update's length is sqrt(n)
    before it is shortened.

    Source: Navon et al. 2022 (Nash-MTL), Eq. 2, with the released limit of 1 on the update's length. Differs: the
    equation is solved to rounding, where the paper approximates it by convex programs; a ridge of 1e-6 on the cosines.
    """
    lengths = norms(gram)
    there = mask & (lengths > 0)
    bend = cosines(jnp.where(there[:, None] & there[None, :], gram, 0.0)) + NASH_RIDGE * jnp.eye(len(gram))
    bend = jnp.where(there[:, None] & there[None, :], bend, jnp.eye(len(gram)))

    def step(_: int, b: Array) -> Array:
        slope = jnp.where(there, bend @ b - 1 / b, 0.0)
        newton = jnp.linalg.solve(bend + jnp.diag(1 / jnp.square(b)), slope)
        decrement = jnp.sqrt(jnp.maximum(slope @ newton, 0.0))
        return b - jnp.where(decrement > 0.25, 1 / (1 + decrement), 1.0) * newton

    b = lax.fori_loop(0, NASH_STEPS, step, jnp.ones(len(gram), gram.dtype))
    b = jnp.where(there, b, 0.0)
    length = jnp.sqrt(jnp.maximum(b @ cosines(gram) @ b, 0.0))
    return over(b, lengths) / jnp.maximum(length / NASH_LENGTH, 1.0)


# --- with draws or a memory -------------------------------------------------------------------------------------------


def _surgery(gram: Array, mask: Array, order: Array, cosine_goal: Array) -> tuple[Array, Array]:
    """Each gradient in turn, over the others in `order` [T, T]: raised to the goal cosine where it is below it.

    Returns the matrix of combinations (row i: weights of g_i') and the cosines that were met [T, T]. A goal of 0 is
    PCGrad's projection.
    """
    lengths, count = norms(gram), len(gram)

    def one(i: Array) -> tuple[Array, Array]:
        def visit(place: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            own, met = carry
            j = order[i, place]
            length = jnp.sqrt(jnp.maximum(own @ gram @ own, 0.0))
            cosine = jnp.clip(over(own @ gram[j], length * lengths[j]), -1.0, 1.0)
            goal = cosine_goal[i, j]
            other = jnp.sqrt(jnp.maximum(1 - goal**2, 1e-12))
            factor = length * (goal * jnp.sqrt(jnp.maximum(1 - cosine**2, 0.0)) - cosine * other)
            factor = over(factor, lengths[j] * other)
            use = (cosine < goal) & (i != j) & mask[i] & mask[j] & (lengths[j] > 0)
            met = met.at[j].set(jnp.where((i != j) & mask[i] & mask[j], cosine, met[j]))
            return own.at[j].add(jnp.where(use, factor, 0.0)), met

        start = (jax.nn.one_hot(i, count) * mask[i], cosine_goal[i])
        return lax.fori_loop(0, count, visit, start)

    return lax.map(one, jnp.arange(count))


def _orders(key: Array, count: int) -> Array:
    return jax.vmap(lambda k: jax.random.permutation(k, count))(jax.random.split(key, count))


def _pcgrad(gram: Array, losses: Array, mask: Array, key: Array, state: Any) -> tuple[Array, Any]:
    """sum_i g_i', each g_i projected on the normal planes of those it conflicts with. Source: Yu et al. 2020."""
    del losses
    combined, _ = _surgery(gram, mask, _orders(key, len(gram)), jnp.zeros_like(gram))
    return jnp.sum(combined, 0), state


def _gradvac(gram: Array, losses: Array, mask: Array, key: Array, state: Any) -> tuple[Array, Any]:
    """PCGrad with moving averages of the cosines as goals. Source: Wang et al. 2021 (Gradient Vaccine)."""
    del losses
    combined, met = _surgery(gram, mask, _orders(key, len(gram)), state["goal"])
    return jnp.sum(combined, 0), {"goal": (1 - GRADVAC_RATE) * state["goal"] + GRADVAC_RATE * met}


def _rlw(gram: Array, losses: Array, mask: Array, key: Array, state: Any) -> tuple[Array, Any]:
    """T softmax(normal): random weights. Source: Lin et al. 2022."""
    del losses
    drawn = jnp.where(mask, jax.random.normal(key, (len(gram),)), -jnp.inf)
    return jnp.where(jnp.any(mask), jax.nn.softmax(drawn) * jnp.sum(mask), 0.0), state


def weigh(aggregator: Aggregator, gram: Array, losses: Array, mask: Array, key: Array, state: Any) -> tuple[Array, Any]:
    """The aggregator's weights [T] and its new state; a single gradient is taken as it is, whatever the aggregator.

    Source: the rule for a single gradient is that of the code released with stable parallel continual learning.
    """
    weights, new = aggregator.weights(gram, losses, mask, key, state)
    return jnp.where(jnp.sum(mask) > 1, weights, mask.astype(weights.dtype)), new


def make_aggregator(
    name: str,
    *,
    alpha: float = 10.0,
    scale: str = "min",
    floor: float = 0.0,
    c: float = 0.5,
    rate: float = learned_weights.WEIGHT_RATE,
) -> Aggregator | ElementwiseAggregator:
    """The aggregator of a name. `alpha`: spcl's; `scale` and its `floor`: spcl's and Aligned-MTL's; `c`: CAGrad's;
    `rate`: with which UW and GradNorm learn their weights.

    Raises: `KeyError` for an unknown name.
    """
    if name == "spcl":
        return _spcl(alpha=alpha, scale=scale, floor=floor)
    if name == "spcl-released":
        return _spcl_released(alpha=alpha, scale=scale, floor=floor)
    if name == "aligned-mtl":
        return _aligned(scale=scale, floor=floor)
    if name == "cagrad":
        return _plain(functools.partial(_cagrad, c=c))
    if name == "uw":
        return Aggregator(learned_weights.uw_state, functools.partial(learned_weights.uw, rate=rate), True)
    if name == "gradnorm":
        return Aggregator(learned_weights.gradnorm_state, functools.partial(learned_weights.gradnorm, rate=rate), True)
    return AGGREGATORS[name]


AGGREGATORS: dict[str, Aggregator | ElementwiseAggregator] = {
    "sum": _plain(_sum_rule),
    "mean": _plain(_mean_rule),
    "norm": _plain(_norm_rule),
    "mgda": _plain(simplex.mgda),
    "nmgda": _plain(simplex.nmgda),
    "pcgrad": Aggregator(_nothing, _pcgrad),
    "gradvac": Aggregator(lambda width: {"goal": jnp.zeros((width, width))}, _gradvac),
    "cagrad": _plain(functools.partial(_cagrad, c=0.5)),
    "imtl-g": _plain(_imtl),
    "aligned-mtl": _aligned(),
    "upgrad": _plain(_upgrad),
    "dualproj": _plain(_dual),
    "config": _plain(_config),
    "rlw": Aggregator(_nothing, _rlw),
    "dwa": Aggregator(learned_weights.dwa_state, learned_weights.dwa, needs_losses=True),
    "nash-mtl": _plain(_nash),
    "graddrop": GRADDROP,
    "uw": Aggregator(learned_weights.uw_state, learned_weights.uw, needs_losses=True),
    "gradnorm": Aggregator(learned_weights.gradnorm_state, learned_weights.gradnorm, needs_losses=True),
    "maxdo": _plain(simplex.maxdo),
    "emgd": Aggregator(lambda width: {"length": jnp.zeros(width)}, simplex.emgd),
    "spcl": _spcl(),
    "spcl-released": _spcl_released(),
    "pcgrad-released": Aggregator(_nothing, released.pcgrad),
    "graddrop-released": released.GRADDROP,
    "imtl-g-released": _plain(released.imtl_g),
    "rlw-released": Aggregator(_nothing, released.rlw),
    "dwa-released": Aggregator(released.dwa_state, released.dwa, needs_losses=True),
    "maxdo-released": _plain(released.maxdo),
}
"""Aggregators by name, with their papers' settings; `make_aggregator` for others."""
