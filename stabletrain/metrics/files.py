"""Files that are whole or absent, whoever else writes them; and batches of arrays kept in such files."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray]

UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged file may raise."""

log = logging.getLogger("stabletrain")


def write_whole(path: Path, content: bytes) -> None:
    """The whole file or none of it, also when two processes write the same one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_npz(path: Path) -> dict[str, NDArray]:
    """All arrays of an `.npz`, read whole, without pickle. Raises: one of `UNREADABLE` when it is not one."""
    stream = io.BytesIO(path.read_bytes())
    if not zipfile.is_zipfile(stream):
        raise ValueError("it is not a complete .npz file")
    with np.load(stream, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


class BatchFolder:
    """Numbered batches of named arrays in a folder. A batch that is there is read, another one computed and kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def batch(self, index: int, compute: Callable[[], Arrays]) -> dict[str, NDArray]:
        """Batch `index`; the same bytes whether it was computed now or before. A damaged file is said and replaced."""
        path = self.folder / f"{index:06d}.npz"
        kept = self._read(path)
        if kept is not None:
            return kept
        arrays = {name: np.asarray(array) for name, array in compute().items()}
        stream = io.BytesIO()
        np.savez(stream, digest=np.array(_digest(arrays)), **arrays)  # type: ignore[arg-type]
        write_whole(path, stream.getvalue())
        return arrays

    def _read(self, path: Path) -> dict[str, NDArray] | None:
        if not path.exists():
            return None
        try:
            arrays = read_npz(path)
            if str(arrays.pop("digest")) != _digest(arrays):
                raise ValueError("the arrays are not those that the hash was made of")
            return arrays
        except UNREADABLE as error:
            log.warning("%s is damaged (%s): computing it again", path, error)
            return None


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}{array.dtype.str}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
