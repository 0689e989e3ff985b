"""Where images come from: an array in memory, or encoded files decoded in threads when they are asked for."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from stabletrain.data.spec import Images
from stabletrain.errors import DataError

MEMORY_LIMIT = 2 << 30
"""Sets up to this many bytes of pixels are held in memory (and on the device) as one array."""

Crop = Callable[[Image.Image], Image.Image]


class ArraySource:
    """Images that are in memory already, uint8 [N, H, W, C]."""

    def __init__(self, images: Images) -> None:
        self._images = images
        self.shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: NDArray[np.integer]) -> Images:
        """The images at `indices`."""
        return self._images[np.asarray(indices)]

    def array(self) -> Images:
        """All of them."""
        return self._images


class EncodedSource:
    """Encoded images (PNG, JPEG, ...) by name, read by `open_bytes` and decoded in threads.

    `crop` makes each picture square and of the wanted size; without it every picture must have `shape` already.
    """

    def __init__(
        self,
        names: Sequence[str],
        open_bytes: Callable[[str], bytes],
        shape: tuple[int, int, int],
        crop: Crop | None = None,
    ) -> None:
        self.names = list(names)
        self.shape = shape
        self._open_bytes = open_bytes
        self._crop = crop

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1)), thread_name_prefix="decode")

    def decode(self, index: int) -> Images:
        """One image [H, W, C]. Raises `DataError` naming the file when it is damaged or of another size."""
        name = self.names[index]
        try:
            with Image.open(io.BytesIO(self._open_bytes(name))) as picture:
                image = convert(picture, self.shape[2])
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise DataError(f"cannot read the image {name}: {error}") from error
        if self._crop is not None:
            image = self._crop(image)
        array = np.asarray(image, dtype=np.uint8)
        if array.ndim == 2:
            array = array[..., None]
        if array.shape != self.shape:
            raise DataError(
                f"the image {name} is {array.shape[1]}x{array.shape[0]}, but the first one is "
                f"{self.shape[1]}x{self.shape[0]}: give --image-size to crop and resize all of them"
            )
        return array

    def read(self, indices: NDArray[np.integer]) -> Images:
        """The images at `indices`, decoded side by side, in order."""
        return np.stack(list(self._pool.map(self.decode, np.asarray(indices).tolist())))

    @cached_property
    def _all(self) -> Images | None:
        if len(self) * int(np.prod(self.shape)) > MEMORY_LIMIT:
            return None
        images = np.empty((len(self), *self.shape), np.uint8)
        for index, image in enumerate(self._pool.map(self.decode, range(len(self)))):
            images[index] = image
        return images

    def array(self) -> Images | None:
        """All images, decoded once; None above `MEMORY_LIMIT`."""
        return self._all


def convert(picture: Image.Image, channels: int) -> Image.Image:
    """Greyscale for one channel, RGB for three. Palettes are looked up; transparency is laid on white."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("L" if channels == 1 else "RGB")


def centre_crop(size: int) -> Crop:
    """Halves with a box filter while at least twice too large, resizes bicubically, cuts the centre square.

    Source: the crop of Dhariwal and Nichol 2021 for ImageNet.
    """

    def crop(picture: Image.Image) -> Image.Image:
        while min(picture.size) >= 2 * size:
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        scale = size / min(picture.size)
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
        )
        left, top = (picture.width - size) // 2, (picture.height - size) // 2
        return picture.crop((left, top, left + size, top + size))

    return crop


def celeba_crop(size: int) -> Crop:
    """128x128 around (89, 121), then resized bilinearly. Source: the CelebA 64x64 crop of Song et al. 2021 (DDIM)."""

    def crop(picture: Image.Image) -> Image.Image:
        centre_x, centre_y = 89, 121
        square = picture.crop((centre_x - 64, centre_y - 64, centre_x + 64, centre_y + 64))
        return square.resize((size, size), Image.Resampling.BILINEAR)

    return crop
