"""A potential: a network of atomic energies, bound to the atoms that it is for.

Everything that simulates or trains sees this class and no network. The energy counts from `reference`, the sum of the
elements' reference energies, so that float32 resolves what matters; forces do not know the difference.

**Units**: eV, A; stress in eV / A^3. **Shapes**: N atoms.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.errors import ConfigError
from stabletrain.nnip.pairs import (
    Neighbors,
    Pairs,
    all_arrivals,
    all_pairs,
    count_neighbors,
    find_neighbors,
    pair_geometry,
)
from stabletrain.nnip.systems import System, smallest_width

Params = Any

DENSE_ATOMS = 50
"""Molecules of up to this many atoms look at all their pairs; everything else gets a padded list."""
CAPACITY_MARGIN = 1.25


@dataclass(frozen=True)
class EnergyScale:
    """What the network's numbers mean: E = sum_i (scale * network_i + reference[species_i])."""

    scale: float  # eV
    reference: Mapping[int, float]  # atomic number -> eV

    def total_reference(self, species: np.ndarray) -> float:
        """The part of the energy that does not depend on positions, in eV (float64)."""
        return float(sum(self.reference[int(z)] for z in species))


@dataclass(frozen=True)
class Potential:
    """The energy of one system as a function of parameters and positions. Pure, for jit, grad and vmap.

    `network(species [N], pairs) -> [N]` is a Flax module; one with a true attribute `triplets` gets the pairs by atom
    as well. `capacity` is the room of the pair list, `degree` that for the neighbours of an atom (triplets); None looks
    at all pairs. The methods take `neighbors` where a list is at hand and make their own otherwise; an energy from a
    list that overflowed is NaN, never wrong: ask `neighbors(positions).overflow` and go on with `fitted(positions)`.
    """

    name: str
    network: nn.Module
    system: System
    cutoff: float
    scale: EnergyScale
    capacity: int | None = None
    degree: int | None = None

    def __post_init__(self) -> None:
        cell = self.system.cell
        if cell is not None and 2 * self.cutoff > smallest_width(cell):
            raise ConfigError(
                f"a cutoff of {self.cutoff:g} A needs a cell at least {2 * self.cutoff:g} A wide, but this one is "
                f"{smallest_width(cell):.2f} A: an atom would see two images of another"
            )

    @property
    def reference(self) -> float:
        """What to add for the total energy, in eV."""
        return self.scale.total_reference(self.system.species)

    # --- which pairs --------------------------------------------------------------------------------------------------

    @property
    def triplets(self) -> bool:
        """Whether the network looks at triplets."""
        return bool(getattr(self.network, "triplets", False))

    @property
    def room(self) -> tuple[int, ...]:
        """What decides the shapes: nothing where all pairs are looked at, else `capacity`, and `degree` if there is."""
        return tuple(size for size in (self.capacity, self.degree) if size is not None)

    def with_room(self, room: tuple[int, ...]) -> Potential:
        """The same potential with the `room` of another."""
        sizes = [*room, None, None]
        return dataclasses.replace(self, capacity=sizes[0], degree=sizes[1])

    @functools.cached_property
    def _count(self) -> Any:
        def count(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
            return count_neighbors(positions, self.system.cell, self.cutoff)

        return jax.jit(jax.vmap(count))

    def counts(self, positions: Any) -> tuple[np.ndarray, np.ndarray]:
        """Pairs within the cutoff, and the most neighbours of an atom, of each of `positions` [..., N, 3]: [frames]."""
        frames = np.asarray(positions).reshape(-1, self.system.count, 3)
        found = [self._count(frames[i : i + 64]) for i in range(0, len(frames), 64)]
        return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])

    def fitted(self, positions: Any) -> Potential:
        """This potential with room for the pairs of all `positions` [..., N, 3] and a margin; never less than before.

        Not for use under jit: the room is a shape. Small molecules need none and come back as they are.
        """
        if not self.system.periodic and self.system.count <= DENSE_ATOMS:
            return self
        pairs, degrees = self.counts(positions)
        return self._with_at_least(CAPACITY_MARGIN * pairs.max(), CAPACITY_MARGIN * degrees.max())

    def larger(self) -> Potential:
        """This potential with a quarter more room, as far as there are pairs. Raises: `ValueError` without a list."""
        if self.capacity is None:
            raise ValueError("a potential that looks at all pairs has all the room that it needs")
        return self._with_at_least(1.25 * self.capacity, 1.25 * (self.degree or 0))

    def _with_at_least(self, capacity: float, degree: float) -> Potential:
        """Room rounded up, to 64 pairs and 4 neighbours; not more than there can be, nor less than there was."""
        count = self.system.count
        pairs = min(count * (count - 1) // 2, int(np.ceil(capacity / 64)) * 64)
        neighbors = min(count - 1, int(np.ceil(degree / 4)) * 4)
        return dataclasses.replace(
            self,
            capacity=max(pairs, self.capacity or 0),
            degree=max(neighbors, self.degree or 0) if self.triplets else None,
        )

    def neighbors(self, positions: jax.Array) -> Neighbors:
        """The list of pairs at `positions` [N, 3]."""
        if self.capacity is None:
            first, second = all_pairs(self.system.count)
            count, filled = jnp.int32(len(first)), jnp.ones(len(first), bool)
            arrivals = all_arrivals(self.system.count) if self.triplets else None
            return Neighbors(jnp.asarray(first), jnp.asarray(second), filled, count, jnp.zeros((), bool), arrivals)
        return find_neighbors(
            positions, self.system.cell, cutoff=self.cutoff, capacity=self.capacity, degree=self.degree
        )

    def pairs(
        self, positions: jax.Array, neighbors: Neighbors | None = None, strain: jax.Array | None = None
    ) -> tuple[Pairs, jax.Array | None]:
        """What the network sees at `positions` [N, 3]; and whether the list overflowed, None where there is none."""
        cell = self.system.cell
        if neighbors is None and self.capacity is None:
            first, second = (jnp.asarray(ends) for ends in all_pairs(self.system.count))
            arrivals = all_arrivals(self.system.count) if self.triplets else None
            return pair_geometry(positions, first, second, None, cell, self.cutoff, strain, arrivals), None
        listed = self.neighbors(positions) if neighbors is None else neighbors
        pairs = pair_geometry(
            positions, listed.first, listed.second, listed.filled, cell, self.cutoff, strain, listed.arrivals
        )
        return pairs, listed.overflow

    # --- energies -----------------------------------------------------------------------------------------------------

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters; they do not depend on any position."""
        arrivals = all_arrivals(2) if self.triplets else None
        pairs = pair_geometry(
            jnp.zeros((2, 3)), jnp.array([0]), jnp.array([1]), None, None, self.cutoff, arrivals=arrivals
        )
        return self.network.init({"params": key}, jnp.asarray(self.system.species[[0, -1]]), pairs)["params"]

    def energy_per_atom(
        self,
        params: Params,
        positions: jax.Array,
        neighbors: Neighbors | None = None,
        strain: jax.Array | None = None,
    ) -> jax.Array:
        """Atomic energies [N] in eV without the reference, at `positions` [N, 3]."""
        pairs, overflow = self.pairs(positions, neighbors, strain)
        energies: Any = self.network.apply({"params": params}, jnp.asarray(self.system.species), pairs)
        energies = self.scale.scale * energies
        return energies if overflow is None else jnp.where(overflow, jnp.nan, energies)

    def energy(self, params: Params, positions: jax.Array, neighbors: Neighbors | None = None) -> jax.Array:
        """The energy [] in eV without the reference, at `positions` [N, 3]."""
        return jnp.sum(self.energy_per_atom(params, positions, neighbors))

    def energy_and_forces(
        self, params: Params, positions: jax.Array, neighbors: Neighbors | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Energy [] in eV and forces [N, 3] = -dE/dx in eV / A."""
        energy, gradient = jax.value_and_grad(self.energy, argnums=1)(params, positions, neighbors)
        return energy, -gradient

    def stress(self, params: Params, positions: jax.Array, neighbors: Neighbors | None = None) -> jax.Array:
        """The stress [3, 3] = dE/dstrain / volume of a periodic system, positive under tension.

        Raises: `ValueError` for a system without a cell.
        """
        if self.system.cell is None:
            raise ValueError("stress needs a periodic cell")

        def strained(strain: jax.Array) -> jax.Array:
            return jnp.sum(self.energy_per_atom(params, positions, neighbors, strain))

        virial = jax.grad(strained)(jnp.zeros((3, 3), positions.dtype))
        return 0.5 * (virial + virial.T) / abs(np.linalg.det(self.system.cell))
