"""Training a potential on energies and forces; an `Experiment` of the loop. Units: eV, A."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from stabletrain.data.order import batch_indices
from stabletrain.nnip.config import NnipConfig
from stabletrain.nnip.errors import error_scalars, error_table
from stabletrain.nnip.frames import FramesSpec, LabelledFrames, read_frames, split
from stabletrain.nnip.networks import NETWORKS, Surroundings
from stabletrain.nnip.pairs import all_pairs
from stabletrain.nnip.potential import EnergyScale, Params, Potential
from stabletrain.nnip.schedule import Plateau, learning_rate_at, start_plateau, update_plateau
from stabletrain.nnip.stable_learning import Structures, energy_force_loss
from stabletrain.nnip.systems import minimum_image
from stabletrain.random_keys import random_key
from stabletrain.training.ema import average_decay, start_average, update_average
from stabletrain.training.experiment import Batch, Evaluation, EvaluationContext, Metrics
from stabletrain.training.stability import MonitorState, Policy, guarded_update, init_monitor

Array = jax.Array
CHUNK = 50
SCALING_FRAMES = 32
"""Training frames that GemNet-T's scaling factors are measured on."""


@struct.dataclass
class Best:
    """The weights with the lowest validation loss so far."""

    params: Params
    loss: Array  # float32 []
    step: Array  # int32 []: updates that they have had


@struct.dataclass
class NnipState:
    """All that evolves."""

    params: Params
    ema: Params | None
    optimizer: Any
    monitor: MonitorState
    plateau: Plateau | None
    best: Best | None


def make_potential(config: NnipConfig, frames: LabelledFrames, train: np.ndarray) -> Potential:
    """The configured network on these frames' system. Its scale is the root mean square of the training forces (over
    1 A); the energy reference is the mean training energy, shared equally by the atoms."""
    mean = float(frames.energies[train].mean()) / frames.system.count
    rms = float(np.sqrt(np.mean(frames.forces[train] ** 2)))
    around = Surroundings(frames.system.elements, average_neighbors(frames, train, config.cutoff))
    network = NETWORKS[config.model](config, around)
    scale = EnergyScale(rms, dict.fromkeys(frames.system.elements, mean))
    return Potential(config.model, network, frames.system, config.cutoff, scale).fitted(frames.positions)


def average_neighbors(frames: LabelledFrames, chosen: np.ndarray, cutoff: float) -> float:
    """The mean number of neighbours of an atom within the cutoff, over the chosen frames; at least 1."""
    first, second = all_pairs(frames.system.count)
    pairs = 0
    for x in frames.positions[chosen]:
        vectors = minimum_image(x[second] - x[first], frames.system.cell)
        pairs += int(np.sum(np.sum(vectors**2, axis=-1) < cutoff**2))
    return max(1.0, 2 * pairs / (len(chosen) * frames.system.count))


def structures_of(frames: LabelledFrames, chosen: np.ndarray, reference: float) -> Structures:
    """Some of the frames, their energies without the elements' reference."""
    return Structures(frames.positions[chosen], frames.energies[chosen] - reference, frames.forces[chosen])


class NnipExperiment:
    """A potential learnt from labelled frames; with `base_params` it goes on from those."""

    traceable = True

    def __init__(self, config: NnipConfig, *, mesh: Mesh, base_params: Params | None = None) -> None:
        self.config = config
        self.mesh = mesh
        frames = read_frames(config.dataset, config.data, config.energy_unit, config.length_unit)
        self.data_spec: FramesSpec = frames.spec
        assert config.split_seed is not None, "resolve(config) fills it in"
        held_out = config.validation_frames or 0
        train, validation, test = split(frames, config.train_frames, held_out, config.test_frames, config.split_seed)
        self.potential = make_potential(config, frames, train)
        self.train = structures_of(frames, train, self.potential.reference)
        self.validation = structures_of(frames, validation, self.potential.reference)
        self.test = structures_of(frames, test, self.potential.reference)
        self.loss = energy_force_loss(
            self.potential,
            energy_weight=config.energy_weight,
            force_weight=config.force_weight,
            energy_loss=config.energy_loss,
            force_loss=config.force_loss,
        )
        self.policy = Policy.from_config(config)
        self.inner_steps = 10
        self.examples_per_step = config.batch_size
        self._base_params = base_params
        shapes = jax.eval_shape(self.potential.init, random_key(0))
        self.parameter_count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
        self._key = random_key(config.seed)
        resident = {**self.train.tree(), **{f"validation_{k}": v for k, v in self.validation.tree().items()}}
        self.resident = jax.device_put(resident, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        self._predict = jax.jit(jax.vmap(self.potential.energy_and_forces, (None, 0)))

    def _optimizer(self, rate: Any) -> optax.GradientTransformation:
        clip = [optax.clip_by_global_norm(self.config.gradient_clip)] if self.config.gradient_clip else []
        return optax.chain(*clip, optax.scale_by_adam(b2=self.config.beta2), optax.scale(-rate))

    def init(self, key: Array) -> NnipState:
        """Fresh parameters, or the base's."""
        params = self.potential.init(key)
        if self._base_params is None and self.config.model == "gemnet-t":
            from stabletrain.nnip.gemnet import fitted_scaling

            frames = jnp.asarray(self.train.positions[:SCALING_FRAMES], jnp.float32)
            params = fitted_scaling(self.potential, params, frames)
        if self._base_params is not None:
            params = jax.tree.map(lambda base, new: jnp.array(base, new.dtype, copy=True), self._base_params, params)
        best = Best(start_average(params), jnp.full((), jnp.inf, jnp.float32), jnp.zeros((), jnp.int32))
        return NnipState(
            params=params,
            ema=start_average(params) if self.config.ema_decay else None,
            optimizer=self._optimizer(0.0).init(params),
            monitor=init_monitor(params, self.policy),
            plateau=start_plateau() if self.config.lr_decay == "plateau" else None,
            best=best if self.config.validation_frames else None,
        )

    def batch(self, position: int) -> Batch:
        """Numbers of the training frames."""
        index = batch_indices(self.config.seed, position, len(self.train.energies), self.config.batch_size)
        return {"index": index, "position": np.uint32(position)}

    def step(self, state: NnipState, batch: Batch) -> tuple[NnipState, Metrics]:
        """One Adam step on the batch's mean loss."""
        config, data = self.config, {**self.resident, **batch}
        structures = {name: data[name][batch["index"]] for name in ("positions", "energy", "forces")}

        def loss_of(params: Params) -> Array:
            return jnp.mean(jax.vmap(self.loss, (None, 0))(params, structures))

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        rate = learning_rate_at(
            batch["position"],
            peak=config.learning_rate,
            steps=config.steps,
            warmup=config.warmup_steps,
            decay=config.lr_decay,
            factor=1.0 if state.plateau is None else state.plateau.factor,
        )
        update = guarded_update(
            self._optimizer(rate),
            loss=loss,
            gradients=gradients,
            params=state.params,
            optimizer_state=state.optimizer,
            monitor=state.monitor,
            policy=self.policy,
        )
        ema = state.ema
        if config.ema_decay:
            decay = average_decay(batch["position"], config.ema_decay, ramp=True)
            ema = update.choose(update_average(state.ema, update.params, decay), state.ema)
        new = NnipState(update.params, ema, update.optimizer_state, update.monitor, state.plateau, state.best)
        new = self._validated(new, batch["position"], data)
        metrics = {"train/loss": loss, "train/learning_rate": rate}
        if new.best is not None:
            metrics |= {"train/best_validation_loss": new.best.loss, "train/best_step": new.best.step}
        return new, {**metrics, **update.metrics}

    def _validated(self, state: NnipState, position: Array, data: Any) -> NnipState:
        """After the first update, each `validate_every` and the last: the best weights and the plateau rule see the
        mean validation loss of the average (of the raw weights where none is kept)."""
        config, best = self.config, state.best
        if best is None:
            return state
        structures = {name: data[f"validation_{name}"] for name in ("positions", "energy", "forces")}
        params = state.params if state.ema is None else state.ema
        done = position.astype(jnp.int32) + 1

        def look() -> tuple[Best, Plateau | None]:
            loss = jnp.mean(jax.vmap(self.loss, (None, 0))(params, structures))
            now = Best(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), loss, done)
            kept = jax.tree.map(lambda a, b: jnp.where(loss < best.loss, a, b), now, best)
            if state.plateau is None:
                return kept, None
            smallest = config.minimum_rate / config.learning_rate if config.learning_rate else 1.0
            smallest = min(smallest, 1.0)  # the rule never raises the rate
            rule = update_plateau(state.plateau, loss, patience=config.validation_patience, smallest=smallest)
            return kept, rule

        due = (done == 1) | (done % max(config.validate_every, 1) == 0) | (done == config.steps)
        kept, plateau = jax.lax.cond(due, look, lambda: (best, state.plateau))
        return dataclasses.replace(state, best=kept, plateau=plateau)

    def probe(self, state: NnipState) -> Metrics:
        """Nothing."""
        return {}

    def weights(self, state: NnipState) -> dict[str, Params]:
        """`best` by validation first where there is one, then `ema` where it is kept, then `raw`."""
        named = {"best": None if state.best is None else state.best.params, "ema": state.ema}
        return {**{name: params for name, params in named.items() if params is not None}, "raw": state.params}

    def evaluate(self, state: NnipState, step: int, context: EvaluationContext) -> Evaluation:
        """Errors on the training, validation and test frames, of the preferred weights: see `error_scalars`."""
        params = next(iter(self.weights(state).values()))
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        parts = {name: part for name, part in parts.items() if len(part.energies)}
        symbols = self.potential.system.symbols
        scalars: dict[str, float] = {}
        for name, part in parts.items():
            scalars |= error_scalars(*self._errors(params, part, name, context), symbols, name)
        table = error_table(scalars, {name: len(part.energies) for name, part in parts.items()}, symbols)
        return Evaluation(scalars=scalars, files={f"eval/errors-{step:08d}.txt": f"{table}\n".encode()}, shown=table)

    def _errors(
        self, params: Params, part: Structures, name: str, context: EvaluationContext
    ) -> tuple[np.ndarray, np.ndarray]:
        energies, forces = [], []
        for first in range(0, len(part.energies), CHUNK):
            context.tick(f"errors of the {name} frames", first, len(part.energies))
            energy, force = self._predict(params, jnp.asarray(part.positions[first : first + CHUNK], jnp.float32))
            energies.append(np.asarray(energy, float))
            forces.append(np.asarray(force, float))
        return np.concatenate(energies) - part.energies, np.concatenate(forces) - part.forces
