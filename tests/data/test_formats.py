"""Each format gives back the pixels, labels, splits and names that were written into it."""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stabletrain.data.catalogue import CATALOGUE, list_datasets
from stabletrain.data.crops import celeba_crop, centre_crop
from stabletrain.data.load import load_dataset
from stabletrain.data.locate import official_folder
from stabletrain.data.sources import ArraySource, EncodedSource, RowSource
from stabletrain.data.spec import DataSpec, Labels, Split
from stabletrain.errors import DataError
from tests.data.written import (
    cifar_files,
    class_folders,
    encoded,
    idx_bytes,
    idx_files,
    pixels,
    tiny_imagenet_files,
    write_files,
    write_tar,
    write_zip,
)


def whole(split: Split) -> np.ndarray:
    """All images, which must also be what `read` gives one by one, out of order."""
    images = split.images.array()
    assert images is not None
    order = np.random.default_rng(0).permutation(len(split))
    np.testing.assert_array_equal(split.images.read(order), images[order])
    assert images.shape == (len(split), *split.images.shape)
    return images


def labels_of(labels: Labels | None) -> Labels:
    """Labels that are there."""
    assert labels is not None
    return labels


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_are_the_real_ones_in_a_fixed_stratified_split() -> None:
    """1,797 images, 0..16 stretched to 0..255; every fifth of each class is a test; the content is the recorded one."""
    from sklearn.datasets import load_digits

    dataset = load_dataset("digits")
    real = load_digits()
    assert (dataset.spec.train_count, dataset.spec.test_count) == (1442, 355)
    assert dataset.spec.image_size == 8
    assert dataset.spec.num_classes == 10
    assert dataset.spec.fingerprint == "73bdf7f6334c489bded77317940699aebecb64cc1dc09b5fd3dc6143f43aa9c6"
    images = np.concatenate([whole(dataset.train), whole(dataset.test)])
    assert (images.min(), images.max()) == (0, 255)
    ours = sorted(np.rint(image.astype(float) * 16 / 255).astype(int).tobytes() for image in images[..., 0])
    assert ours == sorted(image.astype(int).tobytes() for image in real.images)
    share = np.bincount(labels_of(dataset.test.labels)) / np.bincount(real.target)
    assert ((share > 0.19) & (share <= 0.2)).all()


def test_the_description_survives_a_file() -> None:
    """`DataSpec` to plain values and back."""
    spec = load_dataset("digits").spec
    assert DataSpec.from_dict(spec.to_dict()) == spec


def test_the_catalogue_agrees_with_itself() -> None:
    """As many names as classes, and a place to get each set from."""
    for info in list_datasets():
        assert CATALOGUE[info.name] is info
        assert len(info.class_names) in (0, info.num_classes)
        assert info.bundled or (info.files and info.source)
    assert len(set(CATALOGUE["cifar100"].class_names)) == 100


# --- .npz -------------------------------------------------------------------------------------------------------------


def write_npz(path: Path, **contents: Any) -> str:
    """An .npz with these arrays."""
    np.savez(path, **contents)
    return str(path)


def test_npz_with_splits_and_names(tmp_path: Path) -> None:
    """Pixels, labels and names as written; other keys are ignored."""
    x, y = pixels(12), np.arange(12, dtype=np.uint8) % 3
    path = write_npz(
        tmp_path / "my set.npz", train_x=x[:9], train_y=y[:9], test_x=x[9:], test_y=y[9:], names=np.array(list("abc")),
        extra=np.array([{"a": 1}], dtype=object),
    )  # fmt: skip
    dataset = load_dataset("digits", data=path)
    np.testing.assert_array_equal(whole(dataset.train), x[:9])
    np.testing.assert_array_equal(whole(dataset.test), x[9:])
    np.testing.assert_array_equal(dataset.train.labels, y[:9])
    assert dataset.spec.class_names == ("a", "b", "c")
    assert dataset.name == "my-set"
    assert load_dataset("pets", data=path).name == "pets"


def test_npz_without_a_test_split_holds_out_a_tenth_of_each_class(tmp_path: Path) -> None:
    """With train_x or x; an empty test_x keeps everything for training; without labels a tenth of all."""
    x, y = pixels(60), np.repeat([0, 1, 2], 20)
    for prefix in ("train_", ""):
        dataset = load_dataset("digits", data=write_npz(tmp_path / "a.npz", **{f"{prefix}x": x, f"{prefix}y": y}))
        assert np.bincount(labels_of(dataset.train.labels)).tolist() == [18, 18, 18]
        assert np.bincount(labels_of(dataset.test.labels)).tolist() == [2, 2, 2]
        np.testing.assert_array_equal(whole(dataset.test), x[[9, 19, 29, 39, 49, 59]])
    unlabelled = load_dataset("digits", data=write_npz(tmp_path / "b.npz", train_x=x))
    assert (len(unlabelled.train), len(unlabelled.test), unlabelled.train.labels) == (54, 6, None)
    kept = load_dataset("digits", data=write_npz(tmp_path / "c.npz", train_x=x, train_y=y, test_x=x[:0]))
    assert (len(kept.train), len(kept.test)) == (60, 0)


@pytest.mark.parametrize("shape", ["N H W", "N H W 1"])
def test_greyscale_arrays_may_leave_the_channel_out(tmp_path: Path, shape: str) -> None:
    """[N, H, W] is [N, H, W, 1]."""
    x = pixels(12, channels=1)
    dataset = load_dataset("g", data=write_npz(tmp_path / "a.npz", train_x=x if shape.endswith("1") else x[..., 0]))
    assert dataset.spec.channels == 1
    assert set(map(bytes, [*whole(dataset.train), *whole(dataset.test)])) == set(map(bytes, x))


def test_floats_in_either_range_give_the_same_pixels(tmp_path: Path) -> None:
    """[0, 1] and [-1, 1], float32 and float64; and integers of any type."""
    x = pixels(12)
    test_x = x[:2] // 2 + 128  # has no negative value in [-1, 1]: the range must be decided over both splits
    for scaled in (
        lambda a: a / 255,
        lambda a: (a / 127.5 - 1).astype(np.float32),
        lambda a: a.astype(np.int64),
    ):
        dataset = load_dataset("f", data=write_npz(tmp_path / "a.npz", train_x=scaled(x), test_x=scaled(test_x)))
        np.testing.assert_array_equal(whole(dataset.train), x)
        np.testing.assert_array_equal(whole(dataset.test), test_x)


@pytest.mark.parametrize("compressed", [False, True])
def test_large_arrays_are_mapped_and_not_held(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    """Above the limit `array()` is None, `read` gives the same pixels; what was compressed is unpacked in the cache."""
    x = pixels(40)
    path = tmp_path / "large.npz"
    (np.savez_compressed if compressed else np.savez)(path, train_x=x, train_y=np.arange(40) % 2, test_x=x[:0])
    small = load_dataset("a", data=str(path))
    for module in ("arrays", "sources"):
        monkeypatch.setattr(f"stabletrain.data.{module}.MEMORY_LIMIT", x.nbytes - 1)
    dataset = load_dataset("a", data=str(path))
    assert dataset.train.images.array() is None
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(dataset.train.images.read(order), x[order])
    assert dataset.spec == small.spec  # the fingerprint too: the sample of 256 images is all there are
    assert isinstance(dataset.train.images, ArraySource)
    assert isinstance(dataset.train.images._images.base, np.memmap)
    assert len(list((home / "stabletrain" / "unpacked").glob("*.npy"))) == int(compressed)


# --- folders and zips -------------------------------------------------------------------------------------------------


def test_class_folders_with_splits_in_a_folder_and_in_a_zip(tmp_path: Path) -> None:
    """Sorted class names are labels; a folder, a zip, and a zip with everything in one folder have one fingerprint."""
    files = {
        **class_folders({"cat": 3, "ant": 2}, prefix="train/", seed=1),
        **class_folders({"ant": 1, "cat": 1}, prefix="val/", seed=2),
        "README.txt": b"not a picture",
        ".hidden/x.png": b"not looked at",
        "__MACOSX/train/ant/._000.png": b"not looked at",
    }
    places = [
        write_files(tmp_path / "pets", files),
        write_zip(tmp_path / "pets.zip", files),
        write_zip(tmp_path / "enclosed.zip", {f"pets-1.0/{name}": content for name, content in files.items()}),
    ]
    fingerprints = set()
    for place in places:
        dataset = load_dataset("digits", data=str(place))
        assert dataset.spec.class_names == ("ant", "cat")
        assert dataset.train.labels is not None
        assert dataset.train.labels.tolist() == [0, 0, 1, 1, 1]
        assert (len(dataset.test), dataset.spec.channels) == (2, 3)
        assert {bytes(image) for image in whole(dataset.train)} == {bytes(image) for image in pixels(5, seed=1)}
        fingerprints.add(dataset.spec.fingerprint)
    assert len(fingerprints) == 1
    assert load_dataset("digits", data=str(places[0])).name == "pets"


def test_the_fingerprint_follows_the_content_and_nothing_else(tmp_path: Path) -> None:
    """Another place and another time of writing: the same. A pixel, a name, a label, a size asked for: another."""
    files = class_folders({"a": 3, "b": 3})

    def fingerprint(files: dict[str, bytes], **options: int) -> str:
        folder = write_files(tmp_path / str(len(list(tmp_path.iterdir()))), files)
        return load_dataset("digits", data=str(folder), **options).spec.fingerprint

    original = fingerprint(files)
    assert fingerprint(dict(reversed(files.items()))) == original
    changed = dict(files)
    changed["a/000.png"] = encoded(pixels(1, seed=9)[0])
    renamed = {name.replace("a/000", "a/009"): content for name, content in files.items()}
    moved = {name.replace("a/000", "b/000x"): content for name, content in files.items()}
    others = [fingerprint(changed), fingerprint(renamed), fingerprint(moved), fingerprint(files, image_size=4)]
    assert len({original, *others}) == 5


def test_without_a_test_folder_a_tenth_is_held_out_by_name(tmp_path: Path) -> None:
    """Of each class, whatever else lies there; the same from a zip; a flat folder has no labels."""
    files = class_folders({"a": 20, "b": 30})
    for place in (
        write_files(tmp_path / "x", files),
        write_zip(tmp_path / "x.zip", {f"x/{n}": c for n, c in files.items()}),
    ):
        dataset = load_dataset("digits", data=str(place))
        assert np.bincount(labels_of(dataset.test.labels)).tolist() == [2, 3]
        held = {name.removeprefix("x/") for name in dataset.test.images.names}  # type: ignore[attr-defined]
        assert not held & {name.removeprefix("x/") for name in dataset.train.images.names}  # type: ignore[attr-defined]
        assert len(held) == 5
    flat = write_files(tmp_path / "flat", {f"{i}.png": encoded(image) for i, image in enumerate(pixels(20))})
    dataset = load_dataset("digits", data=str(flat))
    assert (len(dataset.train), len(dataset.test), dataset.train.labels) == (18, 2, None)
    assert dataset.spec.num_classes == 0


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    """`train` is a split where a test folder lies beside it, or where it is alone; else it is a vehicle."""
    vehicles = write_files(tmp_path / "vehicles", class_folders({"bus": 2, "train": 2}))
    assert load_dataset("digits", data=str(vehicles)).spec.class_names == ("bus", "train")
    alone = write_files(tmp_path / "alone", class_folders({"a": 2, "b": 2}, prefix="train/"))
    assert load_dataset("digits", data=str(alone)).spec.class_names == ("a", "b")


def test_an_unlabelled_test_folder_is_passed_over_for_a_labelled_validation_folder(tmp_path: Path) -> None:
    """As in ImageNet, whose test images have no labels."""
    files = class_folders({"a": 2, "b": 2}, prefix="train/") | class_folders({"a": 1, "b": 1}, prefix="val/")
    files["test/0.png"] = encoded(pixels(1)[0])
    dataset = load_dataset("digits", data=str(write_files(tmp_path / "x", files)))
    assert dataset.test.labels is not None
    assert dataset.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("1", 1), ("LA", 1), ("I;16", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("CMYK", 3)]
)
def test_pictures_of_every_kind_are_converted(tmp_path: Path, mode: str, channels: int) -> None:
    """Greyscale kinds to one channel, all others to three; 16-bit greyscale keeps its upper bits."""
    colour = Image.fromarray(pixels(1)[0])
    deep = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024)
    stream = io.BytesIO()
    picture = deep if mode == "I;16" else colour.convert(mode)
    picture.save(stream, format="TIFF" if mode == "CMYK" else "PNG")
    ending = "tif" if mode == "CMYK" else "png"
    dataset = load_dataset(
        "x", data=str(write_files(tmp_path / "x", {f"{i}.{ending}": stream.getvalue() for i in range(3)}))
    )
    assert dataset.train.images.shape == (8, 8, channels)
    image = whole(dataset.train)[0]
    if mode == "I;16":
        np.testing.assert_array_equal(image[..., 0], np.arange(64).reshape(8, 8) * 4)
    if mode == "RGBA":
        np.testing.assert_array_equal(image, np.asarray(colour))


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    """A fully transparent black picture is white."""
    stream = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(stream, format="PNG")
    dataset = load_dataset("x", data=str(write_files(tmp_path / "x", {"0.png": stream.getvalue()})))
    assert (whole(dataset.train) == 255).all()


def test_a_few_grey_pictures_among_coloured_ones_become_rgb(tmp_path: Path) -> None:
    """The first picture alone does not decide."""
    files = {"0.png": encoded(pixels(1, channels=1)[0]), "1.png": encoded(pixels(1)[0])}
    assert load_dataset("x", data=str(write_files(tmp_path / "x", files))).train.images.shape == (8, 8, 3)


def test_a_known_name_lends_its_channels(tmp_path: Path) -> None:
    """MNIST saved as coloured PNGs is greyscale again; CIFAR with a grey picture is RGB."""
    grey = write_files(tmp_path / "m", class_folders({"0": 2, "1": 2}, size=28))
    assert load_dataset("mnist", data=str(grey)).train.images.shape == (28, 28, 1)
    colour = write_files(tmp_path / "c", class_folders({"0": 2, "1": 2}, size=32, channels=1))
    assert load_dataset("cifar10", data=str(colour)).train.images.shape == (32, 32, 3)


def test_large_sets_stay_on_disk_and_are_decoded_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit `array()` is None; `read` gives the pictures in the order asked for, repeated ones too."""
    images = pixels(150)
    folder = write_files(tmp_path / "x", {f"{i:03d}.png": encoded(image) for i, image in enumerate(images)})
    monkeypatch.setattr("stabletrain.data.sources.MEMORY_LIMIT", 1000)
    source = load_dataset("x", data=str(folder)).train.images
    assert source.array() is None
    assert isinstance(source, EncodedSource)
    numbers = [int(name[:3]) for name in source.names]
    asked = np.array([7, 3, 3, 130, 0])
    np.testing.assert_array_equal(source.read(asked), images[[numbers[i] for i in asked]])
    assert source.read(np.array([], np.int32)).shape == (0, 8, 8, 3)


# --- crops and sizes --------------------------------------------------------------------------------------------------


def test_the_centre_crop_keeps_the_centre_and_averages() -> None:
    """A wide picture loses its sides; a picture of boxes of one colour each is reduced to these colours."""
    boxes = pixels(1, 4)[0]
    wide = np.zeros((16, 40, 3), np.uint8)
    wide[:, 12:28] = boxes.repeat(4, axis=0).repeat(4, axis=1)
    np.testing.assert_array_equal(np.asarray(centre_crop(4)(Image.fromarray(wide))), boxes)


@pytest.mark.parametrize("size", [(31, 97), (200, 63), (64, 64), (3, 5), (65, 64)])
def test_the_centre_crop_gives_the_size_asked_for(size: tuple[int, int]) -> None:
    """From larger and smaller pictures of any shape."""
    assert centre_crop(16)(Image.new("RGB", size)).size == (16, 16)


def test_the_celeba_crop_is_the_papers() -> None:
    """Columns 25..152 and rows 57..184, halved bilinearly; cropped pictures stay; others are refused."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (218, 178, 3), dtype=np.uint8))
    expected = picture.crop((25, 57, 153, 185)).resize((64, 64), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(np.asarray(celeba_crop(64)(picture)), np.asarray(expected))
    assert celeba_crop(64)(expected) is expected
    with pytest.raises(DataError, match="178x218"):
        celeba_crop(64)(Image.new("RGB", (100, 100)))


def test_asking_for_the_size_that_the_images_have_changes_nothing() -> None:
    """The same pixels under the same fingerprint."""
    assert load_dataset("digits", image_size=8).spec == load_dataset("digits").spec


def test_image_size_resizes_arrays_and_pictures_alike(tmp_path: Path) -> None:
    """The same pixels from an .npz and from a folder; every source says its new shape."""
    images = pixels(5, 16)
    folder = write_files(tmp_path / "x", {f"{i}.png": encoded(image) for i, image in enumerate(images)})
    from_folder = load_dataset("x", data=str(folder), image_size=8)
    from_npz = load_dataset("x", data=write_npz(tmp_path / "x.npz", train_x=images), image_size=8)
    assert from_folder.spec.image_size == from_npz.spec.image_size == 8
    np.testing.assert_array_equal(whole(from_folder.train), whole(from_npz.train))


# --- published formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", ["tar.gz", "folder"])
def test_cifar10_archive(tmp_path: Path, packed: str) -> None:
    """Batches in their order, colour planes to channels, names from the file."""
    images, labels, names = pixels(24, 32), np.arange(24) % 10, [f"class {i}" for i in range(10)]
    files = cifar_files(images, labels.tolist(), names=names)
    place = tmp_path / "cifar-10-python.tar.gz"
    if packed == "folder":
        place = write_files(tmp_path / "cifar-10-batches-py", files)
    else:
        write_tar(place, {"data_batch_3": files.pop("data_batch_3"), **files})
    dataset = load_dataset("cifar10", data=str(place))
    np.testing.assert_array_equal(whole(dataset.train), images[:20])
    np.testing.assert_array_equal(whole(dataset.test), images[20:])
    np.testing.assert_array_equal(dataset.train.labels, labels[:20])
    assert dataset.spec.class_names == tuple(names)


def test_cifar100_archive_gives_the_fine_labels(tmp_path: Path) -> None:
    """Not the coarse ones beside them."""
    labels = [7, 99, 3, 42]
    files = cifar_files(pixels(4, 32), labels, fine=True, names=CATALOGUE["cifar100"].class_names)
    dataset = load_dataset("cifar100", data=str(write_tar(tmp_path / "c.tar.gz", files, "cifar-100-python")))
    assert [*labels_of(dataset.train.labels), *labels_of(dataset.test.labels)] == labels
    assert dataset.spec.class_names[42] == "leopard"


@pytest.mark.parametrize("given", ["folder", "one file", "zip", "unpacked"])
def test_idx_files(tmp_path: Path, given: str) -> None:
    """Given as a folder, as one of the files, in a zip, and not gzipped."""
    images = [pixels(6, 28, 1, seed)[..., 0] for seed in (0, 1)]
    labels = [np.arange(6), np.arange(6)[::-1]]
    files = idx_files(images, labels)
    if given == "unpacked":
        files = {name.removesuffix(".gz"): gzip.decompress(content) for name, content in files.items()}
    place = write_zip(tmp_path / "m.zip", files) if given == "zip" else write_files(tmp_path / "m", files)
    if given == "one file":
        place = place / "t10k-images-idx3-ubyte.gz"
    dataset = load_dataset("fashion-mnist", data=str(place))
    np.testing.assert_array_equal(whole(dataset.train)[..., 0], images[0])
    np.testing.assert_array_equal(whole(dataset.test)[..., 0], images[1])
    np.testing.assert_array_equal(dataset.test.labels, labels[1])
    assert dataset.spec.class_names[9] == "Ankle boot"


def test_emnist_is_set_upright_and_the_balanced_set_is_chosen(tmp_path: Path) -> None:
    """Its idx files hold transposed images, and gzip.zip holds six sets."""
    upright = [pixels(3, 28, 1, seed)[..., 0] for seed in (0, 1)]
    turned = [images.transpose(0, 2, 1) for images in upright]
    labels = [np.array([0, 46, 3]), np.array([1, 2, 3])]
    files = idx_files(turned, labels, "gzip/emnist-balanced-", "test")
    files |= idx_files(
        [images[:1] for images in turned], [label[:1] for label in labels], "gzip/emnist-letters-", "test"
    )
    dataset = load_dataset("emnist", data=str(write_zip(tmp_path / "gzip.zip", files)))
    np.testing.assert_array_equal(whole(dataset.train)[..., 0], upright[0])
    assert dataset.train.labels is not None
    assert [dataset.spec.class_names[label] for label in dataset.train.labels] == ["0", "t", "3"]
    with pytest.raises(DataError, match=r"several sets of idx files \(emnist-balanced-, emnist-letters-\)"):
        load_dataset("x", data=str(tmp_path / "gzip.zip"))


@pytest.mark.parametrize("packed", ["zip", "folder"])
def test_tiny_imagenet(tmp_path: Path, packed: str) -> None:
    """Validation labels from val_annotations.txt, names from words.txt; labels number the sorted wnids."""
    files = tiny_imagenet_files(["n03", "n01"], 2)
    place = write_zip(tmp_path / "t.zip", files) if packed == "zip" else write_files(tmp_path / "t", files)
    dataset = load_dataset("tiny-imagenet", data=str(place))
    assert dataset.spec.class_names == ("name of n01", "name of n03")
    assert sorted(labels_of(dataset.train.labels)) == [0, 0, 1, 1]
    assert dataset.test.labels is not None
    assert dataset.test.labels.tolist() == [1, 0]  # the order of val_annotations.txt
    assert whole(dataset.train).shape == (4, 64, 64, 3)


def test_cub200(tmp_path: Path) -> None:
    """Its four lists say the split and the labels; pictures of any size are cropped to 128."""
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    paths = [f"{names[i % 2]}/{i}.jpg" for i in range(4)]
    root = "CUB_200_2011/"
    files = {
        f"{root}images.txt": "".join(f"{i + 1} {path}\n" for i, path in enumerate(paths)).encode(),
        f"{root}image_class_labels.txt": b"1 1\n2 2\n3 1\n4 2\n",
        f"{root}train_test_split.txt": b"1 1\n2 1\n3 0\n4 1\n",
        f"{root}classes.txt": "".join(f"{i + 1} {name}\n" for i, name in enumerate(names)).encode(),
    }
    for number, path in enumerate(paths):
        files[f"{root}images/{path}"] = encoded(np.zeros((140 + number, 300, 3), np.uint8), "JPEG")
    dataset = load_dataset("cub200", data=str(write_files(tmp_path / "c", files)))
    assert dataset.spec.class_names == ("Black footed Albatross", "Laysan Albatross")
    assert dataset.train.labels is not None
    assert dataset.train.labels.tolist() == [0, 1, 1]
    assert whole(dataset.test).shape == (1, 128, 128, 3)


def test_celeba(tmp_path: Path) -> None:
    """The partition file beside the archive gives the split (0 train, 2 test); each face is cropped to 64."""
    face = encoded(np.zeros((218, 178, 3), np.uint8), "JPEG")
    write_zip(tmp_path / "img_align_celeba.zip", {f"img_align_celeba/{i:06d}.jpg": face for i in range(1, 7)})
    lines = [f"{i:06d}.jpg {flag}" for i, flag in enumerate([0, 0, 1, 2, 0, 2], start=1)]
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(lines))
    dataset = load_dataset("celeba64", data=str(tmp_path / "img_align_celeba.zip"))
    assert (len(dataset.train), len(dataset.test), dataset.spec.num_classes) == (3, 2, 0)
    assert whole(dataset.train).shape == (3, 64, 64, 3)
    (tmp_path / "list_eval_partition.txt").unlink()
    with pytest.raises(DataError, match=r"needs list_eval_partition\.txt"):
        load_dataset("celeba64", data=str(tmp_path / "img_align_celeba.zip"))


@pytest.mark.parametrize("compressed", [False, True])
def test_downsampled_imagenet(tmp_path: Path, home: Path, compressed: bool) -> None:
    """Ten batches in the order of their numbers, labels from 1, rows of colour planes; mapped from the disk."""
    images, labels = pixels(26, 64), np.arange(26) % 1000
    save = np.savez_compressed if compressed else np.savez
    parts = [*np.array_split(np.arange(24), 10), np.array([24, 25])]
    for number, part in enumerate(parts, start=1):
        rows = images[part].transpose(0, 3, 1, 2).reshape(len(part), -1)
        name = f"train_data_batch_{number}.npz" if number <= 10 else "val_data.npz"
        save(tmp_path / name, data=rows, labels=labels[part] + 1, mean=np.zeros(12288))
    dataset = load_dataset("imagenet64", data=str(tmp_path))
    assert isinstance(dataset.train.images, RowSource)
    np.testing.assert_array_equal(whole(dataset.train), images[:24])
    np.testing.assert_array_equal(whole(dataset.test), images[24:])
    np.testing.assert_array_equal(dataset.train.labels, labels[:24])
    assert dataset.spec.num_classes == 1000
    assert (home / "stabletrain" / "unpacked").exists() == compressed
    (tmp_path / "train_data_batch_7.npz").unlink()
    with pytest.raises(DataError, match=r"lacks train_data_batch_7\.npz"):
        load_dataset("imagenet64", data=str(tmp_path))


@pytest.mark.parametrize("size", [128, 256])
def test_imagenet_of_pictures_in_the_cache(size: int) -> None:
    """A folder of pictures per class, cropped to the name's size; both splits, without being told where they are."""
    folder = official_folder(CATALOGUE[f"imagenet{size}"])
    picture = encoded(np.zeros((150, 300, 3), np.uint8), "JPEG")
    write_files(folder, {f"{part}/n0144{i}/{i}.JPEG": picture for part in ("train", "val") for i in range(3)})
    dataset = load_dataset(f"imagenet{size}")
    assert (len(dataset.train), len(dataset.test), dataset.spec.num_classes) == (3, 3, 3)
    assert whole(dataset.train).shape == (3, size, size, 3)


def test_official_files_in_the_cache_are_found_by_name() -> None:
    """An archive, the four idx files, and anything else that --data would take."""
    for name in ("cifar10", "mnist", "tiny-imagenet"):
        official_folder(CATALOGUE[name]).mkdir(parents=True)
    write_tar(official_folder(CATALOGUE["cifar10"]) / "cifar-10-python.tar.gz", cifar_files(pixels(12, 32), [0] * 12))
    assert load_dataset("cifar10").spec.train_count == 10
    grey = pixels(3, 28, 1)[..., 0]
    write_files(official_folder(CATALOGUE["mnist"]), idx_files([grey, grey], [np.arange(3), np.arange(3)]))
    assert load_dataset("mnist").spec.train_count == 3
    folder = official_folder(CATALOGUE["tiny-imagenet"])
    write_npz(folder / "mine.npz", train_x=pixels(4, 64), train_y=np.arange(4))
    assert isinstance(load_dataset("tiny-imagenet").train.images, ArraySource)


def test_content_and_not_the_ending_decides(tmp_path: Path) -> None:
    """An .npz, a tar.gz and an idx file under other names."""
    npz = Path(write_npz(tmp_path / "a.npz", train_x=pixels(4))).rename(tmp_path / "a.data")
    assert load_dataset("x", data=str(npz)).spec.train_count == 4
    tar = write_tar(tmp_path / "b.bin", cifar_files(pixels(12, 32), [0] * 12))
    assert load_dataset("cifar10", data=str(tar)).spec.train_count == 10
    assert idx_bytes(np.zeros((1, 2), np.uint8))[:3] == b"\0\0\x08"
    assert zipfile.is_zipfile(npz)


# --- real data --------------------------------------------------------------------------------------------------------


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "file", "size", "train", "test", "classes"),
    [
        ("cifar10", "cifar10_exact.npz", 32, 3136, 509, 10),
        ("mnist", "mnist.npz", 28, 10_000, 5_000, 10),
        ("fashion-mnist", "fashion_mnist.npz", 28, 10_000, 5_000, 10),
        ("emnist", "emnist_balanced.npz", 28, 6_432, 691, 47),
    ],
)
def test_real_images_are_read_with_their_labels(
    real_data: Path, name: str, file: str, size: int, train: int, test: int, classes: int
) -> None:
    """The test images resemble the mean train image of their own class more than chance: labels and images agree."""
    dataset = load_dataset(name, data=str(real_data / file))
    assert (dataset.spec.train_count, dataset.spec.test_count) == (train, test)
    assert (dataset.spec.image_size, dataset.spec.num_classes) == (size, classes)
    assert dataset.train.labels is not None
    x, test_x = (whole(split).reshape(len(split), -1) / 255 for split in (dataset.train, dataset.test))
    means = np.stack([x[dataset.train.labels == label].mean(axis=0) for label in range(classes)])
    distances = (means**2).sum(axis=1) - 2 * test_x @ means.T
    accuracy = float(np.mean(distances.argmin(axis=1) == dataset.test.labels))
    assert accuracy > 2.0 / classes


@pytest.mark.realdata
def test_real_jpegs_are_read_from_a_zip_in_tiny_imagenets_layout(real_data: Path, tmp_path: Path) -> None:
    """40 published pictures of four classes, packed as published: bytes, labels and names find each other."""
    with np.load(real_data / "tiny_imagenet_jpeg.npz") as packed:
        jpeg, offsets, labels, held, wnids, names = (
            packed[key] for key in ("jpeg", "offsets", "labels", "is_val", "wnids", "names")
        )
    four = np.argsort(wnids)[[0, 50, 100, 150]]
    files = {"t/wnids.txt": "\n".join(wnids[four]).encode()}
    files["t/words.txt"] = "\n".join(f"{wnid}\t{name}" for wnid, name in zip(wnids, names)).encode()
    lines = []
    for label in four:
        for index in np.flatnonzero((labels == label) & ~held)[:8]:
            files[f"t/train/{wnids[label]}/images/{index}.JPEG"] = jpeg[offsets[index] : offsets[index + 1]].tobytes()
        for index in np.flatnonzero((labels == label) & held)[:2]:
            files[f"t/val/images/{index}.JPEG"] = jpeg[offsets[index] : offsets[index + 1]].tobytes()
            lines.append(f"{index}.JPEG\t{wnids[label]}\t0\t0\t63\t63")
    files["t/val/val_annotations.txt"] = "\n".join(lines).encode()
    dataset = load_dataset("tiny-imagenet", data=str(write_zip(tmp_path / "tiny-imagenet-200.zip", files)))
    assert (len(dataset.train), len(dataset.test)) == (32, 8)
    assert dataset.spec.class_names == tuple(str(names[label]).split(",")[0] for label in four)
    source = dataset.train.images
    assert isinstance(source, EncodedSource)
    assert dataset.train.labels is not None
    for index, name in enumerate(source.names):
        number = int(Path(name).stem)
        assert labels[number] == four[dataset.train.labels[index]]
        picture = Image.open(io.BytesIO(jpeg[offsets[number] : offsets[number + 1]].tobytes())).convert("RGB")
        np.testing.assert_array_equal(source.decode(index), np.asarray(picture))
