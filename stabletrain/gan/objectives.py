"""What discriminator and generator minimise: the parts that the configuration names, put together.

L_D = adversarial + lambda (class loss of real samples [+ of fakes] [+ twin loss of fakes]) + penalties,
L_G = adversarial + lambda_G (class loss of fakes [- twin loss of fakes]) + its regularisers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from stabletrain.gan.adversarial import ADVERSARIAL, crammer_singer
from stabletrain.gan.augmentation import ada, diffaugment, flip_and_shift
from stabletrain.gan.conditioning import CLASS_LOSSES, ClassOptions, ClassOutput, HeadOutput
from stabletrain.gan.config import GanConfig, filled
from stabletrain.gan.regularizers import dragan, lecam, mean_square, orthogonality, path_length, r1
from stabletrain.gan.state import Critic, Generator
from stabletrain.methods.wgan_gp import gradient_penalty
from stabletrain.random_keys import key_from_data

Array = jax.Array
Variables = Mapping[str, Any]
MULTI_HINGE_GENERATOR = 0.05  # weight of the generator's class loss beside feature matching (Kavalerov et al. 2021)


@struct.dataclass
class CriticBatch:
    """What one update of the discriminator is computed from; nothing of it is differentiated."""

    real: Array
    real_labels: Array | None
    fake: Array
    fake_labels: Array | None
    near_fake: Array | None
    """Samples of slightly moved latents, for latent consistency."""


@struct.dataclass
class CriticResult:
    """What an evaluation of the discriminator's loss leaves besides the loss."""

    statistics: dict[str, Any]
    metrics: dict[str, Array]
    signs: Array
    """[B]: signs of the scores of real samples."""
    lecam: Array


@struct.dataclass
class GeneratorResult:
    """What an evaluation of the generator's loss leaves besides the loss."""

    statistics: dict[str, Any]
    metrics: dict[str, Array]
    path_length: Array


class Objectives:
    """The two losses of a resolved configuration."""

    def __init__(
        self,
        config: GanConfig,
        generator: Generator,
        critic: Critic,
        *,
        num_classes: int,
        mixes_samples: bool,
        draw: Callable[[Array, int], tuple[Array, Array | None]],
    ) -> None:
        """`draw(key, count)` gives latents and labels of fakes; `mixes_samples`: see `regularizers.r1`."""
        self.config, self.generator, self.critic, self.num_classes = config, generator, critic, num_classes
        self.mixes_samples, self.draw = mixes_samples, draw
        self.class_options = ClassOptions(
            temperature=config.temperature or 1.0,
            positive_margin=1.0 if config.positive_margin is None else config.positive_margin,
            variant=config.d2dce_variant or "released",
        )

    # --- the discriminator --------------------------------------------------------------------------------------------

    def critic_loss(
        self,
        params: Any,
        statistics: Variables,
        batch: CriticBatch,
        *,
        lecam_means: Array,
        augment_probability: Array,
        update: Array,
        position: Array,
        key: Array,
    ) -> tuple[Array, CriticResult]:
        """The discriminator's loss. `update`: number of its update; `position`: number of the step."""
        config = self.config
        keys = jax.random.split(key, 8)
        augment = self.augmented(augment_probability)
        real, fake = augment(batch.real, keys[0]), augment(batch.fake, keys[1])
        of_real, statistics = self._judge(params, statistics, real, batch.real_labels)
        of_fake, statistics = self._judge(params, statistics, fake, batch.fake_labels)
        metrics = {"train/score_real": jnp.mean(of_real.score), "train/score_fake": jnp.mean(of_fake.score)}

        if config.conditioning == "multi-hinge":
            everything_fake = jnp.full((len(fake),), self.num_classes)
            loss = crammer_singer(_logits(of_real), _labels(batch.real_labels))
            loss = loss + crammer_singer(_logits(of_fake), everything_fake)
        else:
            loss = ADVERSARIAL[filled(config.adversarial)].discriminator(of_real.score, of_fake.score)
        metrics["train/adversarial_loss_discriminator"] = loss
        class_term, class_metrics = self._critic_class_loss(of_real, of_fake, batch)
        loss, metrics = loss + class_term, metrics | class_metrics

        def scores(samples: Array) -> Array:
            return self._judge(params, statistics, samples, batch.real_labels)[0].score

        penalty, penalty_metrics = self._penalties(scores, batch, real, fake, update, augment, keys[2:6])
        loss, metrics = loss + penalty, metrics | penalty_metrics
        if config.lecam:
            decay = jnp.where(position < filled(config.lecam_start), 0.0, filled(config.lecam_decay))
            now = lax.stop_gradient(jnp.stack([jnp.mean(of_real.score), jnp.mean(of_fake.score)]))
            lecam_means = decay * lecam_means + (1.0 - decay) * now
            term = lecam(of_real.score, of_fake.score, lecam_means[0], lecam_means[1])
            term = jnp.where(position < filled(config.lecam_start), 0.0, config.lecam * term)
            loss, metrics["train/lecam_term"] = loss + term, term
        consistency = self._critic_consistency(params, statistics, batch, of_real, of_fake, augment, keys[1], keys[6:])
        if consistency is not None:
            loss, metrics["train/consistency_term_discriminator"] = loss + consistency, consistency
        metrics = {"train/loss_discriminator": loss, **metrics}
        return loss, CriticResult(statistics, metrics, jnp.sign(of_real.score), lecam_means)

    def _judge(
        self, params: Any, statistics: Variables, samples: Array, labels: Array | None
    ) -> tuple[HeadOutput, dict[str, Any]]:
        return self.critic({"params": params, **statistics}, samples, labels, train=True)

    def augmented(self, probability: Array) -> Callable[[Array, Array], Array]:
        """(images, key) -> what the discriminator sees of them."""
        if self.config.augmentation == "diffaug":
            return lambda images, key: diffaugment(images, key, self.config.diffaug_policy)
        if self.config.augmentation == "ada":
            return lambda images, key: ada(images, key, probability)
        return lambda images, key: images

    def class_loss(self, output: ClassOutput, labels: Array | None) -> Array:
        """The conditioning's class loss: a scalar."""
        return CLASS_LOSSES[filled(self.config.conditioning)](output, _labels(labels), self.class_options)

    def real_targets(self, labels: Array | None) -> Array:
        """The classes that real samples are to be told for: 2 y with ADC."""
        return _labels(labels) * 2 if self.config.auxiliary == "adc" else _labels(labels)

    def _critic_class_loss(
        self, of_real: HeadOutput, of_fake: HeadOutput, batch: CriticBatch
    ) -> tuple[Array, dict[str, Array]]:
        config = self.config
        if not self.has_class_loss:
            return jnp.zeros(()), {}
        loss = self.class_loss(of_real.classes, self.real_targets(batch.real_labels))
        metrics = {"train/class_loss_real": loss}
        if config.auxiliary == "adc":
            loss = loss + self.class_loss(of_fake.classes, 2 * _labels(batch.fake_labels) + 1)
        elif config.class_loss_on == "real-and-fake":
            loss = loss + self.class_loss(of_fake.classes, batch.fake_labels)
        if config.auxiliary == "tac":
            twin = self.class_loss(of_fake.twin, batch.fake_labels)
            loss, metrics["train/twin_loss"] = loss + twin, twin
        return filled(config.class_weight) * loss, metrics

    @property
    def has_class_loss(self) -> bool:
        """Whether the conditioning adds a class loss to the adversarial one."""
        return self.config.conditioning in CLASS_LOSSES and self.config.conditioning != "multi-hinge"

    def _penalties(
        self,
        scores: Callable[[Array], Array],
        batch: CriticBatch,
        real: Array,
        fake: Array,
        update: Array,
        augment: Callable[[Array, Array], Array],
        keys: Array,
    ) -> tuple[Array, dict[str, Array]]:
        """Penalties on the gradient by the samples; `real` and `fake` as the discriminator saw them."""
        config = self.config
        total, metrics = jnp.zeros(()), {}
        if config.gradient_penalty:
            epsilon = jax.random.uniform(keys[0], (len(real),))
            penalty = gradient_penalty(scores, real, fake, epsilon, one_sided=bool(config.one_sided))
            total, metrics["train/gradient_penalty"] = total + config.gradient_penalty * penalty, penalty
        if config.dragan:
            penalty = dragan(scores, real, keys[1])
            total, metrics["train/dragan_penalty"] = total + config.dragan * penalty, penalty
        if config.r1_weight:
            every, weight = filled(config.r1_every), config.r1_weight
            # As plain numbers: inside of `cond`, JAX cannot differentiate around a typed key that a critic closes over.
            numbers = jax.random.key_data(keys[2])

            def seen(samples: Array) -> Array:
                return scores(augment(samples, key_from_data(numbers)))

            def term() -> Array:
                return every * weight * r1(seen, batch.real, mixes_samples=self.mixes_samples)

            penalty = term() if every == 1 else lax.cond(update % every == 0, term, lambda: jnp.zeros(()))
            total, metrics["train/r1_term"] = total + penalty, penalty
        return total, metrics

    def _critic_consistency(
        self,
        params: Any,
        statistics: Variables,
        batch: CriticBatch,
        of_real: HeadOutput,
        of_fake: HeadOutput,
        augment: Callable[[Array, Array], Array],
        fake_key: Array,
        keys: Array,
    ) -> Array | None:
        config = self.config
        terms = []
        real_weight = filled(config.cr_weight) or filled(config.bcr_real)
        if real_weight:
            moved = flip_and_shift(batch.real, keys[0])
            other, _ = self._judge(params, statistics, moved, batch.real_labels)
            terms.append(real_weight * output_distance(of_real, other))
        if config.bcr_fake:
            moved = flip_and_shift(batch.fake, keys[1])
            other, _ = self._judge(params, statistics, moved, batch.fake_labels)
            terms.append(config.bcr_fake * output_distance(of_fake, other))
        if config.zcr_discriminator:
            near = augment(filled(batch.near_fake), fake_key)
            other, _ = self._judge(params, statistics, near, batch.fake_labels)
            terms.append(config.zcr_discriminator * output_distance(of_fake, other))
        return sum(terms, jnp.zeros(())) if terms else None

    # --- the generator ------------------------------------------------------------------------------------------------

    def generator_loss(
        self,
        params: Any,
        statistics: Variables,
        critic_variables: Variables,
        *,
        real: Array,
        real_labels: Array | None,
        augment_probability: Array,
        path_mean: Array,
        position: Array,
        key: Array,
    ) -> tuple[Array, GeneratorResult]:
        """The generator's loss with fresh fakes; `real` is the last batch that the discriminator saw."""
        config = self.config
        keys = jax.random.split(key, 6)
        z, labels = self.draw(keys[0], config.generator_batch or len(real))
        variables = {"params": params, **statistics}
        fake, changed = self.generator(variables, z, labels, keys[1], train=True)
        augment = self.augmented(augment_probability)
        output, _ = self.critic(critic_variables, augment(fake, keys[2]), labels, train=True)

        metrics: dict[str, Array] = {}
        if config.conditioning == "multi-hinge":
            of_real, _ = self.critic(critic_variables, augment(real, keys[3]), real_labels, train=True)
            matching = jnp.mean(jnp.abs(jnp.mean(of_real.features, axis=0) - jnp.mean(output.features, axis=0)))
            loss = MULTI_HINGE_GENERATOR * crammer_singer(_logits(output), _labels(labels)) + matching
            metrics["train/feature_matching"] = matching
        else:
            loss = ADVERSARIAL[filled(config.adversarial)].generator(output.score)
        metrics["train/adversarial_loss_generator"] = loss
        if self.has_class_loss:
            term = self._generator_class_loss(output, labels)
            metrics["train/class_loss_fake"] = term
            loss = loss + filled(config.generator_class_weight) * term
        if config.zcr_generator:
            near, _ = self.generator(variables, self.moved_latents(z, keys[4]), labels, keys[1], train=True)
            term = -config.zcr_generator * mean_square(fake, near)
            loss, metrics["train/latent_term_generator"] = loss + term, term
        if config.orthogonality:
            term = config.orthogonality * orthogonality(params)
            loss, metrics["train/orthogonality_term"] = loss + term, term
        if config.path_length:
            term, path_mean = self._path_term(params, statistics, path_mean, position, keys[5])
            loss = loss + term
            metrics |= {"train/path_length_term": term, "train/path_length": path_mean}
        return loss, GeneratorResult(changed, {"train/loss_generator": loss, **metrics}, path_mean)

    def _generator_class_loss(self, output: HeadOutput, labels: Array | None) -> Array:
        if self.config.auxiliary == "adc":
            real, fake = 2 * _labels(labels), 2 * _labels(labels) + 1
            return self.class_loss(output.classes, real) - self.class_loss(output.classes, fake)
        loss = self.class_loss(output.classes, labels)
        if self.config.auxiliary == "tac":
            loss = loss - self.class_loss(output.twin, labels)
        return loss

    def moved_latents(self, z: Array, key: Array) -> Array:
        """Latents with normal noise of the latent consistency's radius."""
        return z + filled(self.config.zcr_radius) * jax.random.normal(key, z.shape)

    def _path_term(
        self, params: Any, statistics: Variables, mean: Array, position: Array, key: Array
    ) -> tuple[Array, Array]:
        every, weight = filled(self.config.path_length_every), filled(self.config.path_length)
        keys = jax.random.split(key, 4)

        def term() -> tuple[Array, Array]:
            # Half a batch, as its pull-back costs a second pass. Source: Karras et al. 2020b, Appendix B.
            z, labels = self.draw(keys[0], max(self.config.batch_size // 2, 1))
            variables = {"params": params, **statistics}
            styles = self.generator.styles(variables, z, labels, keys[1], train=True)

            def synthesize(moved: Array) -> Array:
                return self.generator.synthesize(variables, moved, keys[2], train=True)

            penalty, after = path_length(synthesize, styles, keys[3], mean)
            return every * weight * penalty, after

        return term() if every == 1 else lax.cond(position % every == 0, term, lambda: (jnp.zeros(()), mean))


def output_distance(first: HeadOutput, second: HeadOutput) -> Array:
    """Mean squared difference of the scores, plus that of logits or of embeddings where there are any."""
    distance = mean_square(first.score, second.score)
    for name in ("logits", "embedding"):
        one, other = getattr(first.classes, name), getattr(second.classes, name)
        if one is not None:
            distance = distance + mean_square(one, other)
    return distance


def _logits(output: HeadOutput) -> Array:
    assert output.classes.logits is not None
    return output.classes.logits


def _labels(labels: Array | None) -> Array:
    assert labels is not None, "this conditioning needs labels"
    return labels
