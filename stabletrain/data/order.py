"""The order of training examples: a pure function of (seed, position), so that resuming needs no iterator state."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.int32]:
    """The order of one epoch. Philox is a counter-based generator: the same numbers on every machine and version."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    order = generator.permutation(count).astype(np.int32)
    order.flags.writeable = False
    return order


def batch_indices(seed: int, position: int, count: int, batch_size: int) -> NDArray[np.int32]:
    """Indices [B] of the batch at `position` (0, 1, 2, ...) of an endless sequence of shuffled epochs.

    Example number `position * B + b` stands at that place of the concatenated epochs: every index appears exactly
    once in each epoch, and a batch may hold the end of one epoch and the beginning of the next.

    Raises: `ValueError` for an empty data set or a negative position.
    """
    if count < 1 or batch_size < 1 or position < 0:
        raise ValueError(f"no batch at position {position} of {count} examples with batch size {batch_size}")
    first = position * batch_size
    pieces = []
    remaining = batch_size
    while remaining:
        epoch, offset = divmod(first, count)
        piece = _permutation(seed, epoch, count)[offset : offset + remaining]
        pieces.append(piece)
        first += piece.size
        remaining -= piece.size
    return np.concatenate(pieces)
