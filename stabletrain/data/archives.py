"""The published formats of named sets: CIFAR's pickles, MNIST's idx files, the batches of the downsampled ImageNet."""

from __future__ import annotations

import gzip
import io
import pickle
import re
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabletrain.data.arrays import NPZ_ERRORS, RawArrays, as_images, as_labels, map_member, read_member
from stabletrain.data.sources import RowSource
from stabletrain.data.spec import Images, Labels, Split
from stabletrain.data.stores import Store, base_name
from stabletrain.errors import DataError

# --- CIFAR ------------------------------------------------------------------------------------------------------------

CIFAR_MEMBER = re.compile(r"data_batch_\d+|test_batch|batches\.meta|train|test|meta")
LARGEST_MEMBER = 256 << 20  # the largest of the published ones has 155 MB


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
        raise DataError(f"it asks for {module}.{name}, which a data file has no need of: refused")


def tar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of a tar's CIFAR batches, gzipped or not, in one pass.

    Raises: `DataError` for a damaged or truncated archive.
    """
    try:
        with path.open("rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
        with tarfile.open(path, "r:gz") if gzipped else tarfile.open(path, "r:") as archive:
            for member in archive:
                name = base_name(member.name)
                if member.isfile() and CIFAR_MEMBER.fullmatch(name) and member.size <= LARGEST_MEMBER:
                    stream = archive.extractfile(member)
                    assert stream is not None  # only for what is no file
                    yield name, stream.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or not complete: {error}") from error


def store_members(store: Store) -> Iterator[tuple[str, bytes]]:
    """The same of an unpacked CIFAR archive."""
    for path, size in store.sizes.items():
        name = base_name(path)
        if CIFAR_MEMBER.fullmatch(name) and size <= LARGEST_MEMBER:
            yield name, store.open_bytes(path)


def read_cifar(members: Iterable[tuple[str, bytes]], path: Path) -> RawArrays:
    """CIFAR-10 or CIFAR-100 (fine labels), the Python version, from its batches.

    Raises: `DataError` for damaged batches, and when train or test batches are missing.
    """
    train: list[tuple[str, Mapping[Any, Any]]] = []
    test: list[Mapping[Any, Any]] = []
    names: tuple[str, ...] = ()
    for name, content in members:
        batch = _unpickled(content, name, path)
        if name.endswith("meta"):
            found = batch.get(b"fine_label_names") or batch.get(b"label_names") or []
            names = tuple(item.decode() for item in found)
        elif name.startswith("test"):
            test.append(batch)
        else:
            train.append((name, batch))
    if not train or not test:
        raise DataError(f"{path} holds no CIFAR train and test batches: is it the Python version of the archive?")
    train_images, train_labels = _cifar_batches([batch for _, batch in sorted(train, key=lambda pair: pair[0])], path)
    test_images, test_labels = _cifar_batches(test, path)
    return RawArrays(train_images, train_labels, test_images, test_labels, names)


def _unpickled(content: bytes, name: str, path: Path) -> Mapping[Any, Any]:
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{name} in {path} is no CIFAR batch: {error}") from error
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise DataError(f"{name} in {path} is damaged: {error}") from error
    if not isinstance(batch, Mapping):
        raise DataError(f"{name} in {path} is no CIFAR batch but a {type(batch).__name__}")
    return batch


def _cifar_batches(batches: list[Mapping[Any, Any]], path: Path) -> tuple[Images, Labels]:
    pixels, labels = [], []
    for batch in batches:
        rows, classes = batch.get(b"data"), batch.get(b"fine_labels", batch.get(b"labels"))
        if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != 3072 or classes is None:
            raise DataError(f"{path} has a batch without rows of 3072 pixels and labels: it is not CIFAR")
        pixels.append(rows.astype(np.uint8, copy=False))
        labels.append(as_labels(np.asarray(classes), len(rows), f"the labels of a batch in {path}"))
    images = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # colour planes -> [N, H, W, C]
    return np.ascontiguousarray(images), np.concatenate(labels)


# --- idx --------------------------------------------------------------------------------------------------------------

IDX_NAME = re.compile(r"(?P<set>.*?)(?P<split>train|t10k|test)-(?P<kind>images|labels)[-.]idx\d-ubyte(\.gz)?")


def parse_idx(content: bytes, name: str) -> NDArray[np.uint8]:
    """The array of one idx file of unsigned bytes, gzipped or not. Source: the format note of LeCun's MNIST page.

    Raises: `DataError` for a damaged file, or one that ends early.
    """
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        zeros, kind, dimensions = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"{name} is not a readable idx file: {error}") from error
    body = content[4 + 4 * dimensions :]
    if zeros != 0 or kind != 8 or len(body) != int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{name} is not a complete idx file of bytes: {len(body)} bytes of data for shape {shape}")
    return np.frombuffer(body, np.uint8).reshape(shape)


def read_idx(store: Store, wanted: str = "") -> RawArrays:
    """The four idx files of an MNIST-like set, by their usual names, gzipped or not.

    EMNIST's files (`emnist-<set>-...`) hold their images transposed, and are set upright. `wanted` chooses among
    several sets in one place ("emnist-balanced-").

    Raises: `DataError` naming the file that is missing or damaged, and when several sets lie there.
    """
    found: dict[str, dict[tuple[str, str], str]] = {}
    for path in store.sizes:
        match = IDX_NAME.fullmatch(base_name(path))
        if match:
            split = "train" if match["split"] == "train" else "test"
            found.setdefault(match["set"], {})[split, match["kind"]] = path
    sets = [name for name in found if name == wanted] if wanted in found else list(found)
    if len(sets) != 1:
        raise DataError(f"{store.place} holds several sets of idx files ({', '.join(sorted(sets))}): keep one of them")
    files = found[sets[0]]
    images: dict[str, Images] = {}
    labels: dict[str, Labels] = {}
    for split in ("train", "test"):
        for kind in ("images", "labels"):
            if (split, kind) not in files:
                raise DataError(f"{store.place} has no idx file with the {split} {kind}, only {sorted(files.values())}")
        pixels, classes = (parse_idx(store.open_bytes(files[split, k]), files[split, k]) for k in ("images", "labels"))
        if pixels.ndim != 3:
            raise DataError(f"{files[split, 'images']} holds no images: its shape is {pixels.shape}")
        if sets[0].startswith("emnist"):
            pixels = pixels.transpose(0, 2, 1)
        images[split] = as_images(pixels, files[split, "images"])
        labels[split] = as_labels(classes, len(pixels), files[split, "labels"])
    return RawArrays(images["train"], labels["train"], images["test"], labels["test"])


# --- downsampled ImageNet ---------------------------------------------------------------------------------------------

IMAGENET_BATCH = re.compile(r"train_data_batch_(\d+)\.npz")


def read_downsampled_imagenet(store: Store) -> tuple[Split, Split]:
    """`train_data_batch_1..10.npz` and `val_data.npz` of the downsampled ImageNet, its pixels mapped.

    Labels there count from 1. Source: Chrabaszcz et al. 2017. Raises: `DataError` for missing or damaged files.
    """
    if not store.place.is_dir():
        raise DataError(f"unpack {store.place}: its batches are read from the disk, image by image")
    paths = {base_name(name): store.place / name for name in store.sizes}
    batches = sorted((int(match[1]), paths[name]) for name in paths if (match := IMAGENET_BATCH.fullmatch(name)))
    missing = sorted(set(range(1, 11)) - {number for number, _ in batches})
    if missing or "val_data.npz" not in paths:
        absent = [f"train_data_batch_{number}.npz" for number in missing]
        absent += [] if "val_data.npz" in paths else ["val_data.npz"]
        raise DataError(f"{store.place} lacks {', '.join(absent)}")
    train = [_imagenet_batch(path) for _, path in batches]
    return _as_split(train, store.place), _as_split([_imagenet_batch(paths["val_data.npz"])], store.place)


def _imagenet_batch(path: Path) -> tuple[NDArray[np.uint8], Labels]:
    try:
        pixels, labels = map_member(path, "data"), read_member(path, "labels")
    except NPZ_ERRORS as error:
        raise DataError(f"{path} is not a batch of the downsampled ImageNet: {error}") from error
    if pixels.ndim != 2 or pixels.dtype != np.uint8 or labels.dtype.kind not in "iu":
        raise DataError(f"{path} is not a batch of the downsampled ImageNet: its data have shape {pixels.shape}")
    return pixels, as_labels(labels.astype(np.int64) - 1, len(pixels), f"labels, less 1, in {path}")


def _as_split(batches: list[tuple[NDArray[np.uint8], Labels]], place: Path) -> Split:
    widths = {pixels.shape[1] for pixels, _ in batches}
    size = round((min(widths) / 3) ** 0.5)
    if len(widths) > 1 or 3 * size * size != min(widths):
        raise DataError(f"{place} has batches with rows of {sorted(widths)} bytes: not square images of one size")
    return Split(RowSource([pixels for pixels, _ in batches], size), np.concatenate([labels for _, labels in batches]))
