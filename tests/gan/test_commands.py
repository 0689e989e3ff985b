"""Whole commands: a run, its resumption to the bit, its samples, and what bad options say."""

from __future__ import annotations

import json
import shutil

import pytest

from stabletrain.cli.main import run

TINY = [
    "gan", "--batch-size", "8", "--generator-width", "8", "--discriminator-width", "8", "--z-dim", "4", "--depth", "1",
    "--embedding-dim", "4", "--eval-samples", "0", "--sampling-batch", "20", "--log-every", "2", "--quiet", "--json",
]  # fmt: skip


def test_a_run_that_is_interrupted_ends_in_the_same_bits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run([*TINY, "--steps", "6", "--out", "whole"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["status"] == "done"
    assert document["step"] == 6
    assert (tmp_path / "whole" / "samples" / "00000006.png").is_file()
    parts = tmp_path / "parts"
    command = [*TINY, "--steps", "6", "--out", "parts", "--checkpoint-every", "2"]
    assert run(command) == 0
    # As a kill after step 4 leaves it: the last checkpoint was never written.
    shutil.rmtree(next((parts / "checkpoints").glob("*6")))
    status = json.loads((parts / "status.json").read_text())
    (parts / "status.json").write_text(json.dumps({**status, "state": "preempted", "step": 4}))
    assert run(command) == 0
    capsys.readouterr()
    events = [json.loads(line)["kind"] for line in (parts / "events.jsonl").read_text().splitlines()]
    assert "resume" in events
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert {"train/loss_discriminator", "train/loss_generator", "stability/feature_norm"} <= set(rows[-1])
    hashes = [json.loads((tmp_path / name / "status.json").read_text())["params_sha256"] for name in ("whole", "parts")]
    assert hashes[0] == hashes[1]
    assert run(["sample", "whole", "--num", "4", "--label", "3", "--json", "--quiet"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert "grid.png" in files


@pytest.mark.parametrize("figure", ["value-surfaces", "gradient-norms"])
def test_a_file_as_folder_of_a_figure_is_refused(figure, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert run(["gan", figure, "--out", str(tmp_path / "notes.txt"), "--quiet"]) == 1
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "reagan"], "unknown value 'reagan' for --method: did you mean 'reacgan'?"),
        (["--temperature", "0.5", "--conditioning", "projection"], "--temperature needs"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["gan", *options]) == 2
    assert said in capsys.readouterr().err
