"""Devices: which there are, how arrays lie on them, and the compiled training step.

Data parallelism is `jit` over a mesh of one axis, "data": the state lies whole on every device, a batch is split. A
mean over the batch is then a mean over the whole batch, whatever the number of devices.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from stabletrain.errors import ConfigError
from stabletrain.paths import cache_home
from stabletrain.training.experiment import Batch, Experiment, State

DATA_AXIS = "data"
MAX_VIRTUAL_DEVICES = 8  # a batch split further leaves too little for each core

log = logging.getLogger("stabletrain")


def cpu_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _automatic_devices(batch_size: int, available: int) -> int:
    limit = min(available, MAX_VIRTUAL_DEVICES)
    return max(count for count in range(1, limit + 1) if batch_size % count == 0)


def configure_backend(devices: int, batch_size: int) -> None:
    """Virtual CPU devices and the cache of compiled programs. To be called before the first JAX computation.

    `devices=0` takes one virtual device per core: the largest number, at most 8, that divides the batch. Accelerators
    are not touched by this. Programs are cached in `JAX_COMPILATION_CACHE_DIR`, else below `cache_home()`.

    Raises: `ConfigError` when the batch does not divide, or when JAX already runs with fewer CPU devices.
    """
    if devices and batch_size % devices:
        raise ConfigError(_does_not_divide(batch_size, devices))
    if "JAX_NUM_CPU_DEVICES" not in os.environ or devices:
        _set_cpu_devices(devices or _automatic_devices(batch_size, cpu_cores()))
    _set_compile_cache()


def _does_not_divide(batch_size: int, devices: int) -> str:
    below, above = batch_size // devices * devices, -(-batch_size // devices) * devices
    sizes = " or ".join(f"--batch-size {size}" for size in (below, above) if size)
    counts = [count for count in range(1, devices) if batch_size % count == 0]
    return f"batch size {batch_size} is not divisible by {devices} devices: use {sizes}, or --devices {counts[-1]}"


def _set_cpu_devices(count: int) -> None:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:  # JAX runs already: what it has must do
        if count > len(jax.devices("cpu")):
            raise ConfigError(
                f"JAX already runs with {len(jax.devices('cpu'))} CPU devices, {count} were asked for: "
                "start a new process, or use fewer --devices"
            ) from error


def _set_compile_cache() -> None:
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_home() / "jax")
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        log.warning("compiled programs are not kept: %s is not writable (%s)", folder, error.strerror or error)
        jax.config.update("jax_compilation_cache_dir", None)
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    # A step that compiles in half a second is still worth keeping: a resumed run compiles a dozen of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def make_mesh(devices: int, batch_size: int) -> Mesh:
    """A mesh with the axis "data" over the first `devices` devices; 0 takes all accelerators, or CPU devices that fit.

    Raises: `ConfigError` when there are fewer devices, or when the batch does not divide.
    """
    available = jax.devices()
    if not devices:
        on_cpu = available[0].platform == "cpu"
        devices = _automatic_devices(batch_size, min(len(available), cpu_cores())) if on_cpu else len(available)
    if devices > len(available):
        kind = available[0].platform.upper()
        raise ConfigError(f"{devices} devices were asked for, but there are {len(available)} ({kind})")
    if batch_size % devices:
        raise ConfigError(_does_not_divide(batch_size, devices))
    return jax.make_mesh((devices,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=available[:devices])


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Split along `axis`."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, DATA_AXIS))


def batch_shardings(batch: Batch, mesh: Mesh, axis: int = 0) -> Any:
    """How each array of a batch is laid out: split along `axis` where the devices divide it, else whole.

    Scalars, and arrays that are no batch (a mask over five tasks on two devices), are whole. The layout
    never changes a result.
    """

    def layout(leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        splits = len(shape) > axis and shape[axis] > 0 and shape[axis] % mesh.size == 0
        return batch_sharding(mesh, axis) if splits else replicated(mesh)

    return jax.tree.map(layout, batch)


def shard_batch(batch: Batch, mesh: Mesh, axis: int = 0) -> Batch:
    """The batch on the devices of the mesh, laid out as `batch_shardings` says."""
    return jax.device_put(batch, batch_shardings(batch, mesh, axis))


def compute_dtype(precision: str) -> Any:
    """The type of matrix products and convolutions: `float32` or `bfloat16`.

    Raises: `ConfigError` for any other name.
    """
    try:
        return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[precision]
    except KeyError:
        raise ConfigError(f"unknown precision {precision!r}: float32 or bfloat16") from None


class StepMetrics:
    """The metrics of the steps of one dispatch, still on the device: one array, so that fetching is one copy.

    `rows()` waits for the steps and returns, for each, metric name -> float (or list of floats for a vector).
    """

    def __init__(self, packed: jax.Array, layout: dict[str, tuple[int, ...]], count: int) -> None:
        self._packed = packed
        self._layout = layout
        self.count = count

    def __len__(self) -> int:
        return self.count

    def block_until_ready(self) -> StepMetrics:
        """Waits until the steps are done."""
        self._packed.block_until_ready()
        return self

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per step, in order."""
        rows = []
        for values in np.asarray(self._packed)[: self.count].tolist():
            row: dict[str, Any] = {}
            start = 0
            for name, shape in self._layout.items():
                size = int(np.prod(shape))
                row[name] = values[start : start + size] if shape else values[start]
                start += size
            rows.append(row)
        return rows


RunSteps = Callable[[State, Sequence[Batch]], tuple[State, StepMetrics]]


def compile_step(experiment: Experiment, mesh: Mesh, inner_steps: int = 1) -> RunSteps:
    """`run(state, batches) -> (state, metrics)`: 1 to `inner_steps` training steps in one dispatch. Donates the state.

    With `inner_steps` > 1 there is one program with a loop whose length is an argument, so the same compiled body runs
    however the steps are grouped, and the result is the same to the last bit. With `inner_steps` = 1 there is no loop:
    XLA:CPU runs convolutions inside a loop several times slower.

    `experiment.batch_axis` (default 0) is the batch's axis in its arrays: 1 where inner critic steps come first.
    `experiment.resident` (default none): name -> arrays that lie whole on every device, such as a small data set. The
    step finds them in its batch under their names; they are arguments of the program, not constants inside it.
    """
    axis = getattr(experiment, "batch_axis", 0)
    resident = getattr(experiment, "resident", {})
    whole = replicated(mesh)
    layout: dict[str, tuple[int, ...]] = {}

    def packed_step(state: State, batch: Batch, resident: dict[str, Any]) -> tuple[State, jax.Array]:
        state, metrics = experiment.step(state, {**batch, **resident} if resident else batch)
        layout.clear()
        layout.update({name: np.shape(value) for name, value in metrics.items()})
        return state, jnp.concatenate([jnp.ravel(value).astype(jnp.float32) for value in metrics.values()])

    def single(state: State, batch: Batch, resident: dict[str, Any]) -> tuple[State, jax.Array]:
        state, packed = packed_step(state, batch, resident)
        return state, packed[None]

    def several(state: State, batches: Batch, count: jax.Array, resident: dict[str, Any]) -> tuple[State, jax.Array]:
        first = jax.tree.map(lambda leaf: leaf[0], batches)
        width = jax.eval_shape(packed_step, state, first, resident)[1].shape[0]

        def body(i: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
            state, rows = carry
            batch = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), batches)
            state, packed = packed_step(state, batch, resident)
            return state, rows.at[i].set(packed)

        return lax.fori_loop(0, count, body, (state, jnp.zeros((inner_steps, width), jnp.float32)))

    program = jax.jit(single if inner_steps == 1 else several, donate_argnums=0, out_shardings=whole)
    # More emulated devices than cores wait for each other in collectives of different steps, and none gets on.
    must_block = mesh.devices.flat[0].platform == "cpu" and mesh.size > min(2, cpu_cores())

    def run(state: State, batches: Sequence[Batch]) -> tuple[State, StepMetrics]:
        if not 1 <= len(batches) <= inner_steps:
            raise ValueError(f"{len(batches)} batches for a program of 1 to {inner_steps} steps")
        if inner_steps == 1:
            state, packed = program(state, shard_batch(batches[0], mesh, axis), resident)
        else:
            padded = [*batches, *[batches[-1]] * (inner_steps - len(batches))]
            stacked = jax.tree.map(_stack, *padded)
            layouts = jax.tree.map(
                lambda leaf: NamedSharding(mesh, PartitionSpec(None, *leaf.spec)),
                batch_shardings(batches[0], mesh, axis),
            )
            state, packed = program(state, jax.device_put(stacked, layouts), np.int32(len(batches)), resident)
        metrics = StepMetrics(packed, layout, len(batches))
        return state, metrics.block_until_ready() if must_block else metrics

    return run


def _stack(*leaves: Any) -> Any:
    return jnp.stack(leaves) if isinstance(leaves[0], jax.Array) else np.stack(leaves)
