"""Whole commands of the diffusion family: the demo, its samples, resuming it, and the pair that dies and lives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stabletrain.diffusion.config import DiffusionConfig, resolve
from stabletrain.diffusion.experiment import DiffusionExperiment
from stabletrain.training import loop
from stabletrain.training.config import make_config
from stabletrain.training.devices import make_mesh
from stabletrain.training.run_directory import RunDirectory
from stabletrain.training.signals import StopRequest
from tests.training.toy import StopAfter, Told


def stabletrain(*arguments: str, as_for_users: bool = True) -> dict:
    """One command in its own process, as a user runs it (and, if so asked, compiled as for users); its JSON."""
    ours = ["JAX_NUM_CPU_DEVICES", *(["JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"] if as_for_users else [])]
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    command = [sys.executable, "-m", "stabletrain", *arguments, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if done.stdout else {}


def rows(folder: Path) -> list[dict]:
    """The rows of a run without what depends on the clock."""
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith("perf/") and key != "time"}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.slow
def test_demo_makes_digits_that_a_classifier_recognises(tmp_path):
    """A fifth of the demo's steps already beats the 85 % that the whole one is to reach; 200 of 1,000 samples.

    Measured 95.5 %: four deviations of 200 answers above.
    """
    run = tmp_path / "demo"
    outcome = stabletrain(
        "diffusion", "--scalelong", "--steps", "240", "--eval-samples", "200", "--out", str(run), "--quiet"
    )
    metrics = outcome["metrics"]
    assert outcome["status"] == "done"
    assert metrics["eval/label_agreement_200_digits-classifier_ema"] >= 0.85
    assert metrics["eval/loss_test_ema"] < 0.15  # it starts at 1
    with Image.open(run / "samples" / "00000240.png") as grid:
        assert grid.height > 300
    assert any(name.startswith("stability/feature_norm/skip_") for name in rows(run)[-1])

    again = stabletrain("evaluate", str(run), "--quiet")["metrics"]
    assert again == {name: value for name, value in metrics.items() if name.startswith("eval/")}
    judged = stabletrain("evaluate", str(run), "--eval-samples", "60", "--scores", "kd,pr", "--quiet")
    assert {name.split("_")[0] for name in judged["metrics"]} >= {"eval/kd60", "eval/precision60", "eval/recall60"}
    assert "eval/fd200_test_digits-classifier_ema" in metrics
    assert "eval/label_agreement_60" in " ".join(judged["metrics"])
    protocol = json.loads((run / "eval" / "protocol-00000240.json").read_text())
    assert (protocol["num_samples"], protocol["weights"], protocol["scores"]) == (200, "ema", ["fd"])

    made = stabletrain("sample", str(run), "--num", "5", "--label", "7", "--out", str(tmp_path / "sevens"), "--quiet")
    assert made["status"] == "sampled"
    archive = np.load(tmp_path / "sevens" / "samples.npz")
    assert archive["images"].shape == (5, 8, 8, 1)
    assert archive["labels"].tolist() == [7] * 5
    assert (tmp_path / "sevens" / "grid.png").is_file()


@pytest.mark.slow
def test_training_dies_without_and_lives_with_scaled_skips(tmp_path):
    """The theorems' network with the default settings, at 300 of its 500 steps: 1 is the loss of answering zero."""
    losses = {}
    for scaling in ("none", "cs"):
        outcome = stabletrain(
            "diffusion", "--backbone", "mlp", "--skip-scaling", scaling, "--steps", "300",
            "--out", str(tmp_path / scaling), "--quiet", as_for_users=False,
        )  # fmt: skip
        losses[scaling] = outcome["metrics"]["eval/loss_test_raw"]
    assert losses["none"] > 0.95
    assert losses["cs"] < 0.9


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path):
    """Stopped again and again (also within the evaluation) and repeated: rows, pictures and parameters are those of a
    run left alone, on past the end of the first epoch of 180 batches."""
    values = {
        "backbone": "mlp", "width": 16, "depth": 2, "class_conditional": True, "batch_size": 8, "steps": 190,
        "inner_steps": 10, "log_every": 20, "eval_every": 100, "checkpoint_every": 50, "sampling_steps": 2,
        "eval_pairs": 600, "sampling_batch": 20, "ema_decay": 0.9, "skip_scaling": "cs", "eval_samples": 30,
    }  # fmt: skip
    config = resolve(make_config(DiffusionConfig, values))
    experiment = DiffusionExperiment(config, mesh=make_mesh(2, config.batch_size))

    def train(path: Path, stop: StopRequest) -> int:
        run = RunDirectory.create(path, "diffusion", config)
        try:
            return loop.train(experiment, run=run, reporter=Told(), stop=stop).exit_code
        finally:
            run.release()

    assert train(tmp_path / "whole", StopRequest()) == 0
    codes = [train(tmp_path / "parts", StopAfter(looks)) for looks in (5, 13, 8, 12, 9)]
    assert codes.count(75) >= 3, "the stops came too late to interrupt anything"
    assert train(tmp_path / "parts", StopRequest()) == 0

    whole, parts = (RunDirectory.open(tmp_path / name) for name in ("whole", "parts"))
    assert whole.status["params_sha256"] == parts.status["params_sha256"]
    assert rows(whole.path) == rows(parts.path)
    pictures = sorted((whole.path / "samples").glob("*.png"))
    assert [picture.name for picture in pictures] == ["00000100.png", "00000190.png"]
    for picture in pictures:
        assert picture.read_bytes() == (parts.path / "samples" / picture.name).read_bytes()


@pytest.mark.realdata
def test_natural_images_in_colour_train_and_are_sampled(real_data, tmp_path):
    """CIFAR-10 images from a file of the user's: labels, flips, a step that sees three channels, and their samples."""
    values = {
        "dataset": "cifar10", "data": str(real_data / "cifar10_exact.npz"), "backbone": "uvit", "width": 32, "depth": 2,
        "heads": 2, "patch_size": 8, "batch_size": 16, "steps": 4, "sampling_steps": 2, "eval_samples": 0,
        "eval_pairs": 64, "log_every": 1,
    }  # fmt: skip
    config = resolve(make_config(DiffusionConfig, values))
    assert config.horizontal_flip
    assert config.class_conditional
    experiment = DiffusionExperiment(config, mesh=make_mesh(1, config.batch_size))
    assert experiment.data_spec.class_names[3] == "cat"
    run = RunDirectory.create(tmp_path / "run", "diffusion", config)
    outcome = loop.train(experiment, run=run, reporter=Told(), stop=StopRequest())
    run.release()
    assert outcome.status == "done"
    # the loss of a fresh network is near 1, the variance of the noise
    assert 0.5 < outcome.metrics["eval/loss_test_raw"] < 2
    with Image.open(run.path / "samples" / "00000004.png") as grid:
        assert grid.mode == "RGB"


def test_options_that_make_no_sense_end_in_one_line(tmp_path):
    for arguments, reason in (
        (("--kappa", "2", "--scalelong"), "at most 1"),
        (("--horizontal-flip",), "mirrored"),
        (("--skip-scaling", "css"), "did you mean 'cs'"),
    ):
        command = [sys.executable, "-m", "stabletrain", "diffusion", *arguments, "--out", str(tmp_path / "run")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert reason in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()
