"""Initialisers have the ranges and variances of the networks that they come from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.nn.initializers import fan_average, torch_uniform


def test_torch_uniform_fills_its_range_evenly():
    values = torch_uniform(25)(jax.random.key(0), (100, 100))
    assert 0.199 < jnp.abs(values).max() <= 0.2
    # 10,000 draws: the deviation of a uniform, bound / sqrt(3), within two per cent
    np.testing.assert_allclose(values.std(), 0.2 / np.sqrt(3), rtol=0.02)


def test_fan_average_counts_the_window_and_both_widths():
    values = fan_average()(jax.random.key(0), (3, 3, 40, 80))
    np.testing.assert_allclose(values.std(), np.sqrt(1 / (9 * 60)), rtol=0.02)
    assert jnp.abs(values).max() <= np.sqrt(3 / (9 * 60))


def test_fan_average_of_scale_zero_is_small_and_not_zero():
    values = fan_average(0)(jax.random.key(0), (3, 3, 40, 80))
    assert 0 < jnp.abs(values).max() < 1e-5
