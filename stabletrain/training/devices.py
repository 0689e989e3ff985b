"""Devices: which there are, how arrays lie on them, and the compiled training step.

Data parallelism is `jit` over a mesh of one axis, "data": the state lies whole on every device, a batch is split.
A mean over the batch is then a mean over the whole batch, whatever the number of devices.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stabletrain import xla_settings

xla_settings.apply()  # before JAX is imported

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from stabletrain.errors import ConfigError
from stabletrain.paths import cache_home
from stabletrain.training.experiment import Batch, Experiment, State
from stabletrain.training.step_metrics import StepMetrics, layout_of

DATA_AXIS = "data"

log = logging.getLogger("stabletrain")


def cpu_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """The name of the processor, as far as the system tells."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


# --- before the first computation -----------------------------------------------------------------------------


def configure_backend(devices: int, batch_size: int, *, compile_cache: bool = True) -> None:
    """Virtual CPU devices, freed memory, the cache of compiled programs. To be called before the first JAX computation.

    `devices=0` leaves JAX its one CPU device, which uses every core (`benchmarks/cpu_devices.py`), or as many as
    `JAX_NUM_CPU_DEVICES` says. Accelerators are not touched. glibc is made to keep freed memory, for the whole process
    (`xla_settings.keep_freed_memory`). Programs are kept in `JAX_COMPILATION_CACHE_DIR`, else
    below `cache_home()`; if that cannot be written, a warning says so and the run goes on without. With
    `compile_cache=False` nothing is written anywhere.

    Raises: `ConfigError` when the batch does not divide, or when JAX already runs with fewer CPU devices.
    """
    if devices and batch_size % devices:
        raise ConfigError(_does_not_divide(batch_size, devices))
    xla_settings.keep_freed_memory()
    if devices:
        _set_cpu_devices(devices)
    if compile_cache:
        _set_compile_cache()


def _does_not_divide(batch_size: int, devices: int) -> str:
    below, above = batch_size // devices * devices, -(-batch_size // devices) * devices
    sizes = " or ".join(f"--batch-size {size}" for size in (below, above) if size)
    fitting = most_devices(devices, batch_size)
    return f"batch size {batch_size} is not divisible by {devices} devices: use {sizes}, or --devices {fitting}"


def most_devices(available: int, batch_size: int) -> int:
    """The largest number of devices, of those there are, that divides the batch."""
    return max(count for count in range(1, available + 1) if batch_size % count == 0)


def _set_cpu_devices(count: int) -> None:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:  # JAX runs already: what it has must do
        present = len(jax.devices("cpu"))
        if count > present:
            raise ConfigError(
                f"JAX already runs with {present} CPU devices, {count} were asked for: "
                f"start a new process, or use --devices {present}"
            ) from error


def _set_compile_cache() -> None:
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    # JAX's key does not know the processor: one home on two kinds of machine would run illegal instructions.
    features = _cpuinfo().get("flags") or _cpuinfo().get("Features") or cpu_model()
    folder = Path(given or cache_home() / "jax" / hashlib.sha256(features.encode()).hexdigest()[:8])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        log.warning("compiled programs are not kept: cannot write to %s (%s)", folder, reason)
        jax.config.update("jax_compilation_cache_dir", None)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Even half a second of compiling is worth keeping: a run has a dozen programs, and is resumed.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def compute_dtype(precision: str) -> Any:
    """The type of matrix products and convolutions: that of `float32` or `bfloat16`.

    Raises: `ConfigError` for any other name.
    """
    types = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    if precision not in types:
        raise ConfigError(f"unknown precision {precision!r}: valid values: {', '.join(types)}")
    return types[precision]


# --- layout ---------------------------------------------------------------------------------------------------


def make_mesh(devices: int, batch_size: int) -> Mesh:
    """A mesh with the axis "data" over the first `devices` devices.

    0 takes as many accelerators as divide the batch; without any, one CPU device.

    Raises: `ConfigError` when there are fewer devices, or when the batch does not divide.
    """
    available = jax.devices()
    kind = available[0].platform
    devices = devices or (1 if kind == "cpu" else most_devices(len(available), batch_size))
    if devices > len(available):
        raise ConfigError(
            f"{devices} devices were asked for, but there are {len(available)} ({kind}): "
            f"use --devices {len(available)}, or 0 for those that there are"
        )
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

    Scalars are whole, and so is what is no batch: a mask over five tasks on two devices. A layout never changes
    a result, only who computes it.
    """

    def layout(leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        splits = len(shape) > axis and shape[axis] > 0 and shape[axis] % mesh.size == 0
        return batch_sharding(mesh, axis) if splits else replicated(mesh)

    return jax.tree.map(layout, batch)


def shard_batch(batch: Batch, mesh: Mesh, axis: int = 0) -> Batch:
    """The batch on the devices of the mesh, laid out as `batch_shardings` says."""
    return jax.device_put(batch, batch_shardings(batch, mesh, axis))


# --- the compiled step ----------------------------------------------------------------------------------------


RunSteps = Callable[[State, Sequence[Batch]], tuple[State, StepMetrics]]


def compile_step(experiment: Experiment, mesh: Mesh, inner_steps: int = 1) -> RunSteps:
    """`run(state, batches) -> (state, metrics)`: 1 to `inner_steps` training steps in one dispatch.

    The state is donated: the one that went in is gone. With `inner_steps` > 1 there is one program with a loop whose
    length is an argument, so that the same compiled body runs however the steps are grouped, and the result is the
    same to the last bit. With `inner_steps` = 1 there is no loop, because XLA:CPU runs convolutions inside a
    loop several times slower; its results may differ from those of a loop in the last bits.

    `experiment.batch_axis` (default 0) is the batch's axis in its arrays: 1 where inner critic steps come first.
    `experiment.resident` (default none): name -> arrays that lie whole on every device, such as a small data set. The
    step finds them in its batch under their names; they are arguments of the program, not constants inside it.
    """
    axis = getattr(experiment, "batch_axis", 0)
    resident = getattr(experiment, "resident", {})
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    layout: dict[str, tuple[int, int | None]] = {}

    def packed_step(state: State, batch: Batch, resident: dict[str, Any]) -> tuple[State, jax.Array]:
        state, metrics = experiment.step(state, {**batch, **resident} if resident else batch)
        layout.update(layout_of({name: np.shape(value) for name, value in metrics.items()}))
        return state, jnp.concatenate([jnp.ravel(value).astype(jnp.float32) for value in metrics.values()])

    def one_step(state: State, batch: Batch, resident: dict[str, Any]) -> tuple[State, jax.Array]:
        state, packed = packed_step(state, batch, resident)
        return state, packed[None]

    def several_steps(
        state: State, batches: Batch, count: jax.Array, resident: dict[str, Any]
    ) -> tuple[State, jax.Array]:
        def batch_at(i: Any) -> Batch:
            return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), batches)

        def body(i: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
            state, rows = carry
            state, packed = packed_step(state, batch_at(i), resident)
            return state, rows.at[i].set(packed)

        width = jax.eval_shape(packed_step, state, batch_at(0), resident)[1].shape[0]
        return lax.fori_loop(0, count, body, (state, jnp.zeros((inner_steps, width), jnp.float32)))

    program = jax.jit(
        one_step if inner_steps == 1 else several_steps,
        donate_argnums=0,
        out_shardings=replicated(mesh),
        compiler_options=_cpu_compiler_options() if on_cpu else None,
    )
    # Emulated devices wait for one another in the collectives of a step. When steps are queued, those of different
    # steps can wait crosswise for ever; two devices are safe on two cores.
    must_block = on_cpu and mesh.size > min(2, cpu_cores())

    def run(state: State, batches: Sequence[Batch]) -> tuple[State, StepMetrics]:
        if not 1 <= len(batches) <= inner_steps:
            raise ValueError(f"{len(batches)} batches for a program of 1 to {inner_steps} steps")
        if inner_steps == 1:
            state, packed = program(state, shard_batch(batches[0], mesh, axis), resident)
        else:
            padded = [*batches, *[batches[-1]] * (inner_steps - len(batches))]
            stacked = shard_batch(jax.tree.map(_stack, *padded), mesh, axis + 1)
            state, packed = program(state, stacked, np.int32(len(batches)), resident)
        metrics = StepMetrics(packed, layout, len(batches))
        return state, metrics.block_until_ready() if must_block else metrics

    return run


def _stack(*leaves: Any) -> Any:
    return jnp.stack(leaves) if isinstance(leaves[0], jax.Array) else np.stack(leaves)


@functools.cache
def _cpu_compiler_options() -> dict[str, Any] | None:
    """Options that make XLA:CPU leave out the copies of parameters and optimiser around a branch, where known to it."""
    options = {"xla_cpu_copy_insertion_use_region_analysis": True}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        log.info("this version of XLA does not know %s: steps copy their state once more", ", ".join(options))
        return None
    return options
