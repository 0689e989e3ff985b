"""`stabletrain simulate RUN`: dynamics with a trained potential, written as trajectories.

Imports no JAX until it runs. **Units** of options: K, fs, ps, A.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stabletrain.errors import EXIT_OK, ConfigError, DataError
from stabletrain.nnip.benchmark_command import benchmark_command, own_temperature
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
    Thermostat,
    find_run,
    known_thermostat,
    progress_line,
    read_potential,
)

if TYPE_CHECKING:
    import numpy as np


def simulate_command(
    run: RunArgument,
    time: Annotated[float, typer.Option("--time", help="Length in ps.", min=0.001)] = 1.0,
    structure: Annotated[
        Path | None,
        typer.Option("--structure", help="Start here: any file that ASE reads. [default: a test structure]"),
    ] = None,
    replicas: Annotated[int, typer.Option("--replicas", help="Simulations at once, a file each.", min=1)] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            help="K. [default: of a --stable run its own, else 300]",
            min=1.0,
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None,
    timestep: Annotated[float, typer.Option("--timestep", help="fs.", min=0.001, rich_help_panel=PANEL)] = 0.5,
    thermostat: Thermostat = "baoab",
    relaxation_time: Relaxation = 10.0,
    damping: Damping = 1.0,
    frame_every: FrameEvery = 20,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder. [default: RUN/simulations/<T>K]", show_default=False)
    ] = None,
    checkpoint: Checkpoint = "newest",
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Molecular dynamics with a trained potential, written as extended XYZ frame by frame.

    A replica that blows up is frozen: its file ends there, and the summary says when. Files that an earlier
    simulation left in the folder are replaced.
    """
    import jax
    import numpy as np

    from stabletrain.nnip.benchmark import Conditions, Simulator
    from stabletrain.nnip.integrators import temperature_of
    from stabletrain.nnip.trajectory import ExtxyzWriter
    from stabletrain.random_keys import random_key

    path = find_run(run)
    known_thermostat(thermostat)
    steps = max(1, round(time * 1000 / timestep))
    frames_wanted = steps // frame_every
    if not frames_wanted:
        raise ConfigError(
            f"--time {time:g} is {steps} steps of {timestep:g} fs, without a frame: --frame-every {frame_every} is more"
        )
    stored = read_potential(path, checkpoint)
    system, potential = stored.potential.system, stored.potential
    start = stored.test_positions[seed % len(stored.test_positions)]
    if structure is not None:
        start = _structure(structure, system)
    if temperature is None:
        temperature = own_temperature(stored, 300.0)
    per_window = min(frames_wanted, max(1, 500 // frame_every))
    conditions = Conditions(
        temperature=temperature, timestep=timestep, thermostat=thermostat, relaxation_time=relaxation_time,
        damping=damping, window=per_window * frame_every, frame_every=frame_every,
    )  # fmt: skip
    simulator = Simulator(system, conditions, potential=potential)
    folder = out or path / "simulations" / f"{temperature:g}K"
    key = random_key(seed)
    swarm = simulator.start(stored.params, np.repeat(start[None], replicas, axis=0), jax.random.fold_in(key, 0))
    windows = -(-frames_wanted // per_window)
    masses, freedom = jax.numpy.asarray(system.masses, np.float32), conditions.freedom(system)
    written = np.zeros(replicas, int)
    heat, energies = [], []
    for earlier in folder.glob("replica-[0-9]*.extxyz"):
        earlier.unlink()
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(ExtxyzWriter(folder / f"replica-{r:03d}.extxyz", system)) for r in range(replicas)
        ]
        tick = stack.enter_context(progress_line(f"{temperature:g} K", quiet))
        for number in range(windows):
            tick(number, windows)
            swarm, frames = simulator.window(stored.params, swarm, jax.random.fold_in(key, number + 1))
            host = jax.device_get(frames)
            for r, writer in enumerate(writers):
                for f in range(min(per_window, frames_wanted - number * per_window)):
                    if not host.alive[r, f]:
                        break
                    written[r] += 1
                    at = float(written[r] * frame_every * timestep)
                    energy = float(host.energy[r, f]) + potential.reference
                    writer.write(host.position[r, f], time=at, energy=energy, velocities=host.velocity[r, f])
                    heat.append(float(temperature_of(host.velocity[r, f], masses, freedom)))
                    energies.append(energy)
            if not host.alive[:, -1].any():
                break
        tick(windows, windows)
    summary = {
        "out": str(folder),
        "frames": int(written.sum()),
        "length_ps": (written * frame_every * timestep / 1000).tolist(),
        "frozen": int((written < frames_wanted).sum()),
        "temperature": float(np.mean(heat)) if heat else None,
        "energy": float(np.mean(energies)) if energies else None,
    }
    if as_json:
        print(json.dumps({"run_dir": str(path), "status": "simulated", "step": stored.step, "metrics": {}, **summary}))
    else:
        print("\n".join(f"{name.replace('_', ' '):<12} {value}" for name, value in summary.items()))
    return EXIT_OK


def _structure(file: Path, system: Any) -> np.ndarray:
    """Positions [n, 3] of a file of the system's atoms, in its cell.

    Raises: `DataError` for other atoms, another cell or periodicity, or an unreadable file.
    """
    import ase.io
    import numpy as np

    from stabletrain.nnip.calculator import check_atoms

    try:
        atoms: Any = ase.io.read(file)
    except Exception as error:  # whatever ASE's many readers raise
        raise DataError(f"{file} cannot be read as a structure: {error}") from error
    check_atoms(atoms, system, str(file))
    return np.asarray(atoms.get_positions())


SUBCOMMANDS: dict[str, Callable[..., int]] = {"benchmark": benchmark_command, "simulate": simulate_command}
