"""U-ViT checkpoints: every array comes to its place, nothing is dropped, and a whole import can be sampled from."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.cli.main import run
from stabletrain.diffusion.checkpoint_reader import open_checkpoint
from stabletrain.diffusion.uvit import UViT
from stabletrain.diffusion.uvit_import import read_uvit
from stabletrain.errors import DataError
from tests.diffusion.weights import by_name, filled


def network_of(**values) -> UViT:
    return UViT(**{"image_size": 8, "channels": 2, "patch_size": 2, "width": 16, "depth": 6, "heads": 2, **values})


def params_of(network: UViT) -> dict:
    size, labels = network.image_size, jnp.zeros(1, jnp.int32) if network.num_classes else None
    if network.context_shape:
        labels = jnp.zeros((1, *network.context_shape))
    args = jnp.zeros((1, size, size, network.channels)), jnp.zeros(1), labels
    return filled(jax.eval_shape(network.init, jax.random.key(0), *args)["params"])


def released_names(params: dict) -> dict[str, np.ndarray]:
    """The same numbers as PyTorch's modules would hold them: Linear [out, in], Conv2d [out, in, h, w]."""
    count = sum(name.startswith("in_block") for name in params)
    arrays = {
        "patch_embed.proj.weight": params["patch_kernel"].transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": params["patch_bias"],
        "pos_embed": params["position_embedding"],
        "final_layer.weight": params["final_conv"]["kernel"].transpose(3, 2, 0, 1),
        "final_layer.bias": params["final_conv"]["bias"],
    }
    if "label_embedding" in params:
        arrays["label_emb.weight"] = params["label_embedding"]["embedding"]

    def put(name: str, layer: dict) -> None:
        arrays[f"{name}.weight"] = layer["kernel"].T if "kernel" in layer else layer["scale"]
        if "bias" in layer:
            arrays[f"{name}.bias"] = layer["bias"]

    def put_block(name: str, block: dict) -> None:
        theirs = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
        for part, layer in block.items():
            put(f"{name}.{theirs.get(part, part)}", layer)

    if "context_embedding" in params:
        put("context_embed", params["context_embedding"])
    put("norm", params["norm"])
    put("decoder_pred", params["decoder"])
    put_block("mid_block", params["mid_block"])
    for place in range(count):  # decoder blocks in the order in which they run: the innermost first
        put_block(f"in_blocks.{place}", params[f"in_block_{place}"])
        put_block(f"out_blocks.{place}", params[f"out_block_{count - 1 - place}"])
        put(f"out_blocks.{place}.skip_linear", params[f"skip_linear_{count - 1 - place}"])
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


@pytest.mark.torch
@pytest.mark.parametrize("labels", [0, 3])
def test_every_array_of_a_file_written_by_torch_comes_to_its_place(tmp_path, labels):
    torch = pytest.importorskip("torch")
    network = network_of(num_classes=labels)
    params = params_of(network)
    path = tmp_path / "nnet_ema.pth"
    torch.save({name: torch.tensor(array) for name, array in released_names(params).items()}, path)
    found = read_uvit(open_checkpoint(path))
    assert (found.image_size, found.channels, found.patch_size, found.width, found.depth) == (8, 2, 2, 16, 6)
    assert found.embeddings == (labels + 1 if labels else 0)
    expected, ours = by_name(params), by_name(found.params)
    assert set(ours) == set(expected)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, expected[name].astype(np.float32), err_msg=name)


def write(path, arrays):
    np.savez(path, **arrays)
    return path


def test_other_networks_missing_and_additional_arrays_are_named(tmp_path):
    arrays = released_names(params_of(network_of(depth=2)))
    with pytest.raises(DataError, match=r"no U-ViT checkpoint: its arrays are called input_blocks"):
        read_uvit(open_checkpoint(write(tmp_path / "a.npz", {"input_blocks.0.0.weight": np.zeros(3)})))
    with pytest.raises(DataError, match=r"lacks in_blocks.0.norm2.bias"):
        read_uvit(
            open_checkpoint(
                write(tmp_path / "b.npz", {k: v for k, v in arrays.items() if k != "in_blocks.0.norm2.bias"})
            )
        )
    with pytest.raises(DataError, match=r"1 arrays that our U-ViT has no place for: time_embed.0.weight"):
        read_uvit(open_checkpoint(write(tmp_path / "c.npz", {**arrays, "time_embed.0.weight": np.zeros(3)})))
    with pytest.raises(DataError, match=r"pos_embed has shape|not those of a square"):
        read_uvit(open_checkpoint(write(tmp_path / "d.npz", {**arrays, "pos_embed": np.zeros((1, 12, 16))})))
    with pytest.raises(DataError, match=r"mid_block.attn.proj.weight has shape \(3, 3\), but \(16, 16\) is due"):
        read_uvit(
            open_checkpoint(write(tmp_path / "e.npz", {**arrays, "mid_block.attn.proj.weight": np.zeros((3, 3))}))
        )


def test_an_imported_checkpoint_is_a_run_with_the_network_s_own_output(tmp_path, capsys):
    """Import, load as every command does, and compare with the network applied to the same numbers."""
    from stabletrain.cli.stored import load_trained

    network = network_of(image_size=32, channels=3, patch_size=16, depth=2)
    params = params_of(network)
    file = write(tmp_path / "uvit.npz", released_names(params))
    out = tmp_path / "run"
    assert run(["diffusion", "import", str(file), "--out", str(out), "--heads", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "done"
    trained = load_trained(out, with_data=False)
    assert trained.experiment.data_spec.name == "cifar10"
    images, times = jax.random.normal(jax.random.key(0), (2, 32, 32, 3)), jnp.array([3.0, 500.0])
    expected = network.apply({"params": params}, images, times)
    for weights in trained.experiment.weights(trained.state).values():
        found = trained.experiment.network.apply({"params": weights}, images, times)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # float32 in both


def test_a_text_to_image_checkpoint_is_a_run_that_is_sampled_from_texts(tmp_path, capsys):
    network = network_of(channels=4, patch_size=4, depth=2, context_shape=(77, 6))
    params = params_of(network)
    file = write(tmp_path / "t2i.npz", released_names(params))
    found = read_uvit(open_checkpoint(file))
    assert (found.image_size, found.context_shape) == (8, (77, 6))
    expected, ours = by_name(params), by_name(found.params)
    assert set(ours) == set(expected)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, expected[name].astype(np.float32), err_msg=name)

    out, texts = tmp_path / "run", tmp_path / "texts.npz"
    assert run(["diffusion", "import", str(file), "--out", str(out), "--heads", "2"]) == 0
    assert "ddpm-scaled-linear" in capsys.readouterr().out
    np.savez(texts, contexts=np.ones((1, 77, 6), "f4"), empty=np.zeros((77, 6), "f4"))
    command = ["sample", str(out), "--num", "2", "--sampling-steps", "2"]
    assert run(command) == 2
    assert "this model reads texts" in " ".join(capsys.readouterr().err.split())
    assert run([*command, "--context", str(texts), "--out", str(tmp_path / "samples")]) == 0
    assert np.load(tmp_path / "samples" / "samples.npz")["latents"].shape == (2, 8, 8, 4)
    other = write(tmp_path / "uvit.npz", released_names(params_of(network_of(channels=3, depth=2))))
    for dataset, weights in (("cifar10", file), ("coco-latents", other)):
        options = ["--dataset", dataset, "--heads", "2", "--out", str(tmp_path / "no")]
        assert run(["diffusion", "import", str(weights), *options]) == 2
        assert "the checkpoint's network reads" in " ".join(capsys.readouterr().err.split())


def test_what_a_checkpoint_cannot_be_is_refused_in_one_line(tmp_path, capsys):
    def saved(name: str, **values):
        return str(write(tmp_path / f"{name}.npz", released_names(params_of(network_of(depth=2, **values)))))

    small, coarse = saved("small", channels=3), saved("coarse", channels=3, image_size=32, patch_size=16)
    grey = saved("grey", channels=1, image_size=32, patch_size=16)
    latents = saved("latents", channels=4, num_classes=3)  # the layout of U-ViT's ImageNet-256 networks
    heads = ["--heads", "2"]
    for options, code, message in (
        ([small, *heads], 2, "say --dataset NAME"),
        ([small], 2, "say how many --heads"),
        ([small, *heads, "--skip-scaling", "ls"], 2, "weights of its own"),
        ([coarse, *heads, "--dataset", "nope"], 2, "unknown data set 'nope'"),
        ([small, *heads, "--dataset", "unnamed"], 2, "unknown data set 'unnamed'"),
        ([coarse, *heads, "--dataset", "celeba64"], 2, "images have 32 pixels, those of celeba64 have 64; say"),
        ([small, *heads, "--dataset", "cifar10"], 2, "images have 8 pixels, those of cifar10 have 32; say"),
        ([grey, *heads, "--dataset", "cifar10"], 2, "images have 1 channels, those of cifar10 have 3"),
        ([grey, *heads], 2, "say --dataset NAME"),
        ([latents, *heads], 3, "is a network of 4 channels, and pictures have 1 or 3"),
        ([latents, *heads, "--dataset", "cifar10"], 3, "is a network of 4 channels"),
    ):
        assert run(["diffusion", "import", *options, "--out", str(tmp_path / "run")]) == code, options
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_size_that_is_told_and_a_scaling_without_weights_are_kept(tmp_path, capsys):
    file = write(tmp_path / "uvit.npz", released_names(params_of(network_of(channels=3, depth=2))))
    options = ["--heads", "2", "--dataset", "cifar10", "--image-size", "8", "--skip-scaling", "mp-cat"]
    assert run(["diffusion", "import", str(file), "--out", str(tmp_path / "run"), *options]) == 0
    text = (tmp_path / "run" / "config.toml").read_text()
    assert 'skip_scaling = "mp-cat"' in text
    assert "image_size = 8" in text


def test_an_import_keeps_how_it_is_to_be_sampled(tmp_path, capsys):
    from stabletrain.cli.stored import load_trained

    network = network_of(image_size=32, channels=3, patch_size=16, depth=2)
    file = write(tmp_path / "uvit.npz", released_names(params_of(network)))
    command = ["diffusion", "import", str(file), "--heads", "2", "--out"]
    options = ["--sampler", "dpm-solver-fast", "--sampling-steps", "20", "--no-clip-denoised"]
    assert run([*command, str(tmp_path / "as-published"), *options]) == 0
    settings = load_trained(tmp_path / "as-published", with_data=False).experiment.settings()
    assert (settings.sampler, settings.steps, settings.clip) == ("dpm-solver-fast", 20, False)
    assert run([*command, str(tmp_path / "plain")]) == 0
    settings = load_trained(tmp_path / "plain", with_data=False).experiment.settings()
    assert (settings.sampler, settings.steps, settings.clip) == ("ddim", 50, True)
    for wrong, message in (
        (["--sampler", "ddpm-learned"], "only one with --learned-variance says"),
        (["--sampler", "dpm"], "did you mean"),
        (["--sampling-steps", "0"], "--sampling-steps is 0, but must be at least 1"),
    ):
        capsys.readouterr()
        assert run([*command, str(tmp_path / "no"), *wrong]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "no").exists()


def test_an_existing_run_is_not_touched_by_an_import(tmp_path, capsys):
    files = [
        write(tmp_path / f"{name}.npz", released_names(params_of(network_of(channels=3, depth=2))))
        for name in ("first", "second")
    ]
    out = tmp_path / "run"
    command = ["--heads", "2", "--dataset", "cifar10", "--image-size", "8", "--out", str(out)]
    assert run(["diffusion", "import", str(files[0]), *command]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert json.loads((out / "record.json").read_text())["imported_from"] == "first.npz"
    capsys.readouterr()
    assert run(["diffusion", "import", str(files[1]), *command]) == 1
    assert "already holds a run, which an import does not change" in " ".join(capsys.readouterr().err.split())
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
