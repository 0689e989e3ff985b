"""The classifier of a data set: trained once on its training images, kept, and always called after the data set.

Its features and logits stand in for the published Inception where that is not there. A score from it is named after
it (`fd5k_test_digits-classifier_ema`) and compares only with scores from the same weights, which `sha256` tells.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from stabletrain.data.spec import Dataset, Images, Split
from stabletrain.errors import DataError
from stabletrain.metrics import classifier_training
from stabletrain.metrics.files import write_whole
from stabletrain.metrics.progress import silent
from stabletrain.paths import cache_home
from stabletrain.training.experiment import EvaluationContext

VERSION = 2
"""Of the network and its training: raised with every change that changes the weights, so that old files are let be."""

WAIT_SECONDS = 0.2

log = logging.getLogger("stabletrain")


@dataclass(frozen=True)
class DatasetClassifier:
    """A trained classifier. `sha256` is of the weights file; equal hashes give equal features."""

    name: str
    """`<dataset>-classifier`."""
    num_classes: int
    image_shape: tuple[int, int, int]
    """(H, W, C) of the images it was trained on and takes."""
    seed: int
    accuracy: float
    """The share of `accuracy_count` images, which it was not trained on, that it gives their label."""
    accuracy_split: str
    """`test`, or `train (held out)` where the data set has no labelled test images."""
    accuracy_count: int
    sha256: str
    params: Any
    resize: str = "none"

    def logits(self, images: Images) -> NDArray[np.float32]:
        """uint8 [B, H, W, C] -> [B, K]. Raises: `DataError` for images of another shape."""
        return self._answers(images)[0]

    def features(self, images: Images) -> NDArray[np.float32]:
        """uint8 [B, H, W, C] -> [B, 128], the last layer before the logits. Raises: `DataError` as `logits`."""
        return self._answers(images)[1]

    def outputs(self, images: Images) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(features, logits) for the price of one."""
        logits, features = self._answers(images)
        return features, logits

    def _answers(self, images: Images) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
            raise DataError(
                f"{self.name} takes uint8 images of shape {self.image_shape}, "
                f"not {images.dtype} of shape {images.shape[1:]}"
            )
        return classifier_training.answers(self.params, self.num_classes, images)


def dataset_classifier(
    dataset: Dataset, *, seed: int = 0, context: EvaluationContext | None = None
) -> DatasetClassifier:
    """The classifier of `dataset`, from the cache or trained now (digits: some seconds; larger sets: minutes on a CPU).

    It lies in `cache_home()/"classifiers"` as `<key>.json` (hash, accuracy, seed, version) beside the safetensors file
    that this names. A second process that wants the same one waits for the first. A damaged file is logged as a
    warning and trained again. `context` is ticked after each update; interrupted training begins anew.

    Raises: `DataError` when the data set has no labels.
    """
    if dataset.train.labels is None or dataset.spec.num_classes < 2:
        raise DataError(
            f"{dataset.name} has no labels of two or more classes, so no classifier can be trained on it for features: "
            "give the weights of the 2015 Inception"
        )
    folder = cache_home() / "classifiers"
    folder.mkdir(parents=True, exist_ok=True)
    entry = folder / f"{_key(dataset, seed)}.json"
    found = _read(entry, dataset, seed)
    if found is None:
        with _only_one_process(entry, dataset, context):
            found = _read(entry, dataset, seed) or _train_and_keep(entry, dataset, seed, context)
    return found


def _key(dataset: Dataset, seed: int) -> str:
    """Names the file: what the weights depend on. The fingerprint of the data may hold any characters."""
    shape = "x".join(map(str, dataset.train.images.shape))
    content = f"{dataset.spec.fingerprint} {shape} {dataset.spec.num_classes}"
    return f"{hashlib.sha256(content.encode()).hexdigest()[:16]}-{shape}-v{VERSION}-s{seed}"


def _train_and_keep(entry: Path, dataset: Dataset, seed: int, context: EvaluationContext | None) -> DatasetClassifier:
    train, judge, split_name = _splits(dataset)
    assert train.labels is not None
    assert judge.labels is not None
    num_classes = dataset.spec.num_classes
    progress = context.tick if context is not None else silent
    params = classifier_training.fit(
        train.images, train.labels, num_classes, seed=seed, label=f"training {_name(dataset)}", progress=progress
    )
    weights = save({key: np.asarray(value) for key, value in flatten_dict(params, sep="/").items()})
    sha256 = hashlib.sha256(weights).hexdigest()
    file = entry.parent / f"{entry.stem}-{sha256[:12]}.safetensors"
    values = {
        "sha256": sha256,
        "file": file.name,
        "accuracy": classifier_training.accuracy(params, num_classes, judge.images, judge.labels),
        "accuracy_split": split_name,
        "accuracy_count": len(judge),
        "dataset": dataset.name,
        "fingerprint": dataset.spec.fingerprint,
        "seed": seed,
        "version": VERSION,
        "jax": jax.__version__,
        "platform": jax.default_backend(),
    }
    # The weights first: a description never names a file that is not there yet.
    write_whole(file, weights)
    write_whole(entry, (json.dumps(values, indent=2) + "\n").encode())
    return _assemble(dataset, seed, values, params)


def _splits(dataset: Dataset) -> tuple[Split, Split, str]:
    """Training images, the labelled images it is judged on, and what those are called."""
    if len(dataset.test) and dataset.test.labels is not None:
        return dataset.train, dataset.test, "test"
    held_out = np.arange(len(dataset.train)) % 10 == 9
    if not held_out.any():
        raise DataError(f"{dataset.name} has {len(dataset.train)} labelled images: too few to train a classifier")
    return _subset(dataset.train, ~held_out), _subset(dataset.train, held_out), "train (held out)"


class _Subset:
    """Some images of a source."""

    def __init__(self, source: Any, indices: NDArray[np.integer]) -> None:
        self._source, self._indices = source, indices
        self.shape = source.shape

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, indices: NDArray[np.integer]) -> Images:
        return self._source.read(self._indices[indices])

    def array(self) -> Images | None:
        images = self._source.array()
        return None if images is None else images[self._indices]


def _subset(split: Split, chosen: NDArray[np.bool_]) -> Split:
    assert split.labels is not None
    indices = np.flatnonzero(chosen)
    return Split(_Subset(split.images, indices), split.labels[indices])


def _name(dataset: Dataset) -> str:
    return f"{dataset.name}-classifier"


def _assemble(dataset: Dataset, seed: int, values: dict[str, Any], params: Any) -> DatasetClassifier:
    return DatasetClassifier(
        name=_name(dataset),
        num_classes=dataset.spec.num_classes,
        image_shape=dataset.train.images.shape,
        seed=seed,
        accuracy=values["accuracy"],
        accuracy_split=values["accuracy_split"],
        accuracy_count=values["accuracy_count"],
        sha256=values["sha256"],
        params=params,
    )


def _read(entry: Path, dataset: Dataset, seed: int) -> DatasetClassifier | None:
    """The kept classifier; None when there is none or when it is damaged, which is said."""
    if not entry.exists():
        return None
    try:
        values = json.loads(entry.read_text(encoding="utf-8"))
        weights = (entry.parent / values["file"]).read_bytes()
        if hashlib.sha256(weights).hexdigest() != values["sha256"]:
            raise ValueError("the weights are not those that the hash was made of")
        params = jax.device_put(unflatten_dict(load(weights), sep="/"))
        return _assemble(dataset, seed, values, params)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        log.warning("%s is damaged (%s): training the classifier again", entry, error)
        return None


@contextlib.contextmanager
def _only_one_process(entry: Path, dataset: Dataset, context: EvaluationContext | None) -> Iterator[None]:
    """Waits until no other process trains the same classifier. The lock ends with its process, however that ends."""
    with entry.with_suffix(".lock").open("w") as stream:
        waited = 0
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if context is not None:
                    context.tick(f"waiting for another process to train {_name(dataset)}", waited, waited + 1)
                waited += 1
                time.sleep(WAIT_SECONDS)
        yield
