"""`stabletrain resume`: goes on with runs as they were configured."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from stabletrain.cli.families import all_families
from stabletrain.cli.options import Fields, fields_with_types, parameters, typed_values, union_of
from stabletrain.cli.progress import make_reporter
from stabletrain.cli.stored import complete_run, find_run, open_run, stored_config
from stabletrain.cli.text import print_json
from stabletrain.cli.train import execute, outcome_document, show_outcome
from stabletrain.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED
from stabletrain.training.config import TrainConfig
from stabletrain.training.experiment import Family, Outcome

PANEL = "May differ from the run's configuration"


def changeable(family: Family) -> Fields:
    """The options that do not make another experiment: they may change when a run goes on."""
    fields = fields_with_types(family.config)
    return {name: entry for name, entry in fields.items() if not entry[0].metadata["identity"]}


HELP = """Go on with runs from their last complete checkpoints, as they were configured.

What does not make another experiment may be changed: the number of devices, how often to save.
"""


def resume_command() -> Callable[..., int]:
    """The command, with an option for whatever some family lets change."""

    def resume(runs: list[str], as_json: bool, quiet: bool, **given: Any) -> int:
        paths = [find_run(named) for named in runs]
        outcomes: list[tuple[Family, Outcome, TrainConfig]] = []
        for path in paths:
            outcomes.append(_resume(path, given, quiet=quiet))
            if not as_json:
                show_outcome(*outcomes[-1], as_json=False)
            if outcomes[-1][1].exit_code in (EXIT_PREEMPTED, EXIT_INTERRUPTED):
                break
        if as_json:
            documents = [outcome_document(outcome) for _, outcome, _ in outcomes]
            print_json(documents[0] if len(runs) == 1 else {"runs": documents})
        return next((outcome.exit_code for _, outcome, _ in outcomes if outcome.exit_code), EXIT_OK)

    kind = inspect.Parameter.KEYWORD_ONLY
    own = [
        inspect.Parameter(
            "runs",
            kind,
            default=typer.Argument(
                ..., metavar="RUN...", help="Run directories, or names below ./runs.", autocompletion=complete_run
            ),
            annotation=list[str],
        ),
        *parameters(union_of({family.name: changeable(family) for family in all_families()}), PANEL),
        inspect.Parameter(
            "as_json", kind, default=typer.Option(False, "--json", help="Print one JSON document."), annotation=bool
        ),
        inspect.Parameter(
            "quiet", kind, default=typer.Option(False, "--quiet", "-q", help="No progress on stderr."), annotation=bool
        ),
    ]
    resume.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    resume.__annotations__ = {}
    resume.__doc__ = HELP
    return resume


def _resume(path: Path, given: dict[str, Any], *, quiet: bool) -> tuple[Family, Outcome, TrainConfig]:
    run, family = open_run(path)
    changes = typed_values(changeable(family), given, what=f"option that may change in a run of {family.name}")
    config = stored_config(run, family, changes)
    with make_reporter(quiet=quiet) as reporter:
        return family, execute(family, config, path, reporter=reporter), config
