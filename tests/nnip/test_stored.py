"""Runs whose frames have changed, moved or are others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stabletrain.cli.main import run
from stabletrain.errors import DataError
from stabletrain.nnip.stored import read_potential

POSITIONS = np.asarray([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
SMALLEST = ["--features", "8", "--interactions", "1", "--train-frames", "8", "--test-frames", "8", "--steps", "2"]


def write_water(path: Path, count: int = 24, species: tuple[int, ...] = (8, 1, 1)) -> Path:
    noise = np.random.default_rng(0).normal(size=(count, 3, 3)) * 0.05
    energies = 40 * (noise**2).sum((1, 2))
    np.savez(path, R=POSITIONS + noise, E=energies, F=-80 * noise, z=np.asarray(species))
    return path


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on `mine.npz` of the working directory."""
    monkeypatch.chdir(tmp_path)
    write_water(tmp_path / "mine.npz")
    assert run(["nnip", "--data", "mine.npz", *SMALLEST, "--devices", "1", "--quiet", "--out", "base"]) == 0
    return tmp_path / "base"


def test_a_potential_is_not_read_with_other_frames_than_it_was_trained_on(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_potential(trained).step == 2
    write_water(Path("mine.npz"), 30)  # as active learning does: the same frames, and more
    with pytest.raises(DataError, match=r"was trained on 24 frames of mine, .* mine here has 30"):
        read_potential(trained)
    capsys.readouterr()
    assert run(["nnip", "--stable", "--base", "base", "--steps", "1"]) == 3
    assert "base was trained on 24 frames of mine" in capsys.readouterr().err
    assert not list(Path("runs").glob("*"))


def test_a_base_takes_its_frames_wherever_they_lie_and_no_others(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.npz").rename("moved.npz")
    write_water(Path("other.npz"), species=(16, 1, 1))
    continued = ["nnip", "--base", "base", "--steps", "1", "--devices", "1", "--quiet"]
    assert run([*continued, "--data", "moved.npz", "--out", "more"]) == 0
    capsys.readouterr()
    assert run([*continued, "--data", "other.npz", "--out", "wrong"]) == 3
    assert "was trained on 24 frames of mine" in capsys.readouterr().err
    assert not Path("wrong").exists()
