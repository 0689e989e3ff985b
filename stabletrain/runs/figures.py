"""Figures of runs as SVG: curves with confidence bands, one line per method, a panel per group."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabletrain.runs.reading import RunData
from stabletrain.runs.statistics import confidence_band

# Okabe and Ito's palette: told apart with every common form of colour blindness, and on white and on black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#9A8C00", "#7F7F7F")
EVENT_COLOURS = {
    "spike": "#E69F00",
    "skip": "#D55E00",
    "clip": "#CC79A7",
    "rollback": "#D55E00",
    "nonfinite": "#B00020",
    "blowup": "#B00020",
}


@dataclass(frozen=True)
class Band:
    """A metric over steps for runs of one method: mean and 95 % Student's t band, and how many runs it holds."""

    steps: NDArray
    mean: NDArray
    low: NDArray
    high: NDArray
    runs: int


def band(runs: Sequence[RunData], metric: str, *, log: bool = False) -> Band | None:
    """The band over the union of logged steps; None when no run logged the metric.

    With `log`, mean and band are those of the logarithms: a geometric mean, and a band that stays positive.
    """
    curves = [run.curve(metric) for run in runs]
    curves = [(steps, values) for steps, values in curves if steps.size]
    if not curves:
        return None
    steps = np.unique(np.concatenate([steps for steps, _ in curves]))
    grid = np.full((len(curves), steps.size), np.nan)
    for index, (own_steps, values) in enumerate(curves):
        grid[index, np.searchsorted(steps, own_steps)] = values
    if log:
        grid = np.log(np.where(grid > 0, grid, np.nan))
    mean, low, high = (np.exp(part) if log else part for part in confidence_band(grid))
    return Band(steps, mean, low, high, len(curves))


def curves_figure(
    panels: Mapping[str, Mapping[str, Sequence[RunData]]],
    metric: str,
    *,
    label: str = "",
    log: bool = False,
    events: bool = False,
) -> str | None:
    """An SVG of a metric over steps. `panels`: panel title -> line label -> runs (one seed each).

    Shares the vertical axis between panels. With `events`, spikes and interventions are marked where they happened.
    Returns None when no run logged the metric.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bands = {
        title: {name: found for name, runs in lines.items() if (found := band(runs, metric, log=log))}
        for title, lines in panels.items()
    }
    if not any(bands.values()):
        return None
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(max(5.2, 3.9 * len(panels)), 3.1), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (title, lines) in zip(axes[0], bands.items(), strict=True):
        for name, one in lines.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            many = f" (n={one.runs})" if one.runs > 1 else ""
            axis.plot(one.steps, one.mean, color=colour, label=f"{name}{many}", linewidth=1.4)
            if one.runs > 1:
                axis.fill_between(one.steps, one.low, one.high, color=colour, alpha=0.18, linewidth=0)
        if events:
            _mark_events(axis, [run for runs in panels[title].values() for run in runs])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        if log:
            axis.set_yscale("log")
            _show_the_means(axis, [value for one in lines.values() for value in one.mean])
        axis.grid(alpha=0.25, linewidth=0.6)
        if lines:
            axis.legend(fontsize=8, frameon=False)
    axes[0][0].set_ylabel(label or metric)
    return _svg(figure, plt)


def _show_the_means(axis: Any, means: Sequence[float]) -> None:
    """Bounds a logarithmic axis by the means: the band of three runs may span many more decades than they do."""
    finite = [value for value in means if np.isfinite(value) and value > 0]
    if finite:
        axis.set_ylim(min(finite) / 3, max(finite) * 3)


def _mark_events(axis: Any, runs: Sequence[RunData]) -> None:
    for run in runs:
        for event in run.events:
            colour = EVENT_COLOURS.get(str(event.get("kind")))
            if colour and event.get("step") is not None:
                axis.axvline(event["step"], color=colour, alpha=0.5, linewidth=0.8, linestyle=":")


def _svg(figure: Any, plt: Any) -> str:
    """The figure as an SVG element, deterministic and without an XML header, to stand inside a page or a file."""
    stream = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "stabletrain", "svg.fonttype": "path"}):
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)
    text = stream.getvalue()
    return text[text.index("<svg") :]
