"""Training a potential on energies and forces; an `Experiment` of the loop. Units: eV, A."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from stabletrain.data.order import batch_indices
from stabletrain.nnip.config import NnipConfig
from stabletrain.nnip.frames import FramesSpec, LabelledFrames, read_frames, split
from stabletrain.nnip.potential import EnergyScale, Params, Potential
from stabletrain.nnip.schnet import SchNet
from stabletrain.nnip.stable_experiment import Structures
from stabletrain.nnip.stable_learning import energy_force_loss
from stabletrain.training.ema import average_decay, start_average, update_average
from stabletrain.training.experiment import Batch, Evaluation, EvaluationContext, Metrics
from stabletrain.training.stability import MonitorState, Policy, guarded_update, init_monitor

Array = jax.Array
CHUNK = 50


@struct.dataclass
class NnipState:
    """All that evolves."""

    params: Params
    ema: Params | None
    optimizer: Any
    monitor: MonitorState


def make_potential(config: NnipConfig, frames: LabelledFrames, train: np.ndarray) -> Potential:
    """The configured network on these frames' system. Its scale is the root mean square of the training forces (over
    1 A); the energy reference is the mean training energy, shared equally by the atoms."""
    mean = float(frames.energies[train].mean()) / frames.system.count
    rms = float(np.sqrt(np.mean(frames.forces[train] ** 2)))
    network = SchNet(config.features, config.interactions, cutoff=config.cutoff)
    scale = EnergyScale(rms, dict.fromkeys(frames.system.elements, mean))
    return Potential(config.model, network, frames.system, config.cutoff, scale).fitted(frames.positions)


def structures_of(frames: LabelledFrames, chosen: np.ndarray, reference: float) -> Structures:
    """Some of the frames, their energies without the elements' reference."""
    return Structures(frames.positions[chosen], frames.energies[chosen] - reference, frames.forces[chosen])


class NnipExperiment:
    """A potential learnt from labelled frames; with `base_params` it goes on from those."""

    traceable = True

    def __init__(self, config: NnipConfig, *, mesh: Mesh, base_params: Params | None = None) -> None:
        self.config = config
        self.mesh = mesh
        frames = read_frames(config.dataset, config.data, config.energy_unit)
        self.data_spec: FramesSpec = frames.spec
        assert config.split_seed is not None, "resolve(config) fills it in"
        train, test = split(frames, config.train_frames, config.test_frames, config.split_seed)
        self.potential = make_potential(config, frames, train)
        self.train = structures_of(frames, train, self.potential.reference)
        self.test = structures_of(frames, test, self.potential.reference)
        self.loss = energy_force_loss(
            self.potential, energy_weight=config.energy_weight, force_weight=config.force_weight
        )
        self.policy = Policy.from_config(config)
        self.inner_steps = 10
        self.examples_per_step = config.batch_size
        self._base_params = base_params
        shapes = jax.eval_shape(self.potential.init, jax.random.key(0))
        self.parameter_count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
        self._key = jax.random.key(config.seed)
        self.resident = jax.device_put(
            self.train.tree(), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        )
        self._predict = jax.jit(jax.vmap(self.potential.energy_and_forces, (None, 0)))

    def _optimizer(self, rate: Any) -> optax.GradientTransformation:
        return optax.chain(optax.scale_by_adam(), optax.scale(-rate))

    def init(self, key: Array) -> NnipState:
        """Fresh parameters, or the base's."""
        params = self.potential.init(key)
        if self._base_params is not None:
            params = jax.tree.map(lambda base, new: jnp.array(base, new.dtype, copy=True), self._base_params, params)
        return NnipState(
            params=params,
            ema=start_average(params) if self.config.ema_decay else None,
            optimizer=self._optimizer(0.0).init(params),
            monitor=init_monitor(params, self.policy),
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
        done = batch["position"].astype(jnp.float32) / max(config.steps, 1)
        rate = config.learning_rate * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
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
        new = NnipState(update.params, ema, update.optimizer_state, update.monitor)
        return new, {"train/loss": loss, "train/learning_rate": rate, **update.metrics}

    def probe(self, state: NnipState) -> Metrics:
        """Nothing."""
        return {}

    def weights(self, state: NnipState) -> dict[str, Params]:
        """`ema` first where it is kept, then `raw`."""
        return {**({"ema": state.ema} if state.ema is not None else {}), "raw": state.params}

    def evaluate(self, state: NnipState, step: int, context: EvaluationContext) -> Evaluation:
        """Errors on the training and the test frames: `eval/force_mae_test` in meV / A, `eval/energy_mae_test` in meV,
        the same with `rmse`, and by element `eval/force_mae_test_C`; of the preferred weights."""
        params = next(iter(self.weights(state).values()))
        scalars: dict[str, float] = {}
        for name, part in (("train", self.train), ("test", self.test)):
            energy_errors, force_errors = self._errors(params, part, name, context)
            for kind, errors in (("energy", energy_errors), ("force", force_errors)):
                scalars[f"eval/{kind}_mae_{name}"] = 1e3 * float(np.abs(errors).mean())
                scalars[f"eval/{kind}_rmse_{name}"] = 1e3 * float(np.sqrt((errors**2).mean()))
            if name == "test":
                system = self.potential.system
                for symbol in sorted(set(system.symbols)):
                    mine = np.asarray([s == symbol for s in system.symbols])
                    scalars[f"eval/force_mae_test_{symbol}"] = 1e3 * float(np.abs(force_errors[:, mine]).mean())
        return Evaluation(scalars=scalars)

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
