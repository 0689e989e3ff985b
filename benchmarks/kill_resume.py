"""Exact resume, shown: a command is killed (SIGKILL) at random moments, repeated each time, and compared in the end.

The command is run once without disturbance; then again in another run directory, where it is killed at a random moment
of its start-up, training, evaluation or saving, and repeated, until it has been killed often enough. A run that ends
before that is followed by another. Every run must end with the same hash of all parameters and the same rows, to the
last bit, but for `time` and `perf/*`.

    python benchmarks/kill_resume.py --kills 20 -- stabletrain diffusion --backbone mlp --steps 400

`--out` is added to the command. Writes the result as JSON; exit code 5 when a run differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from stabletrain.errors import EXIT_MISMATCH, EXIT_OK
from stabletrain.training.machine import machine_facts

RESULT = Path(__file__).parent / "results" / "kill_resume.json"
POLL_SECONDS = 0.005


def start(command: list[str], run_dir: Path) -> subprocess.Popen[bytes]:
    """Starts the command in a run directory; what it says goes to a log beside that."""
    with run_dir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([*command, "--out", str(run_dir)], stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def status_of(run_dir: Path) -> dict[str, Any]:
    """status.json, or nothing."""
    path = run_dir / "status.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def undisturbed(command: list[str], run_dir: Path) -> tuple[float, float]:
    """Runs the command to its end. Returns the seconds until it trained, and until it ended."""
    begun = time.monotonic()
    process = start(command, run_dir)
    ready = 0.0
    while process.poll() is None:
        if not ready and status_of(run_dir).get("state") == "running":
            ready = time.monotonic() - begun
        time.sleep(POLL_SECONDS)
    seconds = time.monotonic() - begun
    if status_of(run_dir).get("state") != "done":
        sys.exit(f"the undisturbed run failed:\n{run_dir.with_suffix('.log').read_text()[-3000:]}")
    return ready or seconds, seconds


def result_of(run_dir: Path) -> dict[str, Any]:
    """What must be the same: state, hash of all parameters, and rows."""
    status = status_of(run_dir)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")} for row in rows]
    return {"state": status.get("state"), "params_sha256": status.get("params_sha256"), "rows": kept}


def where_killed(run_dir: Path) -> dict[str, Any]:
    """What there was at that moment."""
    lines = (run_dir / "metrics.jsonl").read_bytes() if (run_dir / "metrics.jsonl").is_file() else b""
    names = [path.name for path in (run_dir / "checkpoints").glob("*")]
    return {
        "step": status_of(run_dir).get("step"),
        "rows": lines.count(b"\n"),
        "torn_row": not lines.endswith(b"\n") and bool(lines),
        "checkpoints": sorted(int(name) for name in names if name.isdecimal()),
        "unfinished_checkpoint": any(name.endswith("-tmp") for name in names),
        "in_evaluation": bool(list(run_dir.glob("eval/.*.partial"))),
    }


def killed_in_time(
    process: subprocess.Popen[bytes], run_dir: Path, moments: random.Random, ready: float, training: float
) -> bool:
    """Kills at a random moment: one in six while starting up, the others in the first half of what a run takes."""
    starting = moments.random() < 1 / 6
    after = moments.uniform(0.0, ready if starting else training / 2)
    while not starting and status_of(run_dir).get("pid") != process.pid and process.poll() is None:
        time.sleep(POLL_SECONDS)
    try:
        process.wait(after)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def measure(command: list[str], folder: Path, *, kills: int, seed: int) -> dict[str, Any]:
    """The whole experiment, in a folder."""
    moments = random.Random(seed)
    ready, seconds = undisturbed(command, folder / "undisturbed")
    reference = result_of(folder / "undisturbed")
    done: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    while len(done) < kills or not runs or not runs[-1]["ended"]:
        if not runs or runs[-1]["ended"]:
            runs.append({"ended": False})
        run_dir = folder / f"killed-{len(runs)}"
        process = start(command, run_dir)
        if len(done) < kills and killed_in_time(process, run_dir, moments, ready, seconds - ready):
            done.append({"run": len(runs), **where_killed(run_dir)})
            print(f"kill {len(done)}: {done[-1]}", file=sys.stderr, flush=True)
            continue
        process.wait()
        found = result_of(run_dir)
        runs[-1] = {
            "ended": True,
            "exit_code": process.returncode,
            "sessions": len(json.loads((run_dir / "record.json").read_text())["sessions"]),
            "params_sha256": found["params_sha256"],
            "same_parameters": found["params_sha256"] == reference["params_sha256"],
            "same_rows": found["rows"] == reference["rows"],
        }
        print(f"run {len(runs)}: {runs[-1]}", file=sys.stderr, flush=True)
    same = all(run["same_parameters"] and run["same_rows"] for run in runs)
    return {
        "command": shlex.join([Path(command[0]).name, *command[1:]]),
        "kills": len(done),
        "equal": same and reference["state"] == "done",
        "undisturbed": {
            "seconds": round(seconds, 2),
            "seconds_until_training": round(ready, 2),
            "rows": len(reference["rows"]),
            "params_sha256": reference["params_sha256"],
        },
        "runs": runs,
        "moments": done,
        "machine": {name: fact for name, fact in machine_facts().items() if name != "host"},
    }


def main() -> int:
    """Reads the options, runs, and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=RESULT, help="the result, as JSON")
    parser.add_argument("command", nargs="+", help="after `--`: the training command, without --out")
    options = parser.parse_args()
    # Without it every session would compile for minutes, and most kills would fall on that.
    os.environ.setdefault("STABLETRAIN_HOME", str(Path(__file__).parents[1] / ".cache" / "stabletrain"))
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.command, Path(folder), kills=options.kills, seed=options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['kills']} kills, {len(result['runs'])} runs: {'all equal' if result['equal'] else 'THEY DIFFER'}")
    return EXIT_OK if result["equal"] else EXIT_MISMATCH


if __name__ == "__main__":
    sys.exit(main())
