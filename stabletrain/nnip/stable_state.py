"""What evolves in StABlE Training: parameters, replicas with thermostats, where windows began, counters of the phases.

All of it is in the checkpoint, so that a run that is stopped in either phase goes on to the bit.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from stabletrain.nnip.dynamics import Swarm
from stabletrain.nnip.potential import Params
from stabletrain.nnip.stable_phases import Progress
from stabletrain.training.stability import MonitorState

Array = jax.Array

HISTORY = 32
"""Earlier window starts that are kept for random restarts; older ones are forgotten."""


@struct.dataclass
class ProgressArrays:
    """`Progress` as arrays."""

    learning: Array  # bool []
    cycle: Array  # int32 []
    epoch: Array  # int32 []
    lowered: Array  # int32 []
    best: Array  # float32 []
    waiting: Array  # int32 []


def stored(progress: Progress) -> ProgressArrays:
    """As arrays. Shares are fractions of the replicas; float32 holds their order."""
    return ProgressArrays(
        learning=jnp.asarray(progress.learning),
        cycle=jnp.asarray(progress.cycle, jnp.int32),
        epoch=jnp.asarray(progress.epoch, jnp.int32),
        lowered=jnp.asarray(progress.lowered, jnp.int32),
        best=jnp.asarray(progress.best, jnp.float32),
        waiting=jnp.asarray(progress.waiting, jnp.int32),
    )


def loaded(arrays: ProgressArrays) -> Progress:
    """As plain numbers."""
    values = jax.device_get(arrays)
    return Progress(
        learning=bool(values.learning),
        cycle=int(values.cycle),
        epoch=int(values.epoch),
        lowered=int(values.lowered),
        best=float(values.best),
        waiting=int(values.waiting),
    )


@struct.dataclass
class StableState:
    """All that evolves. H: `HISTORY`, R: replicas."""

    params: Params
    optimizer: Any
    monitor: MonitorState
    swarm: Swarm  # after the last window
    start: Swarm  # at its beginning
    history: Swarm  # leaves [H, R, ...]: earlier beginnings, a ring
    windows: Array  # int32 []: windows so far; the ring's next place is windows % H
    unstable: Array  # bool [R]: in the last window
    progress: ProgressArrays
    updates: Array  # int32 []: learning steps so far
    capacity: Array  # int32 []: room of the neighbour list; 0 without one; with triplets [2], see Potential.room
