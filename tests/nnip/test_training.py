"""Energy-force training: the learning rate, the best weights by validation, and the error tables."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.errors import ConfigError
from stabletrain.nnip.config import NnipConfig, resolve
from stabletrain.nnip.errors import error_scalars, error_table
from stabletrain.nnip.experiment import NnipExperiment
from stabletrain.nnip.schedule import learning_rate_at, start_plateau, update_plateau
from stabletrain.nnip.stable_learning import energy_force_loss
from stabletrain.training.config import LARGEST_SEED, make_config, to_dict
from stabletrain.training.devices import make_mesh

TINY: dict[str, Any] = {
    "dataset": "ethanol-xtb",
    "features": 4,
    "interactions": 1,
    "train_frames": 6,
    "validation_frames": 3,
    "test_frames": 4,
    "batch_size": 3,
}
CONTEXT: Any = SimpleNamespace(tick=lambda *_: None)


def experiment(**values: Any) -> NnipExperiment:
    return NnipExperiment(resolve(make_config(NnipConfig, {**TINY, **values})), mesh=make_mesh(1, 3))


def steps(made: NnipExperiment, count: int) -> tuple[Any, list[dict[str, float]]]:
    step, state, rows = jax.jit(made.step), made.init(jax.random.key(0)), []
    for position in range(count):
        state, metrics = step(state, made.batch(position))
        rows.append({name: float(metrics[name]) for name in metrics if name.startswith("train/")})
    return state, rows


# --- the learning rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decay", "expected"),
    [("cosine", {0: 0.2, 5: 0.6, 10: 1.0, 20: 0.5, 30: 0.0}), ("constant", {0: 0.2, 10: 1.0, 30: 1.0}),
     ("plateau", {0: 0.1, 10: 0.5, 30: 0.5})],
)  # fmt: skip
def test_the_rate_grows_from_a_fifth_and_falls_as_asked(decay: str, expected: dict[int, float]) -> None:
    for position, share in expected.items():
        rate = learning_rate_at(jnp.uint32(position), peak=2.0, steps=30, warmup=10, decay=decay, factor=0.5)
        assert float(rate) == pytest.approx(2.0 * share, abs=1e-6)  # float32 cosine


@pytest.mark.torch
def test_the_plateau_rule_agrees_with_pytorch() -> None:
    torch = pytest.importorskip("torch")
    losses = [3.0, 2.0, 2.0, 1.99999, 2.5, 2.0, 1.0, *[1.5] * 40]
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.8, patience=2, min_lr=0.05, eps=0.0)
    ours = start_plateau()
    for loss in losses:
        theirs.step(loss)
        ours = update_plateau(ours, jnp.float32(loss), patience=2, smallest=0.05)
        # a product of up to 14 float32 factors
        assert float(ours.factor) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-5)
    assert float(ours.factor) == pytest.approx(0.05)


def test_a_loss_that_is_not_a_number_is_not_lower() -> None:
    plateau = update_plateau(start_plateau(), jnp.float32(jnp.nan), patience=0, smallest=0.0)
    assert float(plateau.factor) == pytest.approx(0.8)
    assert float(plateau.lowest) == np.inf


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("energy_loss", "force_loss"), [("total", "squared"), ("per-atom", "length")])
def test_the_loss_by_hand(energy_loss: str, force_loss: str) -> None:
    """Of a potential that knows its errors: 6 meV in all, and forces off by (3, 4, 0) on one atom of three."""
    potential: Any = SimpleNamespace(
        system=SimpleNamespace(count=3), energy_and_forces=lambda params, x: (params, x[0] * params)
    )
    loss = energy_force_loss(potential, energy_weight=2.0, force_weight=10.0, energy_loss=energy_loss,
                             force_loss=force_loss)  # fmt: skip
    structure = {"positions": jnp.zeros((1, 3, 3)), "energy": jnp.float32(-5.0),
                 "forces": jnp.zeros((3, 3)).at[1].set(jnp.asarray([3.0, 4.0, 0.0]))}  # fmt: skip
    energy = 6.0 if energy_loss == "total" else 2.0
    force = 25 / 9 if force_loss == "squared" else 5 / 3
    assert float(loss(jnp.float32(1.0), structure)) == pytest.approx(2 * energy**2 + 10 * force, rel=1e-6)
    assert np.isfinite(jax.grad(loss)(jnp.float32(1.0), structure))  # two atoms are met exactly


# --- validation -------------------------------------------------------------------------------------------------------


def test_the_best_weights_are_those_with_the_lowest_validation_loss_of_all_looks() -> None:
    made = experiment(steps=9, validate_every=2, learning_rate=0.1, ema_decay=0.0)
    step, state = jax.jit(made.step), made.init(jax.random.key(0))
    validation = made.validation.tree()
    loss_of = jax.jit(lambda params: jnp.mean(jax.vmap(made.loss, (None, 0))(params, validation)))
    looks: dict[int, tuple[float, Any]] = {}
    for position in range(9):
        state, _ = step(state, made.batch(position))
        if position + 1 in (1, 2, 4, 6, 8, 9):
            looks[position + 1] = float(loss_of(state.params)), jax.device_get(state.params)
        first = min(looks, key=lambda n: looks[n][0])
        assert int(state.best.step) == first
        # the same formula in another program: float32 rounding of sums
        assert float(state.best.loss) == pytest.approx(looks[first][0], rel=1e-5)
    preferred, params = next(iter(made.weights(state).items()))
    assert preferred == "best"
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), looks[first][1])


def test_the_plateau_rule_lowers_the_rate_of_a_run() -> None:
    """With rate 0 the loss never falls, so that after each two looks the factor does."""
    made = experiment(steps=8, validate_every=2, learning_rate=1e-8, lr_decay="plateau", validation_patience=0,
                      minimum_rate=0.0)  # fmt: skip
    _, rows = steps(made, 8)
    rates = [row["train/learning_rate"] / 1e-8 for row in rows]
    # looks after updates 1, 2, 4, 6: the first is the lowest so far, each later one lowers the rate
    np.testing.assert_allclose(rates, [1, 1, 0.8, 0.8, 0.64, 0.64, 0.512, 0.512], rtol=1e-5)


def test_without_validation_frames_the_average_is_preferred() -> None:
    made = experiment(steps=2, validation_frames=0)
    state, rows = steps(made, 1)
    assert list(made.weights(state)) == ["ema", "raw"]
    assert "train/best_step" not in rows[0]
    assert "eval/force_mae_validation" not in made.evaluate(state, 1, CONTEXT).scalars


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr_decay": "plateau", "validation_frames": 0}, "needs --validation-frames"),
     ({"validate_every": 5, "validation_frames": 0}, "does nothing"),
     ({"precision": "bfloat16"}, "--precision bfloat16 is not for potentials"),
     ({"warmup_steps": 10, "steps": 10}, "leaves nothing")],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(NnipConfig, options)


def test_a_seed_of_the_split_is_a_seed() -> None:
    for seed in (-1, LARGEST_SEED + 1):
        with pytest.raises(ConfigError, match="split_seed"):
            make_config(NnipConfig, {"split_seed": seed})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"energy_force_weight": 2.0}, "--energy-force-weight does nothing without --stable$"),
     ({"observable": "none"}, "--observable does nothing without --stable$"),
     ({"temperature": 300.0}, "--temperature does nothing without --stable: `stabletrain nnip benchmark RUN` has"),
     ({"benchmark_temperatures": (350.0,)}, "--benchmark-temperatures does nothing without --stable:"),
     ({"minimum_rate": 1e-5}, "--minimum-rate does nothing with --lr-decay cosine"),
     ({"stable": True, "learning_rate": 1e-3}, "--learning-rate does nothing with --stable: train the base with it"),
     ({"stable": True, "batch_size": 5}, "--batch-size does nothing with --stable"),
     ({"stable": True, "damping": 1.0}, "--damping does nothing with --thermostat nose-hoover"),
     ({"stable": True, "thermostat": "baoab", "relaxation_time": 5.0}, "--relaxation-time does nothing"),
     ({"stable": True, "residual_batch": 4}, "--residual-batch does nothing with --residual full-sample"),
     ({"stable": True, "reuse_steps": 1, "reuse_ratio": 0.5}, "--reuse-ratio does nothing"),
     ({"stable": True, "residual": "released", "reuse_steps": 3}, "--reuse-steps 3 reweights, --residual released"),
     ({"stable": True, "validation_frames": 5}, "--validation-frames does nothing with --stable"),
     ({"stable": True, "devices": 2}, "--devices 2 does nothing with --stable"),
     ({"stable": True, "benchmark_replicas": 0, "benchmark_time": 2.0}, "--benchmark-time does nothing")],
)  # fmt: skip
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(make_config(NnipConfig, options))


@pytest.mark.parametrize(("residual", "steps"), [("full-sample", 5), ("cross-fitted", 1), ("released", 1)])
def test_only_the_whole_sample_is_used_again(residual: str, steps: int) -> None:
    assert resolve(make_config(NnipConfig, {"stable": True, "residual": residual})).reuse_steps == steps


def test_the_split_has_the_seed_that_was_given() -> None:
    for seed, wanted in ((None, 3), (0, 0), (4, 4)):
        assert resolve(make_config(NnipConfig, {"seed": 3, "split_seed": seed})).split_seed == wanted


@pytest.mark.parametrize(
    "options", [{"distance_reach": 15.0}, {"stable": True, "distance_reach": 15.0}, {"stable": True}]
)
def test_a_resolved_configuration_resolves_to_itself(options: dict[str, Any]) -> None:
    resolved = resolve(make_config(NnipConfig, options))
    assert resolve(make_config(NnipConfig, to_dict(resolved))) == resolved


# --- error tables -----------------------------------------------------------------------------------------------------


def test_errors_by_element() -> None:
    energies = np.asarray([0.001, -0.003])
    forces = np.zeros((2, 3, 3))
    forces[:, 0] = 0.004  # the oxygen
    forces[0, 2] = -0.002  # one hydrogen in one frame
    found = error_scalars(energies, forces, ["O", "H", "H"], "test")
    assert found["eval/energy_mae_test"] == pytest.approx(2.0)
    assert found["eval/energy_rmse_test"] == pytest.approx(np.sqrt(5.0))
    assert found["eval/energy_per_atom_mae_test"] == pytest.approx(2.0 / 3)
    assert found["eval/force_mae_test_O"] == found["eval/force_rmse_test_O"] == pytest.approx(4.0)
    assert found["eval/force_mae_test_H"] == pytest.approx(0.5)
    assert found["eval/force_rmse_test_H"] == pytest.approx(1.0)
    assert found["eval/force_mae_test"] == pytest.approx((4.0 + 2 * 0.5) / 3)
    table = error_table(found, {"test": 2}, ["O", "H", "H"])
    assert table.splitlines()[1].split()[:5] == ["test", "2", "2", "/", "2.236"]
    assert "force on H" in table


def test_an_evaluation_has_the_table_of_every_part() -> None:
    made = experiment(steps=1)
    found = made.evaluate(made.init(jax.random.key(0)), 1, CONTEXT)
    for part, frames in (("train", 6), ("validation", 3), ("test", 4)):
        assert {f"eval/{q}_{k}_{part}" for q in ("energy", "force") for k in ("mae", "rmse")} <= found.scalars.keys()
        assert f"eval/force_rmse_{part}_O" in found.scalars
        assert f"\n{part}" in found.shown
        assert str(frames) in found.shown
    assert found.files["eval/errors-00000001.txt"].decode() == found.shown + "\n"
