"""Tables from hand-made runs: what is best, what is missing, what the paper says, in every format."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest

from stabletrain.errors import ConfigError, DataError
from stabletrain.runs.experiments import TableSpec, find_tables, read_table
from stabletrain.runs.kept import check_disjoint, joined_environment, read_kept
from stabletrain.runs.reading import RunData, read_run
from stabletrain.runs.table import Table, build_table, to_csv, to_json, to_latex, to_markdown
from tests.runs.written import write_run

TABLE = """
title = "A test"
source = "Somebody 2020, Table 1"
deviations = ["everything is small"]
[caption]
small = "Digits."
[[columns.small]]
metric = "eval/score"
label = "score"
mode = "min"
paper = "score"
[[columns.small]]
metric = "eval/score"
label = "steps to 0.4"
reduce = "steps-to:0.4"
[[columns.paper]]
metric = "eval/fid50k"
label = "FID"
"""
ROW = """
family = "diffusion"
skip_scaling = "{key}"
[row]
label = "{label}"
order = {order}
{more}
[small]
steps = 30
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "experiments" / "paper" / "main"
    folder.mkdir(parents=True)
    (folder / "table.toml").write_text(TABLE)
    values = '[row.values.score]\nvalue = 0.5\nread = "the README"\n'
    (folder / "none.toml").write_text(ROW.format(key="none", label="none & co", order=1, more=values))
    for order, key in enumerate(("cs", "ls"), start=2):
        (folder / f"{key}.toml").write_text(ROW.format(key=key, label=key, order=order, more='baseline = "none"'))
    return tmp_path / "experiments"


def runs(tmp_path: Path, finals: dict[str, list[float | None]]) -> dict[str, list[RunData]]:
    """Runs per row with the given final scores; None: diverged."""
    return {
        key: [
            read_run(
                write_run(
                    tmp_path / "runs" / f"{key}-s{seed}",
                    seed=seed,
                    state="diverged" if final is None else "done",
                    curves={"eval/score": [0.9, 0.6, final]},
                )
            )
            for seed, final in enumerate(values)
        ]
        for key, values in finals.items()
    }


@pytest.fixture
def table(root: Path, tmp_path: Path) -> Table:
    spec = read_table(root, "paper/main")
    finals = {"none": [0.5, 0.6, 0.7], "cs": [0.3, 0.4, 0.5], "ls": [0.2, None, 0.5]}
    return build_table(spec, "small", runs(tmp_path, finals), range(3))


def cell(table: Table, key: str, label: str = "score"):
    return table.cells[key, label]


def test_differences_are_paired_by_seed(table: Table) -> None:
    paired = cell(table, "cs").paired
    assert paired.mean == pytest.approx(-0.2)
    assert paired.interval == pytest.approx((-0.2, -0.2))
    assert cell(table, "none").paired is None


def test_a_diverged_run_is_counted_beside_the_mean_of_the_survivors(table: Table) -> None:
    ls = cell(table, "ls")
    assert (ls.summary.count, ls.diverged) == (2, 1)
    assert ls.summary.mean == pytest.approx(0.35)
    assert ls.paired.pairs == 2
    markdown = to_markdown(table)
    assert "† 1/3 diverged" in markdown
    assert "survivors" in markdown


def test_best_is_bold_and_second_underlined(table: Table) -> None:
    assert {key: cell(table, key).rank for key in ("none", "cs", "ls")} == {"none": None, "cs": 2, "ls": 1}
    markdown = to_markdown(table)
    assert "<u>0.40 ± 0.10 (3)</u>" in markdown
    assert "**0.35 ± 0.21 (2)**†" in markdown


def test_runs_that_never_reach_a_score_are_said_and_not_averaged(table: Table) -> None:
    cs = cell(table, "cs", "steps to 0.4")
    assert (cs.summary.mean, cs.never) == (30.0, 1)
    assert "1/3 never" in to_markdown(table)


def test_what_a_row_cannot_have_is_not_missing(root: Path, tmp_path: Path) -> None:
    """A row says so itself: without its word the same cells are missing and the table is incomplete."""
    made = runs(tmp_path, {"none": [0.5], "cs": [0.3]})
    for more in ("", 'without = ["eval/score"]'):
        (root / "paper" / "main" / "ls.toml").write_text(ROW.format(key="ls", label="ls", order=3, more=more))
        found = build_table(read_table(root, "paper/main"), "small", made, [0])
        assert found.complete == bool(more)
        assert ("1/1 missing" in to_markdown(found)) == (not more)


def test_the_json_holds_the_number_of_each_seed(table: Table) -> None:
    cells = {(each["row"], each["column"]): each["values"] for each in json.loads(to_json(table))["cells"]}
    assert cells["none", "score"] == {"0": 0.5, "1": 0.6, "2": 0.7}
    assert cells["ls", "score"] == {"0": 0.2, "1": None, "2": 0.5}
    assert "values" not in next(iter(csv.DictReader(io.StringIO(to_csv(table)))))


@pytest.fixture
def kept_file(root: Path, tmp_path: Path) -> Path:
    """The table of `table`, as its JSON."""
    spec = read_table(root, "paper/main")
    finals = {"none": [0.5, 0.6, 0.7], "cs": [0.3, 0.4, 0.5], "ls": [0.2, None, 0.5]}
    built = build_table(spec, "small", runs(tmp_path, finals), range(3))
    environment = {"runs": 9, "first": "2026-01-01", "last": "2026-01-03", "wall_seconds": 5.0, "devices": ["cpu"]}
    path = tmp_path / "elsewhere.json"
    path.write_text(json.dumps(json.loads(to_json(built)) | {"environment": {**environment, "versions": {}}}))
    return path


def test_seeds_of_another_machine_stand_beside_the_runs_here(root: Path, tmp_path: Path, kept_file: Path) -> None:
    """Joined, the table is the one of all its runs in one place."""
    spec = read_table(root, "paper/main")
    every = {"none": [0.5, 0.6, 0.7, 0.9], "cs": [0.3, 0.4, 0.5, 0.8], "ls": [0.2, None, 0.5, None]}
    expected = build_table(spec, "small", runs(tmp_path / "all", every), range(4))
    here = {row: [run for run in found if run.seed == 3] for row, found in runs(tmp_path / "four", every).items()}
    kept = read_kept(kept_file, spec, "small")
    joined = build_table(spec, "small", here, range(4), [kept])
    assert json.loads(to_json(joined)) == json.loads(to_json(expected))
    assert joined.complete
    assert cell(joined, "ls").diverged == 2
    assert kept.runs == {(row, seed) for row in every for seed in range(3)}
    check_disjoint([kept], frozenset({("cs", 3)}))
    with pytest.raises(ConfigError, match="seed 1 of cs is there twice"):
        check_disjoint([kept], frozenset({("cs", 1)}))


def test_environments_are_joined() -> None:
    one = {"runs": 2, "first": "2026-01-02", "last": "2026-01-03", "wall_seconds": 5.0, "devices": ["cpu"]}
    two = {"runs": 1, "first": "2026-01-01", "last": "2026-01-04", "wall_seconds": 1.5, "devices": ["gpu"]}
    assert joined_environment([one | {"versions": {"jax": "1"}}, {}, two | {"versions": {"jax": "2"}}]) == {
        "runs": 3,
        "first": "2026-01-01",
        "last": "2026-01-04",
        "wall_seconds": 6.5,
        "devices": ["cpu", "gpu"],
        "versions": {"jax": "2"},
    }
    assert joined_environment([{}]) == {}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"complete": true', '"complete": false', "is not complete"),
        ('"scale": "small"', '"scale": "paper"', "at paper scale, not paper/main at small"),
        ('"column": "score"', '"column": "points"', "differ in their rows or columns"),
        ('"values"', '"value"', "is of an older version, without the number of each seed"),
        ('"cells"', '"cell"', "is no table written by"),
        ("{", "", "is no table written by"),
    ],
)
def test_a_table_that_does_not_fit_is_not_joined(root: Path, kept_file: Path, old: str, new: str, message: str) -> None:
    kept_file.write_text(kept_file.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        read_kept(kept_file, read_table(root, "paper/main"), "small")


def test_a_row_can_name_the_row_that_it_starts_from(root: Path) -> None:
    row = root / "paper" / "main" / "ls.toml"
    row.write_text(ROW.format(key="ls", label="ls", order=3, more='after = "none"'))
    assert {row.key: row.after for row in read_table(root, "paper/main").rows} == {
        "none": None,
        "cs": None,
        "ls": "none",
    }
    row.write_text(ROW.format(key="ls", label="ls", order=3, more='after = "nine"'))
    with pytest.raises(ConfigError, match=r"unknown after 'nine'.*none"):
        read_table(root, "paper/main")


def test_a_table_says_how_many_seeds_it_needs_at_a_scale(root: Path) -> None:
    assert read_table(root, "paper/main").default_seeds("small") == range(5)
    description = root / "paper" / "main" / "table.toml"
    description.write_text(TABLE + "[seeds]\nsmall = 2\n")
    spec = read_table(root, "paper/main")
    assert (spec.default_seeds("small"), spec.default_seeds("paper")) == (range(2), range(5))
    for wrong, message in (("small = 0", "number of runs"), ("smal = 3", "small")):
        description.write_text(TABLE + f"[seeds]\n{wrong}\n")
        with pytest.raises(ConfigError, match=message):
            read_table(root, "paper/main")


def test_the_papers_number_stands_beside_ours_with_the_difference(table: Table) -> None:
    assert "0.5 (+0.10)" in to_markdown(table)
    assert "read in: the README" in to_markdown(table)


def test_missing_runs_make_a_table_incomplete(root: Path, tmp_path: Path) -> None:
    spec = read_table(root, "paper/main")
    table = build_table(spec, "small", runs(tmp_path, {"none": [0.5]}), range(2))
    assert not table.complete
    assert "Incomplete" in to_markdown(table)
    assert "–" in to_markdown(table)


def test_latex_escapes_and_balances(table: Table) -> None:
    latex = to_latex(table)
    assert r"none \& co" in latex
    assert r"\textbf{" in latex
    assert latex.count("{") == latex.count("}")
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len({line.replace(r"\&", "").count("&") for line in body}) == 1


def test_csv_and_json_hold_the_same_numbers(table: Table) -> None:
    records = list(csv.DictReader(io.StringIO(to_csv(table))))
    cells = json.loads(to_json(table))["cells"]
    assert len(records) == len(cells) == 6
    assert [float(r["mean"]) if r["mean"] else None for r in records] == [c["mean"] for c in cells]


def test_paper_scale_without_rows_is_an_empty_table(root: Path) -> None:
    table = build_table(read_table(root, "paper/main"), "paper", {}, range(5))
    assert table.rows == ()


def test_find_tables(root: Path) -> None:
    assert find_tables(root) == ["paper/main"]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("table.toml", 'title = "A test"', 'titel = "A test"', "titel.*title"),
        ("table.toml", "steps-to:0.4", "steps-two:0.4", "unknown reduction"),
        ("table.toml", "steps to 0.4", "score", "two columns are called 'score'"),
        ("cs.toml", 'baseline = "none"', 'baseline = "nonne"', "nonne.*none"),
        ("cs.toml", "[row]", "[rows]", "needs `family` and a table"),
        ("cs.toml", "order = 2", "older = 2", "older.*order"),
    ],
)
def test_mistakes_in_the_files_name_the_nearest(root: Path, file: str, old: str, new: str, message: str) -> None:
    path = root / "paper" / "main" / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message):
        read_table(root, "paper/main")


def test_unknown_table_names_the_nearest(root: Path) -> None:
    with pytest.raises(ConfigError, match="paper/main"):
        read_table(root, "paper/mian")


def test_a_row_becomes_a_command(root: Path) -> None:
    spec: TableSpec = read_table(root, "paper/main")
    arguments = spec.rows[1].arguments("small", 3)
    assert arguments[:2] == ("diffusion", "--config")
    assert arguments[-4:] == ("--scale", "small", "--seed", "3")
    assert not math.isnan(spec.rows[0].values["score"].value)
