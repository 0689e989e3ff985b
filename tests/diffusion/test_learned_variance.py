"""A network that says the variance of its steps: the bound in closed form, who learns from what, the sampler's ends."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from stabletrain.cli.main import run
from stabletrain.diffusion.guidance import guided
from stabletrain.diffusion.learned_variance import WEIGHT, LearnedVarianceDDPM, log_likelihood_of_pixels
from stabletrain.diffusion.processes import DDPM, Estimate, noised
from stabletrain.diffusion.samplers import SAMPLERS, ddpm_learned, sample

PROCESS = LearnedVarianceDDPM("cosine", 50)
GRID = np.arange(256) / 127.5 - 1.0


def images(count: int) -> tuple[jax.Array, jax.Array]:
    """Clean images on the grid of 256 values, and noise."""
    generator = np.random.default_rng(3)
    shape = (count, 2, 3, 1)
    return jnp.asarray(GRID[generator.integers(0, 256, shape)]), jnp.asarray(generator.standard_normal(shape))


def constant(noise_share: float, v: float):
    """A network that believes a share of the image to be noise, and one variance."""
    return lambda noisy, times: jnp.concatenate([noise_share * noisy, jnp.full_like(noisy, v)], axis=-1)


def test_the_bound_is_the_divergence_of_two_normals_by_bayes_rule():
    """Posterior from prior precision and likelihood, not from the formula in the code; scipy's bins at level 0."""
    with jax.enable_x64(True):
        clean, noise = images(4)
        times = jnp.array([0, 1, 20, 49])
        noisy = noised(PROCESS, clean, noise, times)
        found = PROCESS.estimate(constant(0.7, 0.3), noisy, times)
        bound = np.asarray(PROCESS.bound(found, clean, noisy, times))
        clean, noisy, believed = (np.asarray(array) for array in (clean, noisy, found.clean))
    alpha, sigma = PROCESS.marginal(np.arange(-1, 50))  # index 0 is "no noise"
    for i, level in enumerate(np.asarray(times)):
        a, before_a, before_s = alpha[level + 1], alpha[level], sigma[level]
        step = a / before_a
        beta = 1 - step**2
        if level == 0:
            small = 1 / (1 / beta_of(1) * step_of(1) ** 2 + 1 / sigma[1] ** 2)
            mean = believed[i]  # the posterior of level 0 is the clean image itself
            scale = np.exp(0.5 * (0.65 * np.log(beta) + 0.35 * np.log(small)))
            upper = np.where(clean[i] > 0.999, np.inf, clean[i] + 1 / 255)
            lower = np.where(clean[i] < -0.999, -np.inf, clean[i] - 1 / 255)
            expected = -np.log(stats.norm.cdf(upper, mean, scale) - stats.norm.cdf(lower, mean, scale))
        else:
            small = 1 / (step**2 / beta + 1 / before_s**2)

            def mean_given(x0, i=i, small=small, step=step, beta=beta, before_a=before_a, before_s=before_s):
                return small * (step * noisy[i] / beta + before_a * x0 / before_s**2)

            variance = np.exp(0.65 * np.log(beta) + 0.35 * np.log(small))
            gap = (mean_given(clean[i]) - mean_given(believed[i])) ** 2
            expected = 0.5 * (np.log(variance / small) + (small + gap) / variance - 1)
        np.testing.assert_allclose(bound[i], expected.mean() / np.log(2), rtol=1e-6, err_msg=f"level {level}")


def step_of(level: int) -> float:
    alpha, _ = PROCESS.marginal(np.array([level - 1, level]))
    return float(alpha[1] / alpha[0])


def beta_of(level: int) -> float:
    return 1 - step_of(level) ** 2


def test_the_masses_of_all_256_values_sum_to_one_and_far_ones_stay_finite():
    pixels = jnp.asarray(GRID, jnp.float32).reshape(1, -1, 1, 1)
    for mean, log_scale in ((0.1, -3.0), (-1.0, -5.0), (0.9, 0.5)):
        mass = log_likelihood_of_pixels(pixels, jnp.full_like(pixels, mean), jnp.full_like(pixels, log_scale))
        assert float(jnp.exp(mass).sum()) == pytest.approx(1.0, abs=1e-3)  # float32 differences of tails
    value, slope = jax.value_and_grad(lambda m: log_likelihood_of_pixels(pixels, m, -5.0 + 0 * pixels).sum())(
        jnp.full_like(pixels, 1.0)
    )
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


def test_the_bound_teaches_the_variance_only_and_the_error_the_mean_only():
    clean, noise = images(3)
    times = jnp.array([0, 10, 40])

    def loss(process, parts):
        return process.loss(lambda noisy, t: jnp.concatenate(parts, axis=-1), clean, noise, times).sum()

    parts = (0.5 * noise, jnp.full_like(noise, 0.2))
    of_noise, of_variance = jax.grad(lambda p: loss(PROCESS, p))(parts)
    plain = jax.grad(lambda n: DDPM("cosine", 50).loss(lambda noisy, t: n, clean, noise, times).sum())(parts[0])
    np.testing.assert_allclose(of_noise, plain, rtol=1e-5, atol=1e-7)
    assert float(jnp.abs(of_variance).min()) > 0


def test_for_the_true_mean_the_best_variance_is_the_posterior_s():
    """Then the divergence is zero; its weight in the loss is 0.001 times the number of levels."""
    clean, noise = images(3)
    times = jnp.array([5, 10, 40])
    noisy = noised(PROCESS, clean, noise, times)

    def bound(share):
        return PROCESS.bound(Estimate(clean, noise, jnp.full_like(clean, share)), clean, noisy, times)

    np.testing.assert_allclose(bound(0.0), 0.0, atol=1e-6)
    assert np.all(bound(0.3) > 1e-6)  # the two variances are nearly one at high levels
    loss = PROCESS.loss(lambda n, t: jnp.concatenate([noise, jnp.full_like(n, -0.4)], axis=-1), clean, noise, times)
    np.testing.assert_allclose(loss, WEIGHT * 50 * bound(0.3), rtol=2e-3)  # float32: the mean is from the noise


@pytest.mark.parametrize(("v", "same"), [(-1.0, "ddpm"), (1.0, "ddpm-large")])
def test_the_ends_of_the_variance_are_the_two_ancestral_samplers(v, same):
    keys = jax.random.split(jax.random.key(0), 4)
    plain = DDPM("cosine", 50)

    def images_of(process, plan, network):
        return jax.jit(lambda k: sample(process, plan, network, k, (2, 2, 1), clip=True))(keys)

    learned = images_of(PROCESS, ddpm_learned(PROCESS, 10), constant(0.9, v))
    fixed = images_of(plain, SAMPLERS[same](plain, 10), lambda noisy, times: 0.9 * noisy)
    np.testing.assert_allclose(learned, fixed, rtol=2e-5, atol=2e-5)
    assert ddpm_learned(PROCESS, 10).fresh[-1] == 0


def test_a_network_without_a_variance_cannot_be_asked_for_it():
    process = DDPM("cosine", 50)
    with pytest.raises(TypeError, match="say no variance"):
        sample(process, ddpm_learned(process, 5), lambda x, t: x, jax.random.split(jax.random.key(0), 1), (1, 1, 1))


def test_guidance_mixes_the_noise_and_takes_the_variance_of_the_labelled_network():
    noisy, labels = jnp.ones((2, 1, 1, 1)), jnp.array([0, 1])
    network = guided(lambda x, t, c: jnp.concatenate([x * c[:, None, None, None], x + 10.0 * c[0]], -1), labels, 2, 3.0)
    out = network(noisy, jnp.zeros(2))
    np.testing.assert_allclose(out[:, 0, 0, 0], [2 + 3 * (0 - 2), 2 + 3 * (1 - 2)])
    np.testing.assert_allclose(out[:, 0, 0, 1], 1.0)


def test_train_and_sample_with_few_levels_and_a_learned_variance(tmp_path):
    out = tmp_path / "run"
    command = [
        "diffusion", "--process", "ddpm-cosine", "--diffusion-steps", "20", "--learned-variance", "--sampler",
        "ddpm-learned", "--sampling-steps", "5", "--width", "8", "--depth", "1", "--channel-multipliers", "1",
        "--steps", "2", "--batch-size", "8", "--eval-samples", "0", "--eval-pairs", "8", "--out", str(out), "--quiet",
    ]  # fmt: skip
    assert run(command) == 0
    assert run(["sample", str(out), "--num", "2", "--out", str(tmp_path / "samples"), "--sampling-steps", "3"]) == 0
    assert len(list((tmp_path / "samples").glob("*.png"))) == 3  # two images and their grid


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--learned-variance"], "does nothing with --process vp-sde"),
        (["--diffusion-steps", "50"], "does nothing with --process vp-sde"),
        (["--process", "ddpm-linear", "--sampler", "ddpm-learned"], "only one with --learned-variance says"),
        (["--process", "ddpm-linear", "--diffusion-steps", "40"], "more than the 40 levels"),
        (["--backbone", "uvit", "--process", "ddpm-linear", "--learned-variance"], "it belongs to unet"),
    ],
)
def test_what_makes_no_sense_is_refused(options, reason, capsys):
    assert run(["diffusion", "--dry-run", *options]) == 2
    assert reason in " ".join(capsys.readouterr().err.split())


def test_an_estimate_that_is_clipped_keeps_its_variance():
    from stabletrain.diffusion.processes import clip_clean

    noisy, times = jnp.full((1, 1, 1, 1), 3.0), jnp.array([10])
    estimate = Estimate(noisy, noisy, jnp.full_like(noisy, 0.25))
    assert clip_clean(PROCESS, estimate, noisy, times).variance_share == estimate.variance_share
    assert dataclasses.astuple(PROCESS) == ("cosine", 50)
