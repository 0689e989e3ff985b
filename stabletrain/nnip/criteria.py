"""When a simulation counts as unstable: criteria with thresholds, and what they say of each frame.

A frame is unstable when any criterion that has a threshold exceeds it, or when the replica is frozen (not finite, or
blown up; see `stabletrain.nnip.dynamics`). The criteria, each with the reason for it:

- bond-length deviation: the largest | |b| - mean |b| | over the bonds, the mean being the training set's. The
  released code tests 0.25 A while training and 0.5 A in the evaluation, Fu et al. (2023) 0.5 A.
- smallest distance of atoms in different molecules: liquids; the released code trains on 1.2 A for water.
- RDF error: the largest over the pairs of elements of r_max mean |g - g_ref| over a window; Fu et al.: 3.0 A, water.
- temperature: the kinetic temperature of a frame above a multiple of the one asked for.
- energy drift: the total energy against that of the first frame, per atom; for NVE.

**Units**: A, K, eV. **Shapes**: R replicas, F frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.nnip.dynamics import Frames
from stabletrain.nnip.geometry import pair_lengths
from stabletrain.nnip.integrators import kinetic_energy, temperature_of
from stabletrain.nnip.observables import StaticObservable
from stabletrain.nnip.systems import System, molecules

CHUNK = 64


@dataclass(frozen=True)
class Thresholds:
    """What is too much. A criterion that is None is not looked at."""

    bond_deviation: float | None = None  # A
    intermolecular_distance: float | None = None  # A; the smallest that is allowed
    rdf_error: float | None = None  # A
    temperature_factor: float | None = None  # times the temperature that was asked for
    energy_drift: float | None = None  # eV per atom

    @property
    def active(self) -> dict[str, float]:
        """Those that are looked at."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


MOLECULE_TRAINING = Thresholds(bond_deviation=0.25)
MOLECULE_EVALUATION = Thresholds(bond_deviation=0.5)
LIQUID_TRAINING = Thresholds(intermolecular_distance=1.2)
LIQUID_EVALUATION = Thresholds(rdf_error=3.0)


def default_thresholds(system: System, *, evaluation: bool) -> Thresholds:
    """Those of the released code: bonds of a single molecule, distances and RDFs of a liquid.

    None where there is neither a bond nor a cell: then only what is not finite or blew up is unstable.
    """
    if system.periodic and molecules(system).max() > 0:
        return LIQUID_EVALUATION if evaluation else LIQUID_TRAINING
    if not len(system.bonds):
        return Thresholds()
    return MOLECULE_EVALUATION if evaluation else MOLECULE_TRAINING


@dataclass(frozen=True)
class Reference:
    """What the criteria measure against, from the training set."""

    bond_lengths: np.ndarray  # [bonds] A, means
    rdfs: Mapping[str, np.ndarray] = field(default_factory=dict)  # by observable, [D]


def mean_bond_lengths(system: System, positions: np.ndarray) -> np.ndarray:
    """The mean of each bond's length over frames: positions [N, n, 3] -> [bonds]."""
    frames = jnp.asarray(positions)
    return np.asarray(jnp.mean(bond_lengths(system, frames), axis=0))


def bond_lengths(system: System, positions: jax.Array) -> jax.Array:
    """The lengths of the system's bonds in each frame: positions [N, n, 3] -> [N, bonds]."""
    return jax.lax.map(lambda x: pair_lengths(x, system.bonds, system.cell), positions, batch_size=CHUNK)


def bond_deviation(system: System, positions: jax.Array, reference: jax.Array | np.ndarray) -> jax.Array:
    """The largest | |b| - reference | of each frame: positions [N, n, 3], reference [bonds] -> [N]."""
    return jnp.max(jnp.abs(bond_lengths(system, positions) - jnp.asarray(reference, positions.dtype)), axis=1)


def intermolecular_pairs(system: System) -> np.ndarray:
    """The pairs of atoms in different molecules: int [P, 2]."""
    pairs = np.stack(np.triu_indices(system.count, 1), axis=1)
    molecule = molecules(system)
    return pairs[molecule[pairs[:, 0]] != molecule[pairs[:, 1]]]


def intermolecular_distance(system: System, positions: jax.Array) -> jax.Array:
    """The smallest distance of atoms in different molecules of each frame: positions [N, n, 3] -> [N].

    Raises: `ValueError` for a system of one molecule.
    """
    pairs = intermolecular_pairs(system)
    if not len(pairs):
        raise ValueError("a single molecule has no intermolecular distance")
    return jax.lax.map(lambda x: jnp.min(pair_lengths(x, pairs, system.cell)), positions, batch_size=CHUNK)


# --- verdicts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Criteria:
    """The criteria of one system, with its thresholds and its reference."""

    system: System
    thresholds: Thresholds
    reference: Reference
    temperature: float  # K, asked for
    degrees_of_freedom: int
    rdfs: tuple[StaticObservable, ...] = ()

    def __post_init__(self) -> None:
        missing = {rdf.name for rdf in self.rdfs} - set(self.reference.rdfs)
        if self.thresholds.rdf_error is not None and (not self.rdfs or missing):
            raise ValueError("an RDF criterion needs RDFs with a reference of each")
        if self.thresholds.bond_deviation is not None and not len(self.system.bonds):
            raise ValueError("a bond criterion needs bonds, and this system has none")
        if self.thresholds.intermolecular_distance is not None and not len(intermolecular_pairs(self.system)):
            raise ValueError("a criterion of distances between molecules needs more than a single molecule")

    def values(self, frames: Frames) -> dict[str, jax.Array]:
        """Each active criterion of each frame, [R, F]; an RDF error is of all frames of the window, in each."""
        replicas, count = frames.energy.shape
        atoms = frames.position.shape[2]
        flat = frames.position.reshape(replicas * count, atoms, 3)
        wanted = self.thresholds.active

        def by_frame(values: jax.Array) -> jax.Array:
            return values.reshape(replicas, count)

        found: dict[str, jax.Array] = {}
        if "bond_deviation" in wanted:
            found["bond_deviation"] = by_frame(bond_deviation(self.system, flat, self.reference.bond_lengths))
        if "intermolecular_distance" in wanted:
            found["intermolecular_distance"] = by_frame(intermolecular_distance(self.system, flat))
        if "rdf_error" in wanted:
            found["rdf_error"] = jnp.broadcast_to(self._rdf_error(frames)[:, None], (replicas, count))
        if "temperature_factor" in wanted:
            measured = temperature_of(frames.velocity, jnp.asarray(self.system.masses), self.degrees_of_freedom)
            found["temperature_factor"] = measured / self.temperature
        if "energy_drift" in wanted:
            total = frames.energy + kinetic_energy(frames.velocity, jnp.asarray(self.system.masses))
            found["energy_drift"] = jnp.abs(total - total[:, :1]) / atoms
        return found

    def _rdf_error(self, frames: Frames) -> jax.Array:
        """The largest error of any pair's RDF over the window's frames, by replica: [R]."""

        def of_replica(positions: jax.Array) -> jax.Array:
            errors = []
            for rdf in self.rdfs:
                curve = jnp.mean(jax.vmap(rdf.of_frame)(positions), axis=0)
                errors.append(rdf.spacing * jnp.sum(jnp.abs(curve - jnp.asarray(self.reference.rdfs[rdf.name]))))
            return jnp.max(jnp.stack(errors))

        return jax.lax.map(of_replica, frames.position)

    def unstable(self, frames: Frames) -> jax.Array:
        """Whether each frame violates a criterion, or its replica is frozen: bool [R, F]."""
        violated = ~frames.alive
        for name, values in self.values(frames).items():
            limit = self.thresholds.active[name]
            # A value that is not finite fulfils nothing.
            allowed = values >= limit if name == "intermolecular_distance" else values <= limit
            violated = violated | ~allowed
        return violated


def reference_extremes(criteria: Criteria, positions: np.ndarray, *, window: int = 1) -> dict[str, float]:
    """What the reference's own frames [N, n, 3] reach of each active criterion: a threshold within is of no use.

    The largest bond deviation and the smallest distance between molecules of any frame; the largest RDF error of
    `window` consecutive frames; for the temperature the mean plus four standard deviations of a canonical sample,
    1 + 4 sqrt(2 / f). The energy of NVE does not drift: 0.
    """
    system, wanted = criteria.system, criteria.thresholds.active
    frames = jnp.asarray(positions, jnp.float32)
    found: dict[str, float] = {}
    if "bond_deviation" in wanted:
        found["bond_deviation"] = float(jnp.max(bond_deviation(system, frames, criteria.reference.bond_lengths)))
    if "intermolecular_distance" in wanted:
        found["intermolecular_distance"] = float(jnp.min(intermolecular_distance(system, frames)))
    if "rdf_error" in wanted:
        window = min(window, len(positions))
        errors = []
        for rdf in criteria.rdfs:
            curves = np.asarray(rdf.of_frames(frames))
            usable = len(curves) // window * window
            means = curves[:usable].reshape(-1, window, curves.shape[1]).mean(axis=1)
            errors += [rdf.error(mean, criteria.reference.rdfs[rdf.name]) for mean in means]
        found["rdf_error"] = max(errors)
    if "temperature_factor" in wanted:
        found["temperature_factor"] = 1 + 4 * float(np.sqrt(2 / criteria.degrees_of_freedom))
    if "energy_drift" in wanted:
        found["energy_drift"] = 0.0
    return found


def frames_before_failure(unstable: jax.Array) -> jax.Array:
    """How many frames of each replica come before its first unstable one: bool [R, F] -> int32 [R]."""
    return jnp.sum(jnp.cumsum(unstable, axis=1) == 0, axis=1).astype(jnp.int32)
