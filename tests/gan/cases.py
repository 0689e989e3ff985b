"""Tiny GANs for tests, and what is done with them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from stabletrain.gan.config import GanConfig
from stabletrain.gan.experiment import GanExperiment
from stabletrain.gan.resolution import resolve
from stabletrain.training.config import make_config
from stabletrain.training.devices import compile_step, make_mesh, replicated

TINY: dict[str, Any] = {
    "batch_size": 8, "steps": 20, "generator_width": 8, "discriminator_width": 8, "z_dim": 4, "depth": 1,
    "embedding_dim": 4, "eval_samples": 0, "sampling_batch": 20,
}  # fmt: skip


def tiny_config(**values: Any) -> GanConfig:
    """A resolved configuration of a GAN of a few hundred parameters on digits."""
    chosen = {**TINY, **values}
    method, conditioning = chosen.get("method", "reacgan"), chosen.get("conditioning")
    embedded = conditioning in ("2c", "d2dce") or (conditioning is None and method.startswith(("reacgan", "contragan")))
    if not embedded and "embedding_dim" not in values:
        chosen.pop("embedding_dim")
    return resolve(make_config(GanConfig, chosen))


def tiny(*, devices: int = 1, **values: Any) -> GanExperiment:
    """The experiment of `tiny_config`."""
    config = tiny_config(**values)
    return GanExperiment(config, mesh=make_mesh(devices, config.batch_size))


def run(experiment: GanExperiment, groups: list[int], inner_steps: int, state=None, position: int = 0):
    """The state and all rows after groups of steps."""
    if state is None:
        state = experiment.init(jax.random.key(experiment.config.seed))
    state = jax.device_put(state, replicated(experiment.mesh), may_alias=False)
    program = compile_step(experiment, experiment.mesh, inner_steps)
    rows = []
    for count in groups:
        state, metrics = program(state, [experiment.batch(position + i) for i in range(count)])
        rows += metrics.rows()
        position += count
    return state, rows


def leaves(tree: Any) -> list[np.ndarray]:
    """The leaves as NumPy arrays."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_equal(first: Any, second: Any) -> None:
    """Bitwise."""
    for a, b in zip(leaves(first), leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


class Context:
    """An evaluation's context that counts its ticks and, if asked, interrupts at one."""

    def __init__(self, scratch: Any, stop_at: int | None = None) -> None:
        self.scratch, self.ticks, self.stop_at = scratch, 0, stop_at

    def tick(self, label: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        self.ticks += 1
        if self.ticks == self.stop_at:
            raise KeyboardInterrupt
