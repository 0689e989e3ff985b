"""The samplers as the papers' algorithms have them, in NumPy, step by step and without plans.

A network here is any function (noisy [B, H, W, C], its time) -> [B, H, W, C or 2 C]; `torch_reference` gives PyTorch's.
Nothing of the package is used: schedules, preconditioning, grids and updates are written again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Case = dict[str, Any]

TRAJECTORIES: dict[str, Case] = {
    "ddim on vp-sde": {"process": "vp-sde", "sampler": "ddim", "steps": 6},
    "ddim on ddpm-linear, eta 0.5": {"process": "ddpm-linear", "sampler": "ddim", "steps": 6, "eta": 0.5},
    "ddpm on ddpm-linear": {"process": "ddpm-linear", "sampler": "ddpm", "steps": 6},
    "ddpm-large on ddpm-cosine": {"process": "ddpm-cosine", "sampler": "ddpm-large", "steps": 6},
    "ddpm-learned on ddpm-linear": {
        "process": "ddpm-linear", "sampler": "ddpm-learned", "steps": 6, "network": "variance",
    },
    "euler-maruyama on vp-sde": {"process": "vp-sde", "sampler": "euler-maruyama", "steps": 6},
    "ode-euler on vp-sde": {"process": "vp-sde", "sampler": "ode-euler", "steps": 6},
    "ode-euler on edm": {"process": "edm", "sampler": "ode-euler", "steps": 6},
    "heun on vp-sde": {"process": "vp-sde", "sampler": "heun", "steps": 7},
    "heun on edm": {"process": "edm", "sampler": "heun", "steps": 7},
    "heun on edm, churn 20": {"process": "edm", "sampler": "heun", "steps": 7, "churn": 20.0},
    "dpm-solver-2m on vp-sde": {"process": "vp-sde", "sampler": "dpm-solver-2m", "steps": 6},
    "dpm-solver-2m on ddpm-scaled-linear, texts, w = 2": {
        "process": "ddpm-scaled-linear", "sampler": "dpm-solver-2m", "steps": 6, "network": "texts",
    },
    **{
        f"dpm-solver-fast on vp-sde, {n} evaluations": {"process": "vp-sde", "sampler": "dpm-solver-fast", "steps": n}
        for n in (6, 7, 8)
    },
}  # fmt: skip
"""Each sampler on a process that it is for; the network is a U-ViT unless the case says another."""

GUIDANCE = 2.0


class Level(NamedTuple):
    """A level of noise: what the network is told of it, and noisy = alpha clean + sigma noise."""

    told: float
    alpha: float
    sigma: float


# --- processes --------------------------------------------------------------------------------------------------------


def vp_level(t: float) -> Level:
    """Song et al. 2021: beta from 0.1 to 20; the network is told 999 t."""
    log_alpha = -0.05 * t - 19.9 / 4 * t * t
    return Level(999.0 * t, math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha)))


def vp_beta(t: float) -> float:
    return 0.1 + 19.9 * t


def vp_times(steps: int) -> list[float]:
    return [1.0 - (1.0 - 1e-3) * i / (steps - 1) for i in range(steps)] + [0.0]


def kept(schedule: str) -> list[float]:
    """The product of 1 - beta over the first levels of a thousand."""
    if schedule == "cosine":
        level = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
        betas = [min(1 - level[i + 1] / level[i], 0.999) for i in range(1000)]
    elif schedule == "linear":
        betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    else:
        low, high = math.sqrt(0.00085), math.sqrt(0.012)
        betas = [(low + (high - low) * i / 999) ** 2 for i in range(1000)]
    return list(itertools.accumulate((1 - beta for beta in betas), lambda product, left: product * left))


def edm_level(sigma: float) -> Level:
    """Karras et al. 2022: the network is told ln(sigma) / 4."""
    return Level(math.log(sigma) / 4 if sigma else math.nan, 1.0, sigma)


def grid(process: str, steps: int) -> list[Level]:
    """The levels from noise to none."""
    if process == "vp-sde":
        return [vp_level(t) for t in vp_times(steps)]
    if process == "edm":
        ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
        places = [(ends[0] + i / (steps - 1) * (ends[1] - ends[0])) ** 7 for i in range(steps)]
        return [edm_level(place) for place in [*places, 0.0]]
    schedule = process.removeprefix("ddpm-")
    left, first = kept(schedule), 1 if schedule == "scaled-linear" else 0
    numbers = [round(999 * (1 - i / (steps - 1))) for i in range(steps)]
    return [Level(n + first, math.sqrt(left[n]), math.sqrt(1 - left[n])) for n in numbers] + [Level(math.nan, 1.0, 0.0)]


class Watched:
    """Estimates of the clean image and the noise, and a record of everything that the network was shown."""

    def __init__(self, network: Callable[[Array, float], Array], process: str) -> None:
        self.network, self.process = network, process
        self.images: list[Array] = []
        self.times: list[float] = []

    def __call__(self, level: Level, x: Array) -> tuple[Array, Array, Array | None]:
        """(clean, noise, what the network says beyond the image's channels)."""
        if self.process == "edm":
            total = level.sigma**2 + 0.5**2
            raw = self._shown(x / math.sqrt(total), level.told)
            clean = 0.5**2 / total * x + level.sigma * 0.5 / math.sqrt(total) * raw
            return clean, (x - clean) / level.sigma, None
        raw = self._shown(x, level.told)
        channels = x.shape[-1]
        noise, more = raw[..., :channels], raw[..., channels:]
        return (x - level.sigma * noise) / level.alpha, noise, more if more.size else None

    def _shown(self, x: Array, told: float) -> Array:
        self.images.append(x)
        self.times.append(told)
        return self.network(x, told)


# --- samplers ---------------------------------------------------------------------------------------------------------


def ddim(look: Watched, x: Array, levels: list[Level], noise: Iterator[Array], eta: float) -> Array:
    """Song, Meng and Ermon 2021, Eqs. 12 and 16."""
    for now, after in itertools.pairwise(levels):
        clean, eps, _ = look(now, x)
        step = (now.alpha / after.alpha) ** 2
        spread = eta * math.sqrt(after.sigma**2 / now.sigma**2 * max(1 - step, 0.0)) if after.sigma else 0.0
        x = after.alpha * clean + math.sqrt(after.sigma**2 - spread**2) * eps + spread * next(noise)
    return x


def ancestral(look: Watched, x: Array, levels: list[Level], noise: Iterator[Array], variance: str) -> Array:
    """Ho et al. 2020, Eqs. 6 and 7; the learned variance is Eq. 15 of Nichol and Dhariwal 2021. The last adds none."""
    for now, after in itertools.pairwise(levels):
        clean, _, says = look(now, x)
        step = (now.alpha / after.alpha) ** 2  # Ho et al.'s alpha_t; 1 - step is their beta_t
        beta = 1 - step
        mean = after.alpha * beta / now.sigma**2 * clean + math.sqrt(step) * after.sigma**2 / now.sigma**2 * x
        fresh = next(noise)
        if not after.sigma:
            return mean
        small = beta * after.sigma**2 / now.sigma**2
        if variance == "learned":
            share = (says + 1) / 2
            x = mean + np.exp(0.5 * (share * math.log(beta) + (1 - share) * math.log(small))) * fresh
        else:
            x = mean + math.sqrt(beta if variance == "large" else small) * fresh
    return x


def euler_maruyama(look: Watched, x: Array, steps: int, noise: Iterator[Array]) -> Array:
    """Song et al. 2021, Eq. 6, from t = 1 to 0; the last step is noise-free."""
    for now, after in itertools.pairwise(vp_times(steps)):
        _, eps, _ = look(vp_level(now), x)
        beta, fresh = vp_beta(now), next(noise)
        drift = -0.5 * beta * x + beta * eps / vp_level(now).sigma
        x = x - (now - after) * drift + (math.sqrt(beta * (now - after)) * fresh if after else 0.0)
    return x


def ode_euler(look: Watched, x: Array, process: str, steps: int) -> Array:
    """Song et al. 2021, Eq. 13; Karras et al. 2022, Eq. 1."""
    if process == "edm":
        for now, after in itertools.pairwise(grid("edm", steps)):
            clean, _, _ = look(now, x)
            x = x + (after.sigma - now.sigma) * (x - clean) / now.sigma
        return x
    for now, after in itertools.pairwise(vp_times(steps)):
        _, eps, _ = look(vp_level(now), x)
        x = x + (after - now) * (-0.5 * vp_beta(now) * x + 0.5 * vp_beta(now) / vp_level(now).sigma * eps)
    return x


def heun(look: Watched, x: Array, levels: list[Level], noise: list[Array], churn: float) -> Array:
    """Karras et al. 2022, Algorithm 2, in x / alpha and sigma / alpha; `noise` is by evaluation."""
    steps = len(levels) - 1
    for now, after in itertools.pairwise(levels):
        y, here, there = x / now.alpha, now.sigma / now.alpha, after.sigma / after.alpha
        if churn and 0.05 <= here <= 50:
            raised = here * (1 + min(churn / steps, math.sqrt(2) - 1))
            y = y + math.sqrt(raised**2 - here**2) * 1.003 * noise[len(look.times)]
            here, now = raised, edm_level(raised)
        clean, _, _ = look(now, now.alpha * y)
        slope = (y - clean) / here
        moved = y + (there - here) * slope
        if there:
            clean, _, _ = look(after, after.alpha * moved)
            moved = y + (there - here) * 0.5 * (slope + (moved - clean) / there)
        x = after.alpha * moved
    return x


def dpm_solver_2m(look: Watched, x: Array, levels: list[Level]) -> Array:
    """Lu et al. 2022b, Algorithm 2."""
    before, log_before = None, 0.0
    for now, after in itertools.pairwise(levels):
        clean, _, _ = look(now, x)
        if not after.sigma:
            return after.alpha * clean
        log_now = math.log(now.alpha / now.sigma)
        h = math.log(after.alpha / after.sigma) - log_now
        guess = clean
        if before is not None:
            r = (log_now - log_before) / h
            guess = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * before
        x = after.sigma / now.sigma * x - after.alpha * (math.exp(-h) - 1) * guess
        before, log_before = clean, log_now
    return x


def dpm_solver_fast(look: Watched, x: Array, evaluations: int) -> Array:
    """Lu et al. 2022a, Algorithms 1 and 2, from t = 1 to 1e-4 on the VP-SDE."""
    orders = {6: (3, 2, 1), 7: (3, 3, 1), 8: (3, 3, 2)}[evaluations]

    def log_snr(t: float) -> float:
        return math.log(vp_level(t).alpha / vp_level(t).sigma)

    def level_at(place: float) -> Level:
        low, high = 0.0, 1.5  # bisection, where the package has a closed form
        for _ in range(200):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if log_snr(middle) > place else (low, middle)
        return vp_level(0.5 * (low + high))

    places = np.linspace(log_snr(1.0), log_snr(1e-4), len(orders) + 1)
    for order, place, end in zip(orders, places[:-1], places[1:]):
        h, s, t = end - place, level_at(place), level_at(end)
        _, eps, _ = look(s, x)
        if order == 1:
            x = t.alpha / s.alpha * x - t.sigma * math.expm1(h) * eps
            continue
        r1, r2 = (0.5, 0.0) if order == 2 else (1 / 3, 2 / 3)
        s1 = level_at(place + r1 * h)
        _, eps1, _ = look(s1, s1.alpha / s.alpha * x - s1.sigma * math.expm1(r1 * h) * eps)
        if order == 2:
            x = t.alpha / s.alpha * x - t.sigma * math.expm1(h) * (eps + (eps1 - eps) / (2 * r1))
            continue
        s2 = level_at(place + r2 * h)
        curve = math.expm1(r2 * h) / (r2 * h) - 1
        inner = s2.alpha / s.alpha * x - s2.sigma * math.expm1(r2 * h) * eps - s2.sigma * r2 / r1 * curve * (eps1 - eps)
        _, eps2, _ = look(s2, inner)
        curve = math.expm1(h) / h - 1
        x = t.alpha / s.alpha * x - t.sigma * math.expm1(h) * eps - t.sigma / r2 * curve * (eps2 - eps)
    return x


def trajectory(case: Case, network: Callable[[Array, float], Array], start: Array, noise: Array) -> dict[str, Array]:
    """Everything that the network is shown on the way, what it is told, and the end.

    `start` [B, H, W, C] is of unit variance, `noise` [steps, B, H, W, C] that of each evaluation.
    """
    process, sampler, steps = case["process"], case["sampler"], case["steps"]
    look, x = Watched(network, process), start * (80.0 if process == "edm" else 1.0)
    if sampler == "ddim":
        end = ddim(look, x, grid(process, steps), iter(noise), case.get("eta", 0.0))
    elif sampler.startswith("ddpm"):
        end = ancestral(look, x, grid(process, steps), iter(noise), sampler.removeprefix("ddpm").removeprefix("-"))
    elif sampler == "euler-maruyama":
        end = euler_maruyama(look, x, steps, iter(noise))
    elif sampler == "ode-euler":
        end = ode_euler(look, x, process, steps)
    elif sampler == "heun":
        end = heun(look, x, grid(process, (steps + 1) // 2), list(noise), case.get("churn", 0.0))
    elif sampler == "dpm-solver-2m":
        end = dpm_solver_2m(look, x, grid(process, steps))
    else:
        end = dpm_solver_fast(look, x, steps)
    return {"shown": np.stack(look.images), "told": np.array(look.times, np.float64), "end": end}
