"""`stabletrain diffusion import`: a published checkpoint becomes a run, to sample from, evaluate and export.

Imports no JAX until it runs.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stabletrain.diffusion.config import SKIP_SCALING_NAMES, DiffusionConfig, resolve
from stabletrain.errors import EXIT_OK, ConfigError
from stabletrain.training.config import make_config


def import_weights(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="U-ViT checkpoint: .pth, .pt, .safetensors or .npz.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The run directory to make.")],
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="What it was trained on. [default: by size and labels]")
    ] = None,
    skip_scaling: Annotated[str, typer.Option(help="Constant skip scaling that it was trained with.")] = "none",
    kappa: Annotated[float | None, typer.Option(help="Base of that scaling.")] = None,
    heads: Annotated[int, typer.Option(help="Attention heads; 0: the width / 64, as in every published one.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> int:
    """Make a run of a published U-ViT checkpoint, for `stabletrain sample`, `evaluate` and `export`."""
    from stabletrain.diffusion.weights_import import HEAD_SIZE, read_uvit

    found = read_uvit(file)
    if skip_scaling not in SKIP_SCALING_NAMES[:3] and skip_scaling != "const":
        raise ConfigError(f"--skip-scaling {skip_scaling} has weights of its own, which a U-ViT checkpoint has not")
    if not heads and found.width % HEAD_SIZE:
        raise ConfigError(f"the width {found.width} is no multiple of {HEAD_SIZE}: say how many --heads it has")
    name = dataset or _dataset_of(found.image_size, found.embeddings)
    spec = _spec(name, found.image_size, found.channels, found.embeddings)
    classes = len(spec["class_names"])
    values: dict[str, Any] = {
        "dataset": name,
        "backbone": "uvit",
        "width": found.width,
        "depth": found.depth,
        "heads": heads or found.width // HEAD_SIZE,
        "patch_size": found.patch_size,
        "class_conditional": classes > 0,
        "skip_scaling": skip_scaling,
    }
    if classes:
        values["label_dropout"] = 0.1 if found.embeddings > classes else 0.0
    if kappa is not None:
        values["kappa"] = kappa
    config = resolve(make_config(DiffusionConfig, values))
    step = _write_run(out, config, spec, found.params, file)
    if as_json:
        print(json.dumps({"run_dir": str(out), "status": "done", "step": step, "metrics": {}}, indent=2))
    else:
        print(f"{out}: U-ViT of width {found.width} and depth {found.depth}, {name}, {config.method}")
        print(f"next: stabletrain sample {out}")
    return EXIT_OK


def _dataset_of(image_size: int, embeddings: int) -> str:
    known = {(32, False): "cifar10", (64, False): "celeba64", (64, True): "imagenet64"}
    name = known.get((image_size, embeddings > 0))
    if name is None:
        kind = "with labels" if embeddings else "without labels"
        raise ConfigError(f"images of {image_size} pixels {kind} are of no known set: say --dataset NAME")
    return name


def _spec(name: str, image_size: int, channels: int, embeddings: int) -> dict[str, Any]:
    """The record's description of data that are not at hand: named classes are counted, the fingerprint is empty."""
    from stabletrain.data.locate import named

    classes = named(name).num_classes if embeddings else 0
    if embeddings not in ((0,) if not classes else (classes, classes + 1)):
        raise ConfigError(f"the checkpoint has {embeddings} label embeddings, but {name} has {classes} classes")
    return {
        "name": name,
        "image_size": image_size,
        "channels": channels,
        "num_classes": classes,
        "class_names": [str(number) for number in range(classes)],
        "fingerprint": "",
        "train_count": 0,
        "test_count": 0,
    }


def _write_run(out: Path, config: DiffusionConfig, spec: dict[str, Any], params: Any, file: Path) -> int:
    """The run directory, with the weights as its only checkpoint, at the last step of the configuration.

    Raises: `ConfigError` where our network has other parameters than the file.
    """
    from stabletrain.training.devices import configure_backend, make_mesh

    configure_backend(1, 1)
    import jax
    import jax.numpy as jnp

    from stabletrain.diffusion.family import FAMILY, build
    from stabletrain.training.checkpoints import Checkpoints
    from stabletrain.training.clock import Clock
    from stabletrain.training.ema import start_average
    from stabletrain.training.run_directory import RunDirectory

    experiment = build(config, mesh=make_mesh(1, 1), data_spec=spec)
    due = jax.eval_shape(experiment.init, jax.random.key(0))
    theirs = jax.tree.map(lambda leaf: leaf.shape, params)
    ours = jax.tree.map(lambda leaf: leaf.shape, due.params)
    if theirs != ours:
        raise ConfigError(f"{file} does not have the parameters of {config.backbone} with these options")
    weights = jax.tree.map(jnp.asarray, params)
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), due)
    state = state.replace(params=weights, ema=start_average(weights))
    run = RunDirectory.create(out, FAMILY.name, config)
    run.update_record(data=spec, imported_from=file.name)
    Checkpoints(run.path).save(config.steps, state, dataclasses.asdict(Clock(step=config.steps)), wait=True)
    run.write_status("done", config.steps, config.steps, reason="imported weights; not trained here")
    run.release()
    return config.steps
