"""Labelled structures: read, converted to eV and A, and split.

Formats of `--data`: `.npz` with R, E, F and z, as MD17 and MD22 have them, or coords, energies, forces and
nuclear_charges, as rMD17, and `cell` for a periodic system; and whatever ASE reads with energies and forces (extended
XYZ, ...). z are atomic numbers or chemical symbols. Units of npz files are kcal/mol and A, as in those three, unless
the file names its own (`energy_unit`, as `stabletrain data make-md` writes it) or the options say otherwise; those of
ASE are eV and A. One cell holds for all frames: a cell for each, [N, 3, 3] or [N, 9], must be N times the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from stabletrain.errors import ConfigError, DataError, nearest
from stabletrain.metrics.files import UNREADABLE, read_npz
from stabletrain.nnip.systems import System, checked_cell, make_system

KCAL_PER_MOL = 0.0433641043
"""In eV (CODATA 2018, thermochemical calorie)."""
HARTREE, BOHR = 27.211386246, 0.529177210903
"""In eV and in A (CODATA 2018)."""
UNITS = {"eV": 1.0, "kcal/mol": KCAL_PER_MOL, "kJ/mol": KCAL_PER_MOL / 4.184, "hartree": HARTREE}
LENGTH_UNITS = {"A": 1.0, "bohr": BOHR}
BUNDLED = {
    "aspirin-xtb": "aspirin_xtb.npz",
    "ethanol-xtb": "ethanol_xtb.npz",
    "ac-ala3-xtb": "ac_ala3_xtb.npz",
}
"""Data sets that come with the program."""
MADE = ("water-flexible",)
"""Data sets that the program makes when they are first asked for, and keeps in its cache."""
DATASETS = (*BUNDLED, *MADE)
COLUMNS = {"R": "coords", "E": "energies", "F": "forces", "z": "nuclear_charges"}
"""Names in an .npz: MD17's and rMD17's."""


@dataclass(frozen=True)
class FramesSpec:
    """What record.json keeps of the data."""

    name: str
    fingerprint: str
    frames: int
    formula: str

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"name": self.name, "fingerprint": self.fingerprint, "frames": self.frames, "formula": self.formula}


@dataclass(frozen=True)
class LabelledFrames:
    """N structures of one system: positions [N, n, 3] A, energies [N] eV, forces [N, n, 3] eV / A; all float64."""

    system: System
    positions: np.ndarray
    energies: np.ndarray
    forces: np.ndarray
    spec: FramesSpec

    def __len__(self) -> int:
        return len(self.energies)


def read_frames(
    dataset: str, data: str | None, energy_unit: str | None = None, length_unit: str | None = None
) -> LabelledFrames:
    """The frames of a named data set, or of the user's file.

    Raises: `DataError` for a file that is missing, of another form, or has numbers that are not finite; `ConfigError`
    for an unknown data set, or units that contradict the file's.
    """
    if data is None:
        if dataset in MADE:
            return _from_npz(_made(dataset), dataset, None, None)
        if dataset not in BUNDLED:
            raise ConfigError(f"unknown data set {dataset!r}: {nearest(dataset, DATASETS)} (your own go by --data)")
        with resources.as_file(resources.files("stabletrain.nnip") / "bundled" / BUNDLED[dataset]) as path:
            return _from_npz(path, dataset, "eV", None)
    path = Path(data)
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if path.suffix == ".npz":
        return _from_npz(path, path.stem, energy_unit, length_unit)
    for flag, unit, own in (("--energy-unit", energy_unit, "eV"), ("--length-unit", length_unit, "A")):
        if unit not in (None, own):
            raise ConfigError(f"{flag} {unit} is for .npz files: ASE converts {path.name} to {own} itself")
    return _from_ase(path)


def _made(dataset: str) -> Path:
    """The file of a data set that the program makes: `water-flexible`."""
    from stabletrain.nnip.classical_water import cached_frames
    from stabletrain.nnip.make_md import progress
    from stabletrain.paths import cache_home

    return cached_frames(cache_home(), progress(quiet=False, prefix=f"{dataset}, made once, "))


def _from_npz(path: Path, name: str, energy_unit: str | None, length_unit: str | None) -> LabelledFrames:
    try:
        content = read_npz(path)
    except UNREADABLE as error:
        raise DataError(f"{path} is not a readable .npz: {error}") from error
    columns = {key: content[name] for key, other in COLUMNS.items() for name in (other, key) if name in content}
    if missing := [key for key in COLUMNS if key not in columns]:
        raise DataError(f"{path} has no {', '.join(missing)}: it needs R [N, n, 3], E [N], F [N, n, 3] and z [n]")
    stated = str(content["energy_unit"]) if "energy_unit" in content else None
    if stated is not None and stated not in UNITS:
        raise DataError(f"{path} has energies in {stated!r}: {nearest(stated, UNITS)}")
    if stated and energy_unit and stated != energy_unit:
        raise ConfigError(f"--energy-unit {energy_unit} contradicts {path.name}, which says {stated}")
    energy = UNITS[energy_unit or stated or "kcal/mol"]
    length = LENGTH_UNITS[length_unit or "A"]
    positions, energies, forces = (_numbers(path, key, columns[key]) for key in "REF")
    cell = _numbers(path, "cell", content["cell"]) * length if "cell" in content else None
    species = _species(path, columns["z"])
    return _checked(
        path, name, species, positions * length, energies.reshape(-1) * energy, forces * (energy / length), cell
    )


def _numbers(path: Path, key: str, column: np.ndarray) -> np.ndarray:
    if column.dtype.kind not in "iuf":
        raise DataError(f"{path} has {key} of type {column.dtype}: it must be real numbers")
    return np.asarray(column, np.float64)


def _species(path: Path, z: np.ndarray) -> np.ndarray:
    """Atomic numbers [n], of whole numbers or of chemical symbols. Raises: `DataError` for anything else."""
    if z.ndim != 1:
        raise DataError(
            f"{path} has z of shape {z.shape}: it must be [n], one for each atom and the same in all frames"
        )
    if z.dtype.kind in "US":
        symbols = [str(symbol) for symbol in z.astype(np.str_)]
        if unknown := [symbol for symbol in symbols if symbol not in atomic_numbers]:
            raise DataError(f"{path} has {unknown[0]!r} in z: it must be atomic numbers, or chemical symbols")
        return np.asarray([atomic_numbers[symbol] for symbol in symbols])
    numbers = _numbers(path, "z", z)
    if not np.array_equal(numbers, np.round(numbers)):  # a NaN too
        raise DataError(f"{path} has z that are not whole: it must be atomic numbers, or chemical symbols")
    return numbers


def _from_ase(path: Path) -> LabelledFrames:
    import ase.io

    try:
        atoms: Any = ase.io.read(path, index=":")
        species = atoms[0].get_atomic_numbers() if atoms else np.zeros(0, int)
        if any(not np.array_equal(frame.get_atomic_numbers(), species) for frame in atoms):
            raise DataError(f"{path} holds different systems; all frames must have the same atoms in the same order")
        # As stored: constraints of the file (`FixAtoms`) would set forces to zero.
        energies = np.asarray([frame.get_potential_energy(apply_constraint=False) for frame in atoms], np.float64)
        forces = np.asarray([frame.get_forces(apply_constraint=False) for frame in atoms], np.float64)
        positions = np.asarray([frame.get_positions() for frame in atoms], np.float64)
    except DataError:
        raise
    except Exception as error:  # whatever ASE's many readers raise
        raise DataError(f"{path} cannot be read with energies and forces: {error}") from error
    periodic = np.asarray([frame.pbc for frame in atoms])
    if periodic.any() and not periodic.all():
        raise DataError(f"{path} has frames that are not periodic, or not along each axis: all must be, or none")
    cells = np.asarray([frame.cell.array for frame in atoms]) if periodic.any() else None
    return _checked(path, path.stem, species, positions, energies, forces, cells)


def _checked(
    path: Path, name: str, species: Any, positions: np.ndarray, energies: np.ndarray, forces: np.ndarray, cell: Any
) -> LabelledFrames:
    if not len(energies):
        raise DataError(f"{path} has no frames")
    shape = (len(energies), len(species), 3)
    if positions.shape != shape or forces.shape != shape:
        raise DataError(f"{path}: R {positions.shape} and F {forces.shape} do not fit {len(energies)} energies")
    if not all(np.isfinite(array).all() for array in (positions, energies, forces)):
        raise DataError(f"{path} has numbers that are not finite")
    lattice = None if cell is None else _one_cell(path, np.asarray(cell, np.float64), len(energies))
    system = make_system(species, positions[0], lattice)
    digest = hashlib.sha256()
    for array in (system.species, positions, energies, forces, np.zeros(0) if lattice is None else lattice):
        digest.update(np.ascontiguousarray(array).tobytes())
    spec = FramesSpec(name, digest.hexdigest(), len(energies), "".join(system.symbols))
    return LabelledFrames(system, positions, energies, forces, spec)


def _one_cell(path: Path, cell: np.ndarray, count: int) -> np.ndarray:
    """The cell [3, 3] of all frames, from one or from `count` equal ones. Raises: `DataError` where they differ."""
    if cell.ndim > 1 and len(cell) == count and cell[0].size == 9:
        # The last digits of a float32 file may differ; a cell of changing size differs by more.
        if not np.allclose(cell, cell[0], rtol=0, atol=1e-4):
            raise DataError(f"{path} has frames in different cells: a potential here is for one cell")
        cell = cell[0]
    return checked_cell(cell)


def split(
    frames: LabelledFrames, train: int, validation: int, test: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the training, validation and test frames: disjoint, at random by the seed. The test frames of one seed
    depend on neither of the others, nor do the training frames. Raises: `DataError` when there are not enough."""
    if train + validation + test > len(frames):
        raise DataError(
            f"{frames.spec.name} has {len(frames)} frames, fewer than {train} for training, {validation} for "
            f"validation and {test} for the test"
        )
    order = np.random.default_rng(seed).permutation(len(frames))
    parts = order[:train], order[train : train + validation], order[len(frames) - test :]
    return np.sort(parts[0]), np.sort(parts[1]), np.sort(parts[2])
