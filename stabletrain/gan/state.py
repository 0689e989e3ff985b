"""What evolves while a GAN trains, and the two networks as functions of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from stabletrain.gan.conditioning import Head, HeadOutput
from stabletrain.gan.config import GanConfig, filled
from stabletrain.methods.wgan_gp import tf1_rmsprop
from stabletrain.training.stability import MonitorState

Array = jax.Array
Params = Any
STATISTICS = ("batch_stats", "spectral")
"""The collections that evolve without gradients: running statistics, vectors of the power iteration."""
HEAD = "head_"
"""Prefix of the head's parameter groups beside those of the trunk."""


@struct.dataclass
class NetworkState:
    """One network in training. `statistics`: collection name -> variables, of the collections that it has."""

    params: Params
    statistics: Mapping[str, Any]
    optimizer: Any
    monitor: MonitorState


@struct.dataclass
class GanState:
    """Everything that evolves."""

    generator: NetworkState
    critic: NetworkState
    ema: Mapping[str, Any] | None
    """Moving average of the generator: `params` and its statistics; None when none is kept."""
    augment: Array
    """[3]: probability of the augmentation, and sum and number of signs of real scores since it last moved."""
    lecam: Array
    """[2]: moving averages of real and fake scores."""
    path_length: Array
    """Moving average of path lengths."""


class Generator:
    """The generator as functions of its variables: `{"params": ..., **statistics}`."""

    def __init__(self, module: nn.Module, z_dim: int, num_classes: int, *, styles: bool) -> None:
        self.module, self.z_dim, self.num_classes, self.has_styles = module, z_dim, num_classes, styles

    def init(self, key: Array) -> tuple[Params, dict[str, Any]]:
        """Parameters and statistics at the start."""
        keys = jax.random.split(key, 2)
        labels = jnp.zeros((2,), jnp.int32) if self.num_classes else None
        rngs = {"params": keys[0], "noise": keys[1]}
        variables = self.module.init(rngs, jnp.zeros((2, self.z_dim)), labels, train=False)
        return variables["params"], {name: variables[name] for name in STATISTICS if name in variables}

    def __call__(
        self, variables: Mapping[str, Any], z: Array, labels: Array | None, key: Array, *, train: bool
    ) -> tuple[Array, dict[str, Any]]:
        """Samples [B, ...] and the statistics after the call (`train`; otherwise as they were)."""
        asked = labels if self.num_classes else None
        mutable = [name for name in STATISTICS if train and name in variables]
        samples, changed = self.module.apply(
            variables, z, asked, train=train, rngs={"noise": key}, mutable=mutable
        )  # fmt: skip
        kept = {name: variables[name] for name in STATISTICS if name in variables}
        return samples.astype(jnp.promote_types(samples.dtype, jnp.float32)), {**kept, **changed}

    def styles(self, variables: Mapping[str, Any], z: Array, labels: Array | None, key: Array, *, train: bool) -> Array:
        """[B, L, D]: the styles of latents."""
        asked = labels if self.num_classes else None
        styles: Any = self.module.apply(variables, z, asked, train=train, rngs={"noise": key}, method="styles")
        return styles

    def synthesize(self, variables: Mapping[str, Any], styles: Array, key: Array, *, train: bool) -> Array:
        """Samples [B, ...] of styles."""
        samples: Any = self.module.apply(variables, styles, train=train, rngs={"noise": key}, method="synthesize")
        return samples


class Critic:
    """The discriminator: a trunk and a head, whose parameters lie side by side in one tree.

    The trunk's groups keep their names, the head's are prefixed `head_`, so that the monitor names both.
    """

    def __init__(self, trunk: nn.Module, head: Head, sample_shape: tuple[int, ...]) -> None:
        self.trunk, self.head, self.sample_shape = trunk, head, sample_shape

    def init(self, key: Array) -> tuple[Params, dict[str, Any]]:
        """Parameters and statistics at the start."""
        keys = jax.random.split(key, 2)
        samples, labels = jnp.zeros((2, *self.sample_shape)), jnp.zeros((2,), jnp.int32)
        trunk = self.trunk.init({"params": keys[0]}, samples, train=False)
        features = jax.eval_shape(lambda: self.trunk.apply(trunk, samples, train=False))
        head = self.head.init({"params": keys[1]}, jnp.zeros(features.shape), labels, train=False)
        variables = _joined(trunk, head)
        return variables["params"], {name: variables[name] for name in STATISTICS if name in variables}

    def __call__(
        self, variables: Mapping[str, Any], samples: Array, labels: Array | None, *, train: bool
    ) -> tuple[HeadOutput, dict[str, Any]]:
        """The output for samples [B, ...] with labels [B], and the statistics after it."""
        of_trunk, of_head = _split(variables)
        features, trunk = self.trunk.apply(
            of_trunk, samples, train=train, mutable=[n for n in STATISTICS if train and n in of_trunk]
        )
        output, head = self.head.apply(
            of_head, features, labels, train=train, mutable=[n for n in STATISTICS if train and n in of_head]
        )
        kept = {name: variables[name] for name in STATISTICS if name in variables}
        changed = _joined({**of_trunk, **trunk}, {**of_head, **head})
        return output, {name: changed.get(name, value) for name, value in kept.items()}


def _joined(trunk: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, Any]:
    names = {*trunk, *head}
    return {
        name: {**trunk.get(name, {}), **{f"{HEAD}{key}": value for key, value in head.get(name, {}).items()}}
        for name in names
    }


def _split(variables: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    trunk: dict[str, Any] = {}
    head: dict[str, Any] = {}
    for name, groups in variables.items():
        of_trunk = {key: value for key, value in groups.items() if not key.startswith(HEAD)}
        of_head = {key.removeprefix(HEAD): value for key, value in groups.items() if key.startswith(HEAD)}
        # A collection of nothing is left out, so that nobody makes it mutable. Parameters there are always.
        trunk |= {name: of_trunk} if of_trunk or name == "params" else {}
        head |= {name: of_head} if of_head or name == "params" else {}
    return trunk, head


# --- optimisers and rates ---------------------------------------------------------------------------------------------


def learning_rate_at(config: GanConfig, rate: float, position: Array) -> Array:
    """The learning rate at step `position` (0, 1, ...) of both networks: constant, or linearly to 0 at the end."""
    if config.lr_decay == "constant":
        return jnp.full((), rate, jnp.float32)
    return rate * jnp.clip(1.0 - position.astype(jnp.float32) / max(config.steps, 1), 0.0, 1.0)


def optimizer_for(config: GanConfig, rate: Array | float) -> optax.GradientTransformation:
    """Adam, or TensorFlow 1's RMSProp."""
    if config.optimizer == "rmsprop":
        return tf1_rmsprop(rate)
    adam = optax.scale_by_adam(b1=filled(config.beta1), b2=filled(config.beta2), eps=filled(config.adam_epsilon))
    return optax.chain(adam, optax.scale(-rate))


def average_decay_at(config: GanConfig, position: Array) -> Array:
    """The decay of the generator's average at step `position`: 0, a copy, before `ema_start`.

    With a half-life of h images it is 0.5^(B / h), where h is at most `ema_rampup` times the images seen so far.
    Source of the latter: Karras et al. 2020a, Appendix C.
    """
    n = position.astype(jnp.float32)
    if config.ema_half_life:
        half_life = jnp.full((), 1000.0 * config.ema_half_life)
        if config.ema_rampup:
            half_life = jnp.minimum(half_life, config.ema_rampup * n * config.batch_size)
        decay = 0.5 ** (config.batch_size / jnp.maximum(half_life, 1e-8))
    else:
        decay = jnp.full((), filled(config.ema_decay), jnp.float32)
    return jnp.where(n < filled(config.ema_start), 0.0, decay)
