"""Gradients through depth: against finite differences, closed forms of linear networks, and a whole command."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.errors import ConfigError
from stabletrain.gan.depth_gradients import activation_gradients, depth_figure, depth_gradients, slope_per_layer
from stabletrain.gan.figure_commands import gradient_norms
from stabletrain.gan.toy_training import ToySettings, init_mlp, scores
from stabletrain.methods.wgan_gp import critic_loss


def test_the_gradient_at_the_input_is_that_of_finite_differences():
    with jax.enable_x64(True):
        critic = init_mlp(jax.random.key(0), (2, 6, 6, 1), jnp.float64)
        real, fake, along = (jax.random.normal(jax.random.key(i), (5, 2), jnp.float64) for i in (1, 2, 3))
        gradients = activation_gradients(critic, real, fake)
        assert [gradient.shape for gradient in gradients] == [(10, 2), (10, 6), (10, 6)]

        def loss(amount):
            return critic_loss(scores(critic, real + amount * along), scores(critic, fake))

        expected = (loss(1e-6) - loss(-1e-6)) / 2e-6
        # piecewise linear: exact but for rounding, unless a unit switches within 1e-6
        np.testing.assert_allclose(jnp.vdot(gradients[0][:5], along), expected, rtol=1e-7)


def test_each_layer_multiplies_the_gradient_by_its_factor():
    """Positive diagonal layers of factor a leave every unit on: the norm grows by a a layer on the way back."""
    factor, depth = 0.5, 6
    kernel = factor * jnp.eye(2)
    critic = [{"kernel": kernel, "bias": jnp.zeros(2)}] * depth + [{"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}]
    gradients = activation_gradients(critic, jnp.ones((3, 2)), jnp.ones((3, 2)))
    norms = np.array([float(jnp.linalg.norm(gradient)) for gradient in gradients])
    np.testing.assert_allclose(norms[:-1] / norms[1:], factor, rtol=1e-6)
    np.testing.assert_allclose(slope_per_layer(norms), np.log10(factor), rtol=1e-5)
    np.testing.assert_allclose(norms[-1], np.sqrt(6 * 2) / 3, rtol=1e-6)  # of ones / 3, for 6 points and 2 units


def test_a_gradient_of_zero_has_no_slope():
    assert np.isnan(slope_per_layer(np.array([0.0, 1.0, 2.0])))


def test_clipping_vanishes_where_the_penalty_keeps_the_gradient():
    """The figure in small: 6 layers of 32 units, 20 generator steps."""
    shared = {"toy": "swissroll", "generator": "trained", "steps": 20, "width": 32, "hidden": 6, "batch_size": 32}
    clipped = depth_gradients(ToySettings(method="wgan", dtype="float64", clip=0.01, **shared), "clipped")
    free = depth_gradients(ToySettings(method="wgan-gp", dtype="float64", **shared), "penalty")
    # backward gain of saturated weights: between c sqrt(n / 2) = 0.04 (random signs) and c n / 2 = 0.16 (aligned)
    assert np.log10(0.02) < clipped.slope < np.log10(0.3)
    assert abs(free.slope) < 0.2
    assert clipped.at_limit > 0.5
    assert free.at_limit is None
    assert clipped.histogram.sum() == free.histogram.sum() == 2 * 32 + 5 * 32 * 32 + 32
    assert len(depth_figure([clipped, free], histogram_of="clipped").axes) == 3


def test_float32_and_fixed_fakes_are_refused():
    with pytest.raises(ValueError, match="float64"):
        depth_gradients(ToySettings(toy="swissroll", method="wgan", generator="trained", steps=1), "x")


def test_the_command_writes_figures_and_numbers_and_keeps_what_is_done(tmp_path, capsys):
    preset = tmp_path / "figure.toml"
    preset.write_text("hidden = 3\nwidth = 8\nbatch_size = 8\nclips = [0.01]\n[small]\nsteps = 2\n[paper]\nsteps = 9\n")
    out = tmp_path / "out"
    assert gradient_norms(out=out, preset=preset, quiet=True, as_json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["files"] == ["gradient-norms.json", "gradient-norms.png", "gradient-norms.svg"]
    document = json.loads((out / "gradient-norms.json").read_text())
    assert [len(curve["gradient_norms"]) for curve in document["curves"]] == [4, 4]
    assert document["settings"]["steps"] == 2
    first = (out / "gradient-norms.svg").read_bytes()
    kept = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    assert gradient_norms(out=out, preset=preset, quiet=True) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()} == kept
    assert (out / "gradient-norms.svg").read_bytes() == first
    assert gradient_norms(out=out, preset=preset, quiet=True, penalty=1.0) == 0
    changed = [path.name for path in (out / "parts").iterdir() if path.stat().st_mtime_ns != kept[path]]
    assert changed == ["gradient-penalty.json"]


def test_settings_that_are_wrong_are_refused(tmp_path):
    preset = tmp_path / "figure.toml"
    preset.write_text("widht = 8\n[small]\n")
    with pytest.raises(ConfigError, match="width"):
        gradient_norms(out=tmp_path, preset=preset)
    with pytest.raises(ConfigError, match="paper"):
        gradient_norms(out=tmp_path, preset=preset, scale="paper")
    with pytest.raises(ConfigError, match="small or paper"):
        gradient_norms(out=tmp_path, scale="large")
    with pytest.raises(ConfigError, match="swissroll"):
        gradient_norms(out=tmp_path, dataset="swissrol")
