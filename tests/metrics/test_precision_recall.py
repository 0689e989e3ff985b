"""Precision, recall, density and coverage against loops over points, whatever the blocks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from stabletrain.metrics import precision_recall as module
from stabletrain.metrics.precision_recall import density_coverage, neighbour_radii, precision_recall


def loops(real, fake, k, strict):
    """The definitions, one point at a time: (precision, recall, density, coverage)."""

    def distance(a, b):
        return np.sqrt(np.sum((a.astype(np.float64) - b) ** 2))

    def radii(points):
        return [sorted(distance(a, b) for j, b in enumerate(points) if j != i)[k - 1] for i, a in enumerate(points)]

    def holds(point, centre, radius):
        return distance(point, centre) < radius if strict else distance(point, centre) <= radius

    real_radii, fake_radii = radii(real), radii(fake)
    inside = np.array([[holds(f, r, radius) for r, radius in zip(real, real_radii)] for f in fake])
    covered = np.array([[holds(r, f, radius) for f, radius in zip(fake, fake_radii)] for r in real])
    return inside.any(1).mean(), covered.any(1).mean(), inside.sum() / (k * len(fake)), inside.any(0).mean()


@pytest.fixture(params=[(8, 16), (1024, 4096)], ids=["small blocks", "one block"])
def _blocks(request, monkeypatch):
    monkeypatch.setattr(module, "ROWS", request.param[0])
    monkeypatch.setattr(module, "COLUMNS", request.param[1])


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(("n", "m"), [(41, 30), (16, 33)])
def test_against_loops(n, m):
    generator = np.random.default_rng(0)
    real = generator.normal(size=(n, 4)).astype(np.float32)
    fake = (0.8 * generator.normal(size=(m, 4)) + 0.4).astype(np.float32)
    found = precision_recall(real, fake, k=3)
    assert (found.precision, found.recall) == pytest.approx(loops(real, fake, 3, strict=False)[:2], abs=1e-12)
    others = density_coverage(real, fake, k=5)
    assert (others.density, others.coverage) == pytest.approx(loops(real, fake, 5, strict=True)[2:], abs=1e-12)


@pytest.mark.usefixtures("_blocks")
def test_duplicates_are_neighbours_at_distance_zero():
    """Quantised images of a collapsed generator are equal: the order of summation must not make them differ."""
    generator = np.random.default_rng(1)
    real = (1e3 * generator.normal(size=(30, 64))).astype(np.float32)
    fake = np.concatenate([np.repeat(real[:2], 6, axis=0), real[5:9] + 1])
    found = precision_recall(real, fake, k=3)
    assert (found.precision, found.recall) == pytest.approx(loops(real, fake, 3, strict=False)[:2], abs=1e-12)
    assert np.all(neighbour_radii(fake, 3)[:12] == 0)


def test_known_values_of_the_released_prdc():
    """N(0, 1) against 1.1 N(0, 1) + 0.1 in 32 dimensions, 500 each, k = 5: what the released function printed."""
    generator = np.random.default_rng(0)
    real, fake = generator.normal(size=(500, 32)), 1.1 * generator.normal(size=(500, 32)) + 0.1
    found, others = precision_recall(real, fake, k=5), density_coverage(real, fake, k=5)
    assert found.precision == pytest.approx(0.58, abs=1e-9)
    assert found.recall == pytest.approx(0.952, abs=1e-9)
    assert others.density == pytest.approx(0.4472, abs=1e-9)
    assert others.coverage == pytest.approx(0.844, abs=1e-9)


def test_radii_against_scipy():
    points = np.random.default_rng(2).normal(size=(100, 7))
    np.testing.assert_allclose(np.sqrt(neighbour_radii(points, 5)), np.sort(cdist(points, points))[:, 5], rtol=1e-10)


def test_extremes():
    generator = np.random.default_rng(3)
    real = generator.normal(size=(50, 3))
    same = precision_recall(real, real)
    assert (same.precision, same.recall) == (1.0, 1.0)
    far = precision_recall(real, real + 100)
    assert (far.precision, far.recall) == (0.0, 0.0)
    assert density_coverage(real, real).coverage == 1.0
    assert density_coverage(real, real + 100).density == 0.0


def test_progress_reaches_its_total(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 8)
    points = np.random.default_rng(4).normal(size=(20, 3))
    ticks: list[tuple[str, int, int]] = []
    precision_recall(points, points[:9], progress=lambda *tick: ticks.append(tick))
    assert [tick[1] for tick in ticks] == list(range(1, 11))
    assert {tick[2] for tick in ticks} == {10}


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="no neighbour number 3"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match="no distances"):
        precision_recall(np.zeros((9, 2)), np.zeros((9, 3)))
