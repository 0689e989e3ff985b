"""The DDPM UNet against an independent implementation, its published size, and what its GroupNorm does to a scaling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.diffusion.skips import SKIP_SCALINGS
from stabletrain.diffusion.unet import DDPM, STYLES, ResBlock, UNet, group_norm
from stabletrain.methods.scalelong import constant_scales
from tests.diffusion.cases import SMALL_UNET, UNET_CASES
from tests.diffusion.parity import assert_same, fixture, our_numbers
from tests.diffusion.weights import filled, inputs


def shapes_of(network: UNet, size: int = 8) -> dict:
    images = jnp.zeros((1, size, size, network.image_channels))
    labels = jnp.zeros(1, jnp.int32) if network.num_classes else None
    return jax.eval_shape(network.init, jax.random.key(0), images, jnp.zeros(1), labels)["params"]


def small(**values) -> tuple[UNet, dict, jax.Array, jax.Array, jax.Array | None]:
    """A small network with its parameters and something to feed it, in float32."""
    network = UNet(**{**SMALL_UNET, "skip_scaling": "none", **values})
    images, times, labels = inputs(8, 2, network.num_classes)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), filled(shapes_of(network)))
    arrays = jnp.asarray(images, jnp.float32), jnp.asarray(times, jnp.float32)
    return network, params, *arrays, None if labels is None else jnp.asarray(labels)


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_the_cifar_network_has_the_published_number_of_parameters_and_skips():
    network = UNet()
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes_of(network, 32)))
    assert count == 35_746_307
    assert network.num_skips == 12


@pytest.mark.parametrize(("multipliers", "blocks"), [((1,), 1), ((1, 2), 1), ((1, 2, 2), 3)])
def test_skips_come_from_the_stem_every_block_and_every_downsampling(multipliers, blocks):
    network = UNet(1, 8, multipliers, blocks)
    levels = len(multipliers)
    assert network.num_skips == 1 + levels * blocks + levels - 1
    assert network.skip_levels == tuple(sorted(network.skip_levels))  # from the outside in
    merged = {name for name in shapes_of(network.clone(skip_scaling="learned-scalar")) if name.startswith("merge_")}
    assert merged == {f"merge_{i}" for i in range(network.num_skips)}


@pytest.mark.parametrize("size", [8, 12, 20])
def test_any_size_that_the_levels_divide(size):
    network = UNet(1, 8, (1, 2, 2), 1, (4,))
    images = jnp.zeros((2, size, size, 1))
    out = jax.eval_shape(lambda p: network.apply({"params": p}, images, jnp.zeros(2)), shapes_of(network, size))
    assert out.shape == images.shape
    assert out.dtype == jnp.float32


@pytest.mark.parametrize(
    ("network", "size", "count"),
    [
        (UNet(3, 128, (1, 2, 2, 2), 3, (16, 8), 4, style=STYLES["iddpm"], learned_variance=True), 32, 52_546_438),
        (UNet(3, 128, (1, 2, 3, 4), 3, (16, 8), 4, style=STYLES["iddpm"], learned_variance=True), 64, 121_063_942),
        (
            UNet(
                3, 192, (1, 2, 3, 4), 3, (32, 16, 8), head_channels=64, num_classes=1000, null_label=False,
                style=STYLES["adm"], learned_variance=True,
            ), 64, 295_904_454,
        ),
        (UNet(3, 128, (2, 2, 2), 4, (16,), num_classes=10, style=STYLES["ddpm++"]), 32, 55_735_299 - 9 * 128),
    ],
    ids=["iddpm", "iddpm64", "adm64", "ddpm++ with labels"],
)  # fmt: skip
def test_the_successors_have_the_parameters_of_their_released_code(network, size, count):
    """Counted by running the authors' code; that of DDPM++ has 9 * 128 weights more, for its augmentation labels."""
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes_of(network, size))) == count


def test_shared_gates_are_shared_among_skips_of_one_width():
    shapes = shapes_of(UNet(1, 16, (1, 2), 1, skip_scaling="ls"))
    assert {name for name in shapes if name.startswith("gate")} == {"gate_16", "gate_32"}
    assert not any(name.startswith("merge") for name in shapes)


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNET_CASES)
def test_output_and_gradients_are_those_of_the_torch_reference(name):
    assert_same(our_numbers("unet", name), fixture("unet", name))


@pytest.mark.torch
@pytest.mark.parametrize("name", ["ls", "unconditional"])
def test_the_fixture_is_what_torch_computes(name):
    pytest.importorskip("torch")
    from tests.diffusion.torch_reference import numbers

    assert_same(numbers("unet", name), fixture("unet", name))


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5])
def test_group_norm_adds_the_epsilon_that_was_asked_for(epsilon):
    x = jnp.tile(jnp.array([1e-3, -1e-3]), (1, 2, 2, 2))  # one group of four channels
    norm = group_norm(4, epsilon, None, "norm")
    out = norm.apply({"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}, x)
    np.testing.assert_allclose(out, x / np.sqrt(1e-6 + epsilon), rtol=1e-5)


def test_group_norm_takes_the_mean_out_before_it_squares():
    """E[x^2] - E[x]^2 in float32 would be wrong by some per cent here."""
    x = 1e3 + np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)  # one group
    norm = group_norm(4, 1e-5, None, "norm")
    out = norm.apply({"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}, jnp.asarray(x))
    exact = (x - x.mean(dtype=np.float64)) / np.sqrt(x.var(dtype=np.float64) + 1e-5)
    np.testing.assert_allclose(out, exact, atol=1e-3)  # the mean is known to 6e-5


@pytest.mark.parametrize("style", ["iddpm", "adm", "ddpm++"])
def test_kernels_start_with_the_variance_that_the_style_says(style):
    """The theory laboratory counts on `variance`; a uniform draw of 64 x 64 entries measures it to some per cent."""
    chosen = STYLES[style]
    kernel = chosen.kernel()(jax.random.key(0), (64, 64))
    np.testing.assert_allclose(jnp.var(kernel), chosen.variance(64, 64), rtol=0.05)
    assert jnp.abs(chosen.kernel(0)(jax.random.key(0), (64, 64))).max() <= (0.0 if chosen.torch_init else 1e-5)
    assert jnp.abs(chosen.bias(16)(jax.random.key(0), (8,))).max() <= 0.25


# --- what GroupNorm does to a scaling ---------------------------------------------------------------------------------


def test_group_norm_cancels_a_constant_kappa_in_the_convolutions_of_a_decoder_block():
    """Where no group straddles the border of [h, kappa s], the norm divides kappa out; the shortcut alone feels it."""
    h, s = jax.random.normal(jax.random.key(0), (2, 2, 4, 4, 16))
    block, time = ResBlock(16, 0.0, DDPM, None), jnp.zeros((2, 8))
    shapes = jax.eval_shape(lambda key: block.init(key, jnp.zeros((2, 4, 4, 32)), time, False), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), filled(shapes["params"]))

    def outputs(kappa: float) -> tuple[jax.Array, jax.Array]:
        out, state = block.apply(
            {"params": params},
            jnp.concatenate([h, kappa * s], axis=-1),
            time,
            False,
            capture_intermediates=lambda module, _: module.name == "conv2",
        )
        return out, state["intermediates"]["conv2"]["__call__"][0]

    (out, branch), (scaled_out, scaled_branch) = outputs(1.0), outputs(0.3)
    # what is left comes from epsilon: 1e-6 beside a variance of 0.09
    np.testing.assert_allclose(scaled_branch, branch, atol=1e-4)
    assert jnp.abs(scaled_out - out).max() > 0.1


def test_cs_acts_through_the_shortcuts_only_and_learned_gates_do_not_cancel():
    """The whole network, its decoder shortcuts deaf to the skips: kappa changes nothing, a gate per channel does."""
    network, params, *args = small(attention_resolutions=(), channels=16)

    def deaf(params: dict) -> dict:
        out = dict(params)
        for name, value in params.items():
            if name.startswith("up_"):
                kernel = value["shortcut"]["kernel"]
                skip_rows = {"up_1_0": 32, "up_1_1": 16, "up_0_0": 16, "up_0_1": 16}[name]
                kernel = kernel.at[:, :, -skip_rows:].set(0.0)
                out[name] = {**value, "shortcut": {**value["shortcut"], "kernel": kernel}}
        return out

    def run(network: UNet, params: dict) -> jax.Array:
        return jax.jit(network.apply)({"params": deaf(params)}, *args)

    out = run(network, params)
    np.testing.assert_allclose(run(network.clone(skip_scaling="cs", kappa=0.5), params), out, atol=1e-3)
    gated, gated_params, *_ = small(attention_resolutions=(), channels=16, skip_scaling="ls")
    assert jnp.abs(run(gated, gated_params) - out).max() > 0.05


# --- run-time multipliers, indices, dropout, bad input ----------------------------------------------------------------


def test_cs_is_the_plain_network_with_run_time_multipliers():
    network, params, *args = small()
    scaled = network.clone(skip_scaling="cs", kappa=0.6)
    expected = jax.jit(scaled.apply)({"params": params}, *args)
    run = jax.jit(lambda multipliers: network.apply({"params": params}, *args, skip_multipliers=multipliers))
    np.testing.assert_allclose(run(constant_scales(network.num_skips, 0.6)), expected, rtol=1e-4, atol=1e-4)
    by_level = 0.6 ** jnp.array(network.skip_levels)
    expected = jax.jit(scaled.clone(kappa_indexing="level").apply)({"params": params}, *args)
    np.testing.assert_allclose(run(by_level), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("style", ["iddpm", "adm", "ddpm++"])
def test_constant_scalings_are_run_time_multipliers_in_every_style(style):
    network, params, *args = small(style=STYLES[style])
    run = jax.jit(lambda multipliers: network.apply({"params": params}, *args, skip_multipliers=multipliers))
    powers = {"skip": jnp.arange(network.num_skips), "level": jnp.array(network.skip_levels)}
    for indexing, exponents in powers.items():
        scaled = network.clone(skip_scaling="cs", kappa=0.6, kappa_indexing=indexing)
        np.testing.assert_allclose(scaled.apply({"params": params}, *args), run(0.6**exponents), rtol=1e-4, atol=1e-4)
    assert jnp.abs(run(0.6 ** powers["skip"]) - run(0.6 ** powers["level"])).max() > 1e-3


@pytest.mark.parametrize("style", ["iddpm", "adm", "ddpm++"])
@pytest.mark.parametrize("scaling", SKIP_SCALINGS)
def test_every_style_takes_every_scaling(style, scaling):
    """Traced, with its gradients; numbers of some of each are compared with PyTorch above."""
    network = UNet(**{**SMALL_UNET, "skip_scaling": scaling, "style": STYLES[style]})
    shapes = shapes_of(network)

    def loss(params: dict, images: jax.Array) -> jax.Array:
        out = network.apply({"params": params}, images, jnp.zeros(2), jnp.zeros(2, jnp.int32), train=True)
        assert out.shape == images.shape
        return jnp.mean(out**2)

    gradients = jax.eval_shape(jax.grad(loss), shapes, jnp.zeros((2, 8, 8, 2)))
    assert jax.tree.structure(gradients) == jax.tree.structure(shapes)


def test_dropout_is_random_in_training_only():
    network, params, *args = small(dropout=0.5, multipliers=(1,), attention_resolutions=())

    def run(train: bool, seed: int) -> jax.Array:
        return network.apply({"params": params}, *args, train=train, rngs={"dropout": jax.random.key(seed)})

    still = run(False, 0)
    np.testing.assert_array_equal(run(False, 1), still)
    np.testing.assert_array_equal(run(True, 1), run(True, 1))
    assert jnp.abs(run(True, 1) - run(True, 2)).max() > 1e-3


def test_bfloat16_answers_in_float32():
    network, params, *args = small(skip_scaling="ls")
    out = jax.jit(network.clone(dtype=jnp.bfloat16).apply)({"params": params}, *args)
    reference = jax.jit(network.apply)({"params": params}, *args)
    assert out.dtype == jnp.float32
    # bfloat16 keeps 8 bits: half a per cent a rounding, some dozens of them in a row
    assert jnp.abs(out - reference).mean() < 0.05 * jnp.abs(reference).mean()


def test_it_starts_at_zero():
    """The last convolution starts within 1e-5 of zero, as in the released DDPM code, so the first loss is near one."""
    network = UNet(1, 8, (1,), 1)
    images = jax.random.normal(jax.random.key(1), (2, 4, 4, 1))
    params = jax.jit(network.init)(jax.random.key(0), images, jnp.zeros(2))["params"]
    assert jnp.abs(network.apply({"params": params}, images, jnp.zeros(2))).max() < 1e-3
    assert jnp.abs(params["final"]["kernel"]).max() > 0


def test_sizes_names_and_labels_that_do_not_fit_are_refused():
    network, params, _, times, _ = small()
    with pytest.raises(ValueError, match="1 times, which one of 7x8 does not allow"):
        network.apply({"params": params}, jnp.zeros((3, 7, 8, 2)), times)
    with pytest.raises(ValueError, match="labels are needed"):
        network.apply({"params": params}, jnp.zeros((3, 8, 8, 2)), times)
    with pytest.raises(ValueError, match="skip or level"):
        shapes_of(UNet(1, 8, (1,), 1, skip_scaling="cs", kappa_indexing="depth"))
    with pytest.raises(ValueError, match="unknown skip scaling"):
        shapes_of(UNet(1, 8, (1,), 1, skip_scaling="half"))
