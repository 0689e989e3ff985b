"""No test here sees the data of the person who runs it, or a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from stabletrain.data import tfds


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, an empty TFDS directory, and a probe that finds no network."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("STABLETRAIN_HOME", str(folder / "stabletrain"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder / "tensorflow_datasets"))
    monkeypatch.setattr(tfds, "online", lambda: False)
    return folder
