"""Prepared latents hold what the features held, in order; what is wrong with a folder is named with its file."""

from __future__ import annotations

import json

import numpy as np
import pytest

from stabletrain.cli.main import run
from stabletrain.data.latents import contexts_digest, open_latents, prepare_latents, read_contexts
from stabletrain.errors import DataError
from tests.data.features import write_features


@pytest.fixture
def features(tmp_path):
    return write_features(tmp_path / "features", train=12, held_out=3)


def test_moments_and_captions_are_those_of_the_files(features, tmp_path):
    facts = prepare_latents(features, tmp_path / "out")
    latents = open_latents(tmp_path / "out", "coco-latents")
    assert latents.spec.context_shape == (5, 6)
    assert (latents.spec.image_size, latents.spec.channels, latents.spec.num_classes) == (8, 4, 0)
    assert (len(latents.train), len(latents.test)) == (12, 3)
    assert latents.spec.fingerprint == facts["fingerprint"]
    np.testing.assert_array_equal(latents.empty, np.load(features / "empty_context.npy"))
    for number in (0, 2, 10, 11):  # numbers in order, not names: 10 comes after 2
        captions = sorted(features.glob(f"train/{number}_*.npy"))
        for k, path in enumerate(captions):
            read = latents.train.read(np.array([number]), np.array([(k + 0.5) / len(captions)]))
            np.testing.assert_array_equal(read["context"][0], np.load(path))
            np.testing.assert_array_equal(
                read["moments"][0].transpose(2, 0, 1), np.load(features / f"train/{number}.npy")
            )


def test_the_fingerprint_is_of_the_content(features, tmp_path):
    first = prepare_latents(features, tmp_path / "a")["fingerprint"]
    assert prepare_latents(features, tmp_path / "b")["fingerprint"] == first
    path = features / "val" / "1_0.npy"
    np.save(path, np.load(path) + 1)
    assert prepare_latents(features, tmp_path / "c")["fingerprint"] != first


def test_an_interrupted_preparation_leaves_nothing(features, tmp_path):
    def stop(label, done, total):
        if done > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_latents(features, tmp_path / "out", stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features"]


def retyped(path, dtype):
    np.save(path, np.load(path).astype(dtype))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "empty_context.npy").unlink(), "has no empty_context.npy"),
        (lambda f: [p.unlink() for p in f.glob("train/3_*.npy")], r"3\.npy has no captions"),
        (
            lambda f: (f / "train" / "3.npy").unlink(),
            r"3_0\.npy is the caption of .* not there \(3\.npy\)",
        ),
        (lambda f: (f / "train" / "2.npy").write_bytes(b"no array"), r"cannot read .*2\.npy"),
        (lambda f: (f / "train" / "4_1.npy").write_bytes(b"PK\x03\x04 no zip"), r"cannot read .*4_1\.npy"),
        (lambda f: retyped(f / "train" / "0.npy", np.float16), r"1\.npy has type float32, but the first .* float16"),
        (lambda f: retyped(f / "val" / "2_1.npy", np.float64), r"2_1\.npy has type float64, but the first .* float32"),
        (lambda f: np.save(f / "train" / "4_0.npy", np.zeros((5, 7), "f4")), r"4_0\.npy has shape \(5, 7\)"),
        (lambda f: np.save(f / "val" / "0.npy", np.full((8, 8, 8), np.nan, "f4")), "not finite"),
        (lambda f: np.save(f / "train" / "0.npy", np.zeros((7, 8, 8), "f4")), "mean and log-variance"),
        (lambda f: [p.unlink() for p in f.glob("train/*.npy")], "has no features"),
    ],
)
def test_what_is_wrong_with_the_features_is_named(features, tmp_path, damage, reason):
    damage(features)
    with pytest.raises(DataError, match=reason):
        prepare_latents(features, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_too_large_for_the_type_that_they_are_read_in_are_refused(features, tmp_path):
    for path in (features / "train").glob("*_*.npy"):
        retyped(path, np.float64)
    np.save(features / "train" / "5_0.npy", np.full((5, 6), 1e300))
    with pytest.raises(DataError, match=r"5_0\.npy holds numbers that are not finite in float32"):
        prepare_latents(features, tmp_path / "out")


def test_a_file_cannot_be_prepared_into(features, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"notes\.txt is a file: the latents need a folder"):
        prepare_latents(features, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("train_contexts.npy", b"", r"cannot read .*train_contexts\.npy"),
        ("empty_context.npy", b"", r"cannot read .*empty_context\.npy"),
        ("empty_context.npy", b"PK\x03\x04 no zip", r"cannot read .*empty_context\.npy"),
        ("empty_context.npy", np.zeros(6, "f4"), r"empty_context\.npy has shape \(6,\); \[L, D\] is due"),
        ("empty_context.npy", np.zeros((4, 6), "f4"), r"of train have shapes .*\[M, 4, 6\] are due"),
        ("test_moments.npy", np.zeros((3, 8), "f4"), r"of test have shapes \(3, 8\)"),
    ],
)
def test_prepared_arrays_that_are_damaged_are_named(features, tmp_path, name, content, reason):
    prepare_latents(features, tmp_path / "out")
    path = tmp_path / "out" / name
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(DataError, match=f"out are damaged: .*{reason}"):
        open_latents(tmp_path / "out", "coco-latents")


def test_prepared_latents_that_are_damaged_are_refused(features, tmp_path):
    out = tmp_path / "out"
    prepare_latents(features, out)
    with pytest.raises(DataError, match="is there already"):
        prepare_latents(features, out)
    np.save(out / "test_first.npy", np.zeros(2, np.int64))
    with pytest.raises(DataError, match="do not have 3 images"):
        open_latents(out, "coco-latents")
    (out / "latents.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(DataError, match="has version 99"):
        open_latents(out, "coco-latents")
    with pytest.raises(DataError, match="data prepare coco-latents --features"):
        open_latents(features, "coco-latents")


def test_texts_to_sample_from_are_held_out_captions_or_an_archive(features, tmp_path):
    prepare_latents(features, tmp_path / "out")
    texts, empty = read_contexts(tmp_path / "out")
    np.testing.assert_array_equal(texts[:], [np.load(features / f"val/{i}_0.npy") for i in range(3)])
    np.testing.assert_array_equal(texts.repeated(5)[3:], texts[:2])
    assert texts.repeated(5).shape == (5, 5, 6)
    np.savez(tmp_path / "own.npz", contexts=texts[:2], empty=empty)
    np.testing.assert_array_equal(read_contexts(tmp_path / "own.npz")[0][:], texts[:2])
    np.savez(tmp_path / "wrong.npz", contexts=texts[:], empty=empty[:2])
    with pytest.raises(DataError, match="are due"):
        read_contexts(tmp_path / "wrong.npz")
    with pytest.raises(DataError, match="data prepare coco-latents --features DIR --out"):
        read_contexts(features)


def test_texts_are_identified_by_their_content(features, tmp_path):
    facts = prepare_latents(features, tmp_path / "out")
    assert contexts_digest(tmp_path / "out") == facts["fingerprint"]
    found = []
    for value in (0.0, 1.0, 0.0):
        np.savez(tmp_path / "own.npz", contexts=np.full((2, 5, 6), value, "f4"), empty=np.zeros((5, 6), "f4"))
        found.append(contexts_digest(tmp_path / "own.npz"))
    assert found[0] == found[2] != found[1]
    with pytest.raises(DataError, match=r"cannot read .*gone\.npz"):
        contexts_digest(tmp_path / "gone.npz")


def test_files_that_are_no_texts_are_named(tmp_path):
    contexts, empty = np.ones((2, 5, 6), "f4"), np.zeros((5, 6), "f4")
    np.save(tmp_path / "array.npy", contexts)
    np.savez_compressed(tmp_path / "whole.npz", contexts=contexts, empty=empty)
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.npz").write_bytes(whole[:80] + bytes(byte ^ 255 for byte in whole[80:120]) + whole[120:])
    np.savez(tmp_path / "one.npz", contexts=contexts)
    for name in ("array.npy", "short.npz", "flipped.npz", "one.npz", "missing.npz"):
        with pytest.raises(DataError, match=f"{name} is no .npz with `contexts`"):
            read_contexts(tmp_path / name)
    np.savez(tmp_path / "large.npz", contexts=1e300 * contexts.astype("f8"), empty=empty)
    with pytest.raises(DataError, match=r"large\.npz holds numbers that are not finite in float32"):
        read_contexts(tmp_path / "large.npz")


def test_the_commands_prepare_describe_and_check_it(features, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STABLETRAIN_HOME", str(tmp_path / "home"))
    assert run(["data", "info", "coco-latents"]) == 0
    assert run(["data", "prepare", "coco-latents"]) == 3
    assert "--features DIR" in " ".join(capsys.readouterr().err.split())
    assert run(["data", "prepare", "digits", "--features", str(features)]) == 2
    assert run(["data", "prepare", "coco-latents", "--features", str(features), "--json"]) == 0
    assert run(["data", "check", "coco-latents"]) == 0
    capsys.readouterr()
    assert run(["data", "info", "coco-latents", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["train_count"] == 12
    assert described["context_shape"] == [5, 6]
    moments = np.load(tmp_path / "home/data/coco-latents/train_moments.npy")
    moments[3] = np.inf
    np.save(tmp_path / "home/data/coco-latents/train_moments.npy", moments)
    assert run(["data", "check", "coco-latents"]) != 0
    elsewhere = tmp_path / "elsewhere"
    assert run(["data", "prepare", "coco-latents", "--features", str(features), "--out", str(elsewhere)]) == 0
    assert run(["data", "check", str(elsewhere)]) == 0
    capsys.readouterr()
    assert run(["data", "info", str(elsewhere), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test_count"] == 3
    assert run(["gan", "--dataset", "coco-latents", "--dry-run"]) == 2
