"""How the critic's gradient changes on its way back through twelve layers, under clipping and under the penalty.

Clipped weights all have about the size of the limit, so that every layer multiplies the gradient by about the same
factor: it explodes or vanishes exponentially with depth, whatever the limit, while the penalty keeps it of one size.
Everything is in float64: with a limit of 0.001 the gradient at the input is below the range of float32.
Source: Gulrajani et al. 2017, Section 4 and Figure 1 (right). The width, batch and number of steps behind the paper's
figure are not published.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from stabletrain.gan.toy_training import LATENT, Layers, ToySettings, apply_mlp, train_toy
from stabletrain.gan.toys import held_out_points
from stabletrain.methods.wgan_gp import critic_loss
from stabletrain.random_keys import random_key

Array = NDArray[np.floating]
PROBE_POINTS = 1024
HISTOGRAM_BINS = 101
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
AT_LIMIT = 0.99
"""A weight above this share of the limit counts as being at it."""


@dataclass(frozen=True)
class DepthGradients:
    """One trained critic: ||dL/dh_l||_2 over a batch for each activation h_0 (the input) ... h_L, and its weights.

    `slope`: change of log10 of the norm for one layer further back, by least squares; `at_limit`: share of the weights
    within 1 % of the clipping limit (None without clipping); `histogram`: counts of the kernels' entries, `edges`.
    """

    label: str
    norms: Array
    slope: float
    at_limit: float | None
    histogram: Array
    edges: Array
    seconds: float

    def numbers(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "label": self.label,
            "gradient_norms": self.norms.tolist(),
            "slope_log10_per_layer": self.slope,
            "weights_at_limit": self.at_limit,
            "weight_histogram": {"counts": self.histogram.tolist(), "edges": self.edges.tolist()},
            "seconds": self.seconds,
        }


def activation_gradients(critic: Layers, real: jax.Array, fake: jax.Array) -> list[jax.Array]:
    """d(E[D(fake)] - E[D(real)])/dh_l for every activation h_0 (the input), h_1, ..., h_L: each [2B, n_l].

    The activations are those after ReLU; the critic's output is not among them.
    """
    points = jnp.concatenate([real, fake])

    def loss(shifts: list[jax.Array]) -> jax.Array:
        hidden = points + shifts[0]
        for layer, shift in zip(critic[:-1], shifts[1:], strict=True):
            hidden = jax.nn.relu(hidden @ layer["kernel"] + layer["bias"]) + shift
        scored = (hidden @ critic[-1]["kernel"] + critic[-1]["bias"])[:, 0]
        return critic_loss(scored[: len(real)], scored[len(real) :])

    widths = [layer["kernel"].shape[0] for layer in critic]
    return jax.grad(loss)([jnp.zeros((len(points), width), points.dtype) for width in widths])


def slope_per_layer(norms: Array) -> float:
    """Least-squares slope of log10(norm) going back one layer; NaN when a norm is zero or not finite.

    Positive explodes and negative vanishes on the way to the input.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(norms)
    if not np.isfinite(logs).all():
        return float("nan")
    return -float(np.polyfit(np.arange(len(logs)), logs, 1)[0])


def depth_gradients(
    settings: ToySettings, label: str, *, tick: Callable[[int, int], None] | None = None
) -> DepthGradients:
    """Trains critic and generator by the settings, then measures on 1,024 held-out and 1,024 generated points.

    Raises: `ValueError` unless the settings say float64 and a trained generator.
    """
    if settings.dtype != "float64" or settings.generator != "trained":
        raise ValueError("gradients through depth are measured in float64 and with a trained generator")
    start = time.perf_counter()
    with jax.enable_x64(True):
        result = train_toy(settings, tick=tick)
        assert result.generator is not None
        real = jnp.asarray(held_out_points(settings.toy)[:PROBE_POINTS], jnp.float64)
        key = jax.random.fold_in(random_key(settings.seed), 2)
        fake = apply_mlp(result.generator, jax.random.normal(key, (PROBE_POINTS, LATENT), jnp.float64))
        gradients = jax.jit(activation_gradients)(result.critic, real, fake)
        norms = np.array([float(_norm(gradient)) for gradient in gradients])
        weights = np.concatenate([np.ravel(layer["kernel"]) for layer in result.critic])
    clipped = settings.method == "wgan"
    extent = 2 * settings.clip if clipped else float(np.abs(weights).max())
    histogram, edges = np.histogram(weights, HISTOGRAM_BINS, (-extent, extent))
    return DepthGradients(
        label=label,
        norms=norms,
        slope=slope_per_layer(norms),
        at_limit=float(np.mean(np.abs(weights) >= AT_LIMIT * settings.clip)) if clipped else None,
        histogram=histogram,
        edges=edges,
        seconds=time.perf_counter() - start,
    )


def _norm(gradient: jax.Array) -> jax.Array:
    largest = jnp.max(jnp.abs(gradient))
    scale = jnp.where(largest == 0, 1.0, largest)
    return jnp.linalg.norm(gradient / scale) * scale


def depth_figure(found: Sequence[DepthGradients], *, histogram_of: str) -> Any:
    """Left: norms by layer, counted back from the output, on a log axis. Right: two weight histograms.

    `histogram_of`: label of the clipped critic whose weights stand above those of the penalty (the last of `found`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 3.4), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(3, 2))
    left, right = halves
    axis = left.subplots()
    for colour, each in zip(COLOURS, found, strict=False):
        layers = np.arange(1, len(each.norms) + 1)
        axis.plot(layers, np.log10(each.norms), "o-", markersize=3, color=colour, label=each.label)
    axis.invert_xaxis()
    axis.set_xticks(np.arange(len(found[0].norms), 0, -3))
    axis.set(xlabel="discriminator layer (1 is the input)", ylabel="log10 of the gradient norm")
    axis.legend(fontsize=8)
    axes = right.subplots(2, 1)
    chosen = [each for each in found if each.label == histogram_of] + [found[-1]]
    for axis, each in zip(axes, chosen, strict=True):
        axis.stairs(each.histogram, each.edges, fill=True, color="#0072B2")
        axis.set_title(each.label, fontsize=9)
        axis.set_yticks([])
        centres = np.abs(each.edges[:-1] + each.edges[1:]) / 2
        within = np.cumsum(each.histogram[np.argsort(centres)]) >= 0.99 * each.histogram.sum()
        reach = 2 * np.sort(centres)[within.argmax()]  # a few large weights would hide the shape of the rest
        axis.set_xlim(-reach, reach)
    axes[-1].set_xlabel("weights")
    return figure
