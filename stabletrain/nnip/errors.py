"""Error tables of a potential on labelled frames: mean absolute and root-mean-square, of energies and of forces.

**Units**: meV, meV per atom, meV / A. Errors of forces are over components, all and by element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def error_scalars(
    energy_errors: np.ndarray, force_errors: np.ndarray, symbols: Sequence[str], name: str
) -> dict[str, float]:
    """The metrics of one part of the data from errors in eV [N] and eV / A [N, n, 3].

    `eval/energy_mae_<name>` in meV, `eval/energy_per_atom_mae_<name>` in meV per atom, `eval/force_mae_<name>` and
    `eval/force_mae_<name>_<element>` in meV / A; each also as `rmse`.
    """
    found: dict[str, float] = {}

    def add(quantity: str, errors: np.ndarray, ending: str = "") -> None:
        found[f"eval/{quantity}_mae_{name}{ending}"] = 1e3 * float(np.abs(errors).mean())
        found[f"eval/{quantity}_rmse_{name}{ending}"] = 1e3 * float(np.sqrt(np.mean(errors**2)))

    add("energy", energy_errors)
    add("energy_per_atom", energy_errors / len(symbols))
    add("force", force_errors)
    for symbol in sorted(set(symbols)):
        add("force", force_errors[:, np.asarray([s == symbol for s in symbols])], f"_{symbol}")
    return found


def error_table(scalars: Mapping[str, float], parts: Mapping[str, int], symbols: Sequence[str]) -> str:
    """The metrics of `error_scalars` as lines of text: MAE / RMSE, a row for each of `parts` (name -> frames)."""
    columns = {"energy (meV)": ("energy", ""), "meV per atom": ("energy_per_atom", ""), "force (meV/A)": ("force", "")}
    columns |= {f"force on {symbol}": ("force", f"_{symbol}") for symbol in sorted(set(symbols))}
    lines = [["MAE / RMSE", "frames", *columns]]
    for part, frames in parts.items():
        cells = [
            " / ".join(f"{scalars[f'eval/{quantity}_{kind}_{part}{ending}']:.4g}" for kind in ("mae", "rmse"))
            for quantity, ending in columns.values()
        ]
        lines.append([part, str(frames), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
