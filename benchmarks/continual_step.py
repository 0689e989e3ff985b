"""Time and memory of a continual step with five active tasks, for each aggregator and both gradient memories.

Relative to a plain step on the same examples in one batch with one gradient. Each aggregator's program is compiled, run
once, and timed over several repetitions; the memory is what the compiler says the program needs besides its arguments.
What an aggregator makes of the Gram matrix is timed alone, too: inside one program, many times in a row, each on a Gram
matrix that depends on the result before it.

    python benchmarks/continual_step.py [--network mlp|conv|resnet18] [--repeats 20] [--out FILE.json]

`resnet18` is the network of the published experiments at its size: 11,223,140 parameters, 100 classes, five tasks of
128 images of 32x32 pixels, here of noise. A step is long on two cores: with `--batch-size 4 --methods spcl
--memories fast --repeats 2` it is a lower bound of it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stabletrain.continual.aggregators.elementwise import ElementwiseAggregator
from stabletrain.continual.aggregators.gram_weights import make_aggregator, weigh
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
    "resnet18": {"network": "resnet18", "batch_size": 128},
}
ALONE_STEPS = 50


def timed(program: Any, *arguments: Any, repeats: int) -> float:
    """Seconds of a compiled program: the fastest of several runs, as other work on the machine can only add to it."""
    jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def temporary_megabytes(program: Any) -> float:
    """What a compiled program needs besides its arguments and results."""
    return program.memory_analysis().temp_size_in_bytes / 2**20


def alone_microseconds(method: str, experiment: ContinualExperiment, repeats: int) -> float | None:
    """Microseconds that the aggregator takes to make weights of a Gram matrix, as the step calls it; None for GradDrop,
    which makes none.
    """
    config, width = experiment.config, experiment.schedule.identities
    rule = make_aggregator(method, scale=config.aggregator_scale or "min", floor=config.scale_floor or 0.0)
    if isinstance(rule, ElementwiseAggregator):
        return None
    rows = np.random.default_rng(0).standard_normal((width, 50)) * np.linspace(0.5, 2, width)[:, None]
    rows[1] -= 2 * rows[0]  # conflict and agreement: a condition number of 12, as the digits' tasks have at worst
    rows[4] += 2 * rows[2]
    mask = jnp.arange(width) < 5  # tasks of a step; two more identities are the memory's
    gram = jnp.asarray(rows @ rows.T, jnp.float32) * mask[:, None] * mask[None, :]
    losses, state = jnp.ones(width), rule.init(width)

    def once(number: jax.Array, carry: jax.Array) -> jax.Array:
        weights, _ = weigh(rule, gram * (1 + 1e-3 * carry), losses, mask, jax.random.key(number), state)
        return 0.5 * jnp.tanh(jnp.sum(weights))

    program = jax.jit(lambda start: jax.lax.fori_loop(0, ALONE_STEPS, once, start))
    return 1e6 * timed(program, jnp.zeros(()), repeats=repeats) / ALONE_STEPS


def noise_images(folder: str) -> str:
    """A file of 6,400 random images of 100 classes; their number plays no part in a step."""
    rng = np.random.default_rng(0)
    labels = np.arange(6400, dtype=np.int32) % 100
    path = f"{folder}/noise.npz"
    np.savez(path, x=rng.integers(0, 256, (6400, 32, 32, 3), dtype=np.uint8), y=labels)
    return path


def experiment_of(method: str, memory: str, network: str, data: str | None, size: int) -> ContinualExperiment:
    """Five tasks from the first step on, so that every step has five gradients."""
    values = {
        "method": method, "gradient_memory": memory, "timeline": "parallel", "tasks": 5, "memory_per_class": 0,
        "batch_size": 32, "devices": 1, **({"data": data} if data else {}), **NETWORKS[network],
        **({"batch_size": size} if size else {}),
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
    statistics_of = state.statistics
    batch = experiment.batch(0)
    optimizer = optax.adam(1e-3)
    images = experiment.to_input(experiment.resident["images"][batch["index"].reshape(-1)])
    labels = experiment.resident["labels"][batch["index"].reshape(-1)]

    def step(params: Any, moments: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            variables = {"params": params, **({"batch_stats": statistics_of} if statistics_of else {})}
            (_, logits), _ = experiment.network.apply(variables, images, running=False, mutable=["batch_stats"])
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
    parser.add_argument("--memories", nargs="*", choices=("fast", "low"), default=["fast", "low"])
    parser.add_argument("--batch-size", type=int, default=0, help="examples of a task; 0: 32, resnet18 128")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    configure_backend(1, 32)
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, noise_images(folder) if arguments.network == "resnet18" else None)


def measure(arguments: argparse.Namespace, data: str | None) -> None:
    """All rows asked for. `data`: a file in place of the digits."""
    base = experiment_of("mean", "fast", arguments.network, data, arguments.batch_size)
    plain = plain_step(base, arguments.repeats)
    rows = [{"method": "plain", "memory": "", **plain, "relative_time": 1.0}]
    size = base.config.batch_size
    print(f"{base.parameter_count:,} parameters, 5 tasks x {size} examples, {cpu_model()}, plain {plain['ms']:.2f} ms")
    for method in arguments.methods:
        for memory in arguments.memories:
            experiment = experiment_of(method, memory, arguments.network, data, arguments.batch_size)
            alone = alone_microseconds(method, experiment, 3 * max(arguments.repeats, 50))
            found = measured(experiment, arguments.repeats)
            share = None if alone is None else 1e-3 * alone / found["ms"]
            rows.append({
                "method": method, "memory": memory, **found, "relative_time": found["ms"] / plain["ms"],
                "aggregation_us": alone, "aggregation_share": share,
            })  # fmt: skip
            row = rows[-1]
            told = "" if alone is None or share is None else f"aggregation {alone:6.1f} us, {100 * share:.4f} %"
            print(f"{method:14} {memory:5} {row['ms']:8.2f} ms  x{row['relative_time']:5.2f}  "
                  f"{row['temporary_mb']:7.2f} MB  {told}", flush=True)  # fmt: skip
    if arguments.out is not None:
        document = {
            "cpu": cpu_model(), "jax": jax.__version__, "network": arguments.network,
            "parameters": base.parameter_count, "tasks": 5, "batch_size": size, "rows": rows,
        }  # fmt: skip
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
