"""The critic's loss as a meter of training: on training and held-out samples, with and without the penalty.

For a Wasserstein critic minus the loss is an estimate of the distance between data and generated samples. It falls as
the generator learns; where the estimate on training samples stays above the one on held-out samples, the critic has
learned its training set by heart. Source: Gulrajani et al. 2017, Section 5.5 and Figure 5, whose released code plots
minus the whole loss, penalty included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from stabletrain.gan.config import filled
from stabletrain.gan.domains import Domain, Model
from stabletrain.gan.indicators import share_at_limit
from stabletrain.gan.state import Critic
from stabletrain.methods.wgan_gp import gradient_norms, interpolate
from stabletrain.training.experiment import EvaluationContext

METER_SAMPLES = 512
CHUNK = 128
SPLITS = ("train", "test")


class LossMeter:
    """Measures one experiment's critic on fixed samples; compiled once."""

    def __init__(self, config: Any, critic: Critic, domain: Domain) -> None:
        self._config, self._domain = config, domain

        def norms_of(variables: Any, real: Any, fake: Any, labels: Any, epsilon: Any) -> jax.Array:
            def score(samples: jax.Array) -> jax.Array:
                return critic(variables, samples, labels, train=False)[0].score

            return gradient_norms(score, interpolate(real, fake, epsilon))

        self._norms = jax.jit(norms_of)

    def measure(self, model: Model, critic: Mapping[str, Any], context: EvaluationContext) -> dict[str, float]:
        """By split, of up to 512 real samples each and as many generated ones by the weights of `model`:

        - `eval/wasserstein_<split>`: mean score of real samples minus that of generated ones;
        - `eval/negative_critic_loss_<split>`: the same minus the weighted penalty (with a gradient penalty);
        - `eval/interpolate_norm_mean|std|low|high`: the gradient's norm at interpolates with training samples, with its
          5 % and 95 % quantiles; `eval/weights_at_clip`: share of the clipped parameters within 1 % of the limit.

        A split that the data do not have is left out.
        """
        scalars: dict[str, float] = {}
        for split in SPLITS:
            real, labels = self._domain.fixed(split, METER_SAMPLES)
            if not len(real):
                continue
            fake = model.samples(labels, len(real), seed=self._config.seed, context=context, what="critic's loss")
            of_real, of_fake = (model.scores(each, labels, context=context) for each in (real, fake))
            estimate = float(np.mean(of_real, dtype=np.float64) - np.mean(of_fake, dtype=np.float64))
            scalars[f"eval/wasserstein_{split}"] = estimate
            if self._config.gradient_penalty:
                norms = self._all_norms(critic, real, fake, labels, context)
                excess = norms - 1.0
                if self._config.one_sided:
                    excess = np.maximum(excess, 0.0)
                weighted = filled(self._config.gradient_penalty) * float(np.mean(excess**2))
                scalars[f"eval/negative_critic_loss_{split}"] = estimate - weighted
                if split == "train":
                    low, high = np.quantile(norms, (0.05, 0.95))
                    found = {"mean": norms.mean(), "std": norms.std(), "low": low, "high": high}
                    scalars |= {f"eval/interpolate_norm_{name}": float(value) for name, value in found.items()}
        if self._config.weight_clip:
            share = share_at_limit(
                critic["params"], self._config.weight_clip, kernels_only=bool(self._config.clip_kernels_only)
            )
            scalars["eval/weights_at_clip"] = float(share)
        return scalars

    def _all_norms(
        self, critic: Any, real: np.ndarray, fake: np.ndarray, labels: np.ndarray | None, context: EvaluationContext
    ) -> np.ndarray:
        epsilon = np.random.Generator(np.random.Philox(7)).random(len(real), np.float32)
        found = []
        for start in range(0, len(real), CHUNK):
            context.tick("gradient norms", start, len(real))
            part = slice(start, start + CHUNK)
            asked = None if labels is None else labels[part]
            found.append(np.asarray(self._norms(critic, real[part], fake[part], asked, epsilon[part]), np.float64))
        return np.concatenate(found)
