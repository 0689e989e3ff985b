"""One self-contained HTML file about a run or a study: no network, no script from elsewhere, light and dark, any width.

Figures are inline SVG, images are inline PNG. What stands first is what to look at first: how it ended, how stable it
was, and what happened when.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stabletrain.runs.comparison import Comparison, Group, compare, stability_counts
from stabletrain.runs.figures import curves_figure
from stabletrain.runs.reading import RunData

MAX_IMAGES = 6
MAX_EVENTS = 60
STABILITY_PANELS = 6
LONG_TEXT = 48

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #5b6470; --line: #d9dee4; --card: #f5f7f9;
        --good: #1a7f37; --bad: #b3261e; --warn: #8a5a00; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --paper: #14171b; --soft: #9aa4af; --line: #333a42; --card: #1d2127;
          --good: #57c77a; --bad: #ff8a80; --warn: #e9b44c; --accent: #56b4e9; }
  figure.plot svg { filter: invert(0.9) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1.1rem 4rem; max-width: 72rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.45rem; margin: .4rem 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
p.lead { color: var(--soft); margin: 0 0 1rem; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .55rem .7rem; }
.card b { display: block; font-size: 1.15rem; overflow-wrap: anywhere; }
.card span { color: var(--soft); font-size: .82rem; overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; min-width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top;
         white-space: nowrap; }
td.text { white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: .8rem 0; } figcaption { color: var(--soft); font-size: .82rem; overflow-wrap: anywhere; }
figure.plot svg { width: 100%; height: auto; max-width: 46rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .4rem 1rem; }
figure.sample img { max-width: 100%; height: auto; image-rendering: pixelated; border: 1px solid var(--line); }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .8rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem; overflow-x: auto;
      font-size: .82rem; }
details > summary { cursor: pointer; color: var(--accent); margin: .6rem 0; }
"""


def run_report(run: RunData) -> str:
    """The page about one run."""
    body = [
        _header(run.name, _subtitle(run)),
        _section("How it ended", _ending(run)),
        _section("How stable it was", _stability(run)),
        _section("Curves", _curves({"": {run.config.get("method", run.name): [run]}}, run.metric_names(), events=True)),
        _section("What happened when", _events(run)),
        _section("Samples", _samples(run)),
        _section("Scores", _scores(run)),
        _section("What was run", _configuration(run)),
        _section("Environment", _environment(run.record)),
        _section("How to repeat it", _repeat([run])),
    ]
    return _page(run.name, body)


def study_report(name: str, runs: Sequence[RunData]) -> str:
    """The page about several runs: groups by configuration, paired differences, curves with bands."""
    comparison = compare(runs)
    lines: dict[str, Sequence[RunData]] = {group.label: group.runs for group in comparison.groups}
    metrics = sorted({metric for run in runs for metric in run.metric_names()}, key=_natural)
    counted = "one group" if len(comparison.groups) == 1 else f"{len(comparison.groups)} groups"
    body = [
        _header(name, f"{len(runs)} runs in {counted}, seeds {_ranges(comparison.seeds)}"),
        "".join(f'<p class="warn">{_text(warning)}</p>' for warning in comparison.warnings),
        _section("What differs", _differences(comparison)),
        _section("How they ended", _endings(comparison.groups)),
        _section("Scores", _paired_scores(comparison)),
        _section("Curves", _curves({"": lines}, metrics, events=False)),
        _section("Samples", "".join(_last_sample(group) for group in comparison.groups)),
        _section("Environment", _environment(runs[0].record)),
        _section("How to repeat it", _repeat(runs)),
    ]
    return _page(name, body)


def write_report(path: Path, page: str) -> None:
    """Writes the page atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def _page(title: str, body: Sequence[str]) -> str:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)} · stabletrain</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(part for part in body if part)
        + f'\n<p class="lead">Written by stabletrain on {now}.</p></body></html>\n'
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _header(title: str, lead: str) -> str:
    return f'<h1>{_text(title)}</h1><p class="lead">{_text(lead)}</p>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>" if content else ""


def _subtitle(run: RunData) -> str:
    dataset = run.config.get("data") or run.config.get("dataset", "")
    started = run.record.get("started", "")
    return f"{run.family} on {dataset}, seed {run.seed}" + (f", started {started}" if started else "")


def _card(value: str, label: str, tone: str = "") -> str:
    return f'<div class="card"><b class="{tone}">{_text(value)}</b><span>{_text(label)}</span></div>'


_TONES = {"done": "good", "diverged": "bad", "failed": "bad", "preempted": "warn", "running": "warn"}


def _ending(run: RunData) -> str:
    cards = [_card(run.state, run.status.get("reason") or "status", _TONES.get(run.state, ""))]
    cards.append(_card(f"{run.status.get('step', 0)} / {run.config.get('steps', '?')}", "steps"))
    for metric in ["train/loss", *(name for name in run.metric_names() if name.startswith("eval/"))][:6]:
        _, values = run.curve(metric)
        if values.size:
            cards.append(_card(_number(values[-1]), metric))
    seconds = run.record.get("wall_seconds")
    if seconds:
        cards.append(_card(_duration(seconds), "wall time"))
    if run.record.get("parameter_count"):
        cards.append(_card(f"{run.record['parameter_count']:,}", "parameters"))
    return f'<div class="cards">{"".join(cards)}</div>'


def _stability(run: RunData) -> str:
    counts = stability_counts(run)
    names = {
        "spike": "loss spikes",
        "nonfinite": "non-finite steps",
        "blowup": "blow-ups",
        "skip": "updates skipped",
        "clip": "updates clipped",
        "rollback": "rollbacks",
    }
    cards = [
        _card(str(counts.get(kind, 0)), label, "warn" if counts.get(kind) else "good") for kind, label in names.items()
    ]
    for metric in ("stability/grad_norm", "stability/feature_norm/middle"):
        _, values = run.curve(metric)
        finite = values[[math.isfinite(value) for value in values]]
        if finite.size:
            cards.append(_card(f"{_number(finite.min())} to {_number(finite.max())}", f"{metric}, range"))
    policy = (
        f"Policies: on a spike {run.config.get('on_spike')}, on a non-finite value {run.config.get('on_nonfinite')}."
    )
    return f'<div class="cards">{"".join(cards)}</div><p class="lead">{_text(policy)}</p>'


def _chosen_metrics(names: Sequence[str]) -> list[str]:
    losses = sorted((name for name in names if name.startswith("train/") and "loss" in name), key=len)[:2]
    scores = [name for name in names if name.startswith("eval/")][:4]
    norms = [name for name in names if name.startswith("stability/")]
    totals = [name for name in norms if name.count("/") == 1]
    features = [name for name in norms if name.startswith("stability/feature_norm/")]
    return losses + scores + list(dict.fromkeys([*totals, *features]))[:STABILITY_PANELS]


def _curves(panels: Mapping[str, Mapping[str, Sequence[RunData]]], metrics: Sequence[str], *, events: bool) -> str:
    figures = []
    for metric in _chosen_metrics(metrics):
        curves = [run.curve(metric) for lines in panels.values() for runs in lines.values() for run in runs]
        finite = [value for _, values in curves for value in values if math.isfinite(value)]
        if not finite or len({step for steps, _ in curves for step in steps.tolist()}) < 2:
            continue  # one point is no curve: it stands under the scores
        positive = [value for value in finite if value > 0]
        log = min(finite) >= 0 and bool(positive) and max(positive) > 30 * min(positive)
        svg = curves_figure(panels, metric, log=log, events=events)
        if svg:
            figures.append(f'<figure class="plot">{svg}<figcaption>{_text(metric)}</figcaption></figure>')
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def _events(run: RunData) -> str:
    if not run.events:
        return "<p>No events were recorded.</p>"
    shown = [event for event in run.events if event.get("kind") != "checkpoint"][:MAX_EVENTS]
    rows = []
    for event in shown:
        details = {key: value for key, value in event.items() if key not in ("step", "time", "kind", "message")}
        text = event.get("message") or ", ".join(f"{key} {_compact(value)}" for key, value in details.items())
        rows.append([str(event.get("step", "")), str(event.get("kind", "")), text])
    checkpoints = sum(event.get("kind") == "checkpoint" for event in run.events)
    more = len(run.events) - checkpoints - len(shown)
    note = f"{checkpoints} checkpoints" + (f", and {more} more events in events.jsonl" if more > 0 else "")
    return _table(["step", "event", "details"], rows) + f'<p class="lead">{note}.</p>'


def _samples(run: RunData) -> str:
    pictures = sorted((run.path / "samples").glob("*.png"), key=lambda path: _natural(path.name))
    if not pictures:
        return ""
    keep = pictures if len(pictures) <= MAX_IMAGES else [*pictures[:1], *pictures[-(MAX_IMAGES - 1) :]]
    return f'<div class="samples">{"".join(_picture(path, path.stem) for path in keep)}</div>'


def _last_sample(group: Group) -> str:
    for run in group.runs:
        pictures = sorted((run.path / "samples").glob("*.png"), key=lambda path: _natural(path.name))
        if pictures:
            return _picture(pictures[-1], f"{group.label}, seed {run.seed}, {pictures[-1].stem}")
    return ""


def _natural(name: str) -> list[Any]:
    """A key by which skip_2 comes before skip_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _picture(path: Path, label: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{_text(label)}" src="data:image/png;base64,{data}">'
    return f'<figure class="sample">{image}<figcaption>{_text(label)}</figcaption></figure>'


def _scores(run: RunData) -> str:
    rows = []
    for metric in run.metric_names():
        if metric.startswith("eval/"):
            steps, values = run.curve(metric)
            rows.append([metric, _number(values[-1]), str(steps[-1]), _number(values.min()), _number(values.max())])
    return _table(["metric", "last", "at step", "smallest", "largest"], rows, numbers=4) if rows else ""


def _differences(comparison: Comparison) -> str:
    """One row a group, one column an option: there are often many groups, and they differ in few options."""
    if not comparison.differences:
        return "<p>Nothing but the seed.</p>"
    headings = ["group", *comparison.differences]
    columns = comparison.differences.values()
    rows = [
        [group.label, *("not set" if values[i] is None else _compact(values[i]) for values in columns)]
        for i, group in enumerate(comparison.groups)
    ]
    return _table(headings, rows)


def _endings(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        total = len(group.runs)
        states = ", ".join(f"{sum(run.state == state for run in group.runs)} {state}" for state in _states(group))
        rows.append([group.label, str(total), states, f"{group.diverged}/{total}", f"{group.rescued}/{total}"])
    return _table(["group", "runs", "ended as", "diverged", "rescued by a policy"], rows)


def _states(group: Group) -> list[str]:
    return list(dict.fromkeys(run.state for run in group.runs))


def _paired_scores(comparison: Comparison) -> str:
    rows = []
    for score in comparison.scores:
        summary, paired = score.summary, score.paired
        spread = f" ± {_number(summary.std)}" if math.isfinite(summary.std) else ""
        row = [score.metric, score.group, f"{_number(summary.mean)}{spread} ({summary.count}/{summary.total})", "", ""]
        if paired and paired.pairs:
            low, high = paired.interval
            row[3] = f"{_number(paired.mean, True)} [{_number(low, True)}, {_number(high, True)}]"
            row[4] = f"{paired.wins} smaller, {paired.losses} larger; sign test p = {paired.sign_p:.2g}"
        rows.append(row)
    headings = ["metric", "group", "mean ± std (n)", "minus first group, paired [95 %]", "pairs"]
    return _table(headings, rows)


def _configuration(run: RunData) -> str:
    rows = [[key, _compact(value)] for key, value in run.config.items()]
    return f"<details><summary>{len(rows)} options</summary>{_table(['option', 'value'], rows)}</details>"


def _environment(record: Mapping[str, Any]) -> str:
    rows = [[key, _compact(value)] for key, value in record.items() if key not in ("command", "sessions")]
    return (
        f"<details><summary>Versions, devices, data</summary>{_table(['fact', 'value'], rows)}</details>"
        if rows
        else ""
    )


def _repeat(runs: Sequence[RunData]) -> str:
    commands = []
    for run in runs:
        command = run.record.get("command")
        commands.append(
            " ".join(command) if isinstance(command, list) else str(command or f"stabletrain resume {run.name}")
        )
    return f"<pre>{_text(chr(10).join(dict.fromkeys(commands)))}</pre>"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """A table that scrolls sideways on a narrow screen; the last `numbers` columns are aligned as numbers."""
    head = "".join(f"<th>{_text(heading)}</th>" for heading in headings)
    first = len(headings) - numbers
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=number' if index >= first else ''}>{_text(value)}</td>" for index, value in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell_class(value: str, is_number: bool) -> str:
    """Numbers are aligned; long texts may break, so that one of them does not make the table endless."""
    return " class=number" if is_number else " class=text" if len(value) > LONG_TEXT else ""


def _number(value: float, sign: bool = False) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:+.4g}" if sign else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _compact(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _ranges(seeds: Sequence[int]) -> str:
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}-{seeds[-1]}"
    return ", ".join(map(str, seeds))
