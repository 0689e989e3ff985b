"""Random numbers by the program's keys against those of `jax.random.key`: seconds to compile, milliseconds to draw.

The numbers are the same (`tests/test_random_keys.py`). Both kinds of key are measured in the same process and in
turns, with nothing in the compile cache:

    python -m benchmarks.random_draws [--turns 15] [--out FILE.json]
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

RESULT = Path(__file__).parent / "results" / "random_draws.json"


def cases() -> dict[str, Callable[[Any], Any]]:
    """What is drawn of a key: noise, a kernel, and the parameters of two networks at their start."""
    import jax
    import jax.numpy as jnp

    from stabletrain.diffusion.uvit import UViT
    from stabletrain.gan.networks.resnet101 import ResNet101Critic

    uvit = UViT(image_size=8, channels=1, patch_size=1, width=96, depth=12, heads=4)
    critic = ResNet101Critic(width=8, norm="layer")
    return {
        "noise of 128 images of 32x32x3": lambda key: jax.random.normal(key, (128, 32, 32, 3)),
        "noise of 64 images of 8x8x1": lambda key: jax.random.normal(key, (64, 8, 8, 1)),
        "momenta of 16 molecules of 21 atoms": lambda key: jax.random.normal(key, (16, 21, 3)),
        "latents of 64 images": lambda key: jax.random.normal(key, (64, 128)),
        "start of U-ViT, 12 layers": lambda key: uvit.init(key, jnp.zeros((1, 8, 8, 1)), jnp.zeros(1)),
        "start of the critic of 101 layers": lambda key: critic.init(key, jnp.zeros((1, 64, 64, 1)), train=False),
    }


def measure(draw: Callable[[Any], Any], turns: int) -> dict[str, Any]:
    """Seconds to compile and milliseconds to run by either key, and their ratios (JAX's over the program's)."""
    import jax

    from stabletrain.random_keys import random_key

    keys = {"jax": jax.random.key(0), "stabletrain": random_key(0)}
    compiled, seconds = {}, {}
    for name, key in keys.items():
        lowered = jax.jit(draw).lower(key)
        begin = time.perf_counter()
        compiled[name] = lowered.compile()
        seconds[name] = time.perf_counter() - begin
        jax.block_until_ready(compiled[name](key))
    times: dict[str, list[float]] = {name: [] for name in keys}
    for _ in range(turns):
        for name, key in keys.items():
            begin = time.perf_counter()
            jax.block_until_ready(compiled[name](key))
            times[name].append(1e3 * (time.perf_counter() - begin))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "compile_seconds": seconds,
        "compile_ratio": seconds["jax"] / seconds["stabletrain"],
        "run_ms": medians,
        "run_ratio": medians["jax"] / medians["stabletrain"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    configure_backend(0, 1, compile_cache=False)
    import jax

    found = {}
    for name, draw in cases().items():
        found[name] = measure(draw, given.turns)
        shown = found[name]
        print(
            f"{name}: compiling {shown['compile_seconds']['jax']:.2f} s against "
            f"{shown['compile_seconds']['stabletrain']:.2f} s, drawing {shown['run_ms']['jax']:.3f} ms against "
            f"{shown['run_ms']['stabletrain']:.3f} ms",
            flush=True,
        )
    machine = {"device": cpu_model(), "cores": cpu_cores(), "jax": jax.__version__}
    given.out.write_text(json.dumps({"machine": machine, "turns": given.turns, "cases": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
