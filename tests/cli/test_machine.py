"""Commands about data, weights and the machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stabletrain.cli import doctor as doctor_module
from stabletrain.cli.doctor import BLOCKER, OK, TESTED, WARNING, Finding
from stabletrain.data import tfds
from tests.cli.conftest import Command

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"


@pytest.fixture(autouse=True)
def empty_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing is on this machine, and the network does not answer."""
    home = tmp_path / "home"
    monkeypatch.setenv("STABLETRAIN_HOME", str(home))
    monkeypatch.setenv("TFDS_DATA_DIR", str(home / "tfds"))
    monkeypatch.setenv("TORCH_HOME", str(home / "torch"))
    monkeypatch.setattr(tfds, "online", lambda: False)
    monkeypatch.setattr("stabletrain.metrics.weights.online", lambda url: False)
    return home


# --- data -------------------------------------------------------------------------------------------------------------


def test_data_list_names_every_set_and_where_it_is(command: Command) -> None:
    found = {entry["name"]: entry["kind"] for entry in command("data", "list", "--json").document["datasets"]}
    assert found["digits"] == "bundled"
    assert found["cifar10"] is None
    text = command("data", "list").out
    assert "bundled" in text
    assert "not here" in text


def test_data_info_describes_what_is_here_and_says_what_to_put_where(command: Command) -> None:
    text = command("data", "info", "digits").out
    assert "8x8, 1 channel" in text
    assert "10 (0, 1, 2" in text
    text = command("data", "info", "cifar10").out
    assert "not on this machine" in text
    assert "cifar-10-python.tar.gz" in text
    said = command("data", "info", "cifar")
    assert said.code == 2
    assert "did you mean 'cifar10'?" in said.error


@pytest.mark.parametrize("asked", ["info", "check", "prepare"])
def test_frames_of_molecules_are_no_images(command: Command, asked: str) -> None:
    said = command("data", asked, "aspirin-xtb")
    assert said.code == 2
    assert "`stabletrain nnip --dataset aspirin-xtb` reads it" in said.error


def test_data_check_is_exit_code_3_when_anything_is_wrong(command: Command, tmp_path: Path) -> None:
    assert command("data", "check", "digits").out == "digits: all is well\n"
    images = np.zeros((6, 4, 4, 1), np.uint8)
    np.savez(
        tmp_path / "mine.npz", train_x=images, train_y=np.array([0, 1, 0, 1, 0, 3]), test_x=images[:2], test_y=[0, 1]
    )
    said = command("data", "check", "mine.npz", "--json")
    assert said.code == 3
    assert said.document["ok"] is False
    assert said.document["problems"]
    said = command("data", "check", "digit")
    assert said.code == 2
    assert "did you mean 'digits'?" in said.error
    said = command("data", "check", "no/such.npz")
    assert said.code == 3
    assert "no data at no/such.npz" in said.out


def test_data_prepare_offline_fails_with_what_to_put_where(command: Command) -> None:
    said = command("data", "prepare", "mnist")
    assert said.code == 3
    assert "train-images-idx3-ubyte.gz" in said.error
    assert command("data", "prepare", "digits", "--json").document["train_count"] > 1000


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_list_fetch_and_add(command: Command, tmp_path: Path) -> None:
    (entry,) = command("weights", "list", "--json").document["weights"]
    assert entry["state"] == "missing"
    assert "missing" in command("weights", "list").out
    said = command("weights", "fetch")
    assert said.code == 3
    assert "does not answer" in said.error
    (tmp_path / "other.pth").write_bytes(b"something else")
    said = command("weights", "add", "other.pth")
    assert said.code == 3
    assert "is not a published file" in said.error


# --- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_finds_nothing_in_the_way_here(command: Command) -> None:
    said = command("doctor", "--json")
    assert said.code == 0
    findings = said.document["findings"]
    assert {"Python", "packages", "devices", "cores", "memory", "runs", "cache", "data", "network"} <= {
        finding["what"] for finding in findings
    }
    assert all(finding["fix"] or finding["state"] in ("ok", "note") for finding in findings)
    assert not (Path.cwd() / "runs").exists(), "looking changes nothing"


def test_a_blocker_is_exit_code_1_with_its_fix(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Finding("toaster", BLOCKER, "on fire", "throw it out")
    monkeypatch.setattr(doctor_module, "CHECKS", (lambda: iter([broken]),))
    said = command("doctor")
    assert said.code == 1
    assert "X  toaster" in said.out
    assert "-> throw it out" in said.out


def test_a_jax_that_computes_wrong_numbers_is_a_blocker(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    monkeypatch.setattr(metadata, "version", lambda name: "0.10.2" if name.startswith("jax") else "1.0")
    found = [finding for finding in doctor_module._versions() if finding.what == "jax"]
    assert [finding.state for finding in found] == [BLOCKER]
    assert "wrong numbers" in found[0].found
    assert "pip install jax==" in found[0].fix


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (finding,) = doctor_module._writable("runs", Path("/proc/nothing"), "elsewhere", blocks=True)
    assert finding.state == BLOCKER
    (finding,) = doctor_module._writable("cache", Path("/proc/nothing"), "elsewhere", blocks=False)
    assert finding.state == WARNING
    (finding,) = doctor_module._writable("runs", tmp_path / "new" / "folder", "elsewhere", blocks=True)
    assert finding.state in (OK, WARNING)  # a warning where the disk is nearly full
    assert list(tmp_path.iterdir()) == []


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    for python, versions in TESTED.items():
        sign = "<" if python == (3, 11) else ">="
        for name, version in versions.items():
            (line,) = [line for line in lines if line.startswith(f"{name}==") and sign in line.split(";")[1]]
            assert line.split(";")[0].strip() == f"{name}=={version}"


def test_a_dry_run_fetches_nothing(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfds, "can_prepare", lambda: True)
    monkeypatch.setattr(tfds, "online", lambda: True)
    said = command("diffusion", "--dataset", "mnist", "--dry-run")
    assert said.code == 3
    assert "a dry run fetches nothing" in said.error
