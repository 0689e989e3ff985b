"""The CIFAR-10 networks of WGAN-GP: published sizes, order of resampling, labels, what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.errors import ConfigError
from stabletrain.gan.networks import NETWORKS, NetworkOptions
from stabletrain.gan.networks.wgan_gp_resnet import ClassNorm, ResNetCritic, ResNetGenerator, doubled, halved
from stabletrain.methods.wgan_gp import check_per_sample

KEY = jax.random.key(0)


def count(module, *inputs) -> int:
    shapes = jax.eval_shape(lambda: module.init(KEY, *inputs, train=True))["params"]
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def test_the_networks_have_the_published_numbers_of_parameters():
    latent, labels = jnp.zeros((2, 128)), jnp.zeros(2, jnp.int32)
    assert count(ResNetGenerator(32, 3), latent) == 1_204_483
    assert count(ResNetGenerator(32, 3, num_classes=10), latent, labels) == 1_218_307
    assert count(ResNetCritic(), jnp.zeros((2, 32, 32, 3))) + 128 + 1 == 1_053_825  # with the head


def test_resampling_repeats_and_averages():
    images = jnp.arange(4.0).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(doubled(images)[0, :, :, 0], np.kron([[0, 1], [2, 3]], np.ones((2, 2))))
    np.testing.assert_array_equal(halved(doubled(images)), images)
    assert halved(images).item() == 1.5


def test_labels_act_through_scale_and_offset_on_statistics_of_the_whole_batch():
    images = jax.random.normal(KEY, (4, 2, 2, 3)) + 2
    labels = jnp.array([0, 1, 0, 1])
    norm = ClassNorm(2)
    variables = norm.init(KEY, images, labels, train=True)
    params = {"scale": jnp.array([[1.0] * 3, [2.0] * 3]), "offset": jnp.array([[0.0] * 3, [5.0] * 3])}
    found, _ = norm.apply({**variables, "params": params}, images, labels, train=True, mutable=["batch_stats"])
    plain = (images - images.mean((0, 1, 2))) / jnp.sqrt(images.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(found[::2], plain[::2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1::2], 2 * plain[1::2] + 5, rtol=1e-4, atol=1e-5)


def test_the_critic_mixes_no_samples():
    images = jax.random.normal(KEY, (3, 16, 16, 1))
    critic = ResNetCritic(width=4)
    params = critic.init(KEY, images, train=True)
    assert critic.apply(params, images, train=True).shape == (3, 4)
    score = partial(critic.apply, params, train=True)
    check_per_sample(lambda x: score(x).sum(1), images)


def test_images_and_labels_that_it_is_not_for_are_refused():
    spec = NETWORKS["wgan-gp-resnet"]
    options = NetworkOptions(
        sample_shape=(32, 32, 3), num_classes=10, z_dim=8, generator_width=8, discriminator_width=8
    )
    spec.check(options)
    for shape in ((8, 8, 1), (28, 28, 1), (48, 48, 3), (2,)):
        with pytest.raises(ConfigError, match="16, 32, 64"):
            spec.check(replace(options, sample_shape=shape))
    with pytest.raises(ConfigError, match="generator-norm batch"):
        spec.check(replace(options, generator_norm="none"))
