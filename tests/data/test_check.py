"""`data info`, `data check` and `data prepare` tell what is known, everything that is wrong, and what to do."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from stabletrain.data.catalogue import CATALOGUE, OfficialFile
from stabletrain.data.check import check_dataset, dataset_info
from stabletrain.data.load import load_dataset
from stabletrain.data.locate import official_folder
from stabletrain.data.prepare import prepare_dataset
from stabletrain.errors import ConfigError, DataError
from tests.data.written import cifar_files, class_folders, encoded, pixels, write_files, write_tar, write_zip


def test_info_of_what_is_here_describes_the_content() -> None:
    """Counts per class add up; everything is plain values."""
    info = dataset_info("digits")
    assert json.loads(json.dumps(info)) == info
    assert (info["found"], info["kind"], info["put"]) == ("bundled", "bundled", None)
    assert sum(info["class_counts"]["train"]) == info["train_count"] == 1442
    assert info["fingerprint"] == load_dataset("digits").spec.fingerprint


def test_info_of_what_is_not_here_says_what_it_would_be_and_what_to_do() -> None:
    """The published sizes, and which file goes where."""
    info = dataset_info("celeba64")
    assert (info["train_count"], info["num_classes"], info["found"]) == (162_770, 0, None)
    assert info["fingerprint"] is None
    assert "img_align_celeba.zip + list_eval_partition.txt" in info["put"]
    assert str(official_folder(CATALOGUE["celeba64"])) in info["put"]


def test_info_of_a_path(tmp_path: Path) -> None:
    """The user's folder; a path that is not there; a name that is not known."""
    folder = write_files(tmp_path / "pets", class_folders({"a": 10, "b": 20}))
    info = dataset_info(str(folder))
    assert (info["name"], info["found"], info["class_counts"]) == (
        "pets", str(folder), {"train": [9, 18], "test": [1, 2]},
    )  # fmt: skip
    with pytest.raises(DataError, match="no data at"):
        dataset_info(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="did you mean 'mnist'"):
        dataset_info("mnits")


@pytest.mark.parametrize("packed", [False, True])
def test_check_lists_every_damaged_picture(tmp_path: Path, packed: bool) -> None:
    """Not only the first one; with progress."""
    good = encoded(pixels(1, 32)[0])
    files = class_folders({"a": 10, "b": 10}, size=32)
    files |= {"a/003.png": good[:-40], "b/001.png": good[: len(good) // 2], "b/007.png": b"?"}
    place = write_zip(tmp_path / "x.zip", files) if packed else write_files(tmp_path / "x", files)
    ticks: list[tuple[str, int, int]] = []
    problems = check_dataset("mine", str(place), image_size=32, tick=lambda *tick: ticks.append(tick))
    assert sorted(problem.split()[4] for problem in problems) == ["a/003.png", "b/001.png", "b/007.png"]
    assert ticks[-1] == ("test images", 2, 2)


def test_check_of_good_data_finds_nothing(tmp_path: Path) -> None:
    """The bundled set, and a folder."""
    assert check_dataset("digits") == []
    folder = write_files(tmp_path / "x", class_folders({"a": 10, "b": 10}))
    assert check_dataset("mine", str(folder)) == []


def test_check_reports_what_cannot_be_loaded_and_refuses_an_unknown_name(tmp_path: Path) -> None:
    """Missing data are a problem in the list; a mistyped name is a usage error."""
    assert "is not on this machine" in check_dataset("cifar10")[0]
    assert "no data at" in check_dataset("digits", str(tmp_path / "nowhere"))[0]
    with pytest.raises(ConfigError, match="unknown data set"):
        check_dataset("cifar11x")


def test_check_compares_official_files_with_what_was_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksum, number of images, classes without images."""
    folder = official_folder(CATALOGUE["cifar10"])
    folder.mkdir(parents=True)
    path = write_tar(folder / "cifar-10-python.tar.gz", cifar_files(pixels(24, 32), [0] * 24))
    problems = check_dataset("cifar10")
    assert any("MD5" in problem and "c58f30108f718f92721af3b95e74349a" in problem for problem in problems)
    assert "cifar10 has 20 train images here; published were 50000" in problems
    assert any(problem.startswith("no train image of 9 classes: automobile, bird") for problem in problems)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    published = replace(CATALOGUE["cifar10"], files=(OfficialFile(path.name, md5),), train_count=20, test_count=4)
    monkeypatch.setitem(CATALOGUE, "cifar10", published)
    assert not any("MD5" in problem or "published" in problem for problem in check_dataset("cifar10"))


def test_prepare_of_what_is_here_reads_it() -> None:
    """And returns its description."""
    ticks: list[str] = []
    info = prepare_dataset("digits", tick=lambda label, done, total: ticks.append(label))
    assert info["train_count"] == 1442
    assert ticks == ["reading digits"]
    assert sum(info["class_counts"]["test"]) == info["test_count"] == 355
