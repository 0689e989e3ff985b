"""A data set by name or by file, checked: the one entrance through which every family gets its data."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from stabletrain.data import arrays, fingerprints, folders, tfds
from stabletrain.data.catalogue import CATALOGUE, DatasetInfo
from stabletrain.data.sources import ArraySource, Crop, EncodedSource, celeba_crop, centre_crop, convert
from stabletrain.data.spec import Dataset, DataSpec, Labels, Split
from stabletrain.errors import ConfigError, DataError, nearest
from stabletrain.paths import cache_home

GREY_MODES = ("L", "1", "I;16", "I", "F")


def load_dataset(name: str, *, data: str | None = None, image_size: int | None = None) -> Dataset:
    """The data set called `name`, or what `data` points to.

    With `data`, its content decides how it is read (.npz, folder, zip, official archive), and a known `name` lends its
    class names and crop. Without: files of the official names below `<cache>/data/<name>`, a prepared TFDS directory,
    preparing with TFDS. `image_size` crops and resizes every image (centre crop, bicubic).

    Raises: `ConfigError` for an unknown name, `DataError` when the data are missing, damaged, or of a wrong size;
    without a network this takes about a second and says what to put where.
    """
    if data is not None:
        path = Path(data).expanduser()
        if not path.exists():
            raise DataError(
                f"no data at {path}: --data takes an .npz, an image folder, a zip of one, or an official archive"
            )
        return _from_path(path, CATALOGUE.get(name), path.stem if name == "digits" else name, image_size)
    if name not in CATALOGUE:
        raise ConfigError(f"unknown data set {name!r}: {nearest(name, CATALOGUE)}")
    info = CATALOGUE[name]
    if info.bundled:
        return _from_arrays(name, arrays.digits(), info, image_size)
    return _from_disk(info, image_size)


def official_folder(info: DatasetInfo) -> Path:
    """Where the official files of a named set are looked for."""
    return cache_home() / "data" / info.name


def _from_disk(info: DatasetInfo, image_size: int | None) -> Dataset:
    folder = official_folder(info)
    found = [folder / name for name in info.files if (folder / name).exists()]
    if found:
        several = len(info.files) > 2  # the four idx files are read together
        return _from_path(folder if several else found[0], info, info.name, image_size)
    prepared = tfds.prepared(info)
    if prepared is None:
        where = f"put {' + '.join(info.files[:4])} into {folder}, or name it with --data"
        if info.tfds_name is None or not tfds.can_prepare():
            extra = "" if info.tfds_name is None else ", or pip install 'stabletrain[tfds]' to prepare it with TFDS"
            raise DataError(f"{info.name} is not on this machine: {where}{extra}")
        if not tfds.online():
            raise DataError(f"{info.name} is not on this machine and {tfds.PROBE_HOST[0]} does not answer: {where}")
        prepared = tfds.prepare(info)
    return _from_tfds(info, prepared, image_size)


def _from_path(path: Path, info: DatasetInfo | None, name: str, image_size: int | None) -> Dataset:
    if path.is_dir():
        inside = {child.name for child in path.iterdir()}
        if any("idx" in child and "ubyte" in child for child in inside):
            return _from_arrays(
                name, arrays.read_idx_folder(path, info is not None and info.transpose), info, image_size
            )
        if any(child.startswith("train_data_batch_") for child in inside):
            return _from_arrays(name, arrays.read_downsampled_imagenet(path), info, image_size)
    elif path.suffix == ".npz":
        return _from_arrays(name, arrays.read_npz(path), info, image_size)
    elif "idx" in path.name and "ubyte" in path.name:
        raw = arrays.read_idx_folder(path.parent, info is not None and info.transpose)
        return _from_arrays(name, raw, info, image_size)
    elif path.name.endswith((".tar.gz", ".tgz", ".tar")):
        if info is not None and info.name == "cub200":
            raise DataError(f"unpack {path} first: a compressed tar cannot be read image by image")
        return _from_arrays(name, arrays.read_cifar(path), info, image_size)
    elif path.suffix != ".zip":
        raise DataError(
            f"{path} is no data set: expected an .npz, an image folder, a zip of one, a CIFAR .tar.gz or idx.gz"
        )
    return _from_files(name, folders.open_store(path), path, info, image_size)


def _from_arrays(name: str, raw: arrays.RawArrays, info: DatasetInfo | None, image_size: int | None) -> Dataset:
    if not len(raw.train_images):
        raise DataError(f"{name} has no training images")
    train, test = raw.train_images, raw.test_images
    if image_size is not None and train.shape[1:3] != (image_size, image_size):
        train, test = _resize(train, image_size), _resize(test, image_size)
    if train.shape[1] != train.shape[2]:
        raise DataError(
            f"{name} has images of {train.shape[2]}x{train.shape[1]}; networks take square ones: give --image-size N"
        )
    class_names = raw.class_names or (info.class_names if info is not None else ())
    fingerprint = fingerprints.of_arrays(
        [("train", train), ("train labels", raw.train_labels), ("test", test), ("test labels", raw.test_labels)]
    )
    splits = Split(ArraySource(train), raw.train_labels), Split(ArraySource(test), raw.test_labels)
    return _checked(name, *splits, class_names, fingerprint)


def _resize(images: np.ndarray, size: int) -> np.ndarray:
    crop = centre_crop(size)
    resized = np.empty((len(images), size, size, images.shape[-1]), np.uint8)
    for index, image in enumerate(images):
        picture = crop(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image))
        resized[index] = np.asarray(picture, np.uint8).reshape(size, size, -1)
    return resized


def _from_files(
    name: str, store: folders.Store, path: Path, info: DatasetInfo | None, image_size: int | None
) -> Dataset:
    known = info.name if info is not None else ""
    if known == "celeba64":
        lists = folders.celeba_lists(store, path.parent / "list_eval_partition.txt")
    else:
        lists = folders.LAYOUTS.get(known, folders.image_lists)(store)
    size = image_size or (info.image_size if info is not None and info.crop != "none" else None)
    crop = _crop(info, size)
    shape = _shape_of(store, lists.train.names[0], size)
    sources = {
        split: EncodedSource(files.names, store.open_bytes, shape, crop)
        for split, files in (("train", lists.train), ("test", lists.test))
    }
    names = [*lists.train.names, *lists.test.names]
    context = f"{known if crop is not None else 'as is'} {shape}"
    fingerprint = fingerprints.of_files(names, [store.sizes[item] for item in names], store.open_bytes, context)
    splits = {
        split: Split(sources[split], None if files.labels is None else np.asarray(files.labels, np.int32))
        for split, files in (("train", lists.train), ("test", lists.test))
    }
    return _checked(name, splits["train"], splits["test"], lists.class_names, fingerprint)


def _crop(info: DatasetInfo | None, size: int | None) -> Crop | None:
    if size is None:
        return None
    return celeba_crop(size) if info is not None and info.crop == "celeba" else centre_crop(size)


def _shape_of(store: folders.Store, name: str, size: int | None) -> tuple[int, int, int]:
    """The shape that every image has or is made to have, from the first one."""
    try:
        with Image.open(io.BytesIO(store.open_bytes(name))) as picture:
            channels = 1 if picture.mode in GREY_MODES else 3
            convert(picture, channels)
            width, height = picture.size
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot read the image {name} in {store.place}: {error}") from error
    if size is not None:
        return size, size, channels
    if width != height:
        raise DataError(f"the image {name} is {width}x{height}; networks take square ones: give --image-size N")
    return height, width, channels


def _from_tfds(info: DatasetInfo, folder: Path, image_size: int | None) -> Dataset:
    records = tfds.read_prepared(info, folder)
    size = image_size or (info.image_size if info.crop != "none" else None)
    shape = (size or info.image_size, size or info.image_size, info.channels)
    splits = []
    for split in info.tfds_splits:
        source = (
            tfds.RecordSource(records[split], shape, _crop(info, size))
            if split
            else ArraySource(np.empty((0, *shape), np.uint8))
        )
        labels = None
        if info.tfds_label and split:
            labels = np.array([int(record[info.tfds_label]) for record in records[split]], np.int32)
        splits.append(Split(source, labels))
    fingerprint = fingerprints.of_arrays([("train labels", splits[0].labels), ("size", np.array(shape))])
    return _checked(info.name, splits[0], splits[1], info.class_names, f"{folder.name}-{fingerprint}")


def _checked(name: str, train: Split, test: Split, class_names: tuple[str, ...], fingerprint: str) -> Dataset:
    """The data set, after what can be said without decoding every image was checked."""
    if not len(train):
        raise DataError(f"{name} has no training images")
    num_classes = 0
    if train.labels is not None:
        num_classes = max(int(train.labels.max()) + 1, len(class_names))
        class_names = class_names or tuple(str(label) for label in range(num_classes))
        for split, labels in (("train", train.labels), ("test", test.labels)):
            _check_range(name, split, labels, len(class_names))
    height, _, channels = train.images.shape
    spec = DataSpec(
        name=name,
        image_size=height,
        channels=channels,
        num_classes=num_classes,
        class_names=class_names if num_classes else (),
        fingerprint=fingerprint,
        train_count=len(train),
        test_count=len(test),
    )
    return Dataset(spec, train, test if len(test) else replace(test, labels=None))


def _check_range(name: str, split: str, labels: Labels | None, num_classes: int) -> None:
    if labels is not None and labels.size and int(labels.max()) >= num_classes:
        index = int(labels.argmax())
        raise DataError(
            f"{name}: the {split} label at index {index} is {labels[index]}, but there are {num_classes} classes, "
            f"0 to {num_classes - 1}"
        )
