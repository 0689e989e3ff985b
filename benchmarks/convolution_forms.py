"""Ways to write a 3x3 convolution and its gradient by the kernel, against XLA's own, on the CPU.

The networks use `lax.conv_general_dilated` as it is; this is the measurement behind that. Tried are the product with a
matrix of patches, a sum of nine products with shifted images, three with rows of shifted images, and halving the batch
(XLA works on one image at a time in places). Milliseconds are those of the fastest of many turns:

    python benchmarks/convolution_forms.py [--turns 25] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.training.devices import batch_sharding, configure_backend, cpu_cores, cpu_model, make_mesh, replicated

RESULT = Path(__file__).parent / "results" / "convolution_forms.json"
SHAPES = [(64, 8, 32, 32), (64, 8, 64, 64), (32, 32, 32, 32), (16, 16, 128, 128)]
"""Batch, pixels along a side, channels in and out."""


def forms() -> dict[str, dict[str, Callable[..., Any]]]:
    """What is computed -> way of computing it -> function of (images, kernel, cotangent)."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from stabletrain.nn.convolution import convolve

    def shifted(x: jax.Array) -> list[jax.Array]:
        size = x.shape[1]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return [padded[:, i : i + size, j : j + size] for i in range(3) for j in range(3)]

    def over_pixels(x: jax.Array, g: jax.Array) -> jax.Array:
        return lax.dot_general(x, g, (((0, 1, 2), (0, 1, 2)), ((), ())))

    def by_kernel(x: jax.Array, k: jax.Array, g: jax.Array) -> jax.Array:
        return jax.vjp(lambda k: convolve(x, k), k)[1](g)[0]

    def rows(x: jax.Array, k: jax.Array, g: jax.Array) -> jax.Array:
        size = x.shape[1]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        wide = jnp.concatenate([padded[:, :, j : j + size] for j in range(3)], axis=-1)
        return jnp.stack([over_pixels(wide[:, i : i + size], g) for i in range(3)]).reshape(k.shape)

    def halves(x: jax.Array, k: jax.Array, g: jax.Array) -> jax.Array:
        cut = len(x) // 2
        return by_kernel(x[:cut], k, g[:cut]) + by_kernel(x[cut:], k, g[cut:])

    return {
        "forward": {
            "lax": lambda x, k, g: convolve(x, k),
            "patches": lambda x, k, g: jnp.concatenate(shifted(x), axis=-1) @ k.reshape(-1, k.shape[-1]),
            "nine products": lambda x, k, g: sum(s @ w for s, w in zip(shifted(x), k.reshape(9, *k.shape[2:]))),
        },
        "gradient by the images": {"lax": lambda x, k, g: jax.vjp(lambda x: convolve(x, k), x)[1](g)[0]},
        "gradient by the kernel": {
            "lax": by_kernel,
            "patches": lambda x, k, g: over_pixels(jnp.concatenate(shifted(x), axis=-1), g).reshape(k.shape),
            "nine products": lambda x, k, g: jnp.stack([over_pixels(s, g) for s in shifted(x)]).reshape(k.shape),
            "three products": rows,
            "halves of the batch": halves,
        },
    }


def measure(shape: tuple[int, int, int, int], devices: int, turns: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each form for one shape, the batch split over `devices`."""
    import jax

    batch, size, inside, outside = shape
    mesh = make_mesh(devices, batch)
    random = np.random.default_rng(0)
    x, g = (random.standard_normal((batch, size, size, width), np.float32) for width in (inside, outside))
    kernel = random.standard_normal((3, 3, inside, outside), np.float32) / (9 * inside) ** 0.5
    images, cotangent = jax.device_put((x, g), batch_sharding(mesh))
    arguments = images, jax.device_put(kernel, replicated(mesh)), cotangent

    found: dict[str, dict[str, float]] = {}
    for what, ways in forms().items():
        compiled = {way: jax.jit(function) for way, function in ways.items()}
        expected = np.asarray(compiled["lax"](*arguments))
        for function in compiled.values():
            np.testing.assert_allclose(function(*arguments), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
        fastest = dict.fromkeys(compiled, float("inf"))
        for _ in range(turns):
            for way, function in compiled.items():
                start = time.perf_counter()
                jax.block_until_ready(function(*arguments))
                fastest[way] = min(fastest[way], 1e3 * (time.perf_counter() - start))
        found[what] = {way: round(value, 3) for way, value in fastest.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    most = min(2, cpu_cores())
    configure_backend(most, 64)
    import jax

    load = os.getloadavg()[0]
    results = []
    for shape in SHAPES:
        for devices in sorted({1, most}):
            found = measure(shape, devices, arguments.turns)
            results.append({"shape": dict(zip(("batch", "size", "in", "out"), shape)), "devices": devices, **found})
            print(shape, f"{devices} device(s)", found, flush=True)
    document = {
        "what": "milliseconds of a 3x3 convolution in float32, the fastest of the turns",
        "turns": arguments.turns,
        "cases": results,
        "machine": {"cpu": cpu_model(), "cores": cpu_cores(), "system": platform.system()},
        "load_before": round(load, 2),
        "versions": {"jax": jax.__version__},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
