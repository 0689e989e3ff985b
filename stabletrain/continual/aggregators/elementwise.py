"""Aggregators that look at single elements of the gradients, for which their Gram matrix is not enough.

An elementwise rule is two functions of an array of any shape: `parts`, what one gradient adds to sums over the tasks,
and `chosen`, what is taken of one gradient once the sums are known. The update is sum_t chosen(g_t, sum_s parts(g_s)),
leaf by leaf: gradients may come all at once or one at a time, and are never copied into one matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any


@dataclass(frozen=True)
class ElementwiseAggregator:
    """`parts(gradient)` -> tuple of arrays of its shape; `chosen(gradient, sums, uniform)` -> array of its shape.

    `uniform` is U(0, 1) for each element, the same for all tasks.
    """

    parts: Callable[[Array], tuple[Array, ...]]
    chosen: Callable[[Array, tuple[Array, ...], Array], Array]


def sign_parts(gradient: Array) -> tuple[Array, Array]:
    """g and |g|."""
    return gradient, jnp.abs(gradient)


def sign_chosen(gradient: Array, sums: tuple[Array, ...], uniform: Array) -> Array:
    """g where its sign is the one drawn for the element: positive with P = (1 + sum g / sum |g|) / 2.

    Source: Chen et al. 2020 (GradDrop), Eq. 1, without leak. Differs: on gradients of the parameters; the paper's layer
    stands where tasks branch off.
    """
    total, size = sums
    purity = 0.5 * (1 + jnp.where(size > 0, total / jnp.where(size > 0, size, 1.0), 0.0))
    positive = purity > uniform
    return jnp.where(positive == (gradient > 0), gradient, 0.0)


GRADDROP = ElementwiseAggregator(sign_parts, sign_chosen)


def uniforms(key: Array, like: Tree) -> Tree:
    """U(0, 1) for each element of a pytree; the draw of a leaf depends on its place, not on how gradients come."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.uniform(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def add_parts(rule: ElementwiseAggregator, sums: Tree | None, gradient: Tree, present: Array | bool = True) -> Tree:
    """The sums with one gradient more; a tuple of arrays at each leaf. None: no gradient yet."""

    def parts(leaf: Array) -> tuple[Array, ...]:
        return tuple(jnp.where(present, part, 0.0) for part in rule.parts(leaf))

    found = jax.tree.map(parts, gradient)
    return found if sums is None else jax.tree.map(jnp.add, sums, found)


def chosen_of(rule: ElementwiseAggregator, gradient: Tree, sums: Tree, drawn: Tree) -> Tree:
    """What is taken of one gradient."""
    return jax.tree.map(
        lambda leaf, of_leaf, uniform: rule.chosen(leaf, of_leaf, uniform), gradient, sums, drawn
    )  # fmt: skip


def combine_elements(rule: ElementwiseAggregator, gradients: Tree, mask: Array, key: Array) -> Tree:
    """The update from gradients whose leaves have the tasks first, [T, ...]. mask: [T]."""
    drawn = uniforms(key, jax.tree.map(lambda leaf: leaf[0], gradients))

    def of_leaf(leaf: Array, uniform: Array) -> Array:
        present = mask.reshape(-1, *[1] * (leaf.ndim - 1))
        sums = tuple(jnp.sum(jnp.where(present, part, 0.0), 0) for part in rule.parts(leaf))
        taken = jax.vmap(lambda gradient: rule.chosen(gradient, sums, uniform))(leaf)
        return jnp.sum(jnp.where(present, taken, 0.0), 0)

    return jax.tree.map(of_leaf, gradients, drawn)
