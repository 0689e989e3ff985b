"""Commands on runs: listing, showing, sampling, evaluating, exporting; and finding a run by its name."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stabletrain.cli import families, stored
from stabletrain.cli.runs import SILENT_SECONDS, TAIL_BYTES, state_of, summarize
from stabletrain.cli.stored import find_run
from stabletrain.errors import NotFiniteError, RunDirectoryError
from tests.cli.conftest import Command
from tests.cli.toy import FAMILY
from tests.training.toy import StopAfter


def heartbeat(seconds_ago: float = 0.0) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds_ago)).isoformat()


# --- runs -------------------------------------------------------------------------------------------------------------


def test_runs_lists_name_status_step_loss_and_evaluation(command: Command, toy_run: Path) -> None:
    said = command("runs")
    heading, line = said.out.splitlines()
    assert heading.split() == ["run", "status", "step", "loss", "evaluation", "age"]
    assert line.split()[:3] == ["first", "done", "9/9"]
    (run,) = command("runs", "--json").document["runs"]
    assert run["loss_name"] == "train/loss"
    assert run["evaluation_name"] == "loss"
    rows = [json.loads(text) for text in (toy_run / "metrics.jsonl").read_text().splitlines()]
    assert run["loss"] == rows[-1]["train/loss"]
    assert run["evaluation"] == rows[-1]["eval/loss"]


def test_without_runs_it_says_how_to_start_one(command: Command) -> None:
    said = command("runs")
    assert said.code == 0
    assert "stabletrain diffusion" in said.out
    assert command("runs", "--json").document["runs"] == []
    said = command("runs", "nowhere")
    assert said.code == 1
    assert "there is no folder nowhere" in said.error


def test_a_damaged_run_does_not_hide_the_others(command: Command, toy_run: Path) -> None:
    broken = toy_run.parent / "broken"
    broken.mkdir()
    (broken / "config.toml").write_text("steps = ")
    states = {run["run_dir"]: run["status"] for run in command("runs", "--json").document["runs"]}
    assert states == {"runs/first": "done", "runs/broken": "damaged"}


@pytest.mark.parametrize(
    ("status", "silent_for", "state"),
    [
        ({"state": "done"}, None, "done"),
        ({}, None, "not started"),
        ({"state": "running", "host": socket.gethostname(), "pid": os.getpid()}, 0, "running"),
        ({"state": "running", "host": socket.gethostname(), "pid": 2**30}, 0, "dead"),
        ({"state": "running", "host": "elsewhere", "pid": 2**30}, 0, "running"),
        ({"state": "running", "host": "elsewhere", "pid": 1}, SILENT_SECONDS + 60, "dead"),
        ({"state": "running", "host": "elsewhere", "pid": 1}, None, "dead"),
    ],
)
def test_a_run_without_a_process_or_a_sign_of_life_is_dead(
    status: dict[str, Any], silent_for: float | None, state: str
) -> None:
    # The heartbeat is made here: one of the parameters would be as old as the suite.
    assert state_of(status if silent_for is None else status | {"heartbeat": heartbeat(silent_for)}) == state


def test_the_last_evaluation_is_found_beyond_the_end_of_a_long_file(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('family = "toy"\nsteps = 10')
    rows = [{"step": 1, "eval/score": 0.5}]
    rows += [{"step": step, "train/loss": 1.0, "note": "x" * 1000} for step in range(2, TAIL_BYTES // 500)]
    torn = '{"step": 99'
    (tmp_path / "metrics.jsonl").write_text("\n".join([*map(json.dumps, rows), torn]))
    summary = summarize(tmp_path)
    assert (summary.evaluation_name, summary.evaluation, summary.loss) == ("score", 0.5, 1.0)


# --- show -------------------------------------------------------------------------------------------------------------


def test_show_tells_status_metrics_stability_config_and_files(command: Command, toy_run: Path) -> None:
    text = command("show", "first").out
    for part in ("done at step 9 of 9", "train/loss", "eval/loss", "undisturbed", "config.toml", "checkpoints/"):
        assert part in text
    configuration = text[text.index("configuration") : text.index("as by default")]
    assert "steps" in configuration
    assert "learning_rate" not in configuration, "a default is not among what was changed"
    document = command("show", "runs/first", "--json").document
    assert document["status"] == "done"
    assert document["config"]["family"] == "toy"
    assert document["metrics"]["eval/loss"] > 0
    assert document["record"]["parameter_count"] == 33


def test_show_lists_what_disturbed_a_run(command: Command) -> None:
    command("toy", "--steps", 8, "--nan-positions", 3, "--on-nonfinite", "skip", "-o", "runs/rescued", "-q")
    text = command("show", "rescued").out
    assert "1 x skip" in text
    assert "step 4: nonfinite" in text


def test_a_run_of_a_family_that_is_not_here_can_still_be_shown(command: Command, toy_run: Path) -> None:
    config = toy_run / "config.toml"
    config.write_text(config.read_text().replace('family = "toy"', 'family = "gone"'))
    assert command("show", "first").code == 0


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("furst", "did you mean 'first'?"),
        ("runs/furst", "did you mean 'first'?"),
        ("elsewhere/first", "none at all in elsewhere"),
        ("runs", "runs is not a run directory"),
        ("runs/first/config.toml", "is a file, not a run; published weights of a diffusion model are"),
    ],
)
def test_an_unknown_run_is_refused_with_the_nearest(toy_run: Path, command: Command, named: str, message: str) -> None:
    with pytest.raises(RunDirectoryError) as caught:
        find_run(named)
    assert message in str(caught.value)


# --- sample, evaluate, export -----------------------------------------------------------------------------------------


def test_sample_writes_the_family_s_files_and_how_they_were_made(command: Command, toy_run: Path) -> None:
    said = command("sample", "first", "--num", 2, "--label", "ball", "--out", "made", "--json", "-q")
    assert said.code == 0
    assert said.document["files"] == ["0.txt", "1.txt"]
    assert said.document["step"] == 9
    assert Path("made/1.txt").read_text() == "ball [1 1]"
    made = json.loads(Path("made/samples.json").read_text())
    assert made == {"run": "first", "step": 9, "options": {"num": 2, "label": "ball"}}
    assert not Path("made/.unfinished").exists()


def test_samples_go_below_the_run_when_no_folder_is_named(command: Command, toy_run: Path) -> None:
    first, second = (command("sample", "first", "--num", n, "--json").document["out"] for n in (1, 2))
    assert Path(first).parent == Path(second).parent == toy_run / "samples"
    assert first != second, "samples of other settings are not mixed"


def test_sample_does_not_mix_settings_nor_touch_other_files(command: Command, toy_run: Path) -> None:
    assert command("sample", "first", "--num", 1, "-o", "made", "-q").code == 0
    assert command("sample", "first", "--num", 1, "-o", "made", "-q").code == 0, "the same again is fine"
    assert "other settings" in command("sample", "first", "--num", 2, "-o", "made").error
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("")
    assert "mine is not empty" in command("sample", "first", "-o", "mine").error


def test_an_interrupted_sample_keeps_its_parts_and_goes_on(
    command: Command, toy_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stabletrain.training import signals

    with monkeypatch.context() as patch:
        patch.setattr(signals, "StopRequest", lambda: StopAfter(3, 75))
        said = command("sample", "first", "--num", 4, "-o", "made", "-q")
    assert said.code == 75
    assert "repeat the command" in said.error
    kept = {file.name: file.stat().st_mtime_ns for file in Path("made/.unfinished").iterdir()}
    assert kept.keys() == {"0.npy", "1.npy"}
    np.save("made/.unfinished/0.npy", np.full(2, 7))  # a part that would be otherwise if it were made again
    assert command("sample", "first", "--num", 4, "-o", "made", "-q").code == 0
    assert Path("made/0.txt").read_text() == "None [7 7]"


def test_sampling_options_are_those_of_the_run_s_family(command: Command, toy_run: Path) -> None:
    said = command("sample", "first", "--guidance", 2)
    assert said.code == 2
    assert "--guidance is no option of sampling from toy" in said.error
    said = command("sample", "first", "--num", 0)
    assert said.code == 2
    assert "--num is 0, but must be at least 1" in said.error


def test_a_refused_option_leaves_the_folder_free(command: Command, toy_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    assert command("sample", "first", "--label", 99, "--out", folder).code == 2
    assert not folder.exists()
    assert command("sample", "first", "--label", 1, "--out", folder, "-q").code == 0


def test_samples_that_are_not_finite_leave_no_folder(
    command: Command, toy_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(experiment: Any, state: Any, options: Any, context: Any) -> dict[str, bytes]:
        np.save(context.scratch / "0.npy", np.zeros(2))
        raise NotFiniteError("1 of the first 2 samples")

    monkeypatch.setitem(families.FAMILIES, "toy", lambda: dataclasses.replace(FAMILY, sample=sample))
    said = command("sample", "first", "--out", "made", "-q")
    assert said.code == 1
    assert "1 of the first 2 samples" in said.error
    assert not Path("made").exists()


def test_samples_of_changed_files_are_not_mixed_with_those_of_the_old(
    command: Command, toy_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stabletrain.training import signals

    texts = {"context": "0123"}
    family = dataclasses.replace(FAMILY, sample_inputs=lambda experiment, options: texts)
    monkeypatch.setitem(families.FAMILIES, "toy", lambda: family)
    with monkeypatch.context() as patch:
        patch.setattr(signals, "StopRequest", lambda: StopAfter(3, 75))
        assert command("sample", "first", "--num", 4, "-o", "made", "-q").code == 75
    first = command("sample", "first", "--json", "-q").document["out"]
    texts["context"] = "4567"
    assert "other settings" in command("sample", "first", "--num", 4, "-o", "made").error
    assert command("sample", "first", "--json", "-q").document["out"] != first
    texts["context"] = "0123"
    assert command("sample", "first", "--num", 4, "-o", "made", "-q").code == 0
    assert json.loads(Path("made/samples.json").read_text())["inputs"] == {"context": "0123"}


def test_a_checkpoint_can_be_named_and_a_wrong_one_lists_those_there_are(command: Command, toy_run: Path) -> None:
    assert command("sample", "first", "--checkpoint", 6, "--json", "-q").document["step"] == 6
    said = command("sample", "first", "--checkpoint", 5)
    assert said.code == 1
    assert "6, 9" in said.error


def test_a_run_without_a_checkpoint_cannot_be_sampled(command: Command, toy_run: Path) -> None:
    import shutil

    shutil.rmtree(toy_run / "checkpoints")
    said = command("export", "first", "--out", "made")
    assert said.code == 1
    assert "has no checkpoint" in said.error
    assert not Path("made").exists()


def test_evaluate_gives_the_scores_of_training_and_leaves_the_rows_alone(command: Command, toy_run: Path) -> None:
    before = {name: (toy_run / name).read_bytes() for name in ("metrics.jsonl", "events.jsonl", "status.json")}
    said = command("evaluate", "first", "--json", "-q")
    last = json.loads(before["metrics.jsonl"].splitlines()[-1])
    # The same program on the same state.
    assert said.document["metrics"]["eval/loss"] == last["eval/loss"]
    assert json.loads((toy_run / "eval" / "evaluate-9.json").read_text())["eval/loss"] == last["eval/loss"]
    assert {name: (toy_run / name).read_bytes() for name in before} == before


def test_export_writes_the_weights_bit_for_bit(command: Command, toy_run: Path) -> None:
    from safetensors.numpy import load_file

    said = command("export", "first", "--out", "made", "--json")
    assert said.document["weights"] == "ema"
    assert command("export", "first", "--out", "raw", "--weights", "raw").code == 0
    trained = stored.load_trained(toy_run, with_data=False)
    for folder, params in (("made", trained.state.ema), ("raw", trained.state.params)):
        tensors = load_file(f"{folder}/model.safetensors")
        assert tensors.keys() == {"hidden.kernel", "hidden.bias", "out.kernel", "out.bias"}
        for name, tensor in tensors.items():
            module, leaf = name.split(".")
            np.testing.assert_array_equal(tensor, np.asarray(params[module][leaf]))
    assert Path("made/config.toml").read_bytes() == (toy_run / "config.toml").read_bytes()
    card = Path("made/README.md").read_text()
    for fact in ("# first", "| Family | toy |", "9 of 9 steps", "jax ", "eval/loss"):
        assert fact in card


def test_weights_that_were_not_kept_are_refused(command: Command, toy_run: Path) -> None:
    said = command("export", "first", "--out", "made", "--weights", "emma")
    assert said.code == 2
    assert "did you mean 'ema'?" in said.error
    Path("file").write_text("")
    assert "file is a file" in command("export", "first", "--out", "file").error


def test_listing_runs_needs_no_jax(toy_run: Path) -> None:
    program = "import sys\nfrom stabletrain.cli.main import run\nrun(sys.argv[1:])\nassert 'jax' not in sys.modules"
    for arguments in (["runs"], ["show", "first"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=toy_run.parents[1],
        )
        assert done.returncode == 0, done.stderr
        assert "done" in done.stdout
