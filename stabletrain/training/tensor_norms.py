"""Names and norms of the tensors of a network, cheap enough for every training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Params = Any

_LANES = 256


def leaf_names(params: Params) -> tuple[str, ...]:
    """Names such as `down_0/conv/kernel`, in the order of `jax.tree.leaves`."""
    return tuple("/".join(_key(k) for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params))


def group_names(params: Params) -> tuple[str, ...]:
    """The parameter groups: the first key of each parameter's path, each once, in the order of the leaves."""
    return tuple(dict.fromkeys(name.split("/")[0] for name in leaf_names(params)))


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def sums_of_squares(tree: Params) -> Array:
    """float32 sums of squares of the leaves, [leaves].

    Not finite where an entry is not finite, or beyond about 1e19, which is as good as lost. Partial sums run along a
    leading axis: that vectorises on CPU, where one long sum is a chain of dependent additions.
    """

    def partial_sums(leaf: Array) -> Array:
        flat = leaf.astype(jnp.float32).reshape(-1)
        whole = flat.size // _LANES * _LANES
        rest = jnp.square(jnp.pad(flat[whole:], (0, _LANES - (flat.size - whole))))
        if not whole:
            return rest
        sums = jnp.sum(jnp.square(flat[:whole].reshape(-1, _LANES)), axis=0)
        return sums if whole == flat.size else sums + rest

    squares = jnp.sum(jnp.stack([partial_sums(leaf) for leaf in jax.tree.leaves(tree)]), axis=-1)
    # Without the barrier a sum over leaves is merged with the sums within them, and all is summed twice.
    return lax.optimization_barrier(squares)


def group_norms(squares: Array, names: Sequence[str]) -> Array:
    """Norms of the groups of leaves of these names: sums of squares [..., leaves] -> [..., groups].

    A sum with a mask, not a matrix product: 0 x inf would spoil every group.
    """
    groups = [name.split("/")[0] for name in names]
    member = jnp.array([[group == other for other in dict.fromkeys(groups)] for group in groups])  # (leaves, groups)
    return jnp.sqrt(jnp.sum(jnp.where(member, squares[..., None], 0.0), axis=-2))
