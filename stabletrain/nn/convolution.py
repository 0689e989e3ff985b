"""The convolution of every image network: NHWC, kernels [h, w, in, out]."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax import lax

from stabletrain.nn import winograd


def convolve(images: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Any = "SAME") -> jax.Array:
    """[B, H, W, C] with [h, w, C, D] -> [B, H', W', D]. Large 3x3 convolutions of stride 1: see `winograd`."""
    if stride == 1 and padding in ("SAME", ((1, 1), (1, 1))) and winograd.pays(images, kernel):
        return winograd.convolve_3x3(images, kernel)
    return lax.conv_general_dilated(
        images, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class Convolution(nn.Module):
    """A convolution. `padding`: SAME, VALID, or explicit pairs. `dtype` None computes in the inputs' type."""

    features: int
    size: int = 3
    stride: int = 1
    padding: Any = "SAME"
    use_bias: bool = True
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (self.size, self.size, images.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,)) if self.use_bias else None
        images, kernel, bias = nn.dtypes.promote_dtype(images, kernel, bias, dtype=self.dtype)
        if self.size == 1 and self.stride == 1:
            out = images @ kernel[0, 0]
        else:
            out = convolve(images, kernel, stride=self.stride, padding=self.padding)
        return out if bias is None else out + bias
