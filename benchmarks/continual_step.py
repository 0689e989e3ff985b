"""Time and memory of a continual step with five active tasks, for each aggregator and both gradient memories.

Relative to a plain step on the same examples in one batch with one gradient. Each aggregator's program is compiled, run
once, and timed over several repetitions; the memory is what the compiler says the program needs besides its arguments.

    python benchmarks/continual_step.py [--network mlp|conv] [--repeats 20] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stabletrain.continual.config import ContinualConfig, resolve
from stabletrain.continual.experiment import ContinualExperiment
from stabletrain.continual.losses import cross_entropy
from stabletrain.continual.presets import AGGREGATOR_NAMES
from stabletrain.training.config import make_config
from stabletrain.training.devices import configure_backend, cpu_model, make_mesh
from stabletrain.training.state import fresh_state

NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"network": "mlp", "hidden": (256, 256)},
    "conv": {"network": "conv", "depth": 4, "width": 16, "norm": "none"},
}


def timed(program: Any, *arguments: Any, repeats: int) -> float:
    """Median seconds of a compiled program."""
    jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def temporary_megabytes(program: Any) -> float:
    """What a compiled program needs besides its arguments and results."""
    return program.memory_analysis().temp_size_in_bytes / 2**20


def experiment_of(method: str, memory: str, network: str) -> ContinualExperiment:
    """Five tasks from the first step on, so that every step has five gradients."""
    values = {
        "method": method, "gradient_memory": memory, "timeline": "parallel", "tasks": 5, "memory_per_class": 0,
        "batch_size": 32, "devices": 1, **NETWORKS[network],
    }  # fmt: skip
    if method == "spcl":
        values["orthogonality"] = "none"  # the decomposition alone; the layers' loss is measured on its own
    config = resolve(make_config(ContinualConfig, values))
    return ContinualExperiment(config, mesh=make_mesh(1, config.batch_size))


def measured(experiment: ContinualExperiment, repeats: int) -> dict[str, float]:
    """Milliseconds of a step, and the temporary memory of its program in MB."""
    state = fresh_state(experiment)
    batch = {**experiment.batch(0), **experiment.resident}
    program = jax.jit(experiment.step).lower(state, batch).compile()
    return {
        "ms": 1e3 * timed(program, state, batch, repeats=repeats),
        "temporary_mb": temporary_megabytes(program),
    }


def plain_step(experiment: ContinualExperiment, repeats: int) -> dict[str, float]:
    """One gradient of the mean loss of all examples, Adam, nothing else."""
    state = fresh_state(experiment)
    batch = experiment.batch(0)
    optimizer = optax.adam(1e-3)
    images = experiment.to_input(experiment.resident["images"][batch["index"].reshape(-1)])
    labels = experiment.resident["labels"][batch["index"].reshape(-1)]

    def step(params: Any, moments: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            _, logits = experiment.apply(params, {}, images)
            return cross_entropy(logits, labels, jnp.ones_like(logits), jnp.ones(len(labels)))

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, updates), moments, value

    program = jax.jit(step).lower(state.params, optimizer.init(state.params)).compile()
    return {
        "ms": 1e3 * timed(program, state.params, optimizer.init(state.params), repeats=repeats),
        "temporary_mb": temporary_megabytes(program),
    }


def main() -> None:
    """Measures and prints; with --out also keeps the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=tuple(NETWORKS), default="mlp")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--methods", nargs="*", default=list(AGGREGATOR_NAMES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    configure_backend(1, 32)
    base = experiment_of("mean", "fast", arguments.network)
    plain = plain_step(base, arguments.repeats)
    rows = [{"method": "plain", "memory": "", **plain, "relative_time": 1.0}]
    print(f"{base.parameter_count:,} parameters, 5 tasks x 32 examples, {cpu_model()}")
    for method in arguments.methods:
        for memory in ("fast", "low"):
            found = measured(experiment_of(method, memory, arguments.network), arguments.repeats)
            rows.append({"method": method, "memory": memory, **found, "relative_time": found["ms"] / plain["ms"]})
            row = rows[-1]
            print(f"{method:14} {memory:5} {row['ms']:8.2f} ms  x{row['relative_time']:5.2f}  "
                  f"{row['temporary_mb']:7.2f} MB", flush=True)  # fmt: skip
    if arguments.out is not None:
        document = {
            "cpu": cpu_model(), "jax": jax.__version__, "network": arguments.network,
            "parameters": base.parameter_count, "tasks": 5, "batch_size": 32, "rows": rows,
        }  # fmt: skip
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
