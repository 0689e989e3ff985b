"""Checkpoints of PyTorch-StudioGAN: every tensor comes to its place, the networks are the same, a run can be sampled.

The released numbers cannot be here; the tests write files of the released layout themselves.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.cli.main import run
from stabletrain.errors import ConfigError, DataError
from stabletrain.gan.conditioning import Head
from stabletrain.gan.networks import NetworkOptions
from stabletrain.gan.networks.biggan import BigGANGenerator
from stabletrain.gan.networks.resnet import ResNetDiscriminator
from stabletrain.gan.state import Critic
from stabletrain.gan.studiogan_import import check_pair, read_discriminator, read_generator
from stabletrain.nn.torch_file import read_torch
from tests.diffusion.weights import wave
from tests.gan.studiogan_files import (
    BOTTOM,
    CLASSES,
    EMBEDDING,
    PART,
    SHARED,
    WIDTH,
    discriminator_arrays,
    generator_arrays,
    save,
    torch_features,
    torch_images,
)

OPTIONS = NetworkOptions(
    (8, 8, 3), CLASSES, 2 * PART, WIDTH, WIDTH, shared_dim=SHARED, generator_attention=(1,),
    discriminator_attention=(1,), generator_spectral=True, discriminator_spectral=True,
)  # fmt: skip
HEADS = {"ac": "ac", "embedding": "d2dce", "projection": "projection"}
Z, LABELS = wave("z", (4, 2 * PART)).astype(np.float32), np.array([0, 3, 9, 3])


def shapes(tree):
    return jax.tree.map(lambda leaf: leaf.shape, tree)


def test_a_generator_is_read_whole(tmp_path):
    found = read_generator(save(tmp_path / "G.pth", generator_arrays()))
    assert (found.image_size, found.channels, found.width, found.z_dim) == (8, 3, WIDTH, 2 * PART)
    assert (found.num_classes, found.shared_dim, found.attention) == (CLASSES, SHARED, (1,))
    due = jax.eval_shape(
        lambda: BigGANGenerator(OPTIONS).init(jax.random.key(0), jnp.asarray(Z), jnp.asarray(LABELS), train=False)
    )
    assert shapes(found.variables) == shapes(due)


@pytest.mark.parametrize("head", HEADS)
def test_a_discriminator_is_read_whole_with_its_head(tmp_path, head):
    found = read_discriminator(save(tmp_path / "D.pth", discriminator_arrays(head)))
    assert (found.blocks, found.width, found.attention, found.head) == (3, WIDTH, (1,), head)
    assert (found.num_classes, found.embedding_dim) == (CLASSES, EMBEDDING if head == "embedding" else 0)
    params, statistics = jax.eval_shape(critic_of(head).init, jax.random.key(0))
    assert shapes(found.variables) == shapes({"params": params, **statistics})


def critic_of(head: str, inplace_relu: bool = False) -> Critic:
    options = NetworkOptions(**{**vars(OPTIONS), "inplace_relu": inplace_relu})
    module = Head(kind=HEADS[head], num_classes=CLASSES, embedding_dim=EMBEDDING, spectral=True)
    return Critic(ResNetDiscriminator(options), module, (8, 8, 3))


def test_the_start_is_turned_from_channel_first_and_the_vectors_follow_their_kernels(tmp_path):
    arrays = generator_arrays()
    variables = read_generator(save(tmp_path / "G.pth", arrays)).variables
    # The value of channel 2 at row 1, column 3 for the first number of the latent.
    theirs, ours = 2 * 16 + 1 * 4 + 3, (1 * 4 + 3) * BOTTOM + 2
    start = variables["params"]["start"]
    assert start["kernel"][0, ours] == arrays["linear0.weight_orig"][theirs, 0]
    assert start["bias"][ours] == arrays["linear0.bias"][theirs]
    assert variables["spectral"]["start"]["kernel_u"][ours] == arrays["linear0.weight_u"][theirs]
    # sigma = u^T W v is the same number in both orders.
    kernel = variables["params"]["block_1"]["conv_1"]["kernel"]
    vectors = variables["spectral"]["block_1"]["conv_1"]
    sigma = vectors["kernel_u"] @ kernel.reshape(-1, BOTTOM).T @ vectors["kernel_v"]
    name = "blocks.0.0.conv2d1"
    matrix = arrays[f"{name}.weight_orig"].reshape(BOTTOM, -1)
    expected = arrays[f"{name}.weight_u"] @ matrix @ arrays[f"{name}.weight_v"]
    np.testing.assert_allclose(sigma, expected, rtol=1e-5)  # float32


@pytest.mark.torch
def test_a_read_generator_makes_the_images_of_the_released_network(tmp_path):
    pytest.importorskip("torch")
    arrays = generator_arrays()
    variables = read_generator(save(tmp_path / "G.pth", arrays)).variables
    found = BigGANGenerator(OPTIONS).apply(variables, jnp.asarray(Z), jnp.asarray(LABELS), train=False)
    expected = torch_images(arrays, Z, LABELS).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, atol=2e-5)  # float32, images in [-1, 1]
    assert np.ptp(expected) > 0.5


@pytest.mark.torch
@pytest.mark.parametrize("inplace_relu", [True, False])
def test_a_read_discriminator_is_the_released_one_with_and_without_its_activation_in_place(tmp_path, inplace_relu):
    pytest.importorskip("torch")
    arrays = discriminator_arrays("ac")
    variables = read_discriminator(save(tmp_path / "D.pth", arrays)).variables
    images = wave("images", (3, 3, 8, 8)).astype(np.float32)
    found, _ = critic_of("ac", inplace_relu)(
        variables, jnp.asarray(images.transpose(0, 2, 3, 1)), jnp.zeros(3, jnp.int32), train=False
    )
    features, scores = torch_features(arrays, images, inplace_relu)
    np.testing.assert_allclose(found.features, features, rtol=1e-4, atol=1e-4 * features.max())  # float32
    np.testing.assert_allclose(found.score, scores, rtol=1e-4, atol=1e-4)
    other, _ = torch_features(arrays, images, not inplace_relu)
    assert np.abs(other - features).max() > 0.01 * features.max()


def test_a_numpy_number_beside_the_tensors_is_read_as_a_number(tmp_path):
    tree = read_torch(save(tmp_path / "D.pth", discriminator_arrays("ac")))
    assert (tree["best_fid"], tree["step"]) == (7.79, 76000)


def without(arrays, *names):
    return {name: value for name, value in arrays.items() if name not in names}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (without(generator_arrays(), "shared.weight"), "no BigGAN generator with spectral normalisation"),
        (without(generator_arrays(), "bn4.bias"), "lacks bn4.bias"),
        ({**generator_arrays(), "bn4.bias": np.zeros(3, np.float32)}, r"bn4.bias has shape \(3,\), but \(32,\) is due"),
        ({**generator_arrays(), "convert_head0.weight": np.zeros((2, 2), np.float32)}, "no place for: convert_head0"),
    ],
)
def test_what_is_no_such_network_is_refused_with_the_reason(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        read_generator(save(tmp_path / "G.pth", arrays))


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    generator = read_generator(save(tmp_path / "G.pth", generator_arrays()))
    critic = read_discriminator(save(tmp_path / "D.pth", discriminator_arrays("ac")))
    with pytest.raises(ConfigError, match="the head of acgan, not of reacgan"):
        check_pair("reacgan", generator, None, critic)
    check_pair("acgan", generator, generator, critic)


@pytest.mark.slow
def test_an_imported_run_makes_the_images_of_the_averaged_generator(tmp_path, capsys):
    files = [
        save(tmp_path / "G.pth", generator_arrays()),
        save(tmp_path / "D.pth", discriminator_arrays("embedding")),
    ]
    average = save(tmp_path / "G_ema.pth", generator_arrays(shift=0.3))
    out = tmp_path / "run"
    code = run(
        ["gan", "import", *map(str, files), "--ema", str(average), "--method", "reacgan", "--out", str(out), "--json"]
    )
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert json.loads(captured.out)["status"] == "done"
    written = (out / "config.toml").read_text()
    assert "inplace_relu = true" in written
    assert f"embedding_dim = {EMBEDDING}" in written
    for weights in ("ema", "raw"):
        code = run(["sample", str(out), "--num", "4", "--weights", weights, "--out", str(tmp_path / weights), "--json"])
        assert code == 0, capsys.readouterr().err
    pictures = [next((tmp_path / weights).rglob("*.png")).read_bytes() for weights in ("ema", "raw")]
    assert pictures[0] != pictures[1]
