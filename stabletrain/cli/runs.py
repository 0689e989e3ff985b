"""`stabletrain runs` and `stabletrain show`: what runs there are, and what became of one."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stabletrain.cli.families import FAMILIES
from stabletrain.cli.progress import evaluations, event_text, main_loss
from stabletrain.cli.sparkline import sparkline
from stabletrain.cli.stored import RUN, find_run
from stabletrain.cli.text import draws_unicode, duration, number, pairs, print_json, size, table
from stabletrain.cli.train import RUNS, newest_samples, shown_path
from stabletrain.errors import EXIT_OK, RunDirectoryError, StableTrainError

if TYPE_CHECKING:
    from stabletrain.runs.reading import RunData

SILENT_SECONDS = 600.0
"""A run that says it is running and has not written a heartbeat for so long is dead: its process cannot say so.
Training writes one every few seconds; compiling a large program is the longest silence."""
TAIL_BYTES = 1 << 16
SHOWN_EVENTS = 10


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """One line of `stabletrain runs`, from the small files and the end of the rows."""

    run_dir: Path
    family: str
    status: str
    step: int
    total_steps: int
    loss_name: str | None
    loss: float | None
    evaluation_name: str | None
    evaluation: float | None
    age_seconds: float | None
    """Since the last sign of life."""
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)


def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Folder with runs below it.", show_default=False)
    ] = RUNS,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """List the runs below a folder (./runs), the newest first. A run whose process is gone is called dead."""
    from stabletrain.runs.reading import find_runs

    if not folder.exists() and folder != RUNS:
        raise RunDirectoryError(f"there is no folder {folder}")
    paths = find_runs([folder]) if folder.is_dir() and _has_runs(folder) else []
    summaries = sorted(map(summarize, paths), key=lambda run: (run.age_seconds is None, run.age_seconds or 0.0))
    if as_json:
        print_json({"folder": folder, "runs": [summary.to_dict() for summary in summaries]})
    elif not summaries:
        print(f"no runs in {folder}; start one: stabletrain {next(iter(FAMILIES))}")
    else:
        print(table(("run", "status", "step", "loss", "evaluation", "age"), [_line(run, folder) for run in summaries]))
    return EXIT_OK


def _has_runs(folder: Path) -> bool:
    return any(next(folder.glob(f"{depth}config.toml"), None) for depth in ("", "*/", "*/*/", "*/*/*/"))


def summarize(path: Path) -> Summary:
    """What there is to say of a run without reading all of it. A damaged run has the status "damaged"."""
    try:
        config, status = _read_toml(path / "config.toml"), _read_status(path / "status.json")
    except (OSError, ValueError, StableTrainError) as error:
        return Summary(path, "unknown", "damaged", 0, 0, None, None, None, None, None, " ".join(str(error).split()))
    last, evaluated = _last_rows(path / "metrics.jsonl")
    loss, found = main_loss(last), evaluations(evaluated)
    best = str(config.get("best_metric", "")).removeprefix("eval/")
    shown = best if best in found else next(iter(found), None)
    return Summary(
        run_dir=path,
        family=str(config.get("family", "unknown")),
        status=state_of(status),
        step=int(status.get("step", 0)),
        total_steps=int(status.get("total_steps", config.get("steps", 0))),
        loss_name=loss,
        loss=None if loss is None else last[loss],
        evaluation_name=shown,
        evaluation=None if shown is None else found[shown],
        age_seconds=_seconds_since(status.get("heartbeat")),
        reason=str(status.get("reason", "")),
    )


def _read_toml(path: Path) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(path.read_text(encoding="utf-8"))


def _read_status(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def state_of(status: Mapping[str, Any]) -> str:
    """The state that status.json says, or "dead" for a run that says it is running and cannot be."""
    state = str(status.get("state", "not started"))
    if state != "running":
        return state
    if status.get("host") == socket.gethostname() and not _process_lives(status.get("pid")):
        return "dead"
    silent = _seconds_since(status.get("heartbeat"))
    return "dead" if silent is None or silent > SILENT_SECONDS else state


def _process_lives(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _seconds_since(moment: Any) -> float | None:
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    except (TypeError, ValueError):
        return None


def _last_rows(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last row of metrics, and the last one with an evaluation; from the end of the file where that is enough."""
    if not path.is_file():
        return {}, {}
    with path.open("rb") as stream:
        start = max(0, path.stat().st_size - TAIL_BYTES)
        last, evaluated = _search(stream, start)
        return (last, evaluated) if evaluated or not start else _search(stream, 0)


def _search(stream: Any, start: int) -> tuple[dict[str, Any], dict[str, Any]]:
    stream.seek(start)
    lines = stream.read().split(b"\n")[1 if start else 0 :]
    last: dict[str, Any] = {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # the torn last line of a killed run; a damaged one elsewhere is told by `show`
            continue
        last = last or row
        if evaluations(row):
            return last, row
    return last, {}


def _line(run: Summary, folder: Path) -> tuple[str, ...]:
    name = str(run.run_dir.relative_to(folder)) if run.run_dir != folder else str(folder)
    evaluation = "" if run.evaluation_name is None else f"{run.evaluation_name} {number(run.evaluation)}"
    loss = "" if run.loss_name is None else number(run.loss)
    age = "" if run.age_seconds is None else duration(run.age_seconds)
    return name, run.status, f"{run.step}/{run.total_steps}", loss, evaluation, age


# --- show -------------------------------------------------------------------------------------------------------------


def show(
    run: Annotated[str, RUN],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Show one run: how it ended, its scores, what disturbed it, its configuration and files."""
    from stabletrain.runs.comparison import stability_counts
    from stabletrain.runs.reading import read_run

    path = find_run(run)
    data = read_run(path)
    newest = {name: value for row in data.rows for name, value in row.items() if "/" in name}
    if as_json:
        print_json(
            {
                "run_dir": path.absolute(),
                "status": state_of(data.status),
                "step": data.status.get("step", 0),
                "metrics": newest,
                "total_steps": data.status.get("total_steps"),
                "reason": data.status.get("reason", ""),
                "config": data.config,
                "record": data.record,
                "events": stability_counts(data),
                "files": _files(path),
            }
        )
        return EXIT_OK
    blocks = [pairs(_facts(path, data)), _metrics_block(data, newest), _events_block(data), _config_block(data)]
    blocks.append("files\n" + _indented(pairs(_files(path))))
    print("\n\n".join(block for block in blocks if block))
    return EXIT_OK


def _facts(path: Path, data: RunData) -> dict[str, str]:
    status, record = data.status, data.record
    ended = f"{state_of(status)} at step {status.get('step', 0):,} of {status.get('total_steps', 0):,}"
    if status.get("reason"):
        ended += f": {status['reason']}"
    seconds = record.get("wall_seconds") or status.get("wall_seconds")
    devices = record.get("devices", {})
    sessions = record.get("sessions", [])
    spec = record.get("data", {})
    facts = {
        "run": str(shown_path(path.absolute())),
        "status": ended,
        "time": f"{duration(seconds)} in {len(sessions)} session{'s' * (len(sessions) != 1)}" if seconds else "",
        "parameters": f"{record['parameter_count']:,}" if "parameter_count" in record else "",
        "data": f"{spec.get('name')} ({spec.get('fingerprint', '')[:12]})" if spec else "",
        "devices": f"{sessions[-1].get('devices', '?')} x {devices.get('kind')}" if sessions and devices else "",
        "peak memory": size(record["peak_memory_bytes"]) if record.get("peak_memory_bytes") else "",
        "command": " ".join(record.get("command", [])),
    }
    return {name: value for name, value in facts.items() if value}


def _metrics_block(data: RunData, newest: Mapping[str, Any]) -> str:
    if not newest:
        return ""
    shown = {name: number(value) for name, value in newest.items() if not name.startswith("stability/")}
    loss = main_loss(newest)
    if loss is not None and draws_unicode(sys.stdout):
        shown[loss] += "  " + sparkline([row[loss] for row in data.rows if loss in row], 40)
    hidden = len(newest) - len(shown)
    more = f"\n  and {hidden} indicators stability/* in metrics.jsonl" if hidden else ""
    return "last metrics\n" + _indented(pairs(shown)) + more


def _events_block(data: RunData) -> str:
    from stabletrain.runs.comparison import stability_counts

    counts = stability_counts(data)
    if not counts:
        return "stability\n  undisturbed"
    summary = ", ".join(f"{count} x {kind}" for kind, count in counts.items())
    told = [event_text(event) for event in data.events if event.get("kind") in counts]
    lines = told[-SHOWN_EVENTS:]
    if len(told) > len(lines):
        lines = [f"(the last {len(lines)} of {len(told)})", *lines]
    return "\n".join(["stability: " + summary, *(f"  {line}" for line in lines)])


def _config_block(data: RunData) -> str:
    defaults = _defaults(data.family)
    values = {name: value for name, value in data.config.items() if name != "family"}
    differing = {name: value for name, value in values.items() if name not in defaults or defaults[name] != value}
    same = {name: value for name, value in values.items() if name not in differing}
    block = "configuration\n" + _indented(pairs({name: json.dumps(value) for name, value in differing.items()}))
    if same:
        block += "\n  as by default\n" + _indented(pairs({name: json.dumps(value) for name, value in same.items()}), 4)
    return block


def _defaults(family: str) -> dict[str, Any]:
    """The defaults of a family's options; empty for a family that this version does not have."""
    if family not in FAMILIES:
        return {}
    fields = dataclasses.fields(FAMILIES[family]().config)
    return {field.name: list(field.default) if isinstance(field.default, tuple) else field.default for field in fields}


def _files(path: Path) -> dict[str, str]:
    """What is in the run directory: files by name, folders with what they hold."""
    found: dict[str, str] = {}
    for child in sorted(path.iterdir()):
        if child.name.startswith("."):
            continue
        if child.is_file():
            found[child.name] = size(child.stat().st_size)
        elif child.name == "samples" and (grid := newest_samples(path)) is not None:
            found["samples/"] = f"{len(list(child.glob('*.png')))} grids, the newest {grid.name}"
        else:
            inside = [entry.name for entry in sorted(child.iterdir()) if not entry.name.startswith(".")]
            found[f"{child.name}/"] = ", ".join(inside[-5:]) if len(inside) <= 5 else f"{len(inside)} entries"
    return found


def _indented(text: str, by: int = 2) -> str:
    return "\n".join(" " * by + line for line in text.splitlines())
