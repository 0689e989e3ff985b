"""The largest learning rate that still trains, by skip scaling and depth, on the network of ScaleLong's theorems.

One compiled program for each scaling and depth, which trains a network for every rate and seed, one after the other.
The noise process, loss, optimiser and warm-up are those of `stabletrain diffusion --backbone mlp`; what is left out is
the monitor, which changes nothing, and evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stabletrain.data.arrays import digits
from stabletrain.data.images import to_float
from stabletrain.diffusion.processes import VPSDE
from stabletrain.diffusion.skip_mlp import SkipMLP
from stabletrain.random_keys import random_key

Array = jax.Array
Floats = np.ndarray
TAIL = 0.25
"""The share of the steps, at the end, over which the loss is averaged."""


@dataclass(frozen=True)
class Cell:
    """One scaling at one depth: final losses [rates, seeds], not finite where a run blew up, and oscillations.

    `final`: mean training loss of the last quarter; predicting no noise at all has loss 1. `oscillation`: standard
    deviation of that quarter's losses around their straight line. `overflow`: the first step whose loss or gradient is
    not finite, -1 where there is none.
    """

    scaling: str
    depth: int
    rates: tuple[float, ...]
    final: Floats
    oscillation: Floats
    overflow: Floats

    def trains(self, threshold: float) -> Floats:
        """Whether each run ends with a finite loss below the threshold, [rates, seeds]."""
        return np.isfinite(self.final) & (self.final < threshold)

    def largest_rate(self, threshold: float) -> list[float]:
        """For each seed the largest rate that trains; 0 where none does."""
        works = self.trains(threshold)
        rates = np.asarray(self.rates)
        return [float(rates[works[:, seed]].max(initial=0.0)) for seed in range(works.shape[1])]

    def at(self, rates: Sequence[float]) -> Cell:
        """The same at some of its rates, in their order. Raises: `ValueError` for a rate that is none of them."""
        rows = [self.rates.index(rate) for rate in rates]
        return Cell(
            self.scaling, self.depth, tuple(rates), self.final[rows], self.oscillation[rows], self.overflow[rows]
        )

    def numbers(self, threshold: float) -> dict[str, Any]:
        """Everything as plain values; what is not finite as None."""

        def plain(array: Floats) -> list[list[float | None]]:
            return [[float(value) if np.isfinite(value) else None for value in row] for row in array]

        return {
            "scaling": self.scaling,
            "depth": self.depth,
            "rates": list(self.rates),
            "final_loss": plain(self.final),
            "oscillation": plain(self.oscillation),
            "first_overflow": self.overflow.astype(int).tolist(),
            "largest_rate": self.largest_rate(threshold),
        }


def joined(cells: Sequence[Cell]) -> Cell:
    """One cell of several, of one scaling and depth and at different rates."""
    return Cell(
        cells[0].scaling,
        cells[0].depth,
        sum((cell.rates for cell in cells), ()),
        *(np.concatenate([getattr(cell, name) for cell in cells]) for name in ("final", "oscillation", "overflow")),
    )


def train_cell(
    scaling: str,
    depth: int,
    rates: Sequence[float],
    *,
    kappa: float,
    width: int,
    batch: int,
    steps: int,
    warmup: int,
    weight_decay: float,
    seeds: int,
    precision: str = "float32",
) -> Cell:
    """Trains `len(rates)` x `seeds` networks of `depth` skips on the handwritten digits.

    Equal seeds start from the same weights and see the same images, times and noise whatever the rate and scaling.
    AdamW with beta (0.9, 0.99), rate linear from 0 over `warmup` steps, then constant; without
    warm-up the first update has the whole rate. `precision` is that of the
    network's products and features; weights, loss and optimiser stay in float32, and no loss is scaled.
    """
    images = to_float(jnp.asarray(digits().train_images))
    network = SkipMLP(8, 1, width, depth, skip_scaling=scaling, kappa=kappa, dtype=jnp.dtype(precision))
    process = VPSDE()
    optimizer = optax.adamw(1.0, b1=0.9, b2=0.99, weight_decay=weight_decay)

    def loss_of(params: Any, key: Array) -> Array:
        keys = jax.random.split(key, 3)
        clean = images[jax.random.randint(keys[0], (batch,), 0, len(images))]
        times = process.draw_times(keys[1], batch)
        noise = jax.random.normal(keys[2], clean.shape)

        def predict(noisy: Array, network_times: Array) -> Array:
            out: Any = network.apply({"params": params}, noisy, network_times)
            return out

        return jnp.mean(process.loss(predict, clean, noise, times))

    def train(rate: Array, seed: Array) -> tuple[Array, Array]:
        key = random_key(seed)
        params = network.init(jax.random.fold_in(key, 0), images[:1], jnp.zeros(1))["params"]

        def step(state: Any, position: Array) -> tuple[Any, tuple[Array, Array]]:
            params, moments = state
            loss, gradient = jax.value_and_grad(loss_of)(params, jax.random.fold_in(key, position + 1))
            update, moments = optimizer.update(gradient, moments, params)
            now = rate * jnp.minimum(position / warmup, 1.0) if warmup else rate
            params = jax.tree.map(lambda p, u: p + now * u, params, update)
            return (params, moments), (loss, jnp.isfinite(loss + optax.tree.norm(gradient, squared=True)))

        _, (losses, finite) = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
        return losses, jnp.where(finite.all(), -1, jnp.argmin(finite))

    # One network after the other: a batch of them is no faster on a CPU, and takes memory for all.
    grid = jnp.meshgrid(jnp.asarray(rates, jnp.float32), jnp.arange(seeds), indexing="ij")
    flat = (grid[0].reshape(-1), grid[1].reshape(-1))
    losses, overflow = jax.jit(lambda pairs: jax.lax.map(lambda pair: train(*pair), pairs))(flat)
    tail = np.asarray(losses, np.float64)[:, -max(2, int(TAIL * steps)) :]
    return Cell(
        scaling,
        depth,
        tuple(rates),
        tail.mean(axis=1).reshape(len(rates), seeds),
        _around_line(tail).reshape(len(rates), seeds),
        np.asarray(overflow).reshape(len(rates), seeds),
    )


def _around_line(tail: Floats) -> Floats:
    """Standard deviation of each row around its least-squares line; NaN where a row is not finite."""
    place = np.arange(tail.shape[1]) - (tail.shape[1] - 1) / 2
    with np.errstate(invalid="ignore"):  # a run that blew up
        centred = tail - tail.mean(axis=1, keepdims=True)
        slope = centred @ place / (place @ place)
        return np.asarray(np.std(centred - slope[:, None] * place, axis=1))


LABELS = {"none": "unscaled", "sqrt2": "1/sqrt(2)", "cs": "CS", "ls": "LS"}
COLOURS = {"none": "#D55E00", "sqrt2": "#E69F00", "cs": "#0072B2", "ls": "#009E73"}


def frontier_figure(cells: Sequence[Cell], threshold: float) -> Any:
    """A panel for each depth: the final loss by rate, seeds as dots around their median; the top line is "diverged"."""
    from matplotlib.figure import Figure

    depths = sorted({cell.depth for cell in cells})
    figure = Figure(figsize=(3.8 * len(depths), 3.4), layout="constrained")
    axes = figure.subplots(1, len(depths), squeeze=False, sharey=True)[0]
    ceiling = 2.0
    for axis, depth in zip(axes, depths, strict=True):
        for cell in cells:
            if cell.depth != depth:
                continue
            shown = np.where(np.isfinite(cell.final), np.minimum(cell.final, ceiling), ceiling)
            colour = COLOURS[cell.scaling]
            axis.plot(cell.rates, np.median(shown, axis=1), "-", color=colour, label=LABELS[cell.scaling])
            axis.plot(np.repeat(cell.rates, shown.shape[1]), shown.reshape(-1), "o", markersize=2, color=colour)
        axis.axhline(threshold, color="#888888", linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.set_xticks(cells[0].rates, [f"{rate:g}" for rate in cells[0].rates], fontsize=7)
        axis.minorticks_off()
        axis.set_title(f"{depth} skips", fontsize=9)
        axis.set_xlabel("peak learning rate")
    axes[0].set_ylabel(f"final training loss (at most {ceiling:g})")
    axes[0].legend(fontsize=7)
    return figure


def frontier_table(cells: Sequence[Cell], threshold: float) -> str:
    """Markdown: for each scaling and depth the largest rate that trains, by seed, and the best loss."""
    lines = [
        "# The largest learning rate that trains",
        "",
        f"A run trains when its mean loss over the last quarter is finite and below {threshold:g}. It overflows when a "
        "loss or gradient is not finite; a loss of 1e20 is not counted.",
        "",
        "| skips | scaling | largest rate, median | by seed | best median loss | at rate | oscillation | overflowed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in sorted(cells, key=lambda cell: (cell.depth, list(LABELS).index(cell.scaling))):
        largest = cell.largest_rate(threshold)
        medians = np.median(np.where(np.isfinite(cell.final), cell.final, np.inf), axis=1)
        best = int(np.argmin(medians))
        by_seed = ", ".join(f"{rate:g}" for rate in largest)
        lines.append(
            f"| {cell.depth} | {LABELS[cell.scaling]} | {np.median(largest):g} | {by_seed} | {medians[best]:.4f} "
            f"| {cell.rates[best]:g} | {np.median(cell.oscillation[best]):.4f} "
            f"| {np.sum(cell.overflow >= 0)} of {cell.overflow.size} |"
        )
    return "\n".join(lines) + "\n"
