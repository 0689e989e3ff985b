"""Continual-learning numbers by hand, with their signs, for tasks one after another and side by side."""

from __future__ import annotations

import json

import numpy as np
import pytest

from stabletrain.metrics.continual import AccuracyMatrix


@pytest.fixture
def sequential():
    """Three tasks, one after another."""
    matrix = AccuracyMatrix((10, 20, 30))
    matrix.record(10, [0.9, 0.1, 0.1])
    matrix.record(20, [0.95, 0.8, 0.1])
    matrix.record(30, [0.5, 0.6, 0.7])
    return matrix


def test_sequential_tasks_by_hand(sequential):
    scalars = sequential.scalars()
    assert scalars["average_accuracy_at_own_end"] == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert scalars["average_accuracy_final"] == pytest.approx((0.5 + 0.6 + 0.7) / 3)
    assert scalars["accuracy_change"] == pytest.approx((-0.4 - 0.2 + 0) / 3), "negative = forgetting"
    assert scalars["backward_transfer"] == pytest.approx((-0.4 - 0.2) / 2), "negative = forgetting"
    assert scalars["peak_forgetting"] == pytest.approx((0.45 + 0.2) / 2), "positive = forgetting"


def test_relation_of_the_two_signs(sequential):
    """Backward transfer is the accuracy change times T / (T - 1)."""
    assert sequential.backward_transfer() == pytest.approx(sequential.accuracy_change() * 3 / 2)


def test_parallel_tasks_by_hand():
    """Two tasks end at the last step; measurements between ends count for the peak from a task's end on only."""
    matrix = AccuracyMatrix((30, 10, 30))
    matrix.record(10, [0.3, 0.6, 0.2])
    matrix.record(30, [0.8, 0.5, 0.9])
    matrix.record(5, [0.2, 0.99, np.nan])
    matrix.record(20, [0.5, 0.7, 0.2])
    assert matrix.steps == [5, 10, 20, 30]
    assert matrix.average_at_own_end() == pytest.approx((0.8 + 0.6 + 0.9) / 3)
    assert matrix.accuracy_change() == pytest.approx(-0.1 / 3)
    assert matrix.peak_forgetting() == pytest.approx(0.2)


def test_positive_transfer_is_positive():
    matrix = AccuracyMatrix((1, 2))
    matrix.record(1, [0.5, 0.0])
    matrix.record(2, [0.7, 0.6])
    assert matrix.accuracy_change() == pytest.approx(0.1)
    assert matrix.backward_transfer() == pytest.approx(0.2)
    assert matrix.peak_forgetting() == 0.0


def test_one_task_has_no_transfer():
    matrix = AccuracyMatrix((4,))
    matrix.record(4, [0.5])
    assert set(matrix.scalars()) == {
        "average_accuracy_at_own_end", "average_accuracy_final", "accuracy_change"
    }  # fmt: skip


def test_missing_measurements_are_named():
    matrix = AccuracyMatrix((4, 8))
    assert matrix.missing == [4, 8]
    matrix.record(4, [0.5, 0.1])
    assert matrix.missing == [8]
    with pytest.raises(ValueError, match="task 1 at its own end"):
        matrix.average_at_own_end()
    with pytest.raises(ValueError, match="task 0 at the last end"):
        matrix.final_average()


def test_survives_json(sequential):
    sequential.record(15, [0.1, np.nan, 0.2])
    again = AccuracyMatrix.from_dict(json.loads(json.dumps(sequential.to_dict(), allow_nan=False)))
    assert again.ends == sequential.ends
    np.testing.assert_array_equal(again.values, sequential.values)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least one task"):
        AccuracyMatrix(())
    matrix = AccuracyMatrix((1, 2))
    with pytest.raises(ValueError, match="3 accuracies for 2 tasks"):
        matrix.record(1, [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"share in \[0, 1\]"):
        matrix.record(1, [50.0, 60.0])
