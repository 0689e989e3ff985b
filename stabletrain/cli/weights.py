"""`stabletrain weights`: the published weights that metrics need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stabletrain.cli.data import Json, tick_on_stderr
from stabletrain.cli.help import PanelCommand, PanelGroup, help_if_alone
from stabletrain.cli.text import pairs, print_json, size
from stabletrain.errors import EXIT_OK

app = typer.Typer(
    cls=PanelGroup,
    help="List, fetch and add the published weights that metrics need.",
    invoke_without_command=True,
    rich_markup_mode=None,
)
app.callback()(help_if_alone)


@app.command("list", cls=PanelCommand)
def list_(as_json: Json = False) -> int:
    """List the published files, whether they are here and whole, and where they were looked for."""
    from dataclasses import asdict

    from stabletrain.metrics.weights import weights_status

    statuses = weights_status()
    if as_json:
        print_json({"weights": [asdict(status) for status in statuses]})
        return EXIT_OK
    for status in statuses:
        facts = {
            "name": status.name,
            "what": status.what,
            "state": status.state,
            "file": str(status.path or "looked in " + ", ".join(map(str, status.looked_in))),
            "size": size(status.size),
            "source": status.url,
            "SHA-256": status.sha256,
        }
        print(pairs(facts))
    return EXIT_OK


@app.command(cls=PanelCommand)
def fetch(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Which weights.")] = "inception2015",
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="A mirror; the content is checked all the same.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Download published weights and check their hash."""
    from stabletrain.metrics.weights import fetch_weights

    return _kept(fetch_weights(name, url=url, progress=tick_on_stderr()), as_json=as_json)


@app.command(cls=PanelCommand)
def add(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A published file, downloaded elsewhere.")],
    as_json: Json = False,
) -> int:
    """Keep a file that was downloaded elsewhere where metrics find it. It is told by its hash."""
    from stabletrain.metrics.weights import add_weights

    return _kept(add_weights(file), as_json=as_json)


def _kept(path: Path, *, as_json: bool) -> int:
    if as_json:
        print_json({"file": path})
    else:
        print(path)
    return EXIT_OK
