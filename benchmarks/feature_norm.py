"""Feature norms of U-ViT while it trains, for each skip scaling at two depths: the README figure of ScaleLong, small.

Each run is `stabletrain diffusion` with the settings below, in a process of its own; runs that are finished are kept
and a second call makes only what is missing:

    python benchmarks/feature_norm.py --runs FOLDER                                    # digits
    python benchmarks/feature_norm.py --runs FOLDER --data cifar10.npz --name cifar10  # the user's CIFAR-10 images

Writes benchmarks/results/feature_norm_<name>.json and .svg. About a minute a run for digits, three for 32x32 images, on
two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.diffusion.skips import SKIP_SCALINGS
from stabletrain.runs.figures import curves_figure
from stabletrain.runs.reading import RunData, read_run
from stabletrain.runs.statistics import reduce_curve
from stabletrain.training.machine import machine_facts

RESULTS = Path(__file__).parent / "results"
FOUR = ("none", "sqrt2", "cs", "ls")
DEPTHS = (12, 16)
METRIC = "stability/feature_norm/middle"
WARM_UP = 0.25  # the first quarter is left out of level and oscillation

SETTINGS = {
    "digits": ["--width", "32", "--heads", "4", "--patch-size", "2", "--steps", "400", "--learning-rate", "2e-3"],
    "images": ["--width", "48", "--heads", "4", "--patch-size", "4", "--steps", "300", "--learning-rate", "1e-3"],
}
COMMON = [
    "--backbone",
    "uvit",
    "--lr-decay",
    "constant",
    "--ema-decay",
    "0",
    "--no-class-conditional",
    "--log-every",
    "5",
]
KAPPA = ["--kappa", "0.5"]


def command(scaling: str, depth: int, seed: int, data: Path | None) -> list[str]:
    """The arguments after `stabletrain`."""
    arguments = ["diffusion", *COMMON, *SETTINGS["images" if data else "digits"], "--skip-scaling", scaling]
    arguments += KAPPA if scaling in ("cs", "const") else []
    arguments += ["--dataset", "cifar10", "--data", str(data)] if data else []
    return [*arguments, "--depth", str(depth), "--seed", str(seed)]


def trained(arguments: list[str], out: Path) -> RunData:
    """The finished run of these arguments."""
    done = subprocess.run([sys.executable, "-m", "stabletrain", *arguments, "--out", str(out), "--quiet"], check=False)
    if done.returncode not in (0, 4):
        raise SystemExit(f"stabletrain {' '.join(arguments)} ended with {done.returncode}")
    return read_run(out)


def summary(run: RunData, scaling: str, depth: int) -> dict[str, Any]:
    """Level and oscillation of the norm, the losses, and how the run ended."""
    steps, values = run.curve(METRIC)
    curve = steps.tolist(), values.tolist()
    return {
        "skip_scaling": scaling,
        "depth": depth,
        "seed": run.seed,
        "ended": run.state,
        "norm": reduce_curve(*curve, "mean", start=WARM_UP),
        "oscillation": reduce_curve(*curve, "oscillation", start=WARM_UP),
        "held_out_loss": run.last("eval/loss_test_raw"),
        "largest_gradient_norm": float(np.nanmax(run.curve("stability/grad_norm")[1])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--data", type=Path, help="an .npz of CIFAR-10 images; without it: digits")
    parser.add_argument("--name", default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--scalings", nargs="+", default=list(FOUR), choices=list(SKIP_SCALINGS))
    parser.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS))
    options = parser.parse_args()
    runs: dict[tuple[int, str], list[RunData]] = {}
    for depth in options.depths:
        for scaling in options.scalings:
            for seed in options.seeds:
                out = options.runs / options.name / f"{scaling}-d{depth}-s{seed}"
                run = trained(command(scaling, depth, seed, options.data), out)
                runs.setdefault((depth, scaling), []).append(run)
                print(json.dumps(summary(run, scaling, depth)), flush=True)
    panels = {f"depth {depth}": {s: runs[depth, s] for s in options.scalings} for depth in options.depths}
    figure = curves_figure(panels, METRIC, label="feature norm, middle block")
    document = {
        "what": f"{METRIC} (L2 norm of a sample's feature on a fixed probe batch): mean, and standard deviation around "
        f"a line, after the first {WARM_UP:.0%} of the steps",
        "command": " ".join(["stabletrain", *command("SCALING", 0, 0, options.data and Path(options.data.name))]),
        "runs": [summary(run, scaling, depth) for (depth, scaling), found in runs.items() for run in found],
        "machine": machine_facts(),
    }
    (RESULTS / f"feature_norm_{options.name}.json").write_text(json.dumps(document, indent=2) + "\n")
    if figure:
        (RESULTS / f"feature_norm_{options.name}.svg").write_text(figure)


if __name__ == "__main__":
    main()
