"""A small convolutional classifier for images of 8x8 to 64x64 and more: its network, its training, its answers.

It is what gives features where no published network can be had, and what judges generated images by training on them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from stabletrain.data.images import to_float
from stabletrain.data.order import batch_indices
from stabletrain.data.spec import Images, ImageSource, Labels
from stabletrain.metrics.progress import Progress, silent
from stabletrain.nn.convolution import Convolution
from stabletrain.random_keys import random_key

FEATURES = 128
CHUNK = 256
"""Images in one call of the compiled network."""

Params = Any


class SmallClassifier(nn.Module):
    """Strided 3x3 convolutions until at most 4x4 is left, then 128 features, then one logit per class.

    Shapes: uint8 images [B, H, W, C] -> (logits [B, K], features [B, 128]).
    """

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = to_float(images)
        width = 32
        x = nn.relu(Convolution(width)(x))
        while max(x.shape[1:3]) > 4:
            width = min(2 * width, 128)
            x = nn.relu(_normalize(Convolution(width, stride=2)(x)))
        features = nn.relu(nn.Dense(FEATURES)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_classes)(features), features


def _normalize(x: jax.Array) -> jax.Array:
    """Each image's activations to mean square one over space and channels: no parameters, no batch statistics."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=(1, 2, 3), keepdims=True) + 1e-6)


@dataclass(frozen=True)
class Recipe:
    """How the classifier is trained: Adam with a cosine schedule, `epochs` epochs within the limits of steps."""

    epochs: int = 20
    min_steps: int = 400
    max_steps: int = 3000
    learning_rate: float = 2e-3

    def batch_size(self, count: int) -> int:
        """64 for small sets, 128 above ten thousand images; never more than there are."""
        return min(count, 64 if count < 10_000 else 128)

    def steps(self, count: int) -> int:
        """The number of updates for `count` training images."""
        return min(max(math.ceil(self.epochs * count / self.batch_size(count)), self.min_steps), self.max_steps)


def fit(
    images: ImageSource,
    labels: Labels,
    num_classes: int,
    *,
    seed: int,
    recipe: Recipe | None = None,
    label: str = "classifier",
    progress: Progress = silent,
) -> Params:
    """Trains a `SmallClassifier` from scratch; a pure function of the data, the seed and the recipe.

    `progress` is called after each update under the name `label`.

    Raises: `ValueError` when images and labels do not go together.
    """
    count = len(images)
    if count < 1 or len(labels) != count:
        raise ValueError(f"{count} images and {len(labels)} labels cannot train a classifier")
    recipe = recipe or Recipe()
    steps, batch_size = recipe.steps(count), recipe.batch_size(count)
    network = SmallClassifier(num_classes)
    key = random_key(seed)
    params = network.init(key, jnp.zeros((1, *images.shape), jnp.uint8))
    optimizer = _optimizer(recipe, steps)
    optimizer_state = optimizer.init(params)
    for position in range(steps):
        indices = batch_indices(seed, position, count, batch_size)
        params, optimizer_state = _update(
            network, recipe, steps, params, optimizer_state, images.read(indices), labels[indices],
            jax.random.fold_in(key, position),
        )  # fmt: skip
        progress(label, position + 1, steps)
    return jax.block_until_ready(params)


def _optimizer(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    warmup = min(50, steps // 10)
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, warmup, steps))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _update(
    network: SmallClassifier,
    recipe: Recipe,
    steps: int,
    params: Params,
    optimizer_state: Any,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
) -> tuple[Params, Any]:
    images = _shifted(images, key)

    def loss(params: Params) -> jax.Array:
        logits = network.apply(params, images)[0]
        # No label smoothing: it would put a ceiling on classifier scores (7.2 of 10 classes for a smoothing of 0.05).
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    gradients = jax.grad(loss)(params)
    updates, optimizer_state = _optimizer(recipe, steps).update(gradients, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state


def _shifted(images: jax.Array, key: jax.Array) -> jax.Array:
    """Each image moved by up to an eighth of its size, its edge repeated: what small training sets need most."""
    margins = [max(1, size // 8) for size in images.shape[1:3]]
    padded = jnp.pad(images, [(0, 0), *((margin, margin) for margin in margins), (0, 0)], mode="edge")
    limits = jnp.array([2 * margin + 1 for margin in margins])
    offsets = jax.random.randint(key, (len(images), 2), 0, limits)

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, offsets)


@functools.partial(jax.jit, static_argnums=0)
def _answers(network: SmallClassifier, params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    both: Any = network.apply(params, images)
    return both


def answers(params: Params, num_classes: int, images: Images) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(logits [B, K], features [B, 128]) of uint8 images [B, H, W, C], in chunks on the device.

    The last chunk is filled up to a power of two, so that a few compiled sizes serve every number of images.
    """
    network = SmallClassifier(num_classes)
    logits = np.empty((len(images), num_classes), np.float32)
    features = np.empty((len(images), FEATURES), np.float32)
    for start in range(0, len(images), CHUNK):
        part = np.asarray(images[start : start + CHUNK])
        stop = start + len(part)
        size = min(CHUNK, 1 << (len(part) - 1).bit_length())
        padded = np.zeros((size, *part.shape[1:]), np.uint8)
        padded[: len(part)] = part
        found = _answers(network, params, padded)
        logits[start:stop], features[start:stop] = (np.asarray(array)[: len(part)] for array in found)
    return logits, features


def accuracy(params: Params, num_classes: int, images: ImageSource, labels: Labels) -> float:
    """The share of images that are given their label."""
    correct = 0
    for start in range(0, len(images), CHUNK):
        indices = np.arange(start, min(start + CHUNK, len(images)))
        logits, _ = answers(params, num_classes, images.read(indices))
        correct += int(np.sum(np.argmax(logits, axis=-1) == labels[indices]))
    return correct / len(images)
