"""EDM and the solvers of higher order: exact flows of Gaussian data, orders of convergence.

Their trajectories are compared with the papers' algorithms in `test_trajectories`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.diffusion.processes import DDPM, EDM, VPSDE, noised
from stabletrain.diffusion.samplers import (
    Plan,
    ddim,
    ddpm,
    dpm_solver_2m,
    dpm_solver_fast,
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
