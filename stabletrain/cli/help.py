"""Help pages: Typer's plain ones, with the options and commands under headings.

Typer draws panels with Rich only, which takes longer to import than the whole rest of a help page takes.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from stabletrain.errors import EXIT_OK, EXIT_USAGE

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def _write_options(command: Any, ctx: Any, formatter: Any) -> None:
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None:
            default = "Arguments" if parameter.param_type_name == "argument" else "Options"
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or default, []).append(record)
    # `--help` and the like come first in the list of options, whatever else is below it.
    for name in sorted(panels, key=lambda name: name not in ("Arguments", "Options")):
        with formatter.section(name):
            formatter.write_dl(panels[name])


class PanelCommand(TyperCommand):
    """A command whose options stand under the headings of their panels."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes a section per panel."""
        _write_options(self, ctx, formatter)


class PanelGroup(TyperGroup):
    """A group whose commands stand under the headings of their panels."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the options, then a section per panel of commands."""
        _write_options(self, ctx, formatter)
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                short = (command.help or "").split("\n\n")[0].replace("\n", " ")
                panels.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append((name, short))
        width = max(len(name) for entries in panels.values() for name, _ in entries)
        for heading, entries in panels.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), short) for name, short in entries])


def help_if_alone(ctx: typer.Context) -> int:
    """For the callback of a group: shows its help when no command was named."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        return EXIT_USAGE
    return EXIT_OK
