"""NequIP and GemNet-T: sizes, symmetries, gradients, smoothness, padded lists, and every command with them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from stabletrain.cli.main import run
from stabletrain.nnip.gemnet import (
    Edges,
    GemNetT,
    Triplets,
    fitted_scaling,
    he_orthogonal,
    scaled_silu,
    zonal_harmonics,
)
from stabletrain.nnip.nequip import NequIP, normalized_silu, normalized_tanh
from stabletrain.nnip.pairs import all_arrivals, all_pairs, arrivals_of
from stabletrain.nnip.potential import EnergyScale, Potential
from stabletrain.nnip.radial import polynomial_envelope
from stabletrain.nnip.systems import make_system

X = np.asarray([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0], [0.2, 0.1, 2.7], [1.0, 0.3, 3.1], [-0.5, 0.7, 3.0]])
SPECIES = [8, 1, 1, 8, 1, 1]
SYSTEM = make_system(SPECIES, X)
BOX = make_system(SPECIES, X, np.asarray([[9.0, 0, 0], [1.0, 9.0, 0], [0.0, -1.0, 9.5]]))
NETWORKS = {
    "nequip": NequIP((1, 8), 5.0, features=4, interactions=2, radial=4, radial_features=8, cutoff=4.0),
    "gemnet-t": GemNetT(features=6, interactions=1, basis=3, cutoff=4.0),
}
POTENTIALS = {name: Potential(name, network, SYSTEM, 4.0, EnergyScale(2.0, {})) for name, network in NETWORKS.items()}
COMPILED = {name: jax.jit(potential.energy_and_forces) for name, potential in POTENTIALS.items()}
EITHER = pytest.mark.parametrize("name", NETWORKS)


@functools.cache
def params_of(name: str) -> Any:
    """float32 parameters, the same for all tests: one compiled program a network and type of positions."""
    with jax.enable_x64(False):
        return jax.jit(POTENTIALS[name].init)(jax.random.key(0))


@pytest.fixture
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def size(params: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_nequip_has_the_papers_number_of_parameters() -> None:
    """Four elements, 32 features of each degree and parity up to 1, three layers: the released checkpoint's weights."""
    network = NequIP((1, 6, 7, 8), 21.35)
    four = make_system([1, 6, 7, 8, 1, 1], X)
    shapes = jax.eval_shape(Potential("n", network, four, 5.0, EnergyScale(1.0, {})).init, jax.random.key(0))
    assert size(shapes) == 120_984


def test_gemnet_has_the_papers_number_of_parameters() -> None:
    shapes = jax.eval_shape(Potential("g", GemNetT(), SYSTEM, 5.0, EnergyScale(1.0, {})).init, jax.random.key(0))
    assert size(shapes) == 1_891_025
    assert sum(path[-1] == "scale" for path in traverse_util.flatten_dict(shapes)) == 17


# --- symmetries and gradients -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_float64")
@EITHER
def test_energy_is_invariant_and_forces_are_minus_its_gradient(name: str) -> None:
    """Rotation, reflection, translation, exchange of equal atoms; central differences; forces add up to zero."""
    params, x = params_of(name), jnp.asarray(X)
    energy, forces = COMPILED[name](params, x)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    order = np.asarray([3, 5, 4, 0, 1, 2])
    for matrix in (turn, -turn):  # one of them is proper, the other is not
        turned, turned_forces = COMPILED[name](params, (x @ matrix + 1.7)[order])
        # float64 rounding of a thousand operations on numbers of order one to ten.
        np.testing.assert_allclose(turned, energy, atol=1e-11)
        np.testing.assert_allclose(turned_forces, (forces @ matrix)[order], atol=1e-10)
    assert float(jnp.abs(forces).max()) > 1e-3
    np.testing.assert_allclose(forces.sum(0), 0, atol=1e-11)
    step = 1e-5
    for atom, axis in ((0, 0), (2, 1), (5, 2)):
        plus = COMPILED[name](params, x.at[atom, axis].add(step))[0]
        minus = COMPILED[name](params, x.at[atom, axis].add(-step))[0]
        assert float(-(plus - minus) / (2 * step)) == pytest.approx(float(forces[atom, axis]), abs=1e-7)


@pytest.mark.usefixtures("_float64")
@EITHER
def test_energy_and_forces_are_continuous_at_the_cutoff_and_finite_where_atoms_coincide(name: str) -> None:
    """An atom that crosses the cutoff of all others: both sides agree, and beyond it there is no force."""
    params, x = params_of(name), jnp.asarray(X)

    def at(gap: float) -> tuple[Any, Any]:
        # Atom 3 is alone on the axis: 4 A + gap beyond atom 0, further from the rest; 4 and 5 are far away.
        return COMPILED[name](params, x.at[3:].set(jnp.asarray([[-3.0, -2.5 - gap, -1.0], [60, 0, 0], [0, 60, 0]])))

    reach = float(np.sqrt(16 - 9 - 1)) - 2.5  # where atom 3 is exactly 4 A from atom 0
    inside, outside = at(reach - 1e-4), at(reach + 1e-4)
    # The envelope's second derivative is 0 at the cutoff: 1e-4 A inside, energy and force differ by its third power
    # and square.
    np.testing.assert_allclose(inside[0], outside[0], atol=1e-9)
    np.testing.assert_allclose(inside[1], outside[1], atol=1e-5)
    np.testing.assert_array_equal(outside[1][3], 0.0)
    assert float(jnp.abs(at(reach - 0.5)[1][3]).max()) > 1e-6
    assert np.isfinite(np.asarray(COMPILED[name](params, x.at[1].set(x[0]))[1])).all()


@pytest.mark.usefixtures("_float64")
@EITHER
def test_in_a_cell_a_padded_list_gives_the_energy_of_all_pairs_and_tells_when_it_overflows(name: str) -> None:
    boxed = Potential(name, NETWORKS[name], BOX, 4.0, EnergyScale(1.0, {}))
    params, x = params_of(name), jnp.asarray(X)
    listed, pairs_only = boxed.fitted(X), name != "gemnet-t"
    assert len(listed.room) == 2 - pairs_only
    wide = listed.with_room((15, 9)[: 2 - pairs_only])  # more room than there are pairs, or atoms

    def of_strain(strain: jax.Array) -> jax.Array:
        return jnp.sum(boxed.energy_per_atom(params, x, strain=strain))

    strained = jax.jit(jax.value_and_grad(of_strain))
    energy, virial = strained(jnp.zeros((3, 3)))
    shifted = x.at[3:].add(jnp.asarray(BOX.cell).sum(0) * jnp.asarray([1.0, -1.0, 2.0])[:, None])
    of_list = jax.jit(wide.energy)
    for same in (x, shifted):
        np.testing.assert_allclose(of_list(params, same), energy, atol=1e-11)
    assert not bool(wide.neighbors(x).overflow)
    assert bool(listed.with_room((3,) if pairs_only else (15, 2)).neighbors(x).overflow)
    step = np.zeros((3, 3))
    step[0, 2] = 1e-5
    slope = float(strained(jnp.asarray(step))[0] - strained(jnp.asarray(-step))[0]) / 2e-5
    assert slope == pytest.approx(float(virial[0, 2]), abs=1e-7)


@EITHER
def test_float32_agrees_with_float64(name: str) -> None:
    params = params_of(name)
    energy, forces = COMPILED[name](params, jnp.asarray(X, jnp.float32))
    assert energy.dtype == forces.dtype == jnp.float32
    with jax.enable_x64(True):
        exact, exact_forces = COMPILED[name](params, jnp.asarray(X))
        assert exact_forces.dtype == jnp.float64
    # float32 rounding through a few layers, forces up to some ten eV / A.
    assert float(energy) == pytest.approx(float(exact), rel=1e-4, abs=1e-4)
    np.testing.assert_allclose(forces, exact_forces, rtol=1e-3, atol=1e-3)


# --- parts ------------------------------------------------------------------------------------------------------------


def test_activations_and_envelope_are_normalised() -> None:
    z = np.random.default_rng(0).normal(size=400_000)
    for activation in (normalized_silu, normalized_tanh):
        # The mean of 4e5 squares is known to a few parts in a thousand.
        assert float(np.mean(np.asarray(activation(jnp.asarray(z))) ** 2)) == pytest.approx(1.0, abs=0.01)
    assert float(scaled_silu(jnp.float32(1.0))) == pytest.approx(1 / (1 + np.exp(-1)) / 0.6)
    for p in (5, 6):
        ends = [jax.grad(polynomial_envelope), jax.grad(jax.grad(polynomial_envelope))]
        assert float(polynomial_envelope(jnp.float32(0.0), p)) == 1.0
        assert float(polynomial_envelope(jnp.float32(1.0), p)) == 0.0
        # float32 sums of terms up to 56.
        assert all(abs(float(slope(jnp.float32(0.999999), p))) < 1e-3 for slope in ends)


def test_zonal_harmonics_are_those_of_scipy() -> None:
    from scipy.special import sph_harm_y

    angles = np.linspace(0.1, 3.0, 7)
    expected = np.stack([sph_harm_y(degree, 0, angles, 0.0).real for degree in range(7)], axis=-1)
    np.testing.assert_allclose(zonal_harmonics(jnp.asarray(np.cos(angles)), 7), expected, atol=1e-5)


def test_first_weights_of_gemnet_have_orthogonal_columns_of_the_right_variance() -> None:
    w = np.asarray(he_orthogonal(jax.random.key(0), (64, 16)))
    np.testing.assert_allclose(w.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(w.var(0), 1 / 64, rtol=1e-3)
    assert he_orthogonal(jax.random.key(0), (7, 6, 16)).shape == (7, 6, 16)


def test_scaling_factors_make_variances_equal() -> None:
    """The first factor by hand: the root of the messages' variance over that of their sums; and all factors count."""
    potential = POTENTIALS["gemnet-t"]
    frames = jnp.asarray(X + 0.05 * np.random.default_rng(0).normal(size=(5, 6, 3)), jnp.float32)
    params = params_of("gemnet-t")
    fitted = fitted_scaling(potential, params, frames)
    factors = {path: leaf for path, leaf in traverse_util.flatten_dict(fitted).items() if path[-1] == "scale"}
    assert len(factors) == 5  # two outputs and three of an interaction
    assert all(float(factor) != 1.0 and np.isfinite(factor) for factor in factors.values())

    def parts(x: jax.Array) -> tuple[Any, Any, Any, Any]:
        pairs, _ = potential.pairs(x)
        _, seen = potential.network.apply(
            {"params": params}, jnp.asarray(SPECIES), pairs, capture_intermediates=True, mutable=["intermediates"]
        )
        inner = seen["intermediates"]
        mask = pairs.arrivals.filled & pairs.mask[pairs.arrivals.place % 15]
        slope = jax.grad(potential.energy)(params, x)
        return inner["edges"]["__call__"][0], inner["output_0"]["atoms"]["sum"]["__call__"][0], mask, slope

    messages, sums, mask, slope = jax.jit(jax.vmap(parts))(frames)  # factors of 1: the scaled sum is the sum
    kept = np.asarray(messages)[np.asarray(mask)]
    expected = np.sqrt(kept.var(0).mean() / np.asarray(sums).reshape(-1, 6).var(0).mean())
    assert float(factors["output_0", "atoms", "sum", "scale"]) == pytest.approx(float(expected), rel=1e-4)
    moved = traverse_util.flatten_dict(slope)
    assert all(not np.any(moved[path]) for path in factors), "training does not move them"


def test_messages_of_triplets_are_the_sums_written_out() -> None:
    """Every triplet by itself: sum over the other neighbours b, over angles l and radial functions, as in the paper."""
    potential = POTENTIALS["gemnet-t"]
    pairs, _ = potential.pairs(jnp.asarray(X, jnp.float32))
    edges = Edges(pairs, 4.0, 6, 7)
    params = params_of("gemnet-t")["interaction_0"]["triplets"]
    rng = np.random.default_rng(0)
    messages = rng.normal(size=(6, 5, 6)).astype(np.float32)
    basis = np.where(np.asarray(edges.mask)[..., None], rng.normal(size=(6, 5, 3)), 0.0).astype(np.float32)
    angular = rng.normal(size=(6, 5, 3, 7)).astype(np.float32)
    ours = Triplets(6).apply({"params": params}, jnp.asarray(messages), basis, jnp.asarray(angular), edges)

    def matrix(name: str) -> np.ndarray:
        return np.asarray(params[name]["dense"]["kernel"])

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x)) / 0.6

    down = silu((silu(messages @ matrix("in")) * (basis @ matrix("radial"))) @ matrix("down"))
    total = np.zeros((6, 6, 3))  # (a, c): to atom a from c
    slots = {(a, int(edges.sender[a, k])): k for a in range(6) for k in range(5) if edges.mask[a, k]}
    for (a, c), k in slots.items():
        for (a2, b), j in slots.items():
            if a2 == a and b != c:
                one, other = X[c] - X[a], X[b] - X[a]
                cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
                harmonics = np.asarray(zonal_harmonics(jnp.asarray(cosine), 7))
                weights = angular[a, k] @ harmonics  # (I,)
                total[a, c] += np.einsum("i,f,fio->o", weights, down[a, j], np.asarray(params["bilinear"]))
    for (a, c), k in slots.items():
        expected = (silu(total[a, c] @ matrix("up")) + silu(total[c, a] @ matrix("up_swapped"))) / 2**0.5
        # float32 sums of some hundred products.
        np.testing.assert_allclose(ours[a, k], expected, rtol=1e-3, atol=1e-3)


def test_arrivals_list_every_neighbour_once() -> None:
    first, second = all_pairs(4)
    listed = [(0, 1), (0, 3), (2, 3)]
    filled = np.asarray([(a, b) in listed for a, b in zip(first, second, strict=True)])
    ends = jnp.asarray(first), jnp.asarray(second)
    arrivals, overflow = arrivals_of(*ends, jnp.asarray(filled), atoms=4, degree=2)
    assert not bool(overflow)
    found = set()
    for atom, k in itertools.product(range(4), range(2)):
        if arrivals.filled[atom, k]:
            place = int(arrivals.place[atom, k])
            at_second, pair = divmod(place, 6)
            assert (second if at_second else first)[pair] == atom
            assert int(arrivals.slot[place]) == atom * 2 + k
            found.add((atom, int((first if at_second else second)[pair])))
    assert found == {*listed, *((b, a) for a, b in listed)}
    assert bool(arrivals_of(*ends, jnp.asarray(filled), atoms=4, degree=1)[1])
    everything, _ = arrivals_of(*ends, jnp.ones(6, bool), atoms=4, degree=3)
    for ours, all_at_once in zip(jax.tree.leaves(everything), jax.tree.leaves(all_arrivals(4)), strict=True):
        np.testing.assert_array_equal(ours, all_at_once)


def test_room_grows_by_a_quarter_up_to_all_pairs() -> None:
    crowd = make_system([18] * 40, np.zeros((40, 3)) + np.arange(40)[:, None], 99.0)
    potential = Potential("g", NETWORKS["gemnet-t"], crowd, 4.0, EnergyScale(1.0, {}), capacity=100, degree=8)
    assert potential.larger().room == (128, 12)
    for _ in range(12):
        potential = potential.larger()
    assert potential.room == potential.larger().room == (780, 39)
    with pytest.raises(ValueError, match="all the room"):
        POTENTIALS["gemnet-t"].larger()


# --- whole commands ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@EITHER
def test_train_export_and_simulate_or_go_on_with_stable(name: str, tmp_path: Path) -> None:
    base, exported, stable = tmp_path / "base", tmp_path / "exported", tmp_path / "stable"
    small = [
        "--dataset",
        "ethanol-xtb",
        "--features",
        "4",
        "--interactions",
        "1",
        "--train-frames",
        "4",
        "--test-frames",
        "4",
    ]
    quiet = ["--quiet", "--devices", "1", "--log-every", "1"]
    assert run(["nnip", "--model", name, *small, "--steps", "1", "--out", str(base), *quiet]) == 0
    assert run(["export", str(base), "--out", str(exported)]) == 0
    assert (exported / "model.safetensors").is_file()
    if name == "nequip":
        assert run(["simulate", str(base), "--time", "0.002", "--frame-every", "4", "--quiet", "--json"]) == 0
    else:
        assert run(["nnip", "--stable", "--base", str(base), "--steps", "1", "--replicas", "2", "--window", "4",
                    "--frame-every", "4", "--benchmark-replicas", "0", "--out", str(stable), *quiet]) == 0  # fmt: skip
