"""GradDrop: its law element by element, and the same update however the gradients come."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.continual.aggregators.elementwise import GRADDROP, add_parts, chosen_of, combine_elements, uniforms

ROWS = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, -1.0]])


def updates(rows: np.ndarray, draws: int, mask: list[bool] | None = None) -> np.ndarray:
    """[draws, P] of gradients [T, P]."""
    there = jnp.ones(len(rows), bool) if mask is None else jnp.array(mask)
    keys = jax.random.split(jax.random.key(0), draws)
    return np.asarray(jax.vmap(lambda key: combine_elements(GRADDROP, jnp.asarray(rows), there, key))(keys))


def test_an_element_keeps_one_sign_with_the_probability_of_its_purity():
    """P = (1 + sum g / sum |g|) / 2 = 0.6, 1, 0.5; 4,000 draws have a standard error of 0.008."""
    found = updates(ROWS, 4000)
    assert set(np.unique(found[:, 0])) == {-4.0, 6.0}
    assert set(np.unique(found[:, 1])) == {2.0}
    np.testing.assert_allclose((found > 0).mean(0), (0.6, 1.0, 0.5), atol=0.03)


def test_where_all_signs_agree_it_is_the_sum():
    rows = np.abs(np.random.default_rng(0).standard_normal((3, 50))) * np.sign(np.arange(50) - 20.5)
    np.testing.assert_allclose(updates(rows, 4), np.tile(rows.sum(0), (4, 1)), rtol=1e-5)


def test_an_absent_gradient_counts_for_nothing():
    rows = np.array([[1.0, 2.0], [-100.0, -100.0]])
    np.testing.assert_allclose(updates(rows, 8, [True, False]), np.tile(rows[0], (8, 1)))


def test_one_gradient_at_a_time_gives_the_same_bits():
    rng = np.random.default_rng(1)
    gradients = {"a": jnp.asarray(rng.standard_normal((4, 3, 5))), "b": jnp.asarray(rng.standard_normal((4, 2)))}
    mask, key = jnp.array([True, True, False, True]), jax.random.key(3)
    whole = combine_elements(GRADDROP, gradients, mask, key)
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], gradients) for i in range(4)]
    sums = None
    for gradient, there in zip(each, mask, strict=True):
        sums = add_parts(GRADDROP, sums, gradient, there)
    drawn = uniforms(key, each[0])
    taken = [chosen_of(GRADDROP, each[i], sums, drawn) for i in (0, 1, 3)]
    for name in gradients:
        # Sums may round in another order; no element's purity is that close to its uniform here.
        np.testing.assert_allclose(sum(part[name] for part in taken), whole[name], rtol=1e-6, atol=1e-6)
