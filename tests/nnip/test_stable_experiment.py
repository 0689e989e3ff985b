"""StABlE Training whole: what is learnt, what is told, and that a run may be killed in either phase."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.errors import ConfigError
from stabletrain.methods.stable import boltzmann_gradient
from stabletrain.nnip.pairs import Pairs
from stabletrain.nnip.potential import EnergyScale, Potential
from stabletrain.nnip.stable_experiment import StableExperiment
from stabletrain.nnip.stable_learning import (
    Estimator,
    Structures,
    distances_gradient,
    distances_observable,
    distances_of,
    distances_target,
    energy_force_loss,
    equal_molecules,
    mean_loss_and_gradient,
)
from stabletrain.nnip.stable_options import StableOptions, stable_problems
from stabletrain.nnip.stable_phases import Progress
from stabletrain.nnip.stable_state import loaded, stored
from stabletrain.nnip.systems import make_system
from stabletrain.nnip.units import thermal_energy
from stabletrain.training.config import TrainConfig, make_config, option
from stabletrain.training.devices import make_mesh
from stabletrain.training.loop import train
from stabletrain.training.run_directory import RunDirectory
from stabletrain.training.signals import StopRequest
from stabletrain.training.state import fresh_state, init_key, state_hash
from tests.training.toy import Told

WATER = np.asarray([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
SYSTEM = make_system([8, 1, 1], WATER)


class Springs(nn.Module):
    """Half of a harmonic spring between each pair of atoms to either: stiffness and lengths are learnt."""

    @nn.compact
    def __call__(self, species: jax.Array, pairs: Pairs) -> jax.Array:
        stiffness = self.param("stiffness", lambda key: jnp.asarray(4.0))
        lengths = self.param("lengths", lambda key: jnp.asarray([0.96, 1.53]))
        rest = jnp.where((species[pairs.first] == 1) & (species[pairs.second] == 1), lengths[1], lengths[0])
        energy = jnp.where(pairs.mask, 0.5 * stiffness * (pairs.distance - rest) ** 2, 0)
        both = jnp.zeros(len(species)).at[pairs.first].add(energy / 2)
        return both.at[pairs.second].add(energy / 2)


POTENTIAL = Potential("springs", Springs(), SYSTEM, 5.0, EnergyScale(1.0, {1: 0.0, 8: 0.0}))
TRUTH = {"stiffness": jnp.asarray(20.0), "lengths": jnp.asarray([0.96, 1.53])}
SOFT = {"stiffness": jnp.asarray(1.2), "lengths": jnp.asarray([0.96, 1.53])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StableOptions, TrainConfig):
    """The options of the family that matter here, sized for a second."""

    steps: int = option(6, "Steps.")
    batch_size: int = option(1, "Batch.")
    devices: int = option(1, "Devices.", identity=False)
    log_every: int = option(1, "Rows.")
    checkpoint_every: int = option(1, "Checkpoints.", identity=False)
    replicas: int = option(4, "Replicas.")
    window: int = option(20, "Window.")
    frame_every: int = option(5, "Frames.")
    benchmark_replicas: int = option(0, "Benchmark.")
    benchmark_time: float = option(0.02, "Time.")

    @property
    def method(self) -> str:
        return "stable"


def structures(count: int = 24) -> Structures:
    rng = np.random.default_rng(0)
    x = WATER + rng.normal(size=(count, 3, 3)) * 0.05
    energy, forces = jax.jit(jax.vmap(POTENTIAL.energy_and_forces, (None, 0)))(TRUTH, jnp.asarray(x, jnp.float32))
    return Structures(x, np.asarray(energy, float), np.asarray(forces, float))


FRAMES = structures()


def experiment(*, params: Any = SOFT, potential: Potential = POTENTIAL, **options: Any) -> StableExperiment:
    config = make_config(Config, options)
    return StableExperiment(
        config,
        mesh=make_mesh(1, 1),
        potential=potential,
        params=params,
        train=FRAMES,
        test=FRAMES,
        loss=energy_force_loss(potential),
    )


def run(path: Path, stable: StableExperiment) -> RunDirectory:
    directory = RunDirectory.create(path, "nnip", stable.config)
    train(stable, run=directory, reporter=Told(), stop=StopRequest())
    return RunDirectory.open(path)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_energy_force_loss_over_the_whole_set_in_chunks() -> None:
    """The mean over structures and its gradient, whatever the chunk; zero at the truth."""
    loss, tree = energy_force_loss(POTENTIAL), FRAMES.tree()
    whole = jax.value_and_grad(lambda p: jnp.mean(jax.vmap(loss, (None, 0))(p, tree)))(SOFT)
    for chunk in (7, 24, 100):
        value, slope = jax.jit(lambda p, c=chunk: mean_loss_and_gradient(loss, p, tree, chunk=c))(SOFT)
        assert float(value) == pytest.approx(float(whole[0]), rel=1e-5)
        np.testing.assert_allclose(slope["stiffness"], whole[1]["stiffness"], rtol=1e-5)
    assert float(mean_loss_and_gradient(loss, TRUTH, tree, chunk=32)[0]) < 1e-10


def test_learning_h_of_r_stiffens_a_soft_spring() -> None:
    """Samples of a potential that is too soft spread too far: the gradient asks for more stiffness."""
    observable = distances_observable(SYSTEM, 3.0)
    target = distances_target(observable, FRAMES.positions)
    assert float(target.sum()) == pytest.approx(100.0, rel=1e-4)
    kT, rng = 0.043, np.random.default_rng(1)
    wide = jnp.asarray(WATER + rng.normal(size=(400, 3, 3)) * 0.12, jnp.float32)
    measure, gradient = distances_of(observable), distances_gradient(target, Estimator(kT))
    every, key = jnp.ones(len(wide), bool), jax.random.key(0)
    learned = jax.jit(lambda x: gradient(POTENTIAL, SOFT, x, measure(x), every, key).gradient)(wide)
    assert float(learned["stiffness"]) < 0


def test_molecules_must_be_alike() -> None:
    pair = np.concatenate([WATER, WATER + np.asarray([0, 0, 3.0])])
    which = equal_molecules(make_system([8, 1, 1, 8, 1, 1], pair, 12.0))
    assert which.atoms.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert which.bonds.tolist() == [[0, 1], [2, 3]]
    mixed = np.concatenate([WATER, [[0.0, 0, 4.0]]])
    with pytest.raises(ValueError, match="all alike"):
        equal_molecules(make_system([8, 1, 1, 18], mixed))


# --- the course -------------------------------------------------------------------------------------------------------


def test_a_stable_potential_is_left_alone(tmp_path: Path) -> None:
    """At the true stiffness nothing fails, so nothing is learnt, and the replicas go on."""
    stable = experiment(params=TRUTH, steps=3)
    directory = run(tmp_path / "run", stable)
    rows = directory.rows()
    assert [row["stable/learning"] for row in rows] == [0, 0, 0]
    assert [row["stable/unstable_share"] for row in rows] == [0, 0, 0]
    assert rows[-1]["stable/relative_change"] == 0
    assert rows[-1]["eval/force_mae_test"] < 0.01
    assert not [event for event in directory.events() if event["kind"] in ("learning", "rewind", "cycle-end")]


def test_a_soft_potential_fails_is_rewound_and_learns(tmp_path: Path) -> None:
    directory = run(tmp_path / "run", experiment(energy_force_weight=1.0, stable_learning_rate=0.05, steps=8))
    rows, events = directory.rows(), directory.events()
    learning = [bool(row["stable/learning"]) for row in rows]
    assert not learning[0]
    assert learning[-1]
    begun = next(event for event in events if event["kind"] == "learning")
    assert begun["step"] == learning.index(True) + 1
    assert begun["share"] >= 0.75
    before = rows[learning.index(True) - 1]
    assert begun["share"] == before["stable/unstable_share"]
    last = rows[-1]
    assert last["train/learning_rate"] == pytest.approx(0.05)
    assert last["stable/updates_total"] == sum(learning)
    assert last["stable/relative_change"] > 0
    assert {"train/observable_loss", "train/energy_force_loss", "stable/gradient_cosine"} <= last.keys()
    assert not any(name.startswith("monitor/") for name in last)


def test_in_a_learning_phase_every_window_begins_at_the_same_place() -> None:
    stable = experiment(stable_learning_rate=0.0)
    state = fresh_state(stable)
    learning = dataclasses.replace(
        state, progress=stored(Progress(learning=True)), unstable=jnp.ones(4, bool), start=state.swarm
    )
    first, _ = stable.step(learning, stable.batch(0))
    second, _ = stable.step(first, stable.batch(1))
    for part in ("position", "velocity", "friction"):
        a, b = getattr(first.start.replicas, part), getattr(second.start.replicas, part)
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, getattr(state.swarm.replicas, part))
    # Nose-Hoover is deterministic and the rate is zero: the same window again.
    np.testing.assert_array_equal(first.swarm.replicas.position, second.swarm.replicas.position)


def test_in_a_simulation_phase_the_unstable_go_back_and_the_others_on() -> None:
    stable = experiment(params=TRUTH, restart_share=0.0)
    state, _ = stable.step(fresh_state(stable), stable.batch(0))
    state = dataclasses.replace(state, unstable=jnp.asarray([True, False, False, False]))
    after, metrics = stable.step(state, stable.batch(1))
    np.testing.assert_array_equal(after.start.replicas.position[0], state.start.replicas.position[0])
    np.testing.assert_array_equal(after.start.replicas.position[1:], state.swarm.replicas.position[1:])
    assert [event["kind"] for event in stable.events(metrics)] == ["rewind"]


def test_random_restarts_come_from_earlier_starts_of_the_same_replica() -> None:
    stable = experiment(params=TRUTH, restart_share=0.5)
    state = fresh_state(stable)
    for number in range(3):
        state, _ = stable.step(state, stable.batch(number))
    # A cycle has just ended: half of the four stable replicas jump.
    state = dataclasses.replace(state, progress=stored(Progress(cycle=1)))
    after, metrics = stable.step(state, stable.batch(3))
    moved = [
        r for r in range(4) if not np.array_equal(after.start.replicas.position[r], state.swarm.replicas.position[r])
    ]
    assert len(moved) == 2 == metrics["stable/restarted"]
    for r in moved:
        earlier = np.asarray(state.history.replicas.position[:3, r])
        assert any(np.array_equal(after.start.replicas.position[r], x) for x in earlier)
    assert "random-restart" in [event["kind"] for event in stable.events(metrics)]


def test_the_control_learns_energies_and_forces_alone() -> None:
    """With --observable none the update is the clipped step along the energy-force gradient."""
    stable = experiment(observable="none", stable_learning_rate=0.1, energy_force_weight=1.0, stable_clip=1e9)
    state = dataclasses.replace(
        fresh_state(stable), progress=stored(Progress(learning=True)), unstable=jnp.ones(4, bool)
    )
    after, metrics = stable.step(state, stable.batch(0))
    _, slope = mean_loss_and_gradient(energy_force_loss(POTENTIAL), SOFT, FRAMES.tree(), chunk=32)
    np.testing.assert_allclose(after.params["stiffness"], SOFT["stiffness"] - 0.1 * slope["stiffness"], rtol=1e-4)
    assert "train/observable_loss" not in metrics


def test_a_window_may_be_learnt_from_again_while_its_frames_stand_for_the_potential() -> None:
    def updates(rate: float) -> float:
        stable = experiment(stable_learning_rate=rate, reuse_ratio=0.9, reuse_steps=3)
        state = dataclasses.replace(
            fresh_state(stable), progress=stored(Progress(learning=True)), unstable=jnp.ones(4, bool)
        )
        after, metrics = stable.step(state, stable.batch(0))
        assert int(after.updates) == metrics["stable/updates"]
        told = [event["updates"] for event in stable.events(metrics) if event["kind"] == "reuse"]
        assert told == ([metrics["stable/updates"]] if metrics["stable/updates"] > 1 else [])
        return float(metrics["stable/updates"])

    assert updates(1e-4) == 3  # a potential that hardly moves
    assert updates(0.5) == 1  # one that is another after its first step


def test_the_control_takes_its_further_steps_on_the_labelled_frames() -> None:
    options = {"observable": "none", "stable_learning_rate": 0.01, "energy_force_weight": 1.0, "stable_clip": 1e9}
    stable = experiment(**options, reuse_steps=3)
    state = dataclasses.replace(
        fresh_state(stable), progress=stored(Progress(learning=True)), unstable=jnp.ones(4, bool)
    )
    after, metrics = stable.step(state, stable.batch(0))
    params, rate = SOFT, 0.01
    for _ in range(3):
        _, slope = mean_loss_and_gradient(energy_force_loss(POTENTIAL), params, FRAMES.tree(), chunk=32)
        params = jax.tree.map(lambda p, g: p - rate * g, params, slope)
    np.testing.assert_allclose(after.params["stiffness"], params["stiffness"], rtol=1e-5)
    assert metrics["stable/updates"] == 3


def test_fewer_structures_at_once_learn_the_same() -> None:
    """--gradient-chunk bounds the structures of a reverse pass, half as many with forces, and changes nothing else."""

    def learnt(chunk: int) -> tuple[Any, str]:
        stable = experiment(gradient_chunk=chunk, stable_learning_rate=0.01)
        state = dataclasses.replace(
            fresh_state(stable), progress=stored(Progress(learning=True)), unstable=jnp.ones(4, bool)
        )
        after, _ = stable.step(state, stable.batch(0))
        frames, flags = jnp.zeros((16, 3, 3)), jnp.ones(16, bool)
        measured = stable._observe(frames)
        arguments = (state, frames, measured, flags, jax.random.key(0), jnp.float32(0.01))
        return after.params, str(jax.make_jaxpr(stable._learn_fresh)(*arguments))

    (few, small), (many, large) = learnt(10), learnt(64)
    np.testing.assert_allclose(few["stiffness"], many["stiffness"], rtol=1e-5)
    assert "f32[2,10,3,3]" in small  # 16 frames of the window
    assert "f32[5,5,3,3]" in small  # 24 labelled ones
    assert "f32[2,10,3,3]" not in large


def test_the_covariance_within_replicas_is_that_of_each_replicas_frames() -> None:
    """Fresh and reweighted steps see, of what the paper's estimator sees, each replica's frames for themselves."""
    stable = experiment(covariance="within-replicas", energy_force_weight=0.0)
    state = fresh_state(stable)
    _, frames = stable._simulator.window(SOFT, state.swarm, jax.random.key(3))
    positions = frames.position.reshape(-1, 3, 3)
    valid, reference = frames.alive.reshape(-1), frames.energy.reshape(-1)
    assert len(positions) == 16

    observable = distances_observable(SYSTEM, 10.0)
    curves = observable.of_frames(positions) * observable.spacing * 100
    v = 2 * (curves.mean(0) - distances_target(observable, FRAMES.positions))
    kT = thermal_energy(500.0)
    expected = 0.0
    for replica in range(4):
        part = slice(4 * replica, 4 * replica + 4)
        slope = boltzmann_gradient(POTENTIAL.energy, SOFT, positions[part], curves[part], v, kT=kT)
        expected += kT * float(slope["stiffness"]) * 3 / 12  # 3 of 4 - 1 each, over 16 - 4
    measured = stable._observe(positions)
    np.testing.assert_allclose(measured, curves, rtol=1e-5)
    fresh = stable._gradient(POTENTIAL, SOFT, positions, measured, valid, jax.random.key(0)).gradient
    assert float(fresh["stiffness"]) == pytest.approx(expected, rel=1e-3)
    again, weights = stable._again(POTENTIAL, SOFT, positions, measured, valid, reference)
    np.testing.assert_allclose(weights, 1 / 16, rtol=1e-3)
    assert float(again.gradient["stiffness"]) == pytest.approx(expected * 12 / 16, rel=1e-3)


def test_h_of_r_reaches_as_far_as_it_is_asked_to(tmp_path: Path) -> None:
    directory = run(tmp_path / "run", experiment(steps=1, benchmark_replicas=4, distance_reach=1.2))
    row = directory.rows()[-1]
    assert row["eval/h_r_error_0.02ps_500K"] > 0
    stable = experiment(distance_reach=1.2)
    first = stable._evaluation._observables(POTENTIAL)[0]
    assert len(first.grid) == 60
    assert first.grid[-1] < 1.2
    state = dataclasses.replace(
        fresh_state(stable), progress=stored(Progress(learning=True)), unstable=jnp.ones(4, bool)
    )
    longer = experiment(distance_reach=10.0)
    losses = [float(s.step(state, s.batch(0))[1]["train/observable_loss"]) for s in (stable, longer)]
    assert losses[0] != losses[1]  # the hydrogens' distance is beyond 1.2 A


def test_a_replica_that_is_frozen_and_a_longer_neighbour_list_are_told() -> None:
    stable = experiment(params=TRUTH, restart_share=0.0)
    state, _ = stable.step(fresh_state(stable), stable.batch(0))
    fast = state.swarm.replicas.velocity.at[1].set(1e3)  # A / fs: further in a step than an atom may
    swarm = dataclasses.replace(state.swarm, replicas=dataclasses.replace(state.swarm.replicas, velocity=fast))
    _, metrics = stable.step(dataclasses.replace(state, swarm=swarm), stable.batch(1))
    assert {"kind": "frozen", "replicas": 1} in stable.events(metrics)
    assert "reallocated" not in [event["kind"] for event in stable.events(metrics)]
    kinds = [event["kind"] for event in stable.events({**metrics, "monitor/stable/reallocated": 1.0})]
    assert "reallocated" in kinds


def test_progress_survives_being_stored() -> None:
    for progress in (Progress(), Progress(True, 2, 5, 1, 0.875, 3)):
        assert loaded(stored(progress)) == progress


# --- killed and resumed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["simulation", "learning"])
def test_a_run_killed_in_either_phase_goes_on_to_the_bit(tmp_path: Path, phase: str) -> None:
    options = {"energy_force_weight": 1.0, "stable_learning_rate": 0.05, "steps": 7, "thermostat": "nose-hoover"}
    whole = run(tmp_path / "whole", experiment(**options))
    learning = [bool(row["stable/learning"]) for row in whole.rows()]
    kill_at = 1 if phase == "simulation" else learning.index(True) + 2  # windows that are over when it is killed
    assert learning[kill_at - 1] == (phase == "learning")
    killed = experiment(**options)
    real_step = killed.step

    def step(state: Any, batch: Any) -> Any:
        if int(batch["position"]) == kill_at:
            raise KeyboardInterrupt
        return real_step(state, batch)

    killed.step = step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", killed)
    directory = RunDirectory.open(tmp_path / "killed")
    again = experiment(**options)
    outcome = train(again, run=directory, reporter=Told(), stop=StopRequest())
    assert outcome.status == "done"
    assert directory.status["params_sha256"] == whole.status["params_sha256"]
    clock = ("time", "perf/")
    for one, other in zip(directory.rows(), whole.rows(), strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(clock)} == {
            k: v for k, v in other.items() if not k.startswith(clock)
        }

    def told(run: RunDirectory) -> list[tuple[int, str]]:
        kinds = ("learning", "rewind", "unstable", "cycle-end", "random-restart", "learning-rate", "frozen")
        return [(event["step"], event["kind"]) for event in run.events() if event["kind"] in kinds]

    assert told(directory) == told(whole)


def test_the_same_seed_gives_the_same_start_and_another_seed_another() -> None:
    one, other = experiment(), experiment()
    assert state_hash(one.init(init_key(0))) == state_hash(other.init(init_key(0)))
    assert state_hash(one.init(init_key(0))) != state_hash(one.init(init_key(1)))


# --- evaluation and bad input -----------------------------------------------------------------------------------------


def test_an_evaluation_compares_with_the_base(tmp_path: Path) -> None:
    directory = run(tmp_path / "run", experiment(steps=1, benchmark_replicas=4))
    row = directory.rows()[-1]
    for name in ("stable_share", "median_stable_ps", "h_r_error", "h_r_noise_floor"):
        assert row[f"eval/{name}_0.02ps_500K"] == row[f"eval/base_{name}_0.02ps_500K"]  # nothing was learnt yet
    assert row["eval/force_mae_test"] == row["eval/base_force_mae_test"] > 0
    assert (directory.path / "eval" / "survival-00000001.png").is_file()


def test_an_evaluation_at_other_temperatures_reports_survival_alone(tmp_path: Path) -> None:
    options = {"steps": 1, "benchmark_replicas": 8, "benchmark_time": 0.1, "benchmark_bond_deviation": 0.1}
    directory = run(tmp_path / "run", experiment(**options, benchmark_temperatures=(20.0, 3000.0)))
    row = directory.rows()[-1]
    shares = [row[f"eval/base_stable_share_0.1ps_{temperature}K"] for temperature in (20, 500, 3000)]
    assert shares == [row[f"eval/stable_share_0.1ps_{temperature}K"] for temperature in (20, 500, 3000)]
    assert shares[0] > shares[1] >= shares[2] == 0
    assert "eval/h_r_error_0.1ps_500K" in row
    assert "eval/h_r_error_0.1ps_20K" not in row
    assert {path.name for path in (directory.path / "eval").glob("survival*")} == {
        "survival-00000001.png", "survival-20K-00000001.png", "survival-3000K-00000001.png",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame_every": 7}, "does not divide"),
        ({"observable": "none", "residual": "released"}, "does nothing"),
        ({"observable": "none", "energy_force_weight": 0.0}, "learns nothing"),
        ({"observable": "bond-lengths", "reuse_steps": 2}, "--reuse-steps"),
        ({"covariance": "within-replicas", "observable": "bond-lengths"}, "is for --observable distances"),
        ({"covariance": "within-replicas", "observable": "none"}, "is for --observable distances"),
        ({"covariance": "within-replicas", "residual": "released"}, "does not go with"),
        ({"covariance": "within-replicas", "frame_every": 20}, "needs two frames"),
        ({"min_unstable": 0.8}, "must be below"),
        ({"benchmark_temperatures": (300.0, 500.0), "benchmark_replicas": 4}, "holds 500, at which it is run anyway"),
        ({"benchmark_temperatures": (300.0,), "benchmark_replicas": 0}, "does nothing"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    assert any(message in problem for problem in stable_problems(make_config(Config, options)))


def test_what_a_system_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="more than a single molecule"):
        experiment(min_distance=1.0)
    boxed = dataclasses.replace(POTENTIAL, system=make_system([8, 1, 1], WATER, 12.0))
    with pytest.raises(ConfigError, match="--observable bond-lengths"):
        experiment(potential=boxed, max_bond_deviation=0.3)
    with pytest.raises(ConfigError, match="--distance-reach is for molecules"):
        experiment(potential=boxed, max_bond_deviation=0.3, distance_reach=5.0, observable="none")
