"""What the stability monitor costs: a training step with it against the same step without it.

Both programs are compiled by `compile_step` in one process and run in short turns, so that whatever else the machine
does falls on both. The cost is the median over turns of (time with) / (time without) - 1; half of the turns lie between
the quartiles, and the fastest turns of both are those least disturbed. It is measured on one device, as runs take, and
on `--devices`. Run it on an idle machine:

    python benchmarks/monitor_cost.py [--turns 40] [--devices 2] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.training.devices import compile_step, configure_backend, cpu_cores, cpu_model, make_mesh, replicated

BATCH_SIZE = 64
RESULT = Path(__file__).parent / "results" / "monitor_cost.json"


def networks() -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Name -> (Flax module that maps a batch to its own shape, shape of one example)."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from stabletrain.diffusion.skip_mlp import SkipMLP

    class UNet(nn.Module):
        """Two resolutions, one skip connection at each, group normalisation: a diffusion network in small."""

        width: int = 32

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            def block(x: jax.Array, features: int, name: str) -> jax.Array:
                for i in range(2):
                    x = nn.silu(
                        nn.GroupNorm(8, name=f"{name}_norm_{i}")(nn.Conv(features, (3, 3), name=f"{name}_{i}")(x))
                    )
                return x

            outer = block(x, self.width, "down_0")
            inner = block(nn.avg_pool(outer, (2, 2), (2, 2)), 2 * self.width, "down_1")
            middle = block(nn.avg_pool(inner, (2, 2), (2, 2)), 2 * self.width, "middle")
            for skip, features, name in ((inner, 2 * self.width, "up_1"), (outer, self.width, "up_0")):
                middle = jax.image.resize(middle, skip.shape[:3] + middle.shape[3:], "nearest")
                middle = block(jnp.concatenate([middle, skip], axis=-1), features, name)
            return nn.Conv(x.shape[-1], (3, 3), name="out")(middle)

    class MLP(nn.Module):
        """Four hidden layers."""

        width: int = 512

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            features = x.shape[-1]
            for i in range(4):
                x = nn.relu(nn.Dense(self.width, name=f"layer_{i}")(x))
            return nn.Dense(features, name="out")(x)

    class Theorems(nn.Module):
        """The network of ScaleLong's theorems with 24 skips, the smallest that the program trains by default."""

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return SkipMLP(skip_scaling="cs", name="network")(x, jnp.full(x.shape[0], 0.5))

    return {
        "unet": (UNet(), (16, 16, 3)),
        "theorems' mlp": (Theorems(), (8, 8, 1)),
        "mlp": (MLP(), (64,)),
    }


class Denoising:
    """A network that learns to take noise off random data; with or without the monitor."""

    def __init__(self, network: Any, shape: tuple[int, ...], *, watched: bool) -> None:
        import optax

        from stabletrain.training.stability import Policy

        self.network, self.shape, self.watched = network, shape, watched
        self.optimizer = optax.adam(1e-3)
        self.policy = Policy()

    def init(self, key: Any) -> dict[str, Any]:
        from stabletrain.training.stability import init_monitor

        params = self.network.init(key, np.zeros((1, *self.shape), np.float32))["params"]
        state = {"params": params, "optimizer": self.optimizer.init(params)}
        return {**state, "monitor": init_monitor(params, self.policy)} if self.watched else state

    def batch(self, position: int) -> dict[str, Any]:
        random = np.random.default_rng(position)
        return {"x": random.normal(size=(BATCH_SIZE, *self.shape)).astype(np.float32), "position": np.uint32(position)}

    def step(self, state: dict[str, Any], batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        import jax
        import jax.numpy as jnp
        import optax

        from stabletrain.training.stability import guarded_update

        key = jax.random.fold_in(jax.random.key(0), batch["position"])
        noise = jax.random.normal(key, batch["x"].shape)

        def loss_of(params: Any) -> jax.Array:
            predicted = self.network.apply({"params": params}, 0.7 * batch["x"] + 0.7 * noise)
            return jnp.mean(jnp.square(predicted - noise))

        loss, gradients = jax.value_and_grad(loss_of)(state["params"])
        if not self.watched:
            updates, optimizer = self.optimizer.update(gradients, state["optimizer"], state["params"])
            return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer}, {
                "train/loss": loss
            }
        update = guarded_update(
            self.optimizer,
            loss=loss,
            gradients=gradients,
            params=state["params"],
            optimizer_state=state["optimizer"],
            monitor=state["monitor"],
            policy=self.policy,
        )
        state = {"params": update.params, "optimizer": update.optimizer_state, "monitor": update.monitor}
        return state, {"train/loss": loss, **update.metrics}


def measure(network: Any, shape: tuple[int, ...], mesh: Any, turns: int, seconds_per_turn: float) -> dict[str, Any]:
    """Seconds per step with and without the monitor, and the cost as a share."""
    import jax

    runs, states = {}, {}
    for watched in (False, True):
        experiment = Denoising(network, shape, watched=watched)
        runs[watched] = compile_step(experiment, mesh, 1)  # type: ignore[arg-type]
        states[watched] = jax.device_put(experiment.init(jax.random.key(0)), replicated(mesh))
    batch = experiment.batch(0)

    def turn(watched: bool, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            states[watched], metrics = runs[watched](states[watched], [batch])
        metrics.rows()  # as the loop does at a log boundary
        return (time.perf_counter() - start) / steps

    for watched in (False, True):
        turn(watched, 3)
    steps = max(8, round(seconds_per_turn / turn(False, 10) / 8) * 8)  # whole periods of the monitor's refresh
    pairs = []
    for index in range(turns):
        order = (False, True) if index % 2 else (True, False)
        times = {watched: turn(watched, steps) for watched in order}
        pairs.append((times[False], times[True]))
    costs = sorted(with_monitor / without - 1 for without, with_monitor in pairs)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(states[True]["params"])),
        "tensors": len(jax.tree.leaves(states[True]["params"])),
        "steps_per_turn": steps,
        "turns": turns,
        "milliseconds_without": round(1e3 * statistics.median(p[0] for p in pairs), 4),
        "milliseconds_with": round(1e3 * statistics.median(p[1] for p in pairs), 4),
        "cost_median": round(statistics.median(costs), 4),
        "cost_of_fastest_turns": round(min(p[1] for p in pairs) / min(p[0] for p in pairs) - 1, 4),
        "cost_quartiles": [round(costs[len(costs) // 4], 4), round(costs[(3 * len(costs)) // 4], 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--seconds-per-turn", type=float, default=0.25)
    parser.add_argument("--devices", type=int, default=min(2, cpu_cores()))
    parser.add_argument("--only", choices=("unet", "theorems' mlp", "mlp"))
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()

    configure_backend(arguments.devices, BATCH_SIZE)
    import flax
    import jax
    import jaxlib
    import optax

    meshes = {mesh.size: mesh for mesh in (make_mesh(arguments.devices, BATCH_SIZE), make_mesh(1, BATCH_SIZE))}
    results = [
        {
            "network": name,
            "devices": count,
            **measure(network, shape, mesh, arguments.turns, arguments.seconds_per_turn),
        }
        for name, (network, shape) in networks().items()
        if arguments.only in (None, name)
        for count, mesh in meshes.items()
    ]
    document = {
        "benchmark": "monitor_cost",
        "batch_size": BATCH_SIZE,
        "results": results,
        "platform": jax.devices()[0].platform,
        "device_kind": jax.devices()[0].device_kind,
        "cpu_model": cpu_model(),
        "cores": cpu_cores(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {module.__name__: module.__version__ for module in (jax, jaxlib, flax, optax)},
    }
    text = json.dumps(document, indent=2) + "\n"
    arguments.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
