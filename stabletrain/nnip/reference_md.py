"""Making a set of labelled frames: molecular dynamics with a reference, and a frame with its forces every so often.

The dynamics are BAOAB (Leimkuhler and Matthews 2013), whose thermostat is Langevin's. What a frame needs to go on from
is a small dictionary of arrays; it lies beside the frames in `<out>.partial.npz`, which the finished file replaces. The
noise of a step is a function of (seed, step), and an engine forgets all else at each frame, so that a run that was
stopped goes on to the bit. The finished file is an .npz as MD17 has them (R, E, F, z, perhaps cell) with its unit and
its provenance, a JSON text, beside.

**Units**: A, fs, eV, amu, K; ps for the equilibration, 1 / ps for the friction.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stabletrain.errors import DataError, StableTrainError
from stabletrain.metrics.files import UNREADABLE, read_npz
from stabletrain.nnip.units import ACCELERATION, BOLTZMANN

FS_PER_PS = 1000.0
SAVE_SECONDS = 15.0
State = dict[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """How the frames are made."""

    frames: int = 1000
    temperature: float = 500.0  # K
    timestep: float = 0.5  # fs
    spacing: float = 10.0  # fs between frames
    damping: float = 2.0  # 1 / ps, friction
    equilibration: float = 1.0  # ps before the first frame
    seed: int = 0

    @property
    def every(self) -> int:
        """Steps from frame to frame."""
        return max(1, round(self.spacing / self.timestep))

    @property
    def skipped(self) -> int:
        """Frames of the equilibration."""
        return -(-round(self.equilibration * FS_PER_PS / self.timestep) // self.every)


@dataclass(frozen=True)
class Frame:
    """One structure with its labels: [n, 3] A, eV, [n, 3] eV / A."""

    position: np.ndarray
    energy: float
    forces: np.ndarray


class Engine(Protocol):
    """Dynamics that can be put down after each frame."""

    @property
    def species(self) -> np.ndarray: ...

    @property
    def cell(self) -> np.ndarray | None: ...

    @property
    def provenance(self) -> Mapping[str, Any]: ...

    def start(self, settings: Settings) -> State: ...

    def advance(self, settings: Settings, state: State, number: int) -> tuple[State, Frame]:
        """From one frame to the next, which is the `number`-th from 0, the equilibration's among them."""


def make_frames(
    engine: Engine,
    settings: Settings,
    out: Path,
    *,
    tick: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> dict[str, Any]:
    """Writes the frames to `out`, from where an earlier call was stopped; returns what was done.

    Raises: `DataError` when `out` exists, when what lies beside it was made with other settings, or when a frame is
    not finite or the reference fails.
    """
    if out.exists():
        raise DataError(f"{out} is there already: name another file with --out, or remove it")
    about = {**engine.provenance, **dataclasses.asdict(settings)}
    partial = out.with_name(f"{out.name}.partial.npz")
    state, frames = _stopped(partial, about) or (engine.start(settings), [])
    resumed, total, saved = len(frames), settings.skipped + settings.frames, time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        while len(frames) < total:
            number = len(frames)
            tick("equilibration" if number < settings.skipped else "frames", number, total)
            state, frame = engine.advance(settings, state, number)
            if not (np.isfinite(frame.energy) and np.isfinite(frame.forces).all()):
                raise DataError(f"frame {number} is not finite: try a smaller --timestep than {settings.timestep:g} fs")
            frames.append(frame)
            if time.monotonic() - saved > SAVE_SECONDS:
                _save(partial, about, state, frames)
                saved = time.monotonic()
    except KeyboardInterrupt:
        _save(partial, about, state, frames)
        raise
    tick("frames", total, total)
    content = _content(engine, frames[settings.skipped : total])  # a stopped run of more frames may have left more
    _write(out, {**content, "energy_unit": np.asarray("eV"), "about": np.asarray(json.dumps(about))})
    partial.unlink(missing_ok=True)
    forces = content["F"]
    return {
        "file": str(out),
        "frames": settings.frames,
        "resumed_from": resumed,
        "span_ps": settings.frames * settings.every * settings.timestep / FS_PER_PS,
        "force_rms": float(np.sqrt(np.mean(np.asarray(forces, float) ** 2))),
        "energy_std": float(np.std(content["E"])),
        **about,
    }


def provenance_of(path: Path) -> dict[str, Any]:
    """What an .npz says of how it was made; empty where it says nothing."""
    with np.load(path, allow_pickle=False) as file:
        return json.loads(str(file["about"])) if "about" in file.files else {}


def _content(engine: Engine, frames: list[Frame]) -> dict[str, np.ndarray]:
    content: dict[str, np.ndarray] = {
        "R": np.asarray([frame.position for frame in frames], np.float32),
        "E": np.asarray([frame.energy for frame in frames], np.float64),
        "F": np.asarray([frame.forces for frame in frames], np.float32),
        "z": np.asarray(engine.species, np.int8 if max(engine.species) < 128 else np.int16),
    }
    return content if engine.cell is None else {**content, "cell": np.asarray(engine.cell, np.float64)}


def _save(partial: Path, about: Mapping[str, Any], state: State, frames: list[Frame]) -> None:
    if not frames:
        return
    content = {f"state_{name}": value for name, value in state.items()}
    content |= {name: np.asarray([getattr(frame, name) for frame in frames]) for name in _FRAME_FIELDS}
    _write(partial, {**content, "about": np.asarray(json.dumps(about))})


_FRAME_FIELDS = tuple(field.name for field in dataclasses.fields(Frame))


def _stopped(partial: Path, about: Mapping[str, Any]) -> tuple[State, list[Frame]] | None:
    if not partial.is_file():
        return None
    try:
        content = read_npz(partial)
        before = json.loads(str(content.pop("about")))
        columns = [content.pop(name) for name in _FRAME_FIELDS]
    except UNREADABLE as error:
        raise DataError(f"{partial} is damaged ({error}): remove it to start anew") from error
    if changed := [name for name in about if before.get(name) != about[name] and name != "frames"]:
        shown = ", ".join(f"{name} {before.get(name)} there, {about[name]} here" for name in changed)
        raise DataError(
            f"{partial} was begun with other settings ({shown}): remove it, or name another file with --out"
        )
    frames = [Frame(position, float(energy), forces) for position, energy, forces in zip(*columns, strict=True)]
    return {name.removeprefix("state_"): value for name, value in content.items()}, frames


def _write(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp.npz")
    np.savez_compressed(temporary, **content)
    temporary.replace(path)


# --- an ASE calculator ------------------------------------------------------------------------------------------------


class CalculatorEngine:
    """Dynamics with an ASE calculator, made anew at each frame: what it remembers of one would be lost in a stop."""

    def __init__(self, atoms: Any, calculator: Callable[[], Any], provenance: Mapping[str, Any]) -> None:
        """`atoms` is an `ase.Atoms`, periodic along each axis or along none, without constraints.

        `provenance` gains the `geometry`: a stopped run goes on from this structure only.
        """
        self.species = np.asarray(atoms.get_atomic_numbers())
        self.cell = np.asarray(atoms.cell.array) if atoms.pbc.all() else None
        self.provenance = {**provenance, "geometry": _geometry(atoms)}
        self._atoms, self._calculator = atoms, calculator

    def start(self, settings: Settings) -> State:
        """The nearest minimum of the energy, with Maxwell's velocities."""
        from ase.optimize import BFGS

        atoms = self._atoms.copy()
        with self._failures_said("at the start"):
            atoms.calc = self._calculator()
            BFGS(atoms, logfile=None).run(fmax=RELAXED, steps=RELAXATION_STEPS)
        masses = atoms.get_masses()[:, None]
        width = np.sqrt(BOLTZMANN * settings.temperature * ACCELERATION / masses)
        velocity = width * _noise(settings.seed, 0, masses)
        return {"position": atoms.get_positions(), "velocity": velocity}

    def advance(self, settings: Settings, state: State, number: int) -> tuple[State, Frame]:
        """BAOAB in float64."""
        atoms, masses, dt = self._atoms.copy(), self._atoms.get_masses()[:, None], settings.timestep
        kept = np.exp(-settings.damping / FS_PER_PS * dt)
        width = np.sqrt((1 - kept**2) * BOLTZMANN * settings.temperature * ACCELERATION / masses)
        x, v = state["position"].copy(), state["velocity"].copy()

        def kick(position: np.ndarray) -> np.ndarray:
            atoms.set_positions(position)
            return 0.5 * dt * ACCELERATION * atoms.get_forces() / masses

        with self._failures_said(f"before frame {number}"):
            atoms.calc = self._calculator()
            half = kick(x)
            for step in range(number * settings.every, (number + 1) * settings.every):
                v += half
                x += 0.5 * dt * v
                v = kept * v + width * _noise(settings.seed, step + 1, masses)
                x += 0.5 * dt * v
                half = kick(x)
                v += half
            if self.cell is None:
                x -= np.sum(masses * x, axis=0) / masses.sum()
            atoms.set_positions(x)
            frame = Frame(x, float(atoms.get_potential_energy()), atoms.get_forces())
        return {"position": x.copy(), "velocity": v}, frame

    @contextmanager
    def _failures_said(self, when: str) -> Iterator[None]:
        try:
            yield
        except StableTrainError:
            raise
        except Exception as error:  # whatever the many calculators raise
            named = self.provenance.get("program", "the calculator")
            raise DataError(f"{named} failed {when}: {type(error).__name__}: {error}") from error


RELAXED, RELAXATION_STEPS = 0.05, 200
"""The start is relaxed until no force exceeds this, in eV / A, or for so many steps."""


def _geometry(atoms: Any) -> str:
    """A digest of what the frames depend on: the elements, masses, positions, cell, charges and moments."""
    digest = hashlib.sha256()
    for array in (
        atoms.get_atomic_numbers(),
        atoms.get_masses(),
        atoms.get_positions(),
        atoms.cell.array if atoms.pbc.any() else np.zeros(0),
        atoms.get_initial_charges(),
        atoms.get_initial_magnetic_moments(),
    ):
        digest.update(np.ascontiguousarray(array, np.float64).tobytes())
    return digest.hexdigest()[:16]


def _noise(seed: int, step: int, masses: np.ndarray) -> np.ndarray:
    return np.random.default_rng([seed, step]).standard_normal((len(masses), 3))
