"""Trees of files read the same way: a folder, or the inside of a zip."""

from __future__ import annotations

import os
import weakref
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Protocol

from stabletrain.errors import DataError


class Store(Protocol):
    """A tree of files: a folder, or the inside of a zip."""

    @property
    def place(self) -> Path:
        """The folder or the archive."""

    @property
    def sizes(self) -> dict[str, int]:
        """Relative name (with forward slashes) -> size in bytes, of every file, in the order of the names."""

    def open_bytes(self, name: str) -> bytes:
        """The content of a file. Raises: `DataError` when it cannot be read."""


@dataclass(frozen=True)
class FolderStore:
    """A folder on disk; `recursive=False` sees the files directly in it only. Links are followed, each folder once."""

    place: Path
    recursive: bool = True

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Every file in the folder, hidden ones left out."""
        sizes: dict[str, int] = {}
        seen: set[tuple[int, int]] = set()
        waiting = [(self.place, "")]
        while waiting:
            folder, prefix = waiting.pop()
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:  # a link back to a folder that was read
                continue
            seen.add((status.st_dev, status.st_ino))
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if _hidden(entry.name):
                            continue
                        if entry.is_file():
                            sizes[prefix + entry.name] = entry.stat().st_size
                        elif entry.is_dir() and self.recursive:
                            waiting.append((Path(entry.path), f"{prefix}{entry.name}/"))
            except OSError as error:
                raise DataError(f"cannot list {folder}: {error.strerror}") from error
        return dict(sorted(sizes.items()))

    def open_bytes(self, name: str) -> bytes:
        """Reads the file."""
        try:
            return (self.place / name).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {self.place / name}: {error.strerror}") from error


class ZipStore:
    """A zip archive, read in place. Reading is serialised: a zip file has one position."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._lock = Lock()
        try:
            self._archive = zipfile.ZipFile(place)
            weakref.finalize(self, self._archive.close)  # also when it goes in a cycle, where its file may go first
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{place} is not a readable zip archive: {error}") from error

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Every file in the archive; a single enclosing folder is part of the names."""
        entries = {entry.filename: entry.file_size for entry in self._archive.infolist() if not entry.is_dir()}
        return {name: size for name, size in sorted(entries.items()) if not _hidden(name)}

    def open_bytes(self, name: str) -> bytes:
        """Reads and checks (CRC) the file."""
        try:
            with self._lock:
                return self._archive.read(name)
        except (KeyError, RuntimeError, zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
            raise DataError(f"cannot read {name} in {self.place}: {error}") from error


def base_name(name: str) -> str:
    """The part of a name behind its last slash."""
    return name.rsplit("/", 1)[-1]


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) and part != "." for part in name.split("/"))


def open_store(path: Path) -> Store:
    """The folder or zip at `path`."""
    return FolderStore(path) if path.is_dir() else ZipStore(path)
