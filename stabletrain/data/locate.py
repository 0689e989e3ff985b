"""Where a named data set lies on this machine, and what to put where when it does not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stabletrain.data import tfds
from stabletrain.data.catalogue import CATALOGUE, DatasetInfo
from stabletrain.errors import ConfigError, nearest
from stabletrain.paths import cache_home

ARCHIVES = (".zip", ".tar.gz")


@dataclass(frozen=True)
class Place:
    """Where a data set was found. `kind`: bundled (with scikit-learn), files (the official ones), tfds (prepared)."""

    kind: str
    path: Path | None


def named(name: str) -> DatasetInfo:
    """The catalogue's entry. Raises: `ConfigError` naming the nearest known name."""
    if name not in CATALOGUE:
        raise ConfigError(
            f"unknown data set {name!r}: {nearest(name, CATALOGUE)} (your own data go by --data, under any name)"
        )
    return CATALOGUE[name]


def official_folder(info: DatasetInfo) -> Path:
    """Where the official files of a named set are looked for. Not created here."""
    return cache_home() / "data" / info.name


def locate(info: DatasetInfo) -> Place | None:
    """The first of: bundled; files below `official_folder`; a prepared TFDS directory."""
    if info.bundled:
        return Place("bundled", None)
    folder = official_folder(info)
    archive = folder / info.files[0].name
    if archive.name.endswith(ARCHIVES) and archive.exists():
        return Place("files", archive)
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        return Place("files", folder)
    prepared = tfds.prepared(info)
    return Place("tfds", prepared) if prepared is not None else None


def what_to_put(info: DatasetInfo) -> str:
    """One sentence: which files, from where, go where; or else."""
    where = f"put {info.wanted()} into {official_folder(info)}, or name them with --data"
    if info.tfds_name is None:
        return where
    return f"{where}; or prepare it with TFDS: pip install 'stabletrain[tfds]', stabletrain data prepare {info.name}"
