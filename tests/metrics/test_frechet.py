"""The Frechet distance against closed forms and independent formulas, and its moments against NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stabletrain.metrics.frechet import (
    MomentAccumulator,
    Moments,
    frechet_distance,
    intra_class_frechet_distance,
    moments,
)

# All sums are float64: what is left is rounding, far below the promised 1e-5.
TIGHT: Any = {"rtol": 1e-10, "atol": 1e-10}


def random_covariance(generator, dimension):
    factor = generator.normal(size=(dimension, 2 * dimension))
    return factor @ factor.T / dimension


def test_diagonal_gaussians_have_a_closed_form():
    """|mu1 - mu2|^2 + sum (s1 - s2)^2 for standard deviations s."""
    generator = np.random.default_rng(0)
    means, deviations = generator.normal(size=(2, 30)), generator.uniform(0, 3, (2, 30))
    first, second = (Moments(9, mean, np.diag(s**2)) for mean, s in zip(means, deviations))
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((deviations[0] - deviations[1]) ** 2)
    np.testing.assert_allclose(frechet_distance(first, second), expected, **TIGHT)


def test_scaled_covariance_has_a_closed_form():
    """S and c^2 S: (1 - c)^2 tr S."""
    covariance = random_covariance(np.random.default_rng(1), 40)
    found = frechet_distance(Moments(9, np.zeros(40), covariance), Moments(9, np.zeros(40), 2.25 * covariance))
    np.testing.assert_allclose(found, 0.25 * np.trace(covariance), **TIGHT)


def test_general_gaussians_against_eigenvalues_of_the_product():
    """tr (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of the (not symmetric) product."""
    generator = np.random.default_rng(2)
    first, second = (Moments(99, generator.normal(size=50), random_covariance(generator, 50)) for _ in range(2))
    eigenvalues = np.linalg.eigvals(first.covariance @ second.covariance)
    expected = (
        np.sum((first.mean - second.mean) ** 2)
        + np.trace(first.covariance + second.covariance)
        - 2 * np.sum(np.sqrt(eigenvalues)).real
    )
    np.testing.assert_allclose(frechet_distance(first, second), expected, **TIGHT)


def test_is_symmetric_and_zero_for_equal():
    generator = np.random.default_rng(3)
    first, second = (moments(generator.normal(size=(80, 20)) * scale) for scale in (1, 3))
    np.testing.assert_allclose(frechet_distance(first, second), frechet_distance(second, first), **TIGHT)
    assert frechet_distance(first, first) < 1e-10
    assert frechet_distance(first, first) >= 0


@pytest.mark.parametrize(("n", "m"), [(20, 30), (20, 400), (2, 3)])
def test_fewer_samples_than_dimensions(n, m):
    """Singular covariances against the nuclear norm of the centred samples, which needs no covariance at all."""
    generator = np.random.default_rng(4)
    dimension = 120
    x, y = generator.normal(size=(n, dimension)), 1.5 * generator.normal(size=(m, dimension)) + 0.1
    cx, cy = (a - a.mean(0) for a in (x, y))
    nuclear = np.linalg.norm(cx @ cy.T, "nuc") / np.sqrt((n - 1) * (m - 1))
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.sum(cx**2) / (n - 1) + np.sum(cy**2) / (m - 1) - 2 * nuclear
    np.testing.assert_allclose(frechet_distance(moments(x), moments(y)), expected, rtol=1e-9)


def test_equal_singular_covariances_are_at_distance_zero():
    """Where roots of eigenvalues that should be zero come back as 1e-8 each, this is not zero."""
    features = np.random.default_rng(5).normal(size=(40, 300)) * 10
    scale = np.sum(features**2) / 40
    assert frechet_distance(moments(features), moments(features)) < 1e-12 * scale


def test_features_that_never_fire_change_nothing():
    generator = np.random.default_rng(6)
    x, y = generator.normal(size=(2, 100, 16))
    padded = [np.concatenate([a, np.zeros((100, 9))], axis=1) for a in (x, y)]
    np.testing.assert_allclose(
        frechet_distance(*map(moments, padded)), frechet_distance(moments(x), moments(y)), **TIGHT
    )


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_streamed_moments_are_numpys(batch_size):
    """Large means and float32 input: sums of x and x x^T in float32 would lose every digit of this covariance."""
    generator = np.random.default_rng(7)
    features = (1e3 + generator.normal(size=(130, 12))).astype(np.float32)
    found = moments(features[start : start + batch_size] for start in range(0, 130, batch_size))
    assert found.count == 130
    np.testing.assert_allclose(found.mean, features.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(features.astype(np.float64), rowvar=False), **TIGHT)


def test_bad_input_is_refused():
    accumulator = MomentAccumulator(4)
    with pytest.raises(ValueError, match=r"expected features \[B, 4\]"):
        accumulator.add(np.zeros((3, 5)))
    with pytest.raises(ValueError, match="not finite"):
        accumulator.add(np.array([[0.0, np.nan, 0.0, 0.0]]))
    accumulator.add(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="at least two"):
        accumulator.moments()
    with pytest.raises(ValueError, match="4 and of 5"):
        frechet_distance(Moments(3, np.zeros(4), np.eye(4)), Moments(3, np.zeros(5), np.eye(5)))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(Moments(3, np.zeros(2), np.eye(2)), Moments(3, np.zeros(2), np.full((2, 2), np.inf)))


def test_intra_class_distance_is_the_mean_of_the_classes():
    generator = np.random.default_rng(8)
    labels = np.array([0] * 20 + [2] * 50)
    real, fake = generator.normal(size=(2, 70, 5))
    mean, distances = intra_class_frechet_distance(real, labels, fake[::-1], labels[::-1])
    assert list(distances) == [0, 2]
    for label in (0, 2):
        expected = frechet_distance(moments(real[labels == label]), moments(fake[::-1][labels[::-1] == label]))
        assert distances[label] == expected
    assert mean == pytest.approx(np.mean(list(distances.values())))
    with pytest.raises(ValueError, match="class 2 has 50 real and 0 generated"):
        intra_class_frechet_distance(real, labels, fake[:20], labels[:20])
