"""Spectral normalisation: layers whose matrix is divided by an estimate of its largest singular value.

The estimate is sigma = u^T W v, with u and v followed by one step of the power iteration at each call in training,
before use, and constant for the gradient. The raw kernel stays as it is in `params`; u and v lie in the collection
`spectral`, and are kept where the caller makes it mutable.
Source: Miyato et al. 2018, Algorithm 1, as PyTorch's hook has it: W is [out, in], for a table [entries, features].
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from stabletrain.nn.convolution import convolve

Array = jax.Array
EPSILON = 1e-6
ORTHOGONAL = nn.initializers.orthogonal()


def unit(vector: Array, epsilon: float = EPSILON) -> Array:
    """A vector over its length, or over `epsilon` where the length is smaller."""
    return vector / jnp.maximum(jnp.linalg.norm(vector), epsilon)


def power_iteration(matrix: Array, u: Array, epsilon: float = EPSILON) -> tuple[Array, Array]:
    """One step from u [out]: v = unit(W^T u), u = unit(W v). Returns (u, v), constants for the gradient."""
    fixed, start = lax.stop_gradient(matrix), lax.stop_gradient(u)
    v = unit(fixed.T @ start, epsilon)
    return unit(fixed @ v, epsilon), v


def spectral_normalize(
    matrix: Array, vectors: tuple[Array, Array], *, update: bool, epsilon: float = EPSILON
) -> tuple[Array, tuple[Array, Array]]:
    """W / sigma of W [out, in] and the vectors (u [out], v [in]) that sigma = u^T W v was taken with.

    `update`: after one step of the power iteration from u. The gradient goes through W in sigma, not through u and v.
    """
    u, v = power_iteration(matrix, vectors[0], epsilon) if update else vectors
    return matrix / (u @ matrix @ v), (u, v)


def normalized(module: nn.Module, matrix: Array, name: str, *, train: bool) -> Array:
    """W / sigma of `matrix` [out, in] inside a module's call; u and v are the module's variables `<name>_u`, `_v`."""

    matrix = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))

    def start(size: int, stream: int) -> Array:
        key = jax.random.fold_in(module.make_rng("params"), stream)
        return unit(jax.random.normal(key, (size,), matrix.dtype))

    u = module.variable("spectral", f"{name}_u", lambda: start(matrix.shape[0], 0))
    v = module.variable("spectral", f"{name}_v", lambda: start(matrix.shape[1], 1))
    weight, now = spectral_normalize(matrix, (u.value, v.value), update=train)
    if train and module.is_mutable_collection("spectral") and not module.is_initializing():
        u.value, v.value = now
    return weight


class SpectralDense(nn.Module):
    """[..., in] -> [..., features] with the kernel over its spectral norm; the bias is left alone."""

    features: int
    use_bias: bool = True
    kernel_init: Any = ORTHOGONAL
    dtype: Any = None
    spectral: bool = True

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Array:
        """`train`: one step of the power iteration before use. `spectral` off: an ordinary linear layer."""
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))
        weight = normalized(self, kernel.T, "kernel", train=train).T if self.spectral else kernel
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,)) if self.use_bias else None
        inputs, weight, bias = nn.dtypes.promote_dtype(inputs, weight, bias, dtype=self.dtype)
        out = inputs @ weight
        return out if bias is None else out + bias


class SpectralConvolution(nn.Module):
    """[B, H, W, C] -> [B, H', W', features]; the kernel [h, w, in, out] is normalised as the matrix [out, h w in].

    `transposed`: the input is spread by the stride first, as in PyTorch's ConvTranspose2d; `padding` then pads that.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: Any = "SAME"
    transposed: bool = False
    use_bias: bool = True
    kernel_init: Any = ORTHOGONAL
    spectral: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """`train`: one step of the power iteration before use. `spectral` off: an ordinary convolution."""
        shape = (self.size, self.size, images.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        if self.spectral:
            matrix = normalized(self, kernel.reshape(-1, self.features).T, "kernel", train=train)
            kernel = matrix.T.reshape(shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,)) if self.use_bias else None
        images, kernel, bias = nn.dtypes.promote_dtype(images, kernel, bias, dtype=self.dtype)
        if self.transposed:
            dilation = (self.stride, self.stride)
            out = lax.conv_general_dilated(
                images, kernel, (1, 1), self.padding, lhs_dilation=dilation, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        elif self.size == 1 and self.stride == 1:
            out = images @ kernel[0, 0]
        else:
            out = convolve(images, kernel, stride=self.stride, padding=self.padding)
        return out if bias is None else out + bias


class SpectralEmbed(nn.Module):
    """Rows of a table [entries, features] over its spectral norm, at whole-numbered places."""

    entries: int
    features: int
    embedding_init: Any = ORTHOGONAL

    @nn.compact
    def __call__(self, places: Array, *, train: bool) -> Array:
        """places [...] -> [..., features]."""
        table = self.param("embedding", self.embedding_init, (self.entries, self.features))
        return normalized(self, table, "embedding", train=train)[places]
