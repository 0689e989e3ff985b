"""What the parity tests do: run a case in float64 and compare with the fixture or with PyTorch itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.diffusion import samplers
from stabletrain.diffusion.guidance import guided
from stabletrain.diffusion.learned_variance import LearnedVarianceDDPM
from stabletrain.diffusion.processes import PROCESSES
from stabletrain.diffusion.uvit import UViT
from tests.diffusion.cases import (
    SMALL_UVIT,
    TRAINING_STEPS,
    TRAJECTORY_NETWORKS,
    UNET_CASES,
    UVIT_CASES,
    case_inputs,
    network_of,
    shapes_of,
    training_experiment,
    training_inputs,
    trajectory_inputs,
)
from tests.diffusion.sampler_reference import GUIDANCE, TRAJECTORIES
from tests.diffusion.weights import by_name, filled, inputs, summary_of, wave

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 1e-9
"""Both sides are float64; a sum of some thousand terms in another order differs by about 1e-13."""


def fixture(kind: str, name: str) -> dict[str, np.ndarray]:
    """The numbers of one case."""
    with np.load(FIXTURES / f"{kind}.npz") as archive:
        return {key.split(":", 1)[1]: archive[key] for key in archive.files if key.split(":", 1)[0] == name}


def our_numbers(kind: str, name: str) -> dict[str, np.ndarray]:
    """Output, gradient by the images, and the summary of the gradient by each parameter."""
    network, params = network_of(kind, name), filled(shapes_of(kind, name))
    images, times, labels = case_inputs({"uvit": UVIT_CASES, "unet": UNET_CASES}[kind][name])

    with jax.enable_x64(True):

        def run(params, images):
            out = network.apply({"params": params}, images, jnp.asarray(times), labels)
            return jnp.sum(out * wave("cotangent", out.shape)), out

        # not compiled as one: the cases share most of their operations, so that each compiles once for all of them
        differentiated = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
        (_, out), (by_params, by_images) = differentiated(jax.tree.map(jnp.asarray, params), jnp.asarray(images))
        gradients = summary_of({key: np.asarray(value) for key, value in by_name(by_params).items()})
        return {"output": np.asarray(out), "images": np.asarray(by_images), "gradients": gradients}


RELEASED = [
    f"{scaling}{labels}{mlp}"
    for labels in ("", "-labels")
    for scaling, mlp in (*((name, "") for name in ("none", "sqrt2", "cs", "ls", "ls-per-skip")), ("cs", "-time-mlp"))
]
"""Cases whose outputs the authors' own network gave, with kappa 0.5."""


def released(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Our output and the authors' for the same weights."""
    mlp, labelled = name.endswith("-time-mlp"), "-labels" in name
    scaling = name.removesuffix("-time-mlp").removesuffix("-labels")
    values = {**SMALL_UVIT, "depth": 6, "num_classes": 3 if labelled else 0, "skip_scaling": scaling, "kappa": 0.5}
    network = UViT(**values, time_mlp=mlp, final_convolution=not mlp)
    images, times, labels = inputs(8, 2, network.num_classes)
    with jax.enable_x64(True):
        args = jnp.asarray(images), jnp.asarray(times), None if labels is None else jnp.asarray(labels)
        params = filled(jax.eval_shape(network.init, jax.random.key(0), *args)["params"])
        out = network.apply({"params": params}, *args)
    with np.load(FIXTURES / "uvit_released.npz") as archive:
        return {"output": np.asarray(out)}, {"output": archive[name]}


def our_course(name: str) -> dict[str, np.ndarray]:
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
            with (
                mock.patch.object(experiment, "_examples", return_value=(clean, labels)),
                mock.patch.object(type(experiment.process), "draw_times", return_value=times),
                mock.patch.object(jax.random, "normal", return_value=noise),
            ):
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


def our_trajectory(name: str) -> dict[str, np.ndarray]:
    """What the network is shown and told on the package's trajectory, and its end, as `sampler_reference` has them."""
    case = TRAJECTORIES[name]
    kind = case.get("network", "uvit")
    network, (start, noise, texts, empty) = TRAJECTORY_NETWORKS[kind], trajectory_inputs(case["steps"])
    process: Any = LearnedVarianceDDPM() if kind == "variance" else PROCESSES[case["process"]]()
    plan = samplers.SAMPLERS[case["sampler"]](
        process, case["steps"], **{key: case[key] for key in ("eta", "churn") if key in case}
    )
    told_texts = texts if kind == "texts" else None
    args = jnp.asarray(start, jnp.float32), jnp.zeros(len(start)), told_texts
    params = filled(jax.eval_shape(network.init, jax.random.key(0), *args)["params"])
    shown, told = [], []

    # Step by step, not compiled as one: what the network sees can be kept, and all cases share their operations.
    with jax.enable_x64(True), jax.disable_jit():
        start, noise = jnp.asarray(start), jnp.asarray(noise)

        def applied(noisy, times, labels):
            return network.apply({"params": params}, noisy, times, labels)

        def watched(noisy, times):
            shown.append(np.asarray(noisy))
            told.append(float(times[0]))
            if told_texts is None:
                return applied(noisy, times, None)
            return guided(applied, jnp.asarray(texts), empty, GUIDANCE)(noisy, times)

        with mock.patch.object(samplers, "_normal", lambda keys, draw, shape: noise[int(draw) - 1]):
            end = samplers.follow(process, plan, watched, process.prior_scale * start, jnp.zeros(len(start)))
    return {"shown": np.stack(shown), "told": np.array(told), "end": np.asarray(end)}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> None:
    """Every number of both agrees, relative to the largest of its array."""
    assert set(found) == set(expected)
    for key in expected:
        assert found[key].dtype == np.float64
        scale = np.abs(expected[key]).max()
        np.testing.assert_allclose(found[key], expected[key], rtol=tolerance, atol=tolerance * scale, err_msg=key)
