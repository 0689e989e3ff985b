"""Memory and time of a Frechet distance over 50,000 images of 32x32 with 2048 features, apart from the network itself.

A child process evaluates a generator against 50,000 real images, exactly as a run does; its peak resident memory is
asked of the operating system. The extractor is a random projection: as wide as the 2015 Inception (2048 features, 1008
logits) and cheap, so that what is measured is the streaming, not the network.

    python benchmarks/fd50k_memory.py [--metrics fd] [--count 50000] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import hashlib
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

LIMIT_GIB = 4.0
SIZE, CHANNELS, FEATURES, LOGITS = 32, 3, 2048, 1008
RESULT = Path(__file__).parent / "results" / "fd50k_memory.json"


class Noise:
    """Images by index that are nowhere in memory: smooth random patterns, a pure function of index and seed."""

    shape = (SIZE, SIZE, CHANNELS)

    def __init__(self, count: int, seed: int, contrast: float) -> None:
        self._count, self._seed, self._contrast = count, seed, contrast

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Any) -> np.ndarray:
        images = np.empty((len(indices), *self.shape), np.uint8)
        for row, index in enumerate(np.asarray(indices).tolist()):
            generator = np.random.Generator(np.random.Philox(key=np.array([self._seed, index], np.uint64)))
            coarse = generator.normal(0, self._contrast, (8, 8, CHANNELS)).repeat(4, axis=0).repeat(4, axis=1)
            images[row] = np.clip(127 + coarse, 0, 255)
        return images

    def array(self) -> None:
        return None


class Projection:
    """A random projection with a rectifier, of the 2015 Inception's width."""

    name, resize = "projection", "none"

    def __init__(self) -> None:
        import jax

        generator = np.random.default_rng(0)
        inputs = SIZE * SIZE * CHANNELS
        self.weights = generator.normal(0, inputs**-0.5, (inputs, FEATURES)).astype(np.float32)
        self.head = generator.normal(0, FEATURES**-0.5, (FEATURES, LOGITS)).astype(np.float32)
        self.sha256 = hashlib.sha256(self.weights.tobytes()).hexdigest()

        def network(weights: jax.Array, head: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            features = jax.nn.relu(images.reshape(len(images), -1).astype(np.float32) / 64 @ weights)
            return features, features @ head

        self._network = jax.jit(network)

    def outputs(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features, logits = self._network(self.weights, self.head, images)
        return np.asarray(features), np.asarray(logits)

    def features(self, images: np.ndarray) -> np.ndarray:
        return self.outputs(images)[0]

    def logits(self, images: np.ndarray) -> np.ndarray:
        return self.outputs(images)[1]


def measure(count: int, metrics: tuple[str, ...]) -> dict[str, Any]:
    """The evaluation, in this process."""
    import jax

    from stabletrain.data.spec import Dataset, DataSpec, Split
    from stabletrain.metrics.evaluate import evaluate_generator

    real, made = Noise(count, 0, 30.0), Noise(count, 1, 33.0)
    spec = DataSpec("noise", SIZE, CHANNELS, 0, (), hashlib.sha256(b"noise").hexdigest(), count, 0)
    dataset = Dataset(spec, Split(real, None), Split(Noise(0, 0, 0.0), None))
    before = peak_gib()
    begun = time.perf_counter()
    scores = evaluate_generator(
        made.read, dataset, Projection(), num_samples=count, context=None, metrics=metrics, split="train"
    )
    seconds = time.perf_counter() - begun
    return {
        "count": count,
        "features": FEATURES,
        "metrics": list(metrics),
        "scores": scores,
        "peak_gib": round(peak_gib(), 3),
        "peak_gib_before": round(before, 3),
        "limit_gib": LIMIT_GIB,
        "seconds": round(seconds, 1),
        "seconds_per_1000_pairs": round(1000 * seconds / count, 3),
        "device": str(jax.devices()[0]),
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }


def peak_gib() -> float:
    """The largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", default="fd", help="comma-separated names of metrics")
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.count, tuple(options.metrics.split(",")))))
        return 0
    with tempfile.TemporaryDirectory(prefix="fd50k-") as folder:
        command = [sys.executable, __file__, "--measure", "--metrics", options.metrics, "--count", str(options.count)]
        environment = {**os.environ, "STABLETRAIN_HOME": folder, "TMPDIR": folder}
        child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(child.stdout)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 0 if result["peak_gib"] <= LIMIT_GIB else 1


if __name__ == "__main__":
    sys.exit(main())
