"""What the stability monitor costs: a training step of the program's own commands with it against one without it.

The step is the experiment's, compiled by `compile_step` as the loop does, on the command's own data, network, batch
and steps per dispatch. Without the monitor `guarded_update` is the bare update of the optimiser; with it the host also
looks at every step's flags, as the loop does. Both run in one process and in short turns, so that whatever else the
machine does falls on both. The cost is the median over turns of (time with) / (time without) - 1; half of the turns lie
between the quartiles, and the fastest turns of both are those least disturbed. Run it on an idle machine:

    python benchmarks/monitor_cost.py [--turns 30] [--only NAME ...] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from stabletrain.training.devices import compile_step, configure_backend, cpu_cores, cpu_model, make_mesh

RESULT = Path(__file__).parent / "results" / "monitor_cost.json"
COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "diffusion, UNet (the default)": ("diffusion", {"skip_scaling": "cs"}),
    "diffusion, U-ViT": ("diffusion", {"skip_scaling": "cs", "backbone": "uvit"}),
    "diffusion, the theorems' MLP": ("diffusion", {"skip_scaling": "cs", "backbone": "mlp"}),
    "GAN, ReACGAN on digits (the default)": ("gan", {"method": "reacgan"}),
    "GAN, WGAN-GP on eight Gaussians": ("gan", {"method": "wgan-gp", "dataset": "gaussians8"}),
    "continual, SPCL on digits (the default)": ("continual", {"method": "spcl"}),
    "potential, SchNet on aspirin (the default)": ("nnip", {}),
}


def bare_update(optimizer: Any, *, gradients: Any, params: Any, optimizer_state: Any, monitor: Any, **_: Any) -> Any:
    """What stands where `guarded_update` stands when there is no monitor."""
    import jax.numpy as jnp
    import optax

    from stabletrain.training.stability import GuardedUpdate

    class Bare(GuardedUpdate):  # type: ignore[misc]
        def choose(self, new: Any, old: Any) -> Any:
            return new

    updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
    return Bare(optax.apply_updates(params, updates), optimizer_state, monitor, {}, jnp.ones((), bool))


def measure(family_name: str, values: dict[str, Any], turns: int, seconds_per_turn: float) -> dict[str, Any]:
    """Seconds per step with and without the monitor, and the cost as a share."""
    import jax

    from stabletrain.cli.families import family_called
    from stabletrain.training.config import make_config
    from stabletrain.training.state import fresh_state
    from stabletrain.training.watch import Watch

    family = family_called(family_name, "benchmark")
    config = family.resolve(make_config(family.config, values))
    experiments, runs, states, positions = {}, {}, {}, {}
    watch = Watch(Path(tempfile.mkdtemp()), config)
    for watched in (False, True):
        experiment = family.build(config, mesh=make_mesh(1, config.batch_size))
        steps = config.inner_steps or experiment.inner_steps
        run = compile_step(experiment, experiment.mesh, steps)
        experiments[watched], runs[watched] = experiment, run
        states[watched], positions[watched] = fresh_state(experiment), 0
        module = importlib.import_module(f"stabletrain.{family_name}.experiment")
        replaced = mock.patch.object(module, "guarded_update", module.guarded_update if watched else bare_update)
        with replaced:  # it is compiled at its first call
            states[watched], _ = run(states[watched], [experiment.batch(0)])
            jax.block_until_ready(states[watched])
    watch.begin(states[True])

    def turn(watched: bool, dispatches: int) -> float:
        start, pending = time.perf_counter(), []
        for _ in range(dispatches):
            first = positions[watched]
            batches = [experiments[watched].batch(first + i) for i in range(steps)]
            states[watched], metrics = runs[watched](states[watched], batches)
            pending.append((first, metrics))
            positions[watched] += steps
        for first, metrics in pending:  # as the loop does at a log boundary
            for i, row in enumerate(metrics.rows()):
                if watched:
                    watch.see(first + i + 1, first + i, row, may_roll_back=False)
        return (time.perf_counter() - start) / (dispatches * steps)

    for watched in (False, True):
        turn(watched, 2)
    period = 8  # of the monitor's refresh
    wanted = seconds_per_turn / (steps * turn(False, max(1, 10 // steps)))
    dispatches = max(1, period // steps, round(wanted / period) * period)
    pairs = []
    for index in range(turns):
        times = {watched: turn(watched, dispatches) for watched in ((False, True) if index % 2 else (True, False))}
        pairs.append((times[False], times[True]))
    costs = sorted(with_monitor / without - 1 for without, with_monitor in pairs)
    return {
        "options": values,
        "parameters": experiments[True].parameter_count,
        "tensors": sum(len(names) for names in watch._leaf_names.values()),
        "steps_per_dispatch": steps,
        "steps_per_turn": dispatches * steps,
        "turns": turns,
        "milliseconds_without": round(1e3 * statistics.median(p[0] for p in pairs), 4),
        "milliseconds_with": round(1e3 * statistics.median(p[1] for p in pairs), 4),
        "cost_median": round(statistics.median(costs), 4),
        "cost_of_fastest_turns": round(min(p[1] for p in pairs) / min(p[0] for p in pairs) - 1, 4),
        "cost_quartiles": [round(costs[len(costs) // 4], 4), round(costs[(3 * len(costs)) // 4], 4)],
    }


def main() -> None:
    """Measures, prints and keeps the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--seconds-per-turn", type=float, default=0.5)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()

    configure_backend(1, 1)
    import flax
    import jax
    import jaxlib
    import optax

    load, results = os.getloadavg()[0], {}
    for name in arguments.only:
        family, values = COMMANDS[name]
        results[name] = found = measure(family, values, arguments.turns, arguments.seconds_per_turn)
        print(
            f"{name}: {found['milliseconds_without']:.2f} ms a step, with the monitor {found['cost_median']:+.1%} "
            f"[{found['cost_quartiles'][0]:+.1%}, {found['cost_quartiles'][1]:+.1%}]",
            flush=True,
        )
    document = {
        "benchmark": "monitor_cost",
        "results": results,
        "platform": jax.devices()[0].platform,
        "device_kind": jax.devices()[0].device_kind,
        "cpu_model": cpu_model(),
        "cores": cpu_cores(),
        "load_average_before": round(load, 2),
        "python": platform.python_version(),
        "versions": {module.__name__: module.__version__ for module in (jax, jaxlib, flax, optax)},
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
