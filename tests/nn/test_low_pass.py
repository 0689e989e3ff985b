"""Filtered doubling and halving against SciPy, and layers of equalised learning rate against plain ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.nn.convolution import convolve
from stabletrain.nn.equalized import EqualizedConvolution, EqualizedDense, activate, unit_second_moment
from stabletrain.nn.low_pass import TAPS, blur, downsample, upsample

signal = pytest.importorskip("scipy.signal")
IMAGES = np.random.default_rng(0).normal(size=(2, 6, 8, 3))
FILTER = np.array(TAPS) / 8.0


def filtered(images: np.ndarray, up: int, down: int, gain: float, start: int) -> np.ndarray:
    """scipy's upfirdn along both axes, from the pixel `start` of the filtered image on."""
    for axis in (1, 2):
        size = images.shape[axis] * up // down
        whole = signal.upfirdn(FILTER * gain**0.5, images, up=up, down=1, axis=axis)
        images = np.take(whole, start + down * np.arange(size), axis=axis)
    return images


def test_doubling_and_halving_are_scipys():
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            upsample(jnp.asarray(IMAGES)), filtered(IMAGES, 2, 1, 4.0, 1), rtol=1e-12, atol=1e-12
        )
        np.testing.assert_allclose(
            downsample(jnp.asarray(IMAGES)), filtered(IMAGES, 1, 2, 1.0, 2), rtol=1e-12, atol=1e-12
        )  # fmt: skip


def test_blur_is_scipys_with_zeros_around():
    square = np.outer(FILTER, FILTER)
    with jax.enable_x64(True):
        for padding, gain in ((1, 4.0), (2, 1.0)):
            found = blur(jnp.asarray(IMAGES), padding, gain)
            for b, c in np.ndindex(2, 3):
                wide = np.pad(IMAGES[b, :, :, c], padding)
                wanted = gain * signal.convolve2d(wide, square, mode="valid")
                np.testing.assert_allclose(found[b, :, :, c], wanted, rtol=1e-12, atol=1e-12)


def test_a_flat_image_stays_flat_away_from_the_edges():
    flat = jnp.ones((1, 8, 8, 1))
    np.testing.assert_allclose(upsample(flat)[:, 1:-1, 1:-1], 1.0, rtol=1e-6)
    np.testing.assert_allclose(downsample(flat)[:, 1:-1, 1:-1], 1.0, rtol=1e-6)


def test_halving_is_the_transpose_of_doubling():
    small = np.random.default_rng(1).normal(size=(2, 3, 4, 3))
    with jax.enable_x64(True):
        _, back = jax.vjp(upsample, jnp.asarray(small))
        np.testing.assert_allclose(back(jnp.asarray(IMAGES))[0], 4 * downsample(jnp.asarray(IMAGES)), rtol=1e-12)


def test_odd_sizes_cannot_be_halved():
    with pytest.raises(ValueError, match="5x8 pixels cannot be halved"):
        downsample(jnp.zeros((1, 5, 8, 1)))


# --- layers of equalised learning rate --------------------------------------------------------------------------------


def test_equalised_layers_are_plain_ones_with_scaled_weights():
    key, images = jax.random.key(0), jnp.asarray(IMAGES, jnp.float32)
    for size in (1, 3):
        layer = EqualizedConvolution(5, size)
        params = layer.init(key, images)["params"]
        wanted = convolve(images, params["kernel"] / np.sqrt(3 * size * size))
        found: Any = layer.apply({"params": params}, images)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)  # float32
    dense = EqualizedDense(5, learning_rate=0.1, bias_start=1.0)
    params = dense.init(key, images)["params"]
    np.testing.assert_allclose(params["bias"], 10.0)
    wanted = images @ (0.1 * params["kernel"] / np.sqrt(3)) + 1.0
    found = dense.apply({"params": params}, images)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_halving_convolution_filters_then_takes_every_other_pixel(size):
    """The same as the filter and the kernel on the plane of zeros around the image, from the pixel that is centred."""
    layer = EqualizedConvolution(2, size, down=True, use_bias=False)
    with jax.enable_x64(True):
        kernel = np.random.default_rng(2).normal(size=(size, size, 3, 2))
        found = np.asarray(layer.apply({"params": {"kernel": jnp.asarray(kernel)}}, jnp.asarray(IMAGES)))
    square = np.outer(FILTER, FILTER) / np.sqrt(3 * size * size)
    wanted = np.zeros((2, 3, 4, 2))
    first = {1: 2, 3: 3}[size]  # from half of 3 taps, rounded up, and of the kernel's size - 1
    for b, i, o in np.ndindex(2, 3, 2):
        whole = signal.convolve2d(IMAGES[b, :, :, i], signal.convolve2d(square, kernel[::-1, ::-1, i, o]))
        wanted[b, :, :, o] += whole[first : first + 6 : 2, first : first + 8 : 2]
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)


def test_activation_keeps_the_second_moment_and_rows_are_normalised():
    numbers = np.random.default_rng(0).normal(size=(100, 1000)).astype(np.float32)
    # E[lrelu(x)^2] * 2 = 1 + 0.2^2 of normal numbers; 100,000 of them.
    np.testing.assert_allclose(np.mean(np.asarray(activate(jnp.asarray(numbers))) ** 2), 1.04, atol=0.03)
    rows = unit_second_moment(jnp.asarray(numbers * 7))
    np.testing.assert_allclose(jnp.mean(rows**2, axis=1), 1.0, rtol=1e-5)
