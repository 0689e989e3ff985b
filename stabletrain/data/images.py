"""Images between the host (uint8) and the device ([-1, 1]), and pictures that a person looks at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MARGIN = 2


def to_float(images: Any, dtype: Any = None) -> Any:
    """uint8 [0, 255] -> float in [-1, 1]; NumPy or JAX arrays, also inside jit.

    Source: x / 127.5 - 1, the convention of Ho et al. 2020.
    """
    return images.astype(dtype or np.float32) / 127.5 - 1.0


def to_uint8(images: Any) -> NDArray[np.uint8]:
    """float in [-1, 1] -> uint8: clipped, then rounded to the nearest level."""
    array = np.asarray(images, dtype=np.float32)
    return np.clip(np.rint((array + 1.0) * 127.5), 0, 255).astype(np.uint8)


def encode_png(array: NDArray[np.uint8]) -> bytes:
    """PNG bytes of [H, W], [H, W, 1] or [H, W, 3]; the same bytes for the same pixels."""
    from PIL import Image

    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(stream, format="PNG")
    return stream.getvalue()


def image_grid(
    images: NDArray[np.uint8],
    columns: int,
    *,
    row_labels: Sequence[str] | None = None,
    background: int = 255,
    smallest: int = 32,
) -> NDArray[np.uint8]:
    """Images [N, H, W, C] side by side, row by row, as [H', W', C] with a margin between them.

    Images smaller than `smallest` pixels are enlarged by a whole factor without smoothing, so that 8x8 digits can be
    seen. `row_labels`: a short text at the left of each row.
    """
    count, height, width, channels = images.shape
    factor = max(1, -(-smallest // max(height, width)))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor, width * factor
    rows = -(-count // columns)
    left = _label_width(row_labels) if row_labels else 0
    grid = np.full(
        (rows * (height + MARGIN) + MARGIN, left + columns * (width + MARGIN) + MARGIN, channels), background, np.uint8
    )
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, start = MARGIN + row * (height + MARGIN), left + MARGIN + column * (width + MARGIN)
        grid[top : top + height, start : start + width] = image
    if row_labels:
        _draw_labels(grid, row_labels, height, 255 - background)
    return grid


def _label_width(labels: Sequence[str]) -> int:
    from PIL import ImageFont

    font = ImageFont.load_default(12)
    return int(max(font.getlength(label) for label in labels)) + 3 * MARGIN


def _draw_labels(grid: NDArray[np.uint8], labels: Sequence[str], height: int, ink: int) -> None:
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(12)
    picture = Image.fromarray(grid[..., 0])
    draw = ImageDraw.Draw(picture)
    for row, label in enumerate(labels):
        draw.text((MARGIN, MARGIN + row * (height + MARGIN) + height // 2), label, fill=ink, font=font, anchor="lm")
    left = _label_width(labels)
    grid[:, :left] = np.asarray(picture)[:, :left, None]
