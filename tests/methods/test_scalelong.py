"""ScaleLong's functions: closed forms, indices from the outside, and every transformation of JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.methods.scalelong import (
    LearnedScale,
    constant_scales,
    lemma32_input_norm,
    overlaps,
    theorem31_prediction,
    theorem33_ratio,
    theorem34_bound,
)


def test_constant_scales_leave_the_outermost_skip_alone():
    np.testing.assert_allclose(constant_scales(6, 0.5), [1, 0.5, 0.25, 0.125, 0.0625, 0.03125])
    # the sum of squares stays below its limit for any depth
    assert jnp.sum(constant_scales(500, 0.9) ** 2) < 1 / (1 - 0.9**2) + 1e-4


def test_theorem_31_with_gain_one_is_its_closed_form():
    scales = jnp.array([1.0, 0.7, 0.4, 0.2])
    expected = [3.0 * (1 + np.sum(np.asarray(scales)[i:] ** 2)) for i in range(5)]
    np.testing.assert_allclose(theorem31_prediction(scales, input_norm_squared=3.0), expected, rtol=1e-6)
    np.testing.assert_allclose(theorem31_prediction(jnp.ones(12))[0], 13.0)


def test_theorem_31_with_gain_two_is_a_geometric_sum_that_scaling_hardly_changes():
    """E||h_0||^2 = sum_i kappa_i^2 g^(2i) + g^(2N+1), so 1/sqrt2 can at most halve the first part."""
    for scales in (np.ones(5), np.full(5, 2**-0.5), 0.5 ** np.arange(5)):
        expected = sum(k**2 * 4.0 ** (i + 1) for i, k in enumerate(scales)) + 2.0**11
        np.testing.assert_allclose(theorem31_prediction(scales, gain=2.0)[0], expected, rtol=1e-6)
    plain, scaled = (theorem31_prediction(scales, gain=2.0)[0] for scales in (np.ones(12), np.full(12, 0.5)))
    assert plain / scaled < 1.7


def test_lemma_32_is_the_mean_of_a_noised_uniform_image():
    keys = jax.random.split(jax.random.key(0), 3)
    clean = jax.random.uniform(keys[0], (4000, 64), minval=-1, maxval=1)
    alpha_bar = jax.random.uniform(keys[1], (4000, 1))
    noised = jnp.sqrt(alpha_bar) * clean + jnp.sqrt(1 - alpha_bar) * jax.random.normal(keys[2], clean.shape)
    # 256,000 squares of deviation about one: 0.2 % a standard error, and another 0.1 % from E[alpha_bar] itself
    np.testing.assert_allclose(jnp.mean(jnp.sum(noised**2, axis=1)), lemma32_input_norm(0.5, 64), rtol=0.01)
    np.testing.assert_allclose(lemma32_input_norm(0.5, 64), 64 * (1 - 1 / 3), rtol=1e-6)


def test_theorem_33_counts_the_skips_from_the_block_inwards():
    scales = jnp.array([1.0, 0.5, 0.25])
    for skip, total in ((0, 2.3125), (1, 1.3125), (2, 1.0625)):
        np.testing.assert_allclose(theorem33_ratio(8.0, 2.0, 3.0, scales, skip), 8.0 / (4 * 2 * 3 * total), rtol=1e-6)
    by_skip = jax.vmap(lambda skip: theorem33_ratio(8.0, 2.0, 3.0, scales, skip))(jnp.arange(3))
    assert jnp.all(jnp.diff(by_skip) > 0)


def test_theorem_34_unrolls_the_recursion():
    """L_i = kappa_{i+1} M_0 + M_0 L_{i+1} from the middle outwards."""
    scales, m0, l0 = np.array([1.0, 0.7, 0.4, 0.2]), 1.3, 0.9
    lipschitz = l0
    for kappa in scales[::-1]:
        lipschitz = m0 * (kappa + lipschitz)
    np.testing.assert_allclose(theorem34_bound(scales, m0, l0), lipschitz, rtol=1e-6)
    assert theorem34_bound(-scales, m0, l0) == theorem34_bound(scales, m0, l0)


@pytest.mark.parametrize("x64", [False, True])
def test_functions_go_through_jit_grad_and_vmap_in_both_precisions(x64):
    with jax.enable_x64(x64):
        dtype = jnp.float64 if x64 else jnp.float32
        kappas = jnp.array([0.5, 0.9], dtype)

        def everything(kappa: jax.Array) -> jax.Array:
            scales = constant_scales(5, kappa)
            norms = theorem31_prediction(scales, input_norm_squared=2.0, gain=1.0)
            return norms[0] + theorem34_bound(scales, 1.1, 1.0) + theorem33_ratio(1.0, 1.0, 2.0, scales, 1)

        values, slopes = jax.jit(jax.vmap(jax.value_and_grad(everything)))(kappas)
        assert values.dtype == slopes.dtype == dtype
        step = 1e-6 if x64 else 1e-2
        numeric = (jax.vmap(everything)(kappas + step) - jax.vmap(everything)(kappas - step)) / (2 * step)
        # central differences: an error of step^2 times the third derivative, and rounding over the step
        np.testing.assert_allclose(slopes, numeric, rtol=1e-8 if x64 else 2e-3)
        assert jnp.isfinite(jax.grad(everything)(jnp.zeros((), dtype)))


# --- the gate ---------------------------------------------------------------------------------------------------------


def gate(form: str, shape: tuple[int, ...], **values) -> tuple[LearnedScale, dict, jax.Array]:
    module = LearnedScale(form, **values)
    features = jax.random.normal(jax.random.key(0), shape)
    return module, module.init(jax.random.key(1), features), features


@pytest.mark.parametrize(
    ("form", "shape", "gate_shape"),
    [
        ("token", (3, 34, 8), (3, 34, 1)),
        ("pooled", (3, 34, 8), (3, 34, 1)),
        ("channel", (3, 4, 5, 32), (3, 1, 1, 32)),
        ("channel", (3, 32), (3, 32)),
    ],
)
def test_gates_have_one_number_a_token_or_channel_and_start_near_one_half(form, shape, gate_shape):
    module, variables, features = gate(form, shape)
    coefficient = module.apply(variables, features)
    assert coefficient.shape == gate_shape
    assert jnp.all((coefficient > 0) & (coefficient < 1))
    np.testing.assert_allclose(coefficient.mean(), 0.5, atol=0.1)


def test_the_token_gate_is_written_out():
    module, variables, features = gate("token", (2, 40, 8))
    w0, w1 = variables["params"]["squeeze"], variables["params"]["excite"]
    assert w0["kernel"].shape == (40, 2)  # 40 // 16
    hidden = np.maximum(np.asarray(features).mean(-1) @ w0["kernel"] + w0["bias"], 0)
    expected = 1 / (1 + np.exp(-(hidden @ w1["kernel"] + w1["bias"])))
    np.testing.assert_allclose(module.apply(variables, features)[..., 0], expected, rtol=1e-5)


def test_gates_start_as_the_released_ones():
    """Uniform in 1/sqrt(fan_in); at 257 tokens 0.498 +- 0.034 was measured for the released code, and 8,497 numbers."""
    module, variables, features = gate("token", (64, 257, 16))
    leaves = jax.tree.leaves(variables)
    assert sum(leaf.size for leaf in leaves) == 8_497
    for layer, fan_in in (("squeeze", 257), ("excite", 16)):
        for leaf in variables["params"][layer].values():
            assert 0.7 * fan_in**-0.5 < jnp.abs(leaf).max() <= fan_in**-0.5
    coefficient = module.apply(variables, features)
    np.testing.assert_allclose(coefficient.mean(), 0.5, atol=0.02)  # biases of one draw shift it by under 0.01
    np.testing.assert_allclose(coefficient.std(), 0.034, atol=0.008)


def test_the_pooled_form_with_a_bin_a_token_is_the_token_form():
    module, variables, features = gate("token", (2, 24, 8))
    pooled = LearnedScale("pooled", bins=24)
    np.testing.assert_allclose(pooled.apply(variables, features), module.apply(variables, features), rtol=1e-5)


@pytest.mark.parametrize("length", [7, 24, 65, 256])
def test_the_pooled_form_takes_any_length(length):
    """The same picture at another resolution, here one of stripes repeated, gets the same gates."""
    module, variables, features = gate("pooled", (2, 8, 4), bins=8)
    if length % 8 == 0:
        finer = jnp.repeat(features, length // 8, axis=1)
        expected = jnp.repeat(module.apply(variables, features), length // 8, axis=1)
        np.testing.assert_allclose(module.apply(variables, finer), expected, rtol=1e-5)
    assert module.apply(variables, jnp.ones((2, length, 4))).shape == (2, length, 1)


@pytest.mark.parametrize(("source", "target"), [(5, 5), (6, 3), (3, 6), (7, 4), (4, 7)])
def test_overlaps_average_a_line_of_cells(source, target):
    matrix = overlaps(source, target)
    np.testing.assert_allclose(matrix.sum(axis=0), 1.0)
    line = np.arange(source) + 1.0
    fine = np.repeat(line, target)  # both grids divide this one
    np.testing.assert_allclose(line @ matrix, fine.reshape(target, source).mean(axis=1))


def test_gates_learn_and_compute_in_float32_at_least():
    module, variables, features = gate("channel", (4, 6, 32))
    gradient = jax.grad(lambda v: jnp.sum(module.apply(v, features) ** 2))(variables)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    assert module.apply(variables, features.astype(jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
        assert module.apply(wide, features.astype(jnp.float64)).dtype == jnp.float64
    by_sample = jax.vmap(lambda x: module.apply(variables, x[None])[0])(features)
    np.testing.assert_allclose(by_sample, module.apply(variables, features), rtol=1e-5)


def test_forms_and_features_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="token, pooled or channel"):
        gate("pixel", (2, 3, 4))
    with pytest.raises(ValueError, match=r"features \[B, L, D\]"):
        gate("token", (2, 3, 4, 5))
