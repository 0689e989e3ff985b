"""From the slots of a step to one update: gradients, Gram matrix, weights, and their sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stabletrain.continual.aggregators.gram_weights import Aggregator, make_aggregator
from stabletrain.continual.baselines import RULES
from stabletrain.continual.config import ContinualConfig, filled

Array = jax.Array
Params = Any
SlotLoss = Callable[[Params, Mapping[str, Array]], tuple[Array, dict[str, Any]]]


@dataclass(frozen=True)
class Aggregated:
    """An update and what it was made of. K slots."""

    update: Params
    losses: Array  # [K]
    gram: Array  # [K, K]
    weights: Array  # [K]
    state: Any
    auxiliary: dict[str, Any]  # each leaf with the slots first
    indicators: dict[str, Array]


class Aggregation:
    """A rehearsal rule or a gradient aggregator, by configuration.

    Rules tell the memory from the active tasks and weigh the mean gradient of the latter; aggregators treat the memory
    as one task more, and remember by identity (`width` of them) whatever slot a gradient comes in.
    """

    def __init__(self, config: ContinualConfig, width: int) -> None:
        self.name = filled(config.aggregator)
        self.width = width
        self._memory = config.gradient_memory
        self._rule = RULES.get(self.name)
        self._aggregator: Aggregator | None = None
        if self._rule is None:
            self._aggregator = make_aggregator(
                self.name,
                alpha=10.0 if config.decomposition_alpha is None else config.decomposition_alpha,
                scale=config.aggregator_scale or "min",
            )

    def init(self) -> Any:
        """What the aggregator remembers before the first step; {} for a rule."""
        return {} if self._aggregator is None else self._aggregator.init(self.width)

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

        def weigh(losses: Array, gram: Array) -> tuple[Array, Any]:
            if self._rule is not None:
                return self._rule(gram, losses, current, memory), state
            assert self._aggregator is not None
            # By identity, which is unique among the slots that are on; the others fall off the end.
            place = jnp.where(on, identity, self.width)
            rows = jnp.zeros((self.width, self.width)).at[place[:, None], place[None, :]].set(gram, mode="drop")
            kept = jnp.zeros(self.width).at[place].set(losses, mode="drop")
            mask = jnp.zeros(self.width, bool).at[place].set(on, mode="drop")
            weights, new = self._aggregator.weights(rows, kept, mask, key, state)
            return jnp.where(on, weights[identity], 0.0), new

        several = jnp.sum(on) > 1

        def weights_of(losses: Array, gram: Array) -> tuple[Array, Any]:
            weights, new = weigh(losses, gram)
            return jnp.where(several, weights, on.astype(weights.dtype)), new

        found = _at_once if self._memory == "fast" else _one_by_one
        update, losses, gram, weights, new, auxiliary = found(loss_of, params, slots, on, weights_of)
        return Aggregated(update, losses, gram, weights, new, auxiliary, {})


WeightsOf = Callable[[Array, Array], tuple[Array, Any]]
Found = tuple[Params, Array, Array, Array, Any, dict[str, Any]]


def _gram(gradients: Params) -> Array:
    """[K, K] in float32 from gradients whose leaves have K rows."""

    def of_leaf(leaf: Array) -> Array:
        rows = leaf.reshape(len(leaf), -1)
        return jnp.einsum("ip,jp->ij", rows, rows, precision="highest")

    return sum((of_leaf(leaf) for leaf in jax.tree.leaves(gradients)), start=jnp.zeros(()))


def _at_once(loss_of: SlotLoss, params: Params, slots: Any, on: Array, weights_of: WeightsOf) -> Found:
    """All gradients by one vmapped backward pass; they are held together, K times the parameters."""
    differentiate = jax.vmap(jax.value_and_grad(loss_of, has_aux=True), in_axes=(None, 0))
    (losses, auxiliary), gradients = differentiate(params, slots)
    gradients = jax.tree.map(lambda g: jnp.where(on.reshape(-1, *[1] * (g.ndim - 1)), g, 0.0), gradients)
    gram = _gram(gradients)
    weights, new = weights_of(losses, gram)
    update = jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), gradients)
    return update, losses, gram, weights, new, auxiliary


def _one_by_one(loss_of: SlotLoss, params: Params, slots: Any, on: Array, weights_of: WeightsOf) -> Found:
    """Never more than two gradients at a time: <g_i, g_j> is the derivative of loss j along g_i.

    Two backward passes for each gradient, and one forward-mode pass for each pair; slots that are off cost nothing. The
    Gram matrix and the update are those of `_at_once` up to rounding.
    """
    count = len(on)

    def slot_at(i: Array) -> Any:
        return jax.tree.map(lambda leaf: leaf[i], slots)

    def row_of(i: Array) -> tuple[Array, Array, dict[str, Any]]:
        (loss, auxiliary), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, slot_at(i))

        def along(j: Array) -> Array:
            def slope() -> Array:
                return jax.jvp(lambda p: loss_of(p, slot_at(j))[0], (params,), (gradient,))[1]

            return lax.cond(on[i] & on[j] & (j >= i), slope, lambda: jnp.zeros(()))

        return loss, lax.map(along, jnp.arange(count)), auxiliary

    losses, upper, auxiliary = lax.map(row_of, jnp.arange(count))
    gram = upper + upper.T - jnp.diag(jnp.diagonal(upper))
    weights, new = weights_of(losses, gram)

    def add(i: Array, total: Params) -> Params:
        def added() -> Params:
            gradient = jax.grad(lambda p: loss_of(p, slot_at(i))[0])(params)
            return jax.tree.map(lambda t, g: t + weights[i] * g, total, gradient)

        return lax.cond(weights[i] != 0, added, lambda: total)

    update = lax.fori_loop(0, count, add, jax.tree.map(jnp.zeros_like, params))
    return update, losses, gram, weights, new, auxiliary
