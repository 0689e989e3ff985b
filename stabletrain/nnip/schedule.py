"""The learning rate of energy-force training: a warm-up, then half a cosine, a plateau rule, or nothing.

Pure and small, so that the rule is part of the compiled step and of the checkpoint. **Source** of the plateau rule and
the warm-up: the released configurations of StABlE Training (Raja et al. 2025): linear from a fifth of the rate, then
times 0.8 after 5 looks at the validation frames without a lower loss, down to 1e-6; PyTorch's ReduceLROnPlateau.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array

WARMUP_START = 0.2
PLATEAU_FACTOR = 0.8
BETTER = 1e-4
"""A loss counts as lower when it is below the lowest by this share, as in PyTorch."""


@struct.dataclass
class Plateau:
    """What the plateau rule remembers."""

    factor: Array  # float32 []: what the rate is multiplied with
    lowest: Array  # float32 []: the lowest loss so far
    waiting: Array  # int32 []: looks since then


def start_plateau() -> Plateau:
    """Before the first look."""
    return Plateau(jnp.ones((), jnp.float32), jnp.full((), jnp.inf, jnp.float32), jnp.zeros((), jnp.int32))


def update_plateau(plateau: Plateau, loss: Array, *, patience: int, smallest: float) -> Plateau:
    """The rule after a look that found this loss; the factor does not fall below `smallest`.

    The factor falls at look `patience + 1` without a lower loss; a loss that is not a number is not lower.
    """
    lower = loss < plateau.lowest * (1.0 - BETTER)
    waiting = jnp.where(lower, 0, plateau.waiting + 1)
    falls = waiting > patience
    return Plateau(
        factor=jnp.where(falls, jnp.maximum(plateau.factor * PLATEAU_FACTOR, smallest), plateau.factor),
        lowest=jnp.where(lower, loss, plateau.lowest),
        waiting=jnp.where(falls, 0, waiting),
    )


def learning_rate_at(
    position: Array, *, peak: float, steps: int, warmup: int, decay: str, factor: Array | float = 1.0
) -> Array:
    """The rate of update number `position` (0, 1, ...).

    From a fifth of `peak` to `peak` along a line over `warmup` updates; then, by `decay`, down to 0 at update `steps`
    along half a cosine (`cosine`), times `factor` (`plateau`), or constant.
    """
    n = position.astype(jnp.float32)
    rate = jnp.full((), peak, jnp.float32)
    if warmup:
        rate = rate * (WARMUP_START + (1.0 - WARMUP_START) * jnp.minimum(n / warmup, 1.0))
    if decay == "cosine":
        done = jnp.clip((n - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return rate * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    return rate * factor if decay == "plateau" else rate
