"""A curve in one line of text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"
NOT_FINITE = "×"
LOG_ABOVE = 20.0  # positive values that span more than this factor are drawn on a logarithmic scale


def sparkline(values: Sequence[float | None], width: int = 24) -> str:
    """`values` from left to right, averaged into at most `width` bars; a cross where one is null or not finite.

    Fewer than two values have no course, and no line.
    """
    if len(values) < 2:
        return ""
    count = min(width, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    bars = [_mean(values[low:high]) for low, high in itertools.pairwise(edges)]
    finite = [bar for bar in bars if bar is not None]
    if not finite:
        return NOT_FINITE * count
    low, high = min(finite), max(finite)
    if low > 0 and high / low > LOG_ABOVE:
        bars = [None if bar is None else math.log(bar) for bar in bars]
        low, high = math.log(low), math.log(high)
    span = high - low
    return "".join(NOT_FINITE if bar is None else BARS[_level(bar - low, span)] for bar in bars)


def _mean(values: Sequence[float | None]) -> float | None:
    if any(value is None or not math.isfinite(value) for value in values):
        return None
    return math.fsum(value for value in values if value is not None) / len(values)


def _level(above: float, span: float) -> int:
    if span <= 0 or not math.isfinite(span):
        return 0
    return min(int(above / span * len(BARS)), len(BARS) - 1)
