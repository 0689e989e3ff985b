"""Names of scores: what was measured stands in them, and FID is the name on the 2015 Inception only."""

from __future__ import annotations

import dataclasses
import json

import pytest

from stabletrain.errors import ConfigError
from stabletrain.metrics.protocol import STEMS, Protocol

CLASSIFIER = Protocol(
    num_samples=5000, split="test", extractor="digits-classifier", extractor_sha256="ab", resize="none",
    dataset="digits", fingerprint="cd", weights="ema",
)  # fmt: skip
INCEPTION = dataclasses.replace(
    CLASSIFIER, num_samples=50_000, split="train", extractor="inception2015", resize="tf1-bilinear", weights=None
)


def test_names_carry_the_protocol():
    assert CLASSIFIER.name("fd") == "fd5k_test_digits-classifier_ema"
    assert INCEPTION.name("fd") == "fid50k_train_inception2015"
    assert CLASSIFIER.name("kd", part="std") == "kd5k-std_test_digits-classifier_ema"
    assert INCEPTION.name("cs", place="10splits") == "is50k_10splits_inception2015"
    assert dataclasses.replace(CLASSIFIER, num_samples=355).name("fd") == "fd355_test_digits-classifier_ema"
    assert dataclasses.replace(CLASSIFIER, weights="raw").name("prd-f8") == "prd-f8-5k_test_digits-classifier_raw"
    assert dataclasses.replace(INCEPTION, batch_norm="standing").name("fd") == (
        "fid50k_train_inception2015_bn-standing"
    )
    assert dataclasses.replace(INCEPTION, resize="pil-bicubic").name("fd") == (
        "fid50k_train_inception2015_resize-pil-bicubic"
    )


@pytest.mark.parametrize("extractor", ["digits-classifier", "inception-custom-0123abcd", "inception2015-other"])
def test_only_the_published_inceptions_scores_are_called_fid_is_and_kid(extractor):
    other = dataclasses.replace(CLASSIFIER, extractor=extractor)
    for score in STEMS:
        stem = other.name(score).split("5")[0]
        assert stem not in ("fid", "kid", "is", "intra-fid")
    assert [INCEPTION.name(score)[:3] for score in ("fd", "kd", "cs")] == ["fid", "kid", "is5"]


def test_every_field_of_the_name_changes_it():
    names = {CLASSIFIER.name("fd")}
    for change in (
        {"num_samples": 5001}, {"split": "train"}, {"extractor": "x"}, {"weights": "raw"}, {"batch_norm": "batch"},
    ):  # fmt: skip
        names.add(dataclasses.replace(CLASSIFIER, **change).name("fd"))
    assert len(names) == 6


def test_record_is_json_and_whole():
    record = json.loads(json.dumps(CLASSIFIER.record()))
    for field in dataclasses.fields(Protocol):
        assert record[field.name] == getattr(CLASSIFIER, field.name)
    assert "uint8" in record["quantisation"]


@pytest.mark.parametrize(
    ("field", "value", "near"), [("weights", "EMA", "ema"), ("split", "tests", "test"), ("batch_norm", "runing", "run")]
)
def test_unknown_values_name_the_nearest(field, value, near):
    with pytest.raises(ConfigError, match=f"unknown {field} {value!r}.*{near}"):
        dataclasses.replace(CLASSIFIER, **{field: value})


@pytest.mark.parametrize(("asked", "used"), [(None, "tf1-bilinear"), ("pytorch-fid", "pytorch-fid")])
def test_the_configured_resize_reaches_the_inception(monkeypatch: pytest.MonkeyPatch, asked: str | None, used: str):
    """As its own graph has it unless asked; the published GANs of PyTorch-StudioGAN were judged the other way."""
    from stabletrain.gan.config import GanConfig
    from stabletrain.metrics import inception, scoring

    seen = []
    monkeypatch.setattr(inception, "load_inception", lambda path, *, resize: seen.append((path, resize)))
    scoring.extractor_for(GanConfig(inception="weights.pth", inception_resize=asked), None)  # type: ignore[arg-type]
    assert seen == [("weights.pth", used)]
