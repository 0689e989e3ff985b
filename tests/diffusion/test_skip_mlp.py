"""The theorems of ScaleLong on the network for which they are stated."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.diffusion.skip_mlp import SkipMLP
from stabletrain.diffusion.skips import SKIP_SCALINGS, skip_scales
from stabletrain.methods.scalelong import constant_scales, theorem31_prediction, theorem33_ratio, theorem34_bound

SETTINGS = [("none", 1.0), ("sqrt2", 1.0), ("cs", 0.5), ("cs", 0.8), ("const", 0.25)]


def theorem_network(
    num_skips: int, width: int, scaling: str = "none", kappa: float = 1.0, gain: float = 1.0
) -> SkipMLP:
    """The theorems' network: no projections, no time; its images are 4x4 with as many channels as make the width."""
    return SkipMLP(
        4, width // 16, width, num_skips, gain=gain, time_embedding=False, skip_scaling=scaling, kappa=kappa
    )  # fmt: skip


def images(network: SkipMLP, batch: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(
        jax.random.key(seed), (batch, network.image_size, network.image_size, network.image_channels)
    )


@functools.cache
def measured_norms(scaling: str, kappa: float, gain: float, seeds: int = 160) -> np.ndarray:
    """||h_i||^2 / ||x||^2 of 160 initialisations, [seeds, N + 1], each at its own input. N = 6, width 128."""
    network = theorem_network(6, 128, scaling, kappa, gain)

    def one(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (1, 4, 4, 8))
        params = network.init(keys[1], x, jnp.zeros(1))["params"]
        _, state = network.apply({"params": params}, x, jnp.zeros(1), mutable=["features"])
        norms = [state["features"][f"skip_{i}"] for i in range(6)] + [state["features"]["middle"]]
        return jnp.concatenate(norms) ** 2 / jnp.sum(x**2)

    keys = jax.random.split(jax.random.key(7), (seeds // 8, 8))
    return np.asarray(jax.jit(lambda keys: jax.lax.map(jax.vmap(one), keys))(keys)).reshape(seeds, 7)


@pytest.mark.parametrize(("scaling", "kappa", "gain"), [("none", 1.0, 1.0), ("cs", 0.5, 1.0), ("none", 1.0, 2.0)])
def test_theorem_31_predicts_the_mean_norm_of_every_decoder_feature(scaling, kappa, gain):
    found = measured_norms(scaling, kappa, gain)
    expected = theorem31_prediction(skip_scales(scaling, range(6), kappa), gain=gain)
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert np.all(error < 0.15 * expected)  # so that the next line says something
    # seven means at four standard errors, with the heavy tail of a product of matrices
    assert np.all(np.abs(found.mean(axis=0) - expected) < 4 * error), (found.mean(axis=0), expected, error)


def test_scaling_lowers_the_norm_and_its_spread_with_gain_one():
    """The measured effect of Theorem 3.1: norm 7 to about 2.3, and the range over seeds with it."""
    plain, scaled = measured_norms("none", 1.0, 1.0)[:, 0], measured_norms("cs", 0.5, 1.0)[:, 0]
    assert scaled.mean() < 0.5 * plain.mean()
    assert scaled.std() < 0.6 * plain.std()


def block_lipschitz(params: dict, prefix: str, i: int | None = None) -> float:
    """The product of the spectral norms of a block's matrices; ReLU is 1-Lipschitz."""
    block = params[prefix if i is None else f"{prefix}_{i}"]
    return float(np.prod([np.linalg.norm(np.asarray(w["kernel"]), 2) for w in block.values()]))


@pytest.mark.parametrize(("scaling", "kappa"), SETTINGS)
def test_theorem_34_bounds_every_change_of_the_output(scaling, kappa):
    network = theorem_network(3, 32, scaling, kappa)
    x = images(network, 16)
    params = network.init(jax.random.key(2), x, jnp.zeros(16))["params"]
    m0 = max(block_lipschitz(params, "in_block", i) * block_lipschitz(params, "out_block", i) for i in range(3))
    bound = theorem34_bound(skip_scales(scaling, range(3), kappa), m0, block_lipschitz(params, "mid_block"))

    def run(x: jax.Array) -> jax.Array:
        return network.apply({"params": params}, x, jnp.zeros(len(x)))

    for size in (1e-2, 1.0, 100.0):
        d = size * images(network, 16, seed=3)
        change = jnp.linalg.norm((run(x + d) - run(x)).reshape(16, -1), axis=1)
        assert jnp.all(change <= bound * jnp.linalg.norm(d.reshape(16, -1), axis=1))
    jacobian = jax.jacobian(lambda flat: run(flat.reshape(x[:1].shape)).reshape(-1))(x[0].reshape(-1))
    assert np.linalg.norm(jacobian, 2) <= bound


def test_theorem_34_is_attained():
    """Identity matrices and a positive input: the network is x -> (sum of kappa + 1) x, and that is the bound."""
    network = theorem_network(4, 16, "cs", 0.5)
    x = jnp.abs(images(network, 2)) + 0.1
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(2))["params"]
    params = jax.tree.map(lambda leaf: jnp.eye(leaf.shape[0]), shapes)
    out = network.apply({"params": params}, x, jnp.zeros(2))
    bound = theorem34_bound(constant_scales(4, 0.5), 1.0, 1.0)
    np.testing.assert_allclose(out, bound * x, rtol=1e-5)
    np.testing.assert_allclose(bound, 1 + 1 + 0.5 + 0.25 + 0.125)


@pytest.mark.parametrize(("scaling", "kappa"), [("none", 1.0), ("cs", 0.5)])
def test_theorem_33_holds_up_to_a_factor_that_no_scaling_changes(scaling, kappa):
    """Squared gradients of the last matrix of every block over their prediction, averaged over 16 initialisations."""
    network, scales = theorem_network(5, 64, scaling, kappa), skip_scales(scaling, range(5), kappa)

    def one(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 3)
        x, noise = jax.random.normal(keys[0], (2, 1, 4, 4, 4))
        params = network.init(keys[2], x, jnp.zeros(1))["params"]
        loss, gradient = jax.value_and_grad(
            lambda p: jnp.sum((network.apply({"params": p}, x, jnp.zeros(1)) - noise) ** 2)
        )(params)
        return jnp.array(
            [
                theorem33_ratio(jnp.sum(gradient[f"{half}_{i}"]["w1"]["kernel"] ** 2), loss, jnp.sum(x**2), scales, i)
                for half in ("in_block", "out_block")
                for i in range(5)
            ]
        )

    ratios = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 16))).mean(axis=0)
    # 0.9 to 18 over depths and scalings at width 256; wider here for 16 draws of a narrower network
    assert np.all((ratios > 0.4) & (ratios < 40.0)), ratios


@pytest.mark.parametrize("scaling", SKIP_SCALINGS)
def test_every_scaling_runs_on_images_with_time_and_label(scaling):
    network = SkipMLP(4, 2, 12, 2, num_classes=3, skip_scaling=scaling)
    x, times, labels = images(network, 3), jnp.array([0.0, 40.0, 999.0]), jnp.array([0, 2, 3])
    params = network.init(jax.random.key(0), x, times, labels)["params"]
    out = network.apply({"params": params}, x, times, labels)
    assert out.shape == x.shape
    assert out.dtype == jnp.float32
    assert jnp.abs(out - network.apply({"params": params}, x, times[::-1], labels)).max() > 1e-3
    assert jnp.abs(out - network.apply({"params": params}, x, times, labels[::-1])).max() > 1e-3


def test_without_projections_and_time_it_has_the_theorems_matrices_only():
    network = theorem_network(3, 16)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images(network, 1), jnp.zeros(1))["params"]
    assert [leaf.shape for leaf in jax.tree.leaves(shapes)] == [(16, 16)] * 2 * (3 + 1 + 3)


def test_cs_is_the_plain_network_with_run_time_multipliers():
    network = theorem_network(5, 16)
    x = images(network, 4)
    params = network.init(jax.random.key(0), x, jnp.zeros(4))["params"]
    plain = network.apply({"params": params}, x, jnp.zeros(4), skip_multipliers=constant_scales(5, 0.6))
    scaled = network.clone(skip_scaling="cs", kappa=0.6).apply({"params": params}, x, jnp.zeros(4))
    np.testing.assert_allclose(plain, scaled, rtol=1e-5, atol=1e-6)


def test_skip_0_joins_the_first_block_to_the_last():
    """With every other way through silenced, h_0 = b_1(a_1(x))."""
    network = theorem_network(3, 16)
    x = images(network, 4)
    params = network.init(jax.random.key(0), x, jnp.zeros(4))["params"]
    only_outermost = network.apply({"params": params}, x, jnp.zeros(4), skip_multipliers=jnp.array([1.0, 0.0, 0.0]))
    params["mid_block"] = jax.tree.map(jnp.zeros_like, params["mid_block"])
    silent = network.apply({"params": params}, x, jnp.zeros(4), skip_multipliers=jnp.array([1.0, 0.0, 0.0]))

    def block(name, v):
        w0, w1 = params[name]["w0"]["kernel"], params[name]["w1"]["kernel"]
        return jnp.maximum(v @ w0, 0.0) @ w1

    expected = block("out_block_0", block("in_block_0", x.reshape(4, -1))).reshape(x.shape)
    np.testing.assert_allclose(silent, expected, rtol=1e-5, atol=1e-6)
    assert jnp.abs(only_outermost - silent).max() > 1e-3


def test_features_cost_nothing_unless_asked_for():
    network = theorem_network(2, 16, "ls")
    x = images(network, 2)
    variables = network.init(jax.random.key(0), x, jnp.zeros(2))
    assert set(variables) == {"params"}

    def roots(mutable) -> int:
        """Square roots are what norms are made of; the network itself has none."""
        return str(jax.make_jaxpr(lambda v: network.apply(v, x, jnp.zeros(2), mutable=mutable))(variables)).count(
            "sqrt"
        )

    assert roots(False) == 0
    assert roots(["features"]) == 3
    _, state = network.apply(variables, x, jnp.zeros(2), mutable=["features"])
    assert set(state["features"]) == {"skip_0", "skip_1", "middle", "merge_0", "merge_1"}
    assert state["features"]["skip_0"].shape == state["features"]["merge_0"]["gate_mean"].shape == (2,)


def test_images_of_another_size_are_refused():
    network = theorem_network(2, 16)
    with pytest.raises(ValueError, match="the network was made for"):
        network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
    with pytest.raises(ValueError, match="labels are needed"):
        SkipMLP(4, 1, 8, 2, num_classes=2).init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), jnp.zeros(1))
