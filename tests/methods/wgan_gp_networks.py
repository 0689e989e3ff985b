"""Five critics as functions of named arrays, in JAX, and their inputs: shared by the test and by the torch reference.

Images are [B, H, W, C] and kernels [h, w, in, out], text is [B, L, V] and its kernels [k, in, out].
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

FIXTURE = Path(__file__).parent / "fixtures" / "wgan_gp.npz"
ONE_SIDED_TARGET = 0.1  # below some of the norms, so that the one-sided penalty is not zero
Params = dict[str, jax.Array]


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    spatial = kernel.ndim - 2
    names = ("NHWC", "HWIO", "NHWC") if spatial == 2 else ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * spatial, "SAME", dimension_numbers=names)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """The paper's: statistics over all of a sample, scale and offset a channel."""
    normed = nn.GroupNorm(num_groups=1, epsilon=1e-5).apply({"params": {"scale": scale, "bias": bias}}, x)
    assert isinstance(normed, jax.Array)
    return normed


def mlp(p: Params, x: jax.Array) -> jax.Array:
    x = jnp.tanh(x @ p["w0"] + p["b0"])
    x = nn.leaky_relu(x @ p["w1"] + p["b1"], 0.2)
    return x @ p["w2"] + p["b2"]


def convolution(p: Params, x: jax.Array) -> jax.Array:
    x = nn.leaky_relu(conv(x, p["k0"], 2) + p["b0"], 0.2)  # TensorFlow's SAME: 5x5, stride 2 pads (1, 2)
    x = nn.leaky_relu(conv(x, p["k1"], 2) + p["b1"], 0.2)
    return x.reshape(len(x), -1) @ p["w2"] + p["b2"]


def layer_normed(p: Params, x: jax.Array) -> jax.Array:
    x = nn.leaky_relu(conv(x, p["k0"], 2) + p["b0"], 0.2)
    x = nn.leaky_relu(layer_norm(conv(x, p["k1"], 2) + p["b1"], p["scale1"], p["offset1"]), 0.2)
    return x.reshape(len(x), -1) @ p["w2"] + p["b2"]


def bottleneck(p: Params, x: jax.Array) -> jax.Array:
    """One block of the 101-layer critic that halves the image: shortcut + 0.3 branch, the norm at the branch's end."""
    y = conv(nn.relu(x), p["k0"]) + p["b0"]
    y = conv(nn.relu(y), p["k1"], 2) + p["b1"]
    y = layer_norm(conv(nn.relu(y), p["k2"]), p["scale2"], p["offset2"])
    x = conv(x, p["k3"], 2) + p["b3"] + 0.3 * y
    return (x.reshape(len(x), -1) @ p["w4"] + p["b4"]) / 5


def text(p: Params, x: jax.Array) -> jax.Array:
    """The language model's critic with one block; x is a distribution over characters a position."""
    x = conv(x, p["k0"]) + p["b0"]
    y = conv(nn.relu(x), p["k1"]) + p["b1"]
    x = x + 0.3 * (conv(nn.relu(y), p["k2"]) + p["b2"])
    return x.reshape(len(x), -1) @ p["w3"] + p["b3"]


NETWORKS: dict[str, Callable[[Params, jax.Array], jax.Array]] = {
    "mlp": mlp,
    "convolution": convolution,
    "layer_normed": layer_normed,
    "bottleneck": bottleneck,
    "text": text,
}
INPUT_SHAPES = {
    "mlp": (6, 3),
    "convolution": (4, 8, 8, 2),
    "layer_normed": (4, 8, 8, 2),
    "bottleneck": (4, 4, 4, 4),
    "text": (4, 7, 5),
}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "mlp": {"w0": (3, 8), "b0": (8,), "w1": (8, 8), "b1": (8,), "w2": (8, 1), "b2": (1,)},
    "convolution": {"k0": (5, 5, 2, 4), "b0": (4,), "k1": (5, 5, 4, 3), "b1": (3,), "w2": (12, 1), "b2": (1,)},
    "bottleneck": {
        **{"k0": (1, 1, 4, 2), "b0": (2,), "k1": (3, 3, 2, 3), "b1": (3,), "k2": (1, 1, 3, 6)},
        **{"scale2": (6,), "offset2": (6,), "k3": (1, 1, 4, 6), "b3": (6,), "w4": (24, 1), "b4": (1,)},
    },
    "text": {
        **{"k0": (1, 5, 4), "b0": (4,), "k1": (5, 4, 4), "b1": (4,), "k2": (5, 4, 4), "b2": (4,)},
        **{"w3": (28, 1), "b3": (1,)},
    },
}
SHAPES["layer_normed"] = SHAPES["convolution"] | {"scale1": (3,), "offset1": (3,)}


def case(name: str) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Parameters, real, fake and epsilon of a network, in float64, from waves: the same numbers on every machine."""
    params = {
        key: wave(key, shape) * np.prod(shape[:-1]) ** -0.5 * 2 + key.startswith("scale")
        for key, shape in sorted(SHAPES[name].items())
    }
    real, fake = wave("real", INPUT_SHAPES[name]), wave("fake", INPUT_SHAPES[name])
    return params, real, fake, (wave("epsilon", (len(real),)) + 1) / 2


def wave(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Irregular numbers in (-1, 1), another row of them for every key."""
    phase = sum(ord(letter) * 1.7 ** (i + 1) for i, letter in enumerate(key))
    return np.sin(phase + 2.399963 * np.arange(np.prod(shape)) * (1 + 0.01 * (phase % 7))).reshape(shape)
