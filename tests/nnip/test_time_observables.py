"""Observables in time, their noise floors, and what the reference reaches of each criterion."""

from __future__ import annotations

import numpy as np
import pytest

from stabletrain.errors import ConfigError
from stabletrain.nnip.criteria import Criteria, Reference, Thresholds, reference_extremes
from stabletrain.nnip.observables import distance_distribution, noise_floor, radial_distributions
from stabletrain.nnip.systems import make_system
from stabletrain.nnip.time_observables import (
    AUTOCORRELATION,
    DISPLACEMENT,
    ReferenceTrajectory,
    finite_velocities,
    segments,
    time_observables,
    unwrapped,
)

RNG = np.random.default_rng(0)
CELL = 12.0
LIQUID = make_system([18] * 8, np.indices((2, 2, 2)).reshape(3, -1).T * 6.0, CELL)
MOLECULE = make_system([8, 1, 1], [[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])


def random_walk(frames: int, step: float) -> np.ndarray:
    """Eight atoms that take independent normal steps; their common drift is part of it."""
    return np.cumsum(RNG.normal(size=(frames, 8, 3)) * step, axis=0)


def test_oscillating_atoms_have_the_cosine_as_their_autocorrelation() -> None:
    period, spacing = 40.0, 1.0
    phase = 2 * np.pi * np.arange(200) * spacing / period
    x = np.asarray([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]) + np.stack([np.sin(phase + a) for a in (0, 1, 2)], axis=-1)[
        :, :, None
    ] * np.asarray([1.0, 0.5, -0.2])
    (found,) = time_observables(MOLECULE, spacing, 200)
    assert found.name == AUTOCORRELATION
    # Whole and broken periods do not average alike: 5 periods, so a few per cent.
    np.testing.assert_allclose(found.of_segment(x), np.cos(2 * np.pi * found.grid / period), atol=0.05)
    assert found.error(np.ones(4), np.zeros(4)) == 1.0
    velocity = finite_velocities(x, spacing)
    expected = 2 * np.pi / period * np.cos(phase[1:-1]) * np.sin(2 * np.pi / period) / (2 * np.pi / period)
    np.testing.assert_allclose(velocity[:, 0, 0], expected, atol=1e-12)


def test_wrapped_frames_are_joined_again() -> None:
    walk = 6.0 + random_walk(300, 0.5)
    joined = unwrapped(walk % CELL, LIQUID.cell)
    np.testing.assert_allclose(joined - joined[0], walk - walk[0], atol=1e-9)
    np.testing.assert_array_equal(unwrapped(walk, None), walk)


def test_segments_are_whole() -> None:
    pieces = segments([np.arange(10), np.arange(3), np.arange(4)], 4)
    assert [piece.tolist() for piece in pieces] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]


def test_diffusivity_of_random_walks_is_found_with_its_noise() -> None:
    """Simulations of the reference's own walk are within its noise; of one with twice the steps they are not."""
    step, spacing = 0.1, 10.0
    reference = ReferenceTrajectory(LIQUID, random_walk(2000, step) % CELL, spacing)
    # The drift of eight atoms is taken out: seven eighths of a free walker's.
    exact = step**2 / (2 * spacing) * 1e4 * 7 / 8
    same, twice = ([random_walk(100, width) for _ in range(6)] for width in (step, 2 * step))
    errors, diffusion = reference.compare(same, spacing / 1000)
    assert diffusion is not None
    assert set(errors) == {AUTOCORRELATION, DISPLACEMENT}
    # 20 segments of 100 frames: a fifth, as the noise floor says.
    assert diffusion.reference == pytest.approx(exact, rel=0.25)
    assert abs(diffusion.simulated - diffusion.reference) < 4 * diffusion.noise_floor
    assert 0 < diffusion.noise_floor < 0.5 * exact
    others, faster = reference.compare(twice, spacing / 1000)
    assert faster is not None
    assert faster.simulated == pytest.approx(4 * exact, rel=0.4)
    assert others[DISPLACEMENT].error > 5 * others[DISPLACEMENT].noise_floor
    assert errors[DISPLACEMENT].error < 5 * errors[DISPLACEMENT].noise_floor
    none, nothing = reference.compare([np.zeros((0, 8, 3))], spacing / 1000)
    assert nothing is not None
    assert np.isnan(nothing.simulated)
    assert np.isnan(none[AUTOCORRELATION].error)


def test_frames_that_do_not_fit_are_refused_before_any_simulation() -> None:
    reference = ReferenceTrajectory(LIQUID, random_walk(100, 0.1), 10.0)
    assert reference.stride(0.005) == 2
    with pytest.raises(ConfigError, match="does not divide"):
        reference.stride(0.007)
    with pytest.raises(ConfigError, match="need 8 frames"):
        reference.check(14, 0.005)
    with pytest.raises(ConfigError, match="32 of the reference, not 31"):
        ReferenceTrajectory(LIQUID, random_walk(31, 0.1), 10.0).check(100, 0.01)


def test_noise_floor_of_weighted_frames_is_that_of_their_effective_number() -> None:
    """Equal weights change nothing but the draw; weights on a tenth of the frames leave a tenth to compare with."""
    h = distance_distribution(9, r_max=2.0, dr=0.1)
    curves = RNG.normal(size=(2000, 20))
    plain = noise_floor(h, curves, 50)
    assert noise_floor(h, curves, 50, weights=np.full(2000, 1 / 2000)) == pytest.approx(plain, rel=0.1)
    few = np.where(np.arange(2000) < 200, 1.0, 0.0)
    # A sample of 100 of 200, whose others are some 120: sqrt(1 / 100 + 1 / 120) against sqrt(1 / 50 + 1 / 1950).
    ratio = np.sqrt((1 / 100 + 1 / 120) / (1 / 50 + 1 / 1950))
    assert noise_floor(h, curves, 10_000, weights=few) == pytest.approx(ratio * plain, rel=0.15)
    assert np.isnan(noise_floor(h, curves[:1], 1))


def test_what_the_reference_reaches_of_each_criterion() -> None:
    lengths = np.linalg.norm([[0.96, 0, 0], [-0.24, 0.93, 0]], axis=1)
    still = np.asarray([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    frames = np.stack([still, still, still])
    frames[1, 1, 0] += 0.07
    criteria = Criteria(MOLECULE, Thresholds(bond_deviation=0.5, temperature_factor=3.0), Reference(lengths), 300.0, 3)
    found = reference_extremes(criteria, frames)
    assert found["bond_deviation"] == pytest.approx(0.07, abs=1e-5)
    assert found["temperature_factor"] == pytest.approx(1 + 4 * np.sqrt(2 / 3))

    rdfs = tuple(radial_distributions(LIQUID.species, np.asarray(LIQUID.cell), r_max=6.0))
    liquid = np.stack([RNG.uniform(0, CELL, size=(8, 3)) for _ in range(40)])
    mean = {rdfs[0].name: np.asarray(rdfs[0].of_frames(liquid.astype(np.float32))).mean(axis=0)}
    thresholds = Thresholds(rdf_error=3.0, intermolecular_distance=1.0, energy_drift=0.1)
    criteria = Criteria(LIQUID, thresholds, Reference(np.zeros(0), mean), 300.0, 21, rdfs)
    single, pooled = (reference_extremes(criteria, liquid, window=window) for window in (1, 20))
    assert single["rdf_error"] > 2 * pooled["rdf_error"] > 0  # more frames in a window, less noise
    vectors = liquid[:, :, None] - liquid[:, None]
    distances = np.linalg.norm(vectors - CELL * np.round(vectors / CELL), axis=-1) + 99 * np.eye(8)
    assert single["intermolecular_distance"] == pytest.approx(distances.min(), abs=1e-4)
    assert single["energy_drift"] == 0.0
