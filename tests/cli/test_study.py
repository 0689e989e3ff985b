"""Commands for many runs: seeds, tables, comparison, report; with real processes on the toy family."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stabletrain.cli import study, table
from stabletrain.runs.engine import LocalEngine
from stabletrain.runs.reproducibility import summary
from tests.cli.conftest import Command

PROGRAM = Path(__file__).with_name("toy_program.py")
TRAIN = ("--steps", "4", "--log-every", "2")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine starts the program that knows the toy family."""

    def make(workers: int) -> LocalEngine:
        return LocalEngine(workers or 2, command=(sys.executable, str(PROGRAM)))

    monkeypatch.setattr(study, "make_engine", make)
    monkeypatch.setattr(table, "make_engine", make)


def modified(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("status.json"))}


@pytest.mark.slow
def test_seeds_make_a_study_and_a_second_call_makes_only_what_is_missing(command: Command, engine: None) -> None:
    said = command("toy", *TRAIN, "--seeds", "0-1", "--json")
    assert said.code == 0, said.err
    folder = Path(said.document["run_dir"])
    assert sorted(path.parent.name for path in folder.glob("*/status.json")) == ["toy-s0", "toy-s1"]
    assert said.document["metrics"]["train/loss"]["n"] == 2
    before = modified(folder)
    said = command("toy", *TRAIN, "--seeds", "0-2")
    assert said.code == 0, said.err
    after = modified(folder)
    assert {name: after[name] for name in before} == before
    assert len(after) == 3
    assert "3/3" in said.out
    jobs = json.loads((folder / "study.json").read_text())["jobs"]
    assert [job["run_dir"] for job in jobs] == ["toy-s0", "toy-s1", "toy-s2"]
    # what was made can be compared and reported
    said = command("compare", folder)
    assert said.code == 0, said.err
    assert "differ in nothing but the seed" in said.out
    said = command("report", folder)
    assert said.code == 0, said.err
    assert "<svg" in (folder / "report.html").read_text()


def test_another_configuration_in_the_same_study_is_refused_with_the_difference(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "study.toml").write_text('family = "toy"\nsteps = 4\ncolour = "red"\n')
    said = command("toy", "--steps", "4", "--colour", "green", "--seeds", "0", "--out", "old")
    assert said.code == 2
    assert "colour: 'red' -> 'green'" in said.error


def test_a_folder_that_is_no_study_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    said = command("toy", "--steps", "4", "--seeds", "0", "--out", "mine")
    assert said.code == 1
    assert "no study" in said.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "4-1"), "count down"),
        (("--seeds", "a"), "0-4"),
        (("--workers", "2"), "without --seeds"),
        (("--seeds", "0-1", "--fresh"), "--fresh does nothing"),
        (("--seeds", "0-1", "--workers", "4096"), "more than the"),
    ],
)
def test_options_that_make_no_sense_together(
    command: Command, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(study, "accelerators", lambda: [])
    said = command("toy", "--steps", "4", *arguments)
    assert said.code == 2
    assert message in said.error


# --- tables -----------------------------------------------------------------------------------------------------------

TABLE = """
title = "A toy table"
source = "Nobody 2026"
[[columns.small]]
metric = "train/loss"
label = "loss"
[[figures]]
metric = "train/loss"
label = "loss"
"""
ROW = """
family = "toy"
colour = "{colour}"
[row]
label = "{colour}"
order = {order}
{baseline}
cost_minutes = {{ small = 0.5 }}
[small]
steps = 4
log_every = 2
"""


@pytest.fixture
def experiments(tmp_path: Path) -> Path:
    folder = tmp_path / "experiments" / "paper" / "toy"
    folder.mkdir(parents=True)
    (folder / "table.toml").write_text(TABLE)
    (folder / "red.toml").write_text(ROW.format(colour="red", order=1, baseline=""))
    (folder / "green.toml").write_text(ROW.format(colour="green", order=2, baseline='baseline = "red"'))
    return tmp_path


@pytest.mark.slow
def test_a_table_from_nothing_and_again_after_a_loss(command: Command, engine: None, experiments: Path) -> None:
    """From nothing to a rendered table; a run that is lost is made again, alone, and the table is the same."""
    said = command("table", "paper/toy", "--seeds", "0-1", "--run")
    assert said.code == 0, said.err
    assert "4 of 4 runs missing, about 1 min" in said.err
    results = experiments / "results" / "small" / "paper"
    assert sorted(path.name for path in results.iterdir()) == [
        "toy-1.svg", "toy.csv", "toy.json", "toy.md", "toy.tex",
    ]  # fmt: skip
    first = json.loads((results / "toy.json").read_text())
    assert first["complete"]
    assert first["environment"]["runs"] == 4
    folder = experiments / "runs" / "paper-toy-small"
    before = modified(folder)
    shutil.rmtree(folder / "green-s1")
    said = command("table", "paper/toy", "--seeds", "0-1")
    assert "Incomplete" in said.out
    said = command("table", "paper/toy", "--seeds", "0-1", "--run")
    assert "1 of 4 runs missing" in said.err
    after = modified(folder)
    assert [name for name in before if before[name] != after[name]] == ["green-s1/status.json"]
    assert json.loads((results / "toy.json").read_text())["cells"] == first["cells"]

    elsewhere = experiments / "elsewhere.json"
    shutil.copy(results / "toy.json", elsewhere)
    said = command("table", "paper/toy", "--seeds", "0-1", "--with", str(elsewhere))
    assert said.code == 2
    assert "there twice" in said.err
    for other in ("--list", "--all"):
        assert "joins seeds to one table" in command("table", other, "--with", str(elsewhere)).err
    shutil.rmtree(folder)
    said = command("table", "paper/toy", "--seeds", "0-1", "--with", str(elsewhere), "--run")
    assert said.code == 0, said.err
    assert "0 of 0 runs missing" in said.err
    assert json.loads((results / "toy.json").read_text()) == json.loads(elsewhere.read_text())

    said = command("table", "--reproducibility", "REPRODUCIBILITY.md")
    assert said.code == 0
    page = (experiments / "REPRODUCIBILITY.md").read_text()
    assert "| [paper/toy](#papertoy) | A toy table | run, 2 seeds | not defined |" in page
    assert "SCALE=paper" not in page  # which this table does not have
    assert str(experiments) not in page


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_a_table_that_was_not_run_names_a_scale_that_it_has(experiments: Path, scale: str) -> None:
    for path in (experiments / "experiments" / "paper" / "toy").glob("*.toml"):
        path.write_text(path.read_text().replace("small", scale))
    page = summary(experiments / "experiments", experiments / "results")
    assert f"Not run. `make table-paper-toy SCALE={scale}` does it." in page
    assert page.count("SCALE=") == 1


def test_listing_says_what_is_left_to_do(command: Command, experiments: Path) -> None:
    """For as many runs at once as asked for, and as many seeds as the table says where none are asked for."""

    def line(*more: str) -> list[str]:
        said = command("table", "--list", *more)
        assert said.code == 0
        return said.out.splitlines()[1].split()

    assert line("--workers", "1") == ["paper/toy", "A", "toy", "table", "0/10", "5", "min"]
    with (experiments / "experiments" / "paper" / "toy" / "table.toml").open("a") as description:
        description.write("[seeds]\nsmall = 3\n")
    assert line("--workers", "1")[4:] == ["0/6", "3", "min"]
    assert line("--workers", "2")[4:] == ["0/6", "1", "min", "30", "s"]
    assert line("--workers", "1", "--seeds", "7")[4:] == ["0/2", "1", "min"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("paper/toi",), "paper/toy"),
        (("paper/toy", "--scale", "large"), "small or paper"),
        (("paper/toy", "--experiments", "nowhere"), "--experiments"),
    ],
)
def test_mistakes_name_what_was_meant(
    command: Command, experiments: Path, arguments: tuple[str, ...], message: str
) -> None:
    said = command("table", *arguments)
    assert said.code == 2
    assert message in said.error


# --- comparison -------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_runs(command: Command) -> Callable[[], None]:
    def make() -> None:
        for colour in ("red", "green"):
            assert command("toy", *TRAIN, "--colour", colour, "--out", f"runs/{colour}", "--quiet").code == 0

    return make


def test_compare_shows_differences_scores_steps_and_figures(command: Command, two_runs: Callable[[], None]) -> None:
    two_runs()
    said = command("compare", "red", "green", "--score", "train/loss=1e9", "--out", "figures")
    assert said.code == 0, said.err
    assert "colour" in said.out
    assert "first / this" in said.out
    assert Path("figures/train-loss.svg").read_text().startswith("<svg")
    document = command("compare", "red", "green", "--json").document
    assert document["differences"] == {"colour": ["red", "green"]}
    assert {score["metric"] for score in document["scores"]} >= {"train/loss"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("red",), 1, "nothing to compare"),
        (("red", "green", "--metric", "train/los"), 2, "train/loss"),
        (("red", "green", "--score", "train/loss"), 2, "METRIC=VALUE"),
        (("red", "green", "--mode", "most"), 2, "min or max"),
        (("red", "blue"), 1, "blue"),
    ],
)
def test_mistakes_in_a_comparison(
    command: Command, two_runs: Callable[[], None], arguments: tuple[str, ...], code: int, message: str
) -> None:
    two_runs()
    said = command("compare", *arguments)
    assert said.code == code
    assert message in said.error


def test_report_of_one_run_stands_in_its_folder(command: Command, two_runs: Callable[[], None]) -> None:
    two_runs()
    assert command("report", "red").code == 0
    assert "How stable it was" in Path("runs/red/report.html").read_text()
    said = command("report", "reed")
    assert said.code == 1
    assert "red" in said.error
