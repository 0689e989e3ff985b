"""Indicators against their definitions on explicit gradients, layers and features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.continual.indicators import (
    condition,
    gram_indicators,
    layer_spectrum,
    subspace_overlap,
    transition_dips,
)

GOLDEN = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])


def test_golden_values_of_two_conflicting_gradients():
    gram = GOLDEN @ GOLDEN.T
    found = gram_indicators(gram, jnp.array([True, True]), gram @ jnp.ones(2), jnp.sum(gram))
    np.testing.assert_allclose(found["mean_cosine"], -0.8411910, rtol=1e-6)
    np.testing.assert_allclose(found["magnitude_similarity"], 0.9340497, rtol=1e-6)
    np.testing.assert_allclose(found["condition"], 3.6886997, rtol=1e-5)
    assert found["conflict_rate"] == 1
    d = np.asarray(GOLDEN.sum(0))
    cosines = np.asarray(GOLDEN) @ d / np.linalg.norm(GOLDEN, axis=1) / np.linalg.norm(d)
    np.testing.assert_allclose(found["least_progress"], cosines.min(), rtol=1e-5)
    np.testing.assert_allclose(found["update_share"], 1, rtol=1e-6)


def test_slots_that_are_off_change_nothing():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3, 7)).astype(np.float32)
    padded = np.zeros((6, 7), np.float32)
    padded[[0, 2, 5]] = rows
    mask = np.isin(np.arange(6), [0, 2, 5])
    weights = rng.uniform(0.1, 1, 3).astype(np.float32)
    spread = np.zeros(6, np.float32)
    spread[mask] = weights
    gram, wide = jnp.asarray(rows @ rows.T), jnp.asarray(padded @ padded.T)
    whole = gram_indicators(gram, jnp.ones(3, bool), gram @ weights, weights @ gram @ weights)
    masked = gram_indicators(wide, jnp.asarray(mask), wide @ spread, spread @ wide @ spread)
    for name, value in whole.items():
        np.testing.assert_allclose(masked[name], value, rtol=1e-5, err_msg=name)
    values = np.linalg.svd(rows, compute_uv=False)
    np.testing.assert_allclose(whole["condition"], values[0] / values[-1], rtol=1e-4)
    shares = values**2 / (values**2).sum()
    np.testing.assert_allclose(whole["effective_rank"], np.exp(-(shares * np.log(shares)).sum()), rtol=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_one_gradient_or_none_has_no_conflict(count):
    mask = jnp.arange(3) < count
    rows = jnp.where(mask[:, None], jnp.ones((3, 4)), 0.0)
    gram = rows @ rows.T
    found = jax.jit(gram_indicators)(gram, mask, jnp.sum(gram, 1), jnp.sum(gram))
    assert all(np.isfinite(value) for value in found.values())
    assert found["condition"] == 1
    assert found["conflict_rate"] == 0


def test_dependent_gradients_have_the_largest_condition_number_that_is_told():
    rows = jnp.array([[1.0, 2.0], [2.0, 4.0], [1.0, -1.0]])
    assert condition(rows @ rows.T, jnp.ones(3, bool)) >= 1e3


def test_a_convolution_s_spectrum_is_that_of_its_matrix():
    rng = np.random.default_rng(1)
    kernel, size = rng.standard_normal((3, 3, 2, 3)), 5
    matrix = np.zeros((size, size, 3, size, size, 2))
    for y in range(size):
        for x in range(size):
            for u in range(3):
                for v in range(3):
                    matrix[y, x, :, (y + u - 1) % size, (x + v - 1) % size] += kernel[u, v].T
    dense = np.linalg.svd(matrix.reshape(size * size * 3, -1), compute_uv=False)
    np.testing.assert_allclose(layer_spectrum(kernel, size), dense, rtol=1e-10)
    np.testing.assert_allclose(layer_spectrum(kernel[0, 0], size), np.linalg.svd(kernel[0, 0], compute_uv=False))
    with pytest.raises(ValueError, match="a kernel of 3x3"):
        layer_spectrum(kernel, 2)


def test_golden_largest_singular_value_of_a_layer():
    u, v, c, m = np.meshgrid(range(3), range(3), range(2), range(3), indexing="ij")
    found = layer_spectrum(np.sin(1 + m + 2 * c + 3 * u + 5 * v) / 3, 8)
    assert found[0] == pytest.approx(3.610958513904, abs=1e-11)


def test_subspaces_overlap_from_apart_to_the_same():
    rng = np.random.default_rng(2)
    plane = rng.standard_normal((50, 2))
    first = np.hstack([plane, np.zeros((50, 4))])
    second = np.hstack([np.zeros((50, 4)), rng.standard_normal((50, 2))])
    assert subspace_overlap(first, first @ np.diag([3, 1, 1, 1, 1, 1]) + 7, 2) == pytest.approx(1)
    assert subspace_overlap(first, second, 2) == pytest.approx(0, abs=1e-12)


def test_dips_are_those_of_the_tasks_that_were_there():
    steps = np.array([5, 6, 7, 9, 20])
    accuracy = np.array([[0.9, np.nan], [0.5, 0.0], [0.6, 0.1], [0.4, 0.5], [0.1, 0.9]])
    dips = transition_dips(steps, accuracy, np.array([0, 5]), 4)
    assert dips[0] is None
    assert dips[1] == pytest.approx(0.5)
    assert transition_dips(steps, accuracy, np.array([0, 5]), 1)[1] == pytest.approx(0.4)
    assert transition_dips(steps, accuracy, np.array([0, 3]), 4)[1] is None


def test_a_layer_s_gap_is_zero_where_it_is_as_orthogonal_as_its_shape_allows():
    from stabletrain.continual.forward import orthogonality_gap
    from stabletrain.continual.networks import Layer

    kernel = np.zeros((3, 3, 2, 5), np.float32)
    kernel[1, 1, 0, 0] = kernel[1, 1, 1, 3] = 1.0  # two of five filters: the others would not fit
    assert orthogonality_gap(jnp.asarray(kernel), Layer(("conv",))) == pytest.approx(0, abs=1e-6)
    assert orthogonality_gap(jnp.eye(4)[:, :3], Layer(("dense",), kind="dense")) == pytest.approx(0, abs=1e-6)
    assert orthogonality_gap(2 * jnp.eye(4)[:, :3], Layer(("dense",), kind="dense")) == pytest.approx(27)
