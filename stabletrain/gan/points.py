"""Points in the plane as data of the GAN family: `--dataset gaussians8|gaussians25|swissroll`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from stabletrain.data.order import batch_indices
from stabletrain.data.spec import DataSpec
from stabletrain.errors import ConfigError
from stabletrain.gan.toys import TOY_NAMES, exact_wasserstein, held_out_points, mixture, mode_report, training_points
from stabletrain.training.experiment import Evaluation, EvaluationContext

if TYPE_CHECKING:
    from stabletrain.gan.config import GanConfig
    from stabletrain.gan.domains import Model

JUDGED_MODES, JUDGED_DISTANCE, SHOWN = 2500, 500, 512
GRID, EXTENT = 96, 2.2


class PointsDomain:
    """A toy [N, 2] for the GAN family, with exact measures of what was learned."""

    num_classes = 0
    class_names: tuple[str, ...] = ()
    sample_shape = (2,)

    def __init__(self, config: GanConfig, data_spec: DataSpec | None) -> None:
        self._config = config
        self._name = data_spec.name if data_spec is not None else config.dataset
        self._points = training_points(self._name)
        self._held_out = held_out_points(self._name)
        digest = hashlib.sha256(self._points.tobytes() + self._held_out.tobytes()).hexdigest()
        self.data_spec = data_spec or DataSpec(
            name=self._name,
            image_size=0,
            channels=2,
            num_classes=0,
            class_names=(),
            fingerprint=digest,
            train_count=len(self._points),
            test_count=len(self._held_out),
        )
        self.resident: dict[str, Any] = {"points": self._points}

    def batch(self, position: int, count: int) -> dict[str, np.ndarray]:
        """Numbers of training points."""
        return {"index": batch_indices(self._config.seed, position, len(self._points), count)}

    def real(self, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, None]:
        """Points [B, 2]; the key is not needed."""
        del key
        return batch["points"][batch["index"]], None

    def fixed(self, split: str, count: int) -> tuple[np.ndarray, None]:
        """The first points of a split."""
        return (self._points if split == "train" else self._held_out)[:count], None

    def evaluate(self, model: Model, step: int, context: EvaluationContext) -> Evaluation:
        """Modes, distances and a picture of the critic's values.

        `eval/modes_covered_2500`, `eval/high_quality_share_2500`: see `mode_report`; not for the Swiss roll.
        `eval/wasserstein1_500`: the exact distance of 500 generated points from 500 held-out ones, and `..._floor` that
        of two real samples. `eval/critic_estimate_500`: the mean score of those real points minus that of those
        generated ones, which is the same number times the critic's Lipschitz constant if the critic is the best one.
        """
        points = model.samples(None, JUDGED_MODES, seed=self._config.seed, context=context, what="points")
        scalars: dict[str, float] = {}
        shape = mixture(self._name)
        if shape is not None:
            report = mode_report(points, shape)
            scalars[f"eval/modes_covered_{JUDGED_MODES}"] = float(report.covered)
            scalars[f"eval/high_quality_share_{JUDGED_MODES}"] = report.high_quality
        real, fake = self._held_out[:JUDGED_DISTANCE], points[:JUDGED_DISTANCE]
        other = self._held_out[JUDGED_DISTANCE : 2 * JUDGED_DISTANCE]
        scalars[f"eval/wasserstein1_{JUDGED_DISTANCE}"] = exact_wasserstein(real, fake)
        scalars[f"eval/wasserstein1_{JUDGED_DISTANCE}_floor"] = exact_wasserstein(real, other)
        of_real, of_fake = (model.scores(each, None, context=context).astype(np.float64) for each in (real, fake))
        scalars[f"eval/critic_estimate_{JUDGED_DISTANCE}"] = float(of_real.mean() - of_fake.mean())
        return Evaluation(scalars=scalars, files={f"samples/{step:08d}.png": self._picture(model, points, context)})

    def _picture(self, model: Model, points: np.ndarray, context: EvaluationContext) -> bytes:
        from matplotlib.figure import Figure

        from stabletrain.gan.value_surfaces import draw_surface, figure_files

        places = np.linspace(-EXTENT, EXTENT, GRID)
        grid = np.stack(np.meshgrid(places, places), axis=-1).reshape(-1, 2).astype(np.float32)
        values = model.scores(grid, None, context=context).reshape(GRID, GRID)
        figure = Figure(figsize=(4, 4), layout="constrained")
        draw_surface(figure.subplots(), places, values, self._held_out[:SHOWN], points[:SHOWN])
        return figure_files(figure, "surface")["surface.png"]

    def sample_files(
        self, samples: np.ndarray, labels: np.ndarray | None, context: EvaluationContext
    ) -> dict[str, bytes]:
        """The points as `samples.json`, and a picture of them."""
        from matplotlib.figure import Figure

        from stabletrain.gan.value_surfaces import figure_files

        del labels, context
        figure = Figure(figsize=(4, 4), layout="constrained")
        axis = figure.subplots()
        axis.plot(*samples.T, ".", markersize=2.5, color="#0072B2")
        axis.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT), aspect="equal")
        text = json.dumps(np.asarray(samples, np.float64).tolist())
        return {"samples.json": text.encode(), "samples.png": figure_files(figure, "samples")["samples.png"]}


def build_points(config: GanConfig, data_spec: DataSpec | None) -> PointsDomain:
    """The domain of a toy. Raises: `ConfigError` for files, which a toy has none of."""
    if config.data is not None:
        raise ConfigError(f"--dataset {config.dataset} is drawn, not read: it takes no --data")
    if data_spec is None and config.dataset not in TOY_NAMES:
        raise ConfigError(f"unknown toy {config.dataset!r}; valid: {', '.join(TOY_NAMES)}")
    return PointsDomain(config, data_spec)
