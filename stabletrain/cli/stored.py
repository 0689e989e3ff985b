"""Runs as something to use: found by name, rebuilt from their record, read from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from stabletrain.cli.families import family_called
from stabletrain.cli.progress import OpenReporter
from stabletrain.cli.train import RUNS
from stabletrain.errors import RunDirectoryError, nearest
from stabletrain.training.config import TrainConfig, make_config
from stabletrain.training.experiment import Experiment, Family, State

if TYPE_CHECKING:
    from stabletrain.training.run_directory import RunDirectory
    from stabletrain.training.signals import StopRequest


def complete_run(incomplete: str) -> list[str]:
    """Names of runs below ./runs for the shell's completion."""
    return [path.parent.name for path in sorted(RUNS.glob(f"{incomplete}*/config.toml"))]


RUN = typer.Argument(metavar="RUN", help="Run directory, or its name below ./runs.", autocompletion=complete_run)


def find_run(named: str) -> Path:
    """The run directory that a user means: a path, or a name below ./runs.

    Raises: `RunDirectoryError` naming the nearest run.
    """
    given = Path(named)
    for path in (given, RUNS / named):
        if (path / "config.toml").is_file():
            return path
    if given.is_dir():
        raise RunDirectoryError(f"{given} is not a run directory (a run has a config.toml)")
    if given.is_file():
        raise RunDirectoryError(
            f"{given} is a file, not a run; published weights of a diffusion model are sampled from by `stabletrain "
            f"sample --weights {given}`, and become a run by `stabletrain diffusion import` (BigGAN's by `gan import`)"
        )
    folder = given.parent if given.parent != Path() else RUNS
    known = [path.parent.name for path in sorted(folder.glob("*/config.toml"))] if folder.is_dir() else []
    if not known:
        raise RunDirectoryError(f"there is no run {named!r}, and none at all in {folder}")
    hint = nearest(given.name, known) if len(known) <= 10 else _nearest_only(given.name, known)
    raise RunDirectoryError(f"there is no run {named!r} in {folder}: {hint}")


def _nearest_only(name: str, known: list[str]) -> str:
    import difflib

    return f"did you mean {difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]!r}?"


def open_run(path: Path) -> tuple[RunDirectory, Family]:
    """A run to read, and its family. Raises: `RunDirectoryError` when it is none, or of an unknown family."""
    from stabletrain.training.run_directory import RunDirectory

    run = RunDirectory.open(path)
    return run, family_called(run.family, str(path))


def stored_config(run: RunDirectory, family: Family, changes: Mapping[str, Any] | None = None) -> TrainConfig:
    """The run's configuration, with some values changed. Raises: `ConfigError` for a file that was tampered with."""
    return make_config(family.config, {**run.config_values, **(changes or {})}, source=str(run.path / "config.toml"))


@dataclass(frozen=True)
class Trained:
    """A run's model at one of its checkpoints."""

    run: RunDirectory
    family: Family
    experiment: Experiment
    state: State
    step: int


def load_trained(
    path: Path,
    *,
    with_data: bool,
    which: str = "newest",
    devices: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> Trained:
    """The model of a run at one of its checkpoints: `newest`, `best`, or a step. Nothing in the run is changed.

    Without data the experiment is built from what the record says of them: enough to sample and to export.
    `devices` as in the configuration; those that the run was trained on need not be there. `changes`: values of the
    configuration that are other than the run's; none that the network depends on.

    Raises: `RunDirectoryError`, `CheckpointError` with the steps that there are, `DataError`.
    """
    from stabletrain.training.devices import configure_backend, make_mesh

    run, family = open_run(path)
    config = stored_config(run, family, changes)
    data_spec = None if with_data else run.record.get("data")
    if data_spec is None and not with_data:
        raise RunDirectoryError(f"{run.path / 'record.json'} does not say which data the run was made with")
    configure_backend(devices, config.batch_size)
    experiment = family.build(config, mesh=make_mesh(devices, config.batch_size), data_spec=data_spec)

    from stabletrain.training.checkpoints import load_state

    state, step = load_state(experiment, run.path, which)
    return Trained(run, family, experiment, state, step)


class Work:
    """The `EvaluationContext` of work outside of training: shows progress and can be stopped.

    Nothing is written into the run's status: it may be training at this very moment.
    """

    def __init__(self, scratch: Path, reporter: OpenReporter, stop: StopRequest) -> None:
        self.scratch = scratch
        self._reporter = reporter
        self._stop = stop
        scratch.mkdir(parents=True, exist_ok=True)

    def tick(self, label: str, done: int, total: int) -> None:
        """Shows progress. Raises: `Interrupted` once SIGTERM or SIGINT came."""
        self._reporter.working(label, done, total)
        self._stop.check()
