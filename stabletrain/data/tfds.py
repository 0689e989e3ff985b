"""Prepared TensorFlow Datasets, read without TensorFlow; preparing them where TensorFlow and a network are there."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.data.catalogue import DatasetInfo
from stabletrain.data.spec import Images
from stabletrain.errors import DataError

PROBE_HOST = ("storage.googleapis.com", 443)
PROBE_SECONDS = 1.0


def data_dir() -> Path:
    """`$TFDS_DATA_DIR`, else `~/tensorflow_datasets`."""
    return Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets").expanduser()


def prepared(info: DatasetInfo) -> Path | None:
    """The newest prepared version of this set in array_record format, or None."""
    if info.tfds_name is None:
        return None
    name, _, config = info.tfds_name.partition("/")
    versions = sorted((data_dir() / name / config).glob("*.*.*/dataset_info.json"))
    return versions[-1].parent if versions else None


class RecordSource:
    """Images of a prepared set, by index. `crop` makes each picture square and of the wanted size."""

    def __init__(self, records: Any, shape: tuple[int, int, int], crop: Any) -> None:
        self._records = records
        self.shape = shape
        self._crop = crop

    def __len__(self) -> int:
        return len(self._records)

    def decode(self, index: int) -> Images:
        """One image [H, W, C]. Raises: `DataError` when its size is another."""
        from PIL import Image

        array = np.asarray(self._records[index]["image"], np.uint8)
        if self._crop is not None:
            picture = self._crop(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array))
            array = np.asarray(picture, np.uint8).reshape(self.shape)
        if array.shape != self.shape:
            raise DataError(f"image {index} of the prepared set is {array.shape}, expected {self.shape}")
        return array

    def read(self, indices: np.ndarray) -> Images:
        """The images at `indices`."""
        return np.stack([self.decode(int(index)) for index in np.asarray(indices)])

    def array(self) -> Images | None:
        """All images, or None above the limit of memory."""
        from stabletrain.data.sources import MEMORY_LIMIT

        if len(self) * int(np.prod(self.shape)) > MEMORY_LIMIT:
            return None
        return self.read(np.arange(len(self)))


def read_prepared(info: DatasetInfo, folder: Path) -> dict[str, Any]:
    """Split name -> random-access records of a prepared set.

    Raises: `DataError` when the set was prepared in a format that only TensorFlow reads, saying how to prepare it.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
        return {split: builder.as_data_source(split=split) for split in info.tfds_splits if split}
    except NotImplementedError as error:
        raise DataError(
            f"{folder} is not in array_record format, which is what can be read without TensorFlow; "
            f"prepare it again: stabletrain data prepare {info.name}"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} is not a readable prepared data set: {error}") from error


def online() -> bool:
    """True when the data sets' host answers within a second. (TFDS itself would try for minutes.)"""
    with contextlib.suppress(OSError), socket.create_connection(PROBE_HOST, timeout=PROBE_SECONDS):
        return True
    return False


def can_prepare() -> bool:
    """True when TensorFlow is installed (the extra `tfds`)."""
    return importlib.util.find_spec("tensorflow") is not None


def prepare(info: DatasetInfo) -> Path:
    """Downloads and prepares a set in array_record format; returns its folder.

    Raises: `DataError` without a TFDS name, without TensorFlow, or without a network, within about a second.
    """
    if info.tfds_name is None:
        raise DataError(f"{info.name} cannot be prepared with TFDS; give its files with --data")
    if not can_prepare():
        raise DataError(f"preparing {info.name} needs TensorFlow: pip install 'stabletrain[tfds]'")
    if not online():
        raise DataError(f"cannot prepare {info.name}: {PROBE_HOST[0]} does not answer")
    import tensorflow_datasets as tfds

    builder = tfds.builder(info.tfds_name, data_dir=data_dir(), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)
