"""Where images come from: an array, rows of mapped files, or encoded pictures decoded in threads when asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stabletrain.data.crops import Crop, convert, is_grey, open_picture, to_array
from stabletrain.data.spec import Images, ImageSource
from stabletrain.errors import DataError

MEMORY_LIMIT = 2 << 30
"""A split of up to this many bytes of pixels is held in memory as one array (2 GiB)."""

DECODE_TOGETHER = 64  # pictures per task when a whole split is decoded: few enough tasks, and all threads busy


def fits_in_memory(count: int, shape: tuple[int, int, int]) -> bool:
    """Whether that many images of that shape are held as one array."""
    return count * int(np.prod(shape)) <= MEMORY_LIMIT


class ArraySource:
    """Images that are one array already, uint8 [N, H, W, C]: in memory, or mapped from a file."""

    def __init__(self, images: Images) -> None:
        self._images = images
        self.shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: NDArray[np.integer]) -> Images:
        """The images at `indices`."""
        return np.asarray(self._images[np.asarray(indices)])

    def array(self) -> Images | None:
        """All of them; None above `MEMORY_LIMIT`."""
        return self._images if fits_in_memory(len(self), self.shape) else None


class RowSource:
    """Square images stored as rows of three colour planes [n, 3 * H * W], in several parts that may be mapped files."""

    def __init__(self, parts: Sequence[NDArray[np.uint8]], size: int) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.shape = (size, size, 3)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: NDArray[np.integer]) -> Images:
        """The images at `indices`."""
        indices = np.asarray(indices)
        height, width, channels = self.shape
        rows = np.empty((len(indices), height * width * channels), np.uint8)
        part_of = np.searchsorted(self._starts, indices, side="right") - 1
        for part in np.unique(part_of):
            mine = part_of == part
            rows[mine] = self._parts[part][indices[mine] - self._starts[part]]
        planes = rows.reshape(-1, channels, height, width)
        return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))  # -> [B, H, W, C]

    def array(self) -> Images | None:
        """All of them; None above `MEMORY_LIMIT`."""
        return self.read(np.arange(len(self))) if fits_in_memory(len(self), self.shape) else None


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1)), thread_name_prefix="decode")


class SubsetSource:
    """Some images of another source."""

    def __init__(self, source: ImageSource, indices: NDArray[np.integer]) -> None:
        self._source, self._indices = source, np.asarray(indices)
        self.shape = source.shape

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, indices: NDArray[np.integer]) -> Images:
        """The images at `indices` of the subset."""
        return self._source.read(self._indices[np.asarray(indices)])

    @cached_property
    def _all(self) -> Images | None:
        return self.read(np.arange(len(self))) if fits_in_memory(len(self), self.shape) else None

    def array(self) -> Images | None:
        """All of them; None above `MEMORY_LIMIT`. Only these images are decoded."""
        return self._all


class ResizedSource:
    """Another source's images, cropped and resized when they are asked for."""

    def __init__(self, source: ImageSource, crop: Crop, size: int) -> None:
        self._source = source
        self._crop = crop
        self.shape = (size, size, source.shape[2])

    def __len__(self) -> int:
        return len(self._source)

    def _resized(self, image: Images) -> Images:
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        return to_array(self._crop(picture))

    def read(self, indices: NDArray[np.integer]) -> Images:
        """The images at `indices`."""
        if self.__dict__.get("_all") is not None:  # resized already
            return self._all[np.asarray(indices)]  # type: ignore[index]
        images = np.empty((len(indices), *self.shape), np.uint8)
        for place, image in enumerate(self._source.read(indices)):
            images[place] = self._resized(image)
        return images

    @cached_property
    def _all(self) -> Images | None:
        if not fits_in_memory(len(self), self.shape):
            return None
        images = np.empty((len(self), *self.shape), np.uint8)

        def fill(start: int) -> None:
            indices = np.arange(start, min(start + DECODE_TOGETHER, len(images)))
            for index, image in zip(indices, self._source.read(indices)):
                images[index] = self._resized(image)

        with _threads() as pool:
            list(pool.map(fill, range(0, len(images), DECODE_TOGETHER)))
        return images

    def array(self) -> Images | None:
        """All images, resized once and then kept; None above `MEMORY_LIMIT`."""
        return self._all


class EncodedSource:
    """Encoded pictures (PNG, JPEG, ...), read by `open_bytes(index)` and decoded in threads.

    `names` and `place` name them in errors. `crop` makes each picture square and of the wanted size; without it every
    picture must have `shape` already. `refuse_colour`: the set was taken for greyscale from a sample of it, so that a
    coloured picture is an error.
    """

    def __init__(
        self,
        names: Sequence[str],
        place: Path,
        open_bytes: Callable[[int], bytes],
        shape: tuple[int, int, int],
        crop: Crop | None = None,
        *,
        refuse_colour: bool = False,
    ) -> None:
        self.names = names
        self.place = place
        self.shape = shape
        self._open_bytes = open_bytes
        self._crop = crop
        self._refuse_colour = refuse_colour

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return _threads()

    def decode(self, index: int) -> Images:
        """One image [H, W, C]. Raises: `DataError` naming the file when it is damaged or of another size."""
        name = f"{self.names[index]} in {self.place}"
        picture = open_picture(self._open_bytes(index), name)
        if self._refuse_colour and not is_grey(picture):
            raise DataError(f"the image {name} is in colour, but the others are greyscale: convert them to one kind")
        try:
            image = convert(picture, self.shape[2])
            array = to_array(image if self._crop is None else self._crop(image))
        except DataError as error:
            raise DataError(f"cannot use the image {name}: {error}") from error
        if array.shape != self.shape:
            raise DataError(
                f"the image {name} is {array.shape[1]}x{array.shape[0]}, but the others are "
                f"{self.shape[1]}x{self.shape[0]}: give --image-size to crop and resize all of them"
            )
        return array

    def read(self, indices: NDArray[np.integer]) -> Images:
        """The images at `indices`, decoded side by side, in order."""
        indices = np.asarray(indices)
        if self.__dict__.get("_all") is not None:  # decoded already
            return self._all[indices]  # type: ignore[index]
        if not len(indices):
            return np.empty((0, *self.shape), np.uint8)
        return np.stack(list(self._pool.map(self.decode, indices.tolist())))

    def problems(self, start: int, stop: int) -> list[str]:
        """What is wrong with the pictures from `start` to `stop`: a line for each that cannot be used."""

        def problem(index: int) -> str | None:
            try:
                self.decode(index)
            except DataError as error:
                return str(error)
            return None

        return [line for line in self._pool.map(problem, range(start, min(stop, len(self)))) if line is not None]

    @cached_property
    def _all(self) -> Images | None:
        if not fits_in_memory(len(self), self.shape):
            return None
        images = np.empty((len(self), *self.shape), np.uint8)

        def fill(start: int) -> None:
            for index in range(start, min(start + DECODE_TOGETHER, len(images))):
                images[index] = self.decode(index)

        for _ in self._pool.map(fill, range(0, len(images), DECODE_TOGETHER)):
            pass  # takes the results, so that an error in a thread is raised here
        return images

    def array(self) -> Images | None:
        """All images, decoded once and then kept; None above `MEMORY_LIMIT`."""
        return self._all
