"""From a resolved configuration to a network and a noise process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from stabletrain.diffusion.config import DiffusionConfig, attention_for
from stabletrain.diffusion.contradictions import unet_size_problems
from stabletrain.diffusion.learned_variance import LearnedVarianceDDPM
from stabletrain.diffusion.processes import DDPM, PROCESSES, Process
from stabletrain.diffusion.skip_mlp import SkipMLP
from stabletrain.diffusion.unet import STYLES, UNet
from stabletrain.diffusion.uvit import UViT
from stabletrain.errors import ConfigError


def _uvit(
    config: DiffusionConfig,
    shape: tuple[int, int, int],
    common: Mapping[str, Any],
    context_shape: tuple[int, ...] = (),
) -> UViT:
    size, _, channels = shape
    patch = config.patch_size or max(patch for patch in range(1, max(1, size // 14) + 1) if size % patch == 0)
    if size % patch:
        raise ConfigError(f"patch size {patch} does not divide the images, which are {size} pixels wide")
    return UViT(
        image_size=size,
        channels=channels,
        patch_size=patch,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        gate_form=config.gate or "token",
        context_shape=context_shape,
        pad_tokens=config.pad_tokens or 1,
        **common,
    )


def _unet(config: DiffusionConfig, shape: tuple[int, int, int], common: Mapping[str, Any]) -> UNet:
    size, _, channels = shape
    if config.attention is None:  # the user's own data, whose size was not known before
        config = dataclasses.replace(config, attention=attention_for(size, len(config.channel_multipliers)))
    for problem in unet_size_problems(config, size):
        raise ConfigError(problem)
    style = STYLES[config.block_style or "ddpm"]
    if config.resample_filter:
        style = dataclasses.replace(style, resample_filter=config.resample_filter)
    return UNet(
        image_channels=channels,
        channels=config.width,
        multipliers=config.channel_multipliers,
        blocks=config.depth,
        attention_resolutions=config.attention or (),
        heads=config.heads,
        head_channels=config.head_channels,
        style=style,
        learned_variance=config.learned_variance,
        dropout=config.dropout or 0.0,
        kappa_indexing=(config.kappa_indexing or "per-skip").removeprefix("per-"),
        **common,
    )


def _mlp(config: DiffusionConfig, shape: tuple[int, int, int], common: Mapping[str, Any]) -> SkipMLP:
    size, _, channels = shape
    return SkipMLP(image_size=size, image_channels=channels, width=config.width, num_skips=config.depth, **common)


BACKBONES: Mapping[str, Callable[[DiffusionConfig, tuple[int, int, int], Mapping[str, Any]], nn.Module]] = {
    "uvit": _uvit,
    "unet": _unet,
    "mlp": _mlp,
}


def build_network(
    config: DiffusionConfig,
    image_shape: tuple[int, int, int],
    *,
    num_classes: int,
    dtype: Any,
    context_shape: tuple[int, ...] = (),
) -> nn.Module:
    """The network of a resolved configuration for images of `image_shape` (H, W, C).

    Called as `apply({"params": p}, images, times, labels or None, skip_multipliers=None, train=False)`. The label
    `num_classes` means "none"; a network that is trained without hiding labels has no such embedding. With
    `context_shape` (L, D) the labels are text features [B, L, D]; only the U-ViT reads them.
    Raises: `ConfigError` where the shape does not fit.
    """
    common = {
        "num_classes": num_classes,
        "null_label": bool(config.label_dropout),
        "skip_scaling": config.skip_scaling,
        "kappa": 1.0 if config.kappa is None else config.kappa,
        "dtype": dtype,
    }
    if context_shape:
        return _uvit(config, image_shape, common, context_shape)
    return BACKBONES[config.backbone](config, image_shape, common)


def build_process(config: DiffusionConfig) -> Process:
    """The noise process of a resolved configuration."""
    if not config.process.startswith("ddpm"):
        return PROCESSES[config.process]()
    kind = LearnedVarianceDDPM if config.learned_variance else DDPM
    return kind(config.process.removeprefix("ddpm-"), config.diffusion_steps or 1000)
