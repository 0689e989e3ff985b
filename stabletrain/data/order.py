"""The order of training examples: a pure function of (seed, position), so that resuming needs no iterator state."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=16)
def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.int32]:
    """The order of one epoch: the ranks of `count` random 64-bit numbers.

    Philox is counter-based, and NumPy keeps the stream of a bit generator the same on every machine and in every
    version; of what `Generator.permutation` makes of it it does not say so (NEP 19).
    """
    numbers = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)
    order = np.argsort(numbers, kind="stable").astype(np.int32)
    order.flags.writeable = False
    return order


def batch_indices(seed: int, position: int, count: int, batch_size: int) -> NDArray[np.int32]:
    """Indices [B] of the batch at `position` (0, 1, 2, ...) of an endless sequence of shuffled epochs.

    Example number `position * B + b` stands at that place of the concatenated epochs: every index appears exactly
    once in each epoch, and a batch may hold the end of one epoch and the beginning of the next.

    Raises: `ValueError` for an empty data set, an empty batch, a negative position or seed.
    """
    if count < 1 or batch_size < 1 or position < 0 or seed < 0:
        raise ValueError(f"no batch {position} of {batch_size} among {count} examples with seed {seed}")
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
