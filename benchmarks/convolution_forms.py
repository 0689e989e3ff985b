"""3x3 convolutions and their gradients on the CPU: XLA's, Winograd's (`stabletrain.nn.winograd`) and PyTorch's.

This is the measurement behind `winograd.pays`: shapes of DDPM's UNet on 32 pixels, of ResNet-18, and around the limits.
Milliseconds are those of the fastest of many turns, in which the ways alternate within one process; compilation is that
of the function alone. Besides, the gradient by the kernel as nine products with shifted images. PyTorch, where it is
installed, runs its faster memory layout. For an idle machine:

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

from stabletrain.training.devices import configure_backend, cpu_cores, cpu_model

RESULT = Path(__file__).parent / "results" / "convolution_forms.json"
SHAPES = [
    (4, 32, 128, 128), (4, 16, 256, 256), (4, 8, 256, 256), (4, 4, 256, 256), (4, 16, 512, 256), (4, 32, 256, 128),
    (16, 16, 128, 128), (16, 32, 64, 64), (16, 16, 64, 64), (64, 8, 64, 64), (64, 8, 32, 32), (64, 8, 32, 64),
]  # fmt: skip
"""Batch, pixels along a side, channels in and out."""
FORWARD, BY_IMAGES, BY_KERNEL = "forward", "gradient by the images", "gradient by the kernel"

Function = Callable[..., Any]


def in_jax() -> dict[str, dict[str, Function]]:
    """What is computed -> way of computing it -> function of (images, kernel, cotangent)."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from stabletrain.nn.winograd import convolve_3x3

    def direct(x: jax.Array, k: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def nine_products(x: jax.Array, k: jax.Array, g: jax.Array) -> jax.Array:
        size = x.shape[1]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [padded[:, i : i + size, j : j + size] for i in range(3) for j in range(3)]
        over_pixels = (((0, 1, 2), (0, 1, 2)), ((), ()))
        return jnp.stack([lax.dot_general(s, g, over_pixels) for s in shifted]).reshape(k.shape)

    ways: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"xla": direct, "winograd": convolve_3x3}
    return {
        FORWARD: {name: lambda x, k, g, f=f: f(x, k) for name, f in ways.items()},
        BY_IMAGES: {
            name: lambda x, k, g, f=f: jax.vjp(lambda x: f(x, k), x)[1](g)[0] for name, f in ways.items()
        },
        BY_KERNEL: {
            **{name: lambda x, k, g, f=f: jax.vjp(lambda k: f(x, k), k)[1](g)[0] for name, f in ways.items()},
            "nine products": nine_products,
        },
    }  # fmt: skip


def in_torch(arrays: tuple[np.ndarray, ...]) -> dict[str, dict[str, Callable[[], Any]]]:
    """The same by PyTorch in both memory layouts; nothing where it is not installed."""
    try:
        import torch
    except ModuleNotFoundError:
        return {what: {} for what in (FORWARD, BY_IMAGES, BY_KERNEL)}
    torch.set_num_threads(cpu_cores())
    found: dict[str, dict[str, Callable[[], Any]]] = {FORWARD: {}, BY_IMAGES: {}, BY_KERNEL: {}}
    x, k, g = arrays
    for name, layout in (("torch", torch.contiguous_format), ("torch, channels last", torch.channels_last)):
        images, cotangent = (torch.tensor(a.transpose(0, 3, 1, 2)).contiguous(memory_format=layout) for a in (x, g))
        kernel = torch.tensor(k.transpose(3, 2, 0, 1)).contiguous(memory_format=layout)

        def backward(
            by: tuple[bool, bool, bool], images: Any = images, kernel: Any = kernel, g: Any = cotangent
        ) -> Any:
            return torch.ops.aten.convolution_backward(
                g, images, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, by
            )

        found[FORWARD][name] = lambda images=images, kernel=kernel: torch.conv2d(images, kernel, padding=1)
        found[BY_IMAGES][name] = lambda backward=backward: backward((True, False, False))
        found[BY_KERNEL][name] = lambda backward=backward: backward((False, True, False))
    return found


def measure(shape: tuple[int, int, int, int], turns: int) -> dict[str, Any]:
    """Milliseconds of each way for one shape, and of compiling it."""
    import jax

    batch, size, inside, outside = shape
    random = np.random.default_rng(0)
    x, g = (random.standard_normal((batch, size, size, width), np.float32) for width in (inside, outside))
    kernel = random.standard_normal((3, 3, inside, outside), np.float32) / (9 * inside) ** 0.5
    arguments = jax.device_put((x, kernel, g))

    found: dict[str, Any] = {}
    peers = in_torch((x, kernel, g))
    for what, ways in in_jax().items():
        compiled, compilation = {}, {}
        for way, function in ways.items():
            start = time.perf_counter()
            compiled[way] = jax.jit(function).lower(*arguments).compile()
            compilation[way] = round(1e3 * (time.perf_counter() - start))
        expected = np.asarray(compiled["xla"](*arguments))
        for function in compiled.values():
            np.testing.assert_allclose(function(*arguments), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
        calls = {
            **{way: lambda f=f: jax.block_until_ready(f(*arguments)) for way, f in compiled.items()},
            **peers[what],
        }
        fastest = dict.fromkeys(calls, float("inf"))
        for _ in range(turns):
            for way, call in calls.items():
                start = time.perf_counter()
                call()
                fastest[way] = min(fastest[way], 1e3 * (time.perf_counter() - start))
        found[what] = {way: round(value, 3) for way, value in fastest.items()}
        found[f"compilation, {what}"] = compilation
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    configure_backend(1, 64, compile_cache=False)
    import jax

    load = os.getloadavg()[0]
    results = []
    for shape in SHAPES:
        found = measure(shape, arguments.turns)
        results.append({"shape": dict(zip(("batch", "size", "in", "out"), shape, strict=True)), **found})
        print(shape, {what: times for what, times in found.items() if "compilation" not in what}, flush=True)
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
