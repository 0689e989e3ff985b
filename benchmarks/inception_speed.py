"""Features of the 2015 Inception: time per 1,000 images of 32 x 32, beside the same network in torch.

Random weights, the same arrays in all programs, which take turns in one process so that whatever else the machine does
falls on all. Ratios are medians over turns of (time of the other) / (time of ours). Processor time is given besides: it
hardly depends on who else is running, but torch's waiting threads count into its own. Peak memory is that of a process
that extracts features and nothing else. Needs torch:

    python -m benchmarks.inception_speed [--images 32] [--turns 4] [--batch-size 32] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULT = Path(__file__).parent / "results" / "inception_speed.json"
GFLOP_PER_IMAGE = 11.4


def images_of(count: int) -> np.ndarray:
    """Noise: the time does not depend on the content."""
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)


def ours(batch_size: int, devices: int) -> Callable[[np.ndarray], Any]:
    from stabletrain.metrics import inception

    params = inception.random_parameters()
    extractor = inception.InceptionExtractor(
        "random", "", params, resize="pytorch-fid", logit_bias=True, batch_size=batch_size, max_devices=devices
    )
    return extractor.outputs


def torchs(batch_size: int, channels_last: bool) -> Callable[[np.ndarray], Any]:
    """The network as pytorch-fid would run it, or with the layout of memory that suits the processor better."""
    import torch

    from stabletrain.metrics import inception
    from tests.metrics.inception_reference import Reference, TorchOperations

    layout = torch.channels_last if channels_last else torch.contiguous_format
    arrays = inception.to_published(inception.random_parameters())
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    tensors = {name: t.contiguous(memory_format=layout) if t.ndim == 4 else t for name, t in tensors.items()}
    network = Reference(TorchOperations(), tensors)

    def extract(images: np.ndarray) -> Any:
        parts = []
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                x = torch.from_numpy(images[start : start + batch_size]).permute(0, 3, 1, 2).float() / 255
                x = torch.nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1
                parts.append(network(x.contiguous(memory_format=layout)))
        return tuple(torch.cat(part).numpy() for part in zip(*parts, strict=True))

    return extract


def peak_memory(batch_size: int) -> float:
    """MiB of a fresh process that extracts features of two batches and of nothing else."""
    command = [sys.executable, "-m", "benchmarks.inception_speed", "--only-memory", "--batch-size", str(batch_size)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(answer.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="images a turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--only-memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    from stabletrain.training.devices import configure_backend, cpu_cores, cpu_model

    configure_backend(0, arguments.batch_size)
    if arguments.only_memory:
        ours(arguments.batch_size, 0)(images_of(2 * arguments.batch_size))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return

    import jax
    import torch

    batch_size = arguments.batch_size
    memory = {str(size): round(peak_memory(size)) for size in sorted({8, batch_size, 2 * batch_size})}
    devices = len(jax.devices())
    programs = {
        f"ours, {devices} devices": ours(batch_size, 0),
        "ours, 1 device": ours(batch_size, 1),
        "torch": torchs(batch_size, channels_last=False),
        "torch, channels last": torchs(batch_size, channels_last=True),
    }
    images = images_of(arguments.images)
    start = time.perf_counter()
    answers = {name: program(images) for name, program in programs.items()}
    print(f"compiled and warm after {time.perf_counter() - start:.0f} s", file=sys.stderr)
    reference = answers["torch"][0]
    differences = {name: float(np.abs(a[0] - reference).max() / reference.std()) for name, a in answers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    processor: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(arguments.turns):
        for name, program in programs.items():
            wall, busy = time.perf_counter(), time.process_time()
            program(images)
            seconds[name].append((time.perf_counter() - wall) * 1000 / len(images))
            processor[name].append((time.process_time() - busy) * 1000 / len(images))
        print(f"turn {turn + 1}: " + ", ".join(f"{n} {s[-1]:.0f}" for n, s in seconds.items()), file=sys.stderr)
    first = next(iter(programs))
    result = {
        "what": "seconds per 1,000 images of 32 x 32 through the 2015 Inception at 299 x 299, float32",
        "images": arguments.images,
        "turns": arguments.turns,
        "batch_size": batch_size,
        "median_seconds_per_1000": {name: round(statistics.median(s), 1) for name, s in seconds.items()},
        "best_seconds_per_1000": {name: round(min(s), 1) for name, s in seconds.items()},
        "best_processor_seconds_per_1000": {name: round(min(s), 1) for name, s in processor.items()},
        "gflops_of_best": {name: round(1000 * GFLOP_PER_IMAGE / min(s)) for name, s in seconds.items()},
        "ratio_to_ours": {
            name: round(statistics.median(t / o for t, o in zip(s, seconds[first], strict=True)), 2)
            for name, s in seconds.items()
        },
        "largest_difference_of_features_in_standard_deviations": differences,
        "peak_memory_mib_by_batch_size": memory,
        "load_average": os.getloadavg()[0],
        "machine": {"processor": cpu_model(), "cores": cpu_cores(), "system": platform.platform()},
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "torch": torch.__version__},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
