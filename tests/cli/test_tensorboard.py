"""Event files for TensorBoard: what is in them is what the run logged."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of every scalar, read record by record as TensorBoard does."""
    from tensorboardX.proto import event_pb2

    (path,) = folder.glob("events.out.tfevents.*")
    content, found, at = path.read_bytes(), [], 0
    while at < len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
        at += 16 + length  # length, its checksum, the record, its checksum
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value if "/" in value.tag]
    return found


def test_every_logged_number_is_a_scalar_at_its_step(command: Command, toy_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    for _ in range(2):  # a second call replaces the files of the first
        assert command("tensorboard", str(toy_run), "--out", str(tmp_path / "tb")).code == 0
    found = {(tag, step): value for tag, step, value in scalars(tmp_path / "tb") if not tag.startswith("events/")}
    rows = [json.loads(text) for text in (toy_run / "metrics.jsonl").read_text().splitlines()]
    logged = {(name, row["step"]): value for row in rows for name, value in row.items() if "/" in name}
    assert found.keys() == logged.keys()
    assert all(found[key] == pytest.approx(value, rel=1e-6) for key, value in logged.items())  # stored in float32


def test_without_the_extra_it_says_what_to_install(
    command: Command, toy_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = command("tensorboard", str(toy_run))
    assert said.code == 1
    assert "stabletrain[tensorboard]" in said.error
