"""The kernel distance against scikit-learn's kernel, its expectation, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics.pairwise import polynomial_kernel

from stabletrain.metrics.kid import kernel_distance, unbiased_mmd2


def reference(x, y):
    kernel = {"degree": 3, "gamma": 1 / x.shape[1], "coef0": 1}
    xx, yy, xy = polynomial_kernel(x, **kernel), polynomial_kernel(y, **kernel), polynomial_kernel(x, y, **kernel)
    n, m = len(x), len(y)
    return (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * np.mean(xy)


@pytest.mark.parametrize(("n", "m", "dimension"), [(40, 40, 8), (30, 50, 64)])
def test_against_scikit_learns_polynomial_kernel(n, m, dimension):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(n, dimension)).astype(np.float32)
    y = (1.2 * generator.normal(size=(m, dimension)) + 0.1).astype(np.float32)
    expected = reference(x.astype(np.float64), y.astype(np.float64))
    # Differences of means near 1 in float64: absolute rounding 1e-15.
    np.testing.assert_allclose(unbiased_mmd2(x, y), expected, rtol=1e-9, atol=1e-13)


def test_subsets_are_those_of_the_seed():
    generator = np.random.default_rng(1)
    real, fake = generator.normal(size=(2, 60, 5))
    first = kernel_distance(real, fake, subsets=7, subset_size=20, seed=3)
    assert first == kernel_distance(real, fake, subsets=7, subset_size=20, seed=3)
    assert first != kernel_distance(real, fake, subsets=7, subset_size=20, seed=4)
    assert (first.subsets, first.subset_size) == (7, 20)
    assert first.std is not None
    assert first.std > 0


def test_is_unbiased():
    """For equal distributions the mean over draws is zero within its error; the biased one would be above 0.1."""
    generator = np.random.default_rng(2)
    found = [unbiased_mmd2(*generator.normal(size=(2, 20, 4))) for _ in range(300)]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(300)


def test_small_sets_are_taken_whole():
    generator = np.random.default_rng(3)
    real, fake = generator.normal(size=(2, 50, 5))
    found = kernel_distance(real, fake)
    assert (found.subsets, found.subset_size, found.std) == (1, 50, None)
    assert found.mean == unbiased_mmd2(real, fake)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="no kernel distance"):
        kernel_distance(np.zeros((5, 3)), np.zeros((5, 4)))
    with pytest.raises(ValueError, match="no kernel distance"):
        kernel_distance(np.zeros((1, 3)), np.zeros((5, 3)))
