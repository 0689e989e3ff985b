"""Training commands: from options to exit code, on a real toy experiment."""

from __future__ import annotations

import json
import shutil
import signal
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stabletrain.cli import train as train_module
from stabletrain.cli.families import all_families
from stabletrain.errors import DataError, Interrupted
from stabletrain.training import checkpoints
from stabletrain.training.config import make_config
from stabletrain.training.experiment import Family, Needed, Outcome
from stabletrain.training.run_directory import RunDirectory
from tests.cli.conftest import Command
from tests.cli.toy import FAMILY, CommandToyConfig, resolve
from tests.training.toy import StopAfter


def test_a_run_ends_with_a_summary_on_stdout_and_progress_on_stderr(command: Command) -> None:
    said = command("toy", "--grass", "--steps", 6)
    assert said.code == 0
    (run_dir,) = Path("runs").iterdir()
    assert run_dir.name.startswith("toy-toy-digits-")
    assert run_dir.name.endswith("-s0")
    assert "done at step 6 of 6" in said.out
    assert f"stabletrain show runs/{run_dir.name}" in said.out
    assert "step 6/6" in said.err
    assert "step 6/6" not in said.out
    stored = tomllib.loads((run_dir / "config.toml").read_text())
    assert (stored["family"], stored["colour"], stored["width"]) == ("toy", "green", 16)


def test_json_is_one_document_with_the_promised_keys(command: Command) -> None:
    said = command("toy", "--steps", 3, "--out", "here", "--json", "--quiet")
    assert said.document["run_dir"] == str(Path("here").absolute())
    assert said.document["status"] == "done"
    assert said.document["step"] == 3
    assert said.document["metrics"]["train/loss"] > 0
    assert said.err == ""


def test_the_same_command_again_has_nothing_to_do(command: Command, toy_run: Path) -> None:
    before = (toy_run / "metrics.jsonl").read_bytes()
    said = command("toy", "--steps", 9, "--checkpoint-every", 6, "--out", "runs/first")
    assert said.code == 0
    assert "nothing left to do" in said.out
    assert (toy_run / "metrics.jsonl").read_bytes() == before


def test_a_changed_config_stops_with_the_difference_and_fresh_moves_the_old_run_aside(
    command: Command, toy_run: Path
) -> None:
    said = command("toy", "--steps", 12, "--out", "runs/first")
    assert said.code == 2
    assert "steps: 9 -> 12" in said.error
    assert command("toy", "--steps", 3, "--out", "runs/first", "--fresh", "-q").code == 0
    assert (toy_run.parent / "first.old-1" / "config.toml").is_file()


def test_a_dry_run_shows_config_origin_and_cost_and_writes_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STABLETRAIN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    said = command("toy", "--grass", "--steps", 1000, "--width", 9, "--dry-run", "--json")
    assert said.code == 0
    plan = said.document
    assert plan["status"] == "dry-run"
    assert plan["config"]["colour"] == "green"
    assert plan["config"]["width"] == 9
    assert plan["origin"] == {"colour": "--grass", "steps": "command line", "width": "command line"}
    estimate = plan["estimate"]
    assert estimate["parameter_count"] == 33
    # Forward and backward through 2 x 8 + 8 x 1 weights for 8 examples is about 3 * 2 * 24 * 8 operations, of which
    # XLA counts about as many again for the optimiser and the monitor.
    assert 500 < estimate["flops_per_step"] < 50_000
    assert estimate["state_bytes"] > 33 * 4 * 4
    assert estimate["step_bytes"] > estimate["state_bytes"]
    expected = estimate["compile_seconds"] + 1000 * estimate["seconds_per_step"]
    assert estimate["total_seconds"] == pytest.approx(expected)
    assert list(tmp_path.iterdir()) == []


def test_the_text_of_a_dry_run_is_a_preset_that_gives_the_same_config(command: Command, tmp_path: Path) -> None:
    text = command("toy", "--grass", "--sizes", "4,5", "--nan-positions", "7", "-n").out
    (tmp_path / "preset.toml").write_text(text)
    again = command("toy", "--config", "preset.toml", "-n", "--json").document["config"]
    first = command("toy", "--grass", "--sizes", "4,5", "--nan-positions", "7", "-n", "--json").document["config"]
    assert again == first


def test_a_dry_run_of_several_seeds_says_how_many_runs_there_will_be(command: Command, tmp_path: Path) -> None:
    assert command("toy", "--seeds", "1,3-4", "-n", "--json").document["seeds"] == [1, 3, 4]
    said = command("toy", "--seeds", "1,3-4", "-n")
    assert "3, seeds 1, 3, 4, each of this cost" in said.out
    assert list(tmp_path.iterdir()) == []


def test_a_step_in_plain_python_has_a_cost_too(command: Command) -> None:
    estimate = command("toy", "--plain", "-n", "--json").document["estimate"]
    assert estimate["flops_per_step"] is None
    assert estimate["seconds_per_step"] > 0


def test_divergence_is_exit_code_4_and_says_why(command: Command) -> None:
    said = command("toy", "--steps", 8, "--nan-positions", 3, "--out", "bad")
    assert said.code == 4
    assert "diverged at step" in said.out
    assert "nonfinite" in said.err


def test_an_interrupted_run_exits_75_and_resume_finishes_it(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from stabletrain.training import signals

    with monkeypatch.context() as patch:
        patch.setattr(signals, "StopRequest", lambda: StopAfter(4, 75))
        said = command("toy", "--steps", 9, "--out", "cut")
    assert said.code == 75
    assert "stabletrain resume cut" in said.out
    said = command("resume", "cut", "--threads", 2, "--json")
    assert said.code == 0
    assert said.document["status"] == "done"
    assert "resumed from the checkpoint" in said.err
    assert "--threads was 1, is now 2" in said.err
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_resume_takes_several_runs_and_refuses_what_makes_another_experiment(command: Command, toy_run: Path) -> None:
    assert command("toy", "--steps", 3, "-o", "runs/second", "-q").code == 0
    said = command("resume", "first", "second", "--json", "-q")
    assert [run["status"] for run in said.document["runs"]] == ["done", "done"]
    said = command("resume", "first", "--steps", 12)
    assert said.code == 2
    assert "no such option --steps" in said.error
    # The diffusion family lets this one change; the toy has no such option.
    said = command("resume", "first", "--sampling-batch", 3)
    assert said.code == 2
    assert "--sampling-batch is no option that may change in a run of toy" in said.error


def test_ctrl_c_before_the_training_is_exit_code_130(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)  # to this very thread: kill() may reach another one, and later

    monkeypatch.setattr(train_module, "execute", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts ignoring it
    try:
        assert command("toy").code == 130
    finally:
        signal.signal(signal.SIGINT, before)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_missing_data_is_exit_code_3_and_leaves_no_run_directory(command: Command) -> None:
    said = command("toy", "--trouble", "data", "--out", "none")
    assert said.code == 3
    assert said.error == "stabletrain: error: no toys at all: buy some"
    assert not Path("none").exists()


def test_an_unexpected_error_is_one_line_a_failed_status_and_a_traceback_only_with_debug(command: Command) -> None:
    said = command("toy", "--trouble", "bug", "--out", "broken", "--json")
    assert said.code == 1
    assert "unexpected ZeroDivisionError: a bug in two lines" in said.error
    assert "--debug" in said.error
    assert said.document["status"] == "failed"
    assert said.document["exit_code"] == 1
    status = json.loads(Path("broken/status.json").read_text())
    assert status["state"] == "failed"
    assert "ZeroDivisionError" in status["reason"]
    said = command("toy", "--trouble", "bug", "--out", "broken", "--debug")
    assert said.code == 1
    assert "Traceback" in said.err


def test_running_out_of_memory_suggests_a_smaller_batch(command: Command) -> None:
    said = command("toy", "--trouble", "memory", "--batch-size", 16)
    assert said.code == 1
    assert "--batch-size 8" in said.error


def test_a_run_directory_of_another_family_is_refused(command: Command, toy_run: Path) -> None:
    config = toy_run / "config.toml"
    config.write_text(config.read_text().replace('family = "toy"', 'family = "optics"'))
    said = command("toy", "--steps", 9, "--out", "runs/first")
    assert said.code == 1
    assert "'optics'" in said.error
    said = command("resume", "first")
    assert said.code == 1
    assert "unknown family 'optics'" in said.error


def test_a_folder_that_is_no_run_is_refused_before_any_work(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    said = command("toy", "--trouble", "data", "--out", "mine")
    assert "is not empty" in said.error
    said = command("toy", "--out", "mine/thesis.txt", "--trouble", "data")
    assert "is a file" in said.error


def test_a_directory_that_cannot_be_written_is_one_line(command: Command) -> None:
    said = command("toy", "--steps", 2, "--out", "/proc/stabletrain-test")
    assert said.code == 1
    assert "/proc/stabletrain-test" in said.error


def test_a_batch_that_the_devices_do_not_divide_is_exit_code_2(command: Command) -> None:
    said = command("toy", "--batch-size", 9, "--devices", 2)
    assert said.code == 2
    assert "not divisible by 2 devices" in said.error


# Orbax closes its event loop while some of its reads of the damaged files are still to fail.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(command: Command, toy_run: Path) -> None:
    status = json.loads((toy_run / "status.json").read_text())
    (toy_run / "status.json").write_text(json.dumps(status | {"state": "running"}))
    for file in (toy_run / checkpoints.FOLDER / "9" / "state" / "d").iterdir():
        file.write_bytes(b"")
    said = command("resume", "first")
    assert said.code == 0
    assert "checkpoint of step 9 is damaged" in said.err
    assert "resumed from the checkpoint of step 6" in said.err


def test_interrupted_is_never_shown_as_unexpected() -> None:
    from stabletrain.cli.main import explained

    message, code = explained(Interrupted(75))
    assert code == 75
    assert "unexpected" not in message


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.name)
def test_what_comes_next_is_what_a_run_of_the_family_can_do(command: Command, family: Family) -> None:
    done = Outcome(Path("r"), "done", 3, {}, 0)
    said = train_module.next_commands(family, done, Path("r"))
    assert ("stabletrain sample r" in said) == (family.sample is not None)
    assert ("stabletrain nnip benchmark r" in said) == (family.name == "nnip")
    for line in said:  # each is a command that the program has
        arguments = line.removeprefix("stabletrain ").replace(" r", " ").replace("--out DIR", "").split()
        assert command(*arguments, "--help").code == 0


def test_a_run_that_another_starts_from_is_trained_first_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = resolve(make_config(CommandToyConfig, {"steps": 2}))
    path = tmp_path / "first"

    def needs(config: Any) -> Needed | None:
        return None if config == first or path.exists() else Needed(first, path, "the first is missing")

    family = replace(FAMILY, needs=needs)
    second = resolve(make_config(CommandToyConfig, {"steps": 3}))
    for expected in (1, 0):
        with train_module.make_reporter(quiet=False) as reporter:
            outcome = train_module.execute(family, second, tmp_path / "second", reporter=reporter)
        assert (outcome.status, outcome.step) == ("done", 3)
        assert capsys.readouterr().err.count("the first is missing") == expected
    assert RunDirectory.open(path).status["state"] == "done"

    shutil.rmtree(path)
    broken = resolve(make_config(CommandToyConfig, {"trouble": "data"}))
    failing = replace(family, needs=lambda c: None if c == broken else Needed(broken, path, "the first is missing"))
    with train_module.make_reporter(quiet=True) as reporter, pytest.raises(DataError, match="no toys at all"):
        train_module.execute(failing, second, tmp_path / "third", reporter=reporter)
    assert not (tmp_path / "third").exists()
