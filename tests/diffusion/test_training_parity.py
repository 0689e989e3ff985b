"""Five whole training steps against PyTorch's network, AdamW, warm-up, clipping and average, from the same numbers."""

from __future__ import annotations

import pytest

from tests.diffusion.cases import TRAINING, TRAINING_STEPS
from tests.diffusion.parity import assert_same, fixture, our_course

TOLERANCE = 1e-5
"""The learning rate, the average and PyTorch's clipping (norm + 1e-6) are right to about 1e-6, the rest is float64."""


@pytest.mark.parametrize("name", TRAINING)
def test_five_steps_are_those_of_the_torch_reference(name):
    found, expected = our_course(name), fixture("training", name)
    assert_same(found, expected, TOLERANCE)
    assert len(set(expected["losses"].round(9))) == TRAINING_STEPS


@pytest.mark.torch
@pytest.mark.parametrize("name", TRAINING)
def test_the_fixture_is_what_torch_computes(name):
    pytest.importorskip("torch")
    from tests.diffusion.torch_reference import trained

    assert_same(trained(name), fixture("training", name))
