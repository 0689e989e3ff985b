"""The body of every family's command: resolve, check, dry run, run directory, loop, outcome."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from stabletrain.cli.options import Resolved, fields_with_types, parameters, resolve, shorthand_parameters
from stabletrain.cli.progress import OpenReporter, evaluations, listed, main_loss, make_reporter
from stabletrain.cli.sparkline import sparkline
from stabletrain.cli.study import SEEDS_OPTIONS, seeds_command, seeds_of
from stabletrain.cli.text import draws_unicode, duration, number, pairs, print_json
from stabletrain.errors import EXIT_OK, ConfigError, DataError, StableTrainError
from stabletrain.training.config import TrainConfig, run_name
from stabletrain.training.experiment import Family, Outcome

RUNS = Path("runs")
"""Where runs without --out are kept, below the working directory."""
PANEL = "This command"

RUN_OPTIONS = {
    "out": (Path | None, typer.Option(None, "--out", "-o", help="Run directory. [default: runs/<name>]")),
    "preset": (
        Path | None,
        typer.Option(None, "--config", "-c", metavar="FILE.toml", help="Values from a file; explicit options win."),
    ),
    "scale": (
        str | None,
        typer.Option(None, "--scale", metavar="small|paper", help="Which settings of the --config file to take."),
    ),
    "fresh": (bool, typer.Option(False, "--fresh", help="Start anew; an old run there is moved aside, not deleted.")),
    "dry_run": (
        bool,
        typer.Option(False, "--dry-run", "-n", help="Show the resolved configuration and the cost; write nothing."),
    ),
    "as_json": (bool, typer.Option(False, "--json", help="Print one JSON document on stdout.")),
    "quiet": (bool, typer.Option(False, "--quiet", "-q", help="No progress on stderr.")),
    **SEEDS_OPTIONS,
}
"""Options of the command that are no fields of the configuration: name -> (type, option)."""


def family_command(family: Family) -> Callable[..., int]:
    """The command of a family: an option per field of its config, its shorthands, and those of every run."""
    fields = fields_with_types(family.config)

    def command(ctx: typer.Context, **arguments: Any) -> int:
        if ctx.invoked_subcommand is not None:
            return EXIT_OK
        run_options = {name: arguments.pop(name) for name in RUN_OPTIONS}
        shorthands = [name for name in family.shorthands if arguments.pop(name)]
        return train_command(family, arguments, shorthands=shorthands, **run_options)

    own = [inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    own += shorthand_parameters(family)
    own += parameters(fields)
    for name, (accepted, info) in RUN_OPTIONS.items():
        info.rich_help_panel, info.show_default = PANEL, False
        own.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=accepted))
    command.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    command.__doc__ = family.help
    return command


def train_command(
    family: Family,
    given: Mapping[str, Any],
    *,
    out: Path | None,
    preset: Path | None,
    scale: str | None,
    fresh: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    seeds: str | None,
    workers: int,
    shorthands: list[str],
) -> int:
    """One command line of a family, from its options to its exit code."""
    resolved = resolve(family, given, preset=preset, scale=scale, shorthands=shorthands)
    path = out or RUNS / run_name(resolved.config, family.name)
    chosen = None if seeds is None else seeds_of(seeds)
    if chosen is not None and fresh:
        raise ConfigError("--fresh does nothing with --seeds: choose another --out for a new study")
    if chosen is None and workers:
        raise ConfigError("--workers does nothing without --seeds")
    study = out or path.with_name(path.name.rpartition("-s")[0])
    if dry_run:
        show_plan(family, resolved, path if chosen is None else study, seeds=chosen, as_json=as_json)
        return EXIT_OK
    if chosen is not None:
        return seeds_command(family, resolved, study, chosen, workers=workers, as_json=as_json, quiet=quiet)
    with make_reporter(quiet=quiet) as reporter:
        outcome = execute(family, resolved.config, path, reporter=reporter, fresh=fresh)
    show_outcome(family, outcome, resolved.config, as_json=as_json)
    return outcome.exit_code


def execute(family: Family, config: TrainConfig, path: Path, *, reporter: OpenReporter, fresh: bool = False) -> Outcome:
    """Trains in this run directory, or goes on there.

    Raises: `StableTrainError` for what the user can mend. A directory that is not there yet is made only when the
    data have been loaded and the model has been built.
    """
    from stabletrain.training.devices import configure_backend, make_mesh
    from stabletrain.training.loop import train
    from stabletrain.training.run_directory import RunDirectory
    from stabletrain.training.signals import StopRequest

    if family.needs is not None and (needed := family.needs(config)) is not None:
        reporter.note(needed.message)
        first = execute(family, needed.config, needed.path, reporter=reporter)
        if first.exit_code:
            return first
    # What stands there is checked first: it costs nothing and the rest can take a while.
    run = RunDirectory.create(path, family.name, config) if path.exists() and not fresh else None
    configure_backend(config.devices, config.batch_size)
    try:
        experiment = family.build(config, mesh=make_mesh(config.devices, config.batch_size))
        run = run or RunDirectory.create(path, family.name, config, fresh=fresh)
        with StopRequest() as stop:
            return train(experiment, run=run, reporter=reporter, stop=stop)
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(_smaller(config)) from error
        raise


class OutOfMemoryError(StableTrainError):
    """The device's or the machine's memory was not enough."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for Python's own error and for XLA's, which has no type of its own."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _smaller(config: TrainConfig) -> str:
    half = config.batch_size // 2
    advice = f"try --batch-size {half}" if half else "the batch cannot be smaller: try a smaller network"
    return f"out of memory with --batch-size {config.batch_size}: {advice}, or more --devices"


# --- dry run ----------------------------------------------------------------------------------------------------------


def show_plan(family: Family, resolved: Resolved, path: Path, *, seeds: list[int] | None, as_json: bool) -> None:
    """Prints the resolved configuration with the origin of its values, and what the run, or one per seed, would cost.

    As text it is a preset file: `stabletrain FAMILY ... --dry-run > preset.toml`.
    """
    from stabletrain.cli.estimate import estimate
    from stabletrain.training.config import to_dict
    from stabletrain.training.devices import configure_backend, make_mesh

    config = resolved.config
    _refuse_to_download(config)
    if family.needs is not None and (needed := family.needs(config)) is not None:
        raise ConfigError(f"{needed.message}; a dry run trains nothing, and without it the cost is not known")
    configure_backend(config.devices, config.batch_size, compile_cache=False)
    try:
        cost = estimate(family.build(config, mesh=make_mesh(config.devices, config.batch_size)))
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(_smaller(config)) from error
        raise
    if as_json:
        plan: dict[str, Any] = {
            "family": family.name,
            "config": to_dict(config),
            "origin": resolved.origin,
            "estimate": cost.to_dict(),
        }
        if seeds is not None:
            plan["seeds"] = seeds
        print_json({"run_dir": path, "status": "dry-run", "step": 0, "metrics": {}, **plan})
        return
    print("\n".join([*_config_lines(family, resolved), ""]))
    where = {"run directory": str(path)} if seeds is None else {"study": str(path)}
    if seeds is not None:
        where["runs"] = f"{len(seeds)}, seeds {', '.join(map(str, seeds))}, each of this cost"
    print("\n".join(f"# {line}" for line in pairs({**where, **cost.lines()}).splitlines()))


def _refuse_to_download(config: TrainConfig) -> None:
    from stabletrain.data.catalogue import CATALOGUE
    from stabletrain.data.locate import locate, what_to_put

    info = CATALOGUE.get(config.dataset) if config.data is None else None
    if info is not None and locate(info) is None:
        raise DataError(f"{info.name} is not on this machine, and a dry run fetches nothing: {what_to_put(info)}")


def _config_lines(family: Family, resolved: Resolved) -> list[str]:
    lines = [(f"family = {_toml(family.name)}", "")]
    for field in dataclasses.fields(resolved.config):
        value = getattr(resolved.config, field.name)
        if value is not None:
            lines.append((f"{field.name} = {_toml(value)}", resolved.origin.get(field.name, "")))
    width = max((len(line) for line, origin in lines if origin), default=0)
    return [f"{line.ljust(width)}  # {origin}" if origin else line for line, origin in lines]


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    import tomli_w

    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")


# --- outcome ----------------------------------------------------------------------------------------------------------


def outcome_document(outcome: Outcome) -> dict[str, Any]:
    """The outcome as plain values: the JSON of a training command."""
    metrics = {name: value for name, value in outcome.metrics.items() if "/" in name}
    document = {key: getattr(outcome, key) for key in ("run_dir", "status", "step", "reason", "exit_code")}
    return document | {"metrics": metrics, "samples": newest_samples(outcome.run_dir)}


def newest_samples(run_dir: Path) -> Path | None:
    """The sample grid of the last evaluation, or None."""
    grids = sorted((run_dir / "samples").glob("*.png"))
    return grids[-1] if grids else None


def show_outcome(family: Family, outcome: Outcome, config: TrainConfig, *, as_json: bool) -> None:
    """Where the run is, how it ended, its scores, what disturbed it, and what to type next."""
    if as_json:
        print_json(outcome_document(outcome))
        return
    import sys

    from stabletrain.runs.comparison import stability_counts
    from stabletrain.runs.reading import read_run

    run = read_run(outcome.run_dir)
    shown = shown_path(outcome.run_dir)
    status = f"{outcome.status} at step {outcome.step:,}"
    if config.steps:  # else the data say how many there are
        status += f" of {config.steps:,}"
    if seconds := run.record.get("wall_seconds"):
        status += f", {duration(seconds)}"
    if outcome.reason:
        status += f": {outcome.reason}"
    lines = {"run": str(shown), "status": status}
    loss = main_loss(outcome.metrics)
    if loss is not None:
        curve = sparkline([row.get(loss) for row in run.rows if loss in row]) if draws_unicode(sys.stdout) else ""
        lines[loss.removeprefix("train/")] = f"{number(outcome.metrics[loss])}  {curve}".rstrip()
    if scores := evaluations(outcome.metrics):
        lines["evaluation"] = listed(scores)
    counts = stability_counts(run)
    lines["stability"] = ", ".join(f"{count} x {kind}" for kind, count in counts.items()) or "undisturbed"
    if grid := newest_samples(outcome.run_dir):
        lines["samples"] = str(shown_path(grid))
    lines["next"] = "\n".join(next_commands(family, outcome, shown))
    print(pairs(lines))


def next_commands(family: Family, outcome: Outcome, shown: Path) -> list[str]:
    """What to type after a run that ended so: only what a run of its family can do."""
    if outcome.status == "done":
        sampled = ("sample {run}",) if family.sample is not None else ()
        commands = ("show {run}", *sampled, *family.next_commands, "export {run} --out DIR")
        return [f"stabletrain {command.format(run=shown)}" for command in commands]
    if outcome.status == "preempted":
        return [f"stabletrain resume {shown}"]
    return [f"stabletrain show {shown}"]


def shown_path(path: Path) -> Path:
    """Relative to the working directory where it is below it: what a person would type."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
