"""WGAN-GP's functions: closed forms, two forms that agree, an independent double backward, and TF1's optimizers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stabletrain.methods.wgan_gp import (
    auxiliary_loss,
    check_per_sample,
    clip_weights,
    conditional_critic_loss,
    conditional_generator_loss,
    critic_loss,
    generator_loss,
    gradient_norms,
    gradient_norms_plain,
    gradient_penalty,
    gradient_penalty_plain,
    interpolate,
    tf1_adam,
    tf1_rmsprop,
)
from tests.methods.wgan_gp_networks import FIXTURE, INPUT_SHAPES, NETWORKS, ONE_SIDED_TARGET, case

FORMS = pytest.mark.parametrize("penalty", [gradient_penalty, gradient_penalty_plain])
KEY = jax.random.key(0)


# --- closed forms -----------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("target", [1.0, 0.3])
def test_a_linear_critic_has_the_penalty_of_its_weights(penalty, target):
    """D(x) = w.x: (||w|| - c)^2, its gradient 2 (||w|| - c) w / ||w||, wherever the samples are."""
    w = jnp.array([0.6, -1.2, 0.4])
    real, fake = jax.random.normal(KEY, (2, 5, 3))
    epsilon = jax.random.uniform(KEY, (5,))
    value, slope = jax.value_and_grad(lambda w: penalty(lambda x: x @ w, real, fake, epsilon, target=target))(w)
    np.testing.assert_allclose(value, (1.4 - target) ** 2, rtol=1e-5)
    np.testing.assert_allclose(slope, 2 * (1.4 - target) * w / 1.4, rtol=1e-5)


@FORMS
@pytest.mark.parametrize("one_sided", [False, True])
def test_between_two_points_the_best_slope_is_one_plus_d_over_two_lambda(penalty, one_sided):
    """D(x) = a x: -a d + lambda (a - 1)^2 is least at a = 1 + d / (2 lambda) > 1, so one-sided too."""
    distance, weight = 3.0, 10.0

    def loss(a):
        real, fake = jnp.full((4, 1), 2.0), jnp.full((4, 1), 2.0 - distance)
        scored = partial(jnp.multiply, a)
        inside = penalty(lambda x: scored(x[:, 0]), real, fake, jnp.linspace(0, 1, 4), one_sided=one_sided)
        return critic_loss(scored(real), scored(fake)) + weight * inside

    best = 1 + distance / (2 * weight)
    np.testing.assert_allclose(jax.grad(loss)(best), 0, atol=1e-5)  # terms of size 3 in float32
    a = 1.5 - jax.grad(loss)(1.5) / jax.hessian(loss)(1.5)  # Newton's step on a parabola; the second derivative is used
    np.testing.assert_allclose(a, best, rtol=1e-6)


def test_the_best_critic_between_point_masses_gives_their_distance_and_no_penalty():
    """Proposition 1: with one real point, D(y) = -||y - x|| has slope one on all the lines, and L_D = -W1 exactly."""
    real = jnp.broadcast_to(jnp.array([0.5, -0.3]), (16, 2))
    fake = jax.random.normal(KEY, (16, 2))
    epsilon = jax.random.uniform(KEY, (16,), maxval=0.99)

    def critic(x):
        return -jnp.linalg.norm(x - real[0] + 1e-12, axis=1)

    exact = np.linalg.norm(fake - real, axis=1).mean()  # every coupling with a point mass is the product
    np.testing.assert_allclose(critic_loss(critic(real), critic(fake)), -exact, rtol=1e-6)
    np.testing.assert_allclose(generator_loss(critic(fake)), exact, rtol=1e-6)
    np.testing.assert_allclose(gradient_norms(critic, interpolate(real, fake, epsilon)), 1, rtol=1e-5)
    np.testing.assert_allclose(gradient_penalty(critic, real, fake, epsilon), 0, atol=1e-10)


@FORMS
def test_the_one_sided_penalty_lets_small_slopes_be(penalty):
    def of(w, one_sided):
        return penalty(lambda x: x @ w, jnp.ones((2, 1)), jnp.zeros((2, 1)), jnp.ones(2) / 2, one_sided=one_sided)

    assert of(jnp.array([0.4]), True) == 0
    np.testing.assert_allclose(of(jnp.array([0.4]), False), 0.36, rtol=1e-6)
    np.testing.assert_allclose(of(jnp.array([3.0]), True), 4, rtol=1e-6)


# --- the two forms and an independent one -----------------------------------------------------------------------------


def our_numbers(name: str, penalty: Callable[..., jax.Array], dtype: type) -> dict[str, np.ndarray]:
    with jax.enable_x64(dtype is np.float64):
        params, real, fake, epsilon = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), case(name))
        network = NETWORKS[name]

        def loss(params):
            critic = partial(network, params)
            value = penalty(critic, real, fake, epsilon)
            return critic_loss(critic(real), critic(fake)) + 10 * value, value

        (total, value), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        one_sided = penalty(partial(network, params), real, fake, epsilon, target=ONE_SIDED_TARGET, one_sided=True)
        found = {"penalty": value, "one_sided": one_sided, "loss": total}
        found |= {f"gradient {key}": gradient for key, gradient in gradients.items()}
        return {key: np.asarray(value) for key, value in found.items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert set(found) == set(expected)
    largest = max(np.abs(value).max() for key, value in expected.items() if key.startswith("gradient"))
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], rtol=tolerance, atol=tolerance * largest, err_msg=key)


@FORMS
@pytest.mark.parametrize("name", NETWORKS)
def test_penalty_and_gradients_are_those_of_an_independent_double_backward(name, penalty):
    with np.load(FIXTURE) as archive:
        expected = {key.split(":")[1]: archive[key] for key in archive.files if key.split(":")[0] == name}
    found = our_numbers(name, penalty, np.float64)
    assert_same(found, expected, 1e-10)  # both in float64
    # W's terms cancel in the last bias, and the penalty does not see it
    last = sorted(key for key in found if key.startswith("gradient b"))[-1]
    np.testing.assert_allclose(found[last], 0, atol=1e-15)


@pytest.mark.torch
@pytest.mark.parametrize("name", NETWORKS)
def test_the_fixture_is_what_torch_computes(name):
    pytest.importorskip("torch")
    from tests.methods.wgan_gp_torch import torch_numbers

    assert_same(our_numbers(name, gradient_penalty, np.float64), torch_numbers(name), 1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_both_forms_agree_in_float32(name):
    fast, plain = (our_numbers(name, penalty, np.float32) for penalty in (gradient_penalty, gradient_penalty_plain))
    assert fast["penalty"].dtype == np.float32
    assert_same(fast, plain, 1e-5)


@FORMS
def test_gradients_are_those_of_finite_differences(penalty):
    """By the parameters, the samples and epsilon at once, along one direction; the plain form in forward mode too."""
    with jax.enable_x64(True):
        at = jax.tree.map(jnp.asarray, case("mlp"))
        along = jax.tree.map(lambda leaf: jnp.cos(1 + jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), at)

        @jax.jit
        def value(arguments):
            params, real, fake, epsilon = arguments
            return penalty(partial(NETWORKS["mlp"], params), real, fake, epsilon)

        step = 1e-5
        before, after = (value(jax.tree.map(lambda x, d, h=h: x + h * d, at, along)) for h in (-step, step))
        expected = (after - before) / (2 * step)
        slopes = jax.grad(value)(at)
        reverse = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(slopes), jax.tree.leaves(along), strict=True))
        found = [reverse]
        if penalty is gradient_penalty_plain:
            found.append(jax.jvp(value, (at,), (along,))[1])
        assert abs(expected) > 1e-3
        # central differences in float64: an error of step^2 times the third derivative, and of 1e-16 / step
        np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_second_derivatives_of_the_forms_agree():
    params, real, fake, epsilon = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), case("mlp"))

    def curvature(penalty):
        def slope_length(w):
            loss = lambda w: penalty(partial(NETWORKS["mlp"], params | {"w1": w}), real, fake, epsilon)  # noqa: E731
            return jnp.sum(jax.grad(loss)(w) ** 2)

        return jax.grad(slope_length)(params["w1"])

    fast, plain = curvature(gradient_penalty), curvature(gradient_penalty_plain)
    np.testing.assert_allclose(
        fast, plain, rtol=1e-4, atol=1e-5 * float(jnp.abs(plain).max())
    )  # two derivatives in float32


# --- transformations, numbers at their ends ---------------------------------------------------------------------------


def test_transformations_may_be_nested_in_any_order_with_labels_and_keys_in_the_closure():
    """A critic closes over arrays of every type, traced or not; none may be lost or leak."""
    real, fake = jax.random.normal(KEY, (2, 4, 3))
    table = jax.random.normal(KEY, (5, 3))

    def loss(table, labels, key, epsilon):
        noise = jax.random.normal(key, (4, 3))
        critic = lambda x: jnp.sum(jnp.tanh(x * table[labels] + noise), 1) + jax.random.normal(key)  # noqa: E731
        return gradient_penalty(critic, real, fake, epsilon)

    arguments = table, jnp.array([0, 3, 3, 1]), KEY, jnp.linspace(0, 1, 4)
    expected = jax.grad(loss)(*arguments)
    assert jnp.all(expected[jnp.array([2, 4])] == 0)
    for order in (
        lambda f: jax.jit(jax.grad(f)),
        lambda f: jax.grad(jax.jit(f)),
        lambda f: jax.grad(jax.checkpoint(f)),
    ):
        np.testing.assert_allclose(order(loss)(*arguments), expected, rtol=1e-5, atol=1e-6)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), arguments)
    for order in (lambda f: jax.vmap(jax.grad(f)), lambda f: jax.jit(jax.vmap(jax.grad(jax.jit(f))))):
        np.testing.assert_allclose(order(loss)(*stacked)[1], expected, rtol=1e-5, atol=1e-6)
    summed = jax.grad(lambda *a: jnp.sum(jax.vmap(loss)(*a)))(*stacked)
    np.testing.assert_allclose(summed[0], expected, rtol=1e-5, atol=1e-6)
    _, (steps, _) = jax.lax.scan(lambda c, _: (c, (jax.grad(loss)(*arguments), c)), 0.0, length=2)
    np.testing.assert_allclose(steps[1], expected, rtol=1e-5, atol=1e-6)


@FORMS
def test_a_zero_gradient_gives_no_nan(penalty):
    """All samples or one of them: where ||g|| = 0 the penalty is target^2 and pulls nowhere."""
    real, fake, epsilon = jnp.ones((3, 2)), -jnp.ones((3, 2)), jnp.array([0.0, 0.5, 1.0])

    def value(w, one_sided=False):
        return penalty(lambda x: jnp.sum(jax.nn.relu(x * w), axis=1), real, fake, epsilon, one_sided=one_sided)

    for one_sided, expected in ((False, 1.0), (True, 0.0)):
        number, slope = jax.value_and_grad(value)(jnp.zeros(2), one_sided)
        assert number == expected
        np.testing.assert_array_equal(slope, 0)
    w = jnp.array([3.0, 4.0])  # x = -1, 0, 1: ReLU is dead at the first, and at 0 JAX takes it as dead
    number, slope = jax.value_and_grad(value)(w)
    np.testing.assert_allclose(number, (1 + 1 + 16) / 3, rtol=1e-6)
    np.testing.assert_allclose(slope, 2 * 4 * w / 5 / 3, rtol=1e-6)
    assert jnp.all(jnp.isfinite(jax.hessian(value)(jnp.zeros(2))))


@pytest.mark.parametrize("norms", [gradient_norms, gradient_norms_plain])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_norms_whose_squares_leave_float32_are_right(norms, size):
    value, slope = jax.value_and_grad(lambda w: norms(lambda x: x @ w, jnp.zeros((1, 2)))[0])(
        jnp.array([3.0, 4.0]) * size
    )
    np.testing.assert_allclose(value, 5 * size, rtol=1e-6)
    np.testing.assert_allclose(slope, [0.6, 0.8], rtol=1e-6)


def test_nan_in_a_critic_is_not_hidden():
    assert jnp.isnan(gradient_norms(lambda x: x @ jnp.array([jnp.nan, 0.0]), jnp.zeros((1, 2)))[0])


def test_a_critic_in_bfloat16_has_its_penalty_in_float32():
    w = jnp.array([0.6, -1.2, 0.4], jnp.bfloat16)
    samples = jnp.ones((4, 3), jnp.bfloat16)
    penalty = lambda w: gradient_penalty(lambda x: x @ w, samples, -samples, jnp.full(4, 0.5))  # noqa: E731
    value, slope = jax.value_and_grad(penalty)(w)
    assert (value.dtype, slope.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(value, 0.16, rtol=0.02)  # bfloat16 has 8 bits
    np.testing.assert_allclose(slope.astype(float), np.array([0.6, -1.2, 0.4]) * 0.8 / 1.4, rtol=0.03)


@FORMS
def test_arguments_that_do_not_fit_are_refused(penalty):
    images, critic = jnp.ones((4, 2, 2, 1)), lambda x: x.sum((1, 2, 3))
    with pytest.raises(ValueError, match="one number a sample"):
        penalty(critic, images, images, jnp.ones((4, 2, 2, 1)))
    with pytest.raises(ValueError, match="one shape"):
        penalty(critic, images, images[:2], jnp.ones(4))
    with pytest.raises(ValueError, match="floating type"):
        penalty(critic, images.astype(jnp.uint8), images.astype(jnp.uint8), jnp.ones(4))
    with pytest.raises(ValueError, match="one score a sample"):
        penalty(lambda x: x.sum((1, 2)), jnp.ones((4, 2, 2, 3)), jnp.ones((4, 2, 2, 3)), jnp.ones(4))
    with pytest.raises(ValueError, match="one score a sample"):
        penalty(lambda x: x.sum(), images, images, jnp.ones(4))


# --- critics that mix samples -----------------------------------------------------------------------------------------


def batch_norm(x, batch_axis=0):
    return (x - x.mean(batch_axis, keepdims=True)) / jnp.sqrt(x.var(batch_axis, keepdims=True) + 1e-5)


MIXING = {
    "batch normalisation": lambda x: batch_norm(x).sum(1),
    "its statistics not differentiated": lambda x: (x - jax.lax.stop_gradient(x.mean(0))).sum(1),
    "batch normalisation of pairs": lambda x: batch_norm(x.reshape(3, 2, 4), 1).reshape(6, 4).sum(1),
    "of neighbours across halves": lambda x: x.sum(1) + jnp.roll(x, 3, axis=0)[:, 0],
    "at a scale of zero": lambda x: 0.0 * batch_norm(x).sum(1),
    "a feature of the minibatch that swallows NaN": lambda x: x.sum(1) + jnp.nanstd(x[:, 0]),
    "one sample that sees one other": lambda x: x.sum(1).at[4].add(x[5, 0]),
}


@pytest.mark.parametrize("name", MIXING)
def test_critics_that_mix_samples_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match="depends on the other samples"):
        check_per_sample(MIXING[name], jax.random.normal(KEY, (6, 4)))


def test_flax_batch_norm_is_refused_in_training_and_taken_with_running_statistics():
    batch = jax.random.normal(KEY, (5, 4))
    norm = nn.BatchNorm()
    variables = norm.init(KEY, batch, use_running_average=True)

    def critic(x, **options):
        return norm.apply(variables, x, mutable=["batch_stats"], **options)[0].sum(1)

    check_per_sample(partial(critic, use_running_average=True), batch)
    with pytest.raises(ValueError, match="depends on the other samples"):
        check_per_sample(partial(critic, use_running_average=False), batch)


@pytest.mark.parametrize("name", NETWORKS)
def test_critics_of_the_paper_are_taken(name):
    params, real, _, _ = case(name)
    assert real.shape == INPUT_SHAPES[name]
    check_per_sample(partial(NETWORKS[name], jax.tree.map(jnp.float32, params)), real.astype(np.float32))


def test_batches_that_prove_nothing_are_refused():
    with pytest.raises(ValueError, match="two samples"):
        check_per_sample(lambda x: x.sum(1), np.ones((1, 3)))
    with pytest.raises(ValueError, match="finite"):
        check_per_sample(lambda x: x.sum(1), np.full((2, 3), np.inf))
    with pytest.raises(ValueError, match="floating type"):
        check_per_sample(lambda x: x.sum(1), np.ones((2, 3), np.uint8))


# --- clipping, labels, optimizers -------------------------------------------------------------------------------------


def test_clipping_takes_all_variables_or_kernels_only():
    params = {"dense": {"kernel": jnp.array([[0.5, -0.5, 0.001]]), "bias": jnp.array([0.7])}, "scale": jnp.ones(2)}
    everything = jax.jit(clip_weights)(params)
    np.testing.assert_allclose(everything["dense"]["kernel"], [[0.01, -0.01, 0.001]])
    np.testing.assert_allclose(everything["scale"], 0.01)
    kernels = clip_weights(params, 0.1, kernels_only=True)
    np.testing.assert_allclose(kernels["dense"]["kernel"], [[0.1, -0.1, 0.001]])
    np.testing.assert_array_equal(kernels["dense"]["bias"], params["dense"]["bias"])
    np.testing.assert_array_equal(kernels["scale"], 1)
    with pytest.raises(ValueError, match="named `kernel`"):
        clip_weights({"w": jnp.ones(2)}, kernels_only=True)


def test_the_auxiliary_classifier_is_weighed_as_released():
    scores, labels = jnp.array([1.0, 3.0]), jnp.array([0, 2])
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.7, 0.1, 0.2]]))
    entropy = -(np.log(0.5) + np.log(0.2)) / 2
    np.testing.assert_allclose(auxiliary_loss(logits, labels), entropy, rtol=1e-6)
    np.testing.assert_allclose(conditional_critic_loss(scores, 2 * scores, logits, labels), 2 + entropy, rtol=1e-6)
    np.testing.assert_allclose(conditional_generator_loss(scores, logits, labels), -2 + 0.1 * entropy, rtol=1e-6)


def run(optimizer: optax.GradientTransformation, gradients: np.ndarray) -> np.ndarray:
    """Where a weight that starts at zero goes."""
    with jax.enable_x64(True):
        weight = jnp.zeros(())
        state, path = optimizer.init(weight), []
        for gradient in gradients:
            updates, state = optimizer.update(jnp.asarray(gradient), state, weight)
            weight = optax.apply_updates(weight, updates)
            path.append(float(weight))
        return np.array(path)


def test_rmsprop_is_tensorflow_1s_and_starts_small():
    gradients, slot, weight, path = np.array([0.1, -3.0, 1e-6, 2.0]), 1.0, 0.0, []
    for gradient in gradients:
        slot = 0.9 * slot + 0.1 * gradient**2
        weight -= 5e-5 * gradient / np.sqrt(slot + 1e-10)
        path.append(weight)
    np.testing.assert_allclose(run(tf1_rmsprop(), gradients), path, rtol=1e-12)
    assert abs(path[0]) < 0.05 * abs(run(optax.rmsprop(5e-5), gradients)[0])


@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_adam_is_tensorflow_1s_whose_epsilon_is_not_corrected(scale):
    gradients, m, v, weight, path = scale * np.array([0.1, -3.0, 1e-2, 2.0]), 0.0, 0.0, 0.0, []
    for step, gradient in enumerate(gradients, 1):
        m, v = 0.5 * m + 0.5 * gradient, 0.9 * v + 0.1 * gradient**2
        weight -= 1e-3 * np.sqrt(1 - 0.9**step) / (1 - 0.5**step) * m / (np.sqrt(v) + 1e-8)
        path.append(weight)
    np.testing.assert_allclose(run(tf1_adam(1e-3, beta1=0.5), gradients), path, rtol=1e-6)  # powers in float32
    ours, others = (run(kind, gradients) for kind in (tf1_adam(1e-3, beta1=0.5), optax.adam(1e-3, 0.5, 0.9)))
    assert np.allclose(ours, others, rtol=1e-5) == (scale == 1.0)


def test_a_critic_trained_with_the_penalty_estimates_the_distance_of_two_points():
    """A two-layer critic reaches slope 1 + d / (2 lambda) on the line, so its estimate is d (1 + d / (2 lambda))."""
    distance, weight = 1.0, 10.0
    keys = jax.random.split(KEY, 2)
    params = {
        "w0": jax.random.normal(keys[0], (1, 16)),
        "b0": jnp.zeros(16),
        "w1": jax.random.normal(keys[1], (16,)) / 4,
    }
    real, fake = jnp.zeros((16, 1)), jnp.full((16, 1), distance)
    optimizer = tf1_adam(0.02, beta1=0.0)

    def loss(params, epsilon):
        critic = lambda x: nn.softplus(x @ params["w0"] + params["b0"]) @ params["w1"]  # noqa: E731
        plain = critic_loss(critic(real), critic(fake))
        return plain + weight * gradient_penalty(critic, real, fake, epsilon), -plain

    def step(carry, key):
        params, state = carry
        epsilon = (jnp.arange(16) + jax.random.uniform(key)) / 16  # an even net of the line
        gradients, estimate = jax.grad(loss, has_aux=True)(params, epsilon)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), estimate

    keys = jax.random.split(KEY, 400)
    _, estimates = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((params, optimizer.init(params)))
    # the slope of one critic cannot be the same everywhere, and Adam at 0.02 keeps moving
    np.testing.assert_allclose(estimates[-50:].mean(), distance * (1 + distance / (2 * weight)), rtol=0.02)
