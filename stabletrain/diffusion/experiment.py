"""The diffusion experiment: what the training loop needs to know of a diffusion model.

One state, one compiled step, one fixed probe batch whose feature norms show what the skip connections do, and an
evaluation: the held-out loss, a grid of samples, and how often a classifier agrees with the asked label.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from stabletrain.data.images import to_float
from stabletrain.data.load import load_dataset
from stabletrain.data.order import batch_indices
from stabletrain.data.spec import Dataset, DataSpec, Split
from stabletrain.diffusion.backbones import build_network, build_process
from stabletrain.diffusion.config import DiffusionConfig, filled
from stabletrain.diffusion.processes import Array, noised
from stabletrain.diffusion.sampling import Generator, Settings, grid_labels, grid_png
from stabletrain.errors import ConfigError, DataError
from stabletrain.metrics.scoring import refuse_unjudgeable, score_images
from stabletrain.random_keys import random_key
from stabletrain.training.devices import batch_shardings, compute_dtype, replicated
from stabletrain.training.ema import average_decay, start_average, update_average
from stabletrain.training.experiment import Batch, Evaluation, EvaluationContext, Metrics
from stabletrain.training.stability import MonitorState, Policy, guarded_update, init_monitor

Params = Any

RESIDENT_BYTES = 1 << 30
"""Training sets up to this size lie on every device; CIFAR-10 takes 150 MB."""
PROBE_IMAGES = 64
HELD_OUT_CHUNK = 256


@struct.dataclass
class DiffusionState:
    """Everything that evolves. `ema` is None when no average is kept."""

    params: Params
    ema: Params | None
    optimizer: Any
    monitor: MonitorState


def learning_rate_at(config: DiffusionConfig, position: Array) -> Array:
    """The learning rate of update number `position` (0, 1, ...).

    Linear warm-up from 0, so the first update of a run with warm-up has rate 0, as in the official U-ViT and ScaleLong
    code; then constant, or down to 0 at the last step along a line or half a cosine. It follows the position, not the
    number of accepted updates: a skipped step does not shift it.
    """
    n = position.astype(jnp.float32)
    rate = jnp.full((), config.learning_rate, jnp.float32)
    warmup = filled(config.warmup_steps)
    if warmup:
        rate = rate * jnp.minimum(n / warmup, 1.0)
    if config.lr_decay == "constant":
        return rate
    done = jnp.clip((n - warmup) / max(config.steps - warmup, 1), 0.0, 1.0)
    return rate * (1.0 - done if config.lr_decay == "linear" else 0.5 * (1.0 + jnp.cos(jnp.pi * done)))


def optimizer_for(config: DiffusionConfig, rate: Array | float) -> optax.GradientTransformation:
    """AdamW as PyTorch and the paper have it: decay on every parameter, scaled by the learning rate; clipping first."""
    stages = [optax.clip_by_global_norm(config.gradient_clip)] if config.gradient_clip else []
    stages.append(optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=1e-8))
    if config.weight_decay:
        stages.append(optax.add_decayed_weights(config.weight_decay))
    return optax.chain(*stages, optax.scale(-rate))


class DiffusionExperiment:
    """A diffusion model on an image data set; see `stabletrain.training.experiment.Experiment`.

    With `data_spec` and no data it can sample, but neither train nor evaluate.
    """

    traceable = True

    def __init__(self, config: DiffusionConfig, *, mesh: Mesh, data_spec: DataSpec | None = None) -> None:
        self.config = config
        self.mesh = mesh
        self.dataset: Dataset | None = None
        self.data_spec = self._open_data() if data_spec is None else data_spec
        data_spec = self.data_spec
        self.num_classes = data_spec.num_classes if config.class_conditional else 0
        self.image_shape = (data_spec.image_size, data_spec.image_size, data_spec.channels)
        self._check_data()

        self.process = build_process(config)
        self.network = build_network(
            config,
            self.image_shape,
            num_classes=self.num_classes,
            context_shape=data_spec.context_shape,
            dtype=compute_dtype(config.precision),
        )
        self.policy = Policy.from_config(config)
        self.examples_per_step = config.batch_size
        self.inner_steps = self._steps_per_dispatch()
        shapes = jax.eval_shape(self._initial_params, random_key(0))
        self.parameter_count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
        self._key = random_key(config.seed)
        self._generators: dict[tuple[Settings, int], Generator] = {}
        self._place_data()

    def _open_data(self) -> DataSpec:
        """Loads what there is to train on, and says what it is."""
        config = self.config
        self.dataset = load_dataset(config.dataset, data=config.data, image_size=config.image_size or None)
        return self.dataset.spec

    def _check_data(self) -> None:
        """Raises: `ConfigError` for a configuration that these data do not allow."""
        config, spec = self.config, self.data_spec
        if config.class_conditional and not spec.num_classes:
            raise ConfigError(f"data set {spec.name!r} has no labels: use --no-class-conditional")
        if self.dataset is not None and len(self.dataset.train) == 0:
            raise DataError(f"data set {spec.name!r} has no training images")
        if self.dataset is not None:
            refuse_unjudgeable(config, self.dataset)

    def _steps_per_dispatch(self) -> int:
        if self.config.backbone == "mlp":
            return 10
        # XLA:CPU runs convolutions inside a loop several times slower than outside.
        return 1 if self.mesh.devices.flat[0].platform == "cpu" else 10

    def _place_data(self) -> None:
        """Small sets lie on the devices as uint8; of large ones each batch brings its images."""
        self.resident: dict[str, Array] = {}
        if self.dataset is None:
            return
        train = self.dataset.train
        images = train.images.array()
        on_device = images is not None and images.nbytes <= RESIDENT_BYTES
        arrays: dict[str, Any] = {"images": images} if on_device else {}
        if self.num_classes:
            arrays["labels"] = train.labels
        whole = replicated(self.mesh)
        self.resident = jax.device_put(arrays, whole)
        self._probe_batch = jax.device_put(self._fixed_batch(train, PROBE_IMAGES), whole)
        self._probe = jax.jit(self._probe_of)
        self._loss = jax.jit(self._losses_of)

    # --- training -----------------------------------------------------------------------------------------------------

    def _initial_params(self, key: Array) -> Params:
        images = jnp.zeros((1, *self.image_shape))
        labels = self._no_labels(1)
        return self.network.init({"params": key}, images, jnp.zeros((1,)), labels, train=False)["params"]

    def _no_labels(self, count: int) -> Array | None:
        """Any labels of the right shape; None for a network without."""
        return jnp.zeros((count,), jnp.int32) if self.num_classes else None

    def init(self, key: Array) -> DiffusionState:
        """The state before the first step."""
        params = self._initial_params(key)
        return DiffusionState(
            params=params,
            ema=start_average(params) if self.config.ema_decay else None,
            optimizer=optimizer_for(self.config, 0.0).init(params),
            monitor=init_monitor(params, self.policy),
        )

    def batch(self, position: int) -> Batch:
        """Indices into the resident training images; of a large set the images themselves as well."""
        assert self.dataset is not None, "an experiment built for sampling has no training data"
        train = self.dataset.train
        index = batch_indices(self.config.seed, position, len(train), self.config.batch_size)
        batch = {"index": index, "position": np.uint32(position)}
        if "images" not in self.resident:
            batch["image"] = train.images.read(index)
        return batch

    def _apply(
        self,
        params: Params,
        noisy: Array,
        times: Array,
        labels: Array | None,
        skip_multipliers: Array | None = None,
        dropout_key: Array | None = None,
    ) -> Array:
        training = dropout_key is not None
        out: Any = self.network.apply(
            {"params": params},
            noisy,
            times,
            labels,
            skip_multipliers=skip_multipliers,
            train=training,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
        )
        return out

    def _examples(self, batch: Mapping[str, Array], flip_key: Array, label_key: Array) -> tuple[Array, Array | None]:
        """Images [B, H, W, C] in [-1, 1] and labels [B], some of them dropped."""
        config, data = self.config, {**self.resident, **batch}
        index = batch["index"]
        images = to_float(data["image"] if "image" in data else data["images"][index])
        if config.horizontal_flip:
            flip = jax.random.bernoulli(flip_key, 0.5, (len(index), 1, 1, 1))
            images = jnp.where(flip, images[:, :, ::-1], images)
        if not self.num_classes:
            return images, None
        labels = data["labels"][index]
        if config.label_dropout:
            dropped = jax.random.bernoulli(label_key, config.label_dropout, labels.shape)
            labels = jnp.where(dropped, self.num_classes, labels)
        return images, labels

    def step(self, state: DiffusionState, batch: Batch) -> tuple[DiffusionState, Metrics]:
        """One update: noise the images, predict the noise, step the optimiser under watch, move the average."""
        config, position = self.config, batch["position"]
        keys = jax.random.split(jax.random.fold_in(self._key, position), 5)
        clean, labels = self._examples(batch, keys[0], keys[1])
        times = self.process.draw_times(keys[2], len(clean))
        noise = jax.random.normal(keys[3], clean.shape)

        def loss_of(params: Params) -> Array:
            def network(noisy: Array, network_times: Array) -> Array:
                return self._apply(params, noisy, network_times, labels, dropout_key=keys[4])

            return jnp.mean(self.process.loss(network, clean, noise, times))

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        rate = learning_rate_at(config, position)
        update = guarded_update(
            optimizer_for(config, rate),
            loss=loss,
            gradients=gradients,
            params=state.params,
            optimizer_state=state.optimizer,
            monitor=state.monitor,
            policy=self.policy,
        )
        ema = state.ema
        if config.ema_decay:
            decay = average_decay(position, config.ema_decay, ramp=filled(config.ema_ramp))
            ema = update.choose(update_average(state.ema, update.params, decay), state.ema)
        new = DiffusionState(update.params, ema, update.optimizer_state, update.monitor)
        return new, {"train/loss": loss, "train/learning_rate": rate, **update.metrics}

    # --- watching -----------------------------------------------------------------------------------------------------

    def _fixed_batch(self, split: Split, count: int) -> dict[str, np.ndarray]:
        """`count` images of a split with their labels, and times and noise that never change."""
        index = np.arange(count) % len(split)
        fixed = {"images": split.images.read(index), **self._fixed_noise(count)}
        if self.num_classes:
            assert split.labels is not None
            fixed["labels"] = split.labels[index]
        return fixed

    def _fixed_noise(self, count: int) -> dict[str, np.ndarray]:
        """`times` [count] and `noise` [count, H, W, C] that never change."""
        # Multiplying by an odd constant near the golden ratio scatters the times over the images.
        order = np.argsort(np.arange(count) * 2654435769 % 2**32, kind="stable")
        noise = np.random.Generator(np.random.Philox(20)).standard_normal((count, *self.image_shape), np.float32)
        return {"times": self.process.spread_times(count)[order], "noise": noise}

    def probe(self, state: DiffusionState) -> Metrics:
        """Norms of the features behind each skip and in the middle for the same noisy images each time, and gate means.

        `stability/feature_norm/skip_<i>` is the norm of the whole feature that the decoder makes of skip i (0 is the
        outermost), averaged over the images; `.../middle` that of the middle block, `.../sum` the sum over the skips.
        `stability/gate_mean/skip_<i>` is there for scalings with learned gates.
        """
        return self._probe(state.params, self._probe_batch)

    def _fixed_examples(self, fixed: Mapping[str, Array]) -> tuple[Array, Array | None]:
        """Clean images and labels of a batch that `_fixed_batch` made."""
        return to_float(fixed["images"]), fixed.get("labels")

    def _probe_of(self, params: Params, fixed: Mapping[str, Array]) -> Metrics:
        clean, labels = self._fixed_examples(fixed)
        noisy = noised(self.process, clean, fixed["noise"], fixed["times"])
        sown: dict[str, Any] = {}

        def network(noisy: Array, network_times: Array) -> Array:
            out, variables = self.network.apply(
                {"params": params}, noisy, network_times, labels, train=False, mutable=["features"]
            )
            sown.update(variables["features"])
            return out

        self.process.estimate(network, noisy, fixed["times"])
        metrics: dict[str, Array] = {}
        for path, values in jax.tree_util.tree_leaves_with_path(sown):
            *outer, name = (entry.key for entry in path if hasattr(entry, "key"))
            if name == "gate_mean":
                metrics[f"stability/gate_mean/{outer[-1].replace('merge_', 'skip_')}"] = jnp.mean(values)
            else:
                metrics[f"stability/feature_norm/{name}"] = jnp.mean(values)
        skips = [value for name, value in metrics.items() if name.startswith("stability/feature_norm/skip_")]
        return {**metrics, "stability/feature_norm/sum": sum(skips, jnp.zeros(()))}

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def weights(self, state: DiffusionState) -> dict[str, Params]:
        """The networks that there are to evaluate and sample from: `ema` first where it is kept, then `raw`."""
        return {**({"ema": state.ema} if state.ema is not None else {}), "raw": state.params}

    def generator(self, settings: Settings, at_most: int | None = None) -> Generator:
        """A compiled sampler of this model; cheap to ask for again. `at_most`: images that will be asked for."""
        chunk = self.config.sampling_batch if at_most is None else min(at_most, self.config.sampling_batch)
        if (settings, chunk) not in self._generators:
            self._generators[settings, chunk] = Generator(
                self._apply,
                self.process,
                settings,
                mesh=self.mesh,
                image_shape=self.image_shape,
                nothing=self.num_classes or None,
                chunk=chunk,
            )
        return self._generators[settings, chunk]

    def settings(self) -> Settings:
        """How this run's configuration samples."""
        config = self.config
        return Settings(
            sampler=config.sampler,
            steps=config.sampling_steps,
            guidance=1.0 if config.guidance is None else config.guidance,
            eta=config.ddim_eta or 0.0,
            churn=config.churn or 0.0,
            clip=filled(config.clip_denoised),
        )

    def evaluate(self, state: DiffusionState, step: int, context: EvaluationContext) -> Evaluation:
        """Held-out loss, a grid of samples, and what the generated images are worth.

        `eval/loss_<split>_<weights>`: the training loss on fixed images, times and noise; the split is `train` only
        where there are no test images (or none with the labels that a conditional model needs). The other scores are
        those of `stabletrain.metrics.scoring.score_images`.
        """
        assert self.dataset is not None, "an experiment built for sampling cannot be evaluated"
        split = "train" if self._held_out_split is self.dataset.train else "test"
        scalars = self._held_out_losses(state, split, context)
        name, params = next(iter(self.weights(state).items()))
        labels = self._evaluation_labels()
        images = self.generator(self.settings()).generate(
            params, labels, seed=self.config.seed, context=context, what="evaluation samples"
        )
        shown = len(grid_labels(self.num_classes))
        names = self.data_spec.class_names if self.num_classes else ()
        files = {f"samples/{step:08d}.png": grid_png(images[:shown], names)}
        if filled(self.config.eval_samples):
            asked = labels[shown:] if self.num_classes else None
            judged = score_images(
                images[shown:], asked, self.dataset, self.config, step=step, context=context, weights=name
            )
            scalars, files = {**scalars, **judged.scalars}, {**files, **judged.files}
        return Evaluation(scalars=scalars, files=files)

    def _evaluation_labels(self) -> np.ndarray:
        """The grid's labels first, then those of the judged samples, every class equally often (within one)."""
        judged = np.arange(filled(self.config.eval_samples)) % max(self.num_classes, 1)
        return np.concatenate([grid_labels(self.num_classes), judged]).astype(np.int32)

    def _held_out_losses(self, state: DiffusionState, split: str, context: EvaluationContext) -> dict[str, float]:
        return {
            f"eval/loss_{split}_{name}": self._held_out_loss(params, f"loss of {name} weights", context)
            for name, params in self.weights(state).items()
        }

    def _held_out_loss(self, params: Params, label: str, context: EvaluationContext) -> float:
        fixed, total = self.held_out_pairs, self.config.eval_pairs
        losses = []
        for start in range(0, total, HELD_OUT_CHUNK):
            context.tick(label, start, total)
            part = {name: array[start : start + HELD_OUT_CHUNK] for name, array in fixed.items()}
            part = jax.device_put(part, batch_shardings(part, self.mesh))
            losses.append(np.asarray(self._loss(params, part), np.float64))
        context.tick(label, total, total)
        return float(np.mean(np.concatenate(losses)))

    @property
    def _held_out_split(self) -> Split:
        assert self.dataset is not None
        test = self.dataset.test
        usable = len(test) and (test.labels is not None or not self.num_classes)
        return test if usable else self.dataset.train

    @functools.cached_property
    def held_out_pairs(self) -> dict[str, np.ndarray]:
        return self._fixed_batch(self._held_out_split, self.config.eval_pairs)

    def _losses_of(self, params: Params, fixed: Mapping[str, Array]) -> Array:
        clean, labels = self._fixed_examples(fixed)

        def network(noisy: Array, network_times: Array) -> Array:
            return self._apply(params, noisy, network_times, labels)

        return self.process.loss(network, clean, fixed["noise"], fixed["times"])
