"""Each skip scaling does what its line in the dictionary says, and everything counts from the outermost skip."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.diffusion.skips import SKIP_SCALINGS, SkipMerge, feature_norm, multiplier_of, skip_scales
from stabletrain.methods.scalelong import constant_scales

KAPPA = 0.7


def features(width_h: int = 8, width_s: int = 8) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (3, 5, width_h)), 3.0 * jax.random.normal(keys[1], (3, 5, width_s))


def merge(scaling: str, h: jax.Array, s: jax.Array, multiplier=None, **values) -> tuple[jax.Array, jax.Array]:
    module = SkipMerge(scaling, **values)
    variables = module.init(jax.random.key(1), h, s)
    return module.apply(variables, h, s, multiplier)


def test_constant_coefficients_count_from_the_outermost_skip():
    np.testing.assert_allclose(skip_scales("cs", range(4), KAPPA), constant_scales(4, KAPPA), rtol=1e-6)
    assert skip_scales("cs", range(4), KAPPA)[0] == 1.0
    assert skip_scales("cs", (0, 0, 1, 1), 0.5) == (1.0, 1.0, 0.5, 0.5)
    assert skip_scales("const", range(3), KAPPA) == (KAPPA,) * 3
    assert skip_scales("sqrt2", range(3), KAPPA) == (2**-0.5,) * 3
    for scaling in set(SKIP_SCALINGS) - {"cs", "const", "sqrt2"}:
        assert skip_scales(scaling, range(3), KAPPA) == (1.0,) * 3
    with pytest.raises(ValueError, match="unknown skip scaling 'half'"):
        skip_scales("half", range(3), KAPPA)


@pytest.mark.parametrize("scaling", SKIP_SCALINGS)
def test_only_the_skip_is_scaled_unless_both_are_normalised(scaling):
    h, s = features()
    new_h, new_s = merge(scaling, h, s, scale=skip_scales(scaling, range(2), KAPPA)[1])
    assert new_h.shape == h.shape
    assert new_s.shape == s.shape
    if scaling not in ("mp-cat", "layernorm"):
        np.testing.assert_array_equal(new_h, h)
    expected = {"none": 1.0, "sqrt2": 2**-0.5, "cs": KAPPA, "const": KAPPA, "learned-scalar": 0.0}
    if scaling in expected:
        np.testing.assert_allclose(new_s, expected[scaling] * s, rtol=1e-6)
    if scaling in ("ls", "ls-per-skip"):
        ratio = new_s / s
        assert jnp.all((ratio > 0) & (ratio < 1))
        assert jnp.ptp(ratio, axis=1).max() < 1e-5  # the channel form: one gate a channel


@pytest.mark.parametrize("scaling", SKIP_SCALINGS)
def test_a_run_time_multiplier_scales_the_skip_after_everything_else(scaling):
    h, s = features()
    plain_h, plain_s = merge(scaling, h, s)
    new_h, new_s = merge(scaling, h, s, jnp.float32(0.25))
    np.testing.assert_array_equal(new_h, plain_h)
    np.testing.assert_allclose(new_s, 0.25 * plain_s, rtol=1e-6)


def test_magnitude_preserving_concatenation_gives_both_parts_their_share_whatever_their_widths():
    """Inputs of unit variance give a concatenation of unit variance, half of its power from each part."""
    keys = jax.random.split(jax.random.key(0))
    h, s = jax.random.normal(keys[0], (4, 500, 48)), jax.random.normal(keys[1], (4, 500, 16))
    new_h, new_s = merge("mp-cat", h, s)
    power = jnp.sum(new_h**2), jnp.sum(new_s**2)
    # 96,000 and 32,000 squares of variance 2: within one per cent at two deviations
    np.testing.assert_allclose(power[0], power[1], rtol=0.03)
    np.testing.assert_allclose((power[0] + power[1]) / (4 * 500 * 64), 1.0, rtol=0.02)
    new_h, new_s = merge("mp-cat", h, h[..., ::-1], additive=True)
    np.testing.assert_allclose(jnp.var(new_h + new_s), 1.0, rtol=0.03)


def test_layer_norm_is_that_of_the_concatenation():
    h, s = features(8, 4)
    merged = jnp.concatenate(merge("layernorm", h, s), axis=-1)
    both = np.concatenate([h, s], axis=-1)
    expected = (both - both.mean(-1, keepdims=True)) / np.sqrt(both.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(merged, expected, atol=1e-5)


def test_a_multiplier_for_each_skip_or_none():
    assert multiplier_of(None, 0, 3) is None
    assert multiplier_of([1.0, 0.5, 0.25], 1, 3) == 0.5
    with pytest.raises(ValueError, match="the network has 3 skips"):
        multiplier_of([1.0, 0.5], 1, 3)


@pytest.mark.parametrize("scaling", SKIP_SCALINGS)
def test_bfloat16_features_stay_bfloat16(scaling):
    h, s = (x.astype(jnp.bfloat16) for x in features())
    for new in merge(scaling, h, s, jnp.float32(0.5)):
        assert new.dtype == jnp.bfloat16


def test_feature_norm_is_that_of_each_sample_in_float32():
    x = jnp.full((2, 100, 100), 256.0, jnp.bfloat16)  # its sum of squares, 6.6e8, needs more than eight bits
    assert feature_norm(x).dtype == jnp.float32
    np.testing.assert_allclose(feature_norm(x), [25600.0, 25600.0], rtol=1e-6)
