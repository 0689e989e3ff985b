"""Data sets that are arrays: the bundled digits, the user's .npz, the official CIFAR and idx archives."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabletrain.data.spec import Images, Labels
from stabletrain.errors import DataError


@dataclass(frozen=True)
class RawArrays:
    """What a file held: images uint8 [N, H, W, C] and labels, per split; the test split may be empty."""

    train_images: Images
    train_labels: Labels | None
    test_images: Images
    test_labels: Labels | None
    class_names: tuple[str, ...] = ()


def digits() -> RawArrays:
    """scikit-learn's 1,797 handwritten digits at 8x8. Levels 0..16 become 0..255; a fifth of each class is for testing.

    Source: the test set of Alpaydin and Kaynak 1998, as shipped in scikit-learn.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    test = _every(labels, 5)
    return RawArrays(images[~test], labels[~test], images[test], labels[test], tuple("0123456789"))


def as_images(array: NDArray, what: str) -> Images:
    """uint8 [N, H, W, C] from [N, H, W] or [N, H, W, C]. Floats must lie in [0, 1] or in [-1, 1].

    Raises: `DataError` for other shapes and types, for values outside, for non-finite values.
    """
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise DataError(f"{what} has shape {array.shape}; expected [N, H, W], [N, H, W, 1] or [N, H, W, 3]")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind == "f" and array.size:
        low, high = float(array.min()), float(array.max())
        if not np.isfinite([low, high]).all():
            raise DataError(f"{what} holds non-finite values")
        if low >= 0 and high <= 1:
            return np.rint(array * 255).astype(np.uint8)
        if low >= -1 and high <= 1:
            return np.rint((array + 1) * 127.5).astype(np.uint8)
        raise DataError(
            f"{what} holds numbers from {low:g} to {high:g}; expected uint8, or floats in [0, 1] or [-1, 1]"
        )
    if array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() <= 255:
        return array.astype(np.uint8)
    raise DataError(f"{what} has type {array.dtype}; expected uint8, or floats in [0, 1] or [-1, 1]")


def as_labels(array: NDArray, count: int, what: str) -> Labels:
    """int32 [N] labels from 0. Raises: `DataError` for another count, fractions, or negative labels."""
    array = np.asarray(array)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (count,):
        raise DataError(f"{what} has shape {array.shape}, but there are {count} images")
    if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
        raise DataError(f"{what} holds fractions; labels are whole numbers from 0")
    if array.dtype.kind not in "iuf":
        raise DataError(f"{what} has type {array.dtype}; labels are whole numbers from 0")
    if array.size and array.min() < 0:
        index = int(np.argmin(array))
        raise DataError(f"{what} holds the label {array[index]} at index {index}; labels are whole numbers from 0")
    return array.astype(np.int32)


NPZ_KEYS = ("train_x", "train_y", "test_x", "test_y", "x", "y", "names")


def _every(labels: NDArray, period: int) -> NDArray[np.bool_]:
    """True for every `period`-th member of each class, in the order of the file."""
    place = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        place[members] = np.arange(len(members))
    return place % period == period - 1


def _with_hold_out(arrays: dict[str, NDArray], path: Path) -> dict[str, NDArray]:
    images = arrays["x"]
    labels = as_labels(arrays["y"], len(images), f"y in {path}") if "y" in arrays else None
    test = _every(np.zeros(len(images)) if labels is None else labels, 10)
    split = {"train_x": images[~test], "test_x": images[test], **{k: arrays[k] for k in ("names",) if k in arrays}}
    return split if labels is None else {**split, "train_y": labels[~test], "test_y": labels[test]}


def read_npz(path: Path) -> RawArrays:
    """The user's .npz: `train_x`, and where there are any `train_y`, `test_x`, `test_y`, `names` (class names).

    Without splits: `x` and `y`, of which every tenth image (of each class) is held out for testing. Other keys are
    ignored. Raises: `DataError` for a damaged file and for anything of the wrong shape or type.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = list(archive)
            arrays = {key: archive[key] for key in NPZ_KEYS if key in keys}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path} is not a readable .npz: {error}") from error
    if "x" in arrays and "train_x" not in arrays:
        arrays = _with_hold_out(arrays, path)
    if "train_x" not in arrays:
        raise DataError(f"{path} has no train_x; it holds {', '.join(keys) or 'nothing'}")
    train = as_images(arrays["train_x"], f"train_x in {path}")
    test = as_images(arrays["test_x"], f"test_x in {path}") if "test_x" in arrays else train[:0]
    if test.shape[1:] != train.shape[1:]:
        raise DataError(f"{path}: test_x has images of {test.shape[1:]}, train_x of {train.shape[1:]}")
    names = tuple(str(name) for name in arrays["names"]) if "names" in arrays else ()
    labels = {
        split: as_labels(arrays[f"{split}_y"], len(images), f"{split}_y in {path}") if f"{split}_y" in arrays else None
        for split, images in (("train", train), ("test", test))
    }
    return RawArrays(train, labels["train"], test, labels["test"], names)


class _ArraysOnly(pickle.Unpickler):
    """Reads the pickles of the CIFAR archives; refuses everything that is not plain data or a NumPy array."""

    allowed = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.allowed:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise DataError(f"the archive asks for {module}.{name}, which a data file has no need of: refused")


def read_cifar(path: Path) -> RawArrays:
    """cifar-10-python.tar.gz or cifar-100-python.tar.gz (fine labels), read in place.

    Raises: `DataError` for a damaged or incomplete archive.
    """
    train: list[Mapping[bytes, Any]] = []
    test: list[Mapping[bytes, Any]] = []
    names: tuple[str, ...] = ()
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is None or name.endswith((".html", ".txt")):
                    continue
                content = _ArraysOnly(io.BytesIO(stream.read()), encoding="bytes").load()
                if name.endswith(".meta") or name == "meta":
                    found = content.get(b"fine_label_names") or content.get(b"label_names") or []
                    names = tuple(item.decode() for item in found)
                elif name.startswith("data_batch") or name == "train":
                    train.append({**content, b"file": name})
                elif name in ("test_batch", "test"):
                    test.append(content)
    except (tarfile.TarError, OSError, EOFError, zlib.error, pickle.UnpicklingError, ValueError) as error:
        raise DataError(f"{path} is not a complete CIFAR archive: {error}") from error
    if not train or not test:
        raise DataError(f"{path} holds no train and test batches: is it the Python version of the archive?")
    train.sort(key=lambda batch: batch[b"file"])
    train_images, train_labels = _cifar_batches(train)
    test_images, test_labels = _cifar_batches(test)
    return RawArrays(train_images, train_labels, test_images, test_labels, names)


def _cifar_batches(batches: list[Mapping[bytes, Any]]) -> tuple[Images, Labels]:
    pixels = np.concatenate([np.asarray(batch[b"data"], np.uint8) for batch in batches])
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # channel-major rows -> [N, H, W, C]
    labels = np.concatenate([batch.get(b"fine_labels", batch.get(b"labels")) for batch in batches])
    return np.ascontiguousarray(images), as_labels(labels, len(images), "labels of the archive")


def read_idx(path: Path) -> NDArray[np.uint8]:
    """One idx file of unsigned bytes, gzipped or not. Source: the format note of LeCun's MNIST page.

    Raises: `DataError` for a damaged file, or one that ends early.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        zeros, kind, dimensions = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"{path} is not a readable idx file: {error}") from error
    body = content[4 + 4 * dimensions :]
    if zeros != 0 or kind != 8 or len(body) != int(np.prod(shape)):
        raise DataError(f"{path} is not a complete idx file of bytes: {len(body)} bytes of data for shape {shape}")
    return np.frombuffer(body, np.uint8).reshape(shape)


def read_idx_folder(folder: Path, transpose: bool) -> RawArrays:
    """The four idx files of an MNIST-like set, by their usual names, gzipped or not.

    Raises: `DataError` naming the file that is missing.
    """

    def find(split: str, kind: str) -> Path:
        spellings = ("train",) if split == "train" else ("t10k", "test")
        for path in sorted(folder.iterdir()):
            if kind in path.name and any(f"{s}-{kind}" in path.name for s in spellings) and "ubyte" in path.name:
                return path
        raise DataError(f"{folder} has no {spellings[0]}-{kind}-idx*-ubyte(.gz)")

    parts = {}
    for split in ("train", "test"):
        images = read_idx(find(split, "images"))
        if images.ndim != 3:
            raise DataError(f"{find(split, 'images')} holds no images: its shape is {images.shape}")
        if transpose:
            images = images.transpose(0, 2, 1)
        labels = read_idx(find(split, "labels"))
        parts[split] = (
            as_images(images, f"{split} images"),
            as_labels(labels, len(images), f"{split} labels in {folder}"),
        )
    return RawArrays(*parts["train"], *parts["test"])


def read_downsampled_imagenet(folder: Path) -> RawArrays:
    """`train_data_batch_1..10(.npz)` and `val_data(.npz)` of the downsampled ImageNet (Chrabaszcz et al. 2017).

    Labels there count from 1. Raises: `DataError` for missing or damaged files.
    """

    def load(path: Path) -> tuple[Images, Labels]:
        try:
            with np.load(path, allow_pickle=False) as batch:
                pixels, labels = batch["data"], batch["labels"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path} is not a batch of the downsampled ImageNet: {error}") from error
        size = round((pixels.shape[1] // 3) ** 0.5)
        images = pixels.reshape(-1, 3, size, size).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images), as_labels(labels.astype(np.int64) - 1, len(images), f"labels in {path}")

    batches = sorted(folder.glob("train_data_batch_*.npz"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))
    if not batches or not (folder / "val_data.npz").is_file():
        raise DataError(f"{folder} needs train_data_batch_1.npz ... and val_data.npz")
    train = [load(path) for path in batches]
    images = np.concatenate([images for images, _ in train])
    labels = np.concatenate([labels for _, labels in train])
    return RawArrays(images, labels, *load(folder / "val_data.npz"))
