"""Prepared TFDS directories are read without TensorFlow, in both of TFDS's usual formats."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from stabletrain.data import tf_example, tfds
from stabletrain.data.catalogue import CATALOGUE
from stabletrain.data.load import load_dataset
from stabletrain.data.prepare import prepare_dataset
from stabletrain.errors import DataError
from tests.data.written import encoded, example_bytes, pixels, write_prepared


def examples(images: np.ndarray, labels: Sequence[int | None]) -> list[bytes]:
    """Serialised examples."""
    return [example_bytes(encoded(image), label) for image, label in zip(images, labels)]


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_a_prepared_set_is_read_in_order(file_format: str) -> None:
    """Images and labels of both splits over several shards, from the newest version."""
    if file_format == "array_record":
        pytest.importorskip("array_record.python.array_record_module")
    images, labels = pixels(9, 32), list(range(9))
    splits = {"train": examples(images[:7], labels[:7]), "test": examples(images[7:], labels[7:])}
    folder = tfds.data_dir() / "cifar10"
    write_prepared(folder / "3.0.2", {"train": [], "test": []}, name="cifar10")
    write_prepared(folder / "10.0.0", splits, name="cifar10", file_format=file_format, shards=3)
    dataset = load_dataset("cifar10")
    train = dataset.train.images.array()
    assert train is not None
    np.testing.assert_array_equal(train, images[:7])
    np.testing.assert_array_equal(dataset.test.images.read(np.array([1, 0])), images[[8, 7]])
    assert dataset.train.labels is not None
    assert dataset.train.labels.tolist() == labels[:7]
    assert dataset.spec.class_names == CATALOGUE["cifar10"].class_names


def test_both_formats_have_one_fingerprint_which_follows_the_content() -> None:
    """What was prepared is the same data, however it is stored; another label or pixel is not."""
    images = pixels(4, 32)
    fingerprints = []
    for file_format, changed in (("tfrecord", 0), ("array_record", 0), ("tfrecord", 1)):
        folder = tfds.data_dir() / "cifar10" / "3.0.2"
        train = examples(images[:3], [0, 1, 2 + changed])
        write_prepared(
            folder, {"train": train, "test": examples(images[3:], [0])}, name="cifar10", file_format=file_format
        )
        fingerprints.append(load_dataset("cifar10").spec.fingerprint)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_emnist_is_set_upright_and_crops_apply() -> None:
    """TFDS holds EMNIST transposed as its files do; birds of any size are cropped; faces have no labels."""
    upright = pixels(2, 28, 1)
    turned = examples(upright.transpose(0, 2, 1, 3), [3, 46])
    write_prepared(tfds.data_dir() / "emnist/balanced/3.0.0", {"train": turned, "test": turned}, name="emnist")
    emnist = load_dataset("emnist").train.images.array()
    assert emnist is not None
    np.testing.assert_array_equal(emnist, upright)
    birds = [example_bytes(encoded(np.zeros((300, 200 + i, 3), np.uint8)), i) for i in range(2)]
    write_prepared(tfds.data_dir() / "caltech_birds2011/0.1.1", {"train": birds, "test": birds}, name="cub")
    assert load_dataset("cub200").train.images.read(np.arange(2)).shape == (2, 128, 128, 3)
    faces = [example_bytes(encoded(np.zeros((218, 178, 3), np.uint8)), None)]
    write_prepared(tfds.data_dir() / "celeb_a/2.1.0", {"train": faces, "test": faces}, name="celeb_a", shards=1)
    celeba = load_dataset("celeba64")
    assert (celeba.spec.image_size, celeba.spec.num_classes, celeba.train.labels) == (64, 0, None)


def test_labels_of_large_splits_are_remembered(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them means reading the whole split: it is done once, and again after the set was prepared anew."""
    monkeypatch.setattr(tfds, "REMEMBERED_LABELS", 2)
    folder = tfds.data_dir() / "cifar10/3.0.2"
    records = examples(pixels(4, 32), [0, 1, 2, 3])
    write_prepared(folder, {"train": records, "test": records[:1]}, name="cifar10")
    first = load_dataset("cifar10")
    kept = list((home / "stabletrain" / "labels").iterdir())
    assert len(kept) == 1
    np.save(kept[0], np.array([9, 8, 7, 6], np.int32))  # a mark, to see that it is read
    assert load_dataset("cifar10").train.labels.tolist() == [9, 8, 7, 6]  # type: ignore[union-attr]
    stated = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**stated, "downloadSize": "1"}))
    np.testing.assert_array_equal(load_dataset("cifar10").train.labels, first.train.labels)


@pytest.mark.parametrize("label", [0, 1, 127, 128, 2**40, 2**63 - 1, -1])
def test_examples_are_taken_apart_as_protobuf_put_them_together(label: int) -> None:
    """Bytes of any length, integers of any size, beside features that are not wanted; protobuf put them together."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    for name in ("a", "image", "z"):
        example.features.feature[name].bytes_list.value.append(name.encode() * abs(label % 100_000))
    example.features.feature["label"].int64_list.value.extend([label, 3])
    example.features.feature["box"].float_list.value.extend([0.5, 1.5])
    example.features.feature["empty"].SetInParent()
    values = tf_example.parse(example.SerializeToString(), ("image", "label", "box", "empty", "absent"))
    assert values == {"image": [b"image" * abs(label % 100_000)], "label": [label, 3], "box": [], "empty": []}


def damage(folder: Path, how: str) -> None:
    """Breaks a prepared directory."""
    shard = folder / "cifar10-train.tfrecord-00001-of-00002"
    description = folder / "dataset_info.json"
    if how == "missing shard":
        shard.unlink()
    elif how == "cut shard":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif how == "short shard":
        record = shard.read_bytes()
        shard.write_bytes(record[: len(record) // 2] if len(record) % 2 == 0 else record)
    elif how == "no description":
        description.write_text("{")
    elif how == "no split":
        description.write_text(description.read_text().replace('"test"', '"validation"'))
    elif how == "other format":
        description.write_text(description.read_text().replace('"tfrecord"', '"parquet"'))
    elif how == "no label":
        write_prepared_again(folder, example_bytes(encoded(pixels(1, 32)[0]), None))
    elif how == "damaged example":
        write_prepared_again(folder, b"\xff" * 40)
    elif how == "damaged image":
        write_prepared_again(folder, example_bytes(b"not a picture", 1))


def write_prepared_again(folder: Path, example: bytes) -> None:
    """The same directory with this example at the end of the train split."""
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    good = examples(pixels(3, 32), [0, 1, 2])
    write_prepared(folder, {"train": [*good, example], "test": good}, name="cifar10")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing shard", r"lacks 1 of the 2 shards of the split 'train'"),
        ("cut shard", r"00001-of-00002 is damaged: it ends within record 3"),
        ("short shard", r"'train' has 3 examples; 4 were prepared"),
        ("no description", r"dataset_info\.json is not the description of a prepared data set"),
        ("no split", r"has no split 'test'; it has train, validation"),
        ("other format", r"is in the format 'parquet'; tfrecord and array_record can be read"),
        ("no label", r"example 3 of the prepared cifar10 \(train\) has no label from 0 to 9"),
        ("damaged example", r"a prepared example is damaged"),
        ("damaged image", r"cannot read the image example 3 \(train\) in .*cifar10"),
    ],
)
def test_damaged_directories_are_refused_in_one_line(how: str, message: str) -> None:
    """Each with what is wrong and where."""
    folder = tfds.data_dir() / "cifar10/3.0.2"
    good = examples(np.repeat(pixels(1, 32), 4, axis=0), [0, 1, 2, 2])  # records of one length
    write_prepared(folder, {"train": good, "test": good}, name="cifar10")
    damage(folder, how)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("cifar10").train.images.array()
    assert "\n" not in str(caught.value)


def test_reading_needs_no_tensorflow() -> None:
    """Nor TFDS itself: in a process where importing them is an error; nothing is printed beside the result."""
    records = examples(pixels(2, 28, 1), [0, 1])
    write_prepared(tfds.data_dir() / "mnist/3.0.1", {"train": records, "test": records}, name="mnist")
    code = (
        "import sys; sys.modules['tensorflow'] = None; sys.modules['tensorflow_datasets'] = None\n"
        "from stabletrain.data.load import load_dataset\n"
        "print(load_dataset('mnist').train.images.array().shape)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "(2, 28, 28, 1)\n"


def test_preparing_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow, the network, or a set that TFDS does not have; always with what to put where."""
    monkeypatch.setattr(tfds, "can_prepare", lambda: False)
    with pytest.raises(DataError, match=r"cifar10 cannot be prepared on this machine: put cifar-10-python\.tar\.gz"):
        prepare_dataset("cifar10")
    monkeypatch.setattr(tfds, "can_prepare", lambda: True)
    with pytest.raises(DataError, match=r"storage\.googleapis\.com does not answer; or put cifar-10-python"):
        prepare_dataset("cifar10")
    with pytest.raises(DataError, match=r"put tiny-imagenet-200\.zip"):
        prepare_dataset("tiny-imagenet")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed (extra tfds)")
@pytest.mark.filterwarnings("default")  # TensorFlow's own
@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_what_tfds_itself_prepares_is_read(file_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set with MNIST's name and features, prepared by `tfds.prepare` with TFDS's own writers and encoders."""
    import tensorflow_datasets

    images = pixels(9, 28, 1)

    class Mnist(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """MNIST, of random images."""

        VERSION = tensorflow_datasets.core.Version("3.0.1")

        def _info(self) -> object:
            features = tensorflow_datasets.features.FeaturesDict(
                {
                    "image": tensorflow_datasets.features.Image(shape=(28, 28, 1)),
                    "label": tensorflow_datasets.features.ClassLabel(num_classes=10),
                }
            )
            return tensorflow_datasets.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager: object) -> dict[str, object]:
            return {"train": self._generate_examples(0, 6), "test": self._generate_examples(6, 9)}

        def _generate_examples(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, object]]]:
            yield from ((index, {"image": images[index], "label": index}) for index in range(start, stop))

    def builder(name: str, *, data_dir: Path, **options: object) -> Mnist:
        return Mnist(data_dir=data_dir, file_format=file_format)

    monkeypatch.setattr(tfds, "online", lambda: True)
    monkeypatch.setattr(tensorflow_datasets, "builder", builder)
    dataset = load_dataset("mnist")
    assert (dataset.spec.train_count, dataset.spec.test_count) == (6, 3)
    for split in (dataset.train, dataset.test):
        assert split.labels is not None
        np.testing.assert_array_equal(split.images.read(np.arange(len(split))), images[split.labels])


def test_a_failure_within_tfds_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own exceptions become the reason."""
    tensorflow_datasets = pytest.importorskip("tensorflow_datasets")

    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("Manual directory\ndoes not exist")

    monkeypatch.setattr(tfds, "can_prepare", lambda: True)
    monkeypatch.setattr(tfds, "online", lambda: True)
    monkeypatch.setattr(tensorflow_datasets, "builder", fail)
    with pytest.raises(
        DataError, match=r"^TFDS could not prepare imagenet2012: Manual directory does not exist; or put"
    ):
        prepare_dataset("imagenet64")
