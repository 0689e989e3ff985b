"""StABlE Training as an experiment: one step is one window of dynamics, and in a learning phase one update after it.

The state (`stable_state`) holds everything that the course depends on; `stable_phases` decides, `stable_learning` gives
the gradients, `stable_evaluation` judges. What is decided is told by `events`.

Source: Raja et al. 2025, Algorithm 1; `docs/stable.md` lists what differs. **Units**: eV, A, fs, K; ps for times.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from stabletrain.errors import ConfigError
from stabletrain.methods.stable import CHUNK, effective_sample_size
from stabletrain.nnip.benchmark import Conditions, Simulator
from stabletrain.nnip.criteria import Criteria, Reference, Thresholds, default_thresholds, mean_bond_lengths
from stabletrain.nnip.dynamics import Swarm, where_replica, with_forces
from stabletrain.nnip.observables import StaticObservable, static_observables
from stabletrain.nnip.potential import Params, Potential
from stabletrain.nnip.stable_evaluation import StableEvaluation
from stabletrain.nnip.stable_learning import (
    REFERENCE_FRAMES,
    Estimator,
    Learned,
    ObservableGradient,
    Observe,
    ReweightedGradient,
    StructureLoss,
    Structures,
    bonds_gradient,
    bonds_of,
    bonds_target,
    distances_again,
    distances_gradient,
    distances_observable,
    distances_of,
    distances_target,
    equal_molecules,
    mean_loss_and_gradient,
)
from stabletrain.nnip.stable_options import StableOptions
from stabletrain.nnip.stable_phases import Plan, Progress, Schedule, Verdict, begin, finish
from stabletrain.nnip.stable_state import HISTORY, StableState, loaded, stored
from stabletrain.nnip.units import thermal_energy
from stabletrain.random_keys import random_key
from stabletrain.training.experiment import Batch, Evaluation, EvaluationContext, Metrics
from stabletrain.training.stability import Policy, guarded_update, init_monitor

Array = jax.Array

CPU_CHUNK = 16
"""Structures that a reverse pass takes at once on a CPU: of 64 it takes 1.1 to 1.6 times as long
(`benchmarks/gradient_chunk.py`), since the pairs' features leave the caches. Elsewhere `CHUNK`."""
WINDOW_STREAM, CHOICE_STREAM, LEARNING_STREAM = 0, 1, 2
"""What a step's key is folded with for the dynamics, the restarts, and the estimator's shuffling."""


class StableExperiment:
    """StABlE Training from a trained potential; an `Experiment` of the loop."""

    traceable = False
    inner_steps = 1

    def __init__(
        self,
        config: Any,
        *,
        mesh: Mesh,
        potential: Potential,
        params: Params,
        train: Structures,
        test: Structures,
        loss: StructureLoss,
        data_spec: Any = None,
    ) -> None:
        """`config` has the fields of `StableOptions`; `params` are the base model's, `loss` is what it was trained on.

        Raises: `ConfigError` for options that this system does not allow.
        """
        self.config = config
        self.mesh = mesh
        self.data_spec = data_spec
        self.base_params = jax.tree.map(lambda x: jnp.asarray(x, jnp.asarray(x).dtype), params)
        self.train, self.test = train, test
        self.system = potential.system
        self.conditions = Conditions.from_options(config)
        self.policy = Policy.from_config(config, watch_blowup=False)  # the loss depends on which replicas failed
        self.parameter_count = sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(params))
        self.examples_per_step = config.replicas * config.window
        self.schedule = Schedule(
            learning_rate=config.stable_learning_rate,
            max_unstable=config.max_unstable,
            min_unstable=config.min_unstable,
            restart_share=config.restart_share,
            patience=config.plateau_patience,
        )
        self._key = random_key(config.seed)
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._chunk = config.gradient_chunk or (CPU_CHUNK if on_cpu else CHUNK)
        self._simulator = Simulator(self.system, self.conditions, potential=potential.fitted(train.positions))
        self._bond_lengths = mean_bond_lengths(self.system, train.positions.astype(np.float32))
        self._criteria = self._training_criteria()
        self._judge = jax.jit(lambda frames: jnp.any(self._criteria.unstable(frames), axis=1))
        self._loss = loss
        self._structures = train.tree()
        self._programs: dict[tuple[str, tuple[int, ...]], Any] = {}
        self._prepare_observable()
        self._evaluation = StableEvaluation(
            config, base_params=self.base_params, test=test, criteria_of=self._criteria_of
        )

    @property
    def notes(self) -> list[str]:
        """What is told when a run starts."""
        return [f"starts from the potential of {self.config.base}"]

    @property
    def potential(self) -> Potential:
        """The potential that is simulated, with room for the neighbours seen so far."""
        assert self._simulator.potential is not None
        return self._simulator.potential

    # --- what is measured ---------------------------------------------------------------------------------------------

    def _training_criteria(self) -> Criteria:
        thresholds = default_thresholds(self.system, evaluation=False)
        config = self.config
        if config.max_bond_deviation is not None or config.min_distance is not None:
            thresholds = Thresholds(
                bond_deviation=config.max_bond_deviation, intermolecular_distance=config.min_distance
            )
        return self._criteria_of(thresholds)

    def _criteria_of(self, thresholds: Thresholds) -> Criteria:
        rdfs: tuple[StaticObservable, ...] = ()
        reference = Reference(self._bond_lengths)
        if thresholds.rdf_error is not None:
            assert self.system.cell is not None
            rdfs = tuple(static_observables(self.system))
            curves = {o.name: np.asarray(o.of_frames(self._reference_frames)).mean(axis=0) for o in rdfs}
            reference = Reference(self._bond_lengths, curves)
        try:
            return Criteria(
                self.system,
                thresholds,
                reference,
                self.config.temperature,
                self.conditions.freedom(self.system),
                rdfs,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @functools.cached_property
    def _reference_frames(self) -> Array:
        """Frames of the training set that observables are compared with: [N, n, 3]."""
        count = len(self.train.positions)
        chosen = np.linspace(0, count - 1, min(count, REFERENCE_FRAMES)).round().astype(int)
        return jnp.asarray(self.train.positions[chosen], jnp.float32)

    def _prepare_observable(self) -> None:
        config = self.config
        estimator = Estimator(
            kT=thermal_energy(config.temperature),
            residual=config.residual,
            minibatch=config.residual_batch if config.residual == "released" else None,
            replicas=config.replicas if config.covariance == "within-replicas" else None,
            chunk=self._chunk,
        )
        if self.system.periodic and config.distance_reach != StableOptions.distance_reach:
            raise ConfigError("--distance-reach is for molecules: in a cell the distributions reach as far as it does")
        self._observe: Observe | None = None
        self._gradient: ObservableGradient | None = None
        self._again: ReweightedGradient | None = None
        if config.observable == "distances":
            if self.system.cell is not None:
                raise ConfigError(
                    "--observable distances is for molecules: of a liquid learn --observable bond-lengths, since its "
                    "mean over many molecules hardly sees one that fails"
                )
            observable = distances_observable(self.system, config.distance_reach)
            target = distances_target(observable, np.asarray(self._reference_frames))
            self._observe = distances_of(observable)
            self._gradient = distances_gradient(target, estimator)
            self._again = distances_again(target, estimator)
        elif config.observable == "bond-lengths":
            try:
                which = equal_molecules(self.system)
            except ValueError as error:
                raise ConfigError(f"--observable bond-lengths: {error}") from error
            target = bonds_target(self._bond_lengths, which)
            self._observe = bonds_of(self.system, which)
            self._gradient = bonds_gradient(which, target, estimator, config.replicas)

    # --- the state ----------------------------------------------------------------------------------------------------

    def init(self, key: Array) -> StableState:
        """The base model, and replicas at random training structures with fresh velocities."""
        config = self.config
        chosen = np.asarray(
            jax.random.choice(
                jax.random.fold_in(key, 0),
                len(self.train.positions),
                (config.replicas,),
                replace=len(self.train.positions) < config.replicas,
            )
        )
        swarm = self._simulator.start(self.base_params, self.train.positions[chosen], jax.random.fold_in(key, 1))
        params = jax.tree.map(jnp.copy, self.base_params)
        empty = jax.tree.map(lambda x: jnp.zeros((HISTORY, *x.shape), x.dtype), swarm)
        return StableState(
            params=params,
            optimizer=self._optimizer(0.0).init(params),
            monitor=init_monitor(params, self.policy),
            swarm=swarm,
            start=jax.tree.map(jnp.copy, swarm),
            history=empty,
            windows=jnp.zeros((), jnp.int32),
            unstable=~jnp.copy(swarm.alive),
            progress=stored(Progress()),
            updates=jnp.zeros((), jnp.int32),
            capacity=self._stored_room,
        )

    @property
    def _stored_room(self) -> Array:
        room = self.potential.room
        return jnp.asarray(room if len(room) > 1 else (*room, 0)[0], jnp.int32)

    def _optimizer(self, rate: Any) -> optax.GradientTransformation:
        """Plain gradient descent after clipping: stateless, so each cycle's optimiser is a fresh one."""
        return optax.chain(optax.clip_by_global_norm(self.config.stable_clip), optax.sgd(rate))

    def batch(self, position: int) -> Batch:
        """Nothing but the position: a window's data are the state."""
        return {"position": np.uint32(position)}

    def weights(self, state: StableState) -> dict[str, Params]:
        """The parameters; there is no average of them."""
        return {"raw": state.params}

    # --- one epoch ----------------------------------------------------------------------------------------------------

    def step(self, state: StableState, batch: Batch) -> tuple[StableState, Metrics]:
        """One window, and in a learning phase one update."""
        key = jax.random.fold_in(self._key, batch["position"])
        self._make_room(tuple(size for size in np.atleast_1d(state.capacity).tolist() if size))
        unstable = np.asarray(state.unstable)
        progress, plan = begin(self.schedule, loaded(state.progress), unstable)
        start, restarted = self._placed(state, plan, key)
        after, frames = self._simulator.window(state.params, start, jax.random.fold_in(key, WINDOW_STREAM))
        unstable_now = self._judge(frames)
        metrics: dict[str, Any] = {
            "stable/unstable_share": float(jnp.mean(unstable_now)),
            "stable/frozen_share": float(jnp.mean(~after.alive)),
            "stable/learning": float(plan.learning),
            "stable/restarted": float(restarted),
        }
        new = dataclasses.replace(state, swarm=after, start=start, unstable=unstable_now)
        if plan.learning:
            new, learnt = self._learning(new, frames, plan.learning_rate, key)
            metrics |= learnt
        progress, verdict = finish(self.schedule, progress, plan.unstable_share)
        place = int(state.windows) % HISTORY
        new = dataclasses.replace(
            new,
            history=jax.tree.map(lambda ring, x: ring.at[place].set(x), state.history, start),
            windows=state.windows + 1,
            progress=stored(progress),
            capacity=self._stored_room,
        )
        newly = {
            "monitor/stable/newly_unstable": float(np.sum(np.asarray(new.unstable) & ~unstable)),
            "monitor/stable/newly_frozen": float(jnp.sum(start.alive & ~after.alive)),
            "monitor/stable/reallocated": float(jnp.any(new.capacity != state.capacity)),
        }
        return new, metrics | newly | self._flags(plan, verdict, new)

    def _make_room(self, room: tuple[int, ...]) -> None:
        """The neighbour list as long as it was when the state was saved: another length is another program."""
        if room and self.potential.room != room:
            larger = self.potential.with_room(room)
            self._simulator = Simulator(self.system, self.conditions, potential=larger)

    def _placed(self, state: StableState, plan: Plan, key: Array) -> tuple[Swarm, int]:
        """The replicas where the plan wants them, with the forces of the parameters as they are."""
        swarm = where_replica(jnp.asarray(plan.rewind), state.start, state.swarm)
        known = min(int(state.windows), HISTORY)
        stable = np.flatnonzero(~plan.rewind)
        restarts = min(plan.restart, len(stable)) if known else 0
        if restarts:
            which, when = jax.random.split(jax.random.fold_in(key, CHOICE_STREAM))
            replicas = np.asarray(jax.random.choice(which, stable, (restarts,), replace=False))
            earlier = np.asarray(jax.random.randint(when, (restarts,), 0, known))
            swarm = jax.tree.map(lambda x, ring: x.at[replicas].set(ring[earlier, replicas]), swarm, state.history)
        return self._with_forces(state.params, swarm), restarts

    def _with_forces(self, params: Params, swarm: Swarm) -> Swarm:
        potential = self.potential
        cleared = dataclasses.replace(swarm, overflow=jnp.zeros_like(swarm.overflow))
        found: Swarm = self._compiled("forces", lambda p, s: with_forces(potential.energy_and_forces, p, s))(
            params, cleared
        )
        return found

    def _compiled(self, name: str, function: Any) -> Any:
        """A compiled function by name, made again when the neighbour list's room has changed."""
        known = self._programs
        place = name, self.potential.room
        if place not in known:
            known[place] = jax.jit(function)
        return known[place]

    def _learning(self, state: StableState, frames: Any, rate: float, key: Array) -> tuple[StableState, dict[str, Any]]:
        """Up to `reuse_steps` updates on a window's frames, those after the first while the frames stand for the
        potential; without an observable on the labelled frames alone, for which they need not."""
        config = self.config
        positions = frames.position.reshape(-1, self.system.count, 3)
        valid = frames.alive.reshape(-1)
        reference = frames.energy.reshape(-1)
        measured = None if self._observe is None else self._compiled("observe", self._observe)(positions)
        key = jax.random.fold_in(key, LEARNING_STREAM)
        learn = self._compiled("learn", self._learn_fresh)
        state, metrics = learn(state, positions, measured, valid, key, jnp.float32(rate))
        steps = 1
        while steps < config.reuse_steps:
            if self._again is None:
                state, metrics = learn(state, positions, measured, valid, key, jnp.float32(rate))
            else:
                again = self._compiled("again", self._learn_again)
                proposed, share, learnt = again(state, positions, measured, valid, reference, jnp.float32(rate))
                if not float(share) >= config.reuse_ratio:
                    break
                state, metrics = proposed, learnt
            steps += 1
        return dataclasses.replace(state, updates=state.updates + steps), {**metrics, "stable/updates": float(steps)}

    def _learn_fresh(
        self, state: StableState, positions: Array, measured: Array | None, valid: Array, key: Array, rate: Array
    ) -> tuple[StableState, dict[str, Array]]:
        learned = None
        if self._gradient is not None:
            assert measured is not None
            learned = self._gradient(self.potential, state.params, positions, measured, valid, key)
        return self._updated(state, learned, rate)

    def _learn_again(
        self, state: StableState, positions: Array, measured: Array, valid: Array, reference: Array, rate: Array
    ) -> tuple[StableState, Array, dict[str, Array]]:
        assert self._again is not None
        learned, weights = self._again(self.potential, state.params, positions, measured, valid, reference)
        share = effective_sample_size(weights) / jnp.maximum(jnp.sum(valid), 1)
        state, metrics = self._updated(state, learned, rate)
        return state, share, metrics

    def _updated(
        self, state: StableState, learned: Learned | None, rate: Array
    ) -> tuple[StableState, dict[str, Array]]:
        """The parameters one clipped step further along both gradients."""
        weight = self.config.energy_force_weight
        params = state.params
        zero = jax.tree.map(jnp.zeros_like, params)
        observable_slope = zero if learned is None else learned.gradient
        loss, slope = jnp.zeros(()), zero
        if weight:
            loss, slope = mean_loss_and_gradient(self._loss, params, self._structures, chunk=max(1, self._chunk // 2))
        slope = jax.tree.map(lambda x: weight * x, slope)
        total = jax.tree.map(jnp.add, observable_slope, slope)
        observable_loss = jnp.zeros(()) if learned is None else learned.loss
        update = guarded_update(
            self._optimizer(rate),
            loss=observable_loss + weight * loss,
            gradients=total,
            params=params,
            optimizer_state=state.optimizer,
            monitor=state.monitor,
            policy=self.policy,
        )
        norms = optax.tree.norm(observable_slope), optax.tree.norm(slope)
        both = optax.tree.vdot(observable_slope, slope)
        metrics = {
            "train/loss": observable_loss + weight * loss,
            "train/learning_rate": rate,
            "stable/observable_grad_norm": norms[0],
            "stable/energy_force_grad_norm": norms[1],
            **({"train/energy_force_loss": loss} if weight else {}),
            **update.metrics,
        }
        if learned is not None:
            metrics |= {
                "train/observable_loss": learned.loss,
                "stable/samples": learned.used.astype(jnp.float32),
                "stable/gradient_cosine": both / jnp.maximum(norms[0] * norms[1], 1e-30),
            }
        new = dataclasses.replace(state, params=update.params, optimizer=update.optimizer_state, monitor=update.monitor)
        return new, metrics

    # --- what is told -------------------------------------------------------------------------------------------------

    def _flags(self, plan: Plan, verdict: Verdict, new: StableState) -> dict[str, float]:
        """What `events` tells of, as numbers."""
        return {
            "monitor/stable/learning": float(plan.learning),
            "monitor/stable/begins_learning": float(plan.begins_learning),
            "monitor/stable/begin_share": plan.unstable_share,
            "monitor/stable/rewound": float(plan.rewind.sum()),
            "monitor/stable/lowered": float(verdict.lowered),
            "monitor/stable/ended": float(verdict.ended),
            "monitor/stable/cycle": float(new.progress.cycle),
            "monitor/stable/rate": plan.learning_rate,
        }

    def events(self, metrics: Metrics) -> list[dict[str, Any]]:
        """The decisions of one step, from its metrics: phases, rewinding, restarts, learning rates, cycles, frames used
        again, replicas that are frozen, neighbour lists made longer."""

        def flag(name: str) -> float:
            return float(metrics[f"monitor/stable/{name}"])

        told: list[dict[str, Any]] = []
        replicas, share, cycle = self.config.replicas, flag("begin_share"), int(flag("cycle"))
        if flag("begins_learning"):
            message = (
                f"{share:.0%} of {replicas} replicas are unstable: all back to where their windows began, and learn"
            )
            told.append({"kind": "learning", "share": share, "cycle": cycle, "message": message})
        elif not flag("learning") and flag("rewound"):
            told.append({"kind": "rewind", "replicas": int(flag("rewound"))})
        if metrics.get("stable/restarted"):
            told.append({"kind": "random-restart", "replicas": int(metrics["stable/restarted"])})
        if flag("newly_unstable") and not flag("learning"):
            told.append({"kind": "unstable", "replicas": int(flag("newly_unstable"))})
        if flag("newly_frozen"):
            told.append({"kind": "frozen", "replicas": int(flag("newly_frozen"))})
        if flag("reallocated"):
            told.append({"kind": "reallocated", "message": "the neighbour list was too short: longer now"})
        if (updates := int(metrics.get("stable/updates", 1))) > 1:
            told.append({"kind": "reuse", "updates": updates})
        if flag("lowered") and not flag("ended"):
            rate = flag("rate") * self.schedule.factor
            told.append({"kind": "learning-rate", "rate": rate, "message": f"no fewer unstable: rate {rate:.2g}"})
        if flag("ended"):
            why = "no replica is unstable" if share <= self.schedule.min_unstable else "the learning rate is at its end"
            message = f"cycle {cycle} is over, {why}: simulate again"
            told.append({"kind": "cycle-end", "share": share, "cycle": cycle, "message": message})
        return told

    def probe(self, state: StableState) -> Metrics:
        """Cycles and updates so far, and how far the parameters are from the base model's."""
        moved = jax.tree.map(jnp.subtract, state.params, self.base_params)
        return {
            "stable/cycle": jnp.asarray(state.progress.cycle, jnp.float32),
            "stable/updates_total": jnp.asarray(state.updates, jnp.float32),
            "stable/relative_change": optax.tree.norm(moved) / optax.tree.norm(self.base_params),
        }

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, state: StableState, step: int, context: EvaluationContext) -> Evaluation:
        """The potential as it is beside the base model: see `StableEvaluation`."""
        return self._evaluation(self.potential, state.params, step, context)
