"""U-ViT against independent implementations, its published sizes, and the places where a port goes wrong."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from stabletrain.diffusion.uvit import SIZES, Block, SkipLinear, UViT, layer_norm
from tests.diffusion.cases import SMALL_UVIT, UVIT_CASES
from tests.diffusion.parity import RELEASED, assert_same, fixture, our_numbers, released
from tests.diffusion.weights import filled, inputs


def parameter_count(network: UViT) -> int:
    size = network.image_size
    images = jnp.zeros((1, size, size, network.channels))
    labels = jnp.zeros(1, jnp.int32) if network.num_classes else None
    shapes = jax.eval_shape(network.init, jax.random.key(0), images, jnp.zeros(1), labels)["params"]
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def small(seed: int = 0, **values) -> tuple[UViT, dict, jax.Array, jax.Array, jax.Array | None]:
    """A small network with its parameters and something to feed it."""
    network = UViT(**{**SMALL_UVIT, "skip_scaling": "none", **values})
    images, times, labels = inputs(network.image_size, network.channels, network.num_classes)
    images, times = jnp.asarray(images, jnp.float32), jnp.asarray(times, jnp.float32)
    labels = None if labels is None else jnp.asarray(labels)
    shapes = jax.eval_shape(network.init, jax.random.key(seed), images, times, labels)["params"]
    return network, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), filled(shapes)), images, times, labels


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "image", "patch", "labels", "count"),
    [
        ("S", 32, 2, 0, 44_255_328),
        ("S-deep", 32, 2, 0, 57_908_320),
        ("S", 64, 4, 0, 44_292_228),
        # published with 1,000 embeddings; ours are the classes and one for "none"
        ("M", 64, 4, 999, 130_940_292),
        ("L", 64, 4, 999, 286_827_652),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(size, image, patch, labels, count):
    assert parameter_count(UViT(image, 3, patch, num_classes=labels, **SIZES[size])) == count


@pytest.mark.parametrize(("scaling", "more"), [("cs", 0), ("ls", 8_497), ("ls-per-skip", 50_982)])
def test_a_scaling_adds_the_published_number_of_parameters(scaling, more):
    assert parameter_count(UViT(32, skip_scaling=scaling)) == 44_255_328 + more


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UVIT_CASES)
def test_output_and_gradients_are_those_of_the_torch_reference(name):
    assert_same(our_numbers("uvit", name), fixture("uvit", name))


@pytest.mark.torch
@pytest.mark.parametrize("name", ["cs", "time-mlp"])
def test_the_fixture_is_what_torch_computes(name):
    pytest.importorskip("torch")
    from tests.diffusion.torch_reference import numbers

    assert_same(numbers("uvit", name), fixture("uvit", name))


@pytest.mark.parametrize("name", RELEASED)
def test_output_is_that_of_the_released_code(name):
    """Outputs of the authors' network (kappa 0.5) for the same weights, in float64: order of tokens, skips and all."""
    assert_same(*released(name))


def test_float32_stays_near_float64():
    """With whole float32 products: those of ten mantissa bits, a GPU's default, would not pass."""
    network, params, *args = small(skip_scaling="cs")
    with jax.default_matmul_precision("highest"):
        out = jax.jit(network.apply)({"params": params}, *args)
    # five blocks of sums of up to 64 terms, each within 1e-7
    np.testing.assert_allclose(out, fixture("uvit", "cs")["output"], rtol=1e-3, atol=3e-5)


# --- the places where a port goes wrong -------------------------------------------------------------------------------


def test_layer_norm_adds_1e_minus_5():
    x = jnp.array([[1e-3, -1e-3]])
    normed = layer_norm("norm", None).apply({"params": {"scale": jnp.ones(2), "bias": jnp.zeros(2)}}, x)
    np.testing.assert_allclose(normed, x / np.sqrt(1e-6 + 1e-5), rtol=1e-5)


def test_layer_norm_takes_the_mean_out_before_it_squares():
    """E[x^2] - E[x]^2 in float32 would be wrong by some per cent here."""
    x = 1e3 + np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    normed = layer_norm("norm", None).apply({"params": {"scale": jnp.ones(64), "bias": jnp.zeros(64)}}, jnp.asarray(x))
    exact = (x - x.mean(dtype=np.float64)) / np.sqrt(x.var(dtype=np.float64) + 1e-5)
    np.testing.assert_allclose(normed, exact, atol=1e-3)  # the mean is known to 6e-5


def silenced_block(width: int) -> dict:
    """Parameters with which a block returns its input."""
    shapes = jax.eval_shape(Block(1).init, jax.random.key(0), jnp.zeros((1, 2, width)))["params"]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)


def test_gelu_is_the_exact_one():
    """Through one hidden unit of the MLP: erf and tanh forms differ by up to 5e-4."""
    params = silenced_block(4)
    biases = np.linspace(-3, 3, 16).astype(np.float32)
    params["fc1"]["bias"] = jnp.asarray(biases)
    params["fc2"]["kernel"] = params["fc2"]["kernel"].at[:, 0].set(1.0)
    out = Block(1).apply({"params": params}, jnp.zeros((1, 1, 4)))
    expected = np.sum(biases * 0.5 * (1 + erf(biases / np.sqrt(2))))
    np.testing.assert_allclose(out[0, 0, 0], expected, rtol=1e-5)


def test_values_are_the_last_third_of_qkv_split_by_heads_within():
    """With queries and keys silent the attention is a mean over tokens of the values: head h of columns h d .. ."""
    width, heads, length = 8, 2, 5
    params = silenced_block(width)
    params["norm1"] = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
    params["qkv"]["kernel"] = params["qkv"]["kernel"].at[:, 2 * width :].set(jnp.eye(width))
    params["proj"]["kernel"] = jnp.eye(width)
    x = jax.random.normal(jax.random.key(0), (1, length, width))
    normed = layer_norm("norm", None).apply({"params": params["norm1"]}, x)
    out = Block(heads).apply({"params": params}, x)
    np.testing.assert_allclose(out - x, jnp.broadcast_to(normed.mean(axis=1, keepdims=True), x.shape), atol=1e-5)


def silence_blocks(params: dict) -> dict:
    """Every block returns its input, every merge only its decoder half."""
    out = dict(params)
    for name, value in params.items():
        if "_block" in name:
            out[name] = {**value, "proj": zeros(value["proj"]), "fc2": zeros(value["fc2"])}
        if name.startswith("skip_linear"):
            width = value["bias"].shape[0]
            out[name] = {"kernel": jnp.eye(2 * width, width), "bias": jnp.zeros(width)}
    return out


def zeros(tree: dict) -> dict:
    return jax.tree.map(jnp.zeros_like, tree)


def test_tokens_are_label_time_patches_by_row():
    """Each token's position, named by a distinct number, shows where it is in the sequence."""
    network, params, images, times, labels = small()
    length = params["position_embedding"].shape[1]
    params = silence_blocks(params) | {
        "patch_kernel": jnp.zeros_like(params["patch_kernel"]),
        "patch_bias": jnp.zeros_like(params["patch_bias"]),
        "label_embedding": {"embedding": jnp.full_like(params["label_embedding"]["embedding"], 100.0)},
        "position_embedding": jnp.broadcast_to(jnp.arange(length * 1.0)[:, None], (length, 16))[None],
    }
    _, state = network.apply(
        {"params": params}, images, times, labels, capture_intermediates=lambda module, _: module.name == "mid_block"
    )
    tokens = state["intermediates"]["mid_block"]["__call__"][0]
    assert jnp.all(tokens[:, 0] == 100.0)
    np.testing.assert_allclose(tokens[0, 1], 1 + np.repeat([1.0, 0.0], 8), atol=1e-6)  # t = 0: cosines, then sines
    assert jnp.all(tokens[:, 2:, 0] == jnp.arange(2.0, length))

    # one patch lit up: its token is the one of row 1, column 2 of a 4x4 grid
    lit = jnp.zeros_like(images).at[:, 2:4, 4:6].set(1.0)
    params = params | {
        "patch_kernel": jnp.ones_like(params["patch_kernel"]),
        "position_embedding": jnp.zeros_like(params["position_embedding"]),
    }
    _, state = network.apply(
        {"params": params}, lit, times, labels, capture_intermediates=lambda module, _: module.name == "mid_block"
    )
    tokens = state["intermediates"]["mid_block"]["__call__"][0]
    assert np.flatnonzero(tokens[0, 2:, 0]).tolist() == [1 * 4 + 2]


def test_a_token_unpacks_to_rows_columns_channels():
    """The decoder's outputs are (p1 p2 C): channel fastest, then columns of the patch, then rows."""
    network, params, *args = small(patch_size=4, final_convolution=False)
    decoder = {"kernel": jnp.zeros((16, 32)), "bias": jnp.arange(32.0)}
    out = network.apply({"params": params | {"decoder": decoder}}, *args)
    patch = np.arange(32.0).reshape(4, 4, 2)
    np.testing.assert_array_equal(out[0], np.tile(patch, (2, 2, 1)))


def test_skip_0_joins_the_first_block_to_the_last():
    """With the last merge deaf to its decoder half, only what the first encoder block makes is heard."""
    network, params, *args = small(skip_scaling="cs", kappa=0.5)
    deaf = dict(params["skip_linear_0"])
    deaf["kernel"] = deaf["kernel"].at[:16].set(0.0)
    params = params | {"skip_linear_0": deaf}
    run = jax.jit(lambda params: network.apply({"params": params}, *args))
    out = run(params)
    for name in ("in_block_1", "mid_block", "out_block_1", "skip_linear_1"):
        changed = params | {name: jax.tree.map(lambda leaf: leaf + 0.1, params[name])}
        np.testing.assert_array_equal(run(changed), out)
    changed = params | {"in_block_0": jax.tree.map(lambda leaf: leaf + 0.1, params["in_block_0"])}
    assert jnp.abs(run(changed) - out).max() > 1e-3


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_skip_linear_is_that_of_the_concatenation():
    h, s = jax.random.normal(jax.random.key(0), (2, 3, 5, 8))
    merge = SkipLinear(8)
    variables = merge.init(jax.random.key(1), h, s)
    variables["params"]["bias"] = jnp.arange(8.0)
    assert variables["params"]["kernel"].shape == (16, 8)
    expected = jnp.concatenate([h, s], axis=-1) @ variables["params"]["kernel"] + jnp.arange(8.0)
    np.testing.assert_allclose(merge.apply(variables, h, s), expected, atol=1e-5)


def test_bfloat16_computes_its_sums_in_float32_and_answers_in_float32():
    network, params, *args = small(skip_scaling="ls")
    low = network.clone(dtype=jnp.bfloat16)
    out = low.apply({"params": params}, *args)
    assert out.dtype == jnp.float32
    reference = network.apply({"params": params}, *args)
    # bfloat16 keeps 8 bits: half a per cent a rounding, some dozens of them in a row
    assert jnp.abs(out - reference).mean() < 0.05 * jnp.abs(reference).mean()
    jaxpr = str(jax.make_jaxpr(lambda p: low.apply({"params": p}, *args))(params))
    statistics = [line for line in jaxpr.splitlines() if " = exp " in line or " = rsqrt " in line]
    assert statistics
    assert all(":f32" in line for line in statistics)


def test_initialisation_is_that_of_the_paper():
    """Linear N(0, 0.02), biases zero, patch and final convolutions uniform in 1/sqrt(fan_in), labels N(0, 1)."""
    network = UViT(8, 3, 2, 128, 0, 4, num_classes=9)
    args = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    params = jax.jit(network.init)(jax.random.key(0), *args)["params"]
    kernel = params["mid_block"]["fc1"]["kernel"]  # 65,536 numbers: their deviation is known within 0.3 %
    np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.015)
    assert jnp.abs(kernel).max() > 0.06  # not cut off at two or three deviations
    assert not params["mid_block"]["fc1"]["bias"].any()
    for leaf, fan_in in (("patch_kernel", 12), ("patch_bias", 12)):
        assert 0.8 * fan_in**-0.5 < jnp.abs(params[leaf]).max() <= fan_in**-0.5
    assert jnp.abs(params["final_conv"]["kernel"]).max() <= 27**-0.5
    assert jnp.abs(params["final_conv"]["bias"]).max() > 0
    np.testing.assert_allclose(params["label_embedding"]["embedding"].std(), 1.0, rtol=0.1)
    assert params["label_embedding"]["embedding"].shape == (10, 128)


def test_the_pooled_gate_has_the_same_parameters_at_any_size_and_the_token_gate_has_not():
    def gate_shape(form: str, size: int) -> tuple[int, ...]:
        network = UViT(size, 1, 2, 16, 2, 2, skip_scaling="ls", gate_form=form)
        shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, size, size, 1)), jnp.zeros(1))["params"]
        return shapes["gate"]["excite"]["kernel"].shape

    assert gate_shape("pooled", 8) == gate_shape("pooled", 16) == (4, 64)
    assert gate_shape("token", 8) == (1, 17)
    assert gate_shape("token", 16) == (4, 65)


@pytest.mark.parametrize("scaling", ["cs", "ls"])
def test_padded_tokens_give_the_same_output(scaling):
    """The padding is within attention only: gates and norms of features see the network's own tokens."""
    network, *arguments = small(skip_scaling=scaling)
    padded = network.clone(pad_tokens=16)
    with jax.enable_x64(True):  # float32 sums in another order
        params, images, times, labels = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, arguments
        )
        expected = network.apply({"params": params}, images, times, labels)
        found = padded.apply({"params": params}, images, times, labels)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
        assert "pad" in str(jax.make_jaxpr(lambda: padded.apply({"params": params}, images, times, labels))())


def test_images_and_labels_that_do_not_fit_are_refused():
    network, params, images, times, labels = small()
    with pytest.raises(ValueError, match="made for 8x8x2"):
        network.apply({"params": params}, jnp.zeros((1, 16, 16, 2)), times[:1], labels[:1])
    with pytest.raises(ValueError, match="do not divide"):
        UViT(10, 1, 4, 16, 2, 2).init(jax.random.key(0), jnp.zeros((1, 10, 10, 1)), jnp.zeros(1))
    with pytest.raises(ValueError, match="labels are needed"):
        network.apply({"params": params}, images, times)
