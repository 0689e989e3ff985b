"""Comparison of hand-made runs: grouping, pairing, warnings, steps to a score, figures."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from stabletrain.errors import ConfigError
from stabletrain.runs.comparison import compare, stability_counts, steps_to_score
from stabletrain.runs.figures import band, curves_figure
from stabletrain.runs.reading import RunData, read_run
from tests.runs.written import write_run


@pytest.fixture
def runs(tmp_path: Path) -> list[RunData]:
    found = []
    for method, scale in (("none", 2.0), ("cs", 1.0)):
        for seed in range(3):
            curve = [scale * (1 + seed / 10) / (i + 1) for i in range(3)]
            path = tmp_path / f"{method}-s{seed}"
            found.append(read_run(write_run(path, seed=seed, skip_scaling=method, curves={"train/loss": curve})))
    return found


def test_runs_group_by_what_differs_besides_the_seed(runs: list[RunData]) -> None:
    comparison = compare(runs)
    assert comparison.differences == {"skip_scaling": ["none", "cs"]}
    assert [group.label for group in comparison.groups] == ["skip_scaling=none", "skip_scaling=cs"]
    assert [len(group.runs) for group in comparison.groups] == [3, 3]


def test_scores_are_paired_with_the_first_group(runs: list[RunData]) -> None:
    none, cs = compare(runs, ["train/loss"]).scores
    assert none.paired is None
    assert cs.paired.pairs == 3
    assert cs.paired.mean == pytest.approx(-1.1 / 3)


def test_a_diverged_run_is_not_averaged(runs: list[RunData], tmp_path: Path) -> None:
    bad = read_run(write_run(tmp_path / "cs-s3", seed=3, skip_scaling="cs", state="diverged"))
    comparison = compare([*runs, bad], ["train/loss"])
    assert comparison.groups[1].diverged == 1
    assert (comparison.scores[1].summary.count, comparison.scores[1].summary.total) == (3, 4)
    assert any("different seeds" in warning for warning in comparison.warnings)


def test_other_data_are_warned_of(runs: list[RunData], tmp_path: Path) -> None:
    other = read_run(write_run(tmp_path / "x", seed=0, skip_scaling="ls", fingerprint="beef"))
    assert any("different data" in warning for warning in compare([*runs, other]).warnings)


def test_unknown_metric_names_the_nearest(runs: list[RunData]) -> None:
    with pytest.raises(ConfigError, match="train/loss"):
        compare(runs, ["train/los"])


def test_speed_up_is_a_ratio_of_medians_with_never_as_infinity(runs: list[RunData]) -> None:
    groups = compare(runs).groups
    none, cs = steps_to_score(groups, "train/loss", 1.1)
    assert none.steps == (20.0, 20.0, 30.0)
    assert cs.steps == (10.0, 10.0, 20.0)
    assert cs.speedup == 2.0
    nobody = steps_to_score(groups, "train/loss", 0.01)
    assert nobody[1].reached == 0
    assert math.isnan(nobody[1].speedup)


def test_events_are_counted_without_the_ordinary_ones(tmp_path: Path) -> None:
    events = [{"step": 1, "kind": "spike"}, {"step": 2, "kind": "checkpoint"}, {"step": 3, "kind": "spike"}]
    run = read_run(write_run(tmp_path / "a", events=[*events, {"step": 3, "kind": "skip"}]))
    assert stability_counts(run) == {"spike": 2, "skip": 1}
    assert run.interventions == {"skip": 1}


def test_band_covers_the_union_of_steps(runs: list[RunData], tmp_path: Path) -> None:
    short = read_run(write_run(tmp_path / "short", seed=9, curves={"train/loss": [1.0]}))
    found = band([runs[0], short], "train/loss")
    assert found.steps.tolist() == [10, 20, 30]
    assert found.mean[0] == pytest.approx((runs[0].rows[0]["train/loss"] + 1.0) / 2)
    assert found.mean[2] == runs[0].rows[2]["train/loss"]


def test_figure_is_wellformed_deterministic_svg(runs: list[RunData]) -> None:
    panels = {"": {"none": runs[:3], "cs": runs[3:]}}
    first, second = (curves_figure(panels, "train/loss", log=True, events=True) for _ in range(2))
    assert first == second
    assert ElementTree.fromstring(first).tag.endswith("svg")
    assert curves_figure(panels, "eval/nothing") is None


def test_a_logarithmic_band_is_the_geometric_mean_and_stays_positive(tmp_path: Path) -> None:
    found = []
    for seed, value in enumerate((0.01, 1.0, 100.0)):
        curves = {"train/loss": [value, value]}
        found.append(read_run(write_run(tmp_path / f"s{seed}", seed=seed, curves=curves)))
    logarithmic = band(found, "train/loss", log=True)
    assert logarithmic.mean == pytest.approx([1.0, 1.0])
    assert (logarithmic.low > 0).all()
    assert logarithmic.low * logarithmic.high == pytest.approx([1.0, 1.0])  # symmetric in the logarithm
    assert band(found, "train/loss").low[0] < 0
