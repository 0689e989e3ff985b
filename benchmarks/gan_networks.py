"""Compile time and memory of a training step of every method of `stabletrain gan`, on the CPU.

A child process for each method builds the experiment on random images, compiles a step of one discriminator and one
generator update, takes it, and reports what XLA planned and what the operating system saw. Compiling is timed by the
clock and by the processor's time in all threads, which tells more on a machine that others use. Networks have their
published widths at the given size; batches are small, so that the numbers are of the networks. A method that takes
longer than --limit seconds is recorded as such. Results are kept method by method, beside those that the file has.

    python benchmarks/gan_networks.py [--methods NAME ...] [--size 32] [--batch 4] [--limit 240] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.gan.presets import PRESETS
from stabletrain.training.devices import configure_backend, cpu_cores, cpu_model

RESULT = Path(__file__).parent / "results" / "gan_networks.json"
CLASSES = 10
MIB = 2**20


def measure(method: str, data: Path, size: int, batch: int) -> dict[str, Any]:
    """One method, in this process."""
    configure_backend(1, batch)
    import jax

    from stabletrain.gan.config import GanConfig
    from stabletrain.gan.family import build
    from stabletrain.gan.resolution import resolve
    from stabletrain.training.config import make_config
    from stabletrain.training.devices import make_mesh

    jax.config.update("jax_enable_compilation_cache", False)
    values = {"method": method, "data": str(data), "image_size": size, "batch_size": batch, "d_steps": 1, "devices": 1}
    config = resolve(make_config(GanConfig, values))
    experiment = build(config, mesh=make_mesh(1, batch))
    before = _resident()
    inputs = {**experiment.batch(0), **experiment.resident}
    shapes = jax.eval_shape(experiment.init, jax.random.key(0))
    start = time.perf_counter()
    lowered = jax.jit(experiment.step, donate_argnums=0).lower(shapes, inputs)
    traced, worked = time.perf_counter(), time.process_time()
    program = lowered.compile()
    compiled, compiling = time.perf_counter(), time.process_time() - worked
    planned = program.memory_analysis()
    assert planned is not None, "XLA plans the memory of every program on a CPU"
    state = jax.jit(experiment.init)(jax.random.key(0))
    jax.block_until_ready(program(state, inputs))
    return {
        "network": config.network,
        "parameters": {"generator": experiment.generator_parameters, "discriminator": experiment.critic_parameters},
        "trace_seconds": round(traced - start, 2),
        "compile_seconds": round(compiled - traced, 2),
        "compile_processor_seconds": round(compiling, 2),
        "planned_mib": {
            "state_and_batch": round(planned.argument_size_in_bytes / MIB, 1),
            "temporary": round(planned.temp_size_in_bytes / MIB, 1),
        },
        "peak_resident_mib": round(_resident()),
        "resident_before_mib": round(before),
    }


def _resident() -> float:
    """Peak resident memory of this process in MiB."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def child(method: str, data: Path, size: int, batch: int, limit: float) -> dict[str, Any]:
    """One method in a process of its own."""
    command = [sys.executable, __file__, "--child", str(data), "--methods", method, "--size", str(size)]
    try:
        done = subprocess.run(
            [*command, "--batch", str(batch)], capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not compiled and run within {limit:.0f} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--limit", type=float, default=240.0)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.methods[0], arguments.child, arguments.size, arguments.batch)))
        return

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "noise.npz"
        generator = np.random.Generator(np.random.Philox(0))
        images = generator.integers(0, 256, (40 * CLASSES, arguments.size, arguments.size, 3), np.uint8)
        np.savez(data, train_x=images, train_y=np.arange(len(images), dtype=np.int32) % CLASSES)
        for method in arguments.methods:
            load = os.getloadavg()[0]
            found = child(method, data, arguments.size, arguments.batch, arguments.limit)
            found = {"size": arguments.size, "batch": arguments.batch, **found, "load_before": round(load, 2)}
            print(f"{method}: {json.dumps(found)}", flush=True)
            keep(arguments.out, method, found)


def keep(path: Path, method: str, found: dict[str, Any]) -> None:
    """Put one result beside those that the file has."""
    import jax

    document: dict[str, Any] = {
        "what": "one discriminator and one generator update in float32 on one virtual device",
        "machine": {"cpu": cpu_model(), "cores": cpu_cores(), "system": platform.system()},
        "versions": {"jax": jax.__version__},
        "methods": json.loads(path.read_text())["methods"] if path.exists() else {},
    }
    document["methods"][method] = found
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
