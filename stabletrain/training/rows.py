"""Rows of metrics.jsonl from the metrics of single steps.

A row covers the steps since the last row. Of a metric it holds
- `train/*` and anything not named below: the mean over those steps (in float64, so that the order of a long sum does
  not show);
- `*grad_norm*`: the largest value, so that no spike falls between two rows;
- other `stability/*` (update and parameter norms, ratios, the family's own indicators): the last value.

A NaN or an infinity among the steps makes the mean or the maximum one: it is not left out. `monitor/*` is for the
loop, and stands in no row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stabletrain.training.stability import MONITOR_PREFIX, STABILITY_PREFIX


class RowMaker:
    """Gathers steps until a row is made. Its memory (`export_state`, `import_state`) is plain JSON."""

    def __init__(self, examples_per_step: int) -> None:
        self._examples_per_step = examples_per_step
        self._layout: Any = None
        self._rules: list[tuple[str, str]] = []
        self.restart()

    def restart(self) -> None:
        """Forgets all steps: the row that they belong to is written."""
        self._values: dict[str, list[float]] = {}  # name -> [number of steps; their sum, their maximum or the last]
        self._steps = 0
        self._seconds = 0.0

    def add(self, metrics: Mapping[str, Any]) -> None:
        """One step's metrics. Vectors are left out: they name tensors, and are for the monitor."""
        for name, rule in self._rules_of(metrics):
            value, kept = float(metrics[name]), self._values.get(name)
            if kept is None:
                self._values[name] = [1, value]
                continue
            kept[0] += 1
            if rule == "mean":
                kept[1] += value
            elif rule == "last" or not (kept[1] != kept[1] or value <= kept[1]):  # of the largest a NaN stays
                kept[1] = value

    def _rules_of(self, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The metrics that a row holds, with their rules: worked out once for all steps of a program."""
        layout = getattr(metrics, "layout", None)
        if layout is None or layout is not self._layout:
            self._layout = layout
            self._rules = [
                (name, _rule(name))
                for name, value in metrics.items()
                if not (name.startswith(MONITOR_PREFIX) or isinstance(value, (list, tuple)))
            ]
        return self._rules

    def time(self, steps: int, seconds: float) -> None:
        """How long some steps took, without compilation, evaluation and checkpoints."""
        self._steps += steps
        self._seconds += seconds

    def make(self, steps_left: int) -> dict[str, float]:
        """Metrics by name, and `perf/*`: the only values that depend on the clock on the wall."""
        row = {name: total / count if _rule(name) == "mean" else total for name, (count, total) in self._values.items()}
        if self._steps and self._seconds > 0:
            seconds = self._seconds / self._steps
            row["perf/step_seconds"] = seconds
            row["perf/examples_per_second"] = self._examples_per_step / seconds
            row["perf/eta_seconds"] = steps_left * seconds
        return row

    def export_state(self) -> dict[str, Any]:
        """All that is remembered, as plain JSON."""
        return {"values": self._values, "steps": self._steps, "seconds": self._seconds}

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `export_state` returned. An empty mapping clears."""
        self.restart()
        self._values = {name: list(value) for name, value in state.get("values", {}).items()}
        self._steps, self._seconds = state.get("steps", 0), state.get("seconds", 0.0)


def _rule(name: str) -> str:
    if "grad_norm" in name:
        return "max"
    return "last" if name.startswith(STABILITY_PREFIX) else "mean"
