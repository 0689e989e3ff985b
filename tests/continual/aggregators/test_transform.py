"""Aggregators on pytrees and as an optax transformation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stabletrain.continual.aggregators.gram_weights import AGGREGATORS
from stabletrain.continual.aggregators.transform import aggregate, aggregate_tasks, gram_matrix, weighted_sum

GOLDEN = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])


def tree(seed: int = 0, tasks: int = 3) -> dict[str, Any]:
    """Task gradients [T, ...] of a small network."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (tasks, 4, 3), "bias": (tasks, 3)}
    return {"layer": {name: jnp.asarray(rng.standard_normal(s), jnp.float32) for name, s in shapes.items()}}


def flat(gradients: Any) -> np.ndarray:
    """[T, P]."""
    return np.hstack([np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(gradients)])


def test_the_gram_matrix_is_that_of_all_parameters():
    np.testing.assert_allclose(gram_matrix(tree()), flat(tree()) @ flat(tree()).T, rtol=1e-5)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree())
    assert gram_matrix(half).dtype == jnp.float32
    assert weighted_sum(jnp.ones(3), half)["layer"]["bias"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_aggregator_is_a_transformation(name):
    """One update of the shape of the parameters, under jit, and its state as before in structure and types."""
    gradients = tree()
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), gradients)
    optimizer = optax.chain(aggregate_tasks(name, tasks=3), optax.adam(0.1))
    state = optimizer.init(params)
    losses = jnp.array([1.0, 2.0, 3.0])
    update = jax.jit(optimizer.update)
    updates, new = update(gradients, state, params, losses=losses)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(updates))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), new) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    update(gradients, new, params, losses=losses)


def test_the_transformation_is_the_weights_times_the_gradients():
    gradients = {"a": jnp.asarray(GOLDEN[:, :1], jnp.float32), "b": jnp.asarray(GOLDEN[:, 1:], jnp.float32)}
    transform = aggregate_tasks("upgrad", tasks=2)
    update, _ = transform.update(gradients, transform.init({}))
    np.testing.assert_allclose(np.hstack(jax.tree.leaves(update)), (0.2929, 1.9004, 1.9004), atol=1e-3)


@pytest.mark.parametrize("name", ["norm", "spcl", "graddrop", "gradnorm"])
def test_a_single_gradient_is_taken_as_it_is(name):
    transform = aggregate_tasks(name, tasks=3)
    gradients = tree(1)
    update, _ = transform.update(
        gradients, transform.init({}), losses=jnp.ones(3), mask=jnp.array([False, True, False])
    )
    for found, leaf in zip(jax.tree.leaves(update), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_array_equal(found, leaf[1])


def test_draws_follow_the_count_of_updates_and_the_seed():
    transform = aggregate_tasks("graddrop", tasks=3, seed=1)
    state = transform.init({})
    first, after = transform.update(tree(), state)
    again, _ = transform.update(tree(), state)
    second, _ = transform.update(tree(), after)
    other, _ = aggregate_tasks("graddrop", tasks=3, seed=2).update(tree(), state)
    name = ("layer", "kernel")
    values = [np.asarray(found[name[0]][name[1]]) for found in (first, again, second, other)]
    assert (values[0] == values[1]).all()
    assert (values[0] != values[2]).any()
    assert (values[0] != values[3]).any()


def test_what_an_aggregator_remembers_is_in_the_state():
    """Two updates in one go, and with the state put aside in between, are the same."""
    transform = aggregate_tasks("gradnorm", tasks=3, rate=0.5)
    losses = jnp.array([1.0, 2.0, 3.0])
    _, state = transform.update(tree(), transform.init({}), losses=losses)
    saved = jax.tree.map(np.asarray, state)
    one, _ = transform.update(tree(), state, losses=losses)
    two, _ = transform.update(tree(), jax.tree.map(jnp.asarray, saved), losses=losses)
    fresh, _ = transform.update(tree(), transform.init({}), losses=losses)
    np.testing.assert_array_equal(one["layer"]["bias"], two["layer"]["bias"])
    assert (one["layer"]["bias"] != fresh["layer"]["bias"]).any()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="weighs by the losses"):
        aggregate(AGGREGATORS["uw"], tree(), state=AGGREGATORS["uw"].init(3))
    with pytest.raises(ValueError, match="first axes here"):
        aggregate(AGGREGATORS["sum"], {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}, state={})
