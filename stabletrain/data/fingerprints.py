"""What a data set's content hashes to: the same wherever it lies and whenever it was copied."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


def of_arrays(arrays: Iterable[tuple[str, NDArray | None]]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, array in arrays:
        if array is None:
            continue
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def of_files(names: Sequence[str], sizes: Sequence[int], open_bytes: Callable[[str], bytes], context: str) -> str:
    """SHA-256 over relative names, sizes and the content of up to 256 files spread over the sorted list.

    Reading every byte of a large folder would take longer than the start of a run; a changed, added or removed file
    changes a name or a size almost always. `context`: crop and size, which decide what is trained on.
    """
    digest = hashlib.sha256(context.encode())
    ordered = sorted(zip(names, sizes, strict=True))
    for name, size in ordered:
        digest.update(f"{name}:{size};".encode())
    for index in np.unique(np.linspace(0, len(ordered) - 1, min(256, len(ordered))).astype(int)):
        digest.update(open_bytes(ordered[index][0]))
    return digest.hexdigest()
