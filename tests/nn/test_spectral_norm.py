"""Spectral normalisation: the estimate against NumPy's singular values, and what it keeps where."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.nn.spectral_norm import (
    SpectralConvolution,
    SpectralDense,
    SpectralEmbed,
    power_iteration,
    spectral_normalize,
    unit,
)


def matrix_of(shape=(7, 5), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def start(matrix: np.ndarray, seed: int = 1) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    return tuple(unit(jnp.asarray(rng.standard_normal(size))) for size in matrix.shape)


LAYERS = {
    "dense": (SpectralDense(6), jnp.ones((2, 4)), ("kernel",), lambda k: k.T),
    "convolution": (
        SpectralConvolution(6, 3),
        jnp.ones((2, 5, 5, 4)),
        ("kernel",),
        lambda k: k.reshape(-1, 6).T,
    ),
    "embedding": (SpectralEmbed(5, 6), jnp.arange(2), ("embedding",), lambda k: k),
}


def test_the_power_iteration_converges_to_the_largest_singular_value():
    matrix = matrix_of()
    with jax.enable_x64(True):
        vectors = start(matrix)
        for _ in range(200):
            vectors = power_iteration(jnp.asarray(matrix), vectors[0])
        weight, _ = spectral_normalize(jnp.asarray(matrix), vectors, update=False)
    expected = matrix / np.linalg.svd(matrix, compute_uv=False)[0]
    # 200 steps with singular values at a ratio of .9 leave 1e-9 of the start; epsilon acts on lengths near 0 only.
    np.testing.assert_allclose(weight, expected, rtol=1e-8)


def test_one_step_is_the_published_one():
    """v = W^T u / |W^T u|, u = W v / |W v|, sigma = u^T W v (Miyato et al. 2018, Algorithm 1)."""
    matrix = matrix_of()
    with jax.enable_x64(True):
        u0, v0 = start(matrix)
        weight, (u, v) = spectral_normalize(jnp.asarray(matrix), (u0, v0), update=True)
    due_v = matrix.T @ np.asarray(u0)
    due_v /= np.linalg.norm(due_v)
    due_u = matrix @ due_v
    sigma = np.linalg.norm(due_u)
    np.testing.assert_allclose(v, due_v, rtol=1e-12)
    np.testing.assert_allclose(u, due_u / sigma, rtol=1e-12)
    np.testing.assert_allclose(weight, matrix / sigma, rtol=1e-12)


def test_the_gradient_passes_through_sigma_but_not_through_its_vectors():
    """d(sum C W/sigma)/dW = C/sigma - sum(C W)/sigma^2 u v^T with u, v held: Miyato et al. 2018, Equation 10."""
    matrix, cotangent = matrix_of(), matrix_of(seed=2)
    with jax.enable_x64(True):
        vectors = start(matrix)

        def loss(weights):
            return jnp.sum(cotangent * spectral_normalize(weights, vectors, update=True)[0])

        gradient = jax.grad(loss)(jnp.asarray(matrix))
        u, v = (np.asarray(x) for x in power_iteration(jnp.asarray(matrix), vectors[0]))
    sigma = u @ matrix @ v
    expected = cotangent / sigma - np.sum(cotangent * matrix) / sigma**2 * np.outer(u, v)
    np.testing.assert_allclose(gradient, expected, rtol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_a_call_in_training_moves_the_vectors_and_never_the_kernel(name):
    layer, inputs, path, matrix = LAYERS[name]
    variables = layer.init(jax.random.key(0), inputs, train=False)
    out, changed = layer.apply(variables, inputs, train=True, mutable=["spectral", "params"])
    np.testing.assert_array_equal(changed["params"][path[0]], variables["params"][path[0]])
    (u_name,) = (key for key in changed["spectral"] if key.endswith("_u"))
    kernel = np.asarray(matrix(variables["params"][path[0]]), np.float64)
    v = unit(jnp.asarray(kernel.T @ np.asarray(variables["spectral"][u_name])))
    np.testing.assert_allclose(changed["spectral"][u_name], unit(jnp.asarray(kernel) @ v), atol=1e-6)  # float32
    assert changed["spectral"][u_name].shape == (kernel.shape[0],)
    # Not mutable: the same output, and nothing kept.
    np.testing.assert_array_equal(layer.apply(variables, inputs, train=True), out)


@pytest.mark.parametrize("name", LAYERS)
def test_outside_of_training_nothing_evolves(name):
    layer, inputs, _, _ = LAYERS[name]
    variables = layer.init(jax.random.key(0), inputs, train=False)
    first, changed = layer.apply(variables, inputs, train=False, mutable=["spectral"])
    for before, after in zip(jax.tree.leaves(variables["spectral"]), jax.tree.leaves(changed["spectral"]), strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(layer.apply(variables, inputs, train=False), first)


@pytest.mark.parametrize("name", LAYERS)
def test_after_many_calls_a_layer_has_spectral_norm_one(name):
    layer, inputs, path, matrix = LAYERS[name]
    variables = layer.init(jax.random.key(0), inputs, train=False)
    # A random kernel in place of the orthogonal one, all of whose singular values are 1 already.
    kernel = jnp.asarray(np.random.default_rng(3).standard_normal(variables["params"][path[0]].shape), jnp.float32)
    params = {**variables["params"], path[0]: kernel}
    spectral = variables["spectral"]
    for _ in range(60):
        out, changed = layer.apply({"params": params, "spectral": spectral}, inputs, train=True, mutable=["spectral"])
        spectral = changed["spectral"]
    sigma = np.linalg.svd(np.asarray(matrix(kernel), np.float64), compute_uv=False)[0]
    plain = {"params": {**params, path[0]: kernel / sigma}}
    if name == "embedding":
        expected = plain["params"][path[0]][inputs]
    else:
        expected = type(layer)(**{**_fields(layer), "spectral": False}).apply(plain, inputs, train=False)
    # 60 steps leave less than 1e-4 of sigma at these matrices' gaps.
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)


def _fields(layer: nn.Module) -> dict[str, object]:
    names = ("features", "size", "stride", "padding", "use_bias", "kernel_init", "dtype", "transposed")
    return {name: getattr(layer, name) for name in names if hasattr(layer, name)}
