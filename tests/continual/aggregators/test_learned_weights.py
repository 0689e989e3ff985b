"""Learned weights: what they tend to, and that an absent task's stay."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.continual.aggregators.gram_weights import AGGREGATORS
from stabletrain.continual.aggregators.learned_weights import gradnorm, gradnorm_state, uw, uw_state

ROWS = jnp.array([[2.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 0.5]])


def after(rule: Any, state: Any, losses: Any, steps: int) -> tuple[jax.Array, Any]:
    """Weights and state after steps with constant gradients and the losses that `losses(step)` gives."""
    gram, mask = ROWS @ ROWS.T, jnp.ones(3, bool)

    def step(state: Any, number: jax.Array) -> tuple[Any, jax.Array]:
        weights, new = rule(gram, losses(number), mask, jax.random.key(0), state)
        return new, weights

    state, found = jax.lax.scan(step, state, jnp.arange(steps))
    return found[-1], state


def test_uncertainties_tend_to_half_the_inverse_loss():
    losses = jnp.array([0.2, 0.5, 2.0])
    weights, _ = after(uw, uw_state(3), lambda step: losses, 1000)
    np.testing.assert_allclose(weights, 0.5 / losses, rtol=1e-3)


def test_gradnorm_balances_the_lengths():
    """Tasks that fall behind alike get equal lengths, w_i ||g_i||; one that falls behind more gets a larger weight.

    Adam on signs ends in a cycle of its rate's size, 0.002 here, around each weight.
    """
    first, rule = jnp.array([1.0, 2.0, 1.0]), functools.partial(gradnorm, rate=2e-3)
    alike, _ = after(rule, gradnorm_state(3), lambda step: jnp.where(step == 0, first, first / 2), 2000)
    expected = 1 / np.array([2.0, 5.0, 0.5])
    np.testing.assert_allclose(alike, 3 * expected / expected.sum(), atol=0.01)
    left = jnp.array([0.5, 0.9, 0.5])
    behind, _ = after(rule, gradnorm_state(3), lambda step: jnp.where(step == 0, first, left * first), 2000)
    assert behind[1] > alike[1] + 0.05
    assert float(behind.sum()) == pytest.approx(3, rel=1e-5)


@pytest.mark.parametrize("name", ["uw", "gradnorm", "dwa", "emgd"])
def test_an_absent_task_s_memory_stays(name):
    aggregator = AGGREGATORS[name]
    state, gram, losses = aggregator.init(3), ROWS @ ROWS.T, jnp.array([1.0, 2.0, 3.0])
    for mask in ([True, True, True], [True, False, True], [True, False, True]):
        before, state = state, aggregator.weights(gram, losses, jnp.array(mask), jax.random.key(0), state)[1]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        assert old[1] == new[1]
    moved = [bool((o != n).any()) for o, n in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True)]
    assert any(moved) or name in ("dwa", "emgd")  # with constant losses and gradients these two are at rest


def test_a_rate_of_learning_is_a_setting():
    from stabletrain.continual.aggregators.gram_weights import make_aggregator

    for name in ("uw", "gradnorm"):
        still = make_aggregator(name, rate=0.0)
        args = (ROWS @ ROWS.T, jnp.array([1.0, 2.0, 3.0]), jnp.ones(3, bool), jax.random.key(0))
        _, state = still.weights(*args, still.init(3))
        np.testing.assert_allclose(still.weights(*args, state)[0], 1.0)
        _, state = AGGREGATORS[name].weights(*args, AGGREGATORS[name].init(3))
        assert np.abs(AGGREGATORS[name].weights(*args, state)[0] - 1).max() > 1e-3
