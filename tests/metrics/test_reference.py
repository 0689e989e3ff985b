"""Reference statistics: written and read exactly, refused when they do not fit or are damaged."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from stabletrain import __version__
from stabletrain.errors import DataError
from stabletrain.metrics.frechet import moments
from stabletrain.metrics.protocol import Protocol
from stabletrain.metrics.reference import check_reference, load_reference, reference_for, save_reference

PROTOCOL = Protocol(
    num_samples=100, split="train", extractor="digits-classifier", extractor_sha256="ab" * 32, resize="none",
    dataset="digits", fingerprint="cd" * 32,
)  # fmt: skip


@pytest.fixture
def reference():
    return reference_for(PROTOCOL, moments(np.random.default_rng(0).normal(size=(30, 6))))


def test_round_trip_is_exact(reference, tmp_path):
    path = tmp_path / "folder" / "digits.npz"
    save_reference(path, reference)
    found = load_reference(path)
    np.testing.assert_array_equal(found.moments.mean, reference.moments.mean)
    np.testing.assert_array_equal(found.moments.covariance, reference.moments.covariance)
    assert found.moments.count == 30
    same = dataclasses.replace(found, moments=reference.moments)
    assert same == reference
    first = path.read_bytes()
    save_reference(path, reference)
    assert path.read_bytes() == first


def test_a_user_can_look_into_it(reference, tmp_path):
    save_reference(tmp_path / "r.npz", reference)
    with np.load(tmp_path / "r.npz") as arrays:
        assert arrays["mu"].shape == (6,)
        assert arrays["sigma"].shape == (6, 6)
        record = json.loads(str(arrays["record"]))
    assert record["count"] == 30
    assert record["stabletrain"] == __version__
    assert record["resize"] == "none"


@pytest.mark.parametrize(
    ("field", "value", "label"),
    [
        ("extractor", "inception2015", "extractor digits-classifier instead of inception2015"),
        ("extractor_sha256", "ef", "extractor hash abab.* instead of ef"),
        ("resize", "pil-bicubic", "resize none instead of pil-bicubic"),
        ("split", "test", "split train instead of test"),
        ("dataset", "mnist", "data set digits instead of mnist"),
        ("fingerprint", "01", "data fingerprint cdcd.* instead of 01"),
    ],
)
def test_each_mismatch_is_one_line_that_says_what_differs(reference, field, value, label):
    check_reference(reference, PROTOCOL, "r.npz")
    with pytest.raises(DataError, match=label) as error:
        check_reference(reference, dataclasses.replace(PROTOCOL, **{field: value}), "r.npz")
    assert "\n" not in str(error.value)
    assert "r.npz" in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "flipped", "text"])
def test_damage_is_refused(reference, tmp_path, damage):
    path = tmp_path / "r.npz"
    save_reference(path, reference)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        path.write_bytes(b"not an npz")
    else:
        place = content.index(b"mu.npy") + 200  # inside the numbers of mu
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(DataError, match="damaged") as error:
        load_reference(path)
    assert "\n" not in str(error.value)


def test_other_numbers_under_the_old_record_are_refused(reference, tmp_path):
    """A file that is whole, but whose numbers were replaced: zip checksums agree, the record's hash does not."""
    path = tmp_path / "r.npz"
    save_reference(path, reference)
    with np.load(path) as arrays:
        changed = {**arrays, "mu": arrays["mu"] + 1}
    np.savez(path, **changed)
    with pytest.raises(DataError, match="not those that the hash was made of"):
        load_reference(path)


def test_statistics_without_a_record_are_refused(tmp_path):
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(DataError, match="does not say which network"):
        load_reference(tmp_path / "theirs.npz")


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(DataError, match="no reference statistics"):
        load_reference(tmp_path / "none.npz")
