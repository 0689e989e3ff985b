"""Prepared TensorFlow Datasets, read without TensorFlow; preparing them where TensorFlow and a network are there."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from stabletrain.data import tf_example
from stabletrain.data.catalogue import DatasetInfo
from stabletrain.data.spec import Labels
from stabletrain.errors import DataError
from stabletrain.paths import cache_home

PROBE_HOST = ("storage.googleapis.com", 443)
PROBE_SECONDS = 1.0

REMEMBERED_LABELS = 100_000
"""Labels of splits larger than this are kept in the cache: reading them again means reading the whole split."""


def data_dir() -> Path:
    """`$TFDS_DATA_DIR`, else `~/tensorflow_datasets`."""
    return Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets").expanduser()


def prepared(info: DatasetInfo) -> Path | None:
    """The newest prepared version of this set, or None."""
    if info.tfds_name is None:
        return None
    versions = [path.parent for path in (data_dir() / info.tfds_name).glob("*.*.*/dataset_info.json")]
    return max(versions, key=_version, default=None)


def _version(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) if part.isdecimal() else -1 for part in folder.name.split("."))


# --- records ----------------------------------------------------------------------------------------------------------


class Records(Protocol):
    """Serialised examples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes: ...


class TfRecords:
    """TFRecord files by index: each record is a length (8 bytes), its checksum (4), the data, and their checksum (4).

    The places of the records are found by walking over the lengths once. Raises: `DataError` for a file that ends
    within a record.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._maps: list[mmap.mmap] = []
        places: list[tuple[int, int, int]] = []  # (file, start, length)
        for path in paths:
            if not path.stat().st_size:  # nothing can be mapped, and an empty shard is what TFDS makes of few examples
                continue
            with path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            number, at = len(self._maps), 0
            self._maps.append(content)
            while at < len(content):
                length = struct.unpack("<Q", content[at : at + 8])[0] if at + 12 <= len(content) else 1 << 62
                if at + 16 + length > len(content):
                    raise DataError(f"{path} is damaged: it ends within record {len(places)}")
                places.append((number, at + 12, length))
                at += 16 + length
        self._places = np.array(places, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> bytes:
        file, start, length = self._places[index].tolist()
        return self._maps[file][start : start + length]


def _array_records(paths: Sequence[Path]) -> Records:
    try:
        from array_record.python.array_record_data_source import ArrayRecordDataSource
    except ImportError as error:
        raise DataError(f"{paths[0].parent} needs the package array_record, which is not installed") from error
    return ArrayRecordDataSource([str(path) for path in paths])


FORMATS: dict[str, Callable[[Sequence[Path]], Records]] = {"tfrecord": TfRecords, "array_record": _array_records}


@dataclass(frozen=True)
class PreparedSplit:
    """The examples of one prepared split: encoded images by index, and labels."""

    folder: Path
    name: str
    records: Records
    labels: Labels | None

    def image_bytes(self, index: int) -> bytes:
        """The encoded image of an example. Raises: `DataError` for an example without one."""
        image = tf_example.parse(self.records[index], ("image",)).get("image", [])
        if len(image) != 1 or not isinstance(image[0], bytes):
            raise DataError(f"example {index} of {self.folder} ({self.name}) has no image")
        return image[0]


def read_prepared(info: DatasetInfo, folder: Path) -> tuple[PreparedSplit, PreparedSplit]:
    """The train and test splits of a prepared set, in either of TFDS's usual formats.

    Raises: `DataError` for another format, for missing shards, and when a shard does not hold what was prepared.
    """
    description = folder / "dataset_info.json"
    try:
        content = description.read_bytes()
        stated = json.loads(content)
        file_format = stated.get("fileFormat", "tfrecord")
        lengths = {split["name"]: [int(n) for n in split["shardLengths"]] for split in stated["splits"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{description} is not the description of a prepared data set: {error}") from error
    if file_format not in FORMATS:
        raise DataError(f"{folder} is in the format {file_format!r}; {' and '.join(FORMATS)} can be read")
    splits = []
    for split in info.tfds_splits:
        if split not in lengths:
            raise DataError(f"{folder} has no split {split!r}; it has {', '.join(sorted(lengths)) or 'none'}")
        shards = len(lengths[split])
        stem = f"-{split}.{file_format}-"
        paths = sorted(folder.glob(f"*{stem}*-of-{shards:05d}"))
        if len(paths) != shards:
            raise DataError(f"{folder} lacks {shards - len(paths)} of the {shards} shards of the split {split!r}")
        records = FORMATS[file_format](paths)
        if len(records) != sum(lengths[split]):
            raise DataError(f"{folder}: {split!r} has {len(records)} examples; {sum(lengths[split])} were prepared")
        labels = _labels(info, split, records, content) if info.tfds_label else None
        splits.append(PreparedSplit(folder, split, records, labels))
    return splits[0], splits[1]


def _labels(info: DatasetInfo, split: str, records: Records, description: bytes) -> Labels:
    """Every example's label; of large splits remembered under the hash of the set's description."""
    kept = cache_home() / "labels" / f"{info.name}-{split}-{hashlib.sha256(description).hexdigest()[:16]}.npy"
    large = len(records) > REMEMBERED_LABELS
    if large and kept.is_file():
        return np.load(kept)
    key = info.tfds_label or ""
    labels: Labels = np.empty(len(records), np.int32)
    for index in range(len(records)):
        value = tf_example.parse(records[index], (key,)).get(key, [])
        if len(value) != 1 or not isinstance(value[0], int) or not 0 <= value[0] < info.num_classes:
            raise DataError(
                f"example {index} of the prepared {info.name} ({split}) has no {key} from 0 to {info.num_classes - 1}"
            )
        labels[index] = value[0]
    if large:
        partial = kept.with_suffix(f".{os.getpid()}.npy")
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            np.save(partial, labels)
            partial.replace(kept)
        except OSError as error:
            raise DataError(f"cannot write {kept}: {error.strerror}; set STABLETRAIN_HOME to another folder") from error
    return labels


# --- preparing --------------------------------------------------------------------------------------------------------


def online() -> bool:
    """True when the data sets' host answers within a second. (TFDS itself would try for minutes.)"""
    answers: list[bool] = []

    def probe() -> None:
        with contextlib.suppress(OSError), socket.create_connection(PROBE_HOST, timeout=PROBE_SECONDS):
            answers.append(True)

    # In a thread, because looking up the host's name has no time limit of its own.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return bool(answers)


def can_prepare() -> bool:
    """True when TensorFlow is installed (the extra `tfds`)."""
    return importlib.util.find_spec("tensorflow") is not None


def prepare(info: DatasetInfo) -> Path:
    """Downloads and prepares a set in array_record format below `data_dir()`; returns its folder.

    Raises: `DataError` without TensorFlow, without a network (within about a second), and with TFDS's own reason when
    it fails: some sets have files that must be fetched by hand.
    """
    if info.tfds_name is None or not can_prepare():
        raise DataError(f"preparing {info.name} needs TensorFlow: pip install 'stabletrain[tfds]'")
    if not online():
        raise DataError(f"cannot prepare {info.name}: {PROBE_HOST[0]} does not answer")
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(info.tfds_name, data_dir=data_dir(), file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:  # TFDS lets through whatever its downloads, parsers and TensorFlow raise
        reason = " ".join(str(error).split())
        raise DataError(f"TFDS could not prepare {info.tfds_name}: {reason or type(error).__name__}") from error
    return Path(builder.data_dir)
