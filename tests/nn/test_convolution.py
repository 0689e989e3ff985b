"""The convolution and its gradients are the written-out sum, for every stride and padding that the networks use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.nn.convolution import Convolution, convolve


def written_out(images: np.ndarray, kernel: np.ndarray, stride: int, padding: tuple[int, int]) -> np.ndarray:
    padded = np.pad(images, ((0, 0), padding, padding, (0, 0)))
    h, w = kernel.shape[:2]
    rows = (padded.shape[1] - h) // stride + 1
    columns = (padded.shape[2] - w) // stride + 1
    out = np.zeros((len(images), rows, columns, kernel.shape[3]))
    for r in range(rows):
        for c in range(columns):
            window = padded[:, r * stride : r * stride + h, c * stride : c * stride + w]
            out[:, r, c] = np.einsum("bhwi,hwio->bo", window, kernel)
    return out


@pytest.mark.parametrize(
    ("size", "stride", "padding", "pixels"),
    [
        (3, 1, "SAME", (1, 1)),
        (3, 2, "SAME", (0, 1)),  # of an even size, the far end only, as TensorFlow and DDPM have it
        (3, 1, "VALID", (0, 0)),
        (3, 2, ((1, 1), (1, 1)), (1, 1)),
        (1, 1, "SAME", (0, 0)),
        (2, 2, "VALID", (0, 0)),
    ],
)
def test_convolution_and_gradients_are_those_of_the_sum(size, stride, padding, pixels):
    keys = jax.random.split(jax.random.key(0), 4)
    images = jax.random.normal(keys[0], (2, 6, 6, 3))
    layer = Convolution(4, size, stride, padding, bias_init=jax.nn.initializers.normal())
    variables = layer.init(keys[1], images)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    expected = written_out(np.asarray(images), np.asarray(kernel), stride, pixels)
    out = layer.apply(variables, images)
    np.testing.assert_allclose(out, expected + np.asarray(bias), atol=1e-5)

    # linear in the kernel and in the images: the gradients are fixed by their products with any direction
    cotangent = jax.random.normal(keys[2], out.shape)
    run = lambda variables, images: jnp.sum(layer.apply(variables, images) * cotangent)  # noqa: E731
    by_variables, by_images = jax.grad(run, argnums=(0, 1))(variables, images)
    change = np.asarray(jax.random.normal(keys[3], kernel.shape))
    product = np.sum(written_out(np.asarray(images), change, stride, pixels) * np.asarray(cotangent))
    np.testing.assert_allclose(jnp.sum(by_variables["params"]["kernel"] * change), product, rtol=1e-4, atol=1e-4)
    change = np.asarray(jax.random.normal(keys[3], images.shape))
    product = np.sum(written_out(change, np.asarray(kernel), stride, pixels) * np.asarray(cotangent))
    np.testing.assert_allclose(jnp.sum(by_images * change), product, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(by_variables["params"]["bias"], cotangent.sum((0, 1, 2)), rtol=1e-4, atol=1e-4)


def test_one_by_one_is_the_same_as_a_product_and_as_a_convolution():
    images = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    layer = Convolution(4, 1)
    variables = layer.init(jax.random.key(1), images)
    expected = convolve(images, variables["params"]["kernel"])
    np.testing.assert_allclose(layer.apply(variables, images), expected, atol=1e-5)


def test_the_type_of_computation_is_the_one_asked_for():
    images = jnp.ones((1, 4, 4, 2), jnp.bfloat16)
    for size in (1, 3):
        variables = Convolution(3, size).init(jax.random.key(0), images)
        assert variables["params"]["kernel"].dtype == jnp.float32
        assert Convolution(3, size).apply(variables, images).dtype == jnp.float32
        assert Convolution(3, size, dtype=jnp.bfloat16).apply(variables, images).dtype == jnp.bfloat16


def test_without_a_bias_there_is_none():
    images = jax.random.normal(jax.random.key(0), (1, 4, 4, 2))
    layer = Convolution(3, use_bias=False)
    variables = layer.init(jax.random.key(1), images)
    assert set(variables["params"]) == {"kernel"}
    np.testing.assert_array_equal(layer.apply(variables, images), convolve(images, variables["params"]["kernel"]))
