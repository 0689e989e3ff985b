"""The serialised examples of TFDS (tf.train.Example), taken apart without TensorFlow and without importing TFDS.

Source: the encoding page of the Protocol Buffers documentation, and TensorFlow's example.proto and feature.proto.
"""

from __future__ import annotations

from collections.abc import Iterator

from stabletrain.errors import DataError

VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5  # wire types


def parse(record: bytes, wanted: tuple[str, ...]) -> dict[str, list[bytes] | list[int]]:
    """The values of the `wanted` features that the example has: bytes, or 64-bit integers.

    Raises: `DataError` for what is no example.
    """
    values: dict[str, list[bytes] | list[int]] = {}
    try:
        for features in _messages(memoryview(record), 1):
            for entry in _messages(features, 1):
                name = b"".join(_messages(entry, 1)).decode()
                if name in wanted:
                    for feature in _messages(entry, 2):
                        values[name] = _values(feature)
    except (IndexError, ValueError) as error:
        raise DataError(f"a prepared example is damaged: {error}") from error
    return values


def _values(feature: memoryview) -> list[bytes] | list[int]:
    """The values of a BytesList (field 1 of a Feature) or an Int64List (field 3)."""
    for number, value in _fields(feature):
        if number == 1 and isinstance(value, memoryview):
            return [bytes(item) for item in _messages(value, 1)]
        if number == 3 and isinstance(value, memoryview):
            integers: list[int] = []
            for _, item in _fields(value):
                integers += [item] if isinstance(item, int) else _packed(item)
            return [item - (1 << 64) if item >> 63 else item for item in integers]
    return []


def _messages(data: memoryview, number: int) -> Iterator[memoryview]:
    """What the fields of this number hold."""
    for found, value in _fields(data):
        if found == number and isinstance(value, memoryview):
            yield value


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Number and value of each field; fields of fixed width are passed over."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
        elif kind == BYTES:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("it ends within a field")
            yield key >> 3, data[at : at + length]
            at += length
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            at += 8 if kind == EIGHT_BYTES else 4
        else:
            raise ValueError(f"there is no wire type {kind}")


def _packed(data: memoryview) -> list[int]:
    at, values = 0, []
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """An integer in groups of seven bits, the lowest first, and where the next field begins."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number has more than 64 bits")
