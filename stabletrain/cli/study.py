"""Many runs by one command: `--seeds` on a training command, and the rows of a paper's table."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from stabletrain.cli.options import Resolved
from stabletrain.cli.text import number, print_json, table
from stabletrain.errors import EXIT_FAILURE, EXIT_OK, ConfigChangedError, ConfigError, RunDirectoryError
from stabletrain.runs.engine import FINISHED, Job, JobStatus, LocalEngine, parse_seeds, read_study, write_study
from stabletrain.training.config import TrainConfig, difference, identity, read_toml, to_toml
from stabletrain.training.experiment import Family

SECONDS_BETWEEN_LINES = 10.0
PRESET = "study.toml"
GIBIBYTES_PER_WORKER = 2
"""Of memory, for the default number of runs at once. Steps of networks that are large for a CPU peak at 1.8 to 2.0
(BigGAN-32) and 2.5 (StyleGAN2 at 32 pixels): benchmarks/results/gan_networks.json."""


def seeds_of(text: str) -> list[int]:
    """`--seeds 0-4` as a list. Raises: `ConfigError` for anything else than numbers and ranges."""
    try:
        return parse_seeds(text)
    except ValueError as error:
        raise ConfigError(f"--seeds: {error}") from error


def accelerators() -> list[str]:
    """The NVIDIA GPUs that this process may use, by the names of CUDA_VISIBLE_DEVICES; found without loading JAX."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    return [str(index) for index, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def make_engine(workers: int) -> LocalEngine:
    """One worker per accelerator; on CPU one per core, as far as the memory goes. `workers` = 0 chooses.

    On CPU a small run gains little from a second core (ReACGAN on digits: 31 s of processor time on one, 80 s on two
    virtual devices), and starting and compiling have use for one only.

    Raises: `ConfigError` for more workers than cores.
    """
    found = accelerators()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not found and workers > cores:
        raise ConfigError(f"--workers {workers} is more than the {cores} cores of this machine")
    by_memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (GIBIBYTES_PER_WORKER * 2**30)
    chosen = workers or len(found) or max(1, min(cores, by_memory))
    return LocalEngine(chosen, accelerators=found)


class Progress:
    """Prints how the jobs stand: a line whenever one ends, and at most every ten seconds in between."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._printed_at = 0.0
        self._finished = 0

    def __call__(self, statuses: list[JobStatus]) -> None:
        finished = sum(status.state in FINISHED or status.state == "failed" for status in statuses)
        due = time.monotonic() - self._printed_at > SECONDS_BETWEEN_LINES
        if self._quiet or not (due or finished != self._finished):
            return
        self._printed_at, self._finished = time.monotonic(), finished
        running = [f"{s.job.name} {s.step}/{s.total}" for s in statuses if s.state == "running" and s.starts]
        states = Counter(status.state for status in statuses if status.state in (*FINISHED, "failed"))
        ended = ", ".join(f"{count} {state}" for state, count in states.items()) or "none done"
        line = f"{ended} of {len(statuses)}" + (f"; running {', '.join(running)}" if running else "")
        print(line, file=sys.stderr, flush=True)


def seeds_command(
    family: Family, resolved: Resolved, path: Path, seeds: Sequence[int], *, workers: int, as_json: bool, quiet: bool
) -> int:
    """One run per seed in a process of its own; finishes what is missing; prints mean and deviation over the seeds."""
    config = _for_every_seed(family, resolved)
    _same_study(family, config, path)
    path.mkdir(parents=True, exist_ok=True)
    preset = path / PRESET
    preset.write_text(to_toml(config, family.name), encoding="utf-8")
    method = resolved.config.method
    jobs = [
        Job(
            method,
            seed,
            path / f"{method}-s{seed}",
            (family.name, "--config", str(preset.resolve()), "--seed", str(seed)),
        )
        for seed in seeds
    ]
    write_study(path, path.name, _with_earlier(path, jobs))
    statuses = make_engine(workers).run(jobs, Progress(quiet=quiet))
    show_study(path, jobs, statuses, as_json=as_json)
    return EXIT_FAILURE if any(status.state == "failed" for status in statuses) else EXIT_OK


def _for_every_seed(family: Family, resolved: Resolved) -> TrainConfig:
    """The configuration with what depends on the seed as it was asked for: each run fills it in by its own."""
    return dataclasses.replace(resolved.config, **{name: getattr(resolved.asked, name) for name in family.by_seed})


def _same_study(family: Family, config: TrainConfig, path: Path) -> None:
    """Raises: `ConfigChangedError` when a study of another configuration is there, or a folder that is no study."""
    if not path.exists() or not any(path.iterdir()):
        return
    if not (path / PRESET).is_file():
        raise RunDirectoryError(f"{path} is not empty and is no study of one configuration: choose another --out")
    stored = read_toml(path / PRESET)
    known = identity(config)
    wanted = {"family": family.name, **{key: value for key, value in known.items() if value is not None}}
    changed = difference({key: value for key, value in stored.items() if key in {*known, "family"}}, wanted)
    if changed:
        shown = "; ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items())
        raise ConfigChangedError(f"{path} is a study of another configuration ({shown}): choose another --out")


def _with_earlier(path: Path, jobs: Sequence[Job]) -> list[Job]:
    """The jobs of this call and those that an earlier one put into the study."""
    earlier = read_study(path)[1] if (path / "study.json").is_file() else []
    names = {job.name for job in jobs}
    return [*(job for job in earlier if job.name not in names), *jobs]


def show_study(path: Path, jobs: Sequence[Job], statuses: Sequence[JobStatus], *, as_json: bool) -> None:
    """Mean and standard deviation of the last losses and scores; diverged runs are counted, not averaged."""
    from stabletrain.runs.reading import is_run, read_run
    from stabletrain.runs.statistics import summarize

    runs = [read_run(job.run_dir) for job in jobs if is_run(job.run_dir)]
    names = sorted({name for run in runs for name in run.metric_names() if name.startswith(("eval/", "train/loss"))})
    summaries = {name: summarize([run.last(name) for run in runs]) for name in names}
    diverged = sum(run.diverged for run in runs)
    if as_json:
        metrics: dict[str, Any] = {
            name: {"mean": s.mean, "std": s.std, "n": s.count, "values": s.values} for name, s in summaries.items()
        }
        jobs_document = [{"name": s.job.name, "status": s.state, "step": s.step, "reason": s.reason} for s in statuses]
        state = "done" if all(s.state in FINISHED for s in statuses) else "failed"
        step = min((s.step for s in statuses), default=0)
        print_json({"run_dir": path, "status": state, "step": step, "metrics": metrics, "jobs": jobs_document}
                   | {"diverged": diverged})  # fmt: skip
        return
    rows = [
        [name, number(s.mean), number(s.std) if s.count > 1 else "", f"{s.count}/{s.total}"]
        for name, s in summaries.items()
    ]
    print(table(["metric", "mean", "std", "n"], rows))
    if diverged:
        print(f"{diverged} of {len(runs)} diverged; the means are of the others")
    for status in statuses:
        if status.state == "failed":
            print(f"{status.job.name} failed: {status.reason}")
    print(f"study  {path}\nnext   stabletrain report {path}")


SEEDS_OPTIONS = {
    "seeds": (
        str | None,
        typer.Option(None, "--seeds", metavar="0-4", help="One run per seed, in processes of their own: a study."),
    ),
    "workers": (
        int,
        typer.Option(
            0, "--workers", "-j", min=0, help="Runs at once with --seeds; 0: one per GPU, or per core as memory allows."
        ),
    ),
}
"""Options that every training command takes for studies."""
