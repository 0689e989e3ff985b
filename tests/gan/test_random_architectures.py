"""Success over thresholds: counts, tests and intervals by hand, broken runs as results, and the command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from stabletrain.errors import ConfigError, DataError, RunDirectoryError
from stabletrain.gan.config import GanConfig
from stabletrain.gan.figure_commands import random_architectures
from stabletrain.gan.random_architectures import (
    classifier_anchors,
    compare,
    grid,
    read_scores,
    scores_from_csv,
    threshold,
    to_csv,
    to_document,
    to_markdown,
)
from stabletrain.gan.resolution import resolve
from stabletrain.training.run_directory import RunDirectory

METRIC = "eval/cs1k_x"
INF = math.inf


def test_counts_and_mcnemars_test_by_hand():
    one = np.array([5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5.0, 1.0])
    two = np.array([1.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 2.0])
    found = threshold(one, two, 2.0)
    assert (found.only_first, found.only_second, found.both, found.neither) == (1, 6, 1, 1)
    # two-sided binomial: 2 (C(7,0) + C(7,1)) / 2^7
    np.testing.assert_allclose(found.p, 2 * 8 / 128)
    np.testing.assert_allclose(found.difference, 5 / 9)
    assert found.interval[0] < 5 / 9 < found.interval[1]
    assert math.isnan(threshold(one, one, 2.0).p)
    assert threshold(one, one, 2.0).interval == (0.0, 0.0)


def test_the_papers_table_is_significant_where_it_says_so():
    """Table 5 at the score 5.0: 0 only GAN, 147 only WGAN-GP, 42 both, 11 none of 200."""
    one = np.repeat([6.0, 1.0, 6.0, 1.0], [0, 147, 42, 11])
    two = np.repeat([1.0, 6.0, 6.0, 1.0], [0, 147, 42, 11])
    found = threshold(one, two, 5.0)
    assert (found.only_first, found.only_second, found.both, found.neither) == (0, 147, 42, 11)
    np.testing.assert_allclose(found.p, 2.0**-146)
    # one-sided against two-sided, Appendix C: 77 against 100 is not significant
    better = compare({"one": dict.fromkeys(range(177), 0.0), "two": {n: 1.0 if n < 100 else -1.0 for n in range(177)}},
                     "one", "two", [0.0])  # fmt: skip
    assert (better.first_better, better.second_better) == (77, 100)
    assert better.sign_p > 0.05


def test_broken_runs_fail_every_threshold_and_are_counted():
    scores = {"gan": {0: -INF, 1: -INF, 2: 3.0, 9: 1.0}, "gp": {0: 4.0, 1: -INF, 2: 4.0}}
    found = compare(scores, "gan", "gp", [-100.0])
    assert found.architectures == (0, 1, 2)  # 9 was trained by one of them only
    assert found.broken == (2, 1)
    assert (found.second_better, found.first_better) == (2, 0)
    assert found.thresholds[0].neither == 1
    text = to_markdown(found, METRIC, (9.0, 3.0))
    assert "3 architectures" in text
    assert "(2 of gan, 1 of gp)" in text
    assert to_document(found, METRIC, None)["real"] is None
    json.dumps(to_document(compare(scores, "gan", "gan", [0.0]), METRIC, None), allow_nan=False)


def test_the_grid_starts_at_noise_and_stays_below_real_data():
    assert grid(9.0, 3.0, 3) == [3.0, 5.0, 7.0]


def test_rows_that_are_not_there_are_named():
    with pytest.raises(ConfigError, match="gan"):
        compare({"gan": {0: 1.0}}, "gan", "gam", [0.0])
    with pytest.raises(ConfigError, match="in common"):
        compare({"a": {0: 1.0}, "b": {1: 1.0}}, "a", "b", [0.0])


def make_run(study, row, seed, state, score, **changes):
    config = resolve(GanConfig(method="wgan-gp", network="random", discriminator_norm="layer", seed=seed, **changes))
    run = RunDirectory.create(study / f"{row}-s{seed}", "gan", config)
    if score is not None:
        run.append_row({"step": 10, METRIC: score})
    run.write_status(state, 10, 10)


@pytest.fixture
def study(tmp_path):
    folder = tmp_path / "study"
    for seed, (one, two) in enumerate([(3.0, 5.0), (2.0, 6.0), (4.0, 3.5)]):
        make_run(folder, "gan", seed, "done", one)
        make_run(folder, "gp", seed, "done", two)
    make_run(folder, "gan", 3, "diverged", None)
    make_run(folder, "gp", 3, "done", float("nan"))
    make_run(folder, "gan", 4, "preempted", None)
    return folder


def test_scores_are_read_by_row_and_architecture(study):
    scores = read_scores(study, METRIC)
    assert scores == {"gan": {0: 3.0, 1: 2.0, 2: 4.0, 3: -INF}, "gp": {0: 5.0, 1: 6.0, 2: 3.5, 3: -INF}}
    table = to_csv(scores, METRIC).splitlines()
    assert table[0].startswith("architecture,generator_nonlinearity,")
    assert table[1].endswith(",3.0,5.0")
    with pytest.raises(ConfigError, match="eval/cs1k_x"):
        read_scores(study, "eval/cs1k_y")
    with pytest.raises(ConfigError, match="holds no finished run"):
        read_scores(study / "nothing", METRIC)


def test_one_architecture_twice_in_a_row_is_refused(study):
    make_run(study, "gan", 7, "done", 1.0, architecture=0)
    with pytest.raises(ConfigError, match="two runs of gan train architecture 0"):
        read_scores(study, METRIC)


def test_the_command_prints_and_writes(study, tmp_path, capsys):
    out = tmp_path / "out"
    assert random_architectures(study, METRIC, minimum=[2.5, 4.5], out=out) == 0
    printed = capsys.readouterr().out
    assert "| 2.50 | 0 | 1 | 2 | 1 | 1 |" in printed
    document = json.loads((out / "random-architectures-success.json").read_text())
    assert document["comparisons"][0]["thresholds"][1]["only_second"] == 2
    assert (out / "random-architectures-scores.csv").read_text().count("\n") == 5
    assert random_architectures(study, METRIC, minimum=[2.5], as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == {"gp/sign_p": 1.0}
    with pytest.raises(ConfigError, match="--minimum"):
        random_architectures(study, METRIC)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="cannot write"):
        random_architectures(study, METRIC, minimum=[2.5], out=tmp_path / "notes.txt")


def test_architectures_of_another_machine_are_joined_by_their_table(study, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    random_architectures(study, METRIC, minimum=[2.5], out=out)
    for seed in (5, 6):
        make_run(other, "gan", seed, "done", 1.0)
        make_run(other, "gp", seed, "done", 7.0)
    kept = out / "random-architectures-scores.csv"
    assert scores_from_csv(kept, METRIC) == read_scores(study, METRIC)
    capsys.readouterr()
    assert random_architectures(other, METRIC, minimum=[2.5], scores_of=[kept], as_json=True) == 0
    (found,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert found["architectures"] == [0, 1, 2, 3, 5, 6]
    assert found["unbroken"] == 5
    assert found["means"] == pytest.approx([11 / 5, 28.5 / 5])
    assert found["difference"] == pytest.approx(17.5 / 5)
    assert found["interval"][0] < 17.5 / 5 < found["interval"][1]
    with pytest.raises(ConfigError, match="two studies have architecture 0 of gan"):
        random_architectures(study, METRIC, minimum=[2.5], scores_of=[kept])


def test_tables_of_scores_that_do_not_fit_are_refused(study, tmp_path):
    kept = tmp_path / "scores.csv"
    kept.write_text(to_csv(read_scores(study, METRIC), METRIC))
    with pytest.raises(DataError, match="not of eval/other"):
        scores_from_csv(kept, "eval/other")
    kept.write_text("architecture,gan\n0,1.0\n")
    with pytest.raises(DataError, match="no table of scores"):
        scores_from_csv(kept, METRIC)
    with pytest.raises(DataError, match="cannot read"):
        scores_from_csv(tmp_path / "nothing.csv", METRIC)


@pytest.mark.slow
def test_real_digits_score_far_above_noise():
    real, noise = classifier_anchors("digits")
    assert real > 8
    assert noise < 6
