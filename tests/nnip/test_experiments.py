"""The tables of experiments/stable: every row resolves at every scale that it has, and starts from the run it names."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from stabletrain.cli.options import resolve
from stabletrain.cli.table import jobs_of
from stabletrain.nnip.config import NnipConfig
from stabletrain.nnip.family import FAMILY
from stabletrain.runs.experiments import SCALES, find_tables, read_table
from stabletrain.training.config import to_toml

ROOT = Path(__file__).parents[2] / "experiments"
TABLES = [name for name in find_tables(ROOT) if name.startswith("stable/")]
EACH = list(itertools.product(TABLES, SCALES))
NO_PAPER = {"stable/aspirin-xtb", "stable/ethanol", "stable/within-replicas"}
SEED = 3


def resolved(name: str, scale: str) -> dict[str, NnipConfig]:
    """The rows' configurations in the order of the table, each written as a run of seed `SEED` before the next."""
    spec = read_table(ROOT, name)
    found: dict[str, NnipConfig] = {}
    for job in jobs_of(spec, scale, [SEED], Path("runs")):
        preset = next(row.path for row in spec.rows if row.key == job.row)
        config = resolve(FAMILY, {"seed": str(SEED)}, preset=preset, scale=scale).config
        assert isinstance(config, NnipConfig)
        job.run_dir.mkdir(parents=True)
        (job.run_dir / "config.toml").write_text(to_toml(config, "nnip"))
        if job.after is not None and job.after.parent.as_posix() in (config.base or ""):
            assert config.base == job.after.as_posix(), f"{preset} [{scale}] starts from another run than it waits for"
        found[job.row] = config
    return found


@pytest.mark.parametrize(("name", "scale"), EACH)
def test_rows_resolve_and_name_rows_of_their_own_scale(
    name: str, scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [row for row in read_table(ROOT, name).rows if scale in row.scales]
    keys = {row.key for row in rows}
    assert bool(rows) == (scale == "small" or name not in NO_PAPER)
    for row in rows:
        assert {row.after, row.baseline} <= {None, *keys}, row.path
        assert row.cost_minutes.get(scale), row.path
        assert not row.values, f"{row.path}: no number of this paper is verified"
    assert resolved(name, scale).keys() == keys


@pytest.mark.parametrize(("name", "scale"), EACH)
def test_columns_are_metrics_of_the_rows_evaluation(
    name: str, scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The benchmark's length and temperatures are in its metrics' names; a row that is not simulated says `without`."""
    monkeypatch.chdir(tmp_path)
    spec = read_table(ROOT, name)
    without = {row.key: row.without for row in spec.rows}
    for key, config in resolved(name, scale).items():
        length = f"_{config.benchmark_time:g}ps"
        protocols = tuple(f"{length}_{kelvin:g}K" for kelvin in (config.temperature, *config.benchmark_temperatures))
        for column in spec.columns[scale]:
            simulated = column.metric.endswith("K") or column.metric.startswith("stable/")
            if not config.stable:
                assert (column.metric in without[key]) == simulated, f"{key}: {column.metric}"
            elif column.metric.endswith("K"):
                assert column.metric.endswith(protocols), f"{key}: {column.metric}"


def test_the_papers_aspirin_is_the_released_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stable = resolved("stable/aspirin", "paper")["stable"]
    assert (stable.replicas, stable.window, stable.steps, stable.energy_force_weight) == (128, 2000, 500, 10.0)
    assert (stable.stable_learning_rate, stable.stable_clip, stable.restart_share) == (1e-3, 1.0, 0.05)
    assert (stable.train_frames, stable.features, stable.interactions) == (950, 64, 6)  # the base's
    assert (stable.observable, stable.residual, stable.residual_batch) == ("distances", "released", 40)
    assert (stable.covariance, stable.plateau_patience, stable.reuse_steps) == ("total", 10, 1)
