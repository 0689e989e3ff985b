"""How a picture of any kind and size becomes a square one of the wanted channels and size, with Pillow."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from stabletrain.data.spec import Images
from stabletrain.errors import DataError

Crop = Callable[[Image.Image], Image.Image]

GREY_MODES = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N")
CELEBA_SIZE = (178, 218)
"""Width and height of CelebA's aligned images, for which its crop is meant."""


def is_grey(picture: Image.Image) -> bool:
    """True for pictures stored without colour. A palette counts as colour."""
    return picture.mode in GREY_MODES


def open_picture(content: bytes, name: str, *, header_only: bool = False) -> Image.Image:
    """The picture in `content`, decoded (or its header read: size and mode).

    Raises: `DataError` that names it when it is damaged.
    """
    try:
        picture = Image.open(io.BytesIO(content))
        if not header_only:
            picture.load()
    except Exception as error:  # Pillow's decoders raise whatever the damage leads them to, SyntaxError included
        reason = "the file is empty" if not content else str(error) or type(error).__name__
        raise DataError(f"cannot read the image {name}: {reason}") from error
    return picture


def convert(picture: Image.Image, channels: int) -> Image.Image:
    """Greyscale for one channel, RGB for three. Palettes are looked up; transparency is laid on white.

    Colour becomes grey by the weights of ITU-R 601 (Pillow's). 16-bit greyscale keeps its upper eight bits.

    Raises: `DataError` for 32-bit pictures, whose range nothing says.
    """
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise DataError(f"its pixels are 32-bit numbers (mode {picture.mode}); save it with 8 bits per channel")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("L" if channels == 1 else "RGB")


def to_array(picture: Image.Image) -> Images:
    """[H, W, C] of a picture in mode L or RGB."""
    array = np.asarray(picture, dtype=np.uint8)
    return array[..., None] if array.ndim == 2 else array


def centre_crop(size: int) -> Crop:
    """Halves with a box filter while at least twice too large, resizes bicubically, cuts the centre square.

    Source: the crop of Dhariwal and Nichol 2021 for ImageNet.
    """

    def crop(picture: Image.Image) -> Image.Image:
        while min(picture.size) >= 2 * size:
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        scale = size / min(picture.size)
        wanted = (round(picture.width * scale), round(picture.height * scale))
        if wanted != picture.size:
            picture = picture.resize(wanted, Image.Resampling.BICUBIC)
        left, top = (picture.width - size) // 2, (picture.height - size) // 2
        return picture.crop((left, top, left + size, top + size))

    return crop


def celeba_crop(size: int) -> Crop:
    """128x128 around column 89 and row 121, then resized bilinearly; a picture that has the size already stays.

    Source: the CelebA 64x64 of Song et al. 2021 (DDIM) and Bao et al. 2023 (U-ViT).
    Raises: `DataError` for pictures that are not CelebA's aligned 178x218.
    """

    def crop(picture: Image.Image) -> Image.Image:
        if picture.size == (size, size):
            return picture
        if picture.size != CELEBA_SIZE:
            raise DataError(
                f"it is {picture.width}x{picture.height}; celeba64 takes the aligned images of 178x218, "
                f"or cropped ones of {size}x{size}"
            )
        left, top = 89 - 64, 121 - 64
        square = picture.crop((left, top, left + 128, top + 128))
        return square.resize((size, size), Image.Resampling.BILINEAR)

    return crop


def transposed(picture: Image.Image) -> Image.Image:
    """Rows and columns exchanged, which sets EMNIST's characters upright."""
    return picture.transpose(Image.Transpose.TRANSPOSE)
