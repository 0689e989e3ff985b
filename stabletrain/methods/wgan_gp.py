"""WGAN-GP: a Wasserstein critic with a gradient penalty (Gulrajani et al., NeurIPS 2017, arXiv 1704.00028).

The critic D and the generator G play, with x real, x~ = G(z) generated and x^ drawn on the lines between them,

    L_D = E[D(x~)] - E[D(x)] + lambda * E[(||grad_x^ D(x^)||_2 - 1)^2],    L_G = -E[D(G(z))].        (Eq. 3)

A critic here is a function of a batch, `critic(x[B, ...]) -> [B] or [B, 1]`, usually a closure over its parameters:
`lambda x: network.apply(params, x)`. Everything is a pure function and works under jit, grad and vmap, in float32 and
float64; the penalty of a critic in a narrower type is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.typing import ArrayLike

Critic = Callable[[jax.Array], jax.Array]

# --- losses -----------------------------------------------------------------------------------------------------------


def critic_loss(real_scores: jax.Array, fake_scores: jax.Array) -> jax.Array:
    """E[D(x~)] - E[D(x)], without the penalty: minus the critic's estimate of the Wasserstein distance.

    Shapes: scores of any shape, of equal weight. Source: Gulrajani et al. 2017, Eq. 2 (with its sign turned), Eq. 3.
    """
    return jnp.mean(fake_scores) - jnp.mean(real_scores)


def generator_loss(fake_scores: jax.Array) -> jax.Array:
    """-E[D(G(z))]. Source: Gulrajani et al. 2017, Algorithm 1, line 12."""
    return -jnp.mean(fake_scores)


def auxiliary_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy of the auxiliary classifier: logits [B, K], labels int [B] in 0 .. K-1.

    Source: Odena et al. 2017 (AC-GAN), in Gulrajani et al. 2017, Appendix F.
    """
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def conditional_critic_loss(
    real_scores: jax.Array, fake_scores: jax.Array, real_logits: jax.Array, labels: jax.Array, *, weight: float = 1.0
) -> jax.Array:
    """L_D with an auxiliary classifier as a second head of the critic: its loss on the real images alone.

    Shapes: scores [B], logits [B, K], labels [B] of the real images (the fakes of a critic step are drawn with the
    same). The penalty is of the score's head only: give `gradient_penalty` a critic that returns nothing else.
    Source: Gulrajani et al. 2017, Appendix F, and its released code, which has the weight 1.
    Differs: Odena et al. train the classifier on the fakes too.
    """
    return critic_loss(real_scores, fake_scores) + weight * auxiliary_loss(real_logits, labels)


def conditional_generator_loss(
    fake_scores: jax.Array, fake_logits: jax.Array, labels: jax.Array, *, weight: float = 0.1
) -> jax.Array:
    """L_G with an auxiliary classifier: the fakes shall be told for the labels that they were drawn with.

    Shapes: scores [B], logits [B, K], labels [B]. Source: Gulrajani et al. 2017, Appendix F, and its released code.
    """
    return generator_loss(fake_scores) + weight * auxiliary_loss(fake_logits, labels)


# --- the penalty ------------------------------------------------------------------------------------------------------


def gradient_penalty(
    critic: Critic,
    real: jax.Array,
    fake: jax.Array,
    epsilon: jax.Array,
    *,
    target: ArrayLike = 1.0,
    one_sided: bool = False,
) -> jax.Array:
    """E[(||grad_x^ D(x^)||_2 - target)^2] -> scalar, without lambda (the paper's is 10).

    Shapes: real and fake [B, ...], epsilon [B], uniform in [0, 1): one number a sample. The norm is over all axes but
    the first. `one_sided` penalises only norms above the target: E[max(0, norm - target)^2].

    Differentiating it takes no second backward pass: see `gradient_norms`. The value is that of
    `gradient_penalty_plain`, and so are the derivatives in reverse mode, of any order, by all that the critic closes
    over, by `real` and by `fake`; `jax.jvp` and `jax.jacfwd` take the plain form. Where a gradient is zero the penalty
    is target^2 and its derivative is taken as zero. It cannot see whether the critic's samples are independent;
    `check_per_sample` can.

    Raises: `ValueError` for shapes or types that do not fit. `TypeError` (from JAX) in forward mode, and when it is
    differentiated and the critic holds a `jax.custom_vjp`; `gradient_penalty_plain` does without forward mode.
    Source: Gulrajani et al. 2017, Eq. 3; one-sided: Appendix C. Differs: nothing is added under the square root.
    """
    norms = gradient_norms(critic, interpolate(real, fake, epsilon))
    return _penalty_of_norms(norms, target, one_sided)


def gradient_penalty_plain(
    critic: Critic,
    real: jax.Array,
    fake: jax.Array,
    epsilon: jax.Array,
    *,
    target: ArrayLike = 1.0,
    one_sided: bool = False,
) -> jax.Array:
    """The same number as `gradient_penalty`, differentiated by differentiating the backward pass; slower to train."""
    norms = gradient_norms_plain(critic, interpolate(real, fake, epsilon))
    return _penalty_of_norms(norms, target, one_sided)


def interpolate(real: jax.Array, fake: jax.Array, epsilon: jax.Array) -> jax.Array:
    """x^ = epsilon x + (1 - epsilon) x~, with one epsilon [B] a sample. Source: Algorithm 1, line 6.

    Raises: `ValueError` for an epsilon a pixel, and for arrays that do not fit or are not of a floating type.
    """
    real, fake, epsilon = jnp.asarray(real), jnp.asarray(fake), jnp.asarray(epsilon)
    if real.ndim == 0 or real.shape != fake.shape:
        raise ValueError(f"real and fake must be batches of one shape, not {real.shape} and {fake.shape}")
    if epsilon.shape != real.shape[:1]:
        raise ValueError(f"epsilon must have one number a sample, shape {real.shape[:1]}, not {epsilon.shape}")
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (real, fake)):
        raise ValueError(f"real and fake must be of a floating type to interpolate, not {real.dtype} and {fake.dtype}")
    epsilon = epsilon.astype(real.dtype).reshape(-1, *(1,) * (real.ndim - 1))  # [B, 1, ..., 1]
    return epsilon * real + (1 - epsilon) * fake


def gradient_norms(critic: Critic, inputs: jax.Array) -> jax.Array:
    """||grad_x D(x)||_2 of every sample, [B], with a cheap derivative.

    With g_i = grad_x D(x_i) and u_i = g_i / ||g_i||, a change of the parameters (or of x) changes the norm by
    d||g_i|| = u_i . dg_i = d( JVP of D at x_i along the fixed u_i ). So training on the norms differentiates a
    forward-mode derivative instead of a backward pass. Reverse mode only.

    Raises: `ValueError` when the critic does not return one number a sample.
    """
    # Everything traced that the critic closes over becomes an argument, as a rule of differentiation needs it.
    closed = jax.make_jaxpr(critic)(inputs)

    def hoisted(x: jax.Array, captured: tuple[Any, ...]) -> jax.Array:
        (out,) = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, captured))(x)
        return out

    if len(closed.out_avals) != 1:
        raise ValueError(f"the critic must return one array, a score a sample, not {len(closed.out_avals)} arrays")
    return _norms(hoisted, inputs, tuple(closed.consts))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norms(critic: Callable[..., jax.Array], inputs: jax.Array, captured: tuple[Any, ...]) -> jax.Array:
    return _direction_and_norm(_input_gradients(lambda x: critic(x, captured), inputs))[1]


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Moving:
    """Which of the inputs and the captured values are differentiated, by number."""

    numbers: tuple[int, ...]


def _norms_forward(
    critic: Callable[..., jax.Array], inputs: CustomVJPPrimal, captured: tuple[CustomVJPPrimal, ...]
) -> tuple[jax.Array, tuple[Any, ...]]:
    leaves = [leaf.value for leaf in (inputs, *captured)]
    # what is not differentiated (the inputs, in training) stays out of the derivative, which it would make dearer
    moving = tuple(
        number
        for number, leaf in enumerate((inputs, *captured))
        if leaf.perturbed and jnp.issubdtype(leaf.value.dtype, jnp.inexact)
    )
    direction, norms = _direction_and_norm(_input_gradients(lambda x: critic(x, tuple(leaves[1:])), leaves[0]))
    return norms, (leaves, direction, _Moving(moving))


def _norms_backward(
    critic: Callable[..., jax.Array], residuals: tuple[Any, ...], cotangent: Any
) -> tuple[Any, tuple[Any, ...]]:
    leaves, direction, moving = residuals
    if isinstance(cotangent, SymbolicZero):
        return None, (None,) * (len(leaves) - 1)
    # The weight of each sample goes into its direction and not onto its slope: the pass back from the slopes is then
    # the very pass that made the input gradients, and compilers do it once.
    weights = cotangent.reshape(-1, *(1,) * (direction.ndim - 1))
    along = (weights * direction).astype(leaves[0].dtype)

    def slope(*moved: Any) -> jax.Array:  # sum_i along_i . grad_x D(x_i)
        x, *rest = (moved[moving.numbers.index(i)] if i in moving.numbers else leaf for i, leaf in enumerate(leaves))
        return jnp.sum(jax.jvp(lambda x: _scores(critic(x, tuple(rest)), len(x)), (x,), (along,))[1])

    chosen = [leaves[number] for number in moving.numbers]
    slopes = jax.grad(slope, argnums=tuple(range(len(chosen))))(*chosen) if chosen else ()
    found = dict(zip(moving.numbers, slopes, strict=True))
    return found.get(0), tuple(found.get(number) for number in range(1, len(leaves)))


_norms.defvjp(_norms_forward, _norms_backward, symbolic_zeros=True)


def gradient_norms_plain(critic: Critic, inputs: jax.Array) -> jax.Array:
    """||grad_x D(x)||_2 of every sample, [B], differentiated as it stands."""
    return _direction_and_norm(_input_gradients(critic, inputs))[1]


def _input_gradients(critic: Critic, inputs: jax.Array) -> jax.Array:
    """grad_x D(x_i), [B, ...]: the gradient of the sum, since no sample enters another's score."""
    return jax.grad(lambda x: jnp.sum(_scores(critic(x), len(x))))(inputs)


def _scores(scores: jax.Array, batch: int) -> jax.Array:
    if scores.shape not in ((batch,), (batch, 1)):
        raise ValueError(f"the critic must return one score a sample, [{batch}] or [{batch}, 1], not {scores.shape}")
    return scores.reshape(batch)


def _direction_and_norm(gradients: jax.Array) -> tuple[jax.Array, jax.Array]:
    """g / ||g|| [B, ...] and ||g|| [B], the direction of a zero vector being zero, with derivatives free of NaN.

    The largest entry is divided out first, so that squares neither vanish nor overflow: the input gradients of a
    clipped critic of many layers leave the range of squares in float32.
    """
    wide = gradients.astype(jnp.promote_types(gradients.dtype, jnp.float32))
    flat = wide.reshape(len(wide), -1)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(flat), axis=1, keepdims=True, initial=0.0))  # [B, 1]
    zero = largest == 0
    scale = jnp.where(zero, 1.0, largest)
    scaled = jnp.where(zero, 1.0, flat) / scale  # of a zero vector, something whose root has a derivative
    length = jnp.sqrt(jnp.sum(scaled**2, axis=1, keepdims=True))
    direction = jnp.where(zero, 0.0, scaled / length)
    norms = jnp.where(zero, 0.0, length * scale)
    return direction.reshape(wide.shape), norms[:, 0]


def _penalty_of_norms(norms: jax.Array, target: ArrayLike, one_sided: bool) -> jax.Array:
    excess = norms - target
    return jnp.mean((jnp.maximum(excess, 0.0) if one_sided else excess) ** 2)


# --- what makes the penalty meaningless -------------------------------------------------------------------------------


def check_per_sample(critic: Critic, batch: ArrayLike) -> None:
    """Refuses a critic whose score of a sample depends on the other samples, as with batch normalisation.

    Call it once, outside of jit, with the critic as it will be trained and a batch [B, ...] of any values, B >= 2.
    For every bit of the sample's index, the samples with that bit set (then those without) are replaced, once by NaN,
    which no arithmetic forgets, and once by other numbers; the scores of the rest must stay. Every pair of samples
    differs in some bit, so that statistics over any group are found, at 4 ceil(log2 B) calls of the compiled critic.

    Raises: `ValueError` with the reason. Source: Gulrajani et al. 2017, Section 4 ("No critic batch normalization").
    """
    inputs = np.asarray(batch)
    size = len(inputs)
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise ValueError(f"check_per_sample needs a batch of a floating type, not {inputs.dtype}")
    if size < 2:
        raise ValueError("check_per_sample needs a batch of at least two samples to see one act on another")
    compiled = jax.jit(lambda x: _scores(critic(x), len(x)))
    with jax.debug_nans(False):  # the NaN below are meant
        expected = np.asarray(compiled(inputs), np.float64)
        if not np.all(np.isfinite(expected)):
            raise ValueError("the critic's scores of this batch are not all finite, so their independence is unknown")
        # rounding: the same sample at the same place of a batch of the same shape, perhaps on a GPU
        allowed = 1e-5 * max(1e-30, np.abs(expected).max())
        for bit in range(math.ceil(math.log2(size))):
            for value in (0, 1):
                replaced = (np.arange(size) >> bit) & 1 == value
                for other in (np.full_like(inputs, np.nan), 1 - 2 * inputs[::-1]):
                    mixed = np.where(replaced.reshape(-1, *(1,) * (inputs.ndim - 1)), other, inputs)
                    found = np.asarray(compiled(mixed.astype(inputs.dtype)), np.float64)
                    change = np.abs(found - expected)[~replaced]
                    if not np.all(change <= allowed):  # NaN is a change
                        raise ValueError(
                            "the critic's score of a sample depends on the other samples of the batch, as batch "
                            "normalisation or minibatch statistics make it. The penalty asks for the gradient of each "
                            "score by its own input, which such a critic does not have. Use layer normalisation "
                            "(flax.linen.GroupNorm(num_groups=1)) or none in the critic"
                        )


# --- weight clipping, which the penalty replaces ----------------------------------------------------------------------


def clip_weights(params: Any, limit: float | jax.Array = 0.01, *, kernels_only: bool = False) -> Any:
    """Every parameter clipped to [-limit, limit], as after each step of the critic of a WGAN without penalty.

    All variables are clipped, biases and the scales of normalisation too, as in the released code; `kernels_only`
    clips those that are named `kernel`, as Flax names the weights of dense and convolutional layers.

    Raises: `ValueError` when only kernels are asked for and none is named so.
    Source: Arjovsky et al. 2017, Algorithm 1; Gulrajani et al. 2017, Section 2.3.
    """
    if not kernels_only:
        return jax.tree.map(lambda leaf: jnp.clip(leaf, -limit, limit), params)
    if not any(_is_kernel(path) for path, _ in jax.tree.leaves_with_path(params)):
        raise ValueError("no parameter is named `kernel`: clip all of them, or name the weights as Flax does")
    return jax.tree.map_with_path(
        lambda path, leaf: jnp.clip(leaf, -limit, limit) if _is_kernel(path) else leaf, params
    )


def _is_kernel(path: Any) -> bool:
    return bool(path) and jax.tree_util.keystr(path[-1:], simple=True) == "kernel"


# --- the optimizers as TensorFlow 1 has them --------------------------------------------------------------------------


def tf1_rmsprop(
    learning_rate: optax.ScalarOrSchedule = 5e-5, *, decay: float = 0.9, epsilon: float = 1e-10
) -> optax.GradientTransformation:
    """RMSProp whose mean of squares starts at one: the first steps are small, not the largest.

        s <- decay s + (1 - decay) g^2,  s_0 = 1;    w <- w - learning_rate g / sqrt(s + epsilon)

    Source: tf.train.RMSPropOptimizer of TensorFlow 1. The default rate is the WGAN's with clipping.
    Differs: optax.rmsprop starts s at zero and has epsilon 1e-8.
    """
    return optax.rmsprop(learning_rate, decay=decay, eps=epsilon, initial_scale=1.0, eps_in_sqrt=True)


def tf1_adam(
    learning_rate: optax.ScalarOrSchedule = 1e-4, *, beta1: float = 0.0, beta2: float = 0.9, epsilon: float = 1e-8
) -> optax.GradientTransformation:
    """Adam with its epsilon beside the root of the second moment as it is, before the correction for its start.

        w <- w - learning_rate sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + epsilon)

    Source: tf.train.AdamOptimizer of TensorFlow 1; the defaults are those of Gulrajani et al. 2017, Algorithm 1.
    Differs: optax.adam adds epsilon after the correction; the two part only where gradients are near epsilon.
    """

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.zeros_like, params))

    def update(
        gradients: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g**2, state.nu, gradients)
        correction = jnp.sqrt(1 - jnp.power(beta2, count)) / (1 - jnp.power(beta1, count))
        steps = jax.tree.map(lambda m, v: correction.astype(m.dtype) * m / (jnp.sqrt(v) + epsilon), mu, nu)
        return steps, optax.ScaleByAdamState(count, mu, nu)

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate))
