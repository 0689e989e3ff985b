"""Training that dies and training that lives: the network of ScaleLong's theorems without and with scaled skips.

Runs the two commands of the README for three seeds each and keeps what they ended with:

    stabletrain diffusion --backbone mlp --skip-scaling none
    stabletrain diffusion --backbone mlp --scalelong

A network that answers "no noise" to everything has the loss that is given as `predict_zero`. About 20 seconds a run.

    python benchmarks/mlp_pair.py [--seeds 0 1 2] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from stabletrain.training.machine import machine_facts

RESULT = Path(__file__).parent / "results" / "mlp_pair.json"
COMMANDS = {
    "none": ["diffusion", "--backbone", "mlp", "--skip-scaling", "none"],
    "scalelong": ["diffusion", "--backbone", "mlp", "--scalelong"],
}


def run(arguments: list[str], seed: int, out: Path) -> dict[str, Any]:
    """One command in its own process: the losses, the largest gradient norm logged, and its wall time."""
    command = [sys.executable, "-m", "stabletrain", *arguments, "--seed", str(seed), "--out", str(out)]
    command += ["--log-every", "10", "--json", "--quiet"]
    started = time.monotonic()
    done = subprocess.run(
        [*command, "--log-every", "10", "--json", "--quiet"], capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    outcome = json.loads(done.stdout)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    norms = [row["stability/grad_norm"] for row in rows if "stability/grad_norm" in row]
    return {
        "seed": seed,
        "steps": outcome["step"],
        "held_out_loss": outcome["metrics"]["eval/loss_test_raw"],
        "last_training_loss": statistics.mean(row["train/loss"] for row in rows[-5:]),
        "largest_gradient_norm": max(norms),
        "seconds": round(seconds, 1),
    }


def predict_zero() -> float:
    """The held-out loss of a network that always answers zero: the mean square of the evaluation's fixed noise."""
    import numpy as np

    from stabletrain.diffusion.config import DiffusionConfig, resolve
    from stabletrain.diffusion.experiment import DiffusionExperiment
    from stabletrain.training.devices import make_mesh

    experiment = DiffusionExperiment(resolve(DiffusionConfig(backbone="mlp")), mesh=make_mesh(1, 64))
    return float(np.mean(np.square(experiment.held_out_pairs["noise"], dtype=np.float64)))


def main() -> None:
    """Runs what is asked for, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()

    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            for name, command in COMMANDS.items():
                result = run(command, seed, Path(folder) / f"{name}-s{seed}")
                runs[name].append(result)
                loss, norm = result["held_out_loss"], result["largest_gradient_norm"]
                print(f"{name:10s} seed {seed}: held-out loss {loss:.3f}, gradient norm up to {norm:.3g}", flush=True)
    document = {
        "what": "held-out loss after the default number of steps; the largest gradient norm of the logged steps",
        "commands": {name: " ".join(["stabletrain", *command]) for name, command in COMMANDS.items()},
        "predict_zero": predict_zero(),
        "runs": runs,
        "load_average_1min": round(os.getloadavg()[0], 2),
        "machine": {name: fact for name, fact in machine_facts().items() if name not in ("host", "git")},
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"predicting zero: {document['predict_zero']:.3f}; written to {arguments.out}")


if __name__ == "__main__":
    main()
