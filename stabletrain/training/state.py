"""The state of a run as arrays: made from the seed, described without being made, and compared to the last bit."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.random_keys import random_key
from stabletrain.training.devices import replicated
from stabletrain.training.experiment import Experiment, State

INIT_STREAM = 0xFFFF_FFFF
"""What is folded into the seed's key for initialisation: a position that no batch of a run ever has."""


def init_key(seed: int) -> jax.Array:
    """The key that `Experiment.init` gets."""
    return jax.random.fold_in(random_key(seed), INIT_STREAM)


def fresh_state(experiment: Experiment) -> State:
    """The state before the first step, whole on every device of the experiment's mesh."""
    init, key = _stored_init(experiment), init_key(experiment.config.seed)
    everywhere = replicated(experiment.mesh)
    if not experiment.traceable:
        return jax.device_put(init(key), everywhere)
    return jax.jit(init, out_shardings=everywhere)(key)


def abstract_state(experiment: Experiment) -> State:
    """Shapes and types of the state: what a checkpoint is read into. Costs no memory where `init` is traceable."""
    if not experiment.traceable:
        return jax.eval_shape(lambda state: state, fresh_state(experiment))
    return jax.eval_shape(_stored_init(experiment), init_key(experiment.config.seed))


def _stored_init(experiment: Experiment) -> Callable[[jax.Array], State]:
    def init(key: jax.Array) -> State:
        return jax.tree.map(_as_stored, experiment.init(key))

    return init


def _as_stored(leaf: Any) -> jax.Array:
    # A weakly typed leaf (a Python number's) comes back from a checkpoint as a strong one, and would compile into
    # another program: one whose results need not be the same to the bit. A key that the experiment keeps is of JAX's
    # own kind, which a checkpoint knows and the experiment's other keys may be of.
    leaf = jnp.asarray(leaf)
    if is_key(leaf):
        return jax.random.wrap_key_data(jax.random.key_data(leaf), impl="threefry2x32")
    return jax.lax.convert_element_type(leaf, leaf.dtype)


def is_key(leaf: Any) -> bool:
    """True for an array of typed random keys."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves with their paths, in order."""
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _bytes_of(leaf: Any) -> np.ndarray:
    array = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def checksums(tree: Any) -> list[int]:
    """CRC-32 of every leaf, in order: enough to tell damage, and faster than writing."""
    return [zlib.crc32(_bytes_of(leaf).data) for leaf in jax.tree.leaves(tree) if leaf.size]


def state_hash(tree: Any) -> str:
    """SHA-256 over path, type, shape and bytes of every leaf: equal only for states that are equal to the bit."""
    digest = hashlib.sha256()
    for name, leaf in named_leaves(tree):
        digest.update(f"{name}:{leaf.dtype}:{tuple(leaf.shape)};".encode())
        if leaf.size:
            digest.update(_bytes_of(leaf).data)
    return digest.hexdigest()
