"""The GAN family as the command line sees it. Imports no JAX until one of its functions is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stabletrain.errors import ConfigError, nearest
from stabletrain.gan.config import BATCH_NORM_NAMES, GanConfig
from stabletrain.gan.figure_commands import gradient_norms, random_architectures, value_surfaces
from stabletrain.gan.import_command import import_weights
from stabletrain.gan.resolution import resolve
from stabletrain.training.config import LARGEST_SEED, option
from stabletrain.training.experiment import EvaluationContext, Family

if TYPE_CHECKING:
    from stabletrain.gan.experiment import GanExperiment
    from stabletrain.gan.state import GanState

PANEL = "Sampling"


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How `stabletrain sample` makes samples. What is not given is as the run was configured."""

    num: int = option(100, "Number of images.", panel=PANEL, minimum=1)
    label: str | None = option(None, "Class to make, by name or number; without it every class in turn.", panel=PANEL)
    truncation: float = option(
        0.0, "Draw latents again until all are this close to 0 (styles: their distance to the mean style, times this); "
        "0: never.", panel=PANEL, minimum=0.0,
    )  # fmt: skip
    batch_norm: str | None = option(None, "Statistics of batch normalisation.", panel=PANEL, choices=BATCH_NORM_NAMES)
    weights: str | None = option(
        None, "Which weights: their moving average or the last ones.", panel=PANEL, choices=("ema", "raw")
    )
    seed: int = option(0, "Seed of the images.", panel=PANEL, minimum=0, maximum=LARGEST_SEED)


def build(config: GanConfig, *, mesh: Any, data_spec: Any = None) -> GanExperiment:
    """The experiment; with `data_spec` (a `DataSpec` or its dictionary) no data set is loaded."""
    from stabletrain.data.spec import DataSpec
    from stabletrain.gan.experiment import GanExperiment

    if isinstance(data_spec, Mapping):
        data_spec = DataSpec.from_dict(data_spec)
    return GanExperiment(config, mesh=mesh, data_spec=data_spec)


def sample(
    experiment: GanExperiment, state: GanState, options: SampleOptions, context: EvaluationContext
) -> Mapping[str, bytes]:
    """Samples of a trained GAN by relative path, as its domain writes them.

    Raises: `ConfigError` for an option that this model cannot follow, `NotFiniteError`.
    """
    import numpy as np

    from stabletrain.data.images import refuse_not_finite

    model = experiment.model(state, options.weights, options.batch_norm)
    names = experiment.domain.class_names if model.num_classes else ()
    labels = None
    if names:
        labels = np.arange(options.num, dtype=np.int32) % len(names)
    if options.label is not None:
        labels = np.full(options.num, _label(options.label, names), np.int32)
    samples = model.samples(
        labels, options.num, seed=options.seed, context=context, what="sampling", truncation=options.truncation
    )
    refuse_not_finite(samples)
    return experiment.domain.sample_files(samples, labels, context)


def _label(asked: str, names: tuple[str, ...]) -> int:
    if not names:
        raise ConfigError("--label does nothing: this model knows no labels")
    if asked in names:
        return list(names).index(asked)
    if asked.isdecimal() and int(asked) < len(names):
        return int(asked)
    raise ConfigError(f"unknown label {asked!r}: {nearest(asked, names)}")


FAMILY = Family(
    name="gan",
    help="Train a GAN: ReACGAN and the conditional GANs that it is compared with, WGAN-GP, and others by --method.",
    config=GanConfig,
    build=build,
    resolve=resolve,
    sample=sample,
    sample_options=SampleOptions,
    subcommands={
        "value-surfaces": value_surfaces,
        "gradient-norms": gradient_norms,
        "random-architectures": random_architectures,
        "import": import_weights,
    },
)
