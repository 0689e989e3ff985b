"""Noise processes: forward marginals, estimates, losses, schedules, and what the network is fed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.diffusion.contradictions import FEWEST_LEVELS
from stabletrain.diffusion.processes import (
    BETAS,
    DDPM,
    PROCESSES,
    VPSDE,
    clip_clean,
    cosine_betas,
    linear_betas,
    noised,
    over_pixels,
    score,
)

ALL = [pytest.param(make(), id=name) for name, make in PROCESSES.items() if name != "edm"]
"""The processes that keep the variance and whose network predicts the noise; EDM has its own tests."""


def network_of(answer):
    """A network that ignores its input and returns `answer`, recording the times it was given."""
    seen = []

    def network(noisy, times):
        seen.append(np.asarray(times))
        return answer

    return network, seen


@pytest.mark.parametrize("process", ALL)
def test_marginal_preserves_variance_and_runs_from_data_to_noise(process):
    times = process.sampling_times(50)
    alpha, sigma = process.marginal(times)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=1e-12)
    assert np.all(np.diff(alpha) > 0), "sampling times run from noise to data"
    assert (alpha[-1], sigma[-1]) == (1.0, 0.0)
    # that of latent diffusion ends with some of the image left
    assert alpha[0] < (0.07 if getattr(process, "schedule", "") == "scaled-linear" else 0.01)


@pytest.mark.parametrize("process", ALL)
def test_traced_marginal_equals_the_one_on_the_host(process):
    times = process.sampling_times(200)
    host = process.marginal(times)
    device = jax.jit(process.marginal)(jnp.asarray(times))
    # float32 against float64: expm1 keeps even the smallest sigma to a few units in the last place; alpha at the noise
    # end is exp(-5), whose exponent's rounding is magnified five times.
    np.testing.assert_allclose(device[0], host[0], rtol=3e-6)
    np.testing.assert_allclose(device[1], host[1], rtol=3e-6)


def test_vp_sde_marginal_solves_its_equation():
    """d alpha / dt = - beta alpha / 2 and d sigma^2 / dt = beta (1 - sigma^2), by central differences."""
    process, t, h = VPSDE(), np.linspace(0.05, 0.95, 19), 1e-5
    (a0, s0), (a1, s1) = process.marginal(t - h), process.marginal(t + h)
    alpha, sigma = process.marginal(t)
    # central differences of step h are off by h^2 times third derivatives of order 1e3
    np.testing.assert_allclose((a1 - a0) / (2 * h), -process.beta(t) * alpha / 2, atol=1e-6)
    np.testing.assert_allclose((s1**2 - s0**2) / (2 * h), process.beta(t) * (1 - sigma**2), atol=1e-6)


def test_ddpm_marginal_is_the_chain_of_its_steps():
    """alpha-bar by the definition: multiply the single steps' means and add up their variances."""
    betas = np.linspace(1e-4, 0.02, 1000)
    mean, variance = 1.0, 0.0
    alpha, sigma = DDPM("linear").marginal(np.arange(1000))
    for i, beta in enumerate(betas):
        mean, variance = mean * np.sqrt(1 - beta), variance * (1 - beta) + beta
        assert alpha[i] == pytest.approx(mean, rel=1e-12)
        assert sigma[i] ** 2 == pytest.approx(variance, rel=1e-9)


def test_schedules_have_their_known_ends():
    linear, cosine = linear_betas(1000), cosine_betas(1000)
    assert linear[[0, -1]] == pytest.approx([1e-4, 0.02])
    assert np.prod(1 - linear) == pytest.approx(4.036e-5, rel=1e-3)  # the known alpha-bar_T of DDPM
    assert cosine[0] == pytest.approx(4.128e-5, rel=1e-3)
    assert cosine[-1] == 0.999
    assert np.all(np.diff(cosine[:-1]) > 0)


def test_too_few_levels_for_a_schedule_are_refused():
    """Scaled to n levels, its betas grow as 1000 / n; at 1 nothing of the image is left, then no root."""
    for name in ("linear", "scaled-linear", "cosine"):
        fewest = FEWEST_LEVELS.get(f"ddpm-{name}", 2)
        assert BETAS[name](fewest).max() < 1
        assert np.isfinite(DDPM(name, fewest).marginal(np.arange(fewest))).all()
        if fewest > 2:
            with pytest.raises(ValueError, match="a beta of 1 or more"):
                DDPM(name, fewest - 1)


@pytest.mark.parametrize("process", ALL)
def test_noised_images_have_the_marginal_moments(process):
    key = jax.random.key(0)
    times = jnp.asarray(process.sampling_times(4)[1:2])
    clean = jnp.full((1, 200, 200, 1), 0.5)
    noisy = noised(process, clean, jax.random.normal(key, clean.shape), times)
    alpha, sigma = process.marginal(np.asarray(times))
    error = float(sigma[0]) / 200  # standard error of the mean of 200 x 200 draws; four of them
    assert float(noisy.mean()) == pytest.approx(0.5 * alpha[0], abs=4 * error)
    assert float(noisy.std()) == pytest.approx(sigma[0], rel=4 / np.sqrt(2 * 40_000))


@pytest.mark.parametrize("process", ALL)
def test_true_noise_gives_back_the_clean_image(process):
    clean, noise = jax.random.uniform(jax.random.key(1), (2, 3, 4, 4, 1), minval=-1.0)
    times = jnp.asarray(process.sampling_times(4)[[1, 2, 3]])
    noisy = noised(process, clean, noise, times)
    estimate = process.estimate(network_of(noise)[0], noisy, times)
    # dividing by the smallest alpha here (0.1 to 0.3) magnifies float32 rounding
    np.testing.assert_allclose(estimate.clean, clean, atol=1e-5)
    np.testing.assert_array_equal(estimate.noise, noise)
    sigma = over_pixels(process.marginal(times)[1], noise)
    np.testing.assert_allclose(score(process, estimate, times), -noise / sigma, rtol=1e-6)


@pytest.mark.parametrize("process", ALL)
def test_loss_is_the_mean_over_pixels_and_zero_for_the_true_noise(process):
    noise = jax.random.normal(jax.random.key(2), (3, 4, 4, 2))
    times = jnp.asarray(process.sampling_times(4)[:3])
    assert np.all(np.asarray(process.loss(network_of(noise)[0], noise, noise, times)) == 0)
    loss = process.loss(network_of(noise + 0.5)[0], noise, noise, times)
    assert loss.shape == (3,)
    np.testing.assert_allclose(loss, 0.25, rtol=1e-5)


def test_loss_is_float32_for_a_network_in_bfloat16():
    noise = jnp.ones((2, 2, 2, 1))
    loss = VPSDE().loss(network_of(jnp.zeros_like(noise, jnp.bfloat16))[0], noise, noise, jnp.array([0.1, 0.5]))
    assert loss.dtype == jnp.float32


def test_the_network_is_fed_999_t():
    """Continuous time reaches the network as 999 t, discrete time as its index: both span 0..999.

    That of U-ViT's text-to-image networks counts from 1.
    """
    noise = jnp.ones((3, 2, 2, 1))
    network, seen = network_of(noise)
    VPSDE().loss(network, noise, noise, jnp.array([0.0, 0.5, 1.0]))
    VPSDE().estimate(network, noise, jnp.array([0.0, 0.5, 1.0]))
    DDPM().loss(network, noise, noise, jnp.array([0, 500, 999]))
    DDPM().estimate(network, noise, jnp.array([0, 500, 999]))
    np.testing.assert_allclose(seen[0], [0, 499.5, 999], rtol=1e-6)
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[2], [0, 500, 999])
    np.testing.assert_array_equal(seen[2], seen[3])
    DDPM("scaled-linear").loss(network, noise, noise, jnp.array([0, 500, 999]))
    np.testing.assert_array_equal(seen[4], [1, 501, 1000])


def test_clipping_keeps_the_noisy_image():
    """Clipped clean image and adjusted noise still make up the same noisy image."""
    process, times = VPSDE(), jnp.array([0.2, 0.7])
    noisy = 3 * jax.random.normal(jax.random.key(3), (2, 4, 4, 1))
    estimate = process.estimate(network_of(jnp.zeros_like(noisy))[0], noisy, times)
    assert float(jnp.abs(estimate.clean).max()) > 1
    clipped = clip_clean(process, estimate, noisy, times)
    assert float(jnp.abs(clipped.clean).max()) == 1
    np.testing.assert_allclose(noised(process, clipped.clean, clipped.noise, times), noisy, atol=1e-5)


@pytest.mark.parametrize("process", ALL)
def test_training_times_cover_their_range_evenly(process):
    times = np.asarray(process.draw_times(jax.random.key(4), 4096), float)
    top = 1.0 if isinstance(process, VPSDE) else 999
    assert times.min() >= 0
    assert times.max() <= top
    counts, _ = np.histogram(times, bins=8, range=(0, top))
    assert np.all(np.abs(counts - 512) < 4.5 * np.sqrt(512 * 7 / 8))  # 4.5 sigma of a binomial count
    spread = process.spread_times(8).astype(float)
    np.testing.assert_allclose(spread / top, (np.arange(8) + 0.5) / 8, atol=1e-3)


def test_sampling_grids_are_those_of_the_papers():
    """VP-SDE: {0} and equal steps from 1e-3 to 1. DDPM: the levels themselves; fewer steps keep both ends."""
    np.testing.assert_allclose(VPSDE().sampling_times(1000)[::-1], np.append(0.0, np.linspace(1e-3, 1, 1000)))
    np.testing.assert_array_equal(DDPM().sampling_times(1000), np.arange(999, -2, -1))
    few = DDPM().sampling_times(7)
    assert (few[0], few[-2], few[-1]) == (999, 0, -1)
    assert np.all(np.diff(few) < 0)
    assert DDPM().sampling_times(1).tolist() == [999, -1]
    with pytest.raises(ValueError, match="sampled in 1001"):
        DDPM().sampling_times(1001)
