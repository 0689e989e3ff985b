"""Batch normalisation by a class or by a vector: against the formula, and what is kept when."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.nn.conditional_norm import EPSILON, BatchNorm, ConditionalBatchNorm

IMAGES = np.random.default_rng(0).normal(3.0, 2.0, (4, 3, 3, 2)).astype(np.float32)
LABELS = jnp.asarray([0, 2, 1, 2])


def normalized(images: np.ndarray) -> np.ndarray:
    wide = images.astype(np.float64)
    return (wide - wide.mean((0, 1, 2))) / np.sqrt(wide.var((0, 1, 2)) + EPSILON)


def made(module, *inputs):
    return module.init(jax.random.key(0), *inputs, train=False)


def test_a_batch_gets_zero_mean_unit_variance_then_scale_and_shift():
    module = BatchNorm()
    variables = made(module, IMAGES)
    params = {"scale": jnp.asarray([2.0, -1.0]), "bias": jnp.asarray([0.5, 3.0])}
    out = module.apply({**variables, "params": params}, IMAGES, train=True)
    np.testing.assert_allclose(out, normalized(IMAGES) * [2.0, -1.0] + [0.5, 3.0], atol=1e-5)  # float32


def test_running_statistics_take_the_unbiased_variance_and_only_where_they_may():
    module = BatchNorm(momentum=0.9)
    variables = made(module, IMAGES)
    _, changed = module.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    wide = IMAGES.astype(np.float64)
    np.testing.assert_allclose(changed["batch_stats"]["mean"], 0.1 * wide.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(changed["batch_stats"]["var"], 0.9 + 0.1 * wide.var((0, 1, 2), ddof=1), rtol=1e-5)
    _, kept = module.apply(variables, IMAGES, train=False, mutable=["batch_stats"])
    np.testing.assert_array_equal(kept["batch_stats"]["mean"], variables["batch_stats"]["mean"])


def test_outside_of_training_the_running_statistics_are_used():
    module = BatchNorm()
    params = made(module, IMAGES)["params"]
    statistics = {"mean": jnp.asarray([1.0, 2.0]), "var": jnp.asarray([4.0, 9.0])}
    out = module.apply({"params": params, "batch_stats": statistics}, IMAGES, train=False)
    np.testing.assert_allclose(out, (IMAGES - [1, 2]) / np.sqrt(np.asarray([4, 9]) + EPSILON), atol=1e-5)


def test_a_single_value_has_no_variance():
    module = BatchNorm()
    variables = made(module, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="of a single value"):
        module.apply(variables, jnp.ones((1, 3)), train=True)


@pytest.mark.parametrize("spectral", [False, True])
def test_a_class_and_its_one_hot_vector_are_the_same_condition(spectral):
    by_class = ConditionalBatchNorm(num_classes=3, spectral=spectral)
    by_vector = ConditionalBatchNorm(spectral=spectral)
    variables = made(by_class, IMAGES, LABELS)
    expected = by_class.apply(variables, IMAGES, LABELS, train=True)
    vectors = jax.nn.one_hot(LABELS, 3)
    np.testing.assert_allclose(by_vector.apply(variables, IMAGES, vectors, train=True), expected, atol=1e-6)


def test_the_condition_scales_and_shifts_each_sample_alone():
    module = ConditionalBatchNorm(num_classes=3)
    variables = made(module, IMAGES, LABELS)
    gain, bias = (np.asarray(variables["params"][name]) for name in ("gain", "bias"))
    out = module.apply(variables, IMAGES, LABELS, train=True)
    labels = np.asarray(LABELS)
    expected = normalized(IMAGES) * (1 + gain[labels])[:, None, None] + bias[labels][:, None, None]
    np.testing.assert_allclose(out, expected, atol=1e-5)  # float32


def test_the_gradient_of_batch_statistics_is_that_of_finite_differences():
    """Mean and variance are functions of the batch, and the gradient goes through both."""
    with jax.enable_x64(True):
        module = ConditionalBatchNorm(num_classes=3)
        images = jnp.asarray(IMAGES, jnp.float64)
        variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), made(module, images, LABELS))
        weights = jnp.asarray(np.random.default_rng(1).standard_normal(images.shape))

        def loss(inputs):
            return jnp.sum(weights * module.apply(variables, inputs, LABELS, train=True))

        gradient, direction = (
            jax.grad(loss)(images),
            jnp.asarray(np.random.default_rng(2).standard_normal(images.shape)),
        )
        step = 1e-5
        slope = (loss(images + step * direction) - loss(images - step * direction)) / (2 * step)
        np.testing.assert_allclose(jnp.sum(gradient * direction), slope, rtol=1e-7)  # error of the order of step^2
