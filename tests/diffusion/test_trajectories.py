"""Each sampler's whole trajectory from fixed noise, against the papers' algorithms around a network in PyTorch."""

from __future__ import annotations

import pytest

from stabletrain.diffusion.config import SAMPLER_NAMES
from tests.diffusion.parity import assert_same, fixture, our_trajectory
from tests.diffusion.sampler_reference import TRAJECTORIES

TOLERANCE = 1e-8
"""Both sides are float64; alpha at the first level of the cosine schedule is 5e-5, which magnifies its rounding."""


def test_every_sampler_has_its_trajectory():
    assert {case["sampler"] for case in TRAJECTORIES.values()} == set(SAMPLER_NAMES)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_the_network_is_shown_and_told_the_same_and_the_end_is_the_same(name):
    assert_same(our_trajectory(name), fixture("trajectories", name), TOLERANCE)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["heun on edm, churn 20", "ddpm-learned on ddpm-linear"])
def test_the_fixture_is_what_torch_computes(name):
    pytest.importorskip("torch")
    from tests.diffusion.torch_reference import trajectory

    assert_same(trajectory(name), fixture("trajectories", name))
