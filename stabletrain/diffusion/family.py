"""The diffusion family as the command line sees it. Imports no JAX until one of its functions is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabletrain.diffusion.choices import SAMPLER_NAMES
from stabletrain.diffusion.config import DiffusionConfig, resolve
from stabletrain.diffusion.contradictions import reads_text
from stabletrain.diffusion.frontier_command import frontier
from stabletrain.diffusion.import_command import import_weights
from stabletrain.diffusion.published import PublishedOptions
from stabletrain.diffusion.theory_command import theory
from stabletrain.training.config import LARGEST_SEED, option
from stabletrain.training.experiment import EvaluationContext, Family, OpenedWeights, Shorthand

if TYPE_CHECKING:
    from stabletrain.diffusion.experiment import DiffusionExperiment, DiffusionState

PANEL = "Sampling"


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How `stabletrain sample` makes images. What is not given is as the run was configured."""

    num: int = option(100, "Number of images.", panel=PANEL, minimum=1)
    label: str | None = option(None, "Class to make, by name or number; without it every class in turn.", panel=PANEL)
    sampler: str | None = option(None, "Sampler.", panel=PANEL, choices=SAMPLER_NAMES)
    sampling_steps: int = option(0, "Network evaluations per image; 0: as the run.", panel=PANEL, minimum=0)
    guidance: float | None = option(
        None, "Guidance strength: 1 is the labelled network alone, 0 the unlabelled one.", panel=PANEL, minimum=0.0
    )
    clip_denoised: bool | None = option(
        None, "Keep the estimated clean image in [-1, 1] at every step; without it as the run.", panel=PANEL
    )
    ddim_eta: float | None = option(
        None, "ddim: share of fresh noise, 0 (deterministic) to 1 (ancestral).", panel=PANEL, minimum=0.0, maximum=1.0
    )
    churn: float | None = option(
        None, "heun with edm: S_churn, fresh noise along the way; 0 is deterministic.", panel=PANEL, minimum=0.0
    )
    weights: str | None = option(
        None, "Which weights: their moving average or the last ones.", panel=PANEL, choices=("ema", "raw")
    )
    seed: int = option(0, "Seed of the images.", panel=PANEL, minimum=0, maximum=LARGEST_SEED)
    context: str | None = option(
        None,
        "Text features of a text-to-image model: an .npz (contexts, empty) or a folder of prepared latents; "
        "else the held-out texts of its own data.",
        panel=PANEL,
    )
    skip_multipliers: tuple[float, ...] = option(
        (), "Multiply each skip connection, outermost first; one number stands for all.", panel=PANEL
    )


def build(config: DiffusionConfig, *, mesh: Any, data_spec: Any = None) -> DiffusionExperiment:
    """The experiment; with `data_spec` (a `DataSpec` or its dictionary) no data set is loaded."""
    from stabletrain.data.spec import DataSpec
    from stabletrain.diffusion.experiment import DiffusionExperiment

    if isinstance(data_spec, Mapping):
        data_spec = DataSpec.from_dict(data_spec)
    if reads_text(config):
        from stabletrain.diffusion.latent_experiment import LatentExperiment

        return LatentExperiment(config, mesh=mesh, data_spec=data_spec)
    return DiffusionExperiment(config, mesh=mesh, data_spec=data_spec)


def sample(
    experiment: DiffusionExperiment, state: DiffusionState, options: SampleOptions, context: EvaluationContext
) -> dict[str, bytes]:
    """Images of a trained model by relative path: a grid, one PNG each, and all of them as `samples.npz`.

    Raises: `ConfigError` for an option that this model cannot follow, `NotFiniteError`.
    """
    from stabletrain.diffusion.latent_experiment import LatentExperiment, sampled_latents
    from stabletrain.diffusion.sampling import sample_files

    if isinstance(experiment, LatentExperiment):
        return sampled_latents(experiment, state, options, context)
    return sample_files(experiment, state, options, context)


def sample_inputs(experiment: DiffusionExperiment, options: SampleOptions) -> dict[str, str]:
    """The digest of the texts that a text-to-image model is given. Raises: as `sample`."""
    from stabletrain.diffusion.latent_experiment import LatentExperiment, texts_digest

    return {"context": texts_digest(experiment, options)} if isinstance(experiment, LatentExperiment) else {}


def open_weights(file: Path, options: PublishedOptions, *, devices: int) -> OpenedWeights:
    """A published checkpoint's model. Raises: `DataError`, `ConfigError` as `read_published` and `experiment_of`."""
    from stabletrain.diffusion.published import experiment_of, read_published

    published = read_published(file, options, named=False)
    experiment, due = experiment_of(published, devices)
    import jax
    import jax.numpy as jnp

    params = jax.tree.map(jnp.asarray, published.params)
    # The rest of a training state is never read by sampling, and stays a description.
    return OpenedWeights(experiment, due.replace(params=params, ema=None), published.what)


FAMILY = Family(
    name="diffusion",
    help="Train a diffusion model; ScaleLong's scaling of long skip connections keeps it stable.",
    config=DiffusionConfig,
    build=build,
    resolve=resolve,
    shorthands={
        "scalelong": Shorthand("ScaleLong: scale the skips by kappa^i (--skip-scaling cs).", {"skip_scaling": "cs"})
    },
    sample=sample,
    sample_inputs=sample_inputs,
    sample_options=SampleOptions,
    open_weights=open_weights,
    weights_options=PublishedOptions,
    subcommands={"theory": theory, "frontier": frontier, "import": import_weights},
)
