"""Widths of convolutional GANs at every square power-of-two size from 8 to 256. Imports no JAX.

At 32 pixels and above the residual plans are those of BigGAN and of PyTorch-StudioGAN; 8 and 16 continue the one of 32,
whose width is constant.
"""

from __future__ import annotations

from dataclasses import dataclass

from stabletrain.errors import ConfigError

SIZES = (8, 16, 32, 64, 128, 256)
BOTTOM = 4
"""Pixels along a side where generators start."""

_GENERATOR = {
    8: (4, 4), 16: (4, 4, 4), 32: (4, 4, 4, 4), 64: (16, 8, 4, 2, 1), 128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
}  # fmt: skip
"""Multiples of the width: at the bottom, and behind each block."""
_DISCRIMINATOR = {
    8: (2, 2, 2), 16: (2, 2, 2, 2), 32: (2, 2, 2, 2), 64: (1, 2, 4, 8, 16), 128: (1, 2, 4, 8, 16, 16),
    256: (1, 2, 4, 8, 8, 16, 16),
}  # fmt: skip
"""Multiples of the width behind each block."""
_DOWNS = {8: 1, 16: 2, 32: 2, 64: 4, 128: 5, 256: 6}
"""How many blocks, the first ones, halve the image. 32 pixels end at 8x8, all others at 4x4."""


@dataclass(frozen=True)
class ResidualPlan:
    """Channels of a pair of residual networks."""

    generator: tuple[int, ...]
    """At the bottom, then behind each block; every block doubles the image."""
    discriminator: tuple[int, ...]
    """Behind each block."""
    halving: tuple[bool, ...]
    """Whether a block of the discriminator halves the image."""


def residual_plan(size: int, generator_width: int, discriminator_width: int) -> ResidualPlan:
    """The plan of SNGAN, SAGAN and BigGAN. Raises: `ConfigError` for a size without one."""
    check_size(size)
    multiples = _DISCRIMINATOR[size]
    return ResidualPlan(
        tuple(generator_width * multiple for multiple in _GENERATOR[size]),
        tuple(discriminator_width * multiple for multiple in multiples),
        tuple(number < _DOWNS[size] for number in range(len(multiples))),
    )


def deep_plan(size: int, generator_width: int, discriminator_width: int) -> ResidualPlan:
    """BigGAN-deep's: the discriminator's first entry is its first convolution, the others are its stages.

    Raises: `ConfigError` for a size without one.
    """
    plan = residual_plan(size, generator_width, discriminator_width)
    widths = plan.discriminator if size > 32 else (4 * discriminator_width,) * len(plan.discriminator)
    return ResidualPlan(plan.generator, widths, plan.halving[:-1])


def doublings(size: int) -> int:
    """From 4x4 to a size: log2(size / 4). Raises: `ConfigError` for a size without a plan."""
    check_size(size)
    return SIZES.index(size) + 1


def check_size(size: int) -> None:
    """Raises: `ConfigError` for a size that is no power of two from 8 to 256."""
    if size not in SIZES:
        nearest = min(SIZES, key=lambda known: abs(known - size))
        raise ConfigError(
            f"this network makes images of {', '.join(map(str, SIZES))} pixels, and these have {size}: "
            f"use --image-size {nearest} or --network mlp"
        )
