"""Data sets that are files: an image folder or a zip of one (read in place), Tiny-ImageNet's and CUB's layouts."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Protocol

from stabletrain.errors import DataError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
HOLD_OUT = 10
"""Without a test folder, about one file in ten is held out for testing, chosen by the hash of its name."""


class Store(Protocol):
    """A tree of files: a folder, or the inside of a zip."""

    @property
    def place(self) -> Path:
        """The folder or the archive."""

    @property
    def sizes(self) -> dict[str, int]:
        """Relative name (with forward slashes) -> size in bytes, of every file."""

    def open_bytes(self, name: str) -> bytes:
        """The content of a file. Raises: `DataError` when it cannot be read."""


@dataclass(frozen=True)
class FolderStore:
    """A folder on disk."""

    place: Path

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Every file below the folder, hidden ones left out."""
        files = (path for path in self.place.rglob("*") if path.is_file())
        names = {path.relative_to(self.place).as_posix(): path.stat().st_size for path in files}
        return {name: size for name, size in sorted(names.items()) if not _hidden(name)}

    def open_bytes(self, name: str) -> bytes:
        """Reads the file."""
        try:
            return (self.place / name).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {self.place / name}: {error.strerror}") from error


class ZipStore:
    """A zip archive, read in place. Reading is serialised: a zip file has one position."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._lock = Lock()
        try:
            self._archive = zipfile.ZipFile(place)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{place} is not a readable zip archive: {error}") from error

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Every file in the archive; a single enclosing folder is part of the names."""
        entries = {entry.filename: entry.file_size for entry in self._archive.infolist() if not entry.is_dir()}
        return {name: size for name, size in sorted(entries.items()) if not _hidden(name)}

    def open_bytes(self, name: str) -> bytes:
        """Reads and checks (CRC) the file."""
        try:
            with self._lock:
                return self._archive.read(name)
        except (KeyError, zipfile.BadZipFile, OSError, EOFError) as error:
            raise DataError(f"cannot read {name} in {self.place}: {error}") from error


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def open_store(path: Path) -> Store:
    """The folder or zip at `path`."""
    return FolderStore(path) if path.is_dir() else ZipStore(path)


@dataclass(frozen=True)
class FileList:
    """The files of one split with a label each; labels is None for a flat folder."""

    names: tuple[str, ...]
    labels: tuple[int, ...] | None


@dataclass(frozen=True)
class FileLists:
    """Both splits and the class names."""

    train: FileList
    test: FileList
    class_names: tuple[str, ...]


def image_lists(store: Store) -> FileLists:
    """The splits of a folder of images.

    Layouts: `train/` beside `test/`, `val/` or `validation/`, or neither; below that a folder per class (sorted names
    are labels 0, 1, ...), or images directly. Without a test folder, files whose name hashes to 0 modulo ten are held
    out: the choice depends on nothing but the names.

    Raises: `DataError` when there are no images, when images lie both beside and inside class folders, or when the
    two splits have different classes.
    """
    images = [name for name in store.sizes if name.lower().endswith(IMAGE_ENDINGS)]
    if not images:
        raise DataError(f"{store.place} holds no images ({', '.join(IMAGE_ENDINGS[:4])}, ...)")
    prefix = _shared_folder(images)
    inside = {name: PurePosixPath(name).relative_to(prefix).parts for name in images}
    tops = {parts[0] for parts in inside.values() if len(parts) > 1}
    test_folder = next((name for name in ("test", "val", "validation") if name in tops), None)
    if "train" in tops and test_folder:
        splits = {
            split: {name: parts[1:] for name, parts in inside.items() if parts[0] == folder}
            for split, folder in (("train", "train"), ("test", test_folder))
        }
    else:
        held = {name for name in images if _held_out("/".join(inside[name]))}
        splits = {
            "train": {name: parts for name, parts in inside.items() if name not in held},
            "test": {name: parts for name, parts in inside.items() if name in held},
        }
    depths = {len(parts) > 1 for split in splits.values() for parts in split.values()}
    if len(depths) > 1:
        raise DataError(f"{store.place} has images both beside and inside class folders; use one or the other")
    if not depths.pop():
        return FileLists(FileList(tuple(splits["train"]), None), FileList(tuple(splits["test"]), None), ())
    classes = sorted({parts[0] for parts in splits["train"].values()})
    unknown = {parts[0] for parts in splits["test"].values()} - set(classes)
    if unknown:
        raise DataError(f"{store.place}: the test split has classes that are not in the train split: {sorted(unknown)}")
    number = {name: index for index, name in enumerate(classes)}
    lists = {
        split: FileList(tuple(files), tuple(number[parts[0]] for parts in files.values()))
        for split, files in splits.items()
    }
    return FileLists(lists["train"], lists["test"], tuple(classes))


def _shared_folder(names: Sequence[str]) -> PurePosixPath:
    """A single folder that encloses everything (as zips have), but never one that names a split or holds images."""
    prefix = PurePosixPath()
    while True:
        depth = len(prefix.parts)
        parts = [PurePosixPath(name).parts for name in names]
        tops = {part[depth] for part in parts if len(part) > depth + 1}
        direct = any(len(part) == depth + 1 for part in parts)
        below = any(len(part) > depth + 2 for part in parts)
        if direct or len(tops) != 1 or not below:
            return prefix
        prefix = prefix / tops.pop()


def _held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HOLD_OUT == 0


def tiny_imagenet_lists(store: Store) -> FileLists:
    """Tiny-ImageNet as published: train/<wnid>/images, val/images, val/val_annotations.txt, wnids.txt, words.txt.

    Raises: `DataError` when a list is missing.
    """
    root = _root_of(store, "wnids.txt")
    wnids = sorted(store.open_bytes(f"{root}wnids.txt").decode().split())
    number = {wnid: index for index, wnid in enumerate(wnids)}
    words = {}
    if f"{root}words.txt" in store.sizes:
        lines = store.open_bytes(f"{root}words.txt").decode().splitlines()
        words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    train = [name for name in store.sizes if name.startswith(f"{root}train/") and name.lower().endswith(".jpeg")]
    annotations = store.open_bytes(f"{root}val/val_annotations.txt").decode().splitlines()
    pairs = [line.split("\t")[:2] for line in annotations if line.strip()]
    return FileLists(
        FileList(tuple(train), tuple(number[name.removeprefix(root).split("/")[1]] for name in train)),
        FileList(tuple(f"{root}val/images/{name}" for name, _ in pairs), tuple(number[wnid] for _, wnid in pairs)),
        tuple(words.get(wnid, wnid).split(",")[0] for wnid in wnids),
    )


def cub_lists(store: Store) -> FileLists:
    """CUB-200-2011 as published: images.txt, image_class_labels.txt, train_test_split.txt, classes.txt.

    Raises: `DataError` when a list is missing.
    """
    root = _root_of(store, "train_test_split.txt")

    def table(name: str) -> dict[str, str]:
        lines = store.open_bytes(f"{root}{name}").decode().splitlines()
        return dict(line.split(" ", 1) for line in lines if line.strip())

    files, labels, train = table("images.txt"), table("image_class_labels.txt"), table("train_test_split.txt")
    chosen = {
        flag: [key for key in files if train[key].strip() == flag]
        for flag in ("1", "0")  # 1: training
    }
    lists = {
        flag: FileList(
            tuple(f"{root}images/{files[key].strip()}" for key in keys), tuple(int(labels[key]) - 1 for key in keys)
        )
        for flag, keys in chosen.items()
    }
    return FileLists(lists["1"], lists["0"], tuple(name.strip() for name in table("classes.txt").values()))


def celeba_lists(store: Store, partition: Path | None) -> FileLists:
    """CelebA's aligned images, split by list_eval_partition.txt (in the archive or beside it).

    Images 0 are for training, 2 for testing, as the papers do. Raises: `DataError` when the list is missing.
    """
    listed = next((name for name in store.sizes if name.endswith("list_eval_partition.txt")), None)
    if listed:
        text = store.open_bytes(listed).decode()
    elif partition is not None and partition.is_file():
        text = partition.read_text()
    else:
        raise DataError(
            f"{store.place} needs list_eval_partition.txt beside it (CelebA's train, validation, test split)"
        )
    split_of = dict(line.split()[:2] for line in text.splitlines() if line.strip())
    images = [name for name in store.sizes if name.lower().endswith(IMAGE_ENDINGS)]
    chosen = {
        flag: tuple(name for name in images if split_of.get(PurePosixPath(name).name) == flag) for flag in ("0", "2")
    }
    if not chosen["0"]:
        raise DataError(f"{store.place} holds no training image of list_eval_partition.txt")
    return FileLists(FileList(chosen["0"], None), FileList(chosen["2"], None), ())


def _root_of(store: Store, marker: str) -> str:
    for name in store.sizes:
        if PurePosixPath(name).name == marker:
            return name.removesuffix(marker)
    raise DataError(f"{store.place} has no {marker}: is it the published layout?")


LAYOUTS: dict[str, Callable[[Store], FileLists]] = {"tiny-imagenet": tiny_imagenet_lists, "cub200": cub_lists}
"""Named sets with a layout of their own; everything else is an image folder."""
