"""Samplers against closed forms: for Gaussian data the best noise estimate is linear and everything is known."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.diffusion.learned_variance import LearnedVarianceDDPM
from stabletrain.diffusion.processes import DDPM, PROCESSES, VPSDE
from stabletrain.diffusion.samplers import SAMPLERS, Plan, ddim, euler_maruyama, follow, initial_noise, sample

MEAN, SPREAD = 0.3, 0.4  # pixels of the data: independent, normal

PAIRS = [
    pytest.param(make(), name, id=f"{process}-{name}")
    for process, make in PROCESSES.items()
    for name in ("ddim", "ddpm", "ddpm-large", "euler-maruyama")
    if process != "edm" and not (name == "euler-maruyama" and process != "vp-sde")
]


def levels(process, network_times):
    if isinstance(process, VPSDE):
        return process.marginal(network_times / 999.0)
    first = 1 if process.schedule == "scaled-linear" else 0  # what the network is told of level 0
    return process.marginal(jnp.rint(network_times).astype(jnp.int32) - first)


def best_network(process):
    """E[noise | noisy] for Gaussian data: sigma (x - alpha m) / (alpha^2 s^2 + sigma^2)."""

    def network(noisy, network_times):
        alpha, sigma = (level.reshape(-1, 1, 1, 1) for level in levels(process, network_times))
        return sigma * (noisy - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)

    return network


def with_variance(network):
    """The network with a second half of its channels: a variance one quarter of the way between its two ends."""
    return lambda noisy, times: jnp.concatenate([network(noisy, times), jnp.full_like(noisy, -0.5)], axis=-1)


def moments(process, plan: Plan) -> tuple[float, float]:
    """Exact mean and variance at the end of a trajectory with the best network: each step is affine."""
    mean, variance = 0.0, 1.0
    alpha, sigma = process.marginal(plan.times[:-1])
    for i in range(plan.steps):
        total = alpha[i] ** 2 * SPREAD**2 + sigma[i] ** 2
        noise_slope, noise_shift = sigma[i] / total, -sigma[i] * alpha[i] * MEAN / total
        clean_slope, clean_shift = (1 - sigma[i] * noise_slope) / alpha[i], -sigma[i] * noise_shift / alpha[i]
        slope = plan.noisy[i] + plan.clean[i] * clean_slope + plan.noise[i] * noise_slope
        mean = slope * mean + plan.clean[i] * clean_shift + plan.noise[i] * noise_shift
        variance = slope**2 * variance + plan.fresh[i] ** 2
    return mean, variance


@pytest.mark.parametrize(("process", "name"), PAIRS)
def test_samples_have_the_data_s_mean_and_variance(process, name):
    """The whole compiled trajectory: 4,096 one-pixel images; within four standard errors and the grid's own bias."""
    plan = SAMPLERS[name](process, 200)
    keys = jax.random.split(jax.random.key(0), 4096)
    images = jax.jit(lambda k: sample(process, plan, best_network(process), k, (1, 1, 1)))(keys)
    mean, variance = moments(process, plan)
    assert float(images.mean()) == pytest.approx(mean, abs=4 * np.sqrt(variance / 4096))
    assert float(images.var()) == pytest.approx(variance, rel=4 * np.sqrt(2 / 4096))


@pytest.mark.parametrize(("process", "name"), PAIRS)
def test_error_of_the_moments_falls_with_the_steps(process, name):
    """Full-length trajectories reach the data's moments: bias within 3 % (the grid's last step is finite)."""
    mean, variance = moments(process, SAMPLERS[name](process, 1000))
    assert mean == pytest.approx(MEAN, abs=0.03 * MEAN + 0.002)
    assert variance == pytest.approx(SPREAD**2, rel=0.03)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler-maruyama"])
def test_first_order_convergence(name):
    """Twice the steps, half the error of the variance (the last step's own share taken out with a tiny first time)."""
    process = VPSDE(first_time=1e-7)
    finest = moments(process, SAMPLERS[name](process, 12_800))[1]
    errors = [abs(moments(process, SAMPLERS[name](process, n))[1] - finest) for n in (200, 400, 800)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    # the difference to 12,800 steps instead of the limit adds 1/16 of the last error; then higher-order terms
    np.testing.assert_allclose(orders, 1.0, atol=0.15)


def test_ddim_follows_the_probability_flow():
    """Deterministic DDIM ends where the exact flow does: m + s / sqrt(v_T) (x_T - alpha_T m), at first order."""
    process = VPSDE()
    start = jnp.linspace(-2.0, 2.0, 16).reshape(16, 1, 1, 1)
    alpha, sigma = process.marginal(np.array(1.0))
    exact = MEAN + SPREAD / np.sqrt(alpha**2 * SPREAD**2 + sigma**2) * (np.asarray(start) - alpha * MEAN)
    keys = jax.random.split(jax.random.key(0), 16)

    def error(steps):
        plan = ddim(process, steps)
        end = jax.jit(lambda x: follow(process, plan, best_network(process), x, keys))(start)
        return float(np.abs(end - exact).max())

    coarse, fine = error(50), error(100)
    assert 1.7 < coarse / fine < 2.3
    assert error(800) < 0.01


@pytest.mark.parametrize(("process", "name"), PAIRS)
def test_trajectory_equals_one_written_in_numpy(process, name):
    """From the same noise, the textbook formula of each sampler, step by step in float64."""
    steps, shape = 12, (3, 2, 2, 1)
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(7), shape[0])
        network = best_network(process)
        plan = SAMPLERS[name](process, steps)
        result = np.asarray(jax.jit(lambda k: sample(process, plan, network, k, shape[1:]))(keys))
        draws = [
            np.asarray(jax.vmap(lambda k, i=i: jax.random.normal(jax.random.fold_in(k, i), shape[1:]))(keys))
            for i in range(steps + 1)
        ]
        assert result.dtype == np.float64

    times = process.sampling_times(steps)
    x = draws[0]
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        (a_t, s_t), (a_s, s_s) = process.marginal(np.array(t)), process.marginal(np.array(s))
        eps = s_t * (x - a_t * MEAN) / (a_t**2 * SPREAD**2 + s_t**2)
        x0 = (x - s_t * eps) / a_t
        z = draws[i + 1] if i < steps - 1 else 0.0  # noise-free last step
        if name == "ddim":
            x = a_s * x0 + s_s * eps
        elif name.startswith("ddpm"):
            step = (a_t / a_s) ** 2  # "alpha_t" of Ho et al.; 1 - step is beta_t
            mean = a_s * (1 - step) / s_t**2 * x0 + np.sqrt(step) * s_s**2 / s_t**2 * x
            variance = (1 - step) * (1.0 if name == "ddpm-large" else s_s**2 / s_t**2)
            x = mean + np.sqrt(variance) * z
        else:
            beta, h = 0.1 + t * 19.9, t - s
            drift = -0.5 * beta * x - beta * (-eps / s_t)
            x = x - drift * h + np.sqrt(beta * h) * z
    # float64 in both: rounding only, magnified by 1 / alpha_T (20,000 for the cosine schedule)
    np.testing.assert_allclose(result, x, atol=1e-9)


@pytest.mark.parametrize(("process", "name"), PAIRS)
def test_the_last_step_is_noise_free_and_earlier_ones_are_not(process, name):
    plan = SAMPLERS[name](process, 10)
    assert plan.fresh[-1] == 0
    assert np.all(plan.fresh[:-1] > 0) or name == "ddim"
    assert plan.steps == 10


@pytest.mark.parametrize("process", [VPSDE(), DDPM("cosine")])
def test_ddim_with_eta_one_is_ancestral_sampling(process):
    """Written with clean and noise estimates both are the same step, since noisy = alpha clean + sigma noise."""
    implicit, ancestral = ddim(process, 20, eta=1.0), SAMPLERS["ddpm"](process, 20)
    alpha, sigma = process.marginal(ancestral.times[:-1])
    np.testing.assert_allclose(implicit.fresh, ancestral.fresh, atol=1e-12)
    np.testing.assert_allclose(implicit.clean, ancestral.clean + alpha * ancestral.noisy, atol=1e-12)
    np.testing.assert_allclose(implicit.noise, ancestral.noise + sigma * ancestral.noisy, atol=1e-7)


def test_euler_maruyama_needs_an_sde():
    with pytest.raises(TypeError, match="DDPM is no stochastic"):
        euler_maruyama(DDPM(), 10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(name):
    """A key per image: the same picture alone, in a batch, and split over four devices."""
    process = LearnedVarianceDDPM() if name == "ddpm-learned" else VPSDE()
    plan, network = SAMPLERS[name](process, 5), best_network(process)
    if name == "ddpm-learned":
        network = with_variance(network)
    keys = jax.random.split(jax.random.key(3), 8)
    make = jax.jit(lambda k: sample(process, plan, network, k, (2, 2, 1)))
    batch = np.asarray(make(keys))
    np.testing.assert_allclose(make(keys[5:6])[0], batch[5], atol=1e-6)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(keys, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    np.testing.assert_allclose(np.asarray(make(split)), batch, atol=1e-6)


def test_clipping_bounds_the_estimates():
    """A network that says "no noise" makes the clean estimate noisy / alpha: only clipping bounds the result."""
    process, plan = VPSDE(), ddim(VPSDE(), 5)
    keys = jax.random.split(jax.random.key(3), 8)

    def end(clip):
        return sample(process, plan, lambda x, t: jnp.zeros_like(x), keys, (2, 2, 1), clip=clip)

    assert float(jnp.abs(end(True)).max()) <= 1
    assert float(jnp.abs(end(False)).max()) > 10


def test_initial_noise_is_standard_normal_for_these_processes():
    noise = initial_noise(VPSDE(), jax.random.split(jax.random.key(1), 64), (8, 8, 1))
    assert float(noise.std()) == pytest.approx(1.0, abs=4 / np.sqrt(2 * 4096))
