"""Data sets that are arrays: the bundled digits and the user's .npz."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabletrain.data.sources import MEMORY_LIMIT
from stabletrain.data.spec import Images, Labels
from stabletrain.errors import DataError
from stabletrain.paths import cache_home

MOST_CLASSES = 100_000
"""A label above this is taken for a mistake (an identifier, a regression target), not for a class."""

HOLD_OUT = 10
"""Without a test split every tenth image of each class is held out for testing."""

NPZ_KEYS = ("train_x", "train_y", "test_x", "test_y", "x", "y", "names")
NPZ_ERRORS = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


@dataclass(frozen=True)
class RawArrays:
    """What a file held: images uint8 [N, H, W, C] and labels, per split; the test split may be empty."""

    train_images: Images
    train_labels: Labels | None
    test_images: Images
    test_labels: Labels | None
    class_names: tuple[str, ...] = ()


def digits() -> RawArrays:
    """scikit-learn's 1,797 handwritten digits at 8x8. Levels 0..16 become 0..255; every fifth of each class is a test.

    Source: the test set of Alpaydin and Kaynak 1998, as shipped in scikit-learn.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    test = every(labels, 5)
    return RawArrays(images[~test], labels[~test], images[test], labels[test], tuple("0123456789"))


def every(labels: NDArray, period: int) -> NDArray[np.bool_]:
    """True for every `period`-th member of each class, in the order given."""
    place = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        place[members] = np.arange(len(members))
    return place % period == period - 1


# --- checks of what a user's array holds ------------------------------------------------------------------------------


def as_images(array: NDArray, what: str, *, signed: bool = False) -> Images:
    """uint8 [N, H, W, C] from [N, H, W] or [N, H, W, C]; not copied when it is that already.

    Integers must lie in 0..255. Floats must lie in [0, 1], or in [-1, 1] with `signed`: two ranges that a split alone
    may not tell apart, so that `float_range` decides over all splits.

    Raises: `DataError` for other shapes and types, values outside, non-finite values, and integers that are only 0
    and 1 (which would be black).
    """
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3) or 0 in array.shape[1:]:
        hint = ""
        if array.ndim == 4 and array.shape[1] in (1, 3):
            hint = "; the channels come last: transpose(0, 2, 3, 1)"
        elif array.ndim == 4 and array.shape[-1] == 4:
            hint = "; leave the transparency out: [..., :3]"
        raise DataError(f"{what} has shape {array.shape}; expected [N, H, W], [N, H, W, 1] or [N, H, W, 3]{hint}")
    if array.dtype.kind not in "iuf" or array.dtype.itemsize > 8:
        raise DataError(f"{what} has type {array.dtype}; expected uint8, or floats in [0, 1] or [-1, 1]")
    if not array.size:
        return np.zeros(array.shape, np.uint8)
    if array.dtype.kind == "f":
        low = -1.0 if signed else 0.0
        _check_floats(array, what, low)
        return np.rint((array - low) * (255 / (1 - low))).astype(np.uint8)
    if array.dtype != np.uint8 and (array.min() < 0 or array.max() > 255):
        raise DataError(f"{what} holds integers from {array.min()} to {array.max()}; expected 0 to 255")
    if _is_binary(array):
        raise DataError(f"{what} holds only the integers 0 and 1, of 255: multiply by 255, or save floats")
    return np.ascontiguousarray(array, dtype=np.uint8)


def _is_binary(array: NDArray) -> bool:
    """True for zeros and ones (not for zeros alone). Looks no further than the first pixel above 1."""
    most = 0
    for start in range(0, len(array), 1024):
        most = max(most, int(array[start : start + 1024].max()))
        if most > 1:
            return False
    return most == 1


def _check_floats(array: NDArray, what: str, low: float) -> None:
    least, most = float(array.min()), float(array.max())
    if not np.isfinite([least, most]).all():
        index = int(np.flatnonzero(~np.isfinite(array).all(axis=(1, 2, 3)))[0])
        raise DataError(f"{what} holds a non-finite value in image {index}")
    if least < low or most > 1:
        raise DataError(
            f"{what} holds numbers from {least:g} to {most:g}; expected uint8, or floats in [0, 1] or [-1, 1]"
        )


def float_range(*arrays: NDArray) -> bool:
    """True when floats are to be read as [-1, 1]: when any split has a negative one."""
    return any(array.dtype.kind == "f" and array.size and float(array.min()) < 0 for array in arrays)


def as_labels(array: NDArray, count: int, what: str) -> Labels:
    """int32 [N] labels from 0. Raises: `DataError` for another count, fractions, negative or absurdly large labels."""
    array = np.asarray(array)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (count,):
        raise DataError(f"{what} has shape {array.shape}, but there are {count} images")
    if array.dtype.kind not in "iuf":
        raise DataError(f"{what} has type {array.dtype}; labels are whole numbers from 0")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and np.array_equal(array, np.rint(array))):
        raise DataError(f"{what} holds fractions or non-finite values; labels are whole numbers from 0")
    if array.size and (array.min() < 0 or array.max() >= MOST_CLASSES):
        index = int(np.argmin(array) if array.min() < 0 else np.argmax(array))
        raise DataError(
            f"{what} holds the label {array[index]} at index {index}; labels are the numbers of classes, from 0"
        )
    return array.astype(np.int32)


# --- .npz -------------------------------------------------------------------------------------------------------------


def read_npz(path: Path) -> RawArrays:
    """The user's .npz: `train_x`, and where there are any `train_y`, `test_x`, `test_y`, `names` (class names).

    Without splits: `x` and `y`. Without test images every tenth image (of each class) is held out for testing; give
    an empty `test_x` to keep all for training. Other keys are ignored. Arrays of uint8 above `MEMORY_LIMIT` are
    mapped, not read. Raises: `DataError` for a damaged file and for anything of the wrong shape or type.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = list(archive)
        arrays = {key: read_member(path, key) for key in NPZ_KEYS if key in keys}
    except NPZ_ERRORS as error:
        raise DataError(f"{path} is not a readable .npz: {error}") from error
    if "x" in arrays and "train_x" not in arrays:
        arrays["train_x"] = arrays["x"]
        if "y" in arrays:
            arrays["train_y"] = arrays["y"]
    if "train_x" not in arrays:
        raise DataError(f"{path} has no train_x; it holds {', '.join(keys) or 'nothing'}")
    signed = float_range(*(arrays[key] for key in ("train_x", "test_x") if key in arrays))
    train = as_images(arrays["train_x"], f"train_x in {path}", signed=signed)
    train_labels = as_labels(arrays["train_y"], len(train), f"train_y in {path}") if "train_y" in arrays else None
    names = _class_names(arrays["names"], path) if "names" in arrays and train_labels is not None else ()
    if "test_x" not in arrays:
        if "test_y" in arrays:
            raise DataError(f"{path} has test_y but no test_x")
        held = every(np.zeros(len(train)) if train_labels is None else train_labels, HOLD_OUT)
        if train_labels is None:
            return RawArrays(train[~held], None, train[held], None)
        return RawArrays(train[~held], train_labels[~held], train[held], train_labels[held], names)
    test = as_images(arrays["test_x"], f"test_x in {path}", signed=signed)
    if test.shape[1:] != train.shape[1:]:
        raise DataError(f"{path}: test_x has images of shape {test.shape[1:]}, train_x of {train.shape[1:]}")
    if ("test_y" in arrays) != (train_labels is not None) and len(test):
        raise DataError(f"{path} has labels for one split only: it needs both train_y and test_y, or neither")
    test_labels = as_labels(arrays["test_y"], len(test), f"test_y in {path}") if "test_y" in arrays else None
    return RawArrays(train, train_labels, test, test_labels, names)


def _class_names(array: NDArray, path: Path) -> tuple[str, ...]:
    if array.ndim != 1 or array.dtype.kind not in "US":
        raise DataError(f"names in {path} has shape {array.shape} and type {array.dtype}; expected a text per class")
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in array.tolist())


def read_member(path: Path, key: str) -> NDArray:
    """One array of an .npz: read, or mapped when it is uint8 and larger than `MEMORY_LIMIT`.

    Raises: one of `NPZ_ERRORS` for a damaged file.
    """
    with zipfile.ZipFile(path) as archive:
        large = archive.getinfo(f"{key}.npy").file_size > MEMORY_LIMIT
    if large:
        return map_member(path, key)
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[key]


def map_member(path: Path, key: str) -> NDArray:
    """One array of an .npz, mapped: read from the disk where it is touched.

    A compressed member is first unpacked into `<cache>/unpacked`, once for its content.

    Raises: `DataError` when the disk has no room for that, one of `NPZ_ERRORS` for a damaged file.
    """
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{key}.npy")
        if member.compress_type == zipfile.ZIP_STORED:
            with archive.open(member) as stream:
                shape, fortran, dtype = _npy_header(stream)
                header = stream.tell()
            return np.memmap(path, dtype, "r", _start_of(path, member) + header, shape, order="F" if fortran else "C")
        target = cache_home() / "unpacked" / f"{path.stem}-{key}-{member.CRC:08x}-{member.file_size}.npy"
        if not target.exists():
            _unpack(archive, member, target)
    return np.load(target, mmap_mode="r")


def _npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _start_of(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: behind its local header, whose name and extra field vary in length."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        name, extra = struct.unpack("<HH", file.read(30)[26:])
    return member.header_offset + 30 + name + extra


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(target.parent).free < member.file_size:
        raise DataError(
            f"{archive.filename} is compressed, and unpacking it takes {member.file_size / 2**30:.1f} GiB in "
            f"{target.parent}, which has not that much room: set STABLETRAIN_HOME to a larger disk"
        )
    handle, partial = tempfile.mkstemp(dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as out, archive.open(member) as stream:
            shutil.copyfileobj(stream, out, 1 << 20)
        Path(partial).replace(target)
    finally:
        Path(partial).unlink(missing_ok=True)
