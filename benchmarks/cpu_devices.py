"""One CPU device against one virtual device per core: seconds a step of the program's own commands.

Each command runs as a process of its own with `--devices 1` and with one device per core, in turns that alternate which
comes first. A time is the median of `perf/step_seconds` over the rows after the first of a run; a ratio above one means
that several devices are slower. Run it on an idle machine, where nothing keeps one device from waiting for another:

    python benchmarks/cpu_devices.py [--turns 3] [--only NAME ...] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from stabletrain.training.devices import cpu_cores, cpu_model

RESULT = Path(__file__).parent / "results" / "cpu_devices.json"
QUICK = ("--eval-samples", "0", "--log-every", "20")
COMMANDS: dict[str, tuple[str, ...]] = {
    "diffusion, UNet (the default)": ("diffusion", "--scalelong", "--steps", "120", *QUICK),
    "diffusion, U-ViT": ("diffusion", "--scalelong", "--backbone", "uvit", "--steps", "120", *QUICK),
    "diffusion, the theorems' MLP": ("diffusion", "--scalelong", "--backbone", "mlp", "--steps", "200", *QUICK),
    "GAN, convolutions on digits": ("gan", "--method", "reacgan", "--steps", "400", *QUICK),
    "continual, MLP on digits": ("continual", "--method", "spcl", "--log-every", "10"),
}


def step_seconds(command: tuple[str, ...], devices: int, folder: Path) -> float:
    """Median seconds of a step of one run."""
    out = folder / f"{command[0]}-{devices}"
    whole = [sys.executable, "-m", "stabletrain", *command, "--devices", str(devices), "--out", str(out), "--fresh"]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(whole)}: {done.stderr.strip()[-500:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    times = [row["perf/step_seconds"] for row in rows if "perf/step_seconds" in row]
    return statistics.median(times[1:])


def measure(command: tuple[str, ...], turns: int, folder: Path) -> dict[str, Any]:
    """Both numbers of devices, in turns."""
    counts = (1, cpu_cores())
    times: dict[int, list[float]] = {count: [] for count in counts}
    for turn in range(turns):
        for count in counts if turn % 2 else counts[::-1]:
            times[count].append(step_seconds(command, count, folder))
    ratios = sorted(several / one for one, several in zip(times[counts[0]], times[counts[1]]))
    return {
        "command": " ".join(command),
        "milliseconds": {str(count): [round(1e3 * value, 3) for value in values] for count, values in times.items()},
        "several_to_one": {"median": round(statistics.median(ratios), 3), "all": [round(value, 3) for value in ratios]},
    }


def main() -> None:
    """Measures, prints and keeps the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if cpu_cores() < 2:
        raise SystemExit("there is one core only: nothing to compare")
    load, results = os.getloadavg()[0], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            results[name] = measure(COMMANDS[name], arguments.turns, Path(folder))
            print(f"{name}: {cpu_cores()} devices take {results[name]['several_to_one']['median']} of one's time")
    document = {
        "benchmark": "cpu_devices",
        "cases": results,
        "load_average_before": round(load, 2),
        "machine": {"cpu": cpu_model(), "cores": cpu_cores(), "system": platform.system()},
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
