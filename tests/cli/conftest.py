"""Command lines run in this process, on the toy family, in an empty working directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stabletrain.cli import families
from stabletrain.cli.main import run
from tests.cli.toy import FAMILY


@dataclass(frozen=True)
class Said:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """stdout as the one JSON document that it must be."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of the error."""
        lines = [line for line in self.err.splitlines() if line.startswith("stabletrain: error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


Command = Callable[..., Said]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("toy", "--steps", 4)` runs a command line in an empty folder, with the toy among the families."""
    monkeypatch.setitem(families.FAMILIES, "toy", lambda: FAMILY)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Said:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the toy that was made once."""
    folder = tmp_path_factory.mktemp("finished") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, "toy", lambda: FAMILY)
        assert run(["toy", "--steps", "9", "--checkpoint-every", "6", "--out", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture
def toy_run(finished_run: Path, command: Command, tmp_path: Path) -> Path:
    """A finished run of the toy, at runs/first, with checkpoints at 6 and 9."""
    return shutil.copytree(finished_run, tmp_path / "runs" / "first")
