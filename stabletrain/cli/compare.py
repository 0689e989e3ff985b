"""`stabletrain compare` and `stabletrain report`: finished runs beside each other, on the terminal and as a page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stabletrain.cli.stored import complete_run, find_run
from stabletrain.cli.text import number, print_json
from stabletrain.cli.text import table as text_table
from stabletrain.errors import EXIT_OK, ConfigError, RunDirectoryError

if TYPE_CHECKING:
    from stabletrain.runs.comparison import Comparison, Group, Score, Speed
    from stabletrain.runs.reading import RunData

INDICATORS = ("stability/grad_norm", "stability/feature_norm/middle")
"""Ranges of these are shown side by side, where they were logged."""


def _found(named: list[str]) -> list[RunData]:
    from stabletrain.runs.reading import find_runs, read_run

    paths = []
    for name in named:
        study = next((path for path in (Path(name), Path("runs") / name) if path.is_dir()), None)
        paths += find_runs([study]) if study is not None else [find_run(name)]
    return [read_run(path) for path in dict.fromkeys(paths)]


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Runs or studies; the first group is the baseline.", autocompletion=complete_run
        ),
    ],
    metric: Annotated[
        list[str] | None, typer.Option(help="Metrics to compare. [default: eval/* and train/loss]")
    ] = None,
    score: Annotated[
        list[str] | None, typer.Option(metavar="METRIC=VALUE", help="Steps until a metric is at least this good.")
    ] = None,
    mode: Annotated[
        str, typer.Option(metavar="min|max", help="Whether smaller or larger is better, for --score.")
    ] = "min",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Also draw the curves there, with bands (SVG).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Compare runs: what differs, paired differences with intervals, who diverged, steps to a score, stability."""
    from stabletrain.runs.comparison import compare as compared
    from stabletrain.runs.comparison import steps_to_score

    if mode not in ("min", "max"):
        raise ConfigError(f"unknown mode {mode!r}: min or max")
    data = _found(runs)
    if len(data) < 2:
        raise RunDirectoryError("there is nothing to compare: name at least two runs, or a study of several")
    comparison = compared(data, metric or ())
    wanted = [_threshold(text) for text in score or []]
    speeds = {f"{name} {value:g}": steps_to_score(comparison.groups, name, value, mode) for name, value in wanted}
    files = _draw(comparison, out) if out is not None else []
    if as_json:
        print_json(_document(comparison, speeds, files))
        return EXIT_OK
    sections = [_what_differs(comparison), _how_they_ended(comparison), _scores(comparison)]
    sections += [_speeds(name, found) for name, found in speeds.items()]
    sections += [f"note: {warning}" for warning in comparison.warnings]
    sections.append("\n".join(str(path) for path in files))
    print("\n\n".join(section for section in sections if section))
    return EXIT_OK


def report(
    run: Annotated[
        str, typer.Argument(metavar="RUN|STUDY", help="A run, or a folder of runs.", autocompletion=complete_run)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.html", help="[default: report.html in that folder]")
    ] = None,
) -> int:
    """Write one self-contained HTML page about a run or a study: its ending, stability, events, samples and curves."""
    from stabletrain.runs.reading import is_run
    from stabletrain.runs.report import run_report, study_report, write_report
    from stabletrain.training.run_directory import readable_errors

    data = _found([run])
    folder = next(path for path in (Path(run), Path("runs") / run, data[0].path) if path.is_dir())
    page = run_report(data[0]) if is_run(folder) else study_report(folder.resolve().name, data)
    target = out or folder / "report.html"
    with readable_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_report(target, page)
    print(target)
    return EXIT_OK


def _threshold(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ConfigError(f"--score takes METRIC=VALUE, not {text!r}") from None


def _what_differs(comparison: Comparison) -> str:
    headings = ["option", *(group.label for group in comparison.groups)]
    rows = [[key, *(number(value) if value is not None else "-" for value in values)]
            for key, values in comparison.differences.items()]  # fmt: skip
    return text_table(headings, rows) if rows else "the runs differ in nothing but the seed"


def _how_they_ended(comparison: Comparison) -> str:
    from stabletrain.runs.comparison import stability_counts

    rows = []
    for group in comparison.groups:
        total = len(group.runs)
        events: dict[str, int] = {}
        for run in group.runs:
            for kind, count in stability_counts(run).items():
                events[kind] = events.get(kind, 0) + count
        said = ", ".join(f"{count} {kind}" for kind, count in events.items()) or "undisturbed"
        rows.append([group.label, str(total), f"{group.diverged}/{total}", f"{group.rescued}/{total}", said]
                    + [_range(group, metric) for metric in INDICATORS])  # fmt: skip
    shown = [metric for index, metric in enumerate(INDICATORS) if any(row[5 + index] for row in rows)]
    kept = [[*row[:5], *(row[5 + INDICATORS.index(metric)] for metric in shown)] for row in rows]
    return text_table(["group", "runs", "diverged", "rescued", "events", *(f"{m}, range" for m in shown)], kept)


def _range(group: Group, metric: str) -> str:
    values = [value for run in group.runs for value in run.curve(metric)[1] if math.isfinite(value)]
    return f"{number(float(min(values)))} to {number(float(max(values)))}" if values else ""


def _scores(comparison: Comparison) -> str:
    rows = []
    for score in comparison.scores:
        summary = score.summary
        spread = f" ± {number(summary.std)}" if math.isfinite(summary.std) else ""
        mean = f"{number(summary.mean)}{spread} ({summary.count}/{summary.total})" if summary.count else "-"
        rows.append([score.metric, score.group, mean, *_difference(score)])
    return text_table(["metric", "group", "mean ± std (n)", "minus first [95 %]", "sign p", "Wilcoxon p"], rows)


def _difference(score: Score) -> list[str]:
    paired = score.paired
    if paired is None or not paired.pairs:
        return ["", "", ""]
    low, high = paired.interval
    interval = f" [{low:+.4g}, {high:+.4g}]" if math.isfinite(low) else ""
    tests = [f"{p:.3g}" if math.isfinite(p) else "" for p in (paired.sign_p, paired.wilcoxon_p)]
    return [f"{paired.mean:+.4g}{interval}", *tests]


def _speeds(name: str, speeds: list[Speed]) -> str:
    rows = []
    for speed in speeds:
        steps = ", ".join(f"{step:,.0f}" if math.isfinite(step) else "never" for step in speed.steps)
        ratio = f"{speed.speedup:.2f}" if math.isfinite(speed.speedup) else "-"
        rows.append([speed.group, f"{speed.reached}/{len(speed.steps)}", steps, ratio])
    return text_table([f"steps to {name}", "reached", "per run", "first / this"], rows)


def _draw(comparison: Comparison, folder: Path) -> list[Path]:
    from stabletrain.runs.figures import curves_figure

    folder.mkdir(parents=True, exist_ok=True)
    lines = {"": {group.label: group.runs for group in comparison.groups}}
    metrics = dict.fromkeys([*(score.metric for score in comparison.scores), *INDICATORS])
    written = []
    for metric in metrics:
        svg = curves_figure(lines, metric)
        if svg:
            written.append(folder / f"{metric.replace('/', '-')}.svg")
            written[-1].write_text(svg, encoding="utf-8")
    return written


def _document(comparison: Comparison, speeds: dict[str, list[Speed]], files: list[Path]) -> dict[str, Any]:
    first = comparison.groups[0].runs[0]
    scores = [
        {
            "metric": score.metric,
            "group": score.group,
            "mean": score.summary.mean,
            "std": score.summary.std,
            "n": score.summary.count,
            "asked": score.summary.total,
            "paired": None if score.paired is None else vars(score.paired),
        }
        for score in comparison.scores
    ]
    groups = [
        {"label": g.label, "runs": [r.path for r in g.runs], "diverged": g.diverged, "rescued": g.rescued}
        for g in comparison.groups
    ]
    return {
        "run_dir": first.path,
        "status": first.state,
        "step": int(first.status.get("step", 0)),
        "metrics": {},
        "groups": groups,
        "differences": comparison.differences,
        "scores": scores,
        "steps_to_score": {name: [vars(speed) for speed in found] for name, found in speeds.items()},
        "warnings": comparison.warnings,
        "figures": files,
    }
