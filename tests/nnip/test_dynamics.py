"""Integrators against their formulas and invariants, and windows of many replicas."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.nnip.dynamics import (
    Swarm,
    degrees_of_freedom,
    make_window,
    maxwell_velocities,
    start_swarm,
    where_replica,
    with_forces,
)
from stabletrain.nnip.integrators import (
    ENSEMBLES,
    Langevin,
    LangevinBAOAB,
    NoseHoover,
    Replica,
    VelocityVerlet,
    kinetic_energy,
    make_integrator,
    temperature_of,
)
from stabletrain.nnip.units import ACCELERATION, BOLTZMANN

MASSES: Any = np.asarray([12.011, 1.008, 15.999, 1.008])
KEY = jax.random.key(3)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def springs(stiffness: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every pair of atoms on a spring of rest length 1.5 A, with a quartic term: bound, smooth and not harmonic."""

    def energy(x: jax.Array) -> jax.Array:
        i, j = np.triu_indices(len(x), 1)
        stretch = jnp.sqrt(jnp.sum((x[i] - x[j]) ** 2, axis=1)) - 1.5
        return jnp.sum(0.5 * stiffness * stretch**2 + 2.0 * stretch**4)

    value, slope = jax.value_and_grad(energy)(x)
    return value, -slope


STIFFNESS = jnp.asarray(20.0, jnp.float32)
TETRAHEDRON = np.asarray([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 0.53


def replica(seed: int = 0, temperature: float = 500.0) -> Replica:
    x = jnp.asarray(TETRAHEDRON) + 0.02 * jax.random.normal(jax.random.key(seed), (4, 3))
    v = maxwell_velocities(jax.random.key(seed + 1), x, MASSES, temperature=temperature)
    energy, force = springs(STIFFNESS, x)
    return Replica(x, v, force, energy, jnp.asarray(0.01))


def forces(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return springs(STIFFNESS, x)


def total_energy(state: Replica) -> float:
    return float(state.energy + kinetic_energy(state.velocity, MASSES))


# --- formulas ---------------------------------------------------------------------------------------------------------

ROUNDING = 1e-13  # float64, a dozen operations on numbers of order 1


def test_one_step_of_nose_hoover() -> None:
    """Against the published formulas, in NumPy."""
    state, dt, temperature, tau, f = replica(), 0.5, 500.0, 10.0, 12
    new = NoseHoover(dt, temperature, tau, f).step(forces, MASSES, state, KEY)
    x, v, m = np.asarray(state.position), np.asarray(state.velocity), np.asarray(MASSES)[:, None]
    zeta, wanted = 0.01, 0.5 * f * BOLTZMANN * temperature
    q = f * BOLTZMANN * temperature * tau**2

    def kinetic(v: np.ndarray) -> float:
        return float((m * v**2).sum() / 2 / ACCELERATION)

    a = np.asarray(state.force) / m * ACCELERATION
    x_new = x + v * dt + (a - zeta * v) * dt**2 / 2
    half = v + (a - zeta * v) * dt / 2
    zeta_new = zeta + dt / (2 * q) * (kinetic(v) - wanted) + dt / (2 * q) * (kinetic(half) - wanted)
    a_new = np.asarray(forces(jnp.asarray(x_new))[1]) / m * ACCELERATION
    v_new = (half + a_new * dt / 2) / (1 + zeta_new * dt / 2)
    np.testing.assert_allclose(new.position, x_new, atol=ROUNDING)
    np.testing.assert_allclose(new.velocity, v_new, atol=ROUNDING)
    np.testing.assert_allclose(new.friction, zeta_new, atol=ROUNDING)
    np.testing.assert_allclose(new.force, np.asarray(forces(jnp.asarray(x_new))[1]), atol=1e-11)


def test_one_step_of_langevin() -> None:
    """Semi-implicit Euler: the new force, the old velocity in the friction, and noise of the right width."""
    state, dt, gamma, temperature = replica(), 0.5, 0.02, 500.0
    new = Langevin(dt, temperature, gamma).step(forces, MASSES, state, KEY)
    m = np.asarray(MASSES)[:, None]
    x_new = np.asarray(state.position + dt * state.velocity)
    a_new = np.asarray(forces(jnp.asarray(x_new))[1]) / m * ACCELERATION
    noise = np.asarray(jax.random.normal(KEY, (4, 3)))
    v_new = (
        np.asarray(state.velocity) * (1 - gamma * dt)
        + a_new * dt
        + np.sqrt(2 * gamma * BOLTZMANN * temperature * dt * ACCELERATION / m) * noise
    )
    np.testing.assert_allclose(new.position, x_new, atol=ROUNDING)
    np.testing.assert_allclose(new.velocity, v_new, atol=ROUNDING)


def test_without_friction_baoab_is_velocity_verlet() -> None:
    state = replica()
    one = LangevinBAOAB(0.5, 500.0, 0.0).step(forces, MASSES, state, KEY)
    other = VelocityVerlet(0.5).step(forces, MASSES, state, KEY)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


def test_friction_of_baoab_alone_is_an_exact_ornstein_uhlenbeck_step() -> None:
    """Free atoms: v+ = c v + sqrt((1 - c^2) kT / m) N, c = exp(-gamma dt)."""

    def free(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(()), jnp.zeros_like(x)

    state = replica().replace(force=jnp.zeros((4, 3)))
    new = LangevinBAOAB(2.0, 300.0, 0.1).step(free, MASSES, state, KEY)
    c = np.exp(-0.2)
    width = np.sqrt((1 - c**2) * BOLTZMANN * 300.0 * ACCELERATION / np.asarray(MASSES))[:, None]
    expected = c * np.asarray(state.velocity) + width * np.asarray(jax.random.normal(KEY, (4, 3)))
    np.testing.assert_allclose(new.velocity, expected, atol=ROUNDING)
    np.testing.assert_allclose(new.position, state.position + (state.velocity + expected), atol=ROUNDING)


def test_unit_of_acceleration() -> None:
    """1 eV / (A amu) is 9.6485e-3 A / fs^2, and k_B that of ASE to its table's digits."""
    ase_units = pytest.importorskip("ase.units")
    fs = 1e-15 * ase_units.second
    assert pytest.approx(fs**2, rel=1e-6) == ACCELERATION
    assert pytest.approx(ase_units.kB, rel=1e-6) == BOLTZMANN


# --- invariants -------------------------------------------------------------------------------------------------------


def run(integrator, state: Replica, steps: int, every: int) -> list[Replica]:  # type: ignore[no-untyped-def]
    step = jax.jit(lambda state, key: integrator.step(forces, MASSES, state, key))
    states = []
    for i in range(steps):
        state = step(state, jax.random.fold_in(KEY, i))
        if (i + 1) % every == 0:
            states.append(state)
    return states


def test_energy_of_nve_does_not_drift_and_its_error_is_of_second_order() -> None:
    """2,000 steps: the energy swings by O(dt^2), a quarter at half the step, and its mean stays."""
    state = replica()

    def course(dt: float, steps: int) -> np.ndarray:
        return np.asarray([total_energy(s) for s in run(VelocityVerlet(dt), state, steps, 10)]) - total_energy(state)

    coarse, fine = course(0.5, 800), course(0.25, 1600)
    assert np.ptp(fine) == pytest.approx(np.ptp(coarse) / 4, rel=0.2)  # higher orders, and extremes between samples
    half = len(fine) // 2
    # What wanders between the halves is a small part of the swing itself.
    assert abs(fine[half:].mean() - fine[:half].mean()) < 0.1 * np.ptp(fine)


def test_nve_is_reversible() -> None:
    state = replica()
    there = run(VelocityVerlet(0.5), state, 50, 50)[-1]
    back = run(VelocityVerlet(0.5), there.replace(velocity=-there.velocity), 50, 50)[-1]
    # Rounding of 100 steps, amplified by the chaos of a quartic cluster over 50 fs.
    np.testing.assert_allclose(back.position, state.position, atol=1e-10)


def test_nose_hoover_conserves_its_own_energy_and_momenta() -> None:
    """E + K + Q zeta^2 + f kT int zeta dt, the integral by the trapezoidal rule; P and L stay zero."""
    thermostat = NoseHoover(0.1, 500.0, 10.0, 6)
    states = run(thermostat, replica().replace(friction=jnp.zeros(())), 1000, 1)
    zeta = np.asarray([float(s.friction) for s in states])
    integral = np.concatenate([[0.0], np.cumsum((zeta[1:] + zeta[:-1]) / 2) * 0.1])
    conserved = (
        np.asarray([total_energy(s) for s in states]) + thermostat.mass * zeta**2 + 6 * BOLTZMANN * 500.0 * integral
    )
    exchanged = np.ptp([total_energy(s) for s in states])
    assert np.ptp(conserved) < 1e-2 * exchanged  # 0.1 fs against a period of some 15 fs: (0.1 * 2 pi / 15)^2 of it
    last = states[-1]
    m = np.asarray(MASSES)[:, None]
    v = np.asarray(last.velocity)
    np.testing.assert_allclose((m * v).sum(0), 0, atol=1e-12)
    np.testing.assert_allclose(np.cross(last.position, m * v).sum(0), 0, atol=1e-3 * np.abs(m * v).sum())


@pytest.mark.parametrize(("name", "conserved"), [("nose-hoover", True), ("langevin", False), ("baoab", False)])
def test_thermostats_reach_their_temperature(name: str, conserved: bool) -> None:
    """From the minimum at 500 K, of which half would go into the springs: the temperature after 0.4 ps of 0.8."""
    positions = jnp.broadcast_to(jnp.asarray(TETRAHEDRON), (64, 4, 3))
    f = degrees_of_freedom(4, periodic=False, momentum_conserved=conserved)
    integrator = make_integrator(
        name, timestep=0.5, temperature=500.0, relaxation_time=20.0, damping=0.02, degrees_of_freedom=f
    )
    swarm = start_swarm(springs, STIFFNESS, positions, MASSES, KEY, temperature=500.0, momentum_conserved=conserved)
    _, frames = jax.jit(make_window(springs, MASSES, integrator, steps=1600, every=20))(STIFFNESS, swarm, KEY)
    measured = float(jnp.mean(temperature_of(frames.velocity[:, 40:], MASSES, f)))
    # 64 times some 6 independent values of a temperature that varies by sqrt(2 / f) = 58 %: 3 %, three of them.
    assert measured == pytest.approx(500.0, rel=0.1)
    if name == "baoab":
        # Positions are canonical too: the configurational temperature <|grad U|^2> / k <div grad U>.
        x = frames.position[:, 40::4].reshape(-1, 12)
        energy = lambda x: springs(STIFFNESS, x.reshape(4, 3))[0]  # noqa: E731
        both = jax.jit(jax.vmap(lambda x: (jnp.sum(jax.grad(energy)(x) ** 2), jnp.trace(jax.hessian(energy)(x)))))
        squared, divergence = both(x)
        assert float(jnp.mean(squared) / jnp.mean(divergence)) / BOLTZMANN == pytest.approx(500.0, rel=0.1)


@pytest.mark.slow
def test_nve_and_baoab_agree_with_jax_md() -> None:
    """An independent velocity Verlet, in its own units; and its Langevin step with the same normal numbers."""
    simulate = pytest.importorskip("jax_md.simulate")
    space = pytest.importorskip("jax_md.space")
    state, dt = replica(), 0.5
    ours = run(VelocityVerlet(dt), state, 20, 20)[-1]
    unit = ACCELERATION**-0.5  # of time, in fs, where eV, A and amu are 1
    init, apply = simulate.nve(lambda x, **_: forces(x)[0], space.free()[1], dt / unit)
    theirs = init(KEY, state.position, kT=0.0, mass=MASSES[:, None])
    theirs = theirs.set(momentum=MASSES[:, None] * state.velocity * unit)
    for _ in range(20):
        theirs = apply(theirs)
    # jax-md rounds its time step to float32: 6e-8 of the way that is gone in 10 fs.
    np.testing.assert_allclose(ours.position, theirs.position, atol=1e-8)
    np.testing.assert_allclose(ours.velocity, theirs.velocity / unit, atol=1e-8)

    damping, temperature = 0.02, 400.0
    kT = BOLTZMANN * temperature
    init, apply = simulate.nvt_langevin(lambda x, **_: forces(x)[0], space.free()[1], dt / unit, kT, damping * unit)
    theirs = init(KEY, state.position, mass=MASSES[:, None], momenta=MASSES[:, None] * state.velocity * unit)
    noise = jax.random.split(theirs.rng)[1]
    stepped = LangevinBAOAB(dt, temperature, damping).step(forces, MASSES, state, noise)
    theirs = apply(theirs)
    np.testing.assert_allclose(stepped.position, theirs.position, atol=1e-8)
    np.testing.assert_allclose(stepped.velocity, theirs.velocity / unit, atol=1e-8)


# --- the start --------------------------------------------------------------------------------------------------------


def test_fresh_velocities_have_the_temperature_and_neither_momentum() -> None:
    x = jnp.asarray(TETRAHEDRON)
    v = maxwell_velocities(KEY, x, MASSES, temperature=300.0)
    m = np.asarray(MASSES)[:, None]
    assert float(temperature_of(v, MASSES, 6)) == pytest.approx(300.0, rel=1e-10)
    centred = np.asarray(x) - (m * np.asarray(x)).sum(0) / m.sum()
    np.testing.assert_allclose((m * v).sum(0), 0, atol=1e-12)
    np.testing.assert_allclose(np.cross(centred, m * np.asarray(v)).sum(0), 0, atol=1e-12)
    in_cell = maxwell_velocities(KEY, x, MASSES, temperature=300.0, periodic=True)
    assert float(temperature_of(in_cell, MASSES, 9)) == pytest.approx(300.0, rel=1e-10)
    coupled = maxwell_velocities(KEY, x, MASSES, temperature=300.0, momentum_conserved=False)
    assert float(temperature_of(coupled, MASSES, 12)) == pytest.approx(300.0, rel=1e-10)


def test_fresh_velocities_of_a_linear_molecule_are_finite() -> None:
    x = jnp.asarray([[0.0, 0, 0], [1.1, 0, 0]])
    v = maxwell_velocities(KEY, x, jnp.asarray([12.0, 16.0]), temperature=300.0)
    assert degrees_of_freedom(2, periodic=False, momentum_conserved=True) == 1
    assert float(temperature_of(v, jnp.asarray([12.0, 16.0]), 1)) == pytest.approx(300.0, rel=1e-9)
    np.testing.assert_allclose(v[:, 1:], 0, atol=1e-9)  # only the stretch is left


# --- windows ----------------------------------------------------------------------------------------------------------


def cliff(stiffness: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The springs, but NaN as soon as atom 0 is beyond x = 5 A."""
    energy, force = springs(stiffness, x)
    broken = x[0, 0] > 5.0
    return energy, jnp.where(broken, jnp.nan, force)


def swarm_of(temperatures: tuple[float, ...], forces=springs) -> Swarm:  # type: ignore[no-untyped-def]
    parts = [
        start_swarm(forces, STIFFNESS, jnp.asarray(TETRAHEDRON)[None], MASSES, jax.random.key(i), temperature=t)
        for i, t in enumerate(temperatures)
    ]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def test_a_broken_replica_is_frozen_and_counted_and_the_others_do_not_notice() -> None:
    window = jax.jit(make_window(cliff, MASSES, VelocityVerlet(0.5), steps=40, every=10))
    swarm = swarm_of((300.0, 300.0, 300.0))
    flying = swarm.replicas.velocity.at[1].set(jnp.asarray([0.45, 0.0, 0.0]))  # over the edge in about 20 steps
    swarm = swarm.replace(replicas=swarm.replicas.replace(velocity=flying))
    shot = swarm.replicas.velocity.at[2, 0, 0].set(1e6)  # further in one step than any atom may
    last, frames = window(STIFFNESS, swarm.replace(replicas=swarm.replicas.replace(velocity=shot)), KEY)
    assert last.alive.tolist() == [True, False, False]
    assert frames.alive.tolist()[0] == [True] * 4
    assert frames.alive.tolist()[2] == [False] * 4
    steps = last.steps.tolist()
    assert steps[0] == 40
    assert steps[2] == 0
    assert 10 < steps[1] < 40
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(frames))
    np.testing.assert_array_equal(frames.position[1, -1], frames.position[1, -2])
    np.testing.assert_array_equal(last.replicas.position[2], swarm.replicas.position[2])
    alone, _ = window(STIFFNESS, swarm, KEY)
    for a, b in zip(jax.tree.leaves(last.replicas), jax.tree.leaves(alone.replicas), strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def test_a_window_is_its_steps() -> None:
    """Frames are the states after each `every`-th step, whatever the integrator's noise."""
    swarm = swarm_of((300.0, 500.0))
    integrator = LangevinBAOAB(0.5, 500.0, 0.02)
    _, frames = jax.jit(make_window(springs, MASSES, integrator, steps=6, every=3))(STIFFNESS, swarm, KEY)
    for r in range(2):
        state = jax.tree.map(lambda leaf, r=r: leaf[r], swarm.replicas)
        key = jax.random.fold_in(KEY, r)
        for i in range(6):
            state = integrator.step(forces, MASSES, state, jax.random.fold_in(key, i))
            if i == 2:
                np.testing.assert_allclose(frames.position[r, 0], state.position, atol=1e-12)
        np.testing.assert_allclose(frames.position[r, 1], state.position, atol=1e-12)
        np.testing.assert_allclose(frames.energy[r, 1], state.energy, atol=1e-11)


def test_another_potential_gives_other_forces_and_brings_nobody_back_who_is_broken() -> None:
    swarm = swarm_of((300.0, 300.0), cliff)
    away = swarm.replicas.position.at[1].add(jnp.asarray([9.0, 0.0, 0.0]))
    swarm = swarm.replace(replicas=swarm.replicas.replace(position=away))
    doubled = with_forces(cliff, 2 * STIFFNESS, swarm)
    assert doubled.alive.tolist() == [True, False]
    np.testing.assert_allclose(doubled.replicas.energy[0], springs(2 * STIFFNESS, swarm.replicas.position[0])[0])


def test_replicas_are_put_back_by_number() -> None:
    old, new = swarm_of((300.0, 300.0)), swarm_of((600.0, 600.0))
    mixed = where_replica(jnp.asarray([True, False]), new, old)
    np.testing.assert_array_equal(mixed.replicas.velocity[0], new.replicas.velocity[0])
    np.testing.assert_array_equal(mixed.replicas.velocity[1], old.replicas.velocity[1])


@pytest.mark.parametrize(("steps", "every"), [(10, 3), (0, 1), (4, 0)])
def test_windows_that_do_not_come_out_even_are_refused(steps: int, every: int) -> None:
    with pytest.raises(ValueError, match="cannot have a frame"):
        make_window(springs, MASSES, VelocityVerlet(0.5), steps=steps, every=every)


def test_every_ensemble_has_an_integrator() -> None:
    made = [
        make_integrator(name, timestep=0.5, temperature=500.0, relaxation_time=10.0, damping=1e-4, degrees_of_freedom=6)
        for name in ENSEMBLES
    ]
    assert len({type(integrator) for integrator in made}) == 4
    assert all(dataclasses.asdict(integrator)["timestep"] == 0.5 for integrator in made)  # type: ignore[call-overload]
