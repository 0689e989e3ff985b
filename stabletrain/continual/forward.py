"""The forward half of SPCL in a network: the regulariser that holds layers near orthogonality, by configuration."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stabletrain.continual.config import ContinualConfig, filled
from stabletrain.continual.networks import Layer, Network, chosen_layers, kernel_of
from stabletrain.errors import ConfigError
from stabletrain.methods import spcl

Array = jax.Array
Params = Any


class LayerRegularizer:
    """lambda times the sum of the layers' losses; its gradient joins the aggregate, or each task's gradient."""

    def __init__(self, config: ContinualConfig, network: Network) -> None:
        self.kind = filled(config.orthogonality)
        self.weight = config.orthogonality_weight or 0.0
        self.on = self.kind != "none" and self.weight > 0
        self._before = config.orthogonality_when == "before"
        self.layers: list[Layer] = []
        if self.kind != "none":
            self.layers = chosen_layers(network, filled(config.orthogonality_layers))
            if not self.layers:
                raise ConfigError(
                    f"--orthogonality {self.kind} holds no layer: with --orthogonality-layers "
                    f"{config.orthogonality_layers} --network {config.network} has none"
                )

    def penalty(self, params: Params) -> Array:
        """Sum over the layers, without the weight."""
        total = jnp.zeros(())
        for layer in self.layers:
            total = total + layer_loss(self.kind, kernel_of(params, layer.path), layer)
        return total

    def in_each_loss(self, params: Params) -> Array:
        """What is added to the loss of every task (`--orthogonality-when before`); 0 otherwise."""
        if not (self.on and self._before):
            return jnp.zeros(())
        return self.weight * self.penalty(params)

    def added(self, params: Params, update: Params) -> tuple[Array, Params]:
        """The penalty, and the update with its weighted gradient added (`after`)."""
        if not self.on:
            return jnp.zeros(()), update
        if self._before:
            return self.penalty(params), update
        value, gradient = jax.value_and_grad(self.penalty)(params)
        return value, jax.tree.map(lambda u, g: u + self.weight * g, update, gradient)


def orthogonality_gap(kernel: Array, layer: Layer) -> float:
    """A layer's `dbt` loss (the smaller Gram matrix's for dense ones) above the least that its shape allows."""
    floor = spcl.orthogonality_floor(kernel.shape, layer.stride) if layer.kind == "conv" else 0
    return float(layer_loss("dbt", kernel, layer)) - floor


def layer_loss(kind: str, kernel: Array, layer: Layer) -> Array:
    """The loss of one layer. Dense layers and 1x1 shortcuts have the smaller Gram matrix's, whatever the kind."""
    if kernel.ndim == 2 or kernel.shape[:2] == (1, 1):
        return spcl.dense_orthogonality(kernel.reshape(kernel.shape[-2:]))
    return spcl.conv_orthogonality(kernel, layer.stride, mode=kind)
