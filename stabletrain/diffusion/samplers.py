"""Samplers: from noise to images, each whole trajectory one compiled program.

Every sampler here takes, at each of its times, one look at the noisy image and then a step that is linear in what it
sees:

    next = a noisy + b clean + c noise + d fresh,

with `clean` and `noise` the process's estimates and `fresh` new Gaussian noise. A sampler is therefore four columns of
numbers, worked out once on the host in float64 (differences such as 1 - alpha_t^2 / alpha_s^2 lose three digits in
float32), and one `scan` runs them all. In every sampler the last step adds no noise (d = 0): leaving it in is a known
way of spoiling samples.

**Source** Ho et al. 2020 (ancestral); Song, Meng and Ermon 2021 (DDIM); Song et al. 2021 (reverse SDE), on the grid of
the official ScaleLong and U-ViT code: {0} and 1,000 equal steps from 1e-3 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.diffusion.processes import Array, Network, Process, clip_clean


@dataclass(frozen=True)
class Plan:
    """A sampler's steps on a given process: times [N + 1] and the coefficients of each step [N], float64."""

    times: np.ndarray
    noisy: np.ndarray
    clean: np.ndarray
    noise: np.ndarray
    fresh: np.ndarray

    @property
    def steps(self) -> int:
        """Network evaluations of a trajectory."""
        return len(self.noisy)


@dataclass(frozen=True)
class _Grid:
    """The levels between which the steps go: now (t) -> next (s)."""

    times: np.ndarray  # [N + 1]
    alpha: np.ndarray  # [N]
    sigma: np.ndarray
    next_alpha: np.ndarray
    next_sigma: np.ndarray

    @property
    def spread(self) -> np.ndarray:
        """1 - (alpha_t / alpha_s)^2: the variance of the forward step from s to t."""
        return 1.0 - np.square(self.alpha / self.next_alpha)


def _grid(process: Process, steps: int) -> _Grid:
    if steps < 1:
        raise ValueError(f"a trajectory has at least one step, not {steps}")
    times = process.sampling_times(steps)
    alpha, sigma = (np.asarray(level, np.float64) for level in process.marginal(times))
    return _Grid(times, alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])


def ddim(process: Process, steps: int, eta: float = 0.0) -> Plan:
    """Denoising diffusion implicit models; `eta` 0 is deterministic, 1 has the noise of the ancestral sampler.

    Source: Song, Meng and Ermon 2021, Eqs. 12 and 16.
    """
    grid = _grid(process, steps)
    fresh = eta * grid.next_sigma / grid.sigma * np.sqrt(grid.spread)
    along = np.sqrt(np.square(grid.next_sigma) - np.square(fresh))
    return Plan(grid.times, np.zeros_like(fresh), grid.next_alpha, along, fresh)


def _ancestral(process: Process, steps: int, large: bool) -> Plan:
    grid = _grid(process, steps)
    share = np.square(grid.next_sigma / grid.sigma)
    keep = grid.alpha / grid.next_alpha * share
    clean = grid.next_alpha * grid.spread / np.square(grid.sigma)
    variance = grid.spread * (np.where(grid.next_sigma > 0, 1.0, 0.0) if large else share)
    return Plan(grid.times, keep, clean, np.zeros_like(keep), np.sqrt(variance))


def ddpm(process: Process, steps: int) -> Plan:
    """Ancestral sampling with the posterior's variance ("fixed small").

    Source: Ho et al. 2020, Eqs. 6 and 7; with fewer steps than levels, the same for the coarser chain.
    """
    return _ancestral(process, steps, large=False)


def ddpm_large(process: Process, steps: int) -> Plan:
    """Ancestral sampling with the forward step's variance ("fixed large"), which DDPM uses for CIFAR-10."""
    return _ancestral(process, steps, large=True)


def euler_maruyama(process: Process, steps: int) -> Plan:
    """Euler-Maruyama steps on the reverse SDE: x + (beta x / 2 + beta score) h + sqrt(beta h) z, h > 0.

    Source: Song et al. 2021, Eq. 6. Raises: `TypeError` for a process that is no SDE.
    """
    if not hasattr(process, "beta"):
        raise TypeError(f"{type(process).__name__} is no stochastic differential equation")
    grid = _grid(process, steps)
    change = np.asarray(process.beta(grid.times[:-1]), np.float64) * -np.diff(grid.times)
    fresh = np.where(grid.next_sigma > 0, np.sqrt(change), 0.0)
    return Plan(grid.times, 1.0 + 0.5 * change, np.zeros_like(change), -change / grid.sigma, fresh)


SAMPLERS: Mapping[str, Callable[[Process, int], Plan]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "ddpm-large": ddpm_large,
    "euler-maruyama": euler_maruyama,
}
"""By the name of the option `--sampler`. `ddim` takes `eta` as well."""


def initial_noise(process: Process, keys: Array, shape: tuple[int, ...]) -> Array:
    """What trajectories start from: one draw [B, *shape] per key [B]."""
    return process.prior_scale * _normal(keys, 0, shape)


def _normal(keys: Array, draw: int | Array, shape: tuple[int, ...]) -> Array:
    # A key per image: image n of a seed is the same in whatever batch, and on however many devices, it is made.
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, draw), shape))(keys)


def sample(
    process: Process, plan: Plan, network: Network, keys: Array, shape: tuple[int, ...], *, clip: bool = False
) -> Array:
    """Images [B, *shape] from one random key each [B]; to be called inside `jit`.

    `clip` keeps the estimated clean image in [-1, 1] at every step. The result is not clipped.
    """
    start = initial_noise(process, keys, shape)
    return follow(process, plan, network, start, keys, clip=clip)


def follow(process: Process, plan: Plan, network: Network, start: Array, keys: Array, *, clip: bool = False) -> Array:
    """The trajectory that begins at `start` [B, H, W, C]; the noise of step i is draw i + 1 of each key."""
    random = bool(np.any(plan.fresh))
    columns = np.stack([plan.noisy, plan.clean, plan.noise, plan.fresh], axis=1)  # (N, 4)

    def step(noisy: Array, now: tuple[Array, Array, Array]) -> tuple[Array, None]:
        index, time, (of_noisy, of_clean, of_noise, of_fresh) = now
        times = jnp.full(noisy.shape[:1], time)
        estimate = process.estimate(network, noisy, times)
        if clip:
            estimate = clip_clean(process, estimate, noisy, times)
        moved = of_noisy * noisy + of_clean * estimate.clean + of_noise * estimate.noise
        if random:
            moved = moved + of_fresh * _normal(keys, index + 1, noisy.shape[1:])
        return moved.astype(start.dtype), None

    schedule = (jnp.arange(plan.steps), jnp.asarray(plan.times[:-1]), jnp.asarray(columns, start.dtype))
    final, _ = jax.lax.scan(step, start, schedule)
    return final
