"""Attention is the written-out softmax average, with its softmax in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.nn.attention import attend


def test_attention_is_the_average_of_the_values_by_softmax():
    q, k, v = np.asarray(jax.random.normal(jax.random.key(0), (3, 2, 5, 3, 4)))
    expected = np.zeros_like(v)
    for b in range(2):
        for h in range(3):
            scores = np.exp(q[b, :, h] @ k[b, :, h].T / 2.0)  # sqrt(4) = 2
            expected[b, :, h] = scores / scores.sum(axis=1, keepdims=True) @ v[b, :, h]
    np.testing.assert_allclose(attend(q, k, v), expected, rtol=1e-5, atol=1e-6)


def test_its_gradients_are_those_of_the_softmax_to_second_order():
    def written_out(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("blhd,bmhd->bhlm", q, k) / 2.0, axis=-1)
        return jnp.einsum("bhlm,bmhd->blhd", weights, v)

    with jax.enable_x64(True):
        inputs = jax.random.normal(jax.random.key(0), (3, 2, 5, 3, 4), jnp.float64)

        def gradients(attention):
            def loss(inputs):
                return jnp.sum(jnp.sin(attention(*inputs)))

            slope = jax.grad(loss)(inputs)
            return slope, jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2))(inputs)

        for found, expected in zip(gradients(attend), gradients(written_out), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_the_softmax_survives_large_scores_and_is_float32_in_bfloat16():
    q = 100.0 * jax.random.normal(jax.random.key(0), (1, 4, 1, 8), jnp.bfloat16)
    out = attend(q, q, q)
    assert out.dtype == jnp.bfloat16
    assert jnp.isfinite(out.astype(jnp.float32)).all()
    lines = str(jax.make_jaxpr(attend)(q, q, q)).splitlines()
    exponentials = [line for line in lines if " = exp" in line]
    assert exponentials
    assert all(":f32" in line for line in exponentials)


def test_padded_tokens_change_neither_the_result_nor_its_gradient():
    q, k, v, weight = jax.random.normal(jax.random.key(0), (4, 2, 5, 3, 4))

    def found(multiple):
        def loss(*inputs):
            return jnp.sum(weight * attend(*inputs, multiple=multiple))

        return attend(q, k, v, multiple=multiple), *jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    for ours, expected in zip(found(8), found(1), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)  # sums of float32 in another order
    assert "pad" in str(jax.make_jaxpr(lambda *inputs: attend(*inputs, multiple=8))(q, k, v))
    assert "pad" not in str(jax.make_jaxpr(lambda *inputs: attend(*inputs, multiple=5))(q, k, v))
