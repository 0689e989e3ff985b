"""Stability criteria on frames whose faults are known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.errors import ConfigError
from stabletrain.nnip.criteria import (
    LIQUID_EVALUATION,
    LIQUID_TRAINING,
    MOLECULE_EVALUATION,
    MOLECULE_TRAINING,
    Criteria,
    Reference,
    Thresholds,
    bond_deviation,
    default_thresholds,
    frames_before_failure,
    intermolecular_distance,
    mean_bond_lengths,
)
from stabletrain.nnip.dynamics import Frames
from stabletrain.nnip.observables import StaticObservable, radial_distributions
from stabletrain.nnip.stable_evaluation import StableEvaluation, benchmark_thresholds
from stabletrain.nnip.stable_learning import Structures
from stabletrain.nnip.stable_options import StableOptions
from stabletrain.nnip.systems import System, make_system
from stabletrain.nnip.units import ACCELERATION, BOLTZMANN

WATER = np.asarray([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
PAIR = np.concatenate([WATER, WATER + np.asarray([0, 0, 3.0])])
TWO = make_system([8, 1, 1, 8, 1, 1], PAIR, 12.0)
ONE = make_system([8, 1, 1], WATER)


def frames_of(positions: np.ndarray, **changes: jnp.ndarray) -> Frames:
    """[R, F, n, 3] at rest, alive."""
    shape = positions.shape[:2]
    whole = {
        "position": jnp.asarray(positions),
        "velocity": jnp.zeros(positions.shape),
        "energy": jnp.zeros(shape),
        "alive": jnp.ones(shape, bool),
    }
    return Frames(**{**whole, **changes})


def criteria(system: System, rdfs: tuple[StaticObservable, ...] = (), **thresholds: float) -> Criteria:
    at_start = {rdf.name: np.asarray(rdf.of_frame(jnp.asarray(PAIR))) for rdf in rdfs}
    x = WATER if system is ONE else PAIR
    reference = Reference(mean_bond_lengths(system, x[None]), at_start)
    return Criteria(system, Thresholds(**thresholds), reference, 300.0, 3 * system.count - 3, rdfs)


def test_bond_deviation_is_the_largest_over_the_bonds() -> None:
    stretched = PAIR.copy()
    stretched[1, 0] += 0.3
    lengths = mean_bond_lengths(TWO, np.stack([PAIR, PAIR]))
    np.testing.assert_allclose(lengths, [0.96, np.hypot(0.24, 0.93)] * 2, rtol=1e-6)
    found = bond_deviation(TWO, jnp.asarray(np.stack([PAIR, stretched])), lengths)
    np.testing.assert_allclose(found, [0.0, 0.3], atol=1e-6)


def test_bonds_across_the_boundary_are_not_broken() -> None:
    across = PAIR.copy()
    across[1, 0] -= 12.0
    assert float(bond_deviation(TWO, jnp.asarray(across)[None], mean_bond_lengths(TWO, PAIR[None]))[0]) < 1e-5


def test_intermolecular_distance_ignores_bonds_and_sees_images() -> None:
    near = PAIR.copy()
    near[3:, 2] = 11.0  # its image is 1 A below the first molecule
    found = intermolecular_distance(TWO, jnp.asarray(np.stack([PAIR, near])))
    np.testing.assert_allclose(found, [3.0, 1.0], atol=1e-5)
    with pytest.raises(ValueError, match="single molecule"):
        intermolecular_distance(ONE, jnp.asarray(WATER)[None])


@pytest.mark.parametrize(
    ("limit", "unstable"), [(0.25, [False, True, True]), (0.5, [False, False, True]), (0.9, [False, False, False])]
)
def test_frames_over_the_bond_threshold_are_unstable(limit: float, unstable: list[bool]) -> None:
    positions = np.stack([PAIR] * 3)[None].copy()
    positions[0, 1, 1, 0] += 0.4
    positions[0, 2, 1, 0] += 0.8
    assert criteria(TWO, bond_deviation=limit).unstable(frames_of(positions)).tolist() == [unstable]


def test_frozen_and_non_finite_replicas_are_unstable() -> None:
    positions = np.stack([PAIR] * 2)[None].repeat(3, axis=0)
    positions[2, 1, 0, 0] = np.nan
    alive = jnp.asarray([[True, True], [True, False], [True, True]])
    found = criteria(TWO, bond_deviation=0.5).unstable(frames_of(positions, alive=alive))
    assert found.tolist() == [[False, False], [False, True], [False, True]]
    assert criteria(TWO).unstable(frames_of(positions, alive=alive)).tolist()[1] == [False, True]


def test_molecules_that_come_too_close_are_unstable() -> None:
    positions = np.stack([PAIR] * 2)[None].copy()
    positions[0, 1, 3:, 2] -= 2.0
    assert criteria(TWO, intermolecular_distance=1.2).unstable(frames_of(positions)).tolist() == [[False, True]]


def test_rdf_error_judges_the_window() -> None:
    rdfs = tuple(radial_distributions(TWO.species, np.eye(3) * 12.0, r_max=6.0))
    positions = np.stack([PAIR] * 2)[None].repeat(2, axis=0)
    positions[1, :, 3:] += [0, 1.5, 0]
    judge = criteria(TWO, rdfs, rdf_error=1e-3)
    assert judge.unstable(frames_of(positions)).tolist() == [[False, False], [True, True]]
    with pytest.raises(ValueError, match="RDF criterion"):
        criteria(TWO, rdf_error=3.0)


def test_temperature_and_energy_drift() -> None:
    positions = np.stack([WATER] * 3)[None]
    speed = np.sqrt(6 * BOLTZMANN * 900.0 * ACCELERATION / ONE.masses.sum() / 3)  # K = f k T / 2 with f = 6 at 900 K
    velocity = np.zeros((1, 3, 3, 3))
    velocity[0, 1:] = [speed, speed, speed]
    frames = frames_of(positions, velocity=jnp.asarray(velocity))
    np.testing.assert_allclose(criteria(ONE, temperature_factor=2.0).values(frames)["temperature_factor"][0, 1], 3.0)
    assert criteria(ONE, temperature_factor=2.0).unstable(frames).tolist() == [[False, True, True]]
    kinetic = 3 * BOLTZMANN * 900.0
    moved = frames_of(positions, velocity=jnp.asarray(velocity), energy=jnp.asarray([[0.0, -kinetic, 0.1]]))
    drift = np.asarray(criteria(ONE, energy_drift=0.05).values(moved)["energy_drift"])[0]
    np.testing.assert_allclose(drift, [0, 0, (0.1 + kinetic) / 3], atol=1e-6)


def test_a_bond_criterion_needs_bonds() -> None:
    atoms = make_system([18, 18], [[0.0, 0, 0], [5.0, 0, 0]])
    with pytest.raises(ValueError, match="has none"):
        Criteria(atoms, MOLECULE_TRAINING, Reference(np.zeros(0)), 300.0, 3)


def test_thresholds_of_molecules_and_liquids() -> None:
    assert default_thresholds(ONE, evaluation=False) is MOLECULE_TRAINING
    assert default_thresholds(ONE, evaluation=True) is MOLECULE_EVALUATION
    assert default_thresholds(TWO, evaluation=False) is LIQUID_TRAINING
    assert default_thresholds(TWO, evaluation=True) is LIQUID_EVALUATION
    argon = make_system([18, 18], [[0.0, 0, 0], [5.0, 0, 0]])
    for evaluation in (False, True):  # no bonds to judge; in a cell they are a liquid
        assert not default_thresholds(argon, evaluation=evaluation).active
    assert default_thresholds(dataclasses.replace(argon, cell=12 * np.eye(3)), evaluation=True) is LIQUID_EVALUATION
    assert MOLECULE_EVALUATION.active == {"bond_deviation": 0.5}


def test_without_thresholds_what_is_frozen_is_unstable() -> None:
    argon = make_system([18, 18], [[0.0, 0, 0], [5.0, 0, 0]])
    judge = Criteria(argon, default_thresholds(argon, evaluation=True), Reference(np.zeros(0)), 300.0, 3)
    alive = jnp.asarray([[True, True], [True, False]])
    assert judge.unstable(frames_of(np.zeros((2, 2, 2, 3)), alive=alive)).tolist() == [[False, False], [False, True]]


def test_the_evaluations_bond_deviation_is_refused_where_it_does_nothing() -> None:
    """Of molecules with bonds it is the threshold; without bonds, and of liquids, there is none for it to be."""
    given, default = StableOptions(benchmark_bond_deviation=0.4), StableOptions()
    argon = make_system([18, 18], [[0.0, 0, 0], [5.0, 0, 0]])
    assert benchmark_thresholds(given, ONE).active == {"bond_deviation": 0.4}
    assert benchmark_thresholds(default, TWO) is LIQUID_EVALUATION
    assert not benchmark_thresholds(default, argon).active
    for system, why in ((argon, "has none"), (TWO, "RDFs")):
        with pytest.raises(ConfigError, match=why):
            benchmark_thresholds(given, system)
        with pytest.raises(ConfigError, match=why):  # before anything is simulated
            StableEvaluation(
                given,
                base_params=None,
                test=Structures(np.zeros((1, 2, 3)), np.zeros(1), np.zeros((1, 2, 3))),
                criteria_of=lambda thresholds, s=system: Criteria(s, thresholds, Reference(np.zeros(0)), 300.0, 3),
            )


def test_frames_before_the_first_failure() -> None:
    unstable = jnp.asarray([[False, False, False], [False, True, False], [True, False, True]])
    assert frames_before_failure(unstable).tolist() == [3, 1, 0]


@pytest.mark.realdata
def test_no_reference_frame_of_aspirin_is_unstable(real_data: Path) -> None:
    """The threshold 0.25 A lies just outside the data: the largest deviation of 1,000 frames is 0.19 A."""
    with np.load(real_data / "rmd17_aspirin.npz") as file:
        positions, species = file["R"][:1000].astype(np.float32), file["z"]
    system = make_system(species, positions[10])
    assert len(system.bonds) == 21
    deviation = np.asarray(bond_deviation(system, jnp.asarray(positions), mean_bond_lengths(system, positions)))
    assert 0.15 < deviation.max() < 0.25
