"""Text as data: pieces, vocabulary, the layout of Billion Word, symbols there and back, and how lines are judged."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from stabletrain.errors import ConfigError, DataError
from stabletrain.gan.text import PAD, TextDomain, build_text, decode, encode, read_text, vocabulary_of


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def text_file(tmp_path):
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "it's", "\N{GREEK SMALL LETTER OMEGA}"]
    lines = [" ".join(rng.choice(words, 12)) for _ in range(700)]
    path = tmp_path / "words.txt"
    write_lines(path, lines)
    return path, lines


def test_a_file_is_broken_at_spaces_and_loses_nothing(text_file):
    path, lines = text_file
    data = read_text(path)
    assert data.name == "words"
    assert data.train.shape[1] == data.held_out.shape[1] == 32
    pieces = decode(np.concatenate([data.train, data.held_out]), data.vocabulary)
    assert max(map(len, pieces)) <= 32
    assert sorted(" ".join(pieces).split()) == sorted(" ".join(lines).split())
    assert len(data.held_out) == len(pieces) // 10


def test_reading_is_the_same_each_time_and_the_fingerprint_follows_the_text(text_file):
    path, _ = text_file
    first = read_text(path)
    assert read_text(path).fingerprint == first.fingerprint
    path.write_text(path.read_text(encoding="utf-8").replace("beta", "bets"), encoding="utf-8")
    assert read_text(path).fingerprint != first.fingerprint


def test_without_a_file_the_text_is_the_one_that_ships_with_python():
    data = read_text(None)
    assert data.name == "text"
    assert len(data.train) > 8_000
    assert len(data.held_out) >= 640  # enough for a floor
    joined = " ".join(decode(data.train, data.vocabulary))
    assert "statement" in joined
    assert data.vocabulary[0] == "unk"
    assert data.spec.channels == len(data.vocabulary) == len(set(data.vocabulary))


def test_the_billion_word_layout_is_cut_at_32_characters_and_held_out_text_is_its_own(tmp_path):
    root = tmp_path / "1-billion-word"
    shards = root / "training-monolingual.tokenized.shuffled"
    long = "The first sentence of a shard is longer than thirty-two characters ."
    for number in range(3):
        write_lines(shards / f"news.en-{number:05d}-of-00100", [f"{number} {long}", "short", ""] * 700)
    data = read_text(root)
    assert data.name == "billion-word"
    assert len(data.train) == 2 * 2 * 700  # shards 1 and 2, without the empty lines
    assert set(decode(data.train, data.vocabulary)) == {f"1 {long}"[:32], f"2 {long}"[:32], "short"}
    held = decode(data.held_out, data.vocabulary)
    assert len(held) == 1400
    assert held[0][0] == "\N{REPLACEMENT CHARACTER}"  # of shard 0, whose digit is in no training line
    write_lines(root / "heldout-monolingual.tokenized.shuffled" / "news.en.heldout-00000-of-00050", ["other"] * 5)
    data = read_text(root)
    assert len(data.train) == 3 * 2 * 700
    assert decode(data.held_out, data.vocabulary) == ["other"] * 5


def test_the_vocabulary_is_by_frequency_with_the_unknown_symbol_first():
    lines = ["aab", "abc"]
    assert vocabulary_of(lines, 6) == ("unk", PAD, "a", "b", "c")
    assert vocabulary_of(lines, 6, limit=3) == ("unk", PAD, "a")
    assert vocabulary_of(["ba"], 2) == ("unk", "a", "b")


def test_symbols_there_and_back():
    vocabulary = ("unk", PAD, "a", "b")
    tokens = encode(["ab", "", "axb"], vocabulary, 4)
    np.testing.assert_array_equal(tokens, [[2, 3, 1, 1], [1, 1, 1, 1], [2, 0, 3, 1]])
    assert tokens.dtype == np.uint8
    assert decode(tokens, vocabulary) == ["ab", "", "a\N{REPLACEMENT CHARACTER}b"]
    with pytest.raises(ValueError, match="longer than 4"):
        encode(["abcde"], vocabulary, 4)


def test_text_that_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(DataError, match="no text at"):
        read_text(tmp_path / "missing.txt")
    write_lines(tmp_path / "few.txt", ["a line"] * 20)
    with pytest.raises(DataError, match="1,280"):
        read_text(tmp_path / "few.txt")
    (tmp_path / "binary.txt").write_bytes(bytes(range(128, 256)))
    with pytest.raises(DataError, match="UTF-8"):
        read_text(tmp_path / "binary.txt")
    with pytest.raises(DataError, match="no shards"):
        read_text(tmp_path)


class FakeModel:
    """Generates given lines; scores a line by its first symbol."""

    def __init__(self, domain, lines):
        self.soft = np.asarray(domain.one_hot(lines)) * 0.9 + 0.01

    def samples(self, labels, count, *, seed, context, what="", truncation=0.0):
        assert labels is None
        return self.soft[:count]

    def scores(self, samples, labels, *, context):
        return samples[:, 0].argmax(-1).astype(np.float32)


@pytest.fixture
def domain(text_file):
    return TextDomain(SimpleNamespace(data=str(text_file[0]), seed=0, network="text-resnet"), None)


def test_lines_like_the_real_ones_score_at_the_floor_and_noise_far_above(domain):
    context = SimpleNamespace(tick=lambda *_: None)
    count = domain.judged_lines
    assert count == len(domain.data.held_out)  # fewer than 640 were held out
    good = domain.evaluate(FakeModel(domain, domain.data.held_out), 7, context)
    assert good.scalars[f"eval/jsd4_{count}"] == good.scalars[f"eval/jsd4_{count}_floor"]
    noise = np.random.default_rng(1).integers(0, len(domain.vocabulary), (count, 32))
    bad = domain.evaluate(FakeModel(domain, noise), 7, context)
    assert bad.scalars[f"eval/jsd4_{count}"] > 0.9 > bad.scalars[f"eval/jsd4_{count}_floor"]
    assert list(good.files) == ["samples/00000007.txt"]
    assert good.shown.split(" | ") == decode(domain.data.held_out[:4], domain.vocabulary)


def test_batches_are_one_hot_lines_of_the_training_text_and_pass_over_none(domain):
    key = jax.random.key(0)
    seen = []
    for position in range(4):
        batch = domain.batch(position, 64)
        np.testing.assert_array_equal(batch["index"], domain.batch(position, 64)["index"])
        lines, labels = domain.real({**batch, **domain.resident}, key)
        assert labels is None
        assert lines.shape == (64, *domain.sample_shape)
        np.testing.assert_array_equal(lines.argmax(-1), domain.data.train[batch["index"]])
        np.testing.assert_array_equal(lines.sum(-1), 1)
        seen.append(batch["index"])
    assert len(set(np.concatenate(seen))) == 256


def test_fixed_lines_are_spread_over_the_split(domain):
    lines, labels = domain.fixed("test", 10)
    assert labels is None
    np.testing.assert_array_equal(lines.argmax(-1)[[0, -1]], domain.data.held_out[[0, -1]])
    assert len(domain.fixed("train", 10**6)[0]) == len(domain.data.train)


def test_large_text_comes_with_the_batch(domain, monkeypatch):
    monkeypatch.setattr("stabletrain.gan.text.RESIDENT_BYTES", 10)
    large = TextDomain(domain._config, None)
    assert not large.resident
    small = domain.real({**domain.batch(3, 8), **domain.resident}, None)[0]
    np.testing.assert_array_equal(large.real(large.batch(3, 8), None)[0], small)


def test_a_stored_description_is_enough_to_write_samples(domain):
    stored = TextDomain(domain._config, type(domain.data_spec).from_dict(domain.data_spec.to_dict()))
    soft = np.asarray(domain.one_hot(domain.data.train[:3]))
    files = stored.sample_files(soft, None, None)
    assert files == domain.sample_files(soft, None, None)
    assert files["samples.txt"].decode().splitlines() == decode(domain.data.train[:3], domain.vocabulary)


def test_networks_of_images_are_refused_for_text():
    with pytest.raises(ConfigError, match="text-resnet"):
        build_text(SimpleNamespace(network="dcgan"), None)
