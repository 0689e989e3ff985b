"""A trained potential read from its run, and what the commands on it have in common. Imports no JAX until it reads.

**Units** of options: K, fs, ps, A.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stabletrain.errors import ConfigError, DataError, RunDirectoryError, nearest
from stabletrain.nnip.stable_options import THERMOSTATS
from stabletrain.training.config import LARGEST_SEED

if TYPE_CHECKING:
    import numpy as np

    from stabletrain.nnip.frames import FramesSpec
    from stabletrain.nnip.potential import Potential

PANEL = "Dynamics"
ENSEMBLES = (*THERMOSTATS, "nve")

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run directory, or its name below ./runs.")]
Checkpoint = Annotated[str, typer.Option("--checkpoint", metavar="STEP|newest|best", help="Which checkpoint.")]
Thermostat = Annotated[str, typer.Option("--thermostat", help=f"One of {', '.join(ENSEMBLES)}.", rich_help_panel=PANEL)]
Relaxation = Annotated[
    float, typer.Option("--relaxation-time", help="nose-hoover: in fs.", min=0.1, rich_help_panel=PANEL)
]
Damping = Annotated[
    float, typer.Option("--damping", help="langevin and baoab: friction in 1 / ps.", min=0.0, rich_help_panel=PANEL)
]
FrameEvery = Annotated[int, typer.Option("--frame-every", help="Steps between frames.", min=1, rich_help_panel=PANEL)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of velocities and noise.", min=0, max=LARGEST_SEED)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


@dataclass(frozen=True)
class Stored:
    """A potential read from a run, with the structures that it was trained and tested on."""

    path: Path
    step: int
    potential: Potential
    params: Any
    train_positions: np.ndarray  # [N, n, 3] A
    test_positions: np.ndarray
    test_energies: np.ndarray  # [N] eV
    config: Any


def find_run(named: str) -> Path:
    """A run directory by path, or by name below ./runs. Raises: `RunDirectoryError` naming the nearest."""
    for path in (Path(named), Path("runs") / named):
        if (path / "config.toml").is_file():
            return path
    known = [path.parent.name for path in sorted(Path("runs").glob("*/config.toml"))]
    hint = f": {nearest(named, known)}" if known else ""
    raise RunDirectoryError(f"there is no run {named!r}{hint}")


def check_frames(path: Path, here: FramesSpec) -> None:
    """Raises: `DataError` when the run was trained on other frames than those that are here now.

    The scale of a potential's energies, their references, its mean number of neighbours and its split are taken from
    the frames: with others the same weights are another potential.
    """
    from stabletrain.training.run_directory import RunDirectory

    trained_on = RunDirectory.open(path).record.get("data", {})
    old, new = trained_on.get("fingerprint"), here.fingerprint
    if old and old != new:
        raise DataError(
            f"{path} was trained on {trained_on['frames']} frames of {trained_on['name']}, fingerprint {old[:12]}; "
            f"{here.name} here has {here.frames} with {new[:12]}: restore the file, or train anew"
        )


def read_potential(path: Path, checkpoint: str = "newest") -> Stored:
    """The potential of a run of this family, with its preferred weights.

    Raises: `RunDirectoryError` for a run of another family; `DataError` when its frames have changed; `CheckpointError`
    where there is no such checkpoint.
    """
    from stabletrain.nnip.family import FAMILY
    from stabletrain.training.checkpoints import load_state
    from stabletrain.training.config import make_config
    from stabletrain.training.devices import configure_backend, make_mesh
    from stabletrain.training.run_directory import RunDirectory

    run = RunDirectory.open(path)
    if run.family != FAMILY.name:
        raise RunDirectoryError(f"{path} is a run of {run.family}, not of {FAMILY.name}")
    config = make_config(FAMILY.config, run.config_values, source=str(path / "config.toml"))
    # One device, whatever the run had: several runs may be read in one process.
    configure_backend(1, config.batch_size)
    experiment: Any = FAMILY.build(config, mesh=make_mesh(1, config.batch_size))
    check_frames(path, experiment.data_spec)
    state, step = load_state(experiment, path, checkpoint)
    params = next(iter(experiment.weights(state).values()))
    train, test = experiment.train, experiment.test
    return Stored(path, step, experiment.potential, params, train.positions, test.positions, test.energies, config)


def all_positions(config: Any) -> np.ndarray:
    """Every frame of the data that a run was trained on, in the order of the file: [F, n, 3] A."""
    from stabletrain.nnip.frames import read_frames

    return read_frames(config.dataset, config.data, config.energy_unit, config.length_unit).positions


def known_thermostat(thermostat: str) -> None:
    """Raises: `ConfigError` naming the nearest."""
    if thermostat not in ENSEMBLES:
        raise ConfigError(f"unknown thermostat {thermostat!r}: {nearest(thermostat, ENSEMBLES)}")


@contextlib.contextmanager
def progress_line(label: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Windows done, on stderr: rewritten in place on a terminal, else a line when it ends."""
    on_terminal = sys.stderr.isatty()

    def tick(done: int, total: int) -> None:
        if quiet:
            return
        if on_terminal:
            print(f"\r{label}: window {done} of {total}", end="" if done < total else "\n", file=sys.stderr, flush=True)
        elif done == total:
            print(f"{label}: {total} windows", file=sys.stderr)

    yield tick
