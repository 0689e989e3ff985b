"""A classical flexible water: the reference of `water-flexible`, 64 molecules in a periodic cube at 300 K.

Harmonic bonds and angle, Lennard-Jones between oxygens and point charges, with the numbers of SPC/Fw (Wu, Tepper and
Voth, J. Chem. Phys. 124, 024503 (2006)). **Differs** from that model: charges interact by the damped shifted force of
Fennell and Gezelter (J. Chem. Phys. 124, 234104 (2006)) up to half of the cell, not by Ewald's sum, and Lennard-Jones
is a shifted force with the same reach, so that energy and forces end smoothly. That makes it a liquid of its own: a
reference for potentials that learn it, no prediction about water.

**Units**: eV, A, elementary charges. **Shapes**: positions [3 M, 3], atoms O, H, H of each molecule in turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.nnip.frames import KCAL_PER_MOL
from stabletrain.nnip.reference_md import Frame, Settings, State
from stabletrain.random_keys import random_key

BOND_LENGTH, BOND_CONSTANT = 1.012, 1059.162 * KCAL_PER_MOL  # A, eV / A^2: k / 2 (r - r0)^2
ANGLE, ANGLE_CONSTANT = np.deg2rad(113.24), 75.90 * KCAL_PER_MOL  # eV / rad^2
SIGMA, EPSILON = 3.165492, 0.1554253 * KCAL_PER_MOL  # A, eV
CHARGES = (-0.82, 0.41, 0.41)
COULOMB = 14.399645  # eV A, e^2 / (4 pi eps0)
DAMPING = 0.2  # 1 / A
VERSION = "1"
"""Raised when another number would come out."""
MOLECULES, EDGE = 64, 12.4429  # A: 0.994 g / cm^3

DEFAULTS = Settings(frames=400, temperature=300.0, timestep=0.5, spacing=50.0, damping=2.0, equilibration=5.0, seed=0)
"""What the data set `water-flexible` is."""


def make_energy(molecules: int, edge: float) -> Any:
    """positions [3 M, 3] -> energy [], of M molecules in a cube of that edge."""
    atoms = 3 * molecules
    first, second = np.triu_indices(atoms, 1)
    apart = first // 3 != second // 3
    first, second = first[apart], second[apart]
    reach = edge / 2
    charge = np.tile(CHARGES, molecules)
    product = jnp.asarray(COULOMB * charge[first] * charge[second])
    oxygens = np.flatnonzero((first % 3 == 0) & (second % 3 == 0))

    def coulomb(r: jax.Array) -> jax.Array:
        end = jax.scipy.special.erfc(DAMPING * reach) / reach
        slope = end / reach + 2 * DAMPING / np.sqrt(np.pi) * np.exp(-((DAMPING * reach) ** 2)) / reach
        return jax.scipy.special.erfc(DAMPING * r) / r - end + slope * (r - reach)

    def lennard_jones(r: jax.Array) -> jax.Array:
        def plain(r: Any) -> Any:
            return 4 * EPSILON * ((SIGMA / r) ** 12 - (SIGMA / r) ** 6)

        slope = 4 * EPSILON * (-12 * SIGMA**12 / reach**13 + 6 * SIGMA**6 / reach**7)
        return plain(r) - plain(reach) - slope * (r - reach)

    def energy(positions: jax.Array) -> jax.Array:
        x = positions.reshape(molecules, 3, 3)
        arms = x[:, 1:] - x[:, :1]
        lengths = jnp.linalg.norm(arms, axis=-1)
        cosine = jnp.sum(arms[:, 0] * arms[:, 1], axis=-1) / (lengths[:, 0] * lengths[:, 1])
        angle = jnp.arccos(jnp.clip(cosine, -1 + 1e-6, 1 - 1e-6))
        inside = 0.5 * BOND_CONSTANT * jnp.sum((lengths - BOND_LENGTH) ** 2)
        inside += 0.5 * ANGLE_CONSTANT * jnp.sum((angle - ANGLE) ** 2)
        vectors = positions[second] - positions[first]
        vectors = vectors - edge * jnp.round(vectors / edge)
        r = jnp.sqrt(jnp.sum(vectors**2, axis=-1))
        near = r < reach
        between = jnp.sum(jnp.where(near, product * coulomb(r), 0.0))
        between += jnp.sum(jnp.where(near[oxygens], lennard_jones(r[oxygens]), 0.0))
        return inside + between

    return energy


def lattice(molecules: int, edge: float, seed: int) -> np.ndarray:
    """Molecules on a cubic lattice, turned at random: [3 M, 3] A."""
    from scipy.spatial.transform import Rotation

    side = int(np.ceil(molecules ** (1 / 3) - 1e-9))
    places = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)[:molecules]
    half = ANGLE / 2
    molecule = BOND_LENGTH * np.asarray([[0, 0, 0], [np.sin(half), np.cos(half), 0], [-np.sin(half), np.cos(half), 0]])
    turns = Rotation.random(molecules, rng=np.random.default_rng(seed)).as_matrix()
    turned = np.einsum("mij,aj->mai", turns, molecule)
    return (turned + (places[:, None] + 0.5) * edge / side).reshape(-1, 3)


class WaterEngine:
    """An `Engine` of the classical water: BAOAB in float32, compiled; labels in float64."""

    def __init__(self, molecules: int = MOLECULES, edge: float = EDGE) -> None:
        self.molecules, self.edge = molecules, edge
        self.species = np.tile([8, 1, 1], molecules)
        self.cell = np.eye(3) * edge
        self.provenance: Mapping[str, Any] = {
            "program": "classical flexible water: SPC/Fw's numbers, damped shifted force",
            "version": VERSION,
            "molecules": molecules,
            "edge": edge,
        }
        self._energy = make_energy(molecules, edge)
        self._simulator: Any = None
        self._shape: Any = None
        self._labels: Any = None

    def _prepared(self, settings: Settings) -> Any:
        if self._simulator is None:
            from stabletrain.nnip.benchmark import Conditions, Simulator
            from stabletrain.nnip.systems import make_system

            system = make_system(self.species, lattice(self.molecules, self.edge, settings.seed), self.cell)
            conditions = Conditions(
                temperature=settings.temperature, timestep=settings.timestep, thermostat="baoab",
                damping=settings.damping, window=settings.every, frame_every=settings.every,
            )  # fmt: skip

            def forces(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
                energy, slope = jax.value_and_grad(self._energy)(x)
                return energy, -slope

            self._simulator = Simulator(system, conditions, forces=forces)
            at_rest = self._simulator.start(None, lattice(self.molecules, self.edge, 0)[None], random_key(0))
            self._shape = jax.tree.structure(at_rest)
            with jax.enable_x64(True):
                self._labels = jax.jit(jax.value_and_grad(make_energy(self.molecules, self.edge)))
        return self._simulator

    def start(self, settings: Settings) -> State:
        """The lattice, with Maxwell's velocities."""
        positions = lattice(self.molecules, self.edge, settings.seed)
        swarm = self._prepared(settings).start(None, positions[None], random_key(settings.seed))
        return _as_state(swarm)

    def advance(self, settings: Settings, state: State, number: int) -> tuple[State, Frame]:
        """A compiled window; what it starts from is all in the state."""
        simulator = self._prepared(settings)
        leaves = [jnp.asarray(state[f"leaf_{i}"]) for i in range(len(state))]
        swarm = jax.tree.unflatten(self._shape, leaves)
        after, frames = simulator.window(None, swarm, jax.random.fold_in(random_key(settings.seed), number + 1))
        position = np.asarray(frames.position[0, -1], np.float64)
        with jax.enable_x64(True):
            energy, slope = self._labels(jnp.asarray(position))
        if not bool(after.alive[0]):
            energy = np.nan
        return _as_state(after), Frame(position, float(energy), -np.asarray(slope))


def _as_state(swarm: Any) -> State:
    return {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(swarm))}


def cached_frames(home: Path, tick: Any) -> Path:
    """The file of `water-flexible` below `home`, made where it is not there: about a minute."""
    from stabletrain.nnip.reference_md import make_frames

    engine = WaterEngine()
    path = home / "md" / f"water-flexible-{engine.provenance['version']}.npz"
    if not path.is_file():
        make_frames(engine, DEFAULTS, path, tick=tick)
    return path
