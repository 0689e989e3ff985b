"""The loop: what it writes, when, and what it does about spikes, NaN, blow-ups, crashes and a full disk."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stabletrain.errors import EXIT_DIVERGED, ConfigChangedError, ConfigError, RunDirectoryError
from stabletrain.training import journal as journal_module
from stabletrain.training.checkpoints import Checkpoints
from stabletrain.training.run_directory import RunDirectory
from tests.training.toy import Told, ToyExperiment, ToySpec, run_toy


def rows(path: Path) -> list[dict[str, Any]]:
    return RunDirectory.open(path).rows()


def status(path: Path) -> dict[str, Any]:
    return RunDirectory.open(path).status


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in RunDirectory.open(path).events() if event["kind"] == kind]


# --- what is written ------------------------------------------------------------------------------------------


def test_one_row_per_logged_step_with_the_evaluation_in_the_same_row(tmp_path: Path):
    told = Told()
    outcome = run_toy(tmp_path / "run", log_every=5, eval_every=8, told=told)
    found = rows(tmp_path / "run")
    steps = [5, 8, 10, 15, 16, 20, 24]
    assert [row["step"] for row in found] == told.logged_steps == steps
    assert [row["step"] for row in found if "eval/loss" in row] == [8, 16, 24]
    for row in found:
        assert {"time", "train/loss", "stability/grad_norm", "stability/feature_norm/hidden"} <= row.keys()
        assert {"perf/step_seconds", "perf/examples_per_second", "perf/eta_seconds"} <= row.keys()
        assert not any(name.startswith("monitor/") for name in row)
    assert (outcome.status, outcome.step, outcome.exit_code) == ("done", 24, 0)
    assert outcome.metrics == found[-1]
    assert told.outcome == outcome
    assert (tmp_path / "run" / "eval" / "16.json").is_file()
    assert ("evaluation", 0, 3) in told.work


def test_a_row_covers_exactly_the_steps_since_the_last_one(tmp_path: Path):
    """Mean of the losses, largest gradient norm, last parameter norm, against a run that logs every step."""
    run_toy(tmp_path / "each", log_every=1)
    run_toy(tmp_path / "some", log_every=7)
    each = {row["step"]: row for row in rows(tmp_path / "each")}
    before = 0
    for row in rows(tmp_path / "some"):
        covered = [each[step] for step in range(before + 1, row["step"] + 1)]
        # Both are means of the same float32 values in float64; only the last bit may differ.
        assert row["train/loss"] == pytest.approx(np.mean([one["train/loss"] for one in covered]), rel=1e-14)
        assert row["stability/grad_norm"] == max(one["stability/grad_norm"] for one in covered)
        assert row["stability/feature_norm/hidden"] == covered[-1]["stability/feature_norm/hidden"]
        before = row["step"]
    assert before == 24


def test_what_is_logged_and_saved_does_not_change_the_course(tmp_path: Path):
    """Boundaries cut the dispatches of three steps differently; evaluations and checkpoints only look."""
    options: list[dict[str, Any]] = [
        {},
        {"log_every": 7, "checkpoint_every": 4, "eval_every": 5},
        {"log_every": 24, "checkpoint_every": 24},
    ]
    hashes = set()
    for number, values in enumerate(options):
        run_toy(tmp_path / str(number), **values)
        hashes.add(status(tmp_path / str(number))["params_sha256"])
    assert len(hashes) == 1


def test_no_steps_still_evaluate(tmp_path: Path):
    outcome = run_toy(tmp_path / "run", steps=0)
    [row] = rows(tmp_path / "run")
    assert (outcome.status, row["step"]) == ("done", 0)
    assert "eval/loss" in row


def test_finished_run_called_again_says_so_and_does_nothing(tmp_path: Path):
    first = run_toy(tmp_path / "run")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}
    told = Told()
    again = run_toy(tmp_path / "run", told=told)
    assert (again.status, again.step, again.exit_code, again.metrics) == ("done", 24, 0, first.metrics)
    assert "nothing left" in again.reason
    assert told.outcome == again
    assert told.first_step == -1, "it did not start"
    now = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}
    assert [path.name for path, at in now.items() if files.get(path) != at] in ([], ["config.toml"], ["run"])


def test_record_tells_what_is_needed_to_trust_and_repeat_the_run(tmp_path: Path):
    run_toy(tmp_path / "run")
    record = RunDirectory.open(tmp_path / "run").record
    assert record["family"] == "toy"
    assert record["command"]
    assert {"jax", "flax", "optax", "stabletrain"} <= record["versions"].keys()
    assert record["devices"]["platform"] == "cpu"
    assert record["data"] == {"name": "toy", "fingerprint": "0123456789abcdef"}
    assert record["parameter_count"] == 33
    assert record["wall_seconds"] >= record["compile_seconds"] > 0
    assert record["peak_memory_bytes"] > 10**6
    [session] = record["sessions"]
    assert (session["first_step"], session["last_step"], session["as"]) == (0, 24, "done")


def test_status_tells_of_long_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journal_module, "HEARTBEAT_SECONDS", 0.0)
    seen = []

    class Looking(ToyExperiment):
        def evaluate(self, state: Any, step: int, context: Any) -> Any:
            context.tick("sampling", 1, 9)
            seen.append(status(tmp_path / "run"))
            return super().evaluate(state, step, context)

    run_toy(tmp_path / "run", experiment=Looking)
    assert {"state": "running", "step": 24, "doing": "sampling", "done": 1, "of": 9}.items() <= seen[0].items()
    assert status(tmp_path / "run")["state"] == "done"


# --- the best -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["min", "max"])
def test_best_checkpoint_is_kept_besides_the_newest(tmp_path: Path, mode: str):
    run_toy(
        tmp_path / "run",
        eval_every=3,
        checkpoint_every=6,
        keep_checkpoints=1,
        best_metric="eval/loss",
        best_mode=mode,
    )
    scores = {row["step"]: row["eval/loss"] for row in rows(tmp_path / "run") if "eval/loss" in row}
    best = (min if mode == "min" else max)(scores, key=scores.__getitem__)
    checkpoints = Checkpoints(tmp_path / "run")
    assert {best, 24} <= set(checkpoints.steps)
    assert checkpoints.best == best
    assert events(tmp_path / "run", "best")[-1]["step"] == best


def test_unknown_best_metric_is_told_at_the_first_evaluation(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no metric 'eval/los' .*did you mean 'eval/loss'\?"):
        run_toy(tmp_path / "run", eval_every=6, best_metric="eval/los")
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["step"]) == ("failed", 6)
    assert run_toy(tmp_path / "run", eval_every=6, best_metric="eval/loss").status == "done"


# --- trouble --------------------------------------------------------------------------------------------------


def test_nonfinite_stops_at_its_step_with_an_incident(tmp_path: Path):
    """The row ends at the bad step although three steps go in one dispatch, and the loss is named as not finite."""
    told = Told()
    outcome = run_toy(tmp_path / "run", nan_positions=(12,), told=told)
    assert (outcome.status, outcome.step, outcome.exit_code) == ("diverged", 13, EXIT_DIVERGED)
    assert rows(tmp_path / "run")[-1]["step"] == 13
    assert rows(tmp_path / "run")[-1]["train/loss"] is None
    assert "train/loss" in rows(tmp_path / "run")[-1]["nonfinite"]
    [event] = events(tmp_path / "run", "nonfinite")
    assert (event["step"], event["action"]) == (13, "stop")
    assert "loss" in event["tensors"]
    assert "gradient of hidden/kernel" in event["tensors"]
    incident = json.loads((tmp_path / "run" / event["incident"] / "incident.json").read_text())
    assert (incident["kind"], incident["step"], incident["position"]) == ("nonfinite", 13, 12)
    assert "stop" in told.kinds()
    again = run_toy(tmp_path / "run", nan_positions=(12,))
    assert (again.status, again.exit_code) == ("diverged", EXIT_DIVERGED)


def test_skipped_steps_are_events_and_too_many_of_them_end_the_run(tmp_path: Path):
    run_toy(tmp_path / "one", nan_positions=(9,), on_nonfinite="skip")
    [skip] = events(tmp_path / "one", "skip")
    assert (skip["step"], skip["because"]) == (10, "nonfinite")
    assert status(tmp_path / "one")["state"] == "done"
    outcome = run_toy(tmp_path / "many", nan_positions=(4, 9, 14), on_nonfinite="skip", max_interventions=2)
    assert (outcome.status, outcome.step) == ("diverged", 15)
    assert "more than 2 interventions" in outcome.reason
    assert [event["step"] for event in events(tmp_path / "many", "skip")] == [5, 10, 15]


def test_spike_is_an_event_with_its_numbers(tmp_path: Path):
    run_toy(tmp_path / "run", spike_positions=(17,), spike_window=8, on_spike="clip")
    [spike] = events(tmp_path / "run", "spike")
    assert spike["step"] == 18
    assert spike["loss"] > spike["loss_threshold"]
    assert spike["action"] == "clipped"
    assert [event["step"] for event in events(tmp_path / "run", "clip")] == [18]
    assert (tmp_path / "run" / spike["incident"] / "window.jsonl").is_file()


def test_run_that_goes_on_with_nan_counts_as_diverged_and_does_not_flood_the_events(tmp_path: Path):
    outcome = run_toy(tmp_path / "run", nan_positions=(10,), on_nonfinite="log", steps=40)
    assert (outcome.status, outcome.step, outcome.exit_code) == ("diverged", 40, EXIT_DIVERGED)
    assert [event["step"] for event in events(tmp_path / "run", "nonfinite")] == [11, 12, 14, 18, 26]


def test_run_that_ends_blown_up_counts_as_diverged(tmp_path: Path):
    class Lost(ToyExperiment):
        def batch(self, position: int) -> Any:
            batch = super().batch(position)
            return {**batch, "y": batch["y"] + (1e4 if position >= 40 else 0.0)}

    outcome = run_toy(tmp_path / "run", experiment=Lost, steps=80, spike_window=8, log_every=20)
    assert (outcome.status, outcome.step, outcome.exit_code) == ("diverged", 80, EXIT_DIVERGED)
    assert "did not come back" in outcome.reason
    [blowup] = events(tmp_path / "run", "blowup")
    assert 40 < blowup["step"] < 80
    assert "params_sha256" in status(tmp_path / "run")


# --- rollback -------------------------------------------------------------------------------------------------


class Without(ToyExperiment):
    """The same data as the toy's, with some batches taken out."""

    left_out: range

    def batch(self, position: int) -> Any:
        return super().batch(position if position < self.left_out.start else position + len(self.left_out))


@pytest.mark.parametrize(("bad", "target"), [(3, 0), (13, 12), (18, 12), (17, 12)])
def test_rollback_is_the_course_without_the_batches_since_the_checkpoint(tmp_path: Path, bad: int, target: int):
    """Bitwise: as if the batches of the steps from the checkpoint to the bad one had never been there.

    18 is a step at which a checkpoint is due: it must not be saved, nor be the target.
    """

    class Reference(Without):
        left_out = range(target, bad)

    run_toy(tmp_path / "reference", experiment=Reference, on_nonfinite="rollback")
    told = Told()
    outcome = run_toy(tmp_path / "run", nan_positions=(bad - 1,), on_nonfinite="rollback", told=told)
    assert outcome.status == "done"
    [rollback] = events(tmp_path / "run", "rollback")
    assert (rollback["step"], rollback["to"], rollback["skipped_batches"]) == (bad, target, bad - target)
    assert "not finite" in rollback["message"]
    assert "rollback" in told.kinds()
    assert status(tmp_path / "run")["params_sha256"] == status(tmp_path / "reference")["params_sha256"]
    steps = [row["step"] for row in rows(tmp_path / "run")]
    assert steps == [5, 10, 15, 20, 24]


def test_rollbacks_add_up_and_are_limited(tmp_path: Path):
    """After the first rollback the second bad batch comes at an earlier step; a third is one too many."""
    nan: dict[str, Any] = {"nan_positions": (7, 9, 12), "on_nonfinite": "rollback"}
    outcome = run_toy(tmp_path / "three", **nan)
    assert outcome.status == "done"
    found = [(event["step"], event["to"], event["rollbacks"]) for event in events(tmp_path / "three", "rollback")]
    # To 6 and on with position 8; position 9 is step 8: to 6 and on with 10; position 12 is step 9; on with 13.
    assert found == [(8, 6, 1), (8, 6, 2), (9, 6, 3)]
    outcome = run_toy(tmp_path / "two", **nan, max_interventions=2)
    assert (outcome.status, outcome.step, outcome.exit_code) == ("diverged", 9, EXIT_DIVERGED)
    assert "2 rollbacks (--max-interventions) did not help" in outcome.reason


def test_best_before_a_rollback_is_still_there_after_it(tmp_path: Path):
    """The best of the abandoned course is given up, and the one that was best at the target had been kept."""

    class Scored(ToyExperiment):
        def evaluate(self, state: Any, step: int, context: Any) -> Any:
            evaluation = super().evaluate(state, step, context)
            first_course = int(state.monitor.clock("steps")) == step and not (tmp_path / "rolled").exists()
            score = {3: 0.5, 6: 0.9, 9: 0.1 if first_course else 0.8}.get(step, 0.7)
            return type(evaluation)(scalars={"eval/score": score})

        def batch(self, position: int) -> Any:
            if position == 11:
                (tmp_path / "rolled").touch()
            return super().batch(position)

    run_toy(
        tmp_path / "run",
        experiment=Scored,
        nan_positions=(10,),
        on_nonfinite="rollback",
        eval_every=3,
        checkpoint_every=6,
        keep_checkpoints=1,
        best_metric="eval/score",
        inner_steps=1,
    )
    assert [event["to"] for event in events(tmp_path / "run", "rollback")] == [6]
    assert Checkpoints(tmp_path / "run").steps == [3, 24], "3 is the best of the course that counts"


# --- failures -------------------------------------------------------------------------------------------------


def test_unexpected_error_leaves_its_reason_and_the_run_can_go_on(tmp_path: Path):
    class Crashing(ToyExperiment):
        def batch(self, position: int) -> Any:
            if position == 14:
                raise KeyError("a bug")
            return super().batch(position)

    run_toy(tmp_path / "reference")
    with pytest.raises(KeyError):
        run_toy(tmp_path / "run", experiment=Crashing)
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["reason"]) == ("failed", "KeyError: 'a bug'")
    incidents = [json.loads(path.read_text()) for path in (tmp_path / "run" / "incidents").glob("*/incident.json")]
    assert [incident["kind"] for incident in incidents] == ["crash"]
    assert run_toy(tmp_path / "run").status == "done"
    assert status(tmp_path / "run")["params_sha256"] == status(tmp_path / "reference")["params_sha256"]


@pytest.mark.parametrize("file", ["metrics.jsonl", "events.jsonl", "status.json"])
def test_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str):
    """Rows are written up to the middle of one, as on a real full disk."""
    run_toy(tmp_path / "reference", eval_every=4)
    written = 0
    original = Path.open

    class Full:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def write(self, content: bytes) -> int:
            nonlocal written
            written += 1
            if written > 3:
                self.stream.write(content[:20])
                self.stream.flush()
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.stream.write(content)

        def __enter__(self) -> Any:
            self.stream.__enter__()
            return self

        def __exit__(self, *error: Any) -> Any:
            return self.stream.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

    def opened(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        stream = original(self, mode, *rest, **options)
        return Full(stream) if mode in ("ab", "wb") and file in self.name else stream

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "HEARTBEAT_SECONDS", 0.0)
        patch.setattr(Path, "open", opened)
        with pytest.raises(RunDirectoryError, match="the disk is full") as failure:
            run_toy(tmp_path / "run", eval_every=4)
    assert "\n" not in str(failure.value)
    assert status(tmp_path / "run")["state"] == "failed"
    assert "the disk is full" in status(tmp_path / "run")["reason"]
    assert run_toy(tmp_path / "run", eval_every=4).status == "done"
    assert status(tmp_path / "run")["params_sha256"] == status(tmp_path / "reference")["params_sha256"]
    assert [row["step"] for row in rows(tmp_path / "run")] == [row["step"] for row in rows(tmp_path / "reference")]


def test_other_data_under_the_same_name_is_refused(tmp_path: Path):
    class Other(ToyExperiment):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.data_spec = ToySpec(fingerprint="fedcba9876543210")

    class Failing(ToyExperiment):
        def batch(self, position: int) -> Any:
            raise RunDirectoryError("ends early")

    with pytest.raises(RunDirectoryError, match="ends early"):
        run_toy(tmp_path / "run", experiment=Failing)
    with pytest.raises(ConfigChangedError, match=r"fingerprint of 'toy' was 0123456789ab, now it is fedcba987654"):
        run_toy(tmp_path / "run", experiment=Other)


# --- what the experiment tells ----------------------------------------------------------------------------------------


def test_an_experiment_may_tell_of_its_own_decisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each step's events stand in events.jsonl under that step, once, though rows are fewer."""

    def tell(self: ToyExperiment, metrics: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"kind": "small-loss", "loss": metrics["train/loss"]}] if metrics["train/loss"] < told_below else []

    run_toy(tmp_path / "each", log_every=1)
    losses = {row["step"]: row["train/loss"] for row in rows(tmp_path / "each")}
    told_below = float(np.median(list(losses.values())))
    monkeypatch.setattr(ToyExperiment, "events", tell, raising=False)
    run_toy(tmp_path / "run", log_every=5)
    found = {event["step"]: event["loss"] for event in events(tmp_path / "run", "small-loss")}
    assert found == {step: loss for step, loss in losses.items() if loss < told_below}
    assert 0 < len(found) < len(losses)
