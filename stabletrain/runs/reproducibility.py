"""REPRODUCIBILITY.md: for every table of every paper, at which scale it was run, and with which deviations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stabletrain.runs.experiments import SCALES, TableSpec, find_tables, read_table
from stabletrain.runs.reading import RunData

TITLE = "# Reproducibility"
PREFACE = """What was run, at which scale, what came out, and what differs from the papers. This page is written by
`stabletrain table --reproducibility REPRODUCIBILITY.md` from the results kept in `results/`; nothing in it is typed by
hand. "Small" is sized for two CPU cores and shows whether an effect is there, not the paper's numbers. A dagger marks
runs that diverged or were rescued. Negative results stand here like any other.
"""


def environment_of(runs: Sequence[RunData]) -> dict[str, Any]:
    """What the runs of a table were made with: versions, devices, dates, wall time. No paths."""
    if not runs:
        return {}
    records = [run.record for run in runs]
    ended = sorted(str(record.get("ended") or record.get("started", "")) for record in records)
    return {
        "runs": len(runs),
        "first": ended[0][:10],
        "last": ended[-1][:10],
        "wall_seconds": round(sum(float(record.get("wall_seconds", 0.0)) for record in records), 1),
        "devices": sorted({str((record.get("devices") or {}).get("kind", "unknown")) for record in records}),
        "versions": records[-1].get("versions", {}),
    }


def write_summary(path: Path, experiments: Path, results: Path) -> None:
    """Writes the page. The same results give the same page."""
    path.write_text(summary(experiments, results), encoding="utf-8")


def summary(experiments: Path, results: Path) -> str:
    """The page as Markdown: an overview, then every table that has results."""
    specs = [read_table(experiments, name) for name in find_tables(experiments)]
    found = {(spec.name, scale): _result(results, spec, scale) for spec in specs for scale in SCALES}
    lines = [TITLE, "", PREFACE, "| table | what | small scale | full scale |", "|---|---|---|---|"]
    for spec in specs:
        states = [_state(spec, scale, found[spec.name, scale]) for scale in SCALES]
        lines.append(f"| [{spec.name}](#{_anchor(spec.name)}) | {spec.title} | {states[0]} | {states[1]} |")
    for spec in specs:
        lines += ["", f"## {spec.name}", "", f"{spec.title}. Source: {spec.source}.", ""]
        for scale in SCALES:
            document = found[spec.name, scale]
            if document:
                lines += [_made_with(scale, document), "", _markdown(results, spec, scale).strip(), ""]
        defined = [scale for scale in SCALES if any(scale in row.scales for row in spec.rows)]
        if not any(found[spec.name, scale] for scale in SCALES):
            lines += ["Not run. " + _how(spec, defined[0]), ""]
            lines += [f"- {item}" for item in spec.deviations]
        elif "paper" in defined and not found[spec.name, "paper"]:
            lines.append(f"Full scale: not run. {_how(spec, 'paper')}")
    return "\n".join(lines).rstrip() + "\n"


def _result(results: Path, spec: TableSpec, scale: str) -> dict[str, Any]:
    path = results / scale / f"{spec.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _markdown(results: Path, spec: TableSpec, scale: str) -> str:
    return (results / scale / f"{spec.name}.md").read_text(encoding="utf-8")


def _state(spec: TableSpec, scale: str, document: dict[str, Any]) -> str:
    if not any(scale in row.scales for row in spec.rows):
        return "not defined"
    if not document or not any(cell["n"] or cell["diverged"] for cell in document["cells"]):
        return "not run"
    asked = max(cell["asked"] for cell in document["cells"])
    return f"{'run' if document['complete'] else 'incomplete'}, {asked} seeds"


def _made_with(scale: str, document: dict[str, Any]) -> str:
    environment = document.get("environment", {})
    if not environment:
        return f"### {scale}"
    versions = environment["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("stabletrain", "jax", "flax") if versions.get(name))
    dates = (
        environment["first"]
        if environment["first"] == environment["last"]
        else f"{environment['first']} to {environment['last']}"
    )
    hours = environment["wall_seconds"] / 3600
    devices = ", ".join(environment["devices"])
    return f"**{scale}**: {environment['runs']} runs, {dates}, {hours:.2f} hours of runs on {devices}; {named}."


def _how(spec: TableSpec, scale: str) -> str:
    return f"`make table-{spec.name.replace('/', '-', 1)} SCALE={scale}` does it."


def _anchor(name: str) -> str:
    return name.replace("/", "")
