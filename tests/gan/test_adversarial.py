"""Adversarial losses: values of the released code, and what each asks for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.gan.adversarial import ADVERSARIAL, crammer_singer

REAL = np.array([1.5, -0.3, 0.2, 2, -1, 0.7])
FAKE = np.array([-1.2, 0.4, 0.9, -2, 0.1, -0.6])
EMBEDDINGS = np.array([[((7 * i + 3 * j) % 11 - 5) / 5 for j in range(4)] for i in range(6)])

GOLDEN = {
    "non-saturating": (1.2039245592, 1.0210440360),
    "least-squares": (1.2041666667, 1.4650000000),
    "hinge": (1.5333333333, 0.4),
    "wasserstein": (-0.9166666667, 0.4),
}
"""(discriminator, generator) of PyTorch-StudioGAN's functions on these scores, in float64."""


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_golden_values(name):
    with jax.enable_x64(True):
        loss = ADVERSARIAL[name]
        # the golden values have ten decimals
        np.testing.assert_allclose(loss.discriminator(REAL, FAKE), GOLDEN[name][0], atol=1e-9)
        np.testing.assert_allclose(loss.generator(jnp.asarray(FAKE)), GOLDEN[name][1], atol=1e-9)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_generator_wants_higher_scores_and_discriminator_lower_ones_of_fakes(name):
    loss = ADVERSARIAL[name]
    scores = jnp.array([0.1, 0.5])  # between what least squares asks of fakes, 0, and of real samples, 1
    assert jnp.all(jax.grad(loss.generator)(scores) < 0)
    assert jnp.all(jax.grad(loss.discriminator, argnums=1)(scores, scores) >= 0)
    assert jnp.all(jax.grad(loss.discriminator, argnums=0)(scores, scores) <= 0)


def test_hinge_leaves_sure_scores_alone():
    for gradient in jax.grad(ADVERSARIAL["hinge"].discriminator, argnums=(0, 1))(jnp.array([1.5]), jnp.array([-1.5])):
        np.testing.assert_array_equal(gradient, 0)


def test_crammer_singer_is_golden_and_zero_beyond_the_margin():
    with jax.enable_x64(True):
        # Four columns: three classes and "fake"; of the labels 0 1 2 0 1 2.
        found = crammer_singer(jnp.asarray(EMBEDDINGS), jnp.array([0, 1, 2, 0, 1, 2]))
        np.testing.assert_allclose(found, 0.8333333333, atol=1e-9)
    sure = 5 * jnp.eye(3)
    assert crammer_singer(sure, jnp.arange(3)) == 0
