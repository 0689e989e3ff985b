"""A structure to start dynamics from: a file that ASE reads, or a molecule written as SMILES."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.errors import DataError


def read_structure(named: str, seed: int = 0) -> tuple[Any, str]:
    """The `ase.Atoms` of a file, its last frame, or of a SMILES string, and what it is called.

    Raises: `DataError` for what is neither, or for a file with constraints or with periodicity along some axes only.
    """
    path = Path(named)
    if path.is_file():
        return _from_file(path), path.stem
    if path.suffix and path.suffix[1:].isalnum() and path.suffix[1:].islower() and not path.suffix[1:].isdigit():
        raise DataError(f"there is no file {path}")
    return from_smiles(named, seed), named


def _from_file(path: Path) -> Any:
    import ase.io

    try:
        atoms: Any = ase.io.read(path)
    except Exception as error:  # whatever ASE's many readers raise
        raise DataError(f"{path} cannot be read as a structure: {error}") from error
    if atoms.pbc.any() and not atoms.pbc.all():
        raise DataError(f"{path} is periodic along some axes only: it must be along each, or along none")
    if atoms.constraints:
        names = ", ".join(sorted({type(constraint).__name__ for constraint in atoms.constraints}))
        raise DataError(f"{path} has constraints ({names}): every atom moves here, so remove them from the file")
    return atoms


def from_smiles(smiles: str, seed: int = 0) -> Any:
    """The `ase.Atoms` of a molecule: distances embedded by RDKit (ETKDG), with its hydrogen atoms, heavy atoms first.

    Raises: `DataError` without RDKit, for no valid SMILES, or for a molecule that cannot be embedded.
    """
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem import rdDistGeom
    except ImportError as error:
        raise DataError(
            f"{smiles!r} is no file; to read it as SMILES install the extra: pip install 'stabletrain[xtb]'"
        ) from error
    from ase import Atoms

    with rdBase.BlockLogs():  # the error below says it
        read = Chem.MolFromSmiles(smiles)
    if read is None or read.GetNumAtoms() == 0:
        raise DataError(f"{smiles!r} is neither a file nor valid SMILES")
    molecule = Chem.AddHs(read)
    if rdDistGeom.EmbedMolecule(molecule, randomSeed=seed + 1) != 0:
        raise DataError(f"RDKit finds no coordinates for {smiles!r}: give a file of the structure instead")
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    return Atoms(numbers=numbers, positions=np.asarray(molecule.GetConformer().GetPositions()))
