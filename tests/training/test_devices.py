"""Results do not depend on the number of devices, nor on how steps are grouped; bad device settings are refused."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from stabletrain.errors import ConfigError
from stabletrain.training.devices import (
    batch_shardings,
    compile_step,
    compute_dtype,
    configure_backend,
    cpu_model,
    make_mesh,
    most_devices,
    replicated,
    shard_batch,
)
from stabletrain.training.stability import Policy, guarded_update, init_monitor

BATCH = 16


class Network(nn.Module):
    """A convolution, a batch norm and a dense layer: what it returns depends on the statistics of the whole batch."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(1)(x.reshape(len(x), -1))[:, 0]


class Regression:
    """A small watched experiment, with noise that depends on the position alone."""

    batch_axis = 0

    def __init__(self) -> None:
        self.network = Network()
        self.optimizer = optax.adam(1e-2)
        self.policy = Policy(window=16, on_nonfinite="skip", on_spike="clip")

    def init(self, key: Any) -> dict[str, Any]:
        variables = self.network.init(key, jnp.zeros((1, 4, 4, 1)))
        params = variables["params"]
        return {
            "params": params,
            "statistics": variables["batch_stats"],
            "optimizer": self.optimizer.init(params),
            "monitor": init_monitor(params, self.policy),
        }

    def batch(self, position: int) -> dict[str, Any]:
        random = np.random.default_rng(position)
        images = random.normal(size=(BATCH, 4, 4, 1)).astype(np.float32)
        targets = images.mean(axis=(1, 2, 3)) * (100.0 if position == 20 else 1.0)
        return {"images": images, "targets": targets, "mask": np.ones(5, bool), "position": np.uint32(position)}

    def loss(self, params: Any, statistics: Any, batch: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(1), batch["position"])
        images = batch["images"] + 0.1 * jax.random.normal(key, batch["images"].shape)
        outputs, updated = self.network.apply(
            {"params": params, "batch_stats": statistics}, images, mutable=["batch_stats"]
        )
        return jnp.mean(jnp.square(outputs - batch["targets"])), updated["batch_stats"]

    def step(self, state: Any, batch: Any) -> Any:
        (loss, statistics), gradients = jax.value_and_grad(self.loss, has_aux=True)(
            state["params"], state["statistics"], batch
        )
        update = guarded_update(
            self.optimizer,
            loss=loss,
            gradients=gradients,
            params=state["params"],
            optimizer_state=state["optimizer"],
            monitor=state["monitor"],
            policy=self.policy,
        )
        state = {
            "params": update.params,
            "statistics": update.choose(statistics, state["statistics"]),
            "optimizer": update.optimizer_state,
            "monitor": update.monitor,
        }
        return state, {"train/loss": loss, **update.metrics}


def run_steps(count: int, groups: list[int], mesh: Any, inner_steps: int) -> tuple[list[dict[str, Any]], Any]:
    """Rows and final state of `count` steps, dispatched in groups of the sizes of `groups`, over and over."""
    experiment = Regression()
    run = compile_step(experiment, mesh, inner_steps)  # type: ignore[arg-type]
    state = jax.device_put(experiment.init(jax.random.key(0)), replicated(mesh))
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        size = min(groups[len(rows) % len(groups)], count - len(rows))
        state, metrics = run(state, [experiment.batch(len(rows) + i) for i in range(size)])
        assert len(metrics) == size
        rows += metrics.rows()
    return rows, jax.device_get(state)


# --- the same result, however computed ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4])
def test_loss_gradient_and_statistics_agree_between_numbers_of_devices(count: int) -> None:
    experiment = Regression()
    state = experiment.init(jax.random.key(0))
    gradient = jax.jit(jax.value_and_grad(experiment.loss, has_aux=True))
    alone, spread = (
        gradient(
            *(jax.device_put(state[part], replicated(mesh)) for part in ("params", "statistics")),
            shard_batch(experiment.batch(0), mesh),
        )
        for mesh in (make_mesh(1, BATCH), make_mesh(count, BATCH))
    )
    # Sums over 256 entries in float32, in another order. A batch statistic per device would differ by tens of percent.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), alone, spread)


@pytest.mark.parametrize("count", [2, 4])
def test_training_agrees_between_numbers_of_devices(count: int) -> None:
    alone, spread = (run_steps(8, [1], make_mesh(n, BATCH), 1)[0] for n in (1, count))
    for a, b in zip(alone, spread):
        # Adam divides by root mean squares of few gradients: rounding grows a hundredfold in eight steps.
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-3)
        assert a["stability/grad_norm"] == pytest.approx(b["stability/grad_norm"], rel=1e-3)


@pytest.mark.parametrize("count", [1, 2])
def test_grouping_steps_into_dispatches_changes_no_bit(count: int) -> None:
    mesh = make_mesh(count, BATCH)
    rows, state = run_steps(24, [1], mesh, 4)
    for groups in ([4], [3, 1, 4, 2, 1]):
        other_rows, other_state = run_steps(24, groups, mesh, 4)
        assert other_rows == rows
        jax.tree.map(np.testing.assert_array_equal, state, other_state)
    assert any(row["monitor/clipped"] for row in rows)  # an event in the middle belongs to the comparison


def test_a_dispatch_takes_one_to_inner_steps_batches() -> None:
    mesh = make_mesh(1, BATCH)
    experiment = Regression()
    run = compile_step(experiment, mesh, 2)  # type: ignore[arg-type]
    state = experiment.init(jax.random.key(0))
    for size in (0, 3):
        with pytest.raises(ValueError, match="1 to 2"):
            run(state, [experiment.batch(0)] * size)


def test_the_state_is_donated_and_stays_on_every_device() -> None:
    mesh = make_mesh(2, BATCH)
    experiment = Regression()
    run = compile_step(experiment, mesh)  # type: ignore[arg-type]
    state = jax.device_put(experiment.init(jax.random.key(0)), replicated(mesh))
    after, _ = run(state, [experiment.batch(0)])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state["params"]))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(after))


def test_metrics_come_back_with_their_names_and_shapes() -> None:
    rows, _ = run_steps(3, [3], make_mesh(1, BATCH), 4)
    assert len(rows) == 3
    assert isinstance(rows[0]["train/loss"], float)
    assert len(rows[0]["monitor/nonfinite_gradients"]) == 6
    assert [row["monitor/loss"] for row in rows] == [row["train/loss"] for row in rows]


# --- layout ---------------------------------------------------------------------------------------------------


def test_arrays_are_split_along_the_batch_and_the_rest_is_whole() -> None:
    mesh = make_mesh(4, BATCH)
    batch = {"x": np.zeros((BATCH, 3)), "mask": np.zeros(5), "position": np.uint32(0)}
    specs = jax.tree.map(lambda sharding: sharding.spec, batch_shardings(batch, mesh))
    assert specs == {"x": PartitionSpec("data"), "mask": PartitionSpec(), "position": PartitionSpec()}
    inner = {"x": np.zeros((5, BATCH, 3)), "position": np.uint32(0)}
    assert batch_shardings(inner, mesh, 1)["x"].spec == PartitionSpec(None, "data")
    placed = shard_batch(inner, mesh, 1)["x"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(5, BATCH // 4, 3)}


class InnerSteps:
    """The batch is the second axis: as a critic's inner steps come first."""

    batch_axis = 1

    def step(self, state: Any, batch: Any) -> Any:
        return state + jnp.sum(batch["x"].mean(axis=1)), {"mean": batch["x"].mean()}


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_batches_with_inner_steps_first(inner_steps: int) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    mesh = make_mesh(2, 4)
    run = compile_step(InnerSteps(), mesh, inner_steps)  # type: ignore[arg-type]
    state, metrics = run(jax.device_put(jnp.zeros(()), replicated(mesh)), [{"x": x, "position": np.uint32(0)}])
    assert float(state) == pytest.approx(x.mean(axis=1).sum())
    assert metrics.rows() == [{"mean": pytest.approx(x.mean())}]


class Lookup:
    """The data lie on the devices; a batch is indices."""

    def __init__(self, mesh: Any) -> None:
        self.resident = {"table": jax.device_put(jnp.arange(10.0), replicated(mesh))}

    def step(self, state: Any, batch: Any) -> Any:
        return state + batch["table"][batch["indices"]].sum(), {"first": batch["table"][batch["indices"][0]]}


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_resident_arrays_are_found_in_the_batch(inner_steps: int) -> None:
    mesh = make_mesh(2, 2)
    run = compile_step(Lookup(mesh), mesh, inner_steps)  # type: ignore[arg-type]
    batches = [{"indices": np.array([i, 9], np.int32)} for i in range(inner_steps)]
    state, metrics = run(jax.device_put(jnp.zeros(()), replicated(mesh)), batches)
    assert [row["first"] for row in metrics.rows()] == list(range(inner_steps))
    assert float(state) == 9.0 * inner_steps + sum(range(inner_steps))


# --- settings -------------------------------------------------------------------------------------------------


def test_without_a_number_one_cpu_device_is_taken_of_those_that_there_are() -> None:
    assert len(jax.devices()) > 1
    assert make_mesh(0, 16).size == 1


def test_a_batch_that_does_not_divide_is_refused_with_what_would_fit() -> None:
    with pytest.raises(ConfigError, match=r"batch size 10 .* 4 devices: use --batch-size 8 or .* 12, or --devices 2"):
        make_mesh(4, 10)
    with pytest.raises(ConfigError, match="not divisible"):
        configure_backend(3, 64)


@pytest.mark.parametrize(("available", "batch", "fitting"), [(8, 64, 8), (3, 64, 2), (2, 5, 1), (4, 1, 1), (6, 9, 3)])
def test_zero_devices_are_as_many_as_divide_the_batch(available: int, batch: int, fitting: int) -> None:
    assert most_devices(available, batch) == fitting


def test_more_devices_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"but there are {len(jax.devices())}"):
        make_mesh(64, 64)
    with pytest.raises(ConfigError, match="already runs with"):
        configure_backend(64, 64)


def test_precision_names_a_type() -> None:
    assert compute_dtype("bfloat16") == jnp.bfloat16
    assert compute_dtype("float32") == jnp.float32
    with pytest.raises(ConfigError, match="float64"):
        compute_dtype("float64")


def test_the_processor_has_a_name() -> None:
    assert cpu_model()


def test_an_unwritable_cache_is_one_warning_and_no_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "cache"))
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        with caplog.at_level(logging.WARNING):
            configure_backend(0, BATCH)
        assert len(caplog.records) == 1
        assert "cannot write to" in caplog.text
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.slow
def test_a_fresh_process_gets_its_devices_and_reads_its_cache_in_silence(tmp_path: Path) -> None:
    program = (
        "from stabletrain.training.devices import configure_backend, make_mesh\n"
        "configure_backend(3, 12)\n"
        "import jax, jax.numpy as jnp\n"
        "print(len(jax.devices()), make_mesh(3, 12).size, float(jax.jit(lambda x: jnp.sin(x).sum())(jnp.ones(3))))\n"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TF_", "XLA_"))}
    environment = {**kept, "JAX_PLATFORMS": "cpu", "STABLETRAIN_HOME": str(tmp_path)}
    for _ in range(2):  # the second time from the cache
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.stdout.split()[:2] == ["3", "3"]
        assert done.stderr == ""
    assert any((tmp_path / "jax").rglob("*-cache"))
