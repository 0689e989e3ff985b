"""Aggregators against the independent library torchjd, on random gradients of several numbers of tasks."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.continual.aggregators.elementwise import GRADDROP, combine_elements, uniforms
from stabletrain.continual.aggregators.gram_weights import AGGREGATORS, make_aggregator

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # optional solvers that are absent
    aggregation = pytest.importorskip("torchjd.aggregation")

pytestmark = pytest.mark.torch

PEERS: dict[str, tuple[str, dict[str, Any], float]] = {
    # ours: (torchjd's, its settings, largest difference over the length of torchjd's update)
    "sum": ("Sum", {}, 1e-5),
    "mean": ("Mean", {}, 1e-5),
    "mgda": ("MGDA", {"epsilon": 1e-6, "max_iters": 20000}, 1e-2),  # its Frank-Wolfe steps converge sublinearly
    "imtl-g": ("IMTLG", {}, 1e-4),
    "aligned-mtl": ("AlignedMTL", {}, 1e-4),
    "upgrad": ("UPGrad", {"projector": 1e-9}, 1e-5),
    "dualproj": ("DualProj", {"projector": 1e-9}, 1e-5),
    "config": ("ConFIG", {}, 1e-4),
    "cagrad": ("CAGrad", {"c": 0.5}, 3e-2),  # a conic program there, exponentiated gradients here
    "nash-mtl": ("NashMTL", {"n_tasks": 0, "max_norm": 1.0, "optim_niter": 100}, 1e-4),
}
"""Tolerances are several times the largest difference found over the cases below. `projector`: the ridge of its
quadratic programs, which is 1e-4 by default and then shows in the second digit of ill-conditioned cases."""


def gradients(tasks: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((tasks, 9)) * np.exp(rng.uniform(-1, 1, (tasks, 1)))


def theirs(name: str, rows: np.ndarray) -> np.ndarray:
    kind, settings, _ = PEERS[name]
    found = getattr(aggregation, kind, None)
    if found is None:
        pytest.skip(f"this torchjd has no {kind}, or not its solver")
    if "n_tasks" in settings:
        settings = {**settings, "n_tasks": len(rows)}
    try:
        if "projector" in settings:
            linalg = pytest.importorskip("torchjd.linalg")
            settings = {"projector": linalg.QuadprogProjector(reg_eps=settings["projector"])}
        made = found(**settings)
    except ImportError as error:
        pytest.skip(str(error))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its solvers
        return made(torch.tensor(rows)).numpy()


def bargained(rows: np.ndarray, update: np.ndarray) -> bool:
    """Whether an update solves Nash-MTL's equation: a_i <g_i, d> is the same for all tasks."""
    weights = np.linalg.lstsq(rows.T, update, rcond=None)[0]
    shares = weights * (rows @ update)
    return bool(np.ptp(shares) < 1e-3 * np.abs(shares).max())


@functools.cache
def ours(name: str) -> Any:
    return jax.jit(AGGREGATORS[name].weights)


@pytest.mark.parametrize("tasks", [2, 3, 5])
@pytest.mark.parametrize("name", PEERS)
def test_updates_are_those_of_torchjd(name: str, tasks: int):
    compared = 0
    for seed in range(5):
        rows = gradients(tasks, seed)
        gram, there = jnp.asarray(rows @ rows.T, jnp.float32), jnp.ones(tasks, bool)
        weights, _ = ours(name)(gram, jnp.ones(tasks), there, jax.random.key(0), AGGREGATORS[name].init(tasks))
        expected = theirs(name, rows)
        if name == "nash-mtl" and not bargained(rows, expected):
            continue  # its convex programs ended elsewhere
        compared += 1
        update = np.asarray(weights, np.float64) @ rows
        if name == "aligned-mtl":
            update = update / tasks  # torchjd weighs the aligned gradients with 1 / T, here they are summed
        error = np.linalg.norm(update - expected) / np.linalg.norm(expected)
        assert error < PEERS[name][2], f"seed {seed}: {error:.1e}"
    assert compared >= 4


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_scales_of_aligned_mtl_are_those_of_torchjd(scale: str):
    rows = gradients(4, 0)
    made = make_aggregator("aligned-mtl", scale=scale)
    weights, _ = made.weights(
        jnp.asarray(rows @ rows.T, jnp.float32), jnp.ones(4), jnp.ones(4, bool), jax.random.key(0), {}
    )
    expected = aggregation.AlignedMTL(scale_mode=scale)(torch.tensor(rows)).numpy()
    np.testing.assert_allclose(np.asarray(weights) @ rows / 4, expected, rtol=1e-3, atol=1e-4)


def test_pcgrad_of_two_tasks_is_that_of_torchjd():
    """Of two only: with more the order is drawn, and the draws differ."""
    for seed in range(10):
        rows = gradients(2, seed)
        gram = jnp.asarray(rows @ rows.T, jnp.float32)
        weights, _ = ours("pcgrad")(gram, jnp.ones(2), jnp.ones(2, bool), jax.random.key(0), {})
        expected = aggregation.PCGrad()(torch.tensor(rows)).numpy()
        np.testing.assert_allclose(np.asarray(weights) @ rows, expected, rtol=1e-4, atol=1e-4)


def test_graddrop_with_the_same_draw_is_that_of_torchjd(monkeypatch: pytest.MonkeyPatch):
    rows, key = gradients(4, 1).astype(np.float32), jax.random.key(2)
    drawn = torch.tensor(np.asarray(uniforms(key, jnp.zeros(9))))
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: drawn)
    expected = aggregation.GradDrop()(torch.tensor(rows)).numpy()
    update = combine_elements(GRADDROP, jnp.asarray(rows), jnp.ones(4, bool), key)
    np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-6)
