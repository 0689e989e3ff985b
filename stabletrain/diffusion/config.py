"""The options of `stabletrain diffusion`, and the values chosen for those left open.

Imports no JAX: the command line reads it to answer `--help`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from stabletrain.data.catalogue import CATALOGUE
from stabletrain.diffusion.choices import (
    BACKBONE_NAMES,
    BLOCK_STYLE_NAMES,
    PROCESS_NAMES,
    PUBLISHED,
    RESAMPLING_STYLES,
    SAMPLER_NAMES,
    SKIP_SCALING_NAMES,
)
from stabletrain.diffusion.contradictions import TAKES_KAPPA, feature_sizes, problems, reads_text
from stabletrain.errors import ConfigError
from stabletrain.metrics.score_config import ScoreConfig, chosen_extractor, chosen_resize
from stabletrain.training.config import fields_of, option, replace

NETWORK, PROCESS, SAMPLING, OPTIMISER, EVALUATION = "Network", "Noise process", "Sampling", "Optimiser", "Evaluation"


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(ScoreConfig):
    """A diffusion model. 0, "auto" and values not given are chosen by backbone and data set; see `resolve`."""

    steps: int = option(0, "Number of training steps (optimiser updates); 0 chooses.", minimum=0)
    image_size: int = option(
        0, "Crop and resize images to this many pixels; 0: as the data set has them.", panel="Data", minimum=0
    )
    horizontal_flip: bool | None = option(None, "Mirror training images at random; chosen by data set.", panel="Data")

    backbone: str = option(
        "unet",
        "Network: a convolutional UNet, U-ViT, the MLP of ScaleLong's theorems, or a published size of one of them.",
        panel=NETWORK,
        choices=BACKBONE_NAMES,
    )
    skip_scaling: str = option(
        "none",
        "Scaling of the long skip connections; cs and ls are ScaleLong's.",
        panel=NETWORK,
        choices=SKIP_SCALING_NAMES,
    )
    kappa: float | None = option(None, "Base of the scaling: kappa^i for cs (0.7), kappa for const.", panel=NETWORK)
    kappa_indexing: str | None = option(
        None,
        "UNet with cs: the exponent counts skips or resolution levels.",
        panel=NETWORK,
        choices=("per-skip", "per-level"),
    )
    gate: str | None = option(
        None,
        "uvit with ls or ls-per-skip: the paper's gate, which ties the network to its number of tokens, or one over "
        "64 stretches of the tokens, for any image size.",
        panel=NETWORK,
        choices=("token", "pooled"),
    )
    width: int = option(
        0, "Channels of the first level (unet) or features per token (uvit, mlp).", panel=NETWORK, minimum=0
    )
    depth: int = option(
        0,
        "Blocks besides the middle one (uvit), residual blocks per level (unet), skips (mlp).",
        panel=NETWORK,
        minimum=0,
    )
    patch_size: int = option(0, "uvit: pixels along a patch.", panel=NETWORK, minimum=0)
    heads: int = option(0, "uvit and unet: attention heads.", panel=NETWORK, minimum=0)
    pad_tokens: int = option(
        0, "uvit: attention on tokens padded to a multiple of this, for accelerators; the same numbers. 0: never.",
        panel=NETWORK, minimum=0, identity=False,
    )  # fmt: skip
    head_channels: int = option(
        0, "unet: channels of an attention head, instead of a number of heads.", panel=NETWORK, minimum=0
    )
    block_style: str | None = option(
        None,
        "unet: residual blocks, resampling and initialisation as in DDPM, improved DDPM, ADM or EDM's DDPM++.",
        panel=NETWORK,
        choices=BLOCK_STYLE_NAMES,
    )
    resample_filter: tuple[int, ...] = option(
        (), "unet with adm or ddpm++ blocks: taps of the resampling filter; 1 1, or NCSN++'s 1 3 3 1.", panel=NETWORK
    )
    channel_multipliers: tuple[int, ...] = option(
        (), "unet: channels of each level, times the width.", panel=NETWORK, minimum=1
    )
    attention: tuple[int, ...] | None = option(
        None,
        "unet: sizes of the feature maps that get self-attention; by default 16 pixels, or the second "
        "level's, on images of more than 16.",
        panel=NETWORK,
        minimum=1,
    )
    dropout: float | None = option(None, "unet: dropout rate.", panel=NETWORK, minimum=0.0, maximum=0.95)
    class_conditional: bool | None = option(
        None,
        "Teach the labels to the network; by default where a named data set has some, but not to the mlp.",
        panel=NETWORK,
    )
    label_dropout: float | None = option(
        None, "Share of labels or texts hidden in training, for guidance.", panel=NETWORK, minimum=0.0, maximum=1.0
    )

    process: str = option(
        "vp-sde",
        "Noise process; the network predicts the noise, or with edm the preconditioned image.",
        panel=PROCESS,
        choices=PROCESS_NAMES,
    )

    diffusion_steps: int | None = option(
        None, "The three DDPM processes: levels of noise; 1,000 unless given.", panel=PROCESS, minimum=2
    )
    learned_variance: bool = option(
        False,
        "unet with a DDPM process: the network says the variance of the steps of --sampler ddpm-learned.",
        panel=PROCESS,
    )

    sampler: str = option("ddim", "Sampler of the evaluation.", panel=SAMPLING, choices=SAMPLER_NAMES)
    sampling_steps: int = option(
        50, "Network evaluations per image (with guidance, of twice the batch).", panel=SAMPLING, minimum=1
    )
    ddim_eta: float | None = option(
        None,
        "ddim: share of fresh noise, 0 (deterministic) to 1 (ancestral).",
        panel=SAMPLING,
        minimum=0.0,
        maximum=1.0,
    )
    churn: float | None = option(
        None, "heun with edm: S_churn, fresh noise along the way; 0 is deterministic.", panel=SAMPLING, minimum=0.0
    )
    guidance: float | None = option(
        None, "Guidance strength w: 1 is the labelled network alone, 0 the unlabelled one.", panel=SAMPLING, minimum=0.0
    )
    clip_denoised: bool | None = option(
        None,
        "Keep the estimated clean image in [-1, 1] at every sampling step; by default yes, but not for latents.",
        panel=SAMPLING,
    )
    latent_scale: float | None = option(
        None,
        "coco-latents: factor of the latents before the noise; 0.2301, U-ViT's, unless given.",
        panel=PROCESS,
        minimum=1e-6,
    )
    sampling_batch: int = option(250, "Images sampled at once.", panel=SAMPLING, minimum=1, identity=False)

    learning_rate: float = option(0.0, "Peak learning rate; 0 chooses.", panel=OPTIMISER, minimum=0.0)
    warmup_steps: int | None = option(None, "Steps of linear warm-up from 0.", panel=OPTIMISER, minimum=0)
    lr_decay: str | None = option(
        None,
        "Course of the learning rate after the warm-up.",
        panel=OPTIMISER,
        choices=("constant", "linear", "cosine"),
    )
    beta1: float | None = option(
        None, "AdamW: decay of the first moment.", panel=OPTIMISER, minimum=0.0, maximum=0.9999999
    )
    beta2: float | None = option(
        None, "AdamW: decay of the second moment.", panel=OPTIMISER, minimum=0.0, maximum=0.9999999
    )
    weight_decay: float | None = option(None, "AdamW: weight decay, on every parameter.", panel=OPTIMISER, minimum=0.0)
    gradient_clip: float | None = option(
        None, "Clip the global gradient norm to this; 0: never.", panel=OPTIMISER, minimum=0.0
    )
    ema_decay: float | None = option(
        None,
        "Decay of the moving average of the parameters; 0: none is kept.",
        panel=OPTIMISER,
        minimum=0.0,
        maximum=0.9999999,
    )
    ema_ramp: bool | None = option(
        None, "Let the decay rise as (1 + n) / (10 + n), so that the start is soon forgotten.", panel=OPTIMISER
    )

    eval_pairs: int = option(
        2048, "Held-out (image, time, noise) triples of the evaluation's loss.", panel=EVALUATION, minimum=1
    )

    @property
    def method(self) -> str:
        """The skip scaling; `unscaled` where there is none."""
        return "unscaled" if self.skip_scaling == "none" else self.skip_scaling

    def check(self) -> None:
        """Raises: `ConfigError` for options that contradict each other or would do nothing."""
        for problem in problems(named_network(self)):
            raise ConfigError(problem)


def named_network(config: DiffusionConfig) -> DiffusionConfig:
    """The configuration with a published network's name spelled out as options.

    Raises: `ConfigError` where an option of that network was given another value.
    """
    values = PUBLISHED.get(config.backbone)
    if values is None:
        return config
    for name, value in values.items():
        given = getattr(config, name)
        if name != "backbone" and not is_open(config, name) and given != value:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} {given} is not that of {config.backbone}, which has {value}: "
                f"use --backbone {values['backbone']}"
            )
    return replace(config, **values)


# --- automatic values -------------------------------------------------------------------------------------------------

PAPER_UVIT: dict[str, Any] = {
    "width": 512, "depth": 12, "heads": 8,
    "steps": 500_000, "learning_rate": 2e-4, "warmup_steps": 2500, "lr_decay": "constant", "beta1": 0.99,
    "beta2": 0.999, "weight_decay": 0.03, "gradient_clip": 0.0, "ema_decay": 0.9999, "ema_ramp": False,
    "eval_samples": 1000,
}  # fmt: skip
"""U-ViT-S as Bao et al. 2023 train it on CIFAR-10; 14 to 16 patches along a side."""

PAPER_UNET: dict[str, Any] = {
    "width": 128, "depth": 2, "channel_multipliers": (1, 2, 2, 2), "attention": (16,), "heads": 1, "dropout": 0.1,
    "block_style": "ddpm", "kappa_indexing": "per-level",
    "steps": 800_000, "learning_rate": 2e-4, "warmup_steps": 5000, "lr_decay": "constant", "beta1": 0.9, "beta2": 0.999,
    "weight_decay": 0.0, "gradient_clip": 1.0, "ema_decay": 0.9999, "ema_ramp": False, "eval_samples": 1000,
}  # fmt: skip
"""The UNet of Ho et al. 2020 on CIFAR-10."""

SMALL_UVIT: dict[str, Any] = PAPER_UVIT | {
    "width": 96, "depth": 6, "heads": 4,
    "steps": 3000, "learning_rate": 2e-3, "warmup_steps": 100, "lr_decay": "linear", "beta1": 0.9, "beta2": 0.99,
    "ema_decay": 0.995, "ema_ramp": True,
}  # fmt: skip
SMALL_UNET: dict[str, Any] = PAPER_UNET | {
    "width": 24, "depth": 1, "channel_multipliers": (1, 2), "attention": (), "dropout": 0.0,
    "kappa_indexing": "per-skip", "steps": 1000, "learning_rate": 3e-3, "warmup_steps": 100, "lr_decay": "linear",
    "beta2": 0.99, "ema_decay": 0.995, "ema_ramp": True,
}  # fmt: skip
"""Sized for two CPU cores and images of up to 16 pixels."""

THEOREM_MLP: dict[str, Any] = {
    "width": 128, "depth": 24,
    "steps": 500, "learning_rate": 1e-3, "warmup_steps": 100, "lr_decay": "constant", "beta1": 0.9, "beta2": 0.99,
    "weight_decay": 0.03, "gradient_clip": 0.0, "ema_decay": 0.0, "ema_ramp": False, "eval_samples": 0,
}  # fmt: skip
"""ReLU blocks and added skips as in the theorems of Huang et al. 2023, so deep that unscaled skips do not train."""

PUBLISHED_TRAINING: Mapping[str, Mapping[str, Any]] = {
    "unet-iddpm": {
        "steps": 500_000, "learning_rate": 1e-4, "warmup_steps": 0, "gradient_clip": 0.0, "dropout": 0.3,
    },
    "unet-iddpm64": {
        "steps": 1_500_000, "learning_rate": 1e-4, "warmup_steps": 0, "gradient_clip": 0.0, "dropout": 0.0,
    },
    "unet-adm64": {
        "steps": 610_352, "learning_rate": 1e-4, "warmup_steps": 2441, "gradient_clip": 0.0, "dropout": 0.1,
        "ema_decay": 0.999943, "ema_ramp": True,
    },
    "unet-ddpmpp": {
        "steps": 390_625, "learning_rate": 1e-3, "warmup_steps": 19_531, "gradient_clip": 0.0, "dropout": 0.13,
        "ema_decay": 0.99929, "ema_ramp": True,
    },
    "uvit-s4": {"warmup_steps": 5000, "beta2": 0.99},
    "uvit-m4": {"steps": 300_000, "learning_rate": 3e-4, "warmup_steps": 5000, "beta2": 0.99},
    "uvit-l4": {"steps": 300_000, "learning_rate": 3e-4, "warmup_steps": 5000, "beta2": 0.99},
}  # fmt: skip
"""How the released code trains a network, where it is not as `PAPER_UNET` or `PAPER_UVIT`.

`unet-adm64` and `unet-ddpmpp` are as Karras et al. 2022 train them. The batches, which `--batch-size` sets, are 128
(iDDPM), 4096 (ADM, 2,500 million images), 512 (DDPM++, 200 million), 128 (U-ViT-S/4 on CelebA) and 1024 (M/4 and L/4 on
ImageNet). ADM and DDPM++ warm up for 10 million images and average with half-lives of 50 and 0.5 million. Differs:
EDM's average ramps up as 5 % of the images seen.
"""

TEXT_TRAINING: dict[str, Any] = {
    "steps": 1_000_000, "learning_rate": 2e-4, "warmup_steps": 5000, "beta1": 0.9, "beta2": 0.9,
    "horizontal_flip": False, "class_conditional": False, "clip_denoised": False, "label_dropout": 0.1,
    "latent_scale": 0.2301,
}  # fmt: skip
"""How Bao et al. 2023 train their text-to-image networks on MS-COCO, in batches of 256; they sample with w = 2.

Their process is `--process ddpm-scaled-linear`, which must be asked for, as every process but vp-sde must.
"""

SMALL_IMAGES = 16


def _network_values(config: DiffusionConfig, image_size: int, published: bool) -> dict[str, Any]:
    """Size and training of the backbone: the paper's, or small for small images unless it has a published size."""
    small = 0 < image_size <= SMALL_IMAGES and not published
    if config.backbone == "mlp":
        return THEOREM_MLP
    if config.backbone == "uvit":
        patches = 4 if small else 14  # along a side, at least; the paper's 16 do not divide 28 pixels
        fitting = [patch for patch in range(1, image_size // patches + 1) if image_size % patch == 0]
        return (SMALL_UVIT if small else PAPER_UVIT) | {"patch_size": max(fitting, default=0)}
    if small:
        return dict(SMALL_UNET)
    levels = 4
    while image_size and image_size % 2 ** (levels - 1):
        levels -= 1  # 28 pixels can be halved twice only
    multipliers = config.channel_multipliers or (1, 2, 2, 2)[:levels]
    attention = attention_for(image_size, len(multipliers)) if image_size else None
    return PAPER_UNET | {"channel_multipliers": multipliers, "attention": attention}


def attention_for(image_size: int, levels: int) -> tuple[int, ...]:
    """Feature maps that attend where nobody says: those of 16 pixels, as in the paper, or else the second level's."""
    sizes = feature_sizes(image_size, levels)
    return (16,) if 16 in sizes else (sizes[1],) if levels > 1 else ()


def resolve(config: DiffusionConfig) -> DiffusionConfig:
    """The same configuration with every open value filled in: by backbone, data set and the other options.

    Options that do not apply (kappa where nothing is scaled by it) stay unset. For the user's own data `image_size` and
    `patch_size` stay 0, "as the data are" and "a sixteenth of that", and `attention` None, as `attention_for` has it at
    their size. Raises: `ConfigError` as `check` does.
    """
    name, published = config.backbone, config.backbone in PUBLISHED
    config = named_network(config)
    own_data = config.data is not None and config.dataset == "digits"  # under no known name
    info = None if own_data else CATALOGUE.get(config.dataset)
    image_size = config.image_size or (info.image_size if info else 0)
    conditional = config.class_conditional
    if conditional is None:  # the network of the theorems knows no labels
        conditional = bool(info and info.num_classes) and config.backbone != "mlp"
    chosen = {
        # The user's files must say their own size: under a known name too, another one is refused, not resized.
        "image_size": 0 if config.data else image_size,
        "extractor": chosen_extractor(config),
        "inception_resize": chosen_resize(config),
        "score_split": None if info is None or config.data else "test" if info.test_count else "train",
        "horizontal_flip": bool(info and info.channels == 3),
        "class_conditional": conditional,
        "diffusion_steps": 1000 if config.process.startswith("ddpm") else None,
        "ddim_eta": 0.0 if config.sampler == "ddim" else None,
        "churn": 0.0 if (config.sampler, config.process) == ("heun", "edm") else None,
        "label_dropout": 0.1 if conditional else 0.0,
        "guidance": (1.0 if config.label_dropout == 0 else 1.5) if conditional else None,
        "kappa": 0.7 if config.skip_scaling in TAKES_KAPPA else None,
        "gate": "token" if config.backbone == "uvit" and config.skip_scaling in ("ls", "ls-per-skip") else None,
        "clip_denoised": True,
        **_network_values(config, image_size, published),
        **PUBLISHED_TRAINING.get(name, {}),
    }
    if reads_text(config):
        chosen |= TEXT_TRAINING | {"guidance": 1.0 if config.label_dropout == 0 else 2.0}
    if config.head_channels:
        chosen["heads"] = 0
    if config.backbone == "unet" and (config.block_style or chosen["block_style"]) in RESAMPLING_STYLES:
        chosen["resample_filter"] = (1, 1)
    if config.skip_scaling != "cs":
        chosen.pop("kappa_indexing", None)
    if chosen["extractor"] == "inception":
        chosen["eval_samples"] = 1000
    elif not (info and info.num_classes):  # no classifier of these data can judge samples
        chosen["eval_samples"] = 0
    if config.steps:
        chosen["warmup_steps"] = min(chosen["warmup_steps"], config.steps // 10)
    if config.ema_decay == 0:
        chosen["ema_ramp"] = False
    resolved = replace(config, **{name: value for name, value in chosen.items() if is_open(config, name)})
    if published:  # its patches, levels and attention may not fit the data's size
        resolved.check()
    return resolved


def is_open(config: DiffusionConfig, name: str) -> bool:
    """Whether an option was left to `resolve`: None, or the 0 or () that is its default and means "choose"."""
    value = getattr(config, name)
    default = fields_of(type(config))[name].default
    return value is None or (value == default and default in (0, ()))


Value = TypeVar("Value")


def filled(value: Value | None) -> Value:
    """An option's value after `resolve`. Raises: `ValueError` for a configuration that was not resolved."""
    if value is None:
        raise ValueError("the configuration has open values: call resolve(config) first")
    return value
