"""Reading the monitor's flags: which events a step was, what is to be done about it, and when to write an incident."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stabletrain.training.config import TrainConfig
from stabletrain.training.experiment import State
from stabletrain.training.incidents import FlightRecorder
from stabletrain.training.stability import (
    MONITOR_PREFIX,
    STABILITY_PREFIX,
    Policy,
    is_blown_up,
    monitors_of,
    nonfinite_tensors,
)

EVENT_OF_ACTION = {"skipped": "skip", "clipped": "clip"}


@dataclass(frozen=True)
class Verdict:
    """What a step asks the loop to do: `action` is rollback or stop."""

    step: int
    action: str
    reason: str


@dataclass
class Findings:
    """What one step was: events (`kind` and details), and a verdict where the loop has to act."""

    events: list[dict[str, Any]] = field(default_factory=list)
    verdict: Verdict | None = None


class Watch:
    """Sees the metrics of every step, in order. Its memory is the flight recorder's, plain JSON."""

    def __init__(self, incidents: Path, config: TrainConfig) -> None:
        self._config = config
        self._recorder = FlightRecorder(incidents)
        self._leaf_names: dict[str, tuple[str, ...]] = {}
        self._nonfinite: list[str] = []  # networks that took in a non-finite update at the last step

    def begin(self, state: State) -> None:
        """Learns which networks there are, and the names of their parameters."""
        self._leaf_names = {prefix: monitor.leaf_names for prefix, monitor in monitors_of(state).items()}

    def see(self, step: int, position: int, metrics: Mapping[str, Any], *, may_roll_back: bool) -> Findings:
        """The events of one step. Writes an incident for each kind of trouble, ever more rarely.

        `may_roll_back`: False when no more rollbacks are allowed; the verdict is then to stop.
        """
        self._recorder.record(step, position, metrics)
        findings = Findings()
        for prefix in self._leaf_names:
            self._see_network(prefix, step, metrics, findings, may_roll_back)
        if any(metrics.get(f"{MONITOR_PREFIX}{prefix}exhausted") for prefix in self._leaf_names):
            reason = f"more than {self._config.max_interventions} interventions (--max-interventions)"
            self._report(findings, "exhausted", step, "stop", policy="stop", message=reason)
            findings.verdict = Verdict(step, "stop", reason)
        self._nonfinite = [
            prefix
            for prefix in self._leaf_names
            if metrics.get(f"{MONITOR_PREFIX}{prefix}nonfinite") and not metrics.get(f"{MONITOR_PREFIX}{prefix}skipped")
        ]
        return findings

    def _see_network(
        self, prefix: str, step: int, metrics: Mapping[str, Any], findings: Findings, may_roll_back: bool
    ) -> None:
        start = f"{MONITOR_PREFIX}{prefix}"

        def flag(name: str) -> bool:
            return bool(metrics.get(start + name))

        def trouble(kind: str, policy: str, message: str, **details: Any) -> None:
            action = self._action(policy, flag("held"), flag("skipped"), flag("clipped"), may_roll_back)
            reason = f"{network}{message}"
            if action == "applied" and kind == "nonfinite" and not self._worth_telling(metrics, prefix):
                return
            self._report(findings, kind, step, action, policy=policy, message=reason, **details)
            if action in EVENT_OF_ACTION:
                findings.events.append({"kind": EVENT_OF_ACTION[action], "because": kind, **_named(prefix)})
            if action in ("rollback", "stop") and findings.verdict is None:
                if policy == "rollback" and action == "stop":
                    reason += f"; {self._config.max_interventions} rollbacks (--max-interventions) did not help"
                findings.verdict = Verdict(step, action, reason)

        network = f"{prefix.rstrip('/')}: " if prefix else ""
        if flag("nonfinite"):
            tensors = nonfinite_tensors(metrics, {prefix: self._leaf_names[prefix]})
            shown = ", ".join(tensors[:3]) + (f" and {len(tensors) - 3} more" if len(tensors) > 3 else "")
            message = f"not finite: {shown or 'loss or gradient'}"
            trouble("nonfinite", self._config.on_nonfinite, message, tensors=tensors, **_named(prefix))
        elif flag("spike"):
            message, numbers = _spike(metrics, start, f"{STABILITY_PREFIX}{prefix}grad_norm")
            trouble("spike", self._config.on_spike, message, **numbers, **_named(prefix))
        if flag("blowup"):
            message = f"{network}the loss has been far above its best for {metrics[start + 'steps_far']:.0f} steps"
            self._report(findings, "blowup", step, "applied", policy="log", message=message, **_named(prefix))
        if flag("rebaselined"):
            findings.events.append({"kind": "rebaseline", "message": f"{network}the level has moved for good"})

    def _action(self, policy: str, held: bool, skipped: bool, clipped: bool, may_roll_back: bool) -> str:
        if held and policy in ("rollback", "stop"):
            return "rollback" if policy == "rollback" and may_roll_back else "stop"
        return "skipped" if skipped else "clipped" if clipped else "held" if held else "applied"

    def _worth_telling(self, metrics: Mapping[str, Any], prefix: str) -> bool:
        # A run that goes on with NaN would tell so at each step; it does at the first, and then ever more rarely.
        count = int(metrics.get(f"{MONITOR_PREFIX}{prefix}nonfinites", 1))
        return prefix not in self._nonfinite or count & (count - 1) == 0

    def _report(
        self, findings: Findings, kind: str, step: int, action: str, *, policy: str, message: str, **details: Any
    ) -> None:
        folder = self._recorder.dump(kind, step=step, policy=policy, action=action, tensors=details.get("tensors", ()))
        event = {"kind": kind, "action": action, "policy": policy, "message": message, **details}
        if folder is not None:
            event["incident"] = f"{folder.parent.name}/{folder.name}"
        findings.events.append(event)

    def crashed(self, step: int, cause: str) -> None:
        """Writes down the last steps before an unexpected error."""
        self._recorder.dump("crash", step=step, policy="stop", action="stop", cause=cause)

    def lost(self, state: State) -> str:
        """Why the run, at its end, counts as diverged; empty when it does not."""
        policy = Policy.from_config(self._config)
        for prefix, monitor in monitors_of(state).items():
            of = f" of {prefix.rstrip('/')}" if prefix else ""
            if is_blown_up(monitor, policy):
                return f"the loss{of} left its level and did not come back"
            if prefix in self._nonfinite:
                return f"the last update{of} was not finite"
        return ""

    def export_state(self) -> dict[str, Any]:
        """All that is remembered, as plain JSON."""
        return {"recorder": self._recorder.export_state(), "nonfinite": self._nonfinite}

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `export_state` returned. An empty mapping clears."""
        self._recorder.import_state(state.get("recorder", {}))
        self._nonfinite = list(state.get("nonfinite", []))


def _named(prefix: str) -> dict[str, str]:
    return {"network": prefix.rstrip("/")} if prefix else {}


def _spike(metrics: Mapping[str, Any], start: str, norm_name: str) -> tuple[str, dict[str, float]]:
    parts: list[str] = []
    numbers: dict[str, float] = {}
    for quantity, value in (("loss", metrics.get(f"{start}loss")), ("gradient", metrics.get(norm_name))):
        threshold = metrics.get(f"{start}{quantity}_threshold", math.inf)
        if metrics.get(f"{start}{quantity}_spike") and value is not None:
            what = "loss" if quantity == "loss" else "gradient norm"
            parts.append(f"{what} {value:.4g} above the threshold {threshold:.4g}")
            numbers |= {quantity: float(value), f"{quantity}_threshold": float(threshold)}
    return " and ".join(parts) or "spike", numbers
