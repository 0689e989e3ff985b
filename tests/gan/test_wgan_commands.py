"""Whole commands on text, points and a random architecture: training, evaluation, samples, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from stabletrain.cli.main import run
from stabletrain.gan.config import GanConfig
from stabletrain.gan.networks.random_architecture import architecture
from stabletrain.gan.resolution import resolve
from stabletrain.gan.text import read_text

TINY = ["--steps", "2", "--batch-size", "8", "--devices", "1", "--d-steps", "2"]
QUIET = ["--ema-decay", "0", "--json", "--quiet"]


def trained(capsys, *arguments):
    code = run(["gan", "--method", "wgan-gp", *arguments, *TINY, *QUIET])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


@pytest.fixture
def words(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "words.txt"
    path.write_text("\n".join(" ".join(rng.choice(["ab", "cad", "bead"], 10)) for _ in range(1600)), encoding="utf-8")
    return path


def test_text_trains_shows_lines_and_samples(tmp_path, capsys, words):
    out = tmp_path / "run"
    narrow = ["--generator-width", "8", "--discriminator-width", "8", "--depth", "1"]
    document = trained(capsys, "--dataset", "text", "--data", str(words), *narrow, "--out", str(out))
    metrics = document["metrics"]
    count = len(read_text(words).held_out)  # fewer than 640
    assert 0 < metrics[f"eval/jsd4_{count}_floor"] < metrics[f"eval/jsd4_{count}"] <= 1
    assert metrics["eval/negative_critic_loss_test"] < metrics["eval/wasserstein_test"]
    lines = (out / "samples" / "00000002.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == count
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    shown = next(event for event in events if event["kind"] == "samples")
    assert shown["message"].split(" | ") == lines[:4]
    assert run(["sample", str(out), "--num", "3", "--out", str(tmp_path / "made")]) == 0
    capsys.readouterr()
    made = next((tmp_path / "made").rglob("samples.txt"))
    assert len(made.read_text(encoding="utf-8").splitlines()) == 3


def test_points_are_judged_by_modes_and_exact_distance(tmp_path, capsys):
    out = tmp_path / "run"
    narrow = ["--generator-width", "8", "--discriminator-width", "8", "--depth", "1"]
    metrics = trained(capsys, "--dataset", "gaussians25", *narrow, "--out", str(out))["metrics"]
    assert 0 <= metrics["eval/modes_covered_2500"] <= 25
    assert metrics["eval/wasserstein1_500"] > metrics["eval/wasserstein1_500_floor"] > 0
    assert (out / "samples" / "00000002.png").is_file()


def test_a_random_architecture_is_the_one_of_the_seed_unless_it_is_named():
    config = GanConfig(method="wgan-gp", network="random", discriminator_norm="layer", seed=5)
    assert resolve(config).architecture == 5
    assert resolve(replace(config, architecture=7)).architecture == 7
    assert architecture(5) != architecture(7)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset", "text", "--network", "mlp"], "text-resnet"),
        (["--dataset", "digits", "--network", "text-resnet"], "text-resnet"),
        (["--dataset", "swissroll", "--data", "x.npz"], "no --data"),
        (["--network", "random", "--discriminator-norm", "batch"], "each score by its own sample"),
        (["--network", "random", "--architecture", "9216"], "9,216"),
        (["--dataset", "text", "--horizontal-flip"], "of images"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, capsys, arguments, said):
    assert run(["gan", "--method", "wgan-gp", *arguments, "--out", str(tmp_path / "run")]) in (2, 3)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
