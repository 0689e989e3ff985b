"""What a session writes about itself: events, the status with its heartbeat, and record.json.

record.json holds what a reader needs to know to trust a run, or to repeat it: `family`, `command`, `started`, `ended`,
`wall_seconds` and `compile_seconds` (over all sessions), `peak_memory_bytes`, `parameter_count`, `data`; of the newest
session `python`, `versions`, `platform`, `host`, `processor`, `cores`, `devices`, `git`; and `sessions`, one object
for each time that the run was started.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from stabletrain.errors import ConfigChangedError
from stabletrain.training.experiment import Experiment, Reporter
from stabletrain.training.machine import CompileClock, command_line, machine_facts, peak_memory_bytes
from stabletrain.training.run_directory import RunDirectory, now

HEARTBEAT_SECONDS = 3.0
SESSION_EVENTS = ("resume", "restart", "damaged-checkpoint", "changed-option", "changed-devices", "interrupted")
"""Events about the process and not about the course of the training: a resumed run keeps them all."""


class Journal:
    """One session's notes in its run directory, each also told to the reporter where it concerns a person."""

    def __init__(self, run: RunDirectory, reporter: Reporter, total_steps: int, compile_clock: CompileClock) -> None:
        self._run = run
        self._reporter = reporter
        self._total_steps = total_steps
        self._compile_clock = compile_clock
        self._begun = time.monotonic()
        self._heartbeat_at = 0.0
        # A killed session could not write its time into the record; its last heartbeat has it.
        self._seconds_before = max(run.record.get("wall_seconds", 0.0), run.status.get("wall_seconds", 0.0))

    def event(self, step: int, kind: str, **details: Any) -> None:
        """One line of events.jsonl."""
        self._reporter.event(self._run.append_event(step, kind, **details))

    # --- status.json ------------------------------------------------------------------------------------------

    def status(self, state: str, step: int, reason: str = "", **facts: Any) -> None:
        """Replaces status.json."""
        self._run.write_status(
            state, step, self._total_steps, reason, **facts, wall_seconds=round(self._wall_seconds, 3)
        )
        self._heartbeat_at = time.monotonic()

    def heartbeat(self, step: int, **facts: Any) -> None:
        """A sign of life, at most one in three seconds."""
        if time.monotonic() - self._heartbeat_at > HEARTBEAT_SECONDS:
            self.status("running", step, **facts)

    @property
    def _wall_seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._begun

    # --- record.json ------------------------------------------------------------------------------------------

    def begin_session(self, experiment: Experiment, step: int, inner_steps: int) -> list[str]:
        """Notes this session in the record. Returns what is not as it was before, each also an event.

        Raises: `ConfigChangedError` when the data are not those that the run began with.
        """
        record = self._run.record
        spec = getattr(experiment, "data_spec", None)
        data = {} if spec is None else {"data": spec.to_dict()}
        self._refuse_other_data(record.get("data", {}), data.get("data", {}))
        earlier: list[dict[str, Any]] = record.get("sessions", [])
        if earlier and "ended" not in earlier[-1]:
            earlier[-1] |= {"ended": self._run.status.get("heartbeat"), "as": "killed"}
        session = {
            "started": now(),
            "command": command_line(),
            "first_step": step,
            "devices": experiment.mesh.size,
            "inner_steps": inner_steps,
        }
        first = {"family": self._run.family, "command": session["command"], "started": session["started"]}
        self._run.update_record(
            **{name: record.get(name, value) for name, value in first.items()},
            **data,
            **machine_facts(),
            parameter_count=experiment.parameter_count,
            sessions=[*earlier, session],
        )
        return self._changes(step, earlier, session)

    def _refuse_other_data(self, before: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        old, new = before.get("fingerprint"), here.get("fingerprint")
        if old and new and old != new:
            raise ConfigChangedError(
                f"{self._run.path} was made with other data: the fingerprint of {here.get('name')!r} was {old[:12]}, "
                f"now it is {new[:12]}. Restore the data, or use another --out, or --fresh"
            )

    def _changes(self, step: int, earlier: list[dict[str, Any]], session: Mapping[str, Any]) -> list[str]:
        notes = []
        for name, (old, new) in self._run.changed.items():
            notes.append(f"--{name.replace('_', '-')} was {old}, is now {new}")
            self.event(step, "changed-option", name=name, old=old, new=new, message=notes[-1])
        layouts = [(s["devices"], s["inner_steps"]) for s in (*earlier[-1:], session)]
        if layouts[0] != layouts[-1]:
            (devices, inner_steps), (devices_now, inner_steps_now) = layouts
            notes.append(
                f"now {devices_now} devices and {inner_steps_now} steps per dispatch, before {devices} and "
                f"{inner_steps}: results agree to rounding, not to the bit"
            )
            self.event(step, "changed-devices", message=notes[-1])
        return notes

    def end_session(self, state: str, step: int) -> None:
        """Completes the record."""
        record = self._run.record
        sessions = record.get("sessions", [])
        if sessions:
            sessions[-1] |= {"ended": now(), "last_step": step, "as": state}
        self._run.update_record(
            sessions=sessions,
            ended=now(),
            wall_seconds=round(self._wall_seconds, 3),
            compile_seconds=round(record.get("compile_seconds", 0.0) + self._compile_clock.seconds, 3),
            peak_memory_bytes=max(record.get("peak_memory_bytes", 0), peak_memory_bytes()),
        )
