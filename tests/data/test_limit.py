"""A data set limited to a part of its training images, or to its first classes."""

from __future__ import annotations

import numpy as np
import pytest

from stabletrain.data.load import limit_classes, limit_training, load_dataset
from stabletrain.errors import ConfigError


def test_the_same_images_each_time_with_their_labels_and_the_test_split_whole() -> None:
    whole = load_dataset("digits")
    limited, again = limit_training(whole, 100), limit_training(load_dataset("digits"), 100)
    assert len(limited.train) == limited.spec.train_count == 100
    images, all_images = limited.train.images.array(), whole.train.images.array()
    assert images is not None
    assert all_images is not None
    assert np.array_equal(images, again.train.images.array())
    assert limited.spec.fingerprint == again.spec.fingerprint != whole.spec.fingerprint
    for image, label in zip(images, limited.train.labels, strict=True):
        (places,) = np.nonzero(np.all(all_images == image, axis=(1, 2, 3)))
        assert label in whole.train.labels[places]
    assert np.array_equal(limited.train.images.read(np.array([7, 3])), images[[7, 3]])
    assert len(np.unique(limited.train.labels)) == 10
    assert limited.test is whole.test


def test_no_limit_is_the_data_set_itself_and_too_high_a_one_is_refused() -> None:
    whole = load_dataset("digits")
    assert limit_training(whole, 0) is whole
    with pytest.raises(ConfigError, match=r"5000.*1442 training images"):
        limit_training(whole, 5000)


def test_the_first_classes_of_both_splits_with_all_their_images() -> None:
    whole = load_dataset("digits")
    few = limit_classes(whole, 3)
    assert few.spec.num_classes == 3
    assert few.spec.class_names == ("0", "1", "2")
    for part, of_whole, count in (
        (few.train, whole.train, few.spec.train_count),
        (few.test, whole.test, few.spec.test_count),
    ):
        kept = np.flatnonzero(of_whole.labels < 3)
        assert len(part) == count == len(kept)
        assert np.array_equal(part.labels, of_whole.labels[kept])
        assert np.array_equal(part.images.read(np.arange(5)), of_whole.images.read(kept[:5]))
    assert few.spec.fingerprint not in (whole.spec.fingerprint, limit_classes(whole, 4).spec.fingerprint)
    assert limit_classes(whole, 0) is whole
    with pytest.raises(ConfigError, match=r"class_limit is 11, and digits has 10 classes: use 2 to 10"):
        limit_classes(whole, 11)
