"""What a data set's content hashes to: the same wherever it lies and whenever it was copied."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

SAMPLED = 256
"""Of a set of files, or of one that is not held in memory, this many images are hashed (and looked at) in full."""

WHOLE_ROWS = 4096  # rows hashed at a time, so that a mapped array is never read into memory as a whole


def sample(count: int) -> list[int]:
    """Up to `SAMPLED` indices spread evenly over `count`, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(SAMPLED, count)).round().astype(int)).tolist() if count else []


def of_arrays(arrays: Iterable[tuple[str, NDArray | None]]) -> str:
    """SHA-256 over names, types, shapes and every byte."""
    digest = hashlib.sha256()
    for name, array in arrays:
        if array is None:
            continue
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        for start in range(0, len(array), WHOLE_ROWS):
            digest.update(np.ascontiguousarray(array[start : start + WHOLE_ROWS]).data)
    return digest.hexdigest()


def of_files(names: Sequence[str], sizes: Sequence[int], open_bytes: Callable[[int], bytes], context: str) -> str:
    """SHA-256 over relative names, sizes and the content of up to 256 files spread over the sorted list.

    Reading every byte of a large folder would take longer than the start of a run; a changed, added or removed file
    changes a name or a size almost always. `open_bytes`: content by index; `context`: crop, size and labels, which
    decide what is trained on.
    """
    digest = hashlib.sha256(context.encode())
    order = sorted(range(len(names)), key=names.__getitem__)
    for index in order:
        digest.update(f"{names[index]}:{sizes[index]};".encode())
    for place in sample(len(order)):
        digest.update(open_bytes(order[place]))
    return digest.hexdigest()
