"""`stabletrain nnip benchmark RUN`: how long simulations with a trained potential stay stable, and what they are worth.

Imports no JAX until it runs. **Units** of options: K, fs, ps, A.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from stabletrain.errors import EXIT_OK, ConfigError
from stabletrain.nnip.stored import (
    PANEL,
    AsJson,
    Checkpoint,
    Damping,
    FrameEvery,
    Quiet,
    Relaxation,
    RunArgument,
    Seed,
    Stored,
    Thermostat,
    all_positions,
    find_run,
    known_thermostat,
    progress_line,
    read_potential,
)

CRITERIA = "Criteria"


def benchmark_command(
    run: RunArgument,
    time: Annotated[float, typer.Option("--time", help="Length of each simulation in ps.", min=0.001)] = 1.0,
    replicas: Annotated[int, typer.Option("--replicas", help="Simulations at once.", min=1)] = 32,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            "--temperature",
            help="K; several times for several. [default: of a --stable run its own, else 500]",
            min=1.0,
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None,
    timestep: Annotated[
        list[float] | None,
        typer.Option(
            "--timestep",
            help="fs; several times for several. [default: 0.5]",
            min=0.001,
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None,
    thermostat: Thermostat = "nose-hoover",
    relaxation_time: Relaxation = 10.0,
    damping: Damping = 0.1,
    window: Annotated[
        int, typer.Option("--window", help="Steps between two looks at the criteria.", min=1, rich_help_panel=PANEL)
    ] = 500,
    frame_every: FrameEvery = 20,
    bond_deviation: Annotated[
        float | None,
        typer.Option(
            "--bond-deviation",
            help="A; beyond it unstable. [default: molecules: 0.5]",
            min=0.0,
            show_default=False,
            rich_help_panel=CRITERIA,
        ),
    ] = None,
    intermolecular_distance: Annotated[
        float | None,
        typer.Option(
            "--intermolecular-distance",
            help="A between molecules; below it unstable.",
            min=0.0,
            show_default=False,
            rich_help_panel=CRITERIA,
        ),
    ] = None,
    rdf_error: Annotated[
        float | None,
        typer.Option(
            "--rdf-error",
            help="A, over a window; beyond it unstable. [default: liquids: 3]",
            min=0.0,
            show_default=False,
            rich_help_panel=CRITERIA,
        ),
    ] = None,
    temperature_factor: Annotated[
        float | None,
        typer.Option(
            "--temperature-factor",
            help="Hotter than so many times --temperature is unstable.",
            min=1.0,
            show_default=False,
            rich_help_panel=CRITERIA,
        ),
    ] = None,
    energy_drift: Annotated[
        float | None,
        typer.Option(
            "--energy-drift",
            help="eV per atom within a window, with nve; beyond it unstable.",
            min=0.0,
            show_default=False,
            rich_help_panel=CRITERIA,
        ),
    ] = None,
    reference_temperature: Annotated[
        float | None,
        typer.Option(
            "--reference-temperature",
            help="K that the data were sampled at: at other temperatures they are "
            "re-weighted. [default: they count as they are]",
            min=1.0,
            show_default=False,
        ),
    ] = None,
    reference_spacing: Annotated[
        float | None,
        typer.Option(
            "--reference-spacing",
            help="fs between frames of the data, where they are a trajectory in "
            "order: adds velocity autocorrelation and diffusivity.",
            min=0.001,
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option("--against", metavar="RUN", help="Also this run, in the same figure.")
    ] = None,
    calculator: Annotated[
        str | None,
        typer.Option("--calculator", metavar="MODULE:NAME", help="Also this ASE calculator, on the run's system."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder. [default: RUN/eval/benchmark]", show_default=False)
    ] = None,
    checkpoint: Checkpoint = "newest",
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """How long simulations stay stable: survival curves, median stable times, errors of observables.

    Writes benchmark.json, a survival curve for each temperature and time step, and the curves of the observables.
    """
    from stabletrain.nnip.benchmark import Conditions

    path = find_run(run)
    known_thermostat(thermostat)
    if window % frame_every:
        raise ConfigError(f"--frame-every {frame_every} does not divide --window {window}")
    if energy_drift is not None and thermostat != "nve":
        raise ConfigError(f"--energy-drift is for --thermostat nve: {thermostat} exchanges energy")
    limits = {
        "bond_deviation": bond_deviation, "intermolecular_distance": intermolecular_distance, "rdf_error": rdf_error,
        "temperature_factor": temperature_factor, "energy_drift": energy_drift,
    }  # fmt: skip
    others = [find_run(name) for name in against or []]
    labels = labels_of([path, *others], taken=("reference", *([calculator] if calculator else [])))
    stored = [read_potential(path, checkpoint), *(read_potential(other) for other in others)]
    subjects = dict(zip(labels, stored, strict=True))
    chosen = [
        Conditions(
            temperature=t, timestep=dt, thermostat=thermostat, relaxation_time=relaxation_time, damping=damping,
            window=window, frame_every=frame_every,
        )
        for t in temperature or [own_temperature(stored[0], 500.0)]
        for dt in timestep or [0.5]
    ]  # fmt: skip
    folder = out or path / "eval" / "benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for conditions in chosen:
        rows += _benchmark_at(
            conditions, subjects, folder, time=time, replicas=replicas, limits=limits, calculator=calculator,
            reference_temperature=reference_temperature, reference_spacing=reference_spacing, seed=seed, quiet=quiet,
        )  # fmt: skip
    (folder / "benchmark.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if as_json:
        done = {"run_dir": str(path), "status": "benchmarked", "step": stored[0].step, "metrics": {}}
        print(json.dumps({**done, "out": str(folder), "benchmark": rows}))
    else:
        _print_table(rows)
        print(f"written to {folder}")
    return EXIT_OK


def own_temperature(stored: Stored, otherwise: float) -> float:
    """The temperature that StABlE Training simulated at, in K; another run has none of its own."""
    return float(stored.config.temperature) if stored.config.stable else otherwise


def labels_of(paths: Sequence[Path], taken: Sequence[str] = ()) -> list[str]:
    """What each run is called in tables and figures: the shortest end of its path that no other has, and not `taken`.

    Raises: `ConfigError` for the same folder given twice.
    """
    parts = [path.resolve().parts for path in paths]
    for i, path in enumerate(paths):
        if parts[i] in parts[:i]:
            raise ConfigError(f"--against {path} is a run that is already compared: name each run once")

    def ends(length: int) -> list[str]:
        return [str(Path(*each[-length:])) for each in parts]

    found = []
    for i, each in enumerate(parts):
        unique = (ends(n)[i] for n in range(1, len(each) + 1) if [*ends(n), *taken].count(ends(n)[i]) == 1)
        found.append(next(unique))
    return found


def _benchmark_at(
    conditions: Any,
    subjects: dict[str, Stored],
    folder: Path,
    *,
    time: float,
    replicas: int,
    limits: dict[str, float | None],
    calculator: str | None,
    reference_temperature: float | None,
    reference_spacing: float | None,
    seed: int,
    quiet: bool,
) -> list[dict[str, Any]]:
    """All subjects, by label, under one set of conditions: rows of the table, and figures."""
    import dataclasses

    import jax
    import numpy as np

    from stabletrain.methods.stable import effective_sample_size
    from stabletrain.nnip.benchmark import Simulator, benchmark, observable_figure, survival_figure
    from stabletrain.nnip.calculator import calculator_called, forces_of
    from stabletrain.nnip.criteria import Criteria, Reference, default_thresholds, mean_bond_lengths, reference_extremes
    from stabletrain.nnip.observables import static_observables, temperature_weights
    from stabletrain.nnip.time_observables import ReferenceTrajectory, time_observables
    from stabletrain.random_keys import random_key

    first, *others = subjects.values()
    system = first.potential.system
    for other in others:
        if not np.array_equal(other.potential.system.species, system.species):
            raise ConfigError(f"{other.path} is of other atoms than {first.path}")
    observables = static_observables(system, distance_reach=first.config.distance_reach)
    reference = first.test_positions[:2000].astype(np.float32)
    weights = None
    if reference_temperature is not None and reference_temperature != conditions.temperature:
        energies = first.test_energies[: len(reference)]
        weights = temperature_weights(energies, reference_temperature, conditions.temperature)
    trajectory = None
    if reference_spacing is not None:
        trajectory = ReferenceTrajectory(system, all_positions(first.config), reference_spacing)
    thresholds = default_thresholds(system, evaluation=True)
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if "rdf_error" in given and not system.periodic:
        raise ConfigError("--rdf-error is for periodic systems: a molecule has no RDF")
    if "bond_deviation" in given and not len(system.bonds):
        raise ConfigError("--bond-deviation is for systems with bonds, and this one has none: leave it out")
    thresholds = dataclasses.replace(thresholds, **given)
    rdfs: tuple[Any, ...] = ()
    curves = {}
    if thresholds.rdf_error is not None:
        rdfs = tuple(observables)
        frames = jax.numpy.asarray(reference)
        curves = {o.name: np.average(np.asarray(o.of_frames(frames)), axis=0, weights=weights) for o in rdfs}
    lengths = mean_bond_lengths(system, first.train_positions.astype(np.float32))
    try:
        criteria = Criteria(
            system, thresholds, Reference(lengths, curves), conditions.temperature, conditions.freedom(system), rdfs
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    extremes = reference_extremes(criteria, reference, window=conditions.window // conditions.frame_every)
    chosen = np.linspace(0, len(first.test_positions) - 1, replicas).round().astype(int)
    starts = first.test_positions[chosen]
    simulators: dict[str, tuple[Any, Any]] = {
        label: (Simulator(system, conditions, potential=stored.potential), stored.params)
        for label, stored in subjects.items()
    }
    if calculator is not None:
        forces = forces_of(calculator_called(calculator), system, starts[0], name=calculator)
        simulators[calculator] = Simulator(system, conditions, forces=forces), None
    results = {}
    for label, (simulator, params) in simulators.items():
        with progress_line(f"{label} {conditions.temperature:g} K {conditions.timestep:g} fs", quiet) as tick:
            results[label] = benchmark(
                simulator, params, starts, criteria, observables, reference, length=time, key=random_key(seed),
                tick=tick, reference_weights=weights, trajectory=trajectory,
            )  # fmt: skip
    name = f"{conditions.temperature:g}K-{conditions.timestep:g}fs"
    title = f"{conditions.temperature:g} K, {conditions.timestep:g} fs, {conditions.thermostat}"
    survivals = {label: result.survival for label, result in results.items()}
    (folder / f"survival-{name}.png").write_bytes(survival_figure(survivals, title=title))
    shown_observables: list[Any] = [*observables]
    if trajectory is not None:
        lags = next(len(found.curve) for label, found in next(iter(results.values())).observables.items()
                    if label not in {o.name for o in observables})  # fmt: skip
        shown_observables += time_observables(system, trajectory.spacing, 2 * lags)
    for o in shown_observables:
        shown = {"reference": next(iter(results.values())).observables[o.name].reference}
        shown |= {label: result.observables[o.name].curve for label, result in results.items()}
        slug = o.name.lower().replace("(", "").replace(")", "").replace(" ", "-")
        (folder / f"{slug}-{name}.png").write_bytes(observable_figure(o, shown))
    return [
        {
            "potential": label,
            "step": subjects[label].step if label in subjects else None,
            "temperature": conditions.temperature,
            "timestep": conditions.timestep,
            "thermostat": conditions.thermostat,
            "replicas": replicas,
            "length_ps": result.survival.length,
            "stable_times_ps": result.survival.stable_time.round(6).tolist(),
            "median_is_lower_bound": result.survival.median_is_lower_bound,
            "thresholds": thresholds.active,
            "reference_reaches": extremes,
            "reference_frames": len(reference),
            "reference_effective_frames": len(reference)
            if weights is None
            else float(effective_sample_size(jax.numpy.asarray(weights))),
            **{k: v if v == v else None for k, v in result.scalars().items()},
        }
        for label, result in results.items()
    ]


def _print_table(rows: list[dict[str, Any]]) -> None:
    header = ("potential", "T (K)", "dt (fs)", "stable", "median (ps)", "interval (ps)", "observables: error (noise)")
    lines = [header]
    for row in rows:
        bound = "> " if row["median_is_lower_bound"] else ""
        errors = [
            f"{name[: -len('_error')]} {_shown(value)} ({_shown(row[name.replace('_error', '_noise_floor')])})"
            for name, value in row.items()
            if name.endswith("_error")
        ]
        if "diffusivity" in row:
            shown = (_shown(row[f"diffusivity{part}"]) for part in ("", "_reference", "_noise_floor"))
            errors.append("diffusivity {} against {} ({})".format(*shown))
        lines.append((
            str(row["potential"]), f"{row['temperature']:g}", f"{row['timestep']:g}", f"{row['stable_share']:.2f}",
            f"{bound}{row['median_stable_ps']:.3g}",
            f"{row['median_stable_ps_low']:.3g} to {row['median_stable_ps_high']:.3g}", ", ".join(errors),
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    lengths = dict.fromkeys(f"{row['length_ps']:g}" for row in rows)
    if len(lengths) > 1:
        print(f"compared over {' and '.join(lengths)} ps: --time is rounded to whole frames of each time step")
    for note in dict.fromkeys(note for row in rows for note in _notes(row)):
        print(note)


def _notes(row: dict[str, Any]) -> list[str]:
    """What the reference itself reaches of each criterion, and for how many frames re-weighted ones stand."""
    notes = []
    if not row["thresholds"]:
        notes.append("without bonds or a cell no criterion is looked at by itself: unstable is what is not finite or "
                     "blew up (see --intermolecular-distance, --temperature-factor)")  # fmt: skip
    for name, limit in row["thresholds"].items():
        reached, least = row["reference_reaches"][name], name == "intermolecular_distance"
        said = f"{name.replace('_', ' ')}: unstable {'below' if least else 'beyond'} {limit:g}, the reference reaches "
        within = reached < limit if least else reached > limit
        notes.append(f"{said}{reached:.3g}{': the threshold is too strict' if within else ''}")
    if row["reference_effective_frames"] != row["reference_frames"]:
        notes.append(f"{row['temperature']:g} K: {row['reference_frames']} reference frames, re-weighted, stand for "
                     f"{row['reference_effective_frames']:.0f}")  # fmt: skip
    return notes


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
