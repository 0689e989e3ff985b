"""The Inception Score against a plain loop, and where its value is known."""

from __future__ import annotations

import numpy as np
import pytest

from stabletrain.metrics import inception_score as module
from stabletrain.metrics.inception_score import inception_score


def reference(logits, splits):
    scores = []
    for part in np.array_split(logits.astype(np.float64), splits):
        p = np.exp(part - part.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        marginal = p.mean(0)
        scores.append(np.exp(np.mean([np.sum(row * (np.log(row) - np.log(marginal))) for row in p])))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("splits", [1, 2, 10])
def test_against_a_loop(splits, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 16)
    logits = 3 * np.random.default_rng(0).normal(size=(100, 12)).astype(np.float32)
    found = inception_score(logits, splits=splits)
    mean, std = reference(logits, splits)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-10)
    if splits == 1:
        assert found.std is None
    else:
        assert found.std is not None
        np.testing.assert_allclose(found.std, std, rtol=1e-8)


def test_extremes():
    """Equal answers score 1; certain answers over K classes in equal number score K; -1e4 is probability 0."""
    assert inception_score(np.zeros((20, 7)), splits=2).mean == pytest.approx(1.0, abs=1e-12)
    certain = np.where(np.arange(50)[:, None] % 5 == np.arange(5), 0.0, -1e4)
    assert inception_score(certain, splits=10).mean == pytest.approx(5.0, abs=1e-12)


def test_parts_are_contiguous_as_in_the_released_code():
    certain = np.where((np.arange(50) // 10)[:, None] == np.arange(5), 0.0, -1e4)
    assert inception_score(certain, splits=5).mean == pytest.approx(1.0)
    assert inception_score(certain, splits=1).mean == pytest.approx(5.0)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="10 splits"):
        inception_score(np.zeros((9, 3)))
    with pytest.raises(ValueError, match="not finite"):
        inception_score(np.full((20, 3), np.nan))
