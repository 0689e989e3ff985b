"""Molecular dynamics of many replicas at once: windows of steps, compiled whole, that write frames as they go.

A window is a scan over frames of a loop over steps; the replicas are a vmapped axis. A replica that is no longer
finite, or in which an atom flies further in one step than it may, is *frozen*: it stays at its last good step to the
end, is marked in the frames, and its steps are no longer counted. Everything that a window depends on is its
arguments, so that a resumed run repeats it to the bit.

**Units**: A, fs, eV, amu, K; velocities in A / fs. **Shapes**: R replicas, n atoms, F frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from stabletrain.nnip.integrators import ForceFn, Integrator, Replica, kinetic_energy
from stabletrain.nnip.units import ACCELERATION, BOLTZMANN

Params = Any
Forces = Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]
"""(params, positions [n, 3]) -> (potential energy [], forces [n, 3])."""

MAX_DISPLACEMENT = 0.5
"""A that an atom may move in one step. At 1 fs that is hydrogen at some 10^6 K: nothing that goes on is lost."""


@struct.dataclass
class Swarm:
    """R replicas and whether they still move."""

    replicas: Replica  # leaves [R, ...]
    alive: jax.Array  # bool [R]: not frozen
    steps: jax.Array  # int32 [R]: steps done since the start of the simulation
    overflow: jax.Array  # bool [R]: a neighbour list was too short, and what followed is void


@struct.dataclass
class Frames:
    """What a window wrote: F frames of R replicas. Frames of a frozen replica repeat its last good step."""

    position: jax.Array  # [R, F, n, 3] A, not wrapped
    velocity: jax.Array  # [R, F, n, 3] A / fs
    energy: jax.Array  # [R, F] eV, potential
    alive: jax.Array  # bool [R, F]

    @property
    def count(self) -> int:
        """F."""
        return self.energy.shape[1]


Window = Callable[[Params, Swarm, jax.Array], tuple[Swarm, Frames]]
"""(params, swarm, key) -> the swarm after the window's steps, and its frames."""


# --- the start --------------------------------------------------------------------------------------------------------


def degrees_of_freedom(atoms: int, *, periodic: bool, momentum_conserved: bool) -> int:
    """3n less what is conserved and taken out at the start: momentum, and angular momentum where there is no cell."""
    if not momentum_conserved:
        return 3 * atoms
    if periodic:
        return 3 * atoms - 3
    return 3 * atoms - (6 if atoms > 2 else 5 if atoms == 2 else 0)


def maxwell_velocities(
    key: jax.Array,
    positions: jax.Array,
    masses: jax.Array,
    *,
    temperature: float,
    periodic: bool = False,
    momentum_conserved: bool = True,
) -> jax.Array:
    """Velocities [n, 3] of the Maxwell distribution at `positions` [n, 3], scaled to exactly f kT / 2.

    Where momentum is conserved it is taken out, and outside of a cell the angular momentum as well.
    Differs: the released code draws speeds, |v|, per component and takes out their mean.
    """
    width = jnp.sqrt(BOLTZMANN * temperature * ACCELERATION / masses)[:, None]
    velocity = width * jax.random.normal(key, positions.shape, positions.dtype)
    f = degrees_of_freedom(len(masses), periodic=periodic, momentum_conserved=momentum_conserved)
    if momentum_conserved and len(masses) > 1:
        velocity = velocity - jnp.sum(masses[:, None] * velocity, axis=0) / jnp.sum(masses)
        if not periodic:
            velocity = velocity - _rotation(positions, velocity, masses)
    wanted = 0.5 * f * BOLTZMANN * temperature
    return velocity * jnp.sqrt(wanted / kinetic_energy(velocity, masses))


def _rotation(positions: jax.Array, velocity: jax.Array, masses: jax.Array) -> jax.Array:
    """The part of the velocities that is a rigid rotation about the centre of mass."""
    r = positions - masses @ positions / jnp.sum(masses)
    momentum = jnp.sum(masses[:, None] * jnp.cross(r, velocity), axis=0)
    inertia = jnp.sum(masses * jnp.sum(r**2, axis=1)) * jnp.eye(3, dtype=r.dtype) - (masses[:, None] * r).T @ r
    # The pseudo-inverse: a linear molecule has no inertia about its axis.
    return jnp.cross(jnp.linalg.pinv(inertia, hermitian=True) @ momentum, r)


def start_swarm(
    forces: Forces,
    params: Params,
    positions: jax.Array,
    masses: jax.Array,
    key: jax.Array,
    *,
    temperature: float,
    periodic: bool = False,
    momentum_conserved: bool = True,
) -> Swarm:
    """R replicas at `positions` [R, n, 3] with fresh velocities; not alive where the forces are not finite."""
    keys = jax.random.split(key, len(positions))

    def velocities(key: jax.Array, position: jax.Array) -> jax.Array:
        return maxwell_velocities(
            key, position, masses, temperature=temperature, periodic=periodic, momentum_conserved=momentum_conserved
        )

    energy, force = jax.vmap(lambda position: forces(params, position))(positions)
    replicas = Replica(positions, jax.vmap(velocities)(keys, positions), force, energy, jnp.zeros_like(energy))
    count = len(positions)
    return Swarm(replicas, jax.vmap(_is_finite)(replicas), jnp.zeros(count, jnp.int32), jnp.zeros(count, bool))


def with_forces(forces: Forces, params: Params, swarm: Swarm) -> Swarm:
    """The same swarm under another potential: its forces and energies, and who is alive, anew."""
    old = swarm.replicas
    energy, force = jax.vmap(lambda position: forces(params, position))(old.position)
    replicas = dataclasses.replace(old, force=force, energy=energy)
    return dataclasses.replace(swarm, replicas=replicas, alive=jax.vmap(_is_finite)(replicas))


# --- the window -------------------------------------------------------------------------------------------------------


def make_window(
    forces: Forces,
    masses: jax.Array,
    integrator: Integrator,
    *,
    steps: int,
    every: int,
    crowded: Callable[[jax.Array], jax.Array] | None = None,
    max_displacement: float = MAX_DISPLACEMENT,
) -> Window:
    """`steps` steps with a frame after each `every`-th, to be compiled whole: wrap it in `jax.jit`.

    The key is folded with the step and the replica's number; replicas never depend on each other. `crowded` says of
    positions [n, 3] whether the neighbour list of the forces overflows there; see `Swarm.overflow`.
    Raises: `ValueError` unless `every` divides `steps`.
    """
    if every < 1 or steps < 1 or steps % every:
        raise ValueError(f"a window of {steps} steps cannot have a frame at each {every}-th step")

    def window(params: Params, swarm: Swarm, key: jax.Array) -> tuple[Swarm, Frames]:
        def force_of(position: jax.Array) -> tuple[jax.Array, jax.Array]:
            return forces(params, position)

        count = len(swarm.alive)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count, dtype=jnp.uint32))

        def to_next_frame(swarm: Swarm, frame: jax.Array) -> tuple[Swarm, Frames]:
            def one_step(i: jax.Array, swarm: Swarm) -> Swarm:
                number = jnp.uint32(frame * every + i)
                return _step(force_of, masses, integrator, swarm, keys, number, crowded, max_displacement)

            swarm = jax.lax.fori_loop(0, every, one_step, swarm)
            at = swarm.replicas
            return swarm, Frames(at.position, at.velocity, at.energy, swarm.alive)

        swarm, frames = jax.lax.scan(to_next_frame, swarm, jnp.arange(steps // every))
        return swarm, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), frames)

    return window


def _step(
    force_of: ForceFn,
    masses: jax.Array,
    integrator: Integrator,
    swarm: Swarm,
    keys: jax.Array,
    number: jax.Array,
    crowded: Callable[[jax.Array], jax.Array] | None,
    max_displacement: float,
) -> Swarm:
    """One step of every replica that is alive and stays so; the others are as they were."""

    def advance(
        replica: Replica, key: jax.Array, alive: jax.Array, overflow: jax.Array
    ) -> tuple[Replica, jax.Array, jax.Array]:
        new = integrator.step(force_of, masses, replica, jax.random.fold_in(key, number))
        if crowded is not None:
            overflow = overflow | (alive & crowded(new.position))
        moved = jnp.max(jnp.abs(new.position - replica.position))
        alive = alive & _is_finite(new) & (moved <= max_displacement)
        return jax.tree.map(lambda a, b: jnp.where(alive, a, b), new, replica), alive, overflow

    replicas, alive, overflow = jax.vmap(advance)(swarm.replicas, keys, swarm.alive, swarm.overflow)
    return Swarm(replicas, alive, swarm.steps + alive, overflow)


def _is_finite(replica: Replica) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(replica)]))


# --- putting replicas back --------------------------------------------------------------------------------------------


def where_replica(mask: jax.Array, new: Any, old: Any) -> Any:
    """The leaves of `new` for the replicas in the mask, of `old` for the others. Shapes: mask [R], leaves [R, ...]."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, new, old)
