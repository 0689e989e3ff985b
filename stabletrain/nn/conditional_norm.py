"""Batch normalisation with running statistics, and with a scale and shift that depend on a class or on a vector.

Statistics are of the whole batch: under `jit` over a mesh that is the global batch, so that neither the loss nor its
gradient depends on the number of devices. They are computed in at least float32. The running variance is of the
unbiased estimate N / (N - 1), as in PyTorch.
Source: Ioffe and Szegedy 2015; conditional: Dumoulin et al. 2017, de Vries et al. 2017; by a vector: Brock et al. 2019.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from stabletrain.nn.spectral_norm import ORTHOGONAL, normalized

Array = jax.Array
EPSILON = 1e-4
MOMENTUM = 0.9


def normalize_batch(inputs: Array, mean: Array, variance: Array, epsilon: float = EPSILON) -> Array:
    """(x - mean) / sqrt(variance + epsilon), over the last axis of x."""
    return (inputs - mean) * lax.rsqrt(variance + epsilon)


class BatchNorm(nn.Module):
    """[B, ..., C] to zero mean and unit variance per channel, and with `affine` a learned scale and shift.

    `train`: the batch's own statistics, and the running ones move where `batch_stats` is mutable; otherwise the running
    ones. Raises: `ValueError` in training for one value per channel, whose variance says nothing.
    """

    epsilon: float = EPSILON
    momentum: float = MOMENTUM
    affine: bool = True

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Array:
        channels = inputs.shape[-1]
        wide = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), wide.dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), wide.dtype)
        if train:
            axes = tuple(range(inputs.ndim - 1))
            count = inputs.size // channels
            if count < 2:
                raise ValueError(f"batch statistics of an input of shape {inputs.shape} are of a single value")
            mean = jnp.mean(wide, axes)
            variance = jnp.mean(jnp.square(wide - mean), axes)
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                keep = self.momentum
                running_mean.value = keep * running_mean.value + (1 - keep) * mean
                running_var.value = keep * running_var.value + (1 - keep) * variance * (count / (count - 1))
        else:
            mean, variance = running_mean.value, running_var.value
        out = normalize_batch(wide, mean, variance, self.epsilon)
        if self.affine:
            scale = self.param("scale", nn.initializers.ones_init(), (channels,))
            out = out * scale + self.param("bias", nn.initializers.zeros_init(), (channels,))
        return out.astype(inputs.dtype)


class ConditionalBatchNorm(nn.Module):
    """Batch normalisation times 1 + gain(c), plus bias(c); both are linear in c without a bias of their own.

    c is a vector for each sample [B, D] (floats), or a class [B] (whole numbers below `num_classes`), which picks a row
    of the same table. With `spectral` both tables have spectral normalisation.
    """

    num_classes: int = 0
    spectral: bool = False
    epsilon: float = EPSILON
    momentum: float = MOMENTUM
    kernel_init: Any = ORTHOGONAL

    @nn.compact
    def __call__(self, inputs: Array, condition: Array, *, train: bool) -> Array:
        """inputs [B, ..., C] and conditions [B, D] or [B] -> [B, ..., C]."""
        plain = BatchNorm(self.epsilon, self.momentum, affine=False, name="norm")(inputs, train=train)
        gain = self._mapped("gain", condition, inputs.shape[-1], train)
        bias = self._mapped("bias", condition, inputs.shape[-1], train)
        spread = (len(inputs), *(1 for _ in inputs.shape[1:-1]), inputs.shape[-1])
        return (plain * (1 + gain.reshape(spread)) + bias.reshape(spread)).astype(inputs.dtype)

    def _mapped(self, name: str, condition: Array, channels: int, train: bool) -> Array:
        classes = jnp.issubdtype(condition.dtype, jnp.integer)
        kernel = self.param(name, self.kernel_init, (self.num_classes if classes else condition.shape[-1], channels))
        if self.spectral:
            kernel = normalized(self, kernel.T, name, train=train).T
        return kernel[condition] if classes else condition.astype(kernel.dtype) @ kernel
