"""The command `stabletrain`: its commands, how its errors are said, and its exit codes.

    0 ok      1 failure      2 usage or configuration      3 data or weights missing      4 training diverged
    5 verification mismatch      75 preempted after a checkpoint      130 interrupted

Modules of this package import JAX (and NumPy) within functions only, so that `--help` answers at once.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from stabletrain import __version__, xla_settings
from stabletrain.cli import compare, data, doctor, export, resume, runs, sample, table, tensorboard, weights
from stabletrain.cli.families import all_families
from stabletrain.cli.help import SETTINGS, PanelCommand, PanelGroup, help_if_alone
from stabletrain.cli.text import print_json
from stabletrain.cli.train import family_command, is_out_of_memory
from stabletrain.errors import EXIT_FAILURE, EXIT_USAGE, Interrupted, StableTrainError
from stabletrain.nnip.simulate import simulate_command

PROGRAM = "stabletrain"
TRAIN, RUNS, SETUP = "Train", "Look at runs, and use them", "Data and this machine"


def build_app(named: str | None = None) -> typer.Typer:
    """The command tree, built anew for each call.

    `named`: the command that the call names. It alone gets its options, the others only their line in the list: the
    hundreds of options take longer than all the rest. The program's own `--help` and what installs completion are left
    out then too. "" names none, as `stabletrain --help` does; with None everything is built, as completion needs it.
    """
    app = typer.Typer(
        cls=PanelGroup,
        add_completion=not named,
        add_help_option=not named,
        context_settings=SETTINGS,
        rich_markup_mode=None,  # the plain formatter, with panels below: it starts at once and suits pipes
        pretty_exceptions_enable=False,
        invoke_without_command=True,
    )
    app.callback()(_program)

    def add(name: str, panel: str, text: str | None, make: Callable[[], Callable[..., int]]) -> None:
        command = make() if named in (None, name) else _only_listed
        app.command(name, cls=PanelCommand, help=text, rich_help_panel=panel)(command)

    for family in all_families():
        if family.subcommands and named in (None, family.name):
            group = typer.Typer(cls=PanelGroup, invoke_without_command=True, rich_markup_mode=None)
            group.callback()(family_command(family))
            for name, function in family.subcommands.items():
                group.command(name, cls=PanelCommand)(function)
            app.add_typer(group, name=family.name, help=family.help, rich_help_panel=TRAIN)
        else:
            add(family.name, TRAIN, family.help, functools.partial(family_command, family))
    add("resume", TRAIN, resume.HELP, resume.resume_command)
    add("runs", RUNS, runs.runs.__doc__, lambda: runs.runs)
    add("show", RUNS, runs.show.__doc__, lambda: runs.show)
    add("sample", RUNS, sample.SAMPLE_HELP, sample.sample_command)
    add("evaluate", RUNS, sample.EVALUATE_HELP, sample.evaluate_command)
    add("simulate", RUNS, simulate_command.__doc__, lambda: simulate_command)
    add("compare", RUNS, compare.compare.__doc__, lambda: compare.compare)
    add("report", RUNS, compare.report.__doc__, lambda: compare.report)
    add("table", RUNS, table.table.__doc__, lambda: table.table)
    add("export", RUNS, export.export.__doc__, lambda: export.export)
    add("tensorboard", RUNS, tensorboard.tensorboard.__doc__, lambda: tensorboard.tensorboard)
    app.add_typer(data.app, name="data", rich_help_panel=SETUP)
    app.add_typer(weights.app, name="weights", rich_help_panel=SETUP)
    add("doctor", SETUP, doctor.doctor.__doc__, lambda: doctor.doctor)
    return app


def _only_listed() -> int:
    raise AssertionError("a command that the call does not name is listed, and never called")


def _version(given: bool) -> None:
    if given:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


def _program(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, in any command.")] = False,
) -> int:
    """Train, watch, compare and explain methods that make neural-network training stable."""
    return help_if_alone(ctx)


# --- running it -------------------------------------------------------------------------------------------------------


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; errors are said in one line on stderr.

    With `--debug` errors come with their traceback; with `--json` also as a document on stdout.
    """
    debug, as_json = "--debug" in arguments, "--json" in arguments
    xla_settings.apply()
    _arrange_logging(debug=debug)
    try:
        given = [argument for argument in arguments if argument != "--debug"]
        completing = f"_{PROGRAM.upper()}_COMPLETE" in os.environ
        named = given[0] if given and not given[0].startswith("-") else None if completing else ""
        command = typer.main.get_command(build_app(named))
        code = command.main(args=given, prog_name=PROGRAM, standalone_mode=False)
        return int(code or 0)
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, exit_code = explained(error)
        print(f"{PROGRAM}: error: {message}", file=sys.stderr)
        if as_json:
            failure = {"error": message, "exit_code": exit_code}
            print_json({"run_dir": None, "status": "failed", "step": None, "metrics": {}, **failure})
        return exit_code


def explained(error: Exception) -> tuple[str, int]:
    """An error as one readable line, and its exit code."""
    if isinstance(error, StableTrainError):
        return _one_line(error), error.exit_code
    if isinstance(error, Interrupted):
        return "interrupted; finished parts are kept, repeat the command to go on", error.exit_code
    if isinstance(error, TyperException):
        return _usage_message(error), EXIT_USAGE
    if is_out_of_memory(error):
        return f"out of memory: try a smaller --batch-size, or more --devices ({_one_line(error)[:200]})", EXIT_FAILURE
    said = _one_line(error) or "no message"
    return f"unexpected {type(error).__name__}: {said} (repeat with --debug for the traceback)", EXIT_FAILURE


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _usage_message(error: TyperException) -> str:
    """Typer's own errors: in our words where it names an option that does not exist."""
    ctx = getattr(error, "ctx", None)
    see = f" (see `{ctx.command_path} --help`)" if ctx is not None else ""
    unknown = getattr(error, "option_name", None)
    if unknown is not None and hasattr(error, "possibilities"):
        close = error.possibilities or []
        return f"no such option {unknown}" + (f": did you mean {close[0]}?" if close else "") + see
    message = " ".join(error.format_message().split()).rstrip(".")
    return message[:1].lower() + message[1:] + ("" if message.endswith("?") else see)


def _arrange_logging(*, debug: bool) -> None:
    """Lets the program's own warnings be seen as such."""
    # Orbax reads many arrays at once: of a damaged checkpoint each complains here, long after it was said in one line.
    logging.getLogger("asyncio").setLevel(logging.WARNING if debug else logging.CRITICAL)
    logger = logging.getLogger(PROGRAM)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{PROGRAM}: %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False


def main() -> None:
    """Entry point."""
    show = sys.unraisablehook

    def show_ours(unraisable: sys.UnraisableHookArgs) -> None:
        # Orbax closes its event loop while some of its reads of a damaged checkpoint are still to fail.
        if "--debug" in sys.argv or str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_ours
    sys.exit(run(sys.argv[1:]))
