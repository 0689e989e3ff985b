"""Whatever is wrong with the user's data, one readable line says what, where, and what to do; exit code 3 or 2."""

from __future__ import annotations

import gzip
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stabletrain.data import tfds
from stabletrain.data.catalogue import CATALOGUE
from stabletrain.data.load import load_dataset
from stabletrain.data.locate import official_folder
from stabletrain.errors import ConfigError, DataError
from tests.data.written import (
    cifar_files,
    class_folders,
    encoded,
    idx_bytes,
    idx_files,
    pixels,
    write_files,
    write_tar,
    write_zip,
)


def refusal(name: str, path: Path | None = None, **options: Any) -> str:
    """The one line with which these data are refused, by loading or by taking all images."""

    def take_all() -> None:
        dataset = load_dataset(name, data=None if path is None else str(path), **options)
        for split in (dataset.train, dataset.test):
            split.images.array()

    with pytest.raises(DataError) as caught:
        take_all()
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- names and places -------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_a_usage_error_with_the_nearest_name() -> None:
    """Exit code 2."""
    with pytest.raises(ConfigError, match=r"'cifar-10'.*did you mean 'cifar10'\?") as caught:
        load_dataset("cifar-10")
    assert caught.value.exit_code == 2


def test_an_image_size_of_nothing_is_a_usage_error() -> None:
    """Zero pixels."""
    with pytest.raises(ConfigError, match="image_size is 0"):
        load_dataset("digits", image_size=0)


@pytest.mark.parametrize("name", [i.name for i in CATALOGUE.values() if not i.bundled and not i.latents])
def test_a_set_that_is_not_here_says_what_to_put_where(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TensorFlow, and with it but without a network: files, source, folder and --data are named, at once."""
    for can_prepare in (False, True):
        monkeypatch.setattr(tfds, "can_prepare", lambda answer=can_prepare: answer)
        message = refusal(name)
        assert f"{name} is not on this machine" in message
        assert str(official_folder(CATALOGUE[name])) in message
        assert CATALOGUE[name].source in message
        assert "--data" in message


def test_offline_it_fails_in_about_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real probe, with a host that never answers: a second, not minutes."""
    monkeypatch.undo()
    monkeypatch.setenv("STABLETRAIN_HOME", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tfds, "can_prepare", lambda: True)
    monkeypatch.setattr(tfds, "PROBE_HOST", ("192.0.2.1", 443))  # an address kept for documentation (RFC 5737)
    start = time.monotonic()
    assert "192.0.2.1 does not answer" in refusal("cifar10")
    assert time.monotonic() - start < 2.5  # one second of waiting, and a busy machine


def test_a_name_server_that_hangs_does_not_hold_the_probe_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up a name has no time limit of its own."""
    monkeypatch.undo()

    released = threading.Event()

    def hang(*arguments: object, **options: object) -> None:
        released.wait(10)
        raise OSError("no such host")

    monkeypatch.setattr(tfds.socket, "create_connection", hang)
    monkeypatch.setattr(tfds, "PROBE_SECONDS", 0.1)
    start = time.monotonic()
    assert not tfds.online()
    assert time.monotonic() - start < 1.0
    released.set()


def test_a_whole_process_without_a_network_fails_in_seconds(tmp_path: Path) -> None:
    """Imports included, and no JAX, TensorFlow or TFDS among them; the message is on one line."""
    code = (
        "import sys\nfrom stabletrain.data.load import load_dataset\nfrom stabletrain.errors import DataError\n"
        "try: load_dataset('cifar10')\n"
        "except DataError as error: print(error); print(error.exit_code)\n"
        "print(sorted({'jax', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules)))"
    )
    environment = {**os.environ, "STABLETRAIN_HOME": str(tmp_path), "TFDS_DATA_DIR": str(tmp_path)}
    start = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert time.monotonic() - start < 10  # 0.4 s on an idle machine
    message, exit_code, imported = out.stdout.splitlines()
    assert "put cifar-10-python.tar.gz" in message
    assert (exit_code, imported) == ("3", "[]")


def test_the_catalogue_and_the_description_import_nothing_heavy() -> None:
    """`--help` reads them."""
    code = (
        "import sys, stabletrain.data.catalogue\n"
        "print(sorted({'jax', 'numpy', 'PIL', 'sklearn', 'tensorflow_datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- arrays -----------------------------------------------------------------------------------------------------------

X = pixels(6)
Y = np.array([0, 1, 2, 0, 1, 2])

BAD_ARRAYS: list[tuple[Mapping[str, Any], str]] = [
    ({"images": X}, r"has no train_x; it holds images"),
    ({"train_x": X[0, 0, 0]}, r"train_x in .* has shape \(3,\); expected \[N, H, W\]"),
    ({"train_x": X.transpose(0, 3, 1, 2)}, r"channels come last: transpose\(0, 2, 3, 1\)"),
    ({"train_x": np.concatenate([X, X[..., :1]], axis=-1)}, r"leave the transparency out"),
    ({"train_x": X > 3}, r"has type bool; expected uint8, or floats"),
    ({"train_x": X.astype(complex)}, r"has type complex128"),
    ({"train_x": np.array([["a"] * 4] * 4)[None]}, r"has type <U1"),
    ({"train_x": X.astype(np.float32)}, r"numbers from 0 to 255; expected uint8, or floats in \[0, 1\] or \[-1, 1\]"),
    ({"train_x": X / 255 - 2}, r"numbers from -2 to -1"),
    ({"train_x": np.where(X == 255, np.nan, X / 255)}, r"non-finite value in image 0"),
    ({"train_x": X.astype(int) - 1}, r"integers from -1 to 254; expected 0 to 255"),
    ({"train_x": X // 200}, r"only the integers 0 and 1, of 255"),
    ({"train_x": X[:0]}, r"has no training images"),
    ({"train_x": X[:, :, :5]}, r"images of 5x8; networks take square ones: .*--image-size"),
    ({"train_x": X, "test_x": X[:, :4, :4]}, r"test_x has images of shape \(4, 4, 3\), train_x of \(8, 8, 3\)"),
    ({"train_x": X, "train_y": Y[:5]}, r"train_y in .* has shape \(5,\), but there are 6 images"),
    ({"train_x": X, "train_y": Y + 0.5}, r"holds fractions"),
    ({"train_x": X, "train_y": Y.astype(str)}, r"train_y in .* has type <U"),
    ({"train_x": X, "train_y": Y - 1}, r"the label -1 at index 0; labels are the numbers of classes, from 0"),
    ({"train_x": X, "train_y": np.array([0, 1, 2, 0, 2**40, 2])}, r"the label 1099511627776 at index 4"),
    ({"train_x": X, "train_y": Y + 1}, r"no training image of class 0, while labels go up to 3: number the classes"),
    ({"train_x": X, "train_y": Y * 2}, r"no training image of class 1"),
    (
        {"train_x": X, "train_y": Y, "names": np.array(["a", "b"])},
        r"train label at index 2 is 2, but there are 2 classes",
    ),
    ({"train_x": X, "train_y": Y, "names": np.arange(3)}, r"names in .* expected a text per class"),
    (
        {"train_x": X, "train_y": Y, "test_x": X, "test_y": Y + 1},
        r"test label at index 2 is 3, but there are 3 classes",
    ),
    ({"train_x": X, "train_y": Y, "test_x": X}, r"labels for one split only"),
    ({"train_x": X, "test_x": X, "test_y": Y}, r"labels for one split only"),
    ({"train_x": X, "train_y": Y, "test_y": Y}, r"has test_y but no test_x"),
    ({"train_x": np.array([{"a": 1}], dtype=object)}, r"not a readable \.npz: .*allow_pickle"),
]


@pytest.mark.parametrize(("contents", "message"), BAD_ARRAYS, ids=[message for _, message in BAD_ARRAYS])
def test_arrays_of_the_wrong_kind(tmp_path: Path, contents: Mapping[str, Any], message: str) -> None:
    """Shapes, types, ranges, labels, names."""
    path = tmp_path / "my.npz"
    np.savez(path, **contents)
    assert re.search(message, refusal("digits", path))


def test_labels_beyond_the_classes_of_a_known_name(tmp_path: Path) -> None:
    """CIFAR-10 has ten classes, whatever the file says."""
    np.savez(tmp_path / "a.npz", train_x=pixels(3, 32), train_y=[0, 10, 1])
    assert "train label at index 1 is 10, but there are 10 classes, 0 to 9" in refusal("cifar10", tmp_path / "a.npz")


def test_a_wrong_image_size_is_refused_with_the_fix_and_taken_with_it(tmp_path: Path) -> None:
    """CIFAR-10 has 32x32; --image-size takes either."""
    np.savez(tmp_path / "a.npz", train_x=pixels(3, 16), train_y=[0, 1, 2])
    message = refusal("cifar10", tmp_path / "a.npz")
    assert "these images are 16x16, but cifar10 has 32x32: give --image-size 32 to resize them" in message
    for size in (16, 32):
        assert load_dataset("cifar10", data=str(tmp_path / "a.npz"), image_size=size).spec.image_size == size


# --- files ------------------------------------------------------------------------------------------------------------


def truncated(content: bytes) -> bytes:
    """The first two thirds."""
    return content[: len(content) * 2 // 3]


def bad_files(write: Callable[[str, bytes], Path]) -> dict[str, tuple[Path, str]]:
    """Places that are no data set, each with what is said of it."""
    npz = write("good.npz", b"")
    np.savez(npz, train_x=X)
    archive = write("good.zip", b"")
    write_zip(archive, class_folders({"a": 5}))
    tar = write("good.tar.gz", b"")
    write_tar(tar, cifar_files(pixels(12, 32), [0] * 12))
    array = write("array.npy", b"")
    np.save(array, X)
    return {
        "missing": (npz.with_name("nowhere.npz"), r"no data at .*nowhere\.npz: --data takes an \.npz"),
        "empty": (write("empty.npz", b""), r"empty\.npz is empty: expected an \.npz"),
        "text": (write("notes.txt", b"hello"), r"notes\.txt is no data set: expected an \.npz"),
        "picture": (write("one.png", encoded(X[0])), r"one\.png is no data set"),
        "array": (array, r"is an array alone: save it with numpy\.savez"),
        "cut npz": (write("cut.npz", truncated(npz.read_bytes())), r"cut\.npz is damaged or not complete"),
        "cut zip": (write("cut.zip", truncated(archive.read_bytes())), r"cut\.zip is damaged or not complete"),
        "cut tar": (write("cut.tar.gz", truncated(tar.read_bytes())), r"cut\.tar\.gz is damaged or not complete"),
        "another gzip": (write("log.gz", gzip.compress(b"hello" * 99)), r"log\.gz is damaged or not complete"),
        "damaged gzip": (write("bad.gz", b"\x1f\x8b" + b"\xff" * 20), r"bad\.gz is damaged"),
    }


BAD_FILES = (
    "missing",
    "empty",
    "text",
    "picture",
    "array",
    "cut npz",
    "cut zip",
    "cut tar",
    "another gzip",
    "damaged gzip",
)


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_are_no_data_set(tmp_path: Path, case: str) -> None:
    """Missing, empty, something else, or cut off."""

    def write(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    path, message = bad_files(write)[case]
    assert re.search(message, refusal("digits", path))


def test_a_changed_byte_in_an_npz_is_noticed(tmp_path: Path) -> None:
    """By the archive's checksum."""
    np.savez(tmp_path / "a.npz", train_x=X)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    assert "Bad CRC-32" in refusal("digits", tmp_path / "a.npz")


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    """An archive is data: nothing in it is executed."""

    class Attack:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    path = write_tar(tmp_path / "c.tar.gz", {"data_batch_1": pickle.dumps(Attack()), "test_batch": b""})
    assert re.search(r"data_batch_1 in .* is no CIFAR batch: it asks for (posix|nt)\.system", refusal("cifar10", path))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_batch": None}, r"no CIFAR train and test batches"),
        ({"data_batch_2": b"\x80\x02garbage"}, r"data_batch_2 in .* is damaged"),
        ({"data_batch_2": pickle.dumps([1, 2])}, r"data_batch_2 in .* is no CIFAR batch but a list"),
        ({"data_batch_2": pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"labels": [0, 1]})}, r"it is not CIFAR"),
        (
            {"data_batch_2": pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]})},
            r"has shape \(1,\), but there are 2 images",
        ),
    ],
)
def test_damaged_cifar_archives(tmp_path: Path, change: dict[str, bytes | None], message: str) -> None:
    """Missing batches, damaged ones, and ones that hold something else."""
    files = {**cifar_files(pixels(12, 32), [0] * 12), **change}
    path = write_tar(tmp_path / "c.tar.gz", {name: content for name, content in files.items() if content is not None})
    assert re.search(message, refusal("cifar10", path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-labels-idx1-ubyte.gz", None, r"has no idx file with the train labels"),
        (
            "t10k-images-idx3-ubyte.gz",
            truncated(gzip.compress(idx_bytes(X[..., 0]))),
            r"t10k-images.* not a readable idx",
        ),
        ("t10k-images-idx3-ubyte.gz", truncated(idx_bytes(X[..., 0])), r"t10k-images.* is not a complete idx file"),
        ("t10k-images-idx3-ubyte.gz", idx_bytes(X[0, :, 0, 0]), r"holds no images: its shape is \(8,\)"),
        ("t10k-labels-idx1-ubyte.gz", idx_bytes(np.zeros(5, np.uint8)), r"has shape \(5,\), but there are 6 images"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    """Missing, cut off, or not matching each other."""
    files: dict[str, bytes | None] = {**idx_files([X[..., 0], X[..., 0]], [Y, Y]), name: content}
    folder = write_files(tmp_path / "m", {n: c for n, c in files.items() if c is not None})
    assert re.search(message, refusal("digits", folder))


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    """In a folder and in a zip; cut off, empty, and not a picture at all."""
    for number, content in enumerate((truncated(encoded(pixels(1, 64)[0])), b"", b"not a picture")):
        files = class_folders({"a": 3, "b": 3}, size=64) | {"b/001.png": content}
        for place in (write_files(tmp_path / str(number), files), write_zip(tmp_path / f"{number}.zip", files)):
            message = refusal("digits", place)
            assert message.startswith("cannot read the image b/001.png in")
            assert str(place) in message


def test_a_damaged_picture_is_named_also_when_it_is_read_during_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a set that is not held in memory only the header was looked at before."""
    good = encoded(pixels(1, 64)[0])
    folder = write_files(tmp_path / "x", {"0.png": good, "1.png": truncated(good)})
    monkeypatch.setattr("stabletrain.data.sources.MEMORY_LIMIT", 100)
    source = load_dataset("x", data=str(folder)).train.images
    assert source.read(np.array([0])).shape == (1, 64, 64, 3)
    with pytest.raises(DataError, match=r"cannot read the image 1\.png in"):
        source.read(np.array([0, 1]))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.md": b"hello", "b.csv": b"1"}, r"holds no images \(\.png"),
        (class_folders({"a": 2}) | class_folders({"b": 2}, size=9), r"several sizes .*8x8.*9x9.*--image-size"),
        ({"a.png": encoded(pixels(1, 8)[0, :5])}, r"are 8x5; networks take square ones: give --image-size"),
        (
            class_folders({"a": 2, "b": 2}) | {"c.png": encoded(X[0])},
            r"both inside class folders and beside them \(c\.png\)",
        ),
        (
            class_folders({"a": 2, "b": 1}, prefix="train/") | class_folders({"c": 1}, prefix="test/"),
            r"the class 'c' in the test split but not in the train split",
        ),
    ],
)
def test_folders_of_pictures_that_do_not_fit_together(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    """No pictures, several sizes, not square, mixed layouts, other classes for testing."""
    assert re.search(message, refusal("digits", write_files(tmp_path / "x", files)))


def test_pictures_of_several_sizes_are_taken_with_an_image_size(tmp_path: Path) -> None:
    """The fix that the message names works."""
    files = class_folders({"a": 2}) | class_folders({"b": 2}, size=9)
    assert load_dataset("x", data=str(write_files(tmp_path / "x", files)), image_size=8).train.images.shape == (8, 8, 3)


def test_an_odd_picture_outside_the_sample_is_named_when_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coloured one among grey ones, and one of another size."""
    monkeypatch.setattr("stabletrain.data.fingerprints.SAMPLED", 2)
    files = {f"{i}.png": encoded(image) for i, image in enumerate(pixels(5, channels=1))}
    colour = write_files(tmp_path / "c", files | {"2.png": encoded(X[0])})
    assert re.search(r"2\.png in .* is in colour, but the others are greyscale", refusal("digits", colour))
    larger = write_files(tmp_path / "l", files | {"2.png": encoded(pixels(1, 9, 1)[0])})
    assert re.search(r"2\.png in .* is 9x9, but the others are 8x8: give --image-size", refusal("digits", larger))


def test_official_files_that_do_not_belong_there_say_what_was_expected() -> None:
    """A half-finished download in the place of CIFAR-10."""
    folder = write_files(official_folder(CATALOGUE["cifar10"]), {"cifar-10-python.tar.gz.part": b"\x1f\x8b"})
    message = refusal("cifar10")
    assert str(folder) in message
    assert "expected in" in message
    assert "cifar-10-python.tar.gz (from https://www.cs.toronto.edu/~kriz/cifar.html)" in message
