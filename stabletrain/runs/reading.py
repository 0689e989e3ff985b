"""Runs as data: what a run directory says, read from its public files only.

Reading never writes, so a run can be looked at while it goes on, from another machine, or after its code changed.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabletrain.errors import RunDirectoryError, nearest

INTERVENTIONS = ("skip", "clip", "rollback")
"""Kinds of events that changed the course of a run. A run with any of them is marked in every table."""


@dataclass(frozen=True)
class RunData:
    """One run: its resolved config, record, status, logged rows and events, as they stand in the files."""

    path: Path
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    status: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]
    events: tuple[Mapping[str, Any], ...]

    @property
    def name(self) -> str:
        """The run directory's own name."""
        return self.path.name

    @property
    def family(self) -> str:
        """The family whose config this is."""
        return str(self.config.get("family", "unknown"))

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.config.get("seed", 0))

    @property
    def state(self) -> str:
        """running, done, failed, preempted or diverged."""
        return str(self.status.get("state", "unknown"))

    @property
    def diverged(self) -> bool:
        """True when the run ended because training broke: it has no score, and is counted."""
        return self.state == "diverged"

    @cached_property
    def interventions(self) -> dict[str, int]:
        """How often a policy changed the course of the run, by kind; empty for a clean run."""
        counts = {kind: sum(event.get("kind") == kind for event in self.events) for kind in INTERVENTIONS}
        return {kind: count for kind, count in counts.items() if count}

    def metric_names(self) -> list[str]:
        """Every metric with at least one value, sorted."""
        return sorted({key for row in self.rows for key, value in row.items() if "/" in key and _is_number(value)})

    def curve(self, metric: str) -> tuple[NDArray, NDArray]:
        """(steps [n], values [n]) of the rows that hold the metric; null (non-finite) becomes NaN."""
        pairs = [(row["step"], row[metric]) for row in self.rows if metric in row]
        values = [float("nan") if value is None else float(value) for _, value in pairs]
        return np.asarray([step for step, _ in pairs], dtype=np.int64), np.asarray(values, dtype=np.float64)

    def last(self, metric: str) -> float:
        """The last logged value; NaN if there is none, or when the run diverged."""
        _, values = self.curve(metric)
        return float(values[-1]) if values.size and not self.diverged else float("nan")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_run(path: Path) -> bool:
    """True for a folder that holds a run's resolved config."""
    return (path / "config.toml").is_file() and not (path / "study.json").is_file()


def read_run(path: Path) -> RunData:
    """The run in this folder. A torn last line, as a killed run leaves it, is passed over.

    Raises: `RunDirectoryError` when the folder is no run or a file in it is damaged.
    """
    if not is_run(path):
        siblings = [child.name for child in path.parent.iterdir() if is_run(child)] if path.parent.is_dir() else []
        hint = f": {nearest(path.name, siblings)}" if siblings else " (a run has a config.toml)"
        raise RunDirectoryError(f"{path} is not a run directory{hint}")
    try:
        config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{path / 'config.toml'} is damaged: {error}") from error
    return RunData(
        path=path,
        config=config,
        record=_read_json(path / "record.json"),
        status=_read_json(path / "status.json"),
        rows=tuple(_read_lines(path / "metrics.jsonl")),
        events=tuple(_read_lines(path / "events.jsonl")),
    )


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run directories named by `paths`: runs themselves, or every run up to three folders below a study.

    Raises: `RunDirectoryError` for a path with no run in it.
    """
    found: list[Path] = []
    for path in paths:
        if is_run(path):
            found.append(path)
            continue
        below = _in_order_of_study(path) + [
            child.parent
            for depth in ("*", "*/*", "*/*/*")
            for child in sorted(path.glob(f"{depth}/config.toml"))
            if is_run(child.parent)
        ]
        if not below:
            read_run(path)  # says what is wrong with it
        found.extend(below)
    return list(dict.fromkeys(found))


def _in_order_of_study(path: Path) -> list[Path]:
    """The runs that study.json lists, in its order: baselines stand first there. Empty where there is none."""
    jobs = _read_json(path / "study.json").get("jobs", [])
    return [folder for job in jobs if is_run(folder := path / job["run_dir"])]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{path} is damaged: {error}") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    parsed = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # no line end: the writer was killed in the middle of this line
                break
            raise RunDirectoryError(f"{path}, line {number} is damaged: {error}") from error
    return parsed
