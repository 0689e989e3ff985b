"""The moving average of parameters against its closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.training.ema import average_decay, start_average, update_average


def test_average_of_constant_parameters_approaches_them_geometrically():
    """After n updates towards a constant the distance is d^n of what it was."""
    average, params = {"w": jnp.ones(3)}, {"w": jnp.full(3, 5.0)}
    decay = average_decay(jnp.asarray(0), 0.9, ramp=False)
    for _ in range(20):
        average = update_average(average, params, decay)
    np.testing.assert_allclose(average["w"], 5.0 - 4.0 * 0.9**20, rtol=1e-5)  # 20 float32 roundings


def test_ramp_rises_from_a_tenth_to_the_decay():
    decays = [float(average_decay(jnp.asarray(n), 0.99, ramp=True)) for n in (0, 8, 890, 10_000)]
    assert decays == pytest.approx([0.1, 0.5, 0.99, 0.99], rel=1e-6)
    assert float(average_decay(jnp.asarray(0), 0.99, ramp=False)) == pytest.approx(0.99)


def test_average_starts_as_a_copy_in_its_own_float32_buffers():
    params = {"w": jnp.ones(4, jnp.bfloat16), "b": jnp.zeros(2)}
    average = start_average(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(average)} == {jnp.dtype("float32")}
    assert average["b"].unsafe_buffer_pointer() != params["b"].unsafe_buffer_pointer()


def test_an_average_that_has_arrived_does_not_move():
    """No drift by rounding: equal parameters leave the average bitwise as it is, whatever the decay."""
    params = {"w": jax.random.normal(jax.random.key(0), (1000,))}
    average = update_average(start_average(params), params, jnp.float32(0.9999))
    np.testing.assert_array_equal(average["w"], params["w"])
