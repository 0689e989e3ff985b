"""Domains: what a GAN of this family generates, and how that is judged.

A domain owns the real samples and their evaluation; the experiment owns networks, losses and updates. Images are one
domain; points in the plane and text are others, chosen by the data set's name. Imports no JAX until one is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from stabletrain.training.experiment import Evaluation, EvaluationContext

if TYPE_CHECKING:
    import numpy as np
    from jax import Array

    from stabletrain.data.spec import DataSpec
    from stabletrain.gan.config import GanConfig


class Model(Protocol):
    """A trained GAN as an evaluation sees it: weights are chosen, programs compiled, chunks cut to size."""

    num_classes: int
    """Classes that the generator is told of; 0: none."""
    z_dim: int
    weights: str
    """`ema` or `raw`: which generator this is."""
    batch_norm: str | None
    """How batch normalisation is evaluated (`running`, `batch`, `standing`); None where there is none."""

    def samples(
        self,
        labels: np.ndarray | None,
        count: int,
        *,
        seed: int,
        context: EvaluationContext,
        what: str = "evaluation samples",
        truncation: float = 0.0,
    ) -> np.ndarray:
        """float32 [count, *sample_shape] of fresh latents. Sample n depends on seed, n and its label only (with
        `batch_norm` other than `batch`). `truncation` > 0 draws latents again until all are that close to 0; of a
        generator with styles it is the share of the way from the mean style that styles keep."""

    def from_latents(self, latents: np.ndarray, labels: np.ndarray | None, *, context: EvaluationContext) -> np.ndarray:
        """float32 [N, *sample_shape] of the given latents [N, z_dim]."""

    def scores(self, samples: np.ndarray, labels: np.ndarray | None, *, context: EvaluationContext) -> np.ndarray:
        """float32 [N]: the discriminator's adversarial scores, without augmentation."""


class Domain(Protocol):
    """Real samples and their judgement. Built with the data, or (for sampling and export) from a `DataSpec` alone."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of one sample: (H, W, C) of images."""

    @property
    def num_classes(self) -> int:
        """0 where there are no labels."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """A name for each class."""

    @property
    def data_spec(self) -> DataSpec:
        """The description that the run keeps."""

    @property
    def resident(self) -> Mapping[str, Any]:
        """Arrays that lie whole on every device; `real` finds them in its batch under their names."""

    def batch(self, position: int, count: int) -> dict[str, np.ndarray]:
        """Host arrays of `count` examples, leading axis [count]: a pure function of (seed, position). Examples number
        position * count onwards, so that no example is passed over whatever the number of critic steps."""

    def real(self, batch: Mapping[str, Array], key: Array) -> tuple[Array, Array | None]:
        """Inside jit: samples [B, *sample_shape] float32 and labels int32 [B] (None without), from one slice [B] of
        `batch` together with `resident`. Randomness (dequantisation, flips) from `key`."""

    def fixed(self, split: str, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Up to `count` samples of the split (`train` or `test`), evenly spread, as `real` makes them but without
        augmentation, and their labels; none where the data have no such split."""

    def evaluate(self, model: Model, step: int, context: EvaluationContext) -> Evaluation:
        """Scores, pictures and figures of a trained model; names as the family's documentation lists them."""

    def sample_files(
        self, samples: np.ndarray, labels: np.ndarray | None, context: EvaluationContext
    ) -> Mapping[str, bytes]:
        """What `stabletrain sample` writes of float32 samples [N, *sample_shape], by relative path."""


@dataclass(frozen=True)
class DomainSpec:
    """A domain as the configuration knows it, before any data are read."""

    build: Callable[[GanConfig, DataSpec | None], Domain]
    """The second argument stands for the data where they are not needed (sampling, export)."""
    kind: str = "images"
    """`images`, `points` or `text`: which networks fit (`NetworkSpec.kinds`)."""
    num_classes: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)
    """Values of options that neither the user nor, where they differ, the method says; they win over the method's."""


def _images(config: GanConfig, data_spec: DataSpec | None) -> Domain:
    from stabletrain.gan.images import ImageDomain

    return ImageDomain(config, data_spec)


IMAGES = DomainSpec(build=_images)
"""Every image data set of the catalogue, and the user's own images."""


def _points(config: GanConfig, data_spec: DataSpec | None) -> Domain:
    from stabletrain.gan.points import build_points

    return build_points(config, data_spec)


POINTS = DomainSpec(
    build=_points, kind="points", values={"network": "mlp", "generator_norm": "none", "z_dim": 2, "depth": 3}
)


def _text(config: GanConfig, data_spec: DataSpec | None) -> Domain:
    from stabletrain.gan.text import build_text

    return build_text(config, data_spec)


TEXT = DomainSpec(
    build=_text,
    kind="text",
    values={"network": "text-resnet", "generator_width": 64, "discriminator_width": 64, "depth": 2, "z_dim": 128},
)
"""Small networks for two CPU cores; the paper's have a width of 512 and five blocks."""

DOMAINS: dict[str, DomainSpec] = {"gaussians8": POINTS, "gaussians25": POINTS, "swissroll": POINTS, "text": TEXT}
"""Domains of data sets that are not images, by the name that `--dataset` takes."""


def domain_of(config: GanConfig) -> DomainSpec:
    """The domain of the configured data set. The user's own files are images unless the named data set is another."""
    return DOMAINS.get(config.dataset, IMAGES)
