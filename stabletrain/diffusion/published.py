"""A published checkpoint as a configuration, a description of its data, and a model that can be sampled from.

`stabletrain diffusion import` makes a run of it, `stabletrain sample --weights FILE` uses it at once. Imports no JAX
until a file is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabletrain.diffusion.choices import PROCESS_NAMES, PUBLISHED, SAMPLER_NAMES, SKIP_SCALING_NAMES
from stabletrain.diffusion.config import DiffusionConfig, resolve
from stabletrain.errors import ConfigError
from stabletrain.training.config import make_config, option

if TYPE_CHECKING:
    from stabletrain.diffusion.checkpoint_reader import Checkpoint
    from stabletrain.diffusion.experiment import DiffusionExperiment
    from stabletrain.diffusion.unet_import import ImportedUNet
    from stabletrain.diffusion.uvit_import import ImportedUViT

PANEL = "Published weights"


@dataclass(frozen=True, kw_only=True)
class PublishedOptions:
    """What a checkpoint does not say of itself. What is not given is as published."""

    dataset: str | None = option(
        None, "What it was trained on. [default: by size and labels, or the published network's]", panel=PANEL
    )
    image_size: int | None = option(
        None,
        "Pixels along an image, where they are not the data's. [default: the data's, or the published network's]",
        panel=PANEL,
        minimum=1,
    )
    skip_scaling: str = option(
        "none", "Constant skip scaling that it was trained with.", panel=PANEL, choices=SKIP_SCALING_NAMES
    )
    kappa: float | None = option(None, "Base of that scaling.", panel=PANEL)
    heads: int = option(
        0, "Attention heads; 0: U-ViT's width / 64, improved DDPM's 4, ADM's of 64 channels.", panel=PANEL, minimum=0
    )
    qkv_order: str | None = option(
        None,
        "Improved DDPM and ADM: rows of the attention's kernel, by head or whole. [default: whole for ADM's published "
        "ImageNet-64 network, else head]",
        panel=PANEL,
        choices=("head", "whole"),
    )
    process: str | None = option(
        None,
        "Noise process. [default: vp-sde for U-ViT without texts, else as in the paper]",
        panel=PANEL,
        choices=PROCESS_NAMES,
    )
    diffusion_steps: int | None = option(
        None, "Levels of noise. [default: 1,000; improved DDPM's 4,000]", panel=PANEL, minimum=2
    )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a run of a checkpoint samples when it is evaluated. What is not given is as in any run."""

    sampler: str | None = option(
        None,
        "Sampler of `evaluate`. [default: ddim; dpm-solver-2m with texts; ddpm-learned with a learned variance]",
        panel=PANEL,
        choices=SAMPLER_NAMES,
    )
    sampling_steps: int | None = option(
        None, "Network evaluations per image. [default: 50; ddpm-learned's 250]", panel=PANEL, minimum=1
    )
    clip_denoised: bool | None = option(
        None,
        "Keep the estimated clean image in [-1, 1] at every sampling step; U-ViT's released code does not. [default: "
        "yes, but not for latents]",
        panel=PANEL,
    )


@dataclass(frozen=True)
class Published:
    """A checkpoint as a resolved configuration, the description of its data, and parameters in our layout."""

    file: Path
    what: str
    config: DiffusionConfig
    spec: dict[str, Any]
    params: Any


@dataclass(frozen=True)
class _Found:
    what: str
    values: dict[str, Any]
    spec: dict[str, Any]
    params: Any


def read_published(
    file: Path, options: PublishedOptions, *, named: bool, sampling: SamplingOptions | None = None
) -> Published:
    """The network, process and data of a checkpoint of U-ViT, DDPM, improved DDPM or ADM.

    `named`: its data must be a set that is known here, as a run's are. Otherwise `image_size` does where the size is
    not in the file.
    Raises: `DataError` for a file that is no such checkpoint, or not of pictures or latents with texts; `ConfigError`
    for what must be told, or cannot be so.
    """
    from stabletrain.data.locate import named as known_as
    from stabletrain.diffusion.checkpoint_reader import open_checkpoint
    from stabletrain.diffusion.unet_import import is_unet

    if options.dataset is not None:
        known_as(options.dataset)
    if options.skip_scaling in WITH_WEIGHTS:
        raise ConfigError(
            f"--skip-scaling {options.skip_scaling} has weights of its own, which a published checkpoint has not"
        )
    checkpoint = open_checkpoint(file)
    found = (_unet if is_unet(checkpoint.arrays) else _uvit)(checkpoint, options, named)
    values = {**found.values, "skip_scaling": options.skip_scaling}
    if options.kappa is not None:
        values["kappa"] = options.kappa
    if options.process is not None:
        values["process"] = options.process
        values.pop("diffusion_steps", None)
    asked = {} if sampling is None else {k: v for k, v in vars(sampling).items() if v is not None}
    if asked.get("sampler", values.get("sampler")) != values.get("sampler"):
        values.pop("sampling_steps", None)  # those of the published sampler
    if options.diffusion_steps is not None:
        values["diffusion_steps"] = options.diffusion_steps
        values["sampling_steps"] = min(values.get("sampling_steps", SAMPLING_STEPS), options.diffusion_steps)
    values |= asked
    config = resolve(make_config(DiffusionConfig, values))
    what = found.what + (f" (of several in the file, {checkpoint.chosen!r})" if checkpoint.chosen else "")
    return Published(file, what, config, found.spec, found.params)


def experiment_of(published: Published, devices: int = 1) -> tuple[DiffusionExperiment, Any]:
    """The experiment, and the shapes of its state. Raises: `ConfigError` where the file has other parameters."""
    from stabletrain.training.devices import configure_backend, make_mesh

    batch = 1 if devices == 1 else published.config.batch_size
    configure_backend(devices, batch)
    import jax

    from stabletrain.diffusion.family import build
    from stabletrain.random_keys import random_key

    experiment = build(published.config, mesh=make_mesh(devices, batch), data_spec=published.spec)
    due = jax.eval_shape(experiment.init, random_key(0))
    theirs, ours = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (published.params, due.params))
    if theirs != ours:
        raise ConfigError(
            f"{published.file} does not have the parameters of {published.config.backbone} with these options"
        )
    return experiment, due


# --- U-ViT ------------------------------------------------------------------------------------------------------------


def _uvit(checkpoint: Checkpoint, options: PublishedOptions, named: bool) -> _Found:
    from stabletrain.diffusion.checkpoint_reader import refuse_no_pictures
    from stabletrain.diffusion.uvit_import import HEAD_SIZE, read_uvit

    if options.qkv_order is not None:
        raise ConfigError("--qkv-order does nothing for U-ViT, whose released code has one order")
    found = read_uvit(checkpoint)
    if not found.context_shape:
        refuse_no_pictures(checkpoint.path, found.channels)
    if options.image_size not in (None, found.image_size):
        raise ConfigError(f"--image-size {options.image_size} cannot be: the checkpoint's is {found.image_size}")
    if not options.heads and found.width % HEAD_SIZE:
        raise ConfigError(f"the width {found.width} is no multiple of {HEAD_SIZE}: say how many --heads it has")
    texts = bool(found.context_shape)
    name = options.dataset or (TEXTS if texts else _dataset_of(found, named))
    if texts != (name == TEXTS):
        reads = f"reads texts: its data are {TEXTS}" if texts else f"reads no texts, which {TEXTS} is made of"
        raise ConfigError(f"--dataset {name} cannot be: the checkpoint's network {reads}")
    if not texts:
        _refuse_other_pictures(name, found.channels, found.image_size, told=options.image_size is not None)
    spec = _spec(name, found.image_size, found.channels, found.embeddings, null=True)
    values = {
        "backbone": "uvit",
        "width": found.width,
        "depth": found.depth,
        "heads": options.heads or found.width // HEAD_SIZE,
        "patch_size": found.patch_size,
        "image_size": found.image_size,
        **_labels(spec, found.embeddings),
    }
    if texts:
        spec |= {"context_shape": list(found.context_shape)}
        values |= {"process": "ddpm-scaled-linear", "sampler": "dpm-solver-2m"}
        del values["image_size"]  # latents cannot be resized
    return _Found(f"U-ViT of width {found.width} and depth {found.depth}", values, spec, found.params)


def _dataset_of(found: ImportedUViT, named: bool) -> str:
    known = {(32, 3, False): "cifar10", (64, 3, False): "celeba64", (64, 3, True): "imagenet64"}
    name = known.get((found.image_size, found.channels, found.embeddings > 0), None if named else UNNAMED)
    if name is None:
        kind = "with labels" if found.embeddings else "without labels"
        raise ConfigError(f"images of {found.image_size} pixels {kind} are of no known set: say --dataset NAME")
    return name


# --- UNets ------------------------------------------------------------------------------------------------------------


def _unet(checkpoint: Checkpoint, options: PublishedOptions, named: bool) -> _Found:
    from stabletrain.diffusion.unet_import import block_style_of, read_unet

    division = {"heads": options.heads} if options.heads else UNET_HEADS[block_style_of(checkpoint.arrays)]
    found = read_unet(checkpoint, **division, qkv_order=options.qkv_order or "head")
    network = published_unet(found)
    if network == WHOLE_QKV and options.qkv_order is None:
        found = read_unet(checkpoint, **division, qkv_order="whole")
    name = options.dataset or (PUBLISHED_DATA[network] if network else None if named else UNNAMED)
    if name is None:
        raise ConfigError("a UNet's checkpoint does not say the size of its images: say --dataset NAME")
    size = options.image_size or _size_of(name)
    _refuse_other_pictures(name, found.channels, size, told=options.image_size is not None)
    spec = _spec(name, size, found.channels, found.embeddings, null=False)
    values = {
        "backbone": "unet",
        "block_style": found.block_style,
        "width": found.width,
        "depth": found.blocks,
        "channel_multipliers": found.multipliers,
        "attention": tuple(size // 2**level for level in found.attention_levels),
        "image_size": size,
        **division,
        "learned_variance": found.learned_variance,
        **UNET_PROCESS[found.block_style],
        **({"sampler": "ddpm-learned", "sampling_steps": 5 * SAMPLING_STEPS} if found.learned_variance else {}),
        **_labels(spec, found.embeddings),
    }
    levels = len(found.multipliers)
    what = f"UNet of width {found.width}, {levels} levels of {found.blocks} {found.block_style} blocks"
    return _Found(what, values, spec, found.params)


WITH_WEIGHTS = ("ls", "ls-per-skip", "layernorm", "learned-scalar")
"""Skip scalings with parameters."""
SAMPLING_STEPS = 50
TEXTS = "coco-latents"
"""The data of text-to-image networks."""
UNNAMED = "unnamed"
"""The data of a network of which only the size of the images is known."""
UNET_HEADS: dict[str, dict[str, int]] = {"ddpm": {"heads": 1}, "iddpm": {"heads": 4}, "adm": {"head_channels": 64}}
UNET_PROCESS: dict[str, dict[str, Any]] = {
    "ddpm": {"process": "ddpm-linear"},
    "iddpm": {"process": "ddpm-cosine", "diffusion_steps": 4000},
    "adm": {"process": "ddpm-cosine"},
}
"""As the released models have it: Ho et al. 2020; Nichol and Dhariwal 2021; Dhariwal and Nichol 2021 on ImageNet-64."""
PUBLISHED_DATA = {
    "unet-ddpm": "cifar10", "unet-iddpm": "cifar10", "unet-iddpm64": "imagenet64", "unet-adm64": "imagenet64"
}  # fmt: skip
WHOLE_QKV = "unet-adm64"
"""The one that was published with ADM's "new attention order"."""


def published_unet(found: ImportedUNet) -> str | None:
    """The published network that has this shape, by its name for `--backbone`; None if there is none."""
    for name, data in PUBLISHED_DATA.items():
        network, size = PUBLISHED[name], _size_of(data)
        shape = found.block_style, found.width, found.blocks, found.multipliers
        resolutions = tuple(size // 2**level for level in found.attention_levels)
        keys = ("block_style", "width", "depth", "channel_multipliers", "attention")
        if (*shape, resolutions) == tuple(network[key] for key in keys):
            return name
    return None


def _size_of(dataset: str) -> int:
    from stabletrain.data.locate import named

    if dataset == UNNAMED:
        raise ConfigError(
            "a UNet's checkpoint does not say the size of its images, and this network is none of "
            f"{', '.join(PUBLISHED_DATA)}: say --image-size N"
        )
    return named(dataset).image_size


# --- its data ---------------------------------------------------------------------------------------------------------


def _refuse_other_pictures(name: str, channels: int, image_size: int, *, told: bool) -> None:
    """Raises: `ConfigError` for a named data set of other channels, or of another size unless that was `told`."""
    from stabletrain.data.locate import named

    if name == UNNAMED:
        return
    info = named(name)
    if channels != info.channels:
        raise ConfigError(
            f"--dataset {name} cannot be: the checkpoint's images have {channels} channels, those of {name} have "
            f"{info.channels}"
        )
    if image_size != info.image_size and not told:
        raise ConfigError(
            f"--dataset {name} cannot be: the checkpoint's images have {image_size} pixels, those of {name} have "
            f"{info.image_size}; say --image-size {image_size} too if it was trained on them at that size"
        )


def _labels(spec: Mapping[str, Any], embeddings: int) -> dict[str, Any]:
    classes = len(spec["class_names"])
    values: dict[str, Any] = {"dataset": spec["name"], "class_conditional": classes > 0}
    return values | ({"label_dropout": 0.1 if embeddings > classes else 0.0} if classes else {})


def _spec(name: str, image_size: int, channels: int, embeddings: int, *, null: bool) -> dict[str, Any]:
    """The record's description of data that are not at hand: classes are counted, the fingerprint is empty.

    `null`: whether such a network has an embedding for "none", where nothing else tells the number of classes.
    """
    from stabletrain.data.locate import named

    classes = embeddings and (embeddings - null if name == UNNAMED else named(name).num_classes)
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
