"""SPCL's functions: golden values, the doubly block-Toeplitz matrix itself, the two ends of alpha."""

from __future__ import annotations

import functools

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
    # In float64 to all digits: W times the least singular value of G, and the diagonal d of its last step.
    with jax.enable_x64(True):
        gram = jnp.asarray(np.asarray(GOLDEN, np.float64) @ np.asarray(GOLDEN, np.float64).T)
        columns = np.asarray(spcl.released_columns(gram))
        least = float(jnp.sqrt(jnp.linalg.eigvalsh(gram)[0]))
    np.testing.assert_allclose(least * columns, [[0.81243078, 0.35132881], [0.34250401, 0.51441808]], atol=2e-8)
    lengths = np.diagonal(columns.T @ np.asarray(gram) @ columns)
    np.testing.assert_allclose((10 + 500 * lengths) / 510, (1.06677939, 1.12569419), atol=2e-8)


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


# --- properties -------------------------------------------------------------------------------------------------------

ALPHAS = (0.0, 1.0, 10.0)


def gradients(seed: int, count: int = 4, dimension: int = 9) -> np.ndarray:
    """Of lengths that differ by up to a factor of about ten."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, dimension)) * np.exp(rng.uniform(-1, 1, (count, 1)))


@functools.cache
def weights_of(alpha: float, scale: str = "none", floor: float = 0.0):
    return jax.jit(functools.partial(spcl.orthogonal_decomposition, alpha=alpha, scale=scale, floor=floor))


def gram_of(rows: np.ndarray) -> jax.Array:
    return jnp.asarray(rows @ rows.T)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("seed", range(3))
def test_the_decomposition_is_stationary(alpha, seed):
    """In float64: U = Q diag(d)^(-1/2) is the polar factor of G diag(sqrt d), and sqrt d solves its cubic."""
    with jax.enable_x64(True):
        rows = gradients(seed)
        solve = jax.jit(functools.partial(spcl.decomposition, alpha=alpha))
        combined, d = (np.asarray(x) for x in solve(gram_of(rows)))
    s = np.sqrt(d)
    u = (combined / s).T @ rows
    np.testing.assert_allclose(u @ u.T, np.eye(4), atol=1e-10)
    left, _, right = np.linalg.svd(s[:, None] * rows, full_matrices=False)
    # s stands still to 64 roundings; where alpha is 0 it moves slowly, and stops at 40 steps.
    np.testing.assert_allclose(u, left @ right, atol=1e-4 if alpha == 0 else 1e-10)
    c = np.sum(u * rows, 1)
    np.testing.assert_allclose(2 * alpha * s**3 + (1 - 2 * alpha) * s, c, rtol=1e-4 if alpha == 0 else 1e-10)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_order_of_the_tasks_does_not_matter(alpha):
    rows, order = gradients(5), [2, 0, 3, 1]
    whole, permuted = weights_of(alpha)(gram_of(rows)), weights_of(alpha)(gram_of(rows[order]))
    np.testing.assert_allclose(permuted, np.asarray(whole)[order], rtol=1e-3, atol=1e-4)  # float32 eigenvectors


def test_orthogonalising_alone_is_linear_in_the_scale_and_the_rest_is_not():
    """alpha = 0 knows no length of its own; alpha > 0 draws lengths towards 1, so that weights fall with the scale."""
    gram = gram_of(gradients(6))
    np.testing.assert_allclose(weights_of(0.0)(1e6 * gram), weights_of(0.0)(gram), rtol=1e-3)
    assert np.abs(weights_of(10.0)(1e6 * gram)).max() < 0.1 * np.abs(weights_of(10.0)(gram)).max()
    np.testing.assert_allclose(
        weights_of(1e6, "rmse")(gram) @ gram @ weights_of(1e6, "rmse")(gram) / float(jnp.trace(gram)), 1.0, rtol=1e-3
    )


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [1e-10, 1e-5, 1.0, 1e5, 1e10, 1e15])
def test_weights_are_finite_at_any_scale_and_rank(alpha, scale):
    rows = gradients(7)
    twice = rows.copy()
    twice[3] = twice[0] + twice[1]
    same = np.repeat(rows[:1], 4, 0)
    for case in (rows, twice, same, np.vstack([rows[:2], -rows[:2]]), np.zeros((4, 9))):
        for rule in ("none", "min", "median", "rmse") if alpha == 10 else ("none",):
            found = np.asarray(weights_of(alpha, rule)(gram_of((case * scale).astype(np.float32))))
            assert np.isfinite(found).all()
            assert found.any() == case.any()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_absent_tasks_change_nothing_at_a_fixed_width(alpha):
    rows = gradients(8, 3)
    padded = np.zeros((6, 9))
    padded[[1, 2, 5]] = rows
    found = np.asarray(weights_of(alpha)(gram_of(padded)))
    assert not found[[0, 3, 4]].any()
    np.testing.assert_allclose(found[[1, 2, 5]], weights_of(alpha)(gram_of(rows)), rtol=1e-3)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_single_task_keeps_its_direction(alpha):
    """Q = g s / ||g|| with s the root of its cubic for c = ||g||; with alpha = 0 the gradient itself."""
    found = float(weights_of(alpha)(jnp.array([[9.0]]))[0])
    s = 3 * found
    assert 2 * alpha * s**3 + (1 - 2 * alpha) * s == pytest.approx(3.0, rel=1e-5)


def test_the_floor_keeps_the_step_from_collapsing():
    """Two gradients within 1e-3 of parallel: `min` shortens the step a thousandfold, the floor to a tenth at most."""
    rows = np.array([[1.0, 0.0], [1.0, 2e-3]])
    gram = gram_of(rows)
    sigma = np.linalg.svd(rows, compute_uv=False)
    np.testing.assert_allclose(spcl.scale_of(gram, "min"), sigma[1], rtol=0.05)  # the difference of two float32 sums
    np.testing.assert_allclose(spcl.scale_of(gram, "min", floor=0.1), 0.1 * sigma[0], rtol=1e-5)
    np.testing.assert_allclose(spcl.scale_of(gram, "rmse", floor=0.1), np.sqrt(1 + 2e-6), rtol=1e-5)
    lengths = [float(jnp.sqrt(w @ gram @ w)) for w in (weights_of(10.0, "min", f)(gram) for f in (0.0, 0.1))]
    np.testing.assert_allclose(lengths[1] / lengths[0], 0.1 * sigma[0] / sigma[1], rtol=0.1)
    with pytest.raises(ValueError, match="share of the largest singular value"):
        spcl.scale_of(gram, "min", floor=2.0)


def test_float64_tells_condition_numbers_that_float32_cannot():
    rng = np.random.default_rng(9)
    left, right = np.linalg.qr(rng.standard_normal((3, 3)))[0], np.linalg.qr(rng.standard_normal((8, 3)))[0]
    rows = left @ np.diag([1.0, 1e-2, 1e-5]) @ right.T
    with jax.enable_x64(True):
        assert float(spcl.condition_number(gram_of(rows))) == pytest.approx(1e5, rel=1e-3)
        assert spcl.orthogonal_decomposition(gram_of(rows), alpha=10.0, scale="min").dtype == jnp.float64
    assert float(spcl.condition_number(jnp.asarray(gram_of(rows), jnp.float32))) < 3e3


def test_derivatives_are_those_of_the_solution():
    """Against central differences in float64, also where two eigenvalues are equal; under vmap as one by one."""
    solve = jax.jit(lambda gram: spcl.orthogonal_decomposition(gram, alpha=2.0))

    def total(gram: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(jnp.arange(3) + 1.0) * solve(gram))

    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(total))
        for gram in (gram_of(gradients(10, 3)), 2.0 * jnp.eye(3)):
            change = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3)))
            change = change + change.T
            step = 1e-5
            slope = (total(gram + step * change) - total(gram - step * change)) / (2 * step)
            np.testing.assert_allclose(jnp.sum(gradient(gram) * change), slope, rtol=1e-6)
        both = jnp.stack([gram_of(gradients(11, 3)), gram_of(gradients(12, 3))])
        for gram, found in zip(both, jax.vmap(solve)(both), strict=True):
            np.testing.assert_allclose(found, solve(gram), rtol=1e-9)
