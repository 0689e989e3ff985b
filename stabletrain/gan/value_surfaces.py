"""What critics of points in the plane look like: value surfaces under weight clipping and under the penalty.

A clipped critic can only draw simple functions of its inputs and misses the shape of the data; one with the penalty
follows it. Two figures: fakes that are real points plus noise, with the critic trained towards its optimum (Figure 1a
of the paper), and a generator trained against the critic (as the released code draws).
Source: Gulrajani et al. 2017, Section 4 and Figure 1 (left).
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from stabletrain.gan.toy_training import ToyResult, ToySettings, draw_fakes, scores, train_toy
from stabletrain.gan.toys import TOY_NAMES, exact_wasserstein, held_out_points, mixture, mode_report
from stabletrain.methods.wgan_gp import gradient_norms
from stabletrain.random_keys import random_key

Array = NDArray[np.floating]
LEVELS = 14
JUDGED_MODES, JUDGED_DISTANCE, SHOWN = 2500, 500, 512
TITLES = {"gaussians8": "8 Gaussians", "gaussians25": "25 Gaussians", "swissroll": "Swiss roll"}
METHOD_TITLES = {"wgan": "weight clipping", "wgan-gp": "gradient penalty"}


@dataclass(frozen=True)
class Surface:
    """One panel: the critic's values [G, G] on a square grid (rows go with y), points beside it, and its scores.

    `estimate` and `exact` are the critic's and the exact Wasserstein distance of the same 500 real and 500 fake
    points, `floor` that of two real samples of this size, and `lipschitz` the largest gradient norm on the grid: the
    estimate of a clipped critic is that many times too large or too small.
    """

    toy: str
    method: str
    generator: str
    axis: Array
    values: Array
    real: Array
    fake: Array
    estimate: float
    exact: float
    floor: float
    lipschitz: float
    modes_covered: int | None
    modes: int | None
    high_quality: float | None
    seconds: float

    def numbers(self) -> dict[str, Any]:
        """All but the arrays."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if not isinstance(value, np.ndarray)}


def surface(settings: ToySettings, *, extent: float, grid: int, tick: Callable[[int, int], None] | None) -> Surface:
    """Trains one critic by the settings and looks at it on `grid` x `grid` points of [-extent, extent]^2."""
    start = time.perf_counter()
    result = train_toy(settings, tick=tick)
    axis = np.linspace(-extent, extent, grid)
    places = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2).astype(settings.dtype)
    score = jax.jit(partial(scores, result.critic))
    slopes = np.asarray(jax.jit(partial(gradient_norms, partial(scores, result.critic)))(places))
    real, fake = judged_points(result)
    near = slice(0, JUDGED_DISTANCE)
    estimate = float(np.mean(score(real[near])) - np.mean(score(fake[near])))
    shape = mixture(settings.toy) if settings.generator == "trained" else None
    modes = mode_report(fake, shape) if shape is not None else None
    return Surface(
        toy=settings.toy,
        method=settings.method,
        generator=settings.generator,
        axis=axis,
        values=np.asarray(score(places)).reshape(grid, grid),
        real=real[:SHOWN],
        fake=fake[:SHOWN],
        estimate=estimate,
        exact=exact_wasserstein(real[near], fake[near]),
        floor=exact_wasserstein(real[near], real[JUDGED_MODES : JUDGED_MODES + JUDGED_DISTANCE]),
        lipschitz=float(slopes.max()),
        modes_covered=modes.covered if modes else None,
        modes=modes.modes if modes else None,
        high_quality=modes.high_quality if modes else None,
        seconds=time.perf_counter() - start,
    )


def judged_points(result: ToyResult) -> tuple[Array, Array]:
    """Held-out real points and fakes [N, 2], N at least 3000; the fakes of a fixed generator are of other real points.

    (Noise added to the very points that they are compared with would make the distance that of the noise.)
    """
    settings = result.settings
    points = held_out_points(settings.toy).astype(settings.dtype)
    count = JUDGED_MODES + JUDGED_DISTANCE
    key = jax.random.fold_in(random_key(settings.seed), 1)
    return points[:count], np.asarray(draw_fakes(settings, result.generator, key, jnp.asarray(points[-count:])))


def surfaces_figure(surfaces: Sequence[Surface]) -> Any:
    """A row of panels per method (clipping on top), a column per toy; contours of the critic, real and fake points."""
    from matplotlib.figure import Figure

    methods = [method for method in METHOD_TITLES if any(panel.method == method for panel in surfaces)]
    toys = [toy for toy in TOY_NAMES if any(panel.toy == toy for panel in surfaces)]
    figure = Figure(figsize=(3.1 * len(toys) + 0.4, 3.1 * len(methods) + 0.3), layout="constrained")
    axes = figure.subplots(len(methods), len(toys), squeeze=False)
    by_place = {(panel.method, panel.toy): panel for panel in surfaces}
    for row, method in enumerate(methods):
        for column, toy in enumerate(toys):
            axis, panel = axes[row, column], by_place[method, toy]
            fake = panel.fake if panel.generator == "trained" else None
            draw_surface(axis, panel.axis, panel.values, panel.real, fake)
            if row == 0:
                axis.set_title(TITLES[toy], fontsize=10)
            if column == 0:
                axis.set_ylabel(METHOD_TITLES[method], fontsize=10)
    return figure


def draw_surface(axis: Any, places: Array, values: Array, real: Array, fake: Array | None) -> None:
    """Contours of `values` [G, G] on the square grid of `places` [G], with real points and (if given) fakes [N, 2]."""
    finite = values[np.isfinite(values)]
    if finite.size and np.ptp(finite) > 0:
        levels = np.linspace(finite.min(), finite.max(), LEVELS + 2)[1:-1]
        axis.contour(places, places, values, levels=levels, cmap="viridis", linewidths=1.0)
    axis.plot(*real.T, ".", markersize=2.5, color="#E69F00", label="real")
    if fake is not None:
        axis.plot(*fake.T, "+", markersize=3, markeredgewidth=0.6, color="#0072B2", label="generated")
    extent = places[-1]
    axis.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[], aspect="equal")


def figure_files(figure: Any, name: str) -> dict[str, bytes]:
    """The figure as `<name>.png` and `<name>.svg`, the same bytes each time."""
    import matplotlib

    files = {}
    with matplotlib.rc_context({"svg.hashsalt": "stabletrain"}):
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            stream = io.BytesIO()
            figure.savefig(stream, format=ending, dpi=110, metadata=metadata)
            files[f"{name}.{ending}"] = stream.getvalue()
    return files


def pack(panel: Surface) -> dict[str, Any]:
    """Arrays for `numpy.savez`; `unpack` gives the panel back."""
    values = {field.name: getattr(panel, field.name) for field in dataclasses.fields(panel)}
    return {name: value for name, value in values.items() if value is not None}


def unpack(arrays: Mapping[str, Any]) -> Surface:
    """The panel that `pack` packed."""
    values: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Surface))
    for name, value in arrays.items():
        values[name] = value if value.ndim else value.item()
    return Surface(**values)
