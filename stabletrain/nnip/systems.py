"""What is simulated: the atoms of a molecule or of a periodic cell, and the bonds between them.

**Units**: A, amu. Imports no JAX.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase.data import atomic_masses, chemical_symbols, covalent_radii

from stabletrain.errors import DataError

BOND_STRETCH = 1.3
"""Atoms closer than this many times the sum of their covalent radii are bonded."""


@dataclass(frozen=True)
class System:
    """Atoms of which only the positions change.

    **Shapes**: N atoms, nb bonds (pairs i < j, sorted). `cell`: rows are the lattice vectors; None without periodicity.
    """

    species: np.ndarray  # int32 [N], atomic numbers
    masses: np.ndarray  # float64 [N], amu
    cell: np.ndarray | None  # float64 [3, 3], A
    bonds: np.ndarray  # int32 [nb, 2]

    @property
    def count(self) -> int:
        """N."""
        return len(self.species)

    @property
    def periodic(self) -> bool:
        """Whether there is a cell."""
        return self.cell is not None

    @functools.cached_property
    def symbols(self) -> tuple[str, ...]:
        """The chemical symbols of the atoms."""
        return tuple(chemical_symbols[z] for z in self.species)

    @property
    def elements(self) -> tuple[int, ...]:
        """The atomic numbers that occur, ascending."""
        return tuple(int(z) for z in np.unique(self.species))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "species": self.species.tolist(),
            "masses": self.masses.tolist(),
            "cell": None if self.cell is None else self.cell.tolist(),
            "bonds": self.bonds.tolist(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> System:
        """The inverse of `to_dict`."""
        cell = values["cell"]
        return cls(
            species=np.asarray(values["species"], np.int32),
            masses=np.asarray(values["masses"], np.float64),
            cell=None if cell is None else np.asarray(cell, np.float64),
            bonds=np.asarray(values["bonds"], np.int32).reshape(-1, 2),
        )


def make_system(species: Any, positions: Any, cell: Any = None) -> System:
    """The system of these atoms: masses of the elements, and the bonds that `positions` [N, 3] show.

    Raises: `DataError` for an unknown atomic number, or a cell without volume.
    """
    species = np.asarray(species, np.int32)
    if species.ndim != 1 or not len(species) or species.min() < 1 or species.max() >= len(atomic_masses):
        raise DataError(f"atomic numbers must be from 1 to {len(atomic_masses) - 1}, one for each atom")
    cell = None if cell is None else checked_cell(cell)
    return System(
        species=species,
        masses=np.asarray(atomic_masses[species], np.float64),
        cell=cell,
        bonds=find_bonds(species, np.asarray(positions, np.float64), cell),
    )


def checked_cell(cell: Any) -> np.ndarray:
    """Lattice vectors [3, 3] of an edge, three edges or nine numbers, in A. Raises: `DataError` for another shape."""
    array = np.asarray(cell, np.float64)
    if array.size == 1:
        array = np.eye(3) * float(array.reshape(()))
    elif array.size == 3:
        array = np.diag(array.reshape(3))
    elif array.size == 9:
        array = array.reshape(3, 3)
    else:
        raise DataError(f"a cell has one, three or nine numbers, not {array.size}")
    if not np.isfinite(array).all() or abs(np.linalg.det(array)) < 1e-6:
        raise DataError("the cell has no volume")
    return array


def minimum_image(vectors: np.ndarray, cell: np.ndarray | None) -> np.ndarray:
    """Vectors [..., 3] brought to their nearest image, for lengths up to half the cell's smallest width."""
    if cell is None:
        return vectors
    inverse = np.linalg.inv(cell)
    return vectors - np.round(vectors @ inverse) @ cell


def smallest_width(cell: np.ndarray) -> float:
    """The smallest distance between opposite faces of the cell, in A."""
    return float((1.0 / np.linalg.norm(np.linalg.inv(cell), axis=0)).min())


def find_bonds(species: np.ndarray, positions: np.ndarray, cell: np.ndarray | None) -> np.ndarray:
    """The pairs of atoms closer than `BOND_STRETCH` times the sum of their covalent radii; int32 [nb, 2], i < j."""
    vectors = minimum_image(positions[None] - positions[:, None], cell)
    distances = np.linalg.norm(vectors, axis=-1)
    radii = covalent_radii[species]
    near = distances < BOND_STRETCH * (radii[:, None] + radii[None])
    return np.argwhere(np.triu(near, 1)).astype(np.int32).reshape(-1, 2)


def molecules(system: System) -> np.ndarray:
    """The molecule that each atom belongs to, int32 [N]: connected atoms share a number, counted from 0."""
    label = np.arange(system.count)
    changed = True
    while changed:
        before = label.copy()
        for i, j in system.bonds:
            label[i] = label[j] = min(label[i], label[j])
        changed = bool((before != label).any())
    return np.unique(label, return_inverse=True)[1].astype(np.int32)
