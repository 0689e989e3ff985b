"""Aggregators on pytrees of task gradients, and as an optax transformation.

tasks = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batches)      # leaves [T, ...]
optimizer = optax.chain(aggregate_tasks("spcl", tasks=5), optax.adam(1e-3))
updates, state = optimizer.update(tasks, state, params, losses=losses)    # leaves [...]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stabletrain.continual.aggregators.elementwise import ElementwiseAggregator, combine_elements
from stabletrain.continual.aggregators.gram_weights import Aggregator, make_aggregator, weigh
from stabletrain.random_keys import random_key

Array = jax.Array
Tree = Any


def gram_matrix(gradients: Tree, dtype: Any = None) -> Array:
    """M_ij = <g_i, g_j> [T, T] of a pytree whose leaves have the tasks first, leaf by leaf.

    dtype: float32 by default, float64 for gradients in float64. float64 for others, too, where 64-bit types are enabled
    (`jax.enable_x64`): products and sums are then exact to float64, and condition numbers above some 1e3 can be told.
    """

    def of_leaf(leaf: Array) -> Array:
        rows = leaf.reshape(len(leaf), -1)
        rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32) if dtype is None else dtype)
        return jnp.einsum("ip,jp->ij", rows, rows, precision="highest")

    return sum((of_leaf(leaf) for leaf in jax.tree.leaves(gradients)), start=jnp.zeros((), dtype or jnp.float32))


def weighted_sum(weights: Array, gradients: Tree) -> Tree:
    """sum_t w_t g_t, leaf by leaf, in each leaf's type."""
    return jax.tree.map(lambda leaf: jnp.tensordot(weights.astype(leaf.dtype), leaf, 1), gradients)


def aggregate(
    aggregator: Aggregator | ElementwiseAggregator,
    gradients: Tree,
    *,
    state: Any,
    mask: Array | None = None,
    losses: Array | None = None,
    key: Array | None = None,
) -> tuple[Tree, Any]:
    """The update of a pytree of task gradients [T, ...] and the aggregator's new state.

    `mask` [T]: which gradients are there, all by default; those that are not may hold anything finite. A single one is
    taken as it is. `losses` [T] for the aggregators that weigh by them, `key` for those that draw.

    Raises: `ValueError` where losses are needed and not given, or gradients are of different numbers of tasks.
    """
    leaves = jax.tree.leaves(gradients)
    counts = {len(leaf) for leaf in leaves}
    if len(counts) != 1:
        raise ValueError(f"every leaf must have the tasks as its first axis; first axes here: {sorted(counts)}")
    count = counts.pop()
    mask = jnp.ones(count, bool) if mask is None else mask
    key = random_key(0) if key is None else key
    if isinstance(aggregator, ElementwiseAggregator):
        return combine_elements(aggregator, gradients, mask, key), state
    if aggregator.needs_losses and losses is None:
        raise ValueError("this aggregator weighs by the losses: pass losses=, one for each task")
    gradients = jax.tree.map(lambda leaf: jnp.where(mask.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0.0), gradients)
    losses = jnp.ones(count) if losses is None else losses
    weights, new = weigh(aggregator, gram_matrix(gradients), losses, mask, key, state)
    return weighted_sum(weights, gradients), new


class AggregateState(NamedTuple):
    """The number of updates, from which draws follow, and what the aggregator remembers."""

    updates: Array
    aggregator: Any


def aggregate_tasks(
    rule: str | Aggregator | ElementwiseAggregator, *, tasks: int, seed: int = 0, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation from task gradients [T, ...] to one update [...], for the head of a chain.

    rule: a name of `gram_weights.AGGREGATORS`, with `settings` of `make_aggregator`, or an aggregator. tasks: T. The
    update takes `losses` [T] and `mask` [T] as extra arguments. What it remembers is part of its state, which belongs
    into checkpoints as the optimiser's does.

    Raises: `KeyError` for an unknown name, `ValueError` as `aggregate` does.
    """
    aggregator = make_aggregator(rule, **settings) if isinstance(rule, str) else rule

    def init(params: Tree) -> AggregateState:
        del params
        remembered = {} if isinstance(aggregator, ElementwiseAggregator) else aggregator.init(tasks)
        return AggregateState(jnp.zeros((), jnp.int32), remembered)

    def update(
        updates: Tree,
        state: AggregateState,
        params: Tree | None = None,
        *,
        losses: Array | None = None,
        mask: Array | None = None,
        **extra: Any,
    ) -> tuple[Tree, AggregateState]:
        del params, extra
        key = jax.random.fold_in(random_key(seed), state.updates)
        update, remembered = aggregate(
            aggregator, updates, state=state.aggregator, mask=mask, losses=losses, key=key
        )  # fmt: skip
        return update, AggregateState(state.updates + 1, remembered)

    return optax.GradientTransformationExtraArgs(init, update)
