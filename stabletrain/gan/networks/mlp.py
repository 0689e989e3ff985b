"""Fully connected networks for small images and for points: a few milliseconds a step on a CPU.

Small enough to run thousands of steps in a minute, and without the normalisations that hide what a loss does to the
norms of a network.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stabletrain.gan.networks import NetworkOptions
from stabletrain.nn.spectral_norm import SpectralDense

Array = jax.Array
HE = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
LAST = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class MLPGenerator(nn.Module):
    """Latents [B, z_dim], with the label as a one-hot vector beside them, to samples in [-1, 1] (points: unbounded).

    `depth` hidden layers of `width` features, each with batch normalisation where `norm` is `batch`, and ReLU.
    """

    sample_shape: tuple[int, ...]
    num_classes: int
    width: int
    depth: int
    norm: str
    spectral: bool
    dtype: Any

    @classmethod
    def of(cls, options: NetworkOptions) -> MLPGenerator:
        """The generator of these options."""
        return cls(
            options.sample_shape, options.num_classes, options.generator_width, options.depth, options.generator_norm,
            options.generator_spectral, options.dtype,
        )  # fmt: skip

    @nn.compact
    def __call__(self, z: Array, labels: Array | None, *, train: bool) -> Array:
        """z [B, z_dim], labels [B] or None."""
        hidden = z
        if self.num_classes:
            hidden = jnp.concatenate([z, jax.nn.one_hot(labels, self.num_classes, dtype=z.dtype)], axis=-1)
        for layer in range(self.depth):
            hidden = _linear(hidden, self.width, f"hidden_{layer}", HE, self.spectral, train, self.dtype)
            if self.norm == "batch":
                norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm_{layer}")
                hidden = norm(hidden.astype(jnp.float32))
            hidden = jax.nn.relu(hidden)
        size = math.prod(self.sample_shape)
        out = _linear(hidden, size, "out", LAST, self.spectral, train, self.dtype).astype(jnp.float32)
        out = out.reshape(-1, *self.sample_shape)
        return jnp.tanh(out) if len(self.sample_shape) == 3 else out


class MLPDiscriminator(nn.Module):
    """Samples to features [B, width]: `depth` layers with ReLU, without normalisation, the last one's output."""

    width: int
    depth: int
    spectral: bool
    dtype: Any

    @classmethod
    def of(cls, options: NetworkOptions) -> MLPDiscriminator:
        """The discriminator of these options."""
        return cls(options.discriminator_width, options.depth, options.discriminator_spectral, options.dtype)

    @nn.compact
    def __call__(self, samples: Array, *, train: bool) -> Array:
        """samples [B, ...]."""
        hidden = samples.reshape(len(samples), -1)
        for layer in range(self.depth):
            hidden = jax.nn.relu(_linear(hidden, self.width, f"hidden_{layer}", HE, self.spectral, train, self.dtype))
        return hidden


def _linear(inputs: Array, size: int, name: str, start: Any, spectral: bool, train: bool, dtype: Any) -> Array:
    if spectral:
        return SpectralDense(size, kernel_init=start, dtype=dtype, name=name)(inputs, train=train)
    return nn.Dense(size, kernel_init=start, dtype=dtype, name=name)(inputs)
