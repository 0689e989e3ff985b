"""Evaluation of a generator: right numbers, the same after an interruption, in bounded memory, or none at all."""

from __future__ import annotations

import hashlib
import logging
import math

import numpy as np
import pytest

from stabletrain.data.images import to_float
from stabletrain.errors import ConfigError, DataError
from stabletrain.metrics import classifier_training, evaluate
from stabletrain.metrics.classifier import dataset_classifier
from stabletrain.metrics.classifier_training import Recipe
from stabletrain.metrics.evaluate import evaluate_generator, protocol_of, reference_path, reference_statistics
from stabletrain.metrics.frechet import frechet_distance, intra_class_frechet_distance, moments
from stabletrain.metrics.inception_score import inception_score
from stabletrain.metrics.kid import kernel_distance
from stabletrain.metrics.precision_recall import density_coverage, precision_recall
from stabletrain.metrics.protocol import SCORES
from stabletrain.metrics.reference import save_reference
from stabletrain.metrics.score_config import ScoreConfig
from stabletrain.training.config import make_config
from tests.metrics.conftest import Context, make_dataset, stripes

COUNT = 90


class Projection:
    """An extractor: a fixed random projection, which counts the images it has seen."""

    def __init__(self, name: str = "projection", seed: int = 0, dimension: int = 6) -> None:
        self.name, self.sha256, self.resize = name, hashlib.sha256(bytes([seed])).hexdigest(), "none"
        self.matrix = np.random.default_rng(seed).normal(size=(64, dimension)) / 500
        self.seen = 0

    def features(self, images):
        assert images.dtype == np.uint8
        self.seen += len(images)
        return (images.reshape(len(images), -1) @ self.matrix).astype(np.float32)

    def logits(self, images):
        return 3 * self.features(images)

    def outputs(self, images):
        features = self.features(images)
        return features, 3 * features


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("STABLETRAIN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(classifier_training, "Recipe", lambda: Recipe(epochs=1, min_steps=5, max_steps=5))
    return make_dataset(*stripes(80, 8, 1, 3), *stripes(70, 8, 1, 3, seed=1))


MADE, LABELS = stripes(COUNT, 8, 1, 3, seed=2)


class Generator:
    """Hands out `MADE`, and counts."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, indices):
        self.made += len(indices)
        return to_float(MADE[indices]), LABELS[indices]


def evaluated(dataset, context, generator=None, **options):
    values = {"num_samples": COUNT, "metrics": tuple(SCORES), "weights": "ema", "batch_size": 16, **options}
    extractor = values.pop("extractor", None) or Projection()
    return evaluate_generator(generator or Generator(), dataset, extractor, context=context, **values)


def test_every_score_is_that_of_its_function(dataset, context):
    found = evaluated(dataset, context)
    extractor = Projection()
    real, fake = extractor.features(dataset.test.images.array()), extractor.features(MADE)
    suffix = "_projection_ema"
    assert found[f"eval/fd90_test{suffix}"] == pytest.approx(frechet_distance(moments(real), moments(fake)), rel=1e-10)
    kernel = kernel_distance(real, fake)
    assert found[f"eval/kd90_test{suffix}"] == kernel.mean
    score = inception_score(3 * fake)
    assert found[f"eval/cs90_10splits{suffix}"] == score.mean
    assert found[f"eval/cs90-std_10splits{suffix}"] == score.std
    assert found[f"eval/cs90_1split{suffix}"] == inception_score(3 * fake, splits=1).mean
    intra, _ = intra_class_frechet_distance(real, dataset.test.labels, fake, LABELS)
    assert found[f"eval/intra-fd90_test{suffix}"] == pytest.approx(intra, rel=1e-10)
    for name in ("precision", "recall", "density", "coverage", "prd-f8-", "prd-f1of8-"):
        assert 0 <= found[f"eval/{name}90_test{suffix}"] <= 1.5
    assert 0 <= found["eval/cas90_test_small-classifier_ema"] <= 1


def test_neighbours_compare_equally_many(dataset, context):
    """70 real and 90 generated images: a random 70 of the generated ones, the same ones every time."""
    found = evaluated(dataset, context, metrics=("pr", "dc"))
    extractor = Projection()
    chosen = np.random.Generator(np.random.Philox(key=np.array([0, 1], np.uint64))).choice(90, 70, replace=False)
    real, fake = extractor.features(dataset.test.images.array()), extractor.features(MADE)[np.sort(chosen)]
    pairs, others = precision_recall(real, fake), density_coverage(real, fake)
    assert found["eval/precision90_test_projection_ema"] == pairs.precision
    assert found["eval/coverage90_test_projection_ema"] == others.coverage


@pytest.mark.parametrize("stop_at", [1, 4, 8, 11, 13])
def test_interrupted_and_continued_is_the_same_to_the_bit(dataset, tmp_path, stop_at, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    generator, extractor = Generator(), Projection()
    metrics = ("fd", "cs", "kd")
    with pytest.raises(KeyboardInterrupt):
        evaluated(dataset, Context(scratch, stop_at=stop_at), generator, extractor=extractor, metrics=metrics)
    continued = evaluated(dataset, Context(scratch), generator, extractor=extractor, metrics=metrics)
    assert generator.made == COUNT, "no sample is made twice"
    assert extractor.seen == COUNT + 70, "no feature is computed twice"
    monkeypatch.setenv("STABLETRAIN_HOME", str(tmp_path / "other"))
    (tmp_path / "fresh").mkdir()
    assert continued == evaluated(dataset, Context(tmp_path / "fresh"), metrics=metrics)


def test_a_damaged_batch_is_said_and_made_again(dataset, context, caplog):
    first = evaluated(dataset, context, metrics=("fd",))
    (folder,) = context.scratch.glob("generated-*")
    victim = sorted(folder.iterdir())[2]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(bytes(content))
    generator = Generator()
    with caplog.at_level(logging.WARNING, logger="stabletrain"):
        assert evaluated(dataset, context, generator, metrics=("fd",)) == first
    assert generator.made == 16, "only the damaged batch"
    assert "damaged" in caplog.text


def test_other_weights_and_tags_do_not_share_batches(dataset, context):
    generator = Generator()
    for options in ({}, {"weights": "raw"}, {"tag": "ddim"}):
        evaluated(dataset, context, generator, metrics=("fd",), **options)
    assert generator.made == 3 * COUNT


def test_the_real_split_is_seen_once(dataset, context):
    extractor = Projection()
    evaluated(dataset, context, extractor=extractor, metrics=("fd",))
    assert extractor.seen == COUNT + 70
    evaluated(dataset, context, extractor=extractor, metrics=("fd",), weights="raw")
    assert extractor.seen == 2 * COUNT + 70
    assert reference_path(protocol_of(dataset, extractor, COUNT)).exists()
    assert reference_statistics(dataset, "test", extractor).moments.count == 70
    assert extractor.seen == 2 * COUNT + 70


def test_no_images_and_no_features_are_kept_for_sums(dataset, context):
    evaluated(dataset, context, metrics=("fd",))
    (folder,) = context.scratch.glob("generated-*")
    with np.load(sorted(folder.iterdir())[0]) as arrays:
        assert set(arrays) == {"digest", "features"}


def test_images_are_quantised(dataset, context):
    """Floats and the uint8 images that they round to have the same scores."""
    floats = evaluated(dataset, context, metrics=("fd",))
    levels = evaluated(dataset, context, lambda indices: (MADE[indices], None), metrics=("fd",), tag="uint8")
    assert floats == levels


def test_a_diverged_generator_has_no_scores(dataset, context, caplog):
    def sample(indices):
        images = to_float(MADE[indices])
        images[indices == 40] = np.nan
        return images, LABELS[indices]

    with caplog.at_level(logging.WARNING, logger="stabletrain"):
        found = evaluated(dataset, context, sample, metrics=("fd", "cs"))
    assert set(found) == {
        "eval/fd90_test_projection_ema",
        "eval/cs90_10splits_projection_ema",
        "eval/cs90-std_10splits_projection_ema",
        "eval/cs90_1split_projection_ema",
    }
    assert all(math.isnan(value) for value in found.values())
    assert "sample 40 of 90 is not finite" in caplog.text


def test_a_shared_reference_is_used_or_refused(dataset, context, tmp_path):
    ours = reference_statistics(dataset, "train", Projection())
    save_reference(tmp_path / "ours.npz", ours)
    kept = evaluated(dataset, context, metrics=("fd",), split="train", reference=tmp_path / "ours.npz")
    assert kept == evaluated(dataset, context, metrics=("fd",), split="train")
    generator = Generator()
    with pytest.raises(DataError, match="split train instead of test"):
        evaluated(dataset, context, generator, metrics=("fd",), reference=tmp_path / "ours.npz")
    with pytest.raises(DataError, match="extractor hash"):
        evaluated(
            dataset, context, generator, metrics=("fd",), split="train", reference=tmp_path / "ours.npz",
            extractor=Projection(seed=1),
        )  # fmt: skip
    assert generator.made == 0, "refused before the work"


def test_a_damaged_reference_in_the_cache_is_made_again(dataset, context, caplog):
    first = evaluated(dataset, context, metrics=("fd",))
    reference_path(protocol_of(dataset, Projection(), COUNT)).write_bytes(b"cut")
    with caplog.at_level(logging.WARNING, logger="stabletrain"):
        assert evaluated(dataset, context, metrics=("fd",)) == first
    assert "damaged" in caplog.text


def test_without_a_context_nothing_is_left_behind(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.tempfile, "tempdir", str(tmp_path))
    before = set(tmp_path.iterdir())
    assert evaluated(dataset, None, metrics=("fd",))
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {"home"}


def test_ticks_count_up(dataset, context):
    evaluated(dataset, context, metrics=("fd",))
    samples = [tick for tick in context.ticks if tick[0].startswith("samples")]
    assert [tick[1] for tick in samples] == [0, 16, 32, 48, 64, 80, 90]
    assert {tick[2] for tick in samples} == {90}


def test_what_cannot_be_scored_is_refused_before_the_work(dataset, context):
    images, labels = stripes(40, 8, 1, 3)
    only_train = make_dataset(images, labels, images[:0], None)
    unlabelled = make_dataset(images, None, images, None)
    generator = Generator()
    with pytest.raises(ConfigError, match="did you mean 'fd'"):
        evaluated(dataset, context, generator, metrics=("fid",))
    with pytest.raises(ConfigError, match="no test images"):
        evaluated(only_train, context, generator, split="test")
    with pytest.raises(DataError, match="no labelled test images"):
        evaluated(only_train, context, generator, metrics=("cas",))
    with pytest.raises(DataError, match="no labelled test images, which the metric 'intra-fd'"):
        evaluated(unlabelled, context, generator, metrics=("intra-fd",))
    with pytest.raises(ConfigError, match="at least 10"):
        evaluated(dataset, context, generator, num_samples=5)
    assert generator.made == 0
    assert protocol_of(only_train, Projection(), 10).split == "train"


def test_wrong_samples_are_refused(dataset, context):
    with pytest.raises(ValueError, match="the generator made images"):
        evaluated(dataset, context, lambda indices: MADE[indices, :4], metrics=("fd",))
    with pytest.raises(ValueError, match="gives \\(images, labels\\)"):
        evaluated(dataset, context, lambda indices: MADE[indices], metrics=("intra-fd",))


def test_digits_rank_real_images_before_noise(digits_dataset, context):
    """On real data with the data set's own classifier: every score puts training images before noise."""
    classifier = dataset_classifier(digits_dataset)
    train = digits_dataset.train.images.array()
    noise = np.random.default_rng(0).integers(0, 256, train.shape, dtype=np.uint8)
    found = {}
    for tag, images in {"real": train, "noise": noise}.items():
        found[tag] = evaluate_generator(
            images.__getitem__, digits_dataset, classifier,
            num_samples=500, context=context, metrics=("fd", "cs", "pr"), tag=tag,
        )  # fmt: skip
    suffix = "_test_digits-classifier"
    fd, precision = f"eval/fd500{suffix}", f"eval/precision500{suffix}"
    score = "eval/cs500_10splits_digits-classifier"
    assert 0 < 20 * found["real"][fd] < found["noise"][fd]
    assert found["real"][precision] > 0.5 > found["noise"][precision]
    assert 8 < found["real"][score] <= 10, "ten classes in nearly equal number, nearly all recognised"
    assert found["noise"][score] < 6


def test_how_to_judge_does_nothing_without_samples():
    """Options as given, and as `evaluate` changes those of a run that judges none."""
    for values in ({"scores": ("fd", "kd")}, {"inception": "w.pth"}, {"extractor": "inception"}):
        for count in (None, 100):
            make_config(ScoreConfig, {"eval_samples": count, **values})
        with pytest.raises(ConfigError, match="does nothing where no samples are judged"):
            make_config(ScoreConfig, {"eval_samples": 0, **values})
    chosen = {"eval_samples": 0, "extractor": "classifier", "score_split": "test"}
    assert make_config(ScoreConfig, chosen).scores == ("fd",), "what `resolve` fills in is not refused"
