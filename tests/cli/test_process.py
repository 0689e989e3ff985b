"""The real program in real processes: trained, stopped by a signal, continued, sampled, exported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

# A small network; steps enough to be stopped in the middle.
TRAIN = ("diffusion", "--backbone", "mlp", "--scalelong", "--width", "32", "--depth", "2", "--steps", "900")
TRAIN += ("--log-every", "20", "--eval-pairs", "64", "--sampling-steps", "2", "--devices", "1", "--out", "run")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    # Importing JAX, as this process did, leaves a log level to its children: they must be silent all the same.
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "stabletrain", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "NO_COLOR": "1"},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that got SIGTERM after its first rows, and its JSON."""
    folder = tmp_path_factory.mktemp("process")
    process = start(folder, *TRAIN, "--json")
    rows = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not rows.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 75, err
    return folder, json.loads(out)


def test_sigterm_ends_with_a_checkpoint_and_one_json_document(stopped: tuple[Path, dict[str, Any]]) -> None:
    folder, document = stopped
    assert document["status"] == "preempted"
    assert 0 < document["step"] < 900
    assert (folder / "run" / "checkpoints" / str(document["step"])).is_dir()
    assert json.loads((folder / "run" / "status.json").read_text())["state"] == "preempted"


def test_the_same_command_goes_on_and_the_run_can_be_used(stopped: tuple[Path, dict[str, Any]]) -> None:
    folder, document = stopped
    code, out, err = finish(start(folder, *TRAIN))
    assert code == 0, err
    assert "done at step 900 of 900" in out
    assert f"resumed from the checkpoint of step {document['step']}" in err
    assert "\x1b" not in out + err
    steps = [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))

    code, out, err = finish(start(folder, "sample", "run", "--num", "3", "--out", "images", "--json", "--quiet"))
    assert code == 0, err
    assert err == ""
    assert all((folder / "images" / name).is_file() for name in json.loads(out)["files"])

    code, _, err = finish(start(folder, "export", "run", "--out", "weights"))
    assert code == 0, err
    assert (folder / "weights" / "model.safetensors").stat().st_size > 10_000

    changed = list(TRAIN)
    changed[changed.index("--scalelong")] = "--skip-scaling=none"
    code, out, err = finish(start(folder, *changed))
    assert code == 2
    assert out == ""
    assert "skip_scaling: 'cs' -> 'none'" in err
    assert len(err.splitlines()) == 1
