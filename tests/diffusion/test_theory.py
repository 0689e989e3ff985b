"""The theory laboratory: parts that make up the networks, exact expectations, inequalities, and the whole command."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.cli.main import run
from stabletrain.diffusion import theory as laboratory
from stabletrain.diffusion.skip_chain import skip_chain
from stabletrain.diffusion.theory import SCALINGS, Robustness, aligned_decoders, unrolled_bound
from stabletrain.diffusion.unet import STYLES, Style, UNet, group_count
from stabletrain.diffusion.uvit import UViT
from stabletrain.methods.scalelong import theorem34_bound

UVIT = UViT(4, 1, 2, 16, 4, 2)
UNET = UNet(1, 8, (1, 2), 1, ())


def drawn(network, size=4):
    ((params, images, times, _),) = laboratory.draws(network, 1, 3, size)
    return params, images, times


DDPMPP = UNET.clone(style=STYLES["ddpm++"])
IDDPM = UNET.clone(style=STYLES["iddpm"], attention_resolutions=(4,), head_channels=8)
NETWORKS = [
    pytest.param(UVIT, id="uvit"),
    pytest.param(UNET, id="unet"),
    pytest.param(DDPMPP, id="ddpm++", marks=pytest.mark.slow),
    pytest.param(IDDPM, id="iddpm", marks=pytest.mark.slow),
    pytest.param(laboratory.theorem_network(3, 16), id="mlp"),
]


@pytest.mark.parametrize("network", NETWORKS)
def test_the_parts_put_together_have_the_features_of_the_network(network):
    network = network.clone(skip_scaling="cs", kappa=0.5)
    params, images, times = drawn(network)
    _, state = network.apply({"params": params}, images, times, mutable=["features"])
    parts = skip_chain(network, params, images, times)
    skips, decoded = parts.features(parts.inputs)
    assert len(skips) == network.num_skips == len(decoded) - 1
    for i, feature in enumerate(decoded):
        expected = state["features"][f"skip_{i}" if i < network.num_skips else "middle"]
        np.testing.assert_allclose(jnp.linalg.norm(feature), expected[0], rtol=1e-5)


def test_learned_scalings_are_refused():
    network = UVIT.clone(skip_scaling="ls")
    with pytest.raises(ValueError, match="constant coefficients, not 'ls'"):
        skip_chain(network, {}, jnp.zeros((1, 4, 4, 1)), jnp.zeros(1))
    with pytest.raises(ValueError, match="none of the networks"):
        skip_chain(jax.nn, {}, jnp.zeros((1, 4, 4, 1)), jnp.zeros(1))


@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_forward_norms_have_the_exact_expectation(gain):
    for found in laboratory.forward_norms(4, 64, SCALINGS, gain=gain, seeds=64, seed=1):
        assert np.all(found.standard_error < 0.2 * found.predicted)  # so that the next line says something
        assert found.largest_deviation < 4.5  # five means, with the heavy tail of a product of matrices


def test_with_gain_two_scaling_hardly_matters_and_with_gain_one_it_does():
    """The condition that the text of Theorem 3.1 leaves out."""
    for gain, low, high in ((1.0, 0.0, 0.55), (2.0, 0.55, 1.0)):
        found = {
            f.scaling.label: f.predicted[0]
            for f in laboratory.forward_norms(4, 8, SCALINGS, gain=gain, seeds=2, seed=0)
        }
        assert low < found["CS 0.5"] / found["unscaled"] < high


@pytest.mark.parametrize("network", [UVIT, UNET], ids=["uvit", "unet"])
def test_every_merge_of_a_real_network_has_its_exact_expectation(network):
    plain, *_, scaled = laboratory.merge_norms("net", network, SCALINGS, seeds=24, seed=0)
    for found in (plain, scaled):
        assert np.all(found.ratio.std(axis=0) < 0.7)
        assert found.largest_deviation < 4.5
    assert np.all(scaled.skip_share[:, -1] < plain.skip_share[:, -1])


def test_a_merge_of_u_vit_damps_what_comes_from_inside_so_that_cs_hardly_changes_the_output_norm():
    """Gain width * 0.02^2 is far below 1: the outermost skip, which CS leaves alone, is nearly all of h_0."""
    found = {
        f.scaling.label: f.norms[:, 0].mean() for f in laboratory.merge_norms("u", UVIT, SCALINGS, seeds=24, seed=0)
    }
    assert found["CS 0.5"] > 0.95 * found["unscaled"]
    assert found["1/sqrt(2)"] < 0.8 * found["unscaled"]


def test_no_perturbation_of_the_paper_s_network_breaks_the_bounds():
    for found in laboratory.theorem_network_robustness(3, 16, SCALINGS, seeds=4, seed=0):
        assert found.violations == 0
        assert np.all(found.unrolled <= 1.0001 * found.bound)


def test_the_bounds_hold_at_a_point_of_u_vit():
    for found in laboratory.local_robustness("u", UViT(4, 1, 2, 8, 4, 2), SCALINGS[::3], seeds=2, seed=0):
        assert found.violations == 0
        assert np.all(found.gain > 0)


def test_a_broken_bound_is_counted():
    one = np.ones(2)
    assert Robustness("net", SCALINGS[0], 1, np.array([2.0, 0.5]), one, one).violations == 1


def test_the_unrolled_bound_with_equal_blocks_is_that_of_the_theorem():
    scales, a, b = jnp.array([1.0, 0.5, 0.25]), jnp.full(3, 2.0), jnp.full(3, 1.5)
    np.testing.assert_allclose(unrolled_bound(scales, a, b, b, 7.0), theorem34_bound(scales, 3.0, 7.0), rtol=1e-6)


def test_gradient_ratios_are_of_order_one_on_the_paper_s_network():
    network = laboratory.theorem_network(2, 32)
    for found in laboratory.gradient_ratios("mlp", network, SCALINGS, seeds=16, seed=0):
        low, high = found.extremes
        assert low > 0.3  # measured 0.9 to 18 at width 256
        assert high < 40


def test_ten_of_the_twelve_decoders_of_ddpm_have_groups_that_do_not_straddle():
    network = UNet()
    assert network.merge_widths[:4] == ((128, 128), (128, 128), (256, 128), (256, 128))
    assert sum(aligned_decoders(network)) == 10
    assert group_count(384) == 32


@pytest.mark.slow
def test_group_norm_cancels_a_constant_coefficient_exactly_where_its_groups_are_aligned():
    network = UNet(1, 16, (1,), 1, (), style=Style(epsilon=0.0))
    found = laboratory.cancellation(network, 0.5, seeds=1, seed=0)
    assert all(found.aligned)
    assert np.all(found.merged > 0.1)
    # rounding of the statistics, in float32
    np.testing.assert_allclose(found.normalized, 0.0, atol=1e-5)


def test_a_file_as_folder_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    def measured(*given, **settings):
        raise AssertionError("measured first")

    monkeypatch.setattr(laboratory, "forward_norms", measured)
    (tmp_path / "notes.txt").write_text("mine")
    assert run(["diffusion", "theory", "--out", str(tmp_path / "notes.txt"), "--quiet"]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_the_command_writes_figures_table_and_numbers(tmp_path, capsys):
    from stabletrain.diffusion.theory_command import theory

    preset = tmp_path / "figure.toml"
    preset.write_text(
        "depths = [2]\ngains = [1.0]\nwidth = 8\nuvit_width = 8\nuvit_depth = 2\nunet_channels = 4\n"
        "[small]\nseeds = 4\nnetwork_seeds = 2\nrobustness_width = 8\nrobustness_seeds = 1\ngradient_seeds = 1\n"
    )
    out = tmp_path / "out"
    assert theory(out=out, preset=preset, as_json=True, quiet=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"]["theorem34/violations"] == 0
    assert sorted(path.name for path in out.iterdir()) == printed["files"]
    names = ("forward-norms", "real-networks", "robustness", "gradients")
    assert set(printed["files"]) == {f"{name}.{kind}" for name in names for kind in ("png", "svg")} | {
        "theory.json", "theory.md",
    }  # fmt: skip
    assert "| UNet | CS 0.5 |" in (out / "theory.md").read_text()
    assert json.loads((out / "theory.json").read_text())["settings"]["width"] == 8
