"""Gradient aggregators as weights on gradients, from their Gram matrix: the update is sum_i w_i g_i.

An aggregator has `init(width)`, what it remembers before the first step, and
`weights(gram, losses, mask, key, state)` -> (weights [T], new state). gram: [T, T] with zero rows and columns for the
gradients that are off (`mask` False), whose weight is 0; the width is fixed, so that everything runs under jit. Rows
keep their identity from step to step. The rules are those of the papers named with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stabletrain.methods import spcl

Array = jax.Array
Weigh = Callable[[Array, Array, Array, Array, Any], tuple[Array, Any]]

MGDA_STEPS = 250
CAGRAD_STEPS = 400
DUAL_SWEEPS = 200
GRADVAC_RATE = 0.01
DWA_TEMPERATURE = 2.0


@dataclass(frozen=True)
class Aggregator:
    """A named rule; `init` and `weights` as above."""

    init: Callable[[int], Any]
    weights: Weigh


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


def _norms(gram: Array) -> Array:
    return jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0.0))


def _over(values: Array, divisor: Array) -> Array:
    """values / divisor, 0 where the divisor is 0."""
    return jnp.where(divisor > 0, values / jnp.where(divisor > 0, divisor, 1.0), 0.0)


def _mean(mask: Array) -> Array:
    return mask / jnp.maximum(jnp.sum(mask), 1)


def _sum_rule(gram: Array, mask: Array) -> Array:
    del gram
    return mask.astype(jnp.float32)


def _mean_rule(gram: Array, mask: Array) -> Array:
    del gram
    return _mean(mask)


def _norm_rule(gram: Array, mask: Array) -> Array:
    del mask
    return _over(jnp.ones(len(gram)), _norms(gram))


def _shortest(gram: Array, mask: Array) -> Array:
    """argmin over the simplex of a^T M a, by Frank-Wolfe with exact line search. Source: Sener and Koltun 2018."""

    def step(_: int, a: Array) -> Array:
        slope = gram @ a
        corner = jax.nn.one_hot(jnp.argmin(jnp.where(mask, slope, jnp.inf)), len(gram))
        way = corner - a
        length = way @ gram @ way
        share = jnp.clip(_over(-(way @ slope), length), 0.0, 1.0)
        return a + share * way

    return lax.fori_loop(0, MGDA_STEPS, step, _mean(mask))


def _normalized_shortest(gram: Array, mask: Array) -> Array:
    """MGDA's weights of the unit gradients, on the gradients as they are."""
    inverse = _over(jnp.ones(len(gram)), _norms(gram))
    return _shortest(inverse[:, None] * gram * inverse[None, :], mask)


def _aligned(gram: Array, mask: Array, *, scale: str) -> Array:
    """sigma V Sigma^-1 V^T 1. Source: Senushkin et al. 2023 (Aligned-MTL), with unit task weights."""
    del mask
    return spcl.scale_of(gram, scale) * jnp.sum(spcl.polar_weights(gram), 1)


def _imtl(gram: Array, mask: Array) -> Array:
    """Equal projections on all unit gradients: M a = ||g||, scaled to sum 1. Source: Liu et al. 2021 (IMTL-G)."""
    values, vectors = jnp.linalg.eigh(gram)
    inverse = jnp.where(values > 1e-7 * len(gram) * values[-1], 1.0 / jnp.where(values > 0, values, 1.0), 0.0)
    raw = vectors @ (inverse * (vectors.T @ _norms(gram)))
    total = jnp.sum(raw)
    return jnp.where(jnp.abs(total) > 0, raw / jnp.where(total == 0, 1.0, total), _mean(mask))


def _cagrad(gram: Array, mask: Array, *, c: float) -> Array:
    """min over the simplex of g_w . g_0 + c ||g_0|| ||g_w||, then g_0 + c ||g_0|| / ||g_w|| g_w.

    Source: Liu et al. 2021 (CAGrad), without a final rescaling. Exponentiated gradient steps on the scaled Gram matrix.
    """
    mean = _mean(mask)
    scale = jnp.max(jnp.diagonal(gram))
    scaled = gram / jnp.where(scale > 0, scale, 1.0)
    length = jnp.sqrt(jnp.maximum(mean @ scaled @ mean, 0.0))

    def step(i: int, w: Array) -> Array:
        slope = scaled @ mean + c * length * _over(scaled @ w, jnp.sqrt(jnp.maximum(w @ scaled @ w, 1e-20)))
        log = jnp.where(mask, jnp.log(jnp.maximum(w, 1e-30)) - 2.0 * slope, -jnp.inf)
        return jnp.where(jnp.any(mask), jax.nn.softmax(log), w)

    w = lax.fori_loop(0, CAGRAD_STEPS, step, mean)
    return mean + c * length * _over(w, jnp.sqrt(jnp.maximum(w @ scaled @ w, 0.0)))


def _project_on_dual_cone(gram: Array, target: Array, mask: Array) -> Array:
    """argmin over v >= target of v^T M v, by coordinate descent. target: [T]."""
    scale = jnp.max(jnp.diagonal(gram))
    scaled = gram / jnp.where(scale > 0, scale, 1.0)

    def coordinate(k: Array, v: Array) -> Array:
        best = v[k] - _over(scaled[k] @ v, scaled[k, k])
        return v.at[k].set(jnp.where(mask[k], jnp.maximum(best, target[k]), 0.0))

    return lax.fori_loop(0, DUAL_SWEEPS * len(gram), lambda i, v: coordinate(i % len(gram), v), target)


def _dual(gram: Array, mask: Array) -> Array:
    """The mean gradient projected on the dual cone: no task's loss rises."""
    return _project_on_dual_cone(gram, _mean(mask), mask)


def _upgrad(gram: Array, mask: Array) -> Array:
    """Each gradient projected on the dual cone, in the mean. Source: Quinton and Rey 2024 (Jacobian descent)."""
    each = jax.vmap(lambda row: _project_on_dual_cone(gram, row, mask))(jnp.diag(mask.astype(jnp.float32)))
    return jnp.sum(each, 0) / jnp.maximum(jnp.sum(mask), 1)


def _config(gram: Array, mask: Array) -> Array:
    """Equal cosines with all gradients, length the sum of the projections. Source: Liu et al. 2024 (ConFIG)."""
    inverse = _over(jnp.ones(len(gram)), _norms(gram))
    unit = inverse[:, None] * gram * inverse[None, :]
    values, vectors = jnp.linalg.eigh(unit)
    kept = values > 1e-6 * len(gram)
    direction = vectors @ (jnp.where(kept, 1.0 / jnp.where(kept, values, 1.0), 0.0) * (vectors.T @ mask))
    weights = inverse * direction
    length = jnp.sqrt(jnp.maximum(weights @ gram @ weights, 0.0))
    weights = _over(weights, length)
    return weights * jnp.sum(jnp.where(mask, gram @ weights, 0.0))


# --- with draws or a memory -------------------------------------------------------------------------------------------


def _surgery(gram: Array, mask: Array, order: Array, cosine_goal: Array) -> tuple[Array, Array]:
    """Each gradient in turn, over the others in `order` [T, T]: raised to the goal cosine where it is below it.

    Returns the matrix of combinations (row i: weights of g_i') and the cosines that were met [T, T]. A goal of 0 is
    PCGrad's projection.
    """
    norms, count = _norms(gram), len(gram)

    def one(i: Array) -> tuple[Array, Array]:
        def visit(place: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            own, met = carry
            j = order[i, place]
            length = jnp.sqrt(jnp.maximum(own @ gram @ own, 0.0))
            cosine = jnp.clip(_over(own @ gram[j], length * norms[j]), -1.0, 1.0)
            goal = cosine_goal[i, j]
            other = jnp.sqrt(jnp.maximum(1 - goal**2, 1e-12))
            factor = length * (goal * jnp.sqrt(jnp.maximum(1 - cosine**2, 0.0)) - cosine * other)
            factor = _over(factor, norms[j] * other)
            use = (cosine < goal) & (i != j) & mask[i] & mask[j] & (norms[j] > 0)
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


def _dwa(gram: Array, losses: Array, mask: Array, key: Array, state: Any) -> tuple[Array, Any]:
    """T softmax(r / 2), r = l_(k-1) / l_(k-2) of the task's own last two steps; r = 1 before.

    Source: Liu et al. 2019.
    """
    del gram, key
    one, two = state["last"], state["before"]
    rate = jnp.where((one > 0) & (two > 0), one / jnp.where(two > 0, two, 1.0), 1.0)
    logits = jnp.where(mask, rate / DWA_TEMPERATURE, -jnp.inf)
    weights = jnp.where(jnp.any(mask), jax.nn.softmax(logits) * jnp.sum(mask), 0.0)
    return weights, {"last": jnp.where(mask, losses, one), "before": jnp.where(mask, one, two)}


def _two_losses(width: int) -> dict[str, Array]:
    return {"last": jnp.zeros(width), "before": jnp.zeros(width)}


def make_aggregator(name: str, *, alpha: float = 10.0, scale: str = "min", c: float = 0.5) -> Aggregator:
    """The aggregator of a name. `alpha`: spcl's; `scale`: spcl's and Aligned-MTL's; `c`: CAGrad's."""
    if name in ("spcl", "spcl-released"):
        solve = spcl.orthogonal_decomposition if name == "spcl" else spcl.released_decomposition
        return _plain(lambda gram, mask: solve(gram, alpha=alpha, scale=scale))
    if name == "aligned-mtl":
        return _plain(functools.partial(_aligned, scale=scale))
    if name == "cagrad":
        return _plain(functools.partial(_cagrad, c=c))
    return AGGREGATORS[name]


AGGREGATORS: dict[str, Aggregator] = {
    "sum": _plain(_sum_rule),
    "mean": _plain(_mean_rule),
    "norm": _plain(_norm_rule),
    "mgda": _plain(_shortest),
    "nmgda": _plain(_normalized_shortest),
    "pcgrad": Aggregator(_nothing, _pcgrad),
    "gradvac": Aggregator(lambda width: {"goal": jnp.zeros((width, width))}, _gradvac),
    "cagrad": _plain(functools.partial(_cagrad, c=0.5)),
    "imtl-g": _plain(_imtl),
    "aligned-mtl": _plain(functools.partial(_aligned, scale="min")),
    "upgrad": _plain(_upgrad),
    "dualproj": _plain(_dual),
    "config": _plain(_config),
    "rlw": Aggregator(_nothing, _rlw),
    "dwa": Aggregator(_two_losses, _dwa),
    "spcl": _plain(lambda gram, mask: spcl.orthogonal_decomposition(gram, alpha=10.0, scale="min")),
    "spcl-released": _plain(lambda gram, mask: spcl.released_decomposition(gram)),
}
"""Aggregators by name, with their papers' settings; `make_aggregator` for others."""
