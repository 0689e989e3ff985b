"""What a family gives to the loop, and what the loop gives back: the contracts between the rooms.

Imports no JAX: a family's description is read by the command line before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from stabletrain.training.config import TrainConfig

State = Any  # one pytree of arrays: params, statistics, optimiser, EMA, monitor; anything that evolves
Batch = Any  # one pytree of arrays whose leading axis (or `position` scalar) the mesh knows how to lay out
Metrics = Mapping[str, Any]  # metric name -> scalar array (or a short vector named in MONITOR_VECTORS)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found. `scalars` go into metrics.jsonl; `files` are written below the run directory.

    `scalars`: names start with `eval/` and carry the protocol. `files`: relative path -> bytes (PNG, JSON, SVG...).
    """

    scalars: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    shown: str = ""
    """Told while the run goes on, as an event: a few samples where they are text."""


class EvaluationContext(Protocol):
    """Handed to `evaluate`: keeps the run alive, and able to stop, during long work."""

    scratch: Path
    """A folder that survives an interruption: finished parts put here are not computed again. Removed afterwards."""

    def tick(self, label: str, done: int, total: int) -> None:
        """Shows progress and writes the heartbeat. Raises `Interrupted` when the run was asked to stop."""


class Experiment(Protocol):
    """One per family; all that the loop needs to know."""

    @property
    def config(self) -> TrainConfig:
        """The resolved configuration; a family's own config class."""

    traceable: bool
    """True: `step` is a pure function which the loop compiles over the device mesh, donating the state.
    False: `step` is plain Python that calls its own compiled functions (a simulation followed by learning)."""
    mesh: Any
    """The `jax.sharding.Mesh` that the experiment was built for (one axis, "data")."""
    inner_steps: int
    """Steps per dispatch that pay for this network on this device, when the user does not say."""
    parameter_count: int
    examples_per_step: int

    def init(self, key: Any) -> State:
        """The state before the first step: a pure function of the key, without sharing a buffer between leaves."""

    def batch(self, position: int) -> Batch:
        """Host or device arrays for one step: a pure function of (seed, position), so that resuming needs no iterator.
        The batch holds what the step needs to fold into its key: `position` itself as a uint32 scalar."""

    def step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One update. Randomness is `fold_in(key, batch["position"])`."""

    def probe(self, state: State) -> Metrics:
        """Indicators on a fixed probe batch, computed at each logged step (feature norms). May be empty."""

    def evaluate(self, state: State, step: int, context: EvaluationContext) -> Evaluation:
        """Scalars and artefacts. Must call `context.tick` often: at least once a second of work."""

    def weights(self, state: State) -> Mapping[str, Any]:
        """The parameters to use and to export, the preferred ones first: `ema` where an average is kept, `raw`."""

    # An experiment may also have `notes`, lines that are told when a run starts: what it goes on from, and
    # `events(metrics) -> Sequence[Mapping]`: what a step decided, told from its metrics
    # (those under `monitor/` stand in no row), each with `kind` and usually `message`. The loop writes them down.


@dataclass(frozen=True)
class Shorthand:
    """A flag that stands for values of options: `--scalelong` is `--skip-scaling cs`. Explicit options win over it."""

    help: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Needed:
    """A run that is trained before the one that was asked for."""

    config: TrainConfig
    path: Path
    message: str
    """Why, as the user reads it."""


@dataclass(frozen=True)
class OpenedWeights:
    """A model out of a published file, without a run."""

    experiment: Experiment
    state: State
    """Enough of a state to sample from."""
    what: str
    """The network, as the user reads it."""


@dataclass(frozen=True)
class Family:
    """A test bed as the command line sees it. Functions import JAX when they are called, not before."""

    name: str
    help: str
    config: type[TrainConfig]
    build: Callable[..., Experiment]
    """`build(config, *, mesh, data_spec=None)` -> Experiment. With `data_spec` (the "data" entry of record.json) no
    data set is loaded: for sampling and export. Without it the data set is loaded and checked."""
    resolve: Callable[[Any], Any]
    """`resolve(config)` -> config with every automatic value filled in. No JAX, no data."""
    shorthands: Mapping[str, Shorthand] = field(default_factory=dict)
    sample: Callable[..., Mapping[str, bytes]] | None = None
    """`sample(experiment, state, options, context)` -> files by relative path; `options` is a `sample_options`."""
    sample_inputs: Callable[..., Mapping[str, str]] | None = None
    """`sample_inputs(experiment, options)` -> digests by name of what else samples depend on: files that options name.
    Raises as `sample` does."""
    sample_options: type | None = None
    """A frozen dataclass of `option(...)` fields: what `stabletrain sample` takes besides the run directory."""
    open_weights: Callable[..., OpenedWeights] | None = None
    """`open_weights(file, options, *, devices)`: the model of a published file; `options` is a `weights_options`."""
    weights_options: type | None = None
    """A frozen dataclass of `option(...)` fields: what `stabletrain sample --weights FILE` may be told of the file."""
    subcommands: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    needs: Callable[[Any], Needed | None] | None = None
    """`needs(config)` -> the run that a run of this config starts from, where it is still to be trained."""
    by_seed: tuple[str, ...] = ()
    """Fields that are filled in by the seed: a study of several seeds hands them on as they were asked for."""
    next_commands: tuple[str, ...] = ()
    """What to do with a finished run, besides showing, sampling and exporting it: `simulate {run}`."""


class Reporter(Protocol):
    """How the loop tells somebody what happens; the command line draws bars or prints lines."""

    def started(self, *, run_dir: Path, first_step: int, total_steps: int, notes: list[str]) -> None: ...

    def logged(self, *, step: int, row: Mapping[str, Any]) -> None: ...

    def progressed(self, *, step: int) -> None: ...

    def event(self, event: Mapping[str, Any]) -> None: ...

    def working(self, label: str, done: int, total: int) -> None: ...

    def finished(self, outcome: Outcome) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `status` is one of done, failed, preempted, diverged."""

    run_dir: Path
    status: str
    step: int
    metrics: Mapping[str, Any]
    exit_code: int
    reason: str = ""
