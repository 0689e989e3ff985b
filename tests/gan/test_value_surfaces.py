"""Value surfaces: what a panel measures, that panels keep, and the whole command."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from stabletrain.errors import ConfigError
from stabletrain.gan.figure_commands import value_surfaces
from stabletrain.gan.toy_training import ToyResult, ToySettings, init_mlp, scores, train_toy
from stabletrain.gan.value_surfaces import Surface, judged_points, pack, surface, surfaces_figure, unpack

TINY = ToySettings(
    toy="gaussians8", method="wgan-gp", generator="trained", steps=1, width=8, hidden=1, batch_size=8, critic_steps=1
)


def panel_of(toy, method, generator):
    """A panel of a critic that is the distance from the middle."""
    axis = np.linspace(-2, 2, 9)
    values = np.hypot(*np.meshgrid(axis, axis))
    points = np.ones((4, 2))
    numbers = {"estimate": 0.5, "exact": 0.6, "floor": 0.1, "lipschitz": 1.0, "seconds": 1.0}
    modes: dict = {"modes_covered": None, "modes": None, "high_quality": None}
    return Surface(toy, method, generator, axis, values, points, points, **numbers, **modes)


def test_a_panel_says_what_it_shows():
    panel = surface(TINY, extent=1.5, grid=9, tick=None)
    assert panel.values.shape == (9, 9)
    np.testing.assert_allclose(panel.axis[[0, -1]], [-1.5, 1.5])
    assert (panel.modes, panel.modes_covered) == (8, 0)  # an untrained generator reaches no mode
    assert 0 < panel.floor < panel.exact
    assert abs(panel.estimate) <= panel.lipschitz * panel.exact * 1.001  # duality, on a grid's Lipschitz constant
    again = unpack({name: np.asarray(value) for name, value in pack(panel).items()})
    np.testing.assert_array_equal(again.values, panel.values)
    assert again.numbers() == panel.numbers()


def test_the_surface_lies_on_the_grid_as_contours_expect_it():
    """Rows go with y: a critic's value at (x_j, y_i) is values[i, j]."""
    panel = surface(TINY, extent=2.0, grid=5, tick=None)
    critic = train_toy(TINY).critic  # the same, by the seed
    point = np.array([[panel.axis[3], panel.axis[1]]], np.float32)
    np.testing.assert_allclose(panel.values[1, 3], jax.jit(scores)(critic, point)[0], rtol=1e-5, atol=1e-6)


def test_fixed_fakes_are_judged_on_other_real_points():
    critic = init_mlp(jax.random.key(0), (2, 1), np.float32)
    settings = ToySettings(toy="gaussians25", method="wgan", generator="noise", steps=1)
    real, fake = judged_points(ToyResult(settings, critic, None, np.zeros(1), np.zeros(1)))
    assert real.shape == fake.shape == (3000, 2)
    # noise on the same points has the covariance of real and fake equal to the variance of real, 1; here it is 0
    assert abs(np.mean(real * fake)) < 0.1


@pytest.mark.parametrize("generator", ["noise", "trained"])
def test_the_figure_has_clipping_on_top_and_a_column_for_each_toy(generator):
    pairs = [(toy, method) for toy in ("gaussians8", "swissroll") for method in ("wgan", "wgan-gp")]
    figure = surfaces_figure([panel_of(toy, method, generator) for toy, method in pairs])
    assert len(figure.axes) == 4
    assert [axis.get_ylabel() for axis in figure.axes] == ["weight clipping", "", "gradient penalty", ""]
    assert [axis.get_title() for axis in figure.axes] == ["8 Gaussians", "Swiss roll", "", ""]
    assert all(len(axis.lines) == (2 if generator == "trained" else 1) for axis in figure.axes)


def test_the_command_draws_both_figures_and_goes_on_where_it_was(tmp_path, capsys):
    preset = tmp_path / "figure.toml"
    preset.write_text(
        'datasets = ["gaussians8"]\nwidth = 8\nhidden = 1\nbatch_size = 8\ngrid = 8\n'
        "fixed_steps = 1\ntrained_steps = 1\n[small]\n[paper]\n"
    )
    out = tmp_path / "out"
    assert value_surfaces(out=out, preset=preset, as_json=True, quiet=True) == 0
    document = json.loads(capsys.readouterr().out)
    names = ["value-surfaces-fixed", "value-surfaces-trained"]
    expected = ["value-surfaces.json", *(f"{name}.{ending}" for name in names for ending in ("png", "svg"))]
    assert document["files"] == sorted(expected)
    assert document["metrics"]["trained/gaussians8/wgan-gp/modes_covered_2500"] in range(9)
    assert (out / "value-surfaces-fixed.png").read_bytes().startswith(b"\x89PNG")
    (out / "parts" / "noise-gaussians8-wgan.npz").unlink()  # as if it had been interrupted
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    before = (out / "value-surfaces-fixed.svg").read_bytes()
    assert value_surfaces(out=out, preset=preset, quiet=True) == 0
    assert len(list((out / "parts").iterdir())) == 4
    assert all((out / "parts" / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert (out / "value-surfaces-fixed.svg").read_bytes() == before


def test_unknown_toys_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="gaussians8"):
        value_surfaces(out=tmp_path, datasets=["gaussian8"])
