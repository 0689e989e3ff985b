"""EDM and the solvers of higher order: exact flows of Gaussian data, orders of convergence, parity in float64.

The parity references are written here from the papers' algorithms, in NumPy, step by step and without plans.
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.diffusion.processes import DDPM, EDM, VPSDE, noised
from stabletrain.diffusion.samplers import (
    Plan,
    _normal,
    ddim,
    ddpm,
    dpm_solver_2m,
    dpm_solver_fast,
    follow,
    heun,
    ode_euler,
    solver_orders,
)  # fmt: skip

MEAN, SPREAD = 0.3, 0.4  # pixels of the data: independent, normal


# --- EDM's process ----------------------------------------------------------------------------------------------------


def test_the_grid_is_that_of_the_paper():
    times = EDM().sampling_times(18)
    assert times[0] == pytest.approx(80.0)
    assert times[17] == pytest.approx(0.002)
    assert times[18] == 0
    # (80^(1/7) + 1/17 (0.002^(1/7) - 80^(1/7)))^7
    assert times[1] == pytest.approx((80 ** (1 / 7) * 16 / 17 + 0.002 ** (1 / 7) / 17) ** 7)
    np.testing.assert_allclose(EDM().sampling_times(1), [80.0, 0.0])


def test_preconditioning_is_that_of_the_paper():
    sigma = jnp.array([0.01, 0.5, 40.0])
    skip, out, scale, label = EDM().preconditioning(sigma)
    np.testing.assert_allclose(skip, 0.25 / (sigma**2 + 0.25), rtol=1e-6)
    np.testing.assert_allclose(out, 0.5 * sigma / np.sqrt(sigma**2 + 0.25), rtol=1e-6)
    np.testing.assert_allclose(scale, 1 / np.sqrt(sigma**2 + 0.25), rtol=1e-6)
    np.testing.assert_allclose(label, np.log(sigma) / 4, rtol=1e-6)


def test_input_and_target_of_the_network_have_unit_variance_at_every_level():
    """What the preconditioning is for, with data of standard deviation sigma_data."""
    process, count = EDM(), 200_000
    clean, noise = np.random.default_rng(0).standard_normal((2, count)) * np.array([[0.5], [1.0]])
    for sigma in (0.02, 0.7, 30.0):
        skip, out, scale, _ = (float(part) for part in process.preconditioning(jnp.array(sigma)))
        noisy = clean + sigma * noise
        # standard error of a variance of 200,000 draws: 0.3 %
        assert np.var(scale * noisy) == pytest.approx(1.0, rel=0.015)
        assert np.var((clean - skip * noisy) / out) == pytest.approx(1.0, rel=0.015)


def test_the_loss_is_the_network_s_own_squared_error():
    """lambda (D - y)^2 = (F - (y - c_skip x) / c_out)^2: the weight undoes c_out."""
    process = EDM()
    clean, noise = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 1))
    times = jnp.array([0.05, 1.0, 20.0])
    skip, out, _, _ = (part.reshape(3, 1, 1, 1) for part in process.preconditioning(times))
    target = (clean - skip * noised(process, clean, noise, times)) / out
    found = process.loss(lambda x, label: jnp.sin(x) + label.reshape(-1, 1, 1, 1), clean, noise, times)
    expected = []
    for n in range(3):
        noisy = clean[n] + times[n] * noise[n]
        raw = jnp.sin(noisy / jnp.sqrt(times[n] ** 2 + 0.25)) + jnp.log(times[n]) / 4
        expected.append(float(jnp.mean((raw - target[n]) ** 2)))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_training_levels_are_log_normal():
    process = EDM()
    drawn = np.log(process.draw_times(jax.random.key(0), 20_000))
    assert drawn.mean() == pytest.approx(-1.2, abs=0.04)  # four standard errors
    assert drawn.std() == pytest.approx(1.2, rel=0.02)
    spread = np.log(process.spread_times(1000))
    assert spread.mean() == pytest.approx(-1.2, abs=1e-3)
    assert np.all(np.diff(spread) > 0)


@pytest.mark.parametrize("process", [VPSDE(), EDM()])
def test_times_of_inverts_the_log_snr(process):
    times = np.array([0.002, 0.01, 0.4, 1.0])
    alpha, sigma = process.marginal(times)
    np.testing.assert_allclose(process.times_of(np.log(alpha / sigma)), times, rtol=1e-9)


# --- exact flows ------------------------------------------------------------------------------------------------------


def best_noise(alpha, sigma, noisy):
    """E[noise | noisy] for the Gaussian data."""
    return sigma * (noisy - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)


def carried_through(process, plan: Plan, start: np.ndarray) -> np.ndarray:
    """A deterministic plan with the best estimates, in NumPy float64."""
    noisy, old = start, (0.0, 0.0, 0.0)
    for i in range(plan.steps):
        alpha, sigma = (float(np.asarray(level)[0]) for level in process.marginal(plan.times[i : i + 1]))
        noise = best_noise(alpha, sigma, noisy)
        clean = (noisy - sigma * noise) / alpha
        moved = plan.noisy[i] * noisy + plan.clean[i] * clean + plan.noise[i] * noise
        if plan.memory is not None:
            memory = plan.memory
            moved = moved + memory.base[i] * old[0] + memory.clean[i] * old[1] + memory.noise[i] * old[2]
            if memory.keep[i]:
                old = (noisy, clean, noise)
        noisy = moved
    return noisy


def exact_flow(process, first, last, start):
    """m alpha + sqrt(v_last / v_first) (x - alpha m), v = alpha^2 s^2 + sigma^2: the probability flow of Gaussians."""
    (alpha, sigma), (end_alpha, end_sigma) = (process.marginal(np.array([t], float)) for t in (first, last))
    ratio = np.sqrt((end_alpha**2 * SPREAD**2 + end_sigma**2) / (alpha**2 * SPREAD**2 + sigma**2))
    return end_alpha * MEAN + ratio * (start - alpha * MEAN)


@pytest.mark.parametrize(
    ("process", "sampler", "counts", "order"),
    [
        (EDM(sigma_min=1e-5), ode_euler, (100, 200, 400), 1),
        (EDM(sigma_min=1e-5), ddim, (100, 200, 400), 1),
        (EDM(sigma_min=1e-5), heun, (79, 159, 319), 2),
        (EDM(sigma_min=1e-5), dpm_solver_2m, (160, 320, 640), 2),
        (VPSDE(first_time=1e-6), ode_euler, (800, 1600, 3200), 1),
        (EDM(), dpm_solver_fast, (60, 120, 240), 3),
        (VPSDE(), dpm_solver_fast, (60, 120, 240), 3),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, (VPSDE, EDM)) else getattr(value, "__name__", ""),
)
def test_order_of_convergence_to_the_exact_flow(process, sampler, counts, order):
    start = np.linspace(-1.0, 1.0, 5) * process.prior_scale
    errors = []
    for count in counts:
        plan = sampler(process, count)
        exact = exact_flow(process, plan.times[0], plan.times[-1], start)
        errors.append(np.abs(carried_through(process, plan, start) - exact).max())
    assert errors[-1] < 1e-2
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    # the next order of the expansion, and the grid's finite last step, shift the estimate by a few tenths
    assert np.all(np.abs(orders - order) < 0.4), (errors, orders)


def test_posterior_of_edm_has_the_right_variance():
    """Ancestral sampling with alpha = 1: from variance s^2 + sigma_t^2 to s^2 + sigma_s^2, exactly at any step."""
    plan = ddpm(EDM(), 6)
    total = SPREAD**2 + 80.0**2
    for i in range(6):
        sigma, after = plan.times[i], plan.times[i + 1]
        slope = plan.noisy[i] + plan.clean[i] * SPREAD**2 / (SPREAD**2 + sigma**2)
        left = plan.clean[i] ** 2 * SPREAD**2 * sigma**2 / (SPREAD**2 + sigma**2)  # of the clean image itself
        assert slope**2 * total + plan.fresh[i] ** 2 + left == pytest.approx(SPREAD**2 + after**2)
        total = SPREAD**2 + after**2
    assert plan.fresh[-1] == 0


# --- parity -----------------------------------------------------------------------------------------------------------

SHAPE = (3, 2, 2, 1)


def network(x, label):
    """Any smooth function of both."""
    xp = np if isinstance(x, np.ndarray) else jnp
    return xp.sin(1.3 * x) + 0.1 * xp.cos(0.01 * label).reshape(-1, 1, 1, 1)


def denoised(sigma, x):
    """EDM's D, from the paper's table."""
    total = sigma**2 + 0.25
    raw = network(x / math.sqrt(total), np.full(len(x), math.log(sigma) / 4))
    return 0.25 / total * x + sigma * 0.5 / math.sqrt(total) * raw


def vp_levels(t):
    log_alpha = -0.05 * t - 19.9 / 4 * t * t
    return math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha))


def vp_noise(t, x):
    return network(x, np.full(len(x), 999.0 * t))


def ours(process, plan):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(5), SHAPE[0])
        start = process.prior_scale * jax.random.normal(jax.random.key(6), SHAPE, jnp.float64)
        end = follow(process, plan, network, start, keys)
        fresh = [np.asarray(_normal(keys, i + 1, SHAPE[1:])) for i in range(plan.steps)]
        return np.asarray(start), np.asarray(end), fresh


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)  # both in float64


@pytest.mark.parametrize("churn", [0.0, 20.0])
def test_heun_is_algorithm_2_of_karras(churn):
    steps, looks = 6, 0
    x, found, fresh = ours(EDM(), heun(EDM(), 2 * steps - 1, churn))
    grid = [*((80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(steps)), 0.0]
    for now, after in itertools.pairwise(grid):
        gamma = min(churn / steps, math.sqrt(2) - 1) if 0.05 <= now <= 50 else 0.0
        raised = now + gamma * now
        x = x + math.sqrt(raised**2 - now**2) * 1.003 * fresh[looks]
        slope = (x - denoised(raised, x)) / raised
        moved = x + (after - raised) * slope
        looks += 1
        if after:
            slope_there = (moved - denoised(after, moved)) / after
            moved = x + (after - raised) * 0.5 * (slope + slope_there)
            looks += 1
        x = moved
    assert looks == 2 * steps - 1
    close(found, x)


def test_dpm_solver_2m_is_algorithm_2_of_dpm_solver_plus_plus():
    process, steps = VPSDE(), 7
    plan = dpm_solver_2m(process, steps)
    x, found, _ = ours(process, plan)
    times = [*np.linspace(1.0, 1e-3, steps), 0.0]
    before, log_before = None, None
    for now, after in itertools.pairwise(times):
        (alpha, sigma), (next_alpha, next_sigma) = vp_levels(now), vp_levels(after)
        clean = (x - sigma * vp_noise(now, x)) / alpha
        log_now = math.log(alpha / sigma)
        if after == 0:
            x = next_alpha * clean
            break
        h = math.log(next_alpha / next_sigma) - log_now
        guess = clean
        if before is not None:
            r = (log_now - log_before) / h
            guess = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * before
        x = next_sigma / sigma * x - next_alpha * (math.exp(-h) - 1) * guess
        before, log_before = clean, log_now
    close(found, x)


@pytest.mark.parametrize("evaluations", [6, 7, 8])
def test_dpm_solver_fast_is_the_single_step_algorithm(evaluations):
    process = VPSDE()
    x, found, _ = ours(process, dpm_solver_fast(process, evaluations))
    orders = {6: (3, 2, 1), 7: (3, 3, 1), 8: (3, 3, 2)}[evaluations]

    def time_at(log_snr):
        low, high = 0.0, 1.5  # bisection, unlike the closed form under test
        for _ in range(200):
            middle = 0.5 * (low + high)
            alpha, sigma = vp_levels(middle)
            low, high = (middle, high) if math.log(alpha / sigma) > log_snr else (low, middle)
        return 0.5 * (low + high)

    def log_snr_at(t):
        alpha, sigma = vp_levels(t)
        return math.log(alpha / sigma)

    places = np.linspace(log_snr_at(1.0), log_snr_at(1e-4), len(orders) + 1)
    for order, place, end in zip(orders, places[:-1], places[1:]):
        h, s = end - place, time_at(place)
        (alpha, _), (end_alpha, end_sigma) = vp_levels(s), vp_levels(time_at(end))
        eps = vp_noise(s, x)
        if order == 1:
            x = end_alpha / alpha * x - end_sigma * math.expm1(h) * eps
            continue
        r1, r2 = (0.5, None) if order == 2 else (1 / 3, 2 / 3)
        s1 = time_at(place + r1 * h)
        alpha1, sigma1 = vp_levels(s1)
        eps1 = vp_noise(s1, alpha1 / alpha * x - sigma1 * math.expm1(r1 * h) * eps)
        if order == 2:
            x = end_alpha / alpha * x - end_sigma * math.expm1(h) * (eps + (eps1 - eps) / (2 * r1))
            continue
        s2 = time_at(place + r2 * h)
        alpha2, sigma2 = vp_levels(s2)
        curve = math.expm1(r2 * h) / (r2 * h) - 1
        inner = alpha2 / alpha * x - sigma2 * math.expm1(r2 * h) * eps - sigma2 * r2 / r1 * curve * (eps1 - eps)
        eps2 = vp_noise(s2, inner)
        curve = math.expm1(h) / h - 1
        x = end_alpha / alpha * x - end_sigma * math.expm1(h) * eps - end_sigma / r2 * curve * (eps2 - eps)
    np.testing.assert_allclose(found, x, rtol=1e-8, atol=1e-9)  # the times agree to the rounding of the bisection


def test_probability_flow_euler_is_the_ode_s():
    process = VPSDE()
    x, found, _ = ours(process, ode_euler(process, 5))
    times = [*np.linspace(1.0, 1e-3, 5), 0.0]
    for now, after in itertools.pairwise(times):
        beta, (_, sigma) = 0.1 + 19.9 * now, vp_levels(now)
        x = x + (after - now) * (-0.5 * beta * x + 0.5 * beta / sigma * vp_noise(now, x))
    close(found, x)


# --- the places where a sampler goes wrong ----------------------------------------------------------------------------


def test_fifty_evaluations_are_sixteen_steps_of_order_three_and_one_of_order_two():
    assert solver_orders(50) == (3,) * 16 + (2,)
    assert [sum(solver_orders(count)) for count in range(1, 20)] == list(range(1, 20))
    plan = dpm_solver_fast(VPSDE(), 50)
    assert plan.steps == 50
    assert plan.times[0] == pytest.approx(1.0)
    assert plan.times[-1] == 1e-4  # no denoising step at the end


@pytest.mark.parametrize(("evaluations", "looks"), [(1, 1), (2, 1), (35, 35), (36, 35)])
def test_heun_takes_two_looks_a_step_but_one_at_the_last(evaluations, looks):
    plan = heun(EDM(), evaluations)
    assert plan.steps == looks
    assert not plan.memory.churn.any()


def test_no_noise_is_added_outside_the_range_of_levels_nor_at_the_end():
    plan = heun(EDM(), 35, churn=40.0)
    noisy = np.flatnonzero(plan.memory.churn)
    levels = EDM().sampling_times(18)
    assert len(noisy) == np.sum((levels >= 0.05) & (levels <= 50))
    assert plan.memory.churn[-1] == 0


def test_samplers_keep_the_kind_of_time_of_a_discrete_process():
    for sampler in (heun, dpm_solver_2m):
        assert sampler(DDPM(), 9).times.dtype == np.int32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ode_euler(DDPM(), 5), "no differential equation"),
        (lambda: dpm_solver_fast(DDPM(), 5), "no times between"),
        (lambda: heun(VPSDE(), 5, churn=1.0), "churn needs"),
    ],
)
def test_what_a_process_does_not_allow_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()
