"""Observables of frames in time: velocity autocorrelation and diffusion of simulations, against a reference trajectory.

A *segment* is a run of frames at one spacing; each gives a curve over time lags, and simulation and reference are cut
into segments of the same length and treated alike: velocities are central differences of positions also where a
simulation knows its own, so that what a wide spacing hides is hidden from both. Like every observable they have a
noise floor: the error of as many segments of the reference itself (`stabletrain.nnip.observables.noise_floor`).

**Units**: A, fs. **Shapes**: F frames, n atoms, L lags, S segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from stabletrain.errors import ConfigError
from stabletrain.nnip.observables import (
    ObservableError,
    diffusivity,
    mean_square_displacement,
    noise_floor,
    velocity_autocorrelation,
)
from stabletrain.nnip.systems import System, minimum_image, molecules

LONGEST = 200
"""Frames of a segment at most: 100 lags, as the released code has it."""
SHORTEST, PIECES = 8, 4
"""Frames of a segment at least, and segments of the reference."""
FS_PER_PS = 1000.0
AUTOCORRELATION, DISPLACEMENT = "velocity autocorrelation", "mean-square displacement"


@dataclass(frozen=True)
class TimeObservable:
    """A curve over time lags that one segment gives."""

    name: str
    of_segment: Callable[[np.ndarray], np.ndarray]
    """unwrapped positions [F, n, 3] -> [L]."""
    grid: np.ndarray
    """[L]: lags in fs."""
    spacing: float
    """fs."""
    label: str = "time (fs)"

    def error(self, curve: np.ndarray, reference: np.ndarray) -> float:
        """The mean difference |curve - reference|. Shapes: [L], [L]."""
        return float(np.abs(np.asarray(curve) - np.asarray(reference)).mean())


def time_observables(system: System, spacing: float, frames: int) -> list[TimeObservable]:
    """Velocity autocorrelation, and for several molecules in a cell the mean-square displacement of the heavy atoms.

    Of segments of that many frames `spacing` fs apart; half as many lags. Raises: `ValueError` for fewer than eight.
    """
    if frames < SHORTEST:
        raise ValueError(f"segments of {frames} frames are too short: {SHORTEST} at least")
    lags = frames // 2
    grid = np.arange(lags) * spacing

    def velocities(positions: np.ndarray) -> np.ndarray:
        return velocity_autocorrelation(finite_velocities(positions, spacing)[None], lags)

    found = [TimeObservable(AUTOCORRELATION, velocities, grid, spacing)]
    if system.periodic and molecules(system).max() > 0:
        heavy = np.flatnonzero(system.species > 1)
        followed = heavy if len(heavy) else np.arange(system.count)

        def displacements(positions: np.ndarray) -> np.ndarray:
            centred = positions - np.einsum("n,fnd->fd", system.masses / system.masses.sum(), positions)[:, None]
            return mean_square_displacement(centred[None, :, followed], None, lags)

        found.append(TimeObservable(DISPLACEMENT, displacements, grid, spacing))
    return found


def finite_velocities(positions: np.ndarray, spacing: float) -> np.ndarray:
    """Central differences in A / fs: [F, n, 3] -> [F - 2, n, 3]."""
    return (positions[2:] - positions[:-2]) / (2 * spacing)


def unwrapped(positions: np.ndarray, cell: np.ndarray | None) -> np.ndarray:
    """The same trajectory [F, n, 3] without jumps through the cell's faces: each step goes to the nearest image."""
    positions = np.asarray(positions, np.float64)
    if cell is None:
        return positions
    steps = minimum_image(np.diff(positions, axis=0), cell)
    return positions[0] + np.concatenate([np.zeros_like(positions[:1]), np.cumsum(steps, axis=0)])


def segments(trajectories: Sequence[np.ndarray], frames: int) -> list[np.ndarray]:
    """Each trajectory [F, n, 3] cut into pieces of `frames` frames; what is left over at the ends is dropped."""
    return [
        trajectory[start : start + frames]
        for trajectory in trajectories
        for start in range(0, len(trajectory) - frames + 1, frames)
    ]


def diffusivity_of(curves: np.ndarray, spacing: float) -> float:
    """D in 1e-9 m^2 / s of the mean over segments of the mean-square displacement: [S, L] in A^2."""
    return diffusivity(np.asarray(curves).mean(axis=0), spacing)


def diffusivity_noise(curves: np.ndarray, spacing: float, count: int, *, draws: int = 20, seed: int = 0) -> float:
    """How far D of `count` segments of the reference [S, L] is from that of the others, on average; 1e-9 m^2 / s."""
    taken = min(count, len(curves) // 2)
    if not taken:
        return float("nan")
    rng, differences = np.random.default_rng(seed), []
    for _ in range(draws):
        order = rng.permutation(len(curves))
        part, rest = curves[order[:taken]], curves[order[taken:]]
        differences.append(abs(diffusivity_of(part, spacing) - diffusivity_of(rest, spacing)))
    return float(np.mean(differences))


@dataclass(frozen=True)
class Diffusion:
    """Diffusivities in 1e-9 m^2 / s; not a number without a segment of stable frames."""

    simulated: float
    reference: float
    noise_floor: float


@dataclass(frozen=True)
class ReferenceTrajectory:
    """Reference frames in order, for observables in time."""

    system: System
    positions: np.ndarray  # [F, n, 3] A, wrapped or not
    spacing: float  # fs

    def check(self, simulated: int, frame_time: float) -> None:
        """Raises: `ConfigError` where `simulated` frames, `frame_time` ps apart, or the reference are too few."""
        found, needed = simulated // self.stride(frame_time), PIECES * SHORTEST
        if found < SHORTEST or len(self.positions) < needed:
            raise ConfigError(
                f"observables in time need {SHORTEST} frames of a simulation {self.spacing:g} fs apart, not {found} "
                f"(--time), and {needed} of the reference, not {len(self.positions)}"
            )

    def stride(self, frame_time: float) -> int:
        """Simulated frames, `frame_time` ps apart, to one step of the reference. Raises: `ConfigError` if uneven."""
        ratio = self.spacing / (frame_time * FS_PER_PS)
        if round(ratio) < 1 or abs(ratio - round(ratio)) > 1e-6:
            raise ConfigError(
                f"frames of the simulation are {frame_time * FS_PER_PS:g} fs apart, which does not divide "
                f"--reference-spacing {self.spacing:g}: choose --frame-every and --timestep so that it does"
            )
        return round(ratio)

    def compare(
        self, stable: Sequence[np.ndarray], frame_time: float
    ) -> tuple[dict[str, ObservableError], Diffusion | None]:
        """Errors of simulations [F, n, 3], an array for each replica, against the reference; diffusivity of liquids.

        Segments are as long as the longest simulation, as long as the reference has four of them.
        """
        taken = [positions[:: self.stride(frame_time)] for positions in stable]
        longest = max(len(positions) for positions in taken)
        frames = max(SHORTEST, min(LONGEST, longest, len(self.positions) // PIECES))
        ours, theirs = segments(taken, frames), segments([unwrapped(self.positions, self.system.cell)], frames)
        errors: dict[str, ObservableError] = {}
        diffusion = None
        for o in time_observables(self.system, self.spacing, frames):
            reference = np.stack([o.of_segment(segment) for segment in theirs])
            curves = np.stack([o.of_segment(s) for s in ours]) if ours else np.full((1, len(o.grid)), np.nan)
            mean, expected = curves.mean(axis=0), reference.mean(axis=0)
            floor = noise_floor(o, reference, max(1, len(ours)))
            errors[o.name] = ObservableError(o.error(mean, expected), floor, mean, expected)
            if o.name == DISPLACEMENT:
                diffusion = Diffusion(
                    diffusivity_of(curves, self.spacing) if ours else float("nan"),
                    diffusivity_of(reference, self.spacing),
                    diffusivity_noise(reference, self.spacing, max(1, len(ours))),
                )
        return errors, diffusion
