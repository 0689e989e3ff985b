"""One learning step of StABlE Training: the gradient of an observable and of energies and forces, added.

    g = kT * d L_obs / dth  +  weight * d L_EF / dth,     th <- th - rate * clip(g)

With the factor kT the weight is the released code's lambda (its observable gradient has no 1/kT); in the paper's own
units it is weight / kT. L_obs is the squared error of an observable over the frames of a window, L_EF the loss of the
potential's own training over the whole training set; no frame of the simulation is labelled.

Source: Raja et al. 2025, Eq. 6 and Algorithm 1. **Units**: eV, A.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.methods.stable import (
    Residual,
    boltzmann_gradient,
    energies_of,
    flatten_histogram,
    local_boltzmann_gradient,
    observable_loss,
    reweighted_gradient,
    reweighting,
    squared_error_cotangent,
)
from stabletrain.nnip.criteria import bond_lengths
from stabletrain.nnip.observables import StaticObservable, mean_curve, smeared_distance_distribution
from stabletrain.nnip.potential import Params, Potential
from stabletrain.nnip.systems import System, molecules

Array = jax.Array
PERCENT = 100.0
"""h(r) is learnt as percent of the distances in each interval, as the released code scales it."""
LOCAL_BINS, LOCAL_PER_REPLICA = 100, 5
"""Neighbourhoods are drawn evenly over this many intervals of the deviation, so many for each replica."""
REFERENCE_FRAMES = 2000
"""Frames, at most, that an observable's reference is taken over: of the training set, evenly spread, for what is
learnt; of the test set for what is reported."""


@dataclass(frozen=True)
class Learned:
    """What an observable gives for one window."""

    loss: Array
    gradient: Params  # kT * dL/dth
    used: Array  # how many samples


@dataclass(frozen=True)
class Estimator:
    """How the gradient of an observable is estimated."""

    kT: float  # eV
    residual: Residual = "full-sample"
    minibatch: int | None = None
    replicas: int | None = None  # the covariance within each of so many equal runs of samples; None: of all samples
    chunk: int = 64  # structures at once

    def group(self, count: int) -> Array | None:
        """Which replica each of `count` samples is of, where the covariance is within replicas: int [N]."""
        return None if self.replicas is None else jnp.arange(count) // (count // self.replicas)


Observe = Callable[[Array], Array]
"""positions [N, n, 3] -> what an observable measures of each frame, [N, ...]: once for a window."""
ObservableGradient = Callable[[Potential, Params, Array, Array, Array, Array], Learned]
"""(potential, params, positions [N, n, 3], measured [N, ...], valid [N], key) -> loss and gradient."""
ReweightedGradient = Callable[[Potential, Params, Array, Array, Array, Array], tuple[Learned, Array]]
"""(potential, params, positions [N, n, 3], measured [N, ...], valid [N], energies of the potential that was simulated
[N] eV) -> loss and gradient; weights [N]."""


@dataclass(frozen=True)
class Structures:
    """Labelled frames: positions [N, n, 3] A, energies [N] eV without the elements' reference, forces [N, n, 3]."""

    positions: np.ndarray
    energies: np.ndarray
    forces: np.ndarray

    def tree(self) -> dict[str, Array]:
        """As a loss takes them."""
        return {
            "positions": jnp.asarray(self.positions, jnp.float32),
            "energy": jnp.asarray(self.energies, jnp.float32),
            "forces": jnp.asarray(self.forces, jnp.float32),
        }


# --- h(r) -------------------------------------------------------------------------------------------------------------


def distances_of(observable: StaticObservable) -> Observe:
    """h(r) of each frame, in percent by interval: [N, n, 3] -> [N, D]."""
    return lambda positions: observable.of_frames(positions) * observable.spacing * PERCENT


def distances_target(observable: StaticObservable, frames: np.ndarray) -> Array:
    """The mean h(r) of training frames [N, n, 3], in percent by interval: [D]."""
    return jnp.mean(jax.jit(distances_of(observable))(jnp.asarray(frames, jnp.float32)), axis=0)


def distances_gradient(target: Array, estimator: Estimator) -> ObservableGradient:
    """Learning h(r): one sample is one frame, those of a replica one after the other."""
    unit = estimator.kT if estimator.residual != "released" else 1.0

    def gradient(
        potential: Potential, params: Params, positions: Array, curves: Array, valid: Array, key: Array
    ) -> Learned:
        slope = boltzmann_gradient(
            potential.energy,
            params,
            positions,
            curves,
            squared_error_cotangent(target),
            kT=estimator.kT,
            residual=estimator.residual,
            minibatch=estimator.minibatch,
            valid=valid,
            order=_order(key, len(valid), estimator),
            group=estimator.group(len(valid)),
            chunk_size=estimator.chunk,
        )
        loss = observable_loss(mean_curve(curves, valid), target)
        return Learned(loss, jax.tree.map(lambda x: unit * x, slope), jnp.sum(valid))

    return gradient


def _order(key: Array, count: int, estimator: Estimator) -> Array | None:
    """Random: halves and minibatches of mixed replicas, as the released code has it. None where it does not matter."""
    return None if estimator.residual == "full-sample" else jax.random.permutation(key, count)


def distances_again(target: Array, estimator: Estimator) -> ReweightedGradient:
    """Learning h(r) from frames of an earlier potential."""

    def gradient(
        potential: Potential, params: Params, positions: Array, curves: Array, valid: Array, reference: Array
    ) -> tuple[Learned, Array]:
        # A frame that does not count gets an energy that gives it no weight.
        reference = jnp.where(valid, reference, -jnp.inf)
        energies = energies_of(potential.energy, params, positions, chunk_size=estimator.chunk)
        weights = reweighting(energies, reference, kT=estimator.kT)
        slope = reweighted_gradient(
            potential.energy,
            params,
            positions,
            curves,
            squared_error_cotangent(target),
            kT=estimator.kT,
            reference_energies=reference,
            energies=energies,
            group=estimator.group(len(valid)),
            chunk_size=estimator.chunk,
        )
        loss = observable_loss(weights @ curves, target)
        return Learned(loss, jax.tree.map(lambda x: estimator.kT * x, slope), jnp.sum(valid)), weights

    return gradient


def distances_observable(system: System, reach: float) -> StaticObservable:
    """h(r) as it is learnt, up to `reach` A: smeared by 0.01 A, in intervals of 0.02 A."""
    return smeared_distance_distribution(system.count, r_max=reach, dr=0.02, width=0.01, cell=system.cell)


# --- bond lengths, molecule by molecule -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Molecules:
    """The equal molecules of a system: their atoms [M, k] and their bonds [M, b] (numbers into the system's)."""

    atoms: np.ndarray
    bonds: np.ndarray


def equal_molecules(system: System) -> Molecules:
    """Raises: `ValueError` when the molecules are not all alike, atom by atom, or have no bonds."""
    molecule = molecules(system)
    groups = [np.flatnonzero(molecule == m) for m in range(int(molecule.max()) + 1)]
    bond_molecule = molecule[system.bonds[:, 0]] if len(system.bonds) else np.zeros(0, int)
    bonds = [np.flatnonzero(bond_molecule == m) for m in range(len(groups))]
    shapes = {(len(a), tuple(system.species[a]), len(b)) for a, b in zip(groups, bonds, strict=True)}
    if len(shapes) != 1 or not len(bonds[0]):
        raise ValueError("bond lengths by molecule need molecules that are all alike, with bonds")
    return Molecules(np.stack(groups), np.stack(bonds))


def bonds_target(lengths: np.ndarray, which: Molecules) -> Array:
    """Mean lengths of a molecule's bonds, over molecules: from the system's [bonds] -> [b] in A."""
    return jnp.asarray(lengths[which.bonds].mean(axis=0), jnp.float32)


def bonds_of(system: System, which: Molecules) -> Observe:
    """The bond lengths of each molecule of each frame in A: [N, n, 3] -> [N, M, b]."""
    return lambda positions: bond_lengths(system, positions)[:, jnp.asarray(which.bonds)]


def bonds_gradient(which: Molecules, target: Array, estimator: Estimator, replicas: int) -> ObservableGradient:
    """Learning the bond lengths of a molecule: one sample is one molecule of one frame, rare ones more often.

    Source: the released code for water.
    """
    unit = estimator.kT if estimator.residual != "released" else 1.0

    def gradient(
        potential: Potential, params: Params, positions: Array, lengths: Array, valid: Array, key: Array
    ) -> Learned:
        kept_key, order_key = jax.random.split(key)
        worst = jnp.max(jnp.abs(lengths - target), axis=-1)
        known = jnp.broadcast_to(valid[:, None], worst.shape)
        kept = flatten_histogram(
            kept_key, worst.reshape(-1), bins=LOCAL_BINS, per_bin=LOCAL_PER_REPLICA * replicas, valid=known.reshape(-1)
        ).reshape(worst.shape)
        slope = local_boltzmann_gradient(
            potential.energy_per_atom,
            params,
            positions,
            jnp.asarray(which.atoms),
            lengths,
            squared_error_cotangent(target),
            kT=estimator.kT,
            residual=estimator.residual,
            minibatch=estimator.minibatch,
            valid=kept,
            order=_order(order_key, kept.size, estimator),
            chunk_size=estimator.chunk,
        )
        mean = mean_curve(lengths.reshape(-1, lengths.shape[-1]), kept.reshape(-1))
        return Learned(observable_loss(mean, target), jax.tree.map(lambda x: unit * x, slope), jnp.sum(kept))

    return gradient


# --- energies and forces ----------------------------------------------------------------------------------------------

StructureLoss = Callable[[Params, Any], Array]
"""(params, one structure) -> its loss."""


def energy_force_loss(
    potential: Potential,
    *,
    energy_weight: float = 0.05,
    force_weight: float = 0.95,
    energy_loss: str = "total",
    force_loss: str = "squared",
) -> StructureLoss:
    """energy_weight * (E error)^2 + force_weight * (mean F error), in eV and A.

    The energy's error is that of the structure (`total`) or of an atom (`per-atom`: over the number of atoms). The
    mean error of forces is that of squared components (`squared`) or of the lengths of the atoms' errors (`length`).
    A structure is {"positions" [n, 3], "energy" [] without the elements' reference, "forces" [n, 3]}.
    Source: the training configurations of the released potentials: SchNet with the defaults, NequIP per atom with 1 and
    1000, GemNet-T with lengths, 0.001 and 0.999.
    """
    atoms = {"total": 1, "per-atom": potential.system.count}[energy_loss]

    def loss(params: Params, structure: Any) -> Array:
        energy, forces = potential.energy_and_forces(params, structure["positions"])
        squared = (forces - structure["forces"]) ** 2
        if force_loss == "squared":
            force_error = jnp.mean(squared)
        else:
            total = jnp.sum(squared, axis=-1)
            # Where a force is met exactly its length has no slope, and the gradient would not be a number.
            missed = total > 0
            force_error = jnp.mean(jnp.where(missed, jnp.sqrt(jnp.where(missed, total, 1.0)), 0.0))
        return energy_weight * ((energy - structure["energy"]) / atoms) ** 2 + force_weight * force_error

    return loss


def mean_loss_and_gradient(loss: StructureLoss, params: Params, structures: Any, *, chunk: int) -> tuple[Array, Params]:
    """The mean loss over all structures (leaves [N, ...]) and its gradient, a chunk at a time."""
    count = len(jax.tree.leaves(structures)[0])
    chunk = min(chunk, count)
    chunks = -(-count // chunk)
    fill = chunks * chunk - count

    def in_chunks(x: Array) -> Array:
        x = jnp.concatenate([x, jnp.repeat(x[-1:], fill, axis=0)])
        return x.reshape(chunks, chunk, *x.shape[1:])

    weights = jnp.pad(jnp.full(count, 1 / count), (0, fill)).reshape(chunks, chunk)

    def weighted(params: Params, part: Any, weights: Array) -> Array:
        return jnp.sum(weights * jax.vmap(loss, (None, 0))(params, part))

    def add(total: tuple[Array, Params], part: tuple[Any, Array]) -> tuple[tuple[Array, Params], None]:
        value_and_slope = jax.value_and_grad(weighted)(params, *part)
        return jax.tree.map(jnp.add, total, value_and_slope), None

    start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add, start, (jax.tree.map(in_chunks, structures), weights))[0]
