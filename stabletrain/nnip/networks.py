"""The networks by name. Each is a Flax module of (species [N], pairs) -> energies of atoms [N], without unit.

A module is imported when it is asked for: e3nn, which NequIP needs, takes a second to import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn

from stabletrain.nnip.config import NnipConfig


@dataclass(frozen=True)
class Surroundings:
    """What a network may want to know of the data."""

    elements: tuple[int, ...]  # atomic numbers that occur
    average_neighbors: float  # within the cutoff, over the training frames


def _schnet(config: NnipConfig, around: Surroundings) -> nn.Module:
    from stabletrain.nnip.schnet import SchNet

    return SchNet(config.features, config.interactions, cutoff=config.cutoff)


def _painn(config: NnipConfig, around: Surroundings) -> nn.Module:
    from stabletrain.nnip.painn import PaiNN

    return PaiNN(config.features, config.interactions, cutoff=config.cutoff)


def _nequip(config: NnipConfig, around: Surroundings) -> nn.Module:
    from stabletrain.nnip.nequip import NequIP

    return NequIP(around.elements, around.average_neighbors, config.features, config.interactions, cutoff=config.cutoff)


def _gemnet(config: NnipConfig, around: Surroundings) -> nn.Module:
    from stabletrain.nnip.gemnet import GemNetT

    return GemNetT(config.features, config.interactions, cutoff=config.cutoff)


NETWORKS: dict[str, Callable[[NnipConfig, Surroundings], nn.Module]] = {
    "schnet": _schnet,
    "painn": _painn,
    "nequip": _nequip,
    "gemnet-t": _gemnet,
}
