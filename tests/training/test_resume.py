"""Exact resume: a run that was stopped or killed, however often and whenever, ends as if nothing had happened.

"The same" is every leaf of the state and every row of metrics.jsonl to the last bit, but for `time` and `perf/*`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stabletrain.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, CheckpointError, ConfigChangedError, Interrupted
from stabletrain.training import loop
from stabletrain.training.checkpoints import Checkpoints
from stabletrain.training.lock import LOCK_FILE
from stabletrain.training.run_directory import RunDirectory
from stabletrain.training.signals import StopRequest
from tests.training.test_checkpoints import truncate
from tests.training.toy import PARTS_COUNT, StopAfter, Told, ToyExperiment, run_toy

BUSY: dict[str, Any] = {"log_every": 5, "eval_every": 8, "checkpoint_every": 6, "best_metric": "eval/loss"}
"""Rows, evaluations and checkpoints at different steps; 24 steps of 8 examples are almost five epochs of 40."""
ROLLING: dict[str, Any] = {**BUSY, "nan_positions": (10, 16), "on_nonfinite": "rollback"}


def comparable_rows(path: Path) -> list[dict[str, Any]]:
    rows = RunDirectory.open(path).rows()
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")} for row in rows]


def assert_same(path: Path, reference: Path) -> None:
    run, other = RunDirectory.open(path), RunDirectory.open(reference)
    assert run.status["state"] == other.status["state"] == "done"
    assert run.status["params_sha256"] == other.status["params_sha256"]
    assert comparable_rows(path) == comparable_rows(reference)
    assert all(any(name.startswith("perf/") for name in row) for row in run.rows()), "no row without its timing"
    steps = [row["step"] for row in run.rows()]
    assert steps == sorted(set(steps)), "a step stands there twice"
    for kind in ("rollback", "nonfinite", "best"):
        seen, wanted = ([(e["step"], e.get("to")) for e in r.events() if e["kind"] == kind] for r in (run, other))
        assert seen == wanted
    files, wanted_files = ({f.name: f.read_bytes() for f in (p / "eval").iterdir()} for p in (path, reference))
    assert files == wanted_files
    assert not list(path.rglob("*.orbax-checkpoint-tmp"))
    clock, wanted_clock = ((c := Checkpoints(p)).clock(c.steps[-1]) for p in (path, reference))
    for name in ("step", "offset", "rollbacks"):
        assert clock[name] == wanted_clock[name]
    assert Checkpoints(path).best == Checkpoints(reference).best


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nothing happened to."""
    folder = tmp_path_factory.mktemp("references")
    run_toy(folder / "busy", **BUSY)
    run_toy(folder / "rolling", **ROLLING)
    run_toy(folder / "plain", **BUSY, plain=True)
    return {path.name: path for path in folder.iterdir()}


# --- stopping -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "looks"), [("busy", 4), ("busy", 7), ("rolling", 11), ("plain", 6)])
def test_stopped_again_and_again_ends_the_same(tmp_path: Path, references: dict[str, Path], name: str, looks: int):
    """Each session ends at the n-th safe point, in training or in an evaluation.

    A session of the rolling run must get as far as the checkpoint after the rollback, or it repeats it for ever.
    """
    options = {"busy": BUSY, "rolling": ROLLING, "plain": {**BUSY, "plain": True}}[name]
    sessions = 0
    while True:
        sessions += 1
        outcome = run_toy(tmp_path / "run", stop=StopAfter(looks), **options)
        if outcome.status != "preempted":
            break
        assert outcome.exit_code == EXIT_PREEMPTED
        assert RunDirectory.open(tmp_path / "run").status["state"] == "preempted"
        assert sessions < 40
    assert sessions > 2
    assert_same(tmp_path / "run", references[name])


def test_stopped_in_an_evaluation_keeps_finished_parts_and_writes_the_row_once(
    tmp_path: Path, references: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    class StopsInEvaluation(StopRequest):
        def __init__(self) -> None:
            super().__init__()
            self.parts = 0

        def working(self) -> None:
            self.parts += 1
            if self.parts == 3:
                self.exit_code = EXIT_INTERRUPTED

    stop = StopsInEvaluation()

    class Telling(Told):
        def working(self, label: str, done: int, total: int) -> None:
            stop.working()

    monkeypatch.setenv(PARTS_COUNT, str(tmp_path / "count"))
    outcome = run_toy(tmp_path / "run", stop=stop, told=Telling(), **BUSY)
    assert (outcome.status, outcome.step, outcome.exit_code) == ("preempted", 8, EXIT_INTERRUPTED)
    assert [row["step"] for row in RunDirectory.open(tmp_path / "run").rows()] == [5]
    assert len((tmp_path / "count").read_text()) == 2, "two of three parts were done"
    assert run_toy(tmp_path / "run", **BUSY).status == "done"
    assert len((tmp_path / "count").read_text()) == 3 * 3, "and are not done again"
    assert_same(tmp_path / "run", references["busy"])
    assert not list((tmp_path / "run" / "eval").glob(".*"))


def test_sessions_are_recorded_and_their_time_adds_up(tmp_path: Path):
    seconds = []
    for looks in (3, 3, 1000):
        told = Told()
        run_toy(tmp_path / "run", stop=StopAfter(looks), told=told)
        seconds.append(RunDirectory.open(tmp_path / "run").record["wall_seconds"])
    assert seconds == sorted(set(seconds))
    sessions = RunDirectory.open(tmp_path / "run").record["sessions"]
    assert [session["as"] for session in sessions] == ["preempted", "preempted", "done"]
    assert sessions[0]["last_step"] == sessions[1]["first_step"] > 0
    assert sessions[1]["last_step"] == sessions[2]["first_step"] == told.first_step
    assert any(f"resumed from the checkpoint of step {told.first_step}" in note for note in told.notes)
    kinds = [event["kind"] for event in RunDirectory.open(tmp_path / "run").events()]
    assert (kinds.count("resume"), kinds.count("interrupted")) == (2, 2)


# --- killing --------------------------------------------------------------------------------------------------


class KilledError(BaseException):
    """Stands for SIGKILL: nothing after it is executed."""


def kill_at(write: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the n-th write to the run directory the last: it is half done, or done and not followed by anything."""
    count = 0

    def dying(original: Any, torn: bool) -> Any:
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == write and torn and arguments[0].endswith(".jsonl"):
                with (self.path / arguments[0]).open("ab") as stream:
                    stream.write(b'{"step": 3, "tor')
            elif count <= write:
                done = original(self, *arguments, **options)
                if count < write:
                    return done
            raise KilledError

        return call

    monkeypatch.setattr(RunDirectory, "_append", dying(RunDirectory._append, torn=True))
    monkeypatch.setattr(RunDirectory, "write_file", dying(RunDirectory.write_file, torn=False))
    monkeypatch.setattr(Checkpoints, "save", dying(Checkpoints.save, torn=False))
    monkeypatch.setattr(Checkpoints, "discard_after", dying(Checkpoints.discard_after, torn=False))
    # A save under way goes on in its thread, which does not die with a simulated kill: it is let finish.
    monkeypatch.setattr(loop._Session, "failed", lambda self, error: self.checkpoints.wait())


@pytest.mark.parametrize(("name", "first"), [*(("rolling", n) for n in range(1, 8)), ("busy", 3), ("busy", 5)])
def test_killed_at_any_write_ends_the_same(
    tmp_path: Path, references: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, first: int
):
    """Killed at the n-th write, and the next session at its n-th again, and so on, each a little later."""
    options = BUSY if name == "busy" else ROLLING
    for write in range(first, 1000, 7):
        with monkeypatch.context() as patch:
            kill_at(write, patch)
            try:
                outcome = run_toy(tmp_path / "run", **options)
                break
            except KilledError:
                continue
    assert outcome.status == "done"
    assert_same(tmp_path / "run", references[name])
    assert len(RunDirectory.open(tmp_path / "run").record["sessions"]) >= 4


def toy_command(path: Path, **options: Any) -> list[str]:
    arguments = [sys.executable, "-m", "tests.training.toy", "--out", str(path)]
    for name, value in options.items():
        arguments += [
            f"--{name.replace('_', '-')}",
            ",".join(map(str, value)) if isinstance(value, tuple) else str(value),
        ]
    return arguments


def start(path: Path, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", PARTS_COUNT: str(path.with_name("count"))}
    return subprocess.Popen(
        toy_command(path, **options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


def wait_for(path: Path, text: str) -> None:
    """Until a file of the run holds a text."""
    deadline = time.monotonic() + 60
    while not (path.is_file() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{path} never held {text!r}"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def process_reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a process of its own that nothing happened to."""
    path = tmp_path_factory.mktemp("process") / "reference"
    process = start(path, **BUSY)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()[-2000:]
    return path


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_processes_killed_at_random_moments_end_the_same(tmp_path: Path, process_reference: Path, seed: int):
    """SIGKILL to a real process, three times, then left alone. `benchmarks/kill_resume.py` does so twenty times."""
    moments = random.Random(seed)
    path = tmp_path / "run"
    for number in range(3):
        process = start(path, **BUSY, pause=0.02)
        wait_for(path / "status.json", '"running"') if number == 0 else wait_for(path / LOCK_FILE, str(process.pid))
        time.sleep(moments.uniform(0.0, 1.5))
        process.kill()
        process.communicate()
    process = start(path, **BUSY)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()[-2000:]
    assert_same(path, process_reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "where"),
    [
        (signal.SIGTERM, EXIT_PREEMPTED, "training"),
        (signal.SIGTERM, EXIT_PREEMPTED, "evaluation"),
        (signal.SIGINT, EXIT_INTERRUPTED, "training"),
    ],
)
def test_signals_checkpoint_and_end_with_their_code(
    tmp_path: Path, process_reference: Path, number: signal.Signals, code: int, where: str
):
    path = tmp_path / "run"
    process = start(path, **BUSY, pause=0.05 if where == "training" else 0.3)
    if where == "training":
        wait_for(path / "metrics.jsonl", '"step": 5')
    else:
        wait_for(tmp_path / "count", ".")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err.decode()[-2000:]
    status = RunDirectory.open(path).status
    assert status["state"] == "preempted"
    assert bool(list(path.glob("eval/.*.partial"))) == (where == "evaluation")
    assert Checkpoints(path).steps[-1] == status["step"], "the checkpoint is on disk"
    process = start(path, **BUSY)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()[-2000:]
    assert_same(path, process_reference)


@pytest.mark.slow
def test_second_signal_ends_at_once(tmp_path: Path):
    """With a batch that takes a minute the first signal cannot be obeyed yet."""
    path = tmp_path / "run"
    process = start(path, pause=60)
    wait_for(path / "status.json", '"running"')
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    assert process.returncode == -signal.SIGTERM


def test_stop_request_puts_former_handlers_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        with stop:
            assert signal.getsignal(signal.SIGTERM) != before
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(Interrupted) as interrupted:
            stop.check()
    assert interrupted.value.exit_code == EXIT_PREEMPTED
    assert signal.getsignal(signal.SIGTERM) == before


# --- what changed in between ----------------------------------------------------------------------------------


def test_changed_config_and_seed_stop_with_the_difference(tmp_path: Path):
    run_toy(tmp_path / "run", stop=StopAfter(8))
    with pytest.raises(ConfigChangedError, match=r"learning_rate: 0.01 -> 0.02"):
        run_toy(tmp_path / "run", learning_rate=0.02)
    with pytest.raises(ConfigChangedError, match=r"seed: 0 -> 1"):
        run_toy(tmp_path / "run", seed=1)
    assert run_toy(tmp_path / "run").status == "done"


def test_options_that_may_change_are_noted(tmp_path: Path, references: dict[str, Path]):
    """Another number of devices gives the same to rounding; how often to save changes nothing."""
    run_toy(tmp_path / "run", stop=StopAfter(8), **BUSY)
    told = Told()
    run_toy(tmp_path / "run", told=told, **(BUSY | {"checkpoint_every": 9, "devices": 2}))
    notes = "; ".join(told.notes)
    assert "--checkpoint-every was 6, is now 9" in notes
    assert "now 2 devices" in notes
    assert "agree to rounding, not to the bit" in notes
    kinds = told.kinds()
    assert (kinds.count("changed-option"), kinds.count("changed-devices")) == (2, 1)
    for row, wanted in zip(comparable_rows(tmp_path / "run"), comparable_rows(references["busy"]), strict=True):
        # Float32 sums in another order, over two dozen steps.
        assert row["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_damaged_checkpoints_fall_back_say_so_and_end_the_same(tmp_path: Path, references: dict[str, Path], count: int):
    path = tmp_path / "run"

    class Crashing(ToyExperiment):
        def batch(self, position: int) -> Any:
            if position == 20:
                raise ConnectionError
            return super().batch(position)

    with pytest.raises(ConnectionError):
        run_toy(path, experiment=Crashing, **BUSY, keep_checkpoints=3)
    steps = Checkpoints(path).steps
    damaged = steps[-count:]
    for step in damaged:
        truncate(path / "checkpoints" / str(step))
    told = Told()
    run_toy(path, told=told, **BUSY, keep_checkpoints=3)
    assert told.first_step == steps[-count - 1]
    for step in damaged:
        assert any(f"the checkpoint of step {step} is damaged" in note for note in told.notes)
        assert (path / "checkpoints" / f"{step}.damaged").is_dir()
    events = [e["damaged"] for e in RunDirectory.open(path).events() if e["kind"] == "damaged-checkpoint"]
    assert events == damaged[::-1]
    assert_same(path, references["busy"])


def test_only_damaged_checkpoints_are_an_error_and_lose_no_row(tmp_path: Path):
    run_toy(tmp_path / "run", stop=StopAfter(12), **BUSY)
    rows = comparable_rows(tmp_path / "run")
    assert rows
    for step in Checkpoints(tmp_path / "run").steps:
        truncate(tmp_path / "run" / "checkpoints" / str(step))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="--fresh"):
            run_toy(tmp_path / "run", **BUSY)
        assert comparable_rows(tmp_path / "run") == rows
        assert RunDirectory.open(tmp_path / "run").status["state"] == "failed"
    assert run_toy(tmp_path / "run", fresh=True, **BUSY).status == "done"
    assert comparable_rows(tmp_path / "run.old-1") == rows


def test_checkpoint_survives_as_json(tmp_path: Path):
    """The clock in a checkpoint is what the loop had, to the bit: Python's floats survive JSON exactly."""
    run_toy(tmp_path / "run", stop=StopAfter(5), log_every=1000)
    checkpoints = Checkpoints(tmp_path / "run")
    clock = checkpoints.clock(checkpoints.steps[-1])
    assert clock["rows"]["steps"] == clock["step"] > 0
    assert json.loads(json.dumps(clock)) == clock
    assert [block["steps"] for block in clock["watch"]["recorder"]["blocks"]] == [list(range(1, clock["step"] + 1))]
