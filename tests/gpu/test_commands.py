"""Whole commands on an NVIDIA GPU: the losses are those of the CPU, bfloat16 trains, and a killed run ends as one left
alone. Each command is a process of its own, so that the CPU's runs never see the GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

PLATFORM = "cuda"
COMMANDS = {
    "unet": ("diffusion", "--scalelong", "--width", "8", "--eval-samples", "0", "--eval-pairs", "64"),
    "uvit": (
        "diffusion", "--backbone", "uvit", "--skip-scaling", "ls", "--width", "32", "--depth", "4", "--heads", "2",
        "--eval-samples", "0", "--eval-pairs", "64",
    ),
    "reacgan": ("gan", "--method", "reacgan", "--eval-samples", "0"),
    "wgan-gp": ("gan", "--method", "wgan-gp", "--dataset", "gaussians8"),
    "spcl": ("continual", "--method", "spcl"),
}  # fmt: skip
SHORT = ("--steps", "6", "--log-every", "1")
WATCHED = ("train/", "stability/grad_norm")


def environment(platform: str, precision: str = "highest") -> dict[str, str]:
    """TF32 would hide errors of a part in a thousand: products are those of float32 unless asked otherwise."""
    values = {"JAX_PLATFORMS": platform, "JAX_DEFAULT_MATMUL_PRECISION": precision, "NO_COLOR": "1"}
    return {**{k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}, **values}


def stabletrain(folder: Path, platform: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "stabletrain", *arguments],
        cwd=folder, env=environment(platform), capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_clock(run: Path) -> list[dict[str, Any]]:
    """All that does not depend on the clock on the wall."""
    return [{k: v for k, v in row.items() if not k.startswith("perf/") and k != "time"} for row in rows(run)]


@pytest.mark.parametrize("name", COMMANDS)
def test_losses_and_gradient_norms_are_those_of_the_cpu(name, tmp_path):
    for platform in (PLATFORM, "cpu"):
        stabletrain(tmp_path, platform, *COMMANDS[name], *SHORT, "--devices", "1", "--out", platform)
    used = json.loads((tmp_path / PLATFORM / "record.json").read_text())
    assert ("NVIDIA" in json.dumps(used)) == (PLATFORM == "cuda"), "the run says which device it had"
    pairs = list(zip(rows(tmp_path / PLATFORM), rows(tmp_path / "cpu"), strict=True))
    watched = [key for key in pairs[0][1] if key.startswith(WATCHED)]
    assert watched
    for index, (gpu, cpu) in enumerate(pairs):
        # Sums of float32 in another order; then Adam's division by small second moments lets the courses part.
        tolerance = 1e-3 if index == 0 else 5e-2
        for key in watched:
            np.testing.assert_allclose(gpu[key], cpu[key], rtol=tolerance, atol=tolerance, err_msg=f"{key} {index}")


@pytest.mark.parametrize("name", ["unet", "uvit"])
def test_bfloat16_lowers_the_loss(name, tmp_path):
    arguments = (*COMMANDS[name], "--steps", "60", "--log-every", "20", "--precision", "bfloat16", "--out", "run")
    stabletrain(tmp_path, PLATFORM, *arguments)
    losses = [row["train/loss"] for row in rows(tmp_path / "run")]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["unet", "uvit", "reacgan"])
def test_a_killed_run_ends_as_one_left_alone(name, tmp_path):
    long = (*COMMANDS[name], "--steps", "240", "--log-every", "10", "--checkpoint-every", "20")
    stabletrain(tmp_path, PLATFORM, *long, "--out", "alone")
    command = [sys.executable, "-m", "stabletrain", *long, "--out", "killed"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(PLATFORM), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 400
    while not (tmp_path / "killed" / "checkpoints" / "40").is_dir():
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    stabletrain(tmp_path, PLATFORM, *long, "--out", "killed")
    assert without_clock(tmp_path / "killed") == without_clock(tmp_path / "alone")
    for run in ("alone", "killed"):
        stabletrain(tmp_path, PLATFORM, "export", run, "--out", f"{run}-export")
    weights = [next((tmp_path / f"{run}-export").glob("*.safetensors")).read_bytes() for run in ("alone", "killed")]
    assert weights[0] == weights[1]
