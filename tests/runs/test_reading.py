"""Reading run directories: torn lines, nulls, damage, finding runs below a study."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from stabletrain.errors import RunDirectoryError
from stabletrain.runs.reading import find_runs, read_run
from tests.runs.written import write_run


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 40, "train/lo')
    assert [row["step"] for row in read_run(run).rows] == [10, 20, 30]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "garbage", lines[2]]) + "\n")
    with pytest.raises(RunDirectoryError, match="line 2"):
        read_run(run)


def test_null_is_nan_in_a_curve_and_a_diverged_run_has_no_last_value(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", state="diverged", curves={"train/loss": [1.0, None]}))
    steps, values = run.curve("train/loss")
    assert steps.tolist() == [10, 20]
    assert values[0] == 1.0
    assert math.isnan(values[1])
    assert math.isnan(run.last("train/loss"))


def test_an_unknown_run_names_the_nearest(tmp_path: Path) -> None:
    write_run(tmp_path / "cs-s0")
    with pytest.raises(RunDirectoryError, match="cs-s0"):
        read_run(tmp_path / "cs-s1")


def test_find_runs_looks_below_a_study_and_repeats_none(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "study" / f"cs-s{seed}", seed=seed) for seed in range(3)]
    assert find_runs([paths[1], tmp_path / "study"]) == [paths[1], paths[0], paths[2]]
    with pytest.raises(RunDirectoryError):
        find_runs([tmp_path / "nothing"])
