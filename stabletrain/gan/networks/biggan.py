"""BigGAN: a class embedding that all layers share, and a part of the latent for each of them.

The discriminator is that of `stabletrain.gan.networks.resnet`. Source: Brock et al. 2019, Section 3 and Appendix B,
with the order of layers of PyTorch-StudioGAN.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from stabletrain.errors import ConfigError
from stabletrain.gan.channel_plan import BOTTOM, residual_plan
from stabletrain.gan.networks import NetworkOptions
from stabletrain.gan.networks.resnet import check_resnet, generator_body
from stabletrain.nn.spectral_norm import ORTHOGONAL, SpectralDense

Array = jax.Array


def check_biggan(options: NetworkOptions) -> None:
    """Raises: `ConfigError` as for the residual networks, and for a latent that does not divide into its parts."""
    check_resnet(options)
    parts = len(residual_plan(options.sample_shape[0], 1, 1).generator)
    if options.z_dim % parts:
        raise ConfigError(
            f"--z-dim {options.z_dim}: BigGAN's latent has {parts} equal parts at {options.sample_shape[0]} pixels; "
            f"use {max(parts, round(options.z_dim / parts) * parts)}"
        )
    if options.generator_norm == "none" and options.num_classes and not options.shared_dim:
        raise ConfigError("--generator-norm none with labels needs --shared-dim, whose embedding joins the latent")


class BigGANGenerator(nn.Module):
    """Latents [B, z_dim] and labels [B] to images in [-1, 1].

    The first part of the latent makes the 4x4 start; each block's normalisation receives the class embedding and its
    own part. Without normalisation the embedding joins the first part, and all parts make the start.
    """

    options: NetworkOptions

    @nn.compact
    def __call__(self, z: Array, labels: Array | None, *, train: bool) -> Array:
        """z [B, z_dim], labels [B] or None."""
        options = self.options
        widths = residual_plan(options.sample_shape[0], options.generator_width, 1).generator
        shared = class_embedding(options, labels, z.dtype)
        parts = jnp.split(z, len(widths), axis=-1)
        conditions: list[Array | None] = [jnp.concatenate([*shared, part], axis=-1) for part in parts[1:]]
        start = parts[0]
        if options.generator_norm == "none":
            start, conditions = jnp.concatenate([*shared, z], axis=-1), [None] * len(conditions)
        layer = SpectralDense(
            BOTTOM * BOTTOM * widths[0], spectral=options.generator_spectral, dtype=options.dtype, name="start"
        )
        hidden = layer(start, train=train).reshape(-1, BOTTOM, BOTTOM, widths[0])
        return generator_body(hidden, conditions, widths, options, train=train)


def class_embedding(options: NetworkOptions, labels: Array | None, dtype: jnp.dtype) -> list[Array]:
    """What stands for the label in a list of things to concatenate: nothing, a row of a table, or a one-hot vector."""
    if not options.num_classes:
        return []
    if not options.shared_dim:
        return [jax.nn.one_hot(labels, options.num_classes, dtype=dtype)]
    table = nn.Embed(options.num_classes, options.shared_dim, embedding_init=ORTHOGONAL, name="shared")
    return [table(labels)]
