"""The names that options of `stabletrain diffusion` take, and the published networks that some of them stand for.

Imports no JAX: the command line reads it to answer `--help`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "uvit-s2": {"backbone": "uvit", "width": 512, "depth": 12, "heads": 8, "patch_size": 2},
    "uvit-s2-deep": {"backbone": "uvit", "width": 512, "depth": 16, "heads": 8, "patch_size": 2},
    "uvit-s4": {"backbone": "uvit", "width": 512, "depth": 12, "heads": 8, "patch_size": 4},
    "uvit-m4": {"backbone": "uvit", "width": 768, "depth": 16, "heads": 12, "patch_size": 4},
    "uvit-l4": {"backbone": "uvit", "width": 1024, "depth": 20, "heads": 16, "patch_size": 4},
    "unet-ddpm": {
        "backbone": "unet", "width": 128, "depth": 2, "channel_multipliers": (1, 2, 2, 2), "attention": (16,),
        "heads": 1, "block_style": "ddpm",
    },
    "unet-iddpm": {
        "backbone": "unet", "width": 128, "depth": 3, "channel_multipliers": (1, 2, 2, 2), "attention": (16, 8),
        "heads": 4, "block_style": "iddpm",
    },
    "unet-iddpm64": {
        "backbone": "unet", "width": 128, "depth": 3, "channel_multipliers": (1, 2, 3, 4), "attention": (16, 8),
        "heads": 4, "block_style": "iddpm",
    },
    "unet-adm64": {
        "backbone": "unet", "width": 192, "depth": 3, "channel_multipliers": (1, 2, 3, 4), "attention": (32, 16, 8),
        "head_channels": 64, "block_style": "adm",
    },
    "unet-ddpmpp": {
        "backbone": "unet", "width": 128, "depth": 4, "channel_multipliers": (2, 2, 2), "attention": (16,),
        "heads": 1, "block_style": "ddpm++",
    },
    "unet-ddpmpp-song": {
        "backbone": "unet", "width": 128, "depth": 4, "channel_multipliers": (1, 2, 2, 2), "attention": (16,),
        "heads": 1, "block_style": "ddpm++",
    },
}  # fmt: skip
"""Published networks by name: what `--backbone` stands for.

Sources: Bao et al. 2023, Tables 1 and 6; Ho et al. 2020; Nichol and Dhariwal 2021; Dhariwal and Nichol 2021;
Karras et al. 2022 (`unet-ddpmpp`); Song et al. 2021 (`unet-ddpmpp-song`); sizes as in the released code.
"""

BACKBONE_NAMES = ("unet", "uvit", "mlp", *PUBLISHED)
BLOCK_STYLE_NAMES = ("ddpm", "iddpm", "adm", "ddpm++")
RESAMPLING_STYLES = ("adm", "ddpm++")
"""Those that change the resolution within residual blocks, with a filter."""
SKIP_SCALING_NAMES = ("none", "sqrt2", "cs", "ls", "ls-per-skip", "const", "mp-cat", "layernorm", "learned-scalar")
PROCESS_NAMES = ("vp-sde", "ddpm-linear", "ddpm-cosine", "ddpm-scaled-linear", "edm")
SAMPLER_NAMES = (
    "ddim", "ddpm", "ddpm-large", "ddpm-learned", "euler-maruyama", "ode-euler", "heun", "dpm-solver-fast",
    "dpm-solver-2m",
)  # fmt: skip
SAMPLER_PROCESSES = {
    "euler-maruyama": ("vp-sde",),
    "ode-euler": ("vp-sde", "edm"),
    "dpm-solver-fast": ("vp-sde", "edm"),
    "ddpm-learned": ("ddpm-linear", "ddpm-cosine", "ddpm-scaled-linear"),
}
"""The processes that a sampler can follow, where not all."""
