"""Regularisers: closed forms, golden values, and R1 with and without statistics over the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.gan.regularizers import dragan, lecam, mean_square, orthogonality, path_length, r1

POINTS = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


def test_r1_of_a_linear_critic_is_half_its_squared_slope():
    slope = jnp.array([3.0, 0.0, 4.0])
    for mixes in (False, True):
        found = r1(lambda x: x @ slope, jnp.asarray(POINTS), mixes_samples=mixes)
        np.testing.assert_allclose(found, 12.5, rtol=1e-5)  # float32


def test_r1_agrees_with_and_without_second_backward_pass():
    def critic(weights):
        return lambda x: jnp.tanh(x @ weights) @ jnp.ones(4)

    weights = jax.random.normal(jax.random.key(0), (3, 4))
    gradients = [
        jax.jit(jax.grad(lambda w, m=mixes: r1(critic(w), jnp.asarray(POINTS), mixes_samples=m)))(weights)
        for mixes in (False, True)
    ]
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)  # float32, another order of sums


def test_r1_of_mixing_critic_is_the_gradient_of_the_sum():
    """With a score that sees the batch, R1 is of the gradient of their sum, cross terms included."""

    def critic(scale):
        return lambda x: scale * x[:, 0] * jnp.mean(x[:, 1])

    def by_hand(scale):
        gradient = jax.grad(lambda x: jnp.sum(critic(scale)(x)))(jnp.asarray(POINTS))
        return 0.5 * jnp.mean(jnp.sum(gradient**2, axis=1))

    found, expected = (
        jax.value_and_grad(f)(1.5) for f in (lambda s: r1(critic(s), jnp.asarray(POINTS), mixes_samples=True), by_hand)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32


def test_dragan_looks_at_places_between_a_sample_and_half_a_deviation_above():
    """A critic that is flat up to 0.9 and steep beyond half a deviation shows where the penalty looks."""
    real = jnp.tile(jnp.array([[-1.0], [1.0]]), (500, 1))  # deviation 1: places reach from x to x + 0.5
    for start, seen in ((-0.5, False), (1.5, False), (1.05, True)):
        penalty = dragan(lambda x, s=start: jnp.sum(100 * jnp.clip(x - s, 0.0, 1e-3), axis=1), real, jax.random.key(0))
        inside = penalty != 1.0  # where the critic is flat every norm is 0, and the penalty 1
        assert bool(inside) == seen, (start, penalty)


def test_lecam_is_golden():
    real, fake = np.array([1.5, -0.3, 0.2, 2, -1, 0.7]), np.array([-1.2, 0.4, 0.9, -2, 0.1, -0.6])
    with jax.enable_x64(True):
        np.testing.assert_allclose(lecam(real, fake, 0.3, -0.2), 2.8483333333, atol=1e-9)  # ten decimals are known


def test_lecam_leaves_scores_alone_that_are_closer_than_the_averages():
    for gradient in jax.grad(lecam, argnums=(0, 1))(jnp.array([-0.1]), jnp.array([0.5]), 0.3, 0.0):
        np.testing.assert_array_equal(gradient, 0)
    apart = jax.grad(lecam, argnums=(0, 1))(jnp.array([0.8]), jnp.array([-0.8]), 0.3, 0.0)
    assert apart[0] > 0 > apart[1]  # descent lowers the real score and raises the fake one


def test_path_length_of_a_linear_generator():
    """G(w) = w A reshaped: the expected squared length is ||A||_F^2 / (H W), and the average moves by its decay."""
    matrix = jax.random.normal(jax.random.key(1), (5, 4 * 4 * 2))
    styles = jax.random.normal(jax.random.key(2), (2000, 1, 5))
    penalty, mean = path_length(
        lambda w: (w[:, 0] @ matrix).reshape(-1, 4, 4, 2), styles, jax.random.key(3), jnp.zeros(()), decay=1.0
    )
    # With decay 1 the average is this batch's mean, and the penalty the variance of the lengths: the two give E[l^2].
    np.testing.assert_allclose(penalty + mean**2, jnp.sum(matrix**2) / 16, rtol=0.05)  # 2,000 draws
    _, slow = path_length(
        lambda w: (w[:, 0] @ matrix).reshape(-1, 4, 4, 2), styles, jax.random.key(3), jnp.zeros(()), decay=0.01
    )
    np.testing.assert_allclose(slow, 0.01 * mean, rtol=1e-5)


def test_mean_square_counts_every_entry():
    assert mean_square(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 0.0]])) == 2.5


def test_orthogonality_is_the_sum_over_pairs_of_different_filters():
    rng = np.random.default_rng(0)
    kernel, table = rng.normal(size=(3, 3, 2, 4)), rng.normal(size=(5, 6))
    params = {"conv": {"kernel": jnp.asarray(kernel), "bias": jnp.ones(4)}, "shared": {"embedding": jnp.asarray(table)}}
    filters = kernel.reshape(-1, 4).T
    pairs = [(filters[i] @ filters[j]) ** 2 for i in range(4) for j in range(4) if i != j]
    assert float(orthogonality(params)) == pytest.approx(sum(pairs), rel=1e-5)  # float32


def test_orthogonal_filters_of_any_length_cost_nothing():
    basis, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 3)))
    params = {"dense": {"kernel": jnp.asarray(basis * [0.5, 1.0, 3.0])}}
    assert float(orthogonality(params)) == pytest.approx(0.0, abs=1e-10)  # float32, lengths up to 3
    gradient = jax.grad(orthogonality)(params)["dense"]["kernel"]
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)
