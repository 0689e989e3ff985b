"""Pictures of a continual run: the windows of the tasks, and every task's accuracy over time."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from stabletrain.continual.schedule import Schedule
from stabletrain.continual.timeline import Timeline
from stabletrain.metrics.continual import AccuracyMatrix


def _figure(width: float, height: float) -> Any:
    # Without pyplot: no global state, and no window system is looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    # No date and no version: the same run gives the same bytes.
    figure.savefig(stream, format="png", dpi=100, metadata={"Software": None})
    return stream.getvalue()


def colours(tasks: int) -> list[Any]:
    """A colour for each task, the same in every picture."""
    from matplotlib import colormaps

    return [colormaps["tab10" if tasks <= 10 else "tab20"](task % 20) for task in range(tasks)]


def timeline_picture(timeline: Timeline, schedule: Schedule) -> bytes:
    """A bar for each task's window with its classes; below, the tasks active and the gradients at each step."""
    figure = _figure(8, 1.8 + 0.32 * timeline.tasks)
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [max(timeline.tasks, 3), 3]})
    rows = zip(timeline.starts, timeline.durations, timeline.classes, colours(timeline.tasks), strict=True)
    for task, (start, duration, classes, colour) in enumerate(rows):
        above.barh(task, duration, left=start, height=0.7, color=colour)
        shown = ", ".join(map(str, classes)) if len(classes) <= 6 else f"{len(classes)} classes"
        above.text(start + duration / 2, task, shown, ha="center", va="center", fontsize=8)
    above.set_yticks(range(timeline.tasks), [f"task {task}" for task in range(timeline.tasks)])
    above.invert_yaxis()
    steps = np.arange(timeline.steps)
    active = [len(timeline.active(int(step))) for step in steps]
    gradients = [len(schedule.slots(int(step))) for step in steps]
    below.step(steps, gradients, where="post", color="0.6", label="gradients, with the memory's")
    below.step(steps, active, where="post", color="black", label="active tasks")
    below.set_ylim(0, max(gradients) + 0.5)
    below.set_xlabel("step")
    below.legend(fontsize=7, loc="upper right")
    return _png(figure)


def accuracy_picture(timeline: Timeline, matrix: AccuracyMatrix, scenario: str) -> bytes:
    """Test accuracy of each task wherever it was measured, its window thick; the mean of the begun tasks in black."""
    figure = _figure(8, 4)
    axis = figure.subplots()
    steps, values = np.array(matrix.steps, float), matrix.values
    for task, colour in enumerate(colours(timeline.tasks)):
        own = np.isfinite(values[:, task]) if len(steps) else np.zeros(0, bool)
        axis.plot(steps[own], values[own, task], color=colour, marker="o", markersize=2.5, linewidth=1,
                  label=f"task {task}")  # fmt: skip
        inside = own & (steps >= timeline.starts[task]) & (steps <= timeline.ends[task] + 1)
        axis.plot(steps[inside], values[inside, task], color=colour, linewidth=3, alpha=0.5)
    begun = np.isfinite(values).any(1) if len(steps) else np.zeros(0, bool)
    if begun.any():
        axis.plot(steps[begun], np.nanmean(values[begun], 1), color="black", linewidth=1.5, label="mean of those begun")
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("step")
    axis.set_ylabel(f"test accuracy, {scenario}-incremental")
    axis.legend(fontsize=7, ncols=2)
    return _png(figure)
