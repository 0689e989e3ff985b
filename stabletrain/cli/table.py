"""`stabletrain table`: a paper's table from runs: what it costs, what is missing, and the table in four formats."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from stabletrain.cli.study import Progress, make_engine, seeds_of
from stabletrain.cli.text import duration, print_json
from stabletrain.cli.text import table as text_table
from stabletrain.errors import EXIT_FAILURE, EXIT_OK, ConfigError
from stabletrain.runs.engine import FINISHED, Job, job_status, write_study
from stabletrain.runs.experiments import SCALES, TableSpec, find_tables, read_table
from stabletrain.runs.kept import KeptTable, check_disjoint, joined_environment, read_kept

EXPERIMENTS, RESULTS = Path("experiments"), Path("results")


def table(
    name: Annotated[str | None, typer.Argument(metavar="PAPER/TABLE", help="Which table; see --list.")] = None,
    scale: Annotated[
        str, typer.Option(metavar="small|paper", help="Sized for two CPU cores, or as published.")
    ] = "small",
    seeds: Annotated[
        str | None, typer.Option(metavar="0-4", help="Seeds of every row; without it as many as the table asks for.")
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="First run what is missing.")] = False,
    workers: Annotated[int, typer.Option("--workers", "-j", min=0, help="Runs at once; 0 chooses.")] = 0,
    every: Annotated[bool, typer.Option("--all", help="Every table that is there.")] = False,
    list_only: Annotated[bool, typer.Option("--list", help="Name the tables and how far they are.")] = False,
    reproducibility: Annotated[
        Path | None,
        typer.Option("--reproducibility", metavar="FILE.md", help="Only write the summary of all kept results there."),
    ] = None,
    experiments: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of <paper>/<table>/<row>.toml.")
    ] = EXPERIMENTS,
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the runs.")] = Path("runs"),
    kept: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="FILE.json", help="The same table with other seeds, run elsewhere; joined."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for tables and figures.")] = RESULTS,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> int:
    """Render a paper's table from its runs: mean, deviation, paired differences, the paper's number beside ours."""
    if scale not in SCALES:
        raise ConfigError(f"unknown scale {scale!r}: {' or '.join(SCALES)}")
    if kept and (reproducibility is not None or list_only or every or name is None):
        raise ConfigError("--with joins seeds to one table: name it, without --all, --list or --reproducibility")
    if reproducibility is not None:
        from stabletrain.runs.reproducibility import write_summary

        write_summary(reproducibility, experiments, out)
        print(reproducibility)
        return EXIT_OK
    chosen = seeds_of(seeds) if seeds else None
    known = find_tables(experiments)
    if not known:
        raise ConfigError(f"there are no tables below {experiments}: name the folder with --experiments")
    if list_only or (name is None and not every):
        _list(experiments, known, scale, chosen, runs, make_engine(workers).workers)
        return EXIT_OK
    specs = [read_table(experiments, each) for each in (known if every else [name or ""])]
    studies = [(spec, jobs_of(spec, scale, chosen or spec.default_seeds(scale), runs)) for spec in specs]
    joined = [read_kept(path, specs[0], scale) for path in kept or ()]
    if joined:
        from stabletrain.runs.reading import is_run

        elsewhere = frozenset[tuple[str, int]]().union(*(each.runs for each in joined))
        jobs = [job for job in studies[0][1] if (job.row, job.seed) not in elsewhere or is_run(job.run_dir)]
        check_disjoint(joined, frozenset((job.row, job.seed) for job in jobs if is_run(job.run_dir)))
        studies = [(specs[0], jobs)]
    code = EXIT_OK
    if run:
        code = _run_missing(studies, scale, workers, quiet=quiet)
    documents = [_render(spec, scale, jobs, joined, out, show=not as_json) for spec, jobs in studies]
    if as_json:
        print_json({"run_dir": runs, "status": "done" if code == EXIT_OK else "failed", "step": 0, "metrics": {}}
                   | {"tables": documents})  # fmt: skip
    return code


def study_folder(spec: TableSpec, scale: str, runs: Path) -> Path:
    """`runs/<paper>-<table>-<scale>/`."""
    return runs / f"{spec.name.replace('/', '-')}-{scale}"


def jobs_of(spec: TableSpec, scale: str, seeds: Sequence[int], runs: Path) -> list[Job]:
    """Every run of a table at a scale, seed by seed, so that an unfinished table has complete pairs first."""
    folder = study_folder(spec, scale, runs)
    rows = [row for row in spec.rows if scale in row.scales]

    def run_dir(key: str, seed: int) -> Path:
        return folder / f"{key}-s{seed}"

    return [
        Job(
            row.key,
            seed,
            run_dir(row.key, seed),
            row.arguments(scale, seed),
            run_dir(row.after, seed) if row.after else None,
        )
        for seed in seeds
        for row in rows
    ]


def missing_minutes(spec: TableSpec, scale: str, jobs: Sequence[Job]) -> float:
    """Estimated minutes of the runs that are missing: by the finished runs of the row, else by what its file says."""
    import statistics  # only here: with what it imports it would slow --help

    from stabletrain.runs.reading import read_run

    costs = {row.key: row.cost_minutes.get(scale, 0.0) for row in spec.rows}
    total = 0.0
    for key in {job.row for job in jobs}:
        of_row = [job for job in jobs if job.row == key]
        finished = [job for job in of_row if job_status(job).state in FINISHED]
        seconds = [float(read_run(job.run_dir).record.get("wall_seconds", 0.0)) for job in finished]
        each = statistics.median(seconds) / 60 if seconds else costs[key]
        total += each * (len(of_row) - len(finished))
    return total


def _run_missing(studies: list[tuple[TableSpec, list[Job]]], scale: str, workers: int, *, quiet: bool) -> int:
    engine = make_engine(workers)
    jobs: list[Job] = []
    for spec, of_table in studies:
        missing = [job for job in of_table if job_status(job).state not in FINISHED]
        minutes = missing_minutes(spec, scale, of_table) / engine.workers
        estimate = f", about {duration(60 * minutes)} with {engine.workers} at once" if missing else ""
        print(f"{spec.name} ({scale}): {len(missing)} of {len(of_table)} runs missing{estimate}", file=sys.stderr)
        if of_table:
            write_study(of_table[0].run_dir.parent, spec.name, of_table, scale=scale)
        jobs += of_table
    statuses = engine.run(jobs, Progress(quiet=quiet))
    failed = [status for status in statuses if status.state == "failed"]
    for status in failed:
        print(f"{status.job.run_dir} failed: {status.reason}", file=sys.stderr)
    return EXIT_FAILURE if failed else EXIT_OK


def _render(
    spec: TableSpec, scale: str, jobs: Sequence[Job], kept: Sequence[KeptTable], out: Path, *, show: bool
) -> dict:
    """Writes the table in every format and its figures; returns the JSON document."""
    import json

    from stabletrain.runs.figures import curves_figure
    from stabletrain.runs.reading import is_run, read_run
    from stabletrain.runs.reproducibility import environment_of
    from stabletrain.runs.table import RENDERERS, build_table

    runs = {
        row.key: [read_run(job.run_dir) for job in jobs if job.row == row.key and is_run(job.run_dir)]
        for row in spec.rows
    }
    seeds = {job.seed for job in jobs} | {seed for table in kept for _, seed in table.runs}
    built = build_table(spec, scale, runs, sorted(seeds), kept)
    base = out / scale / spec.name
    base.parent.mkdir(parents=True, exist_ok=True)
    rendered = {ending: renderer(built) for ending, renderer in RENDERERS.items()}
    here = environment_of([run for each in runs.values() for run in each])
    document = json.loads(rendered["json"]) | {
        "environment": joined_environment([here, *(table.environment for table in kept)])
    }
    rendered["json"] = json.dumps(document, indent=2) + "\n"
    written = []
    for ending, content in rendered.items():
        path = base.with_name(f"{base.name}.{ending}")
        path.write_text(content, encoding="utf-8")
        written.append(path)
    for number, curve in enumerate(spec.figures, start=1):
        groups = dict.fromkeys(row.group for row in spec.rows if runs[row.key])
        panels = {
            group: {row.label: runs[row.key] for row in spec.rows if row.group == group and runs[row.key]}
            for group in groups
        }
        svg = curves_figure(panels, curve.metric, label=curve.label, log=curve.log) if panels else None
        if svg:
            path = base.with_name(f"{base.name}-{number}.svg")
            path.write_text(svg, encoding="utf-8")
            written.append(path)
    if show:
        print(rendered["md"])
        print("\n".join(str(path) for path in written))
    return document


def _list(
    experiments: Path, names: Sequence[str], scale: str, seeds: Sequence[int] | None, runs: Path, workers: int
) -> None:
    rows = []
    for name in names:
        spec = read_table(experiments, name)
        jobs = jobs_of(spec, scale, seeds or spec.default_seeds(scale), runs)
        finished = sum(job_status(job).state in FINISHED for job in jobs)
        minutes = missing_minutes(spec, scale, jobs) / workers
        rows.append([name, spec.title, f"{finished}/{len(jobs)}", duration(60 * minutes) if minutes else "-"])
    print(text_table(["table", "title", f"runs ({scale})", f"left to do, {workers} at once"], rows))
