"""`stabletrain sample --weights FILE`: from a published file to pictures, of the average where there is one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stabletrain.cli.main import run
from stabletrain.diffusion import published
from stabletrain.diffusion.checkpoint_reader import open_checkpoint
from stabletrain.diffusion.choices import PUBLISHED
from stabletrain.diffusion.unet_import import ImportedUNet
from stabletrain.errors import DataError
from tests.diffusion import test_unet_import as unets
from tests.diffusion.test_uvit_import import network_of, params_of, released_names

UVIT = network_of(channels=3, patch_size=4, depth=2)


def uvit_arrays(factor: float = 1.0) -> dict[str, np.ndarray]:
    return {name: factor * array for name, array in released_names(params_of(UVIT)).items()}


def named(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + name: array for name, array in arrays.items()}


def sample(capsys: pytest.CaptureFixture, file: Path, out: Path, *options: str) -> tuple[int, str]:
    command = ["sample", "--weights", str(file), "--num", "3", "--sampling-steps", "2", "--out", str(out), "-q"]
    code = run([*command, *options])
    said = capsys.readouterr()
    return code, said.out if code == 0 else said.err


def test_a_file_with_a_network_and_its_average_gives_the_average_s_pictures(tmp_path, capsys):
    average, last = uvit_arrays(), uvit_arrays(0.5)
    files = {"both": named("net.", last) | named("net_ema.module.", average), "average": average, "last": last}
    pictures = {}
    for name, arrays in files.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        code, said = sample(capsys, tmp_path / f"{name}.npz", tmp_path / name, "--heads", "2")
        assert code == 0
        assert "U-ViT of width 16 and depth 2" in said
        assert ("'net_ema.module'" in said) == (name == "both")
        pictures[name] = np.load(tmp_path / name / "samples.npz")["images"]
        assert (tmp_path / name / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert pictures["both"].shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(pictures["both"], pictures["average"])
    assert (pictures["both"] != pictures["last"]).any()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*files, *(f"{name}.npz" for name in files)])

    code, said = sample(capsys, tmp_path / "last.npz", tmp_path / "average", "--heads", "2")
    assert (code, "samples of other settings" in said) == (1, True), "another file's samples are not mixed with these"


def test_a_unet_of_no_published_size_is_told_its_own(tmp_path, capsys):
    network, names, _ = unets.CASES["ddpm"]
    file = tmp_path / "unet.npz"
    np.savez(file, **names(unets.params_of(network)))
    code, said = sample(capsys, file, tmp_path / "out")
    assert (code, "say --image-size N" in " ".join(said.split())) == (2, True)
    assert not (tmp_path / "out").exists()
    code, said = sample(capsys, file, tmp_path / "out", "--image-size", "8", "--json")
    assert code == 0
    assert json.loads(said)["run_dir"] is None
    assert np.load(tmp_path / "out" / "samples.npz")["images"].shape == (3, 8, 8, 3)
    made = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert (made["weights"], made["told"]["image_size"]) == ("unet.npz", 8)


def test_a_published_unet_is_known_by_its_shape():
    shapes = {
        "unet-ddpm": ("ddpm", 128, (1, 2, 2, 2), 2, (1,)),
        "unet-iddpm": ("iddpm", 128, (1, 2, 2, 2), 3, (1, 2)),
        "unet-iddpm64": ("iddpm", 128, (1, 2, 3, 4), 3, (2, 3)),
        "unet-adm64": ("adm", 192, (1, 2, 3, 4), 3, (1, 2, 3)),
    }
    assert set(shapes) == set(published.PUBLISHED_DATA) <= set(PUBLISHED)
    for name, (style, width, multipliers, blocks, attention) in shapes.items():
        found = ImportedUNet(style, 3, width, multipliers, blocks, attention, False, 0, {})
        assert published.published_unet(found) == name
        assert published.published_unet(ImportedUNet(style, 3, width, multipliers, 1, attention, False, 0, {})) is None


def test_adm_s_published_network_is_read_in_its_own_order_of_attention(tmp_path, monkeypatch):
    network, names, _ = unets.CASES["adm"]
    params = unets.params_of(network)
    file = tmp_path / "adm.npz"
    np.savez(file, **names(params))
    expected = params["mid_attention"]["q"]["kernel"].astype(np.float32)
    monkeypatch.setattr(published, "published_unet", lambda found: published.WHOLE_QKV)
    for order, equal in ((None, True), ("whole", True), ("head", False)):
        options = published.PublishedOptions(dataset="cifar10", image_size=8, qkv_order=order)
        found = published.read_published(file, options, named=False)
        assert np.array_equal(found.params["mid_attention"]["q"]["kernel"], expected) == equal


@pytest.mark.torch
def test_the_layouts_of_training_states_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    last, average = ({name: torch.tensor(a) for name, a in uvit_arrays(f).items()} for f in (0.5, 1.0))
    optimiser = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}
    wrapped = {f"module.{name}": tensor for name, tensor in last.items()}
    layouts = {
        "list": ([wrapped, optimiser, 3, 10, average], "4"),
        "named": ({"model": last, "model_ema": average, "optimizer": optimiser, "step": 10}, "model_ema"),
        "wrapped": ({"state_dict": {f"module.{name}": tensor for name, tensor in average.items()}}, ""),
    }
    for name, (content, chosen) in layouts.items():
        torch.save(content, tmp_path / f"{name}.pth")
        found = open_checkpoint(tmp_path / f"{name}.pth")
        assert found.chosen == chosen
        assert set(found.arrays) == set(average), name
        np.testing.assert_array_equal(found.arrays["pos_embed"], average["pos_embed"].numpy())
    torch.save({"first": last, "second": average}, tmp_path / "two.pth")
    with pytest.raises(DataError, match=r"holds 2 networks, and none is called an average \(ema\): 'first', 'second'"):
        open_checkpoint(tmp_path / "two.pth")


def test_a_network_of_latents_without_texts_makes_no_pictures(tmp_path, capsys):
    """The layout of U-ViT's ImageNet-256 and 512 networks: four channels and labels."""
    latents = network_of(channels=4, patch_size=4, depth=2, num_classes=3)
    np.savez(tmp_path / "latents.npz", **released_names(params_of(latents)))
    code, said = sample(capsys, tmp_path / "latents.npz", tmp_path / "out", "--heads", "2")
    assert (code, "is a network of 4 channels, and pictures have 1 or 3" in " ".join(said.split())) == (3, True)
    assert not (tmp_path / "out").exists()


def test_a_refused_file_is_one_line_with_its_exit_code(tmp_path, capsys):
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    np.savez(tmp_path / "uvit.npz", **uvit_arrays())
    np.savez(tmp_path / "lacking.npz", **{k: v for k, v in uvit_arrays().items() if k != "norm.bias"})
    (tmp_path / "text.pth").write_text("no weights")
    cases = (
        (["--weights", "text.pth"], 3, "not those of a .pth"),
        (["--weights", "absent.pth"], 3, "cannot read"),
        (["--weights", "other.npz"], 3, "is no checkpoint of U-ViT, DDPM, improved DDPM or ADM"),
        (["--weights", "lacking.npz", "--heads", "2"], 3, "lacks norm.bias"),
        (["--weights", "uvit.npz"], 2, "say how many --heads"),
        (["--weights", "uvit.npz", "--heads", "2", "--image-size", "16"], 2, "the checkpoint's is 8"),
        (["--weights", "uvit.npz", "--heads", "2", "--skip-scaling", "ls"], 2, "weights of its own"),
        (["--weights", "uvit.npz", "--heads", "2", "--process", "vp-sd"], 2, "did you mean 'vp-sde'"),
        (
            ["--weights", "uvit.npz", "--heads", "2", "--process", "ddpm-linear", "--diffusion-steps", "10"],
            2,
            "--diffusion-steps 10 is too few for ddpm-linear",
        ),
        (["--weights", "uvit.npz", "--heads", "2", "--checkpoint", "best"], 2, "--checkpoint does nothing"),
        (["--weights", "uvit.npz", "--heads", "2", "--label", "1"], 2, "knows no labels"),
        (["--weights", "uvit.npz", "RUN"], 2, "either the run or the file"),
        (["--weights", "rew", "RUN"], 2, "did you mean 'raw'"),
        (["--heads", "2", "RUN"], 2, "--heads does nothing with a run"),
        (["--weights", "ema"], 2, "name a RUN"),
        ([], 2, "name a RUN"),
    )
    for options, code, message in cases:
        given = [str(tmp_path / word) if word.endswith((".pth", ".npz")) else word for word in options]
        assert run(["sample", *given, "--out", str(tmp_path / "out"), "-q"]) == code, options
        said = " ".join(capsys.readouterr().err.split())
        assert message in said
        assert "Traceback" not in said
        assert not (tmp_path / "out").exists()
