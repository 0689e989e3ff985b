"""The units of atomistic simulation here: eV, Angstrom, fs, K, and atomic mass units. CODATA 2018."""

from __future__ import annotations

BOLTZMANN = 8.617333262e-5
"""k_B in eV / K."""

ACCELERATION = 1.602176634e-19 / 1.66053906660e-27 * 1e20 * 1e-30
"""1 eV / (A amu) in A / fs^2: what turns a force over a mass into an acceleration, and m v^2 (divided) into eV."""


def thermal_energy(temperature: float) -> float:
    """kT in eV of a temperature in K."""
    return BOLTZMANN * temperature
