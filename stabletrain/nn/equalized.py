"""Layers with an equalised learning rate: weights start as normal numbers and are scaled where they are used.

Adam moves every stored weight by about the learning rate, so that layers whose weights have one size learn at one
pace, whatever their fan-in. Source: Karras et al. 2018, Section 4.1.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stabletrain.nn.convolution import convolve
from stabletrain.nn.low_pass import blur, downsample

Array = jax.Array
SLOPE = 0.2


def activate(inputs: Array) -> Array:
    """Leaky ReLU of slope 0.2 times sqrt(2), which about keeps the second moment of normal inputs."""
    return jax.nn.leaky_relu(inputs, SLOPE) * jnp.asarray(2.0**0.5, inputs.dtype)


def unit_second_moment(inputs: Array) -> Array:
    """Each row [..., D] scaled so that the mean of its squares is 1. Source: Karras et al. 2018, Section 4.2."""
    return inputs * jax.lax.rsqrt(jnp.mean(inputs**2, axis=-1, keepdims=True) + 1e-8)


class EqualizedDense(nn.Module):
    """A linear layer [..., D] -> [..., features] of normal weights times 1 / sqrt(D).

    `learning_rate` scales the step of the layer besides (Karras et al. 2019, Appendix C). The bias starts at
    `bias_start`.
    """

    features: int
    use_bias: bool = True
    learning_rate: float = 1.0
    bias_start: float = 0.0

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        start = nn.initializers.normal(1.0 / self.learning_rate)
        kernel = self.param("kernel", start, (inputs.shape[-1], self.features))
        out = inputs @ (kernel * (self.learning_rate / inputs.shape[-1] ** 0.5))
        if self.use_bias:
            bias_start = nn.initializers.constant(self.bias_start / self.learning_rate)
            out = out + self.param("bias", bias_start, (self.features,)) * self.learning_rate
        return out


class EqualizedConvolution(nn.Module):
    """A convolution of normal weights times 1 / sqrt(fan-in), NHWC, that keeps the size or, with `down`, halves it.

    Halving filters by [1, 3, 3, 1] before every other pixel is taken; a 1x1 convolution then sees only those. `dtype`
    None computes in the inputs' type.
    """

    features: int
    size: int = 3
    down: bool = False
    use_bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array) -> Array:
        shape = (self.size, self.size, images.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(1.0), shape)
        dtype = self.dtype or jnp.result_type(images, kernel)
        kernel = (kernel / (self.size * self.size * images.shape[-1]) ** 0.5).astype(dtype)
        images = images.astype(dtype)
        if self.size == 1:
            out = (downsample(images) if self.down else images) @ kernel[0, 0]
        elif self.down:
            # Zeros such that a filter of 4 and a kernel of k leave H + 1 - (3 - k) pixels, of which H / 2 are taken.
            out = convolve(blur(images, (self.size + 1) // 2), kernel, stride=2, padding="VALID")
        else:
            out = convolve(images, kernel)
        if self.use_bias:
            out = out + self.param("bias", nn.initializers.zeros_init(), (self.features,)).astype(dtype)
        return out
