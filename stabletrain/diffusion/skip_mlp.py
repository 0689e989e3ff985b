"""The network of ScaleLong's theorems: blocks of plain ReLU layers, additive skips, no norm, no residual, no bias."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stabletrain.diffusion.skips import SkipMerge, multiplier_of, skip_scales, watch
from stabletrain.methods.scalelong import LearnedScale
from stabletrain.nn.embeddings import sinusoidal


class MlpBlock(nn.Module):
    """W_l relu( ... relu(W_1 x)), every matrix m x m: hidden ones N(0, 2/m), the last one N(0, gain/m)."""

    matrices: int
    gain: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        for index in range(self.matrices):
            variance = self.gain if index == self.matrices - 1 else 2.0
            init = nn.initializers.normal((variance / width) ** 0.5)
            x = nn.Dense(width, use_bias=False, kernel_init=init, dtype=self.dtype, name=f"w{index}")(x)
            if index < self.matrices - 1:
                x = nn.relu(x)
        return x


class SkipMLP(nn.Module):
    """f_0 of Huang et al. 2023, Section 3: N encoder blocks, a middle block, N decoder blocks with added skips.

    `core` is the theorems' network exactly: [B, m] -> [B, m]. Calling the module on images flattens them, projects
    them to the width and back where they have another size, and adds a projection of the sinusoidal time (unless
    `time_embedding` is off) and of the label, of which the theorems know nothing. Shapes and the collection "features"
    as in `UViT`; here E||h_i||^2 at initialisation is `theorem31_prediction`.
    Raises: `ValueError` for images that the network was not made for, or missing labels.
    Differs: the last matrix of each block has gain 1 (`gain=2` is the literal statement; see `theorem31_prediction`).
    """

    image_size: int = 8
    image_channels: int = 1
    width: int = 128
    num_skips: int = 24
    matrices: int = 2
    gain: float = 1.0
    time_embedding: bool = True
    num_classes: int = 0
    null_label: bool = True
    skip_scaling: str = "none"
    kappa: float = 0.7
    dtype: Any = None

    def setup(self) -> None:
        def block(name: str) -> MlpBlock:
            return MlpBlock(self.matrices, self.gain, self.dtype, name=name)

        indices = range(self.num_skips)
        scales = skip_scales(self.skip_scaling, indices, self.kappa)
        self.encoders = [block(f"in_block_{i}") for i in indices]
        self.middle = block("mid_block")
        self.decoders = [block(f"out_block_{i}") for i in indices]
        self.merges = [SkipMerge(self.skip_scaling, scales[i], additive=True, name=f"merge_{i}") for i in indices]
        self.gate = LearnedScale("channel") if self.skip_scaling == "ls" else None

        def dense(features: int, name: str) -> nn.Dense:
            init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            return nn.Dense(features, use_bias=False, kernel_init=init, dtype=self.dtype, name=name)

        if self.image_size**2 * self.image_channels != self.width:
            self.project_in = dense(self.width, "project_in")
            self.project_out = dense(self.image_size**2 * self.image_channels, "project_out")
        if self.time_embedding:
            self.project_time = dense(self.width, "project_time")
        if self.num_classes:
            self.label_embedding = nn.Embed(
                self.num_classes + self.null_label,
                self.width,
                embedding_init=nn.initializers.normal(1.0),
                name="label_embedding",
            )

    def core(self, x: jax.Array, skip_multipliers: jax.Array | None = None) -> jax.Array:
        """The network of the theorems, [B, m] -> [B, m]."""
        skips = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
        x = self.middle(x)
        watch(self, "middle", x)
        for i in reversed(range(self.num_skips)):
            h, s = self.merges[i](x, skips[i], multiplier_of(skip_multipliers, i, self.num_skips), self.gate)
            x = self.decoders[i](h + s)
            watch(self, f"skip_{i}", x)
        return x

    def __call__(
        self,
        images: jax.Array,
        times: jax.Array,
        labels: jax.Array | None = None,
        *,
        skip_multipliers: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        side, channels = self.image_size, self.image_channels
        if images.shape[1:] != (side, side, channels):
            raise ValueError(f"images are {images.shape[1:]}, but the network was made for {(side, side, channels)}")
        x = images.reshape(images.shape[0], -1)
        projected = x.shape[1] != self.width
        x = self.project_in(x) if projected else x.astype(self.dtype or x.dtype)
        if self.time_embedding:
            x = x + self.project_time(sinusoidal(times, self.width).astype(x.dtype))
        if self.num_classes:
            if labels is None:
                raise ValueError("this network is class-conditional: labels are needed")
            x = x + self.label_embedding(labels).astype(x.dtype)
        x = self.core(x, skip_multipliers)
        if projected:
            x = self.project_out(x)
        return x.reshape(images.shape).astype(jnp.promote_types(x.dtype, jnp.float32))
