"""The program's keys give the numbers of JAX's own, whatever is drawn and however the keys are carried."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.random_keys import key_from_data, random_key

DRAWS = {
    "bits": lambda key: jax.random.bits(key, (3, 2, 4, 5)),
    "bytes": lambda key: jax.random.bits(key, (7, 5), jnp.uint8),
    "integers": lambda key: jax.random.randint(key, (5, 4), -3, 1000),
    "normal": lambda key: jax.random.normal(key, (4, 3, 3, 2)),
    "uniform": lambda key: jax.random.uniform(key, (), minval=-1.0),
    "truncated": lambda key: jax.random.truncated_normal(key, -2.0, 2.0, (3, 3, 2, 4)),
    "bernoulli": lambda key: jax.random.bernoulli(key, 0.3, (2, 3, 4)),
    "permutation": lambda key: jax.random.permutation(key, 11),
    "empty": lambda key: jax.random.normal(key, (0, 3)),
    "split": lambda key: jax.random.key_data(jax.random.split(key, (2, 3))),
    "folded": lambda key: jax.random.key_data(jax.random.fold_in(key, 12_345)),
    "of many keys": lambda key: jax.vmap(lambda one: jax.random.normal(one, (2, 3)))(jax.random.split(key, 4)),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_every_draw_is_that_of_the_key_of_jax(name, seed):
    draw = DRAWS[name]
    np.testing.assert_array_equal(draw(random_key(seed)), draw(jax.random.key(seed)))
    np.testing.assert_array_equal(jax.jit(draw)(random_key(seed)), jax.jit(draw)(jax.random.key(seed)))


def test_doubles_are_those_of_the_key_of_jax():
    with jax.enable_x64(True):
        drawn, expected = (jax.random.normal(key(5), (3, 4), jnp.float64) for key in (random_key, jax.random.key))
        assert drawn.dtype == jnp.float64
        np.testing.assert_array_equal(drawn, expected)


def test_a_key_survives_as_numbers_and_is_made_of_a_traced_seed():
    data = jax.random.key_data(random_key(3))
    np.testing.assert_array_equal(data, jax.random.key_data(jax.random.key(3)))
    np.testing.assert_array_equal(jax.random.bits(key_from_data(data)), jax.random.bits(random_key(3)))
    assert key_from_data(data).dtype == random_key(3).dtype
    traced = jax.jit(lambda seed: jax.random.bits(random_key(seed), (4,)))(np.uint32(3))
    np.testing.assert_array_equal(traced, jax.random.bits(jax.random.key(3), (4,)))
