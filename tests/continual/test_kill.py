"""SIGKILL and SIGTERM to a real process amid overlapping tasks: the run that goes on ends the same to the bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stabletrain.errors import EXIT_OK, EXIT_PREEMPTED

COMMAND = [
    sys.executable, "-m", "stabletrain", "continual", "--method", "spcl", "--timeline", "staggered", "--overlap", "0.9",
    "--tasks", "5", "--hidden", "16,8", "--batch-size", "8", "--epochs", "4", "--devices", "1",
    "--checkpoint-every", "5", "--quiet",
]  # fmt: skip


def saved(run_dir: Path) -> int:
    """The newest step of which there is a checkpoint; -1 for none."""
    return max((int(path.name) for path in (run_dir / "checkpoints").glob("*") if path.name.isdecimal()), default=-1)


def session(run_dir: Path, *, at: int | None = None, number: signal.Signals = signal.SIGKILL) -> int:
    """The command until it ends, or until a signal at the first checkpoint from step `at` on. Returns its exit code."""
    process = subprocess.Popen([*COMMAND, "--out", str(run_dir)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            if at is not None and saved(run_dir) >= at:
                process.send_signal(number)
                at = None
            time.sleep(0.002)
        return process.returncode
    finally:
        process.kill()
        process.wait()


def result(run_dir: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")} for row in rows]
    return {"params": json.loads((run_dir / "status.json").read_text())["params_sha256"], "rows": kept}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # four sessions, on a machine that may have other work
def test_killed_and_terminated_amid_overlapping_tasks_ends_the_same(tmp_path: Path):
    assert session(tmp_path / "whole") == EXIT_OK
    assert session(tmp_path / "cut", at=60) == -signal.SIGKILL
    first = saved(tmp_path / "cut")
    assert session(tmp_path / "cut", at=first + 30, number=signal.SIGTERM) == EXIT_PREEMPTED
    second = saved(tmp_path / "cut")
    accuracy = json.loads((tmp_path / "whole/eval/accuracy.json").read_text())
    assert max(accuracy["starts"]) <= first < second < min(accuracy["ends"]), "all five tasks are active"
    assert session(tmp_path / "cut") == EXIT_OK
    assert result(tmp_path / "cut") == result(tmp_path / "whole")
