"""A tiny real experiment for the tests of the loop: an MLP that learns a function from noisy examples.

It has all that a family has: data by position, noise by folded key, a moving average, the monitor, a probe, and an
evaluation in parts that can be interrupted. `python -m tests.training.toy --out DIR [--name value ...]` is its
command line; exit codes are those of the program.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from stabletrain.data.order import batch_indices
from stabletrain.errors import EXIT_OK, StableTrainError
from stabletrain.training import loop
from stabletrain.training.config import TrainConfig, fields_of, make_config, option
from stabletrain.training.devices import compile_step, make_mesh
from stabletrain.training.ema import average_decay, start_average, update_average
from stabletrain.training.experiment import Batch, Evaluation, EvaluationContext, Metrics, Outcome
from stabletrain.training.run_directory import RunDirectory
from stabletrain.training.signals import StopRequest
from stabletrain.training.stability import MonitorState, Policy, guarded_update, init_monitor

EXAMPLES = 40
PARTS_COUNT = "TOY_COUNT"
"""Names a file that grows by one byte with each part of an evaluation that is computed."""


@dataclass(frozen=True, kw_only=True)
class ToyConfig(TrainConfig):
    """Small enough that a run takes a second; `devices` is 1 so that tests do not depend on the machine."""

    steps: int = option(24, "Steps.")
    batch_size: int = option(8, "Batch.")
    log_every: int = option(5, "Rows.")
    eval_every: int = option(0, "Evaluations.")
    checkpoint_every: int = option(6, "Checkpoints.", identity=False)
    devices: int = option(1, "Devices.", identity=False)
    learning_rate: float = option(0.01, "Learning rate.")
    nan_positions: tuple[int, ...] = option((), "Batches whose targets are NaN.")
    spike_positions: tuple[int, ...] = option((), "Batches whose targets are a hundred times too large.")
    eval_parts: int = option(3, "Parts of an evaluation.")
    pause: float = option(0.0, "Seconds that each batch and each part of an evaluation take.", identity=False)
    plain: bool = option(False, "Plain Python instead of one compiled step.")

    @property
    def method(self) -> str:
        return "toy"


@struct.dataclass
class ToyState:
    params: Any
    ema: Any
    optimizer: Any
    monitor: MonitorState
    key: jax.Array
    nothing: jax.Array


@dataclass(frozen=True)
class ToySpec:
    name: str = "toy"
    fingerprint: str = "0123456789abcdef"

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "fingerprint": self.fingerprint}


class ToyExperiment:
    parameter_count = 2 * 8 + 8 + 8 * 1 + 1

    def __init__(self, config: ToyConfig, *, mesh: Mesh | None = None) -> None:
        self.config = config
        self.mesh = mesh or make_mesh(config.devices, config.batch_size)
        self.traceable = not config.plain
        self.inner_steps = 3
        self.examples_per_step = config.batch_size
        self.data_spec = ToySpec()
        rng = np.random.default_rng(0)
        self.x = rng.uniform(-1, 1, (EXAMPLES, 2)).astype(np.float32)
        self.y = np.sin(3 * self.x[:, :1]) * self.x[:, 1:]
        self._key = jax.random.key(config.seed)
        self.policy = Policy.from_config(config)
        self._optimizer = optax.adam(config.learning_rate)
        self._compiled = jax.jit(self._step)
        self._compiled_init = jax.jit(self._init)

    def init(self, key: jax.Array) -> ToyState:
        # A plain experiment's `init` need not be traceable: this one could not be traced through `float`.
        return self._init(key) if self.traceable else self._compiled_init(jax.random.fold_in(key, int(np.asarray(1))))

    def _init(self, key: jax.Array) -> ToyState:
        first, second = jax.random.split(key)
        params = {
            "hidden": {"kernel": jax.random.normal(first, (2, 8)), "bias": jnp.zeros(8)},
            "out": {"kernel": jax.random.normal(second, (8, 1)) / 3, "bias": jnp.zeros(1)},
        }
        return ToyState(
            params=params,
            ema=start_average(params),
            optimizer=self._optimizer.init(params),
            monitor=init_monitor(params, self.policy),
            key=key,
            nothing=jnp.zeros((0, 3)),
        )

    def batch(self, position: int) -> Batch:
        time.sleep(self.config.pause)
        index = batch_indices(self.config.seed, position, EXAMPLES, self.config.batch_size)
        y = self.y[index]
        if position in self.config.nan_positions:
            y = y * np.nan
        if position in self.config.spike_positions:
            y = y * 100 + 100
        return {"x": self.x[index], "y": y, "position": np.uint32(position)}

    def step(self, state: ToyState, batch: Batch) -> tuple[ToyState, Metrics]:
        return (self._step if self.traceable else self._compiled)(state, batch)

    def _step(self, state: ToyState, batch: Batch) -> tuple[ToyState, Metrics]:
        noise_key, key = jax.random.split(jax.random.fold_in(self._key, batch["position"]))
        noisy = batch["x"] + 0.01 * jax.random.normal(noise_key, batch["x"].shape)
        loss, gradients = jax.value_and_grad(_loss)(state.params, noisy, batch["y"])
        update = guarded_update(
            self._optimizer,
            loss=loss,
            gradients=gradients,
            params=state.params,
            optimizer_state=state.optimizer,
            monitor=state.monitor,
            policy=self.policy,
        )
        ema = update_average(state.ema, update.params, average_decay(batch["position"], 0.99, ramp=True))
        new = ToyState(
            params=update.params,
            ema=update.choose(ema, state.ema),
            optimizer=update.optimizer_state,
            monitor=update.monitor,
            key=key,
            nothing=state.nothing,
        )
        return new, {"train/loss": loss, **update.metrics}

    def probe(self, state: ToyState) -> Metrics:
        return {"stability/feature_norm/hidden": jnp.linalg.norm(_hidden(state.params, self.x))}

    def weights(self, state: ToyState) -> Mapping[str, Any]:
        return {"ema": state.ema, "raw": state.params}

    def evaluate(self, state: ToyState, step: int, context: EvaluationContext) -> Evaluation:
        parts = []
        for part in range(self.config.eval_parts):
            context.tick("evaluation", part, self.config.eval_parts)
            file = context.scratch / f"{part}.npy"
            if not file.exists():
                time.sleep(self.config.pause)
                if PARTS_COUNT in os.environ:
                    with Path(os.environ[PARTS_COUNT]).open("a") as count:
                        count.write(".")
                unfinished = file.with_suffix(".part")
                with unfinished.open("wb") as stream:
                    np.save(stream, np.asarray(_loss(state.ema, self.x[part::3], self.y[part::3])))
                unfinished.replace(file)
            parts.append(float(np.load(file)))
        return Evaluation(
            scalars={"eval/loss": float(np.mean(parts))}, files={f"eval/{step}.json": f"{parts}".encode()}
        )


def _hidden(params: Any, x: Any) -> jax.Array:
    return jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])


def _loss(params: Any, x: Any, y: Any) -> jax.Array:
    return jnp.mean(jnp.square(_hidden(params, x) @ params["out"]["kernel"] + params["out"]["bias"] - y))


class Told:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.events: list[Mapping[str, Any]] = []
        self.logged_steps: list[int] = []
        self.work: list[tuple[str, int, int]] = []
        self.first_step = -1
        self.outcome: Outcome | None = None

    def started(self, *, run_dir: Path, first_step: int, total_steps: int, notes: list[str]) -> None:
        self.first_step, self.notes = first_step, notes

    def logged(self, *, step: int, row: Mapping[str, Any]) -> None:
        self.logged_steps.append(step)

    def progressed(self, *, step: int) -> None:
        pass

    def event(self, event: Mapping[str, Any]) -> None:
        self.events.append(event)

    def working(self, label: str, done: int, total: int) -> None:
        self.work.append((label, done, total))

    def finished(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def kinds(self) -> list[str]:
        return [event["kind"] for event in self.events]


class StopAfter(StopRequest):
    """A stop request that comes by itself at the n-th look at it."""

    def __init__(self, looks: int, exit_code: int = 75) -> None:
        super().__init__()
        self._looks = looks
        self._code = exit_code

    def _look(self) -> None:
        self._looks -= 1
        if self._looks <= 0:
            self.exit_code = self._code

    @property
    def requested(self) -> bool:
        self._look()
        return super().requested

    def check(self) -> None:
        self._look()
        super().check()


def run_toy(
    path: Path,
    *,
    stop: StopRequest | None = None,
    told: Told | None = None,
    fresh: bool = False,
    experiment: type[ToyExperiment] = ToyExperiment,
    **values: Any,
) -> Outcome:
    """Trains the toy in a run directory, or goes on with it."""
    config = make_config(ToyConfig, values)
    run = RunDirectory.create(path, "toy", config, fresh=fresh)
    try:
        with mock.patch.object(loop, "compile_step", _compiled_once):
            return loop.train(experiment(config), run=run, reporter=told or Told(), stop=stop or StopRequest())
    finally:
        run.release()


_programs: dict[Any, Any] = {}


def _compiled_once(experiment: ToyExperiment, mesh: Mesh, inner_steps: int) -> Any:
    """One program per distinct step within a test process: tracing would take most of a toy run's time."""
    config = experiment.config
    key = (type(experiment).step, experiment.policy, config.learning_rate, config.seed, mesh, inner_steps)
    if key not in _programs:
        _programs[key] = compile_step(experiment, mesh, inner_steps)
    return _programs[key]


def main() -> int:
    """The command line: `--name value` for every option, `--out DIR`, `--fresh`."""
    arguments = sys.argv[1:]
    fresh = "--fresh" in arguments
    arguments = [argument for argument in arguments if argument != "--fresh"]
    given = dict(zip((name.removeprefix("--").replace("-", "_") for name in arguments[::2]), arguments[1::2]))
    out = Path(given.pop("out"))
    defaults: dict[str, Any] = {name: field.default for name, field in fields_of(ToyConfig).items()}
    values: dict[str, Any] = {}
    for name, text in given.items():
        default = defaults[name]
        if isinstance(default, tuple):
            values[name] = tuple(int(part) for part in text.split(","))
        else:
            values[name] = text if default is None or isinstance(default, str) else type(default)(text)
    try:
        with StopRequest() as stop:
            outcome = run_toy(out, stop=stop, fresh=fresh, **values)
    except StableTrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(outcome.status, outcome.step, outcome.reason)
    assert outcome.status != "done" or outcome.exit_code == EXIT_OK
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
