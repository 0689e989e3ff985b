"""The networks have as many parameters as the published ones; nothing is allocated to count them.

The numbers are those of PyTorch-StudioGAN's networks (Kang et al. 2021), each with the head of its method. ReACGAN's
published logs have some more: its experiments had a layer in the head that was never released.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from stabletrain.gan.conditioning import Head
from stabletrain.gan.config import GanConfig, filled
from stabletrain.gan.resolution import network_of, network_options, resolve
from stabletrain.gan.state import Critic, Generator
from stabletrain.training.config import make_config


def counts(size: int, num_classes: int, **values: Any) -> tuple[int, int]:
    """Parameters of the generator and of the discriminator with its head, for colour images."""
    config = resolve(make_config(GanConfig, {"image_size": size, **values}))
    shape, spec = (size, size, 3), network_of(config)
    options = network_options(config, shape, num_classes)
    generator = Generator(spec.generator(options), filled(config.z_dim), num_classes, styles=spec.styles)
    head = Head(
        kind=filled(config.conditioning),
        num_classes=num_classes,
        auxiliary=filled(config.auxiliary),
        embedding_dim=config.embedding_dim or 1,
        spectral=bool(config.discriminator_spectral),
        equalized=spec.styles,
    )
    critic = Critic(spec.discriminator(options), head, shape)
    trees = jax.eval_shape(lambda key: (generator.init(key)[0], critic.init(key)[0]), jax.random.key(0))
    of_generator, of_critic = (sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree)) for tree in trees)
    return of_generator, of_critic


CIFAR = {"dataset": "cifar10"}
BIG = {**CIFAR, "network": "biggan", "generator_spectral": True, "discriminator_spectral": True}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({**CIFAR, "method": "biggan"}, (9_416_196, 2_415_170)),
        ({**BIG, "method": "acgan"}, (9_416_196, 2_415_170)),
        ({**CIFAR, "method": "contragan"}, (9_416_196, 2_517_186)),
        ({**CIFAR, "method": "reacgan"}, (9_416_196, 2_517_186)),
        ({**CIFAR, "method": "sngan"}, (4_304_387, 1_055_105)),
        ({**CIFAR, "method": "sagan"}, (4_386_308, 1_075_586)),
        ({**CIFAR, "method": "acgan"}, (4_304_387, 1_057_159)),
    ],
    ids=["biggan", "acgan-big", "contragan", "reacgan", "sngan", "sagan", "acgan"],
)
def test_networks_of_cifar(values, expected):
    assert counts(32, 10, **values) == expected


@pytest.mark.parametrize(
    ("size", "classes", "dataset", "expected"),
    [
        (64, 100, "tiny-imagenet", (17_322_404, 31_601_330)),  # Baby-ImageNet's 100 classes
        (128, 200, "cub200", (49_226_404, 61_551_026)),
        (128, 1000, "imagenet", (70_433_988, 91_642_146)),
    ],
)
def test_networks_of_larger_images(size, classes, dataset, expected):
    assert counts(size, classes, dataset=dataset, method="reacgan") == expected


def test_every_size_has_networks_and_larger_images_more_parameters_at_the_end():
    """Width 96 throughout: 8 to 32 pixels share a plan of constant width, from 64 on another one."""
    options = {"method": "reacgan", "network": "biggan", "generator_width": 96, "discriminator_width": 96}
    sizes = {size: counts(size, 10, dataset="cifar10", **options) for size in (8, 16, 32, 64, 128, 256)}
    for smaller, larger in ((8, 16), (16, 32), (64, 128), (128, 256)):
        assert all(few < many for few, many in zip(sizes[smaller], sizes[larger], strict=True))
