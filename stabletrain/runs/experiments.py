"""The papers' tables as files: `experiments/<paper>/<table>/` holds `table.toml` and one file per row.

A row is at once a preset for the command line (its top-level keys are the family's options; `[small]` and `[paper]`
overlay them) and a description (`[row]`): label, group, the paper's number with where it was read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stabletrain.errors import ConfigError, nearest
from stabletrain.training.config import read_toml

SCALES = ("small", "paper")
SEEDS = 5
"""Runs of every row, where the table does not say another number."""
DESCRIPTION = "table.toml"


@dataclass(frozen=True)
class PaperValue:
    """A number as printed in the paper, and where it was read. Unverified numbers have no place here."""

    value: float
    read: str


@dataclass(frozen=True)
class Column:
    """One score of a table: a metric's curve reduced to one number per run."""

    metric: str
    label: str
    reduce: str = "last"
    start: float = 0.0
    mode: str = "min"
    digits: int | None = None
    paper: str = ""
    """Key of the rows' `[row.values]` entry that holds the paper's number for this column."""


@dataclass(frozen=True)
class Curve:
    """One figure of a table: a metric over steps, a line with a band per row, a panel per group."""

    metric: str
    label: str
    log: bool = False


@dataclass(frozen=True)
class Row:
    """One row: how to run it, what it is called, what the paper says."""

    key: str
    path: Path
    label: str
    group: str
    baseline: str | None
    after: str | None
    """The row whose run of the same seed this one starts from."""
    without: tuple[str, ...]
    """Metrics that its runs cannot have: their cells are empty, and count as complete."""
    order: int
    command: tuple[str, ...]
    values: Mapping[str, PaperValue] = field(default_factory=dict)
    cost_minutes: Mapping[str, float] = field(default_factory=dict)
    scales: tuple[str, ...] = ()

    def arguments(self, scale: str, seed: int) -> tuple[str, ...]:
        """The command line of one run, after `stabletrain`."""
        return (*self.command, "--config", str(self.path), "--scale", scale, "--seed", str(seed))


@dataclass(frozen=True)
class TableSpec:
    """One table of a paper: its rows, its scores per scale, its figures, and what differs from the paper."""

    name: str
    title: str
    source: str
    caption: Mapping[str, str]
    columns: Mapping[str, tuple[Column, ...]]
    figures: tuple[Curve, ...]
    rows: tuple[Row, ...]
    deviations: tuple[str, ...]
    seeds: Mapping[str, int] = field(default_factory=dict)
    """Runs of every row at a scale, where nothing else is asked for; `SEEDS` for a scale that is not named."""

    def default_seeds(self, scale: str) -> range:
        """The seeds of every row at a scale, where nothing else is asked for."""
        return range(self.seeds.get(scale, SEEDS))

    @property
    def paper(self) -> str:
        """The folder of the paper."""
        return self.name.split("/")[0]


def find_tables(root: Path) -> list[str]:
    """The names `<paper>/<table>` of every table below `root`, sorted."""
    return sorted(str(path.parent.relative_to(root)) for path in root.glob(f"*/*/{DESCRIPTION}"))


def read_table(root: Path, name: str) -> TableSpec:
    """The table `<paper>/<table>` below `root`.

    Raises: `ConfigError` for an unknown name, an unknown key, a row without the keys it needs, a baseline that is no
    row; each names the file.
    """
    folder = root / name
    if not (folder / DESCRIPTION).is_file():
        tables = find_tables(root)
        hint = nearest(name, tables) if tables else f"there is no {root}/<paper>/<table>/{DESCRIPTION}"
        raise ConfigError(f"unknown table {name!r}: {hint}")
    path = folder / DESCRIPTION
    values = read_toml(path)
    _refuse_unknown(path, values, ("title", "source", "caption", "columns", "figures", "deviations", "seeds"))
    rows = sorted(
        (_read_row(file) for file in sorted(folder.glob("*.toml")) if file.name != DESCRIPTION),
        key=lambda row: (row.order, row.key),
    )
    keys = [row.key for row in rows]
    for row in rows:
        for relation, other in (("baseline", row.baseline), ("after", row.after)):
            if other is not None and other not in keys:
                raise ConfigError(f"{row.path}: unknown {relation} {other!r}: {nearest(other, keys)}")
    try:
        spec = TableSpec(
            name=name,
            title=values["title"],
            source=values["source"],
            caption=values.get("caption", {}),
            columns={scale: _columns(path, values["columns"], scale) for scale in SCALES},
            figures=tuple(Curve(**entry) for entry in values.get("figures", [])),
            rows=tuple(rows),
            deviations=tuple(values.get("deviations", [])),
            seeds=_seeds(path, values.get("seeds", {})),
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not rows:
        raise ConfigError(f"{folder} has no rows: add one .toml file per row")
    return spec


def _seeds(path: Path, values: Any) -> dict[str, int]:
    if not isinstance(values, dict) or not all(isinstance(count, int) and count > 0 for count in values.values()):
        raise ConfigError(f"{path}: [seeds] holds the number of runs of every row at a scale, as in small = {SEEDS}")
    _refuse_unknown(path, values, SCALES)
    return values


def _columns(path: Path, entries: Mapping[str, Any] | list[Any], scale: str) -> tuple[Column, ...]:
    from stabletrain.runs.statistics import REDUCTIONS  # loads NumPy and SciPy, which naming a table does not need

    chosen = entries if isinstance(entries, list) else entries.get(scale, [])
    columns = tuple(Column(**entry) for entry in chosen)
    labels = [column.label for column in columns]
    for column in columns:
        if labels.count(column.label) > 1:
            raise ConfigError(f"{path}: two columns are called {column.label!r}: a label names its column")
        if column.reduce not in REDUCTIONS and not re.fullmatch(r"steps-to:[-+.\deE]+", column.reduce):
            raise ConfigError(f"{path}: unknown reduction {column.reduce!r}: {nearest(column.reduce, REDUCTIONS)}")
    return columns


_ROW_KEYS = ("label", "group", "baseline", "after", "without", "order", "command", "values", "cost_minutes")


def _read_row(path: Path) -> Row:
    values = read_toml(path)
    if "family" not in values or not isinstance(values.get("row"), dict):
        raise ConfigError(f"{path}: a row needs `family` and a table [row] with a label")
    row = dict(values["row"])
    _refuse_unknown(path, row, _ROW_KEYS)
    try:
        return Row(
            key=path.stem,
            path=path,
            label=row["label"],
            group=row.get("group", ""),
            baseline=row.get("baseline"),
            after=row.get("after"),
            without=tuple(row.get("without", ())),
            order=row.get("order", 0),
            command=tuple(row.get("command", [values["family"]])),
            values={key: PaperValue(**entry) for key, entry in row.get("values", {}).items()},
            cost_minutes=row.get("cost_minutes", {}),
            scales=tuple(scale for scale in SCALES if scale in values),
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: [row]: {error}") from error


def _refuse_unknown(path: Path, values: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}: {nearest(key, known)}")
