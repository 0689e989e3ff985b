"""What a run would cost: parameters, arithmetic and memory of the compiled step, and time from a few real steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from stabletrain.cli.text import duration, size
from stabletrain.training.experiment import Experiment

TIMED_STEPS = 5
TIMED_SECONDS = 10.0  # slow steps are timed less often


@dataclass(frozen=True)
class Estimate:
    """The cost of a run. What the compiler does not tell is None; time leaves out evaluations.

    Units: bytes, seconds, floating-point operations.
    """

    devices: int
    device_kind: str
    parameter_count: int
    flops_per_step: float | None
    state_bytes: int
    step_bytes: int | None
    """State, batch and intermediate values of one step, over all devices."""
    compile_seconds: float
    seconds_per_step: float
    total_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def lines(self) -> dict[str, str]:
        """For people: what -> how much."""
        flops = "unknown: the step is no single program" if self.flops_per_step is None else _flops(self.flops_per_step)
        step = "" if self.step_bytes is None else f", {size(self.step_bytes)} during a step"
        return {
            "devices": f"{self.devices} x {self.device_kind}",
            "parameters": f"{self.parameter_count:,}",
            "FLOPs per step": flops,
            "memory": f"{size(self.state_bytes)} of state{step}",
            "time": f"about {duration(self.total_seconds)} without evaluations "
            f"({self.seconds_per_step * 1000:.3g} ms a step, {duration(self.compile_seconds)} to compile)",
        }


def _flops(count: float) -> str:
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}FLOP"
    return f"{count:.0f} FLOP"


def estimate(experiment: Experiment) -> Estimate:
    """Compiles one step, runs a few, and keeps nothing: no file is written, the compile cache included."""
    with _without_compile_cache():
        return _measure(experiment)


@contextmanager
def _without_compile_cache() -> Iterator[None]:
    import jax

    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _measure(experiment: Experiment) -> Estimate:
    import jax

    from stabletrain.training.devices import replicated, shard_batch
    from stabletrain.training.state import fresh_state

    mesh = experiment.mesh
    axis = getattr(experiment, "batch_axis", 0)
    resident = getattr(experiment, "resident", {})
    flops, step_bytes = None, None
    begun = time.monotonic()
    state: Any = fresh_state(experiment)
    step: Any = experiment.step

    def batch_at(position: int) -> Any:
        batch = experiment.batch(position)
        return {**shard_batch(batch, mesh, axis), **resident} if experiment.traceable else batch

    if experiment.traceable:
        program = jax.jit(experiment.step, donate_argnums=0, out_shardings=replicated(mesh))
        step = program.lower(state, batch_at(0)).compile()
        flops, step_bytes = _analysed(step, mesh.size)
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    def run(position: int, state: Any) -> Any:
        state, metrics = step(state, batch_at(position))
        jax.block_until_ready(metrics)
        return state

    state = run(0, state)
    compile_seconds = time.monotonic() - begun
    times: list[float] = []
    while len(times) < TIMED_STEPS and sum(times) < TIMED_SECONDS:
        begun = time.monotonic()
        state = run(len(times) + 1, state)
        times.append(time.monotonic() - begun)
    seconds = sorted(times)[len(times) // 2]
    return Estimate(
        devices=mesh.size,
        device_kind=mesh.devices.flat[0].device_kind,
        parameter_count=experiment.parameter_count,
        flops_per_step=flops,
        state_bytes=state_bytes,
        step_bytes=step_bytes,
        compile_seconds=compile_seconds,
        seconds_per_step=seconds,
        total_seconds=compile_seconds + seconds * experiment.config.steps,
    )


def _analysed(program: Any, devices: int) -> tuple[float | None, int | None]:
    """FLOPs and bytes of a compiled program, over all devices; XLA counts those of one."""
    costs, memory = program.cost_analysis(), program.memory_analysis()
    flops = costs.get("flops") if costs else None
    if memory is None:
        return (None if flops is None else flops * devices), None
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (None if flops is None else flops * devices), (kept + memory.temp_size_in_bytes) * devices
