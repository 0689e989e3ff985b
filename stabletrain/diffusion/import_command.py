"""`stabletrain diffusion import`: a published checkpoint becomes a run, to sample from, evaluate and export.

Imports no JAX until it runs.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from stabletrain.diffusion.published import (
    Published,
    PublishedOptions,
    SamplingOptions,
    experiment_of,
    read_published,
)
from stabletrain.errors import EXIT_OK, RunDirectoryError
from stabletrain.training.config import checked_values, flag

HELP = {
    field.name: field.metadata["help"]
    for options in (PublishedOptions, SamplingOptions)
    for field in dataclasses.fields(options)
}


def import_weights(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="U-ViT or UNet checkpoint: .pth, .pt, .safetensors or .npz.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The run directory to make.")],
    dataset: Annotated[str | None, typer.Option(metavar="NAME", help=HELP["dataset"])] = None,
    image_size: Annotated[int | None, typer.Option(help=HELP["image_size"])] = None,
    skip_scaling: Annotated[str, typer.Option(help=HELP["skip_scaling"])] = "none",
    kappa: Annotated[float | None, typer.Option(help=HELP["kappa"])] = None,
    heads: Annotated[int, typer.Option(help=HELP["heads"], show_default=False)] = 0,
    qkv_order: Annotated[str | None, typer.Option(help=HELP["qkv_order"])] = None,
    process: Annotated[str | None, typer.Option(help=HELP["process"])] = None,
    diffusion_steps: Annotated[int | None, typer.Option(help=HELP["diffusion_steps"])] = None,
    sampler: Annotated[str | None, typer.Option(help=HELP["sampler"])] = None,
    sampling_steps: Annotated[int | None, typer.Option(help=HELP["sampling_steps"])] = None,
    clip_denoised: Annotated[
        bool | None, typer.Option("--clip-denoised/--no-clip-denoised", help=HELP["clip_denoised"])
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> int:
    """Make a run of a published checkpoint (U-ViT, DDPM, improved DDPM, ADM), to sample from, evaluate and export."""
    given = {
        "dataset": dataset, "image_size": image_size, "skip_scaling": skip_scaling, "kappa": kappa, "heads": heads,
        "qkv_order": qkv_order, "process": process, "diffusion_steps": diffusion_steps,
    }  # fmt: skip
    asked = {"sampler": sampler, "sampling_steps": sampling_steps, "clip_denoised": clip_denoised}
    _refuse_existing(out)
    published = read_published(
        file,
        PublishedOptions(**checked_values(PublishedOptions, given, named=flag)),
        named=True,
        sampling=SamplingOptions(**checked_values(SamplingOptions, asked, named=flag)),
    )
    step = _write_run(out, published)
    config, spec = published.config, published.spec
    if as_json:
        print(json.dumps({"run_dir": str(out), "status": "done", "step": step, "metrics": {}}, indent=2))
    else:
        print(f"{out}: {published.what}, {spec['name']}, {config.method}, {config.process}")
        print(f"next: stabletrain sample {out}{' --context FILE.npz' if spec.get('context_shape') else ''}")
    return EXIT_OK


def _refuse_existing(out: Path) -> None:
    """Raises: `RunDirectoryError` for a folder with a run or checkpoints: weights are put into a new one only."""
    if (out / "config.toml").exists() or (out / "checkpoints").exists():
        raise RunDirectoryError(f"{out} already holds a run, which an import does not change: choose another --out")


def _write_run(out: Path, published: Published) -> int:
    """The run directory, with the weights as its only checkpoint, at the last step of the configuration.

    Raises: `ConfigError` where our network has other parameters than the file.
    """
    _, due = experiment_of(published)
    import jax
    import jax.numpy as jnp

    from stabletrain.diffusion.family import FAMILY
    from stabletrain.training.checkpoints import Checkpoints
    from stabletrain.training.clock import Clock
    from stabletrain.training.ema import start_average
    from stabletrain.training.run_directory import RunDirectory

    config = published.config
    weights = jax.tree.map(jnp.asarray, published.params)
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), due)
    state = state.replace(params=weights, ema=start_average(weights))
    run = RunDirectory.create(out, FAMILY.name, config)
    Checkpoints(run.path).save(config.steps, state, dataclasses.asdict(Clock(step=config.steps)), wait=True)
    run.update_record(data=published.spec, imported_from=published.file.name)
    run.write_status("done", config.steps, config.steps, reason="imported weights; not trained here")
    run.release()
    return config.steps
