"""Images keep their values between host and device, and pictures show each image where it belongs."""

from __future__ import annotations

import io

import jax
import numpy as np
import pytest
from PIL import Image

from stabletrain.data.images import (
    MARGIN,
    TEXT_HEIGHT,
    encode_png,
    image_grid,
    refuse_not_finite,
    to_float,
    to_uint8,
)
from stabletrain.errors import NotFiniteError
from tests.data.written import pixels


def test_every_level_survives_the_way_to_floats_and_back() -> None:
    """All 256, in NumPy and inside jit; the ends are exactly -1 and 1."""
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    floats = to_float(levels)
    assert floats.dtype == np.float32
    assert (floats.min(), floats.max()) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_uint8(floats), levels)
    np.testing.assert_array_equal(to_uint8(jax.jit(to_float)(levels)), levels)


def test_floats_outside_are_clipped() -> None:
    """A model's samples leave [-1, 1]."""
    assert to_uint8(np.array([-3.0, -1.0, 0.0, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_a_png_holds_the_pixels_and_is_the_same_each_time(shape: tuple[int, ...]) -> None:
    """Lossless, and byte for byte repeatable."""
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    content = encode_png(image)
    assert encode_png(image.copy()) == content
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), image.squeeze())


def test_a_png_of_floats_is_refused() -> None:
    """Instead of a picture of something else."""
    with pytest.raises(ValueError, match="float64"):
        encode_png(np.zeros((4, 4)))  # type: ignore[arg-type]


def test_a_grid_shows_each_image_at_its_place_enlarged_without_smoothing() -> None:
    """Image 4 of 5 in 3 columns is in the second row, second column; 8 pixels become 32."""
    images = pixels(5)
    grid = image_grid(images, 3)
    top = left = MARGIN + 32 + MARGIN
    shown = grid[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(shown, images[4].repeat(4, axis=0).repeat(4, axis=1))
    assert (grid[top : top + 32, left + 32 + MARGIN :] == 255).all()  # no sixth image


def test_large_images_are_not_enlarged() -> None:
    """40 pixels stay 40."""
    assert image_grid(pixels(1, 40), 1).shape == (40 + 2 * MARGIN, 40 + 2 * MARGIN, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_labels_are_written_beside_the_images_and_not_over_them(channels: int) -> None:
    """Text appears above each image and at the left of each row; the images are untouched, however long a text is."""
    images = pixels(4, 32, channels)
    plain = image_grid(images, 2)
    grid = image_grid(images, 2, ["a", "a word much wider than its image", "c", "d"], row_labels=["first", "x" * 400])
    left = grid.shape[1] - plain.shape[1]
    for index in range(4):
        row, column = divmod(index, 2)
        top = MARGIN + row * (TEXT_HEIGHT + 32 + MARGIN) + TEXT_HEIGHT
        start = left + MARGIN + column * (32 + MARGIN)
        np.testing.assert_array_equal(grid[top : top + 32, start : start + 32], images[index])
        assert (grid[top - TEXT_HEIGHT : top, start : start + 32] < 128).any()
    assert (grid[MARGIN + TEXT_HEIGHT : MARGIN + TEXT_HEIGHT + 32, :left] < 128).any()
    assert left < 200


def test_a_grid_with_another_number_of_labels_is_refused() -> None:
    """A label must not stand at another image."""
    with pytest.raises(ValueError, match="3 labels"):
        image_grid(pixels(4), 2, ["a", "b", "c"])
    with pytest.raises(ValueError, match="no grid of 4 images in 0 columns"):
        image_grid(pixels(4), 0)


def test_samples_that_are_not_finite_are_counted():
    samples = np.zeros((5, 2, 2, 1), np.float32)
    refuse_not_finite(samples)
    samples[1, 0, 0], samples[1, 1, 1], samples[4, 1, 0] = np.nan, np.inf, -np.inf
    with pytest.raises(NotFiniteError, match="2 of the first 8 samples hold numbers that are not finite"):
        refuse_not_finite(samples, before=3)
