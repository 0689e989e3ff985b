"""Rehearsal rules: golden values, and what each promises."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.continual.baselines import RULES
from stabletrain.continual.presets import REHEARSAL_RULE_NAMES

GOLDEN = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # memory, current
CURRENT, MEMORY = jnp.array([False, True]), jnp.array([True, False])


def update(name: str, rows, current=CURRENT, memory=MEMORY, losses=None) -> np.ndarray:
    losses = jnp.ones(len(rows)) if losses is None else jnp.asarray(losses)
    return np.asarray(jax.jit(RULES[name])(rows @ rows.T, losses, current, memory) @ rows)


def test_names_are_those_of_the_options():
    assert tuple(RULES) == REHEARSAL_RULE_NAMES


def test_agem_projects_the_current_gradient_on_the_memory_s_normal_plane():
    found = update("agem", GOLDEN)
    np.testing.assert_allclose(found, [1.1111111, 2.2222222, 2.2222222], rtol=1e-6)
    assert abs(found @ np.asarray(GOLDEN[0])) < 1e-5  # float32 at magnitudes of 10


def test_agem_leaves_a_gradient_that_does_not_conflict():
    rows = jnp.array([[1.0, 2.0], [3.0, 0.5]])
    np.testing.assert_allclose(update("agem", rows), rows[1])


def test_er_is_the_mean_of_memory_and_mean_current_gradient():
    rows = jnp.array([[2.0, 0.0], [0.0, 4.0], [0.0, 8.0]])
    current, memory = jnp.array([False, True, True]), jnp.array([True, False, False])
    np.testing.assert_allclose(update("er", rows, current, memory), [1.0, 3.0])
    np.testing.assert_allclose(update("replay-sum", rows, current, memory), [2.0, 6.0])


@pytest.mark.parametrize("name", RULES)
def test_without_a_memory_the_update_is_the_current_gradient(name):
    rows = jnp.array([[7.0, 7.0], [0.0, 4.0], [2.0, 8.0]])
    current, memory = jnp.array([False, True, True]), jnp.zeros(3, bool)
    np.testing.assert_allclose(update(name, rows, current, memory), [1.0, 6.0], rtol=1e-6)


def test_mega_weighs_the_memory_by_the_ratio_of_losses():
    np.testing.assert_allclose(update("mega", GOLDEN, losses=[0.4, 0.8]), GOLDEN[1] + 0.5 * GOLDEN[0])
    np.testing.assert_allclose(update("mega", GOLDEN, losses=[0.4, 0.05]), GOLDEN[0])
    np.testing.assert_allclose(update("mega-released", GOLDEN, losses=[0.4, 0.8]), GOLDEN[0] + 0.5 * GOLDEN[1])
    np.testing.assert_allclose(update("mega-released", GOLDEN, losses=[0.4, 0.05]), GOLDEN[1])


def test_gem_conflicts_with_no_finished_task():
    """Random problems with more directions than tasks; the ridge of 1e-3 leaves a slack of about its size."""
    rng = np.random.default_rng(0)
    conflicts = 0
    for _ in range(50):
        rows = jnp.asarray(rng.standard_normal((5, 12)), jnp.float32)
        memory, current = jnp.array([True, True, True, False, False]), jnp.array([False, False, False, True, True])
        mean = np.asarray(rows[3:].mean(0))
        found = update("gem", rows, current, memory)
        products = np.asarray(rows[:3]) @ found
        if (np.asarray(rows[:3]) @ mean < 0).any():
            conflicts += 1
            assert products.min() > -0.1
        else:
            np.testing.assert_allclose(found, mean, rtol=1e-5)
    assert conflicts > 20


def test_gem_with_one_task_and_no_margin_would_be_agem():
    """The dual of one constraint in closed form: v = max(margin, -<g, g_1> / (||g_1||^2 + ridge)), at unit scale."""
    rows = jnp.array([[1.0, 0.0], [-0.9, 0.1]])
    scale = 1.0  # the largest squared norm
    expected = max(0.5, 0.9 / (1.0 / scale + 1e-3))
    np.testing.assert_allclose(update("gem", rows), rows[1] + expected * rows[0], atol=1e-6)  # cancels
