"""The learning-rate frontier: what counts as trained, the detrended oscillation, and a tiny whole command."""

from __future__ import annotations

import json

import numpy as np
import pytest

from stabletrain.cli.main import run
from stabletrain.diffusion.frontier import Cell, _around_line, frontier_table, joined


def cell() -> Cell:
    final = np.array([[0.2, 0.9], [0.3, 0.4], [np.nan, np.inf]])
    return Cell("cs", 12, (1e-3, 1e-2, 1e-1), final, np.full((3, 2), 0.01), np.array([[-1, -1], [-1, -1], [7, 0]]))


def test_a_run_trains_when_its_loss_is_finite_and_low():
    assert cell().trains(0.5).tolist() == [[True, False], [True, True], [False, False]]
    assert cell().largest_rate(0.5) == [1e-2, 1e-2]
    assert cell().largest_rate(0.1) == [0.0, 0.0]  # none does


def test_what_is_not_finite_is_none_in_the_document_and_out_of_the_table():
    numbers = cell().numbers(0.5)
    assert numbers["final_loss"][2] == [None, None]
    json.dumps(numbers, allow_nan=False)
    assert "| 12 | CS | 0.01 | 0.01, 0.01 | 0.3500 | 0.01 | 0.0100 | 2 of 6 |" in frontier_table([cell()], 0.5)
    assert numbers["first_overflow"][2] == [7, 0]


def test_rates_are_joined_and_taken_out_with_their_rows():
    whole = cell()
    parts = [whole.at((1e-1,)), whole.at((1e-2, 1e-3))]
    assert joined(parts).rates == (1e-1, 1e-2, 1e-3)
    again = joined(parts).at(whole.rates)
    assert json.dumps(again.numbers(0.5)) == json.dumps(whole.numbers(0.5))
    with pytest.raises(ValueError, match="not in tuple"):
        whole.at((2.0,))


def test_oscillation_is_around_the_line():
    place = np.arange(50.0)
    np.testing.assert_allclose(_around_line(np.stack([3 - 0.1 * place, np.ones(50)])), 0.0, atol=1e-12)
    wave = np.where(place % 2 == 0, 1.0, -1.0)
    # alternating signs have unit deviation; fifty of them have a slope of 1e-3 at most
    np.testing.assert_allclose(_around_line((wave + 0.5 * place)[None]), 1.0, rtol=1e-2)


@pytest.mark.slow
def test_the_command_keeps_finished_parts(tmp_path, capsys, monkeypatch):
    from stabletrain.diffusion import frontier as laboratory
    from stabletrain.diffusion.frontier_command import frontier

    preset = tmp_path / "figure.toml"
    preset.write_text("scalings = ['none', 'cs']\nwidth = 64\nbatch = 4\nwarmup = 1\n[small]\nrates = [1e-3, 1e-2]\n")
    out = tmp_path / "out"
    assert frontier(out=out, preset=preset, depths=[1], steps=4, seeds=2, as_json=True, quiet=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["files"] == ["frontier.json", "frontier.md", "frontier.png", "frontier.svg"]
    document = json.loads((out / "frontier.json").read_text())
    assert [np.shape(each["final_loss"]) for each in document["cells"]] == [(2, 2), (2, 2)]
    kept = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    assert frontier(out=out, preset=preset, depths=[1], steps=4, seeds=2, as_json=True, quiet=True) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()} == kept

    trained = []
    monkeypatch.setattr(
        laboratory, "train_cell", lambda *given, **settings: trained.append(given) or cell().at((1e-1,))
    )
    again = {"out": out, "preset": preset, "depths": [1], "steps": 4, "seeds": 2, "as_json": True, "quiet": True}
    assert frontier(**again, rates=[1e-2, 1e-1]) == 0
    assert trained == [("none", 1, [1e-1]), ("cs", 1, [1e-1])], "only the rate that was missing"
    longer = json.loads((out / "frontier.json").read_text())
    assert longer["cells"][0]["final_loss"][0] == document["cells"][0]["final_loss"][1]
    assert longer["cells"][0]["first_overflow"][1] == [7, 0]


def test_a_rate_that_is_far_too_large_overflows_and_a_small_one_does_not():
    from stabletrain.diffusion.frontier import train_cell

    settings = {"kappa": 0.7, "width": 64, "batch": 2, "steps": 8, "warmup": 0, "weight_decay": 0.0, "seeds": 1}
    found = train_cell("none", 1, (1e-3, 1e30), precision="bfloat16", **settings)
    assert found.overflow[0].tolist() == [-1]
    assert found.overflow[1].tolist() == [1]  # the first update has the whole rate, and shows in the step after it
    assert np.isfinite(found.final[0]).all()
    assert found.trains(100.0).tolist() == [[True], [False]]
    warmed = train_cell("none", 1, (1e30,), precision="bfloat16", **(settings | {"warmup": 1}))
    assert warmed.overflow.tolist() == [[2]]  # the first update has rate 0


def test_a_file_as_folder_is_refused(tmp_path, monkeypatch, capsys):
    from stabletrain.diffusion import frontier as laboratory

    def trained(*given, **settings):
        raise AssertionError("trained first")

    monkeypatch.setattr(laboratory, "train_cell", trained)
    (tmp_path / "notes.txt").write_text("mine")
    assert run(["diffusion", "frontier", "--out", str(tmp_path / "notes.txt"), "--quiet"]) == 1
    assert "cannot write" in capsys.readouterr().err
