"""Options of StABlE Training and of the simulations it is judged by: part of the nnip family's configuration.

Imports no JAX. **Units**: K, fs, A; 1 / ps for damping, ps for times of evaluations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Set
from dataclasses import dataclass

from stabletrain.training.config import option

DYNAMICS, STABLE, BENCHMARK = "Dynamics", "StABlE Training", "Stability benchmark"
THERMOSTATS = ("nose-hoover", "langevin", "baoab")
OBSERVABLES = ("distances", "bond-lengths", "none")
RESIDUAL_NAMES = ("full-sample", "cross-fitted", "released")
COVARIANCES = ("total", "within-replicas")


@dataclass(frozen=True, kw_only=True)
class StableOptions:
    """What `stabletrain nnip --stable` adds, and how its dynamics run."""

    stable: bool = option(
        False, "StABlE Training: simulate, and learn an observable from what fails; starts from --base.", panel=STABLE
    )
    base: str | None = option(
        None,
        "Run directory of the trained potential to start from; {seed} in it stands for --seed. [default with "
        "--stable: what the same command without --stable makes, found in ./runs or trained first]",
        panel=STABLE,
    )
    replicas: int = option(16, "Copies of the system that are simulated at once.", panel=DYNAMICS, minimum=2)
    temperature: float = option(500.0, "Temperature in K.", panel=DYNAMICS, minimum=1.0)
    timestep: float = option(0.5, "Time step in fs.", panel=DYNAMICS, minimum=0.001)
    thermostat: str = option("nose-hoover", "Thermostat.", panel=DYNAMICS, choices=THERMOSTATS)
    relaxation_time: float = option(10.0, "Nose-Hoover: relaxation time in fs.", panel=DYNAMICS, minimum=0.1)
    damping: float = option(0.1, "langevin and baoab: friction in 1 / ps.", panel=DYNAMICS, minimum=0.0)
    window: int = option(250, "Time steps of a window of dynamics: one epoch.", panel=DYNAMICS, minimum=1)
    frame_every: int = option(10, "Time steps between recorded frames; divides the window.", panel=DYNAMICS, minimum=1)

    observable: str = option(
        "distances",
        "What is learnt: the distribution of distances h(r); lengths of bonds, molecule by molecule (local "
        "estimator); or none, the control that takes energy-force steps alone.",
        panel=STABLE,
        choices=OBSERVABLES,
    )
    distance_reach: float = option(
        10.0, "Molecules: h(r) up to this distance in A, learnt and reported.", panel=STABLE, minimum=1.0
    )
    residual: str = option(
        "full-sample", "Which sample the observable's residual is taken of.", panel=STABLE, choices=RESIDUAL_NAMES
    )
    covariance: str | None = option(
        None,
        "Covariance of observable and energy gradient: of all frames, as in the paper, or of those of each replica, "
        "without that of the replicas' means. [default: within replicas for h(r); total for other observables, with "
        "--residual released and where a window has one frame]",
        panel=STABLE,
        choices=COVARIANCES,
    )
    residual_batch: int = option(40, "--residual released: samples in a minibatch.", panel=STABLE, minimum=2)
    energy_force_weight: float = option(
        0.3,
        "Weight of the energy-force loss against the observable's, as in the released code: that is lambda kT.",
        panel=STABLE,
        minimum=0.0,
    )
    stable_learning_rate: float = option(4e-3, "Learning rate of the learning phases (SGD).", panel=STABLE, minimum=0.0)
    stable_clip: float = option(1.0, "Clip the global gradient norm to this.", panel=STABLE, minimum=1e-9)
    max_unstable: float = option(
        0.75, "Share of unstable replicas at which learning begins.", panel=STABLE, minimum=0.0, maximum=1.0
    )
    min_unstable: float = option(
        0.0, "Share of unstable replicas at which learning ends.", panel=STABLE, minimum=0.0, maximum=1.0
    )
    restart_share: float = option(
        0.05,
        "Stable replicas that go back to a random earlier state when simulation begins anew.",
        panel=STABLE,
        minimum=0.0,
        maximum=1.0,
    )
    plateau_patience: int = option(
        2, "Windows without fewer unstable replicas after which the learning rate falls.", panel=STABLE, minimum=0
    )
    reuse_steps: int = option(
        0,
        "Learning steps on one window's frames, at most; above 1 they are reweighted. 0 chooses: 5, and 1 for bond "
        "lengths and with another residual than full-sample.",
        panel=STABLE,
        minimum=0,
    )
    reuse_ratio: float = option(
        0.9,
        "Effective share of the frames below which a window is not used again.",
        panel=STABLE,
        minimum=0.0,
        maximum=1.0,
    )
    gradient_chunk: int = option(
        0,
        "Structures whose energies are differentiated at once in a learning step, half as many with their forces: "
        "fewer need less memory. 0 chooses: 16 on a CPU, whose caches hold no more, else 64.",
        panel=STABLE,
        minimum=0,
    )
    max_bond_deviation: float | None = option(
        None, "Unstable: a bond this much longer or shorter than its mean, in A.", panel=STABLE, minimum=0.0
    )
    min_distance: float | None = option(
        None, "Unstable: atoms of two molecules nearer than this, in A.", panel=STABLE, minimum=0.0
    )

    benchmark_replicas: int = option(
        32, "Replicas of the stability benchmark in the evaluation; 0: none.", panel=BENCHMARK, minimum=0
    )
    benchmark_time: float = option(1.0, "Length of its simulations in ps.", panel=BENCHMARK, minimum=0.001)
    benchmark_temperatures: tuple[float, ...] = option(
        (), "Further temperatures in K at which it is run, for survival alone.", panel=BENCHMARK, minimum=1.0
    )
    benchmark_bond_deviation: float = option(
        0.25, "Unstable in the benchmark: a bond this much longer or shorter than its mean, in A.", panel=BENCHMARK,
        minimum=0.0,
    )  # fmt: skip


def stable_problems(config: StableOptions) -> list[str]:
    """What is wrong with these options together, each as the sentence that the user reads."""
    found = []
    if config.window % config.frame_every:
        found.append(f"--frame-every {config.frame_every} does not divide --window {config.window}")
    if config.residual != "full-sample" and config.observable == "none":
        found.append(f"--residual {config.residual} does nothing with --observable none")
    if config.observable == "none" and config.energy_force_weight == 0:
        found.append("--observable none with --energy-force-weight 0 learns nothing")
    if config.covariance == "within-replicas" and config.observable != "distances":
        found.append(f"--covariance within-replicas is for --observable distances, not {config.observable}")
    if config.covariance == "within-replicas" and config.residual == "released":
        found.append("--covariance within-replicas does not go with --residual released, which has that of minibatches")
    if config.covariance == "within-replicas" and config.window == config.frame_every:
        found.append(
            f"--covariance within-replicas needs two frames of a window: --frame-every {config.frame_every} is all of "
            f"--window {config.window}"
        )
    if config.reuse_steps > 1 and config.observable == "bond-lengths":
        found.append("--reuse-steps reweights --observable distances, not bond-lengths")
    if config.temperature in config.benchmark_temperatures:
        found.append(f"--benchmark-temperatures holds {config.temperature:g}, at which it is run anyway")
    if config.benchmark_temperatures and not config.benchmark_replicas:
        found.append("--benchmark-temperatures does nothing with --benchmark-replicas 0")
    if config.min_unstable >= config.max_unstable:
        found.append(f"--min-unstable {config.min_unstable:g} must be below --max-unstable {config.max_unstable:g}")
    return found


OF_EVERY_RUN = ("stable", "base", "distance_reach")
"""Those of `StableOptions` that do something without --stable; `nnip benchmark` takes the reach from its first run."""


def unused_stable_options(config: StableOptions, given: Set[str]) -> Iterator[str]:
    """Which of the options that were given do nothing, each as the sentence that the user reads."""
    if not config.stable:
        for field in dataclasses.fields(StableOptions):
            if field.name in given and field.name not in OF_EVERY_RUN:
                where = (
                    "" if field.metadata["panel"] == STABLE else ": `stabletrain nnip benchmark RUN` has such options"
                )
                yield f"--{field.name.replace('_', '-')} does nothing without --stable{where}"
        return
    if "damping" in given and config.thermostat == "nose-hoover":
        yield "--damping does nothing with --thermostat nose-hoover: it belongs to langevin and baoab"
    if "relaxation_time" in given and config.thermostat != "nose-hoover":
        yield f"--relaxation-time does nothing with --thermostat {config.thermostat}: it belongs to nose-hoover"
    if "residual_batch" in given and config.residual != "released":
        yield f"--residual-batch does nothing with --residual {config.residual}: it belongs to released"
    if config.reuse_steps > 1 and config.residual != "full-sample":
        yield f"--reuse-steps {config.reuse_steps} reweights, --residual {config.residual} does not"
    if "reuse_ratio" in given and (
        config.reuse_steps == 1 or config.observable == "bond-lengths" or config.residual != "full-sample"
    ):
        yield "--reuse-ratio does nothing with one learning step in a window"
    if not config.benchmark_replicas:
        for name in ("benchmark_time", "benchmark_bond_deviation"):
            if name in given:
                yield f"--{name.replace('_', '-')} does nothing with --benchmark-replicas 0"
