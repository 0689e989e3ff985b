"""UNet checkpoints under their released names: every array comes to its place, and a whole import can be sampled from.

The numbers of released models cannot be here. Compared once with the released implementations of improved DDPM and ADM
(random weights of width 128, three levels, labels and a learned variance): the same outputs to 4e-6 in float32.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.cli.main import run
from stabletrain.diffusion.checkpoint_reader import open_checkpoint
from stabletrain.diffusion.unet import STYLES, UNet
from stabletrain.diffusion.unet_import import read_unet
from stabletrain.errors import DataError
from tests.diffusion.weights import by_name, filled

HEADS = 2


def network_of(style: str, **values) -> UNet:
    defaults = {"multipliers": (1, 2), "blocks": 1, "attention_resolutions": (4,), "heads": HEADS}
    return UNet(3, 128, **{**defaults, "style": STYLES[style], **values})


def params_of(network: UNet) -> dict:
    labels = jnp.zeros(1, jnp.int32) if network.num_classes else None
    return filled(
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), labels)["params"]
    )


def torch_arrays(layers: dict[str, dict]) -> dict[str, np.ndarray]:
    """Layers by released name as PyTorch holds them."""
    arrays = {}
    for name, layer in layers.items():
        kernel = layer.get("kernel", layer.get("scale", layer.get("embedding")))
        if kernel.ndim == 4:
            kernel = kernel.transpose(3, 2, 0, 1)
        elif "kernel" in layer:
            kernel = kernel.T
        arrays[f"{name}.weight"] = kernel
        if "bias" in layer:
            arrays[f"{name}.bias"] = layer["bias"]
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


def improved_names(params: dict, order: str = "head") -> dict[str, np.ndarray]:
    """Parameters of `network_of("iddpm" or "adm")` under the names of improved DDPM."""
    layers: dict[str, dict] = {
        "input_blocks.0.0": params["stem"], "time_embed.0": params["time_0"], "time_embed.2": params["time_1"],
        "out.0": params["norm"], "out.2": params["final"],
    }  # fmt: skip
    together: dict[str, np.ndarray] = {}

    def put_block(name: str, block: dict) -> None:
        theirs = {
            "norm1": "in_layers.0", "conv1": "in_layers.2", "time": "emb_layers.1", "norm2": "out_layers.0",
            "conv2": "out_layers.3", "shortcut": "skip_connection",
        }  # fmt: skip
        if set(block) == {"kernel", "bias"}:
            layers[name] = block
        else:
            layers.update({f"{name}.{theirs[part]}": layer for part, layer in block.items()})

    def put_attention(name: str, block: dict) -> None:
        layers[f"{name}.norm"], layers[f"{name}.proj_out"] = block["norm"], block["proj"]
        width = block["q"]["kernel"].shape[0]
        heads = HEADS if order == "head" else 1
        kernels = [block[part]["kernel"].T.reshape(heads, -1, width) for part in "qkv"]
        biases = [block[part]["bias"].reshape(heads, -1) for part in "qkv"]
        together[f"{name}.qkv.weight"] = np.stack(kernels, 1).reshape(3 * width, width, 1).astype(np.float32)
        together[f"{name}.qkv.bias"] = np.stack(biases, 1).reshape(3 * width).astype(np.float32)

    residual = "conv1" in params["downsample_0"]
    put_block("input_blocks.1.0", params["down_0_0"])
    put_block("input_blocks.2.0" if residual else "input_blocks.2.0.op", params["downsample_0"])
    put_block("input_blocks.3.0", params["down_1_0"])
    put_attention("input_blocks.3.1", params["down_1_0_attention"])
    put_block("middle_block.0", params["mid_block_0"])
    put_attention("middle_block.1", params["mid_attention"])
    put_block("middle_block.2", params["mid_block_1"])
    for place, ours in enumerate(("up_1_0", "up_1_1", "up_0_0", "up_0_1")):
        put_block(f"output_blocks.{place}.0", params[ours])
        if f"{ours}_attention" in params:
            put_attention(f"output_blocks.{place}.1", params[f"{ours}_attention"])
    put_block("output_blocks.1.2" if residual else "output_blocks.1.2.conv", params["upsample_1"])
    if "label_embedding" in params:
        layers["label_emb"] = params["label_embedding"]
    arrays = torch_arrays(layers) | together
    for name in [name for name in arrays if name.endswith("proj_out.weight")]:
        arrays[name] = arrays[name][:, :, None]  # kept as a convolution along one axis
    return arrays


def ddpm_names(params: dict) -> dict[str, np.ndarray]:
    """Parameters of `network_of("ddpm")` under the names of DDPM's ports."""
    layers: dict[str, dict] = {
        "conv_in": params["stem"], "temb.dense.0": params["time_0"], "temb.dense.1": params["time_1"],
        "norm_out": params["norm"], "conv_out": params["final"], "down.0.downsample.conv": params["downsample_0"],
        "up.1.upsample.conv": params["upsample_1"],
    }  # fmt: skip
    blocks = {"down_0_0": "down.0.block.0", "down_1_0": "down.1.block.0", "mid_block_0": "mid.block_1"}
    blocks |= {"mid_block_1": "mid.block_2"} | {f"up_{i}_{j}": f"up.{i}.block.{j}" for i in (0, 1) for j in (0, 1)}
    for ours, theirs in blocks.items():
        other = {"time": "temb_proj", "shortcut": "nin_shortcut"}
        layers.update({f"{theirs}.{other.get(part, part)}": layer for part, layer in params[ours].items()})
    attentions = {"down_1_0_attention": "down.1.attn.0", "mid_attention": "mid.attn_1"}
    attentions |= {f"up_1_{j}_attention": f"up.1.attn.{j}" for j in (0, 1)}
    arrays = {}
    for ours, theirs in attentions.items():
        parts = torch_arrays(
            {f"{theirs}.{'proj_out' if part == 'proj' else part}": layer for part, layer in params[ours].items()}
        )
        arrays |= {name: a[:, :, None, None] if a.ndim == 2 else a for name, a in parts.items()}
    return torch_arrays(layers) | arrays


CASES = {
    "iddpm": (network_of("iddpm", learned_variance=True), improved_names, {"heads": HEADS}),
    "adm": (
        network_of("adm", num_classes=10, null_label=False, learned_variance=True),
        lambda params: improved_names(params, "whole"),
        {"head_channels": 128, "qkv_order": "whole"},
    ),
    "ddpm": (network_of("ddpm", heads=1), ddpm_names, {}),
}


@pytest.mark.parametrize("style", CASES)
def test_every_array_comes_to_its_place(style, tmp_path):
    network, named, options = CASES[style]
    params = params_of(network)
    path = tmp_path / "unet.npz"
    np.savez(path, **named(params))
    found = read_unet(open_checkpoint(path), **options)
    assert (found.block_style, found.channels, found.width, found.multipliers, found.blocks) == (
        style,
        3,
        128,
        (1, 2),
        1,
    )
    assert found.attention_levels == (1,)
    assert found.learned_variance == network.learned_variance
    assert found.embeddings == network.num_classes
    expected, ours = by_name(params), by_name(found.params)
    assert set(ours) == set(expected)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, expected[name].astype(np.float32), err_msg=name)


def test_an_imported_checkpoint_is_a_run_that_gives_the_network_s_output(tmp_path, capsys):
    from stabletrain.cli.stored import load_trained

    params = params_of(CASES["iddpm"][0])
    file, out = tmp_path / "ema.npz", tmp_path / "run"
    np.savez(file, **improved_names(params))
    command = ["diffusion", "import", str(file), "--dataset", "cifar10", "--heads", str(HEADS), "--json"]
    assert run([*command, "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "done"
    trained = load_trained(out, with_data=False)
    config = trained.experiment.config
    assert (config.process, config.diffusion_steps, config.sampler) == ("ddpm-cosine", 4000, "ddpm-learned")
    assert config.attention == (16,), "the second level of images of 32 pixels"
    images, times = jax.random.normal(jax.random.key(0), (2, 32, 32, 3)), jnp.array([3.0, 500.0])
    network = network_of("iddpm", learned_variance=True, attention_resolutions=(16,))
    expected = network.apply({"params": params}, images, times)
    for weights in trained.experiment.weights(trained.state).values():
        found = trained.experiment.network.apply({"params": weights}, images, times)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # float32 in both
    other = tmp_path / "other"
    assert run([*command, "--out", str(other), "--process", "ddpm-linear", "--diffusion-steps", "100"]) == 0
    assert '"ddpm-linear"' in (other / "config.toml").read_text()


def test_what_does_not_fit_is_named(tmp_path, capsys):
    arrays = improved_names(params_of(CASES["iddpm"][0]))

    def refused(message: str, changed: dict, **options) -> None:
        np.savez(tmp_path / "a.npz", **changed)
        with pytest.raises(DataError, match=message):
            read_unet(open_checkpoint(tmp_path / "a.npz"), **{"heads": HEADS, **options})

    refused(r"no checkpoint of U-ViT, DDPM, improved DDPM or ADM: its arrays are called w", {"w": np.zeros(2)})
    refused(r"lacks middle_block.1.norm.bias", {k: v for k, v in arrays.items() if k != "middle_block.1.norm.bias"})
    refused(r"1 arrays that our UNet has no place for: more.weight", {**arrays, "more.weight": np.zeros(2)})
    refused(r"not divided by 3 heads", arrays, heads=3)
    refused(r"time is added", {**arrays, "input_blocks.1.0.emb_layers.1.bias": np.zeros(128, np.float32)})
    # The layout of ADM's networks that enlarge: the noisy picture beside the small one.
    stem = np.concatenate([arrays["input_blocks.0.0.weight"]] * 2, axis=1)
    refused(r"is a network of 6 channels, and pictures have 1 or 3", {**arrays, "input_blocks.0.0.weight": stem})
    np.savez(tmp_path / "a.npz", **arrays)
    for options, message in (
        ([], "does not say the size of its images: say --dataset NAME"),
        (["--dataset", "cifar10", "--qkv-order", "heads"], "did you mean 'head'"),
        (["--dataset", "cifar10", "--skip-scaling", "ls"], "weights of its own"),
    ):
        assert run(["diffusion", "import", str(tmp_path / "a.npz"), "--out", str(tmp_path / "run"), *options]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
