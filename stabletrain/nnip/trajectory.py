"""Trajectories as extended XYZ: what ASE, OVITO and most programs read.

One file per replica, written frame by frame, so that a simulation that is stopped leaves what it had. Positions in A,
velocities in ASE's unit (A sqrt(eV / amu)), energies and forces in eV and eV / A, times in fs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from stabletrain.nnip.systems import System
from stabletrain.nnip.units import ACCELERATION


class ExtxyzWriter:
    """Appends frames to a file. Usable in a `with`; every frame is on the disk when `write` returns."""

    def __init__(self, path: Path, system: System) -> None:
        self._system = system
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = path.open("w", encoding="utf-8")

    def write(
        self,
        positions: np.ndarray,
        *,
        time: float,
        energy: float | None = None,
        velocities: np.ndarray | None = None,
    ) -> None:
        """One frame: positions [n, 3] A (wrapped or not), velocities [n, 3] A / fs, energy eV, time fs."""
        system, columns, properties = self._system, [np.asarray(positions, float)], "species:S:1:pos:R:3"
        if velocities is not None:
            columns.append(np.asarray(velocities, float) * ACCELERATION**-0.5)
            properties += ":velocities:R:3"
        notes = [] if system.cell is None else [f'Lattice="{_numbers(system.cell.reshape(-1))}"']
        notes += [f"Properties={properties}", f"time={time:.9g}"]
        notes += [] if energy is None else [f"energy={energy:.10g}"]
        notes += [f'pbc="{" ".join("T" if system.periodic else "F" for _ in range(3))}"']
        rows = np.concatenate(columns, axis=1)
        lines = [f"{symbol:<2} {_numbers(row)}" for symbol, row in zip(system.symbols, rows, strict=True)]
        self._file.write("\n".join([str(system.count), " ".join(notes), *lines]) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> ExtxyzWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _numbers(values: Sequence[float] | np.ndarray) -> str:
    return " ".join(f"{value:.8g}" for value in values)
