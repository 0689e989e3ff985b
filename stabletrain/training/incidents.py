"""The flight recorder: the last steps before something went wrong, kept on the host and written down when it does.

`incidents/<step>/window.jsonl` holds one object per recorded step, oldest first. `incident.json` says what happened
and what was done about it, which tensors were not finite, what the numbers were before and at the event, and the
same in one plain sentence. A number that is not finite is null in `metrics`, and named with its kind in `nonfinite`.
"""

from __future__ import annotations

import base64
import json
import math
import shutil
import statistics
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.training.stability import MONITOR_COUNTERS, MONITOR_FLAGS, MONITOR_PREFIX, STABILITY_PREFIX
from stabletrain.training.step_metrics import StepRow

KINDS = ("nonfinite", "blowup", "spike", "exhausted", "crash")
"""What an incident can be. For a step at which several things happen, the first that applies."""

ACTIONS = {
    "applied": "the update was applied all the same",
    "skipped": "the update was skipped",
    "clipped": "the gradient was scaled down to its running median",
    "held": "the update was held back",
    "rollback": "the run was rolled back",
    "stop": "the run was stopped",
}
"""What was done about it, as incident.json and its sentence say it."""

BEFORE = 32  # steps whose median is "before" in incident.json


class FlightRecorder:
    """Keeps the metrics of the last `capacity` steps, and writes them below `directory` at an incident.

    After a dump none of the same kind follows for `spacing` steps, and twice as long after each further one: what
    happens all the time (the losses of adversaries spike) is told by the events, and takes no time. None is
    overwritten. Its memory (`export_state`, `import_state`) is plain JSON, so that a resumed run has the same window
    and dumps the same.
    """

    def __init__(self, directory: Path, *, capacity: int = 256, spacing: int = 50) -> None:
        self.directory = directory
        self.spacing = spacing
        self._steps: deque[tuple[int, int, Mapping[str, Any]]] = deque(maxlen=capacity)  # step, position, metrics
        self._last_dump: dict[str, int] = {}
        self._pauses: dict[str, int] = {}  # kind -> steps after its last dump in which there is no other

    def __len__(self) -> int:
        return len(self._steps)

    def record(self, step: int, position: int, metrics: Mapping[str, Any]) -> None:
        """Remembers a step: scalars as they are, of a vector only which entries are set.

        `position` is the batch's place in the order of the data, which differs from the step once a rollback has left
        batches out. A step that comes again after a rollback replaces itself and all that came after it.
        """
        while self._steps and self._steps[-1][0] >= step:
            self._steps.pop()
        self._steps.append((step, position, metrics if isinstance(metrics, StepRow) else _without_quiet(metrics)))

    def dump(
        self,
        kind: str,
        *,
        step: int,
        policy: str,
        action: str = "applied",
        tensors: Sequence[str] = (),
        cause: str = "",
    ) -> Path | None:
        """Writes the window up to `step`. Returns its folder, or None when one of this kind was written just before.

        `policy` is what the user asked for, `action` what was done (a key of `ACTIONS`), `cause` the message of a
        crash. The folder appears whole or not at all. A run that was killed after a dump and meets the same incident
        again writes nothing new.

        Raises: `ValueError` for an unknown kind or action; `OSError` when the run directory cannot be written.
        """
        if kind not in KINDS or action not in ACTIONS:
            raise ValueError(f"no such incident: kind {kind!r}, action {action!r}")
        last = self._last_dump.get(kind)
        pause = self._pauses.get(kind, self.spacing)
        if last is not None and 0 <= step - last < pause:
            return None
        steps = [(at, position, _unpacked(row)) for at, position, row in self._steps if at <= step]
        at = steps[-1] if steps and steps[-1][0] == step else (step, None, {})
        before = [metrics for _, _, metrics in steps if metrics is not at[2]][-BEFORE:]
        incident = {
            "kind": kind,
            "step": step,
            "position": at[1],
            "policy": policy,
            "action": action,
            "tensors": list(tensors),
            "cause": cause,
            "sentence": _sentence(kind, step, at[2], action=action, policy=policy, tensors=tensors, cause=cause),
            "recorded_steps": [steps[0][0], steps[-1][0]] if steps else [],
            "numbers": _numbers(before, at[2]),
        }
        folder = self._write(step, incident, [_encode(*entry) for entry in steps])
        self._last_dump[kind], self._pauses[kind] = step, pause if last is None else 2 * pause
        return folder

    def _write(self, step: int, incident: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Path:
        contents = {
            "incident.json": json.dumps(incident, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
            "window.jsonl": "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows),
        }
        folder, count = self.directory / str(step), 1
        while folder.exists():  # this step had an incident: of another kind, or before a rollback or a kill
            if all(_read(folder / name) == text for name, text in contents.items()):
                return folder
            count += 1
            folder = self.directory / f"{step}-{count}"
        partial = self.directory / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, text in contents.items():
            (partial / name).write_text(text, encoding="utf-8")
        partial.replace(folder)
        return folder

    def export_state(self) -> dict[str, Any]:
        """All that the recorder remembers, as plain JSON.

        Numbers are packed: as text, a window of a large network would take longer to save than its parameters.
        """
        blocks: list[dict[str, Any]] = []
        names: list[str] = []
        for step, position, row in self._steps:
            metrics = _unpacked(row)
            if not blocks or names != list(metrics):
                names = list(metrics)
                blocks.append({"names": names, "steps": [], "positions": [], "lists": [], "numbers": []})
            block = blocks[-1]
            block["steps"].append(step)
            block["positions"].append(position)
            block["lists"].append({name: value for name, value in metrics.items() if isinstance(value, list)})
            block["numbers"].append([0.0 if isinstance(value, list) else value for value in metrics.values()])
        for block in blocks:
            packed = zlib.compress(np.asarray(block["numbers"], "<f8").tobytes(), level=1)
            block["numbers"] = base64.b64encode(packed).decode()
        return {"blocks": blocks, "last_dump": dict(self._last_dump), "pauses": dict(self._pauses)}

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `export_state` returned, in place of what is remembered now. An empty mapping clears."""
        self._steps.clear()
        for block in state.get("blocks", []):
            packed = zlib.decompress(base64.b64decode(block["numbers"]))
            numbers = np.frombuffer(packed, "<f8").reshape(len(block["steps"]), len(block["names"])).tolist()
            for step, position, lists, values in zip(block["steps"], block["positions"], block["lists"], numbers):
                self._steps.append((step, position, {**dict(zip(block["names"], values)), **lists}))
        self._last_dump = {kind: int(step) for kind, step in state.get("last_dump", {}).items()}
        self._pauses = {kind: int(steps) for kind, steps in state.get("pauses", {}).items()}


def _without_quiet(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: [i for i, entry in enumerate(value) if entry] if isinstance(value, (list, tuple)) else value
        for name, value in metrics.items()
    }


def _unpacked(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A remembered step as it is written. A packed row is left so until then: most are never written."""
    return _without_quiet(row) if isinstance(row, StepRow) else row


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _encode(step: int, position: int | None, metrics: Mapping[str, Any]) -> dict[str, Any]:
    encoded = {name: _encode_value(value) for name, value in metrics.items()}
    nonfinite = {name: _kind_of_nonfinite(metrics[name]) for name, value in encoded.items() if value is None}
    return {"step": step, "position": position, "metrics": encoded, "nonfinite": nonfinite}


def _encode_value(value: Any) -> Any:
    if isinstance(value, list):
        return value
    number = float(value)
    if not math.isfinite(number):
        return None
    # Nine digits give a float32 back exactly.
    return int(number) if number.is_integer() and abs(number) < 2**24 else float(f"{number:.9g}")


def _kind_of_nonfinite(value: float) -> str:
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _numbers(before: Sequence[Mapping[str, Any]], at: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> the median of the steps before, and the value at the event; null where it is not finite or not known."""
    numbers = {}
    for name, value in at.items():
        label = name.rsplit("/", 1)[-1]
        if isinstance(value, list) or (
            name.startswith(MONITOR_PREFIX) and label in (*MONITOR_FLAGS, *MONITOR_COUNTERS)
        ):
            continue
        earlier = [float(metrics[name]) for metrics in before if name in metrics and math.isfinite(metrics[name])]
        numbers[name] = {
            "before": _encode_value(statistics.median(earlier)) if earlier else None,
            "at": _encode_value(value),
        }
    return numbers


def _sentence(
    kind: str,
    step: int,
    metrics: Mapping[str, Any],
    *,
    action: str,
    policy: str,
    tensors: Sequence[str],
    cause: str,
) -> str:
    if kind == "crash":
        return f"The run crashed after step {step}: {cause.strip() or 'no reason was given'}."
    networks = [
        name.removeprefix(MONITOR_PREFIX).removesuffix("spike")
        for name in metrics
        if name.startswith(MONITOR_PREFIX) and name.rsplit("/", 1)[-1] == "spike"
    ]
    parts: list[str] = []
    if kind == "nonfinite":
        shown = ", ".join(tensors[:3]) + (f" and {len(tensors) - 3} more" if len(tensors) > 3 else "")
        parts.append(f"not finite: {shown or 'the loss or a gradient'}")
    elif kind == "exhausted":
        used = sum(int(metrics.get(f"{MONITOR_PREFIX}{network}interventions", 0)) for network in networks)
        parts.append(f"there have been {used} interventions, more than are allowed")
    for network in networks if kind in ("spike", "blowup") else []:
        start, of = f"{MONITOR_PREFIX}{network}", network.replace("/", " ")
        loss, norm = metrics.get(f"{start}loss"), metrics.get(f"{STABILITY_PREFIX}{network}grad_norm")
        if kind == "blowup" and metrics.get(f"{start}blowup"):
            far = int(metrics[f"{start}steps_far"])
            parts.append(f"the {of}loss is {loss:.4g} and has been far above its best for {far} steps")
        if kind == "spike" and metrics.get(f"{start}loss_spike"):
            parts.append(_above(f"the {of}loss", loss, metrics, f"{start}loss"))
        if kind == "spike" and metrics.get(f"{start}gradient_spike"):
            parts.append(_above(f"the {of}gradient norm", norm, metrics, f"{start}gradient"))
    what = "; ".join(parts) or kind
    return f"Step {step}: {what}; {ACTIONS[action]} (policy {policy})."


def _above(what: str, value: Any, metrics: Mapping[str, Any], quantity: str) -> str:
    level, threshold = metrics[f"{quantity}_level"], metrics[f"{quantity}_threshold"]
    return f"{what} was {value:.4g}, above its threshold of {threshold:.4g} (level {level:.4g})"
