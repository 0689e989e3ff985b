"""The classification accuracy score: high for real data, at chance for labels that mean nothing."""

from __future__ import annotations

import numpy as np
import pytest

from stabletrain.errors import DataError
from stabletrain.metrics.classification_accuracy import classification_accuracy_score
from stabletrain.metrics.classifier_training import Recipe
from tests.metrics.conftest import make_dataset, stripes

RECIPE = Recipe(epochs=1, min_steps=60, max_steps=60)


def test_good_and_meaningless_samples():
    train, test = stripes(150, 8, 1, 3), stripes(60, 8, 1, 3, seed=1)
    dataset = make_dataset(*train, *test)
    made, labels = stripes(150, 8, 1, 3, seed=2)
    ticks: list[tuple[str, int, int]] = []
    good = classification_accuracy_score(
        made, labels, dataset, recipe=RECIPE, progress=lambda *tick: ticks.append(tick)
    )
    assert good > 0.9
    assert len(ticks) == 60
    assert classification_accuracy_score(made, labels, dataset, recipe=RECIPE) == good, "the same every time"
    wrong = np.random.default_rng(0).integers(0, 3, 150)
    assert classification_accuracy_score(made, wrong, dataset, recipe=RECIPE) < 0.6


def test_bad_input_is_refused():
    images, labels = stripes(30, 8, 1, 3)
    with pytest.raises(DataError, match="no labelled test images"):
        classification_accuracy_score(images, labels, make_dataset(images, labels, images[:0], None))
    with pytest.raises(DataError, match="are not those of"):
        classification_accuracy_score(images[:, :4], labels, make_dataset(images, labels, images, labels))
