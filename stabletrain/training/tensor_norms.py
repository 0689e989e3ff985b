"""Names and norms of the tensors of a network, cheap enough for every training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
Params = Any

_LANES = 256
_FOLDS = 6
"""2^6 terms are added up in one loop without intermediate results: more is no faster, and takes longer to compile."""


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

    Not finite where an entry is not finite, or beyond about 1e19, which is as good as lost. In the order that suits a
    CPU, where one long sum is a chain of dependent additions and each small tensor by itself costs more to launch than
    to add up: large ones are folded in half again and again, small ones of equal size are summed as rows of a matrix.
    """
    leaves = [leaf.astype(jnp.float32).reshape(-1) for leaf in jax.tree.leaves(tree)]
    of_size: dict[int, list[int]] = {}
    for i, leaf in enumerate(leaves):
        of_size.setdefault(leaf.size if leaf.size <= _LANES else 0, []).append(i)
    folded = of_size.pop(0, [])
    sums = [jnp.sum(jnp.stack([_folded(leaves[i]) for i in folded]), axis=-1)] if folded else []
    for size, which in of_size.items():
        rows = lax.optimization_barrier(jnp.concatenate([leaves[i] for i in which])).reshape(len(which), size)
        sums.append(jnp.sum(jnp.square(rows), axis=-1))
    order = np.argsort([*folded, *(i for which in of_size.values() for i in which)])
    # Without the barriers a sum over leaves is merged with the sums within them, and all is summed twice.
    return lax.optimization_barrier(jnp.concatenate(sums)[order])


def _folded(flat: Array) -> Array:
    """[size] -> [_LANES] whose sum is that of the squares."""
    values, folds = jnp.square(flat), 0
    while values.size > _LANES and values.size % 2 == 0:
        if folds and folds % _FOLDS == 0:
            values = lax.optimization_barrier(values)
        first, second = values.reshape(2, -1)
        values, folds = first + second, folds + 1
    whole = values.size // _LANES * _LANES if values.size > _LANES else 0
    rest = jnp.pad(values[whole:], (0, _LANES - (values.size - whole)))
    return rest + jnp.sum(lax.optimization_barrier(values)[:whole].reshape(-1, _LANES), axis=0) if whole else rest


def group_norms(squares: Array, names: Sequence[str]) -> Array:
    """Norms of the groups of leaves of these names: sums of squares [..., leaves] -> [..., groups].

    A sum with a mask, not a matrix product: 0 x inf would spoil every group.
    """
    groups = [name.split("/")[0] for name in names]
    member = jnp.array([[group == other for other in dict.fromkeys(groups)] for group in groups])  # (leaves, groups)
    return jnp.sqrt(jnp.sum(jnp.where(member, squares[..., None], 0.0), axis=-2))
