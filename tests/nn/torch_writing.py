"""Writes what `torch.save` writes, byte by byte and without torch, for the tests of reading it."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

STORAGE_OF = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "complex64": "ComplexFloatStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
EMPTY_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def numbers(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(number(value) for value in values) + b"t"


def tensor(
    key: str,
    storage: str,
    count: int,
    shape: Iterable[int],
    strides: Iterable[int],
    offset: int = 0,
    legacy: bool = False,
    view: tuple[str, int, int] | None = None,
) -> bytes:
    """The instructions for one tensor on a storage of `count` values."""
    last = (
        b"" if not legacy else b"N" if view is None else b"(" + text(view[0]) + number(view[1]) + number(view[2]) + b"t"
    )
    identity = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu") + number(count)
    rest = number(offset) + numbers(shape) + numbers(strides) + b"\x89" + EMPTY_ORDERED_DICT
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + identity + last + b"tQ" + rest + b"tR"


def whole(key: str, array: np.ndarray, legacy: bool = False) -> bytes:
    """The instructions for a contiguous tensor that is all of its storage."""
    strides = [stride // array.itemsize for stride in np.empty(array.shape, array.dtype).strides]
    return tensor(key, STORAGE_OF[array.dtype.name], array.size, array.shape, strides, legacy=legacy)


def mapping(items: Mapping[str, bytes]) -> bytes:
    """An OrderedDict with an attribute, as a state dict is."""
    pairs = b"".join(text(name) + value for name, value in items.items())
    attributes = b"}" + text("_metadata") + EMPTY_ORDERED_DICT + b"s"
    return EMPTY_ORDERED_DICT + b"(" + pairs + b"u" + attributes + b"b"


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def write_zip(
    path: Path, body: bytes, storages: Mapping[str, bytes], order: str | None = "little", **records: bytes
) -> Path:
    """The layout since PyTorch 1.6."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program(body))
        if order is not None:
            archive.writestr("archive/byteorder", order)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return path


def write_legacy(path: Path, body: bytes, storages: Mapping[str, tuple[int, bytes]]) -> Path:
    """The layout of before PyTorch 1.6; a storage is given with its number of values."""

    def dumped(value: Any) -> bytes:
        return pickle.dumps(value, protocol=2)

    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [dumped(0x1950A86A20F9469CFC6C), dumped(1001), dumped(system), program(body), dumped(sorted(storages))]
    for key in sorted(storages):
        count, data = storages[key]
        parts += [struct.pack("<q", count), data]
    path.write_bytes(b"".join(parts))
    return path


def save_zip(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """A state dict of contiguous tensors, each on its own storage."""
    body = mapping({name: whole(str(i), array) for i, (name, array) in enumerate(arrays.items())})
    return write_zip(path, body, {str(i): array.tobytes() for i, array in enumerate(arrays.values())})


def save_legacy(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """The same in the older layout."""
    body = mapping({name: whole(str(i), array, legacy=True) for i, (name, array) in enumerate(arrays.items())})
    return write_legacy(path, body, {str(i): (array.size, array.tobytes()) for i, array in enumerate(arrays.values())})
