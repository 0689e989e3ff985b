"""The data sets known by name: sizes, classes, official files, and how their pictures are cropped.

Imports nothing heavy: `stabletrain data list` and the command line's checks read it.
"""

from __future__ import annotations

from dataclasses import dataclass

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
EMNIST_CHARACTERS = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt")
DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class DatasetInfo:
    """One named data set. `image_size` is what the papers train at; `files` are the official names looked for."""

    name: str
    about: str
    image_size: int
    channels: int
    num_classes: int
    class_names: tuple[str, ...] = ()
    train_count: int = 0
    test_count: int = 0
    files: tuple[str, ...] = ()
    tfds_name: str | None = None
    tfds_splits: tuple[str, str | None] = ("train", "test")
    tfds_label: str | None = "label"
    crop: str = "none"
    """none: pictures have the right size; centre: ADM's centre crop; celeba: 128x128 around the face."""
    transpose: bool = False
    """EMNIST's idx files hold their images transposed."""
    bundled: bool = False
    """True where no file and no network is needed."""


CATALOGUE: dict[str, DatasetInfo] = {
    info.name: info
    for info in (
        DatasetInfo(
            "digits", "handwritten digits that ship with scikit-learn; needs no network", 8, 1, 10, DIGITS, 1442, 355,
            bundled=True,
        ),
        DatasetInfo(
            "cifar10", "CIFAR-10, natural images in ten classes", 32, 3, 10, CIFAR10_CLASSES, 50_000, 10_000,
            ("cifar-10-python.tar.gz",), "cifar10",
        ),
        DatasetInfo(
            "cifar100", "CIFAR-100, fine labels", 32, 3, 100, (), 50_000, 10_000,
            ("cifar-100-python.tar.gz",), "cifar100",
        ),
        DatasetInfo(
            "celeba64", "CelebA faces cropped to 128x128 around (89, 121), resized to 64x64", 64, 3, 0, (),
            162_770, 19_962, ("img_align_celeba.zip",), "celeb_a", tfds_label=None, crop="celeba",
        ),
        DatasetInfo(
            "imagenet64", "ImageNet at 64x64, centre crop", 64, 3, 1000, (), 1_281_167, 50_000,
            ("imagenet64.zip", "imagenet64"), "imagenet2012", ("train", "validation"), crop="centre",
        ),
        DatasetInfo(
            "mnist", "MNIST digits", 28, 1, 10, DIGITS, 60_000, 10_000,
            ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz",
             "t10k-labels-idx1-ubyte.gz"), "mnist",
        ),
        DatasetInfo(
            "fashion-mnist", "Fashion-MNIST clothes", 28, 1, 10, FASHION_CLASSES, 60_000, 10_000,
            ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz",
             "t10k-labels-idx1-ubyte.gz"), "fashion_mnist",
        ),
        DatasetInfo(
            "emnist", "EMNIST balanced: digits and letters in 47 classes", 28, 1, 47, EMNIST_CHARACTERS,
            112_800, 18_800,
            ("emnist-balanced-train-images-idx3-ubyte.gz", "emnist-balanced-train-labels-idx1-ubyte.gz",
             "emnist-balanced-test-images-idx3-ubyte.gz", "emnist-balanced-test-labels-idx1-ubyte.gz"),
            "emnist/balanced", transpose=True,
        ),
        DatasetInfo(
            "tiny-imagenet", "Tiny-ImageNet, 200 classes at 64x64", 64, 3, 200, (), 100_000, 10_000,
            ("tiny-imagenet-200.zip", "tiny-imagenet-200"),
        ),
        DatasetInfo(
            "cub200", "CUB-200-2011 birds, centre crop", 128, 3, 200, (), 5_994, 5_794,
            ("CUB_200_2011.tgz", "CUB_200_2011"), "caltech_birds2011", crop="centre",
        ),
    )
}  # fmt: skip


def list_datasets() -> list[DatasetInfo]:
    """Every named data set, in the order of the documentation."""
    return list(CATALOGUE.values())
