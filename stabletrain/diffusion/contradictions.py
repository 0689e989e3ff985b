"""What is wrong with a configuration of `stabletrain diffusion`: options that contradict each other or do nothing.

Imports no JAX: the command line checks before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from stabletrain.data.catalogue import CATALOGUE
from stabletrain.diffusion.choices import PROCESS_NAMES, RESAMPLING_STYLES, SAMPLER_PROCESSES
from stabletrain.metrics.score_config import judging_asked, score_problems

if TYPE_CHECKING:
    from stabletrain.diffusion.config import DiffusionConfig

ONLY_FOR: Mapping[str, tuple[str, ...]] = {
    "patch_size": ("uvit",),
    "pad_tokens": ("uvit",),
    "heads": ("uvit", "unet"),
    "channel_multipliers": ("unet",),
    "attention": ("unet",),
    "dropout": ("unet",),
    "head_channels": ("unet",),
    "block_style": ("unet",),
    "resample_filter": ("unet",),
    "kappa_indexing": ("unet",),
    "learned_variance": ("unet",),
    "gate": ("uvit",),
}
"""Options that only some backbones have."""

TAKES_KAPPA = ("cs", "const")
FEWEST_LEVELS: Mapping[str, int] = {"ddpm-linear": 21, "ddpm-scaled-linear": 13}
"""Noise levels below which a schedule, scaled to their number, would remove more variance than there is."""
HANDWRITING = ("digits", "mnist", "emnist")


def _given(value: Any) -> bool:
    return value is not None and value != () and value != 0


def problems(config: DiffusionConfig) -> Iterator[str]:
    """What is wrong with a configuration, each as the sentence that the user reads."""
    for name, backbones in ONLY_FOR.items():
        if _given(getattr(config, name)) and config.backbone not in backbones:
            flag = "--" + name.replace("_", "-")
            yield f"{flag} does nothing with --backbone {config.backbone}: it belongs to {' and '.join(backbones)}"
    yield from _scaling_problems(config)
    yield from _shape_problems(config)
    yield from _text_problems(config) if reads_text(config) else _label_problems(config)
    if config.latent_scale is not None and not reads_text(config):
        yield "--latent-scale does nothing with pictures: it belongs to --dataset coco-latents"
    yield from _sampler_problems(config)
    yield from score_problems(config)
    if config.horizontal_flip and config.data is None and config.dataset in HANDWRITING:
        yield f"--horizontal-flip makes no sense for {config.dataset}: a mirrored character is another one or none"
    if config.ema_ramp and config.ema_decay == 0:
        yield "--ema-ramp does nothing with --ema-decay 0"
    if config.lr_decay in ("linear", "cosine") and config.steps and (config.warmup_steps or 0) >= config.steps:
        yield (
            f"--warmup-steps {config.warmup_steps} leaves nothing of the {config.steps} steps for "
            f"--lr-decay {config.lr_decay}"
        )


def _scaling_problems(config: DiffusionConfig) -> Iterator[str]:
    if config.kappa is not None:
        if config.skip_scaling not in TAKES_KAPPA:
            owners = " and ".join(TAKES_KAPPA)
            yield f"--kappa does nothing with --skip-scaling {config.skip_scaling}: it belongs to {owners}"
        if not 0 < config.kappa <= 1:
            yield f"kappa is {config.kappa}, but must be above 0 and at most 1: it damps the deeper skips"
    if config.gate is not None and config.skip_scaling not in ("ls", "ls-per-skip"):
        yield f"--gate does nothing with --skip-scaling {config.skip_scaling}: it belongs to ls and ls-per-skip"
    if config.kappa_indexing is not None and config.skip_scaling != "cs":
        yield f"--kappa-indexing does nothing with --skip-scaling {config.skip_scaling}: it belongs to cs"


def _shape_problems(config: DiffusionConfig) -> Iterator[str]:
    if config.backbone == "uvit":
        if config.depth % 2:
            yield f"--depth {config.depth} is odd, but a U-ViT has as many blocks before the middle as after it"
        if config.patch_size and config.image_size % config.patch_size:
            yield f"patch size {config.patch_size} does not divide the image size {config.image_size}"
    if config.heads and config.width % config.heads:
        yield f"--width {config.width} is not divisible by {config.heads} attention heads"
    yield from _unet_problems(config)
    if config.backbone == "unet" and config.channel_multipliers:
        yield from unet_size_problems(config, config.image_size)


def feature_sizes(image_size: int, levels: int) -> list[int]:
    """Pixels along the feature maps of a UNet's levels, the first those of the image."""
    return [image_size // 2**level for level in range(levels)]


def unet_size_problems(config: DiffusionConfig, image_size: int) -> Iterator[str]:
    """What a UNet with these `channel_multipliers` cannot be on images of a size; 0: not known yet."""
    multipliers = config.channel_multipliers
    halvings = len(multipliers) - 1
    sizes = feature_sizes(image_size, len(multipliers))
    if image_size % 2**halvings:
        yield (
            f"{halvings + 1} levels halve the image {halvings} times, but {image_size} pixels are not divisible by "
            f"{2**halvings}: use fewer --channel-multipliers or another --image-size"
        )
    elif image_size:
        for size in config.attention or ():
            if size not in sizes:
                yield f"--attention {size} names no feature map: their sizes are {', '.join(map(str, sizes))}"
    if not (config.head_channels and config.width):
        return
    for level, size in enumerate(sizes):
        attends = level == halvings or (image_size and size in (config.attention or ()))  # the last: in the middle
        width = config.width * multipliers[level]
        if attends and width % config.head_channels:
            yield f"{width} channels at level {level + 1} are no multiple of --head-channels {config.head_channels}"


def _unet_problems(config: DiffusionConfig) -> Iterator[str]:
    if config.heads and config.head_channels:
        yield f"--heads {config.heads} does nothing with --head-channels {config.head_channels}"
    taps = config.resample_filter
    if taps and config.block_style not in (None, *RESAMPLING_STYLES):
        yield (
            f"--resample-filter does nothing with --block-style {config.block_style}: it belongs to "
            f"{' and '.join(RESAMPLING_STYLES)}"
        )
    if taps and (len(taps) % 2 or not sum(taps)):
        yield f"--resample-filter has {len(taps)} taps of sum {sum(taps)}: an even number, and no zero sum, are due"


def reads_text(config: DiffusionConfig) -> bool:
    """Whether the data are latents with text features."""
    return config.dataset in CATALOGUE and CATALOGUE[config.dataset].latents


def _text_problems(config: DiffusionConfig) -> Iterator[str]:
    name = config.dataset
    if config.backbone != "uvit":
        yield f"{name} needs --backbone uvit (or a size of it): text features are tokens beside patches"
    if config.class_conditional:
        yield f"--class-conditional makes no sense for {name}: its images have texts, no labels"
    if config.image_size and config.image_size != CATALOGUE[name].image_size:
        yield f"--image-size does nothing for {name}: latents cannot be resized"
    if config.horizontal_flip:
        yield f"--horizontal-flip makes no sense for {name}: the latent of a mirrored picture is no mirrored latent"
    if config.eval_samples:
        yield f"--eval-samples {config.eval_samples} makes no sense for {name}: latents are no pictures to be judged"
    if asked := judging_asked(config):
        yield f"{asked} makes no sense for {name}: latents are no pictures to be judged"
    if config.clip_denoised:
        yield f"--clip-denoised makes no sense for {name}: latents do not lie in [-1, 1]"
    if config.guidance not in (None, 1.0) and config.label_dropout == 0:
        yield f"--guidance {config.guidance} needs a network that was trained without texts too: raise --label-dropout"


def _label_problems(config: DiffusionConfig) -> Iterator[str]:
    if config.class_conditional is False:
        if config.label_dropout:
            yield "--label-dropout does nothing without labels (--no-class-conditional)"
        if config.guidance is not None:
            yield "--guidance does nothing without labels (--no-class-conditional)"
        if labelled := [score for score in config.scores if score in ("intra-fd", "cas")]:
            yield f"--scores {labelled[0]} needs samples with labels (--no-class-conditional)"
    elif config.guidance not in (None, 1.0) and config.label_dropout == 0:
        yield f"--guidance {config.guidance} needs a network that was trained without labels too: raise --label-dropout"


def sampler_problem(config: DiffusionConfig, sampler: str, steps: int) -> str | None:
    """Why a sampler of so many network evaluations cannot follow a process, as the user reads it; None if it can."""
    process = config.process
    if sampler == "ddpm-learned" and not config.learned_variance:
        return "--sampler ddpm-learned asks the network for a variance, which only one with --learned-variance says"
    processes = SAMPLER_PROCESSES.get(sampler, PROCESS_NAMES)
    if process not in processes:
        return (
            f"--sampler {sampler} cannot follow {process}, which is in {_kind_of_time(process)} time: "
            f"it needs --process {' or '.join(processes)}"
        )
    levels, there_are = (steps + 1) // 2 if sampler == "heun" else steps, config.diffusion_steps or 1000
    if process.startswith("ddpm") and levels > there_are:
        return f"--sampling-steps {steps} asks for more than the {there_are} levels of {process}"
    return None


def _kind_of_time(process: str) -> str:
    return "discrete" if process.startswith("ddpm") else "continuous"


def _sampler_problems(config: DiffusionConfig) -> Iterator[str]:
    fewest = FEWEST_LEVELS.get(config.process, 2)
    if config.diffusion_steps is not None and config.diffusion_steps < fewest:
        yield (
            f"--diffusion-steps {config.diffusion_steps} is too few for {config.process}, whose last level would then "
            f"keep nothing of the image: use at least {fewest}, or --process ddpm-cosine"
        )
    problem = sampler_problem(config, config.sampler, config.sampling_steps)
    if problem:
        yield problem
    if not config.process.startswith("ddpm"):
        for name in ("diffusion_steps", "learned_variance"):
            if getattr(config, name):
                flag = "--" + name.replace("_", "-")
                yield f"{flag} does nothing with --process {config.process}: it belongs to the DDPM ones"
    if config.churn and (config.sampler, config.process) != ("heun", "edm"):
        yield f"--churn does nothing with --sampler {config.sampler} on {config.process}: it belongs to heun on edm"
    if config.ddim_eta is not None and config.sampler != "ddim":
        yield f"--ddim-eta does nothing with --sampler {config.sampler}"
