"""One step of molecular dynamics: NVE, Nose-Hoover, and two Langevin schemes, for one replica.

An integrator is a frozen dataclass with the constants of its scheme and a method `step(forces, masses, state, key)`.
Replicas are stepped together by `jax.vmap`; the loop over steps is `stabletrain.nnip.dynamics`.

**Units**: A, fs, eV, amu, K; velocities in A / fs. **Shapes**: positions, velocities, forces [n, 3], masses [n].
The step of a deterministic scheme ignores its key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct

from stabletrain.nnip.units import ACCELERATION, BOLTZMANN

ForceFn = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""positions [n, 3] -> (potential energy, forces [n, 3])."""


@struct.dataclass
class Replica:
    """One simulated copy of the system, or R of them with a leading axis."""

    position: jax.Array  # [n, 3] A, not wrapped into the cell
    velocity: jax.Array  # [n, 3] A / fs
    force: jax.Array  # [n, 3] eV / A, at `position`
    energy: jax.Array  # [] eV, potential, at `position`
    friction: jax.Array  # [] 1 / fs: zeta of Nose-Hoover; other schemes leave it 0


class Integrator(Protocol):
    """A scheme with its constants."""

    @property
    def timestep(self) -> float:
        """In fs."""

    def step(self, forces: ForceFn, masses: jax.Array, state: Replica, key: jax.Array) -> Replica:
        """The state one time step later."""


def kinetic_energy(velocity: jax.Array, masses: jax.Array) -> jax.Array:
    """sum m v^2 / 2 in eV. Shapes: [..., n, 3], [n] -> [...]."""
    return 0.5 * jnp.sum(masses[:, None] * velocity**2, axis=(-2, -1)) / ACCELERATION


def temperature_of(velocity: jax.Array, masses: jax.Array, degrees_of_freedom: int) -> jax.Array:
    """2 K / (f k_B) in K. Shapes: [..., n, 3], [n] -> [...]."""
    return 2 * kinetic_energy(velocity, masses) / (degrees_of_freedom * BOLTZMANN)


def _acceleration(force: jax.Array, masses: jax.Array) -> jax.Array:
    return force * (ACCELERATION / masses[:, None])


# --- constant energy --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VelocityVerlet:
    """NVE: x+ = x + v dt + a dt^2 / 2, v+ = v + (a + a+) dt / 2."""

    timestep: float

    def step(self, forces: ForceFn, masses: jax.Array, state: Replica, key: jax.Array) -> Replica:
        """The state one time step later."""
        dt = self.timestep
        halfway = state.velocity + 0.5 * dt * _acceleration(state.force, masses)
        position = state.position + dt * halfway
        energy, force = forces(position)
        velocity = halfway + 0.5 * dt * _acceleration(force, masses)
        return Replica(position, velocity, force, energy, state.friction)


# --- Nose-Hoover ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoseHoover:
    """Canonical by one thermostat variable zeta, deterministic:

        x+    = x + v dt + (a - zeta v) dt^2 / 2
        v_h   = v + (a - zeta v) dt / 2
        zeta+ = zeta + dt / (2 Q) (K(v) - K*) + dt / (2 Q) (K(v_h) - K*)
        v+    = (v_h + a+ dt / 2) / (1 + zeta+ dt / 2)

    with K the kinetic energy, K* = f kT / 2 and Q = f kT tau^2 for f degrees of freedom.
    What is conserved is E + K + Q zeta^2 + f kT int zeta dt.

    Source: the scheme that the released code of StABlE Training simulates with.
    Differs: there f = 3n, although momentum and angular momentum of a molecule are conserved where they are zero: the
    rest is then hotter than asked for by 3n / (3n - 6), which is 29 % for 9 atoms. `degrees_of_freedom=3 * n` gives
    that back.
    """

    timestep: float
    temperature: float
    relaxation_time: float
    """tau in fs; the released code has 20 time steps."""
    degrees_of_freedom: int

    @property
    def mass(self) -> float:
        """Q = f kT tau^2, in eV fs^2."""
        return self.degrees_of_freedom * BOLTZMANN * self.temperature * self.relaxation_time**2

    def step(self, forces: ForceFn, masses: jax.Array, state: Replica, key: jax.Array) -> Replica:
        """The state one time step later."""
        dt, zeta = self.timestep, state.friction
        wanted = 0.5 * self.degrees_of_freedom * BOLTZMANN * self.temperature
        rate = dt / (2 * self.mass)
        acceleration = _acceleration(state.force, masses) - zeta * state.velocity
        position = state.position + dt * state.velocity + 0.5 * dt**2 * acceleration
        halfway = state.velocity + 0.5 * dt * acceleration
        zeta = zeta + rate * (kinetic_energy(state.velocity, masses) - wanted)
        energy, force = forces(position)
        zeta = zeta + rate * (kinetic_energy(halfway, masses) - wanted)
        velocity = (halfway + 0.5 * dt * _acceleration(force, masses)) / (1 + 0.5 * dt * zeta)
        return Replica(position, velocity, force, energy, zeta)


# --- Langevin ---------------------------------------------------------------------------------------------------------


def _kicks(key: jax.Array, temperature: float, masses: jax.Array, like: jax.Array) -> jax.Array:
    """Velocities of the Maxwell distribution, sqrt(kT / m) N(0, 1): [n, 3]."""
    width = jnp.sqrt(BOLTZMANN * temperature * ACCELERATION / masses)
    return width[:, None] * jax.random.normal(key, like.shape, like.dtype)


@dataclass(frozen=True)
class Langevin:
    """Canonical by friction and noise, semi-implicit Euler as in the released code of StABlE Training:

        x+ = x + v dt,    v+ = v + (F(x+) / m - gamma v) dt + sqrt(2 gamma kT dt / m) N(0, 1).

    Of first order in dt; `LangevinBAOAB` is of second order for the same cost.
    """

    timestep: float
    temperature: float
    damping: float
    """gamma in 1 / fs; the released code evaluates with 1e-4 (0.1 / ps)."""

    def step(self, forces: ForceFn, masses: jax.Array, state: Replica, key: jax.Array) -> Replica:
        """The state one time step later."""
        dt, gamma = self.timestep, self.damping
        position = state.position + dt * state.velocity
        energy, force = forces(position)
        noise = (2 * gamma * dt) ** 0.5 * _kicks(key, self.temperature, masses, state.velocity)
        velocity = state.velocity + dt * (_acceleration(force, masses) - gamma * state.velocity) + noise
        return Replica(position, velocity, force, energy, state.friction)


@dataclass(frozen=True)
class LangevinBAOAB:
    """Canonical by friction and noise, split into kick, drift and Ornstein-Uhlenbeck (Leimkuhler & Matthews 2013):

        v += a dt/2;  x += v dt/2;  v = c v + sqrt((1 - c^2) kT / m) N(0, 1);  x += v dt/2;  v += a+ dt/2

    with c = exp(-gamma dt). With gamma = 0 it is velocity Verlet.
    """

    timestep: float
    temperature: float
    damping: float
    """gamma in 1 / fs."""

    def step(self, forces: ForceFn, masses: jax.Array, state: Replica, key: jax.Array) -> Replica:
        """The state one time step later."""
        dt = self.timestep
        kept = jnp.exp(-self.damping * dt).astype(state.velocity.dtype)
        velocity = state.velocity + 0.5 * dt * _acceleration(state.force, masses)
        position = state.position + 0.5 * dt * velocity
        noise = jnp.sqrt(1 - kept**2) * _kicks(key, self.temperature, masses, velocity)
        velocity = kept * velocity + noise
        position = position + 0.5 * dt * velocity
        energy, force = forces(position)
        velocity = velocity + 0.5 * dt * _acceleration(force, masses)
        return Replica(position, velocity, force, energy, state.friction)


# --- choosing ---------------------------------------------------------------------------------------------------------

ENSEMBLES = ("nose-hoover", "langevin", "baoab", "nve")
"""Names of the schemes, for options."""


def make_integrator(
    name: str,
    *,
    timestep: float,
    temperature: float,
    relaxation_time: float,
    damping: float,
    degrees_of_freedom: int,
) -> Integrator:
    """The scheme of that name. Units: fs, K, fs, 1 / fs. Raises: `KeyError` for a name not in `ENSEMBLES`."""
    makers: dict[str, Callable[[], Integrator]] = {
        "nose-hoover": lambda: NoseHoover(timestep, temperature, relaxation_time, degrees_of_freedom),
        "langevin": lambda: Langevin(timestep, temperature, damping),
        "baoab": lambda: LangevinBAOAB(timestep, temperature, damping),
        "nve": lambda: VelocityVerlet(timestep),
    }
    return makers[name]()
