"""Generator and critic of the character language model: residual networks along one dimension.

Source: Gulrajani et al. 2017, Section 5.4 and Appendix G, with the sizes of the released gan_language.py.
"""

from __future__ import annotations

import flax.linen as nn
import jax

from stabletrain.gan.networks.tf_layers import Conv1D, Linear

WINDOW = 5
BRANCH_SCALE = 0.3


class TextBlock(nn.Module):
    """x + 0.3 (ReLU, convolution, ReLU, convolution)(x) on [B, L, C]."""

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        width = text.shape[-1]
        branch = Conv1D(width, WINDOW, name="first")(nn.relu(text))
        branch = Conv1D(width, WINDOW, name="second")(nn.relu(branch))
        return text + BRANCH_SCALE * branch


class TextGenerator(nn.Module):
    """Latent [B, Z] -> a distribution over the vocabulary at each position, [B, length, vocabulary].

    The softmax is fed to the critic as it is; reading it as text takes the largest entry.
    """

    length: int
    vocabulary: int
    width: int = 512
    blocks: int = 5

    @nn.compact
    def __call__(self, latent: jax.Array) -> jax.Array:
        text = Linear(self.length * self.width, name="start")(latent).reshape(-1, self.length, self.width)
        for number in range(self.blocks):
            text = TextBlock(name=f"block_{number}")(text)
        return nn.softmax(Conv1D(self.vocabulary, 1, name="characters")(text))


class TextCritic(nn.Module):
    """[B, length, vocabulary], one-hot or a softmax, -> scores [B]. Without any normalisation."""

    width: int = 512
    blocks: int = 5

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        text = Conv1D(self.width, 1, name="characters")(text)
        for number in range(self.blocks):
            text = TextBlock(name=f"block_{number}")(text)
        return Linear(1, name="score")(text.reshape(len(text), -1))[:, 0]
