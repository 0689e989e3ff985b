"""The recorder's window, what it writes at an incident, and that a resumed run has the same one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stabletrain.training.incidents import FlightRecorder
from stabletrain.training.step_metrics import StepRow, layout_of


def metrics_of(step: int, **changes: Any) -> dict[str, Any]:
    """One step of a quiet run, as the loop fetches it."""
    metrics = {
        "train/loss": 1.0 + 0.01 * (step % 7),
        "stability/grad_norm": 0.5,
        "monitor/spike": 0.0,
        "monitor/loss_spike": 0.0,
        "monitor/gradient_spike": 0.0,
        "monitor/blowup": 0.0,
        "monitor/interventions": 0.0,
        "monitor/loss": 1.0 + 0.01 * (step % 7),
        "monitor/loss_level": 1.03,
        "monitor/loss_threshold": 1.5,
        "monitor/gradient_level": 0.5,
        "monitor/gradient_threshold": 1.1,
        "monitor/steps_far": 0.0,
        "monitor/nonfinite_gradients": [0.0, 0.0, 0.0],
    }
    return {**metrics, **{name.replace("__", "/"): value for name, value in changes.items()}}


SPIKE = {"train__loss": 9.25, "monitor__loss": 9.25, "monitor__spike": 1.0, "monitor__loss_spike": 1.0}


def recorder_with(path: Path, steps: int, **at_last: Any) -> FlightRecorder:
    recorder = FlightRecorder(path, capacity=20)
    for step in range(1, steps + 1):
        recorder.record(step, step - 1, metrics_of(step, **(at_last if step == steps else {})))
    return recorder


def read(folder: Path | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    assert folder is not None
    incident = json.loads((folder / "incident.json").read_text())
    return incident, [json.loads(line) for line in (folder / "window.jsonl").read_text().splitlines()]


def test_a_spike_is_written_with_its_window_and_a_plain_sentence(tmp_path: Path) -> None:
    recorder = recorder_with(tmp_path, 30, **SPIKE)
    folder = recorder.dump("spike", step=30, policy="skip", action="skipped")
    assert folder == tmp_path / "30"
    incident, rows = read(folder)
    assert [row["step"] for row in rows] == list(range(11, 31))  # the last `capacity` steps
    assert (incident["kind"], incident["step"], incident["position"]) == ("spike", 30, 29)
    assert incident["numbers"]["train/loss"] == {"before": pytest.approx(1.03, abs=0.02), "at": 9.25}
    assert "monitor/spike" not in incident["numbers"]
    assert incident["sentence"] == (
        "Step 30: the loss was 9.25, above its threshold of 1.5 (level 1.03); the update was skipped (policy skip)."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["30"]  # nothing half-written is left


def test_non_finite_numbers_are_null_and_named_with_their_kind(tmp_path: Path) -> None:
    changes = {
        "train__loss": math.nan,
        "stability__grad_norm": math.inf,
        "monitor__nonfinite_gradients": [0.0, 1.0, 1.0],
    }
    recorder = recorder_with(tmp_path, 5, **changes)
    tensors = [f"gradient of layer_{i}/kernel" for i in range(5)]
    incident, rows = read(recorder.dump("nonfinite", step=5, policy="stop", action="stop", tensors=tensors))
    assert rows[-1]["metrics"]["train/loss"] is None
    assert rows[-1]["nonfinite"] == {"train/loss": "nan", "stability/grad_norm": "inf"}
    assert rows[-1]["metrics"]["monitor/nonfinite_gradients"] == [1, 2]
    assert incident["tensors"] == tensors
    assert incident["numbers"]["train/loss"]["at"] is None
    assert "gradient of layer_2/kernel and 2 more; the run was stopped" in incident["sentence"]


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("blowup", {"monitor__blowup": 1.0, "monitor__steps_far": 128.0}, "far above its best for 128 steps"),
        ("exhausted", {"monitor__interventions": 21.0}, "21 interventions"),
        ("spike", {**SPIKE, "monitor__gradient_spike": 1.0}, "the gradient norm was 0.5"),
        ("crash", {}, "crashed after step 30: out of memory"),
    ],
)
def test_every_kind_has_its_sentence(tmp_path: Path, kind: str, changes: dict[str, Any], words: str) -> None:
    recorder = recorder_with(tmp_path, 30, **changes)
    incident, _ = read(recorder.dump(kind, step=30, policy="log", cause="out of memory"))
    assert words in incident["sentence"]


def test_the_network_that_spiked_is_named(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path)
    row = {name.replace("monitor/", "monitor/critic/"): value for name, value in metrics_of(1, **SPIKE).items()}
    recorder.record(1, 0, row)
    incident, _ = read(recorder.dump("spike", step=1, policy="log"))
    assert "the critic loss was 9.25" in incident["sentence"]


def test_one_kind_is_written_ever_more_rarely_and_others_besides(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path)
    written = {}
    for step in range(1, 400):
        if step == 200:  # a resumed run has the same pauses
            state = json.loads(json.dumps(recorder.export_state()))
            recorder = FlightRecorder(tmp_path)
            recorder.import_state(state)
        recorder.record(step, step, metrics_of(step))
        written[step] = recorder.dump("spike", step=step, policy="log") is not None
    assert [step for step, done in written.items() if done] == [1, 51, 151, 351]
    assert recorder.dump("blowup", step=351, policy="log") == tmp_path / "351-2"


def test_nothing_is_overwritten_and_nothing_written_twice(tmp_path: Path) -> None:
    first = recorder_with(tmp_path, 30, **SPIKE).dump("spike", step=30, policy="log")
    before = read(first)
    again = recorder_with(tmp_path, 30, **SPIKE).dump("spike", step=30, policy="log")  # a resumed run meets it again
    assert again == first
    other = recorder_with(tmp_path, 30, **{**SPIKE, "train__loss": 8.0}).dump("spike", step=30, policy="log")
    assert other == tmp_path / "30-2"
    assert read(first) == before


def test_a_resumed_recorder_writes_the_same_to_the_letter(tmp_path: Path) -> None:
    whole = recorder_with(tmp_path / "whole", 25, train__loss=math.nan, stability__grad_norm=0.1 + 1e-9)
    whole.dump("nonfinite", step=25, policy="log")
    half = FlightRecorder(tmp_path / "half", capacity=20)
    half.import_state(json.loads(json.dumps(whole.export_state(), allow_nan=False)))
    folders = []
    for recorder in (whole, half):
        for step in range(26, 31):
            recorder.record(step, step - 1, metrics_of(step, **(SPIKE if step == 30 else {})))
        assert recorder.dump("nonfinite", step=30, policy="log") is None  # too soon, as before
        folders.append(recorder.dump("spike", step=30, policy="log"))
    texts = [
        [(folder / name).read_text() for name in ("incident.json", "window.jsonl")] for folder in folders if folder
    ]
    assert texts[0] == texts[1]
    assert whole.export_state() == half.export_state()


def test_packed_rows_are_written_as_dictionaries_are(tmp_path: Path) -> None:
    """Also after a resume, which gives dictionaries back, and by any way of asking for a metric."""
    texts = []
    for name, packed in (("packed", True), ("plain", False), ("resumed", True)):
        recorder = FlightRecorder(tmp_path / name, capacity=20)
        for step in range(1, 31):
            row = metrics_of(step, monitor__nonfinite_gradients=[0.0, 1.0, 1.0], **(SPIKE if step == 30 else {}))
            if packed:
                layout = layout_of({key: np.shape(value) for key, value in row.items()})
                values = [float(x) for value in row.values() for x in np.ravel(value)]
                assert StepRow(layout, values) == row
                assert StepRow(layout, values).get("no such metric", 7) == 7
                row = StepRow(layout, values)
            recorder.record(step, step - 1, row)
        if name == "resumed":
            state = json.loads(json.dumps(recorder.export_state()))
            recorder = FlightRecorder(tmp_path / name, capacity=20)
            recorder.import_state(state)
        folder = recorder.dump("spike", step=30, policy="log")
        assert folder is not None
        texts.append([(folder / file).read_text() for file in ("incident.json", "window.jsonl")])
    assert texts[0] == texts[1] == texts[2]


def test_a_rollback_replaces_the_steps_that_come_again(tmp_path: Path) -> None:
    recorder = recorder_with(tmp_path, 10)
    recorder.record(7, 12, metrics_of(7))
    _, rows = read(recorder.dump("crash", step=7, policy="rollback", cause="x"))
    assert [(row["step"], row["position"]) for row in rows] == [*((i, i - 1) for i in range(1, 7)), (7, 12)]


def test_a_crash_before_the_first_step_is_written_too(tmp_path: Path) -> None:
    incident, rows = read(FlightRecorder(tmp_path).dump("crash", step=0, policy="log", cause="no memory"))
    assert rows == []
    assert incident["position"] is None


def test_an_unknown_kind_or_action_is_refused(tmp_path: Path) -> None:
    for wrong in ({"kind": "surprise"}, {"kind": "spike", "action": "shrug"}):
        with pytest.raises(ValueError, match="no such incident"):
            FlightRecorder(tmp_path).dump(step=1, policy="log", **wrong)
