"""The run directory: what it refuses, what it keeps, and that a reader never sees half of anything."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stabletrain.errors import EXIT_USAGE, ConfigChangedError, RunDirectoryError
from stabletrain.training.config import read_toml
from stabletrain.training.lock import LOCK_FILE
from stabletrain.training.run_directory import RunDirectory, now
from tests.training.toy import ToyConfig


def create(path: Path, *, family: str = "toy", fresh: bool = False, **values: Any) -> RunDirectory:
    return RunDirectory.create(path, family, ToyConfig(**values), fresh=fresh)


def create_and_release(path: Path, **values: Any) -> RunDirectory:
    run = create(path, **values)
    run.release()
    return run


def test_config_is_written_whole_and_read_back(tmp_path: Path):
    create_and_release(tmp_path / "a" / "run", nan_positions=(1, 2), learning_rate=0.5)
    stored = read_toml(tmp_path / "a" / "run" / "config.toml")
    assert (stored["family"], stored["nan_positions"], stored["learning_rate"]) == ("toy", [1, 2], 0.5)
    opened = RunDirectory.open(tmp_path / "a" / "run")
    assert opened.family == "toy"
    assert opened.config_values["learning_rate"] == 0.5


def test_same_command_continues_and_a_change_of_what_may_change_is_known(tmp_path: Path):
    create_and_release(tmp_path / "run")
    assert create_and_release(tmp_path / "run").changed == {}
    assert create_and_release(tmp_path / "run", keep_checkpoints=7).changed == {"keep_checkpoints": (2, 7)}
    assert create_and_release(tmp_path / "run", keep_checkpoints=7).changed == {}


def test_changed_config_is_refused_key_by_key(tmp_path: Path):
    create_and_release(tmp_path / "run")
    before = (tmp_path / "run" / "config.toml").read_bytes()
    with pytest.raises(ConfigChangedError) as refused:
        create(tmp_path / "run", seed=3, learning_rate=0.5, best_metric="eval/loss")
    message = str(refused.value)
    assert "seed: 0 -> 3" in message
    assert "learning_rate: 0.01 -> 0.5" in message
    assert "best_metric" not in message, "an option that may change is no reason to refuse"
    assert "--fresh" in message
    assert refused.value.exit_code == EXIT_USAGE
    assert (tmp_path / "run" / "config.toml").read_bytes() == before


def test_other_families_files_and_strange_folders_are_refused(tmp_path: Path):
    create_and_release(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=r"run of 'toy', not of 'gan'"):
        create(tmp_path / "run", family="gan")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(RunDirectoryError, match="not empty and is no run"):
        create(tmp_path / "photos")
    with pytest.raises(RunDirectoryError, match="is a file"):
        create(tmp_path / "photos" / "cat.png")
    with pytest.raises(RunDirectoryError, match="cannot write the run directory"):
        create(tmp_path / "photos" / "cat.png" / "run")
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        RunDirectory.open(tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.png"]


def test_what_a_killed_creation_leaves_is_not_in_the_way(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).touch()
    (tmp_path / "run" / ".config.toml.tmp").write_text("fami")
    create_and_release(tmp_path / "run")
    assert read_toml(tmp_path / "run" / "config.toml")["family"] == "toy"


def test_fresh_moves_aside_and_never_deletes(tmp_path: Path):
    for seed in range(3):
        create_and_release(tmp_path / "run", seed=seed, fresh=True)
    seeds = {path.name: read_toml(path / "config.toml")["seed"] for path in tmp_path.iterdir()}
    assert seeds == {"run": 2, "run.old-1": 0, "run.old-2": 1}


# --- one process at a time ------------------------------------------------------------------------------------


def test_two_at_once_are_refused(tmp_path: Path):
    run = create(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=f"in use by process {os.getpid()} on "):
        create(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="in use"):
        create(tmp_path / "run", fresh=True)
    run.release()
    create_and_release(tmp_path / "run")


def test_lock_of_a_killed_process_is_free(tmp_path: Path):
    script = (
        "import sys, time; from pathlib import Path; from tests.training.test_run_directory import create\n"
        "run = create(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "run"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(RunDirectoryError, match=f"in use by process {process.pid}"):
        create(tmp_path / "run")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == process.pid, "it could not tidy up"
    create_and_release(tmp_path / "run")


def test_another_machine_holds_a_run_while_its_heart_beats(tmp_path: Path):
    run = create_and_release(tmp_path / "run")
    (run.path / LOCK_FILE).write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    run.write_status("running", 3, 10)
    with pytest.raises(RunDirectoryError, match="in use by process 1 on elsewhere"):
        create(tmp_path / "run")
    status = run.status | {"heartbeat": "2020-01-01T00:00:00.000+00:00"}
    run.write_file("status.json", json.dumps(status).encode())
    create_and_release(tmp_path / "run")


def test_without_locks_in_the_file_system_a_living_process_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    run = create(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=f"in use by process {os.getpid()}"):
        create(tmp_path / "run")
    run.release()
    create_and_release(tmp_path / "run")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (run.path / LOCK_FILE).write_text(json.dumps({"pid": dead.pid, "host": socket.gethostname()}))
    create_and_release(tmp_path / "run")


# --- files ----------------------------------------------------------------------------------------------------


def test_nonfinite_values_are_null_and_named(tmp_path: Path):
    run = create_and_release(tmp_path / "run")
    returned = run.append_row({"step": 1, "b": float("nan"), "a": float("-inf"), "c": 0.1})
    assert returned == {"step": 1, "a": None, "b": None, "c": 0.1, "nonfinite": ["a", "b"]}
    assert run.rows() == [returned]
    json.loads((run.path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_torn_last_line_is_left_out_and_cut_off(tmp_path: Path):
    run = create_and_release(tmp_path / "run")
    for step in (1, 2, 3):
        run.append_row({"step": step})
    with (run.path / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step": 4, "train/lo')
    assert [row["step"] for row in run.rows()] == [1, 2, 3]
    assert run.cut_rows(after=2) == 1
    run.append_row({"step": 3, "again": True})
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'


def test_damage_within_a_file_is_an_error_and_not_passed_over(tmp_path: Path):
    run = create_and_release(tmp_path / "run")
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(RunDirectoryError, match=r"metrics.jsonl, line 2 is damaged"):
        run.rows()


def test_events_are_cut_by_count_but_for_those_about_the_process(tmp_path: Path):
    """After a rollback events do not stand in the order of their steps, so the step cannot say what to cut."""
    run = create_and_release(tmp_path / "run")
    for step, kind in [(5, "checkpoint"), (9, "rollback"), (6, "checkpoint"), (6, "resume"), (7, "spike")]:
        run.append_event(step, kind)
    run.cut_events(after=3, but=("resume",))
    assert [(event["step"], event["kind"]) for event in run.events()] == [
        (5, "checkpoint"),
        (9, "rollback"),
        (6, "checkpoint"),
        (6, "resume"),
    ]


def test_full_disk_is_one_readable_line_and_old_content_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = create_and_release(tmp_path / "run")
    run.write_file("eval/grid.png", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunDirectoryError, match="the disk is full") as failure:
        run.write_file("eval/grid.png", b"new content")
    assert "\n" not in str(failure.value)
    assert (run.path / "eval" / "grid.png").read_bytes() == b"old"


def test_failure_is_noted_even_when_there_is_no_room_for_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = create_and_release(tmp_path / "run")
    run.write_status("running", 3, 10, "a reason which is longer than the next one", detail=1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    run.write_status("failed", 3, 10, "the disk is full")
    assert (run.status["state"], run.status["reason"]) == ("failed", "the disk is full")


def test_time_is_utc():
    assert now().endswith("+00:00")
