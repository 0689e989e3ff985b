"""Frames made by dynamics with a reference: the command, exact resuming, the classical water, and units of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.constraints import FixAtoms

from stabletrain.cli.main import run
from stabletrain.errors import ConfigError, DataError
from stabletrain.nnip.classical_water import ANGLE, BOND_LENGTH, WaterEngine, lattice, make_energy
from stabletrain.nnip.frames import HARTREE, read_frames
from stabletrain.nnip.reference_md import CalculatorEngine, Settings, make_frames
from stabletrain.nnip.structures import read_structure
from stabletrain.nnip.units import thermal_energy

SPRING = 5.0  # eV / A^2


class Spring(Calculator):
    """Two atoms on a spring of length 1 A."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 (ASE's)

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties or ["energy"], system_changes)
        vector = self.atoms.positions[1] - self.atoms.positions[0]
        length = np.linalg.norm(vector)
        push = -SPRING * (length - 1.0) * vector / length
        self.results = {"energy": 0.5 * SPRING * (length - 1.0) ** 2, "forces": np.asarray([-push, push])}


def engine() -> CalculatorEngine:
    return CalculatorEngine(Atoms("H2", positions=[[0, 0, 0], [0, 0, 1.3]]), Spring, {"program": "a spring"})


SETTINGS = Settings(frames=12, timestep=0.5, spacing=2.0, equilibration=0.004)


def test_frames_after_a_stop_are_those_without_one(tmp_path: Path) -> None:
    whole = make_frames(engine(), SETTINGS, tmp_path / "whole.npz")

    def stop(label: str, done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    out = tmp_path / "parts.npz"
    with pytest.raises(KeyboardInterrupt):
        make_frames(engine(), SETTINGS, out, tick=stop)
    assert not out.exists()
    with pytest.raises(DataError, match=r"other settings \(temperature 500"):
        make_frames(engine(), Settings(**{**vars(SETTINGS), "temperature": 400.0}), out)
    again = make_frames(engine(), SETTINGS, out)
    assert (whole["resumed_from"], again["resumed_from"]) == (0, 7)
    assert [path.name for path in tmp_path.glob("parts*")] == ["parts.npz"]
    with np.load(tmp_path / "whole.npz") as one, np.load(out) as other:
        assert set(one.files) == {"R", "E", "F", "z", "energy_unit", "about"}
        for name in "REF":
            np.testing.assert_array_equal(one[name], other[name])
        assert json.loads(str(other["about"]))["program"] == "a spring"
    with pytest.raises(DataError, match="is there already"):
        make_frames(engine(), SETTINGS, out)


def test_a_stop_after_more_frames_than_asked_for_gives_those_asked_for(tmp_path: Path) -> None:
    def stop(label: str, done: int, total: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    fewer = Settings(**{**vars(SETTINGS), "frames": 4})
    with pytest.raises(KeyboardInterrupt):
        make_frames(engine(), SETTINGS, tmp_path / "parts.npz", tick=stop)
    parts = make_frames(engine(), fewer, tmp_path / "parts.npz")
    whole = make_frames(engine(), fewer, tmp_path / "whole.npz")
    assert (parts["resumed_from"], parts["frames"], len(read_frames("", parts["file"]))) == (9, 4, 4)
    np.testing.assert_array_equal(read_frames("", parts["file"]).positions, read_frames("", whole["file"]).positions)


@pytest.mark.parametrize("change", ["atom", "cell", "moment", "mass"])
def test_a_stopped_run_goes_on_from_the_same_structure_only(tmp_path: Path, change: str) -> None:
    def made(atoms: Atoms, **options: Any) -> dict[str, Any]:
        of_spring = CalculatorEngine(atoms, Spring, {"structure": "h2"})
        return make_frames(of_spring, SETTINGS, tmp_path / "h2.npz", **options)

    def stop(label: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    atoms = Atoms("H2", positions=[[0, 0, 0], [0, 0, 1.3]], cell=[8.0] * 3, pbc=True)
    edited = atoms.copy()
    if change == "atom":
        edited.positions[1, 2] += 0.01
    elif change == "cell":
        edited.cell[0, 0] = 9.0
    elif change == "moment":
        edited.set_initial_magnetic_moments([1.0, 0.0])
    else:
        edited.set_masses([2.014, 1.008])
    with pytest.raises(KeyboardInterrupt):
        made(atoms, tick=stop)
    with pytest.raises(DataError, match=r"other settings \(geometry [0-9a-f]{16} there, [0-9a-f]{16} here\)"):
        made(edited)
    assert made(atoms)["resumed_from"] == 3


def test_the_thermostat_samples_the_spring(tmp_path: Path) -> None:
    """<k (r - 1)^2> = kT of a stiff spring, up to the radial measure: <E> = kT / 2 (1 + O(kT / k))."""
    settings = Settings(frames=300, timestep=1.0, spacing=8.0, damping=200.0, equilibration=0.05, temperature=300.0)
    make_frames(engine(), settings, tmp_path / "spring.npz")
    frames = read_frames("", str(tmp_path / "spring.npz"))  # the file says its unit
    # 300 nearly independent draws of a chi-square: 8 % standard error, 2 kT / k = 1 % of the measure
    assert frames.energies.mean() == pytest.approx(0.5 * thermal_energy(300.0), rel=0.25)


def test_the_command_makes_data_that_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ase.io import write

    write(tmp_path / "copper.xyz", Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 2.4]]))
    arguments = ["data", "make-md", str(tmp_path / "copper.xyz"), "--calculator", "ase.calculators.emt:EMT"]
    arguments += ["--frames", "4", "--equilibration", "0.01", "--out", str(tmp_path / "copper.npz"), "--json"]
    assert run(arguments) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["frames"] == 4
    assert done["spacing"] == 10.0
    frames = read_frames("", done["file"])
    assert frames.positions.shape == (4, 2, 3)
    assert run(["data", "make-md", "--system", "water", "--out", str(tmp_path / "w.npz")]) == 2
    assert "water-flexible" in capsys.readouterr().err
    assert run([*arguments[:-2], str(tmp_path / "other.npz"), "--spacing", "0.7"]) == 2
    assert "multiple of --timestep" in capsys.readouterr().err
    for name in ("plain", "copper.xyz.dat"):  # training would not read them
        assert run([*arguments[:-2], str(tmp_path / name)]) == 2
        assert f"--out {tmp_path / name}.npz" in capsys.readouterr().err
        assert not list(tmp_path.glob(f"{name}*"))
    assert run([*arguments, "--seed", str(2**31 - 1)]) == 2
    assert "--seed" in capsys.readouterr().err


def test_a_structure_is_a_file_or_smiles() -> None:
    pytest.importorskip("rdkit")
    atoms, name = read_structure("CCO")
    assert name == "CCO"
    assert atoms.get_chemical_formula() == "C2H6O"
    assert atoms.get_all_distances()[np.triu_indices(9, 1)].min() > 0.8  # no two atoms on each other
    np.testing.assert_array_equal(atoms.positions, read_structure("CCO")[0].positions)
    with pytest.raises(DataError, match="neither a file nor valid SMILES"):
        read_structure("notamolecule")
    with pytest.raises(DataError, match=r"no file missing\.xyz"):
        read_structure("missing.xyz")


class Failing(Spring):
    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        raise KeyError("no parameters")


def test_a_calculator_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ase.io import write

    write(tmp_path / "silicon.xyz", Atoms("Si2", positions=[[0, 0, 0], [0, 0, 2.4]]))
    arguments = ["data", "make-md", str(tmp_path / "silicon.xyz"), "--calculator", "ase.calculators.emt:EMT"]
    assert run([*arguments, "--out", str(tmp_path / "silicon.npz")]) == 3
    said = capsys.readouterr().err
    assert "ase.calculators.emt:EMT failed at the start: NotImplementedError: No EMT-potential for Si" in said
    state = engine().start(SETTINGS)
    failing = CalculatorEngine(Atoms("H2"), Failing, {"program": "a broken spring"})
    with pytest.raises(DataError, match="a broken spring failed before frame 3: KeyError: 'no parameters'"):
        failing.advance(SETTINGS, state, 3)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", None], ids=["empty", "truncated", "without-about"])
def test_a_damaged_partial_file_is_said(tmp_path: Path, content: bytes | None) -> None:
    partial = tmp_path / "h2.npz.partial.npz"
    if content is None:
        np.savez(partial, position=np.zeros((1, 2, 3)))
    else:
        partial.write_bytes(content)
    with pytest.raises(DataError, match=r"partial\.npz is damaged .*: remove it to start anew"):
        make_frames(engine(), SETTINGS, tmp_path / "h2.npz")


def test_a_structure_with_constraints_is_refused(tmp_path: Path) -> None:
    """ASE would hold fixed atoms back and zero their forces, while the dynamics here move them."""
    from ase.io import write

    fixed = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 2.4]], constraint=FixAtoms([0]))
    write(tmp_path / "fixed.extxyz", fixed)
    with pytest.raises(DataError, match=r"has constraints \(FixAtoms\).*remove them"):
        read_structure(str(tmp_path / "fixed.extxyz"))


def test_xtb_gives_energies_and_forces_that_belong_together(tmp_path: Path) -> None:
    pytest.importorskip("tblite")
    water = Atoms("OHH", positions=[[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    from ase.io import write

    write(tmp_path / "water.xyz", water)
    out = tmp_path / "water.npz"
    assert run(["data", "make-md", str(tmp_path / "water.xyz"), "--frames", "30", "--spacing", "0.5",
                 "--equilibration", "0", "--out", str(out), "-q"]) == 0  # fmt: skip
    frames = read_frames("", str(out))
    work = -0.5 * np.sum((frames.forces[1:] + frames.forces[:-1]) * np.diff(frames.positions, axis=0), axis=(1, 2))
    # the trapezium rule over steps of some 0.01 A
    np.testing.assert_allclose(np.diff(frames.energies), work, atol=2e-3)


# --- the classical water ----------------------------------------------------------------------------------------------


def test_the_water_is_at_rest_in_its_geometry_and_whole_cells_apart() -> None:
    edge = 40.0
    energy = jax.jit(make_energy(2, edge))
    one = lattice(2, edge, seed=1)
    arms = one.reshape(2, 3, 3)[:, 1:] - one.reshape(2, 3, 3)[:, :1]
    np.testing.assert_allclose(np.linalg.norm(arms, axis=-1), BOND_LENGTH, rtol=1e-6)
    cosine = np.sum(arms[:, 0] * arms[:, 1], axis=-1) / BOND_LENGTH**2
    np.testing.assert_allclose(cosine, np.cos(ANGLE), rtol=1e-6)
    # further apart than half of the cell nothing is left between them
    assert float(energy(one)) == pytest.approx(0.0, abs=1e-5)
    near = one.reshape(2, 3, 3).copy()
    near[1] += one.reshape(2, 3, 3)[0, 0] - near[1, 0] + [0, 0, 2.8]
    moved = near.copy()
    moved[1] += [edge, -edge, 2 * edge]
    # float32 positions of some 100 A
    assert float(energy(moved.reshape(6, 3))) == pytest.approx(float(energy(near.reshape(6, 3))), abs=1e-3)


def test_the_water_ends_smoothly_at_its_reach() -> None:
    with jax.enable_x64(True):
        edge = 16.0
        force = jax.jit(jax.grad(make_energy(2, edge)))
        pair = lattice(1, edge, seed=0).reshape(1, 3, 3)
        there = np.concatenate([pair, pair + np.asarray([0, 0, edge / 2])])
        sizes = []
        for nearer in (1.0, 0.1, 0.001):
            at = there.copy()
            at[1, :, 2] -= nearer
            sizes.append(np.abs(np.asarray(force(at.reshape(6, 3)))).max())
        assert sizes[0] > sizes[1] > sizes[2]


def test_the_water_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    settings = Settings(frames=3, temperature=300.0, spacing=1.0, equilibration=0.001)
    whole = make_frames(WaterEngine(8, 8.0), settings, tmp_path / "whole.npz")

    def stop(label: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_frames(WaterEngine(8, 8.0), settings, tmp_path / "parts.npz", tick=stop)
    parts = make_frames(WaterEngine(8, 8.0), settings, tmp_path / "parts.npz")
    assert parts["resumed_from"] == 2
    frames = read_frames("", whole["file"])
    assert len(frames) == 3
    np.testing.assert_array_equal(frames.positions, read_frames("", parts["file"]).positions)
    assert frames.system.cell is not None
    assert frames.system.cell[0, 0] == 8.0


# --- units of files ---------------------------------------------------------------------------------------------------


def test_units_are_converted_and_the_names_of_rmd17_known(tmp_path: Path) -> None:
    r = np.asarray([[[0.0, 0, 0], [0, 0, 1.2]]] * 3)
    content = {"coords": r, "energies": np.arange(3.0), "forces": np.ones((3, 2, 3)), "nuclear_charges": [1, 1]}
    np.savez(tmp_path / "h2.npz", **content)
    plain, atomic = (
        read_frames("", str(tmp_path / "h2.npz"), "eV"),
        read_frames("", str(tmp_path / "h2.npz"), "hartree", "bohr"),
    )
    assert plain.positions[0, 1, 2] == 1.2
    assert atomic.positions[0, 1, 2] == pytest.approx(1.2 * 0.529177210903)
    np.testing.assert_allclose(atomic.energies, plain.energies * HARTREE)
    np.testing.assert_allclose(atomic.forces, plain.forces * HARTREE / 0.529177210903)
    kj = read_frames("", str(tmp_path / "h2.npz"), "kJ/mol")
    kcal = read_frames("", str(tmp_path / "h2.npz"))
    np.testing.assert_allclose(kcal.energies, 4.184 * kj.energies)
    np.savez(tmp_path / "said.npz", **content, energy_unit="eV")
    np.testing.assert_array_equal(read_frames("", str(tmp_path / "said.npz")).energies, plain.energies)
    with pytest.raises(ConfigError, match=r"contradicts said\.npz, which says eV"):
        read_frames("", str(tmp_path / "said.npz"), "kcal/mol")


def test_the_water_is_made_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stabletrain.nnip import classical_water

    monkeypatch.setenv("STABLETRAIN_HOME", str(tmp_path))
    made: list[Path] = []

    def make(engine: WaterEngine, settings: Settings, out: Path, *, tick: Any) -> None:
        made.append(out)
        out.parent.mkdir(parents=True)
        content = {"R": lattice(64, engine.edge, 0)[None], "E": [0.0], "F": np.zeros((1, 192, 3))}
        np.savez(out, **content, z=engine.species, cell=engine.cell, energy_unit="eV")

    monkeypatch.setattr("stabletrain.nnip.reference_md.make_frames", make)
    first, again = (read_frames("water-flexible", None) for _ in range(2))
    assert made == [tmp_path / "md" / f"water-flexible-{classical_water.VERSION}.npz"]
    assert first.spec == again.spec
    assert len(first.system.bonds) == 128
    with pytest.raises(ConfigError, match="did you mean 'water-flexible'"):
        read_frames("water-flexibel", None)


@pytest.mark.parametrize(("dataset", "shape"), [("aspirin-xtb", (600, 21, 3)), ("ac-ala3-xtb", (400, 42, 3))])
def test_a_bundled_set_says_how_it_was_made_and_stays_within_its_bonds(dataset: str, shape: tuple[int, ...]) -> None:
    from importlib import resources

    from stabletrain.nnip.frames import BUNDLED
    from stabletrain.nnip.reference_md import provenance_of

    frames = read_frames(dataset, None)
    assert frames.positions.shape == shape
    lengths = np.linalg.norm(np.diff(frames.positions[:, frames.system.bonds], axis=2)[:, :, 0], axis=-1)
    assert np.abs(lengths - lengths.mean(axis=0)).max() < 0.25  # the criterion refuses nothing of the reference
    with resources.as_file(resources.files("stabletrain.nnip") / "bundled" / BUNDLED[dataset]) as path:
        about = provenance_of(path)
    assert (about["program"], about["temperature"], about["spacing"]) == ("tblite, GFN2-xTB", 500.0, 10.0)
