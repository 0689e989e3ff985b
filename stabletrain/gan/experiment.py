"""The GAN experiment: what the training loop needs to know of a generator and a discriminator.

A step is `d_steps` updates of the discriminator, each with new real samples and new fakes, then one of the generator.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from stabletrain.data.spec import DataSpec
from stabletrain.errors import ConfigError
from stabletrain.gan.augmentation import adapted_probability, mixed_with_fakes
from stabletrain.gan.conditioning import Head
from stabletrain.gan.config import GanConfig, filled
from stabletrain.gan.domains import domain_of
from stabletrain.gan.indicators import LATENTS_PER_CLASS, PROBE_SAMPLES, Indicators, probed_classes, spread
from stabletrain.gan.loss_meter import LossMeter
from stabletrain.gan.objectives import CriticBatch, Objectives
from stabletrain.gan.resolution import network_of, network_options
from stabletrain.gan.sampling import GanModel, Programs
from stabletrain.gan.state import (
    Critic,
    GanState,
    Generator,
    NetworkState,
    average_decay_at,
    learning_rate_at,
    optimizer_for,
)
from stabletrain.methods.wgan_gp import clip_weights
from stabletrain.random_keys import key_from_data, random_key
from stabletrain.training.devices import batch_sharding, compute_dtype, replicated
from stabletrain.training.ema import start_average, update_average
from stabletrain.training.experiment import Batch, Evaluation, EvaluationContext, Metrics
from stabletrain.training.stability import Policy, guarded_update, init_monitor, merge_inner_metrics

Array = jax.Array
GENERATOR, CRITIC = "generator/", "critic/"
"""Prefixes of the two networks' metrics."""
SEED = "seed"
"""Name of the run's random key (as plain numbers) among the resident arrays."""
TINY_IMAGE = 64
"""Pixels up to which the discriminator's updates are a compiled loop on a CPU, convolutions or not."""
SPREAD_SAMPLES = 64
"""Real samples a class at most that its spread is measured on."""


class GanExperiment:
    """A GAN on a domain; see `stabletrain.training.experiment.Experiment`.

    With `data_spec` and no data it can sample, but neither train nor evaluate.
    """

    traceable = True
    batch_axis = 1  # updates of the discriminator come first

    def __init__(self, config: GanConfig, *, mesh: Mesh, data_spec: DataSpec | None = None) -> None:
        """Raises: `ConfigError` for networks that do not fit the data; what the domain raises."""
        self.config, self.mesh = config, mesh
        self.domain = domain_of(config).build(config, data_spec)
        self._has_data = data_spec is None
        self.data_spec = self.domain.data_spec
        spec = network_of(config)
        self.num_classes = self.domain.num_classes if config.conditioning != "none" else 0
        options = network_options(
            config, self.domain.sample_shape, self.num_classes, compute_dtype(config.precision)
        )  # fmt: skip
        spec.check(options)
        self.generator = Generator(
            spec.generator(options), filled(config.z_dim), self.num_classes, styles=spec.styles
        )  # fmt: skip
        head = Head(
            kind=filled(config.conditioning),
            num_classes=self.num_classes,
            auxiliary=filled(config.auxiliary),
            embedding_dim=config.embedding_dim or 1,
            spectral=bool(config.discriminator_spectral),
            equalized=spec.styles,
        )
        self.critic = Critic(spec.discriminator(options), head, self.domain.sample_shape)
        self.objectives = Objectives(
            config,
            self.generator,
            self.critic,
            num_classes=self.num_classes,
            mixes_samples=spec.mixes_samples or config.discriminator_norm == "batch",
            draw=self._latents,
        )
        self.policy = Policy.from_config(config, watch_blowup=False)  # adversaries' losses rise by design
        self.examples_per_step = config.batch_size * filled(config.d_steps)
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        slow_in_loops = spec.convolutional and on_cpu
        self.inner_steps = 1 if slow_in_loops else 10
        # Images of 8x8 leave a convolution nothing to lose in a loop of five, and deep critics compile five times
        # faster: 31 s and not minutes for two networks of twenty layers.
        tiny = int(np.prod(self.domain.sample_shape[:2])) <= TINY_IMAGE
        self._unrolled = slow_in_loops and not tiny and not spec.deep
        shapes = jax.eval_shape(lambda key: (self.generator.init(key)[0], self.critic.init(key)[0]), random_key(0))
        self.generator_parameters, self.critic_parameters = (
            sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree)) for tree in shapes
        )
        self.parameter_count = self.generator_parameters + self.critic_parameters
        # An argument of the program like the data, not a constant inside it: all seeds share one compiled program.
        self.resident: dict[str, Any] = {SEED: jax.random.key_data(random_key(config.seed))}
        if self._has_data:
            self.resident |= self.domain.resident
        self.resident = jax.device_put(self.resident, replicated(mesh))

    # --- training -----------------------------------------------------------------------------------------------------

    def init(self, key: Array) -> GanState:
        """The state before the first step."""
        keys = jax.random.split(key, 2)
        optimizer = optimizer_for(self.config, 0.0)
        networks = []
        for (params, statistics), prefix in (
            (self.generator.init(keys[0]), GENERATOR),
            (self.critic.init(keys[1]), CRITIC),
        ):
            monitor = init_monitor(params, self.policy, prefix)
            networks.append(NetworkState(params, statistics, optimizer.init(params), monitor))
        generator, critic = networks
        averaged = bool(self.config.ema_decay or self.config.ema_half_life)
        return GanState(
            generator=generator,
            critic=critic,
            ema=start_average({"params": generator.params, **generator.statistics}) if averaged else None,
            augment=jnp.zeros((3,), jnp.float32),
            lecam=jnp.zeros((2,), jnp.float32),
            path_length=jnp.zeros((), jnp.float32),
        )

    def batch(self, position: int) -> Batch:
        """The domain's arrays [d_steps, B, ...] of one step."""
        assert self._has_data, "an experiment built for sampling has no training data"
        steps, size = filled(self.config.d_steps), self.config.batch_size
        arrays = self.domain.batch(position, steps * size)
        folded = {name: array.reshape(steps, size, *array.shape[1:]) for name, array in arrays.items()}
        return {**folded, "position": np.uint32(position)}

    def _latents(self, key: Array, count: int) -> tuple[Array, Array | None]:
        """Latents [count, z_dim] and uniform labels [count], split over the devices as batches are."""
        keys = jax.random.split(key)
        z = jax.random.normal(keys[0], (count, self.generator.z_dim))
        labels = jax.random.randint(keys[1], (count,), 0, self.num_classes) if self.num_classes else None
        if count % self.mesh.size:
            return z, labels
        drawn: tuple[Array, Array | None] = lax.with_sharding_constraint((z, labels), batch_sharding(self.mesh))
        return drawn

    def step(self, state: GanState, batch: Batch) -> tuple[GanState, Metrics]:
        """`d_steps` updates of the discriminator and one of the generator."""
        position = batch["position"]
        steps = filled(self.config.d_steps)
        key = jax.random.fold_in(key_from_data(batch[SEED]), position)
        resident = {name: batch[name] for name in self.resident}
        inner = {name: value for name, value in batch.items() if name not in resident and name != "position"}

        def critic_update(carried: GanState, number: Any) -> tuple[GanState, tuple[dict[str, Array], Any]]:
            part = {name: value[number] for name, value in inner.items()}
            return self._critic_step(carried, {**part, **resident}, position, number, jax.random.fold_in(key, number))

        if self._unrolled or steps == 1:
            rows = []
            for number in range(steps):
                state, (row, seen) = critic_update(state, number)
                rows.append(row)
        else:
            state, (stacked, all_seen) = lax.scan(critic_update, state, jnp.arange(steps))
            rows = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(steps)]
            seen = jax.tree.map(lambda leaf: leaf[-1], all_seen)
        metrics = _joined_rows(rows)
        state, generator_metrics = self._generator_step(state, seen, position, jax.random.fold_in(key, steps))
        return state, {**metrics, **generator_metrics}

    def _critic_step(
        self, state: GanState, batch: Mapping[str, Array], position: Array, number: Any, key: Array
    ) -> tuple[GanState, tuple[dict[str, Array], tuple[Array, Array | None]]]:
        config = self.config
        keys = jax.random.split(key, 6)
        real, labels = self.domain.real(batch, keys[0])
        z, fake_labels = self._latents(keys[1], len(real))
        generator = {"params": state.generator.params, **state.generator.statistics}
        fake = lax.stop_gradient(self.generator(generator, z, fake_labels, keys[2], train=True)[0])
        near = None
        if config.zcr_discriminator:
            moved = self.objectives.moved_latents(z, keys[3])
            near = lax.stop_gradient(self.generator(generator, moved, fake_labels, keys[2], train=True)[0])
        seen = (real, labels)
        if config.augmentation == "apa":
            real = mixed_with_fakes(real, fake, keys[4], state.augment[0])
            if labels is not None and fake_labels is not None:  # a fake comes with the label that it was made for
                labels = mixed_with_fakes(labels, fake_labels, keys[4], state.augment[0])

        update_number = position * filled(config.d_steps) + jnp.asarray(number, jnp.uint32)
        (loss, result), gradients = jax.value_and_grad(self.objectives.critic_loss, has_aux=True)(
            state.critic.params,
            state.critic.statistics,
            CriticBatch(real, labels, fake, fake_labels, near),
            lecam_means=state.lecam,
            augment_probability=state.augment[0],
            update=update_number,
            position=position,
            key=keys[5],
        )
        rate = learning_rate_at(config, filled(config.discriminator_lr), position)
        update = guarded_update(
            optimizer_for(config, rate),
            loss=loss,
            gradients=gradients,
            params=state.critic.params,
            optimizer_state=state.critic.optimizer,
            monitor=state.critic.monitor,
            policy=self.policy,
            prefix=CRITIC,
        )
        params = update.params
        if config.weight_clip:
            clipped = clip_weights(params, config.weight_clip, kernels_only=bool(config.clip_kernels_only))
            params = update.choose(clipped, params)
        critic = NetworkState(
            params,
            update.choose(result.statistics, state.critic.statistics),
            update.optimizer_state,
            update.monitor,
        )
        state = state.replace(  # type: ignore[attr-defined]
            critic=critic,
            lecam=update.choose(result.lecam, state.lecam),
            augment=update.choose(self._adapted(state.augment, result.signs), state.augment),
        )
        metrics = {**result.metrics, "train/learning_rate_discriminator": rate, **update.metrics}
        if config.augmentation in ("ada", "apa"):
            metrics["train/augment_probability"] = state.augment[0]
        return state, (metrics, seen)

    def _adapted(self, augment: Array, signs: Array) -> Array:
        """The controller of ADA and APA after one more update of the discriminator."""
        config = self.config
        if config.augmentation not in ("ada", "apa"):
            return augment
        probability, total, count = augment[0], augment[1] + jnp.sum(signs), augment[2] + len(signs)
        images = config.batch_size * filled(config.augment_interval)
        moved = adapted_probability(
            probability,
            total / count,
            target=filled(config.augment_target),
            images=images,
            thousands=filled(config.augment_images),
        )
        due = count >= images
        return jnp.where(due, jnp.stack([moved, 0.0, 0.0]), jnp.stack([probability, total, count]))

    def _generator_step(
        self, state: GanState, seen: tuple[Array, Array | None], position: Array, key: Array
    ) -> tuple[GanState, dict[str, Array]]:
        config = self.config
        (loss, result), gradients = jax.value_and_grad(self.objectives.generator_loss, has_aux=True)(
            state.generator.params,
            state.generator.statistics,
            {"params": state.critic.params, **state.critic.statistics},
            real=seen[0],
            real_labels=seen[1],
            augment_probability=state.augment[0],
            path_mean=state.path_length,
            position=position,
            key=key,
        )
        rate = learning_rate_at(config, filled(config.generator_lr), position)
        update = guarded_update(
            optimizer_for(config, rate),
            loss=loss,
            gradients=gradients,
            params=state.generator.params,
            optimizer_state=state.generator.optimizer,
            monitor=state.generator.monitor,
            policy=self.policy,
            prefix=GENERATOR,
        )
        statistics = update.choose(result.statistics, state.generator.statistics)
        ema = state.ema
        if ema is not None:
            now = {"params": update.params, **statistics}
            ema = update.choose(update_average(ema, now, average_decay_at(config, position)), ema)
        state = state.replace(  # type: ignore[attr-defined]
            generator=NetworkState(update.params, statistics, update.optimizer_state, update.monitor),
            ema=ema,
            path_length=update.choose(result.path_length, state.path_length),
        )
        return state, {**result.metrics, "train/learning_rate_generator": rate, **update.metrics}

    # --- watching -----------------------------------------------------------------------------------------------------

    def probe(self, state: GanState) -> Metrics:
        """The indicators of `stabletrain.gan.indicators` on fixed samples and latents."""
        return self._indicators(state)

    @functools.cached_property
    def _indicators(self) -> Indicators:
        batch: dict[str, Any] = {**self.domain.batch(0, PROBE_SAMPLES), **self.resident}
        samples, labels = self.domain.real(batch, random_key(0))
        classes = probed_classes(self.num_classes)
        rng = np.random.Generator(np.random.Philox(20))
        latents = rng.standard_normal((LATENTS_PER_CLASS, self.generator.z_dim), np.float32)
        fixed: dict[str, Any] = {
            "samples": samples,
            "latents": np.tile(latents, (len(classes), 1)),
            "spread": self._real_spread(classes),
        }
        if self.num_classes:
            fixed |= {"labels": labels, "classes": np.repeat(classes, LATENTS_PER_CLASS)}
        return Indicators(self.objectives, jax.device_put(fixed, replicated(self.mesh)))

    def _real_spread(self, classes: np.ndarray) -> np.ndarray:
        """[len(classes)]: the spread of real samples within each class, from the first thousands of examples."""
        drawn = self.domain.batch(0, min(self.data_spec.train_count, SPREAD_SAMPLES * len(classes) * 2))
        batch: dict[str, Any] = {**drawn, **self.resident}
        samples, labels = (None if a is None else np.asarray(a) for a in self.domain.real(batch, random_key(0)))
        assert samples is not None
        values = []
        for number in classes:
            chosen = samples if labels is None else samples[labels == number]
            # A class with fewer than two examples among these has no spread of its own: that of all stands for it.
            chosen = chosen if len(chosen) > 1 else samples
            values.append(float(spread(jnp.asarray(chosen[None, :SPREAD_SAMPLES]))[0]))
        return np.asarray(values, np.float32)

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def weights(self, state: GanState) -> dict[str, Any]:
        """The generators that there are to evaluate and sample from: `ema` first where it is kept, then `raw`.

        Each is `{"params": ..., **statistics}`.
        """
        raw = {"params": state.generator.params, **state.generator.statistics}
        return {**({"ema": dict(state.ema)} if state.ema is not None else {}), "raw": raw}

    def model(self, state: GanState, weights: str | None = None, batch_norm: str | None = None) -> GanModel:
        """The trained GAN for sampling; by default with the preferred weights and the run's batch normalisation.

        Raises: `ConfigError` for weights that are not there, or a treatment of batch normalisation where there is none.
        """
        variables = self.weights(state)
        name = weights or next(iter(variables))
        if name not in variables:
            raise ConfigError("this run keeps no moving average (--ema-decay 0): use --weights raw")
        has_norm = "batch_stats" in variables[name]
        if batch_norm and not has_norm:
            raise ConfigError(f"--batch-norm {batch_norm} does nothing: this generator has no batch normalisation")
        return GanModel(
            self._programs,
            variables[name],
            {"params": state.critic.params, **state.critic.statistics},
            weights=name,
            batch_norm=(batch_norm or self.config.batch_norm or "running") if has_norm else None,
            standing_batches=self.config.standing_batches or STANDING_BATCHES,
        )

    @functools.cached_property
    def _programs(self) -> Programs:
        return Programs(self.generator, self.critic, mesh=self.mesh, chunk=self.config.sampling_batch)

    def evaluate(self, state: GanState, step: int, context: EvaluationContext) -> Evaluation:
        """What the domain finds of the preferred weights; of a Wasserstein critic also its loss as a meter."""
        found = self.domain.evaluate(self.model(state), step, context)
        if self.config.adversarial != "wasserstein":
            return found
        critic = {"params": state.critic.params, **state.critic.statistics}
        meter = self._meter.measure(self.model(state, "raw"), critic, context)
        return dataclasses.replace(found, scalars={**found.scalars, **meter})

    @functools.cached_property
    def _meter(self) -> LossMeter:
        return LossMeter(self.config, self.critic, self.domain)


STANDING_BATCHES = 16
"""Batches that standing statistics are of where the run does not say."""


def _joined_rows(rows: list[dict[str, Array]]) -> dict[str, Array]:
    """One step's metrics: the mean of `train/*` over the discriminator's updates, and of the monitor the largest."""
    watched = merge_inner_metrics([{n: v for n, v in row.items() if not n.startswith("train/")} for row in rows])
    means = {name: jnp.mean(jnp.stack([row[name] for row in rows])) for name in rows[0] if name.startswith("train/")}
    return {**means, **watched}
