"""SPCL: orthogonal layers (forward) and an orthogonal decomposition of the task gradients (backward).

Forward. A convolution is a matrix, doubly block-Toeplitz (DBT). Its rows are orthonormal iff the kernel's convolution
with itself is the identity: L_orth = || Conv(K, K; padding P, stride S) - I_r0 ||_F^2 with P = floor((k - 1) / S) S,
whose cost does not depend on the image (Wang et al. 2020, OCNN).

Backward. G = [g_1 .. g_T] has the Gram matrix M = G^T G. Everything happens in T x T: Q = G W with

    min_{Q, d} ||G - Q||_F^2 + alpha ||d - 1||^2   subject to   Q^T Q = diag(d),

and the update is the sum of Q's columns, G (W 1). alpha = 0 orthogonalises only, alpha -> infinity makes all columns
equally long: condition number 1, as in Aligned-MTL.

Source: "Towards stable training of parallel continual learning" (2024) and its released code. Differs: the released
code solves a penalty form by gradient descent (`released_decomposition`); the constraint is exact here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

MODES = ("dbt", "ocnn", "kernel", "kernel_cos")
RELEASED_TOLERANCE = 1e-7
RELEASED_ITERATIONS = 100
RELEASED_RATE = 1e-5
RELEASED_MOMENTUM = 0.9
RELEASED_PENALTY = 500.0
RELEASED_STOP = 1e-5
ITERATIONS = 40
ROOT_STEPS = 10

# --- forward ----------------------------------------------------------------------------------------------------------


def self_convolution(kernel: Array, stride: int, padding: int) -> Array:
    """Conv(K, K; P, S): the inner products of all filters with all shifted filters.

    kernel: [k, k, in, out]; returns [out, out, s, s] with s = 2 P / S + 1 where S divides P.
    """
    filters = jnp.transpose(kernel, (3, 2, 0, 1))  # (M, C, k, k)
    return lax.conv_general_dilated(
        filters, filters, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NCHW", "OIHW", "NCHW"),
        precision="highest",
    )  # fmt: skip


def conv_orthogonality(kernel: Array, stride: int, *, mode: str = "dbt") -> Array:
    """How far a convolution is from orthogonal; a scalar.

    kernel: [k, k, in, out].

    - `dbt`: ||Conv(K, K; P, S) - I||_F^2, P = floor((k - 1) / S) S.
    - `ocnn`: the same unsquared with padding 1, as released by Wang et al.; at stride 2 its centre is a shift by one.
    - `kernel`: ||R R^T - I||_F^2 of the flattened filters: necessary, not sufficient.
    - `kernel_cos`: sum over pairs i != j of cos^2(K_i, K_j), as released with SPCL; the stride is ignored.

    The losses of rows and columns differ by a constant, so one serves both; for out > in S^2 `dbt` cannot go below
    `orthogonality_floor`.

    Raises: `ValueError` for an unknown mode.
    """
    size, outputs = kernel.shape[0], kernel.shape[-1]
    identity = jnp.eye(outputs, dtype=kernel.dtype)
    if mode in ("dbt", "ocnn"):
        padding = (size - 1) // stride * stride if mode == "dbt" else 1
        found = self_convolution(kernel, stride, padding)
        centre = found.shape[-1] // 2
        squares = jnp.sum(jnp.square(found.at[:, :, centre, centre].add(-identity)))
        # The root's derivative at 0 is infinite.
        return squares if mode == "dbt" else jnp.sqrt(jnp.where(squares > 0, squares, 1.0)) * (squares > 0)
    rows = kernel.reshape(-1, outputs).T
    if mode == "kernel":
        return jnp.sum(jnp.square(jnp.matmul(rows, rows.T, precision="highest") - identity))
    if mode == "kernel_cos":
        unit = rows / jnp.sqrt(jnp.sum(jnp.square(rows), 1, keepdims=True) + 1e-12)
        cosines = jnp.matmul(unit, unit.T, precision="highest") * (1 - identity)
        return jnp.sum(jnp.square(cosines))
    raise ValueError(f"unknown mode {mode!r}: {', '.join(MODES)}")


def orthogonality_floor(kernel_shape: tuple[int, ...], stride: int = 1) -> int:
    """The least value of `dbt`, by shape: out - in S^2 where that is positive (rows cannot all be orthogonal)."""
    return max(kernel_shape[-1] - kernel_shape[-2] * stride**2, 0)


def dense_orthogonality(kernel: Array) -> Array:
    """||W^T W - I||_F^2 on the smaller of the two Gram matrices. kernel: [in, out]."""
    matrix = kernel if kernel.shape[0] >= kernel.shape[1] else kernel.T
    gram = jnp.matmul(matrix.T, matrix, precision="highest")
    return jnp.sum(jnp.square(gram - jnp.eye(len(gram), dtype=kernel.dtype)))


# --- backward ---------------------------------------------------------------------------------------------------------


def _spectrum(gram: Array, tolerance: float | None = None) -> tuple[Array, Array, Array]:
    """Eigenvalues in rising order, eigenvectors, and which ones count: above tolerance T lambda_max.

    The tolerance is the rounding of gram's type by default: float32 tells condition numbers up to some 1e3, float64 up
    to some 1e7.
    """
    values, vectors = jnp.linalg.eigh(gram)
    share = jnp.finfo(gram.dtype).eps if tolerance is None else tolerance
    kept = values > share * len(gram) * jnp.maximum(values[-1], 0.0)
    return jnp.where(kept, values, 0.0), vectors, kept


def _inverse_root(values: Array, kept: Array) -> Array:
    return jnp.where(kept, 1.0 / jnp.sqrt(jnp.where(kept, values, 1.0)), 0.0)


def condition_number(gram: Array) -> Array:
    """sigma_1 / sigma_r of G over the singular values above rounding; 1 for a zero matrix. gram: [T, T]."""
    values, _, kept = _spectrum(gram)
    least = jnp.min(jnp.where(kept, values, jnp.inf))
    return jnp.where(jnp.any(kept), jnp.sqrt(values[-1] / jnp.where(jnp.isfinite(least), least, 1.0)), 1.0)


def scale_of(gram: Array, rule: str, *, floor: float = 0.0, tolerance: float | None = None) -> Array:
    """A length from the singular values that are there: min, median, rmse, or none (1).

    `floor` is the guard against the collapse of the step: the length is at least this share of the largest singular
    value. The smallest one, which `min` takes, goes to 0 as two gradients become parallel, and the update with it.

    Raises: `ValueError` for an unknown rule, and for a floor outside [0, 1].
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"the floor is a share of the largest singular value, from 0 to 1, and not {floor}")
    if rule == "none":
        return jnp.ones((), gram.dtype)
    values, _, kept = _spectrum(gram, tolerance)
    rank = jnp.maximum(jnp.sum(kept), 1)
    if rule == "min":
        chosen = jnp.min(jnp.where(kept, values, jnp.inf))
        chosen = jnp.where(jnp.isfinite(chosen), chosen, 0.0)
    elif rule == "rmse":
        chosen = jnp.sum(values) / rank
    elif rule == "median":  # the kept ones are the last of the rising order; the lower one of two, as torch has it
        chosen = values[len(gram) - rank + (rank - 1) // 2]
    else:
        raise ValueError(f"unknown scale {rule!r}: min, median, rmse, none")
    return jnp.sqrt(jnp.maximum(chosen, floor**2 * values[-1]))


def polar_weights(gram: Array, *, tolerance: float | None = None) -> Array:
    """W = M^(-1/2) on the span of the gradients: G W is the nearest matrix with orthonormal columns."""
    values, vectors, kept = _spectrum(gram, tolerance)
    return (vectors * _inverse_root(values, kept)) @ vectors.T


@jax.custom_jvp
def _roots(matrix: Array) -> tuple[Array, Array]:
    """N^(1/2) and its pseudo-inverse. The derivative is that of the Sylvester equation R dR + dR R = dN, which knows no
    differences of eigenvalues: equal ones, where that of `eigh` is infinite, do no harm.
    """
    values, vectors, kept = _spectrum(matrix)
    return (vectors * jnp.sqrt(values)) @ vectors.T, (vectors * _inverse_root(values, kept)) @ vectors.T


@_roots.defjvp
def _roots_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    values, vectors, kept = _spectrum(primals[0])
    sigma, inverse = jnp.sqrt(values), _inverse_root(values, kept)
    inner = vectors.T @ tangents[0] @ vectors
    total = sigma[:, None] + sigma[None, :]
    change = jnp.where(total > 0, inner / jnp.where(total > 0, total, 1.0), 0.0)
    slope = -inverse[:, None] * change * inverse[None, :]
    found = (vectors * sigma) @ vectors.T, (vectors * inverse) @ vectors.T
    return found, (vectors @ change @ vectors.T, vectors @ slope @ vectors.T)


def decomposition(gram: Array, *, alpha: float) -> tuple[Array, Array]:
    """W [T, T] and d [T] of the constrained problem: Q = G W, Q^T Q = diag(d).

    Alternates U = polar(G diag(s)) and the root s_i >= 0 of 2 alpha s^3 + (1 - 2 alpha) s - c_i = 0, c_i = <g_i, u_i>,
    which minimises (s^2 - 2 c s) + alpha (s^2 - 1)^2, from the s that orthogonal gradients would have until s stands
    still. Q is orthogonal at any s. Zero gradients (slots that are off) have zero rows and columns. Derivatives are
    those of the solution, by the implicit function theorem.
    """
    largest = jnp.max(jnp.diagonal(gram))
    unit_scale = jnp.where(largest > 0, largest, 1.0)
    scaled = gram / unit_scale  # s and G each over their largest: products of four of them stay within float32
    lengths = jnp.sqrt(jnp.maximum(jnp.diagonal(scaled), 0.0))
    length_scale = jnp.sqrt(unit_scale)
    present = lengths > 0

    def shape_of(s: Array) -> tuple[Array, Array, Array]:
        top = jnp.max(s)
        relative = s / jnp.where(top > 0, top, 1.0)
        root, inverse = _roots(relative[:, None] * scaled * relative[None, :])
        return relative, root, inverse

    def improved(s: Array) -> Array:
        relative, root, _ = shape_of(s)
        c = length_scale * jnp.diagonal(root) / jnp.where(relative > 0, relative, 1.0)
        return jnp.where(present, _root(jnp.maximum(c, 0.0), alpha), 0.0)

    tolerance = 64 * jnp.finfo(gram.dtype).eps

    def solve(_: Callable[[Array], Array], start: Array) -> Array:
        def unsettled(carry: tuple[Array, Array, Array]) -> Array:
            count, s, before = carry
            return (count < ITERATIONS) & jnp.any(jnp.abs(s - before) > tolerance * s)

        def body(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            count, s, _ = carry
            return count + 1, improved(s), s

        return lax.while_loop(unsettled, body, (jnp.zeros((), jnp.int32), start, jnp.full_like(start, -1.0)))[1]

    def tangent(linear: Callable[[Array], Array], right: Array) -> Array:
        return jnp.linalg.solve(jax.jacobian(linear)(right), right)

    start = jnp.where(present, _root(length_scale * lengths, alpha), 0.0)
    s = lax.custom_root(lambda s: improved(s) - s, start, solve, tangent)
    relative, _, inverse = shape_of(s)
    unit = relative[:, None] * inverse / length_scale  # U = G unit
    return unit * s[None, :], jnp.square(s)


def _root(c: Array, alpha: float) -> Array:
    """The s >= 0 that minimises s^2 - 2 c s + alpha (s^2 - 1)^2 for c >= 0."""
    if alpha == 0:
        return c
    # Convex beyond its inflection and increasing there: Newton from above falls onto the largest root. Both starts are
    # at most twice the root, from where ten steps reach float64's rounding; unrolled they are one fused operation.
    cubic = jnp.cbrt(c / (2 * alpha))
    s = jnp.minimum(c / (1 - 2 * alpha), cubic) if alpha < 0.5 else math.sqrt(1 - 0.5 / alpha) + cubic
    for _ in range(ROOT_STEPS):
        value, slope = 2 * alpha * s**3 + (1 - 2 * alpha) * s - c, 6 * alpha * s**2 + 1 - 2 * alpha
        s = s - jnp.where(slope > 0, value / jnp.where(slope > 0, slope, 1.0), 0.0)
    return s


def orthogonal_decomposition(gram: Array, *, alpha: float, scale: str = "none", floor: float = 0.0) -> Array:
    """Weights [T] of the update sum_t w_t g_t = sum of Q's columns, times the length that `scale` names.

    gram: [T, T], float32 or float64. alpha >= 0: from "orthogonalise only" to condition number 1. `scale` and `floor`
    are those of `scale_of`. A zero matrix has zero weights.
    """
    found, _ = decomposition(gram, alpha=alpha)
    return scale_of(gram, scale, floor=floor) * jnp.sum(found, 1)


def released_decomposition(gram: Array, *, alpha: float = 10.0, scale: str = "min", floor: float = 0.0) -> Array:
    """Weights [T] as the released penalty loop gives them: those of `released_columns`, times the smallest singular
    value of G, or another length.
    """
    length = scale_of(gram, scale, floor=floor, tolerance=RELEASED_TOLERANCE)
    return length * jnp.sum(released_columns(gram, alpha=alpha), 1)


def released_columns(gram: Array, *, alpha: float = 10.0) -> Array:
    """W [T, T] with Q = G W as the released penalty loop leaves it, in T x T.

    From the polar factor 100 heavy-ball steps (rate 1e-5, momentum 0.9) on ||G - Q||^2 + 500 ||Q^T Q - diag(d)||^2
    with d in closed form, until the objective changes by less than 1e-5.
    """
    identity, penalty = jnp.eye(len(gram), dtype=gram.dtype), RELEASED_PENALTY

    def diagonal(w: Array) -> Array:
        return (alpha + penalty * jnp.diagonal(w.T @ gram @ w)) / (alpha + penalty)

    def objective(w: Array, d: Array) -> Array:
        off = w - identity
        gap = w.T @ gram @ w - jnp.diag(d)
        return jnp.sum(off * (gram @ off)) + alpha * jnp.sum((d - 1) ** 2) + penalty * jnp.sum(gap**2)

    start = polar_weights(gram, tolerance=RELEASED_TOLERANCE)
    d = jnp.diagonal(start.T @ gram @ start)

    def body(carry: tuple) -> tuple:
        i, w, velocity, d, before, _ = carry
        gradient = 2 * (w - identity) + 4 * penalty * w @ (w.T @ gram @ w - jnp.diag(d))
        velocity = RELEASED_MOMENTUM * velocity - RELEASED_RATE * gradient
        w = w + velocity
        d = diagonal(w)
        now = objective(w, d)
        return i + 1, w, velocity, d, now, jnp.abs(before - now) >= RELEASED_STOP

    first = (0, start, jnp.zeros_like(start), d, objective(start, d), jnp.array(True))
    return lax.while_loop(lambda c: (c[0] < RELEASED_ITERATIONS) & c[5], body, first)[1]
