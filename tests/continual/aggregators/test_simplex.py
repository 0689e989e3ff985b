"""Programs on the simplex: the conditions of optimality, on random gradients and on those that have a closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.continual.aggregators.simplex import agd, emgd, maxdo, mgda, minimize_on_simplex

GOLDEN = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
MGDA, MAXDO, EMGD = jax.jit(mgda), jax.jit(maxdo), jax.jit(emgd)


def gradients(seed: int, count: int = 4, dimension: int = 6) -> np.ndarray:
    """Of lengths that differ by up to a factor of about ten, with some conflict."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, dimension)) * np.exp(rng.uniform(-1, 1, (count, 1)))


def gram_of(rows: np.ndarray) -> jax.Array:
    return jnp.asarray(rows @ rows.T, jnp.float32)


@pytest.mark.parametrize("seed", range(8))
def test_a_quadratic_program_meets_its_conditions(seed):
    """All slopes of the support are equal, the others larger: to 1e-4 of the slopes, as float32 sums allow."""
    rng = np.random.default_rng(seed)
    quadratic, linear = gram_of(rng.standard_normal((5, 7))), jnp.asarray(rng.standard_normal(5), jnp.float32)
    y = np.asarray(minimize_on_simplex(quadratic, linear, jnp.ones(5, bool)), np.float64)
    slopes = np.asarray(quadratic, np.float64) @ y + np.asarray(linear)
    assert y.min() >= 0
    assert y.sum() == pytest.approx(1, abs=1e-5)
    tolerance = 1e-4 * np.abs(slopes).max()
    assert slopes.min() >= y @ slopes - tolerance
    np.testing.assert_allclose(slopes[y > 1e-4], y @ slopes, atol=tolerance)


@pytest.mark.parametrize("seed", range(8))
def test_mgda_is_the_shortest_combination(seed):
    """<g_i, d> >= ||d||^2 for all tasks, with equality where the weight is not 0."""
    gram = gram_of(gradients(seed))
    w = np.asarray(MGDA(gram, jnp.ones(4, bool)), np.float64)
    slopes = np.asarray(gram, np.float64) @ w
    tolerance = 1e-5 * float(np.max(np.diagonal(gram)))  # float32 sums of slopes
    assert slopes.min() >= w @ slopes - tolerance
    np.testing.assert_allclose(slopes[w > 1e-4], w @ slopes, atol=tolerance)


@pytest.mark.parametrize("seed", range(8))
def test_maxdo_s_largest_distance_is_the_least(seed):
    """The tasks that have a weight share the largest distance, and no other update near or far has a smaller one."""
    rows = gradients(seed)
    w = np.asarray(MAXDO(gram_of(rows), jnp.ones(4, bool)), np.float64)
    np.testing.assert_allclose(w.sum(), 1, atol=1e-5)

    def distances(update: np.ndarray) -> np.ndarray:
        gap = np.linalg.norm(rows - update, axis=1)
        return gap / (gap + np.linalg.norm(rows, axis=1))

    found = distances(w @ rows)
    np.testing.assert_allclose(found, agd(gram_of(rows), jnp.asarray(w, jnp.float32)), rtol=1e-4)
    np.testing.assert_allclose(found[w > 1e-3], found.max(), atol=1e-3)
    rng = np.random.default_rng(seed)
    for size in (1e-2, 0.1, 1.0):
        for _ in range(50):
            other = w @ rows + size * rng.standard_normal(rows.shape[1])
            assert distances(other).max() > found.max() - 1e-4


def test_golden_asymmetric_distances():
    """AGD of one gradient as the update and the other as the task's own."""
    gram = gram_of(GOLDEN)
    np.testing.assert_allclose(agd(gram, jnp.array([1.0, 0.0])), (0, 0.618643), atol=1e-6)
    np.testing.assert_allclose(agd(gram, jnp.array([0.0, 1.0])), (0.702117, 0), atol=1e-6)


def test_maxdo_knows_no_task_by_its_length():
    """Opposite gradients of any lengths: the update is 0, at distance 1/2 from both."""
    gram = gram_of(np.array([[3.0, 0.0], [-1.0, 0.0]]))
    w = MAXDO(gram, jnp.ones(2, bool))
    np.testing.assert_allclose(w @ gram @ w, 0, atol=1e-4)
    np.testing.assert_allclose(agd(gram, w), 0.5, atol=1e-3)


def test_golden_elastic_weights():
    gamma, state = EMGD(gram_of(GOLDEN), jnp.ones(2), jnp.ones(2, bool), jax.random.key(0), {"length": jnp.zeros(2)})
    np.testing.assert_allclose(gamma, (1.2271281, 0.8453508), rtol=1e-5)
    np.testing.assert_allclose(state["length"], np.linalg.norm(GOLDEN, axis=1), rtol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_elastic_weights_meet_their_conditions(seed):
    """sum sigma c = 1, c above its bound; <g_i, d> / sigma_i equal where it is not at the bound, larger where it is."""
    gram = gram_of(gradients(seed))
    mask, state = jnp.arange(4) != 2, {"length": jnp.array([2.0, 0.0, 5.0, 1.0])}
    gamma, after = EMGD(gram, jnp.ones(4), mask, jax.random.key(0), state)
    there = np.asarray(mask)
    lengths = np.sqrt(np.diagonal(gram))
    mean = np.where(state["length"] > 0, 0.9 * np.asarray(state["length"]) + 0.1 * lengths, lengths)
    np.testing.assert_allclose(after["length"], np.where(there, mean, 5.0), rtol=1e-5)
    sigma = np.where(there, np.exp(mean / 5), 0)
    sigma /= sigma.sum()
    c = np.asarray(gamma, np.float64)
    assert c[2] == 0
    assert sigma @ c == pytest.approx(1, abs=1e-5)
    assert c[there].min() >= 0.25 - 1e-6
    slopes = (np.asarray(gram, np.float64) @ c)[there] / sigma[there]
    free = c[there] > 0.25 + 1e-4
    tolerance = 2e-4 * np.abs(slopes).max()
    np.testing.assert_allclose(slopes[free], slopes[free].mean(), atol=tolerance)
    assert slopes.min() >= slopes[free].mean() - tolerance
