"""The families by name. Each entry imports the family's description when it is asked for, which imports no JAX."""

from __future__ import annotations

from collections.abc import Callable

from stabletrain.errors import RunDirectoryError, nearest
from stabletrain.training.experiment import Family


def _diffusion() -> Family:
    from stabletrain.diffusion.family import FAMILY

    return FAMILY


def _gan() -> Family:
    from stabletrain.gan.family import FAMILY

    return FAMILY


def _continual() -> Family:
    from stabletrain.continual.family import FAMILY

    return FAMILY


def _nnip() -> Family:
    from stabletrain.nnip.family import FAMILY

    return FAMILY


FAMILIES: dict[str, Callable[[], Family]] = {
    "diffusion": _diffusion,
    "gan": _gan,
    "continual": _continual,
    "nnip": _nnip,
}


def family_called(name: str, where: str) -> Family:
    """The family of a stored run; `where` names the run in the message.

    Raises: `RunDirectoryError` for a family that this version does not have.
    """
    if name not in FAMILIES:
        raise RunDirectoryError(f"{where} is a run of the unknown family {name!r}: {nearest(name, FAMILIES)}")
    return FAMILIES[name]()


def all_families() -> list[Family]:
    """Every family, in the order of the help."""
    return [load() for load in FAMILIES.values()]
