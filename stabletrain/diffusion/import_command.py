"""`stabletrain diffusion import`: a published checkpoint becomes a run, to sample from, evaluate and export.

Imports no JAX until it runs.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from stabletrain.diffusion.config import PROCESS_NAMES, SKIP_SCALING_NAMES, DiffusionConfig, resolve
from stabletrain.errors import EXIT_OK, ConfigError, nearest
from stabletrain.training.config import make_config


def import_weights(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="U-ViT or UNet checkpoint: .pth, .pt, .safetensors or .npz.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The run directory to make.")],
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="What it was trained on. [default: U-ViT's by size and labels]")
    ] = None,
    skip_scaling: Annotated[str, typer.Option(help="Constant skip scaling that it was trained with.")] = "none",
    kappa: Annotated[float | None, typer.Option(help="Base of that scaling.")] = None,
    heads: Annotated[
        int, typer.Option(help="Attention heads; 0: U-ViT's width / 64, improved DDPM's 4, ADM's of 64 channels.")
    ] = 0,
    qkv_order: Annotated[
        str | None,
        typer.Option(help="Improved DDPM and ADM: rows of the attention's kernel, by head or whole. [default: head]"),
    ] = None,
    process: Annotated[
        str | None, typer.Option(help="Noise process. [default: vp-sde for U-ViT without texts, else as in the paper]")
    ] = None,
    diffusion_steps: Annotated[
        int | None, typer.Option(help="Levels of noise. [default: 1,000; improved DDPM's 4,000]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> int:
    """Make a run of a published checkpoint (U-ViT, DDPM, improved DDPM, ADM), to sample from, evaluate and export."""
    from stabletrain.diffusion.unet_import import is_unet
    from stabletrain.nn.torch_file import read_arrays

    if skip_scaling not in SKIP_SCALING_NAMES[:3] and skip_scaling != "const":
        raise ConfigError(f"--skip-scaling {skip_scaling} has weights of its own, which a published checkpoint has not")
    if process not in (None, *PROCESS_NAMES):
        raise ConfigError(f"unknown --process {process!r}: {nearest(str(process), PROCESS_NAMES)}")
    if is_unet(read_arrays(file)):
        found = _unet(file, dataset, heads, qkv_order or "head")
    else:
        if qkv_order is not None:
            raise ConfigError("--qkv-order does nothing for U-ViT, whose released code has one order")
        found = _uvit(file, dataset, heads)
    values = {**found.values, "skip_scaling": skip_scaling}
    if kappa is not None:
        values["kappa"] = kappa
    if process is not None:
        values["process"] = process
        values.pop("diffusion_steps", None)
    if diffusion_steps is not None:
        values["diffusion_steps"] = diffusion_steps
        values["sampling_steps"] = min(values.get("sampling_steps", SAMPLING_STEPS), diffusion_steps)
    config = resolve(make_config(DiffusionConfig, values))
    step = _write_run(out, config, found.spec, found.params, file)
    if as_json:
        print(json.dumps({"run_dir": str(out), "status": "done", "step": step, "metrics": {}}, indent=2))
    else:
        print(f"{out}: {found.what}, {found.spec['name']}, {config.method}, {config.process}")
        print(f"next: stabletrain sample {out}{' --context FILE.npz' if found.spec.get('context_shape') else ''}")
    return EXIT_OK


@dataclass(frozen=True)
class _Found:
    """A checkpoint as a configuration's values, a description of its data, and parameters."""

    what: str
    values: dict[str, Any]
    spec: dict[str, Any]
    params: Any


def _uvit(file: Path, dataset: str | None, heads: int) -> _Found:
    from stabletrain.diffusion.uvit_import import HEAD_SIZE, read_uvit

    found = read_uvit(file)
    if not heads and found.width % HEAD_SIZE:
        raise ConfigError(f"the width {found.width} is no multiple of {HEAD_SIZE}: say how many --heads it has")
    texts = bool(found.context_shape)
    name = dataset or (TEXTS if texts else _dataset_of(found.image_size, found.embeddings))
    if texts != (name == TEXTS):
        reads = f"reads texts: its data are {TEXTS}" if texts else f"reads no texts, which {TEXTS} is made of"
        raise ConfigError(f"--dataset {name} cannot be: the checkpoint's network {reads}")
    spec = _spec(name, found.channels, found.embeddings)
    values = {
        "backbone": "uvit",
        "width": found.width,
        "depth": found.depth,
        "heads": heads or found.width // HEAD_SIZE,
        "patch_size": found.patch_size,
        **_labels(spec, found.embeddings),
    }
    if texts:
        spec |= {"image_size": found.image_size, "context_shape": list(found.context_shape)}
        values |= {"process": "ddpm-scaled-linear", "sampler": "dpm-solver-2m"}
    elif found.image_size != spec["image_size"]:
        spec["image_size"] = values["image_size"] = found.image_size
    return _Found(f"U-ViT of width {found.width} and depth {found.depth}", values, spec, found.params)


def _unet(file: Path, dataset: str | None, heads: int, qkv_order: str) -> _Found:
    from stabletrain.diffusion.unet_import import QKV_ORDERS, block_style_of, read_unet

    if dataset is None:
        raise ConfigError("a UNet's checkpoint does not say the size of its images: say --dataset NAME")
    if qkv_order not in QKV_ORDERS:
        raise ConfigError(f"unknown --qkv-order {qkv_order!r}: {nearest(qkv_order, QKV_ORDERS)}")
    division = {"heads": heads} if heads else UNET_HEADS[block_style_of(file)]
    found = read_unet(file, **division, qkv_order=qkv_order)
    spec = _spec(dataset, found.channels, found.embeddings)
    size = spec["image_size"]
    values = {
        "backbone": "unet",
        "block_style": found.block_style,
        "width": found.width,
        "depth": found.blocks,
        "channel_multipliers": found.multipliers,
        "attention": tuple(size // 2**level for level in found.attention_levels),
        **division,
        "learned_variance": found.learned_variance,
        **UNET_PROCESS[found.block_style],
        **({"sampler": "ddpm-learned", "sampling_steps": 5 * SAMPLING_STEPS} if found.learned_variance else {}),
        **_labels(spec, found.embeddings),
    }
    levels = len(found.multipliers)
    what = f"UNet of width {found.width}, {levels} levels of {found.blocks} {found.block_style} blocks"
    return _Found(what, values, spec, found.params)


SAMPLING_STEPS = 50
TEXTS = "coco-latents"
"""The data of text-to-image networks."""
UNET_HEADS: dict[str, dict[str, int]] = {"ddpm": {"heads": 1}, "iddpm": {"heads": 4}, "adm": {"head_channels": 64}}
UNET_PROCESS: dict[str, dict[str, Any]] = {
    "ddpm": {"process": "ddpm-linear"},
    "iddpm": {"process": "ddpm-cosine", "diffusion_steps": 4000},
    "adm": {"process": "ddpm-cosine"},
}
"""As the released models have it: Ho et al. 2020; Nichol and Dhariwal 2021; Dhariwal and Nichol 2021 on ImageNet-64."""


def _labels(spec: dict[str, Any], embeddings: int) -> dict[str, Any]:
    classes = len(spec["class_names"])
    values: dict[str, Any] = {"dataset": spec["name"], "class_conditional": classes > 0}
    return values | ({"label_dropout": 0.1 if embeddings > classes else 0.0} if classes else {})


def _dataset_of(image_size: int, embeddings: int) -> str:
    known = {(32, False): "cifar10", (64, False): "celeba64", (64, True): "imagenet64"}
    name = known.get((image_size, embeddings > 0))
    if name is None:
        kind = "with labels" if embeddings else "without labels"
        raise ConfigError(f"images of {image_size} pixels {kind} are of no known set: say --dataset NAME")
    return name


def _spec(name: str, channels: int, embeddings: int) -> dict[str, Any]:
    """The record's description of data that are not at hand: named classes are counted, the fingerprint is empty."""
    from stabletrain.data.locate import named

    info = named(name)
    classes = info.num_classes if embeddings else 0
    if embeddings not in ((0,) if not classes else (classes, classes + 1)):
        raise ConfigError(f"the checkpoint has {embeddings} label embeddings, but {name} has {classes} classes")
    return {
        "name": name,
        "image_size": info.image_size,
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
