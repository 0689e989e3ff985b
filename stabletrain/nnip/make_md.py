"""`stabletrain data make-md`: a set of frames with energies and forces, made by dynamics with a reference.

Imports no JAX until the command runs. **Units** of options: K, fs, ps, 1 / ps.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from stabletrain.errors import EXIT_OK, ConfigError, DataError, nearest

SYSTEMS = ("water-flexible",)
XTB_METHODS = ("GFN2-xTB", "GFN1-xTB", "IPEA1-xTB")
PANEL = "Dynamics"
DEFAULTS = {"frames": 1000, "temperature": 500.0, "spacing": 10.0, "equilibration": 1.0, "damping": 2.0}
LARGEST_SEED = 2**31 - 2
"""RDKit counts its seeds from 1, in 32 bits with a sign."""


def make_md_command(
    structure: Annotated[
        str | None, typer.Argument(metavar="[SMILES|FILE]", help="A molecule as SMILES, or a file that ASE reads.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help=f"A system with a reference of its own: {', '.join(SYSTEMS)}.")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help=f"Reference of tblite: {', '.join(XTB_METHODS)}.")
    ] = "GFN2-xTB",
    calculator: Annotated[
        str | None, typer.Option("--calculator", metavar="MODULE:NAME", help="Any ASE calculator, in tblite's place.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option("--frames", help="How many. [default: 1000; water 400]", min=1, show_default=False)
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="K. [default: 500; water 300]", min=1.0, rich_help_panel=PANEL),
    ] = None,
    timestep: Annotated[float, typer.Option("--timestep", help="fs.", min=0.001, rich_help_panel=PANEL)] = 0.5,
    spacing: Annotated[
        float | None,
        typer.Option(
            "--spacing", help="fs from frame to frame. [default: 10; water 50]", min=0.001, rich_help_panel=PANEL
        ),
    ] = None,
    damping: Annotated[
        float, typer.Option("--damping", help="Langevin's friction in 1 / ps.", min=0.0, rich_help_panel=PANEL)
    ] = 2.0,
    equilibration: Annotated[
        float | None,
        typer.Option(
            "--equilibration", help="ps before the first frame. [default: 1; water 5]", min=0.0, rich_help_panel=PANEL
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The .npz to write. [default: <name>.npz]", show_default=False)
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Of the coordinates, velocities and noise.", min=0, max=LARGEST_SEED)
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> int:
    """Make a set of labelled frames by dynamics with GFN2-xTB, any ASE calculator, or a classical water.

    Langevin dynamics from the relaxed structure; a frame with its energy (eV) and forces (eV / A) each --spacing. The
    same command goes on where it was stopped. The file is data for `stabletrain nnip --data FILE`.
    """
    from stabletrain.nnip.reference_md import Settings, make_frames

    if (structure is None) == (system is None):
        raise ConfigError("make-md takes a structure (SMILES or a file), or --system water-flexible")
    if out is not None and out.suffix != ".npz":
        raise ConfigError(f"--out {out} is no .npz, which is what the frames are written as: --out {out}.npz")
    defaults = dict(DEFAULTS)
    engine: Any
    if system is not None:
        if system not in SYSTEMS:
            raise ConfigError(f"unknown --system {system!r}: {nearest(system, SYSTEMS)}")
        if calculator is not None or method != "GFN2-xTB":
            raise ConfigError(f"--system {system} has its own reference: --calculator and --method do nothing")
        engine, name, defaults = _water()
    else:
        assert structure is not None
        engine, name = _calculated(structure, method, calculator, seed)
    given = {
        "frames": frames,
        "temperature": temperature,
        "spacing": spacing,
        "equilibration": equilibration,
    }
    chosen: dict[str, Any] = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    settings = Settings(**{**chosen, "timestep": timestep, "damping": damping, "seed": seed})
    steps = settings.spacing / settings.timestep
    if abs(steps - settings.every) > 1e-6 * settings.every:
        raise ConfigError(f"--spacing {settings.spacing:g} fs is no multiple of --timestep {settings.timestep:g} fs")
    done = make_frames(engine, settings, out or Path(f"{name}.npz"), tick=progress(quiet=quiet))
    if as_json:
        print(json.dumps(done))
        return EXIT_OK
    units = {
        "span_ps": "ps", "force_rms": "eV / A", "energy_std": "eV", "temperature": "K", "timestep": "fs",
        "spacing": "fs", "damping": "1 / ps", "equilibration": "ps", "edge": "A",
    }  # fmt: skip
    for key, value in done.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"{key.replace('_', ' '):<14} {shown} {units.get(key, '')}".rstrip())
    print(f"\ntrain on it    stabletrain nnip --data {done['file']}")
    return EXIT_OK


def _water() -> tuple[Any, str, dict[str, Any]]:
    from stabletrain.nnip.classical_water import DEFAULTS as WATER
    from stabletrain.nnip.classical_water import WaterEngine

    return WaterEngine(), "water-flexible", {name: getattr(WATER, name) for name in DEFAULTS}


def _calculated(structure: str, method: str, calculator: str | None, seed: int) -> tuple[Any, str]:
    from stabletrain.nnip.reference_md import CalculatorEngine
    from stabletrain.nnip.structures import read_structure

    if calculator is not None and method != "GFN2-xTB":
        raise ConfigError("--method is tblite's: with --calculator it does nothing")
    if method not in XTB_METHODS:
        raise ConfigError(f"unknown --method {method!r}: {nearest(method, XTB_METHODS)}")
    make, about = _ase(calculator) if calculator is not None else _xtb(method)
    atoms, name = read_structure(structure, seed)
    formula = atoms.get_chemical_formula()
    plain = name if name.isalnum() or Path(structure).is_file() else formula
    return CalculatorEngine(atoms, make, {**about, "structure": name, "formula": formula}), f"{plain}-frames"


def _xtb(method: str) -> tuple[Callable[[], Any], dict[str, Any]]:
    try:
        from tblite.ase import TBLite
    except ImportError as error:
        raise DataError(
            "GFN2-xTB is computed by tblite, which is not installed: pip install 'stabletrain[xtb]', or name another "
            "reference with --calculator"
        ) from error
    about = {"program": f"tblite, {method}", "version": metadata.version("tblite")}
    return lambda: TBLite(method=method, verbosity=0), about


def _ase(calculator: str) -> tuple[Callable[[], Any], dict[str, Any]]:
    from stabletrain.nnip.calculator import calculator_called

    calculator_called(calculator)  # the errors, before anything else
    return lambda: calculator_called(calculator), {"program": calculator, "version": f"ase {metadata.version('ase')}"}


def progress(*, quiet: bool, prefix: str = "") -> Callable[[str, int, int], None]:
    """Frames done, on stderr: drawn again on a terminal, a line every ten seconds elsewhere; with what is left."""
    begun, said = time.monotonic(), time.monotonic()
    first: int | None = None

    def tick(label: str, done: int, total: int) -> None:
        nonlocal said, first
        first = done if first is None else first
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if quiet or (not terminal and now - said < 10 and done < total):
            return
        said = now
        left = (now - begun) / max(done - first, 1) * (total - done)
        text = f"{prefix}{label}: {done} of {total}" + (f", {left:.0f} s left" if first < done < total else "")
        ends = "\n" if done >= total or not terminal else ""
        print(f"\r\033[K{text}" if terminal else text, end=ends, file=sys.stderr, flush=True)

    return tick
