"""SPCL's functions: golden values, the doubly block-Toeplitz matrix itself, the two ends of alpha."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.methods import spcl

GOLDEN = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])


def golden_kernel() -> np.ndarray:
    u, v, c, m = np.meshgrid(range(3), range(3), range(2), range(3), indexing="ij")
    return np.sin(1 + m + 2 * c + 3 * u + 5 * v) / 3


@pytest.mark.parametrize(
    ("stride", "mode", "value"),
    [
        (1, "dbt", 17.878788960381), (2, "dbt", 4.164668964508), (3, "dbt", 1.613340262120),
        (1, "kernel", 1.613340262120), (1, "ocnn", 3.650365113015), (1, "kernel_cos", 1.552853487329),
    ],
)  # fmt: skip
def test_golden_losses_of_a_kernel(stride, mode, value):
    kernel = jnp.asarray(golden_kernel(), jnp.float32)
    np.testing.assert_allclose(spcl.conv_orthogonality(kernel, stride, mode=mode), value, rtol=1e-5)


def toeplitz(kernel: np.ndarray, size: int, stride: int) -> np.ndarray:
    """The convolution's matrix over a circular image, one column per input pixel and channel."""
    out = size // stride
    matrix = np.zeros((out, out, kernel.shape[3], size, size, kernel.shape[2]))
    for y in range(out):
        for x in range(out):
            for u in range(kernel.shape[0]):
                for v in range(kernel.shape[1]):
                    matrix[y, x, :, (stride * y + u) % size, (stride * x + v) % size] += kernel[u, v].T
    return matrix.reshape(out * out * kernel.shape[3], -1)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_loss_is_that_of_the_doubly_block_toeplitz_matrix(stride):
    """||KK^T - I||^2 = (N/S)^2 L; ||K^T K - I||^2 = (N/S)^2 (L - (M - C S^2)): one loss serves rows and columns."""
    kernel, size = golden_kernel(), 8
    matrix = toeplitz(kernel, size, stride)
    loss = float(spcl.conv_orthogonality(jnp.asarray(kernel, jnp.float32), stride))
    rows = np.square(matrix @ matrix.T - np.eye(len(matrix))).sum()
    columns = np.square(matrix.T @ matrix - np.eye(matrix.shape[1])).sum()
    np.testing.assert_allclose((size / stride) ** 2 * loss, rows, rtol=1e-4)
    np.testing.assert_allclose((size / stride) ** 2 * (loss - (3 - 2 * stride**2)), columns, rtol=1e-4)


def test_orthogonal_layers_cost_nothing():
    kernel = np.zeros((3, 3, 4, 4), np.float32)
    kernel[1, 1] = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    for mode in spcl.MODES:
        assert float(spcl.conv_orthogonality(jnp.asarray(kernel), 1, mode=mode)) < 1e-5
        gradient = jax.grad(lambda k, mode=mode: spcl.conv_orthogonality(k, 1, mode=mode))(jnp.zeros((3, 3, 2, 3)))
        assert np.isfinite(gradient).all()
    assert float(spcl.dense_orthogonality(jnp.asarray(kernel[1, 1][:2]))) < 1e-10
    assert spcl.orthogonality_floor((3, 3, 3, 64)) == 61
    with pytest.raises(ValueError, match="unknown mode"):
        spcl.conv_orthogonality(jnp.asarray(kernel), 1, mode="dtb")


@pytest.mark.parametrize(
    ("alpha", "d", "total"),
    [
        (0.0, (9.577350, 35.743158), (3.886751, 3.886751, 3.886751)),
        (10.0, (1.114599, 1.209370), (0.281395, 1.059430, 1.059430)),
        (1e6, (1.0, 1.0), (0.217850, 0.988065, 0.988065)),
    ],
)
def test_golden_decompositions(alpha, d, total):
    gram = GOLDEN @ GOLDEN.T
    np.testing.assert_allclose(spcl.decomposition(gram, alpha=alpha)[1], d, rtol=1e-4)
    np.testing.assert_allclose(spcl.orthogonal_decomposition(gram, alpha=alpha) @ GOLDEN, total, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 100.0])
def test_columns_are_orthogonal(alpha):
    rows = jnp.asarray(np.random.default_rng(3).standard_normal((4, 30)), jnp.float32)
    combined, d = spcl.decomposition(rows @ rows.T, alpha=alpha)
    q = combined.T @ rows
    np.testing.assert_allclose(q @ q.T, jnp.diag(d), atol=1e-3 * float(d.max()))  # float32 eigenvectors


def test_golden_value_of_the_released_loop():
    weights = spcl.released_decomposition(GOLDEN @ GOLDEN.T)
    np.testing.assert_allclose(weights, (0.81243078 + 0.35132881, 0.34250401 + 0.51441808), atol=1e-4)


def test_condition_numbers_and_zero_gradients():
    gram = GOLDEN @ GOLDEN.T
    np.testing.assert_allclose(spcl.condition_number(gram), 3.6886997, rtol=1e-5)
    padded = jnp.zeros((4, 4)).at[1:3, 1:3].set(gram)
    weights = spcl.orthogonal_decomposition(padded, alpha=10.0)
    np.testing.assert_allclose(weights[1:3], spcl.orthogonal_decomposition(gram, alpha=10.0), rtol=1e-4)
    np.testing.assert_array_equal(weights[jnp.array([0, 3])], 0)
    np.testing.assert_array_equal(spcl.orthogonal_decomposition(jnp.zeros((3, 3)), alpha=10.0, scale="min"), 0)
    with pytest.raises(ValueError, match="unknown scale"):
        spcl.scale_of(gram, "max")
