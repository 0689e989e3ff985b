"""The stability benchmark: statistics, known failures, trajectories, calculators."""

from __future__ import annotations

from pathlib import Path

import ase.io
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones

from stabletrain.errors import ConfigError, DataError
from stabletrain.nnip.benchmark import (
    BenchmarkResult,
    Conditions,
    Simulator,
    Survival,
    benchmark,
    observable_figure,
    order_statistics,
    survival_figure,
    wilson_interval,
)
from stabletrain.nnip.calculator import calculator_called, forces_of
from stabletrain.nnip.criteria import Criteria, Reference, Thresholds, mean_bond_lengths
from stabletrain.nnip.dynamics import Frames
from stabletrain.nnip.observables import distance_distribution
from stabletrain.nnip.systems import make_system
from stabletrain.nnip.trajectory import ExtxyzWriter
from stabletrain.nnip.units import ACCELERATION

X = np.asarray([[0.0, 0, 0], [1.5, 0, 0], [0.75, 1.3, 0]])
SYSTEM = make_system([6, 6, 6], X)
FAST = Conditions(temperature=300.0, timestep=0.5, window=40, frame_every=10)


def springs(params: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Three atoms on springs (eV / A^2: `params`); beyond 1.9 A a spring tears, and the forces are NaN."""

    def lengths(x: jax.Array) -> jax.Array:
        i, j = jnp.asarray([0, 0, 1]), jnp.asarray([1, 2, 2])
        return jnp.sqrt(jnp.sum((x[i] - x[j]) ** 2, axis=1))

    energy, slope = jax.value_and_grad(lambda x: jnp.sum(0.5 * params * (lengths(x) - 1.5) ** 2))(x)
    return energy, jnp.where(jnp.max(lengths(x)) > 1.9, jnp.nan, -slope)


def criteria(limit: float = 0.3) -> Criteria:
    reference = Reference(mean_bond_lengths(SYSTEM, X[None].astype(np.float32)))
    return Criteria(SYSTEM, Thresholds(bond_deviation=limit), reference, 300.0, 3)


# --- statistics -------------------------------------------------------------------------------------------------------


def test_survival_curve_and_median() -> None:
    survival = Survival(np.asarray([0.0, 0.1, 0.2, 0.2, 0.4, 0.4]), length=0.4, frame_time=0.1)
    times, share, low, high = survival.curve()
    np.testing.assert_allclose(times, [0, 0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(share, np.asarray([6, 5, 4, 2, 2]) / 6)
    assert (low <= share).all()
    assert (share <= high).all()
    assert survival.survived.sum() == 2
    assert survival.median() == (pytest.approx(0.2), 0.0, np.inf)
    assert Survival(np.full(9, 0.4), 0.4, 0.1).median() == (np.inf, np.inf, np.inf)
    # Exactly half to the end: the mean of the middle two has no bound.
    half = Survival(np.asarray([0.1, 0.2, 1.0, 1.0]), 1.0, 0.1)
    assert half.median() == (np.inf, 0.1, np.inf)
    assert half.median_is_lower_bound
    assert not survival.median_is_lower_bound


def test_wilson_interval_of_known_shares() -> None:
    """0 of 10 and 5 of 10 at 95 %, from the published formula: 0 to 0.2775, and 0.2366 to 0.7634."""
    low, high = wilson_interval(np.asarray([0, 5]), 10)
    np.testing.assert_allclose(low, [0.0, 0.2366], atol=1e-4)
    np.testing.assert_allclose(high, [0.2775, 0.7634], atol=1e-4)


def test_order_statistics_hold_the_median_often_enough_and_not_much_more() -> None:
    """The probability that the median lies between the two values, by counting: at least 95 %, and less one place in
    on either side below it."""
    for count in (6, 16, 32, 101):
        low, high = order_statistics(count)
        outcomes = np.random.default_rng(count).binomial(count, 0.5, 200_000)  # values below the median
        inside = ((outcomes > low) & (outcomes <= high)).mean()
        narrower = ((outcomes > low + 1) & (outcomes <= high - 1)).mean()
        assert inside > 0.945
        assert narrower < 0.955
    assert order_statistics(3) == (0, 2)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_soft_springs_fail_and_stiff_ones_do_not() -> None:
    starts = np.repeat(X[None], 6, axis=0)
    h = distance_distribution(3, r_max=3.0, dr=0.1)
    seen: list[np.ndarray] = []
    results = {}
    simulator = Simulator(SYSTEM, FAST, forces=springs)
    for stiffness in (40.0, 0.2):
        results[stiffness] = benchmark(
            simulator, jnp.float32(stiffness), starts, criteria(), [h], starts,
            length=0.1, key=jax.random.key(0), on_frames=lambda frames, stable: seen.append(stable),
        )  # fmt: skip
    stiff, soft = results[40.0], results[0.2]
    assert stiff.survival.length == pytest.approx(0.1)
    assert stiff.survival.survived.all()
    assert stiff.frozen == 0
    assert stiff.scalars()["median_stable_ps"] == pytest.approx(0.1)
    assert soft.survival.survived.mean() < 0.5
    assert soft.frozen > 0
    assert soft.survival.stable_time.min() >= 0
    # Stable time is what the frames say.
    assert sum(s.sum() for s in seen[:5]) * FAST.frame_time == pytest.approx(stiff.survival.stable_time.sum())
    # 5 windows of 0.02 ps, and fewer where nothing was left to see.
    assert len(seen[:5]) == 5
    assert stiff.observables["h(r)"].curve.sum() * h.spacing == pytest.approx(1.0, rel=1e-4)
    assert stiff.observables["h(r)"].error > stiff.observables["h(r)"].noise_floor == 0.0  # the reference is one point
    assert survival_figure({"stiff": stiff.survival, "soft": soft.survival})[:4] == b"\x89PNG"
    assert observable_figure(h, {"stiff": stiff.observables["h(r)"].curve})[:4] == b"\x89PNG"


def test_the_benchmark_is_the_same_each_time_and_may_be_stopped() -> None:
    starts = np.repeat(X[None], 4, axis=0)
    simulator = Simulator(SYSTEM, FAST, forces=springs)

    def run() -> np.ndarray:
        found = benchmark(
            simulator, jnp.float32(2.0), starts, criteria(), [], starts, length=0.06, key=jax.random.key(1)
        )
        return found.survival.stable_time

    np.testing.assert_array_equal(run(), run())

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        benchmark(
            simulator, jnp.float32(2.0), starts, criteria(), [], starts, length=1.0, key=jax.random.key(1), tick=stop
        )


def test_the_length_is_the_time_asked_for_in_whole_frames_and_not_in_whole_windows() -> None:
    """A last window that is too long is cut: as many frames as with windows that divide the time, and the same ones."""
    starts = np.repeat(X[None], 4, axis=0)
    h = distance_distribution(3, r_max=3.0, dr=0.1)
    simulator = Simulator(SYSTEM, FAST, forces=springs)  # a window of 0.02 ps, a frame of 0.005

    def run(length: float, stiffness: float = 40.0, limit: float = 0.3) -> tuple[BenchmarkResult, list[Frames]]:
        seen: list[Frames] = []
        found = benchmark(
            simulator, jnp.float32(stiffness), starts, criteria(limit), [h], starts, length=length,
            key=jax.random.key(0), on_frames=lambda frames, stable: seen.append(frames),
        )  # fmt: skip
        return found, seen

    (whole, every), (cut, counted) = run(0.04), run(0.03)
    assert whole.survival.length == 2 * 4 * FAST.frame_time  # exactly
    assert cut.survival.length == 6 * FAST.frame_time
    assert cut.survival.survived.all()
    assert cut.survival.stable_time.tolist() == [6 * FAST.frame_time] * 4
    assert [frames.position.shape[1] for frames in counted] == [4, 2]
    np.testing.assert_array_equal(counted[1].position, every[1].position[:, :2])
    mean = np.concatenate([np.asarray(h.of_frames(f.position.reshape(-1, 3, 3))) for f in counted]).mean(axis=0)
    np.testing.assert_allclose(cut.observables["h(r)"].curve, mean, rtol=1e-5)
    assert run(0.001)[0].survival.length == FAST.frame_time  # one frame at least
    # What breaks after the time asked for is not counted as broken.
    late, seen = run(0.1, 0.2, 9.0)
    frozen = (~np.concatenate([frames.alive for frames in seen], axis=1)).sum(axis=0)
    assert late.frozen == frozen[-1]
    assert frozen[8] < frozen[11]  # in the third window
    assert run(9 * FAST.frame_time, 0.2, 9.0)[0].frozen == frozen[8]


# --- ASE --------------------------------------------------------------------------------------------------------------


def test_an_ase_calculator_moves_the_replicas_as_its_own_formula_does() -> None:
    """Lennard-Jones by ASE through the callback, against the same formula in JAX: the same trajectory."""

    def formula(params: None, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def energy(x: jax.Array) -> jax.Array:
            i, j = jnp.asarray([0, 0, 1]), jnp.asarray([1, 2, 2])
            r6 = 1 / jnp.sum((x[i] - x[j]) ** 2, axis=1) ** 3
            return jnp.sum(4 * 0.3 * (1.34**12 * r6**2 - 1.34**6 * r6))

        value, slope = jax.value_and_grad(energy)(x)
        return value, -slope

    calculator = LennardJones(sigma=1.34, epsilon=0.3, rc=50.0)
    theirs = forces_of(calculator, SYSTEM, X)
    starts = np.repeat(X[None], 2, axis=0)
    frames = []
    for forces in (theirs, formula):
        simulator = Simulator(SYSTEM, FAST, forces=forces)
        swarm = simulator.start(None, starts, jax.random.key(0))
        frames.append(simulator.window(None, swarm, jax.random.key(1))[1])
    # float32 over 40 steps of a bound, not yet chaotic, motion.
    np.testing.assert_allclose(frames[0].position, frames[1].position, atol=1e-4)
    shift = np.asarray(frames[1].energy - frames[0].energy)
    np.testing.assert_allclose(shift, shift.mean(), atol=1e-4)


def test_calculators_by_name() -> None:
    assert isinstance(calculator_called("ase.calculators.lj:LennardJones"), LennardJones)
    for name, message in (("LennardJones", "MODULE:NAME"), ("no_such:Thing", "no_such"), ("math:floor", "math:floor"),
                          (":EMT", "--calculator :EMT"), ("ase.calculators.emt:", "ase.calculators.emt:")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            calculator_called(name)


def test_a_calculator_that_lacks_an_element_says_so() -> None:
    silicon = make_system([14, 14], [[0.0, 0, 0], [2.3, 0, 0]])
    with pytest.raises(DataError, match=r"^emt:EMT does not compute these atoms \(Si\): .*Si"):
        forces_of(EMT(), silicon, np.asarray([[0.0, 0, 0], [2.3, 0, 0]]), name="emt:EMT")

    class EnergyAlone(LennardJones):
        implemented_properties = ("energy",)

    with pytest.raises(DataError, match="forces"):
        forces_of(EnergyAlone(), SYSTEM, X)


def test_a_simulator_takes_one_kind_of_forces() -> None:
    with pytest.raises(ValueError, match="a potential, or forces"):
        Simulator(SYSTEM, FAST)


# --- trajectories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [None, np.diag([9.0, 10.0, 11.0])])
def test_ase_reads_what_was_written(tmp_path: Path, cell: np.ndarray | None) -> None:
    system = make_system([8, 1, 1], X, cell)
    velocities = np.random.default_rng(0).normal(size=(3, 3)) * 0.01
    with ExtxyzWriter(tmp_path / "replica.extxyz", system) as writer:
        for i in range(3):
            writer.write(X + i, time=0.5 * i, energy=-1.5 * i, velocities=velocities)
    frames = ase.io.read(tmp_path / "replica.extxyz", index=":")
    assert len(frames) == 3
    last: Atoms = frames[-1]
    np.testing.assert_allclose(last.positions, X + 2, atol=1e-7)
    assert last.get_chemical_symbols() == ["O", "H", "H"]
    assert last.info["time"] == 1.0
    assert last.get_potential_energy() == pytest.approx(-3.0)
    np.testing.assert_allclose(last.arrays["velocities"], velocities * ACCELERATION**-0.5, rtol=1e-6)
    last.set_velocities(last.arrays["velocities"])
    kinetic = 0.5 * (system.masses[:, None] * velocities**2).sum() / ACCELERATION
    assert last.get_kinetic_energy() == pytest.approx(kinetic, rel=1e-3)  # ASE reads the unit as we wrote it
    assert last.pbc.all() == (cell is not None)
    if cell is not None:
        np.testing.assert_allclose(last.cell.array, cell)
