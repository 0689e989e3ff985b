"""What a run's configuration asks to know of its generated images: scores, label agreement, the protocol.

found = score_images(images, labels, dataset, config, weights="ema", step=step, context=context)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stabletrain.data.spec import Dataset
from stabletrain.errors import DataError
from stabletrain.metrics.classifier import dataset_classifier
from stabletrain.metrics.evaluate import evaluate_generator, protocol_of
from stabletrain.metrics.extractor import Extractor
from stabletrain.metrics.score_config import ScoreConfig, chosen_extractor
from stabletrain.training.experiment import Evaluation, EvaluationContext


def refuse_unjudgeable(config: ScoreConfig, dataset: Dataset) -> None:
    """Before any training: could the asked images be judged at the end?

    Raises: `DataError` for features from a classifier on data without labels, for a score within classes there, and
    for published weights that are not found; `ConfigError` for a split without images.
    """
    if not config.eval_samples or not config.scores:
        return
    if chosen_extractor(config) == "inception":
        from stabletrain.metrics.weights import find_inception

        find_inception(config.inception)
    elif dataset.train.labels is None or dataset.spec.num_classes < 2:
        raise DataError(
            f"{dataset.name} has no labels, so no classifier gives features to judge samples by: use --extractor "
            "inception, or --eval-samples 0"
        )


def extractor_for(config: ScoreConfig, dataset: Dataset, context: EvaluationContext | None = None) -> Extractor:
    """The network that the configuration asks features of. Raises: `DataError` where it cannot be had."""
    if chosen_extractor(config) == "inception":
        from stabletrain.metrics.inception import load_inception

        return load_inception(config.inception, resize=config.inception_resize or "tf1-bilinear")
    return dataset_classifier(dataset, seed=0, context=context)


@dataclass(frozen=True)
class _Drawn:
    """Generated images as a function of their number."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int32] | None

    def __call__(self, indices: NDArray[np.int64]) -> object:
        images = self.images[indices]
        return images if self.labels is None else (images, self.labels[indices])


def score_images(
    images: NDArray[np.uint8],
    labels: NDArray[np.int32] | None,
    dataset: Dataset,
    config: ScoreConfig,
    *,
    step: int,
    context: EvaluationContext,
    weights: str | None = None,
    batch_norm: str | None = None,
) -> Evaluation:
    """The configuration's scores of generated images [N, H, W, C] with the labels [N] they were asked for.

    `eval/label_agreement_<N>_<classifier>[_<weights>]` is the share of images that the data set's classifier gives the
    label they were asked for (with labels only). The other scores are named as in `evaluate_generator`. The file
    `eval/protocol-<step>.json` holds the protocol whole. `weights` and `batch_norm`: see `Protocol`.

    Raises: as `evaluate_generator`.
    """
    scalars: dict[str, float] = {}
    suffix = f"_{weights}" if weights else ""
    if labels is not None:
        classifier = dataset_classifier(dataset, seed=0, context=context)
        found = np.argmax(np.asarray(classifier.logits(images)), axis=-1)
        name = f"eval/label_agreement_{len(images)}_{classifier.name}{suffix}"
        scalars[name] = float(np.mean(found == labels))
    if not config.scores:
        return Evaluation(scalars)
    extractor = extractor_for(config, dataset, context)
    scalars |= evaluate_generator(
        _Drawn(images, labels),
        dataset,
        extractor,
        num_samples=len(images),
        context=context,
        metrics=config.scores,
        split=config.score_split,
        weights=weights,
        batch_norm=batch_norm,
        tag=f"step {step}",
    )
    protocol = protocol_of(
        dataset, extractor, len(images), split=config.score_split, weights=weights, batch_norm=batch_norm
    )
    record: Mapping[str, object] = {"step": step, "scores": list(config.scores), **protocol.record()}
    return Evaluation(scalars, {f"eval/protocol-{step:08d}.json": (json.dumps(record, indent=2) + "\n").encode()})
