"""Generator and critic of the character language model: residual networks along one dimension.

Source: Gulrajani et al. 2017, Section 5.4 and Appendix G, with the sizes of the released gan_language.py.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stabletrain.errors import ConfigError
from stabletrain.gan.networks import NetworkOptions
from stabletrain.gan.networks.tf_layers import Conv1D, Linear

WINDOW = 5
BRANCH_SCALE = 0.3


class TextBlock(nn.Module):
    """x + 0.3 (ReLU, convolution, ReLU, convolution)(x) on [B, L, C]."""

    dtype: Any = None

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        width = text.shape[-1]
        branch = Conv1D(width, WINDOW, dtype=self.dtype, name="first")(nn.relu(text))
        branch = Conv1D(width, WINDOW, dtype=self.dtype, name="second")(nn.relu(branch))
        return text + BRANCH_SCALE * branch


class TextGenerator(nn.Module):
    """Latent [B, Z] -> a distribution over the vocabulary at each position, [B, length, vocabulary].

    The softmax is fed to the critic as it is; reading it as text takes the largest entry.
    """

    length: int
    vocabulary: int
    width: int = 512
    blocks: int = 5
    dtype: Any = None

    @nn.compact
    def __call__(self, latent: jax.Array, labels: jax.Array | None = None, *, train: bool) -> jax.Array:
        del labels, train
        text = Linear(self.length * self.width, dtype=self.dtype, name="start")(latent)
        text = text.reshape(-1, self.length, self.width)
        for number in range(self.blocks):
            text = TextBlock(self.dtype, name=f"block_{number}")(text)
        characters = Conv1D(self.vocabulary, 1, dtype=self.dtype, name="characters")(text)
        return nn.softmax(characters.astype(jnp.float32))


class TextCritic(nn.Module):
    """[B, length, vocabulary], one-hot or a softmax, -> features [B, length * width]. Without any normalisation."""

    width: int = 512
    blocks: int = 5
    dtype: Any = None

    @nn.compact
    def __call__(self, text: jax.Array, *, train: bool) -> jax.Array:
        del train
        text = Conv1D(self.width, 1, dtype=self.dtype, name="characters")(text)
        for number in range(self.blocks):
            text = TextBlock(self.dtype, name=f"block_{number}")(text)
        return text.reshape(len(text), -1)


def text_generator(options: NetworkOptions) -> TextGenerator:
    """The generator of the command line's options; `depth` is the number of blocks."""
    length, vocabulary = options.sample_shape
    return TextGenerator(length, vocabulary, width=options.generator_width, blocks=options.depth, dtype=options.dtype)


def text_critic(options: NetworkOptions) -> TextCritic:
    """The critic of the command line's options."""
    return TextCritic(width=options.discriminator_width, blocks=options.depth, dtype=options.dtype)


def check_text(options: NetworkOptions) -> None:
    """Raises: `ConfigError` for images."""
    if len(options.sample_shape) != 2:
        raise ConfigError(f"--network text-resnet is for --dataset text, not for samples of {options.sample_shape}")
