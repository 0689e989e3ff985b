"""Critics of points in the plane: their start, what one round does, and that training is a function of its settings."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.gan.toy_training import ToySettings, apply_mlp, draw_fakes, init_mlp, scores, train_toy
from stabletrain.gan.toys import held_out_points

TINY = ToySettings(
    toy="gaussians8", method="wgan-gp", generator="trained", steps=2, width=8, hidden=2, batch_size=16, critic_steps=2
)


def test_networks_have_the_released_sizes_and_start():
    generator = init_mlp(jax.random.key(0), (2, 512, 512, 512, 2), jnp.float32)
    critic = init_mlp(jax.random.key(1), (2, 512, 512, 512, 1), jnp.float32)
    assert [sum(leaf.size for leaf in jax.tree.leaves(net)) for net in (generator, critic)] == [527_874, 527_361]
    kernel = np.asarray(critic[1]["kernel"])
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / 512), rtol=0.01)  # 262,144 numbers
    np.testing.assert_allclose(np.abs(kernel).max(), np.sqrt(6 / 512), rtol=0.01)  # uniform, not normal
    assert all(np.all(layer["bias"] == 0) for layer in critic)


def test_training_is_a_function_of_the_settings():
    first, again, other = (train_toy(settings) for settings in (TINY, TINY, replace(TINY, seed=1)))
    for ours, theirs in zip(jax.tree.leaves(first.critic), jax.tree.leaves(again.critic), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(first.critic[0]["kernel"], other.critic[0]["kernel"])
    assert first.estimates.shape == (2,)


def test_clipping_keeps_every_variable_within_the_limit():
    result = train_toy(replace(TINY, method="wgan", clip=0.03))
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(result.critic)) == np.float32(0.03)
    assert np.all(result.penalties == 0)
    free = train_toy(TINY)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(free.critic)) > 0.1
    assert np.all(free.penalties > 0)


def test_fixed_fakes_are_the_real_points_with_unit_noise():
    settings = replace(TINY, generator="noise")
    real = jnp.asarray(held_out_points("gaussians8"))
    fakes = draw_fakes(settings, None, jax.random.key(3), real)
    np.testing.assert_allclose((fakes - real).std(0), 1, rtol=0.03)  # four standard errors of 10,000 points
    assert train_toy(settings).generator is None


def test_a_critic_learns_to_tell_real_points_from_noisy_ones():
    settings = replace(TINY, generator="noise", width=32, steps=100, batch_size=64, critic_steps=5, penalty_rate=1e-2)
    result = train_toy(settings)
    # about 0.75; 64 points give it to 0.1, and a critic that learned nothing stays near 0
    assert result.estimates[-10:].mean() > 0.4


def test_in_float64_everything_is_float64():
    with jax.enable_x64(True):
        result = train_toy(replace(TINY, dtype="float64", steps=1))
        assert {leaf.dtype for leaf in jax.tree.leaves((result.critic, result.generator))} == {jnp.dtype("float64")}


def test_a_network_without_hidden_layers_is_linear():
    layers = init_mlp(jax.random.key(0), (2, 1), jnp.float32)
    points = jnp.array([[1.0, 2.0], [-3.0, 0.5]])
    np.testing.assert_allclose(apply_mlp(layers, points), points @ layers[0]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(scores(layers, points), (points @ layers[0]["kernel"])[:, 0], rtol=1e-6)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="wgan, wgan-gp"):
        train_toy(replace(TINY, method="gan"))
    with pytest.raises(ValueError, match="noise, trained"):
        train_toy(replace(TINY, generator="none"))
