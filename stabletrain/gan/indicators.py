"""Stability indicators of a GAN on fixed samples and latents: what explodes, what collapses.

- `stability/feature_norm`: mean ||F(x)|| of real samples, the features before the classifier. AC-GAN's grow.
- `stability/class_grad_norm`: norm of the class loss's gradient by the whole discriminator; `stability/
  classifier_grad_norm`: by the classifier's weights (or proxies) alone; `stability/adversarial_grad_norm`: the
  adversarial loss's, which the class loss's drowns when it explodes.
- `stability/classifier_probability`: mean probability of the right class of real samples.
- `stability/score_gap`: mean score of real minus that of fake samples.
- `stability/singular_value/<layer>`: the largest singular value of each of the discriminator's kernels as stored
  (spectral normalisation divides it out in use).
- `stability/intra_class_diversity`: deviation of generated images of one class and latents of all kinds, over that of
  real images of the class, as a mean over classes; `.../min` of the least diverse class. 0 is total collapse.

- `stability/loss_oscillation`: how the discriminator's loss swings, over the monitor's window of accepted updates:
  the deviation around the window's fitted line; `.../relative`: over the size of the window's mean.

Of a Wasserstein critic besides (Gulrajani et al. 2017, Figure 1b):

- `stability/gradient_slope`: change of log10 of the norm of the critic's gradient by a layer's output for one layer
  further back, by least squares over its layers (blocks, where a network has them). Positive explodes on the way to the
  input, negative vanishes; nothing is said where a norm is 0. `stability/layer_gradient/<layer>` are the norms.
- `stability/weights_at_clip`: share of the clipped parameters within 1 % of the limit, with weight clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from stabletrain.gan.adversarial import ADVERSARIAL, crammer_singer
from stabletrain.gan.conditioning import class_probabilities
from stabletrain.gan.objectives import Objectives
from stabletrain.gan.state import HEAD, GanState
from stabletrain.random_keys import random_key
from stabletrain.training.experiment import Metrics

Array = jax.Array
PROBE_SAMPLES = 64
PROBE_CLASSES = 32
LATENTS_PER_CLASS = 8
AT_LIMIT = 0.99
"""A parameter above this share of the limit counts as being at it."""
CLASSIFIER_GROUPS = ("classifier", "proxies", "proxies_embedding")


class Indicators:
    """The probe of one experiment. `fixed`: real `samples` and `labels`, fakes' `latents` and `classes`, `spread`."""

    def __init__(self, objectives: Objectives, fixed: Mapping[str, Any]) -> None:
        self._objectives, self._fixed = objectives, fixed
        self._program = jax.jit(self._of)

    def __call__(self, state: GanState) -> Metrics:
        """The indicators of a state."""
        return self._program(state, self._fixed)

    def _of(self, state: GanState, fixed: Mapping[str, Array]) -> Metrics:
        objectives = self._objectives
        statistics, key = state.critic.statistics, random_key(0)
        labels, classes = fixed.get("labels"), fixed.get("classes")
        generator = {"params": state.generator.params, **state.generator.statistics}
        fakes, _ = objectives.generator(generator, fixed["latents"], classes, key, train=True)

        def judged(params: Any, samples: Array, asked: Array | None) -> Any:
            return objectives.critic({"params": params, **statistics}, samples, asked, train=False)[0]

        of_real, of_fake = (
            judged(state.critic.params, fixed["samples"], labels),
            judged(state.critic.params, fakes, classes),
        )
        metrics: dict[str, Array] = {
            "stability/feature_norm": jnp.mean(jnp.linalg.norm(of_real.features, axis=-1)),
            "stability/score_gap": jnp.mean(of_real.score) - jnp.mean(of_fake.score),
        }
        monitor = state.critic.monitor
        swing, relative = oscillation(monitor.window[0], monitor.clock("accepted"))
        metrics |= {"stability/loss_oscillation": swing, "stability/loss_oscillation/relative": relative}
        metrics |= self._gradients(state, fixed, judged, fakes)
        probabilities = class_probabilities(
            objectives.config.conditioning or "none", of_real.classes, objectives.class_options
        )
        if probabilities is not None:
            targets = objectives.real_targets(labels)
            right = jnp.take_along_axis(probabilities, targets[:, None], axis=-1)
            metrics["stability/classifier_probability"] = jnp.mean(right)
        for name, value in singular_values(state.critic.params).items():
            metrics[f"stability/singular_value/{name}"] = value
        config = objectives.config
        if config.weight_clip:
            metrics["stability/weights_at_clip"] = share_at_limit(
                state.critic.params, config.weight_clip, kernels_only=bool(config.clip_kernels_only)
            )
        if config.adversarial == "wasserstein" and not (config.scan_blocks or config.remat):
            metrics |= self._through_depth(state, fixed["samples"], labels)
        return metrics | self._diversity(fakes, fixed)

    def _gradients(self, state: GanState, fixed: Mapping[str, Array], judged: Any, fakes: Array) -> dict[str, Array]:
        objectives = self._objectives
        labels, classes = fixed.get("labels"), fixed.get("classes")
        metrics: dict[str, Array] = {}
        if objectives.config.conditioning == "multi-hinge":

            def adversarial(params: Any) -> Array:
                everything_fake = jnp.full((len(fakes),), objectives.num_classes)
                return crammer_singer(judged(params, fakes, classes).classes.logits, everything_fake)
        else:

            def adversarial(params: Any) -> Array:
                loss = ADVERSARIAL[objectives.config.adversarial or ""].discriminator
                return loss(judged(params, fixed["samples"], labels).score, judged(params, fakes, classes).score)

        metrics["stability/adversarial_grad_norm"] = optax.tree.norm(jax.grad(adversarial)(state.critic.params))
        if objectives.has_class_loss or objectives.config.conditioning == "multi-hinge":

            def class_loss(params: Any) -> Array:
                return objectives.class_loss(
                    judged(params, fixed["samples"], labels).classes, objectives.real_targets(labels)
                )

            gradient = jax.grad(class_loss)(state.critic.params)
            metrics["stability/class_grad_norm"] = optax.tree.norm(gradient)
            of_classifier = [gradient[HEAD + name] for name in CLASSIFIER_GROUPS if HEAD + name in gradient]
            metrics["stability/classifier_grad_norm"] = optax.tree.norm(of_classifier)
        return metrics

    def _through_depth(self, state: GanState, samples: Array, labels: Array | None) -> dict[str, Array]:
        """Gradients of the mean score of real samples by what each layer of the critic puts out."""
        trunk = {name for name in state.critic.params if not name.startswith(HEAD)}
        variables = {"params": state.critic.params, **state.critic.statistics}

        def mean_score() -> Array:
            return jnp.mean(self._objectives.critic(variables, samples, labels, train=False)[0].score)

        norms = layer_gradients(mean_score, trunk)
        metrics = {f"stability/layer_gradient/{name}": norm for name, norm in norms.items()}
        if len(norms) > 1:
            metrics["stability/gradient_slope"] = slope_backwards(jnp.stack(list(norms.values())))
        return metrics

    def _diversity(self, fakes: Array, fixed: Mapping[str, Array]) -> dict[str, Array]:
        deviation = spread(fakes.reshape(-1, LATENTS_PER_CLASS, *fakes.shape[1:]))
        ratio = deviation / jnp.maximum(fixed["spread"], 1e-6)
        name = "stability/intra_class_diversity"
        return {name: jnp.mean(ratio), f"{name}/min": jnp.min(ratio)}


def layer_gradients(value: Callable[[], Array], layers: Collection[str]) -> dict[str, Array]:
    """Norms of the gradient of a scalar by the outputs of Flax modules that its evaluation calls, in calling order.

    `layers`: names of modules directly below the one that is applied; of one that is called more than once, the first
    call counts.
    """
    shapes: dict[str, Any] = {}

    def evaluated(shifts: dict[str, Array] | None) -> Array:
        met: set[str] = set()

        def shifted(call: Any, arguments: Any, options: Any, context: Any) -> Any:
            out, path = call(*arguments, **options), context.module.path
            name = path[0] if path else ""
            if len(path) != 1 or context.method_name != "__call__" or name not in layers or name in met:
                return out
            met.add(name)
            if shifts is None:
                shapes[name] = jax.ShapeDtypeStruct(out.shape, out.dtype)
                return out
            return out + shifts[name]

        with nn.intercept_methods(shifted):
            return value()

    jax.eval_shape(lambda: evaluated(None))
    gradients = jax.grad(evaluated)({name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()})
    return {name: jnp.linalg.norm(gradients[name].astype(jnp.float32)) for name in shapes}


def slope_backwards(norms: Array) -> Array:
    """Least-squares slope of log10(norms) [L] for one place further back; NaN where a norm is 0."""
    logs = jnp.where(norms > 0, jnp.log10(jnp.where(norms > 0, norms, 1.0)), jnp.nan)
    places = jnp.arange(len(norms)) - (len(norms) - 1) / 2
    return -jnp.sum(places * logs) / jnp.sum(places**2)


def oscillation(window: Array, count: Array) -> tuple[Array, Array]:
    """Deviation of the last `count` values of a window [W] around their least-squares line, alone and over |mean|.

    A trend is no oscillation. Of up to two values it is 0, as a line goes through them.
    """
    size = len(window)
    weight = (jnp.arange(size) >= size - count).astype(window.dtype)  # the newest value comes last
    number = jnp.maximum(jnp.sum(weight), 1.0)
    values = jnp.where(weight > 0, window, 0.0)
    places = weight * (jnp.arange(size) - jnp.sum(weight * jnp.arange(size)) / number)
    mean = jnp.sum(values) / number
    slope = jnp.sum(places * values) / jnp.maximum(jnp.sum(places**2), 1.0)
    residuals = weight * (values - mean) - slope * places
    swing = jnp.where(number > 2, jnp.sqrt(jnp.sum(residuals**2) / number), 0.0)
    return swing, swing / jnp.maximum(jnp.abs(mean), 1e-12)


def share_at_limit(params: Any, limit: float, *, kernels_only: bool) -> Array:
    """Share of the parameters that clipping to `limit` touches whose size is within 1 % of it."""
    chosen = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not kernels_only or path[-1].key == "kernel"
    ]
    at_limit = sum(jnp.sum(jnp.abs(leaf) >= AT_LIMIT * limit) for leaf in chosen)
    return at_limit / sum(leaf.size for leaf in chosen)


def spread(groups: Array) -> Array:
    """Root mean variance of samples [G, N, ...] within each group: [G]. The same of any N in expectation of squares."""
    variance = jnp.var(groups, axis=1, ddof=1)
    return jnp.sqrt(jnp.mean(variance.reshape(len(groups), -1), axis=1))


def probed_classes(num_classes: int) -> np.ndarray:
    """The classes whose diversity is watched: all, or 32 spread evenly; one group without labels."""
    if not num_classes:
        return np.zeros(1, np.int32)
    return np.unique(np.linspace(0, num_classes - 1, min(num_classes, PROBE_CLASSES)).astype(np.int32))


def singular_values(params: Any) -> dict[str, Array]:
    """The largest singular value of every kernel, as the matrix [all inputs, outputs], by the name of its layer.

    From the eigenvalues of the smaller Gram matrix: relative error about 1e-6 in float32.
    """
    found = {}
    for path, kernel in jax.tree_util.tree_leaves_with_path(params):
        names = [entry.key for entry in path]
        if names[-1] not in ("kernel", "embedding") and names[-1] != f"{HEAD}classifier":
            continue
        matrix = kernel.reshape(-1, kernel.shape[-1]).astype(jnp.float32)
        if matrix.shape[0] < matrix.shape[1]:
            matrix = matrix.T
        gram = jnp.matmul(matrix.T, matrix, precision=jax.lax.Precision.HIGHEST)
        largest = jnp.linalg.eigvalsh(gram)[-1]
        layer = names[:-1] if names[-1] != f"{HEAD}classifier" else names
        found["/".join(layer)] = jnp.sqrt(jnp.maximum(largest, 0.0))
    return found
