"""U-ViT: a vision transformer with long skip connections (Bao et al., CVPR 2023), with a choice of skip scalings."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from stabletrain.diffusion.skips import SkipMerge, multiplier_of, skip_scales, watch
from stabletrain.methods.scalelong import SQRT_HALF, LearnedScale
from stabletrain.nn.attention import attend
from stabletrain.nn.convolution import Convolution
from stabletrain.nn.embeddings import sinusoidal
from stabletrain.nn.initializers import torch_uniform

EPSILON = 1e-5  # of every LayerNorm in the released network; Flax's own default is 1e-6
normal_002 = nn.initializers.normal(0.02)


def layer_norm(name: str, dtype: Any) -> nn.LayerNorm:
    """LayerNorm with statistics in float32 and the two-pass variance."""
    return nn.LayerNorm(epsilon=EPSILON, use_fast_variance=False, dtype=dtype, name=name)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU by erf, as PyTorch computes it; that of JAX by erfc takes twice as long on a CPU."""
    return 0.5 * x * (1.0 + lax.erf(x * SQRT_HALF))


def materialized(x: jax.Array) -> jax.Array:
    """The same array, which XLA:CPU is made to write down, and its gradient too.

    Else it computes the residual stream's gradient, a chain through all later blocks, anew within each consumer, and
    a step of a small U-ViT takes a tenth longer. No other backend does that.
    """
    return lax.optimization_barrier(x) if jax.default_backend() == "cpu" else x


class Block(nn.Module):
    """Pre-norm transformer block: x + Attn(LN(x)), then x + MLP(LN(x)). [B, L, D] -> [B, L, D].

    Queries, keys and values come from one matrix without bias, in the order (q, k, v) x heads x d; exact (erf) GELU.
    """

    heads: int
    mlp_ratio: float = 4.0
    dtype: Any = None
    pad_tokens: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape

        def dense(features: int, name: str, bias: bool = True) -> nn.Dense:
            return nn.Dense(features, use_bias=bias, kernel_init=normal_002, dtype=self.dtype, name=name)

        # Rows of all images [B L, D]: from two axes XLA:CPU sums the gradients of a norm or a kernel with a copy more.
        rows = materialized(x.reshape(batch * length, width))
        qkv = dense(3 * width, "qkv", bias=False)(layer_norm("norm1", self.dtype)(rows))
        heads = (batch, length, self.heads, width // self.heads)
        queries, keys, values = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=1))
        y = attend(queries, keys, values, multiple=self.pad_tokens).reshape(rows.shape)
        rows = materialized(rows + dense(width, "proj")(y))
        y = layer_norm("norm2", self.dtype)(rows)
        y = gelu(dense(int(self.mlp_ratio * width), "fc1")(y))
        return (rows + dense(width, "fc2")(y)).reshape(x.shape)


class SkipLinear(nn.Module):
    """Linear(2D -> D) of the concatenation [h, s], computed as h W_h + s W_s without a copy; one kernel [2D, D]."""

    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, h: jax.Array, s: jax.Array) -> jax.Array:
        width = h.shape[-1]
        kernel = self.param("kernel", normal_002, (width + s.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        dtype = self.dtype or jnp.result_type(h, kernel)
        kernel = kernel.astype(dtype)
        rows, skip_rows = h.reshape(-1, width).astype(dtype), s.reshape(-1, s.shape[-1]).astype(dtype)
        out = rows @ kernel[:width] + skip_rows @ kernel[width:] + bias.astype(dtype)
        return out.reshape(*h.shape[:-1], self.features)


class UViT(nn.Module):
    """Predicts the noise in `images` at `times`.

    Tokens are [label,] time, [texts,] patches. With `num_classes` > 0 labels are given as [B] in 0 .. num_classes, the
    last being the null label of classifier-free guidance (left out with `null_label=False`). With `context_shape`
    (L, D) they are text features [B, L, D], and each of the L becomes a token by one linear map. With neither they are
    not used.

    Shapes: images [B, H, W, C], times [B] (0 .. 999), labels [B] or [B, L, D] -> [B, H, W, C] in at least float32.
    Collection "features", when mutable: the per-sample norm [B] of each decoder block's output, `skip_<i>`, of the
    middle block's, `middle`, and the mean gate where there are gates.
    Source: Bao et al. 2023, U-ViT; Huang et al. 2023 for the scalings.
    """

    image_size: int
    channels: int = 3
    patch_size: int = 2
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    time_mlp: bool = False
    final_convolution: bool = True
    """Of the image, after the patches are put together."""
    num_classes: int = 0
    null_label: bool = True
    context_shape: tuple[int, ...] = ()
    skip_scaling: str = "none"
    kappa: float = 0.7
    gate_form: str = "token"
    dtype: Any = None
    pad_tokens: int = 1
    """Attention pads its tokens to a multiple of this, and masks the padding."""

    @property
    def num_skips(self) -> int:
        """Long skip connections: one for each encoder block."""
        return self.depth // 2

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        times: jax.Array,
        labels: jax.Array | None = None,
        *,
        skip_multipliers: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        x, extras = self._tokens(images, times, labels)
        shared = LearnedScale(self.gate_form, name="gate") if self.skip_scaling == "ls" else None
        scales = skip_scales(self.skip_scaling, range(self.num_skips), self.kappa)
        skips = []

        def block(name: str) -> Block:
            return Block(self.heads, self.mlp_ratio, self.dtype, self.pad_tokens, name=name)

        for i in range(self.num_skips):
            x = block(f"in_block_{i}")(x)
            skips.append(x)
        x = block("mid_block")(x)
        watch(self, "middle", x)
        for i in reversed(range(self.num_skips)):
            merge = SkipMerge(self.skip_scaling, scales[i], self.gate_form, name=f"merge_{i}")
            h, s = merge(x, skips[i], multiplier_of(skip_multipliers, i, self.num_skips), shared)
            x = SkipLinear(self.width, self.dtype, name=f"skip_linear_{i}")(h, s)
            x = block(f"out_block_{i}")(x)
            watch(self, f"skip_{i}", x)
        x = layer_norm("norm", self.dtype)(x)[:, extras:]
        return self._images(x)

    def _tokens(self, images: jax.Array, times: jax.Array, labels: jax.Array | None) -> tuple[jax.Array, int]:
        batch, height, width, channels = images.shape
        p = self.patch_size
        if (height, width, channels) != (self.image_size, self.image_size, self.channels):
            raise ValueError(
                f"images are {height}x{width}x{channels}, but the network was made for "
                f"{self.image_size}x{self.image_size}x{self.channels}"
            )
        if height % p:
            raise ValueError(f"patches of {p} do not divide an image of {height}x{width}")
        fan_in = p * p * channels
        kernel = self.param("patch_kernel", torch_uniform(fan_in), (p, p, channels, self.width))
        bias = self.param("patch_bias", torch_uniform(fan_in), (self.width,))
        dtype = self.dtype or jnp.result_type(images, kernel)
        patches = images.reshape(batch, height // p, p, width // p, p, channels).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(batch, -1, fan_in).astype(dtype)  # a strided convolution is one product
        x = patches @ kernel.reshape(fan_in, self.width).astype(dtype) + bias.astype(dtype)
        time = sinusoidal(times, self.width).astype(dtype)
        if self.time_mlp:
            time = self._dense(4 * self.width, "time_0")(time)
            time = self._dense(self.width, "time_1")(nn.silu(time))
        tokens = [time[:, None], x]
        if self.num_classes:
            if labels is None:
                raise ValueError("this network is class-conditional: labels are needed")
            table = nn.Embed(
                self.num_classes + self.null_label,
                self.width,
                embedding_init=nn.initializers.normal(1.0),
                name="label_embedding",
            )
            tokens.insert(0, table(labels)[:, None].astype(dtype))
        if self.context_shape:
            if labels is None or labels.shape[1:] != self.context_shape:
                given = "none" if labels is None else f"an array of shape {labels.shape}"
                raise ValueError(f"this network reads text features [B, {self.context_shape}], not {given}")
            tokens.insert(1, self._dense(self.width, "context_embedding")(labels.astype(dtype)))
        x = jnp.concatenate(tokens, axis=1)
        positions = self.param("position_embedding", normal_002, (1, x.shape[1], self.width))
        return x + positions.astype(dtype), x.shape[1] - patches.shape[1]

    def _images(self, x: jax.Array) -> jax.Array:
        p, c = self.patch_size, self.channels
        side = self.image_size // p
        x = self._dense(p * p * c, "decoder")(x)
        x = x.reshape(-1, side, side, p, p, c).transpose(0, 1, 3, 2, 4, 5)  # (p1 p2 C), the channel fastest
        x = x.reshape(-1, self.image_size, self.image_size, c)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.final_convolution:
            init = torch_uniform(9 * c)
            x = Convolution(c, kernel_init=init, bias_init=init, name="final_conv")(x)
        return x

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, kernel_init=normal_002, dtype=self.dtype, name=name)


SIZES = {
    "S": {"width": 512, "depth": 12, "heads": 8},
    "S-deep": {"width": 512, "depth": 16, "heads": 8},
    "M": {"width": 768, "depth": 16, "heads": 12},
    "L": {"width": 1024, "depth": 20, "heads": 16},
}
"""Published sizes; the patch is named apart: S/2 is size S with patch_size 2."""
