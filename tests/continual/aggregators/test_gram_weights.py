"""Aggregators: golden values, and the properties that each promises."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.continual.aggregators.gram_weights import AGGREGATORS, Aggregator, make_aggregator
from stabletrain.continual.presets import AGGREGATOR_NAMES

GOLDEN_ROWS = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])

GOLDEN = {
    "sum": (2, 2, 2),
    "mgda": (0, 1, 1),
    "pcgrad": (0.5848, 3.8012, 3.8012),
    "gradvac": (0.5848, 3.8012, 3.8012),  # with goals of 0, as at the first step
    "cagrad": (0.1835, 1.2041, 1.2041),
    "imtl-g": (0.0767, 1, 1),
    "aligned-mtl": (0.4265, 1.9346, 1.9346),  # twice the mean-weighted one
    "upgrad": (0.2929, 1.9004, 1.9004),
    "dualproj": (0.5563, 1.1109, 1.1109),
    "config": (0.1588, 2.0706, 2.0706),
    "nash-mtl": (0.0542, 0.7061, 0.7061),
    "emgd": (0.1635921, 2.0724789, 2.0724789),
    "spcl-released": (0.48649414, 2.02068168, 2.02068168),
}
"""Updates of two conflicting gradients; three decimals are published, 2e-3 covers their rounding and the ridges."""


OF_GRAM = [name for name, found in AGGREGATORS.items() if isinstance(found, Aggregator)]


DRAWING = ("pcgrad", "gradvac", "rlw", "pcgrad-released", "rlw-released")
"""Rules that draw, and whose draws depend on the width."""


@functools.cache
def program(name: str):
    return jax.jit(AGGREGATORS[name].weights)


def weights(name: str, rows: np.ndarray, mask: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    rows = jnp.asarray(rows, jnp.float32)
    mask = jnp.ones(len(rows), bool) if mask is None else jnp.asarray(mask)
    state = AGGREGATORS[name].init(len(rows))
    found, _ = program(name)(rows @ rows.T, jnp.ones(len(rows)), mask, jax.random.key(seed), state)
    return np.asarray(found)


def test_names_are_those_of_the_options():
    assert tuple(AGGREGATORS) == AGGREGATOR_NAMES


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
    np.testing.assert_allclose(weights(name, GOLDEN_ROWS) @ GOLDEN_ROWS, GOLDEN[name], atol=2e-3)


GOLDEN_WEIGHTS = {
    "mgda": (0.6, 0.4),
    "pcgrad": (2.2222, 1.5789),
    "cagrad": (0.7041, 0.5),
    "imtl-g": (0.5923, 0.4077),
    "aligned-mtl": (2 * 0.5591, 2 * 0.4083),  # published with weights of 1/2
    "upgrad": (1.1109, 0.7894),
    "dualproj": (0.6109, 0.5),
    "emgd": (1.2271281, 0.8453508),
}


@pytest.mark.parametrize("name", GOLDEN_WEIGHTS)
def test_golden_weights(name):
    """Which the updates of two gradients in three dimensions determine; a published rounding is 5e-5."""
    np.testing.assert_allclose(weights(name, GOLDEN_ROWS), GOLDEN_WEIGHTS[name], atol=1e-3)


@pytest.mark.parametrize("name", OF_GRAM)
def test_gradients_that_are_off_change_nothing(name):
    rows = np.random.default_rng(0).standard_normal((3, 6))
    padded = np.zeros((5, 6))
    padded[[0, 2, 3]] = rows
    mask = np.isin(np.arange(5), [0, 2, 3])
    found = weights(name, padded, mask)
    assert not found[~mask].any()
    if name not in DRAWING:
        np.testing.assert_allclose(found[mask] @ rows, weights(name, rows) @ rows, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("name", OF_GRAM)
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e15])
def test_weights_are_finite_at_any_scale_and_rank(name, scale):
    rng = np.random.default_rng(1)
    full, twice = rng.standard_normal((3, 6)), np.repeat(rng.standard_normal((1, 6)), 3, 0)
    for rows in (full * scale, twice * scale, np.vstack([full[:2], -full[:1]]) * scale, np.zeros((3, 6))):
        found = weights(name, rows)
        assert found.shape == (3,)
        assert np.isfinite(found).all()


@pytest.mark.parametrize("name", OF_GRAM)
def test_gradients_of_zero_give_no_update(name):
    """A task whose gradient is 0 changes no other's part by more than its place in a mean; all zeros give zero."""
    assert not (weights(name, np.zeros((3, 6))) @ np.zeros((3, 6))).any()
    rows = np.random.default_rng(4).standard_normal((3, 6))
    rows[1] = 0
    assert np.isfinite(weights(name, rows)).all()


HOMOGENEOUS = (
    "sum", "mean", "mgda", "nmgda", "pcgrad", "gradvac", "cagrad", "imtl-g", "aligned-mtl", "upgrad", "dualproj",
    "config", "rlw", "dwa", "uw", "gradnorm", "maxdo", "pcgrad-released", "imtl-g-released", "rlw-released",
    "dwa-released", "maxdo-released",
)  # fmt: skip
"""Weights that the scale of all gradients together does not change: the update is in proportion to it."""


@pytest.mark.parametrize("name", OF_GRAM)
def test_weights_and_the_scale_of_all_gradients(name):
    """The others give an update of a length of their own (unit gradients, Nash's), or know one (alpha, EMGD's 5)."""
    rows = np.random.default_rng(5).standard_normal((3, 6))
    one, other = weights(name, rows), weights(name, 1e4 * rows)
    if name in HOMOGENEOUS:
        np.testing.assert_allclose(other, one, rtol=1e-2, atol=1e-4)
    else:
        assert np.abs(other - one).max() > 1e-2 * np.abs(one).max()


@pytest.mark.parametrize("name", ["mgda", "upgrad", "dualproj"])
def test_no_conflict_where_none_is_promised(name):
    """To 1 % of the product of the lengths: the iterations are finite."""
    for seed in range(20):
        rows = np.random.default_rng(seed).standard_normal((3, 8))
        update = weights(name, rows) @ rows
        slack = 0.01 * np.linalg.norm(rows, axis=1) * max(np.linalg.norm(update), 0.1)
        assert (rows @ update > -slack - 0.01).all()


@pytest.mark.parametrize("name", [name for name in OF_GRAM if name not in (*DRAWING, "imtl-g-released")])
def test_the_order_of_the_gradients_does_not_matter(name):
    rows, order = np.random.default_rng(2).standard_normal((3, 6)), [2, 0, 1]
    np.testing.assert_allclose(
        weights(name, rows[order]) @ rows[order], weights(name, rows) @ rows, rtol=2e-2, atol=2e-3
    )


@pytest.mark.parametrize("seed", range(6))
def test_nash_s_equation_holds(seed):
    """a_i <g_i, d> is the same for every task, and d has length 1; lengths of gradients play no part."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((4, 9))
    found = weights("nash-mtl", rows).astype(np.float64)
    shares = found * (rows @ (found @ rows))
    np.testing.assert_allclose(shares, shares.mean(), rtol=2e-4)
    assert found.min() > 0
    assert np.linalg.norm(found @ rows) == pytest.approx(1, rel=1e-4)
    lengths = np.exp(rng.uniform(-5, 5, (4, 1)))
    np.testing.assert_allclose(weights("nash-mtl", lengths * rows) * lengths[:, 0], found, rtol=1e-3)


def test_what_is_remembered_follows_the_identity():
    """A goal of 0.5 for the cosine, after which GradVac's golden value holds."""
    rows = jnp.asarray(GOLDEN_ROWS, jnp.float32)
    state = {"goal": jnp.full((2, 2), 0.5)}
    found, after = program("gradvac")(rows @ rows.T, jnp.ones(2), jnp.ones(2, bool), jax.random.key(0), state)
    np.testing.assert_allclose(found @ rows, (0.0595636, 4.46964632, 4.46964632), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(after["goal"][0, 1], 0.99 * 0.5 + 0.01 * -0.8411910, rtol=1e-5)


def test_loss_rates_weigh_tasks():
    aggregator = AGGREGATORS["dwa"]
    state, mask = aggregator.init(2), jnp.ones(2, bool)
    for losses in ([1.0, 1.0], [1.0, 0.5]):
        _, state = aggregator.weights(jnp.eye(2), jnp.array(losses), mask, jax.random.key(0), state)
    found, _ = aggregator.weights(jnp.eye(2), jnp.ones(2), mask, jax.random.key(0), state)
    expected = np.exp([0.5, 0.25])
    np.testing.assert_allclose(found, 2 * expected / expected.sum(), rtol=1e-5)


@pytest.mark.parametrize(("name", "most"), [("spcl", 1.5), ("spcl-released", 1.1), ("aligned-mtl", 1.001)])
def test_weights_are_the_sum_of_the_conditioned_gradients(name, most):
    """Whose condition number is near 1: 2.1 before, here."""
    rows = np.random.default_rng(6).standard_normal((4, 8))
    rows[2] = 0
    mask = jnp.array([True, True, False, True])
    columns, length = AGGREGATORS[name].columns(jnp.asarray(rows @ rows.T, jnp.float32), mask)
    np.testing.assert_allclose(length * columns.sum(1), weights(name, rows, mask), rtol=1e-4, atol=1e-6)
    values = np.linalg.svd(np.asarray(columns).T @ rows, compute_uv=False)[:3]
    before = np.linalg.svd(rows, compute_uv=False)[:3]
    assert values[0] / values[2] < min(most, before[0] / before[2])


def test_settings_reach_the_rules():
    rows = jnp.asarray(GOLDEN_ROWS, jnp.float32)
    args = (rows @ rows.T, jnp.ones(2), jnp.ones(2, bool), jax.random.key(0), {})
    loose = make_aggregator("spcl", alpha=0.0, scale="none").weights(*args)[0] @ rows
    np.testing.assert_allclose(loose, (3.886751, 3.886751, 3.886751), rtol=1e-4)
    floored = make_aggregator("aligned-mtl", scale="min", floor=1.0).weights(*args)[0]
    np.testing.assert_allclose(floored, make_aggregator("aligned-mtl", scale="min").weights(*args)[0] * 3.6886997, 1e-4)
    small, large = (make_aggregator("aligned-mtl", scale=s).weights(*args)[0] for s in ("min", "rmse"))
    assert np.linalg.norm(large) > 1.5 * np.linalg.norm(small)
