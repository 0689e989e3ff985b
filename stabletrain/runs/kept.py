"""The seeds of a table that another machine ran, read back from the table's JSON, to stand beside the runs here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stabletrain.errors import ConfigError, DataError
from stabletrain.runs.experiments import TableSpec

COUNTS = ("diverged", "rescued", "never")


@dataclass(frozen=True)
class KeptTable:
    """What a finished table's JSON says of its runs. Cells are named by (row, column's label)."""

    values: Mapping[tuple[str, str], Mapping[int, float]]
    """Each seed's number; NaN for a run that ended without one."""
    counts: Mapping[tuple[str, str], Mapping[str, int]]
    """How many of `COUNTS`."""
    environment: Mapping[str, Any]

    @property
    def runs(self) -> frozenset[tuple[str, int]]:
        """(row, seed) of every run."""
        return frozenset((row, seed) for (row, _), values in self.values.items() for seed in values)


def read_kept(path: Path, spec: TableSpec, scale: str) -> KeptTable:
    """Reads `<table>.json` as `stabletrain table` writes it.

    Raises: `DataError` when it cannot be read, is of another table or scale or has not all its runs, or its rows and
    columns are not those of the table here.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = (document["table"], document["scale"])
        if found != (spec.name, scale):
            raise DataError(f"{path} is the table {found[0]} at {found[1]} scale, not {spec.name} at {scale} scale")
        if not document["complete"]:
            raise DataError(f"{path} is not complete: its missing runs cannot be told from those that diverged")
        cells = {(cell["row"], cell["column"]): cell for cell in document["cells"]}
        if not all("values" in cell for cell in cells.values()):
            raise DataError(f"{path} is of an older version, without the number of each seed: make the table again")
        values = {
            key: {int(seed): float("nan") if value is None else float(value) for seed, value in cell["values"].items()}
            for key, cell in cells.items()
        }
        counts = {key: {name: int(cell[name]) for name in COUNTS} for key, cell in cells.items()}
        environment = dict(document["environment"])
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no table written by `stabletrain table`: {error}") from error
    due = {(row.key, column.label) for row in spec.rows if scale in row.scales for column in spec.columns[scale]}
    if set(cells) != due:
        differing = sorted(set(cells) ^ due)[0]
        raise DataError(f"{path} and the table here differ in their rows or columns: {' / '.join(differing)}")
    return KeptTable(values, counts, environment)


def check_disjoint(tables: Sequence[KeptTable], here: frozenset[tuple[str, int]]) -> None:
    """Raises: `ConfigError` when a run is in two of the tables, or in one of them and among those that are here."""
    seen = set(here)
    for table in tables:
        if twice := sorted(table.runs & seen):
            row, seed = twice[0]
            raise ConfigError(f"seed {seed} of {row} is there twice: give tables and runs that have no seed in common")
        seen |= table.runs


def joined_environment(environments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One summary of several, as `environment_of` gives them; versions are those of the latest runs."""
    filled = sorted((each for each in environments if each), key=lambda each: str(each["last"]))
    if not filled:
        return {}
    return {
        "runs": sum(each["runs"] for each in filled),
        "first": min(each["first"] for each in filled),
        "last": filled[-1]["last"],
        "wall_seconds": round(sum(each["wall_seconds"] for each in filled), 1),
        "devices": sorted({device for each in filled for device in each["devices"]}),
        "versions": filled[-1]["versions"],
    }
