"""ScaleLong: scaling the long skip connections of a UNet (Huang, Zhou, Yan and Lin, NeurIPS 2023, arXiv 2310.13545).

A network with N long skip connections is, from the outside in,

    UNet(x) = f_0(x),   f_i(x) = b_{i+1}( kappa_{i+1} * a_{i+1}(x) + f_{i+1}(a_{i+1}(x)) ),   f_N = middle block,

with encoder blocks a_i, decoder blocks b_i, and kappa_i the coefficient of the i-th skip (1 in the standard UNet).
Arrays of coefficients are indexed from the outside: index 0 is kappa_1, the outermost skip. Features are numbered as
the paper numbers them: h_i is the output of f_i, thus of the decoder block that merges the skip of index i.

Everything here is a pure function or a Flax module, and works under jit, grad and vmap, in float32 and float64.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

SQRT_HALF = 2.0**-0.5
"""The 1/sqrt(2) scaling of earlier work (SR3, Imagen), which ScaleLong compares with."""


# --- constant scaling -------------------------------------------------------------------------------------------------


def constant_scales(num_skips: int, kappa: ArrayLike) -> jax.Array:
    """CS: [kappa^0, kappa^1, ..., kappa^(N-1)], index 0 the outermost skip, which is thus never scaled.

    The bound of Theorem 3.4 weights skip i by M_0^i, so the innermost needs the most damping; and sum kappa_i^2 stays
    below 1 / (1 - kappa^2) for any depth.
    Source: Huang et al. 2023, Section 4 (CS): kappa_i = kappa^(i-1), i = 1 the outermost; the authors suggest kappa in
    [0.5, 0.95]. The released code walks from the innermost skip outwards with the exponent N-1 .. 0: the same numbers.
    """
    return jnp.asarray(kappa, dtype=float) ** jnp.arange(num_skips)


# --- learned scaling --------------------------------------------------------------------------------------------------


class LearnedScale(nn.Module):
    """LS: a squeeze-and-excitation gate that predicts the coefficient from the skip feature itself, in (0, 1).

    `form="token"`: features [B, L, D] are averaged over D, and the gate is one number per token, [B, L, 1]. This is
    what was released for U-ViT; its Linear layers tie the network to L tokens.
    `form="pooled"`: the same with the L tokens first averaged into `bins` equal stretches, and the gate of a token
    read back from the stretches that it lies in. Any L; with L = bins it is the token form exactly.
    `form="channel"`: features [B, ..., D] are averaged over everything between, and the gate is one number per
    channel, [B, 1, ..., D]. Any resolution; the form for convolutional UNets.

    All: Linear(n -> n // reduction), ReLU, Linear(-> n), sigmoid, computed in at least float32. A module called at
    several skips is shared among them (LS); one module a skip is the released "non-share" variant.
    Initialisation U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases, so gates start near 0.5.

    Raises: `ValueError` for an unknown form, or features that a form does not take.
    Source: Huang et al. 2023, Section 4 (LS). Differs: only the token form is in the released code.
    """

    form: str = "token"
    reduction: int = 16
    bins: int = 64
    """Of the pooled form only."""

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        wide = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        if self.form == "channel":
            gate = self._gate(wide.mean(axis=tuple(range(1, features.ndim - 1))))  # [B, D]
            return gate.reshape(gate.shape[0], *(1,) * (features.ndim - 2), gate.shape[-1])
        if self.form not in ("token", "pooled"):
            raise ValueError(f"unknown form {self.form!r}: token, pooled or channel")
        if features.ndim != 3:
            raise ValueError(f"the {self.form} form takes features [B, L, D], not {features.shape}")
        squeezed = wide.mean(axis=-1)  # [B, L]
        if self.form == "token":
            return self._gate(squeezed)[:, :, None]
        length = features.shape[1]
        binned = squeezed @ jnp.asarray(overlaps(length, self.bins), wide.dtype)  # [B, bins]
        return (self._gate(binned) @ jnp.asarray(overlaps(self.bins, length), wide.dtype))[:, :, None]

    def _gate(self, squeezed: jax.Array) -> jax.Array:
        size = squeezed.shape[-1]
        hidden = nn.relu(UniformDense(max(1, size // self.reduction), name="squeeze")(squeezed))
        return nn.sigmoid(UniformDense(size, name="excite")(hidden))


class UniformDense(nn.Module):
    """A Linear layer whose weight and bias start uniform in +-1/sqrt(fan_in), as in the released gates."""

    features: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        bound = inputs.shape[-1] ** -0.5

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        kernel = self.param("kernel", uniform, (inputs.shape[-1], self.features))
        bias = self.param("bias", uniform, (self.features,))
        return inputs @ kernel + bias


def overlaps(source: int, target: int) -> np.ndarray:
    """[source, target] matrix that averages a line of `source` equal cells into one of `target` equal cells.

    Entry (s, t) is the share of target cell t that source cell s covers; columns sum to one, and it is the identity
    where the two are equal.
    """
    starts, ends = np.arange(source)[:, None] * target, np.arange(1, source + 1)[:, None] * target
    lows, highs = np.arange(target)[None] * source, np.arange(1, target + 1)[None] * source
    return np.maximum(np.minimum(ends, highs) - np.maximum(starts, lows), 0) / source


# --- what the theorems predict ----------------------------------------------------------------------------------------


def theorem31_prediction(scales: ArrayLike, *, input_norm_squared: ArrayLike = 1.0, gain: ArrayLike = 1.0) -> jax.Array:
    """Expected squared norms E||h_i||^2 of the decoder features at initialisation, i = 0 .. N.

    Shapes: scales [N] -> [N + 1]; entry i belongs to h_i = f_i(.), entry N to the middle block.

    For blocks W_2 relu(W_1 x) with W_1 ~ N(0, 2/m) and W_2 ~ N(0, gain/m), independence and zero means give exactly

        E||h_N||^2 = g^(N+1) ||x||^2,    E||h_i||^2 = g ( kappa_{i+1}^2 g^(i+1) ||x||^2 + E||h_{i+1}||^2 ),

    which for gain 1 is ||x||^2 ( sum_{j > i} kappa_j^2 + 1 ), that is 1 + sum(scales[i:] ** 2).
    Source: Huang et al. 2023, Theorem 3.1. Differs: the theorem bounds the norm by c1 ||x||^2 sum_{j >= i} kappa_j^2
    + c2 with constants left open and the sum starting one earlier; read literally (every matrix N(0, 2/m)) the gain
    is 2, the weights are geometric, and scaling the skips hardly changes the norm.
    """
    scales = jnp.asarray(scales)
    num_skips = scales.shape[0]
    norm, gain = jnp.asarray(input_norm_squared), jnp.asarray(gain)
    expected = gain ** (num_skips + 1) * norm
    found = [expected]
    for i in range(num_skips - 1, -1, -1):
        expected = gain * (scales[i] ** 2 * gain ** (i + 1) * norm + expected)
        found.append(expected)
    return jnp.stack(found[::-1])


def lemma32_input_norm(mean_alpha_bar: ArrayLike, dimension: int) -> jax.Array:
    """E||x_t||^2 of a noised image x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps with x_0 uniform in [-1, 1]^m.

    Equals (1 - 2 E[abar] / 3) m, since E x_0^2 = 1/3. Source: Huang et al. 2023, Lemma 3.2.
    """
    return (1.0 - 2.0 * jnp.asarray(mean_alpha_bar) / 3.0) * dimension


def theorem33_ratio(
    gradient_norm_squared: ArrayLike,
    loss: ArrayLike,
    input_norm_squared: ArrayLike,
    scales: ArrayLike,
    skip: ArrayLike,
) -> jax.Array:
    """A block's squared gradient norm over 4 l ||x||^2 (sum_{j >= i} kappa_j^2 + 1), for the blocks of skip i = `skip`.

    Theorem 3.3 says that this stays of order one, whatever the scaling. `skip` counts from 0, the outermost; the loss
    is the sum ||eps - eps_theta||^2, not its mean over pixels.
    Source: Huang et al. 2023, Theorem 3.3. Differs: the theorem leaves its constants open; this is the value for a
    squared error and gain-1 blocks if the matrices of the forward and backward passes were independent. They are the
    same matrices, so values of about 1 to 20 are what one sees.
    """
    scales = jnp.asarray(scales)
    total = jnp.sum(jnp.where(jnp.arange(scales.shape[0]) >= skip, scales**2, 0)) + 1.0
    return jnp.asarray(gradient_norm_squared) / (4.0 * jnp.asarray(loss) * jnp.asarray(input_norm_squared) * total)


def theorem34_bound(scales: ArrayLike, block_lipschitz: ArrayLike, middle_lipschitz: ArrayLike) -> jax.Array:
    """The Lipschitz constant of the network: ||UNet(x + d) - UNet(x)|| <= bound * ||d||.

    sum_{i=1}^N kappa_i M_0^i + M_0^N L_0, with M_0 = max_i Lip(b_i) Lip(a_i) and L_0 that of the middle block: a
    rigorous inequality. Source: Huang et al. 2023, Theorem 3.4, whose c_0 is M_0^N L_0 by unrolling the recursion.
    """
    scales = jnp.abs(jnp.asarray(scales))
    num_skips = scales.shape[0]
    block = jnp.asarray(block_lipschitz)
    powers = block ** jnp.arange(1, num_skips + 1)
    return jnp.sum(scales * powers) + block**num_skips * jnp.asarray(middle_lipschitz)
