"""`stabletrain tensorboard`: a run's metrics, events and pictures as TensorBoard event files."""

from __future__ import annotations

import importlib.util
import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stabletrain.cli.stored import RUN, find_run
from stabletrain.errors import EXIT_OK, StableTrainError

if TYPE_CHECKING:
    from stabletrain.runs.reading import RunData


def tensorboard(
    run: Annotated[str, RUN],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder for the event files. [default: RUN/tb]")
    ] = None,
) -> int:
    """Write a run's curves, events and sample grids for TensorBoard (extra `tensorboard`). Repeating replaces them."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise StableTrainError("writing for TensorBoard needs tensorboardX: pip install 'stabletrain[tensorboard]'")
    from stabletrain.runs.reading import read_run

    data = read_run(find_run(run))
    folder = out or data.path / "tb"
    for stale in folder.glob("events.out.tfevents.*"):
        stale.unlink()
    rows, pictures = write_events(data, folder)
    print(f"{folder}  ({rows} rows, {pictures} pictures); look at it with: tensorboard --logdir {folder}")
    return EXIT_OK


def write_events(data: RunData, folder: Path) -> tuple[int, int]:
    """One scalar per metric and row, at the row's own time; a text per event; the sample grids. Returns the counts."""
    import numpy as np
    from PIL import Image
    from tensorboardX import SummaryWriter

    pictures = 0
    with SummaryWriter(str(folder)) as writer:
        for row in data.rows:
            for name, value in row.items():
                if "/" in name and value is not None:
                    writer.add_scalar(name, value, row["step"], walltime=_seconds(row))
        for event in data.events:
            details = ", ".join(
                f"{key}: {value}" for key, value in event.items() if key not in ("step", "time", "kind")
            )
            writer.add_text(
                f"events/{event['kind']}", details or event["kind"], event["step"], walltime=_seconds(event)
            )
        for path in sorted((data.path / "samples").glob("*.png")):
            step = int(re.sub(r"\D", "", path.stem) or 0)
            writer.add_image("samples", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
            pictures += 1
    return len(data.rows), pictures


def _seconds(entry: Any) -> float:
    return datetime.fromisoformat(entry["time"]).timestamp()
