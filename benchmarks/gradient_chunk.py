"""The Boltzmann estimator's reverse pass by the structures that it takes at once: seconds, on 320 of aspirin.

SchNet in the default's size and the paper's; all sizes in the same process and in turns:

    python -m benchmarks.gradient_chunk [--turns 7] [--out FILE.json]

`taskset -c 0` before it measures one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stabletrain.training.devices import configure_backend, cpu_cores, cpu_model

RESULT = Path(__file__).parent / "results" / "gradient_chunk.json"
CHUNKS = (8, 16, 32, 64)
STRUCTURES = 320
SIZES = {"default, 32 features, 3 interactions": (32, 3), "paper, 64 features, 6 interactions": (64, 6)}


def measure(features: int, interactions: int, turns: int) -> dict[str, float]:
    """Median seconds of a reverse pass by the chunk."""
    import jax
    import jax.numpy as jnp

    from stabletrain.methods.stable import weighted_energy_gradient
    from stabletrain.nnip.frames import read_frames
    from stabletrain.nnip.potential import EnergyScale, Potential
    from stabletrain.nnip.schnet import SchNet

    frames = read_frames("aspirin-xtb", None)
    scale = EnergyScale(1.0, dict.fromkeys(frames.system.elements, 0.0))
    potential = Potential("schnet", SchNet(features, interactions), frames.system, 5.0, scale)
    params = potential.init(jax.random.key(0))
    positions = jnp.asarray(frames.positions[:STRUCTURES], jnp.float32)
    coefficients = jnp.ones(STRUCTURES)

    def compiled(chunk: int) -> Callable[[Any], Any]:
        return jax.jit(
            lambda params: weighted_energy_gradient(potential.energy, params, positions, coefficients, chunk_size=chunk)
        )

    programs = {chunk: compiled(chunk) for chunk in CHUNKS}
    for program in programs.values():
        jax.block_until_ready(program(params))
    times: dict[int, list[float]] = {chunk: [] for chunk in CHUNKS}
    for _ in range(turns):
        for chunk, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(params))
            times[chunk].append(time.perf_counter() - begin)
    return {str(chunk): statistics.median(values) for chunk, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    configure_backend(0, 1, compile_cache=False)
    import jax

    found = {}
    for name, (features, interactions) in SIZES.items():
        seconds = measure(features, interactions, given.turns)
        found[name] = {"seconds": seconds, "16_over_64": seconds["16"] / seconds["64"]}
        print(name, {chunk: round(value, 3) for chunk, value in seconds.items()}, flush=True)
    machine = {"device": cpu_model(), "cores": cpu_cores(), "jax": jax.__version__}
    document = {"machine": machine, "structures": STRUCTURES, "turns": given.turns, "cases": found}
    given.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
