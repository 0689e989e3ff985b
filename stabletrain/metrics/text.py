"""n-gram Jensen-Shannon divergence of generated text, always with what real text of the same amount would score.

Source: the character language model of Gulrajani et al. 2017; orders above 4 as Heusel et al. 2017. In bits, in
[0, 1], not its root. Few samples give large values whatever wrote them, so that a value alone says little: the floor
beside it is the divergence of as many held-out lines of real text. Counting is host work on integers, in NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ORDERS = (1, 2, 3, 4, 5, 6)
MAX_FLOOR_DRAWS = 10
WINDOWS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class NGrams:
    """Counts of the n-grams of some lines: distinct `keys` in ascending order, and how often each occurs."""

    order: int
    vocabulary: int
    keys: NDArray[Any]
    counts: NDArray[np.int64]

    @property
    def total(self) -> int:
        """Windows counted."""
        return int(self.counts.sum())


def count_ngrams(lines: NDArray[np.integer], order: int, vocabulary: int) -> NGrams:
    """All windows of `order` tokens within each line; none reaches into the next. Padding counts as a symbol.

    Shapes: lines [N, L], tokens 0 .. vocabulary - 1.
    Raises: `ValueError` for tokens outside the vocabulary, or lines shorter than `order`.
    """
    lines = np.asarray(lines)
    if lines.ndim != 2 or not 1 <= order <= lines.shape[1] or not len(lines):
        raise ValueError(f"lines of shape {list(lines.shape)} have no {order}-grams")
    if lines.min() < 0 or lines.max() >= vocabulary:
        raise ValueError(f"tokens from {lines.min()} to {lines.max()} are outside a vocabulary of {vocabulary}")
    per_chunk = max(1, WINDOWS_AT_ONCE // (lines.shape[1] - order + 1))
    keys, counts = _unique(_windows(lines[:per_chunk], order, vocabulary))
    for start in range(per_chunk, len(lines), per_chunk):
        more_keys, more = _unique(_windows(lines[start : start + per_chunk], order, vocabulary))
        keys, counts = _merged(keys, counts, more_keys, more)
    return NGrams(order, vocabulary, keys, counts)


def _windows(lines: NDArray[np.integer], order: int, vocabulary: int) -> NDArray[Any]:
    """One key per window: an integer where order symbols fit into 63 bits, else a pair of integers."""
    windows = np.lib.stride_tricks.sliding_window_view(lines, order, axis=1).reshape(-1, order)
    bits = max(1, (vocabulary - 1).bit_length())
    if bits * order <= 63:
        return _packed(windows, bits)
    half = (order + 1) // 2
    if bits * half > 63:
        raise ValueError(f"{order}-grams over a vocabulary of {vocabulary} are more than can be counted")
    keys = np.empty(len(windows), np.dtype([("first", np.int64), ("second", np.int64)]))
    keys["first"], keys["second"] = _packed(windows[:, :half], bits), _packed(windows[:, half:], bits)
    return keys


def _packed(windows: NDArray[np.integer], bits: int) -> NDArray[np.int64]:
    keys = np.zeros(len(windows), np.int64)
    for column in range(windows.shape[1]):
        keys = (keys << bits) | windows[:, column]
    return keys


def _unique(keys: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    unique, counts = np.unique(keys, return_counts=True)
    return unique, counts.astype(np.int64)


def _merged(
    keys: NDArray[Any], counts: NDArray[np.int64], more_keys: NDArray[Any], more: NDArray[np.int64]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    merged, places = np.unique(np.concatenate([keys, more_keys]), return_inverse=True)
    total = np.zeros(len(merged), np.int64)
    np.add.at(total, places, np.concatenate([counts, more]))
    return merged, total


def jensen_shannon_divergence(first: NGrams, second: NGrams) -> float:
    """(KL(p | m) + KL(q | m)) / 2 in bits with m = (p + q) / 2: 0 for equal, 1 for disjoint distributions.

    Raises: `ValueError` for n-grams of different order or vocabulary.
    """
    if (first.order, first.vocabulary) != (second.order, second.vocabulary):
        raise ValueError("n-grams of different order or vocabulary do not compare")
    keys = np.union1d(first.keys, second.keys)
    p, q = (_distribution(ngrams, keys) for ngrams in (first, second))
    mean = (p + q) / 2
    return float(_divergence(p, mean) + _divergence(q, mean)) / 2


def _distribution(ngrams: NGrams, keys: NDArray[Any]) -> NDArray[np.float64]:
    distribution = np.zeros(len(keys))
    distribution[np.searchsorted(keys, ngrams.keys)] = ngrams.counts / ngrams.total
    return distribution


def _divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    present = p > 0
    return float(np.sum(p[present] * np.log2(p[present] / q[present])))


@dataclass(frozen=True)
class Divergence:
    """The divergence of `samples` lines from the reference, and of as many held-out lines (mean over `draws`)."""

    value: float
    floor: float
    samples: int
    draws: int

    @property
    def excess(self) -> float:
        """What is above the floor: about 0 for text as good as real text."""
        return self.value - self.floor


class TextReference:
    """Real text to compare with: the n-grams of the training lines, and held-out lines for the floor."""

    def __init__(
        self,
        train: NDArray[np.integer],
        held_out: NDArray[np.integer],
        vocabulary: int,
        orders: Sequence[int] = ORDERS,
    ) -> None:
        self.vocabulary = vocabulary
        self.orders = tuple(orders)
        self._held_out = np.asarray(held_out)
        self._models = {order: count_ngrams(train, order, vocabulary) for order in self.orders}
        self._floors: dict[int, tuple[dict[int, float], int]] = {}

    def compare(self, lines: NDArray[np.integer]) -> dict[int, Divergence]:
        """The divergence of generated lines [N, L] for each order, with the floor at the same N.

        Raises: `ValueError` when fewer than N lines were held out: there is no floor then.
        """
        floors, draws = self._floor(len(lines))
        found = {}
        for order in self.orders:
            ngrams = count_ngrams(lines, order, self.vocabulary)
            value = jensen_shannon_divergence(ngrams, self._models[order])
            found[order] = Divergence(value, floors[order], len(lines), draws)
        return found

    def _floor(self, count: int) -> tuple[dict[int, float], int]:
        """By order: the mean over disjoint parts of `count` held-out lines, at most ten; kept for the next call."""
        if count not in self._floors:
            draws = min(len(self._held_out) // count, MAX_FLOOR_DRAWS) if count else 0
            if not draws:
                raise ValueError(
                    f"{count} lines need at least as many held-out lines for a floor, not {len(self._held_out)}"
                )
            parts = [self._held_out[draw * count : (draw + 1) * count] for draw in range(draws)]
            floors = {
                order: float(
                    np.mean(
                        [
                            jensen_shannon_divergence(count_ngrams(part, order, self.vocabulary), self._models[order])
                            for part in parts
                        ]
                    )
                )
                for order in self.orders
            }
            self._floors[count] = floors, draws
        return self._floors[count]


def divergence_scalars(divergences: dict[int, Divergence]) -> dict[str, float]:
    """As metrics: `jsd4_640` and, never without it, `jsd4_640_floor`: order, then number of lines."""
    scalars = {}
    for order, divergence in divergences.items():
        scalars[f"jsd{order}_{divergence.samples}"] = divergence.value
        scalars[f"jsd{order}_{divergence.samples}_floor"] = divergence.floor
    return scalars
