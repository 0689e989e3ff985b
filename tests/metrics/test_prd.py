"""PRD curves against the definition and closed forms; F scores."""

from __future__ import annotations

import numpy as np
import pytest

from stabletrain.metrics.prd import Curve, curve_of_histograms, prd_curve


def test_curve_against_the_definition():
    """alpha(l) = sum min(l p, q), beta(l) = sum min(p, q / l), in a loop."""
    generator = np.random.default_rng(0)
    real, fake = generator.dirichlet(np.ones(6), 2)
    curve = curve_of_histograms(real, fake, angles=11)
    for index, angle in enumerate(np.linspace(1e-10, np.pi / 2 - 1e-10, 11)):
        slope = np.tan(angle)
        assert curve.precision[index] == pytest.approx(sum(min(slope * p, q) for p, q in zip(real, fake)), abs=1e-12)
        assert curve.recall[index] == pytest.approx(sum(min(p, q / slope) for p, q in zip(real, fake)), abs=1e-12)


def test_equal_and_disjoint_distributions():
    equal = curve_of_histograms(np.full(4, 0.25), np.full(4, 0.25))
    assert equal.f_score(8) == pytest.approx(1.0)
    assert equal.f_score(1 / 8) == pytest.approx(1.0)
    disjoint = curve_of_histograms(np.array([1.0, 0]), np.array([0, 1.0]))
    assert disjoint.f_score(8) == 0.0


@pytest.mark.parametrize("dropped", [False, True], ids=["invented mode", "dropped mode"])
def test_a_dropped_mode_costs_recall_and_an_invented_one_precision(dropped):
    """One of two modes: the curve has the corner (1, 1/2) or (1/2, 1), where F_beta has a closed form."""
    full, half = np.array([0.5, 0.5]), np.array([1.0, 0.0])
    curve = curve_of_histograms(full, half) if dropped else curve_of_histograms(half, full)
    precision, recall = (1.0, 0.5) if dropped else (0.5, 1.0)

    def f_score(beta):
        return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)

    # 1001 angles: the corner is met within half a step of 0.0016.
    assert curve.f_score(8) == pytest.approx(f_score(8), abs=2e-3)
    assert curve.f_score(1 / 8) == pytest.approx(f_score(1 / 8), abs=2e-3)


def test_f_score_is_the_best_of_the_curve():
    curve = Curve(np.array([0.0, 0.2, 0.9]), np.array([0.0, 0.9, 0.1]))
    by_hand = max(2 * p * r / (p + r) for p, r in ((0.2, 0.9), (0.9, 0.1)))
    assert curve.f_score(1) == pytest.approx(by_hand)


def test_features_in_clusters():
    """Real data in four clusters, generated data in two of them: recall suffers, precision does not."""
    generator = np.random.default_rng(1)
    centres = 50 * np.eye(4)
    real = centres[np.arange(80) % 4] + generator.normal(size=(80, 4))
    fake = centres[np.arange(80) % 2] + generator.normal(size=(80, 4))
    curve = prd_curve(real, fake, clusters=4, runs=2)
    assert curve.f_score(1 / 8) > 0.95
    assert curve.f_score(8) < 0.6
    again = prd_curve(real, fake, clusters=4, runs=2)
    np.testing.assert_array_equal(curve.precision, again.precision)


def test_a_collapsed_generator_has_fewer_points_than_clusters():
    real = np.repeat(np.eye(3), 10, axis=0)
    fake = np.repeat(np.eye(3)[:1], 30, axis=0)
    curve = prd_curve(real, fake, clusters=20, runs=1)
    assert curve.f_score(8) < 0.5


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="equally many"):
        prd_curve(np.zeros((30, 2)), np.zeros((20, 2)))
    with pytest.raises(ValueError, match="cannot make 20 clusters"):
        prd_curve(np.zeros((5, 2)), np.zeros((5, 2)))
    with pytest.raises(ValueError, match="two distributions"):
        curve_of_histograms(np.array([0.5, 0.2]), np.array([0.5, 0.5]))
