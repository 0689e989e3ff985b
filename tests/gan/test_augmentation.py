"""Augmentations: exact shifts, ranges, what leaves an image alone, gradients, the controller."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.gan.augmentation import (
    DIFFAUGMENT,
    _affine,
    _hue_rotated,
    _sampled,
    adapted_probability,
    diffaugment,
    flip_and_shift,
    mixed_with_fakes,
    translated,
)
from stabletrain.gan.augmentation import (
    ada as plain_ada,
)

IMAGES = np.random.default_rng(0).uniform(-1, 1, size=(6, 8, 7, 3)).astype(np.float32)
KEY = jax.random.key(0)
ada = jax.jit(plain_ada)


@pytest.mark.parametrize("border", ["zero", "reflect"])
def test_translation_moves_pixels_exactly(border):
    down, right = np.array([0, 1, -2, 3, 0, 2]), np.array([0, -1, 2, 0, 3, 1])
    found = np.asarray(translated(IMAGES, jnp.asarray(down), jnp.asarray(right), border=border))
    mode = {"zero": {"mode": "constant"}, "reflect": {"mode": "reflect"}}[border]
    for image, moved, d, r in zip(IMAGES, found, down, right):
        padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), **mode)
        np.testing.assert_array_equal(moved, padded[3 - d : 11 - d, 3 - r : 10 - r])


def test_flip_and_shift_makes_all_flips_and_shifts_up_to_an_eighth():
    marked = np.zeros((512, 8, 8, 1), np.float32)
    marked[:, 3, 2] = 1.0
    moved = np.asarray(flip_and_shift(marked, KEY))
    assert {tuple(int(i) for i in np.argwhere(image[..., 0])[0]) for image in moved} == {
        (row, column) for row in (2, 3, 4) for column in (1, 2, 3, 4, 5, 6)
    }


def test_diffaugment_ranges():
    grey = np.full((2000, 8, 8, 3), 0.25, np.float32)
    brightness = np.asarray(diffaugment(grey, KEY, ("color",)))[:, 0, 0]
    # Of an even image only brightness is to be seen: uniform in 0.25 +- 0.5.
    np.testing.assert_allclose(brightness[:, 0], brightness[:, 2], atol=1e-6)
    assert -0.25 <= brightness.min() < -0.23
    assert 0.73 < brightness.max() < 0.75
    holes = np.asarray(diffaugment(np.ones((2000, 8, 8, 1), np.float32), KEY, ("cutout",)))[..., 0] == 0
    areas = holes.sum(axis=(1, 2))
    assert areas.max() == 16  # half the side, where it lies inside
    assert areas.min() == 4  # a quarter of it where its centre is a corner
    shifted = np.asarray(diffaugment(np.ones((2000, 8, 8, 1), np.float32), KEY, ("translation",)))[..., 0] == 0
    assert sorted(set(shifted.sum(axis=(1, 2)).tolist())) == [0, 8, 15]  # none, one side, two sides, by one pixel


def test_diffaugment_is_what_its_policy_says():
    np.testing.assert_array_equal(diffaugment(IMAGES, KEY, ()), IMAGES)
    assert set(DIFFAUGMENT) == {"color", "translation", "cutout"}
    whole = diffaugment(IMAGES, KEY)
    parts = IMAGES
    for name in DIFFAUGMENT:  # operations draw the same numbers whatever else the policy holds
        parts = diffaugment(parts, KEY, (name,))
    np.testing.assert_allclose(whole, parts, atol=1e-6)  # float32


def test_ada_without_probability_is_the_identity():
    np.testing.assert_allclose(ada(IMAGES, KEY, jnp.zeros(())), IMAGES, atol=1e-6)  # float32 coordinates


def test_ada_with_full_probability_changes_every_image_and_stays_finite():
    found = ada(IMAGES, KEY, jnp.ones(()))
    assert jnp.all(jnp.isfinite(found))
    assert jnp.all(jnp.max(jnp.abs(found - IMAGES), axis=(1, 2, 3)) > 0.05)


def test_ada_works_on_grey_images():
    assert ada(IMAGES[..., :1], KEY, jnp.ones(())).shape == (6, 8, 7, 1)


def test_sampling_by_exact_maps_moves_whole_pixels():
    mirror = jnp.diag(jnp.array([-1.0, 1.0, 1.0]))[None].repeat(6, 0)
    np.testing.assert_allclose(_sampled(jnp.asarray(IMAGES), mirror), IMAGES[:, :, ::-1], atol=1e-6)
    square = IMAGES[:, :7]
    # The map says where a pixel comes from: (x, y) from (-y, x), so that what was on the right is now below.
    quarter = jnp.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])[None].repeat(6, 0)
    np.testing.assert_allclose(_sampled(jnp.asarray(square), quarter), np.rot90(square, 1, (1, 2)), atol=1e-6)


def test_ada_applies_its_maps_to_the_asked_share():
    maps = np.asarray(_affine(KEY, (4000, 8, 8, 3), jnp.asarray(0.1)))
    same = np.isclose(maps, np.eye(3)).all(axis=(1, 2)).mean()
    # Seven independent maps, of which the mirror and the quarter turns are the identity in 1/2 and 1/4 of their uses,
    # and shifts by whole pixels of up to one in 1/9: 0.95 * 0.925 * 0.911 * 0.9^2 * (0.9 for both turns) * 0.9.
    expected = 0.95 * 0.925 * (0.9 + 0.1 / 4) * 0.9 * 0.9 * 0.9 * 0.9
    assert abs(same - expected) < 0.03  # four standard deviations of 4,000 draws, and the edges of rounding


def test_hue_keeps_grey_and_length_and_turns_colours_round():
    grey = np.full((1, 1, 1, 3), 0.4, np.float32)
    red = np.array([[[[1.0, 0.0, 0.0]]]], np.float32)
    angle = jnp.full((1, 1, 1, 1), 2 * np.pi / 3)
    np.testing.assert_allclose(_hue_rotated(grey, angle), grey, atol=1e-6)
    np.testing.assert_allclose(_hue_rotated(red, angle), [[[[0, 1, 0]]]], atol=1e-6)  # a third of a turn: green


@pytest.mark.parametrize("operation", [diffaugment, flip_and_shift, lambda x, k: ada(x, k, jnp.asarray(0.8))])
def test_gradients_reach_the_images(operation):
    """All are linear in the image for fixed random numbers, so a difference quotient is exact."""
    direction = np.random.default_rng(1).normal(size=IMAGES.shape).astype(np.float32)
    weights = np.random.default_rng(2).normal(size=IMAGES.shape).astype(np.float32)
    loss = jax.jit(lambda x: jnp.sum(weights * operation(x, KEY)))
    along = jnp.sum(jax.jit(jax.grad(loss))(jnp.asarray(IMAGES)) * direction)
    quotient = (loss(IMAGES + direction) - loss(IMAGES - direction)) / 2
    np.testing.assert_allclose(along, quotient, rtol=2e-3, atol=2e-3)  # float32 sums of a thousand numbers
    assert along != 0


def test_probability_follows_the_target_and_stays_a_probability():
    def moved(p, sign_mean):
        return float(adapted_probability(jnp.asarray(p), jnp.asarray(sign_mean), target=0.6, images=256, thousands=500))

    step = 256 / 500_000
    assert moved(0.5, 0.7) == pytest.approx(0.5 + step)
    assert moved(0.5, 0.5) == pytest.approx(0.5 - step)
    assert moved(0.5, 0.6) == 0.5
    assert moved(0.0, -1.0) == 0.0
    assert moved(1.0, 1.0) == 1.0


def test_apa_replaces_the_asked_share_without_gradient_to_the_fakes():
    real, fake = jnp.zeros((2000, 2)), jnp.ones((2000, 2))
    mixed = mixed_with_fakes(real, fake, KEY, jnp.asarray(0.3))
    assert np.all(np.asarray(mixed)[:, 0] == np.asarray(mixed)[:, 1])
    assert abs(float(jnp.mean(mixed)) - 0.3) < 0.045  # four standard deviations
    gradient = jax.grad(lambda f: jnp.sum(mixed_with_fakes(real, f, KEY, jnp.asarray(0.3))))(fake)
    np.testing.assert_array_equal(gradient, 0)
