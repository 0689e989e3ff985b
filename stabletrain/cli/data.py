"""`stabletrain data`: which data sets there are, whether they are here, and whether they are whole."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from stabletrain.cli.help import PanelCommand, PanelGroup, help_if_alone
from stabletrain.cli.text import is_terminal, pairs, print_json, table
from stabletrain.errors import EXIT_DATA, EXIT_OK, ConfigError
from stabletrain.nnip.make_md import make_md_command

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
ImageSize = Annotated[
    int | None, typer.Option("--image-size", min=1, help="Crop and resize to this many pixels, as in training.")
]

app = typer.Typer(
    cls=PanelGroup,
    help="List, describe, prepare and check data sets.",
    invoke_without_command=True,
    rich_markup_mode=None,
)
app.callback()(help_if_alone)
app.command("make-md", cls=PanelCommand)(make_md_command)


@app.command("list", cls=PanelCommand)
def list_(as_json: Json = False) -> int:
    """List the data sets that are known by name, and where they are on this machine."""
    from stabletrain.data.catalogue import list_datasets
    from stabletrain.data.locate import locate

    entries = [(info, locate(info)) for info in list_datasets()]
    if as_json:
        keys = ("name", "about", "image_size", "channels", "num_classes", "train_count", "test_count")
        print_json(
            {
                "datasets": [
                    {key: getattr(info, key) for key in keys}
                    | {"kind": place.kind if place else None, "found": place.path if place else None}
                    for info, place in entries
                ]
            }
        )
        return EXIT_OK
    lines = []
    for info, place in entries:
        where = "not here" if place is None else "bundled" if place.path is None else str(place.path)
        images = f"{info.image_size}x{info.image_size}x{info.channels}"
        lines.append((info.name, images, str(info.num_classes or "-"), f"{info.train_count:,}", where, info.about))
    print(table(("name", "images", "classes", "training", "where", "about"), lines))
    if any(place is None for _, place in entries):
        print("\nWhat to put where: stabletrain data info NAME. Your own data: --data FILE in any training command.")
    print("\nThese are images; frames of molecules are chosen by `stabletrain nnip --dataset` and --data.")
    return EXIT_OK


@app.command(cls=PanelCommand)
def info(
    name: Annotated[str, typer.Argument(metavar="NAME|PATH", help="A data set's name, or your own file or folder.")],
    image_size: ImageSize = None,
    as_json: Json = False,
) -> int:
    """Describe a data set: sizes, classes, fingerprint, where it is or what to put where."""
    from stabletrain.data.check import dataset_info

    _refuse_frames(name)
    described = dataset_info(name, image_size=image_size)
    if as_json:
        print_json(described)
    else:
        _print_info(described)
    return EXIT_OK


@app.command(cls=PanelCommand)
def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A data set's name.")],
    features: Annotated[
        Path | None, typer.Option(metavar="DIR", help="coco-latents: the folder of extracted features.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="coco-latents: where to write. [default: the cache]")
    ] = None,
    as_json: Json = False,
) -> int:
    """Make a named data set ready: unpack what is here, download and prepare it with TFDS, or pack features."""
    from stabletrain.data.prepare import prepare_dataset, prepare_features

    _refuse_frames(name)
    if features is not None or out is not None:
        described = prepare_features(name, features, out, tick_on_stderr())
        if as_json:
            print_json(described)
        else:
            print(pairs({key: str(value) for key, value in described.items()}))
        return EXIT_OK
    described = prepare_dataset(name, tick_on_stderr())
    if as_json:
        print_json(described)
    else:
        _print_info(described)
    return EXIT_OK


@app.command(cls=PanelCommand)
def check(
    name: Annotated[str, typer.Argument(metavar="NAME|PATH", help="A data set's name, or your own file or folder.")],
    image_size: ImageSize = None,
    as_json: Json = False,
) -> int:
    """Read everything of a data set and list all that is wrong with it. Exit code 3 when anything is."""
    from stabletrain.data.catalogue import CATALOGUE
    from stabletrain.data.check import check_dataset
    from stabletrain.data.locate import named

    _refuse_frames(name)
    own = name not in CATALOGUE and (Path(name).expanduser().exists() or Path(name).suffix or len(Path(name).parts) > 1)
    if name not in CATALOGUE and not own:
        named(name)  # raises, with the nearest name
    problems = check_dataset(
        "digits" if own else name, name if own else None, image_size=image_size, tick=tick_on_stderr()
    )
    if as_json:
        print_json({"name": name, "ok": not problems, "problems": problems})
    elif problems:
        print("\n".join(problems))
    else:
        print(f"{name}: all is well")
    return EXIT_DATA if problems else EXIT_OK


def _refuse_frames(name: str) -> None:
    from stabletrain.nnip.frames import DATASETS

    if name in DATASETS:
        raise ConfigError(f"{name} holds frames of molecules, not images: `stabletrain nnip --dataset {name}` reads it")


def _print_info(described: dict[str, Any]) -> None:
    edge = described["image_size"]
    facts = {
        "name": described["name"],
        "about": described["about"],
        "images": f"{edge}x{edge}, {described['channels']} channel{'s' * (described['channels'] != 1)}",
        "training": f"{described['train_count']:,}",
        "test": f"{described['test_count']:,}",
        "classes": _classes(described),
        "fingerprint": described["fingerprint"] or "",
        "where": described["found"] or "not on this machine",
        "to have it": described["put"] or "",
    }
    print(pairs({name: value for name, value in facts.items() if value}))


def _classes(described: dict[str, Any]) -> str:
    count, names = described["num_classes"], described["class_names"]
    if not count:
        return "no labels"
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    counts = described.get("class_counts", {}).get("train")
    each = f"; {min(counts):,} to {max(counts):,} training images each" if counts else ""
    return f"{count} ({shown}){each}" if names else f"{count}{each}"


def tick_on_stderr() -> Any:
    """Progress on stderr: one line that is drawn again on a terminal, a line every ten seconds elsewhere."""
    if not is_terminal():
        said_at = time.monotonic()

        def say(label: str, done: int, total: int) -> None:
            nonlocal said_at
            if time.monotonic() - said_at >= 10.0:
                said_at = time.monotonic()
                print(f"{label}: {done}/{total}", file=sys.stderr)

        return say

    def draw(label: str, done: int, total: int) -> None:
        end = "\n" if done >= total else ""
        print(f"\r\033[K{label}: {done}/{total}", end=end, file=sys.stderr, flush=True)

    return draw
