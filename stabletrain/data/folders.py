"""Which pictures of a tree of files are for training and for testing, and their labels, by the tree's layout."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stabletrain.data.arrays import HOLD_OUT, every
from stabletrain.data.stores import Store, base_name
from stabletrain.errors import DataError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TEST_FOLDERS = ("test", "val", "validation", "valid")


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


# --- a folder of pictures ---------------------------------------------------------------------------------------------


def image_lists(store: Store) -> FileLists:
    """The splits of a folder of images.

    Layouts: `train/` beside `test/`, `val/` or `validation/` (the first of them that is laid out like `train/`), or
    neither; below that a folder per class (sorted names are labels 0, 1, ...), or images directly. Without a test
    folder every tenth image of each class, in the order of a hash of its name, is held out for testing: the choice
    depends on the names alone. A folder that encloses everything else is passed over.

    Raises: `DataError` when there are no images, when images lie both beside and inside class folders, or when the
    test split has classes that the train split has not.
    """
    images = [name for name in store.sizes if name.lower().endswith(IMAGE_ENDINGS)]
    if not images:
        raise DataError(f"{store.place} holds no images ({', '.join(IMAGE_ENDINGS[:4])}, ...)")
    depth = shared_depth(images)
    inside = {name: tuple(name.split("/")[depth:]) for name in images}
    splits = _split_folders(inside)
    labelled = {name: len(parts) > 1 for split in splits for name, parts in split.items()}
    if len(set(labelled.values())) > 1:
        odd = next(name for name, is_labelled in labelled.items() if not is_labelled)
        raise DataError(f"{store.place} has images both inside class folders and beside them ({odd}): use one layout")
    if not any(labelled.values()):
        if len(splits) == 1:
            splits = _hold_out(splits[0], dict.fromkeys(splits[0], 0))
        return FileLists(FileList(tuple(splits[0]), None), FileList(tuple(splits[1]), None), ())
    classes = sorted({parts[0] for parts in splits[0].values()})
    number = {name: index for index, name in enumerate(classes)}
    unknown = sorted({parts[0] for split in splits[1:] for parts in split.values()} - set(classes))
    if unknown:
        raise DataError(f"{store.place} has the class {unknown[0]!r} in the test split but not in the train split")
    labels = {name: number[parts[0]] for split in splits for name, parts in split.items()}
    if len(splits) == 1:
        splits = _hold_out(splits[0], labels)
    lists = [FileList(tuple(split), tuple(labels[name] for name in split)) for split in splits]
    return FileLists(lists[0], lists[1], tuple(classes))


Parts = Mapping[str, tuple[str, ...]]  # name of a file in the store -> its path inside its split


def _split_folders(inside: Parts) -> list[Parts]:
    """Train and test where folders say so, else everything as one."""
    by_top: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, parts in inside.items():
        by_top.setdefault(parts[0] if len(parts) > 1 else "", {})[name] = parts[1:]
    if "train" not in by_top:
        return [inside]

    def is_flat(split: Parts) -> bool:
        return all(len(parts) == 1 for parts in split.values())

    candidates = [by_top[top] for top in TEST_FOLDERS if top in by_top]
    alike = [split for split in candidates if is_flat(split) == is_flat(by_top["train"])]
    if alike or candidates:
        return [by_top["train"], (alike or candidates)[0]]
    return [by_top["train"]] if len(by_top) == 1 else [inside]  # beside other folders "train" is a class


def _hold_out(files: Parts, labels: Mapping[str, int]) -> list[Parts]:
    order = sorted(files, key=lambda name: hashlib.sha256("/".join(files[name]).encode()).digest())
    held = {name for name, is_held in zip(order, every(np.array([labels[n] for n in order]), HOLD_OUT)) if is_held}
    return [
        {name: parts for name, parts in files.items() if name not in held},
        {name: parts for name, parts in files.items() if name in held},
    ]


def shared_depth(names: Sequence[str]) -> int:
    """How many folders enclose every file (zips have one around everything)."""
    first, last = min(names).split("/")[:-1], max(names).split("/")[:-1]
    # What these two share, all that lie between them in order share.
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last)))


# --- published layouts ------------------------------------------------------------------------------------------------


def tiny_imagenet_lists(store: Store) -> FileLists:
    """Tiny-ImageNet as published: train/<wnid>/images, val/images, val/val_annotations.txt, wnids.txt, words.txt.

    The validation images are the test split (the published test images have no labels). Labels number the sorted
    wnids. Raises: `DataError` when a list is missing or names what is not there.
    """
    root = _root_of(store, "wnids.txt")
    number = {wnid: index for index, wnid in enumerate(sorted(_text(store, f"{root}wnids.txt").split()))}
    words = {}
    if f"{root}words.txt" in store.sizes:
        lines = _text(store, f"{root}words.txt").splitlines()
        words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    images = [name for name in store.sizes if name.lower().endswith(IMAGE_ENDINGS)]
    folder = f"{root}train/"
    train = {name: name.removeprefix(folder).split("/")[0] for name in images if name.startswith(folder)}
    rows = [line.split("\t") for line in _text(store, f"{root}val/val_annotations.txt").splitlines() if line.strip()]
    test = {f"{root}val/images/{row[0]}": row[1] if len(row) > 1 else "" for row in rows}
    for name, wnid in [*train.items(), *test.items()]:
        if wnid not in number:
            raise DataError(f"{store.place}: {name} has the class {wnid!r}, which is not in wnids.txt")
        if name not in store.sizes:
            raise DataError(f"{store.place} lacks {name}, which val_annotations.txt names")
    return FileLists(
        FileList(tuple(train), tuple(number[wnid] for wnid in train.values())),
        FileList(tuple(test), tuple(number[wnid] for wnid in test.values())),
        tuple(words.get(wnid, wnid).split(",")[0] for wnid in number),
    )


def cub_lists(store: Store) -> FileLists:
    """CUB-200-2011 as published: images.txt, image_class_labels.txt, train_test_split.txt, classes.txt.

    Raises: `DataError` when a list is missing, damaged, or names what is not there.
    """
    root = _root_of(store, "train_test_split.txt")
    tables = {}
    for table in ("images", "image_class_labels", "train_test_split", "classes"):
        lines = [line.split() for line in _text(store, f"{root}{table}.txt").splitlines() if line.strip()]
        if any(len(line) != 2 for line in lines):
            raise DataError(f"{store.place}: {table}.txt has a line without two entries")
        tables[table] = dict(lines)
    splits: dict[str, dict[str, int]] = {"1": {}, "0": {}}  # 1: training
    for key, file in tables["images"].items():
        name, flag = f"{root}images/{file}", tables["train_test_split"].get(key)
        label = tables["image_class_labels"].get(key)
        if flag not in splits or label not in tables["classes"] or name not in store.sizes:
            raise DataError(f"{store.place}: image {key} ({file}) is missing, or has no split or no class in the lists")
        splits[flag][name] = int(label) - 1
    lists = [FileList(tuple(split), tuple(split.values())) for split in (splits["1"], splits["0"])]
    names = sorted(tables["classes"].items(), key=lambda item: int(item[0]))
    return FileLists(lists[0], lists[1], tuple(name.split(".", 1)[-1].replace("_", " ") for _, name in names))


def celeba_lists(store: Store) -> FileLists:
    """CelebA's aligned images, split by list_eval_partition.txt (among the images, or beside their archive).

    Images 0 are for training, 2 for testing, as the papers do. Raises: `DataError` when the list is missing.
    """
    listed = next((name for name in store.sizes if base_name(name) == CELEBA_MARKER), None)
    beside = store.place.parent / CELEBA_MARKER
    if listed:
        text = _text(store, listed)
    elif beside.is_file():
        text = beside.read_text()
    else:
        raise DataError(f"{store.place} needs {CELEBA_MARKER} beside it (CelebA's train, validation and test split)")
    split_of = dict(line.split()[:2] for line in text.splitlines() if len(line.split()) > 1)
    images = [name for name in store.sizes if name.lower().endswith(IMAGE_ENDINGS)]
    train, test = (tuple(name for name in images if split_of.get(base_name(name)) == flag) for flag in ("0", "2"))
    if not train:
        raise DataError(f"{store.place} holds no training image of {CELEBA_MARKER}")
    return FileLists(FileList(train, None), FileList(test, None), ())


CELEBA_MARKER = "list_eval_partition.txt"
CELEBA_ARCHIVE = "img_align_celeba"


def layout_of(store: Store) -> Callable[[Store], FileLists]:
    """How the pictures in this store are laid out, by the lists that lie with them."""
    names = {base_name(name) for name in store.sizes if name.endswith(".txt")}
    if {"wnids.txt", "val_annotations.txt"} <= names:
        return tiny_imagenet_lists
    if {"train_test_split.txt", "image_class_labels.txt"} <= names:
        return cub_lists
    if CELEBA_MARKER in names or store.place.stem == CELEBA_ARCHIVE:
        return celeba_lists
    return image_lists


def _text(store: Store, name: str) -> str:
    if name not in store.sizes:
        raise DataError(f"{store.place} has no {name}: is it the published layout?")
    try:
        return store.open_bytes(name).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{name} in {store.place} is not text: {error}") from error


def _root_of(store: Store, marker: str) -> str:
    return next(name.removesuffix(marker) for name in store.sizes if base_name(name) == marker)
