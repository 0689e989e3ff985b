"""Toys as a domain: batches, exact measures beside the critic's estimate, pictures, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from stabletrain.data.spec import DataSpec
from stabletrain.errors import ConfigError
from stabletrain.gan.points import PointsDomain, build_points
from stabletrain.gan.toys import held_out_points, toy_points

CONTEXT = SimpleNamespace(tick=lambda *_: None)


def config(dataset="gaussians8", data=None):
    return SimpleNamespace(dataset=dataset, data=data, seed=0)


class FakeModel:
    """Generates given points; scores them by a function."""

    def __init__(self, points, score):
        self.points, self.score = points, score

    def samples(self, labels, count, *, seed, context, what="", truncation=0.0):
        return self.points[:count]

    def scores(self, samples, labels, *, context):
        return self.score(samples).astype(np.float32)


def test_real_points_cover_every_mode_at_the_floor_of_the_distance():
    domain = PointsDomain(config(), None)
    points = toy_points("gaussians8", 2500, np.random.default_rng(9))
    found = domain.evaluate(FakeModel(points, lambda x: x[:, 0]), 3, CONTEXT)
    assert found.scalars["eval/modes_covered_2500"] == 8
    assert found.scalars["eval/high_quality_share_2500"] > 0.97
    # two draws of the same size from one distribution: both are about 0.1
    assert abs(found.scalars["eval/wasserstein1_500"] - found.scalars["eval/wasserstein1_500_floor"]) < 0.1
    assert found.files["samples/00000003.png"].startswith(b"\x89PNG")


def test_a_shift_is_measured_exactly_and_a_linear_critic_along_it_estimates_it():
    domain = PointsDomain(config("swissroll"), None)
    shift = np.array([0.6, 0.8], np.float32)
    points = np.concatenate([held_out_points("swissroll")[:500] - shift, np.zeros((2000, 2), np.float32)])
    found = domain.evaluate(FakeModel(points, lambda x: x @ shift), 0, CONTEXT).scalars
    np.testing.assert_allclose(found["eval/wasserstein1_500"], 1, rtol=1e-5)
    np.testing.assert_allclose(found["eval/critic_estimate_500"], 1, rtol=1e-4)
    assert "eval/modes_covered_2500" not in found


def test_batches_pass_over_no_point():
    domain = PointsDomain(config("gaussians25"), None)
    first, second = (domain.batch(position, 1000)["index"] for position in (0, 1))
    assert len(set(first) | set(second)) == 2000
    np.testing.assert_array_equal(domain.batch(1, 1000)["index"], second)
    points, labels = domain.real({"index": first, **domain.resident}, None)
    assert points.shape == (1000, 2)
    assert labels is None


def test_the_stored_description_rebuilds_it():
    domain = PointsDomain(config(), None)
    spec = DataSpec.from_dict(domain.data_spec.to_dict())
    again = build_points(config("digits"), spec)
    np.testing.assert_array_equal(again.resident["points"], domain.resident["points"])
    assert again.data_spec == domain.data_spec


def test_samples_are_written_as_numbers_and_as_a_picture():
    files = PointsDomain(config(), None).sample_files(np.array([[1.0, 2.0]], np.float32), None, CONTEXT)
    assert json.loads(files["samples.json"]) == [[1.0, 2.0]]
    assert files["samples.png"].startswith(b"\x89PNG")


def test_files_and_unknown_toys_are_refused():
    with pytest.raises(ConfigError, match="no --data"):
        build_points(config(data="x.npz"), None)
    with pytest.raises(ConfigError, match="gaussians25"):
        build_points(config("gaussian"), None)
