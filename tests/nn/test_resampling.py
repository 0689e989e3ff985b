"""Filtered halving and doubling: against PyTorch, each other, and the plain forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.nn.resampling import doubled, filter_of, halved

TAPS = [(1, 1), (1, 3, 3, 1), (1, 2, 3, 4)]


@pytest.mark.parametrize("taps", TAPS)
def test_doubling_is_four_times_the_transpose_of_halving(taps):
    x, y = jnp.zeros((1, 6, 4, 2)), jax.random.normal(jax.random.key(0), (1, 3, 2, 2))
    transposed = jax.linear_transpose(lambda array: halved(array, taps), x)(y)[0]
    np.testing.assert_allclose(doubled(y, taps), 4.0 * transposed, atol=1e-6)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_both_keep_a_constant_image_away_from_the_border(taps):
    x = jnp.full((1, 8, 8, 3), 2.5)
    np.testing.assert_allclose(halved(x, taps)[:, 1:-1, 1:-1], 2.5, rtol=1e-6)
    np.testing.assert_allclose(doubled(x, taps)[:, 2:-2, 2:-2], 2.5, rtol=1e-6)


def test_the_two_taps_average_and_repeat_and_the_filter_agrees():
    x = jnp.arange(8.0).reshape(1, 2, 4, 1)
    np.testing.assert_array_equal(halved(x)[0, 0, :, 0], [2.5, 4.5])
    np.testing.assert_array_equal(doubled(x)[0, 0, :, 0], [0, 0, 1, 1, 2, 2, 3, 3])
    # as many taps written out, which takes the general way
    np.testing.assert_allclose(halved(x, (0, 1, 1, 0)), halved(x), rtol=1e-6)
    np.testing.assert_allclose(doubled(x, (0, 1, 1, 0)), doubled(x), rtol=1e-6)


def test_filters_have_sum_one_and_an_even_number_of_taps():
    np.testing.assert_allclose(filter_of((1, 3, 3, 1)).sum(), 1.0)
    for taps in [(1, 2, 1), (), (1, -1)]:
        with pytest.raises(ValueError, match="even number"):
            halved(jnp.zeros((1, 4, 4, 1)), taps)


@pytest.mark.torch
def test_a_filter_that_is_not_symmetric_is_applied_as_pytorch_does():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, 6, 8, 3)).astype(np.float32)
    kernel = torch.tensor(filter_of((1, 2, 3, 4)), dtype=torch.float32).expand(3, 1, -1, -1)
    images = torch.tensor(x).permute(0, 3, 1, 2)
    down = torch.nn.functional.conv2d(images, kernel, stride=2, padding=1, groups=3)
    up = torch.nn.functional.conv_transpose2d(images, 4 * kernel, stride=2, padding=1, groups=3)
    # float32 sums of sixteen products
    np.testing.assert_allclose(halved(x, (1, 2, 3, 4)), down.permute(0, 2, 3, 1), atol=1e-6)
    np.testing.assert_allclose(doubled(x, (1, 2, 3, 4)), up.permute(0, 2, 3, 1), atol=1e-6)
