"""Images between the host (uint8) and the device ([-1, 1]), and pictures that a person looks at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabletrain.errors import NotFiniteError

MARGIN = 2
FONT_SIZE = 12
TEXT_HEIGHT = 15
MOST_TEXT_WIDTH = 160


def to_float(images: Any, dtype: Any = None) -> Any:
    """uint8 [0, 255] -> float in [-1, 1]; NumPy or JAX arrays, also inside jit.

    Source: x / 127.5 - 1, the convention of Ho et al. 2020.
    """
    return images.astype(dtype or np.float32) / 127.5 - 1.0


def to_uint8(images: Any) -> NDArray[np.uint8]:
    """float in [-1, 1] -> uint8: clipped, then rounded to the nearest level."""
    array = np.asarray(images, dtype=np.float32)
    return np.clip(np.rint((array + 1.0) * 127.5), 0, 255).astype(np.uint8)


def refuse_not_finite(samples: NDArray[np.floating], before: int = 0) -> None:
    """Raises: `NotFiniteError` with the number of samples [N, ...] that are not finite, after `before` that are."""
    bad = np.count_nonzero(~np.isfinite(samples).reshape(len(samples), -1).all(axis=1))
    if bad:
        raise NotFiniteError(
            f"{bad} of the first {before + len(samples)} samples hold numbers that are not finite: the weights have "
            "diverged (try another --checkpoint or --weights), or an option of sampling is too far out"
        )


def encode_png(array: NDArray[np.uint8]) -> bytes:
    """PNG bytes of uint8 [H, W], [H, W, 1] or [H, W, 3]; the same bytes for the same pixels.

    Raises: `ValueError` for another type or shape.
    """
    from PIL import Image

    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3)):
        raise ValueError(f"no PNG of {array.dtype} {array.shape}: expected uint8 [H, W], [H, W, 1] or [H, W, 3]")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(stream, format="PNG")
    return stream.getvalue()


def image_grid(
    images: NDArray[np.uint8],
    columns: int,
    labels: Sequence[str] | None = None,
    *,
    row_labels: Sequence[str] | None = None,
    background: int = 255,
    smallest: int = 32,
) -> NDArray[np.uint8]:
    """Images [N, H, W, C] side by side, row by row, as [H', W', C] with a margin between them.

    Images smaller than `smallest` pixels are enlarged by a whole factor without smoothing, so that 8x8 digits can be
    seen. `labels`: a short text above each image; `row_labels`: one at the left of each row. Texts too wide for their
    place are cut.

    Raises: `ValueError` for no images, no columns, or another number of labels than of images or rows.
    """
    count, height, width, channels = images.shape
    rows = -(-count // columns) if columns > 0 else 0
    if not rows or len(labels or images) != count or len(row_labels or range(rows)) != rows:
        raise ValueError(
            f"no grid of {count} images in {columns} columns with {labels and len(labels)} labels and "
            f"{row_labels and len(row_labels)} row labels"
        )
    factor = max(1, -(-smallest // max(height, width)))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor, width * factor
    above = TEXT_HEIGHT if labels else 0
    left = min(_text_width(row_labels), MOST_TEXT_WIDTH) + 2 * MARGIN if row_labels else 0
    step_down, step_right = above + height + MARGIN, width + MARGIN
    grid = np.full((rows * step_down + MARGIN, left + columns * step_right + MARGIN, channels), background, np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, start = MARGIN + row * step_down + above, left + MARGIN + column * step_right
        grid[top : top + height, start : start + width] = image
        if labels:
            place = grid[top - above : top, start : start + width]
            place[:] = _text(labels[index], place.shape[:2], background)[..., None]
    for row, text in enumerate(row_labels or ()):
        place = grid[row * step_down + MARGIN + above : (row + 1) * step_down, MARGIN : left - MARGIN]
        place[:] = _text(text, place.shape[:2], background)[..., None]
    return grid


def _text_width(texts: Sequence[str]) -> int:
    from PIL import ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    return int(np.ceil(max(font.getlength(text) for text in texts))) + 1


def _text(text: str, shape: tuple[int, int], background: int) -> NDArray[np.uint8]:
    """A text in one line, in the middle of the height of [H, W], from the left."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("L", (shape[1], shape[0]), background)
    font = ImageFont.load_default(FONT_SIZE)
    ImageDraw.Draw(picture).text((0, shape[0] // 2), text, fill=255 - background, font=font, anchor="lm")
    return np.asarray(picture)
