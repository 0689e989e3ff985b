"""Text to image on stored latents: the diffusion experiment where the data are an autoencoder's moments and texts.

A latent is drawn anew at each visit from the mean and log-variance that the autoencoder gave, and a text from the
image's captions; the network reads the text's features as tokens (`UViT.context_shape`). Samples are latents: the
decoder of the autoencoder, which is not part of this program, makes pictures of them.

Source: Bao et al. 2023 (U-ViT), on the latents of Rombach et al. 2022.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.data.catalogue import CATALOGUE
from stabletrain.data.latents import LatentSet, LatentSplit, contexts_digest, open_latents, read_contexts
from stabletrain.data.locate import official_folder
from stabletrain.data.order import batch_indices
from stabletrain.data.spec import DataSpec
from stabletrain.diffusion.config import DiffusionConfig, filled
from stabletrain.diffusion.experiment import PROBE_IMAGES, DiffusionExperiment, DiffusionState
from stabletrain.diffusion.processes import Array
from stabletrain.diffusion.sampling import Generator, Settings, chosen_weights, grid_labels, grid_png, sample_settings
from stabletrain.errors import ConfigError, DataError
from stabletrain.training.devices import replicated
from stabletrain.training.experiment import Batch, Evaluation, EvaluationContext

if TYPE_CHECKING:
    from stabletrain.diffusion.family import SampleOptions

CAPTIONS = 0x636170
"""Second word of the key that chooses captions, so that no other stream of the seed is the same."""


def false_colours(latents: np.ndarray) -> np.ndarray:
    """Latents [N, H, W, C] as uint8 pictures [N, H, W, 3] to look at: the first channels, +-3 deviations of each.

    Of fewer than three channels the first one alone is shown, in grey: [N, H, W, 1].
    """
    shown = latents[..., : 3 if latents.shape[-1] >= 3 else 1].astype(np.float64)
    mean, deviation = shown.mean((0, 1, 2)), shown.std((0, 1, 2)) + 1e-12
    return np.clip(np.rint((shown - mean) / deviation * (127.5 / 3) + 127.5), 0, 255).astype(np.uint8)


def latent_folder(config: DiffusionConfig) -> Path:
    """Where the prepared latents of a configuration are looked for."""
    return Path(config.data).expanduser() if config.data else official_folder(CATALOGUE[config.dataset])


class LatentExperiment(DiffusionExperiment):
    """A diffusion model of latents given texts; see `DiffusionExperiment`."""

    def _open_data(self) -> DataSpec:
        self.latents: LatentSet | None = open_latents(latent_folder(self.config), self.config.dataset)
        return self.latents.spec

    def _check_data(self) -> None:
        """Nothing beyond what `open_latents` refuses: there are no labels, and no pictures to judge."""

    def _steps_per_dispatch(self) -> int:
        return 1  # every batch brings its texts, which are larger than the images

    def _place_data(self) -> None:
        """Only the empty text lies on the devices; everything else stays on disk."""
        self.resident = {}
        self._probe = jax.jit(self._probe_of)
        self._loss = jax.jit(self._losses_of)
        self.latents = getattr(self, "latents", None)
        if self.latents is None:
            return
        whole = replicated(self.mesh)
        self.resident = {"empty": jax.device_put(self.latents.empty, whole)}
        self._probe_batch = jax.device_put(self._fixed_latents(self.latents.train, PROBE_IMAGES), whole)

    def _no_labels(self, count: int) -> Array:
        return jnp.zeros((count, *self.data_spec.context_shape))

    # --- training -----------------------------------------------------------------------------------------------------

    def batch(self, position: int) -> Batch:
        """Moments [B, H, W, 2 C] and the features [B, L, D] of one caption each, by seed and position."""
        assert self.latents is not None, "an experiment built for sampling has no training data"
        train, seed = self.latents.train, self.config.seed
        index = batch_indices(seed, position, len(train), self.config.batch_size)
        draws = np.random.Generator(np.random.Philox(key=[seed << 32 | CAPTIONS, position]))
        return {"position": np.uint32(position), **train.read(index, draws.random(len(index)))}

    def _examples(self, batch: Mapping[str, Array], flip_key: Array, label_key: Array) -> tuple[Array, Array]:
        """Latents [B, H, W, C], drawn and scaled, and text features [B, L, D], some of them of the empty text."""
        mean, log_variance = jnp.split(batch["moments"], 2, axis=-1)
        spread = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))  # the bounds of the released autoencoder
        latents = mean + spread * jax.random.normal(flip_key, mean.shape)
        context = batch["context"]
        if self.config.label_dropout:
            dropped = jax.random.bernoulli(label_key, self.config.label_dropout, (len(context), 1, 1))
            context = jnp.where(dropped, self.resident["empty"], context)
        return latents * filled(self.config.latent_scale), context

    # --- watching and evaluation --------------------------------------------------------------------------------------

    def _fixed_latents(self, split: LatentSplit, count: int) -> dict[str, np.ndarray]:
        """`count` moments of a split with their first captions, and times and noise that never change."""
        index = np.arange(count) % len(split)
        return {**split.read(index, np.zeros(count)), **self._fixed_noise(count)}

    def _fixed_examples(self, fixed: Mapping[str, Array]) -> tuple[Array, Array]:
        mean, _ = jnp.split(fixed["moments"], 2, axis=-1)
        return mean * filled(self.config.latent_scale), fixed["context"]

    @functools.cached_property
    def held_out_pairs(self) -> dict[str, np.ndarray]:
        assert self.latents is not None
        split = self.latents.test if len(self.latents.test) else self.latents.train
        return self._fixed_latents(split, self.config.eval_pairs)

    def text_generator(self, settings: Settings, empty: np.ndarray, chunk: int) -> Generator:
        """A compiled sampler of latents, which are given back unscaled in float32; `empty` [L, D] is the empty text."""
        scale = filled(self.config.latent_scale)

        def unscaled(latents: Array) -> np.ndarray:
            return np.asarray(latents, np.float32) / np.float32(scale)

        return Generator(
            self._apply,
            self.process,
            settings,
            mesh=self.mesh,
            image_shape=self.image_shape,
            nothing=empty,
            chunk=chunk,
            finish=unscaled,
        )

    def generator(self, settings: Settings, at_most: int | None = None) -> Generator:
        """As `text_generator`, with the data set's own features of the empty text; cheap to ask for again."""
        assert self.latents is not None, "an experiment built for sampling brings its own texts: text_generator"
        chunk = self.config.sampling_batch if at_most is None else min(at_most, self.config.sampling_batch)
        if (settings, chunk) not in self._generators:
            self._generators[settings, chunk] = self.text_generator(settings, self.latents.empty, chunk)
        return self._generators[settings, chunk]

    def evaluate(self, state: DiffusionState, step: int, context: EvaluationContext) -> Evaluation:
        """`eval/loss_<split>_<weights>` on fixed latents, and a grid of samples for held-out texts in false colours."""
        assert self.latents is not None, "an experiment built for sampling cannot be evaluated"
        split, name = (self.latents.test, "test") if len(self.latents.test) else (self.latents.train, "train")
        scalars: dict[str, Any] = self._held_out_losses(state, name, context)
        count = len(grid_labels(0))
        texts = split.read(np.arange(count) % len(split), np.zeros(count))["context"]
        params = next(iter(self.weights(state).values()))
        latents = self.generator(self.settings()).generate(
            params, texts, seed=self.config.seed, context=context, what="evaluation samples"
        )
        return Evaluation(scalars=scalars, files={f"samples/{step:08d}.png": grid_png(false_colours(latents))})


def texts_digest(experiment: LatentExperiment, options: SampleOptions) -> str:
    """Identifies the texts to sample from by their content. Raises: `ConfigError`, `DataError`."""
    return contexts_digest(_texts_place(experiment, options))


def _texts_place(experiment: LatentExperiment, options: SampleOptions) -> Path:
    """Raises: `ConfigError` where no texts are named and those of the data are gone."""
    if options.context is not None:
        return Path(options.context).expanduser()
    place = latent_folder(experiment.config)
    if not place.is_dir():
        raise ConfigError(
            f"this model reads texts, and its data are no longer in {place}: --context FILE.npz (contexts [N, L, D], "
            "empty [L, D]) or a folder of prepared latents"
        )
    return place


def sampled_latents(
    experiment: LatentExperiment, state: DiffusionState, options: SampleOptions, context: EvaluationContext
) -> dict[str, bytes]:
    """What `stabletrain sample` writes: `samples.npz` with `latents` [N, H, W, C], for the autoencoder's decoder.

    The latents are unscaled, one for each text in turn; `grid.png` shows them in false colours.
    Raises: `ConfigError` for options that this model cannot follow, `DataError` for texts that are not of its shape,
    `NotFiniteError`.
    """
    if options.label is not None:
        raise ConfigError("--label does nothing: this model reads texts (--context)")
    place = _texts_place(experiment, options)
    texts, empty = read_contexts(place)
    if texts.shape[1:] != experiment.data_spec.context_shape:
        raise DataError(
            f"{place} holds texts of shape {texts.shape[1:]}, but this model was trained on "
            f"{experiment.data_spec.context_shape}"
        )
    params = chosen_weights(experiment, state, options)
    chunk = min(options.num, experiment.config.sampling_batch)
    generator = experiment.text_generator(sample_settings(experiment, options), empty, chunk)
    latents = generator.generate(params, texts.repeated(options.num), seed=options.seed, context=context, finite=True)
    stream = io.BytesIO()
    np.savez_compressed(stream, latents=latents)
    return {"grid.png": grid_png(false_colours(latents)), "samples.npz": stream.getvalue()}
