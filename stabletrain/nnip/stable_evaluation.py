"""What StABlE Training gained and what it cost: errors and stability of a potential beside those of its base model.

**Units**: meV and meV / A for errors, ps for times, K.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.errors import ConfigError
from stabletrain.nnip.benchmark import (
    BenchmarkResult,
    Conditions,
    Simulator,
    benchmark,
    observable_figure,
    slug,
    survival_figure,
)
from stabletrain.nnip.criteria import Criteria, Thresholds, default_thresholds
from stabletrain.nnip.observables import StaticObservable, static_observables
from stabletrain.nnip.potential import Params, Potential
from stabletrain.nnip.stable_learning import REFERENCE_FRAMES, Structures
from stabletrain.nnip.stable_options import StableOptions
from stabletrain.nnip.systems import System
from stabletrain.random_keys import random_key
from stabletrain.training.experiment import Evaluation, EvaluationContext

ERROR_CHUNK = 50


class StableEvaluation:
    """Evaluates potentials of one run, each beside the base model, whose simulations are run once in a process."""

    def __init__(
        self,
        config: Any,
        *,
        base_params: Params,
        test: Structures,
        criteria_of: Callable[[Thresholds], Criteria],
    ) -> None:
        """`config` has the fields of `StableOptions`; `criteria_of` makes the run's criteria from thresholds.

        Raises: `ConfigError` for a threshold that the system has no criterion for.
        """
        self.config = config
        self.base_params = base_params
        self.test = test
        self._criteria_of = criteria_of
        self._thresholds = benchmark_thresholds(config, criteria_of(Thresholds()).system)
        self._of_base: dict[float, BenchmarkResult] = {}
        self._predict: dict[tuple[int, ...], Any] = {}  # by the length of the neighbour list
        self._simulators: dict[tuple[float, tuple[int, ...]], Simulator] = {}  # and by temperature

    def __call__(self, potential: Potential, params: Params, step: int, context: EvaluationContext) -> Evaluation:
        """Force and energy errors, and the stability benchmark, of the potential as it is and of the base model.

        `eval/force_mae_test` in meV / A and `eval/energy_mae_test` in meV; the benchmark's with its protocol in the
        name, those of the base model with `base_` before them. Survival and observables also as figures. At
        `benchmark_temperatures` only survival: the reference frames are of the run's own temperature.
        """
        scalars: dict[str, float] = {}
        for name, one in (("", params), ("base_", self.base_params)):
            energy, force = self._errors(potential, one, context)
            scalars |= {f"eval/{name}energy_mae_test": energy, f"eval/{name}force_mae_test": force}
        files: dict[str, bytes] = {}
        config = self.config
        if config.benchmark_replicas:
            for temperature in (config.temperature, *config.benchmark_temperatures):
                own = temperature == config.temperature
                label = "benchmark" if own else f"benchmark at {temperature:g} K"
                after = self._benchmark(potential, params, temperature, label, context)
                if temperature not in self._of_base:
                    label += " of the base"
                    self._of_base[temperature] = self._benchmark(
                        potential, self.base_params, temperature, label, context
                    )
                before = self._of_base[temperature]
                scalars |= self._scalars(after, temperature) | self._scalars(before, temperature, "base_")
                where = "" if own else f"-{temperature:g}K"
                files[f"eval/survival{where}-{step:08d}.png"] = survival_figure(
                    {"base": before.survival, "StABlE": after.survival},
                    title=f"{temperature:g} K, {config.timestep:g} fs, {config.thermostat}",
                )
                if own:
                    files |= self._observable_figures(potential, before, after, step)
        return Evaluation(scalars=scalars, files=files)

    def _scalars(self, result: BenchmarkResult, temperature: float, whose: str = "") -> dict[str, float]:
        protocol = f"{self.config.benchmark_time:g}ps_{temperature:g}K"
        compared = {slug(name) for name in result.observables} if temperature != self.config.temperature else ()
        return {
            f"eval/{whose}{key}_{protocol}": value
            for key, value in result.scalars().items()
            if math.isfinite(value) and not any(key.startswith(f"{name}_") for name in compared)
        }

    def _observable_figures(
        self, potential: Potential, before: BenchmarkResult, after: BenchmarkResult, step: int
    ) -> dict[str, bytes]:
        files = {}
        for observable in self._observables(potential):
            curves = {
                "reference": after.observables[observable.name].reference,
                "base": before.observables[observable.name].curve,
                "StABlE": after.observables[observable.name].curve,
            }
            name = observable.name.lower().replace("(", "").replace(")", "").replace(" ", "-")
            files[f"eval/{name}-{step:08d}.png"] = observable_figure(observable, curves)
        return files

    def _observables(self, potential: Potential) -> list[StaticObservable]:
        return static_observables(potential.system, distance_reach=self.config.distance_reach)

    def _errors(self, potential: Potential, params: Params, context: EvaluationContext) -> tuple[float, float]:
        """Mean absolute errors of energies (meV) and force components (meV / A) on the test set."""
        if potential.room not in self._predict:
            self._predict[potential.room] = jax.jit(jax.vmap(potential.energy_and_forces, (None, 0)))
        predict = self._predict[potential.room]
        energy_error, force_error = 0.0, 0.0
        for first in range(0, len(self.test.energies), ERROR_CHUNK):
            context.tick("errors", first, len(self.test.energies))
            part = slice(first, first + ERROR_CHUNK)
            energy, forces = predict(params, jnp.asarray(self.test.positions[part], jnp.float32))
            energy_error += float(np.abs(np.asarray(energy, float) - self.test.energies[part]).sum())
            force_error += float(np.abs(np.asarray(forces, float) - self.test.forces[part]).sum())
        return 1e3 * energy_error / self.test.energies.size, 1e3 * force_error / self.test.forces.size

    def _benchmark(
        self, potential: Potential, params: Params, temperature: float, label: str, context: EvaluationContext
    ) -> BenchmarkResult:
        """Simulations from test structures, judged by the evaluation's thresholds; observables against test frames."""
        config = self.config
        conditions = dataclasses.replace(Conditions.from_options(config), temperature=temperature)
        chosen = np.linspace(0, len(self.test.positions) - 1, config.benchmark_replicas).round().astype(int)
        return benchmark(
            self._simulator(potential, conditions),
            params,
            self.test.positions[chosen],
            self._criteria_of(self._thresholds),
            self._observables(potential),
            self.test.positions[:REFERENCE_FRAMES].astype(np.float32),
            length=config.benchmark_time,
            key=random_key(config.seed + 1),
            tick=lambda done, total: context.tick(label, done, total),
        )

    def _simulator(self, potential: Potential, conditions: Conditions) -> Simulator:
        """What one has compiled is used again."""
        place = conditions.temperature, potential.room
        if place not in self._simulators:
            self._simulators[place] = Simulator(potential.system, conditions, potential=potential)
        return self._simulators[place]


def benchmark_thresholds(config: Any, system: System) -> Thresholds:
    """Those of the evaluation's benchmark: the defaults, for a molecule with the configuration's bond deviation.

    Raises: `ConfigError` where that was given and the benchmark of this system does not look at bonds.
    """
    thresholds = default_thresholds(system, evaluation=True)
    if thresholds.bond_deviation is not None:
        return dataclasses.replace(thresholds, bond_deviation=config.benchmark_bond_deviation)
    if config.benchmark_bond_deviation != StableOptions.benchmark_bond_deviation:
        why = "in a liquid the benchmark looks at RDFs" if system.periodic else "this system has none"
        raise ConfigError(f"--benchmark-bond-deviation is for molecules with bonds: {why}; leave it out")
    return thresholds
