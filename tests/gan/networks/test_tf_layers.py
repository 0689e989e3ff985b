"""TensorFlow's layers: padding, transposed convolution, depth to space and starts, against plain NumPy and PyTorch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.gan.networks.tf_layers import (
    Conv,
    Conv1D,
    Deconv,
    LayerNorm,
    Linear,
    Norm,
    convolve_same,
    depth_to_space,
)

KEY = jax.random.key(0)


def made(module, inputs):
    variables = module.init(KEY, inputs)
    return variables["params"], module.apply(variables, inputs)


def test_a_five_by_five_convolution_with_stride_two_pads_one_before_and_two_behind():
    """A kernel with one entry picks single pixels: with (1, 2) its middle sits on pixel 1, 3, 5, ..."""
    images = jnp.arange(64.0).reshape(1, 8, 8, 1)
    kernel = jnp.zeros((5, 5, 1, 1)).at[2, 2].set(1.0)
    module = Conv(1, 5, 2)
    found = module.apply({"params": {"kernel": kernel, "bias": jnp.zeros(1)}}, images)
    np.testing.assert_array_equal(found[0, :, :, 0], images[0, 1::2, 1::2, 0])


@pytest.mark.parametrize("size", [3, 5])
def test_the_transposed_convolution_is_the_gradient_of_the_convolution(size):
    images, small = jax.random.normal(KEY, (2, 8, 8, 3)), jax.random.normal(KEY, (2, 4, 4, 4))
    kernel = jax.random.normal(KEY, (size, size, 3, 4))
    convolve = lambda x: Conv(4, size, 2, bias=False).apply({"params": {"kernel": kernel}}, x)  # noqa: E731
    expected = jax.vjp(convolve, images)[1](small)[0]
    found = Deconv(3, size).apply({"params": {"kernel": kernel, "bias": jnp.zeros(3)}}, small)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)  # sums of 100 products in float32


@pytest.mark.torch
def test_the_transposed_convolution_is_pytorchs_cropped_and_not_its_padded_one():
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
    params, found = made(Deconv(6), jnp.asarray(images))
    # ours [h, w, out, in], PyTorch's [in, out, h, w]
    kernel = torch.tensor(np.asarray(params["kernel"]).transpose(3, 2, 0, 1))
    channels_first = torch.tensor(images.transpose(0, 3, 1, 2))
    whole = torch.nn.functional.conv_transpose2d(channels_first, kernel, stride=2)
    cropped = whole[:, :, 1:9, 1:9].numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, cropped, rtol=1e-5, atol=1e-5)
    padded = torch.nn.functional.conv_transpose2d(channels_first, kernel, stride=2, padding=2, output_padding=1)
    assert np.abs(padded.numpy().transpose(0, 2, 3, 1) - np.asarray(found)).max() > 0.1


@pytest.mark.parametrize(
    ("side", "size", "stride", "channels", "features"),
    [(4, 3, 1, 8, 8), (8, 5, 2, 1, 8), (8, 3, 1, 3, 5), (8, 5, 2, 24, 16), (4, 5, 2, 64, 64), (6, 5, 2, 64, 32)],
)
def test_every_form_of_a_convolution_is_xlas(side, size, stride, channels, features):
    rng = np.random.default_rng(0)
    places = side // stride
    images, kernel, cotangent = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((2, side, side, channels), (size, size, channels, features), (2, places, places, features))
    )

    def plain(x, k):
        return jax.lax.conv_general_dilated(x, k, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    expected, back = jax.vjp(plain, images, kernel)
    found, back_here = jax.vjp(lambda x, k: convolve_same(x, k, stride), images, kernel)
    # sums of up to 1,600 products of order one, taken in another order
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-4)
    for one, other in zip(back_here(cotangent), back(cotangent), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-4)


def test_depth_to_space_reads_channels_as_row_column_channel():
    images = jnp.arange(2 * 2 * 8.0).reshape(1, 2, 2, 8)
    found = depth_to_space(images)
    assert found.shape == (1, 4, 4, 2)
    for row, column in np.ndindex(4, 4):
        block = images[0, row // 2, column // 2]
        start = ((row % 2) * 2 + column % 2) * 2
        np.testing.assert_array_equal(found[0, row, column], block[start : start + 2])


def test_the_one_dimensional_convolution_is_that_of_xla():
    text = jax.random.normal(KEY, (3, 7, 4))
    params, found = made(Conv1D(6, 5), text)
    expected = jax.lax.conv_general_dilated(
        text, params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="even size"):
        Conv1D(6, 4).init(KEY, text)


STARTS = {
    "linear": (Linear(300), (1, 200), 2 / 500),
    "linear he": (Linear(300, "he"), (1, 200), 2 / 200),
    "conv he": (Conv(40, 3), (1, 4, 4, 30), 4 / (9 * 30 + 9 * 40)),
    "conv glorot": (Conv(40, 3, start="glorot"), (1, 4, 4, 30), 2 / (9 * 30 + 9 * 40)),
    "conv with stride": (Conv(40, 5, 2), (1, 4, 4, 30), 4 / (25 * 30 + 25 * 40 / 4)),
    "deconv": (Deconv(40), (1, 4, 4, 30), 4 / (25 * 30 / 4 + 25 * 40)),
    "conv of text": (Conv1D(60, 5), (1, 9, 50), 4 / (5 * 50 + 5 * 60)),
    "a number": (Conv(40, 5, 2, 0.02), (1, 4, 4, 30), 0.02**2),
}


@pytest.mark.parametrize("name", STARTS)
def test_weights_start_uniform_with_the_released_variance(name):
    module, shape, variance = STARTS[name]
    leaves = jax.tree.leaves_with_path(module.init(KEY, jnp.zeros(shape))["params"])
    kernel = next(np.asarray(leaf) for path, leaf in leaves if "kernel" in jax.tree_util.keystr(path))
    bias = next(np.asarray(leaf) for path, leaf in leaves if "bias" in jax.tree_util.keystr(path))
    np.testing.assert_allclose(kernel.var(), variance, rtol=0.03)  # at least 10,000 numbers
    np.testing.assert_allclose(np.abs(kernel).max(), np.sqrt(3 * variance), rtol=0.01)
    np.testing.assert_array_equal(bias, 0)


def test_layer_norm_is_over_the_whole_sample_with_a_scale_for_each_channel():
    images = jax.random.normal(KEY, (2, 4, 4, 3)) * jnp.array([1.0, 2.0, 3.0]) + 5
    params, found = made(LayerNorm(), images)
    assert params["scale"].shape == params["bias"].shape == (3,)
    expected = (images - images.mean((1, 2, 3), keepdims=True)) / jnp.sqrt(images.var((1, 2, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_layer_norm_in_bfloat16_has_its_statistics_in_float32():
    images = (jax.random.normal(KEY, (2, 4, 4, 3)) + 100).astype(jnp.bfloat16)
    _, found = made(LayerNorm(), images)
    wide = np.asarray(images, np.float32)
    expected = (wide - wide.mean((1, 2, 3), keepdims=True)) / wide.std((1, 2, 3), keepdims=True)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)  # the epsilon in the root is left out


def test_norms_by_name():
    images = jax.random.normal(KEY, (4, 2, 2, 3)) + 2
    assert Norm("none").init(KEY, images, train=True) == {}
    variables = Norm("batch").init(KEY, images, train=True)
    found, moved = Norm("batch").apply(variables, images, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(found.mean((0, 1, 2)), 0, atol=1e-5)
    assert not np.array_equal(jax.tree.leaves(moved)[0], jax.tree.leaves(variables["batch_stats"])[0])
    with pytest.raises(ValueError, match="batch, layer, none"):
        Norm("instance").init(KEY, images, train=True)


def test_unknown_starts_are_refused():
    with pytest.raises(ValueError, match="he, glorot"):
        Linear(3, "xavier").init(KEY, jnp.zeros((1, 2)))
