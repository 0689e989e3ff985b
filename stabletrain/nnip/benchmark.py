"""How long simulations with a potential stay stable, and what their observables are worth.

Replicas start from reference structures with fresh velocities and run for a given time; each is stable up to its first
frame that a criterion refuses. Reported are the *survival curve*, the share of replicas still stable at each time,
with its Wilson interval; the *median stable time* with an interval from order statistics, exact for any distribution;
and for each observable its error against the reference over the stable frames, beside the noise floor of as many
independent reference frames. Works on any `Forces`: those of a potential here, or of any ASE calculator.

**Units**: ps for times, K, A, eV. **Shapes**: R replicas.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from stabletrain.nnip.criteria import Criteria, frames_before_failure
from stabletrain.nnip.dynamics import Forces, Frames, Params, Swarm, degrees_of_freedom, make_window, start_swarm
from stabletrain.nnip.integrators import make_integrator, temperature_of
from stabletrain.nnip.observables import ObservableError, StaticObservable, mean_curve, noise_floor
from stabletrain.nnip.potential import Potential
from stabletrain.nnip.stable_options import StableOptions
from stabletrain.nnip.systems import System
from stabletrain.nnip.time_observables import Diffusion, ReferenceTrajectory, TimeObservable

CONFIDENCE = 0.95
FS_PER_PS = 1000.0


@dataclass(frozen=True)
class Conditions:
    """Under which the simulations run."""

    temperature: float = 500.0  # K
    timestep: float = 0.5  # fs
    thermostat: str = "nose-hoover"
    relaxation_time: float = 10.0  # fs, Nose-Hoover
    damping: float = 0.1  # 1 / ps, Langevin
    window: int = 500  # steps
    frame_every: int = 20  # steps

    @classmethod
    def from_options(cls, options: StableOptions) -> Conditions:
        """Those of a configuration."""
        return cls(**{f.name: getattr(options, f.name) for f in dataclasses.fields(cls)})

    @property
    def momentum_conserved(self) -> bool:
        """Not where noise acts on the atoms."""
        return self.thermostat in ("nose-hoover", "nve")

    @property
    def frame_time(self) -> float:
        """ps between frames."""
        return self.timestep * self.frame_every / FS_PER_PS

    def freedom(self, system: System) -> int:
        """The degrees of freedom that carry kinetic energy."""
        return degrees_of_freedom(system.count, periodic=system.periodic, momentum_conserved=self.momentum_conserved)


# --- running ----------------------------------------------------------------------------------------------------------


class Simulator:
    """Windows of many replicas under some conditions, compiled once. A neighbour list that overflows is made larger,
    and the window run again: what it wrote is void."""

    def __init__(self, system: System, conditions: Conditions, *, potential: Potential | None = None,
                 forces: Forces | None = None) -> None:  # fmt: skip
        if (potential is None) == (forces is None):
            raise ValueError("a simulator takes a potential, or forces")
        self.system = system
        self.conditions = conditions
        self.potential = potential
        self._masses = jnp.asarray(system.masses, jnp.float32)
        self._forces = forces
        self._compile()

    def _compile(self) -> None:
        conditions, potential, system = self.conditions, self.potential, self.system
        integrator = make_integrator(
            conditions.thermostat,
            timestep=conditions.timestep,
            temperature=conditions.temperature,
            relaxation_time=conditions.relaxation_time,
            damping=conditions.damping / FS_PER_PS,
            degrees_of_freedom=conditions.freedom(system),
        )
        crowded: Callable[[jax.Array], jax.Array] | None = None
        if potential is None:
            assert self._forces is not None
            forces = self._forces
        else:
            fitted = potential
            forces = fitted.energy_and_forces
            if potential.room:

                def crowded(x: jax.Array) -> jax.Array:
                    return fitted.neighbors(x).overflow

        def start(params: Params, positions: jax.Array, key: jax.Array) -> Swarm:
            return start_swarm(
                forces,
                params,
                positions,
                self._masses,
                key,
                temperature=conditions.temperature,
                periodic=system.periodic,
                momentum_conserved=conditions.momentum_conserved,
            )

        self._start = jax.jit(start)
        self._window = jax.jit(
            make_window(
                forces,
                self._masses,
                integrator,
                steps=conditions.window,
                every=conditions.frame_every,
                crowded=crowded,
            )
        )

    def start(self, params: Params, positions: np.ndarray, key: jax.Array) -> Swarm:
        """Replicas at `positions` [R, n, 3] with fresh velocities."""
        if self.potential is not None:
            self._fit(positions)
        return self._start(params, jnp.asarray(positions, jnp.float32), key)

    def window(self, params: Params, swarm: Swarm, key: jax.Array) -> tuple[Swarm, Frames]:
        """The swarm a window later, and its frames."""
        while True:
            after, frames = self._window(params, swarm, key)
            if self.potential is None or not bool(jnp.any(after.overflow)):
                return after, frames
            room = self.potential.room
            self._fit(np.asarray(frames.position[:, -1]), more=True)
            if self.potential.room == room:
                raise RuntimeError("a neighbour list overflowed that holds every pair")

    def _fit(self, positions: np.ndarray, *, more: bool = False) -> None:
        """Room for the pairs of these structures; `more`: and at least a quarter more than there was."""
        assert self.potential is not None
        fitted = self.potential.fitted(positions)
        if more and fitted.room == self.potential.room:
            fitted = fitted.larger()
        if fitted.room != self.potential.room:
            self.potential = fitted
            self._compile()


# --- statistics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Survival:
    """How long each replica was stable; `length` where it was to the end."""

    stable_time: np.ndarray  # [R] ps
    length: float  # ps
    frame_time: float  # ps: the resolution

    @property
    def survived(self) -> np.ndarray:
        """bool [R]: stable to the end."""
        return self.stable_time >= self.length - 1e-9

    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Times [T] in ps, share stable up to there, and the lower and upper end of its Wilson interval."""
        times = np.arange(round(self.length / self.frame_time) + 1) * self.frame_time
        stable = (self.stable_time[None] >= times[:, None] - 1e-9).sum(axis=1)
        low, high = wilson_interval(stable, len(self.stable_time))
        return times, stable / len(self.stable_time), low, high

    def median(self) -> tuple[float, float, float]:
        """Median stable time in ps and its interval; infinite where half or more were stable to the end."""
        ordered = np.sort(np.where(self.survived, np.inf, self.stable_time))
        count = len(ordered)
        middle = ordered[(count - 1) // 2], ordered[count // 2]
        median = float(middle[0] if middle[0] == middle[1] else (middle[0] + middle[1]) / 2)
        low, high = order_statistics(count)
        return median, float(ordered[low]), float(ordered[high])

    @property
    def median_is_lower_bound(self) -> bool:
        """Whether the median is beyond the length, which is then given in its place."""
        return not np.isfinite(self.median()[0])


def wilson_interval(successes: np.ndarray, count: int, confidence: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
    """Of a share of `count` independent trials. Source: Wilson 1927."""
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    p = np.asarray(successes) / count
    centre = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def order_statistics(count: int, confidence: float = CONFIDENCE) -> tuple[int, int]:
    """The places (from 0) of the ordered values between which the median lies with at least that confidence.

    With fewer than six values none of them can: the smallest and the largest are given.
    """
    rank = max(int(stats.binom.ppf((1 - confidence) / 2, count, 0.5)), 1)
    return rank - 1, count - rank


# --- the benchmark ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchmarkResult:
    """What a benchmark found."""

    survival: Survival
    observables: Mapping[str, ObservableError]
    temperature: float  # K, mean over the stable frames
    frozen: int  # replicas that were not finite or blew up
    diffusion: Diffusion | None = None

    def scalars(self) -> dict[str, float]:
        """By name: shares, times in ps, errors. Infinite medians are given as the length of the benchmark."""
        median, low, high = self.survival.median()
        length = self.survival.length
        return {
            "stable_share": float(self.survival.survived.mean()),
            "median_stable_ps": min(median, length),
            "median_stable_ps_low": min(low, length),
            "median_stable_ps_high": min(high, length),
            "mean_stable_ps": float(self.survival.stable_time.mean()),
            "frozen": float(self.frozen),
            "mean_temperature": self.temperature,
            **{f"{slug(name)}_error": found.error for name, found in self.observables.items()},
            **{f"{slug(name)}_noise_floor": found.noise_floor for name, found in self.observables.items()},
            **({} if self.diffusion is None else {
                "diffusivity": self.diffusion.simulated,
                "diffusivity_reference": self.diffusion.reference,
                "diffusivity_noise_floor": self.diffusion.noise_floor,
            }),
        }  # fmt: skip


def slug(name: str) -> str:
    """An observable's name for metrics: "h(r)" is h_r, "RDF H-O" is rdf_h-o."""
    return name.lower().replace("(", "_").replace(")", "").replace(" ", "_")


def benchmark(
    simulator: Simulator,
    params: Params,
    starts: np.ndarray,
    criteria: Criteria,
    observables: Sequence[StaticObservable],
    reference_frames: np.ndarray,
    *,
    length: float,
    key: jax.Array,
    reference_weights: np.ndarray | None = None,
    trajectory: ReferenceTrajectory | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
    on_frames: Callable[[Frames, np.ndarray], None] = lambda frames, stable: None,
) -> BenchmarkResult:
    """Runs replicas from `starts` [R, n, 3] for `length` ps, rounded to whole frames, or until none is stable.

    At least one frame; where the length is no multiple of the window, the last one's frames beyond it do not count.
    Observables are averaged over the frames of each replica before its failure, and compared with the mean over
    `reference_frames` [N, n, 3] (weighted by `reference_weights` [N] where those are of another temperature). With a
    reference `trajectory` also observables in time, of segments of the stable frames. Their noise floor is that of as
    many reference frames as there were replicas, or picoseconds where those are more: frames of one replica that are
    nearer are taken to say the same.
    `tick(windows done, of)` may raise to stop; `on_frames(frames, stable bool [R, F])` gets every window's.
    """
    conditions = simulator.conditions
    wanted = max(1, round(length / conditions.frame_time))
    per_window = conditions.window // conditions.frame_every
    windows = -(-wanted // per_window)
    if trajectory is not None:
        trajectory.check(wanted, conditions.frame_time)
    masses, freedom = jnp.asarray(simulator.system.masses, jnp.float32), conditions.freedom(simulator.system)
    judge = jax.jit(criteria.unstable)
    sums = {o.name: np.zeros(len(o.grid)) for o in observables}
    curves_of = {o.name: jax.jit(lambda frames, stable, o=o: _sum_of_stable(o, frames, stable)) for o in observables}

    swarm = simulator.start(params, starts, jax.random.fold_in(key, 0))
    count = len(starts)
    going, alive, stable_frames, heat = np.ones(count, bool), np.ones(count, bool), np.zeros(count, int), 0.0
    followed: list[list[np.ndarray]] = [[] for _ in range(count)]
    for number in range(windows):
        tick(number, windows)
        if not going.any():
            break
        swarm, frames = simulator.window(params, swarm, jax.random.fold_in(key, number + 1))
        counted = min(per_window, wanted - number * per_window)
        if counted < per_window:
            frames = jax.tree.map(lambda x, n=counted: x[:, :n], frames)
        before = np.where(going, np.asarray(frames_before_failure(judge(frames))), 0)
        stable = np.arange(counted)[None] < before[:, None]
        for name, of_frames in curves_of.items():
            sums[name] += np.asarray(of_frames(frames.position, jnp.asarray(stable)), float)
        heat += float(np.sum(np.asarray(temperature_of(frames.velocity, masses, freedom)), where=stable))
        on_frames(frames, stable)
        if trajectory is not None:
            positions = np.asarray(frames.position)
            for r in range(count):
                followed[r].append(positions[r, : before[r]])
        stable_frames += before
        going &= before == counted
        alive = np.asarray(frames.alive[:, -1])
    tick(windows, windows)

    total = int(stable_frames.sum())
    # A replica that fails before its first frame was stable for less than one interval: it is given 0.
    survival = Survival(stable_frames * conditions.frame_time, wanted * conditions.frame_time, conditions.frame_time)
    independent = max(1, int((stable_frames > 0).sum()), round(survival.stable_time.sum()))
    errors = {}
    for o in observables:
        by_frame = np.asarray(o.of_frames(jnp.asarray(reference_frames, jnp.float32)), float)
        reference = np.average(by_frame, axis=0, weights=reference_weights)
        curve = sums[o.name] / total if total else np.full(len(o.grid), np.nan)
        floor = noise_floor(o, by_frame, independent, weights=reference_weights)
        errors[o.name] = ObservableError(o.error(curve, reference), floor, curve, reference)
    diffusion = None
    if trajectory is not None:
        in_time, diffusion = trajectory.compare([np.concatenate(parts) for parts in followed], conditions.frame_time)
        errors |= in_time
    temperature = heat / total if total else float("nan")
    return BenchmarkResult(survival, errors, temperature, int(np.sum(~alive)), diffusion)


def _sum_of_stable(observable: StaticObservable, positions: jax.Array, stable: jax.Array) -> jax.Array:
    """The sum of the curves of the stable frames: [R, F, n, 3], [R, F] -> [D]."""
    flat = positions.reshape(-1, *positions.shape[2:])
    kept = stable.reshape(-1)
    mean = mean_curve(observable.of_frames(flat), kept)
    return jnp.where(jnp.any(kept), mean * jnp.sum(kept), jnp.zeros_like(mean))


# --- figures ----------------------------------------------------------------------------------------------------------


def survival_figure(results: Mapping[str, Survival], *, title: str = "") -> bytes:
    """Survival curves with their intervals, as PNG: label -> survival."""
    figure, axes = _figure()
    for label, survival in results.items():
        times, share, low, high = survival.curve()
        (line,) = axes.plot(times, share, label=label)
        axes.fill_between(times, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="time (ps)", ylabel="share of replicas still stable", ylim=(0, 1.02), title=title)
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    return _png(figure)


def observable_figure(observable: StaticObservable | TimeObservable, curves: Mapping[str, np.ndarray]) -> bytes:
    """Curves of one observable over its grid, as PNG: label -> [D]."""
    figure, axes = _figure()
    for label, curve in curves.items():
        axes.plot(observable.grid, curve, label=label, linewidth=1)
    axes.set(xlabel=observable.label, ylabel=observable.name)
    axes.legend(frameon=False)
    return _png(figure)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    return figure, figure.subplots()


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
