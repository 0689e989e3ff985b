"""What is measured of a simulation: distance and angle distributions, RDFs, velocity correlation, diffusion.

*Static* observables are functions of one frame, positions [n, 3] -> a curve [D] over a grid, and their mean over
frames is what is compared. *Dynamic* ones are functions of frames in time. How far a curve is from its reference is

    error = spacing * sum over the grid |curve - reference|,

the integral of the difference (r_max times the mean difference, as the StABlE paper and its released code report
it). No finite sample matches its own ensemble: `noise_floor` says how far a sample of the reference itself is.

**Units**: A, fs, degrees; distributions are densities, of integral 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.nnip.geometry import angles_of, bond_angles, pair_lengths
from stabletrain.nnip.systems import System, smallest_width
from stabletrain.nnip.units import BOLTZMANN

Cell = np.ndarray | None
CHUNK = 32  # frames at a time: [chunk, pairs, grid] is the largest array
DIFFUSIVITY_UNIT = 1e4
"""1 A^2 / fs in 1e-9 m^2 / s."""


@dataclass(frozen=True)
class StaticObservable:
    """A curve that one frame gives, and what it is drawn over."""

    name: str
    of_frame: Callable[[jax.Array], jax.Array]
    """positions [n, 3] -> [D]."""
    grid: np.ndarray
    """[D]: the middle of each interval."""
    spacing: float
    label: str
    """Of the horizontal axis, with its unit."""

    def of_frames(self, positions: jax.Array) -> jax.Array:
        """The curve of each frame: positions [N, n, 3] -> [N, D], a few at a time."""
        return jax.lax.map(self.of_frame, positions, batch_size=CHUNK)

    def error(self, curve: np.ndarray, reference: np.ndarray) -> float:
        """spacing * sum |curve - reference|. Shapes: [D], [D]."""
        return float(self.spacing * np.abs(np.asarray(curve) - np.asarray(reference)).sum())


def mean_curve(curves: jax.Array, valid: jax.Array | None = None, weights: jax.Array | None = None) -> jax.Array:
    """The mean over frames, of the valid ones, weighted where weights [N] are given: [N, D] -> [D]."""
    kept = jnp.ones(len(curves)) if weights is None else weights
    if valid is not None:
        kept = jnp.where(valid, kept, 0)
        curves = jnp.where(valid[:, None], curves, 0)
    return kept @ curves / jnp.sum(kept)


@dataclass(frozen=True)
class ObservableError:
    """How far an observable of a simulation is from its reference."""

    error: float
    """The integral of the difference; not a number where no frame was stable."""
    noise_floor: float
    """That of as much of the reference as there was of the simulation; who compares says how that is counted."""
    curve: np.ndarray  # [D]
    reference: np.ndarray  # [D]


# --- distributions ----------------------------------------------------------------------------------------------------


def _counts(values: jax.Array, edges: np.ndarray) -> jax.Array:
    """How many values lie in each interval, as np.histogram counts (the last one is closed): [K] -> [D].

    By comparison with every edge and not by division, so that a value at an edge falls to the same side as there.
    """
    bounds = jnp.asarray(edges, values.dtype)
    place = jnp.searchsorted(bounds, values, side="right") - 1
    place = jnp.where(values == bounds[-1], len(edges) - 2, place)
    inside = (values >= bounds[0]) & (values <= bounds[-1])
    return jnp.zeros(len(edges) - 1, values.dtype).at[place].add(jnp.where(inside, 1.0, 0.0), mode="drop")


def _density(counts: jax.Array, spacing: float) -> jax.Array:
    return counts / (spacing * jnp.maximum(jnp.sum(counts), 1e-12))


def distance_distribution(atoms: int, *, r_max: float = 10.0, dr: float = 0.02, cell: Cell = None) -> StaticObservable:
    """h(r): the density of the distances of all pairs of atoms up to `r_max`, 1 / A.

    Equal to `np.histogram(..., density=True)` over the frame's distances. Source: Fu et al. 2023 (arXiv 2210.07237).
    """
    edges = _edges(r_max, dr)
    pairs = _pairs(atoms)

    def of_frame(positions: jax.Array) -> jax.Array:
        return _density(_counts(pair_lengths(positions, pairs, cell), edges), _spacing(edges))

    return StaticObservable("h(r)", of_frame, _middles(edges), _spacing(edges), "distance (A)")


def smeared_distance_distribution(
    atoms: int, *, r_max: float = 10.0, dr: float = 0.02, width: float = 0.01, cell: Cell = None
) -> StaticObservable:
    """h(r) with each distance as a Gaussian of that width (A): the observable that StABlE Training learns from.

    Differs: the released code smears the simulation and compares with a plain histogram of the reference, on a grid
    that is half an interval off; here both are smeared alike.
    """
    edges = _edges(r_max, dr)
    middles = _middles(edges)
    pairs = _pairs(atoms)

    def of_frame(positions: jax.Array) -> jax.Array:
        offsets = pair_lengths(positions, pairs, cell)[:, None] - jnp.asarray(middles, positions.dtype)
        return _density(jnp.sum(jnp.exp(-0.5 * (offsets / width) ** 2), axis=0), _spacing(edges))

    return StaticObservable("smeared h(r)", of_frame, middles, _spacing(edges), "distance (A)")


def angle_distribution(triples: np.ndarray, *, cell: Cell = None) -> StaticObservable:
    """The density of the angles between bonds, in intervals of one degree, 1 / degree. triples: int [A, 3].

    Differs: the released code takes every triple of atoms within 3 A; here they are those of the bonds.
    """
    edges = np.linspace(0.0, 180.0, 181)

    def of_frame(positions: jax.Array) -> jax.Array:
        return _density(_counts(bond_angles(positions, triples, cell), edges), 1.0)

    return StaticObservable("angles", of_frame, _middles(edges), 1.0, "angle (degrees)")


def radial_distribution(
    name: str, first: np.ndarray, second: np.ndarray, cell: np.ndarray, *, r_max: float = 6.0, dr: float = 0.012
) -> StaticObservable:
    """g(r) between the atoms `first` and `second` (index arrays, equal or without common members) in a cell [3, 3].

    Pairs in a shell over those of an ideal gas of the same density, so that g goes to 1.
    Differs: the released code counts an atom as a pair with itself in the density, which makes like-pair curves
    smaller by 1 / N.
    Raises: `ValueError` when `r_max` exceeds half the cell, where the nearest image is no longer all there is.
    """
    if 2 * r_max > smallest_width(cell):
        raise ValueError(f"r_max {r_max} is more than half of the cell ({smallest_width(cell) / 2:.3f} A)")
    edges = _edges(r_max, dr)
    alike = np.array_equal(first, second)
    if alike:
        pairs = np.asarray(first)[_pairs(len(first))]
    else:
        pairs = np.stack(np.meshgrid(first, second, indexing="ij"), axis=-1).reshape(-1, 2)
    volume = abs(np.linalg.det(cell))
    expected = len(pairs) / volume * 4 / 3 * np.pi * (edges[1:] ** 3 - edges[:-1] ** 3)

    def of_frame(positions: jax.Array) -> jax.Array:
        return _counts(pair_lengths(positions, pairs, cell), edges) / jnp.asarray(expected, positions.dtype)

    return StaticObservable(name, of_frame, _middles(edges), _spacing(edges), "distance (A)")


def radial_distributions(numbers: np.ndarray, cell: np.ndarray, *, r_max: float = 6.0) -> list[StaticObservable]:
    """g(r) of every pair of elements: "RDF H-O" and so on, in the order of the atomic numbers."""
    from ase.data import chemical_symbols

    numbers = np.asarray(numbers)
    kinds = np.unique(numbers).tolist()
    found = []
    for k, a in enumerate(kinds):
        for b in kinds[k:]:
            first, second = np.flatnonzero(numbers == a), np.flatnonzero(numbers == b)
            if a != b or len(first) > 1:
                name = f"RDF {chemical_symbols[a]}-{chemical_symbols[b]}"
                found.append(radial_distribution(name, first, second, cell, r_max=r_max))
    return found


def static_observables(system: System, *, distance_reach: float = 10.0) -> list[StaticObservable]:
    """What is compared of a system: of a molecule h(r) and the angles, of a periodic one g(r) by pair of elements.

    h(r) goes to `distance_reach` in A, g(r) to 6 A, or half of the cell's width where that is less.
    """
    if system.cell is not None:
        return radial_distributions(system.species, system.cell, r_max=min(6.0, smallest_width(system.cell) / 2))
    found = [distance_distribution(system.count, r_max=distance_reach)]
    triples = angles_of(system.bonds)
    return [*found, angle_distribution(triples)] if len(triples) else found


def _pairs(atoms: int) -> np.ndarray:
    return np.stack(np.triu_indices(atoms, 1), axis=1)


def _edges(r_max: float, dr: float) -> np.ndarray:
    # From just above zero, so that an atom is no neighbour of itself, as in the released code.
    return np.linspace(1e-6, r_max, round(r_max / dr) + 1)


def _middles(edges: np.ndarray) -> np.ndarray:
    return (edges[1:] + edges[:-1]) / 2


def _spacing(edges: np.ndarray) -> float:
    return float((edges[-1] - edges[0]) / (len(edges) - 1))


# --- in time ----------------------------------------------------------------------------------------------------------


def velocity_autocorrelation(velocities: np.ndarray, lags: int) -> np.ndarray:
    """C(t) = <v(0) . v(t)> / <v . v> over atoms, replicas and time origins: [R, F, n, 3] -> float64 [lags], C(0) = 1.

    Raises: `ValueError` for more lags than frames.
    """
    v = np.asarray(velocities, np.float64)
    frames = _frames_for(v, lags)
    products = np.stack([np.mean(v[:, : frames - lag] * v[:, lag:]) for lag in range(lags)])
    return products / products[0]


def mean_square_displacement(positions: np.ndarray, masses: np.ndarray | None, lags: int) -> np.ndarray:
    """<|r(t) - r(0)|^2> over atoms, replicas and time origins, in A^2: unwrapped [R, F, n, 3] -> float64 [lags].

    The motion of the centre of mass, of all atoms by `masses` [n], is taken out. To follow some of the atoms only,
    take it out before and give those alone, with None. Raises: `ValueError` for more lags than frames.
    """
    r = np.asarray(positions, np.float64)
    frames = _frames_for(r, lags)
    if masses is not None:
        r = r - np.einsum("n,rfnd->rfd", masses / np.sum(masses), r)[:, :, None]
    return np.stack([3 * np.mean((r[:, lag:] - r[:, : frames - lag]) ** 2) for lag in range(lags)])


def _frames_for(trajectory: np.ndarray, lags: int) -> int:
    frames = trajectory.shape[1]
    if not 1 <= lags <= frames:
        raise ValueError(f"{lags} lags of {frames} frames")
    return frames


def diffusivity(displacements: np.ndarray, time_step: float) -> float:
    """D in 1e-9 m^2 / s: a sixth of the slope of the mean-square displacement over its second half.

    Shapes: [lags] in A^2, `time_step` fs apart. Differs: the released code takes MSD / 6 t at the last lag, which
    includes the rattling at the start. Raises: `ValueError` for fewer than four lags.
    """
    if len(displacements) < 4:
        raise ValueError(f"{len(displacements)} lags are too few for a slope")
    times = np.arange(len(displacements)) * time_step
    half = len(times) // 2
    slope = np.polyfit(times[half:], np.asarray(displacements, float)[half:], 1)[0]
    return float(slope / 6 * DIFFUSIVITY_UNIT)


# --- other temperatures, and noise ------------------------------------------------------------------------------------


def temperature_weights(energies: np.ndarray, sampled: float, wanted: float) -> np.ndarray:
    """Weights [N] of sum 1 that make frames sampled at one temperature (K) stand for another: energies [N] in eV.

    w ~ exp(-E (1 / k T_wanted - 1 / k T_sampled)). Check `effective_sample_size`: it falls fast with the distance.
    """
    exponents = -(np.asarray(energies, float) / BOLTZMANN) * (1 / wanted - 1 / sampled)
    weights = np.exp(exponents - exponents.max())
    return weights / weights.sum()


class Comparable(Protocol):
    """What says how far two curves are apart."""

    def error(self, curve: np.ndarray, reference: np.ndarray) -> float:
        """Of curves [D]."""


def noise_floor(
    observable: Comparable,
    curves: np.ndarray,
    count: int,
    *,
    weights: np.ndarray | None = None,
    draws: int = 20,
    seed: int = 0,
) -> float:
    """The mean error of a sample of `count` of the reference's against all the others: curves by frame [N, D].

    What a perfect simulation of `count` independent frames would score. A sample is at most half of the frames. With
    `weights` [N] (frames of another temperature) samples are drawn by them, and the others count by them: at most half
    of the effective sample size. Not a number for fewer than two curves.
    """
    curves = np.asarray(curves, float)
    if len(curves) < 2:
        return float("nan")
    rng = np.random.default_rng(seed)
    total, errors = curves.sum(axis=0), []
    if weights is None:
        taken = min(count, len(curves) // 2)
    else:
        effective = 1 / np.sum((weights / np.sum(weights)) ** 2)
        taken = max(1, min(count, int(effective) // 2))
    for _ in range(draws):
        if weights is None:
            part = curves[rng.choice(len(curves), taken, replace=False)].sum(axis=0)
            errors.append(observable.error(part / taken, (total - part) / (len(curves) - taken)))
        else:
            chosen = rng.choice(len(curves), taken, p=weights / np.sum(weights))
            others = np.delete(np.arange(len(curves)), chosen)
            rest = weights[others] @ curves[others] / max(np.sum(weights[others]), np.finfo(float).tiny)
            errors.append(observable.error(curves[chosen].mean(axis=0), rest))
    return float(np.mean(errors))
