"""The 2015 Inception: each block and the whole beside NumPy and torch, its input, its weights, its extractor."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from stabletrain.errors import ConfigError, DataError
from stabletrain.metrics import inception, weights
from stabletrain.metrics.inception import InceptionA, InceptionB, InceptionC, InceptionD, InceptionE
from tests.metrics.inception_reference import NumpyOperations, Reference, TorchOperations
from tests.nn import torch_writing

# One of each kind; the whole network has them all.
BLOCKS = {
    "Mixed_5b": (InceptionA(32), 192),
    "Mixed_6a": (InceptionB(), 288),
    "Mixed_6b": (InceptionC(128), 768),
    "Mixed_7a": (InceptionD(), 768),
    "Mixed_7b": (InceptionE(False), 1280),
    "Mixed_7c": (InceptionE(True), 2048),
}


@pytest.fixture(scope="session")
def params():
    return inception.random_parameters()


@pytest.fixture(scope="session")
def published(params):
    return inception.to_published(params)


@pytest.fixture(scope="session")
def published64(published):
    return {name: array.astype(np.float64) for name, array in published.items()}


def photographs(count: int, height: int = 32, width: int = 32, channels: int = 3) -> np.ndarray:
    """Smooth colour fields with noise: pixel values of all sizes."""
    rng = np.random.default_rng(count + height)
    y, x = np.mgrid[:height, :width] / max(height, width)
    fields = np.sin(6 * rng.uniform(-1, 1, (count, 1, 1, channels)) * (x + 2 * y)[None, :, :, None] + rng.uniform(0, 6))
    return np.clip(127 + 110 * fields + rng.normal(0, 12, fields.shape), 0, 255).astype(np.uint8)


# --- the network beside the references ------------------------------------------------------------------------


def in_float64(block, params, x):
    """A block's answer in float64, NHWC inside and NCHW outside."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        return np.moveaxis(np.asarray(block.apply({"params": wide}, jnp.asarray(np.moveaxis(x, 1, -1)))), -1, 1)


def block_input(channels: int) -> np.ndarray:
    # Five by six: borders on all sides, an inside, and no symmetry between rows and columns. Negative values too, so
    # that a maximum over padding would show.
    return np.random.default_rng(1).normal(0, 1, (2, channels, 5, 6))


@pytest.mark.parametrize("name", BLOCKS)
def test_each_block_is_numpys(name, params, published64):
    block, channels = BLOCKS[name]
    x = block_input(channels)
    expected = Reference(NumpyOperations(), published64).block(x, name)
    # float64 on both sides: nothing but the order of sums of up to 7,000 products of order one differs.
    np.testing.assert_allclose(in_float64(block, params[name], x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.torch
@pytest.mark.parametrize("name", BLOCKS)
def test_each_block_is_torchs(name, params, published64):
    torch = pytest.importorskip("torch")
    block, channels = BLOCKS[name]
    x = block_input(channels)
    tensors = {key: torch.from_numpy(array) for key, array in published64.items() if name in key}
    with torch.inference_mode():
        expected = Reference(TorchOperations(), tensors).block(torch.tensor(x), name).numpy()
    np.testing.assert_allclose(in_float64(block, params[name], x), expected, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="session")
def extractor(params):
    return inception.InceptionExtractor("inception-custom-00000000", "0" * 64, params, batch_size=4)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("resize", inception.RESIZES)
def test_the_whole_is_torchs(resize, extractor, published64):
    torch = pytest.importorskip("torch")
    images = photographs(2)
    tensors = {key: torch.from_numpy(array) for key, array in published64.items()}
    x = torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2)
    if resize == "pytorch-fid":
        x = torch.nn.functional.interpolate(x / 255, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1
    else:
        x = torch.tensor(naive_tf1(images).transpose(0, 3, 1, 2))
    with torch.inference_mode():
        pool3, logits = (part.numpy() for part in Reference(TorchOperations(), tensors)(x))
    ours_pool3, ours_logits = replace(extractor, resize=resize, logit_bias=True).outputs(images)
    # Float32 through 17 layers in a row against float64: 2e-6 of the typical value was seen.
    np.testing.assert_allclose(ours_pool3, pool3, rtol=1e-4, atol=2e-5 * pool3.std())
    np.testing.assert_allclose(ours_logits, logits, rtol=1e-4, atol=2e-5 * logits.std())


@pytest.mark.slow
def test_the_whole_is_numpys(extractor, published64):
    image = photographs(1)
    x = naive_tf1(image).transpose(0, 3, 1, 2)
    pool3, logits = Reference(NumpyOperations(), published64)(x)
    ours = replace(extractor, logit_bias=True).outputs(image)
    np.testing.assert_allclose(ours[0], pool3, rtol=1e-4, atol=2e-5 * pool3.std())
    np.testing.assert_allclose(ours[1], logits, rtol=1e-4, atol=2e-5 * logits.std())


def test_the_parameters_are_as_many_as_the_published_files():
    """The file has 566 arrays (94 of them counters) in 95,628,359 bytes; ours take all but 152 bytes for each name."""
    shapes = inception.parameter_shapes()
    assert len(shapes) + 94 == 566
    rest = 95_628_359 - 4 * sum(math.prod(shape) for shape in shapes.values()) - 94 * 8
    assert 100 * 566 < rest < 200 * 566


# --- input ----------------------------------------------------------------------------------------------------


def naive_tf1(images: np.ndarray) -> np.ndarray:
    """TensorFlow 1's resize to 299 x 299, one output column and then one output row at a time, and its scaling."""
    count, height, width, channels = images.shape
    columns = np.empty((count, height, 299, channels))
    for j in range(299):
        x = j * width / 299
        left, right = int(x), min(int(x) + 1, width - 1)
        columns[:, :, j] = images[:, :, left] * (1 - x % 1) + images[:, :, right] * (x % 1)
    result = np.empty((count, 299, 299, channels))
    for i in range(299):
        y = i * height / 299
        top, bottom = int(y), min(int(y) + 1, height - 1)
        result[:, i] = columns[:, top] * (1 - y % 1) + columns[:, bottom] * (y % 1)
    return (result - 128) / 128


@pytest.mark.parametrize(("height", "width"), [(32, 32), (1, 1), (31, 47), (299, 299), (350, 64)])
def test_the_tf1_resize_is_that_of_a_loop(height, width):
    images = photographs(1, height, width)
    ours = np.asarray(inception.preprocess(jnp.asarray(images)))
    assert ours.shape == (1, 299, 299, 3)
    # Float32 positions up to 350 are right to 3e-5 pixels, times at most 255 / 128 a pixel.
    np.testing.assert_allclose(ours, naive_tf1(images), atol=8e-5)


def test_the_tf1_resize_keeps_the_first_pixel_and_repeats_the_last():
    images = photographs(1)
    ours = np.asarray(inception.preprocess(jnp.asarray(images)))
    np.testing.assert_array_equal(ours[0, 0, 0], (images[0, 0, 0].astype(np.float32) - 128) / 128)
    np.testing.assert_array_equal(ours[0, -1, -1], (images[0, -1, -1].astype(np.float32) - 128) / 128)


@pytest.mark.torch
@pytest.mark.parametrize(("height", "width"), [(32, 32), (31, 47), (299, 299), (350, 64)])
def test_the_other_resize_is_torchs(height, width):
    torch = pytest.importorskip("torch")
    images = photographs(2, height, width)
    x = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    expected = torch.nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1
    ours = np.asarray(inception.preprocess(jnp.asarray(images), "pytorch-fid"))
    np.testing.assert_allclose(ours, expected.permute(0, 2, 3, 1).numpy(), atol=8e-5)


def test_the_two_resizes_differ():
    """By far more than rounding: scores from the two are different scores."""
    images = jnp.asarray(photographs(1))
    difference = inception.preprocess(images) - inception.preprocess(images, "pytorch-fid")
    assert float(jnp.abs(difference).max()) > 0.05


def test_grey_is_repeated():
    grey = photographs(2, channels=1)
    coloured = np.repeat(grey, 3, axis=-1)
    np.testing.assert_array_equal(inception.preprocess(jnp.asarray(grey)), inception.preprocess(jnp.asarray(coloured)))


@pytest.mark.parametrize(
    "images",
    [np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.uint8)],
)
def test_other_images_are_refused(images, extractor):
    for refuse in (extractor.features, lambda images: extractor.features(images[:0])):
        with pytest.raises(DataError, match="uint8"):
            refuse(images)


def test_another_resize_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'pytorch-fid'"):
        inception.preprocess(jnp.zeros((1, 8, 8, 3), jnp.uint8), "pytorch")
    with pytest.raises(ConfigError, match="tf1-bilinear"):
        inception.load_inception("nowhere.pth", resize="clean")


# --- weights --------------------------------------------------------------------------------------------------


def with_counters(published):
    counters = {name: np.array(5) for name in published if name.endswith("running_var")}
    return published | {name.replace("running_var", "num_batches_tracked"): array for name, array in counters.items()}


def test_names_and_layouts_are_a_round_trip(params, published):
    assert published["Mixed_6b.branch7x7_2.conv.weight"].shape == (128, 128, 1, 7)
    assert published["fc.weight"].shape == (1008, 2048)
    back = flatten_dict(inception.from_published(with_counters(published)))
    for path, array in flatten_dict(params).items():
        np.testing.assert_array_equal(back[path], array, err_msg=str(path))


def test_what_is_not_this_network_is_refused(published):
    with pytest.raises(DataError, match=r"has no Mixed_7c\.branch_pool\.bn\.bias"):
        inception.from_published({k: v for k, v in published.items() if k != "Mixed_7c.branch_pool.bn.bias"})
    extra = {"AuxLogits.conv0.conv.weight": np.zeros(1), "AuxLogits.conv1.conv.weight": np.zeros(1)}
    with pytest.raises(DataError, match=r"2 arrays .* AuxLogits\.conv0"):
        inception.from_published(published | extra)
    with pytest.raises(DataError, match=r"fc\.bias has shape \(1000,\).* torchvision's"):
        inception.from_published(published | {"fc.bias": np.zeros(1000), "fc.weight": np.zeros((1000, 2048))})
    kernel = published["Mixed_6b.branch7x7_2.conv.weight"]
    with pytest.raises(DataError, match=r"conv\.weight has shape"):
        inception.from_published(published | {"Mixed_6b.branch7x7_2.conv.weight": kernel.transpose(0, 1, 3, 2)})


@pytest.mark.parametrize("kind", ["zip", "legacy", "npz"])
def test_the_extractor_is_named_after_its_file(kind, params, published, tmp_path, monkeypatch):
    """And only the published file's hash makes it `inception2015`."""
    path = tmp_path / "file.pth"
    match kind:
        case "zip":
            torch_writing.save_zip(path, with_counters(published))
        case "legacy":
            torch_writing.save_legacy(path, with_counters(published))
        case "npz":
            path = tmp_path / "file.npz"
            np.savez(path, **published)
    sha256 = weights.sha256_of(path)
    loaded = inception.load_inception(path)
    assert (loaded.name, loaded.sha256) == (f"inception-custom-{sha256[:8]}", sha256)
    name, part = ("Mixed_7c", "branch_pool")
    np.testing.assert_array_equal(loaded.params[name][part]["kernel"], params[name][part]["kernel"])
    monkeypatch.setattr(inception, "INCEPTION", replace(weights.INCEPTION, sha256=sha256))
    assert inception.load_inception(path).name == "inception2015"


# --- the extractor --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_batch_does_not_change_an_images_features(extractor):
    """Seven images in batches of four on four devices, the second filled up, and each alone."""
    images = photographs(7)
    features, logits = extractor.outputs(images)
    assert features.shape == (7, 2048)
    assert logits.shape == (7, 1008)
    assert features.dtype == logits.dtype == np.float32
    np.testing.assert_array_equal(extractor.features(images[6:]), features[6:])
    np.testing.assert_array_equal(extractor.logits(images[2:5]), logits[2:5])
    assert features.min() >= 0
    assert (features.std(0) > 0).mean() > 0.9


@pytest.mark.slow
def test_logits_are_without_bias_as_the_inception_scores_code_has_them(extractor, params):
    features, logits = extractor.outputs(photographs(4))
    expected = features.astype(np.float64) @ params["fc"]["kernel"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * logits.std())


def test_no_images_give_no_features(extractor):
    features, logits = extractor.outputs(np.zeros((0, 32, 32, 3), np.uint8))
    assert features.shape == (0, 2048)
    assert logits.shape == (0, 1008)
