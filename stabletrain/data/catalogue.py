"""The data sets known by name: sizes, classes, official files, and how their pictures are cropped.

Imports nothing heavy: `stabletrain data list` and the command line's checks read it.
"""

from __future__ import annotations

from dataclasses import dataclass

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
CIFAR100_CLASSES = tuple(_CIFAR100.split())
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
EMNIST_CHARACTERS = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt")
BYCLASS_CHARACTERS = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class OfficialFile:
    """A file as its authors publish it. `md5` is the published checksum where there is one."""

    name: str
    md5: str = ""


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
    files: tuple[OfficialFile, ...] = ()
    source: str = ""
    """Where the authors publish them."""
    put: str = ""
    """What to put into the folder, where that is not simply `files`."""
    tfds_name: str | None = None
    tfds_splits: tuple[str, str] = ("train", "test")
    tfds_label: str | None = "label"
    crop: str = "none"
    """none: pictures have the right size; centre: ADM's centre crop; celeba: 128x128 around the face."""
    transpose: bool = False
    """EMNIST's files, the TFDS ones too, hold their images transposed."""
    latents: bool = False
    """Latents of an autoencoder with text features, not pictures; see `stabletrain.data.latents`."""
    bundled: bool = False
    """True where no file and no network is needed."""

    def wanted(self) -> str:
        """The files a user has to provide, and where they come from."""
        names = self.put or " + ".join(file.name for file in self.files)
        return f"{names} (from {self.source})"


def _idx_files(*checksums: str) -> tuple[OfficialFile, ...]:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return tuple(OfficialFile(f"{name}-ubyte.gz", md5) for name, md5 in zip(names, checksums, strict=True))


CATALOGUE: dict[str, DatasetInfo] = {
    info.name: info
    for info in (
        DatasetInfo(
            "digits", "handwritten digits that ship with scikit-learn; needs no network", 8, 1, 10, DIGITS, 1442, 355,
            bundled=True,
        ),
        DatasetInfo(
            "cifar10", "CIFAR-10, natural images in ten classes", 32, 3, 10, CIFAR10_CLASSES, 50_000, 10_000,
            (OfficialFile("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),),
            "https://www.cs.toronto.edu/~kriz/cifar.html", tfds_name="cifar10",
        ),
        DatasetInfo(
            "cifar100", "CIFAR-100, fine labels", 32, 3, 100, CIFAR100_CLASSES, 50_000, 10_000,
            (OfficialFile("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),),
            "https://www.cs.toronto.edu/~kriz/cifar.html", tfds_name="cifar100",
        ),
        DatasetInfo(
            "celeba64", "CelebA faces cropped to 128x128 around (89, 121), resized to 64x64", 64, 3, 0, (),
            162_770, 19_962,
            (OfficialFile("img_align_celeba.zip", "00d2c5bc6d35e252742224ab0c1e8fcb"),
             OfficialFile("list_eval_partition.txt", "d32c9cbf5e040fd4025c592c306e6668")),
            "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html", tfds_name="celeb_a", tfds_label=None, crop="celeba",
        ),
        DatasetInfo(
            "imagenet64", "ImageNet (ILSVRC 2012) at 64x64", 64, 3, 1000, (), 1_281_167, 50_000,
            (*(OfficialFile(f"train_data_batch_{batch}.npz") for batch in range(1, 11)), OfficialFile("val_data.npz")),
            "https://image-net.org/download-images",
            put="train_data_batch_1.npz ... train_data_batch_10.npz + val_data.npz, or train/ and val/ with a folder "
                "of pictures per class",
            tfds_name="imagenet2012", tfds_splits=("train", "validation"), crop="centre",
        ),
        *(
            DatasetInfo(
                f"imagenet{size}", f"ImageNet (ILSVRC 2012) at {size}x{size}", size, 3, 1000, (), 1_281_167, 50_000,
                (OfficialFile("train"), OfficialFile("val")), "https://image-net.org/download-images",
                put="train/ and val/ with a folder of pictures per class",
                tfds_name="imagenet2012", tfds_splits=("train", "validation"), crop="centre",
            )
            for size in (128, 256)
        ),
        DatasetInfo(
            "mnist", "MNIST digits", 28, 1, 10, DIGITS, 60_000, 10_000,
            _idx_files("f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
                       "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"),
            "http://yann.lecun.com/exdb/mnist/", tfds_name="mnist",
        ),
        DatasetInfo(
            "fashion-mnist", "Fashion-MNIST clothes", 28, 1, 10, FASHION_CLASSES, 60_000, 10_000,
            _idx_files("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
                       "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"),
            "https://github.com/zalandoresearch/fashion-mnist", tfds_name="fashion_mnist",
        ),
        DatasetInfo(
            "emnist", "EMNIST balanced: digits and letters in 47 classes", 28, 1, 47, EMNIST_CHARACTERS,
            112_800, 18_800,
            (OfficialFile("gzip.zip", "58c8d27c78d21e728a6bc7b3cc06412e"),),
            "https://www.nist.gov/itl/products-and-services/emnist-dataset",
            put="gzip.zip, or the four emnist-balanced-*-ubyte.gz inside it",
            tfds_name="emnist/balanced", transpose=True,
        ),
        DatasetInfo(
            "emnist-byclass", "EMNIST by class: digits and both cases of all letters in 62 classes", 28, 1, 62,
            BYCLASS_CHARACTERS, 697_932, 116_323,
            (OfficialFile("gzip.zip", "58c8d27c78d21e728a6bc7b3cc06412e"),),
            "https://www.nist.gov/itl/products-and-services/emnist-dataset",
            put="gzip.zip, or the four emnist-byclass-*-ubyte.gz inside it",
            tfds_name="emnist/byclass", transpose=True,
        ),
        DatasetInfo(
            "tiny-imagenet", "Tiny-ImageNet, 200 classes at 64x64", 64, 3, 200, (), 100_000, 10_000,
            (OfficialFile("tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),),
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        ),
        DatasetInfo(
            "cub200", "CUB-200-2011 birds, centre crop", 128, 3, 200, (), 5_994, 5_794,
            (OfficialFile("CUB_200_2011"),), "https://www.vision.caltech.edu/datasets/cub_200_2011/",
            put="the folder CUB_200_2011 that CUB_200_2011.tgz holds", tfds_name="caltech_birds2011", crop="centre",
        ),
        DatasetInfo(
            "coco-latents", "MS-COCO as latents of an autoencoder with text features, for text to image", 32, 4, 0, (),
            82_783, 40_504, (OfficialFile("latents.json"),), "https://github.com/baofff/U-ViT",
            put="what `stabletrain data prepare coco-latents --features DIR` makes of the released code's features "
                "(DIR/train/0.npy, DIR/train/0_0.npy, ..., DIR/val/..., DIR/empty_context.npy)",
            latents=True,
        ),
    )
}  # fmt: skip


def list_datasets() -> list[DatasetInfo]:
    """Every named data set, in the order of the documentation."""
    return list(CATALOGUE.values())
