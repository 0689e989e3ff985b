"""Potentials: size, symmetries, forces; frames: units, splits, bad files; and the commands of the family."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.io
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from stabletrain.cli import study
from stabletrain.cli.main import run
from stabletrain.cli.options import resolve as resolve_options
from stabletrain.errors import ConfigError, DataError
from stabletrain.nnip import benchmark_command, simulate
from stabletrain.nnip.benchmark import Simulator
from stabletrain.nnip.benchmark_command import labels_of, own_temperature
from stabletrain.nnip.calculator import PotentialCalculator, check_atoms
from stabletrain.nnip.config import NnipConfig, default_base, default_base_path, resolve
from stabletrain.nnip.family import FAMILY, needs
from stabletrain.nnip.frames import KCAL_PER_MOL, read_frames, split
from stabletrain.nnip.potential import EnergyScale, Potential
from stabletrain.nnip.schnet import SchNet
from stabletrain.nnip.stable_options import StableOptions
from stabletrain.nnip.stored import Stored
from stabletrain.nnip.systems import System, make_system
from stabletrain.training.config import make_config
from stabletrain.training.run_directory import RunDirectory

X = np.asarray([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0], [0.2, 0.1, 2.7], [1.0, 0.3, 3.1], [-0.5, 0.7, 3.0]])
SYSTEM = make_system([8, 1, 1, 8, 1, 1], X)
SMALL = Potential("schnet", SchNet(8, 2), SYSTEM, 5.0, EnergyScale(2.0, {1: -3.0, 8: -70.0}))


@pytest.fixture
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def test_schnet_has_the_papers_number_of_parameters() -> None:
    shapes = jax.eval_shape(Potential("s", SchNet(), SYSTEM, 5.0, EnergyScale(1.0, {})).init, jax.random.key(0))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == 117_953


@pytest.mark.usefixtures("_float64")
def test_schnet_is_its_formulas_written_out() -> None:
    """NumPy, atom by atom and neighbour by neighbour, as the StABlE paper's SchNet is defined."""
    params: Any = SMALL.init(jax.random.key(0))

    def layer(place: Any, x: np.ndarray) -> np.ndarray:
        return x @ np.asarray(place["kernel"], float) + np.asarray(place.get("bias", 0.0), float)

    def ssp(x: np.ndarray) -> np.ndarray:
        return np.log1p(np.exp(x)) - np.log(2)

    features = np.asarray(params["elements"]["embedding"], float)[SYSTEM.species]
    for number in range(2):
        block = params[f"interaction_{number}"]
        values, gained = layer(block["values"], features), np.zeros_like(features)
        for i in range(6):
            for j in range(6):
                d = np.linalg.norm(X[i] - X[j])
                if i != j and d <= 5.0:
                    e = np.exp(-((d - np.linspace(0, 5, 25)) ** 2) / (2 * (5 / 24) ** 2))
                    w = layer(block["filter_out"], ssp(layer(block["filter_in"], e))) * (np.cos(np.pi * d / 5) + 1) / 2
                    gained[i] += w * values[j]
        features = features + layer(block["update_out"], ssp(layer(block["update_in"], gained)))
    expected = 2.0 * layer(params["energy"], ssp(layer(params["hidden"], features)))[:, 0]
    np.testing.assert_allclose(SMALL.energy_per_atom(params, jnp.asarray(X)), expected, atol=1e-12)


@pytest.mark.usefixtures("_float64")
def test_energy_is_invariant_and_forces_are_minus_its_gradient() -> None:
    """Rotation, translation, exchange of equal atoms; central differences; forces add up to zero."""
    params = SMALL.init(jax.random.key(0))
    x = jnp.asarray(X)
    energy_and_forces = jax.jit(SMALL.energy_and_forces)
    energy, forces = energy_and_forces(params, x)
    rotation = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0])
    order = np.asarray([3, 5, 4, 0, 1, 2])
    turned, turned_forces = energy_and_forces(params, (x @ rotation + 1.7)[order])
    # float64 rounding of some hundred operations on numbers of order one.
    np.testing.assert_allclose(turned, energy, atol=1e-12)
    np.testing.assert_allclose(turned_forces, (forces @ rotation)[order], atol=1e-11)
    np.testing.assert_allclose(forces.sum(0), 0, atol=1e-12)
    step = 1e-5
    for atom, axis in ((0, 0), (2, 1), (5, 2)):
        plus = energy_and_forces(params, x.at[atom, axis].add(step))[0]
        minus = energy_and_forces(params, x.at[atom, axis].add(-step))[0]
        assert float(-(plus - minus) / (2 * step)) == pytest.approx(float(forces[atom, axis]), abs=1e-8)


@pytest.mark.usefixtures("_float64")
def test_a_neighbour_list_in_a_cell_gives_the_energy_of_all_pairs_and_tells_when_it_overflows() -> None:
    boxed = Potential("s", SchNet(8, 2, cutoff=4.0), make_system(SYSTEM.species, X, 9.0), 4.0, EnergyScale(1.0, {}))
    params, x = boxed.init(jax.random.key(0)), jnp.asarray(X)
    listed = boxed.fitted(X)
    assert listed.capacity is not None
    assert float(listed.energy(params, x)) == pytest.approx(float(boxed.energy(params, x)), abs=1e-12)
    shifted = x.at[3:].add(jnp.asarray([9.0, -9.0, 18.0]))
    assert float(listed.energy(params, shifted)) == pytest.approx(float(boxed.energy(params, x)), abs=1e-11)
    short = Potential("s", boxed.network, boxed.system, 4.0, boxed.scale, capacity=3)
    assert bool(short.neighbors(x).overflow)
    assert np.isnan(float(short.energy(params, x)))


def test_ase_gets_energies_with_the_reference_and_the_same_forces() -> None:
    params = SMALL.init(jax.random.key(0))
    atoms = Atoms(numbers=SYSTEM.species, positions=X, calculator=PotentialCalculator(SMALL, params))
    energy, forces = SMALL.energy_and_forces(params, jnp.asarray(X, jnp.float32))
    assert atoms.get_potential_energy() == pytest.approx(float(energy) - 2 * 70.0 - 4 * 3.0, abs=1e-4)
    np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-5)
    assert atoms.get_potential_energies().sum() == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    other = Atoms("H2", positions=[[0, 0, 0], [0, 0, 1]], calculator=PotentialCalculator(SMALL, params))
    with pytest.raises(DataError, match="is for"):
        other.get_potential_energy()


def test_ase_gets_nothing_for_another_cell_or_periodicity() -> None:
    """A molecule's potential sees no images, a periodic one's are those of its own cell."""
    boxed = dataclasses.replace(SMALL, system=make_system(SYSTEM.species, X, 9.0), cutoff=4.0)
    params = SMALL.init(jax.random.key(0))
    for potential, cell, pbc, message in (
        (SMALL, 9.0, True, "without periodicity"),
        (SMALL, 9.0, (True, False, False), "without periodicity"),
        (boxed, 9.0, False, "periodic along each axis"),
        (boxed, 9.0, (True, True, False), "periodic along each axis"),
        (boxed, 9.5, True, "for the cell"),
    ):
        calculator = PotentialCalculator(potential, params)
        atoms = Atoms(numbers=SYSTEM.species, positions=X, cell=[cell] * 3, pbc=pbc, calculator=calculator)
        with pytest.raises(DataError, match=message):
            atoms.get_potential_energy()
    check_atoms(Atoms(numbers=SYSTEM.species, positions=X, cell=[9.0] * 3, pbc=True), boxed.system)
    check_atoms(Atoms(numbers=SYSTEM.species, positions=X, cell=[9.0] * 3, pbc=False), SYSTEM)


# --- frames -----------------------------------------------------------------------------------------------------------


def write_npz(path: Path, count: int = 30, **changes: np.ndarray) -> Path:
    """Frames of springs about a water dimer, in the form of MD17."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(count, 6, 3)) * 0.05
    content = {"R": X + noise, "E": 100.0 + 40 * (noise**2).sum((1, 2)), "F": -80 * noise, "z": SYSTEM.species}
    np.savez(path, **{**content, **changes})
    return path


def test_units_of_npz_files(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "dimer.npz")
    kcal = read_frames("x", str(path))
    ev = read_frames("x", str(path), "eV")
    np.testing.assert_allclose(kcal.energies, ev.energies * KCAL_PER_MOL)
    np.testing.assert_allclose(kcal.forces, ev.forces * KCAL_PER_MOL)
    np.testing.assert_array_equal(kcal.positions, ev.positions)
    assert kcal.spec.fingerprint != ev.spec.fingerprint
    assert len(kcal.system.bonds) == 4


def test_files_of_ase(tmp_path: Path) -> None:
    frames = read_frames("x", str(write_npz(tmp_path / "dimer.npz")), "eV")
    images = []
    for k in range(4):
        atoms = Atoms(numbers=SYSTEM.species, positions=frames.positions[k])
        atoms.calc = SinglePointCalculator(atoms, energy=frames.energies[k], forces=frames.forces[k])
        images.append(atoms)
    ase.io.write(tmp_path / "dimer.extxyz", images)
    again = read_frames("x", str(tmp_path / "dimer.extxyz"))
    np.testing.assert_allclose(again.energies, frames.energies[:4], atol=1e-6)
    np.testing.assert_allclose(again.forces, frames.forces[:4], atol=1e-6)


@pytest.mark.parametrize("form", ["extxyz", "traj"])
def test_forces_of_constrained_atoms_are_read_as_stored(tmp_path: Path, form: str) -> None:
    """ASE gives zero for the force on a fixed atom; the label is what the reference computed."""
    forces = np.random.default_rng(0).normal(size=X.shape)
    atoms = Atoms(numbers=SYSTEM.species, positions=X, constraint=FixAtoms([0]))
    atoms.calc = SinglePointCalculator(atoms, energy=1.0, forces=forces)
    ase.io.write(tmp_path / f"fixed.{form}", [atoms, atoms])
    frames = read_frames("x", str(tmp_path / f"fixed.{form}"))
    np.testing.assert_allclose(frames.forces, [forces, forces], atol=1e-7)  # extxyz keeps eight decimals


def test_one_cell_for_all_frames(tmp_path: Path) -> None:
    """A cell for each frame is read where all are the same; changing or partial periodicity is refused, not dropped."""
    each = np.repeat(9.0 * np.eye(3)[None], 30, axis=0)
    for shape in ((30, 3, 3), (30, 9)):
        frames = read_frames("x", str(write_npz(tmp_path / "same.npz", cell=each.reshape(shape))))
        assert frames.system.cell is not None
        np.testing.assert_array_equal(frames.system.cell, each[0])
    with pytest.raises(DataError, match="different cells"):
        read_frames("x", str(write_npz(tmp_path / "npt.npz", cell=each * np.linspace(1, 1.1, 30)[:, None, None])))

    for name, cells, pbc, refusal in (
        ("npt", (9.0, 9.5), True, "different cells"),
        ("slab", (9.0, 9.0), (True, True, False), "not along each axis"),
    ):
        images = [Atoms(numbers=SYSTEM.species, positions=X, cell=[edge] * 3, pbc=pbc) for edge in cells]
        for atoms in images:
            atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.zeros_like(X))
        ase.io.write(tmp_path / f"{name}.extxyz", images)
        with pytest.raises(DataError, match=refusal):
            read_frames("x", str(tmp_path / f"{name}.extxyz"))


def test_bad_files_are_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        read_frames("x", str(tmp_path / "none.npz"))
    np.savez(tmp_path / "part.npz", R=np.zeros((2, 3, 3)), z=np.ones(3, int))
    with pytest.raises(DataError, match="has no E, F"):
        read_frames("x", str(tmp_path / "part.npz"))
    with pytest.raises(DataError, match="not finite"):
        read_frames("x", str(write_npz(tmp_path / "nan.npz", E=np.full(30, np.nan))))
    with pytest.raises(DataError, match="do not fit"):
        read_frames("x", str(write_npz(tmp_path / "short.npz", E=np.zeros(3))))
    with pytest.raises(ConfigError, match="unknown data set"):
        read_frames("aspirine", None)
    (tmp_path / "text.xyz").write_text("nothing")
    with pytest.raises(DataError, match="cannot be read"):
        read_frames("x", str(tmp_path / "text.xyz"))


def test_damaged_npz_files_are_said_in_a_sentence(tmp_path: Path) -> None:
    whole = write_npz(tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "array.npy", X)
    changed = bytearray(whole)
    changed[200] ^= 255
    for name, content in {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "array": (tmp_path / "array.npy").read_bytes(),
        "changed": bytes(changed),
    }.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.npz is not a readable \.npz: .+"):
            read_frames("x", str(tmp_path / f"{name}.npz"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"R": X[None][:0], "E": np.zeros(0), "F": X[None][:0]}, "has no frames"),
        ({"z": np.asarray(["O", "H", "H", "O", "H", "Hh"])}, "has 'Hh' in z: it must be atomic numbers, or chemical"),
        ({"z": np.asarray([8, 1, 1, 8, 1, 1.5])}, "has z that are not whole"),
        ({"z": np.tile(SYSTEM.species, (30, 1))}, r"has z of shape \(30, 6\): it must be \[n\]"),
        ({"z": np.asarray(8)}, r"has z of shape \(\)"),
        ({"E": np.asarray(["low"] * 30)}, "has E of type <U3: it must be real numbers"),
        ({"E": np.zeros(30, complex)}, "has E of type complex128: it must be real numbers"),
        ({"cell": np.asarray("cubic")}, "has cell of type <U5: it must be real numbers"),
        ({"cell": np.asarray([9.0, 9.0])}, "a cell has one, three or nine numbers, not 2"),
    ],
)
def test_npz_files_of_another_form_are_said_in_a_sentence(
    tmp_path: Path, changes: dict[str, np.ndarray], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        read_frames("x", str(write_npz(tmp_path / "form.npz", **changes)))


def test_symbols_and_a_single_edge_are_read(tmp_path: Path) -> None:
    numbers = read_frames("x", str(write_npz(tmp_path / "numbers.npz", cell=np.diag([9.0, 9.0, 9.0]))))
    for symbols in (np.asarray(list("OHHOHH")), np.asarray([b"O", b"H", b"H"] * 2)):
        named = read_frames("x", str(write_npz(tmp_path / "names.npz", z=symbols, cell=np.asarray(9.0))))
        assert named.spec.fingerprint == numbers.spec.fingerprint
        assert named.system.symbols == tuple("OHHOHH")


def test_frames_of_different_atoms_are_refused(tmp_path: Path) -> None:
    for name, second in (("more", "OH2OH3"), ("other", "OH2OHLi")):
        images = [Atoms("OH2OH2"), Atoms(second)]
        for atoms in images:
            atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.zeros((len(atoms), 3)))
        ase.io.write(tmp_path / f"{name}.extxyz", images)
        with pytest.raises(DataError, match="holds different systems"):
            read_frames("x", str(tmp_path / f"{name}.extxyz"))


def test_splits_are_disjoint_and_keep_the_test_frames(tmp_path: Path) -> None:
    frames = read_frames("x", str(write_npz(tmp_path / "dimer.npz")))
    train, validation, test = split(frames, 5, 6, 10, 0)
    assert (len(train), len(validation), len(test)) == (5, 6, 10)
    assert len({*train, *validation, *test}) == 21
    more, none, same = split(frames, 20, 0, 10, 0)
    assert set(train) <= set(more)
    assert len(none) == 0
    np.testing.assert_array_equal(test, same)
    with pytest.raises(DataError, match="fewer than 15 for training, 6 for validation and 10 for the test"):
        split(frames, 15, 6, 10, 0)


# --- configuration and commands ---------------------------------------------------------------------------------------


def test_open_values_are_filled_in() -> None:
    config = resolve(make_config(NnipConfig, {}))
    assert (config.features, config.interactions, config.train_frames, config.steps) == (32, 3, 25, 3000)
    assert config.split_seed == config.seed
    assert config.method == "schnet"


def test_a_run_takes_from_its_base_what_that_fixes(tmp_path: Path) -> None:
    """Data, split and network are the base's, by seed where {seed} stands; what contradicts them is refused."""
    base = resolve(make_config(NnipConfig, {"features": 16, "train_frames": 12, "seed": 4}))
    RunDirectory.create(tmp_path / "base-s4", "nnip", base)
    named = str(tmp_path / "base-s{seed}")
    config = resolve(make_config(NnipConfig, {"stable": True, "base": named, "seed": 4}))
    assert (config.features, config.train_frames, config.split_seed) == (16, 12, 4)
    assert config.base == str(tmp_path / "base-s4")
    assert config.method == "stable"
    assert resolve(config) == config
    assert (config.reuse_steps, config.covariance) == (5, "within-replicas")
    local = make_config(NnipConfig, {"stable": True, "base": named, "seed": 4, "observable": "bond-lengths"})
    assert (resolve(local).reuse_steps, resolve(local).covariance) == (1, "total")
    for options in ({"residual": "released"}, {"window": 10, "frame_every": 10}):
        without = make_config(NnipConfig, {"stable": True, "base": named, "seed": 4, **options})
        assert resolve(without).covariance == "total"
    with pytest.raises(ConfigError, match="contradicts the base run"):
        resolve(make_config(NnipConfig, {"base": named, "seed": 4, "features": 64}))
    with pytest.raises(ConfigError, match="no run directory"):
        resolve(make_config(NnipConfig, {"base": named, "seed": 5}))


SMALLEST = ["--features", "8", "--interactions", "1", "--train-frames", "8", "--test-frames", "8"]
QUIET = ["--quiet", "--devices", "1", "--log-every", "1"]


def by_hand(path: Path, system: System = SYSTEM, **values: Any) -> Stored:
    """A potential that was never trained, and frames about its structure, as if read from a run there."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.toml").touch()
    potential = dataclasses.replace(SMALL, system=system)
    start = X[: system.count] * (1.0 if len(system.bonds) else 4.0)
    frames = start + np.random.default_rng(0).normal(size=(12, system.count, 3)) * 0.02
    config = resolve(make_config(NnipConfig, values))
    return Stored(path, 7, potential, potential.init(jax.random.key(0)), frames, frames, np.zeros(12), config)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[Path, Stored]:
    """What the commands read in the place of runs, by path."""
    stored: dict[Path, Stored] = {}
    for command in (benchmark_command, simulate):
        monkeypatch.setattr(command, "read_potential", lambda path, checkpoint="newest": stored[path])
    return stored


SHORT = ["--replicas", "2", "--window", "8", "--frame-every", "4", "--quiet", "--json"]


def test_runs_of_the_same_name_are_told_apart(
    tmp_path: Path, read: dict[Path, Stored], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each under the shortest end of its path that is its own; the same folder twice is refused."""
    one, two = tmp_path / "one" / "base-s0", tmp_path / "two" / "base-s0"
    read |= {one: by_hand(one), two: dataclasses.replace(by_hand(two), step=9)}
    command = ["nnip", "benchmark", str(one), "--time", "0.004", *SHORT]
    assert run([*command, "--against", str(two)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(row["potential"], row["step"]) for row in document["benchmark"]] == [
        ("one/base-s0", 7),
        ("two/base-s0", 9),
    ]
    assert run([*command, "--against", f"{two}/../../one/base-s0"]) == 2
    assert "name each run once" in capsys.readouterr().err
    assert labels_of([one, two, tmp_path / "x"]) == ["one/base-s0", "two/base-s0", "x"]
    assert labels_of([tmp_path / "a" / "reference"], taken=("reference",)) == ["a/reference"]


def test_atoms_without_bonds_are_benchmarked(
    tmp_path: Path, read: dict[Path, Stored], capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no bond criterion by itself, and one that is asked for is refused before anything is simulated."""
    atoms = dataclasses.replace(SYSTEM, bonds=SYSTEM.bonds[:0])
    read[tmp_path / "atoms"] = by_hand(tmp_path / "atoms", atoms)
    command = ["nnip", "benchmark", str(tmp_path / "atoms"), "--time", "0.004", *SHORT]
    assert run(command) == 0
    row = json.loads(capsys.readouterr().out)["benchmark"][0]
    assert row["thresholds"] == {}
    assert row["stable_share"] == 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Simulator, "start", lambda *arguments: pytest.fail("simulated"))
        assert run([*command, "--bond-deviation", "0.3"]) == 2
    assert "--bond-deviation is for systems with bonds" in capsys.readouterr().err


def test_a_structure_of_another_cell_is_not_simulated(
    tmp_path: Path, read: dict[Path, Stored], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "boxed"
    read[path] = by_hand(path, make_system(SYSTEM.species, X, 10.0))
    for cell, pbc, message in ((12.0, True, "for the cell"), (10.0, False, "periodic along each axis")):
        file = tmp_path / "start.extxyz"
        ase.io.write(file, Atoms(numbers=SYSTEM.species, positions=X, cell=[cell] * 3, pbc=pbc))
        assert run(["nnip", "simulate", str(path), "--structure", str(file), "--time", "0.01"]) == 3
        said = capsys.readouterr().err
        assert message in said
        assert "start.extxyz" in said


def test_simulate_leaves_what_was_asked_for(
    tmp_path: Path, read: dict[Path, Stored], capsys: pytest.CaptureFixture[str]
) -> None:
    """Fewer replicas leave no file of an earlier call; no longer than --time; no frame at all is refused; at the
    temperature of a --stable run."""
    path, other = tmp_path / "potential", tmp_path / "stable"
    read |= {path: by_hand(path), other: by_hand(other)}
    read[other] = dataclasses.replace(read[other], config=StableOptions(stable=True, temperature=350.0))
    options = ["--frame-every", "4", "--quiet", "--json"]
    for replicas, time in ((2, "0.004"), (1, "0.007")):
        command = ["nnip", "simulate", str(path), "--time", time, "--replicas", str(replicas), *options]
        assert run(command) == 0
        summary = json.loads(capsys.readouterr().out)
        folder = path / "simulations" / "300K"
        assert summary["out"] == str(folder)
        assert sorted(file.name for file in folder.iterdir()) == [f"replica-00{r}.extxyz" for r in range(replicas)]
    assert summary["length_ps"] == [pytest.approx(0.006)]
    assert run(["nnip", "simulate", str(path), "--time", "0.001", *options]) == 2
    assert "--frame-every 4 is more" in capsys.readouterr().err
    assert len(list(folder.iterdir())) == 1
    assert run(["nnip", "simulate", str(other), "--time", "0.002", *options]) == 0
    assert json.loads(capsys.readouterr().out)["out"].endswith("350K")


def test_benchmark_has_the_runs_temperature_and_refuses_impossible_conditions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = by_hand(tmp_path / "potential")
    assert own_temperature(stored, 500.0) == 500.0
    stable = dataclasses.replace(stored, config=StableOptions(stable=True, temperature=350.0))
    assert own_temperature(stable, 500.0) == 350.0
    for option, value in (("--timestep", "0"), ("--temperature", "0"), ("--temperature", "-5")):
        assert run(["nnip", "benchmark", str(tmp_path / "potential"), option, value]) == 2
        assert option in capsys.readouterr().err
    for command, default in (("benchmark", "else 500]"), ("benchmark", "[default: 0.5]"), ("simulate", "else 300]")):
        assert run(["nnip", command, "--help"]) == 0
        assert default in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_train_then_stable_then_benchmark_then_simulate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way by commands, each read back from what it left."""
    data = str(write_npz(tmp_path / "dimer.npz"))
    base, stable = tmp_path / "base", tmp_path / "stable"
    assert run(["nnip", "--data", data, *SMALLEST, "--steps", "4", "--out", str(base), *QUIET]) == 0
    dynamics = ["--replicas", "2", "--window", "8", "--frame-every", "4"]
    learning = ["--stable", "--base", str(base), "--steps", "2", "--max-bond-deviation", "0.0"]
    judged = ["--benchmark-replicas", "2", "--benchmark-time", "0.004"]
    assert run(["nnip", *learning, *dynamics, *judged, "--out", str(stable), *QUIET]) == 0
    row = RunDirectory.open(stable).rows()[-1]
    assert row["stable/learning"] == 1  # every bond is off its mean by more than nothing
    assert {"eval/stable_share_0.004ps_500K", "eval/base_stable_share_0.004ps_500K"} <= row.keys()
    continued = tmp_path / "continued"
    assert run(["nnip", "--base", str(base), "--steps", "2", "--out", str(continued), *QUIET]) == 0
    capsys.readouterr()

    found = ["--time", "0.004", "--replicas", "2", "--window", "8", "--frame-every", "4", "--quiet", "--json"]
    weighted = ["--temperature", "300", "--reference-temperature", "320", "--temperature-factor", "99"]
    assert run(["nnip", "benchmark", str(stable), "--against", str(base), *weighted, *found]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [entry["potential"] for entry in document["benchmark"]] == ["stable", "base"]
    assert (stable / "eval" / "benchmark" / "survival-300K-0.5fs.png").is_file()
    first = document["benchmark"][0]
    assert 1 <= first["reference_effective_frames"] < first["reference_frames"] == 8
    assert first["thresholds"] == {"bond_deviation": 0.5, "temperature_factor": 99.0}
    for options, message in ((["--energy-drift", "0.1"], "for --thermostat nve"), (["--rdf-error", "1"], "no RDF"),
                             (["--reference-spacing", "7"], "does not divide"),
                             (["--reference-spacing", "2"], "need 8 frames")):  # fmt: skip
        assert run(["nnip", "benchmark", str(base), *options, *found]) == 2
        assert message in capsys.readouterr().err

    options = ["--time", "0.01", "--frame-every", "4", "--replicas", "2", "--quiet", "--json"]
    assert run(["nnip", "simulate", str(base), *options]) == 0
    summary = json.loads(capsys.readouterr().out)
    frames = ase.io.read(Path(summary["out"]) / "replica-001.extxyz", index=":")
    assert summary["frames"] == 2 * len(frames) == 10
    assert frames[0].info["time"] == pytest.approx(2.0)


def test_stable_without_a_base_takes_the_newest_of_the_default_or_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The finished run of the same data, network and seed; a run of another kind or seed, or unfinished, is none."""
    monkeypatch.chdir(tmp_path)
    base = resolve(make_config(NnipConfig, {}))

    def config(**values: Any) -> NnipConfig:
        return resolve(make_config(NnipConfig, {"stable": True, **values}))

    first = config()
    assert first.base == default_base_path(base).as_posix()
    assert resolve(first) == first
    asked = needs(first)
    assert asked is not None
    assert (asked.config, asked.path) == (base, default_base_path(base))
    assert "is trained first" in asked.message

    def stored(name: str, state: str, **values: Any) -> None:
        run = RunDirectory.create(tmp_path / "runs" / name, "nnip", resolve(make_config(NnipConfig, values)))
        run.write_status(state, 1, 1)
        run.release()

    stored("unfinished", "running")
    stored("smaller", "done", features=16)
    stored("other-seed", "done", seed=1)
    assert config() == first
    stored("mine", "done")
    assert config().base == "runs/mine"
    assert needs(config()) is None
    assert config(seed=1).base == "runs/other-seed"
    assert config(features=16).base == "runs/smaller"
    assert needs(config(features=8)) is not None

    stored("study/schnet-s2", "done", seed=2)
    assert config(seed=2).base == "runs/study/schnet-s2"
    assert run(["nnip", "--stable", "--base", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert run(["nnip", "--stable", "--features", "8", "--dry-run"]) == 2
    assert "a dry run trains nothing" in capsys.readouterr().err


def test_each_seed_of_a_study_has_its_own_base_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what was found for the first seed nor what a pattern names for it is handed to the others."""
    monkeypatch.chdir(tmp_path)
    written: list[dict[str, Any]] = []

    class Engine:
        def run(self, jobs: Any, report: Any) -> list[Any]:
            for job in jobs:
                preset = job.arguments[job.arguments.index("--config") + 1]
                found = resolve_options(FAMILY, {"seed": str(job.seed)}, preset=Path(preset)).config
                assert isinstance(found, NnipConfig)
                written.append({"base": found.base, "split_seed": found.split_seed})
            return []

    monkeypatch.setattr(study, "make_engine", lambda workers: Engine())
    monkeypatch.setattr(study, "show_study", lambda *args, **options: None)
    for name in ("mine-0", "mine-4", "mine-5"):
        directory = RunDirectory.create(tmp_path / "runs" / name, "nnip", default_base(make_config(NnipConfig, {})))
        directory.release()
    for out, options in (("chosen", []), ("given", ["--base", "runs/mine-{seed}"])):
        assert run(["nnip", "--stable", "--seeds", "4-5", "--out", out, *options]) == 0
    alone = [default_base(make_config(NnipConfig, {"stable": True, "seed": seed})) for seed in (4, 5)]
    assert written[:2] == [{"base": default_base_path(base).as_posix(), "split_seed": base.seed} for base in alone]
    assert written[2:] == [{"base": f"runs/mine-{seed}", "split_seed": 0} for seed in (4, 5)]
