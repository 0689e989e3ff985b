"""Images as a domain: batches of a data set, and what generated images are worth.

The class grid has a class per row and a latent per column, so that what a column has in common is the latent's. The
interpolation grid goes from one latent to another along a great circle; the truncation grid draws latents nearer and
nearer to the middle.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.data.images import encode_png, image_grid, to_float, to_uint8
from stabletrain.data.load import limit_classes, limit_training, load_dataset
from stabletrain.data.order import batch_indices
from stabletrain.data.spec import Dataset, DataSpec, Split
from stabletrain.errors import ConfigError, DataError
from stabletrain.gan.config import GanConfig, filled
from stabletrain.gan.domains import Model
from stabletrain.metrics.classifier import DatasetClassifier, dataset_classifier
from stabletrain.metrics.scoring import refuse_unjudgeable, score_images
from stabletrain.training.experiment import Evaluation, EvaluationContext

Array = jax.Array
RESIDENT_BYTES = 1 << 30
"""Training sets up to this size lie on every device; CIFAR-10 takes 150 MB."""
GRID_COLUMNS = 10
GRID_CLASSES = 20  # more classes than this are shown by that many, evenly spread
TRUNCATIONS = (0.2, 0.5, 1.0, 1.5, 0.0)
"""Rows of the truncation grid; 0 is none."""
GAP_IMAGES = 256
COVERED_SHARE = 0.1
"""A class is covered if it gets at least this share of what it would get were all classes equally frequent."""


class ImageDomain:
    """An image data set for the GAN family."""

    def __init__(self, config: GanConfig, data_spec: DataSpec | None) -> None:
        """Raises: `ConfigError` or `DataError` for data that the configuration cannot be trained or judged on."""
        self._config = config
        self.dataset: Dataset | None = None
        if data_spec is None:
            loaded = load_dataset(config.dataset, data=config.data, image_size=config.image_size or None)
            self.dataset = limit_training(limit_classes(loaded, config.class_limit), config.train_limit)
            data_spec = self.dataset.spec
        self.data_spec = data_spec
        self.sample_shape = (data_spec.image_size, data_spec.image_size, data_spec.channels)
        self.num_classes = data_spec.num_classes if config.conditioning != "none" else 0
        self.class_names = data_spec.class_names if self.num_classes else ()
        self._check()
        self.resident: Mapping[str, Any] = self._resident()

    def _check(self) -> None:
        if self._config.conditioning != "none" and not self.data_spec.num_classes:
            raise ConfigError(f"data set {self.data_spec.name!r} has no labels: use --conditioning none")
        if self.dataset is None:
            return
        if len(self.dataset.train) == 0:
            raise DataError(f"data set {self.data_spec.name!r} has no training images")
        refuse_unjudgeable(self._config, self.dataset)

    def _resident(self) -> dict[str, Any]:
        """Small sets lie on the devices as uint8; of large ones each batch brings its images."""
        if self.dataset is None:
            return {}
        images = self.dataset.train.images.array()
        on_device = images is not None and images.nbytes <= RESIDENT_BYTES
        arrays: dict[str, Any] = {"images": images} if on_device else {}
        if self.num_classes:
            arrays["labels"] = self.dataset.train.labels
        return arrays

    def batch(self, position: int, count: int) -> dict[str, np.ndarray]:
        """Indices into the resident training images; of a large set the images themselves as well."""
        assert self.dataset is not None, "a domain built for sampling has no training data"
        train = self.dataset.train
        index = batch_indices(self._config.seed, position, len(train), count)
        batch: dict[str, np.ndarray] = {"index": index}
        if "images" not in self.resident:
            batch["image"] = train.images.read(index)
        return batch

    def real(self, batch: Mapping[str, Array], key: Array) -> tuple[Array, Array | None]:
        """Images [B, H, W, C] in [-1, 1] and labels [B]."""
        flip_key, noise_key = jax.random.split(key)
        index = batch["index"]
        images = to_float(batch["image"] if "image" in batch else batch["images"][index])
        if self._config.dequantize:
            # Grey level n becomes the interval from n to n + 1, and 256 of them fill [-1, 1].
            levels = (images + 1.0) * 127.5 + jax.random.uniform(noise_key, images.shape)
            images = levels / 128.0 - 1.0
        if self._config.horizontal_flip:
            flip = jax.random.bernoulli(flip_key, 0.5, (len(index), 1, 1, 1))
            images = jnp.where(flip, images[:, :, ::-1], images)
        return images, batch["labels"][index] if self.num_classes else None

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def fixed(self, split: str, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Up to `count` images of a split in [-1, 1], evenly spread, with their labels."""
        assert self.dataset is not None, "a domain built for sampling has no data"
        part = self.dataset.train if split == "train" else self.dataset.test
        if not len(part) or (self.num_classes and part.labels is None):
            return np.zeros((0, *self.sample_shape), np.float32), None
        index = np.unique(np.linspace(0, len(part) - 1, min(len(part), count)).astype(np.int64))
        labels = part.labels[index] if self.num_classes and part.labels is not None else None
        return np.asarray(to_float(part.images.read(index))), labels

    def evaluate(self, model: Model, step: int, context: EvaluationContext) -> Evaluation:
        """Grids, the discriminator's gap between training and test images, and what the generated images are worth.

        `eval/discriminator_gap_train_test`: mean score of training images minus that of test images; it grows as the
        discriminator learns the training set by heart. `eval/classes_covered_<N>_<classifier>`: classes that the data
        set's classifier finds among N generated images at least a tenth as often as it would were all equally frequent.
        The other scores are those of `stabletrain.metrics.scoring.score_images`.
        """
        assert self.dataset is not None, "a domain built for sampling cannot be evaluated"
        scalars = self._gap(model, context)
        files = self._grids(model, step, context)
        count = filled(self._config.eval_samples)
        if count:
            labels = (np.arange(count) % self.num_classes).astype(np.int32) if self.num_classes else None
            images = to_uint8(model.samples(labels, count, seed=self._config.seed, context=context))
            if self.dataset.spec.num_classes > 1 and self.dataset.train.labels is not None:
                scalars |= self._covered(images, dataset_classifier(self.dataset, seed=0, context=context), model)
            judged = score_images(
                images, labels, self.dataset, self._config, step=step, context=context, weights=model.weights,
                batch_norm=model.batch_norm,
            )  # fmt: skip
            scalars, files = {**scalars, **judged.scalars}, {**files, **judged.files}
        return Evaluation(scalars=scalars, files=files)

    def _gap(self, model: Model, context: EvaluationContext) -> dict[str, float]:
        assert self.dataset is not None
        test = self.dataset.test
        if not len(test) or (self.num_classes and test.labels is None):
            return {}
        means = [
            float(np.mean(self._scores(split, model, context), dtype=np.float64))
            for split in (self.dataset.train, test)
        ]
        return {"eval/discriminator_gap_train_test": means[0] - means[1]}

    def _scores(self, split: Split, model: Model, context: EvaluationContext) -> np.ndarray:
        index = np.unique(np.linspace(0, len(split) - 1, min(len(split), GAP_IMAGES)).astype(np.int64))
        labels = split.labels[index] if self.num_classes and split.labels is not None else None
        return model.scores(np.asarray(to_float(split.images.read(index))), labels, context=context)

    def _covered(self, images: np.ndarray, classifier: DatasetClassifier, model: Model) -> dict[str, float]:
        found = np.argmax(np.asarray(classifier.logits(images)), axis=-1)
        classes = self.data_spec.num_classes
        counts = np.bincount(found, minlength=classes)
        covered = int(np.sum(counts >= max(1.0, COVERED_SHARE * len(images) / classes)))
        return {f"eval/classes_covered_{len(images)}_{classifier.name}_{model.weights}": float(covered)}

    def _grids(self, model: Model, step: int, context: EvaluationContext) -> dict[str, bytes]:
        seed = self._config.seed
        rows = shown_classes(self.num_classes) if self.num_classes else np.zeros(GRID_COLUMNS, np.int32)
        names = [self.class_names[row] for row in rows] if self.num_classes else None
        rng = np.random.Generator(np.random.Philox(seed))
        if self.num_classes:
            latents = np.tile(rng.standard_normal((GRID_COLUMNS, model.z_dim), np.float32), (len(rows), 1))
        else:
            latents = rng.standard_normal((len(rows) * GRID_COLUMNS, model.z_dim), np.float32)
        labels = np.repeat(rows, GRID_COLUMNS).astype(np.int32)
        grids = {"": self._picture(model, latents, labels, context, names)}

        ends = rng.standard_normal((2, len(rows), model.z_dim), np.float32)
        paths = great_circle(ends[0], ends[1], GRID_COLUMNS).reshape(-1, model.z_dim)
        grids["-interpolation"] = self._picture(model, paths, labels, context, names)

        truncated = [
            model.samples(
                np.resize(rows, GRID_COLUMNS).astype(np.int32), GRID_COLUMNS, seed=seed, context=context,
                what=f"truncation {truncation}", truncation=truncation,
            )
            for truncation in TRUNCATIONS
        ]  # fmt: skip
        texts = [str(truncation) if truncation else "none" for truncation in TRUNCATIONS]
        images = to_uint8(np.concatenate(truncated))
        grids["-truncation"] = encode_png(image_grid(images, GRID_COLUMNS, row_labels=texts))
        return {f"samples/{step:08d}{name}.png": content for name, content in grids.items()}

    def _picture(
        self, model: Model, latents: np.ndarray, labels: np.ndarray, context: EvaluationContext, names: list[str] | None
    ) -> bytes:
        images = to_uint8(model.from_latents(latents, labels if self.num_classes else None, context=context))
        return encode_png(image_grid(images, GRID_COLUMNS, row_labels=names))

    def sample_files(
        self, samples: np.ndarray, labels: np.ndarray | None, context: EvaluationContext
    ) -> Mapping[str, bytes]:
        """`grid.png`, one PNG per image, and `samples.npz` (images, labels)."""
        del context
        images, names = to_uint8(samples), self.class_names
        digits = len(str(len(images) - 1))
        files = {"grid.png": encode_png(image_grid(images, GRID_COLUMNS))}
        for number, image in enumerate(images):
            suffix = f"-{names[labels[number]].replace('/', '_')}" if names and labels is not None else ""
            files[f"{number:0{digits}d}{suffix}.png"] = encode_png(image)
        stream = io.BytesIO()
        arrays: dict[str, Any] = {"images": images} if labels is None else {"images": images, "labels": labels}
        np.savez_compressed(stream, **arrays)
        return {**files, "samples.npz": stream.getvalue()}


def shown_classes(num_classes: int) -> np.ndarray:
    """The classes of a grid, a row each: all, or 20 of them."""
    return np.unique(np.linspace(0, num_classes - 1, min(num_classes, GRID_CLASSES)).astype(np.int32))


def great_circle(start: np.ndarray, end: np.ndarray, count: int) -> np.ndarray:
    """Latents [N, count, z_dim] from start to end [N, z_dim] along a great circle, lengths going evenly.

    A straight line would pass nearer to the origin than normal latents ever are. Source: White 2016.
    """
    share = np.linspace(0.0, 1.0, count, dtype=np.float32)[None, :, None]
    lengths = [np.linalg.norm(each, axis=-1, keepdims=True) for each in (start, end)]
    cosine = np.clip(np.sum(start * end, -1, keepdims=True) / np.maximum(lengths[0] * lengths[1], 1e-12), -1.0, 1.0)
    angle = np.maximum(np.arccos(cosine), 1e-6)[:, None]
    first, second = (each[:, None] / np.maximum(length[:, None], 1e-12) for each, length in zip((start, end), lengths))
    direction = (np.sin((1 - share) * angle) * first + np.sin(share * angle) * second) / np.sin(angle)
    return direction * ((1 - share) * lengths[0][:, None] + share * lengths[1][:, None])
