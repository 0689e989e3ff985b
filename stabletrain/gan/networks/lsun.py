"""The seven generator and critic pairs that the paper trains on LSUN bedrooms, to see which of them a method survives.

| name | generator | critic |
|---|---|---|
| dcgan | DCGAN | DCGAN |
| plain-g | constant width, no normalisation | DCGAN |
| mlp-g | four ReLU layers of 512 units | DCGAN |
| no-norm | DCGAN without normalisation | the same |
| gated | tanh times a sigmoid gate after every layer | the same |
| tanh | tanh for every nonlinearity | the same |
| resnet101 | 101 layers | 101 layers |

Source: Gulrajani et al. 2017, Section 5.2, Figure 2 and Appendix H, by the released gan_64x64.py; resnet101 is in
`resnet101.py`. Images are square with a side of 4 * 2^n, n at least 1; the paper's have 64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stabletrain.errors import ConfigError
from stabletrain.gan.networks import NetworkOptions
from stabletrain.gan.networks.tf_layers import Conv, Deconv, Linear, Norm

LSUN_NAMES = ("dcgan", "plain-g", "mlp-g", "no-norm", "gated", "tanh", "resnet101")
CIFAR = "cifar"
"""The release's pair for CIFAR-10 (gan_cifar.py) beside the seven: DCGAN with other starts."""
START = 0.02
LEAK = 0.2
BASE = 4
MLP_UNITS, MLP_LAYERS = 512, 4


def gate(inputs: jax.Array) -> jax.Array:
    """[..., 2C] -> [..., C]: sigmoid of the even channels times tanh of the odd ones."""
    return nn.sigmoid(inputs[..., ::2]) * jnp.tanh(inputs[..., 1::2])


def leaky(inputs: jax.Array) -> jax.Array:
    """LeakyReLU of slope 0.2."""
    return nn.leaky_relu(inputs, LEAK)


def halvings(size: int) -> int:
    """How often a square of this side is halved down to 4x4.

    Raises: `ValueError` for a side that is not 4 * 2^n with n at least 1.
    """
    count = (size // BASE).bit_length() - 1
    if count < 1 or size != BASE << count:
        raise ValueError(f"these networks are for images of side 8, 16, 32, 64, 128, ..., not {size}")
    return count


class DcganGenerator(nn.Module):
    """Latent [B, Z] -> images [B, size, size, channels]: a linear layer to 4x4, then 5x5 transposed convolutions.

    `activation`: "relu", "tanh" or "gated". The width halves with every doubling of the side; `constant_width` keeps
    it at the base width and starts as He et al., as the pair plain-g does. `cifar` is the release's network for
    CIFAR-10: the transposed convolutions start as He et al., the linear layer as Glorot, normalised unit by unit.
    """

    size: int
    channels: int
    width: int = 64
    norm: str = "batch"
    activation: str = "relu"
    constant_width: bool = False
    cifar: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, latent: jax.Array, labels: jax.Array | None = None, *, train: bool) -> jax.Array:
        del labels
        activate = _activation(self.activation, {"relu": nn.relu})
        copies = 2 if self.activation == "gated" else 1
        start: str | float = "he" if self.constant_width or self.cifar else START
        linear_start = "glorot" if self.cifar else start
        stages = halvings(self.size)
        widths = [self.width if self.constant_width else self.width << place for place in reversed(range(stages))]
        images = Linear(copies * widths[0] * BASE**2, start=linear_start, dtype=self.dtype, name="start")(latent)
        if not self.cifar:
            images = images.reshape(-1, BASE, BASE, copies * widths[0])
        images = activate(Norm(self.norm, name="norm_0")(images, train=train))
        images = images.reshape(-1, BASE, BASE, widths[0])
        for number, features in enumerate(widths[1:], start=1):
            images = Deconv(copies * features, start=start, dtype=self.dtype, name=f"deconv_{number}")(images)
            images = activate(Norm(self.norm, name=f"norm_{number}")(images, train=train))
        images = Deconv(self.channels, start=start, dtype=self.dtype, name="image")(images)
        return jnp.tanh(images.astype(jnp.float32))


class MlpGenerator(nn.Module):
    """Latent [B, Z] -> images: four ReLU layers of 512 units, then a linear one and tanh."""

    size: int
    channels: int
    dtype: Any = None

    @nn.compact
    def __call__(self, latent: jax.Array, labels: jax.Array | None = None, *, train: bool) -> jax.Array:
        del labels, train
        hidden = latent
        for number in range(MLP_LAYERS):
            hidden = nn.relu(Linear(MLP_UNITS, start="he", dtype=self.dtype, name=f"hidden_{number}")(hidden))
        pixels = Linear(self.size**2 * self.channels, dtype=self.dtype, name="image")(hidden)
        return jnp.tanh(pixels.astype(jnp.float32).reshape(-1, self.size, self.size, self.channels))


class DcganCritic(nn.Module):
    """Images [B, size, size, C] -> features [B, F]: 5x5 convolutions with stride 2 down to 4x4.

    `norm` stands after every convolution but the first. With the penalty it must be "layer" or "none".
    `activation`: "leaky", "tanh" or "gated". `start`: of the convolutions, see `tf_layers.fan_deviation`.
    """

    width: int = 64
    norm: str = "layer"
    activation: str = "leaky"
    start: str | float = START
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        activate = _activation(self.activation, {"leaky": leaky})
        copies = 2 if self.activation == "gated" else 1
        for number in range(halvings(images.shape[1])):
            features = copies * (self.width << number)
            images = Conv(features, 5, 2, self.start, dtype=self.dtype, name=f"conv_{number}")(images)
            if number:
                images = Norm(self.norm, name=f"norm_{number}")(images, train=train)
            images = activate(images)
        return images.reshape(len(images), -1)


def _activation(name: str, others: dict[str, Callable[[jax.Array], jax.Array]]) -> Callable[[jax.Array], jax.Array]:
    known: dict[str, Callable[[jax.Array], jax.Array]] = {**others, "tanh": jnp.tanh, "gated": gate}
    if name not in known:
        raise ValueError(f"unknown activation {name!r}; valid: {', '.join(known)}")
    return known[name]


def lsun_generator(name: str, options: NetworkOptions) -> nn.Module:
    """The generator of one of the pairs, by its name."""
    size, _, channels = options.sample_shape
    if name == "mlp-g":
        return MlpGenerator(size, channels, dtype=options.dtype)
    return DcganGenerator(
        size,
        channels,
        width=options.generator_width,
        norm="none" if name in ("plain-g", "no-norm") else options.generator_norm,
        activation=name if name in ("gated", "tanh") else "relu",
        constant_width=name == "plain-g",
        cifar=name == CIFAR,
        dtype=options.dtype,
    )


def lsun_critic(name: str, options: NetworkOptions) -> DcganCritic:
    """The critic of one of the pairs, by its name."""
    return DcganCritic(
        width=options.discriminator_width,
        norm="none" if name == "no-norm" else options.discriminator_norm,
        activation=name if name in ("gated", "tanh") else "leaky",
        start="he" if name == CIFAR else START,
        dtype=options.dtype,
    )


def check_lsun(options: NetworkOptions) -> None:
    """Raises: `ConfigError` for images whose side is not 4 * 2^n, and for labels."""
    if len(options.sample_shape) != 3:
        raise ConfigError(f"this network is for images, not for samples of shape {options.sample_shape}")
    try:
        halvings(options.sample_shape[0])
    except ValueError as error:
        raise ConfigError(f"{error}: --image-size") from error
    if options.num_classes:
        raise ConfigError("this network has no class-conditional layers: train it without labels")
