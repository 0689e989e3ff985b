"""What a person sees of a run while it goes on, on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TextIO

from stabletrain.cli.sparkline import sparkline
from stabletrain.cli.text import draws_unicode, duration, is_terminal, number
from stabletrain.training.experiment import Outcome, Reporter

LINE_SECONDS = 10.0
RATE_SECONDS = 30.0
LEAST_SECONDS = 1.0  # steps are queued: the first ones come back faster than they are done
CURVE_POINTS = 512
ORDINARY_EVENTS = ("start", "checkpoint", "evaluation", "best", "done")
"""Events of every run, which are not told one by one."""


class OpenReporter(Reporter, Protocol):
    """A reporter that holds the terminal while it is entered."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def note(self, text: str) -> None:
        """Says something before a run has started."""


def make_reporter(*, quiet: bool, stream: TextIO | None = None) -> OpenReporter:
    """The reporter for this stream (stderr): nothing, bars on a terminal, or lines."""
    stream = sys.stderr if stream is None else stream
    if quiet:
        return SilentReporter()
    return BarReporter(stream) if is_terminal(stream) else LineReporter(stream)


def main_loss(row: Mapping[str, Any]) -> str | None:
    """The name of the metric that stands for the course of training: the loss."""
    names = [name for name in row if name.startswith("train/")]
    losses = [name for name in names if "loss" in name]
    return next(iter([*[name for name in losses if name == "train/loss"], *losses, *names]), None)


def evaluations(row: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation's scalars of a row, without the prefix."""
    return {name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/")}


def listed(metrics: Mapping[str, Any]) -> str:
    """`loss_test 0.043, accuracy 0.93`."""
    return ", ".join(f"{name} {number(value)}" for name, value in metrics.items())


def event_text(event: Mapping[str, Any]) -> str:
    """An event in one line: what happened at which step, and the details that it carries."""
    details = {key: value for key, value in event.items() if key not in ("step", "time", "kind", "nonfinite")}
    spoken = [str(details.pop(key)) for key in ("message", "reason") if details.get(key)]
    scalars = {key: value for key, value in details.items() if isinstance(value, (int, float, str)) and value != ""}
    named = [f"{key} {number(value)}" for key, value in scalars.items()]
    rest = "; ".join([*spoken, ", ".join(named)] if named else spoken)
    return f"step {event['step']}: {event['kind']}" + (f": {rest}" if rest else "")


class Meter:
    """Steps per second of training alone: compiling and evaluating are left out."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._last: float | None = None
        self._points: deque[tuple[float, int]] = deque()
        self._told: float | None = None

    def at(self, step: int) -> None:
        """The run is at this step now."""
        now = time.monotonic()
        if self._points and step < self._points[-1][1]:  # a rollback
            self._points.clear()
        if self._last is not None:
            self._seconds += now - self._last
        self._last = now
        self._points.append((self._seconds, step))
        while self._seconds - self._points[0][0] > RATE_SECONDS and len(self._points) > 2:
            self._points.popleft()

    def pause(self) -> None:
        """What follows is no training, until the next step."""
        self._last = None

    def read(self, row: Mapping[str, Any]) -> None:
        """Takes over what the loop measured, which knows when a step was done and not only when it was asked for."""
        seconds = row.get("perf/step_seconds")
        self._told = 1.0 / seconds if seconds else None

    @property
    def rate(self) -> float | None:
        """Steps per second; None before there is enough to measure."""
        if self._told is not None:
            return self._told
        if not self._points or self._points[-1][0] - self._points[0][0] < LEAST_SECONDS:
            return None
        (begun, first), (ended, last) = self._points[0], self._points[-1]
        return (last - first) / (ended - begun)


class SilentReporter:
    """Says nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def note(self, text: str) -> None: ...

    def started(self, *, run_dir: Path, first_step: int, total_steps: int, notes: list[str]) -> None: ...

    def logged(self, *, step: int, row: Mapping[str, Any]) -> None: ...

    def progressed(self, *, step: int) -> None: ...

    def event(self, event: Mapping[str, Any]) -> None: ...

    def working(self, label: str, done: int, total: int) -> None: ...

    def finished(self, outcome: Outcome) -> None: ...


class LineReporter:
    """One line about every ten seconds and at each evaluation, and a line per event."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._meter = Meter()
        self._total = 0
        self._begun = False
        self._said_at = 0.0
        self._row: Mapping[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def _say(self, text: str) -> None:
        self._said_at = time.monotonic()
        print(text, file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Says it at once."""
        self._say(text)

    def started(self, *, run_dir: Path, first_step: int, total_steps: int, notes: list[str]) -> None:
        """Says where the run is and what is unusual about its beginning."""
        self._total, self._begun = total_steps, True
        self._say(f"{run_dir}: step {first_step} of {total_steps}")
        for note in notes:
            self._say(note)

    def progressed(self, *, step: int) -> None:
        """Called after every dispatch."""
        self._meter.at(step)
        if time.monotonic() - self._said_at >= LINE_SECONDS:
            self._say(self._line(step))

    def _line(self, step: int) -> str:
        parts = [f"step {step}/{self._total}"]
        loss = main_loss(self._row)
        if loss is not None:
            parts.append(f"{loss.removeprefix('train/')} {number(self._row[loss])}")
        if rate := self._meter.rate:
            parts += [f"{rate:.3g} steps/s", f"{duration((self._total - step) / rate)} left"]
        return "  ".join(parts)

    def logged(self, *, step: int, row: Mapping[str, Any]) -> None:
        """Called after every row of metrics."""
        self._row = row
        self._meter.read(row)
        found = evaluations(row)
        if found:
            self._say(f"{self._line(step)}  {listed(found)}")
        elif step == self._total:
            self._say(self._line(step))

    def event(self, event: Mapping[str, Any]) -> None:
        """Says what is out of the ordinary. What happens before `started` is among its notes."""
        if self._begun and event["kind"] not in ORDINARY_EVENTS:
            self._say(event_text(event))

    def working(self, label: str, done: int, total: int) -> None:
        """Called often during evaluations."""
        self._meter.pause()
        if time.monotonic() - self._said_at >= LINE_SECONDS:
            self._say(f"{label}: {done}/{total}")

    def finished(self, outcome: Outcome) -> None:
        """The summary is printed by the command."""


class BarReporter:
    """A bar with the time left, throughput, the loss and its course; a second one while an evaluation goes on."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._curve_drawn = draws_unicode(stream)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            console=self._console,
            refresh_per_second=5,
            transient=True,
        )
        self._meter = Meter()
        self._training: Any = None
        self._evaluating: Any = None
        self._label = ""
        self._total = 0
        self._losses: deque[float | None] = deque(maxlen=CURVE_POINTS)
        self._loss_text = ""
        self._evaluation = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _say(self, text: str) -> None:
        # No markup: a path or a message may hold brackets.
        self._console.print(text, markup=False)

    def note(self, text: str) -> None:
        """Says it at once."""
        self._say(text)

    def started(self, *, run_dir: Path, first_step: int, total_steps: int, notes: list[str]) -> None:
        """Says where the run is, what is unusual about its beginning, and starts the bar."""
        self._total = total_steps
        self._say(str(run_dir))
        for note in notes:
            self._say(note)
        self._progress.start()
        self._training = self._progress.add_task("training", total=total_steps, completed=first_step, facts="compiling")

    def progressed(self, *, step: int) -> None:
        """Called after every dispatch."""
        self._end_evaluation()
        self._meter.at(step)
        self._progress.update(self._training, completed=step, facts=self._facts(step))

    def _facts(self, step: int) -> str:
        parts = []
        if rate := self._meter.rate:
            parts += [f"{duration((self._total - step) / rate)} left", f"{rate:.3g} steps/s"]
        return "  ".join([*parts, *filter(None, (self._loss_text, self._evaluation))])

    def logged(self, *, step: int, row: Mapping[str, Any]) -> None:
        """Called after every row of metrics."""
        self._meter.read(row)
        loss = main_loss(row)
        if loss is not None:
            self._losses.append(row[loss])
            curve = sparkline(list(self._losses), 16) if self._curve_drawn else ""
            self._loss_text = f"{loss.removeprefix('train/')} {number(row[loss])} {curve}".rstrip()
        found = evaluations(row)
        if found:
            self._evaluation = listed(dict(list(found.items())[:1]))
            self._say(f"step {step}: {listed(found)}")
        self._end_evaluation()
        self._progress.update(self._training, facts=self._facts(step))

    def event(self, event: Mapping[str, Any]) -> None:
        """Says what is out of the ordinary. What happens before `started` is among its notes."""
        if self._training is not None and event["kind"] not in ORDINARY_EVENTS:
            self._say(event_text(event))

    def working(self, label: str, done: int, total: int) -> None:
        """Called often during evaluations."""
        self._meter.pause()
        if self._evaluating is None:
            if not self._progress.live.is_started:
                self._progress.start()
            self._evaluating = self._progress.add_task(label, total=total, facts="")
        self._progress.update(self._evaluating, description=label, completed=done, total=total)

    def _end_evaluation(self) -> None:
        if self._evaluating is not None:
            self._progress.remove_task(self._evaluating)
            self._evaluating = None

    def finished(self, outcome: Outcome) -> None:
        """Takes the bars away; the summary is printed by the command."""
        self._progress.stop()
