"""Text to image on stored latents: batches by seed and position, draws from the moments, whole commands."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.cli.main import run
from stabletrain.data.latents import prepare_latents
from stabletrain.diffusion.config import DiffusionConfig, resolve
from stabletrain.diffusion.family import build
from stabletrain.diffusion.latent_experiment import false_colours
from stabletrain.diffusion.processes import scaled_linear_betas
from stabletrain.diffusion.sampling import grid_png
from stabletrain.diffusion.uvit import SIZES, UViT
from stabletrain.training.config import make_config
from stabletrain.training.devices import make_mesh
from tests.data.features import write_features

SMALL = {"backbone": "uvit", "width": 16, "depth": 2, "heads": 2, "patch_size": 4, "batch_size": 8}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    prepare_latents(write_features(folder / "features", train=14, held_out=4), folder / "out")
    return folder / "out"


def experiment(latents, **values):
    values = {**SMALL, "dataset": "coco-latents", "data": str(latents), "steps": 100, **values}
    return build(resolve(make_config(DiffusionConfig, values)), mesh=make_mesh(1, 8))


@pytest.mark.parametrize(("size", "count"), [("S", 44_255_328), ("S-deep", 57_908_320)])
def test_texts_and_a_fourth_channel_add_their_parameters_to_the_published_network(size, count):
    """To U-ViT-S/2 on CIFAR-10: the map of the texts, 77 positions; the patches, the decoder and the last convolution.

    44,692,644 and 58,345,636 in all.
    """
    count += (768 * 512 + 512) + 77 * 512 + 4 * 512 + (512 * 4 + 4) + (4 * 4 * 9 + 4 - (3 * 3 * 9 + 3))
    network = UViT(32, 4, 2, context_shape=(77, 768), **SIZES[size])
    inputs = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros((1, 77, 768))
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    assert shapes["params"]["position_embedding"].shape == (1, 1 + 77 + 256, 512)


def test_texts_of_another_shape_are_refused():
    network = UViT(8, 4, 4, width=16, depth=2, heads=2, context_shape=(5, 6))
    for texts in (None, jnp.zeros((1, 5, 7))):
        with pytest.raises(ValueError, match="reads text features"):
            network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), texts)


def test_the_square_roots_of_the_betas_go_in_equal_steps():
    betas = scaled_linear_betas(1000)
    assert betas[0] == pytest.approx(0.00085)
    assert betas[-1] == pytest.approx(0.012)
    np.testing.assert_allclose(np.diff(np.sqrt(betas), 2), 0, atol=1e-15)
    # what is left of the image at the last level, 0.0047: Lin et al. 2024, Table 1, say 0.068265 for its square root
    assert np.sqrt(np.prod(1 - betas)) == pytest.approx(0.068265, abs=1e-6)


def test_batches_depend_on_seed_and_position_and_each_caption_comes(latents):
    first, again, other = experiment(latents), experiment(latents), experiment(latents, seed=1)
    for position in (0, 7):
        ours, same = first.batch(position), again.batch(position)
        assert all(np.array_equal(ours[key], same[key]) for key in ours)
        assert not np.array_equal(ours["context"], other.batch(position)["context"])
    seen = {row.tobytes() for position in range(60) for row in first.batch(position)["context"]}
    assert len(seen) == len(first.latents.train.contexts)


def test_latents_are_drawn_from_their_moments_and_scaled(latents):
    made = experiment(latents, latent_scale=0.5, label_dropout=0.0)
    batch = {"moments": jnp.concatenate([jnp.full((2, 64, 64, 4), 3.0), jnp.full((2, 64, 64, 4), 2 * np.log(0.2))], -1)}
    batch["context"] = jnp.ones((2, 5, 6))
    drawn, texts = made._examples(batch, jax.random.key(0), jax.random.key(1))
    # 32,768 numbers: three standard errors of the mean are 0.0017, of the deviation 0.0012
    assert float(drawn.mean()) == pytest.approx(1.5, abs=0.0017)
    assert float(drawn.std()) == pytest.approx(0.1, abs=0.0012)
    np.testing.assert_array_equal(texts, 1.0)


def test_a_share_of_the_texts_becomes_the_empty_one(latents):
    made = experiment(latents, label_dropout=0.25)
    batch = {"moments": jnp.zeros((4000, 1, 1, 8)), "context": jnp.ones((4000, 5, 6))}
    _, texts = made._examples(batch, jax.random.key(0), jax.random.key(1))
    share = float(np.mean(np.all(np.asarray(texts) == 0, axis=(1, 2))))
    assert share == pytest.approx(0.25, abs=0.03)  # four standard errors
    assert set(np.unique(np.asarray(texts).mean((1, 2)))) == {0.0, 1.0}  # a text is dropped as a whole


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 3)])
def test_latents_are_shown_in_false_colours_or_in_grey(channels, shown):
    latents = np.random.default_rng(0).standard_normal((100, 4, 4, channels))
    pictures = false_colours(latents)
    assert pictures.shape == (100, 4, 4, shown)
    assert pictures.dtype == np.uint8
    for channel in range(shown):  # levels follow the channel's own numbers, which are within four deviations
        assert np.corrcoef(pictures[..., channel].ravel(), latents[..., channel].ravel())[0, 1] > 0.99
    assert grid_png(pictures)


TINY = [
    "--backbone", "uvit", "--width", "16", "--depth", "2", "--heads", "2", "--patch-size", "4", "--batch-size", "8",
    "--process", "ddpm-scaled-linear", "--eval-pairs", "8", "--sampling-steps", "4", "--quiet",
]  # fmt: skip


def test_train_resume_to_the_bit_and_sample(latents, tmp_path, capsys):
    command = ["diffusion", "--dataset", "coco-latents", "--data", str(latents), *TINY]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run([*command, "--steps", "6", "--checkpoint-every", "3", "--out", str(whole)]) == 0
    shutil.copytree(whole, parts)
    # As a kill after step 3 leaves it: the last checkpoint was never written.
    shutil.rmtree(next((parts / "checkpoints").glob("*6")))
    status = json.loads((parts / "status.json").read_text())
    (parts / "status.json").write_text(json.dumps({**status, "state": "preempted", "step": 3}))
    assert run(["resume", str(parts), "--quiet"]) == 0
    hashes = [json.loads((out / "status.json").read_text())["params_sha256"] for out in (whole, parts)]
    assert hashes[0] == hashes[1]
    for out in (whole, parts):
        assert run(["sample", str(out), "--num", "6", "--guidance", "2", "--out", str(tmp_path / f"s-{out.name}")]) == 0
    ours, theirs = (np.load(tmp_path / f"s-{name}" / "samples.npz")["latents"] for name in ("whole", "parts"))
    np.testing.assert_array_equal(ours, theirs)
    assert ours.shape == (6, 8, 8, 4)
    own = tmp_path / "own.npz"
    np.savez(own, contexts=np.ones((2, 5, 6), "f4"), empty=np.zeros((5, 6), "f4"))
    assert run(["sample", str(whole), "--num", "4", "--context", str(own), "--out", str(tmp_path / "own")]) == 0
    np.savez(own, contexts=np.zeros((2, 5, 6), "f4"), empty=np.zeros((5, 6), "f4"))
    capsys.readouterr()
    assert run(["sample", str(whole), "--num", "4", "--context", str(own), "--out", str(tmp_path / "own")]) == 1
    assert "other settings" in " ".join(capsys.readouterr().err.split())
    assert run(["sample", str(whole), "--clip-denoised", "--out", str(tmp_path / "none")]) == 2
    assert "do not lie in [-1, 1]" in " ".join(capsys.readouterr().err.split())
    np.savez(own, contexts=np.ones((2, 4, 6), "f4"), empty=np.zeros((4, 6), "f4"))
    capsys.readouterr()
    assert run(["sample", str(whole), "--context", str(own), "--out", str(tmp_path / "no")]) == 3
    assert "trained on (5, 6)" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "no").exists()
    assert run(["sample", str(whole), "--label", "3", "--out", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--backbone", "unet"], "needs --backbone uvit"),
        (["--backbone", "uvit", "--class-conditional"], "have texts, no labels"),
        (["--backbone", "uvit", "--image-size", "64"], "cannot be resized"),
        (["--backbone", "uvit", "--horizontal-flip"], "no mirrored latent"),
        (["--backbone", "uvit", "--eval-samples", "100"], "no pictures to be judged"),
        (["--backbone", "uvit", "--clip-denoised"], "do not lie in [-1, 1]"),
        (["--backbone", "uvit", "--guidance", "2", "--label-dropout", "0"], "trained without texts too"),
    ],
)
def test_what_makes_no_sense_is_refused(latents, options, reason, capsys):
    command = ["diffusion", "--dataset", "coco-latents", "--data", str(latents), "--dry-run"]
    assert run([*command, *options]) == 2
    assert reason in " ".join(capsys.readouterr().err.split())


def test_pictures_have_no_latent_scale(capsys):
    assert run(["diffusion", "--latent-scale", "0.2", "--dry-run"]) == 2
    assert "does nothing with pictures" in " ".join(capsys.readouterr().err.split())
