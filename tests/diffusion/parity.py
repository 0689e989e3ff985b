"""What both parity tests do: run a case in float64 and compare with the fixture or with PyTorch itself."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.diffusion.cases import UNET_CASES, UVIT_CASES, case_inputs, network_of, shapes_of
from tests.diffusion.weights import by_name, filled, summary_of, wave

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


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> None:
    """Every number of both agrees, relative to the largest of its array."""
    assert set(found) == set(expected)
    for key in expected:
        assert found[key].dtype == np.float64
        scale = np.abs(expected[key]).max()
        np.testing.assert_allclose(found[key], expected[key], rtol=tolerance, atol=tolerance * scale, err_msg=key)
