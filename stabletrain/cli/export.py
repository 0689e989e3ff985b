"""`stabletrain export`: a run's weights as safetensors, with its configuration and a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stabletrain.cli.stored import RUN, Trained, find_run, load_trained
from stabletrain.cli.text import number, print_json, size
from stabletrain.errors import EXIT_OK, ConfigError, RunDirectoryError, nearest

if TYPE_CHECKING:
    from stabletrain.runs.reading import RunData

WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.toml", "README.md"


def export(
    run: Annotated[str, RUN],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the files; made if need be.")],
    weights: Annotated[
        str | None,
        typer.Option(metavar="ema|raw", help="Moving average or last weights. [default: ema where it is kept]"),
    ] = None,
    checkpoint: Annotated[str, typer.Option(metavar="STEP|newest|best", help="Which checkpoint.")] = "newest",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Write a run's weights as safetensors, with its configuration and a model card. Needs no data set."""
    from safetensors.numpy import save

    from stabletrain.runs.reading import read_run
    from stabletrain.training.run_directory import readable_errors

    path = find_run(run)
    trained = load_trained(path, with_data=False, which=checkpoint)
    chosen, params = choose_weights(trained, weights)
    arrays = flat_arrays(params)
    facts = {"family": trained.family.name, "run": path.resolve().name, "step": str(trained.step), "weights": chosen}
    data = read_run(trained.run.path)
    content = {
        WEIGHTS_FILE: save(arrays, metadata={"format": "stabletrain", **facts}),
        CONFIG_FILE: (trained.run.path / "config.toml").read_bytes(),
        CARD_FILE: model_card(data, trained, chosen, arrays).encode(),
    }
    if out.exists() and not out.is_dir():
        raise RunDirectoryError(f"{out} is a file: choose another --out")
    with readable_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, payload in content.items():
            (out / name).write_bytes(payload)
    files = {name: len(payload) for name, payload in content.items()}
    if as_json:
        metrics = last_metrics(data)
        print_json({"run_dir": trained.run.path, "status": "exported", "step": trained.step, "metrics": metrics}
                   | {"out": out, "weights": chosen, "tensors": len(arrays), "files": files})  # fmt: skip
    else:
        for name, amount in files.items():
            print(f"{out / name}  ({size(amount)})")
    return EXIT_OK


def choose_weights(trained: Trained, wanted: str | None) -> tuple[str, Any]:
    """The name and the parameters of the wanted weights. Raises: `ConfigError` for weights that were not kept."""
    available: Mapping[str, Any] = trained.experiment.weights(trained.state)
    name = wanted or next(iter(available))
    if name not in available:
        raise ConfigError(f"{trained.run.path} has no weights {name!r}: {nearest(name, available)}")
    return name, available[name]


def flat_arrays(params: Any) -> dict[str, Any]:
    """`{"a": {"kernel": x}}` -> `{"a.kernel": x}`, as NumPy arrays in row-major order."""
    import jax
    import numpy as np

    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.ascontiguousarray(leaf) for path, leaf in leaves}


def last_metrics(data: RunData) -> dict[str, Any]:
    """The newest value of each metric: evaluations may be rarer than rows."""
    return {name: value for row in data.rows for name, value in row.items() if "/" in name}


def model_card(data: RunData, trained: Trained, weights: str, arrays: Mapping[str, Any]) -> str:
    """What somebody who finds the files needs to know, in Markdown: facts of the record and nothing else."""
    from stabletrain.runs.comparison import stability_counts

    record, spec, config = data.record, data.record.get("data", {}), trained.experiment.config
    parameters = sum(array.size for array in arrays.values())
    facts = {
        "Family": trained.family.name,
        "Method": config.method,
        "Parameters": f"{parameters:,} in {len(arrays)} tensors ({weights} weights)",
        "Data": ", ".join(filter(None, (spec.get("name"), f"fingerprint `{spec.get('fingerprint', '')[:16]}`"))),
        "Trained": f"{trained.step:,} of {config.steps:,} steps, seed {config.seed}",
        "Status": data.state,
        "Stability": ", ".join(f"{count} x {kind}" for kind, count in stability_counts(data).items()) or "undisturbed",
        "Hardware": record.get("devices", {}).get("kind", ""),
        "Versions": ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items() if version),
        "Commit": (record.get("git") or {}).get("commit", ""),
        "Command": f"`{' '.join(record['command'])}`" if record.get("command") else "",
    }
    scores = {name: value for name, value in last_metrics(data).items() if name.startswith("eval/")}
    lines = [
        f"# {data.name}",
        "",
        f"Trained with stabletrain; its configuration is `{CONFIG_FILE}`, its weights are `{WEIGHTS_FILE}`.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items() if value),
        *(f"| {name} | {number(value)} |" for name, value in scores.items()),
        "",
        "Names of tensors are the paths of the network's modules, joined by dots.",
    ]
    return "\n".join(lines) + "\n"
