"""Denoising diffusion whose network says the variance of its steps too (Nichol and Dhariwal, ICML 2021).

The network has twice the image's channels: the first half predicts the noise, the second v in [-1, 1] (not enforced),
which interpolates between the two variances of the ancestral samplers,

    log variance = share log(beta) + (1 - share) log(posterior variance),    share = (v + 1) / 2    (Eq. 15).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.diffusion.processes import DDPM, Array, Estimate, Network, noised, over_pixels

BIN = 1.0 / 255.0
"""Half the distance between two of the 256 values of a pixel in [-1, 1]."""
WEIGHT = 1e-3


@dataclass(frozen=True)
class LearnedVarianceDDPM(DDPM):
    """`DDPM` with a learned variance; networks here are `(noisy [B, H, W, C], times [B]) -> [B, H, W, 2 C]`.

    Source: Nichol and Dhariwal 2021, Eqs. 14 to 16. Differs: as in the released code, the bound is in bits per pixel
    rather than in nats per image, and levels are drawn uniformly.
    """

    def estimate(self, network: Network, noisy: Array, times: Array) -> Estimate:
        noise, v = jnp.split(network(noisy, self._network_times(times)).astype(noisy.dtype), 2, axis=-1)
        alpha, sigma = self.marginal(times)
        clean = (noisy - over_pixels(sigma, noisy) * noise) / over_pixels(alpha, noisy)
        return Estimate(clean, noise, (v + 1.0) / 2.0)

    def loss(self, network: Network, clean: Array, noise: Array, times: Array) -> Array:
        """L_hybrid = L_simple + 0.001 count L_t [B], L_t being the bound's term of the drawn level (`bound`).

        The mean's gradient in L_t is stopped: the bound teaches the variance only.
        """
        dtype = jnp.promote_types(clean.dtype, jnp.float32)
        clean, noise = clean.astype(dtype), noise.astype(dtype)
        noisy = noised(self, clean, noise, times)
        found = self.estimate(network, noisy, times)
        simple = jnp.mean(jnp.square(noise - found.noise), axis=tuple(range(1, clean.ndim)))
        fixed = Estimate(jax.lax.stop_gradient(found.clean), found.noise, found.variance_share)
        return simple + WEIGHT * self.count * self.bound(fixed, clean, noisy, times)

    def bound(self, found: Estimate, clean: Array, noisy: Array, times: Array) -> Array:
        """The variational bound's term at each image's level [B], in bits per pixel.

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at level 0 the negative log-likelihood of the image's 256 values.
        """
        assert found.variance_share is not None
        of_clean, of_noisy, log_beta, log_small = (over_pixels(column[times], clean) for column in self._posterior())
        log_variance = found.variance_share * log_beta + (1.0 - found.variance_share) * log_small
        mean = of_clean * found.clean + of_noisy * noisy
        true_mean = of_clean * clean + of_noisy * noisy
        apart = jnp.square(true_mean - mean) * jnp.exp(-log_variance)
        divergence = 0.5 * (log_variance - log_small + jnp.exp(log_small - log_variance) - 1.0 + apart)
        unlikely = -log_likelihood_of_pixels(clean, mean, 0.5 * log_variance)
        terms = jnp.where(over_pixels(times, clean) == 0, unlikely, divergence)
        return jnp.mean(terms, axis=tuple(range(1, clean.ndim))) / math.log(2.0)

    def _posterior(self) -> tuple[Array, Array, Array, Array]:
        """Coefficients of the clean and the noisy image in the posterior's mean, and log(beta), log(its variance).

        Each [count]. The variance at level 0 is 0; its logarithm is taken from level 1, as in the released code.
        """
        levels = np.arange(self.count)
        alpha, sigma = self.marginal(levels)
        before_alpha, before_sigma = self.marginal(levels - 1)
        beta = 1.0 - np.square(alpha / before_alpha)
        of_clean = before_alpha * beta / sigma**2
        of_noisy = alpha / before_alpha * np.square(before_sigma / sigma)
        variance = beta * np.square(before_sigma / sigma)
        variance[0] = variance[1]
        columns = (of_clean, of_noisy, np.log(beta), np.log(variance))
        dtype = jax.dtypes.canonicalize_dtype(np.float64)
        first, second, third, fourth = (jnp.asarray(column.astype(dtype)) for column in columns)
        return first, second, third, fourth


def log_likelihood_of_pixels(pixels: Array, mean: Array, log_scale: Array) -> Array:
    """log of the mass that a normal distribution has in each pixel's bin; the outermost bins reach to infinity.

    `pixels` in [-1, 1] on the grid of 256 values; all arrays [B, H, W, C]. Source: Ho et al. 2020, Eq. 13.
    """
    above = (pixels - mean + BIN) * jnp.exp(-log_scale)
    below = (pixels - mean - BIN) * jnp.exp(-log_scale)
    # The logarithm of a difference of tails that are taken on the side where they are small.
    flipped = below > 0
    high, low = jnp.where(flipped, -below, above), jnp.where(flipped, -above, below)
    log_high, log_low = jax.scipy.stats.norm.logcdf(high), jax.scipy.stats.norm.logcdf(low)
    inner = log_high + jnp.log1p(-jnp.exp(jnp.minimum(log_low - log_high, -1e-7)))
    upper = jax.scipy.stats.norm.logcdf(-below)
    lower = jax.scipy.stats.norm.logcdf(above)
    return jnp.where(pixels < -1.0 + BIN, lower, jnp.where(pixels > 1.0 - BIN, upper, inner))
