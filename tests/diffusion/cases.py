"""The small networks that are compared with PyTorch, and what they are fed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.diffusion.skips import SKIP_SCALINGS
from stabletrain.diffusion.unet import STYLES, Style, UNet
from stabletrain.diffusion.uvit import UViT
from tests.diffusion.weights import Tree, inputs, wave

Case = dict[str, Any]

SMALL_UVIT: Case = {
    "image_size": 8, "channels": 2, "patch_size": 2, "width": 16, "depth": 4, "heads": 2, "num_classes": 3,
}  # fmt: skip
SMALL_UNET: Case = {
    "image_channels": 2, "channels": 8, "multipliers": (1, 2), "blocks": 1, "attention_resolutions": (4,), "heads": 2,
    "num_classes": 3,
}  # fmt: skip

UVIT_CASES: dict[str, Case] = {
    **{name: {**SMALL_UVIT, "skip_scaling": name} for name in SKIP_SCALINGS},
    "unconditional": {**SMALL_UVIT, "num_classes": 0, "skip_scaling": "cs", "kappa": 0.5},
    "texts": {**SMALL_UVIT, "num_classes": 0, "context_shape": (5, 6), "skip_scaling": "ls"},
    "time-mlp": {**SMALL_UVIT, "time_mlp": True, "final_convolution": False, "patch_size": 4, "skip_scaling": "none"},
}
UNET_CASES: dict[str, Case] = {
    **{name: {**SMALL_UNET, "skip_scaling": name} for name in SKIP_SCALINGS},
    "cs-level": {**SMALL_UNET, "skip_scaling": "cs", "kappa_indexing": "level", "kappa": 0.5},
    "iddpm": {**SMALL_UNET, "style": STYLES["iddpm"], "skip_scaling": "none", "learned_variance": True},
    "adm": {**SMALL_UNET, "style": STYLES["adm"], "skip_scaling": "cs", "blocks": 2, "head_channels": 4},
    "ddpm++": {**SMALL_UNET, "style": STYLES["ddpm++"], "skip_scaling": "ls", "blocks": 2},
    "fir": {
        **SMALL_UNET, "style": replace(STYLES["ddpm++"], resample_filter=(1, 3, 3, 1)), "skip_scaling": "const",
    },
    "unconditional": {**SMALL_UNET, "num_classes": 0, "style": Style(epsilon=1e-5), "heads": 1, "skip_scaling": "none"},
}  # fmt: skip


def network_of(kind: str, name: str) -> UViT | UNet:
    """The package's network of a case."""
    if kind == "uvit":
        return UViT(**UVIT_CASES[name])
    return UNet(**UNET_CASES[name])


def case_inputs(case: Case) -> tuple[np.ndarray, np.ndarray, Any]:
    """Images, times and labels (or texts) of a case, in float64."""
    images, times, labels = inputs(8, 2, case["num_classes"])
    return images, times, wave("texts", (3, *case["context_shape"])) if "context_shape" in case else labels


def shapes_of(kind: str, name: str) -> Tree:
    """The shapes of a case's parameters."""
    network = network_of(kind, name)
    labels = jnp.zeros(1, jnp.int32) if network.num_classes else None
    if isinstance(network, UViT) and network.context_shape:
        labels = jnp.zeros((1, *network.context_shape))
    return jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 2)), jnp.zeros(1), labels)["params"]


# --- five steps of training -------------------------------------------------------------------------------------------

TRAINING: dict[str, Case] = {
    "uvit": {
        "backbone": "uvit", "image_size": 8, "channels": 1, "patch_size": 2, "width": 16, "depth": 4, "heads": 2,
        "skip_scaling": "ls", "learning_rate": 2e-3, "warmup_steps": 3, "beta1": 0.99, "beta2": 0.9,
        "weight_decay": 0.03, "gradient_clip": 0.0, "ema_decay": 0.9,
    },
    "unet": {
        "backbone": "unet", "channels": 8, "multipliers": (1, 2), "blocks": 1, "heads": 1, "skip_scaling": "cs",
        "kappa_indexing": "level", "learning_rate": 1e-3, "warmup_steps": 2, "beta1": 0.9, "beta2": 0.999,
        "weight_decay": 0.0, "gradient_clip": 0.5, "ema_decay": 0.8,
    },
}  # fmt: skip
TRAINING_STEPS = 5
TRAINING_BATCH = 4


def training_experiment(name: str) -> Any:
    """The package's experiment of a training case, on the digits."""
    from stabletrain.diffusion.config import DiffusionConfig, resolve
    from stabletrain.diffusion.family import build
    from stabletrain.training.config import make_config
    from stabletrain.training.devices import make_mesh

    case = TRAINING[name]
    other = {"channels": "width", "multipliers": "channel_multipliers", "blocks": "depth"} if name == "unet" else {}
    values = {other.get(key, key): value for key, value in case.items() if key not in ("image_size", "channels")}
    if name == "unet":
        values |= {"width": case["channels"], "attention": (4,), "kappa_indexing": "per-level", "dropout": 0.0}
    values |= {"steps": 100, "batch_size": TRAINING_BATCH, "lr_decay": "constant", "ema_ramp": False}
    return build(resolve(make_config(DiffusionConfig, values)), mesh=make_mesh(1, 1))


def training_shapes(name: str) -> Tree:
    """The shapes of a training case's parameters."""
    return jax.eval_shape(training_experiment(name).init, jax.random.key(0)).params


def training_inputs(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images [B, 8, 8, 1] in [-1, 1], labels [B], times [B] in [0, 1] and noise of one step, in float64."""
    shape = (TRAINING_BATCH, 8, 8, 1)
    labels = np.arange(TRAINING_BATCH) * 3 % 10 + (step == 1)  # 10 is "none"
    times = (np.arange(TRAINING_BATCH) + 0.5 + 0.09 * step) / TRAINING_BATCH
    return wave(f"clean {step}", shape), labels, times, 1.4 * wave(f"noise {step}", shape)


# --- trajectories -----------------------------------------------------------------------------------------------------

TRAJECTORY_CASES: dict[str, Case] = {
    "uvit": {
        "image_size": 4, "channels": 2, "patch_size": 2, "width": 16, "depth": 2, "heads": 2, "num_classes": 0,
        "skip_scaling": "cs", "kappa": 0.5,
    },
    "texts": {
        "image_size": 4, "channels": 2, "patch_size": 2, "width": 16, "depth": 2, "heads": 2, "num_classes": 0,
        "skip_scaling": "ls", "context_shape": (3, 4),
    },
    "variance": {
        "image_channels": 2, "channels": 8, "multipliers": (1,), "blocks": 1, "attention_resolutions": (), "heads": 1,
        "num_classes": 0, "style": STYLES["iddpm"], "learned_variance": True, "skip_scaling": "cs",
    },
}  # fmt: skip
TRAJECTORY_NETWORKS: dict[str, UViT | UNet] = {
    name: (UNet if name == "variance" else UViT)(**case) for name, case in TRAJECTORY_CASES.items()
}


def trajectory_inputs(steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A start [2, 4, 4, 2], the noise of each evaluation [steps, 2, 4, 4, 2], texts [2, 3, 4] and the empty one."""
    shape = (2, 4, 4, 2)
    start, noise = 1.4 * wave("start", shape), 1.4 * wave("fresh", (steps, *shape))
    return start, noise, wave("texts", (2, 3, 4)), wave("empty", (3, 4))
