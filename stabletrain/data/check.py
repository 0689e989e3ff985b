"""What is known of a data set, and everything that is wrong with it: `stabletrain data info` and `data check`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.data.catalogue import CATALOGUE, DatasetInfo
from stabletrain.data.latents import INDEX, open_latents
from stabletrain.data.load import load_dataset
from stabletrain.data.locate import locate, named, official_folder, what_to_put
from stabletrain.data.sources import EncodedSource
from stabletrain.data.spec import Dataset
from stabletrain.errors import ConfigError, DataError

Tick = Callable[[str, int, int], None]
"""`tick(label, done, total)`: shows progress; may raise to stop."""

LOOKED_AT = 256  # pictures or files between two ticks


def dataset_info(name_or_path: str, *, image_size: int | None = None) -> dict[str, Any]:
    """What is known of a named data set, or of the user's file or folder, as plain values.

    Keys: those of `DataSpec` (fingerprint None when the data are not here), `about`, `found` ("bundled", the path, or
    None), `kind` (bundled, files, tfds, user or None), `put` (what to put where; None when found), and where the data
    are here and labelled `class_counts` (train and test images per class).

    Raises: `ConfigError` for what is neither a name nor a path, `DataError` for damaged data.
    """
    if name_or_path not in CATALOGUE:
        path = Path(name_or_path).expanduser()
        if not path.exists():
            if path.suffix or len(path.parts) > 1:
                raise DataError(f"no data at {path}")
            named(name_or_path)  # raises, with the nearest name
        if (path / INDEX).is_file():
            spec = open_latents(path, path.name).spec
            return {**spec.to_dict(), "about": "", "found": str(path), "kind": "user", "put": None}
        dataset = load_dataset("digits", data=str(path), image_size=image_size)
        return {**_described(dataset), "about": "", "found": str(path), "kind": "user", "put": None}
    info = named(name_or_path)
    place = locate(info)
    if place is None:
        return {**_stated(info), "about": info.about, "found": None, "kind": None, "put": what_to_put(info)}
    if info.latents:
        found = str(place.path)
        spec = open_latents(Path(found), info.name).spec
        return {**spec.to_dict(), "about": info.about, "found": found, "kind": place.kind, "put": None}
    dataset = load_dataset(info.name, image_size=image_size)
    found = "bundled" if place.path is None else str(place.path)
    return {**_described(dataset), "about": info.about, "found": found, "kind": place.kind, "put": None}


def _described(dataset: Dataset) -> dict[str, Any]:
    counts = {
        name: np.bincount(split.labels, minlength=dataset.spec.num_classes).tolist()
        for name, split in (("train", dataset.train), ("test", dataset.test))
        if split.labels is not None
    }
    return {**dataset.spec.to_dict(), **({"class_counts": counts} if counts else {})}


def _stated(info: DatasetInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "image_size": info.image_size,
        "channels": info.channels,
        "num_classes": info.num_classes,
        "class_names": list(info.class_names),
        "fingerprint": None,
        "train_count": info.train_count,
        "test_count": info.test_count,
    }


def check_dataset(
    name: str, data: str | None = None, *, image_size: int | None = None, tick: Tick | None = None
) -> list[str]:
    """Everything that is wrong with a data set, a line each; empty when all is well.

    Reads everything: the checksums of the official files, then each picture, of which all damaged ones are listed.

    Raises: `ConfigError` for an unknown name. Data that are missing or cannot be read at all are problems, not errors.
    """
    report = tick or (lambda label, done, total: None)
    if data is not None and (Path(data).expanduser() / INDEX).is_file():
        return _wrong_latents(Path(data).expanduser(), report)
    if data is None and named(name).latents:
        return _wrong_latents(official_folder(named(name)), report)
    info = named(name) if data is None else None
    place = None if info is None else locate(info)
    problems = (
        _wrong_checksums(info, report) if info is not None and place is not None and place.kind == "files" else []
    )
    try:
        dataset = load_dataset(name, data=data, image_size=image_size)
    except ConfigError:
        raise
    except DataError as error:
        return [*problems, str(error)]
    for split_name, split in (("train", dataset.train), ("test", dataset.test)):
        total = len(split)
        if isinstance(split.images, EncodedSource):
            for start in range(0, total, LOOKED_AT):
                problems += split.images.problems(start, start + LOOKED_AT)
                report(f"{split_name} images", min(start + LOOKED_AT, total), total)
        elif split.images.array() is None:  # mapped from disk: touching every byte finds what cannot be read
            for start in range(0, total, LOOKED_AT):
                split.images.read(np.arange(start, min(start + LOOKED_AT, total)))
                report(f"{split_name} images", min(start + LOOKED_AT, total), total)
        if split.labels is not None and total:
            absent = np.setdiff1d(np.arange(dataset.spec.num_classes), split.labels)
            if absent.size:
                few = ", ".join(dataset.spec.class_names[label] for label in absent[:5])
                of = "the class" if absent.size == 1 else f"{absent.size} classes:"
                problems.append(f"no {split_name} image of {of} {few}{', ...' * (absent.size > 5)}")
    if info is not None and place is not None:
        for split_name, split, stated in (
            ("train", dataset.train, info.train_count),
            ("test", dataset.test, info.test_count),
        ):
            if len(split) != stated:
                problems.append(f"{name} has {len(split)} {split_name} images here; published were {stated}")
    return problems


def _wrong_checksums(info: DatasetInfo, report: Tick) -> list[str]:
    problems = []
    files = [file for file in info.files if file.md5 and (official_folder(info) / file.name).is_file()]
    for number, file in enumerate(files):
        path = official_folder(info) / file.name
        report(f"checksum of {file.name}", number, len(files))
        with path.open("rb") as content:
            found = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != file.md5:
            problems.append(
                f"{path} has the MD5 {found}, published was {file.md5}: it is damaged, cut off, or another file"
            )
    return problems


def _wrong_latents(folder: Path, report: Tick) -> list[str]:
    try:
        latents = open_latents(folder, folder.name)
    except DataError as error:
        return [str(error)]
    problems = []
    for name, split in (("train", latents.train), ("test", latents.test)):
        for part in ("moments", "contexts"):
            array = getattr(split, part)
            for start in range(0, len(array), LOOKED_AT):
                report(f"{name} {part}", start, len(array))
                if not np.isfinite(array[start : start + LOOKED_AT]).all():
                    problems.append(f"{name} {part} {start} to {start + LOOKED_AT} hold numbers that are not finite")
    return problems
