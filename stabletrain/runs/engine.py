"""Many runs as one experiment: a list of commands with their run directories, of which the missing ones are run.

`LocalEngine` starts each job as a process of its own on a share of the machine. A job that is done or that diverged
is a result and is left alone; one that died or was preempted is started again and resumes from its checkpoint.
Another engine (a batch system) offers the same `run`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Protocol

from stabletrain.errors import (
    EXIT_DATA,
    EXIT_DIVERGED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_PREEMPTED,
    EXIT_USAGE,
    Interrupted,
    StableTrainError,
)
from stabletrain.training.config import LARGEST_SEED
from stabletrain.training.lock import in_use

FINISHED = ("done", "diverged")
POLL_SECONDS = 0.2


class JobFailedError(StableTrainError):
    """A job that cannot work: a bad configuration, missing data, or too many deaths."""


@dataclass(frozen=True)
class Job:
    """One run of a study. `arguments` follow `stabletrain`, without `--out`."""

    row: str
    seed: int
    run_dir: Path
    arguments: tuple[str, ...]
    after: Path | None = None
    """The run directory of the job that must have finished before this one starts."""

    @property
    def name(self) -> str:
        """`<row>-s<seed>`."""
        return f"{self.row}-s{self.seed}"


@dataclass(frozen=True)
class JobStatus:
    """What a job's status.json says, and how often it was started in this call."""

    job: Job
    state: str
    step: int = 0
    total: int = 0
    starts: int = 0
    reason: str = ""


class Engine(Protocol):
    """Runs what is missing of a list of jobs."""

    def run(self, jobs: Sequence[Job], report: Callable[[list[JobStatus]], None]) -> list[JobStatus]:
        """Returns when every job is finished or has failed for good; calls `report` at each change."""


def job_status(job: Job, starts: int = 0) -> JobStatus:
    """Reads status.json; `missing` where there is none."""
    path = job.run_dir / "status.json"
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return JobStatus(job, "missing", starts=starts)
    except json.JSONDecodeError:
        return JobStatus(job, "failed", starts=starts, reason=f"{path.name} is damaged")
    return JobStatus(
        job,
        str(status.get("state", "unknown")),
        int(status.get("step", 0)),
        int(status.get("total_steps", 0)),
        starts,
        str(status.get("reason", "")),
    )


@dataclass
class _Running:
    job: Job
    slot: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]


@dataclass
class LocalEngine:
    """Jobs as processes of this machine, `workers` at a time, each on its own accelerator or share of the cores.

    `restarts`: how often a job that died (killed, crashed) is started again in one call.
    """

    workers: int
    restarts: int = 3
    accelerators: Sequence[str] = ()
    command: Sequence[str] = (sys.executable, "-m", "stabletrain")
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, jobs: Sequence[Job], report: Callable[[list[JobStatus]], None]) -> list[JobStatus]:
        """Runs the missing jobs in order. SIGTERM and SIGINT are passed on; running jobs checkpoint before this raises.

        A job that another process is at work on (left behind by an engine that was killed, or started by hand) is
        waited for.

        A job that needs another (`Job.after`) starts when that has finished, and fails when it cannot finish.

        Raises: `JobFailedError` at once for a job with a bad configuration or missing data (each of the others would
        meet the same); `Interrupted` when asked to stop.
        """
        starts = {job.name: 0 for job in jobs}
        failed: dict[str, str] = {}
        waiting = [job for job in jobs if job_status(job).state not in FINISHED]
        running: list[_Running] = []
        signals: list[int] = []
        previous = {number: signal.signal(number, lambda got, _: signals.append(got)) for number in _STOPPING}
        last: list[JobStatus] = []
        try:
            while waiting or running:
                if signals:
                    raise Interrupted(EXIT_INTERRUPTED if signals[0] == signal.SIGINT else EXIT_PREEMPTED)
                while len(running) < self.workers and (free := _first_free(waiting)) is not None:
                    job = waiting.pop(free)
                    if job_status(job).state in FINISHED:  # by another process, which has just let go of it
                        continue
                    starts[job.name] += 1
                    slot = min(set(range(self.workers)) - {item.slot for item in running})
                    running.append(self._start(job, slot))
                for job in _without_hope(waiting, [item.job for item in running]):
                    waiting.remove(job)
                    failed[job.name] = f"needs {job.after}, which has not finished"
                time.sleep(POLL_SECONDS)
                for item in [item for item in running if item.process.poll() is not None]:
                    running.remove(item)
                    item.log.close()
                    again = self._ended(item, starts, failed)
                    if again:
                        waiting.insert(0, item.job)
                now = [self._status(job, starts, failed) for job in jobs]
                if now != last:
                    report(now)
                    last = now
        finally:
            _stop(running)
            for number, handler in previous.items():
                signal.signal(number, handler)
        return [self._status(job, starts, failed) for job in jobs]

    def _status(self, job: Job, starts: Mapping[str, int], failed: Mapping[str, str]) -> JobStatus:
        status = job_status(job, starts[job.name])
        if job.name in failed:
            return JobStatus(job, "failed", status.step, status.total, status.starts, failed[job.name])
        return status

    def _start(self, job: Job, slot: int) -> _Running:
        job.run_dir.parent.mkdir(parents=True, exist_ok=True)
        log = (job.run_dir.parent / f"{job.name}.log").open("ab")
        cores = _share_of_cores(slot, self.workers) if not self.accelerators else None
        environment = {**os.environ, **self.environment}
        if self.accelerators:
            environment["CUDA_VISIBLE_DEVICES"] = self.accelerators[slot % len(self.accelerators)]
        process = subprocess.Popen(
            [*self.command, *job.arguments, "--out", str(job.run_dir)],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # a Ctrl-C in the terminal reaches the engine only, which passes it on once
        )
        if cores:  # before the new interpreter can have started a thread
            os.sched_setaffinity(process.pid, cores)
        return _Running(job, slot, process, log)

    def _ended(self, item: _Running, starts: Mapping[str, int], failed: dict[str, str]) -> bool:
        """True when the job is to be started again."""
        code = item.process.returncode
        if code in (EXIT_OK, EXIT_DIVERGED):
            return False
        tail = last_line(Path(item.log.name))
        if code in (EXIT_USAGE, EXIT_DATA):
            raise JobFailedError(f"{item.job.name} cannot run: {tail}")
        if starts[item.job.name] <= self.restarts:
            return True
        failed[item.job.name] = f"ended with code {code} {starts[item.job.name]} times: {tail}"
        return False


def _first_free(waiting: Sequence[Job]) -> int | None:
    """The index of the first job that can start: no other process is at work on it, and what it needs is there."""
    return next((index for index, job in enumerate(waiting) if _ready(job) and not in_use(job.run_dir)), None)


def _ready(job: Job) -> bool:
    return job.after is None or job_status(replace(job, run_dir=job.after)).state in FINISHED


def _without_hope(waiting: Sequence[Job], running: Sequence[Job]) -> list[Job]:
    """Jobs that need a run which is neither finished nor to be run."""
    coming = {job.run_dir for job in (*waiting, *running)}
    return [job for job in waiting if not _ready(job) and job.after not in coming]


def _stop(running: Sequence[_Running]) -> None:
    """Asks running jobs to checkpoint and end, and waits for them."""
    for item in running:
        if item.process.poll() is None:
            item.process.send_signal(signal.SIGTERM)
    for item in running:
        item.process.wait()
        item.log.close()


_STOPPING = (signal.SIGTERM, signal.SIGINT)


def _share_of_cores(slot: int, workers: int) -> set[int] | None:
    """This worker's part of the cores that the process may use; None where there is nothing to divide."""
    if not hasattr(os, "sched_getaffinity") or workers < 2:
        return None
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < workers:
        return {cores[slot % len(cores)]}
    return set(cores[slot::workers])


def last_line(log: Path) -> str:
    """The last non-empty line of a job's log: for an error that is its one readable line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def parse_seeds(text: str) -> list[int]:
    """`0-4`, `1,2,5-10` or `3` -> list of seeds, in order, without repeats.

    Raises: `ValueError` for anything else.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"seeds are written like 0-4 or 1,2,5-10, not {text!r}")
        low, high = int(first), int(last) if dash else int(first)
        if high < low:
            raise ValueError(f"seeds {part.strip()!r} count down; write {high}-{low}")
        if high > LARGEST_SEED:
            raise ValueError(f"seeds go up to {LARGEST_SEED}, not {high}")
        seeds.extend(range(low, high + 1))
    return list(dict.fromkeys(seeds))


def write_study(path: Path, name: str, jobs: Sequence[Job], **facts: Any) -> None:
    """`study.json`: what the study consists of, with run directories relative to it; written atomically."""
    entries = [
        {
            "row": job.row,
            "seed": job.seed,
            "run_dir": os.path.relpath(job.run_dir, path),
            "arguments": list(job.arguments),
            **({"after": os.path.relpath(job.after, path)} if job.after else {}),
        }
        for job in jobs
    ]
    path.mkdir(parents=True, exist_ok=True)
    temporary = path / "study.json.tmp"
    temporary.write_text(json.dumps({"name": name, **facts, "jobs": entries}, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path / "study.json")


def read_study(path: Path) -> tuple[dict[str, Any], list[Job]]:
    """The facts and the jobs of a study's folder.

    Raises: `JobFailedError` when there is no study.json or it is damaged.
    """
    try:
        study = json.loads((path / "study.json").read_text(encoding="utf-8"))
        jobs = [
            Job(
                entry["row"],
                int(entry["seed"]),
                (path / entry["run_dir"]).resolve(),
                tuple(entry["arguments"]),
                (path / entry["after"]).resolve() if "after" in entry else None,
            )
            for entry in study.pop("jobs")
        ]
    except FileNotFoundError as error:
        raise JobFailedError(f"{path} is no study: it has no study.json") from error
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise JobFailedError(f"{path / 'study.json'} is damaged: {error}") from error
    return study, jobs
