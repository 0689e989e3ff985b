"""Classification accuracy score: train a classifier on generated images, test it on real ones.

Source: Ravuri and Vinyals 2019, section 3. Differs: the classifier is the small one of `classifier_training` and not
a ResNet-50, so scores compare with each other and with `accuracy` of the data set's own classifier, not with a paper's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabletrain.data.sources import ArraySource
from stabletrain.data.spec import Dataset, Images
from stabletrain.errors import DataError
from stabletrain.metrics import classifier_training
from stabletrain.metrics.classifier_training import Recipe
from stabletrain.metrics.progress import Progress, silent


def classification_accuracy_score(
    images: Images,
    labels: NDArray[Any],
    dataset: Dataset,
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    progress: Progress = silent,
) -> float:
    """The accuracy on the real test split of a classifier trained on generated images with the labels asked for.

    Shapes: images uint8 [N, H, W, C], labels [N].
    Raises: `DataError` when the data set has no labelled test images, or the images have another shape.
    """
    if not len(dataset.test) or dataset.test.labels is None:
        raise DataError(f"{dataset.name} has no labelled test images: no classification accuracy score")
    if images.shape[1:] != dataset.test.images.shape:
        raise DataError(f"generated images {images.shape[1:]} are not those of {dataset.name}")
    num_classes = dataset.spec.num_classes
    params = classifier_training.fit(
        ArraySource(images),
        np.asarray(labels, np.int32),
        num_classes,
        seed=seed,
        recipe=recipe,
        label="training a classifier on generated images",
        progress=progress,
    )
    return classifier_training.accuracy(params, num_classes, dataset.test.images, dataset.test.labels)
