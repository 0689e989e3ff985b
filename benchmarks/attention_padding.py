"""Attention and its gradient on the tokens of U-ViT, as they are and padded to a multiple of 8, 16, 32 and 64.

A number of tokens such as 257 fits no tile of a product. `--pad-tokens N` of `stabletrain diffusion --backbone uvit`
pads within attention, masks, and gives the same numbers; this measures whether that pays, against the unpadded form
in the same process and in turns. On a CPU the time is the processor's, not the clock's, on one core:

    taskset -c 0 python -m benchmarks.attention_padding [--turns 9] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.training.devices import configure_backend, cpu_cores, cpu_model

RESULT = Path(__file__).parent / "results" / "attention_padding.json"
CASES = {
    "uvit-s2, 32 pixels": (4, 257, 8, 64),
    "digits, patch 1": (64, 65, 4, 24),
    "digits, patch 2": (64, 17, 4, 24),
}
"""Images, tokens, heads and features of a head."""
MULTIPLES = (1, 8, 16, 32, 64)


def programs(shape: tuple[int, int, int, int], multiples: tuple[int, ...], precision: str) -> dict[int, Callable]:
    """For each multiple a call that computes the gradient of attention by queries, keys and values."""
    import jax
    import jax.numpy as jnp

    from stabletrain.nn.attention import attend

    keys = jax.random.split(jax.random.key(0), 4)
    *qkv, weight = (jax.random.normal(key, shape, precision) for key in keys)

    def loss(multiple: int, q: Any, k: Any, v: Any) -> Any:
        return jnp.sum((attend(q, k, v, multiple=multiple) * weight).astype(jnp.float32))

    calls = {}
    for multiple in multiples:
        compiled = jax.jit(jax.value_and_grad(partial(loss, multiple), argnums=(0, 1, 2))).lower(*qkv).compile()
        calls[multiple] = partial(lambda run: jax.block_until_ready(run(*qkv)), compiled)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    configure_backend(1, 1)
    import jax

    device = jax.devices()[0]
    clock = time.process_time if device.platform == "cpu" else time.perf_counter
    results = {}
    for name, shape in CASES.items():
        length = shape[1]
        sizes = {multiple: length + -length % multiple for multiple in MULTIPLES}
        chosen = tuple({size: multiple for multiple, size in reversed(sizes.items())}.values())  # each size once
        calls = programs(shape, tuple(sorted(chosen)), given.precision)
        repeats = {}
        for multiple, call in calls.items():
            call()
            start = clock()
            call()
            repeats[multiple] = max(1, round(0.1 / max(clock() - start, 1e-5)))
        taken: dict[int, list[float]] = {multiple: [] for multiple in calls}
        for turn in range(given.turns):
            for multiple in list(calls) if turn % 2 == 0 else list(calls)[::-1]:
                call = calls[multiple]
                call()
                start = clock()
                for _ in range(repeats[multiple]):
                    call()
                taken[multiple].append((clock() - start) / repeats[multiple])
        results[name] = {}
        for multiple, values in taken.items():
            ratios = [value / plain for value, plain in zip(values, taken[1])]
            quartiles = [float(np.quantile(ratios, q)) for q in (0.25, 0.5, 0.75)]
            results[name][sizes[multiple]] = {
                "multiple": multiple,
                "milliseconds": 1e3 * statistics.median(values),
                "ratio_to_unpadded": quartiles[1],
                "quartiles": [quartiles[0], quartiles[2]],
            }
            print(f"{name}: {sizes[multiple]} tokens, {1e3 * statistics.median(values):.2f} ms, {quartiles[1]:.2f}")
    document = {
        "what": "attention and its gradient; ratio_to_unpadded below one: padding is faster",
        "time": "of the processor" if device.platform == "cpu" else "of the clock",
        "turns": given.turns,
        "precision": given.precision,
        "cases": results,
        "machine": {"device": cpu_model() if device.platform == "cpu" else device.device_kind, "cores": cpu_cores()},
        "versions": {"jax": jax.__version__},
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
