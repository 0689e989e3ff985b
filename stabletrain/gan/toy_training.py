"""Critics of points in the plane, trained with clipping or the penalty: what the two toy figures of WGAN-GP share.

Small on purpose and apart from the training loop: the figures need critics whose generator never moves, networks in
float64, and no run directory. `stabletrain gan --dataset gaussians8` trains the same toys as runs.
Source: Gulrajani et al. 2017, Section 4, with the released gan_toy.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stabletrain.gan.toys import training_points
from stabletrain.methods.wgan_gp import (
    clip_weights,
    critic_loss,
    generator_loss,
    gradient_penalty,
    tf1_adam,
    tf1_rmsprop,
)
from stabletrain.random_keys import random_key

Layers = list[dict[str, jax.Array]]
"""A ReLU network, layer by layer: `kernel` [in, out] and `bias` [out]."""
Tick = Callable[[int, int], None]
LATENT = 2
STEPS_PER_CALL = 25
METHODS = ("wgan", "wgan-gp")


@dataclass(frozen=True)
class ToySettings:
    """One critic, and its generator where it has one.

    `generator`: "noise" leaves the fakes at real points plus Gaussian noise of unit variance (each fake keeps the
    real point that it came from, so that the penalty's lines are those of the noise, as in the released code);
    "trained" trains a network against the critic. `steps` counts generator steps, or with fixed fakes the rounds of
    `critic_steps` critic steps.
    """

    toy: str
    method: str
    generator: str
    steps: int
    width: int = 512
    hidden: int = 3
    batch_size: int = 256
    critic_steps: int = 5
    clip: float = 0.01
    penalty: float = 10.0
    beta1: float = 0.5
    beta2: float = 0.9
    penalty_rate: float = 1e-4
    clip_rate: float = 5e-5
    dtype: str = "float32"
    seed: int = 0


@dataclass(frozen=True)
class ToyResult:
    """Trained networks, and by round the critic's estimate of the Wasserstein distance and its penalty."""

    settings: ToySettings
    critic: Layers
    generator: Layers | None
    estimates: np.ndarray
    penalties: np.ndarray


def init_mlp(key: jax.Array, sizes: tuple[int, ...], dtype: Any) -> Layers:
    """Weights uniform with variance 2 / fan_in (He et al. 2015), biases zero: the release's `he` start."""
    layers = []
    for key_of, fan_in, fan_out in zip(jax.random.split(key, len(sizes) - 1), sizes, sizes[1:], strict=False):
        limit = np.sqrt(3 * 2 / fan_in)
        kernel = jax.random.uniform(key_of, (fan_in, fan_out), dtype, -limit, limit)
        layers.append({"kernel": kernel, "bias": jnp.zeros(fan_out, dtype)})
    return layers


def apply_mlp(layers: Layers, points: jax.Array) -> jax.Array:
    """[B, in] -> [B, out]; ReLU after every layer but the last."""
    for layer in layers[:-1]:
        points = jax.nn.relu(points @ layer["kernel"] + layer["bias"])
    return points @ layers[-1]["kernel"] + layers[-1]["bias"]


def scores(critic: Layers, points: jax.Array) -> jax.Array:
    """The critic's scores [B] of points [B, 2]."""
    return apply_mlp(critic, points)[:, 0]


def draw_fakes(settings: ToySettings, generator: Layers | None, key: jax.Array, real: jax.Array) -> jax.Array:
    """As many fakes as real points [B, 2]."""
    noise = jax.random.normal(key, (len(real), LATENT), real.dtype)
    return real + noise if generator is None else apply_mlp(generator, noise)


def optimizer_of(settings: ToySettings) -> optax.GradientTransformation:
    """RMSProp at 5e-5 for clipping, Adam at 1e-4 for the penalty, as TensorFlow 1 had them."""
    if settings.method == "wgan":
        return tf1_rmsprop(settings.clip_rate)
    return tf1_adam(settings.penalty_rate, beta1=settings.beta1, beta2=settings.beta2)


def critic_objective(
    settings: ToySettings, critic: Layers, real: jax.Array, fake: jax.Array, epsilon: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """L_D, with the estimate of the distance and the penalty (zero for clipping) beside it."""
    score = partial(scores, critic)
    plain = critic_loss(score(real), score(fake))
    if settings.method == "wgan":
        return plain, (-plain, jnp.zeros_like(plain))
    penalty = gradient_penalty(score, real, fake, epsilon)
    return plain + settings.penalty * penalty, (-plain, penalty)


def train_toy(settings: ToySettings, *, tick: Tick | None = None) -> ToyResult:
    """Trains by the settings; `tick(done, steps)` is called between compiled parts.

    With the dtype float64 it must be called within `jax.enable_x64(True)`.
    Raises: `ValueError` for an unknown method, generator or toy.
    """
    if settings.method not in METHODS:
        raise ValueError(f"unknown method {settings.method!r}; valid: {', '.join(METHODS)}")
    if settings.generator not in ("noise", "trained"):
        raise ValueError(f"unknown generator {settings.generator!r}; valid: noise, trained")
    dtype = jnp.dtype(settings.dtype)
    points = jnp.asarray(training_points(settings.toy), dtype)
    critic_key, generator_key, key = jax.random.split(random_key(settings.seed), 3)
    hidden = (settings.width,) * settings.hidden
    optimizer = optimizer_of(settings)
    critic = init_mlp(critic_key, (2, *hidden, 1), dtype)
    generator = init_mlp(generator_key, (LATENT, *hidden, 2), dtype) if settings.generator == "trained" else None
    carry = (critic, optimizer.init(critic), generator, optimizer.init(generator))

    def critic_step(
        carry: tuple[Layers, Any], key: jax.Array, generator: Layers | None, points: jax.Array
    ) -> tuple[tuple[Layers, Any], tuple[jax.Array, jax.Array]]:
        critic, state = carry
        chosen, noise, mix = jax.random.split(key, 3)
        real = points[jax.random.randint(chosen, (settings.batch_size,), 0, len(points))]
        fake = draw_fakes(settings, generator, noise, real)
        epsilon = jax.random.uniform(mix, (settings.batch_size,), dtype)
        gradients, found = jax.grad(partial(critic_objective, settings), has_aux=True)(critic, real, fake, epsilon)
        updates, state = optimizer.update(gradients, state, critic)
        critic = optax.apply_updates(critic, updates)
        if settings.method == "wgan":
            critic = clip_weights(critic, settings.clip)
        return (critic, state), found

    def round_of(carry: Any, key: jax.Array, points: jax.Array) -> tuple[Any, Any]:
        critic, critic_state, generator, state = carry
        generator_key, *critic_keys = jax.random.split(key, settings.critic_steps + 1)
        if generator is not None:  # the generator moves first, as in Algorithm 1's release

            def loss_of(moved: Layers) -> jax.Array:
                noise = jax.random.normal(generator_key, (settings.batch_size, LATENT), dtype)
                return generator_loss(scores(critic, apply_mlp(moved, noise)))

            updates, state = optimizer.update(jax.grad(loss_of)(generator), state, generator)
            generator = optax.apply_updates(generator, updates)
        step = partial(critic_step, generator=generator, points=points)
        (critic, critic_state), found = jax.lax.scan(step, (critic, critic_state), jnp.stack(critic_keys))
        return (critic, critic_state, generator, state), jax.tree.map(lambda values: values[-1], found)

    run = jax.jit(lambda carry, keys, points: jax.lax.scan(partial(round_of, points=points), carry, keys))
    estimates, penalties = [], []
    keys = jax.random.split(key, settings.steps)
    for start in range(0, settings.steps, STEPS_PER_CALL):
        carry, (estimate, penalty) = run(carry, keys[start : start + STEPS_PER_CALL], points)
        estimates.append(np.asarray(estimate))
        penalties.append(np.asarray(penalty))
        if tick is not None:
            tick(min(start + STEPS_PER_CALL, settings.steps), settings.steps)
    critic, _, generator, _ = carry
    return ToyResult(settings, critic, generator, np.concatenate(estimates), np.concatenate(penalties))
