"""Inception Score: exp of the mean divergence of each image's class distribution from the mean distribution.

Source: Salimans et al. 2016, section 4: exp(E_x KL(p(y|x) || p(y))). Called Inception Score only where the logits are
the 2015 Inception's; on another classifier it is a classifier score (see `protocol`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

CHUNK = 4096


@dataclass(frozen=True)
class Score:
    """Mean over splits, and their standard deviation (None for one split)."""

    mean: float
    std: float | None
    splits: int


def inception_score(logits: ArrayLike, *, splits: int = 10) -> Score:
    """The score of each of `splits` contiguous parts of the samples, from logits [N, K]; 1 to K.

    Contiguous parts, as in the released code: parts of a list that is sorted by class score lower than a shuffled one.

    Raises: `ValueError` for fewer samples than splits, or logits that are not finite.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or splits < 1 or len(logits) < splits:
        raise ValueError(f"logits of shape {list(logits.shape)} cannot be scored in {splits} splits")
    if not np.isfinite(logits).all():
        raise ValueError("the logits are not finite")
    bounds = [len(logits) * index // splits for index in range(splits + 1)]
    scores = [_score(logits[start:stop]) for start, stop in itertools.pairwise(bounds)]
    return Score(float(np.mean(scores)), float(np.std(scores)) if splits > 1 else None, splits)


def _score(logits: NDArray[np.floating]) -> float:
    """exp(mean of sum p log p - sum q log q) with q the mean of p: one pass, in chunks."""
    with jax.enable_x64(True):
        negative_entropy, total = 0.0, np.zeros(logits.shape[1])
        for start in range(0, len(logits), CHUNK):
            part, probabilities = _sums(logits[start : start + CHUNK])
            negative_entropy += float(part)
            total += np.asarray(probabilities)
    marginal = total / len(logits)
    # A class that no sample has any probability for adds nothing: x log x -> 0.
    marginal_term = float(np.sum(marginal * np.log(np.where(marginal > 0, marginal, 1.0))))
    return float(np.exp(negative_entropy / len(logits) - marginal_term))


@jax.jit
def _sums(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum over samples of sum p log p, sum over samples of p [K])."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float64), axis=-1)
    probabilities = jnp.exp(log_probabilities)
    # exp(-800) is 0 and 0 * -800 is 0: no case needs a guard while the logits are finite.
    return jnp.sum(probabilities * log_probabilities), jnp.sum(probabilities, axis=0)
