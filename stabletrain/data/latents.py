"""Latents of an autoencoder with text features beside them: `coco-latents`, prepared once from a folder of features.

The features are those that U-ViT's released code extracts: `train/<i>.npy` and `val/<i>.npy` hold the mean and the
log-variance of image i's latent, [2 C, H, W], `train/<i>_<k>.npy` the text features [L, D] of its k-th caption, and
`empty_context.npy` those of the empty text. Prepared, they are a few arrays that are mapped from disk, and
`latents.json`, written last.

Source: Bao et al. 2023 (U-ViT) on MS-COCO: Stable Diffusion's autoencoder, 256x256 pixels; CLIP ViT-L/14, [77, 768].
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.lib.format import MAGIC_PREFIX
from numpy.typing import NDArray

from stabletrain.data.arrays import NPZ_ERRORS
from stabletrain.data.spec import DataSpec
from stabletrain.errors import DataError

Tick = Callable[[str, int, int], None]

VERSION = 1
INDEX = "latents.json"
FOLDERS = {"train": "train", "test": "val"}
"""Our splits by the folders of the features."""
EMPTY = "empty_context.npy"


@dataclass(frozen=True)
class LatentSplit:
    """`moments` [N, H, W, 2 C]: mean and log-variance; `contexts` [M, L, D], image i's from `first[i]` on."""

    moments: NDArray[np.floating]
    contexts: NDArray[np.floating]
    first: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.moments)

    def read(self, index: NDArray[np.integer], caption: NDArray[np.floating]) -> dict[str, NDArray[np.float32]]:
        """Moments and contexts of images `index` [B]; `caption` [B] in [0, 1) picks one of each image's captions."""
        start, count = self.first[index], self.first[index + 1] - self.first[index]
        chosen = start + (caption * count).astype(np.int64)
        return {
            "moments": np.asarray(self.moments[index], np.float32),
            "context": np.asarray(self.contexts[chosen], np.float32),
        }


@dataclass(frozen=True)
class LatentSet:
    """Prepared latents; `empty` [L, D] are the features of the empty text."""

    spec: DataSpec
    train: LatentSplit
    test: LatentSplit
    empty: NDArray[np.float32]


def open_latents(folder: Path, name: str) -> LatentSet:
    """What `prepare_latents` wrote. Raises: `DataError` when it is not there, incomplete or of another version."""
    index = folder / INDEX
    if not index.is_file():
        raise DataError(
            f"there are no prepared latents in {folder}: stabletrain data prepare {name} --features DIR --out {folder}"
        )
    try:
        facts = json.loads(index.read_text())
        if facts["version"] != VERSION:
            raise DataError(f"{index} has version {facts['version']}; this version of stabletrain reads {VERSION}")
        empty = np.asarray(_array(folder / EMPTY), np.float32)
        if empty.ndim != 2:
            raise ValueError(f"{EMPTY} has shape {empty.shape}; [L, D] is due")
        splits = {split: _open_split(folder, split, facts["counts"][split], empty.shape) for split in FOLDERS}
        height, _, channels = splits["train"].moments.shape[1:]
        spec = DataSpec(
            name=name,
            image_size=height,
            channels=channels // 2,
            num_classes=0,
            class_names=(),
            fingerprint=facts["fingerprint"],
            train_count=len(splits["train"]),
            test_count=len(splits["test"]),
            context_shape=(int(empty.shape[0]), int(empty.shape[1])),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the latents in {folder} are damaged: {error}") from error
    return LatentSet(spec, splits["train"], splits["test"], empty)


def _open_split(folder: Path, split: str, count: int, context_shape: tuple[int, ...]) -> LatentSplit:
    moments, contexts = (_array(folder / f"{split}_{part}.npy", mmap_mode="r") for part in ("moments", "contexts"))
    first = _array(folder / f"{split}_first.npy")
    if moments.ndim != 4 or contexts.shape[1:] != context_shape:
        raise ValueError(
            f"the arrays of {split} have shapes {moments.shape} and {contexts.shape}; [N, H, W, 2 C] and "
            f"[M, {', '.join(map(str, context_shape))}] are due"
        )
    if len(moments) != count or len(first) != count + 1 or first[-1] != len(contexts):
        raise ValueError(f"the arrays of {split} do not have {count} images")
    return LatentSplit(moments, contexts, first)


def prepare_latents(features: Path, out: Path, tick: Tick | None = None) -> dict[str, Any]:
    """Packs a folder of features into `out` and returns counts, shapes and fingerprint.

    Whole or not at all: `out` appears at the end. Numbers keep the type that they have in the features.

    Raises: `DataError` naming the file that is missing, damaged, superfluous, or of another shape or type than the
    first, or for an `out` that is there already.
    """
    report = tick or (lambda label, done, total: None)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file: the latents need a folder, choose another --out")
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is there already: remove it to prepare it again")
    if not (features / EMPTY).is_file():
        raise DataError(f"{features} has no {EMPTY}, the features of the empty text")
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        digest = hashlib.sha256()
        empty = _loaded(features / EMPTY, 2, None, None)
        np.save(unfinished / EMPTY, empty)
        digest.update(np.ascontiguousarray(empty).tobytes())
        counts = {}
        shapes: dict[str, tuple[int, ...]] = {"context": empty.shape}
        types: dict[str, np.dtype] = {}
        for split, folder in FOLDERS.items():
            counts[split] = _pack(features / folder, unfinished, split, shapes, types, digest, report)
        if not counts["train"]:
            raise DataError(f"{features / FOLDERS['train']} has no features (0.npy, 0_0.npy, ...)")
        facts = {
            "version": VERSION,
            "counts": counts,
            "moments": list(shapes["moments"]),
            "context": list(empty.shape),
            "fingerprint": digest.hexdigest(),
        }
        (unfinished / INDEX).write_text(json.dumps(facts, indent=2) + "\n")
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    except OSError as error:
        raise DataError(f"the latents could not be written to {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return {**facts, "found": str(out)}


def _pack(
    folder: Path,
    out: Path,
    split: str,
    shapes: dict[str, tuple[int, ...]],
    types: dict[str, np.dtype],
    digest: Any,
    report: Tick,
) -> int:
    """One split into three arrays; the number of its images. `shapes` and `types` are those of the first file."""
    captions: dict[int, list[tuple[int, Path]]] = {}
    images: dict[int, Path] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if found := re.fullmatch(r"(\d+)\.npy", path.name):
            images[int(found.group(1))] = path
        elif found := re.fullmatch(r"(\d+)_(\d+)\.npy", path.name):
            captions.setdefault(int(found.group(1)), []).append((int(found.group(2)), path))
    numbers = sorted(images)
    if lonely := [number for number in numbers if number not in captions]:
        raise DataError(f"{images[lonely[0]]} has no captions ({lonely[0]}_0.npy, ...)")
    if orphans := sorted(captions.keys() - images.keys()):
        path = min(captions[orphans[0]])[1]
        raise DataError(f"{path} is the caption of an image that is not there ({orphans[0]}.npy)")
    texts = [path for number in numbers for _, path in sorted(captions[number])]
    first = np.concatenate([[0], np.cumsum([len(captions[number]) for number in numbers])]).astype(np.int64)

    total, done = len(numbers) + len(texts), 0
    for part, paths, axes in (("moments", [images[number] for number in numbers], 3), ("contexts", texts, 2)):
        key = part.removesuffix("s") if part == "contexts" else part
        stored: Any = None
        for place, path in enumerate(paths):
            array = _loaded(path, axes, shapes.get(key), types.get(key))
            if key == "moments" and (array.shape[0] % 2 or array.shape[1] != array.shape[2]):
                raise DataError(f"{path} has shape {array.shape}; mean and log-variance of a square latent are due")
            shapes.setdefault(key, array.shape)
            types.setdefault(key, array.dtype)
            row = array.transpose(1, 2, 0) if key == "moments" else array
            if stored is None:
                stored = np.lib.format.open_memmap(
                    out / f"{split}_{part}.npy", "w+", array.dtype, (len(paths), *row.shape)
                )
            stored[place] = row
            digest.update(np.ascontiguousarray(row).tobytes())
            done += 1
            report(f"{split} features", done, total)
        if stored is None:
            due = shapes.get(key, (0, 0, 0))
            np.save(out / f"{split}_{part}.npy", np.zeros((0, *(np.roll(due, -1) if key == "moments" else due)), "f4"))
        else:
            stored.flush()
    np.save(out / f"{split}_first.npy", first)
    return len(numbers)


def _array(path: Path, mmap_mode: Literal["r"] | None = None) -> NDArray[Any]:
    """The array of a .npy. Raises: `ValueError` naming a file that is none."""
    try:
        with path.open("rb") as stream:
            start = stream.read(len(MAGIC_PREFIX))
        if start != MAGIC_PREFIX:
            raise ValueError("it is no .npy")
        array: NDArray[Any] = np.load(path, mmap_mode=mmap_mode)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return array


def _loaded(path: Path, axes: int, shape: tuple[int, ...] | None, dtype: np.dtype | None) -> NDArray[Any]:
    """A file of features. Raises: `DataError` for one that is damaged or not as asked."""
    try:
        array = _array(path)
    except ValueError as error:
        raise DataError(str(error)) from error
    if array.ndim != axes or array.dtype.kind != "f" or (shape is not None and array.shape != shape):
        due = f"shape {shape}" if shape is not None else f"{axes} axes"
        raise DataError(
            f"{path} has shape {array.shape} and type {array.dtype}; floating-point numbers of {due} are due"
        )
    if dtype is not None and array.dtype != dtype:
        raise DataError(f"{path} has type {array.dtype}, but the first file of its kind {dtype}: one type is due")
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32)).all()  # as which they are read
    if not finite:
        raise DataError(f"{path} holds numbers that are not finite in float32")
    return array


@dataclass(frozen=True)
class Texts:
    """Text features [N, L, D] that are read, possibly from disk, as they are asked for; text n is row `rows[n]`."""

    contexts: NDArray[np.floating]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> NDArray[np.float32]:
        return np.asarray(self.contexts[self.rows[part]], np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.contexts.shape[1:])

    def repeated(self, count: int) -> Texts:
        """`count` texts, in turn."""
        return Texts(self.contexts, np.resize(self.rows, count))


def read_contexts(path: Path) -> tuple[Texts, NDArray[np.float32]]:
    """Text features [N, L, D] and those of the empty text [L, D], to sample from.

    `path`: prepared latents (their held-out captions, one per image), or an .npz with `contexts` and `empty`.

    Raises: `DataError` for anything else.
    """
    if path.is_dir():
        latents = open_latents(path, "coco-latents")
        split = latents.test if len(latents.test) else latents.train
        return Texts(split.contexts, split.first[:-1]), latents.empty
    try:
        with path.open("rb") as stream, np.errstate(over="ignore"):
            archive = np.load(stream)
            if isinstance(archive, np.ndarray):
                raise ValueError("it holds one array")
            contexts, empty = (np.asarray(archive[name], np.float32) for name in ("contexts", "empty"))
    except NPZ_ERRORS as error:
        raise DataError(f"{path} is no .npz with `contexts` [N, L, D] and `empty` [L, D]: {error}") from error
    if contexts.ndim != 3 or empty.shape != contexts.shape[1:] or not len(contexts):
        raise DataError(
            f"{path}: contexts have shape {contexts.shape} and empty {empty.shape}; [N, L, D] and [L, D] are due"
        )
    if not (np.isfinite(contexts).all() and np.isfinite(empty).all()):
        raise DataError(f"{path} holds numbers that are not finite in float32")
    return Texts(contexts, np.arange(len(contexts))), empty


def contexts_digest(path: Path) -> str:
    """SHA-256 of what `read_contexts` reads, without reading it all: of a folder the fingerprint of its features.

    Raises: `DataError` for a path that is not there or cannot be read.
    """
    if path.is_dir():
        return open_latents(path, "coco-latents").spec.fingerprint
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
