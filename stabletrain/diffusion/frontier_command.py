"""`stabletrain diffusion frontier`: the largest learning rate that trains. Imports no JAX until it runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from stabletrain.errors import EXIT_OK
from stabletrain.training.config import option
from stabletrain.training.presets import settings_from

SCALINGS = ("none", "sqrt2", "cs", "ls")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class FrontierOptions:
    """Settings; the defaults are those of the small scale, for one CPU core."""

    scalings: tuple[str, ...] = option(SCALINGS, "Skip scalings.", choices=SCALINGS)
    depths: tuple[int, ...] = option((12, 16, 24), "Numbers of skips.", minimum=1)
    rates: tuple[float, ...] = option(
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "Peak learning rates.", minimum=1e-9, maximum=10.0
    )
    kappa: float = option(0.7, "Base of cs.", minimum=0.0, maximum=1.0)
    width: int = option(64, "Width of the network.", minimum=1)
    batch: int = option(64, "Images in a step.", minimum=1)
    steps: int = option(400, "Steps of each run.", minimum=4)
    warmup: int = option(40, "Steps of warm-up.", minimum=0)
    weight_decay: float = option(0.03, "AdamW's.", minimum=0.0)
    seeds: int = option(5, "Seeds of each setting.", minimum=1)
    precision: str = option("float32", "Of products and features.", choices=PRECISIONS)
    threshold: float = option(0.9, "A final loss below this counts as trained; knowing nothing has 1.", minimum=0.0)


def frontier(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the figure (PNG, SVG), table and numbers.")
    ] = Path("results/frontier"),
    preset: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE.toml", help="Settings, with [small] and [paper].")
    ] = None,
    scale: Annotated[
        str, typer.Option("--scale", metavar="small|paper", help="Which settings of the --config file to take.")
    ] = "small",
    depths: Annotated[list[int] | None, typer.Option(help="Numbers of skips. [default: 12 16 24]")] = None,
    rates: Annotated[list[float] | None, typer.Option(help="Peak learning rates.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of each run.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds of each setting.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [default: float32]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> int:
    """Find the largest learning rate that trains, by skip scaling and depth. Finished parts are kept."""
    given = {
        "depths": depths or None, "rates": rates or None, "steps": steps, "seeds": seeds, "precision": precision
    }  # fmt: skip
    options = settings_from(FrontierOptions, preset, scale, given)
    from stabletrain.training.devices import configure_backend
    from stabletrain.training.run_directory import readable_errors

    parts = out / "parts"
    with readable_errors(out):
        parts.mkdir(parents=True, exist_ok=True)
    configure_backend(1, 1)
    import io

    import numpy as np

    from stabletrain.diffusion.frontier import frontier_figure, frontier_table

    cells = []
    for depth in options.depths:
        for scaling in options.scalings:
            if not quiet:
                print(f"{scaling}, {depth} skips", file=sys.stderr, flush=True)
            cells.append(_kept_cell(parts, scaling, depth, options))
    figure = frontier_figure(cells, options.threshold)
    files: dict[str, bytes] = {}
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, dpi=150, metadata=metadata)
        files[f"frontier.{kind}"] = stream.getvalue()
    metrics = {
        f"largest_rate/n{cell.depth}/{cell.scaling}": float(np.median(cell.largest_rate(options.threshold)))
        for cell in cells
    }
    document = {
        "scale": scale,
        "settings": dataclasses.asdict(options),
        "metrics": metrics,
        "cells": [cell.numbers(options.threshold) for cell in cells],
    }
    files["frontier.json"] = (json.dumps(document, indent=2) + "\n").encode()
    files["frontier.md"] = frontier_table(cells, options.threshold).encode()
    with readable_errors(out):
        for file, content in files.items():
            (out / file).write_bytes(content)
    if as_json:
        head = {"run_dir": str(out), "status": "done", "step": options.steps, "metrics": metrics}
        print(json.dumps({**head, "files": sorted(files)}, indent=2))
    else:
        print(files["frontier.md"].decode())
        print("\n".join(str(out / file) for file in sorted(files)))
    return EXIT_OK


def _kept_cell(parts: Path, scaling: str, depth: int, options: FrontierOptions) -> Any:
    """Rates that an earlier call with the same settings trained are read, the others trained and kept."""
    import numpy as np

    from stabletrain.diffusion.frontier import Cell, joined, train_cell
    from stabletrain.training.run_directory import readable_errors

    settings = {
        name: value
        for name, value in dataclasses.asdict(options).items()
        if name not in ("scalings", "depths", "threshold", "rates")
    }
    asked = json.dumps(settings)
    path = parts / f"{scaling}-{depth}.npz"
    cells = []
    if path.is_file():
        with np.load(path) as kept:
            if str(kept["settings"]) == asked:
                rates = tuple(kept["rates"].tolist())
                cells.append(Cell(scaling, depth, rates, kept["final"], kept["oscillation"], kept["overflow"]))
    missing = [rate for rate in options.rates if not any(rate in cell.rates for cell in cells)]
    if missing:
        cells.append(train_cell(scaling, depth, missing, **settings))
        whole = joined(cells)
        unfinished = path.with_name(f".{path.name}")
        with readable_errors(parts):
            with unfinished.open("wb") as stream:
                np.savez(
                    stream,
                    settings=np.asarray(asked),
                    rates=np.asarray(whole.rates),
                    final=whole.final,
                    oscillation=whole.oscillation,
                    overflow=whole.overflow,
                )
            unfinished.replace(path)
    return joined(cells).at(options.rates)
