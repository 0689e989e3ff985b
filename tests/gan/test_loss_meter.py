"""The critic's loss as a meter: closed forms of a linear critic, splits that are not there, and clipped weights."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.gan.indicators import share_at_limit
from stabletrain.gan.loss_meter import LossMeter

CONTEXT = SimpleNamespace(tick=lambda *_: None)
WEIGHTS = {"params": {"w": jnp.array([1.8, 2.4])}}  # of length 3


def linear(variables, samples, labels, *, train):
    assert not train
    return SimpleNamespace(score=samples @ variables["params"]["w"]), {}


class FakeModel:
    """Generates the origin; scores as the critic."""

    def samples(self, labels, count, *, seed, context, what="", truncation=0.0):
        return np.zeros((count, 2), np.float32)

    def scores(self, samples, labels, *, context):
        return np.asarray(samples @ WEIGHTS["params"]["w"])


class FakeDomain:
    """Training points at (1, 0), held-out ones at (0, 1)."""

    def __init__(self, held_out=200):
        self.held_out = held_out

    def fixed(self, split, count):
        size = 300 if split == "train" else self.held_out
        return np.tile(np.array([[1.0, 0.0]] if split == "train" else [[0.0, 1.0]], np.float32), (size, 1)), None


def config(**changes):
    values = {"seed": 0, "gradient_penalty": 10.0, "one_sided": False, "weight_clip": 0.0, "clip_kernels_only": False}
    return SimpleNamespace(**(values | changes))


def test_estimate_and_loss_of_a_linear_critic_on_both_splits():
    found = LossMeter(config(), linear, FakeDomain()).measure(FakeModel(), WEIGHTS, CONTEXT)
    expected = {
        "eval/wasserstein_train": 1.8,
        "eval/wasserstein_test": 2.4,
        "eval/negative_critic_loss_train": 1.8 - 10 * (3 - 1) ** 2,
        "eval/negative_critic_loss_test": 2.4 - 10 * (3 - 1) ** 2,
        "eval/interpolate_norm_mean": 3.0,
        "eval/interpolate_norm_std": 0.0,
        "eval/interpolate_norm_low": 3.0,
        "eval/interpolate_norm_high": 3.0,
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_one_sided_penalty_lets_small_slopes_be():
    small = {"params": {"w": jnp.array([0.3, 0.4])}}
    found = LossMeter(config(one_sided=True), linear, FakeDomain()).measure(FakeModel(), small, CONTEXT)
    assert found["eval/negative_critic_loss_train"] == found["eval/wasserstein_train"]


def test_data_without_a_held_out_split_have_no_meter_of_it():
    found = LossMeter(config(), linear, FakeDomain(held_out=0)).measure(FakeModel(), WEIGHTS, CONTEXT)
    assert "eval/wasserstein_train" in found
    assert not any(name.endswith("test") for name in found)


def test_clipping_has_no_penalty_but_weights_at_the_limit():
    found = LossMeter(config(gradient_penalty=0.0, weight_clip=2.4), linear, FakeDomain()).measure(
        FakeModel(), WEIGHTS, CONTEXT
    )
    assert found["eval/weights_at_clip"] == 0.5
    assert not any("negative_critic_loss" in name for name in found)


@pytest.mark.parametrize(("limit", "share"), [(0.1, 0.75), (0.0999, 0.75), (0.2, 0.0)])
def test_the_share_of_weights_at_the_limit(limit, share):
    params = {"a": jnp.array([0.1, -0.1]), "b": {"c": jnp.array([0.05, 0.1])}}
    assert float(share_at_limit(params, limit, kernels_only=False)) == pytest.approx(share)  # float32
