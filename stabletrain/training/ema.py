"""Exponential moving average of parameters.

ema <- d ema + (1 - d) params, once per update, in float32 whatever the type of the parameters.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Params = Any


def start_average(params: Params) -> Params:
    """The average before the first update: a copy of the parameters, in buffers of its own (they may be donated)."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)


def average_decay(position: jax.Array, decay: float, *, ramp: bool) -> jax.Array:
    """The decay of update number `position` (0, 1, ...). With `ramp` it is min(decay, (1 + n) / (10 + n)).

    The ramp makes the average forget the initial parameters soon, which matters in short runs: with a decay of 0.9999
    a run of 1,000 steps would otherwise keep nine tenths of its initialisation.
    """
    if not ramp:
        return jnp.full((), decay, jnp.float32)
    n = position.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + n) / (10.0 + n))


def update_average(average: Params, params: Params, decay: jax.Array) -> Params:
    """One update. The difference is added, so an average that has arrived stays put exactly."""
    return jax.tree.map(lambda a, p: a + (1.0 - decay) * (p.astype(jnp.float32) - a), average, params)
