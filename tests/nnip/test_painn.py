"""PaiNN: symmetries of energies, forces and inner vectors, smoothness, size, and that it learns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.cli.main import run
from stabletrain.nnip.config import NnipConfig, resolve
from stabletrain.nnip.experiment import NnipExperiment
from stabletrain.nnip.painn import Message, PaiNN, Update
from stabletrain.nnip.pairs import pair_geometry
from stabletrain.nnip.potential import EnergyScale, Potential
from stabletrain.nnip.systems import make_system
from stabletrain.training.config import make_config
from stabletrain.training.devices import make_mesh

X = np.asarray([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0], [0.2, 0.1, 2.7], [1.0, 0.3, 3.1], [-0.5, 0.7, 3.0]])
SYSTEM = make_system([8, 1, 1, 8, 1, 1], X)
SMALL = Potential("painn", PaiNN(8, 2, radial=6), SYSTEM, 5.0, EnergyScale(2.0, {}))
MIRROR = np.diag([1.0, 1.0, -1.0])


@pytest.fixture
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def rotation(seed: int) -> np.ndarray:
    turned = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    return turned * np.sign(np.linalg.det(turned))


def test_number_of_parameters() -> None:
    """Written out from the paper's figure for 128 features, 3 interactions and 20 radial functions."""
    f, k = 128, 20
    message = (f * f + f) + (f * 3 * f + 3 * f) + (k * 3 * f + 3 * f)
    update = 2 * f * f + (2 * f * f + f) + (f * 3 * f + 3 * f)
    written_out = 100 * f + 3 * (message + update) + (f * f // 2 + f // 2) + (f // 2 + 1)
    shapes = jax.eval_shape(Potential("p", PaiNN(), SYSTEM, 5.0, EnergyScale(1.0, {})).init, jax.random.key(0))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == written_out == 589_057


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("turn", [rotation(0), MIRROR @ rotation(1)], ids=["rotation", "reflection"])
def test_energy_is_invariant_and_forces_are_equivariant_and_minus_its_gradient(turn: np.ndarray) -> None:
    params, x = SMALL.init(jax.random.key(0)), jnp.asarray(X)
    energy_and_forces = jax.jit(SMALL.energy_and_forces)
    energy, forces = energy_and_forces(params, x)
    order = np.asarray([3, 5, 4, 0, 1, 2])
    turned, turned_forces = energy_and_forces(params, (x @ turn + 1.7)[order])
    assert float(jnp.abs(forces).max()) > 0.01
    # float64 rounding of some hundred operations on numbers of order one.
    np.testing.assert_allclose(turned, energy, atol=1e-12)
    np.testing.assert_allclose(turned_forces, (forces @ turn)[order], atol=1e-11)
    np.testing.assert_allclose(forces.sum(0), 0, atol=1e-12)
    step = 1e-5
    for atom, axis in ((0, 0), (2, 1), (5, 2)):
        plus = energy_and_forces(params, x.at[atom, axis].add(step))[0]
        minus = energy_and_forces(params, x.at[atom, axis].add(-step))[0]
        assert float(-(plus - minus) / (2 * step)) == pytest.approx(float(forces[atom, axis]), abs=1e-8)


@pytest.mark.usefixtures("_float64")
def test_inner_vectors_turn_and_inner_scalars_do_not() -> None:
    turn, rng = rotation(2), np.random.default_rng(0)
    scalars, vectors = jnp.asarray(rng.normal(size=(6, 4))), jnp.asarray(rng.normal(size=(6, 3, 4)))
    first, second = np.triu_indices(6, 1)

    def layers(x: Any, v: Any) -> Any:
        pairs = pair_geometry(jnp.asarray(x), jnp.asarray(first), jnp.asarray(second), None, None, 5.0)
        distance = pairs.distance[:, None]
        geometry = jnp.cos(distance), jnp.exp(-distance), pairs.vector / distance, pairs
        message, update = Message(4), Update(4)
        # the same key: the same weights, whatever the positions
        s, v = message.apply(message.init(jax.random.key(0), scalars, v, *geometry), scalars, v, *geometry)
        return update.apply(update.init(jax.random.key(1), s, v), s, v)

    (s, v), (turned_s, turned_v) = layers(X, vectors), layers(X @ turn, jnp.einsum("nif,ij->njf", vectors, turn))
    np.testing.assert_allclose(turned_s, s, atol=1e-12)  # float64 rounding
    np.testing.assert_allclose(turned_v, jnp.einsum("nif,ij->njf", v, turn), atol=1e-12)


@pytest.mark.usefixtures("_float64")
def test_it_tells_structures_apart_that_have_the_same_distances_from_each_atom() -> None:
    """Vectors let one layer see an angle: two neighbours at right angles or opposite, out of each other's sight."""
    system = make_system([8, 1, 1], np.asarray([[0.0, 0, 0], [1.4, 0, 0], [-1.4, 0, 0]]))
    seen = Potential("painn", PaiNN(4, 1, cutoff=1.9), system, 1.9, EnergyScale(1.0, {}))
    params = seen.init(jax.random.key(0))
    straight = seen.energy(params, jnp.asarray([[0.0, 0, 0], [1.4, 0, 0], [-1.4, 0, 0]]))
    bent = seen.energy(params, jnp.asarray([[0.0, 0, 0], [1.4, 0, 0], [0, 1.4, 0]]))
    assert abs(float(straight - bent)) > 1e-6


@pytest.mark.usefixtures("_float64")
def test_forces_vanish_at_the_cutoff_and_are_finite_where_atoms_coincide() -> None:
    system = make_system([1, 1], np.asarray([[0.0, 0, 0], [1.0, 0, 0]]))
    pair = Potential("painn", PaiNN(4, 1, cutoff=5.0), system, 5.0, EnergyScale(1.0, {}))
    params = pair.init(jax.random.key(0))
    forces = jax.jit(lambda d: pair.energy_and_forces(params, jnp.zeros((2, 3)).at[1, 0].set(d))[1])
    for distance in (5.0 - 1e-6, 5.0 + 1e-6):
        np.testing.assert_allclose(forces(distance), 0, atol=1e-5)  # the envelope's slope is 0.1 x 1e-6 there
    assert np.isfinite(forces(0.0)).all()


def test_training_reduces_the_force_error() -> None:
    values = {"dataset": "ethanol-xtb", "model": "painn", "features": 8, "interactions": 1, "train_frames": 10,
              "test_frames": 10, "steps": 60}  # fmt: skip
    made = NnipExperiment(resolve(make_config(NnipConfig, {**values, "learning_rate": 1e-2})), mesh=make_mesh(1, 2))
    step, state = jax.jit(made.step), made.init(jax.random.key(0))
    losses = []
    for position in range(60):
        state, metrics = step(state, made.batch(position))
        losses.append(float(metrics["train/loss"]))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


@pytest.mark.slow
def test_every_command_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, evaluate, export, simulate, benchmark, and StABlE Training from it."""
    base, exported, stable = tmp_path / "base", tmp_path / "exported", tmp_path / "stable"
    small = [
        "--dataset",
        "ethanol-xtb",
        "--features",
        "4",
        "--interactions",
        "1",
        "--train-frames",
        "8",
        "--test-frames",
        "8",
    ]
    quiet = ["--quiet", "--devices", "1", "--log-every", "1"]
    assert (
        run(
            ["nnip", "--dataset", "ethanol-xtb", "--model", "painn", *small, "--steps", "2", "--out", str(base), *quiet]
        )
        == 0
    )
    capsys.readouterr()
    assert run(["evaluate", str(base), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["metrics"]["eval/force_rmse_validation_C"] > 0
    assert run(["export", str(base), "--out", str(exported)]) == 0
    assert (exported / "model.safetensors").is_file()
    assert run(["nnip", "--stable", "--base", str(base), "--steps", "1", "--replicas", "2", "--window", "4",
                "--frame-every", "4", "--benchmark-replicas", "0", "--out", str(stable), *quiet]) == 0  # fmt: skip
    dynamics = ["--time", "0.002", "--replicas", "2", "--frame-every", "4", "--quiet", "--json"]
    assert run(["simulate", str(stable), *dynamics]) == 0
    assert run(["nnip", "benchmark", str(base), "--window", "4", *dynamics]) == 0
