"""Networks of the continual experiments: MLP, a plain convolutional network, ResNet-18. One head over all classes.

Every network maps images [B, H, W, C] to (features [B, D], logits [B, classes]); the features are what the head sees.
Each tells which of its layers can be regularised towards orthogonality, with their strides (`layers`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers

from stabletrain.continual.config import ContinualConfig, filled
from stabletrain.nn.convolution import Convolution

Array = jax.Array


@dataclass(frozen=True)
class Layer:
    """A convolution or a dense layer inside a network: where its kernel is, and how it strides."""

    path: tuple[str, ...]
    stride: int = 1
    kind: str = "conv"
    """conv, dense, or shortcut (a 1x1 convolution)."""
    stem: bool = False
    first_of_block: bool = False

    @property
    def name(self) -> str:
        """For metrics: the path with dots."""
        return ".".join(self.path)


class Network(Protocol):
    """What the experiment needs besides `init` and `apply`."""

    def layers(self) -> list[Layer]: ...


class Head(nn.Module):
    """Linear over all classes; `cosine`: bias-free, of unit features and unit weights, so that logits lie in [-1, 1].

    Source: the cosine head is that of MDMT-R (Lyu et al. 2021).
    """

    classes: int
    kind: str
    dtype: Any

    @nn.compact
    def __call__(self, features: Array) -> Array:
        if self.kind == "linear":
            return nn.Dense(self.classes, dtype=self.dtype, name="dense")(features).astype(jnp.float32)
        kernel = self.param("kernel", initializers.lecun_normal(), (features.shape[-1], self.classes))
        features = features.astype(jnp.float32)
        return _unit(features, 1) @ _unit(kernel, 0)


def _unit(values: Array, axis: int) -> Array:
    return values / jnp.sqrt(jnp.sum(jnp.square(values), axis, keepdims=True) + 1e-12)


class Norm(nn.Module):
    """Batch, group or no normalisation. Batch statistics are those of one task's batch, as streams are not mixed."""

    kind: str
    momentum: float
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, running: bool) -> Array:
        if self.kind == "none":
            return x
        if self.kind == "group":
            groups = max(g for g in range(1, min(8, x.shape[-1]) + 1) if x.shape[-1] % g == 0)
            return nn.GroupNorm(groups, epsilon=self.epsilon, dtype=self.dtype)(x)
        return nn.BatchNorm(
            use_running_average=running, momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype
        )(x)


class Mlp(nn.Module):
    """Dense layers with ReLU. Hidden sizes 128, 64 over 784 pixels and 62 classes: 112,766 parameters, as released."""

    hidden: tuple[int, ...]
    classes: int
    head: str
    dtype: Any

    @nn.compact
    def __call__(self, images: Array, running: bool = False) -> tuple[Array, Array]:
        x = images.reshape(len(images), -1)
        for i, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, dtype=self.dtype, kernel_init=initializers.he_normal(), name=f"dense_{i}")(x))
        return x, Head(self.classes, self.head, self.dtype, name="head")(x)

    def layers(self) -> list[Layer]:
        return [Layer((f"dense_{i}",), kind="dense", stem=i == 0) for i in range(len(self.hidden))]


class PlainConv(nn.Module):
    """3x3 convolutions with ReLU in a straight line, no skip connection; two of them halve the image; a dense layer.

    The halving ones stand after the first and after the second third. With depth 3, widths 32, 64, 64 this is about the
    network of the released two-task toy.
    """

    depth: int
    width: int
    norm: str
    momentum: float
    epsilon: float
    classes: int
    head: str
    dtype: Any

    def _strides(self) -> list[int]:
        halving = {max(1, self.depth // 3), max(2, 2 * self.depth // 3)}
        return [2 if i in halving else 1 for i in range(self.depth)]

    @nn.compact
    def __call__(self, images: Array, running: bool = False) -> tuple[Array, Array]:
        x, channels = images.astype(self.dtype), self.width
        for i, stride in enumerate(self._strides()):
            channels = min(channels * stride, 2 * self.width)
            x = Convolution(
                channels, 3, stride, dtype=self.dtype, kernel_init=initializers.he_normal(), name=f"conv_{i}"
            )(x)
            x = Norm(self.norm, self.momentum, self.epsilon, self.dtype, name=f"norm_{i}")(x, running)
            x = nn.relu(x)
        x = nn.Dense(2 * self.width, dtype=self.dtype, kernel_init=initializers.he_normal(), name="dense")(
            x.reshape(len(x), -1)
        )
        x = nn.relu(x)
        return x, Head(self.classes, self.head, self.dtype, name="head")(x)

    def layers(self) -> list[Layer]:
        convolutions = [Layer((f"conv_{i}",), stride, stem=i == 0) for i, stride in enumerate(self._strides())]
        return [*convolutions, Layer(("dense",), kind="dense")]


class ResNet18(nn.Module):
    """ResNet-18 for small images: 3x3 stem of stride 1, four stages of two basic blocks, global average, a dense layer.

    The defaults are the released network: 2x2 max-pooling after the stem, biases in convolutions, He initialisation, an
    additional ReLU after the second normalisation of a block (before the addition), a 1x1 shortcut only where the
    stride is 2, normalisation with momentum 0.99 and epsilon 1e-3. 11,223,140 trainable parameters with 100 classes.
    Differs: the released network is said to have 11,224,932, more by 1,792: the size of the scales and shifts that
    normalisation of the three shortcuts would add.
    """

    width: int
    norm: str
    momentum: float
    epsilon: float
    max_pool: bool
    inner_relu: bool
    conv_bias: bool
    classes: int
    head: str
    dtype: Any

    def _conv(self, features: int, size: int, stride: int, name: str) -> Convolution:
        return Convolution(
            features, size, stride, use_bias=self.conv_bias, dtype=self.dtype, kernel_init=initializers.he_normal(),
            name=name,
        )  # fmt: skip

    def _norm(self, name: str) -> Norm:
        return Norm(self.norm, self.momentum, self.epsilon, self.dtype, name=name)

    def _blocks(self) -> list[tuple[str, int, int]]:
        """(name, channels, stride) of the eight blocks."""
        return [
            (f"block_{2 * stage + i}", self.width * 2**stage, 2 if stage and not i else 1)
            for stage in range(4)
            for i in range(2)
        ]

    @nn.compact
    def __call__(self, images: Array, running: bool = False) -> tuple[Array, Array]:
        x = self._conv(self.width, 3, 1, "stem")(images.astype(self.dtype))
        x = nn.relu(self._norm("stem_norm")(x, running))
        if self.max_pool:
            x = nn.max_pool(x, (2, 2), (2, 2))
        for name, channels, stride in self._blocks():
            y = self._conv(channels, 3, stride, f"{name}_conv_0")(x)
            y = nn.relu(self._norm(f"{name}_norm_0")(y, running))
            y = self._norm(f"{name}_norm_1")(self._conv(channels, 3, 1, f"{name}_conv_1")(y), running)
            if self.inner_relu:
                y = nn.relu(y)
            if stride != 1:
                x = self._conv(channels, 1, stride, f"{name}_shortcut")(x)
            x = nn.relu(x + y)
        x = x.mean((1, 2))
        return x, Head(self.classes, self.head, self.dtype, name="head")(x)

    def layers(self) -> list[Layer]:
        found = [Layer(("stem",), stem=True)]
        for name, _, stride in self._blocks():
            found += [Layer((f"{name}_conv_0",), stride, first_of_block=True), Layer((f"{name}_conv_1",))]
            if stride != 1:
                found.append(Layer((f"{name}_shortcut",), stride, kind="shortcut"))
        return found


def _mlp(config: ContinualConfig, classes: int, dtype: Any) -> Mlp:
    return Mlp(tuple(config.hidden), classes, filled(config.head), dtype)


def _conv(config: ContinualConfig, classes: int, dtype: Any) -> PlainConv:
    return PlainConv(
        config.depth, config.width, filled(config.norm), config.norm_momentum, config.norm_epsilon, classes,
        filled(config.head), dtype,
    )  # fmt: skip


def _resnet(config: ContinualConfig, classes: int, dtype: Any) -> ResNet18:
    return ResNet18(
        config.width, filled(config.norm), config.norm_momentum, config.norm_epsilon, filled(config.max_pool),
        filled(config.inner_relu), filled(config.conv_bias), classes, filled(config.head), dtype,
    )  # fmt: skip


NETWORKS: dict[str, Callable[[ContinualConfig, int, Any], Any]] = {"mlp": _mlp, "conv": _conv, "resnet18": _resnet}


def build_network(config: ContinualConfig, classes: int, dtype: Any) -> Any:
    """The network of a resolved configuration: a Flax module that is a `Network`."""
    return NETWORKS[filled(config.network)](config, classes, dtype)


def chosen_layers(network: Network, which: str) -> list[Layer]:
    """The layers that the orthogonality regulariser is applied to.

    `inner`: all but the stem, whose kernel has fewer input than output channels and cannot be orthogonal there;
    `all`: the stem too; `first-of-block`: the first convolution of each residual block and the shortcuts, as the code
    released with orthogonal convolutional networks (Wang et al. 2020) and with stable parallel continual learning has
    it; for a network without blocks there is no such layer.
    """
    layers = network.layers()
    if which == "all":
        return layers
    if which == "inner":
        return [layer for layer in layers if not layer.stem]
    return [layer for layer in layers if layer.first_of_block or layer.kind == "shortcut"]


def kernel_of(params: Any, path: Sequence[str]) -> Array:
    """The kernel at a path: [k, k, in, out] of a convolution, [in, out] of a dense layer."""
    node = params
    for key in path:
        node = node[key]
    return node["kernel"]
