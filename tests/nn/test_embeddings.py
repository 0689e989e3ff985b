"""Sinusoidal embeddings in the two orders of the published networks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.nn.embeddings import sinusoidal


def test_cosines_then_sines_with_frequencies_that_stop_short_of_the_last():
    times = np.array([0.0, 3.0, 999.0])
    angles = times[:, None] * 10_000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    # an angle of 999 carries 6e-5 in float32
    np.testing.assert_allclose(sinusoidal(jnp.asarray(times, jnp.float32), 8), expected, atol=1e-4)


def test_sines_then_cosines_with_frequencies_that_reach_the_last():
    times = np.array([0.0, 3.0, 999.0])
    angles = times[:, None] * 10_000.0 ** (-np.arange(4) / 3)
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    out = sinusoidal(jnp.asarray(times, jnp.float32), 8, order="sin-cos")
    np.testing.assert_allclose(out, expected, atol=1e-4)


def test_an_odd_size_ends_with_a_zero_and_integers_and_doubles_are_taken():
    assert not sinusoidal(jnp.array([5.0]), 7)[0, -1]
    assert sinusoidal(jnp.array([5]), 8).dtype == jnp.float32
    with jax.enable_x64(True):
        assert sinusoidal(jnp.array([5.0], jnp.float64), 8).dtype == jnp.float64
