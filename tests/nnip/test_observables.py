"""Observables against NumPy's histograms, ideal gases, free flight and random walks."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.methods.stable import effective_sample_size
from stabletrain.nnip.geometry import angles_of, bond_angles, pair_lengths
from stabletrain.nnip.observables import (
    angle_distribution,
    diffusivity,
    distance_distribution,
    mean_curve,
    mean_square_displacement,
    noise_floor,
    radial_distribution,
    radial_distributions,
    smeared_distance_distribution,
    static_observables,
    temperature_weights,
    velocity_autocorrelation,
)
from stabletrain.nnip.systems import make_system
from stabletrain.nnip.units import BOLTZMANN

RNG = np.random.default_rng(0)
FRAMES = RNG.normal(size=(5, 9, 3)).astype(np.float32) * 1.5


def ordered_distances(frame: np.ndarray) -> np.ndarray:
    """The distances of all ordered pairs without i = j, computed as float32 as the observable does."""
    i, j = np.nonzero(~np.eye(len(frame), dtype=bool))
    low, high = np.minimum(i, j), np.maximum(i, j)
    pairs = np.stack([low, high], axis=1)
    return np.asarray(pair_lengths(jnp.asarray(frame), pairs))


def test_distance_distribution_is_numpys_histogram() -> None:
    """The same counts to the last one, as density, with the released code's bins."""
    h = distance_distribution(9, r_max=6.0, dr=0.02)
    edges = np.linspace(1e-6, 6.0, 301).astype(np.float32)
    curves = np.asarray(h.of_frames(jnp.asarray(FRAMES)))
    for frame, curve in zip(FRAMES, curves, strict=True):
        counts, _ = np.histogram(ordered_distances(frame), bins=edges)
        np.testing.assert_array_equal(np.round(curve * h.spacing * counts.sum()), counts)
        np.testing.assert_allclose(curve, counts / counts.sum() / h.spacing, rtol=1e-5)
        assert curve.sum() * h.spacing == pytest.approx(1.0, rel=1e-5)


def test_smeared_distribution_is_the_sum_of_gaussians() -> None:
    h = smeared_distance_distribution(9, r_max=6.0, dr=0.05, width=0.04)
    distances = ordered_distances(FRAMES[0])
    sums = np.exp(-((distances[:, None] - h.grid) ** 2) / (2 * 0.04**2)).sum(0)
    np.testing.assert_allclose(
        h.of_frame(jnp.asarray(FRAMES[0])), sums / sums.sum() / h.spacing, rtol=1e-3, atol=1e-5
    )  # float32 of a difference of up to 6 A, over 0.04 A


def test_distributions_do_not_change_with_the_place_and_the_order_of_atoms() -> None:
    h = smeared_distance_distribution(9, width=0.05)
    rotation = np.linalg.qr(RNG.normal(size=(3, 3)))[0].astype(np.float32)
    moved = FRAMES[0][RNG.permutation(9)] @ rotation + np.float32(3.0)
    np.testing.assert_allclose(h.of_frame(jnp.asarray(moved)), h.of_frame(jnp.asarray(FRAMES[0])), atol=1e-3)


def test_angles() -> None:
    """Water and a straight line; a triple for each pair of bonds at an atom."""
    bonds = np.asarray([[0, 1], [0, 2], [2, 3]])
    triples = angles_of(bonds)
    assert triples.tolist() == [[1, 0, 2], [0, 2, 3]]
    x = jnp.asarray([[0.0, 0, 0], [0.0, 1, 0], [1.0, 0, 0], [2.0, 0, 0]])
    np.testing.assert_allclose(bond_angles(x, triples), [90.0, 180.0], atol=1e-4)
    curve = np.asarray(angle_distribution(triples).of_frame(x))
    assert curve[90] == pytest.approx(0.5)
    assert curve[179] == pytest.approx(0.5)  # the last interval is closed


def test_rdf_of_an_ideal_gas_is_one_and_a_lattice_has_peaks() -> None:
    cell = np.eye(3) * 10.0
    gas = RNG.uniform(0, 10, size=(200, 30, 3))
    for first, second in ((np.arange(30), np.arange(30)), (np.arange(10), np.arange(10, 30))):
        g = radial_distribution("g", first, second, cell, r_max=5.0, dr=0.5)
        curve = np.asarray(mean_curve(g.of_frames(jnp.asarray(gas))))
        # 200 frames of 435 (200) pairs: 80 counts or more in a shell beyond 1 A, so 11 % at worst.
        np.testing.assert_allclose(curve[3:], 1.0, atol=0.15)
    lattice = np.stack(np.meshgrid(*[np.arange(4) * 2.5] * 3), axis=-1).reshape(1, -1, 3) + 37.0  # unwrapped
    g = radial_distribution("g", np.arange(64), np.arange(64), cell, r_max=4.0, dr=0.1)
    curve = np.asarray(g.of_frames(jnp.asarray(lattice)))[0]
    peaks = g.grid[curve > 0]
    np.testing.assert_allclose(sorted({round(float(r), 1) for r in peaks}), [2.5, 3.5], atol=0.11)
    # Six neighbours at the lattice constant: the integral of 4 pi r^2 rho g over the first peak.
    first = np.abs(g.grid - 2.5) < 0.2
    edges = np.stack([g.grid - g.spacing / 2, g.grid + g.spacing / 2])
    shells = 4 / 3 * np.pi * (edges[1] ** 3 - edges[0] ** 3)
    # g counts each atom's neighbours over N - 1 others instead of N.
    assert (curve * shells * 63 / 1000)[first].sum() == pytest.approx(6.0, rel=1e-3)


def test_rdf_beyond_half_the_cell_is_refused() -> None:
    with pytest.raises(ValueError, match="half of the cell"):
        radial_distribution("g", np.arange(3), np.arange(3), np.eye(3) * 10.0, r_max=5.1)


def test_rdfs_by_pair_of_elements() -> None:
    names = [g.name for g in radial_distributions(np.asarray([8, 1, 1, 8, 1, 1]), np.eye(3) * 13.0)]
    assert names == ["RDF H-H", "RDF H-O", "RDF O-O"]


def test_a_molecule_has_distances_and_angles_and_a_cell_has_rdfs() -> None:
    water = np.asarray([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    assert [o.name for o in static_observables(make_system([8, 1, 1], water))] == ["h(r)", "angles"]
    boxed = static_observables(make_system([8, 1, 1], water, 9.0))
    assert [o.name for o in boxed] == ["RDF H-H", "RDF H-O"]
    assert boxed[0].grid.max() < 4.5
    assert [o.name for o in static_observables(make_system([1, 1], [[0.0, 0, 0], [0.7, 0, 0]]))] == ["h(r)"]


def test_error_is_the_integral_of_the_difference() -> None:
    h = distance_distribution(9, r_max=2.0, dr=0.5)
    assert h.error(np.asarray([1.0, 0, 0, 1]), np.asarray([0.0, 1, 0, 1])) == pytest.approx(1.0)
    assert h.error(np.ones(4), np.zeros(4)) == pytest.approx(2.0 * 1.0)  # r_max times the mean difference


def test_mean_curve_leaves_out_what_is_not_valid_and_takes_weights() -> None:
    curves = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [jnp.nan, 0.0]])
    valid = jnp.asarray([True, True, False])
    np.testing.assert_allclose(mean_curve(curves, valid), [2.0, 3.0])
    np.testing.assert_allclose(mean_curve(curves, valid, jnp.asarray([3.0, 1.0, 9.0])), [1.5, 2.5])


# --- in time ----------------------------------------------------------------------------------------------------------


def test_velocity_autocorrelation_of_an_oscillator_and_of_noise() -> None:
    times = np.arange(400) * 0.1
    phases = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    swings = np.concatenate([np.cos(times + p)[None, :, None, None] * np.ones((1, 1, 2, 3)) for p in phases])
    c = velocity_autocorrelation(swings, 60)
    np.testing.assert_allclose(c, np.cos(times[:60]), atol=1e-12)  # phases all round: exact
    noise = velocity_autocorrelation(RNG.normal(size=(4, 500, 5, 3)), 5)
    assert noise[0] == 1.0
    np.testing.assert_allclose(noise[1:], 0, atol=0.03)  # 30,000 products: 0.6 %, five of them


def test_displacement_of_free_flight_is_quadratic_and_the_drift_of_all_is_taken_out() -> None:
    v = RNG.normal(size=(3, 1, 2, 3))
    v[:, :, 1] = -v[:, :, 0]
    times = np.arange(20.0)[None, :, None, None]
    positions = v * times + 100.0 * times  # all drift alike
    msd = mean_square_displacement(positions, np.ones(2), 10)
    expected = (v**2).sum(-1).mean() * np.arange(10) ** 2
    np.testing.assert_allclose(msd, expected, atol=1e-9)


def test_diffusivity_of_a_random_walk() -> None:
    """Steps of variance s per component each tau: D = s / (2 tau)."""
    variance, tau = 0.01, 5.0
    steps = RNG.normal(size=(8, 400, 40, 3)) * np.sqrt(variance)
    msd = mean_square_displacement(np.cumsum(steps, axis=1), np.ones(40), 100)
    expected = variance / (2 * tau) * 1e4 * 39 / 40  # one in 40 degrees of freedom goes with the centre of mass
    # 320 walkers with 4 independent stretches of the longest lag: 3 % of the slope; three of them.
    assert diffusivity(msd, tau) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("lags", [0, 6])
def test_more_lags_than_frames_are_refused(lags: int) -> None:
    with pytest.raises(ValueError, match="lags of 5 frames"):
        velocity_autocorrelation(np.ones((1, 5, 2, 3)), lags)
    with pytest.raises(ValueError, match="lags of 5 frames"):
        mean_square_displacement(np.ones((1, 5, 2, 3)), np.ones(2), lags)
    with pytest.raises(ValueError, match="too few"):
        diffusivity(np.ones(3), 1.0)


# --- other temperatures, and noise ------------------------------------------------------------------------------------


def test_reweighting_a_harmonic_oscillator_to_another_temperature() -> None:
    """x^2 sampled at 500 K, weighted to 350 K, has the mean kT / k of 350 K."""
    k = 2.0
    x = RNG.normal(size=40_000) * np.sqrt(BOLTZMANN * 500 / k)
    weights = temperature_weights(k * x**2 / 2, 500.0, 350.0)
    assert weights.sum() == pytest.approx(1.0)
    # Relative deviation of x^2: sqrt(2 / N_eff), below 1 %; four of them.
    assert weights @ x**2 == pytest.approx(BOLTZMANN * 350 / k, rel=0.04)
    assert 0.5 < float(effective_sample_size(jnp.asarray(weights))) / 40_000 < 1
    np.testing.assert_allclose(temperature_weights(x, 500.0, 500.0), 1 / 40_000)


def test_noise_floor_falls_as_the_square_root_of_the_sample() -> None:
    h = distance_distribution(9, r_max=2.0, dr=0.1)
    curves = RNG.normal(size=(4000, 20))
    small, large = noise_floor(h, curves, 20), noise_floor(h, curves, 320)
    # Curves of independent noise: 4 at 16 times the frames, less the noise of the rest.
    assert small / large == pytest.approx(4.0, rel=0.15)
    assert noise_floor(h, curves, 100_000) == noise_floor(h, curves, 2000)  # never more than half


@pytest.mark.realdata
def test_noise_floor_of_aspirin(real_data: Path) -> None:
    """h(r) of 100 frames against 900: measured independently as 0.097 A on other frames of this data set."""
    with np.load(real_data / "rmd17_aspirin.npz") as file:
        positions = file["R"][:1000]
    h = distance_distribution(21)
    curves = np.asarray(h.of_frames(jnp.asarray(positions)))
    assert noise_floor(h, curves, 100) == pytest.approx(0.097, rel=0.1)
