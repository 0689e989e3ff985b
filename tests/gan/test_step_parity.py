"""Whole steps and all losses against PyTorch, from the same weights, noise and data, in float64.

A step is five updates of the discriminator and one of the generator. Losses are of linear networks, one for each
adversarial loss and conditioning, with the gradients by both networks' parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.gan import experiment as experiment_module
from stabletrain.gan.objectives import CriticBatch
from tests.diffusion.weights import by_name, summary_of
from tests.gan.parity_cases import (
    CRITIC_STEPS,
    LOSSES,
    STEPS,
    loss_inputs,
    loss_objectives,
    loss_start,
    start_value,
    step_experiment,
    step_inputs,
)

FIXTURES = Path(__file__).parent / "fixtures"
EXACT = 1e-9
"""Both sides are float64; sums in another order differ by about 1e-13, which six updates of Adam carry on."""
AVERAGE = 1e-6
"""The moving average is kept in float32."""


def fixture(kind: str, name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / f"{kind}.npz") as archive:
        return {key.split(":", 1)[1]: archive[key] for key in archive.files if key.split(":", 1)[0] == name}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Every number agrees, relative to the largest of its array."""
    assert set(found) == set(expected)
    for key in expected:
        tolerance = AVERAGE if key == "average" else EXACT
        scale = np.abs(expected[key]).max()
        np.testing.assert_allclose(found[key], expected[key], rtol=tolerance, atol=tolerance * scale, err_msg=key)


def nested(values: dict[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *groups, leaf = name.split("/")
        at = tree
        for group in groups:
            at = at.setdefault(group, {})
        at[leaf] = jnp.asarray(value)
    return tree


def started(network: Any, which: str) -> Any:
    """The state of one network before the first update, in float64."""

    def filled(kind: str, tree: Any) -> Any:
        shapes = {key: leaf.shape for key, leaf in by_name(tree).items()}
        return nested({key: start_value(f"{which}/{kind}", key, shape) for key, shape in shapes.items()})

    return network.replace(
        params=filled("params", network.params),
        statistics={kind: filled(kind, tree) for kind, tree in network.statistics.items()},
        optimizer=jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.ndim else leaf, network.optimizer),
    )


def our_step(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The experiment's own step, with its random draws replaced by the inputs of the case."""
    monkeypatch.setattr(experiment_module, "compute_dtype", lambda precision: None)  # that of the inputs: float64
    experiment = step_experiment(name)
    given = {key: jnp.asarray(value) for key, value in step_inputs().items()}
    z = given["z"][..., : STEPS[name]["z_dim"]]
    critic_step = experiment._critic_step

    def updated(state: Any, part: Any, position: Any, number: Any, key: Any) -> Any:
        experiment._latents = lambda key, count: (z[number], given["labels"][number])
        return critic_step(state, part, position, number, key)

    experiment._critic_step = updated
    experiment.objectives.draw = lambda key, count: (z[CRITIC_STEPS], given["labels"][CRITIC_STEPS])
    experiment.domain.real = lambda batch, key: (batch["images"], batch["labels"])
    due = jax.eval_shape(experiment.init, jax.random.key(0))
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), due)
    state = state.replace(generator=started(state.generator, "generator"), critic=started(state.critic, "critic"))
    start = {"params": state.generator.params, **state.generator.statistics}
    state = state.replace(ema=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start))
    batch = {"images": given["real"], "labels": given["real_labels"], "position": jnp.uint32(0), **experiment.resident}
    experiment._unrolled = False  # the five updates as a loop, which compiles once
    # Without optimisation, which takes longer than the few numbers do.
    step = jax.jit(experiment.step, compiler_options={"xla_backend_optimization_level": "0"})
    state, metrics = step(state, batch)

    def summary(*trees: Any) -> np.ndarray:
        return summary_of({k: np.asarray(v, np.float64) for tree in trees for k, v in by_name(tree).items()})

    found = {
        "losses": np.array([float(metrics[f"train/loss_{which}"]) for which in ("discriminator", "generator")]),
        "generator": summary(state.generator.params),
        "generator statistics": summary(*state.generator.statistics.values()),
        "critic": summary(state.critic.params),
        "average": summary(*state.ema.values()),
    }
    if state.critic.statistics:
        found["critic statistics"] = summary(*state.critic.statistics.values())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_five_updates_of_the_discriminator_and_one_of_the_generator_are_those_of_torch(name, monkeypatch):
    with jax.enable_x64(True):
        assert_same(our_step(name, monkeypatch), fixture("step", name))


@pytest.mark.torch
@pytest.mark.parametrize("name", STEPS)
def test_the_fixture_of_steps_is_what_torch_computes(name):
    pytest.importorskip("torch")
    from tests.gan.torch_reference import stepped

    assert_same(stepped(name), fixture("step", name))


def our_losses(name: str) -> dict[str, np.ndarray]:
    objectives = loss_objectives(name)
    critic, generator = (nested(values) for values in loss_start(name))
    given = {key: jnp.asarray(value) for key, value in loss_inputs().items()}
    labelled = objectives.num_classes > 0
    labels = given["labels"] if labelled else None
    batch = CriticBatch(given["real"], given["real_labels"] if labelled else None, given["fake"], labels, None)
    shared = {"augment_probability": jnp.zeros(()), "position": jnp.uint32(0), "key": jax.random.key(0)}
    (of_critic, _), by_critic = jax.value_and_grad(objectives.critic_loss, has_aux=True)(
        critic, {}, batch, lecam_means=given["lecam"], update=jnp.uint32(0), **shared
    )
    (of_generator, _), by_generator = jax.value_and_grad(objectives.generator_loss, has_aux=True)(
        generator, {}, {"params": critic}, real=given["real"], real_labels=given["real_labels"],
        path_mean=jnp.zeros(()), **shared,
    )  # fmt: skip
    return {
        "losses": np.array([float(of_critic), float(of_generator)]),
        "critic": summary_of({key: np.asarray(value) for key, value in by_name(by_critic).items()}),
        "generator": summary_of({key: np.asarray(value) for key, value in by_name(by_generator).items()}),
    }


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_and_its_gradients_are_those_of_torch(name):
    with jax.enable_x64(True):
        found, expected = our_losses(name), fixture("losses", name)
    assert_same(found, expected)
    assert (np.abs(expected["generator"]) > 1e-6).all()


@pytest.mark.torch
@pytest.mark.parametrize("name", LOSSES)
def test_the_fixture_of_losses_is_what_torch_computes(name):
    pytest.importorskip("torch")
    from tests.gan.torch_reference import losses_of

    assert_same(losses_of(name), fixture("losses", name))
