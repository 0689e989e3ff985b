"""Samplers: from noise to images, each whole trajectory one compiled program.

Every sampler here takes, at each of its times, one look at the noisy image and then a step that is linear in what it
sees:

    next = a noisy + b clean + c noise + d fresh,

with `clean` and `noise` the process's estimates and `fresh` new Gaussian noise. Samplers of higher order remember one
earlier look (its noisy image, its clean image, its noise), and their steps are linear in that as well. A sampler is
therefore a few columns of numbers, worked out once on the host in float64 (differences such as
1 - alpha_t^2 / alpha_s^2 lose three digits in float32), and one `scan` runs them all. In every sampler the last step
adds no noise (d = 0): leaving it in is a known way of spoiling samples.

**Source** Ho et al. 2020 (ancestral); Song, Meng and Ermon 2021 (DDIM); Song et al. 2021 (reverse SDE and probability
flow), on the grid of the official ScaleLong and U-ViT code: {0} and 1,000 equal steps from 1e-3 to 1; Lu et al. 2022
(DPM-Solver, DPM-Solver++); Karras et al. 2022 (Heun, with churn); Nichol and Dhariwal 2021 (a learned variance).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.diffusion.processes import EDM, Array, Invertible, Network, Process, clip_clean


@dataclass(frozen=True)
class Memory:
    """What a sampler of higher order does besides; columns [N], float64 and bool.

    `churn` times new noise is added to the image before the look. Where `keep` is true, the image and both estimates
    of this look are remembered, after the step; the step itself uses what was remembered before.
    """

    base: np.ndarray
    clean: np.ndarray
    noise: np.ndarray
    keep: np.ndarray
    churn: np.ndarray


@dataclass(frozen=True)
class Plan:
    """A sampler's steps on a given process: times [N + 1] and the coefficients of each step [N], float64."""

    times: np.ndarray
    noisy: np.ndarray
    clean: np.ndarray
    noise: np.ndarray
    fresh: np.ndarray
    memory: Memory | None = None
    small_fresh: np.ndarray | None = None
    """Where the network says its variance: the coefficient for a share of 0, `fresh` being that for 1."""

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
        """sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2: the variance of the forward step from s to t."""
        return np.square(self.sigma) - np.square(self.alpha / self.next_alpha * self.next_sigma)


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


def ddpm_learned(process: Process, steps: int) -> Plan:
    """Ancestral sampling with a variance between those two, as the network says for each pixel.

    Source: Nichol and Dhariwal 2021, Eq. 15; with fewer steps than levels, between the coarser chain's (Section 4).
    Differs: the last step adds no noise, as everywhere here. `follow` raises `TypeError` for a network that says none.
    """
    plan, small = _ancestral(process, steps, large=True), _ancestral(process, steps, large=False)
    return dataclasses.replace(plan, small_fresh=small.fresh)


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


def ode_euler(process: Process, steps: int) -> Plan:
    """Euler steps on the probability-flow ODE, in the process's own time.

    dx/dt = -beta x / 2 + beta noise / (2 sigma) for the VP-SDE, dx/dsigma = noise for EDM.
    Source: Song et al. 2021, Eq. 13; Karras et al. 2022, Eq. 1. Raises: `TypeError` for a process in discrete time.
    """
    grid = _grid(process, steps)
    zero = np.zeros_like(grid.sigma)
    if hasattr(process, "beta"):
        change = np.asarray(process.beta(grid.times[:-1]), np.float64) * -np.diff(grid.times)
        return Plan(grid.times, 1.0 + 0.5 * change, zero, -0.5 * change / grid.sigma, zero)
    if not isinstance(process, EDM):
        raise TypeError(f"{type(process).__name__} is no differential equation")
    return Plan(grid.times, zero + 1.0, zero, np.diff(grid.times), zero)


class _Stages:
    """Builds a plan with memory, one look after the other."""

    columns = ("time", "noisy", "clean", "noise", "base", "old_clean", "old_noise", "keep", "churn")

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def look(self, **values: float) -> None:
        """One look at `time` and the step after it; what is not given is 0."""
        self.rows.append(values)

    def plan(self, end: np.ndarray) -> Plan:
        """The plan, whose trajectory ends at time `end` [1], in that array's kind of time."""
        of = {name: np.array([row.get(name, 0.0) for row in self.rows]) for name in self.columns}
        memory = Memory(of["base"], of["old_clean"], of["old_noise"], of["keep"].astype(bool), of["churn"])
        times = np.append(of["time"], end).astype(end.dtype)
        return Plan(times, of["noisy"], of["clean"], of["noise"], np.zeros(len(self.rows)), memory)


CHURN_RANGE = (0.05, 50.0)
CHURN_NOISE = 1.003
"""S_tmin, S_tmax and S_noise of Karras et al. 2022, Table 5 (ImageNet-64)."""


def heun(process: Process, evaluations: int, churn: float = 0.0) -> Plan:
    """Heun's second-order steps on the probability-flow ODE of x / alpha in sigma / alpha; the last one is Euler's.

    n steps take 2 n - 1 evaluations: of an even number, one is left out. `churn` is S_churn: before each step within
    the range of levels, noise is added up to the level (1 + min(S_churn / n, sqrt(2) - 1)) sigma.
    Source: Karras et al. 2022, Algorithm 2. Raises: `TypeError` for churn on another process than EDM.
    """
    if churn and not isinstance(process, EDM):
        raise TypeError(f"churn needs a continuous range of noise levels, which {type(process).__name__} has not")
    steps = (evaluations + 1) // 2
    grid = _grid(process, steps)
    more = min(churn / steps, 2.0**0.5 - 1.0)
    stages = _Stages()
    for i in range(steps):
        time, alpha, next_alpha = float(grid.times[i]), grid.alpha[i], grid.next_alpha[i]
        now, after = grid.sigma[i] / alpha, grid.next_sigma[i] / next_alpha
        added = 0.0
        if more and CHURN_RANGE[0] <= now <= CHURN_RANGE[1]:
            added = CHURN_NOISE * now * np.sqrt((1.0 + more) ** 2 - 1.0)
            now *= 1.0 + more
            time = now  # EDM's time is its level
        step, ratio = after - now, next_alpha / alpha
        stages.look(time=time, noisy=ratio, noise=next_alpha * step, keep=True, churn=added)
        if grid.next_sigma[i] > 0:
            half = 0.5 * next_alpha * step
            stages.look(time=float(grid.times[i + 1]), base=ratio, old_noise=half, noise=half)
    return stages.plan(grid.times[-1:])


def dpm_solver_2m(process: Process, steps: int) -> Plan:
    """DPM-Solver++(2M): second order from the last two clean images; first order at the first and the last step.

    Source: Lu et al. 2022b, Algorithm 2, on the process's own grid.
    """
    grid = _grid(process, steps)
    log_snr = np.log(grid.alpha / grid.sigma)
    stages = _Stages()
    for i in range(steps):
        if grid.next_sigma[i] == 0:  # an infinite step in log-SNR
            stages.look(time=float(grid.times[i]), clean=grid.next_alpha[i], keep=True)
            continue
        step = np.log(grid.next_alpha[i] / grid.next_sigma[i]) - log_snr[i]
        whole = -grid.next_alpha[i] * np.expm1(-step)
        ahead = 0.0 if i == 0 else step / (2.0 * (log_snr[i] - log_snr[i - 1]))
        stages.look(
            time=float(grid.times[i]),
            noisy=grid.next_sigma[i] / grid.sigma[i],
            clean=whole * (1.0 + ahead),
            old_clean=-whole * ahead,
            keep=True,
        )
    return stages.plan(grid.times[-1:])


def solver_orders(evaluations: int) -> tuple[int, ...]:
    """Orders of the steps of DPM-Solver-fast: threes, then what is left. Lu et al. 2022a, Section 3.4."""
    threes, left = divmod(evaluations, 3)
    if left == 0:
        return (3,) * (threes - 1) + (2, 1)
    return (3,) * threes + (left,)


def dpm_solver_fast(process: Process, evaluations: int) -> Plan:
    """DPM-Solver-fast: single-step orders 3, ..., 3, then 2 or 1, between times of uniformly spaced log-SNR.

    From the first time to `solver_end` (1e-4 for the VP-SDE), without a denoising step at the end: the sampler of the
    U-ViT tables. Source: Lu et al. 2022a, Algorithms 1 and 2. Raises: `TypeError` for a process in discrete time.
    """
    if not hasattr(process, "times_of"):
        raise TypeError(f"{type(process).__name__} has no times between its levels")
    orders = solver_orders(evaluations)
    ends: Invertible = process  # type: ignore[assignment]
    first, last = (float(_log_snr(process, np.array([time]))[0]) for time in (_start(process), ends.solver_end))
    places = np.linspace(first, last, len(orders) + 1)
    stages = _Stages()
    for order, place, step in zip(orders, places[:-1], np.diff(places), strict=True):

        def at(share: float, place: float = place, step: float = step) -> tuple[float, float, float]:
            time = ends.times_of(np.array([place + share * step]))
            alpha, sigma = (np.asarray(level, np.float64) for level in process.marginal(time))
            return float(time[0]), float(alpha[0]), float(sigma[0])

        time, alpha, _ = at(0.0)
        _, end_alpha, end_sigma = at(1.0)
        whole = end_sigma * np.expm1(step)
        if order == 1:
            stages.look(time=time, noisy=end_alpha / alpha, noise=-whole)
            continue
        share = 0.5 if order == 2 else 1.0 / 3.0
        inner_time, inner_alpha, inner_sigma = at(share)
        stages.look(time=time, noisy=inner_alpha / alpha, noise=-inner_sigma * np.expm1(share * step), keep=True)
        if order == 2:  # whole (eps_s + (eps_1 - eps_s) / (2 r_1)), r_1 = 1/2
            stages.look(time=inner_time, base=end_alpha / alpha, noise=-whole)
            continue
        second_time, second_alpha, second_sigma = at(2.0 / 3.0)
        grown = np.expm1(2.0 / 3.0 * step)
        curve = 2.0 * second_sigma * (grown / (2.0 / 3.0 * step) - 1.0)  # r_2 / r_1 = 2
        stages.look(time=inner_time, base=second_alpha / alpha, old_noise=curve - second_sigma * grown, noise=-curve)
        curve = 1.5 * end_sigma * (np.expm1(step) / step - 1.0)  # 1 / r_2 = 3/2
        stages.look(time=second_time, base=end_alpha / alpha, old_noise=curve - whole, noise=-curve)
    return stages.plan(np.array([ends.solver_end]))


def _start(process: Process) -> float:
    return float(process.sampling_times(2)[0])


def _log_snr(process: Process, times: np.ndarray) -> np.ndarray:
    alpha, sigma = (np.asarray(level, np.float64) for level in process.marginal(times))
    return np.asarray(np.log(alpha / sigma))


SAMPLERS: Mapping[str, Callable[[Process, int], Plan]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "ddpm-large": ddpm_large,
    "ddpm-learned": ddpm_learned,
    "euler-maruyama": euler_maruyama,
    "ode-euler": ode_euler,
    "heun": heun,
    "dpm-solver-fast": dpm_solver_fast,
    "dpm-solver-2m": dpm_solver_2m,
}
"""By the name of the option `--sampler`. `ddim` takes `eta` and `heun` takes `churn` as well."""


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
    if plan.memory is not None:
        return _follow_with_memory(process, plan, plan.memory, network, start, keys, clip)
    random = bool(np.any(plan.fresh))
    least = plan.fresh if plan.small_fresh is None else plan.small_fresh
    columns = np.stack([plan.noisy, plan.clean, plan.noise, plan.fresh, least], axis=1)  # (N, 5)

    def step(noisy: Array, now: tuple[Array, Array, Array]) -> tuple[Array, None]:
        index, time, (of_noisy, of_clean, of_noise, of_fresh, of_least) = now
        times = jnp.full(noisy.shape[:1], time)
        estimate = process.estimate(network, noisy, times)
        if clip:
            estimate = clip_clean(process, estimate, noisy, times)
        moved = of_noisy * noisy + of_clean * estimate.clean + of_noise * estimate.noise
        if plan.small_fresh is not None:
            if estimate.variance_share is None:
                raise TypeError(f"{type(process).__name__}'s networks say no variance")
            share = estimate.variance_share
            of_fresh = jnp.where(of_least > 0, of_fresh**share * of_least ** (1.0 - share), 0.0)
        if random:
            moved = moved + of_fresh * _normal(keys, index + 1, noisy.shape[1:])
        return moved.astype(start.dtype), None

    schedule = (jnp.arange(plan.steps), jnp.asarray(plan.times[:-1]), jnp.asarray(columns, start.dtype))
    final, _ = jax.lax.scan(step, start, schedule)
    return final


def _follow_with_memory(
    process: Process, plan: Plan, memory: Memory, network: Network, start: Array, keys: Array, clip: bool
) -> Array:
    random = bool(np.any(memory.churn))
    columns = np.stack(
        [plan.noisy, plan.clean, plan.noise, memory.base, memory.clean, memory.noise, memory.churn], axis=1
    )

    Carried = tuple[Array, Array, Array, Array]

    def step(carried: Carried, now: tuple[Array, Array, Array, Array]) -> tuple[Carried, None]:
        noisy, *old = carried
        index, time, keep, of = now
        if random:
            noisy = noisy + of[6] * _normal(keys, index + 1, noisy.shape[1:]).astype(noisy.dtype)
        times = jnp.full(noisy.shape[:1], time)
        estimate = process.estimate(network, noisy, times)
        if clip:
            estimate = clip_clean(process, estimate, noisy, times)
        moved = of[0] * noisy + of[1] * estimate.clean + of[2] * estimate.noise
        moved = moved + of[3] * old[0] + of[4] * old[1] + of[5] * old[2]
        image, clean, noise = (
            jnp.where(keep, new, before).astype(start.dtype)
            for new, before in zip((noisy, estimate.clean, estimate.noise), old, strict=True)
        )
        return (moved.astype(start.dtype), image, clean, noise), None

    schedule = (
        jnp.arange(plan.steps),
        jnp.asarray(plan.times[:-1]),
        jnp.asarray(memory.keep),
        jnp.asarray(columns, start.dtype),
    )
    nothing = jnp.zeros_like(start)
    (final, *_), _ = jax.lax.scan(step, (start, nothing, nothing, nothing), schedule)
    return final
