"""The methods by name: which parts each is made of, and how its papers train it. Imports no JAX.

A preset says nothing that an option cannot say: `--method reacgan --conditioning projection` is BigGAN trained like
ReACGAN. Where a value is not a preset's, the network's or the domain's default is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """A method: `parts` are its losses and regularisers, `network` and `training` what its paper uses at 32 pixels."""

    help: str
    parts: Values
    network: str
    training: Values = field(default_factory=dict)
    small: Values = field(default_factory=dict)
    """What differs from `SMALL` on small images."""
    by_size: Mapping[int, Values] = field(default_factory=dict)
    """What differs, in parts and training, from so many pixels on: the entry of the largest number that is reached."""
    by_dataset: Mapping[str, Values] = field(default_factory=dict)
    """What differs besides on a data set's images, from 64 pixels on."""


# --- how they are trained ---------------------------------------------------------------------------------------------

RESNET_CIFAR: Values = {
    "batch_size": 64, "steps": 100_000, "d_steps": 5, "generator_lr": 2e-4, "discriminator_lr": 2e-4,
    "beta1": 0.5, "beta2": 0.999, "adam_epsilon": 1e-6, "ema_decay": 0.0,
}  # fmt: skip
"""SNGAN, SAGAN and ACGAN on CIFAR as PyTorch-StudioGAN trains them."""

ACGAN_CIFAR: Values = {**RESNET_CIFAR, "discriminator_norm": "batch"}
"""A discriminator without spectral normalisation has batch normalisation there."""

BIGGAN_CIFAR: Values = {**RESNET_CIFAR, "ema_decay": 0.9999, "ema_start": 1000}
REACGAN_CIFAR: Values = {**BIGGAN_CIFAR, "batch_size": 128, "generator_lr": 2.8284271e-4,
                         "discriminator_lr": 2.8284271e-4}  # fmt: skip
"""Twice the batch of BigGAN and ContraGAN, and a rate higher by the root of two."""

STYLEGAN2_CIFAR: Values = {
    "batch_size": 64, "steps": 200_000, "d_steps": 1, "generator_lr": 2.5e-3, "discriminator_lr": 2.5e-3,
    "beta1": 0.0, "beta2": 0.99, "adam_epsilon": 1e-8, "ema_half_life": 500.0, "ema_rampup": 0.05,
    "r1_weight": 0.01, "r1_every": 16, "style_mixing": 0.0,
}  # fmt: skip

STYLEGAN2_LARGE: Values = {"path_length": 2.0, "path_length_every": 4, "style_mixing": 0.9, "ema_half_life": 20.0}
"""Beyond `STYLEGAN2_CIFAR`: what the setting for CIFAR leaves out, and the average of the larger data sets."""

BY_SIZE: Mapping[int, Values] = {
    64: {
        "batch_size": 1024, "steps": 100_000, "d_steps": 1, "generator_lr": 1e-4, "discriminator_lr": 4e-4,
        "beta1": 0.0, "ema_start": 20_000,
    },
    128: {
        "batch_size": 256, "steps": 200_000, "d_steps": 2, "generator_lr": 5e-5, "discriminator_lr": 2e-4,
        "beta1": 0.0, "ema_start": 20_000,
    },
}  # fmt: skip
"""How BigGAN's networks are trained at 64 pixels (Tiny-ImageNet) and at 128 or more (ImageNet, batch 256)."""

BIRDS: Values = {"steps": 40_000, "ema_start": 4000, "generator_width": 80, "discriminator_width": 80}
"""CUB-200 at 128 pixels, beyond `BY_SIZE`."""

IMAGENET = ("imagenet", "imagenet128", "imagenet256")
"""Names that ImageNet's images go by: the user's own files, and the catalogue's."""

D2DCE_BY_SIZE: Mapping[int, Values] = {
    64: {"class_weight": 0.75, "positive_margin": 1.0, "temperature": 0.75, "embedding_dim": 768},
    128: {"class_weight": 1.0, "positive_margin": 0.98, "temperature": 0.5, "embedding_dim": 2048},
}  # fmt: skip
D2DCE_STYLES_IMAGENET: Values = {
    "batch_size": 256, "d_steps": 1, "class_weight": 0.5, "positive_margin": 0.9, "embedding_dim": 2048,
}  # fmt: skip
D2DCE_BIRDS: Values = {"class_weight": 0.25, "positive_margin": 0.95, "temperature": 0.25, "embedding_dim": 1024}
CONTRASTIVE_BY_SIZE: Mapping[int, Values] = {64: {"embedding_dim": 768}, 128: {"embedding_dim": 1536}}
CONTRASTIVE_BIRDS: Values = {"embedding_dim": 1024}
"""What changes of the class losses with the size, and on CUB-200, where the option is not given."""

SMALL: Values = {
    "batch_size": 64, "steps": 6000, "d_steps": 1, "generator_lr": 2e-4, "discriminator_lr": 5e-4,
    "beta1": 0.0, "beta2": 0.99, "adam_epsilon": 1e-6, "ema_decay": 0.999, "ema_start": 0, "embedding_dim": 128,
    "class_weight": 1.0, "r1_every": 16, "generator_spectral": False, "discriminator_spectral": False,
    "discriminator_norm": "none",
}  # fmt: skip
"""For images of up to 16 pixels, or of a size that is no power of two, on two CPU cores, with fully connected networks.

Without spectral normalisation, which tames the norms whose growth this family watches.
"""

SMALL_CONVOLUTIONAL: Values = {
    "generator_width": 16, "discriminator_width": 16, "steps": 1500, "generator_lr": 2e-4, "discriminator_lr": 2e-4,
    "beta1": 0.5, "beta2": 0.999, "ema_decay": 0.99, "discriminator_norm": "none",
}  # fmt: skip
"""Beyond `SMALL`, for the methods that are a convolutional network."""

SMALL_STYLES: Values = {
    "generator_width": 32, "discriminator_width": 32, "z_dim": 64, "steps": 1500, "generator_lr": 2.5e-3,
    "discriminator_lr": 2.5e-3, "adam_epsilon": 1e-8, "r1_weight": 0.01, "ema_half_life": 10.0, "ema_rampup": 0.05,
}  # fmt: skip
"""Beyond `SMALL`, for StyleGAN2."""

# --- the methods ------------------------------------------------------------------------------------------------------

_SPECTRAL = {"generator_spectral": True, "discriminator_spectral": True}
_HINGE = {"adversarial": "hinge"}
_REACGAN = {**_HINGE, "conditioning": "d2dce", "class_weight": 0.5, "temperature": 0.5, "positive_margin": 0.98}
_D2DCE_SIZES: Mapping[str, Any] = {"by_size": D2DCE_BY_SIZE, "by_dataset": {"cub200": D2DCE_BIRDS}}

PRESETS: dict[str, Preset] = {
    "reacgan": Preset(
        "ReACGAN: Data-to-Data Cross-Entropy on the unit sphere (Kang et al. 2021).",
        {**_REACGAN, "embedding_dim": 512, **_SPECTRAL}, "biggan", REACGAN_CIFAR, **_D2DCE_SIZES,
    ),
    "reacgan-cr": Preset(
        "ReACGAN with consistency regularisation (Zhang et al. 2020).",
        {**_REACGAN, "embedding_dim": 512, **_SPECTRAL, "cr_weight": 10.0}, "biggan", REACGAN_CIFAR,
        **_D2DCE_SIZES,
    ),
    "reacgan-diffaug": Preset(
        "ReACGAN with DiffAugment (Zhao et al. 2020).",
        {**_REACGAN, "embedding_dim": 512, **_SPECTRAL, "augmentation": "diffaug"}, "biggan",
        {**REACGAN_CIFAR, "steps": 200_000}, **_D2DCE_SIZES,
    ),
    "reacgan-ada": Preset(
        "ReACGAN with adaptive augmentation (Karras et al. 2020a) and the logistic loss.",
        {**_REACGAN, "embedding_dim": 512, **_SPECTRAL, "adversarial": "non-saturating", "augmentation": "ada",
         "augment_target": 0.7, "horizontal_flip": False},
        "biggan", {**REACGAN_CIFAR, "steps": 400_000}, **_D2DCE_SIZES,
    ),
    "acgan": Preset(
        "AC-GAN: softmax cross-entropy (Odena et al. 2017), on real samples only as ReACGAN compares it.",
        {**_HINGE, "conditioning": "ac", "class_weight": 1.0, "generator_spectral": False,
         "discriminator_spectral": False},
        "sngan", ACGAN_CIFAR,
    ),
    "acgan-normalized": Preset(
        "AC-GAN with features and class weights on the unit sphere: the first half of ReACGAN.",
        {**_HINGE, "conditioning": "ac-normalized", "class_weight": 1.0, "temperature": 0.5,
         "generator_spectral": False, "discriminator_spectral": False},
        "sngan", ACGAN_CIFAR,
    ),
    "sngan": Preset(
        "SNGAN: spectral normalisation of the discriminator, projection (Miyato et al. 2018; Miyato and Koyama 2018).",
        {**_HINGE, "conditioning": "projection", "generator_spectral": False, "discriminator_spectral": True},
        "sngan", RESNET_CIFAR, {"discriminator_spectral": True},
    ),
    "sagan": Preset(
        "SAGAN: self-attention, spectral normalisation of both networks (Zhang et al. 2019).",
        {**_HINGE, "conditioning": "projection", **_SPECTRAL}, "sagan", RESNET_CIFAR,
        {**SMALL_CONVOLUTIONAL, **_SPECTRAL},
    ),
    "biggan": Preset(
        "BigGAN: projection, shared class embedding, orthogonal start (Brock et al. 2019).",
        {**_HINGE, "conditioning": "projection", **_SPECTRAL}, "biggan", BIGGAN_CIFAR,
    ),
    "contragan": Preset(
        "ContraGAN: conditional contrastive loss 2C (Kang and Park 2020).",
        {**_HINGE, "conditioning": "2c", "class_weight": 1.0, "temperature": 1.0, "embedding_dim": 512, **_SPECTRAL},
        "biggan", BIGGAN_CIFAR, by_size=CONTRASTIVE_BY_SIZE, by_dataset={"cub200": CONTRASTIVE_BIRDS},
    ),
    "tacgan": Preset(
        "TAC-GAN: AC-GAN with a twin classifier of fakes (Gong et al. 2019).",
        {**_HINGE, "conditioning": "ac", "auxiliary": "tac", "class_weight": 1.0, **_SPECTRAL}, "biggan",
        BIGGAN_CIFAR,
    ),
    "adcgan": Preset(
        "ADC-GAN: one classifier of classes, real and fake (Hou et al. 2022).",
        {**_HINGE, "conditioning": "ac", "auxiliary": "adc", "class_weight": 1.0, **_SPECTRAL}, "biggan",
        BIGGAN_CIFAR,
    ),
    "stylegan2": Preset(
        "StyleGAN2 with its projection, lazy R1 (Karras et al. 2020b).",
        {"adversarial": "non-saturating", "conditioning": "sg2-projection"}, "stylegan2", STYLEGAN2_CIFAR,
        SMALL_STYLES, {64: STYLEGAN2_LARGE}, {"cub200": {"r1_weight": 0.2048, "steps": 100_000}},
    ),
    "stylegan2-d2dce": Preset(
        "StyleGAN2 with D2D-CE in place of projection.",
        {"adversarial": "non-saturating", "conditioning": "d2dce", "class_weight": 0.25, "temperature": 0.25,
         "positive_margin": 0.98, "embedding_dim": 512},
        "stylegan2", {**STYLEGAN2_CIFAR, "d_steps": 2}, SMALL_STYLES, {64: STYLEGAN2_LARGE},
        {"cub200": {"r1_weight": 0.2048, "steps": 100_000, "positive_margin": 0.95, "embedding_dim": 1024},
         **dict.fromkeys(IMAGENET, D2DCE_STYLES_IMAGENET)},
    ),
    "wgan-gp": Preset(
        "WGAN-GP: Wasserstein critic with a gradient penalty (Gulrajani et al. 2017).",
        {"adversarial": "wasserstein", "conditioning": "none", "gradient_penalty": 10.0,
         "generator_spectral": False, "discriminator_spectral": False},
        "wgan-gp-resnet",
        {"batch_size": 64, "steps": 100_000, "d_steps": 5, "generator_lr": 2e-4, "discriminator_lr": 2e-4,
         "beta1": 0.0, "beta2": 0.9, "adam_epsilon": 1e-8, "lr_decay": "linear", "ema_decay": 0.0},
        {"d_steps": 5, "generator_lr": 1e-4, "discriminator_lr": 1e-4, "beta2": 0.9},
    ),
    "wgan": Preset(
        "WGAN: Wasserstein critic with clipped weights (Arjovsky et al. 2017).",
        {"adversarial": "wasserstein", "conditioning": "none", "weight_clip": 0.01, "optimizer": "rmsprop",
         "generator_spectral": False, "discriminator_spectral": False},
        "dcgan",
        {"batch_size": 64, "steps": 200_000, "d_steps": 5, "generator_lr": 5e-5, "discriminator_lr": 5e-5,
         "ema_decay": 0.0},
        {"d_steps": 5, "generator_lr": 5e-5, "discriminator_lr": 5e-5},
    ),
    "lsgan": Preset(
        "LSGAN: least squares (Mao et al. 2017).",
        {"adversarial": "least-squares", "conditioning": "none", "generator_spectral": False,
         "discriminator_spectral": False},
        "dcgan", {**RESNET_CIFAR, "d_steps": 1},
    ),
    "dcgan": Preset(
        "DCGAN: the non-saturating loss (Radford et al. 2016).",
        {"adversarial": "non-saturating", "conditioning": "none", "generator_spectral": False,
         "discriminator_spectral": False},
        "dcgan", {**RESNET_CIFAR, "d_steps": 1}, SMALL_CONVOLUTIONAL,
    ),
}  # fmt: skip
"""Every method, by the name that `--method` takes; the first is the default."""

CONSTRUCTED: frozenset[str] = frozenset({"dcgan", "sagan", "stylegan2", "stylegan2-d2dce"})
"""Methods that are a network: on small images too they have their own."""
