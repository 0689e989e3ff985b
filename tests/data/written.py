"""Small files in each format that can be read, written by the tests themselves."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def pixels(count: int, size: int = 8, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """Random images [N, H, W, C] that use the whole range."""
    images = np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    images[:, 0, 0] = 255
    return images


def encoded(image: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    """One image [H, W, C] as PNG (lossless) or JPEG."""
    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(stream, format=kind)
    return stream.getvalue()


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """A folder with these files."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    """A zip with these files."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def class_folders(
    per_class: Mapping[str, int], *, prefix: str = "", size: int = 8, channels: int = 3, seed: int = 0
) -> dict[str, bytes]:
    """Files `<prefix><class>/<number>.png`."""
    images = iter(pixels(sum(per_class.values()), size, channels, seed))
    return {
        f"{prefix}{name}/{number:03d}.png": encoded(next(images))
        for name, count in per_class.items()
        for number in range(count)
    }


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    """An array as an idx file of unsigned bytes."""
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def idx_files(
    images: Sequence[NDArray], labels: Sequence[NDArray], prefix: str = "", test: str = "t10k"
) -> dict[str, bytes]:
    """The four gzipped files of an MNIST-like set: train and test images [N, H, W] and labels."""
    files = {}
    for split, its_images, its_labels in zip(("train", test), images, labels):
        files[f"{prefix}{split}-images-idx3-ubyte.gz"] = gzip.compress(idx_bytes(its_images), 1)
        files[f"{prefix}{split}-labels-idx1-ubyte.gz"] = gzip.compress(idx_bytes(its_labels.astype(np.uint8)), 1)
    return files


def cifar_files(
    images: NDArray[np.uint8], labels: Sequence[int], *, fine: bool = False, batches: int = 5, names: Sequence[str] = ()
) -> dict[str, bytes]:
    """The pickles of CIFAR-10 (or CIFAR-100 with `fine`): the last batch of images is the test batch."""
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    key = b"fine_labels" if fine else b"labels"
    parts = np.array_split(np.arange(len(images)), (1 if fine else batches) + 1)
    files = {}
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        name = ("test" if last else "train") if fine else ("test_batch" if last else f"data_batch_{number + 1}")
        batch = {b"data": rows[part], key: [int(labels[i]) for i in part], b"coarse_labels": [0] * len(part)}
        files[name] = pickle.dumps(batch, protocol=2)
    meta_key = b"fine_label_names" if fine else b"label_names"
    files["meta" if fine else "batches.meta"] = pickle.dumps({meta_key: [name.encode() for name in names]}, protocol=2)
    return files


def write_tar(path: Path, files: Mapping[str, bytes], folder: str = "cifar-10-batches-py") -> Path:
    """A tar.gz with these files in one folder."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def tiny_imagenet_files(wnids: Sequence[str], per_class: int, size: int = 64) -> dict[str, bytes]:
    """Tiny-ImageNet's layout; the validation images are one per class."""
    root = "tiny-imagenet-200/"
    files = {f"{root}wnids.txt": "\n".join(wnids).encode()}
    files[f"{root}words.txt"] = "\n".join(f"{wnid}\tname of {wnid}, also" for wnid in wnids).encode()
    images = iter(pixels(len(wnids) * (per_class + 1), size))
    lines = []
    for wnid in wnids:
        for number in range(per_class):
            files[f"{root}train/{wnid}/images/{wnid}_{number}.JPEG"] = encoded(next(images), "JPEG")
        files[f"{root}val/images/val_{wnid}.JPEG"] = encoded(next(images), "JPEG")
        lines.append(f"val_{wnid}.JPEG\t{wnid}\t0\t0\t9\t9")
    files[f"{root}val/val_annotations.txt"] = "\n".join(lines).encode()
    files[f"{root}test/images/test_0.JPEG"] = encoded(pixels(1, size)[0], "JPEG")
    return files


def example_bytes(image: bytes, label: int | None) -> bytes:
    """A serialised tf.train.Example with an encoded image and a label."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(image)
    if label is not None:
        example.features.feature["label"].int64_list.value.append(label)
    return example.SerializeToString()


def write_prepared(
    folder: Path, splits: Mapping[str, Sequence[bytes]], *, name: str, file_format: str = "tfrecord", shards: int = 2
) -> Path:
    """A prepared TFDS directory: dataset_info.json and shards of serialised examples."""
    folder.mkdir(parents=True)
    stated = []
    for split, examples in splits.items():
        parts = np.array_split(np.arange(len(examples)), shards)
        for number, part in enumerate(parts):
            path = folder / f"{name}-{split}.{file_format}-{number:05d}-of-{shards:05d}"
            _write_shard(path, [examples[i] for i in part], file_format)
        stated.append({"name": split, "shardLengths": [str(len(part)) for part in parts], "numBytes": "1"})
    content = {"name": name, "version": folder.name, "fileFormat": file_format, "splits": stated}
    (folder / "dataset_info.json").write_text(json.dumps(content))
    return folder


def _write_shard(path: Path, examples: Sequence[bytes], file_format: str) -> None:
    if file_format == "tfrecord":  # the checksums are not read
        path.write_bytes(b"".join(struct.pack("<Q", len(e)) + bytes(4) + e + bytes(4) for e in examples))
        return
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for example in examples:
        writer.write(example)
    writer.close()
