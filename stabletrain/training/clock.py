"""What the training loop must remember besides the state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Clock:
    """Where a run stands. Plain values: it travels in each checkpoint as JSON."""

    step: int = 0
    offset: int = 0
    """Batches that rollbacks left out: update number n (1, 2, ...) uses the batch at position n - 1 + offset."""
    rollbacks: int = 0
    logged: int = -1
    """The last step with a row in metrics.jsonl."""
    best: float | None = None
    best_step: int | None = None
    best_when_scheduled: int | None = None
    """`best_step` at the newest scheduled checkpoint: a rollback to there needs that one again."""
    events: int = 0
    """Events that had been written; what came later is cut off when a run goes on from here."""
    rows: dict[str, Any] = field(default_factory=dict)
    """The row in the making: metrics of the steps since the last one (see `RowMaker`)."""
    watch: dict[str, Any] = field(default_factory=dict)
    """What the monitor's reader remembers, the flight recorder's window among it (see `Watch`)."""
