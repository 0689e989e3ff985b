"""Toys in the plane: where the points lie, which modes are covered, and the exact Wasserstein distance."""

from __future__ import annotations

import numpy as np
import pytest

from stabletrain.gan.toys import (
    TOY_NAMES,
    exact_wasserstein,
    held_out_points,
    mixture,
    mode_report,
    toy_points,
    training_points,
)


@pytest.mark.parametrize("name", TOY_NAMES)
def test_training_points_are_fixed_and_apart_from_the_held_out_ones(name):
    points = training_points(name)
    assert points.shape == (100_000, 2)
    assert points.dtype == np.float32
    np.testing.assert_array_equal(points, training_points(name))
    assert np.abs(points).max() < 2.5
    assert not set(map(tuple, held_out_points(name))) & set(map(tuple, points))


def test_eight_gaussians_lie_on_a_circle_of_radius_root_two():
    centres = mixture("gaussians8").centres
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 2 / 1.414)
    np.testing.assert_allclose(np.diff(np.sort(np.arctan2(centres[:, 1], centres[:, 0]))), np.pi / 4)


def test_twenty_five_gaussians_have_the_released_scale():
    points = training_points("gaussians25")
    shape = mixture("gaussians25")
    assert len({tuple(centre) for centre in shape.centres}) == 25
    residual = points - shape.centres[np.abs(points[:, None] - shape.centres).sum(-1).argmin(1)]
    # 200,000 numbers: the deviation is known to 0.2 %
    np.testing.assert_allclose(residual.std(), 0.05 / 2.828, rtol=0.01)
    np.testing.assert_allclose(points.std(0), 1, rtol=0.01)  # 2.828 is the root of the variance 8 of the grid


def test_the_swiss_roll_lies_on_its_spiral():
    """Without noise a point at angle t has radius t / 7.5."""
    points = 7.5 * training_points("swissroll").astype(float)
    radius, angle = np.linalg.norm(points, axis=1), np.arctan2(points[:, 1], points[:, 0])
    turns = (radius - angle) / (2 * np.pi)
    off = np.abs(turns - np.round(turns)) * 2 * np.pi
    assert np.quantile(off, 0.5) < 0.25
    assert off.max() < 1.5
    assert 1.5 * np.pi - 1 < radius.min()
    assert radius.max() < 4.5 * np.pi + 1.5


def test_real_samples_cover_every_mode_with_the_share_that_three_sigmas_hold():
    for name in ("gaussians8", "gaussians25"):
        report = mode_report(toy_points(name, 20_000, np.random.default_rng(0)), mixture(name))
        assert report.covered == report.modes
        assert abs(report.high_quality - (1 - np.exp(-4.5))) < 0.004  # five standard errors


def test_modes_that_few_or_no_samples_reach_are_not_covered():
    shape = mixture("gaussians8")
    points = np.repeat(shape.centres, [100, 100, 100, 100, 2, 98, 0, 0], axis=0)
    report = mode_report(points, shape)
    assert (report.covered, report.high_quality) == (5, 1.0)  # 2 of 500 is below 0.8 %
    points[:250] = np.nan
    report = mode_report(points, shape)
    assert (report.covered, report.high_quality) == (3, 0.5)


def test_the_distance_of_a_shifted_sample_is_the_shift():
    points = np.random.default_rng(1).standard_normal((60, 2))
    shift = np.array([0.3, -0.4])
    shuffled = np.random.default_rng(2).permutation(points) + shift
    np.testing.assert_allclose(exact_wasserstein(points, shuffled), 0.5, rtol=1e-12)
    assert exact_wasserstein(points, points[::-1]) == 0.0


def test_in_one_dimension_the_best_assignment_is_the_sorted_one():
    first, second = np.random.default_rng(3).standard_normal((2, 100, 1))
    expected = np.abs(np.sort(first[:, 0]) - np.sort(second[:, 0])).mean()
    np.testing.assert_allclose(exact_wasserstein(first, second), expected, rtol=1e-12)


def test_samples_that_do_not_compare():
    with pytest.raises(ValueError, match="one shape"):
        exact_wasserstein(np.zeros((3, 2)), np.zeros((4, 2)))
    assert np.isnan(exact_wasserstein(np.full((3, 2), np.nan), np.zeros((3, 2))))
    with pytest.raises(ValueError, match="gaussians8, gaussians25"):
        toy_points("gaussians9", 5, np.random.default_rng(0))
