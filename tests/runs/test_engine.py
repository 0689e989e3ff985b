"""The local engine against jobs that finish, die, diverge, refuse, or are interrupted: real processes, no mocks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from stabletrain.errors import EXIT_INTERRUPTED, Interrupted
from stabletrain.runs.engine import (
    Job,
    JobFailedError,
    JobStatus,
    LocalEngine,
    job_status,
    parse_seeds,
    read_study,
    write_study,
)

PROGRAM = textwrap.dedent(
    """
    import json, os, pathlib, signal, sys, time
    behaviour, _, folder = sys.argv[1:]
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    starts = len(list(path.glob("start-*")))
    (path / f"start-{starts}").write_text(str(sorted(os.sched_getaffinity(0))))
    def status(state):
        (path / "status.json").write_text(json.dumps(dict(state=state, step=3, total_steps=9)))
    def preempted(number, frame):
        status("preempted")
        sys.exit(75)
    signal.signal(signal.SIGTERM, preempted)
    status("running")
    if behaviour == "dies-once" and starts == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "always-dies":
        print("stabletrain: error: it is broken")
        sys.exit(1)
    if behaviour == "refuses":
        print("stabletrain: error: unknown option 'x'")
        sys.exit(2)
    if behaviour == "waits" and starts == 0:
        time.sleep(60)
    if behaviour == "diverges":
        status("diverged")
        sys.exit(4)
    status("done")
    """
)


@pytest.fixture
def engine(tmp_path: Path) -> LocalEngine:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    return LocalEngine(workers=2, command=(sys.executable, str(program)), restarts=2)


def jobs(folder: Path, *behaviours: str) -> list[Job]:
    return [Job(name, 0, folder / "study" / f"{name}-s0", (name,)) for name in behaviours]


def quiet(_: list[JobStatus]) -> None:
    return None


def starts(job: Job) -> int:
    return len(list(job.run_dir.glob("start-*")))


def test_a_job_that_was_killed_is_started_again_and_a_diverged_one_is_a_result(
    engine: LocalEngine, tmp_path: Path
) -> None:
    study = jobs(tmp_path, "works", "dies-once", "diverges")
    states = {status.job.row: status.state for status in engine.run(study, quiet)}
    assert states == {"works": "done", "dies-once": "done", "diverges": "diverged"}
    assert [starts(job) for job in study] == [1, 2, 1]


def test_a_second_call_runs_only_what_is_missing(engine: LocalEngine, tmp_path: Path) -> None:
    study = jobs(tmp_path, "works", "diverges")
    engine.run(study, quiet)
    more = [*study, *jobs(tmp_path, "late")]
    engine.run(more, quiet)
    assert [starts(job) for job in more] == [1, 1, 1]


def test_a_job_that_always_dies_fails_alone_with_its_last_line(engine: LocalEngine, tmp_path: Path) -> None:
    broken, fine = engine.run(jobs(tmp_path, "always-dies", "works"), quiet)
    assert (broken.state, fine.state) == ("failed", "done")
    assert "it is broken" in broken.reason
    assert starts(broken.job) == 3


def test_a_job_that_needs_another_starts_when_that_has_finished(engine: LocalEngine, tmp_path: Path) -> None:
    first, second = jobs(tmp_path, "works", "late")
    needing = replace(first, row="needs", run_dir=second.run_dir.with_name("needs-s0"), after=second.run_dir)
    order: list[str] = []

    def running(statuses: list[JobStatus]) -> None:
        states = {status.job.row: status.state for status in statuses}
        if states["needs"] != "missing":
            order.append(states["late"])

    assert [status.state for status in engine.run([needing, first, second], running)] == ["done"] * 3
    assert set(order) == {"done"}
    write_study(tmp_path / "study", "a study", [needing, second])
    assert read_study(tmp_path / "study")[1][0].after == second.run_dir


def test_a_job_that_needs_one_which_fails_is_not_run(engine: LocalEngine, tmp_path: Path) -> None:
    broken, fine = jobs(tmp_path, "always-dies", "works")
    needing = replace(fine, row="needs", run_dir=broken.run_dir.with_name("needs-s0"), after=broken.run_dir)
    last = engine.run([needing, broken, fine], quiet)
    assert [status.state for status in last] == ["failed", "failed", "done"]
    assert "always-dies-s0" in last[0].reason
    assert starts(needing) == 0


def test_a_bad_configuration_stops_the_study_at_once(engine: LocalEngine, tmp_path: Path) -> None:
    with pytest.raises(JobFailedError, match="unknown option 'x'"):
        engine.run(jobs(tmp_path, "refuses", "works"), quiet)


def test_interrupting_the_engine_lets_running_jobs_checkpoint(engine: LocalEngine, tmp_path: Path) -> None:
    study = jobs(tmp_path, "waits")
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    begun = time.monotonic()
    with pytest.raises(Interrupted) as caught:
        engine.run(study, quiet)
    assert caught.value.exit_code == EXIT_INTERRUPTED
    assert time.monotonic() - begun < 30
    assert job_status(study[0]).state == "preempted"
    assert [status.state for status in engine.run(study, quiet)] == ["done"]


def test_workers_share_the_cores(engine: LocalEngine, tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core has no shares")
    study = jobs(tmp_path, "works", "late")
    engine.run(study, quiet)
    used = [set(json.loads((job.run_dir / "start-0").read_text())) for job in study]
    assert used[0] | used[1] == set(cores)
    assert not used[0] & used[1]


@pytest.mark.parametrize(("text", "seeds"), [("0-4", [0, 1, 2, 3, 4]), ("1,2,5-7,2", [1, 2, 5, 6, 7]), ("3", [3])])
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1-", "4-1", "-1", "1.5", "4294967296", "0-5000000000000"])
def test_seeds_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="seeds"):
        parse_seeds(text)


def test_a_study_file_survives_being_moved(tmp_path: Path) -> None:
    study = jobs(tmp_path, "works", "late")
    write_study(tmp_path / "study", "test", study, scale="small")
    (tmp_path / "study").rename(tmp_path / "elsewhere")
    facts, read = read_study(tmp_path / "elsewhere")
    assert facts == {"name": "test", "scale": "small"}
    assert [job.run_dir for job in read] == [tmp_path / "elsewhere" / f"{name}-s0" for name in ("works", "late")]


def test_a_damaged_study_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"name": "x"')
    with pytest.raises(JobFailedError, match="damaged"):
        read_study(tmp_path)


ELSEWHERE = textwrap.dedent(
    """
    import json, pathlib, sys, time
    from stabletrain.training.lock import RunLock
    path, ending = pathlib.Path(sys.argv[1]), sys.argv[2]
    lock = RunLock(path)
    lock.acquire()
    print("held", flush=True)
    time.sleep(1.0)
    if ending == "done":
        (path / "status.json").write_text(json.dumps(dict(state="done", step=9, total_steps=9)))
    """
)


@pytest.mark.parametrize(("ending", "started"), [("done", 0), ("killed", 1)])
def test_a_run_that_another_process_is_at_work_on_is_waited_for(
    engine: LocalEngine, tmp_path: Path, ending: str, started: int
) -> None:
    """An engine that was killed leaves its jobs running; the next call neither disturbs nor fails them."""
    held, free = jobs(tmp_path, "works", "also-works")
    held.run_dir.mkdir(parents=True)
    command = [sys.executable, "-c", ELSEWHERE, str(held.run_dir), ending]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        ended = engine.run([held, free], quiet)
    assert [status.state for status in ended] == ["done", "done"]
    assert (starts(held), starts(free)) == (started, 1)
