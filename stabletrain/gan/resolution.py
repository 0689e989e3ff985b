"""From what the user says to a whole configuration: what makes no sense, and the values left open. Imports no JAX.

An option belongs to something (a temperature to a loss of cosines, an interval to a penalty): `BELONGS` says to what.
Given without it, it is refused with the reason; left open without it, it stays open.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stabletrain.data.catalogue import CATALOGUE
from stabletrain.errors import ConfigError
from stabletrain.gan.config import GanConfig
from stabletrain.gan.domains import domain_of
from stabletrain.gan.networks import NETWORKS, NetworkOptions, NetworkSpec
from stabletrain.gan.presets import BIRDS, BY_SIZE, CONSTRUCTED, PRESETS, SMALL
from stabletrain.metrics.score_config import chosen_extractor, chosen_resize, score_problems
from stabletrain.training.config import fields_of, replace

HANDWRITING = ("digits", "mnist", "emnist")
CLASS_LOSSES = ("ac", "ac-normalized", "2c", "d2dce")
"""Conditionings with a class loss of their own, which twin and doubled classifiers build on."""
COSINES = ("ac-normalized", "2c", "d2dce")
SMALL_IMAGES = 16
LARGE_IMAGES = 64

NETWORK_FIELDS = tuple(field.name for field in dataclasses.fields(NetworkOptions) if field.name in fields_of(GanConfig))
"""Options that networks are built from."""
ALWAYS_FOLLOWED = ("z_dim", "generator_width", "discriminator_width")


def network_of(config: GanConfig) -> NetworkSpec:
    """The pair of networks of a configuration that says which."""
    return NETWORKS[config.network or ""]


# --- what belongs to what ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Owner:
    """What an option needs, as a test of the configuration and as words."""

    present: Callable[[GanConfig], Any]
    words: str


def _on(*names: str) -> Callable[[GanConfig], bool]:
    return lambda config: any(getattr(config, name) for name in names)


_COSINE = Owner(lambda c: c.conditioning in COSINES, f"--conditioning {', '.join(COSINES)}")
_CLASSES = Owner(lambda c: c.conditioning in CLASS_LOSSES, f"a class loss (--conditioning {', '.join(CLASS_LOSSES)})")
_D2DCE = Owner(lambda c: c.conditioning == "d2dce", "--conditioning d2dce")
_ADAPTIVE = Owner(lambda c: c.augmentation in ("ada", "apa"), "--augmentation ada or apa")
_LATENT = Owner(_on("zcr_discriminator", "zcr_generator"), "--zcr-discriminator or --zcr-generator")
_LECAM = Owner(_on("lecam"), "--lecam")
_ADAM = Owner(lambda c: c.optimizer == "adam", "--optimizer adam")
_AVERAGE = Owner(_on("ema_decay", "ema_half_life"), "--ema-decay or --ema-half-life")
_STYLES = Owner(lambda c: network_of(c).styles, "a network with styles (--network stylegan2)")

BELONGS: Mapping[str, Owner] = {
    "temperature": _COSINE,
    "embedding_dim": Owner(lambda c: c.conditioning in ("2c", "d2dce"), "--conditioning 2c or d2dce"),
    "positive_margin": _D2DCE,
    "d2dce_variant": _D2DCE,
    "class_weight": _CLASSES,
    "generator_class_weight": _CLASSES,
    "class_loss_on": Owner(
        lambda c: c.conditioning in CLASS_LOSSES and c.auxiliary != "adc",
        "a class loss without --auxiliary adc, which is of real and fake samples by design",
    ),
    "one_sided": Owner(_on("gradient_penalty"), "--gradient-penalty"),
    "clip_kernels_only": Owner(_on("weight_clip"), "--weight-clip"),
    "r1_every": Owner(_on("r1_weight"), "--r1-weight"),
    "lecam_start": _LECAM,
    "lecam_decay": _LECAM,
    "zcr_radius": _LATENT,
    "path_length": _STYLES,
    "path_length_every": Owner(_on("path_length"), "--path-length"),
    "style_mixing": _STYLES,
    "diffaug_policy": Owner(lambda c: c.augmentation == "diffaug", "--augmentation diffaug"),
    "augment_target": _ADAPTIVE,
    "augment_interval": _ADAPTIVE,
    "augment_images": _ADAPTIVE,
    "beta1": _ADAM,
    "beta2": _ADAM,
    "adam_epsilon": _ADAM,
    "ema_start": _AVERAGE,
    "ema_rampup": Owner(_on("ema_half_life"), "--ema-half-life"),
    "standing_batches": Owner(lambda c: c.batch_norm == "standing", "--batch-norm standing"),
    "batch_norm": Owner(
        lambda c: "generator_norm" in network_of(c).follows and c.generator_norm != "none",
        "a generator with batch normalisation",
    ),
}  # fmt: skip


def _follows(config: GanConfig, name: str) -> bool:
    return name in ALWAYS_FOLLOWED or name in network_of(config).follows


def _applies(config: GanConfig, name: str) -> bool:
    if name in NETWORK_FIELDS and not _follows(config, name):
        return False
    return name not in BELONGS or bool(BELONGS[name].present(config))


def _given(value: Any) -> bool:
    return value is not None and value != () and value is not False and (value != 0 or isinstance(value, bool))


# --- what makes no sense ----------------------------------------------------------------------------------------------


def problems(config: GanConfig) -> Iterator[str]:
    """What is wrong with a configuration, each as the sentence that the user reads."""
    yield from score_problems(config)
    whole = _with_parts(config)
    for name in fields_of(GanConfig):
        if not _given(getattr(config, name)) or _applies(whole, name):
            continue
        flag = "--" + name.replace("_", "-")
        if name in NETWORK_FIELDS and not _follows(whole, name):
            yield f"{flag} does nothing with --network {whole.network}"
        else:
            yield f"{flag} needs {BELONGS[name].words}; here: {_situation(whole, name)}"
    yield from _loss_problems(whole)
    yield from _penalty_problems(whole)
    yield from _augmentation_problems(whole)
    yield from _network_problems(whole)
    if whole.ema_decay and whole.ema_half_life:
        yield "--ema-decay and --ema-half-life both say how fast the average forgets: give one"


def _situation(config: GanConfig, name: str) -> str:
    """The part of the configuration that an option's owner is not in."""
    for part in ("conditioning", "augmentation", "optimizer"):
        if f"--{part}" in BELONGS[name].words:
            return f"{part} {getattr(config, part)}"
    return f"--method {config.method} without it"


def _loss_problems(config: GanConfig) -> Iterator[str]:
    if config.auxiliary not in (None, "none") and config.conditioning not in CLASS_LOSSES:
        yield (
            f"--auxiliary {config.auxiliary} doubles a class loss, and --conditioning {config.conditioning} has none: "
            f"use one of {', '.join(CLASS_LOSSES)}"
        )
    if config.conditioning == "multi-hinge" and config.adversarial not in (None, "hinge"):
        yield (
            f"--conditioning multi-hinge takes the place of the adversarial loss, so --adversarial "
            f"{config.adversarial} would do nothing"
        )
    if config.conditioning == "multi-hinge" and config.lecam:
        yield "--lecam compares scores of real and fake, and --conditioning multi-hinge has none to train"
    bounded = ("gradient_penalty", "weight_clip", "dragan", "r1_weight", "discriminator_spectral", "lecam")
    if config.adversarial == "wasserstein" and not any(getattr(config, name) for name in bounded):
        yield (
            "--adversarial wasserstein needs a bound on the critic, whose scores grow without limit otherwise: "
            "--gradient-penalty 10, --weight-clip 0.01, --dragan, --r1-weight or --discriminator-spectral"
        )
    labelled = [score for score in config.scores if score in ("intra-fd", "cas")]
    if config.conditioning == "none" and labelled:
        yield f"--scores {labelled[0]} needs samples with labels (--conditioning none)"


def _penalty_problems(config: GanConfig) -> Iterator[str]:
    if config.gradient_penalty and config.weight_clip:
        yield "--gradient-penalty is what replaces --weight-clip: give one of them (0 turns the other off)"
    if config.gradient_penalty and config.dragan:
        yield "--gradient-penalty and --dragan both hold the gradient's norm at 1, at different places: give one"
    if config.weight_clip and config.discriminator_spectral:
        yield (
            "--weight-clip does nothing to a layer with spectral normalisation, which divides the size of the "
            "weights out: use --no-discriminator-spectral or --weight-clip 0"
        )
    mixing = config.discriminator_norm == "batch" or network_of(config).mixes_samples
    for name in ("gradient_penalty", "dragan"):
        if getattr(config, name) and mixing:
            why = "minibatch statistics" if config.discriminator_norm != "batch" else "--discriminator-norm batch"
            yield (
                f"--{name.replace('_', '-')} is of each score by its own sample, and {why} lets samples act on each "
                "other's scores: use --discriminator-norm layer or none"
                + ("" if config.discriminator_norm == "batch" else ", and another network")
            )
    if config.cr_weight and (config.bcr_real or config.bcr_fake):
        yield "--cr-weight and --bcr-real count the same distance twice: give one of the two"


def _augmentation_problems(config: GanConfig) -> Iterator[str]:
    kind = domain_of(config).kind
    flipped = {
        "horizontal_flip": config.horizontal_flip,
        "dequantize": config.dequantize,
        "train_limit": config.train_limit,
        "class_limit": config.class_limit,
    }
    for name in (
        *(n for n, on in flipped.items() if on),
        *(n for n in ("cr_weight", "bcr_real", "bcr_fake") if getattr(config, n)),
    ):
        if kind != "images":
            yield f"--{name.replace('_', '-')} is of images, and --dataset {config.dataset} has none"
    if config.augmentation not in (None, "none", "apa") and kind != "images":
        yield f"--augmentation {config.augmentation} is of images, and --dataset {config.dataset} has none"
    if config.augmentation in ("ada", "apa") and config.adversarial == "wasserstein":
        yield (
            f"--augmentation {config.augmentation} follows the sign of real scores, and a Wasserstein critic's scores "
            "have no meaningful zero: use another --adversarial"
        )
    if config.horizontal_flip and config.data is None and config.dataset in HANDWRITING:
        yield f"--horizontal-flip makes no sense for {config.dataset}: a mirrored character is another one or none"


def _network_problems(config: GanConfig) -> Iterator[str]:
    spec, kind = network_of(config), domain_of(config).kind
    if kind not in spec.kinds:
        fitting = " or ".join(name for name, other in NETWORKS.items() if kind in other.kinds)
        yield f"--network {config.network} makes no {kind}, which --dataset {config.dataset} needs: use {fitting}"


# --- automatic values -------------------------------------------------------------------------------------------------


def _image_size(config: GanConfig) -> int:
    """Pixels along a side as far as they are known before reading anything, else 0."""
    own_data = config.data is not None and config.dataset == "digits"  # under no known name
    info = None if own_data else CATALOGUE.get(config.dataset)
    return config.image_size or (info.image_size if info else 0)


def _is_small(config: GanConfig) -> bool:
    size = _image_size(config)
    return domain_of(config).kind != "images" or 0 < size <= SMALL_IMAGES or size & (size - 1) != 0


def _default_network(config: GanConfig) -> str:
    domain = domain_of(config)
    if "network" in domain.values:
        return str(domain.values["network"])
    preset = PRESETS[config.method]
    size = _image_size(config)
    power_of_two = size & (size - 1) == 0
    if _is_small(config) and not (config.method in CONSTRUCTED and power_of_two):
        return "mlp"
    return preset.network


def _parts(config: GanConfig) -> dict[str, Any]:
    """The method's parts and what follows from them."""
    weights = (
        "gradient_penalty", "weight_clip", "dragan", "r1_weight", "lecam", "cr_weight", "bcr_real", "bcr_fake",
        "zcr_discriminator", "zcr_generator", "orthogonality",
    )  # fmt: skip
    neutral = {"auxiliary": "none", "augmentation": "none", "optimizer": "adam", **dict.fromkeys(weights, 0.0)}
    network = config.network or _default_network(config)
    defaults = {**NETWORKS[network].defaults, **NETWORKS[network].sized(_image_size(config))}
    training = _training(config)
    preset = PRESETS[config.method]
    parts = {**neutral, **defaults, **training, **preset.parts}
    size = _image_size(config)
    if size >= LARGE_IMAGES:
        parts |= {**_by_size(preset.by_size, size), **preset.by_dataset.get(config.dataset, {})}
    if _is_small(config):
        parts |= {**SMALL, **_own(PRESETS[config.method].parts, "class_weight"), **PRESETS[config.method].small}
    parts |= {**domain_of(config).values, "network": network}
    if config.discriminator_spectral or "discriminator_norm" not in NETWORKS[network].follows:
        parts["discriminator_norm"] = "none"  # spectral normalisation is asked for in place of it
    if config.ema_half_life:
        parts["ema_decay"] = 0.0
    elif config.ema_decay:
        parts["ema_half_life"] = 0.0
    elif parts.get("ema_half_life"):
        parts["ema_decay"] = 0.0
    return parts


def _by_size(values: Mapping[int, Mapping[str, Any]], size: int) -> Mapping[str, Any]:
    """The entry of the largest size that an image reaches; nothing below the smallest."""
    reached = [least for least in values if least <= size]
    return values[max(reached)] if reached else {}


def _own(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _training(config: GanConfig) -> dict[str, Any]:
    preset = PRESETS[config.method]
    size = _image_size(config)
    values = dict(preset.training)
    if preset.network == "biggan" and size >= 64:
        values |= _by_size(BY_SIZE, size)
        if config.dataset.startswith("cub"):
            values |= BIRDS if config.network in (None, preset.network) else _without_widths(BIRDS)
    return values


def _without_widths(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not name.endswith("_width")}


def _with_parts(config: GanConfig) -> GanConfig:
    """The configuration with the method's parts in the open places; whether they apply is not asked."""
    names = fields_of(GanConfig)
    open_parts = {name: value for name, value in _parts(config).items() if name in names and is_open(config, name)}
    return _changed(config, open_parts)


def resolve(config: GanConfig) -> GanConfig:
    """The same configuration with every open value filled in: by method, network, data set and the other options.

    Options that do not apply (a temperature where nothing is a cosine) stay unset; `image_size` stays 0, "as the data
    are", for the user's own data. Raises: `ConfigError` as `check` does, and for a method of labels on a named data set
    without any.
    """
    own_data = config.data is not None and config.dataset == "digits"
    info = None if own_data else CATALOGUE.get(config.dataset)
    domain = domain_of(config)
    images = domain.kind == "images"
    whole = _with_parts(config)
    _refuse_unlabelled(whole, info.num_classes if info else (None if images else domain.num_classes))
    late = {
        "image_size": 0 if config.data else _image_size(config),
        "horizontal_flip": bool(images and info and info.channels == 3),
        "dequantize": False,
        "extractor": chosen_extractor(config),
        "inception_resize": chosen_resize(config),
        "score_split": None if info is None or config.data else "test" if info.test_count else "train",
        "d_steps": 1,
        "class_weight": 1.0,
        "generator_class_weight": whole.class_weight if whole.class_weight is not None else 1.0,
        "class_loss_on": "real",
        "temperature": 0.5 if whole.conditioning != "2c" else 1.0,
        "positive_margin": 0.98,
        "d2dce_variant": "released",
        "embedding_dim": 128,
        "one_sided": False,
        "clip_kernels_only": False,
        "r1_every": 16,
        "lecam_start": 1000,
        "lecam_decay": 0.99,
        "zcr_radius": 0.05,
        "path_length": 0.0,
        "path_length_every": 4,
        "diffaug_policy": ("color", "translation", "cutout"),
        "augment_target": 0.6,
        "augment_interval": 4,
        "augment_images": 500.0,
        "adversarial": "hinge",
        "conditioning": "none",
        "lr_decay": "constant",
        "beta1": 0.5,
        "beta2": 0.999,
        "adam_epsilon": 1e-8,
        "ema_decay": 0.0,
        "ema_half_life": 0.0,
        "ema_rampup": 0.0,
        "ema_start": 0,
        "generator_spectral": False,
        "discriminator_spectral": False,
        "generator_norm": "batch",
        "discriminator_norm": "none",
        "inplace_relu": False,
        "style_mixing": 0.0,
        "discriminator_shortcuts": True,
        "shared_dim": 0,
        "generator_attention": (),
        "discriminator_attention": (),
        "architecture": config.seed,
        "scan_blocks": False,
        "remat": False,
        "batch_norm": "running",
        "standing_batches": 16,
        "eval_samples": 1000 if images else 0,
        "steps": 1000,
        "batch_size": 64,
    }  # fmt: skip
    if images and not (info and info.num_classes):  # no classifier of these data can judge samples
        late["eval_samples"] = 1000 if config.inception or config.extractor == "inception" else 0
    filled = {name: value for name, value in late.items() if is_open(whole, name)}
    complete = _changed(whole, filled)
    if is_open(complete, "generator_batch"):
        complete = _changed(complete, {"generator_batch": complete.batch_size})
    unset = {
        name: fields_of(GanConfig)[name].default
        for name in fields_of(GanConfig)
        if is_open(config, name) and not _applies(complete, name)
    }
    return replace(_changed(complete, unset))


def _changed(config: GanConfig, values: dict[str, Any]) -> GanConfig:
    """An unchecked copy."""
    return dataclasses.replace(config, **values)


def _refuse_unlabelled(config: GanConfig, num_classes: int | None) -> None:
    """`num_classes` None: not known before the data are read."""
    if num_classes == 0 and config.conditioning != "none":
        raise ConfigError(
            f"--conditioning {config.conditioning} (of --method {config.method}) needs labels, and {config.dataset} "
            "has none: use --conditioning none, or an unconditional method (wgan-gp, wgan, lsgan, dcgan)"
        )


def is_open(config: GanConfig, name: str) -> bool:
    """Whether an option was left to `resolve`: None, or the 0 or () that is its default and means "choose"."""
    value = getattr(config, name)
    default = fields_of(GanConfig)[name].default
    return value is None or (value == default and default in (0, ()) and not isinstance(default, bool))


def network_options(
    config: GanConfig, sample_shape: tuple[int, ...], num_classes: int, dtype: Any = None
) -> NetworkOptions:
    """What the configured networks are built from. `num_classes` 0: the generator is told of no label."""
    chosen = {name: getattr(config, name) for name in NETWORK_FIELDS if getattr(config, name) is not None}
    return NetworkOptions(sample_shape=sample_shape, num_classes=num_classes, dtype=dtype, **chosen)
