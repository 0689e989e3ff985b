"""The continual experiment: what a step sees, resuming amid overlapping tasks, devices, every method's steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.continual.config import ContinualConfig, resolve
from stabletrain.continual.experiment import MEMORY, TASK, ContinualExperiment
from stabletrain.continual.networks import build_network
from stabletrain.errors import ConfigError
from stabletrain.training import loop
from stabletrain.training.config import make_config
from stabletrain.training.devices import compile_step, make_mesh
from stabletrain.training.run_directory import RunDirectory
from stabletrain.training.signals import StopRequest
from stabletrain.training.state import fresh_state, state_hash
from tests.training.toy import StopAfter, Told

TINY: dict[str, Any] = {"hidden": (8,), "batch_size": 32, "devices": 1, "timeline": "staggered", "inner_steps": 1}


def experiment(devices: int = 1, **values: Any) -> ContinualExperiment:
    config = resolve(make_config(ContinualConfig, {"method": "er", **TINY, **values}))
    return ContinualExperiment(config, mesh=make_mesh(devices, config.batch_size))


HURRIED: Any = {"xla_backend_optimization_level": 0}


def compiled(made: ContinualExperiment) -> Any:
    """The step, compiled in a hurry: a step or two of it is all that a test takes."""
    return jax.jit(made.step, compiler_options=HURRIED)


def run(path: Path, stop: StopRequest | None = None, **values: Any) -> Any:
    made = experiment(**values)
    directory = RunDirectory.create(path, "continual", made.config)
    return loop.train(made, run=directory, reporter=Told(), stop=stop or StopRequest())


def comparable_rows(path: Path) -> list[dict[str, Any]]:
    rows = RunDirectory.open(path).rows()
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")} for row in rows]


# --- what a step sees -------------------------------------------------------------------------------------------------


def test_slots_are_the_memory_and_the_active_tasks():
    made = experiment()
    timeline, labels = made.timeline, np.asarray(made.resident["labels"])
    widths = set()
    for step in range(timeline.steps):
        batch = made.batch(step)
        on = batch["kind"] > 0
        tasks = [int(identity) - 1 for identity in batch["identity"][batch["kind"] == TASK]]
        assert tasks == timeline.active(step)
        assert (batch["kind"] == MEMORY).sum() == bool(timeline.finished(step))
        assert not batch["weight"][~on].any()
        for k in np.flatnonzero(batch["kind"] == TASK):
            own = labels[batch["index"][k][batch["weight"][k] > 0]]
            assert set(own) <= set(timeline.classes[batch["identity"][k] - 1])
        widths.add(int(on.sum()))
    assert made.schedule.width == max(widths)
    assert {1, 2, 3} <= widths


def test_measurements_lie_before_starts_and_after_ends():
    made = experiment()
    measured = set(made.schedule.measured)
    assert {end + 1 for end in made.timeline.ends} <= measured
    assert {start for start in made.timeline.starts if start} <= measured
    assert {start + 1 for start in made.timeline.starts if start} <= measured
    assert max(measured) == made.timeline.steps


def test_class_and_task_incremental_losses_differ_by_their_masks():
    """With logits all equal the loss is the log of the number of classes that compete."""
    for scenario, classes in (("class", lambda begun: 2 * begun), ("task", lambda begun: 2)):
        made = experiment(scenario=scenario)
        state = fresh_state(made)
        head = jax.tree.map(jnp.zeros_like, state.params["head"])
        state.params["head"] = head
        step = made.timeline.starts[2]
        _, metrics = compiled(made)(state, {**made.batch(step), **made.resident})
        np.testing.assert_allclose(metrics["train/loss"], np.log(classes(3)), rtol=1e-6)


def test_steps_behind_the_timeline_s_end_change_nothing():
    """After a rollback the loop asks for later batches: nothing comes there, and parameters must stand still."""
    made = experiment()
    state = fresh_state(made)
    before = state_hash(state.params)
    state, _ = compiled(made)(state, {**made.batch(made.timeline.steps + 3), **made.resident})
    assert state_hash(state.params) == before


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_stopped_amid_overlapping_tasks_ends_the_same_to_the_bit(tmp_path: Path):
    """With all that a state can hold: GradNorm's weights, and the logits stored with the examples of the buffer."""
    options = {"checkpoint_every": 9, "log_every": 4, "method": "derpp", "aggregator": "gradnorm"}
    reference = run(tmp_path / "whole", **options)
    assert reference.status == "done"
    made = experiment(**options)
    assert len(made.timeline.active(9)) == 2, "the first checkpoint lies where tasks overlap"
    sessions = 0
    while run(tmp_path / "cut", stop=StopAfter(9), **options).status == "preempted":
        sessions += 1
        assert sessions < 40
    assert sessions > 1
    whole, cut = RunDirectory.open(tmp_path / "whole"), RunDirectory.open(tmp_path / "cut")
    assert cut.status["params_sha256"] == whole.status["params_sha256"]
    assert comparable_rows(tmp_path / "cut") == comparable_rows(tmp_path / "whole")
    for name in ("accuracy.json", "timeline.toml", "timeline.png"):
        assert (tmp_path / "cut/eval" / name).read_bytes() == (tmp_path / "whole/eval" / name).read_bytes()


def test_the_number_of_devices_does_not_change_the_course():
    """Sums over a batch are added in another order: float32 rounding, grown over four steps of Adam."""
    params = []
    for devices in (1, 4):
        made = experiment(devices=devices, inner_steps=1)
        steps, state = compile_step(made, made.mesh), fresh_state(made)
        for step in range(6, 10):
            state, _ = steps(state, [made.batch(step)])
        params.append(jax.device_get(state.params))
    for other in params[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params[0], other)


def test_a_run_tells_its_metrics_and_pictures(tmp_path: Path):
    outcome = run(tmp_path / "run", measure_every=7, hidden=(64,), learning_rate=0.01)
    metrics = outcome.metrics
    own, final = metrics["eval/accuracy_own_end_class"], metrics["eval/accuracy_final_class"]
    assert metrics["eval/accuracy_change_class"] == pytest.approx(final - own)
    assert metrics["eval/accuracy_now_class"] == pytest.approx(final)
    assert own > 0.3, "five tasks of two classes by chance: 0.2 or less"
    for name in ("condition", "effective_rank", "mean_cosine", "conflict_rate", "least_progress"):
        assert f"stability/{name}" in metrics
    document = json.loads((tmp_path / "run/eval/accuracy.json").read_text())
    assert set(range(7, max(document["steps"]), 7)) <= set(document["steps"])
    for picture in ("timeline.png", f"accuracy_{outcome.step:08d}.png"):
        assert (tmp_path / "run/eval" / picture).read_bytes().startswith(b"\x89PNG")


def test_single_tasks_alone_are_learned_better_than_together(tmp_path: Path):
    options = {"method": "single", "scenario": "task", "hidden": (64,), "learning_rate": 0.01, "timeline": "serial"}
    alone = run(tmp_path / "alone", **options).metrics
    assert alone["eval/accuracy_own_end_task"] > 0.8
    assert "eval/accuracy_final_task" not in alone


@pytest.mark.parametrize("method", ["gem", "icarl", "gmed", "mdmt-r"])
def test_baselines_take_steps_with_a_memory(method: str):
    made = experiment(method=method)
    step, state = compiled(made), fresh_state(made)
    before = state_hash(state.params)
    with_memory = made.timeline.ends[0] + 1
    for position in (0, with_memory, with_memory + 1):
        state, metrics = step(state, {**made.batch(position), **made.resident})
        assert np.isfinite(metrics["train/loss"])
    assert state_hash(state.params) != before
    if method == "gem":
        assert made.batch(made.timeline.steps - 1)["kind"].tolist().count(MEMORY) == 4
    if method == "icarl":
        assert state_hash(state.old["params"]) != before
    if method == "gmed":
        assert float(jnp.abs(state.stored["images"]).max()) > 0


@pytest.mark.parametrize(
    "method", ["agem", "mega", "finetune", "joint", "spcl-released", "uw", "emgd", "graddrop-released"]
)
def test_a_step_fits_the_state(method: str):
    """Traced and not compiled: what the rules compute is tested by themselves."""
    timeline = "parallel" if method == "joint" else "staggered"
    made = experiment(method=method, timeline=timeline, hidden=(8, 8))
    state = jax.eval_shape(made.init, jax.random.key(0))
    after, metrics = jax.eval_shape(made.step, state, {**made.batch(0), **made.resident})
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert {"train/loss", "stability/condition", "stability/least_progress"} <= set(metrics)


def test_seeds_share_their_programs():
    """Nothing of a seed is a constant of the program: the second of five seeds compiles nothing."""
    texts = set()
    for seed in (0, 1):
        made = experiment(seed=seed, method="pcgrad")
        state = jax.eval_shape(made.init, jax.random.key(0))
        texts.add(jax.jit(made.step).lower(state, {**made.batch(0), **made.resident}).as_text())
    assert len(texts) == 1


@pytest.mark.parametrize("method", ["er", "graddrop"])
def test_one_gradient_at_a_time_gives_the_same_update(method: str):
    """Sums in another order: float32 rounding of parameters near 1."""
    params = []
    for memory in ("fast", "low"):
        made = experiment(method=method, gradient_memory=memory)
        state, position = fresh_state(made), made.timeline.starts[2]
        state, metrics = compiled(made)(state, {**made.batch(position), **made.resident})
        told = [float(metrics[f"stability/{name}"]) for name in ("condition", "least_progress")]
        params.append((jax.device_get(state.params), told))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params[0][0], params[1][0])
    assert params[0][1] == pytest.approx(params[1][1], rel=1e-3)


def test_conditioning_lowers_the_condition_number():
    """alpha = 10 leaves lengths that differ by less than a factor of two here."""
    made = experiment(method="spcl", orthogonality="none")
    state, position = fresh_state(made), made.timeline.starts[2]
    _, metrics = compiled(made)(state, {**made.batch(position), **made.resident})
    assert metrics["stability/gradients"] > 1
    assert 1 <= metrics["stability/condition_after"] < min(2.0, float(metrics["stability/condition"]))


def test_a_float64_gram_matrix_tells_what_float32_cannot():
    """The same examples in two slots, but for one: float32 rounds the smallest singular value away."""
    told = []
    for precision in ("float32", "float64"):
        made = experiment(method="aligned-mtl", gram_precision=precision, batch_size=64, memory_per_class=0)
        state, batch = fresh_state(made), made.batch(made.timeline.starts[1])
        on = np.flatnonzero(batch["kind"] == TASK)[:2]
        for name in ("index", "weight"):
            batch[name][on[1]] = batch[name][on[0]]
        batch["weight"][on[1], 0] = 1.01  # almost the same loss, almost the same gradient
        _, metrics = compiled(made)(state, {**batch, **made.resident})
        assert metrics["stability/condition"].dtype == jnp.float32
        told.append(float(metrics["stability/condition"]))
        assert np.isfinite(metrics["stability/least_progress"])
    assert 1e4 < told[1] < 1e6
    assert abs(told[0] - told[1]) > 0.5 * told[1]


def test_stored_logits_are_those_of_the_step_at_which_an_example_came():
    made = experiment(method="der")
    state = fresh_state(made)
    batch = made.batch(0)
    params = jax.tree.map(jnp.copy, state.params)
    after, _ = compiled(made)(state, {**batch, **made.resident})
    slots = batch["arrive"][0]
    where = np.flatnonzero(slots >= 0)
    images = made.to_input(made.resident["images"][batch["index"][0][where]])
    _, logits = made.apply(params, {}, images)
    np.testing.assert_allclose(after.stored["logits"][slots[where]], logits, atol=1e-5)


def test_a_step_moves_running_statistics():
    made = experiment(width=4, hidden=(), network="conv", norm="batch")
    state = fresh_state(made)
    before = state_hash(state.statistics)
    state, metrics = compiled(made)(state, {**made.batch(0), **made.resident})
    assert np.isfinite(metrics["train/loss"])
    assert state_hash(state.statistics) != before


def test_resnet18_takes_steps():
    """Its step is traced; its forward pass in training is run."""
    made = experiment(width=4, hidden=(), network="resnet18", norm="batch", batch_size=4)
    state = jax.eval_shape(made.init, jax.random.key(0))
    after, _ = jax.eval_shape(made.step, state, {**made.batch(0), **made.resident})
    assert jax.tree.structure(after) == jax.tree.structure(state)
    rng = np.random.default_rng(0)  # drawn here: initialising would compile for longer than all the rest
    drawn = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), state.params)
    statistics = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), state.statistics)

    def forward(variables: Any, images: Any) -> Any:
        return made.network.apply(variables, images, running=False, mutable=["batch_stats"])

    program = jax.jit(forward, compiler_options=HURRIED)
    images = made.to_input(made.resident["images"][:4])
    (features, logits), moved = program({"params": drawn, "batch_stats": statistics}, images)
    assert features.shape == (4, 32)
    assert logits.shape == (4, 10)
    assert np.isfinite(logits).all()
    assert not any(np.array_equal(leaf, np.ones_like(leaf)) for leaf in jax.tree.leaves(moved["batch_stats"]))


def test_networks_have_the_published_numbers_of_parameters():
    """The MLP of PS-EMNIST, and ResNet-18 for 100 classes but for the 1,792 that its docstring names."""
    counts = []
    for values in ({"network": "mlp"}, {"network": "resnet18"}):
        config = resolve(make_config(ContinualConfig, {"method": "er", **values}))
        classes, image = (62, (1, 28, 28, 1)) if values["network"] == "mlp" else (100, (1, 32, 32, 3))
        network = build_network(config, classes, jnp.float32)
        shapes = jax.eval_shape(lambda n=network, i=image: n.init(jax.random.key(0), jnp.zeros(i), running=True))
        counts.append(sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes["params"])))
    assert counts == [112_766, 11_224_932 - 1_792]


def test_more_steps_than_the_timeline_has_are_refused():
    with pytest.raises(ConfigError, match=r"more than the \d+ steps of the timeline"):
        experiment(steps=10_000)
