"""The convolution of every image network: NHWC, kernels [h, w, in, out]."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def convolve(images: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Any = "SAME") -> jax.Array:
    """[B, H, W, C] with [h, w, C, D] -> [B, H', W', D]."""
    return lax.conv_general_dilated(
        images, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class Convolution(nn.Module):
    """A convolution with bias. `padding`: SAME, VALID, or explicit pairs. `dtype` None computes in the inputs' type."""

    features: int
    size: int = 3
    stride: int = 1
    padding: Any = "SAME"
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (self.size, self.size, images.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        dtype = self.dtype or jnp.result_type(images, kernel)
        images, kernel, bias = (array.astype(dtype) for array in (images, kernel, bias))
        if self.size == 1 and self.stride == 1:
            return images @ kernel[0, 0] + bias
        return convolve(images, kernel, stride=self.stride, padding=self.padding) + bias
