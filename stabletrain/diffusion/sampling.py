"""Making pictures from a trained network: chunks of compiled trajectories, labels, grids.

Used by the evaluation during training and by `stabletrain sample`. Finished chunks are kept in the caller's scratch
folder, so that an interrupted evaluation does not make them again.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from stabletrain.data.images import encode_png, image_grid, refuse_not_finite, to_uint8
from stabletrain.diffusion.contradictions import sampler_problem
from stabletrain.diffusion.guidance import guided
from stabletrain.diffusion.processes import Array, Process
from stabletrain.diffusion.samplers import SAMPLERS, Plan, ddim, heun, sample
from stabletrain.errors import ConfigError, nearest
from stabletrain.random_keys import random_key
from stabletrain.training.devices import batch_sharding, replicated
from stabletrain.training.experiment import EvaluationContext

if TYPE_CHECKING:
    from stabletrain.data.latents import Texts
    from stabletrain.diffusion.experiment import DiffusionExperiment, DiffusionState
    from stabletrain.diffusion.family import SampleOptions

Params = Any
Apply = Callable[..., Array]
"""(params, noisy, network times, labels, texts or None, skip_multipliers or None) -> the network's output."""


@dataclass(frozen=True)
class Settings:
    """How trajectories are run.

    `eta` is for `ddim`, `churn` for `heun`; `skip_multipliers` has one number per skip, outermost first.
    """

    sampler: str
    steps: int
    guidance: float
    eta: float = 0.0
    churn: float = 0.0
    clip: bool = True
    skip_multipliers: tuple[float, ...] = ()


def plan_of(process: Process, settings: Settings) -> Plan:
    """The sampler's plan on a process."""
    if settings.sampler == "ddim":
        return ddim(process, settings.steps, settings.eta)
    if settings.sampler == "heun":
        return heun(process, settings.steps, settings.churn)
    return SAMPLERS[settings.sampler](process, settings.steps)


class Generator:
    """Images from parameters, compiled once for its settings.

    Image n of a seed depends on the parameters, the settings and its label only, not on the chunk or the devices.
    `nothing` is the label that means "none", or the features [L, D] of the empty text; None for a network without
    either. `finish` turns a chunk of what the samplers give into what is kept: uint8 images.
    """

    def __init__(
        self,
        apply: Apply,
        process: Process,
        settings: Settings,
        *,
        mesh: Mesh,
        image_shape: tuple[int, int, int],
        nothing: np.ndarray | int | None,
        chunk: int,
        finish: Callable[[Array], np.ndarray] = to_uint8,
    ) -> None:
        self._finish = finish
        self.chunk = -(-chunk // mesh.size) * mesh.size
        self._mesh = mesh
        plan = plan_of(process, settings)
        multipliers = np.asarray(settings.skip_multipliers, np.float32) if settings.skip_multipliers else None

        def trajectory(params: Params, keys: Array, labels: Array) -> Array:
            def network(noisy: Array, times: Array, classes: Array | None) -> Array:
                return apply(params, noisy, times, classes, multipliers)

            if nothing is not None:
                follow = guided(network, labels, nothing, settings.guidance)
            else:

                def follow(noisy: Array, times: Array) -> Array:
                    return network(noisy, times, None)

            return sample(process, plan, follow, keys, image_shape, clip=settings.clip)

        whole, split = replicated(mesh), batch_sharding(mesh)
        self._trajectory = jax.jit(trajectory, in_shardings=(whole, split, split), out_shardings=split)
        self._keys = jax.jit(lambda seed, n: jax.vmap(lambda i: jax.random.fold_in(random_key(seed), i))(n))

    def chunks(
        self,
        params: Params,
        labels: np.ndarray | Texts,
        *,
        seed: int,
        context: EvaluationContext,
        what: str,
        finite: bool = False,
    ) -> Iterator[np.ndarray]:
        """Images of the asked labels [N] or texts [N, L, D], a chunk at a time, in order.

        Raises: `NotFiniteError` where `finite` is asked for and a sample is not; no such chunk is kept.
        """
        total = len(labels)
        for start in range(0, total, self.chunk):
            context.tick(what, start, total)
            count = min(self.chunk, total - start)
            kept = context.scratch / f"{what.replace(' ', '_')}_{start}_{count}.npy"
            if kept.is_file():
                yield np.load(kept)
                continue
            # Always whole chunks: another size would be another program to compile.
            numbers = np.arange(start, start + self.chunk, dtype=np.uint32)
            asked = np.resize(labels[start : start + count], (self.chunk, *labels.shape[1:]))
            made = self._trajectory(params, self._keys(np.uint32(seed), numbers), asked)
            if finite:
                refuse_not_finite(np.asarray(made, np.float32)[:count], before=start)
            images = self._finish(made)[:count]
            _save(kept, images)
            yield images
        context.tick(what, total, total)

    def generate(
        self,
        params: Params,
        labels: np.ndarray | Texts,
        *,
        seed: int,
        context: EvaluationContext,
        what: str = "sampling",
        finite: bool = False,
    ) -> np.ndarray:
        """Images [N, H, W, C] of the asked labels [N] or texts [N, L, D]. Raises: as `chunks`."""
        return np.concatenate(list(self.chunks(params, labels, seed=seed, context=context, what=what, finite=finite)))


def _save(path: Path, images: np.ndarray) -> None:
    """Whole or not at all: a chunk cut off by a kill must not be taken for a finished one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        np.save(file, images)
    unfinished.replace(path)


GRID_COLUMNS = 10
GRID_CLASSES = 20  # more classes than this are shown by that many, evenly spread


def shown_classes(num_classes: int) -> np.ndarray:
    """The classes of a sample grid, a row each: all, or 20 of them."""
    return np.unique(np.linspace(0, num_classes - 1, min(num_classes, GRID_CLASSES)).astype(np.int32))


def grid_labels(num_classes: int) -> np.ndarray:
    """Labels [rows x 10] of a sample grid in reading order: a class per row; 100 zeros without classes."""
    if not num_classes:
        return np.zeros(GRID_COLUMNS**2, np.int32)
    return np.repeat(shown_classes(num_classes), GRID_COLUMNS)


def grid_png(images: np.ndarray, class_names: Sequence[str] = ()) -> bytes:
    """The images [N, H, W, C] in rows of ten, a class per row where `class_names` are given."""
    rows = [class_names[c] for c in shown_classes(len(class_names))] if class_names else None
    return encode_png(image_grid(images, GRID_COLUMNS, row_labels=rows))


def sample_files(
    experiment: DiffusionExperiment, state: DiffusionState, options: SampleOptions, context: EvaluationContext
) -> dict[str, bytes]:
    """What `stabletrain sample` writes: `grid.png`, one PNG per image, and `samples.npz` (images, labels).

    Raises: `ConfigError` for weights, a label or an option that this model cannot follow, `NotFiniteError`.
    """
    if options.context is not None:
        raise ConfigError("--context does nothing: this model reads no texts")
    params, settings = chosen_weights(experiment, state, options), sample_settings(experiment, options)
    names = experiment.data_spec.class_names if experiment.num_classes else ()
    labels = _labels_of(options, names)
    images = experiment.generator(settings, at_most=options.num).generate(
        params, labels, seed=options.seed, context=context, finite=True
    )

    digits = len(str(options.num - 1))
    files = {"grid.png": encode_png(image_grid(images, GRID_COLUMNS))}
    for number, (image, label) in enumerate(zip(images, labels)):
        suffix = f"-{names[label].replace('/', '_')}" if names else ""
        files[f"{number:0{digits}d}{suffix}.png"] = encode_png(image)
    stream = io.BytesIO()
    arrays: dict[str, Any] = {"images": images, "labels": labels} if names else {"images": images}
    np.savez_compressed(stream, **arrays)
    files["samples.npz"] = stream.getvalue()
    return files


def chosen_weights(experiment: DiffusionExperiment, state: DiffusionState, options: SampleOptions) -> Params:
    """The asked weights, or the first that there are. Raises: `ConfigError` for weights that the run does not keep."""
    weights = experiment.weights(state)
    name = options.weights or next(iter(weights))
    if name not in weights:
        raise ConfigError("this run keeps no moving average (--ema-decay 0): use --weights raw")
    return weights[name]


def sample_settings(experiment: DiffusionExperiment, options: SampleOptions) -> Settings:
    """The run's own settings with the options that were given.

    Raises: `ConfigError` where the model cannot follow.
    """
    config, own = experiment.config, experiment.settings()
    sampler = options.sampler or own.sampler
    changes: dict[str, Any] = {
        "sampler": sampler,
        "eta": own.eta if sampler == "ddim" else 0.0,
        "churn": own.churn if sampler == "heun" else 0.0,
    }
    if options.sampling_steps:
        changes["steps"] = options.sampling_steps
    if options.guidance is not None:
        if not experiment.num_classes and not experiment.data_spec.context_shape:
            raise ConfigError("--guidance does nothing: this model knows no labels")
        if options.guidance != 1.0 and not config.label_dropout:
            raise ConfigError("--guidance other than 1 needs a model trained with --label-dropout; this one was not")
        changes["guidance"] = options.guidance
    if options.ddim_eta is not None:
        if sampler != "ddim":
            raise ConfigError(f"--ddim-eta does nothing with --sampler {sampler}")
        changes["eta"] = options.ddim_eta
    if options.churn is not None:
        if (sampler, config.process) != ("heun", "edm"):
            raise ConfigError(
                f"--churn does nothing with --sampler {sampler} on {config.process}: it belongs to heun on edm"
            )
        changes["churn"] = options.churn
    if options.clip_denoised is not None:
        if options.clip_denoised and experiment.data_spec.context_shape:
            raise ConfigError("--clip-denoised makes no sense for latents, which do not lie in [-1, 1]")
        changes["clip"] = options.clip_denoised
    if options.skip_multipliers:
        count, given = experiment.network.num_skips, options.skip_multipliers
        if not all(abs(number) <= float(np.finfo(np.float32).max) for number in given):
            raise ConfigError(f"--skip-multipliers takes numbers of float32, not {','.join(map(str, given))}")
        if len(given) not in (1, count):
            raise ConfigError(f"--skip-multipliers takes 1 or {count} numbers (one per skip), not {len(given)}")
        changes["skip_multipliers"] = given * count if len(given) == 1 else given
    settings = dataclasses.replace(own, **changes)
    if problem := sampler_problem(config, settings.sampler, settings.steps):
        raise ConfigError(f"{problem}; this model was trained on {config.process}")
    return settings


def _labels_of(options: SampleOptions, names: Sequence[str]) -> np.ndarray:
    if options.label is None:
        return np.arange(options.num, dtype=np.int32) % max(len(names), 1)
    if not names:
        raise ConfigError("--label does nothing: this model knows no labels")
    if options.label in names:
        label = list(names).index(options.label)
    elif options.label.isdecimal() and int(options.label) < len(names):
        label = int(options.label)
    else:
        raise ConfigError(f"unknown label {options.label!r}: {nearest(options.label, names)}")
    return np.full(options.num, label, np.int32)
