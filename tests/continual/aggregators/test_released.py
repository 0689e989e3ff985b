"""Aggregators as released, against the same sums written down on the gradients themselves in float64."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.continual.aggregators.elementwise import combine_elements
from stabletrain.continual.aggregators.gram_weights import AGGREGATORS
from stabletrain.continual.aggregators.released import GRADDROP, maxdo

THERE = np.array([True, False, True, True, False])


def rows_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((3, 7))


def update(name: str, rows: np.ndarray, key: int = 0) -> np.ndarray:
    """With two absent gradients between them."""
    padded = np.zeros((5, rows.shape[1]))
    padded[THERE] = rows
    gram = jnp.asarray(padded @ padded.T, jnp.float32)
    rule = AGGREGATORS[name]
    weights, _ = rule.weights(gram, jnp.ones(5), jnp.asarray(THERE), jax.random.key(key), rule.init(5))
    assert not np.asarray(weights)[~THERE].any()
    return np.asarray(weights, np.float64) @ padded


def test_pcgrad_projects_on_one_other_gradient_and_takes_the_mean():
    """One of the eight choices of a partner for each of three gradients; other draws, other choices."""
    rows = rows_of(0)

    def projected(i: int, j: int) -> np.ndarray:
        slope = rows[i] @ rows[j]
        return rows[i] - min(slope, 0.0) / (rows[j] @ rows[j]) * rows[j]

    partners = [[j for j in range(3) if j != i] for i in range(3)]
    choices = [np.mean([projected(i, j) for i, j in enumerate(js)], 0) for js in itertools.product(*partners)]
    found = set()
    for key in range(12):
        distances = [np.abs(update("pcgrad-released", rows, key) - choice).max() for choice in choices]
        assert min(distances) < 1e-5
        found.add(int(np.argmin(distances)))
    assert len(found) > 2


def test_imtl_g_starts_from_the_second_gradient_and_ends_in_a_softmax():
    for seed in range(4):
        rows = rows_of(seed)
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        right, system = (units[0] - units[1:]) @ rows[1], (rows[0] - rows[1:]) @ (units[0] - units[1:]).T
        alpha = right @ np.linalg.inv(system)
        raw = np.exp([1 - alpha.sum(), *alpha])
        np.testing.assert_allclose(update("imtl-g-released", rows), raw / raw.sum() @ rows, rtol=1e-3, atol=1e-4)


def test_dwa_weighs_by_the_mean_of_past_losses():
    rule, mask = AGGREGATORS["dwa-released"], jnp.ones(2, bool)
    state = rule.init(2)
    first, state = rule.weights(jnp.eye(2), jnp.array([1.0, 4.0]), mask, jax.random.key(0), state)
    np.testing.assert_allclose(first, 0.25)  # softmax of equal numbers, over the number of tasks
    _, state = rule.weights(jnp.eye(2), jnp.array([3.0, 2.0]), mask, jax.random.key(0), state)
    third, _ = rule.weights(jnp.eye(2), jnp.ones(2), mask, jax.random.key(0), state)
    expected = np.exp([2.0, 3.0])
    np.testing.assert_allclose(third, expected / expected.sum() / 2, rtol=1e-6)


def _released_maxdo(rows: np.ndarray, simplex: np.ndarray) -> np.ndarray:
    """Weights by numerical derivatives of the distance between the gradients themselves."""
    count = len(rows)
    others = 1 - np.eye(count)

    def combined(a: np.ndarray) -> np.ndarray:
        if count == 2:
            return np.clip(a * others, 0, 1)
        shares = np.exp(a) * others
        return shares / shares.sum(1, keepdims=True)

    def distance(a: np.ndarray) -> float:
        near = combined(a) @ rows
        lengths = [np.linalg.norm(part, axis=1).mean() for part in (near - rows, near, rows)]
        return 0.1 * lengths[0] / (lengths[1] + lengths[2] + 1e-5)

    a = np.ones((count, count)) / (count - 1)
    for _ in range(5):
        before, slope = combined(a), np.zeros_like(a)
        for place in np.ndindex(a.shape):
            move = np.zeros_like(a)
            move[place] = 1e-6
            # Two gradients start at the upper edge of the clip: the derivative is that of the inner side.
            up = a + move * (count > 2)
            slope[place] = (distance(up) - distance(a - move)) / (up - (a - move))[place]
        a = a - (10.0 if count == 2 else 50.0) * slope
    if count == 2:
        columns = np.exp((a * before).sum(0) + simplex)
        return columns / columns.sum()
    return (combined(a).sum(0) + simplex) / (count + 1)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_maxdo_s_predecessor_takes_five_steps(count: int):
    rows = np.random.default_rng(count).standard_normal((count, 7))
    gram = jnp.asarray(rows @ rows.T, jnp.float32)
    found = np.asarray(maxdo(gram, jnp.ones(count, bool)))
    simplex = np.asarray(
        AGGREGATORS["mgda"].weights(gram, jnp.ones(count), jnp.ones(count, bool), jax.random.key(0), {})[0]
    )
    np.testing.assert_allclose(found, _released_maxdo(rows, simplex), atol=2e-3)


def test_graddrop_keeps_the_elements_of_the_sum_s_sign():
    rows = jnp.array([[-4.0, 1.0, 2.0, 0.0], [6.0, 1.0, -2.0, -1.0]])
    for key in range(3):
        found = combine_elements(GRADDROP, rows, jnp.ones(2, bool), jax.random.key(key))
        np.testing.assert_allclose(found, [6.0, 2.0, 0.0, -1.0])
