"""A data set by name or by file, checked: the one entrance through which every family gets its data."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stabletrain.data import archives, arrays, fingerprints, folders, tfds
from stabletrain.data.catalogue import CATALOGUE, DatasetInfo, list_datasets
from stabletrain.data.crops import Crop, celeba_crop, centre_crop, is_grey, open_picture, transposed
from stabletrain.data.locate import Place, locate, named, what_to_put
from stabletrain.data.sources import ArraySource, EncodedSource, ResizedSource, SubsetSource
from stabletrain.data.spec import Dataset, DataSpec, Split
from stabletrain.data.stores import FolderStore, Store, base_name, open_store
from stabletrain.errors import ConfigError, DataError

__all__ = ["Dataset", "limit_training", "list_datasets", "load_dataset"]

TAKEN = "an .npz, an image folder, a zip of one, CIFAR's tar.gz, idx.gz files, or another published layout"

EMNIST_FILES = {"emnist": "emnist-balanced-", "emnist-byclass": "emnist-byclass-"}
"""One archive holds several splits of EMNIST: how the files of each begin."""


LIMIT_SEED = 0
"""Of the choice of training images when their number is limited: one choice for all runs, whatever their seed."""


@dataclass(frozen=True)
class Loaded:
    """What was read, before it is checked as a data set."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
    fingerprint: str


def load_dataset(name: str, *, data: str | None = None, image_size: int | None = None) -> Dataset:
    """The data set called `name`, or what `data` points to.

    With `data`, its content decides how it is read (.npz, folder, zip, official archive), and a known `name` lends its
    class names and crop; `digits`, being the default, lends nothing. Without: files of the official names below
    `<cache>/data/<name>`, a prepared TFDS directory, preparing with TFDS. `image_size` crops and resizes every image
    (centre crop, bicubic); without it every image must be square and have the size that `name` stands for.

    Raises: `ConfigError` for an unknown name, `DataError` when the data are missing, damaged, or of a wrong size;
    without a network this takes about a second and says what to put where.
    """
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size is {image_size}; expected a number of pixels")
    if name in CATALOGUE and CATALOGUE[name].latents:
        raise ConfigError(f"{name} holds latents and text features, no pictures: it is for `stabletrain diffusion`")
    if data is not None:
        return _from_user(name, Path(data).expanduser(), image_size)
    info = named(name)
    place = locate(info) or _prepared(info)
    if place.path is None:
        return _checked(name, info, _from_arrays(arrays.digits(), image_size), image_size)
    if place.kind == "tfds":
        return _checked(name, info, _from_tfds(info, place.path, image_size), image_size)
    try:
        return _checked(name, info, _read(place.path, info, image_size), image_size)
    except DataError as error:
        raise DataError(f"{error} (expected in {place.path}: {info.wanted()})") from error


def limit_training(dataset: Dataset, count: int) -> Dataset:
    """The data set with `count` of its training images, drawn at random but always the same; 0 leaves it as it is.

    The test split stays whole. The fingerprint is another one.

    Raises: `ConfigError` when there are not so many.
    """
    total = len(dataset.train)
    if count == 0:
        return dataset
    if not 0 < count <= total:
        raise ConfigError(f"train_limit is {count}, and {dataset.name} has {total} training images")
    chosen = np.sort(np.random.default_rng(LIMIT_SEED).permutation(total)[:count])
    labels = dataset.train.labels
    train = Split(SubsetSource(dataset.train.images, chosen), None if labels is None else labels[chosen])
    fingerprint = fingerprints.of_arrays([(f"{dataset.spec.fingerprint} limited to", chosen)])
    return replace(dataset, spec=replace(dataset.spec, fingerprint=fingerprint, train_count=count), train=train)


def limit_classes(dataset: Dataset, count: int) -> Dataset:
    """The data set with its first `count` classes only, in both splits; 0 leaves it as it is.

    The fingerprint is another one. Raises: `ConfigError` when there are not so many classes, or no labels.
    """
    total = dataset.spec.num_classes
    if count == 0:
        return dataset
    if not 2 <= count <= total:
        raise ConfigError(f"class_limit is {count}, and {dataset.name} has {total} classes: use 2 to {total}")
    chosen = [np.flatnonzero(_labels_of(split) < count) for split in (dataset.train, dataset.test)]
    train, test = (
        Split(SubsetSource(split.images, index), _labels_of(split)[index])
        for split, index in zip((dataset.train, dataset.test), chosen)
    )
    kept = [(f"{dataset.spec.fingerprint} first classes {name}", at) for name, at in zip(("train", "test"), chosen)]
    spec = replace(
        dataset.spec,
        fingerprint=fingerprints.of_arrays(kept),
        num_classes=count,
        class_names=dataset.spec.class_names[:count],
        train_count=len(train),
        test_count=len(test),
    )
    return replace(dataset, spec=spec, train=train, test=test)


def _labels_of(split: Split) -> np.ndarray:
    return np.zeros(0, np.int32) if split.labels is None else split.labels


def _from_user(name: str, path: Path, image_size: int | None) -> Dataset:
    if not path.exists():
        raise DataError(f"no data at {path}: --data takes {TAKEN}")
    info = next((info for info in list_datasets() if info.name == name and not info.bundled), None)
    own_name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name.removesuffix("".join(path.suffixes))) or "data"
    return _checked(own_name if name == "digits" else name, info, _read(path, info, image_size), image_size)


def _prepared(info: DatasetInfo) -> Place:
    """The set prepared by TFDS just now. Raises: `DataError` saying what to put where, when that cannot be done."""
    if info.tfds_name is None or not tfds.can_prepare():
        raise DataError(f"{info.name} is not on this machine: {what_to_put(info)}")
    if not tfds.online():
        raise DataError(
            f"{info.name} is not on this machine and {tfds.PROBE_HOST[0]} does not answer: {what_to_put(info)}"
        )
    return Place("tfds", tfds.prepare(info))


# --- reading by content -----------------------------------------------------------------------------------------------


def _read(path: Path, info: DatasetInfo | None, image_size: int | None) -> Loaded:
    """What lies at `path`, by its content."""
    kind = _kind_of(path)
    if kind == "npz":
        return _from_arrays(arrays.read_npz(path), image_size)
    if kind == "tar":
        return _from_arrays(archives.read_cifar(archives.tar_members(path), path), image_size)
    store = FolderStore(path.parent, recursive=False) if kind == "idx" else open_store(path)
    names = {base_name(name) for name in store.sizes}
    if any(archives.IDX_NAME.fullmatch(name) for name in names):
        wanted = EMNIST_FILES.get(info.name, "") if info is not None else ""
        return _from_arrays(archives.read_idx(store, wanted), image_size)
    if any(archives.IMAGENET_BATCH.fullmatch(name) for name in names):
        train, test = archives.read_downsampled_imagenet(store)
        return _from_splits(train, test, (), image_size)
    if {"data_batch_1", "test_batch"} <= names or {"train", "test", "meta"} <= names:
        return _from_arrays(archives.read_cifar(archives.store_members(store), path), image_size)
    if path.is_dir() and len(store.sizes) == 1 and not names.pop().lower().endswith(folders.IMAGE_ENDINGS):
        return _read(path / next(iter(store.sizes)), info, image_size)
    return _from_pictures(store, info, image_size)


def _kind_of(path: Path) -> str:
    """npz, tar, idx or tree (a folder, or a zip of one). Raises: `DataError` for anything else."""
    if path.is_dir():
        return "tree"
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if head[:2] == b"PK":
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{path} is damaged or not complete: {error}") from error
        return "npz" if members and all(member.endswith(".npy") for member in members) else "tree"
    if head[:2] == b"\x1f\x8b":
        try:
            start = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, 8)
        except zlib.error as error:
            raise DataError(f"{path} is damaged: {error}") from error
        return "idx" if start[:3] == b"\x00\x00\x08" else "tar"
    if head[257:262] == b"ustar":
        return "tar"
    if head[:3] == b"\x00\x00\x08":
        return "idx"
    if head.startswith(b"\x93NUMPY"):
        raise DataError(f"{path} is an array alone: save it with numpy.savez(path, train_x=..., train_y=...)")
    raise DataError(f"{path} is {'no data set' if head else 'empty'}: expected {TAKEN}")


def _from_arrays(raw: arrays.RawArrays, image_size: int | None) -> Loaded:
    train = Split(ArraySource(raw.train_images), raw.train_labels)
    test = Split(ArraySource(raw.test_images), raw.test_labels)
    return _from_splits(train, test, raw.class_names, image_size)


def _from_splits(train: Split, test: Split, class_names: tuple[str, ...], image_size: int | None) -> Loaded:
    if train.images.shape[:2] == (image_size, image_size):
        image_size = None  # nothing to do, and the same data as without saying so
    hashed: list[tuple[str, np.ndarray | None]] = []
    for name, split in (("train", train), ("test", test)):
        images = split.images.array()
        if images is None:  # mapped from the disk: hashing all of it would take longer than the start of a run
            images = split.images.read(np.array(fingerprints.sample(len(split))))
        hashed += [(f"{name} {len(split)}", images), (f"{name} labels", split.labels)]
    hashed.append(("resized to", None if image_size is None else np.array([image_size])))
    fingerprint = fingerprints.of_arrays(hashed)
    return Loaded(_resized(train, image_size), _resized(test, image_size), class_names, fingerprint)


def _resized(split: Split, image_size: int | None) -> Split:
    if image_size is None:
        return split
    return replace(split, images=ResizedSource(split.images, centre_crop(image_size), image_size))


# --- encoded pictures -------------------------------------------------------------------------------------------------


def _from_pictures(store: Store, info: DatasetInfo | None, image_size: int | None) -> Loaded:
    lists = folders.layout_of(store)(store)
    if not lists.train.names:
        raise DataError(f"{store.place} holds no training images")
    names = [*lists.train.names, *lists.test.names]
    open_bytes = _opener(store, names)
    look = _look(info, image_size, names, store.place, open_bytes)
    splits = []
    for files in (lists.train, lists.test):
        source = EncodedSource(
            files.names, store.place, _opener(store, files.names), look.shape, look.crop,
            refuse_colour=look.refuse_colour,
        )  # fmt: skip
        splits.append(Split(source, None if files.labels is None else np.asarray(files.labels, np.int32)))
    depth = folders.shared_depth(names)
    relative = [name.split("/", depth)[-1] for name in names]
    fingerprint = fingerprints.of_files(
        relative, [store.sizes[name] for name in names], open_bytes,
        f"{look.rule} {look.shape} {len(lists.train.names)} {lists.train.labels} {lists.test.labels}",
    )  # fmt: skip
    return Loaded(splits[0], splits[1], lists.class_names, fingerprint)


def _opener(store: Store, names: Sequence[str]) -> Callable[[int], bytes]:
    return lambda index: store.open_bytes(names[index])


def _from_tfds(info: DatasetInfo, folder: Path, image_size: int | None) -> Loaded:
    train, test = tfds.read_prepared(info, folder)
    counts = [len(train.records), len(test.records)]

    def open_bytes(index: int) -> bytes:
        return train.image_bytes(index) if index < counts[0] else test.image_bytes(index - counts[0])

    names = [f"example {index} ({split.name})" for split in (train, test) for index in range(len(split.records))]
    look = _look(info, image_size, names, folder, open_bytes)
    splits = []
    for split, its_names in ((train, names[: counts[0]]), (test, names[counts[0] :])):
        source = EncodedSource(its_names, folder, split.image_bytes, look.shape, look.crop)
        splits.append(Split(source, split.labels))
    looked_at: list[tuple[str, np.ndarray | None]] = [
        (f"{info.tfds_name} {folder.name} {look.rule} {look.shape} {counts}", np.empty(0)),
        ("train labels", train.labels),
        ("test labels", test.labels),
    ]
    for index in fingerprints.sample(len(names)):
        looked_at.append(("", np.frombuffer(open_bytes(index), np.uint8)))
    return Loaded(splits[0], splits[1], info.class_names, fingerprints.of_arrays(looked_at))


@dataclass(frozen=True)
class Look:
    """What a sample of the pictures says about all of them, and what is to be done with each."""

    shape: tuple[int, int, int]
    crop: Crop | None
    rule: str
    refuse_colour: bool


def _look(
    info: DatasetInfo | None,
    image_size: int | None,
    names: Sequence[str],
    place: Path,
    open_bytes: Callable[[int], bytes],
) -> Look:
    """Reads the headers of up to 256 pictures spread over the set. Damaged ones are left to where they are decoded.

    Channels are those of the named set; otherwise one if all pictures looked at are greyscale, else three.
    Raises: `DataError` when none is readable, and when sizes differ or are not square while no crop is asked for.
    """
    sizes: dict[tuple[int, int], str] = {}
    coloured = False
    damage: DataError | None = None
    for index in fingerprints.sample(len(names)):
        try:
            picture = open_picture(open_bytes(index), f"{names[index]} in {place}", header_only=True)
        except DataError as error:
            damage = damage or error
            continue
        sizes.setdefault(picture.size, names[index])
        coloured = coloured or not is_grey(picture)
    if not sizes:
        raise damage or DataError(f"{place} holds no pictures")
    channels = info.channels if info is not None else 3 if coloured else 1
    size = image_size or (info.image_size if info is not None and info.crop != "none" else None)
    crop, rule = _crop(info, size)
    (width, height), first = next(iter(sizes.items()))
    if size is None:
        if len(sizes) > 1:
            (other_width, other_height), other = list(sizes.items())[1]
            raise DataError(
                f"{place} has pictures of several sizes ({first} is {width}x{height}, {other} is "
                f"{other_width}x{other_height}): give --image-size to crop and resize all of them"
            )
        if width != height:
            raise DataError(
                f"the pictures in {place} are {width}x{height}; networks take square ones: give --image-size to crop "
                "and resize them"
            )
        size = height
    return Look((size, size, channels), crop, rule, refuse_colour=info is None and channels == 1)


def _crop(info: DatasetInfo | None, size: int | None) -> tuple[Crop | None, str]:
    """What is done with each picture, and its name for the fingerprint."""
    if size is None:
        crop, rule = None, "as it is"
    elif info is not None and info.crop == "celeba":
        crop, rule = celeba_crop(size), "celeba crop"
    else:
        crop, rule = centre_crop(size), "centre crop"
    if info is None or not info.transpose:
        return crop, rule
    return (transposed if crop is None else lambda picture: crop(transposed(picture))), f"transposed, {rule}"


# --- checks -----------------------------------------------------------------------------------------------------------


def _checked(name: str, info: DatasetInfo | None, loaded: Loaded, image_size: int | None) -> Dataset:
    """The data set, after what can be said without decoding every image was checked."""
    train, test = loaded.train, loaded.test
    if not len(train):
        raise DataError(f"{name} has no training images")
    height, width, channels = train.images.shape
    if height != width:
        raise DataError(f"{name} has images of {width}x{height}; networks take square ones: crop with --image-size")
    if info is not None and image_size is None and height != info.image_size:
        raise DataError(
            f"these images are {width}x{height}, but {name} has {info.image_size}x{info.image_size}: give --image-size "
            f"{info.image_size} to resize them, or --image-size {height} to train at their own size"
        )
    class_names = _class_names(name, info, loaded) if train.labels is not None else ()
    for split, labels in (("train", train.labels), ("test", test.labels)):
        if labels is not None and labels.size and int(labels.max()) >= len(class_names):
            index = int(labels.argmax())
            raise DataError(
                f"{name}: the {split} label at index {index} is {labels[index]}, but there are {len(class_names)} "
                f"classes, 0 to {len(class_names) - 1}"
            )
    spec = DataSpec(
        name=name,
        image_size=height,
        channels=channels,
        num_classes=len(class_names),
        class_names=class_names,
        fingerprint=loaded.fingerprint,
        train_count=len(train),
        test_count=len(test),
    )
    return Dataset(spec, train, test)


def _class_names(name: str, info: DatasetInfo | None, loaded: Loaded) -> tuple[str, ...]:
    """The file's names of the classes, else the catalogue's, else the numbers of those that occur."""
    if loaded.class_names:
        return loaded.class_names
    if info is not None and info.num_classes:
        return info.class_names or tuple(str(label) for label in range(info.num_classes))
    assert loaded.train.labels is not None
    present = np.unique(loaded.train.labels)
    absent = np.setdiff1d(np.arange(present[-1]), present)
    if absent.size:
        raise DataError(
            f"{name} has no training image of class {absent[0]}, while labels go up to {present[-1]}: number the "
            "classes from 0 without gaps, or name them all (the key names of an .npz)"
        )
    return tuple(str(label) for label in present)
