"""How a discriminator learns labels: heads on its features, and the class losses that go with them.

The trunk of a discriminator gives features F [B, F]. `Head` makes of them, and of the labels y [B], an adversarial
score per sample and whatever the conditioning's class loss needs; `CLASS_LOSSES` are those losses. Everything after the
trunk is computed in at least float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from stabletrain.gan.adversarial import crammer_singer
from stabletrain.methods.reacgan import cosines, d2d_ce, normalize
from stabletrain.nn.equalized import EqualizedDense, activate, unit_second_moment
from stabletrain.nn.spectral_norm import SpectralDense, SpectralEmbed

Array = jax.Array
ORTHOGONAL = nn.initializers.orthogonal()


@struct.dataclass
class ClassOutput:
    """What a class loss is computed from. K is the number of classes, or twice that with ADC."""

    logits: Array | None = None
    """[B, K], or cosines; K = C + 1 for the multi-hinge loss, the last being "fake"."""
    embedding: Array | None = None
    """[B, D], of any length: the losses normalise it."""
    proxies: Array | None = None
    """[K, D], one a class."""


@struct.dataclass
class HeadOutput:
    """What the discriminator says of a batch."""

    score: Array
    """[B]: the larger, the more real."""
    features: Array
    """[B, F]: what the head was given."""
    classes: ClassOutput
    twin: ClassOutput
    """TAC's second classifier; empty without."""


class Head(nn.Module):
    """Scores and class outputs of features [B, F].

    `kind` is a conditioning, `auxiliary` `none`, `tac` or `adc`. With `spectral` linear layers and tables have spectral
    normalisation. With `equalized` they are those of StyleGAN2: normal weights scaled at run time, and class tables
    that go through a mapping network of one layer.
    Source: projection: Miyato and Koyama 2018; StyleGAN2's: Karras et al. 2020a; ac: Odena et al. 2017; 2c: Kang and
    Park 2020; d2dce: Kang et al. 2021; multi-hinge: Kavalerov et al. 2021; tac: Gong et al. 2019; adc: Hou et al. 2022.
    """

    kind: str
    num_classes: int
    auxiliary: str = "none"
    embedding_dim: int = 128
    spectral: bool = False
    equalized: bool = False

    @nn.compact
    def __call__(self, features: Array, labels: Array | None, *, train: bool) -> HeadOutput:
        """Features [B, F] and labels [B] (None for the kind `none`)."""
        features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        width = features.shape[-1]
        classes = self._classes(features, "", train)
        if self.kind == "multi-hinge":
            logits = classes.logits
            assert logits is not None
            score = jnp.max(logits[:, :-1], axis=-1) - logits[:, -1]
        elif self.kind == "sg2-projection":
            wanted = self._mapped(self.num_classes, width, "label_map")[labels]
            score = jnp.sum(self._linear(features, width, "score", train) * wanted, axis=-1) / jnp.sqrt(width)
        else:
            score = self._linear(features, 1, "score", train)[:, 0]
            if self.kind == "projection":
                wanted = self._table(self.num_classes, width, "label_embedding", train)[labels]
                score = score + jnp.sum(wanted * features, axis=-1)
        twin = self._classes(features, "twin_", train) if self.auxiliary == "tac" else ClassOutput()
        return HeadOutput(score=score, features=features, classes=classes, twin=twin)

    def _classes(self, features: Array, prefix: str, train: bool) -> ClassOutput:
        count = self.num_classes * (2 if self.auxiliary == "adc" else 1)
        if self.kind == "multi-hinge":
            return ClassOutput(logits=self._linear(features, count + 1, "classifier", train))
        if self.kind == "ac":
            return ClassOutput(logits=self._linear(features, count, f"{prefix}classifier", train, use_bias=False))
        if self.kind == "ac-normalized":
            # Spectral normalisation would be divided out again.
            weights = self.param(f"{prefix}classifier", ORTHOGONAL, (count, features.shape[-1]))
            return ClassOutput(logits=cosines(features, weights))
        if self.kind in ("2c", "d2dce"):
            embedding = self._linear(features, self.embedding_dim, f"{prefix}embedding", train)
            if self.equalized:
                proxies = self._mapped(count, self.embedding_dim, f"{prefix}proxies")
            else:
                proxies = self._table(count, self.embedding_dim, f"{prefix}proxies", train)
            return ClassOutput(embedding=embedding, proxies=proxies)
        return ClassOutput()

    def _linear(self, features: Array, size: int, name: str, train: bool, *, use_bias: bool = True) -> Array:
        if self.equalized:
            return EqualizedDense(size, use_bias=use_bias, name=name)(features)
        if self.spectral:
            return SpectralDense(size, use_bias=use_bias, name=name)(features, train=train)
        return nn.Dense(size, use_bias=use_bias, kernel_init=ORTHOGONAL, name=name)(features)

    def _table(self, count: int, size: int, name: str, train: bool) -> Array:
        """[count, size]: a row for each class."""
        every = jnp.arange(count)
        if self.spectral:
            return SpectralEmbed(count, size, name=name)(every, train=train)
        return nn.Embed(count, size, embedding_init=ORTHOGONAL, name=name)(every)

    def _mapped(self, count: int, size: int, name: str) -> Array:
        """[count, size]: StyleGAN2's label mapping of one layer, on every class."""
        embedded = EqualizedDense(size, name=f"{name}_embedding")(jnp.eye(count))
        mapped = EqualizedDense(size, learning_rate=0.01, name=name)(unit_second_moment(embedded))
        return activate(mapped)


# --- class losses -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassOptions:
    """The constants of the class losses; those that a loss does not know are not read."""

    temperature: float = 1.0
    positive_margin: float = 1.0
    variant: str = "released"


ClassLoss = Callable[[ClassOutput, Array, ClassOptions], Array]
"""(output of a batch, classes [B], constants) -> scalar."""


def _cross_entropy(output: ClassOutput, labels: Array, options: ClassOptions) -> Array:
    """Mean softmax cross-entropy of the logits. Source: Odena et al. 2017."""
    del options
    return cross_entropy(_given(output.logits), labels)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """-mean_i log softmax(logits_i)_{y_i}: logits [B, K], labels [B] -> scalar."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1))


def _cosine_cross_entropy(output: ClassOutput, labels: Array, options: ClassOptions) -> Array:
    """The same of cosines over the temperature. Source: Kang et al. 2021, Section 3.2."""
    return cross_entropy(_given(output.logits) / options.temperature, labels)


def _contrastive(output: ClassOutput, labels: Array, options: ClassOptions) -> Array:
    embedding, proxies = _given(output.embedding), _given(output.proxies)
    return conditional_contrastive(embedding, proxies[labels], labels, temperature=options.temperature)


def conditional_contrastive(embeddings: Array, proxies: Array, labels: Array, *, temperature: float) -> Array:
    """ContraGAN's 2C loss, a scalar: samples are drawn to their class's proxy and to samples of their class.

        -mean_i log( (e^{c(f_i, v_i)/t} + sum_{j != i, same class} e^{c(f_i, f_j)/t})
                     / (e^{c(f_i, v_i)/t} + sum_{j != i} e^{c(f_i, f_j)/t}) )

    Shapes: embeddings [B, D], proxies [B, D] of each sample's class, labels [B]. Source: Kang and Park 2020, Eq. 8.
    """
    unit = normalize(embeddings)
    to_proxy = jnp.sum(unit * normalize(proxies), axis=-1) / temperature  # (B,)
    similarity = unit @ unit.T / temperature  # (B, B)
    others = ~jnp.eye(len(labels), dtype=bool)
    same = others & (labels[:, None] == labels[None, :])
    return -jnp.mean(_log_sum(to_proxy, similarity, same) - _log_sum(to_proxy, similarity, others))


def _log_sum(first: Array, others: Array, keep: Array) -> Array:
    """log(e^first_i + sum over the kept j of e^others_ij): [B], without overflow or underflow."""
    kept = jnp.where(keep, others, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.maximum(first, jnp.max(kept, axis=1)))
    terms = jnp.exp(jnp.where(keep, others - top[:, None], 0.0))
    return top + jnp.log(jnp.exp(first - top) + jnp.sum(jnp.where(keep, terms, 0.0), axis=1))


def _data_to_data(output: ClassOutput, labels: Array, options: ClassOptions) -> Array:
    return d2d_ce(
        _given(output.embedding),
        _given(output.proxies)[labels],
        labels,
        temperature=options.temperature,
        positive_margin=options.positive_margin,
        variant=options.variant,
    )


def _multi_hinge(output: ClassOutput, labels: Array, options: ClassOptions) -> Array:
    del options
    return crammer_singer(_given(output.logits), labels)


CLASS_LOSSES: Mapping[str, ClassLoss] = {
    "ac": _cross_entropy,
    "ac-normalized": _cosine_cross_entropy,
    "2c": _contrastive,
    "d2dce": _data_to_data,
    "multi-hinge": _multi_hinge,
}
"""The class loss of each conditioning that has one."""


def class_probabilities(kind: str, output: ClassOutput, options: ClassOptions) -> Array | None:
    """[B, K]: the softmax over the classes that a class output stands for; None where there is no classifier.

    Of embeddings it is the softmax of their cosines with the proxies over the temperature, which neither 2C nor D2D-CE
    trains as such: an indicator.
    """
    if kind in ("ac", "multi-hinge"):
        return jax.nn.softmax(_given(output.logits))
    if kind == "ac-normalized":
        return jax.nn.softmax(_given(output.logits) / options.temperature)
    if kind in ("2c", "d2dce"):
        return jax.nn.softmax(cosines(_given(output.embedding), _given(output.proxies)) / options.temperature)
    return None


def _given(value: Any) -> Array:
    assert value is not None, "this head has no such output"
    return value
