"""ReACGAN: a classifier in the discriminator whose loss cannot explode (Kang et al., NeurIPS 2021, arXiv 2111.01118).

AC-GAN's discriminator classifies by softmax cross-entropy over F(x)^T w_c. The gradient by the class weights is
(1 - p) times a feature norm that nothing bounds, so it grows with the features and drowns the adversarial loss:
`softmax_gradients` shows it. ReACGAN puts feature embeddings f = P(F(x)) / ||P(F(x))|| and class proxies
v_c = w_c / ||w_c|| on the unit sphere, and compares each sample with its proxy and with the *samples* of other classes
(Data-to-Data Cross-Entropy, `d2d_ce`). Discriminator and generator add it, with one weight lambda, to their losses:

    L_D = L_adv + lambda D2D-CE(real samples, their labels),    L_G = L_adv + lambda D2D-CE(fakes, the asked labels).

Everything is a pure function of arrays and works under jit, grad and vmap, in float32 and float64 (narrower types are
computed in float32). The batch is the whole batch: under jit over a mesh, value and gradient do not depend on the
number of devices.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

VARIANTS = ("released", "as_written")

# --- the unit sphere --------------------------------------------------------------------------------------------------


def normalize(vectors: ArrayLike, epsilon: float = 1e-12) -> jax.Array:
    """Each vector of `vectors` [..., D] over its Euclidean norm, or over `epsilon` where the norm is smaller.

    A zero vector stays zero and has the gradient of v / epsilon cut to 0, not NaN.
    Source: Kang et al. 2021, Section 3.2. Differs from torch.nn.functional.normalize in that gradient at 0 only.
    """
    vectors = _wide(vectors)
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    zero = squares == 0
    norms = jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squares)))
    return jnp.where(zero, 0.0, vectors / jnp.maximum(norms, epsilon))


def cosines(first: ArrayLike, second: ArrayLike) -> jax.Array:
    """Cosine of every vector of `first` [N, D] with every one of `second` [M, D]: [N, M]; 0 with a zero vector."""
    return normalize(first) @ normalize(second).T


# --- data-to-data cross-entropy ---------------------------------------------------------------------------------------


def d2d_ce(
    embeddings: ArrayLike,
    proxies: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: ArrayLike,
    positive_margin: ArrayLike,
    variant: str = "released",
) -> jax.Array:
    """Data-to-Data Cross-Entropy of a batch, a scalar.

    With cosines c, m_p the positive and m_n = 1 - m_p the negative margin, tau the temperature, N(i) the samples of
    other classes than sample i's, and v_i the proxy of sample i's class,

        a_i = [m_p - c(f_i, v_i)]_+ / tau,    s_ij = [c(f_i, f_j) - m_n]_+ / tau,
        loss = mean_i log(1 + exp(a_i - M_i) sum_{j in N(i)} exp(s_ij)),

    where `as_written`, the printed formula, has M_i = 0, and `released`, the code that the published numbers come
    from, has M_i = max over j != i, of any class, of (c(f_i, f_j) - m_n) / tau, taken as a constant. That shift was
    meant for numerical stability but is applied to the negatives alone and never put back: close neighbours of the
    *same* class make the negatives count less, down to exp(-m_p / tau) of what is printed.

    A sample that is close enough to its proxy (c >= m_p), or far enough from a negative (c <= m_n), feels no force
    from it. A batch with one class only, or of one sample, has loss and gradient 0; a class that no sample has leaves
    its proxy alone.

    Shapes: embeddings [B, D] and proxies [B, D], row i the proxy of class labels[i]; of any length: the cosine
    normalises them. labels [B], whole numbers (with 2 y for real and 2 y + 1 for fake samples it is ADC's loss).
    Raises: `ValueError` for shapes that do not fit or another variant.
    Source: Kang et al. 2021, Eq. 6; the variant `released`: PyTorch-StudioGAN.
    Differs: the shift of a batch of one is 0 where the released code raises; the gradient is that of the whole batch's
    loss on any number of devices, where the released distributed code divides it by their number.
    """
    embeddings, proxies, labels = _wide(embeddings), _wide(proxies), jnp.asarray(labels)
    _check(embeddings, proxies, labels, variant)
    unit = normalize(embeddings)
    to_proxy = jnp.sum(unit * normalize(proxies), axis=-1)  # (B,)
    attraction = jax.nn.relu((positive_margin - to_proxy) / temperature)  # (B,)
    similarity = (unit @ unit.T + positive_margin - 1.0) / temperature  # (B, B), not yet cut at 0
    shift = jnp.zeros_like(attraction)
    if variant == "released":
        others = ~jnp.eye(len(labels), dtype=bool)
        nearest = jnp.max(jnp.where(others, similarity, -jnp.inf), axis=1)
        shift = lax.stop_gradient(jnp.where(jnp.isfinite(nearest), nearest, 0.0))
    negative = labels[:, None] != labels[None, :]
    exponents = jax.nn.relu(similarity) + (attraction - shift)[:, None]
    return jnp.mean(_log_one_plus_sum(exponents, negative))


def d2d_ce_bound(
    num_negatives: ArrayLike, *, temperature: ArrayLike, positive_margin: ArrayLike, variant: str = "released"
) -> jax.Array:
    """The least that a sample with `num_negatives` samples of other classes can have: a floor for watching the loss.

    log(1 + N) as written; log(1 + N exp(-m_p / tau)) as released, where a neighbour at cosine 1 shifts all negatives.
    Raises: `ValueError` for another variant. Source: Kang et al. 2021, Section 3.3.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; valid: {', '.join(VARIANTS)}")
    shift = jnp.asarray(positive_margin) / temperature if variant == "released" else jnp.zeros(())
    return jnp.log1p(num_negatives * jnp.exp(-shift))


def _log_one_plus_sum(exponents: jax.Array, keep: jax.Array) -> jax.Array:
    """log(1 + sum over the kept j of exp(exponents[i, j])): [B]. Exact for an empty sum, and without overflow."""
    largest = jnp.max(jnp.where(keep, exponents, 0.0), axis=1, initial=0.0)
    largest = lax.stop_gradient(largest)
    inside = jnp.where(keep, exponents - largest[:, None], 0.0)
    total = jnp.sum(jnp.where(keep, jnp.exp(inside), 0.0), axis=1)
    return largest + jnp.log(jnp.exp(-largest) + total)


def _check(embeddings: jax.Array, proxies: jax.Array, labels: jax.Array, variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; valid: {', '.join(VARIANTS)}")
    if embeddings.ndim != 2 or proxies.shape != embeddings.shape or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            "d2d_ce takes embeddings [B, D], a proxy for each of them [B, D] and labels [B], not shapes "
            f"{embeddings.shape}, {proxies.shape} and {labels.shape}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels are of type {labels.dtype}; expected whole numbers")


# --- what explodes in AC-GAN ------------------------------------------------------------------------------------------


class SoftmaxGradients(NamedTuple):
    """AC-GAN's class loss -mean_i log softmax(F_i^T w_1 .. F_i^T w_C)_{y_i}, and what its gradients are made of."""

    loss: jax.Array
    """Scalar."""
    probability: jax.Array
    """[B]: p_i, the probability of the asked class."""
    feature_norm: jax.Array
    """[B]: ||F_i||."""
    by_weights: jax.Array
    """[C, F]: dL/dw_k = -(1/B) sum_i (1[y_i = k] - p_ik) F_i."""
    by_features: jax.Array
    """[B, F]: dL/dF_i = -(1/B) sum_k (1[y_i = k] - p_ik) w_k."""
    bound: jax.Array
    """[C]: (1/B) sum_i |1[y_i = k] - p_ik| ||F_i||, which ||dL/dw_k|| never exceeds."""


def softmax_gradients(features: ArrayLike, weights: ArrayLike, labels: ArrayLike) -> SoftmaxGradients:
    """The gradients of AC-GAN's class loss in closed form: (1 - probability) times a feature norm that nothing bounds.

    Early in training the probability of the right class is near 1 / C, so that the first factor is near 1, the more so
    the more classes there are; the second grows as the features do.
    Shapes: features [B, F], weights [C, F], labels [B]. Source: Kang et al. 2021, Section 3.1, Eqs. 2 to 4.
    """
    features, weights, labels = _wide(features), _wide(weights), jnp.asarray(labels)
    logits = features @ weights.T  # (B, C)
    asked = jax.nn.one_hot(labels, len(weights), dtype=logits.dtype)
    error = asked - jax.nn.softmax(logits)  # (B, C)
    norms = jnp.linalg.norm(features, axis=-1)
    count = len(features)
    return SoftmaxGradients(
        loss=-jnp.mean(jnp.sum(asked * jax.nn.log_softmax(logits), axis=-1)),
        probability=1.0 - jnp.sum(asked * error, axis=-1),
        feature_norm=norms,
        by_weights=-error.T @ features / count,
        by_features=-error @ weights / count,
        bound=jnp.abs(error).T @ norms / count,
    )


def cosine_cross_entropy(
    features: ArrayLike, weights: ArrayLike, labels: ArrayLike, *, temperature: ArrayLike
) -> jax.Array:
    """AC-GAN's class loss with features and class weights on the unit sphere: the first half of the cure. A scalar.

    Logits cos(F_i, w_c) / temperature. The gradient by a weight vector w_k is at most 1 / (temperature ||w_k||) per
    sample, however long the features are.
    Shapes: features [B, F], weights [C, F], labels [B]. Source: Kang et al. 2021, Section 3.2.
    """
    logits = jax.nn.log_softmax(cosines(features, weights) / temperature)
    return -jnp.mean(jnp.take_along_axis(logits, jnp.asarray(labels)[:, None], axis=-1))


def _wide(array: ArrayLike) -> jax.Array:
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
