"""Five whole training steps against PyTorch's network, AdamW, warm-up, clipping and average, from the same numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion.cases import TRAINING, TRAINING_STEPS, training_experiment, training_inputs
from tests.diffusion.parity import assert_same, fixture
from tests.diffusion.weights import by_name, filled, summary_of

TOLERANCE = 1e-5
"""The learning rate, the average and PyTorch's clipping (norm + 1e-6) are right to about 1e-6, the rest is float64."""


def our_course(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The experiment's own step, with its random draws replaced by the fixture's inputs."""
    experiment = training_experiment(name)
    with jax.enable_x64(True):
        state = experiment.init(jax.random.key(0))
        params = jax.tree.map(jnp.asarray, filled(state.params))
        state = state.replace(
            params=params,
            ema=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params),
            optimizer=jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.ndim else leaf, state.optimizer),
        )

        @jax.jit
        def advanced(state, position, clean, labels, times, noise):
            with monkeypatch.context() as patch:
                patch.setattr(experiment, "_examples", lambda *a: (clean, labels))
                patch.setattr(type(experiment.process), "draw_times", lambda self, key, count: times)
                patch.setattr(jax.random, "normal", lambda key, shape: noise)
                return experiment.step(state, {"position": position})

        losses = []
        for step in range(TRAINING_STEPS):
            state, metrics = advanced(state, jnp.uint32(step), *map(jnp.asarray, training_inputs(step)))
            losses.append(float(metrics["train/loss"]))
        return {
            "losses": np.array(losses),
            "params": summary_of({key: np.asarray(value) for key, value in by_name(state.params).items()}),
            "ema": summary_of({key: np.asarray(value, np.float64) for key, value in by_name(state.ema).items()}),
        }


@pytest.mark.parametrize("name", TRAINING)
def test_five_steps_are_those_of_the_torch_reference(name, monkeypatch):
    found, expected = our_course(name, monkeypatch), fixture("training", name)
    assert_same(found, expected, TOLERANCE)
    assert len(set(expected["losses"].round(9))) == TRAINING_STEPS


@pytest.mark.torch
@pytest.mark.parametrize("name", TRAINING)
def test_the_fixture_is_what_torch_computes(name):
    pytest.importorskip("torch")
    from tests.diffusion.torch_reference import trained

    assert_same(trained(name), fixture("training", name))
