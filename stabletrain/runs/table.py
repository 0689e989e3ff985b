"""A paper's table from runs: mean +- std (n), best and second, the paper's number beside ours, in four formats."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stabletrain.runs.experiments import Column, PaperValue, Row, TableSpec
from stabletrain.runs.kept import KeptTable
from stabletrain.runs.reading import RunData
from stabletrain.runs.statistics import PairedDifference, Summary, paired_difference, reduce_curve, summarize

DAGGER_NOTE = (
    "† some of these runs diverged, or were rescued by a policy (skip, clip, rollback); the mean is of survivors"
)


@dataclass(frozen=True)
class Cell:
    """One score of one row: over seeds, against the baseline row, beside the paper's number."""

    summary: Summary
    rank: int | None
    """1 for the best mean of the group, 2 for the second; None for the others and for cells without a value."""
    diverged: int
    rescued: int
    never: int
    """Runs that ended without reaching the score of a `steps-to:` column."""
    paired: PairedDifference | None
    paper: PaperValue | None
    values: Mapping[int, float] = field(default_factory=dict)
    """Each seed's number; NaN for a run that is missing or diverged, infinite for one that never got there."""
    without: bool = False
    """The runs of this row cannot have the column's metric."""

    def missing(self, asked: int) -> int:
        """Of the runs asked for, those that neither have a value nor ended without one."""
        return 0 if self.without else asked - self.summary.count - self.diverged - self.never

    @property
    def difference_to_paper(self) -> float:
        """Our mean minus the paper's number; NaN without either."""
        return self.summary.mean - self.paper.value if self.paper else float("nan")


@dataclass(frozen=True)
class Table:
    """Everything that the renderers need."""

    spec: TableSpec
    scale: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    cells: Mapping[tuple[str, str], Cell]
    asked: int
    """Runs asked for in every row."""

    def cell(self, row: Row, column: Column) -> Cell:
        """The cell of a row and a column."""
        return self.cells[row.key, column.label]

    @property
    def complete(self) -> bool:
        """True when every run that was asked for ended, with a value or as diverged."""
        return all(cell.missing(self.asked) <= 0 for cell in self.cells.values())

    @property
    def marked(self) -> bool:
        """True when some cell carries a dagger."""
        return any(cell.diverged or cell.rescued for cell in self.cells.values())


def score(run: RunData, column: Column) -> float:
    """One run's number for a column; NaN when it diverged or did not log the metric.

    A step count (`steps-to:`) of a run that never got there is infinite.
    """
    if run.state != "done":
        return float("nan")
    steps, values = run.curve(column.metric)
    if not steps.size:
        return float("nan")
    return reduce_curve(steps.tolist(), values.tolist(), column.reduce, start=column.start, mode=column.mode)


def build_table(
    spec: TableSpec,
    scale: str,
    runs: Mapping[str, Sequence[RunData]],
    seeds: Sequence[int],
    kept: Sequence[KeptTable] = (),
) -> Table:
    """The table at one scale from the runs of each row (`runs[row.key]`, in any order, any number missing).

    `kept` are tables of other machines, which have none of the runs.
    """
    columns = spec.columns[scale]
    rows = tuple(row for row in spec.rows if scale in row.scales)
    scores = {
        (row.key, column.label): np.array(
            [
                next(
                    (score(run, column) for run in runs.get(row.key, ()) if run.seed == seed),
                    _kept_value(kept, (row.key, column.label), seed),
                )
                for seed in seeds
            ]
        )
        for row in rows
        for column in columns
    }
    cells = {}
    for row in rows:
        of_row = runs.get(row.key, ())
        for column in columns:
            own = scores[row.key, column.label]
            elsewhere = Counter[str]()
            for each in kept:
                elsewhere.update(each.counts[row.key, column.label])
            paired = None
            if row.baseline and row.baseline != row.key and (row.baseline, column.label) in scores:
                paired = paired_difference(own, scores[row.baseline, column.label])
            cells[row.key, column.label] = Cell(
                summary=summarize(own),
                rank=None,
                diverged=sum(run.diverged for run in of_row if run.seed in seeds) + elsewhere["diverged"],
                rescued=sum(bool(run.interventions) for run in of_row if run.seed in seeds) + elsewhere["rescued"],
                never=int(np.isinf(own).sum()) + elsewhere["never"],
                paired=paired,
                paper=row.values.get(column.paper),
                values=dict(zip(seeds, own.tolist())),
                without=column.metric in row.without,
            )
    for column in columns:
        for group in {row.group for row in rows}:
            _rank([row for row in rows if row.group == group], column, cells)
    return Table(spec, scale, columns, rows, cells, len(seeds))


def _kept_value(kept: Sequence[KeptTable], cell: tuple[str, str], seed: int) -> float:
    return next((table.values[cell][seed] for table in kept if seed in table.values[cell]), float("nan"))


def _rank(rows: Sequence[Row], column: Column, cells: dict[tuple[str, str], Cell]) -> None:
    """Marks the best and the second mean of a group. Equal means share a rank; one row alone is not the best."""
    if column.mode == "none" or len(rows) < 2:
        return
    means = {row.key: cells[row.key, column.label].summary.mean for row in rows}
    ordered = sorted({mean for mean in means.values() if math.isfinite(mean)}, reverse=column.mode == "max")
    for row in rows:
        mean = means[row.key]
        if math.isfinite(mean) and mean in ordered[:2]:
            cell = cells[row.key, column.label]
            cells[row.key, column.label] = replace(cell, rank=ordered.index(mean) + 1)


def decimals(summary: Summary, digits: int | None) -> int:
    """Digits after the point: as asked, else so many that the standard deviation shows two significant ones."""
    if digits is not None:
        return digits
    scale = summary.std if math.isfinite(summary.std) and summary.std > 0 else abs(summary.mean) / 100
    if not math.isfinite(scale) or scale <= 0:
        return 3
    return max(0, min(6, 1 - math.floor(math.log10(scale))))


def format_value(summary: Summary, digits: int | None, plus_minus: str) -> str:
    """`mean +- std (n)`; `-` without a value."""
    if not summary.count:
        return "–"
    places = decimals(summary, digits)
    text = f"{summary.mean:.{places}f}"
    if math.isfinite(summary.std):
        text += f" {plus_minus} {summary.std:.{places}f}"
    return f"{text} ({summary.count})"


def _counts(cell: Cell, asked: int) -> str:
    counts = {"diverged": cell.diverged, "rescued": cell.rescued, "never": cell.never, "missing": cell.missing(asked)}
    return ", ".join(f"{count}/{asked} {name}" for name, count in counts.items() if count > 0)


def _against_baseline(cell: Cell, digits: int | None) -> str:
    if cell.paired is None or not cell.paired.pairs:
        return ""
    places = decimals(cell.summary, digits)
    low, high = cell.paired.interval
    if not math.isfinite(low):
        return f"{cell.paired.mean:+.{places}f}"
    return f"{cell.paired.mean:+.{places}f} [{low:+.{places}f}, {high:+.{places}f}]"


def _against_paper(cell: Cell, digits: int | None) -> str:
    if cell.paper is None:
        return ""
    text = f"{cell.paper.value:g}"
    if math.isfinite(cell.difference_to_paper):
        text += f" ({cell.difference_to_paper:+.{decimals(cell.summary, digits)}f})"
    return text


def _headings(table: Table, plus_minus: str) -> list[str]:
    headings = ["method"]
    if any(row.group for row in table.rows):
        headings.insert(0, "group")
    for column in table.columns:
        headings.append(f"{column.label}, mean {plus_minus} std (n)")
        if any(table.cell(row, column).paired for row in table.rows):
            headings.append("minus baseline [95 %]")
        if any(table.cell(row, column).paper for row in table.rows):
            headings.append("paper (ours − paper)")
    return headings


def _body(table: Table, decorate: Any, plus_minus: str) -> list[list[str]]:
    body = []
    for row in table.rows:
        line = [row.label]
        if any(other.group for other in table.rows):
            line.insert(0, row.group)
        for column in table.columns:
            cell = table.cell(row, column)
            text = decorate(format_value(cell.summary, column.digits, plus_minus), cell.rank)
            counts = _counts(cell, table.asked)
            if cell.diverged or cell.rescued:
                text += "†"
            line.append(f"{text} {counts}".strip())
            if any(table.cell(other, column).paired for other in table.rows):
                line.append(_against_baseline(cell, column.digits))
            if any(table.cell(other, column).paper for other in table.rows):
                line.append(_against_paper(cell, column.digits))
        body.append(line)
    return body


def caption(table: Table) -> str:
    """Title, scale, what was measured, where the paper's numbers were read, and what the marks mean."""
    parts = [f"{table.spec.title} ({table.scale} scale). Source: {table.spec.source}."]
    if table.scale in table.spec.caption:
        parts.append(table.spec.caption[table.scale])
    protocols = sorted({column.metric for column in table.columns})
    parts.append("Metrics: " + ", ".join(f"`{name}`" for name in protocols) + ".")
    parts.append("Best of a group bold, second underlined; differences are paired by seed, 95 % bootstrap intervals.")
    read = sorted({value.read for row in table.rows for value in row.values.values()})
    if read:
        parts.append("The paper's numbers were read in: " + "; ".join(read) + ".")
    if table.marked:
        parts.append(DAGGER_NOTE + ".")
    if not table.complete:
        parts.append("**Incomplete**: some runs are still missing.")
    return " ".join(parts)


def to_markdown(table: Table) -> str:
    """GitHub Markdown; bold and underline by `**` and `<u>`."""

    def decorate(text: str, rank: int | None) -> str:
        return f"**{text}**" if rank == 1 else f"<u>{text}</u>" if rank == 2 else text

    lines = [_headings(table, "±"), *_body(table, decorate, "±")]
    rendered = ["| " + " | ".join(line) + " |" for line in lines]
    rendered.insert(1, "|" + "---|" * len(lines[0]))
    text = "\n".join(rendered) + "\n\n" + caption(table) + "\n"
    if table.spec.deviations:
        text += "\nDeviations from the paper:\n" + "".join(f"- {item}\n" for item in table.spec.deviations)
    return text


_LATEX = {
    "&": r"\&",
    "%": r"\%",
    "_": r"\_",
    "#": r"\#",
    "†": r"$^\dagger$",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "κ": r"$\kappa$",
}


def _escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def to_latex(table: Table) -> str:
    """A `table` environment for the booktabs package."""

    def decorate(text: str, rank: int | None) -> str:
        return f"\x01{text}\x03" if rank == 1 else f"\x02{text}\x03" if rank == 2 else text

    def cell(text: str) -> str:
        return _escape(text).replace("\x01", r"\textbf{").replace("\x02", r"\underline{").replace("\x03", "}")

    headings = _headings(table, "±")
    lines = [
        r"\begin{table}",
        r"\centering",
        r"\caption{" + _escape(caption(table).replace("`", "").replace("**", "")) + "}",
        r"\begin{tabular}{" + "l" * len(headings) + "}",
        r"\toprule",
        " & ".join(_escape(heading) for heading in headings) + r" \\",
        r"\midrule",
        *(" & ".join(cell(text) for text in line) + r" \\" for line in _body(table, decorate, "±")),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def to_records(table: Table) -> list[dict[str, Any]]:
    """One record per cell; flat but for `values`, each seed's number. What is not finite is None."""
    records = []
    for row in table.rows:
        for column in table.columns:
            cell = table.cell(row, column)
            paired = cell.paired
            record = {
                "group": row.group,
                "row": row.key,
                "label": row.label,
                "column": column.label,
                "metric": column.metric,
                "reduce": column.reduce,
                "mean": cell.summary.mean,
                "std": cell.summary.std,
                "n": cell.summary.count,
                "asked": table.asked,
                "diverged": cell.diverged,
                "rescued": cell.rescued,
                "never": cell.never,
                "rank": cell.rank,
                "baseline": row.baseline if paired else None,
                "difference": paired.mean if paired else None,
                "difference_low": paired.interval[0] if paired else None,
                "difference_high": paired.interval[1] if paired else None,
                "pairs": paired.pairs if paired else None,
                "sign_test_p": paired.sign_p if paired else None,
                "wilcoxon_p": paired.wilcoxon_p if paired else None,
                "paper": cell.paper.value if cell.paper else None,
                "paper_read": cell.paper.read if cell.paper else None,
                "values": {str(seed): _finite_or_none(value) for seed, value in cell.values.items()},
            }
            records.append({key: _finite_or_none(value) for key, value in record.items()})
    return records


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_csv(table: Table) -> str:
    """One line per cell, without the numbers of the single seeds."""
    records = [{key: value for key, value in record.items() if key != "values"} for record in to_records(table)]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(records[0]) if records else ["row"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()


def to_json(table: Table) -> str:
    """Caption, completeness and one record per cell."""
    document = {
        "table": table.spec.name,
        "scale": table.scale,
        "complete": table.complete,
        "caption": caption(table),
        "deviations": list(table.spec.deviations),
        "cells": to_records(table),
    }
    return json.dumps(document, indent=2) + "\n"


RENDERERS = {"md": to_markdown, "tex": to_latex, "csv": to_csv, "json": to_json}
"""File ending -> renderer."""
