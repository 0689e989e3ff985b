"""From the slots of a step to one update: gradients, Gram matrix, weights, and their sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stabletrain.continual.aggregators.elementwise import (
    ElementwiseAggregator,
    add_parts,
    chosen_of,
    combine_elements,
    uniforms,
)
from stabletrain.continual.aggregators.gram_weights import Aggregator, make_aggregator, weigh
from stabletrain.continual.aggregators.learned_weights import WEIGHT_RATE
from stabletrain.continual.aggregators.transform import gram_matrix, weighted_sum
from stabletrain.continual.baselines import RULES
from stabletrain.continual.config import ContinualConfig, filled
from stabletrain.continual.indicators import condition, gram_indicators

Array = jax.Array
Params = Any
SlotLoss = Callable[[Params, Mapping[str, Array]], tuple[Array, dict[str, Any]]]


@dataclass(frozen=True)
class Aggregated:
    """An update and what it was made of. K slots."""

    update: Params
    losses: Array  # [K]
    indicators: dict[str, Array]
    state: Any
    auxiliary: dict[str, Any]  # each leaf with the slots first


class Aggregation:
    """A rehearsal rule or a gradient aggregator, by configuration.

    Rules tell the memory from the active tasks and weigh the mean gradient of the latter; aggregators treat the memory
    as one task more, and remember by identity (`width` of them) whatever slot a gradient comes in.
    """

    def __init__(self, config: ContinualConfig, width: int) -> None:
        self.name = filled(config.aggregator)
        self.width = width
        self._memory = config.gradient_memory
        self._float64 = config.gram_precision == "float64"
        self._rule = RULES.get(self.name)
        self._aggregator: Aggregator | ElementwiseAggregator | None = None
        if self._rule is None:
            self._aggregator = make_aggregator(
                self.name,
                alpha=10.0 if config.decomposition_alpha is None else config.decomposition_alpha,
                scale=config.aggregator_scale or "min",
                floor=config.scale_floor or 0.0,
                rate=WEIGHT_RATE if config.weight_rate is None else config.weight_rate,
            )

    def init(self) -> Any:
        """What the aggregator remembers before the first step; {} for a rule and for one of single elements."""
        return self._aggregator.init(self.width) if isinstance(self._aggregator, Aggregator) else {}

    def update(
        self,
        loss_of: SlotLoss,
        params: Params,
        slots: Mapping[str, Array],
        *,
        on: Array,
        current: Array,
        memory: Array,
        identity: Array,
        state: Any,
        key: Array,
    ) -> Aggregated:
        """The aggregate of the gradients of the slots that are `on` [K]; a single gradient is taken as it is."""

        if isinstance(self._aggregator, ElementwiseAggregator):
            select = _elements_at_once if self._memory == "fast" else _elements_one_by_one
            return select(self._aggregator, loss_of, params, slots, on, key, state)

        def weights_of(losses: Array, gram: Array) -> tuple[Array, Any, dict[str, Array]]:
            if self._rule is not None:
                weights = self._rule(gram, losses, current, memory)
                return jnp.where(jnp.sum(on) > 1, weights, on.astype(weights.dtype)), state, {}
            assert isinstance(self._aggregator, Aggregator)
            # By identity, which is unique among the slots that are on; the others fall off the end.
            place = jnp.where(on, identity, self.width)
            whole = jnp.zeros((self.width, self.width), gram.dtype)
            rows = whole.at[place[:, None], place[None, :]].set(gram, mode="drop")
            kept = jnp.zeros(self.width, gram.dtype).at[place].set(losses, mode="drop")
            mask = jnp.zeros(self.width, bool).at[place].set(on, mode="drop")
            if self._aggregator.columns is None:
                weights, new = weigh(self._aggregator, rows, kept, mask, key, state)
                return jnp.where(on, weights[identity], 0.0), new, {}
            columns, length = self._aggregator.columns(rows, mask)
            weights = jnp.where(jnp.sum(on) > 1, length * jnp.sum(columns, 1), mask.astype(rows.dtype))
            after = {"condition_after": condition(columns.T @ rows @ columns, mask)}
            return jnp.where(on, weights[identity], 0.0), state, after

        if self._memory == "fast":
            return _at_once(loss_of, params, slots, on, weights_of, float64=self._float64)
        return _one_by_one(loss_of, params, slots, on, weights_of)


WeightsOf = Callable[[Array, Array], tuple[Array, Any, dict[str, Array]]]


def _weigh_and_judge(
    losses: Array, gram: Array, on: Array, weights_of: WeightsOf
) -> tuple[Array, Any, dict[str, Array]]:
    """Weights, the aggregator's new state, and the indicators of sum_i w_i g_i."""
    weights, new, after = weights_of(losses, gram)
    slopes = gram @ weights
    return weights, new, {**gram_indicators(gram, on, slopes, weights @ slopes), **after}


def _in_float64(
    losses: Array, gradients: Params, on: Array, weights_of: WeightsOf
) -> tuple[Array, Any, dict[str, Array]]:
    """The same with the Gram matrix and all that is made of it in float64; results in float32."""
    with jax.enable_x64(True):
        gram = gram_matrix(gradients, jnp.float64)
        found = _weigh_and_judge(losses.astype(jnp.float64), gram, on, weights_of)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found)


def _all_gradients(loss_of: SlotLoss, params: Params, slots: Any, on: Array) -> tuple[Array, dict[str, Any], Params]:
    """Losses [K], what comes beside them, and gradients [K, ...] by one vmapped backward pass; zeros where off."""
    differentiate = jax.vmap(jax.value_and_grad(loss_of, has_aux=True), in_axes=(None, 0))
    (losses, auxiliary), gradients = differentiate(params, slots)
    gradients = jax.tree.map(lambda g: jnp.where(on.reshape(-1, *[1] * (g.ndim - 1)), g, 0.0), gradients)
    return losses, auxiliary, gradients


def _at_once(
    loss_of: SlotLoss, params: Params, slots: Any, on: Array, weights_of: WeightsOf, *, float64: bool
) -> Aggregated:
    """All gradients are held together, K times the parameters."""
    losses, auxiliary, gradients = _all_gradients(loss_of, params, slots, on)
    if float64:
        weights, new, indicators = _in_float64(losses, gradients, on, weights_of)
    else:
        weights, new, indicators = _weigh_and_judge(losses, gram_matrix(gradients), on, weights_of)
    return Aggregated(weighted_sum(weights, gradients), losses, indicators, new, auxiliary)


def _elements_at_once(
    rule: ElementwiseAggregator, loss_of: SlotLoss, params: Params, slots: Any, on: Array, key: Array, state: Any
) -> Aggregated:
    """The rule on the leaves of all gradients."""
    losses, auxiliary, gradients = _all_gradients(loss_of, params, slots, on)
    update = combine_elements(rule, gradients, on, key)
    rows = zip(jax.tree.leaves(gradients), jax.tree.leaves(update), strict=True)
    slopes = sum(
        (jnp.tensordot(g.reshape(len(on), -1), u.reshape(-1), 1, precision="highest") for g, u in rows),
        start=jnp.zeros(len(on)),
    )
    indicators = gram_indicators(gram_matrix(gradients), on, slopes, _square(update))
    return Aggregated(update, losses, indicators, state, auxiliary)


def _square(update: Params) -> Array:
    return sum((jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(update)), start=jnp.zeros(()))


# --- one gradient at a time -------------------------------------------------------------------------------------------


def _slot_at(slots: Any, i: Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], slots)


def _slope_along(loss_of: SlotLoss, params: Params, slot: Any, direction: Params) -> Array:
    """<g, direction> of the slot's gradient g, by forward mode."""
    return jax.jvp(lambda p: loss_of(p, slot)[0], (params,), (direction,))[1]


def _gram_one_by_one(loss_of: SlotLoss, params: Params, slots: Any, on: Array) -> tuple[Array, Array, dict[str, Any]]:
    """Losses [K], Gram matrix [K, K] and auxiliaries: <g_i, g_j> is the derivative of loss j along g_i."""
    count = len(on)

    def row_of(i: Array) -> tuple[Array, Array, dict[str, Any]]:
        (loss, auxiliary), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, _slot_at(slots, i))

        def along(j: Array) -> Array:
            wanted = on[i] & on[j] & (j >= i)
            return lax.cond(
                wanted,
                lambda: _slope_along(loss_of, params, _slot_at(slots, j), gradient),
                lambda: jnp.zeros(()),
            )

        return loss, lax.map(along, jnp.arange(count)), auxiliary

    losses, upper, auxiliary = lax.map(row_of, jnp.arange(count))
    return losses, upper + upper.T - jnp.diag(jnp.diagonal(upper)), auxiliary


def _accumulated(
    loss_of: SlotLoss, params: Params, slots: Any, wanted: Array, add: Callable[[Array, Any, Params], Any], start: Any
) -> Any:
    """`add(i, total, gradient of slot i)` over the slots that are wanted; the others cost nothing."""

    def body(i: Array, total: Any) -> Any:
        def added() -> Any:
            return add(i, total, jax.grad(lambda p: loss_of(p, _slot_at(slots, i))[0])(params))

        return lax.cond(wanted[i], added, lambda: total)

    return lax.fori_loop(0, len(wanted), body, start)


def _one_by_one(loss_of: SlotLoss, params: Params, slots: Any, on: Array, weights_of: WeightsOf) -> Aggregated:
    """Never more than two gradients at a time.

    Two backward passes for each gradient, and one forward-mode pass for each pair; slots that are off cost nothing. The
    Gram matrix and the update are those of `_at_once` up to rounding.
    """
    losses, gram, auxiliary = _gram_one_by_one(loss_of, params, slots, on)
    weights, new, indicators = _weigh_and_judge(losses, gram, on, weights_of)

    def add(i: Array, total: Params, gradient: Params) -> Params:
        return jax.tree.map(lambda t, g: t + weights[i] * g, total, gradient)

    update = _accumulated(loss_of, params, slots, weights != 0, add, jax.tree.map(jnp.zeros_like, params))
    return Aggregated(update, losses, indicators, new, auxiliary)


def _elements_one_by_one(
    rule: ElementwiseAggregator, loss_of: SlotLoss, params: Params, slots: Any, on: Array, key: Array, state: Any
) -> Aggregated:
    """The rule's sums in one pass over the slots, the update in a second one: a few times the parameters, not K."""
    losses, gram, auxiliary = _gram_one_by_one(loss_of, params, slots, on)
    nothing = jax.tree.map(jnp.zeros_like, params)
    none = jax.tree.map(lambda leaf: tuple(jnp.zeros_like(part) for part in rule.parts(leaf)), params)
    sums = _accumulated(loss_of, params, slots, on, lambda i, total, g: add_parts(rule, total, g), none)
    drawn = uniforms(key, params)

    def add(i: Array, total: Params, gradient: Params) -> Params:
        return jax.tree.map(jnp.add, total, chosen_of(rule, gradient, sums, drawn))

    update = _accumulated(loss_of, params, slots, on, add, nothing)

    def slope(i: Array) -> Array:
        found = _slope_along(loss_of, params, _slot_at(slots, i), update)
        return jnp.where(on[i], found, 0.0)

    slopes = lax.map(slope, jnp.arange(len(on)))
    indicators = gram_indicators(gram, on, slopes, _square(update))
    return Aggregated(update, losses, indicators, state, auxiliary)
