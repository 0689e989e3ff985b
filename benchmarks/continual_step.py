"""Time and memory of a continual step with five active tasks, for each aggregator and both gradient memories.

Relative to a plain step: one gradient of the mean loss of the same examples in one batch, Adam, nothing else. All
programs are compiled first and then take turns, so that whatever else the machine does falls on all of them; a time is
the fastest of its turns. The memory is what the compiler says the program needs besides its arguments. What an
aggregator makes of the Gram matrix is timed alone, too: inside one program, many times in a row, each on a Gram matrix
that depends on the result before it.

    python benchmarks/continual_step.py [--network mlp|ps-emnist|conv|resnet18] [--repeats 20] [--out FILE.json]

`ps-emnist` and `resnet18` are the networks of the published experiments at their sizes and batches: an MLP of 112,766
parameters with five tasks of 128 images of 28x28 pixels, and ResNet-18 with five tasks of 128 images of 32x32 pixels
(11,223,140 parameters, 100 classes); the images are noise. A step of ResNet-18 takes minutes on two cores, so that
`--repeats 1` and a few methods must do. On a GPU, where JAX finds one, it is a matter of minutes:

    python benchmarks/continual_step.py --network resnet18 --repeats 10 --out continual_step_gpu.json \\
        --methods sum spcl aligned-mtl pcgrad mgda upgrad nash-mtl graddrop
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
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
    "ps-emnist": {"network": "mlp", "hidden": (128, 64), "batch_size": 128},
    "conv": {"network": "conv", "depth": 4, "width": 16, "norm": "none"},
    "resnet18": {"network": "resnet18", "batch_size": 128},
}
NOISE: dict[str, tuple[tuple[int, ...], int]] = {"ps-emnist": ((28, 28), 62), "resnet18": ((32, 32, 3), 100)}
"""Shape of the images and number of classes where the data are noise; the others have the digits."""
ALONE_STEPS = 50


@dataclass
class Timed:
    """A compiled program with its arguments, and the fastest of its runs so far."""

    method: str
    memory: str
    program: Any
    arguments: tuple[Any, ...]
    seconds: float = float("inf")

    def turn(self) -> None:
        """One run. The first is no slower than the others for want of compiling."""
        begun = time.perf_counter()
        jax.block_until_ready(self.program(*self.arguments))
        self.seconds = min(self.seconds, time.perf_counter() - begun)

    @property
    def temporary_megabytes(self) -> float:
        """What the program needs besides its arguments and results."""
        return self.program.memory_analysis().temp_size_in_bytes / 2**20


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

    program = Timed(method, "", jax.jit(lambda start: jax.lax.fori_loop(0, ALONE_STEPS, once, start)), (jnp.zeros(()),))
    for _ in range(1 + repeats):
        program.turn()
    return 1e6 * program.seconds / ALONE_STEPS


def noise_images(folder: str, shape: tuple[int, ...], classes: int) -> str:
    """A file of 64 random images of each class; their number plays no part in a step."""
    rng = np.random.default_rng(0)
    labels = np.arange(64 * classes, dtype=np.int32) % classes
    path = f"{folder}/noise.npz"
    np.savez(path, x=rng.integers(0, 256, (64 * classes, *shape), dtype=np.uint8), y=labels)
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


def whole_step(experiment: ContinualExperiment, method: str, memory: str) -> Timed:
    """The step of a run, monitor and indicators included."""
    state = fresh_state(experiment)
    batch = {**experiment.batch(0), **experiment.resident}
    return Timed(method, memory, jax.jit(experiment.step).lower(state, batch).compile(), (state, batch))


def plain_step(experiment: ContinualExperiment) -> Timed:
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

    moments = optimizer.init(state.params)
    return Timed("plain", "", jax.jit(step).lower(state.params, moments).compile(), (state.params, moments))


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
        noise = NOISE.get(arguments.network)
        measure(arguments, noise_images(folder, *noise) if noise else None)


def measure(arguments: argparse.Namespace, data: str | None) -> None:
    """All rows asked for. `data`: a file in place of the digits."""
    base = experiment_of("mean", "fast", arguments.network, data, arguments.batch_size)
    size, turns = base.config.batch_size, [plain_step(base)]
    alone: dict[str, float | None] = {}
    for method in arguments.methods:
        for memory in arguments.memories:
            experiment = experiment_of(method, memory, arguments.network, data, arguments.batch_size)
            turns.append(whole_step(experiment, method, memory))
        alone[method] = alone_microseconds(method, experiment, 3 * max(arguments.repeats, 50))
        print(f"compiled {method}", file=sys.stderr, flush=True)
    for _ in range(arguments.repeats):
        for turn in turns:
            turn.turn()
    plain, rows = turns[0], []
    device = cpu_model() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    print(f"{base.parameter_count:,} parameters, 5 tasks x {size} examples, {device}")
    for turn in turns:
        share, microseconds = None, alone.get(turn.method)
        if microseconds is not None:
            share = 1e-6 * microseconds / turn.seconds
        relative = turn.seconds / plain.seconds
        rows.append({
            "method": turn.method, "memory": turn.memory, "ms": 1e3 * turn.seconds, "relative_time": relative,
            "temporary_mb": turn.temporary_megabytes, "aggregation_us": microseconds, "aggregation_share": share,
        })  # fmt: skip
        told = "" if share is None else f"aggregation {microseconds:7.1f} us, {100 * share:.4f} %"
        print(f"{turn.method:16} {turn.memory:5} {1e3 * turn.seconds:10.2f} ms  x{relative:5.2f}  "
              f"{turn.temporary_megabytes:8.2f} MB  {told}")  # fmt: skip
    if arguments.out is not None:
        document = {
            "device": device, "jax": jax.__version__, "network": arguments.network, "repeats": arguments.repeats,
            "parameters": base.parameter_count, "tasks": 5, "batch_size": size, "rows": rows,
        }  # fmt: skip
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
