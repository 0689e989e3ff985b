"""Classifier-free guidance is the stated combination of the labelled and the unlabelled answer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.diffusion.guidance import guided

NULL = 3


def network(noisy, times, labels):
    return noisy * times.reshape(-1, 1, 1, 1) + 10.0 * labels.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0])
def test_guidance_interpolates_and_extrapolates_between_null_and_label(scale):
    noisy = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    times, labels = jnp.array([1.0, 2.0, 3.0]), jnp.array([0, 1, 2])
    out = guided(network, labels, NULL, scale)(noisy, times)
    none = network(noisy, times, jnp.full(3, NULL))
    expected = none + scale * (network(noisy, times, labels) - none)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scale", "rows"), [(0.0, 3), (1.0, 3), (1.5, 6)])
def test_the_network_runs_on_twice_the_batch_only_where_both_answers_count(scale, rows):
    seen = []

    def counting(noisy, times, labels):
        seen.append(len(noisy))
        return noisy

    guided(counting, jnp.array([0, 1, 2]), NULL, scale)(jnp.ones((3, 2, 2, 1)), jnp.ones(3))
    assert seen == [rows]
