"""A potential as an ASE calculator, and any ASE calculator as forces that the dynamics here can use."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from stabletrain.errors import ConfigError, DataError
from stabletrain.nnip.potential import Params, Potential
from stabletrain.nnip.systems import System


class PotentialCalculator(Calculator):
    """ASE's view of a trained potential: energy (eV, with the elements' reference), energies, forces, stress.

    The atoms must be those of the potential's system, in its order; only positions may differ. Periodic systems have
    the system's cell. A neighbour list that overflows is made larger, and the structure computed again.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012 (ASE's)

    def __init__(self, potential: Potential, params: Params, **options: Any) -> None:
        super().__init__(**options)
        self.potential = potential
        self._params = params
        self._compile()

    def _compile(self) -> None:
        potential = self.potential

        def evaluate(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            _, forces = potential.energy_and_forces(params, x)
            return potential.energy_per_atom(params, x), forces, potential.neighbors(x).overflow

        self._evaluate = jax.jit(evaluate)
        self._stress = jax.jit(potential.stress) if potential.system.periodic else None

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Fills `results`. Raises: `DataError` for other atoms, cell or periodicity than the potential's."""
        super().calculate(atoms, properties or ["energy"], system_changes)
        present = self.atoms
        assert present is not None, "ASE's base class has set it"
        check_atoms(present, self.potential.system)
        x = jnp.asarray(present.get_positions(), jnp.float32)
        energies, forces, overflow = self._evaluate(self._params, x)
        if bool(overflow):
            self.potential = self.potential.fitted(np.asarray(x))
            self._compile()
            energies, forces, overflow = self._evaluate(self._params, x)
        reference = self.potential.scale.reference
        by_atom = np.asarray(energies, float) + [reference[int(z)] for z in self.potential.system.species]
        self.results = {
            "energy": float(by_atom.sum()),
            "free_energy": float(by_atom.sum()),
            "energies": by_atom,
            "forces": np.asarray(forces, float),
        }
        if self._stress is not None:
            s = np.asarray(self._stress(self._params, x), float)
            self.results["stress"] = s[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]  # Voigt: xx yy zz yz xz xy


def check_atoms(atoms: Atoms, system: System, source: str = "") -> None:
    """Raises: `DataError`, beginning with where the atoms are from, unless they are the system's but for positions."""
    begin = f"{source}: " if source else ""
    if not np.array_equal(atoms.get_atomic_numbers(), system.species):
        raise DataError(
            f"{begin}this potential is for {_formula(system.species)} in that order, not for "
            f"{_formula(atoms.get_atomic_numbers())}"
        )
    if np.any(atoms.pbc != system.periodic):
        kind = "periodic along each axis" if system.periodic else "without periodicity"
        raise DataError(
            f"{begin}this potential is for atoms {kind} (pbc={system.periodic}), not for pbc={atoms.pbc.tolist()}"
        )
    if system.cell is not None and not np.allclose(atoms.cell.array, system.cell, atol=1e-4):
        raise DataError(
            f"{begin}this potential is for the cell {system.cell.tolist()}, not {atoms.cell.array.tolist()}"
        )


def _formula(species: np.ndarray) -> str:
    return Atoms(numbers=species).get_chemical_formula(mode="reduce")


def forces_of(
    calculator: Calculator, system: System, origin: np.ndarray, *, name: str = "the ASE calculator"
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The `Forces` of `stabletrain.nnip.dynamics` of an ASE calculator; the params they are given mean nothing.

    Energies count from that of the structure `origin` [n, 3], so that float32 resolves them. An error of the
    calculator at some structure (a calculation that does not converge) gives NaN: the replica is frozen.
    Raises: `DataError` with the calculator's `name` where it has no energy or forces of `origin`.
    """
    from ase.calculators.calculator import CalculationFailed, CalculatorError, SCFError

    atoms = Atoms(
        numbers=system.species, cell=system.cell, pbc=system.periodic, positions=origin, calculator=calculator
    )
    try:
        zero = float(atoms.get_potential_energy())
        atoms.get_forces()
    except (NotImplementedError, CalculatorError) as error:  # an element or a property that it does not have
        elements = ", ".join(sorted(set(system.symbols)))
        raise DataError(f"{name} does not compute these atoms ({elements}): {error}") from error

    def evaluate(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        atoms.set_positions(np.asarray(positions, float))
        try:
            energy, forces = atoms.get_potential_energy() - zero, atoms.get_forces()
        except (CalculationFailed, SCFError):
            energy, forces = np.nan, np.full((system.count, 3), np.nan)
        return np.asarray(energy, positions.dtype), np.asarray(forces, positions.dtype)

    def forces(params: Any, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        shapes = jax.ShapeDtypeStruct((), positions.dtype), jax.ShapeDtypeStruct(positions.shape, positions.dtype)
        energy, force = jax.pure_callback(evaluate, shapes, positions, vmap_method="sequential")
        return energy, force

    return forces


def calculator_called(name: str) -> Calculator:
    """The ASE calculator that "package.module:Name" names, made without arguments (or an object that is one).

    Raises: `ConfigError` for a name of another form, or that cannot be imported.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"--calculator takes MODULE:NAME, such as ase.calculators.emt:EMT, not {name!r}")
    try:
        found = getattr(importlib.import_module(module), attribute)
        made = found if isinstance(found, Calculator) else found()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"--calculator {name}: {error}") from error
    if not hasattr(made, "get_potential_energy"):
        raise ConfigError(f"--calculator {name} is no ASE calculator")
    return made
