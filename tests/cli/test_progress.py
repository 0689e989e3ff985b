"""What is told while a run goes on, and how numbers and curves are written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from stabletrain.cli import progress
from stabletrain.cli.progress import (
    BarReporter,
    LineReporter,
    Meter,
    SilentReporter,
    event_text,
    main_loss,
    make_reporter,
)
from stabletrain.cli.sparkline import BARS, NOT_FINITE, sparkline
from stabletrain.cli.text import duration, number, pairs, size, table
from stabletrain.training.experiment import Outcome


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


OUTCOME = Outcome(Path("run"), "done", 100, {}, 0)


def drive(reporter: Any, clock: Clock) -> None:
    """A short run: 60 steps at 2 a second, a spike, an evaluation of 30 seconds."""
    with reporter:
        reporter.event({"step": 0, "kind": "resume", "message": "resumed from step 0"})
        reporter.started(run_dir=Path("run"), first_step=0, total_steps=100, notes=["resumed from step 0"])
        for step in range(1, 61):
            clock.now += 0.5
            reporter.progressed(step=step)
            if step % 20 == 0:
                reporter.logged(step=step, row={"step": step, "train/loss": 1.0 / step})
        reporter.event({"step": 33, "kind": "spike", "message": "the loss is 9, 12 deviations above its median"})
        reporter.event({"step": 60, "kind": "checkpoint"})
        for part in range(3):
            clock.now += 10.0
            reporter.working("samples", part, 3)
        reporter.logged(step=60, row={"step": 60, "train/loss": 0.5, "eval/score": 0.25})
        reporter.finished(OUTCOME)


def test_lines_come_every_ten_seconds_and_at_evaluations_and_events_always(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    drive(LineReporter(stream), Clock(monkeypatch))
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["run: step 0 of 100", "resumed from step 0"]
    assert lines[2].startswith("step 20/100")
    assert lines[3] == "step 40/100  loss 0.05  2 steps/s  30 s left"
    assert "step 33: spike: the loss is 9, 12 deviations above its median" in lines
    assert not any("checkpoint" in line for line in lines)
    assert sum("samples" in line for line in lines) == 3
    # The evaluation's half minute does not count as training.
    assert lines[-1] == "step 60/100  loss 0.5  2 steps/s  20 s left  score 0.25"
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_bars_show_time_left_throughput_loss_curve_and_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    terminal = Terminal()
    reporter = BarReporter(terminal)
    drive(reporter, Clock(monkeypatch))
    text = terminal.getvalue()
    assert "step 33: spike" in text
    assert "step 60: score 0.25" in text
    facts = reporter._facts(60)
    assert "20 s left" in facts
    assert "2 steps/s" in facts
    assert "loss 0.5 " in facts
    assert any(bar in facts for bar in BARS)
    assert "score 0.25" in facts


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    drive(BarReporter(terminal), Clock(monkeypatch))
    # 3x and 9x are the codes of colours; moving the cursor is no colour.
    import re

    assert not re.search(r"\x1b\[[0-9;]*\b(3\d|9\d|38;5;\d+)m", terminal.getvalue())


def test_the_stream_decides_how_progress_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_reporter(quiet=False, stream=Terminal()), BarReporter)
    assert isinstance(make_reporter(quiet=False, stream=io.StringIO()), LineReporter)
    assert isinstance(make_reporter(quiet=True, stream=Terminal()), SilentReporter)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_reporter(quiet=False, stream=Terminal()), LineReporter)


def test_quiet_is_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    drive(SilentReporter(), Clock(monkeypatch))
    assert capsys.readouterr() == ("", "")


def test_the_meter_starts_anew_after_a_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, meter = Clock(monkeypatch), Meter()
    for step in (10, 20, 30):
        clock.now += 1.0
        meter.at(step)
    assert meter.rate == pytest.approx(10.0)
    clock.now += 1.0
    meter.at(5)
    assert meter.rate is None
    clock.now += 1.0
    meter.at(10)
    assert meter.rate == pytest.approx(5.0)


def test_the_loop_s_own_measure_counts_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, meter = Clock(monkeypatch), Meter()
    meter.at(0)
    clock.now += 0.1
    meter.at(1000)
    assert meter.rate is None, "a thousand steps were queued, not done"
    meter.read({"perf/step_seconds": 0.25})
    assert meter.rate == 4.0


@pytest.mark.parametrize(
    ("names", "loss"),
    [
        (["train/learning_rate", "train/loss"], "train/loss"),
        (["train/rate", "train/critic_loss", "eval/loss"], "train/critic_loss"),
        (["train/energy"], "train/energy"),
        (["eval/loss"], None),
    ],
)
def test_the_loss_is_found_by_name(names: list[str], loss: str | None) -> None:
    assert main_loss(dict.fromkeys(names, 1.0)) == loss


def test_an_event_says_its_message_and_its_numbers() -> None:
    event = {"step": 7, "time": "now", "kind": "rollback", "message": "back to step 5", "to": 5, "tensors": ["a"]}
    assert event_text(event) == "step 7: rollback: back to step 5; to 5"
    assert event_text({"step": 7, "kind": "skip"}) == "step 7: skip"


# --- text -------------------------------------------------------------------------------------------------------------


def test_a_sparkline_goes_from_the_lowest_bar_to_the_highest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BARS
    assert sparkline([1.0, 1.0, 1.0]) == BARS[0] * 3
    assert len(sparkline(range(1000), 16)) == 16


def test_a_sparkline_is_logarithmic_over_a_wide_range() -> None:
    halving = [2.0**-n for n in range(8)]
    assert sparkline(halving) == BARS[::-1]


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_a_cross_and_does_not_move_the_others(bad: float | None) -> None:
    assert sparkline([0.0, bad, 7.0]) == BARS[0] + NOT_FINITE + BARS[-1]
    assert sparkline([bad, bad]) == NOT_FINITE * 2


def test_fewer_than_two_values_draw_nothing() -> None:
    assert sparkline([]) == sparkline([1.0]) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min"), (125, "2 min 5 s"), (7200, "2 h"), (90_000, "1 d 1 h"), (-3, "0 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_and_sizes() -> None:
    assert [number(value) for value in (0.12345678, 1234567, None, float("nan"), True, "x")] == [
        "0.1235", "1,234,567", "not finite", "not finite", "True", "x",
    ]  # fmt: skip
    assert [size(value) for value in (12, 1500, 2_500_000, 3e9, 4e12)] == ["12 B", "1.5 kB", "2.5 MB", "3 GB", "4 TB"]


def test_tables_and_pairs_are_aligned_without_trailing_blanks() -> None:
    assert table(("a", "bb"), [("ccc", "d"), ("e", "")]) == "a    bb\nccc  d\ne"
    assert pairs({"a": "1\n2", "bb": ""}) == "a   1\n    2\nbb"
