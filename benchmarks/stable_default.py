"""The two default commands of StABlE Training by the clock: `stabletrain nnip`, then `stabletrain nnip --stable` on it.

Each in a process of its own, as a user types it, compilation included, with an empty compile cache for the first.
Both print the errors of the test frames; the second the survival before and after.

    python benchmarks/stable_default.py                    # both
    python benchmarks/stable_default.py --parts stable --work DIR    # the second alone, on the base that is in DIR
"""

from __future__ import annotations

import argparse
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

from stabletrain.training.devices import cpu_cores, cpu_model

COMMANDS = {"base": ("nnip",), "stable": ("nnip", "--stable")}
RESULT = Path(__file__).parent / "results" / "stable_default.json"


def measured(arguments: tuple[str, ...], work: Path) -> dict[str, Any]:
    """One command in the folder `work`: seconds by the clock and of processors, the load before, its last scores."""
    environment = {**os.environ, "STABLETRAIN_HOME": str(work / "home"), "JAX_PLATFORMS": "cpu"}
    load = [round(x, 1) for x in os.getloadavg()]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "stabletrain", *arguments, "--json", "--quiet"],
        cwd=work, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"stabletrain {' '.join(arguments)}: {done.stderr.strip()}")
    outcome = json.loads(done.stdout)
    return {
        "command": " ".join(("stabletrain", *arguments)),
        "seconds": round(seconds, 1),
        "processor_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "load_average_before": load,
        "steps": outcome["step"],
        "scores": {name: value for name, value in outcome["metrics"].items() if name.startswith("eval/")},
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="the file keeps others")
    parser.add_argument("--work", type=Path, help="folder for the runs; without, one that is deleted afterwards")
    parser.add_argument(
        "--already",
        type=float,
        default=0.0,
        help="seconds of an earlier call that was stopped and is resumed in --work",
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.already and (options.work is None or len(options.parts) > 1):
        raise SystemExit("--already is for one of --parts, in its folder --work")
    result: dict[str, Any] = {"what": (__doc__ or "").split("\n\n")[0]}
    if options.out.is_file() and set(options.parts) != set(COMMANDS):
        result |= json.loads(options.out.read_text(encoding="utf-8"))
    result |= {"processor": cpu_model(), "cores": cpu_cores(), "python": platform.python_version()}
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for part in options.parts:
            result[part] = measured(COMMANDS[part], work.resolve())
            if options.already:
                found = result[part]
                found |= {
                    "seconds": round(found["seconds"] + options.already, 1),
                    "of_these_before_a_stop": options.already,
                }
                found["processor_seconds_after_the_stop"] = found.pop("processor_seconds")
            print(json.dumps(result[part], indent=1), flush=True)
    if all(part in result for part in COMMANDS):
        result["seconds_together"] = round(sum(result[part]["seconds"] for part in COMMANDS), 1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
