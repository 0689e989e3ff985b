"""The networks of WGAN-GP: sizes, numbers of layers and parameters, ranges, and critics that mix no samples."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.errors import ConfigError
from stabletrain.gan.networks import NETWORKS, NetworkOptions
from stabletrain.gan.networks.lsun import DcganCritic, DcganGenerator, MlpGenerator, gate, halvings
from stabletrain.gan.networks.random_architecture import (
    COUNT,
    DEPTHS,
    Architecture,
    RandomCritic,
    RandomGenerator,
    architecture,
    architecture_at,
    middle_stage,
    smooth_elu,
)
from stabletrain.gan.networks.resnet101 import Bottleneck, ResNet101Critic, ResNet101Generator, equal_blocks
from stabletrain.gan.networks.text_resnet import TextCritic, TextGenerator
from stabletrain.methods.wgan_gp import check_per_sample, gradient_penalty, gradient_penalty_plain

KEY = jax.random.key(0)


def shapes_of(module, inputs, **options):
    return jax.eval_shape(lambda: module.init(KEY, jnp.zeros(inputs), **options))["params"]


def count(params) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def layers(params) -> int:
    """Kernels, those of shortcuts left out."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    return sum("kernel" in path and "shortcut" not in path for path in paths)


def scored(critic, variables):
    """A weighted sum of the features, as a head makes one."""

    def score(samples):
        features, _ = critic.apply(variables, samples, train=True, mutable=["batch_stats"])
        return features @ jnp.cos(jnp.arange(features.shape[1]))

    return score


# --- 101 layers -------------------------------------------------------------------------------------------------------


def test_the_residual_networks_have_101_layers_and_the_released_numbers_of_parameters():
    generator = shapes_of(ResNet101Generator(), (2, 128), train=True)
    critic = shapes_of(ResNet101Critic(), (2, 64, 64, 3), train=True)
    head = {
        "kernel": jax.ShapeDtypeStruct((4 * 4 * 512, 1), np.float32),
        "bias": jax.ShapeDtypeStruct((1,), np.float32),
    }
    assert (layers(generator), layers(critic) + layers({"head": head})) == (101, 101)
    assert (count(generator), count(critic) + count(head)) == (9_189_587, 7_618_801)


@pytest.mark.parametrize("resample", ["none", "down", "up"])
def test_a_block_resamples_and_adds_three_tenths_of_its_branch(resample):
    images = jax.random.normal(KEY, (2, 4, 4, 8))
    features = 8 if resample == "none" else 4
    block = Bottleneck(features, "none", resample)
    variables = block.init(KEY, images)
    side = {"none": 4, "down": 2, "up": 8}[resample]
    found = block.apply(variables, images)
    assert found.shape == (2, side, side, features)
    params = variables["params"] | {"expand": jax.tree.map(lambda leaf: 2 * leaf, variables["params"]["expand"])}
    without = variables["params"] | {"expand": jax.tree.map(jnp.zeros_like, variables["params"]["expand"])}
    shortcut = block.apply({"params": without}, images)
    np.testing.assert_allclose(
        block.apply({"params": params}, images) - shortcut, 2 * (found - shortcut), rtol=1e-4, atol=1e-5
    )
    if resample == "none":
        np.testing.assert_array_equal(shortcut, images)


class Blocks(nn.Module):
    """Three equal blocks and a weighted sum: the 101 layers in small."""

    scan: bool
    remat: bool
    norm: str = "layer"
    dtype: type | None = None

    @nn.compact
    def __call__(self, images):
        images = equal_blocks(images, 3, self, train=True, name="block")
        return (images * jnp.cos(jnp.arange(images[0].size)).reshape(images[0].shape)).sum((1, 2, 3))


def test_loops_and_recomputed_activations_change_neither_scores_nor_the_slope_of_the_penalty():
    """The looped blocks hold their parameters stacked; with the same numbers everything agrees."""
    images = jax.random.normal(KEY, (3, 4, 4, 4))
    plain, looped = Blocks(scan=False, remat=False), Blocks(scan=True, remat=True)
    params = plain.init(KEY, images)["params"]
    stacked = {"block": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[f"block_{i}"] for i in range(3)))}
    shapes = jax.eval_shape(lambda: looped.init(KEY, images))["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, shapes)

    def loss(network, penalty, params):
        critic = partial(network.apply, {"params": params})
        return jnp.sum(critic(images)) + penalty(critic, images, -images, jnp.full(3, 0.3))

    value, slopes = jax.jit(jax.value_and_grad(partial(loss, looped, gradient_penalty)))(stacked)
    expected, unrolled = jax.jit(jax.value_and_grad(partial(loss, plain, gradient_penalty_plain)))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for number in range(3):
        ours = jax.tree.leaves(jax.tree.map(lambda leaf, i=number: leaf[i], slopes["block"]))
        for one, other in zip(ours, jax.tree.leaves(unrolled[f"block_{number}"]), strict=True):
            # second derivatives through a normalisation, in float32
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * float(jnp.abs(other).max()))


def test_a_block_cannot_change_its_channels_alone():
    with pytest.raises(ValueError, match="keeps its 4 channels"):
        Bottleneck(6, "none").init(KEY, jnp.zeros((1, 2, 2, 4)))


# --- the LSUN pairs ---------------------------------------------------------------------------------------------------


def test_dcgan_has_the_released_layers_at_64():
    generator = shapes_of(DcganGenerator(64, 3), (1, 128), train=True)
    critic = shapes_of(DcganCritic(), (1, 64, 64, 3), train=True)
    assert [generator[name]["kernel"].shape for name in ("deconv_1", "deconv_2", "deconv_3", "image")] == [
        (5, 5, 256, 512),
        (5, 5, 128, 256),
        (5, 5, 64, 128),
        (5, 5, 3, 64),
    ]
    assert [critic[f"conv_{number}"]["kernel"].shape[-1] for number in range(4)] == [64, 128, 256, 512]
    features = jax.eval_shape(lambda: DcganCritic().init_with_output(KEY, jnp.zeros((2, 64, 64, 3)), train=True))[0]
    assert features.shape == (2, 4 * 4 * 512)
    assert sorted(name for name in critic if name.startswith("norm")) == ["norm_1", "norm_2", "norm_3"]


def test_the_cifar_networks_have_the_released_numbers_of_parameters_and_starts():
    """gan_cifar.py, width 128: 5.18 and 4.11 million; every unit of the linear layer is normalised by itself."""
    generator, critic = DcganGenerator(32, 3, width=128, cifar=True), DcganCritic(width=128, norm="none", start="he")
    made, judging = shapes_of(generator, (1, 128), train=True), shapes_of(critic, (1, 32, 32, 3), train=True)
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(made)) == 5_179_907
    of_head = 4 * 4 * 512 + 1
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(judging)) + of_head == 4_114_689
    assert made["norm_0"]["batch"]["scale"].shape == (4 * 4 * 512,)
    small = DcganCritic(width=32, norm="none", start="he").init(KEY, jnp.zeros((1, 8, 8, 3)), train=True)["params"]
    expected = np.sqrt(4 / (25 * 3 + 25 * 32 / 4))  # He et al., the mean of both fans
    assert float(jnp.std(small["conv_0"]["kernel"])) == pytest.approx(expected, rel=0.05)  # of 2,400 numbers


def test_the_penalty_of_a_layer_normalised_critic_takes_no_pass_twice():
    """The compiled gradient of the fast form has as few convolutions as that of the double backward."""
    critic = DcganCritic(width=16, norm="layer")  # wide enough to be no product with a whole matrix
    images, epsilon = jax.random.normal(KEY, (2, 16, 16, 1)), jnp.full(2, 0.3)
    params = critic.init(KEY, images, train=True)

    def convolutions(penalty):
        def loss(params):
            return penalty(lambda x: critic.apply(params, x, train=True).sum(axis=1), images, 0.5 * images, epsilon)

        return jax.jit(jax.grad(loss)).lower(params).compile().as_text().count(" convolution(")

    assert convolutions(gradient_penalty) == convolutions(gradient_penalty_plain) > 0


PAIRS = {
    "dcgan": (partial(DcganGenerator, norm="batch"), partial(DcganCritic, norm="layer")),
    "plain-g": (partial(DcganGenerator, norm="none", constant_width=True), partial(DcganCritic, norm="layer")),
    "mlp-g": (lambda size, channels, width: MlpGenerator(size, channels), partial(DcganCritic, norm="layer")),
    "no-norm": (partial(DcganGenerator, norm="none"), partial(DcganCritic, norm="none")),
    "gated": (partial(DcganGenerator, activation="gated"), partial(DcganCritic, activation="gated")),
    "tanh": (partial(DcganGenerator, activation="tanh"), partial(DcganCritic, activation="tanh")),
    "cifar": (partial(DcganGenerator, cifar=True), partial(DcganCritic, norm="none", start="he")),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_makes_images_and_scores_them_one_by_one(name):
    make_generator, make_critic = PAIRS[name]
    generator, critic = make_generator(8, 2, width=4), make_critic(width=4)
    latent = jax.random.normal(KEY, (3, 16))
    variables = generator.init(KEY, latent, train=True)
    images, _ = generator.apply(variables, latent, train=True, mutable=["batch_stats"])
    assert images.shape == (3, 8, 8, 2)
    assert float(jnp.abs(images).max()) <= 1
    params = critic.init(KEY, images, train=True)
    check_per_sample(scored(critic, params), images)


def test_plain_generators_keep_their_width():
    params = shapes_of(DcganGenerator(64, 3, norm="none", constant_width=True), (1, 128), train=True)
    assert {params[f"deconv_{number}"]["kernel"].shape for number in (1, 2, 3)} == {(5, 5, 64, 64)}
    assert not any("norm" in name for name in params)


def test_the_gate_takes_even_channels_through_the_sigmoid():
    inputs = jnp.array([[0.5, -1.0, 2.0, 3.0]])
    expected = [[1 / (1 + np.exp(-0.5)) * np.tanh(-1), 1 / (1 + np.exp(-2)) * np.tanh(3)]]
    np.testing.assert_allclose(gate(inputs), expected, rtol=1e-6)


def test_sides_that_are_not_halved_to_four_are_refused():
    assert [halvings(size) for size in (8, 16, 32, 64)] == [1, 2, 3, 4]
    for size in (4, 12, 28, 48):
        with pytest.raises(ValueError, match="not"):
            halvings(size)


# --- random architectures ---------------------------------------------------------------------------------------------


def test_there_are_9216_architectures_and_none_twice():
    everything = {architecture_at(index) for index in range(COUNT)}
    assert len(everything) == COUNT == 9216
    with pytest.raises(ValueError, match="9,216"):
        architecture_at(COUNT)


def test_the_random_order_is_fixed_and_a_sample_without_replacement():
    first = [architecture(number) for number in range(40)]
    assert len(set(first)) == 40
    assert first[0] == Architecture(**vars(first[0]))
    # every choice of each field occurs among forty: the chance that one of 2 to 4 is missing is below 1e-4
    assert {each.critic_depth for each in first} == set(DEPTHS)
    assert {each.generator_norm for each in first} == {False, True}
    with pytest.raises(ValueError, match="9,216"):
        architecture(-1)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("size", [8, 32])
def test_depth_counts_every_layer_of_both_networks(depth, size):
    generator = RandomGenerator(size, 1, 8, depth, "relu", "batch")
    critic = RandomCritic(8, depth, "tanh", "layer")
    assert layers(shapes_of(generator, (1, 16), train=True)) == depth
    assert layers(shapes_of(critic, (1, size, size, 1), train=True)) + 1 == depth  # the head is the last one


def test_further_layers_of_32_pixels_stand_at_8_with_twice_the_width():
    assert [middle_stage(size) for size in (8, 16, 32, 64)] == [0, 0, 1, 2]
    params = shapes_of(RandomGenerator(32, 3, 10, 6, "relu", "none"), (1, 128), train=True)
    assert params["extra_1"]["kernel"].shape == (3, 3, 20, 20)
    assert params["start"]["linear"]["kernel"].shape == (128, 4 * 4 * 40)
    params = shapes_of(RandomCritic(10, 6, "relu", "none"), (1, 32, 32, 3), train=True)
    assert params["extra_0"]["kernel"].shape == (3, 3, 20, 20)


def test_a_random_pair_runs_and_its_critic_mixes_no_samples():
    generator = RandomGenerator(8, 1, 4, 4, "softplus", "batch")
    latent = jax.random.normal(KEY, (4, 8))
    images, _ = generator.apply(generator.init(KEY, latent, train=True), latent, train=True, mutable=["batch_stats"])
    assert images.shape == (4, 8, 8, 1)
    critic = RandomCritic(4, 4, "leaky-relu", "layer")
    check_per_sample(scored(critic, critic.init(KEY, images, train=True)), images)
    mixing = RandomCritic(4, 4, "leaky-relu", "batch")
    variables = mixing.init(KEY, images, train=True)
    with pytest.raises(ValueError, match="depends on the other samples"):
        check_per_sample(scored(mixing, variables), images)


def test_too_little_depth_for_the_size_is_refused():
    with pytest.raises(ValueError, match="at least 5 layers"):
        RandomCritic(4, 4, "relu", "none").init(KEY, jnp.zeros((1, 64, 64, 1)), train=True)


def test_the_smooth_nonlinearity_is_close_to_elu():
    x = jnp.linspace(-3, 3, 50)
    assert float(jnp.abs(smooth_elu(x) - jax.nn.elu(x)).max()) < 0.2
    np.testing.assert_allclose(smooth_elu(jnp.array(-20.0)), -1, rtol=1e-6)


# --- the language model -----------------------------------------------------------------------------------------------


def test_the_language_model_has_the_published_sizes():
    generator = shapes_of(TextGenerator(32, 100), (1, 128), train=True)
    critic = shapes_of(TextCritic(), (1, 32, 100), train=True)
    assert (count(generator), count(critic) + 32 * 512 + 1) == (
        15_277_156,
        13_180_417,
    )


def test_the_generator_gives_a_distribution_at_each_position_and_the_critic_mixes_no_samples():
    generator, critic = TextGenerator(6, 5, width=8, blocks=1), TextCritic(width=8, blocks=1)
    latent = jax.random.normal(KEY, (3, 4))
    text = generator.apply(generator.init(KEY, latent, train=True), latent, train=True)
    assert text.shape == (3, 6, 5)
    np.testing.assert_allclose(text.sum(-1), 1, rtol=1e-6)
    check_per_sample(scored(critic, critic.init(KEY, text, train=True)), text)


# --- by name ----------------------------------------------------------------------------------------------------------

NAMES = [*(f"lsun-{name}" for name in PAIRS if name != "cifar"), "cifar-dcgan", "resnet101", "random", "text-resnet"]


@pytest.mark.parametrize("name", NAMES)
def test_networks_by_name_fit_the_familys_contract(name):
    spec = NETWORKS[name]
    shape = (5, 7) if name == "text-resnet" else (64, 64, 1) if name == "resnet101" else (8, 8, 1)
    options = NetworkOptions(
        sample_shape=shape,
        num_classes=0,
        z_dim=6,
        generator_width=8,
        discriminator_width=8,
        depth=1,
        discriminator_norm="layer",
        scan_blocks=True,
        dtype=jnp.bfloat16,
    )
    spec.check(options)
    generator, critic = spec.generator(options), spec.discriminator(options)

    def both(latent):
        keys = {"params": KEY, "noise": KEY}
        samples, variables = generator.init_with_output(keys, latent, None, train=True)
        features, trunk = critic.init_with_output({"params": KEY}, samples, train=True)
        assert set(variables) <= {"params", "batch_stats"}
        assert set(trunk) == {"params"}
        return samples, features, variables["params"]

    samples, features, params = jax.eval_shape(both, jnp.zeros((2, 6)))
    assert samples.shape == (2, *shape)
    assert samples.dtype == jnp.float32
    assert features.ndim == 2
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("random", {"sample_shape": (64, 64, 3)}, "8, 16 or 32"),
        ("random", {"architecture": 9216}, "9,216"),
        ("random", {"num_classes": 10}, "without labels"),
        ("resnet101", {}, "64 pixels"),
        ("resnet101", {"sample_shape": (64, 64, 3), "generator_width": 6}, "multiple of 4"),
        ("lsun-dcgan", {"sample_shape": (28, 28, 1)}, "image-size"),
        ("lsun-tanh", {"num_classes": 10}, "without labels"),
        ("lsun-tanh", {"sample_shape": (2,)}, "images"),
        ("text-resnet", {}, "dataset text"),
    ],
)
def test_data_that_a_network_is_not_for_are_refused(name, changes, said):
    options = NetworkOptions(sample_shape=(32, 32, 3), num_classes=0, z_dim=8, generator_width=8, discriminator_width=8)
    with pytest.raises(ConfigError, match=said):
        NETWORKS[name].check(replace(options, **changes))


def test_widths_of_a_random_architecture_are_in_proportion_to_the_base_width():
    chosen = architecture(3)
    options = NetworkOptions(
        sample_shape=(8, 8, 1), num_classes=0, z_dim=8, generator_width=8, discriminator_width=64, architecture=3
    )
    generator, critic = NETWORKS["random"].generator(options), NETWORKS["random"].discriminator(options)
    assert (generator.width, critic.width) == (chosen.generator_width // 8, chosen.critic_width)
    assert (generator.depth, generator.nonlinearity) == (chosen.generator_depth, chosen.generator_nonlinearity)
