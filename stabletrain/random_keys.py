"""Random keys whose numbers are JAX's own (threefry 2x32), drawn along one axis: far cheaper to compile and to run.

XLA's CPU backend compiles a draw of an array with four axes several times as long as the same numbers along one axis,
reshaped, and draws noise for a batch of images half as fast (`benchmarks/random_draws.py`).
Every key of this program is made here. A key of `jax.random.key` gives the same numbers wherever one is asked for.
"""

from __future__ import annotations

import math

import jax
from jax.extend.random import define_prng_impl, threefry_prng_impl
from jax.typing import ArrayLike


def _flat_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    # A number depends on the key and on its place in row-major order alone, so that the shape does not matter.
    return threefry_prng_impl.random_bits(key, bit_width, (math.prod(shape),)).reshape(shape)


FLAT_THREEFRY = define_prng_impl(
    key_shape=threefry_prng_impl.key_shape,
    seed=threefry_prng_impl.seed,
    split=threefry_prng_impl.split,
    fold_in=threefry_prng_impl.fold_in,
    random_bits=_flat_bits,
    name="flat_threefry2x32",
    tag="flat",
)


def random_key(seed: ArrayLike) -> jax.Array:
    """The key of a seed: `jax.random.key(seed)`'s numbers."""
    return jax.random.key(seed, impl=FLAT_THREEFRY)


def key_from_data(data: jax.Array) -> jax.Array:
    """The key of what `jax.random.key_data` gave: uint32 [..., 2] -> keys [...]."""
    return jax.random.wrap_key_data(data, impl=FLAT_THREEFRY)
