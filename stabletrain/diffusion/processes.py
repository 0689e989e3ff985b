"""Noise processes: how an image is noised, what the network is asked, and how its answer becomes a noise estimate.

A process is a small frozen object of pure functions. Training draws times and asks for `loss`; samplers ask for
`sampling_times`, `marginal` and `estimate`. How the network's output is read (here: it predicts the noise) is the
process's own business, so another parametrisation (v-prediction, EDM's preconditioning) is another class, and neither
the samplers nor the experiment change.

**Shapes** images: [B, H, W, C] in [-1, 1]; times: [B], of the process's own kind: real numbers in [0, 1] for the
VP-SDE, whole numbers 0..999 (and -1, "no noise") for DDPM, noise levels sigma for EDM. A *network* here is a function
`(noisy [B, H, W, C], network_times [B] in 0..999, for EDM ln(sigma) / 4) -> [B, H, W, C]`; label, weights and guidance
are closed over by the caller.

**Source** Ho et al. 2020 (DDPM); Song et al. 2021 (the VP-SDE); Nichol and Dhariwal 2021 (the cosine schedule);
Bao et al. 2023 (U-ViT) for continuous times in [0, 1] fed to the network as 999 t; Karras et al. 2022 (EDM).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtri

Array = jax.Array
Network = Callable[[Array, Array], Array]

TIME_SCALE = 999.0
"""What the networks' time embedding is made for: t = 1 is 999, as in a DDPM of 1,000 steps."""


class Estimate(NamedTuple):
    """What is believed about a noisy image: noisy = alpha clean + sigma noise."""

    clean: Array  # [B, H, W, C]
    noise: Array  # [B, H, W, C]
    variance_share: Array | None = None
    """[B, H, W, C], of networks that say their variance: where it lies between the two of `ddpm` (0) and `ddpm-large`
    (1), on a logarithmic scale."""


class Process(Protocol):
    """What training and samplers need to know of a noise process."""

    @property
    def prior_scale(self) -> float:
        """Standard deviation of the noise that sampling starts from."""

    def draw_times(self, key: Array, count: int) -> Array:
        """Random training times [count]."""

    def spread_times(self, count: int) -> np.ndarray:
        """`count` fixed times [count] that cover the training distribution evenly, for a repeatable loss."""

    def sampling_times(self, steps: int) -> np.ndarray:
        """Decreasing times [steps + 1]; the last one is "no noise"."""

    def marginal(self, times: Any) -> tuple[Any, Any]:
        """(alpha, sigma), shaped as `times`: the noisy image is alpha clean + sigma noise. NumPy in, NumPy out."""

    def estimate(self, network: Network, noisy: Array, times: Array) -> Estimate:
        """Clean image and noise as the network sees them, from one evaluation of it."""

    def loss(self, network: Network, clean: Array, noise: Array, times: Array) -> Array:
        """Training loss of each image [B], float32."""


class Invertible(Process, Protocol):
    """A process in continuous time, for samplers that choose their own times."""

    def times_of(self, log_snr: np.ndarray) -> np.ndarray:
        """The times at which log(alpha / sigma) has these values."""

    @property
    def solver_end(self) -> float:
        """The time at which DPM-Solver stops."""


class Diffusing(Process, Protocol):
    """A process that is a stochastic differential equation dx = -beta(t) x / 2 dt + sqrt(beta(t)) dw as well."""

    def beta(self, times: Any) -> Any:
        """The rate of noising. NumPy in, NumPy out."""


def over_pixels(per_image: Array, like: Array) -> Array:
    """[B] -> [B, 1, 1, 1], to multiply images with."""
    return per_image.reshape(per_image.shape + (1,) * (like.ndim - per_image.ndim))


def noised(process: Process, clean: Array, noise: Array, times: Array) -> Array:
    """A draw from the forward marginal: alpha clean + sigma noise."""
    alpha, sigma = process.marginal(times)
    return over_pixels(alpha, clean) * clean + over_pixels(sigma, noise) * noise


def score(process: Process, estimate: Estimate, times: Array) -> Array:
    """Gradient of the log density of noisy images, - noise / sigma."""
    _, sigma = process.marginal(times)
    return -estimate.noise / over_pixels(sigma, estimate.noise)


def clip_clean(process: Process, estimate: Estimate, noisy: Array, times: Array) -> Estimate:
    """The estimate with its clean image clipped to [-1, 1] and its noise made to agree with that."""
    alpha, sigma = process.marginal(times)
    clean = jnp.clip(estimate.clean, -1.0, 1.0)
    noise = (noisy - over_pixels(alpha, noisy) * clean) / over_pixels(sigma, noisy)
    return Estimate(clean, noise, estimate.variance_share)


def _noise_estimate(process: Process, network_times: Array, network: Network, noisy: Array, times: Array) -> Estimate:
    """An epsilon-predicting network's estimate: clean = (noisy - sigma noise) / alpha."""
    alpha, sigma = process.marginal(times)
    noise = network(noisy, network_times).astype(noisy.dtype)
    return Estimate((noisy - over_pixels(sigma, noisy) * noise) / over_pixels(alpha, noisy), noise)


def _noise_loss(network_times: Array, network: Network, noisy: Array, noise: Array) -> Array:
    """Mean over the pixels of (noise - predicted noise)^2, for each image."""
    residual = noise.astype(jnp.float32) - network(noisy, network_times).astype(jnp.float32)
    return jnp.mean(jnp.square(residual), axis=tuple(range(1, noise.ndim)))


@dataclass(frozen=True)
class VPSDE:
    """The variance-preserving SDE in continuous time, with a network that predicts the noise.

    dx = -beta(t) x / 2 dt + sqrt(beta(t)) dw, beta(t) = beta_min + t (beta_max - beta_min), t in [0, 1]; so
    alpha(t) = exp(-beta_min t / 2 - (beta_max - beta_min) t^2 / 4) and sigma^2 = 1 - alpha^2.

    Source: Song et al. 2021, Eqs. 11 and 33; times drawn uniformly and 999 t as the network's input: Bao et al. 2023.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    first_time: float = 1e-3  # the smallest time that a sampler evaluates the network at

    prior_scale = 1.0
    solver_end = 1e-4  # as in the released U-ViT

    def draw_times(self, key: Array, count: int) -> Array:
        return jax.random.uniform(key, (count,))

    def spread_times(self, count: int) -> np.ndarray:
        return ((np.arange(count) + 0.5) / count).astype(np.float32)

    def sampling_times(self, steps: int) -> np.ndarray:
        """1 down to 1e-3 in equal steps, then 0: the grid of the official ScaleLong and U-ViT samplers."""
        return np.append(np.linspace(1.0, self.first_time, steps), 0.0)

    def beta(self, times: Any) -> Any:
        return self.beta_min + times * (self.beta_max - self.beta_min)

    def marginal(self, times: Any) -> tuple[Any, Any]:
        xp = np if isinstance(times, np.ndarray) else jnp
        log_alpha = -0.5 * self.beta_min * times - 0.25 * (self.beta_max - self.beta_min) * times**2
        # expm1 keeps sigma right near t = 0, where 1 - alpha^2 in float32 would be a difference of near-equals.
        return xp.exp(log_alpha), xp.sqrt(-xp.expm1(2.0 * log_alpha))

    def times_of(self, log_snr: np.ndarray) -> np.ndarray:
        """The times at which log(alpha / sigma) has these values. Lu et al. 2022 (DPM-Solver), Appendix D.4."""
        log_alpha = -0.5 * np.logaddexp(0.0, -2.0 * log_snr)
        slope = self.beta_max - self.beta_min
        # the root of slope t^2 / 4 + beta_min t / 2 + log_alpha = 0, without a difference of near-equals
        return -4.0 * log_alpha / (self.beta_min + np.sqrt(self.beta_min**2 - 4.0 * slope * log_alpha))

    def estimate(self, network: Network, noisy: Array, times: Array) -> Estimate:
        return _noise_estimate(self, TIME_SCALE * times, network, noisy, times)

    def loss(self, network: Network, clean: Array, noise: Array, times: Array) -> Array:
        return _noise_loss(TIME_SCALE * times, network, noised(self, clean, noise, times), noise)


def linear_betas(count: int) -> np.ndarray:
    """1e-4 to 0.02 in equal steps (for 1,000 steps; scaled to other counts). Ho et al. 2020, Section 4."""
    return np.linspace(1e-4, 0.02, count) * (1000 / count)


def cosine_betas(count: int) -> np.ndarray:
    """beta_i = 1 - f(i + 1) / f(i), f(i) = cos^2((i / count + 0.008) / 1.008 pi / 2), at most 0.999.

    Nichol and Dhariwal 2021, Eq. 17.
    """
    level = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - level[1:] / level[:-1], 0.999)


def scaled_linear_betas(count: int) -> np.ndarray:
    """0.00085 to 0.012, their square roots in equal steps (for 1,000 steps; scaled to other counts).

    Rombach et al. 2022 (latent diffusion), and with it U-ViT's text-to-image networks.
    """
    return np.linspace(0.00085**0.5, 0.012**0.5, count) ** 2 * (1000 / count)


BETAS: Mapping[str, Callable[[int], np.ndarray]] = {
    "linear": linear_betas,
    "cosine": cosine_betas,
    "scaled-linear": scaled_linear_betas,
}


@functools.cache
def _tables(schedule: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma) for the times -1, 0, ..., count - 1, each [count + 1], float64."""
    kept = np.append(1.0, np.cumprod(1.0 - BETAS[schedule](count)))  # alpha-bar, 1 where there is no noise
    return np.sqrt(kept), np.sqrt(1.0 - kept)


@dataclass(frozen=True)
class DDPM:
    """Discrete denoising diffusion of `count` steps, with a network that predicts the noise.

    Time i is the i-th noise level, 0..count-1: alpha_i^2 = prod_{j <= i} (1 - beta_j). Time -1 means no noise. The
    network is told i, or i + 1 with the scaled-linear schedule, as U-ViT's text-to-image networks count.

    Source: Ho et al. 2020, Eqs. 4 and 14.
    Raises: `ValueError` for so few levels that a beta of the schedule would reach 1.
    """

    schedule: str = "linear"
    count: int = 1000

    prior_scale = 1.0

    def __post_init__(self) -> None:
        if BETAS[self.schedule](self.count).max() >= 1:
            raise ValueError(f"the {self.schedule} schedule of {self.count} levels has a beta of 1 or more")

    def draw_times(self, key: Array, count: int) -> Array:
        return jax.random.randint(key, (count,), 0, self.count)

    def spread_times(self, count: int) -> np.ndarray:
        return np.floor((np.arange(count) + 0.5) * self.count / count).astype(np.int32)

    def sampling_times(self, steps: int) -> np.ndarray:
        """`steps` of the `count` levels, evenly spread, first and last among them; then -1.

        Raises: `ValueError` for more steps than levels.
        """
        if steps > self.count:
            raise ValueError(f"a process of {self.count} steps cannot be sampled in {steps}")
        return np.append(np.rint(np.linspace(self.count - 1, 0, steps)), -1).astype(np.int32)

    def marginal(self, times: Any) -> tuple[Any, Any]:
        alpha, sigma = _tables(self.schedule, self.count)
        if isinstance(times, np.ndarray):
            return alpha[times + 1], sigma[times + 1]
        # A new array each time: JAX remembers arrays by identity, and so its precision from before `enable_x64`.
        dtype = jax.dtypes.canonicalize_dtype(np.float64)
        return jnp.asarray(alpha.astype(dtype))[times + 1], jnp.asarray(sigma.astype(dtype))[times + 1]

    def _network_times(self, times: Array) -> Array:
        first = 1 if self.schedule == "scaled-linear" else 0
        return (times.astype(jax.dtypes.canonicalize_dtype(np.float64)) + first) * (1000 / self.count)

    def estimate(self, network: Network, noisy: Array, times: Array) -> Estimate:
        return _noise_estimate(self, self._network_times(times), network, noisy, times)

    def loss(self, network: Network, clean: Array, noise: Array, times: Array) -> Array:
        return _noise_loss(self._network_times(times), network, noised(self, clean, noise, times), noise)


@dataclass(frozen=True)
class EDM:
    """Karras et al.'s process: noisy = clean + sigma noise, a preconditioned denoiser, log-normal training levels.

    Time is sigma itself. D(x) = c_skip x + c_out F(c_in x, ln(sigma) / 4) with the network F; the loss is
    lambda(sigma) (D - clean)^2 with lambda = 1 / c_out^2, so that F's own target has unit variance at every level.

    Source: Karras et al. 2022, Table 1 and Eqs. 5 and 7.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    log_mean: float = -1.2
    log_std: float = 1.2

    @property
    def prior_scale(self) -> float:
        """Sampling starts from noise of the largest level."""
        return self.sigma_max

    @property
    def solver_end(self) -> float:
        """The smallest level."""
        return self.sigma_min

    def draw_times(self, key: Array, count: int) -> Array:
        return jnp.exp(self.log_mean + self.log_std * jax.random.normal(key, (count,)))

    def spread_times(self, count: int) -> np.ndarray:
        quantiles = ndtri((np.arange(count) + 0.5) / count)
        return np.exp(self.log_mean + self.log_std * quantiles).astype(np.float32)

    def sampling_times(self, steps: int) -> np.ndarray:
        """sigma_max down to sigma_min, equally spaced in sigma^(1 / rho); then 0. Karras et al. 2022, Eq. 5."""
        share = np.arange(steps) / max(steps - 1, 1)
        top, bottom = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return np.append((top + share * (bottom - top)) ** self.rho, 0.0)

    def marginal(self, times: Any) -> tuple[Any, Any]:
        xp = np if isinstance(times, np.ndarray) else jnp
        return xp.ones_like(times), times

    def times_of(self, log_snr: np.ndarray) -> np.ndarray:
        """exp(-log_snr)."""
        return np.exp(-log_snr)

    def preconditioning(self, sigma: Array) -> tuple[Array, Array, Array, Array]:
        """(c_skip, c_out, c_in, c_noise) for levels [B]. Karras et al. 2022, Table 1."""
        total = sigma**2 + self.sigma_data**2
        root = jnp.sqrt(total)
        return self.sigma_data**2 / total, sigma * self.sigma_data / root, 1.0 / root, 0.25 * jnp.log(sigma)

    def estimate(self, network: Network, noisy: Array, times: Array) -> Estimate:
        times = times.astype(noisy.dtype)
        skip, out, scale, label = self.preconditioning(times)
        raw = network(over_pixels(scale, noisy) * noisy, label).astype(noisy.dtype)
        clean = over_pixels(skip, noisy) * noisy + over_pixels(out, noisy) * raw
        return Estimate(clean, (noisy - clean) / over_pixels(times, noisy))

    def loss(self, network: Network, clean: Array, noise: Array, times: Array) -> Array:
        dtype = jnp.promote_types(clean.dtype, jnp.float32)
        clean, noise, times = clean.astype(dtype), noise.astype(dtype), times.astype(dtype)
        found = self.estimate(network, noised(self, clean, noise, times), times)
        weight = (times**2 + self.sigma_data**2) / (times * self.sigma_data) ** 2
        return weight * jnp.mean(jnp.square(found.clean - clean), axis=tuple(range(1, clean.ndim)))


PROCESSES: Mapping[str, Callable[[], Process]] = {
    "vp-sde": VPSDE,
    "ddpm-linear": lambda: DDPM("linear"),
    "ddpm-cosine": lambda: DDPM("cosine"),
    "ddpm-scaled-linear": lambda: DDPM("scaled-linear"),
    "edm": EDM,
}
"""By the name of the option `--process`, with as many steps as the papers have."""
