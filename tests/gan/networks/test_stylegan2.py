"""StyleGAN2: modulation, demodulation, noise, styles, minibatch deviation, sizes, and both methods as commands."""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.cli.main import run as command
from stabletrain.errors import ConfigError
from stabletrain.gan.config import GanConfig
from stabletrain.gan.networks import NETWORKS, NetworkOptions
from stabletrain.gan.networks.stylegan2 import (
    StyledConvolution,
    channels,
    check_stylegan2,
    minibatch_deviation,
    modulated_convolution,
)
from stabletrain.gan.resolution import resolve
from stabletrain.training.devices import batch_sharding, make_mesh, replicated
from tests.gan.cases import Context, leaves, run, tiny

SPEC = NETWORKS["stylegan2"]
KEY = jax.random.key(0)


def options(size: int = 8, **values: Any) -> NetworkOptions:
    chosen: dict[str, Any] = {
        "num_classes": 3, "z_dim": 8, "generator_width": 8, "discriminator_width": 8, "depth": 2,
        "sample_shape": (size, size, 3),
    }  # fmt: skip
    return NetworkOptions(**{**chosen, **values})


def count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def started(module: Any, *inputs: Any) -> Any:
    """A generator's variables; compiled, as hundreds of single operations take longer."""
    return jax.jit(lambda: module.init({"params": KEY, "noise": KEY}, *inputs, train=False))()


# --- modulated convolution --------------------------------------------------------------------------------------------


def arrays(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, 5, 5, 4)), rng.normal(size=(size, size, 4, 6)), 1.0 + 0.5 * rng.normal(size=(3, 4))


def kernels_by_hand(kernel: np.ndarray, styles: np.ndarray, demodulate: bool) -> np.ndarray:
    """[B, k, k, I, O]: Eq. 1 and 3 of the paper as they are printed, a kernel for each sample."""
    own = styles[:, None, None, :, None] * kernel
    if demodulate:
        own = own / np.sqrt((own**2).sum(axis=(1, 2, 3), keepdims=True) + 1e-8)
    return own


@pytest.mark.torch
@pytest.mark.parametrize(("size", "demodulate"), [(3, True), (3, False), (1, False)])
def test_modulated_convolution_is_a_convolution_with_each_samples_own_kernel(size, demodulate):
    torch = pytest.importorskip("torch")
    images, kernel, styles = arrays(size)
    own = torch.tensor(kernels_by_hand(kernel, styles, demodulate).transpose(0, 4, 3, 1, 2))  # [B, O, I, k, k]
    expected = np.stack([
        torch.nn.functional.conv2d(torch.tensor(image.transpose(2, 0, 1))[None], weights, padding=size // 2)[0]
        .numpy().transpose(1, 2, 0) for image, weights in zip(images, own)
    ])  # fmt: skip
    with jax.enable_x64(True):
        found = modulated_convolution(*map(jnp.asarray, (images, kernel, styles)), demodulate=demodulate)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_doubling_convolution_is_zeros_between_pixels_then_the_kernel_then_the_filter():
    """On the infinite plane of zeros around the image, whatever the order of kernel and filter; then cut to 2H."""
    signal = pytest.importorskip("scipy.signal")
    images, kernel, styles = arrays(3)
    own = kernels_by_hand(kernel, styles, demodulate=True)
    taps = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 16.0  # of sum 4
    expected = np.zeros((3, 10, 10, 6))
    for b, i, o in np.ndindex(3, 4, 6):
        wide = np.zeros((9, 9))
        wide[::2, ::2] = images[b, :, :, i]
        flipped = own[b, ::-1, ::-1, i, o]  # a network's convolution is a correlation
        whole = signal.convolve2d(signal.convolve2d(wide, taps), flipped)  # 9 + 3 + 2 = 14 pixels
        expected[b, :, :, o] += whole[2:12, 2:12]
    with jax.enable_x64(True):
        found = modulated_convolution(*map(jnp.asarray, (images, kernel, styles)), up=True)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_demodulated_outputs_have_unit_variance_whatever_the_styles():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 32, 32, 16)).astype(np.float32)
    kernel = 7.0 * rng.normal(size=(3, 3, 16, 16)).astype(np.float32)
    styles = np.exp(rng.normal(size=(4, 16))).astype(np.float32)
    found = np.asarray(modulated_convolution(*map(jnp.asarray, (images, kernel, styles))))[:, 1:-1, 1:-1]
    # 900 pixels x 16 channels of a sample, neighbours correlated: about 3 % deviation of the variance.
    np.testing.assert_allclose(found.var(axis=(1, 2, 3)), 1.0, atol=0.12)
    plain = np.asarray(modulated_convolution(*map(jnp.asarray, (images, kernel, styles)), demodulate=False))
    assert plain.var() > 100


def test_a_sample_is_made_of_its_own_style_and_place_in_the_batch_does_not_matter():
    module = SPEC.generator(options())
    z, labels = jax.random.normal(KEY, (5, 8)), jnp.array([0, 1, 2, 0, 1])
    variables = started(module, z, labels)
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)  # noise strengths and biases that matter

    @jax.jit
    def made(z, labels):
        return module.apply(variables, z, labels, train=False, constant_noise=True)

    order = np.array([3, 0, 4, 2, 1])
    np.testing.assert_allclose(made(z[order], labels[order]), made(z, labels)[order], rtol=1e-4, atol=1e-5)  # float32
    other = made(z, labels.at[0].set(2))
    assert np.abs(other[0] - made(z, labels)[0]).max() > 1e-2
    np.testing.assert_allclose(other[1:], made(z, labels)[1:], rtol=1e-4, atol=1e-5)


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_is_of_its_key_starts_without_effect_and_can_be_held_constant():
    layer = StyledConvolution(6)
    images, style = jax.random.normal(KEY, (2, 4, 4, 5)), jnp.ones((2, 3))
    variables = layer.init({"params": KEY, "noise": KEY}, images, style, constant_noise=False)
    strong = {"params": {**variables["params"], "noise_strength": jnp.ones(())}}

    def made(variables, key, constant=False):
        return np.asarray(layer.apply(variables, images, style, constant_noise=constant, rngs={"noise": key}))

    one, two = jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(made(variables, one), made(variables, two))
    np.testing.assert_array_equal(made(strong, one), made(strong, one))
    assert np.abs(made(strong, one) - made(strong, two)).max() > 0.1
    np.testing.assert_array_equal(made(strong, one, constant=True), made(strong, two, constant=True))
    # Of images of zeros nothing but noise is left.
    same: Any = layer.apply(strong, jnp.zeros_like(images), style, constant_noise=True)
    np.testing.assert_array_equal(same[0], same[1])
    np.testing.assert_array_equal(same[..., :1] + jnp.zeros(6), same)  # one number a pixel for all channels
    assert np.asarray(same).std() > 0.1


# --- styles -----------------------------------------------------------------------------------------------------------


def test_mapping_sees_directions_of_latents_and_labels_and_learns_at_a_hundredth():
    module = SPEC.generator(options())
    z, labels = jax.random.normal(KEY, (4, 8)), jnp.array([0, 1, 2, 0])
    variables = started(module, z, labels)

    def styles(z, labels):
        return np.asarray(module.apply(variables, z, labels, train=False, method="styles"))

    found = styles(z, labels)
    assert found.shape == (4, 4, 8)  # 2 log2(8) - 2
    np.testing.assert_array_equal(found, np.repeat(found[:, :1], 4, axis=1))
    np.testing.assert_allclose(styles(3.0 * z, labels), found, rtol=1e-4, atol=1e-5)  # float32
    assert np.abs(styles(z, jnp.array([1, 1, 1, 1]))[0] - found[0]).max() > 1e-3
    # Stored weights are a hundred times as large as those that act, so that Adam's steps act a hundred times less.
    kernel = variables["params"]["mapping_2"]["kernel"]
    assert abs(float(jnp.std(kernel)) - 100) < 30  # of 64 numbers
    moved = jax.tree.map(lambda leaf: leaf, variables)
    moved["params"]["mapping_2"] = {**moved["params"]["mapping_2"], "bias": jnp.ones(8)}
    after = np.asarray(module.apply(moved, z, labels, train=False, method="styles"))
    difference = np.abs(after - found)
    assert 0 < difference.max() <= 0.01 * 2**0.5 * 1.001


def test_styles_are_mixed_from_a_random_place_on_in_training_only():
    module = SPEC.generator(options(16, style_mixing=0.5))
    z, labels = jax.random.normal(KEY, (200, 8)), jnp.zeros(200, jnp.int32)
    variables = started(module, z, labels)

    def styles(train):
        rngs = {"noise": jax.random.key(1)}
        return jax.jit(lambda: module.apply(variables, z, labels, train=train, method="styles", rngs=rngs))()

    plain, mixed = np.asarray(styles(False)), np.asarray(styles(True))
    np.testing.assert_array_equal(plain, np.repeat(plain[:, :1], 6, axis=1))
    own = (mixed == plain).all(axis=2)  # (200, 6)
    assert own[:, 0].all()  # the first place is never another's
    starts = own.sum(axis=1)
    for sample, start in zip(own, starts):
        assert sample[:start].all()
        assert not sample[start:].any()
    assert set(starts) == {1, 2, 3, 4, 5, 6}
    assert 0.35 < np.mean(starts < 6) < 0.65  # 4 deviations of 200 coins
    others = mixed[starts < 6][:, -1]
    assert len(np.unique(others, axis=0)) == len(others)  # each from a latent of its own


def test_styles_that_are_given_are_what_images_are_made_of():
    module = SPEC.generator(options())
    z, labels = jax.random.normal(KEY, (2, 8)), jnp.array([0, 1])
    variables = started(module, z, labels)

    @jax.jit
    def found():
        how = {"train": True, "rngs": {"noise": KEY}}
        styles = module.apply(variables, z, labels, **how, method="styles")
        made, pull_back = jax.vjp(lambda s: module.apply(variables, s, **how, method="synthesize"), styles)
        return made, module.apply(variables, z, labels, **how), pull_back(made)[0]

    made, joined, gradient = found()
    np.testing.assert_allclose(made, joined, rtol=1e-5, atol=1e-6)  # float32, two programs
    assert np.all(np.abs(gradient).sum(axis=2) > 0)  # every place acts on the image


# --- the discriminator ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "group", "size"), [(8, 4, 4), (6, 4, 3), (3, 32, 3), (1, 4, 1)])
def test_minibatch_deviation_is_numpys_of_neighbours(batch, group, size):
    images = np.random.default_rng(0).normal(size=(batch, 4, 4, 5)).astype(np.float32)
    found = np.asarray(minibatch_deviation(jnp.asarray(images), group))
    np.testing.assert_array_equal(found[..., :5], images)
    for start in range(0, batch, size):
        wanted = np.sqrt(images[start : start + size].var(axis=0) + 1e-8).mean()
        np.testing.assert_allclose(found[start : start + size, :, :, 5], wanted, rtol=1e-5)  # float32


def test_order_within_a_group_does_not_matter_and_other_groups_do_not():
    module = SPEC.discriminator(options(discriminator_shortcuts=True))
    images = jax.random.normal(KEY, (64, 8, 8, 3))  # two groups of 32
    variables = jax.jit(lambda: module.init({"params": KEY}, images, train=False))()
    judge = jax.jit(lambda x: module.apply(variables, x, train=False))
    found = judge(images)
    order = np.concatenate([np.random.default_rng(0).permutation(32), 32 + np.random.default_rng(1).permutation(32)])
    np.testing.assert_allclose(judge(images[order]), found[order], rtol=1e-4, atol=1e-5)  # float32
    changed = judge(images.at[0].multiply(9.0))
    assert np.all(np.abs(changed[1:32] - found[1:32]).max(axis=1) > 0)
    np.testing.assert_allclose(changed[32:], found[32:], rtol=1e-4, atol=1e-5)


# --- sizes ------------------------------------------------------------------------------------------------------------


def shapes(chosen: NetworkOptions) -> tuple[Any, Any, Any, Any]:
    """Parameters of both networks, samples and features, as shapes."""
    generator, discriminator = SPEC.generator(chosen), SPEC.discriminator(chosen)
    z, labels = jnp.zeros((4, chosen.z_dim)), jnp.zeros((4,), jnp.int32)
    rngs = {"params": KEY, "noise": KEY}

    def everything():
        of_generator = generator.init(rngs, z, labels, train=True)
        samples = generator.apply(of_generator, z, labels, train=True, rngs={"noise": KEY})
        of_discriminator = discriminator.init({"params": KEY}, samples, train=True)
        return of_generator, of_discriminator, samples, discriminator.apply(of_discriminator, samples, train=True)

    return jax.eval_shape(everything)


def generator_count(size: int, width: int, z: int, depth: int, classes: int, colours: int) -> int:
    """By hand: mapping, the learned start, and of each layer style, kernel, bias and, of convolutions, noise."""
    total = (classes * z + z if classes else 0) + depth * (z * z + z) + (z * z if classes else 0)
    total += 16 * width
    here, pixels = width, 4

    def layer(inputs, outputs, taps, noise):
        return (z * inputs + inputs) + taps * inputs * outputs + outputs + noise

    total += layer(here, here, 9, 1) + layer(here, colours, 1, 0)
    while pixels < size:
        pixels *= 2
        after = min(64 * width // pixels, width)
        total += layer(here, after, 9, 1) + layer(after, after, 9, 1) + layer(after, colours, 1, 0)
        here = after
    return total


def discriminator_count(size: int, width: int, colours: int, shortcuts: bool) -> int:
    pixels, here = size, min(64 * width // size, width)
    total = colours * here + here
    while pixels > 4:
        pixels //= 2
        after = min(64 * width // pixels, width)
        total += 9 * here * here + here + 9 * here * after + after + (here * after if shortcuts else 0)
        here = after
    return total + 9 * (here + 1) * here + here + 16 * here * here + here


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256])
def test_shapes_and_numbers_of_parameters_at_every_size(size):
    chosen = options(size, z_dim=512, generator_width=512, discriminator_width=512, **SPEC.sized(size))
    assert chosen.discriminator_shortcuts == (size > 32)
    check_stylegan2(chosen)
    generator, discriminator, samples, features = shapes(chosen)
    assert samples.shape == (4, size, size, 3)
    assert features.shape == (4, 512)
    assert count(generator["params"]) == generator_count(size, 512, 512, 2, 3, 3)
    assert count(discriminator["params"]) == discriminator_count(size, 512, 3, size > 32)
    assert channels(size, 512) == min(32768 // size, 512)  # the paper's plan


def test_options_change_the_networks():
    generator, discriminator, samples, _ = shapes(options(16, depth=4, num_classes=0, sample_shape=(16, 16, 1)))
    assert samples.shape == (4, 16, 16, 1)
    assert count(generator["params"]) == generator_count(16, 8, 8, 4, 0, 1)
    assert "label" not in generator["params"]
    assert "mapping_4" in generator["params"]
    plain = shapes(options(16, discriminator_shortcuts=False))[1]
    assert count(discriminator["params"]) == discriminator_count(16, 8, 1, True)
    assert count(plain["params"]) == discriminator_count(16, 8, 3, False)


def test_sizes_and_widths_that_do_not_go_are_refused():
    with pytest.raises(ConfigError, match="use --image-size 32"):
        check_stylegan2(options(28))
    with pytest.raises(ConfigError, match="square images"):
        check_stylegan2(options(sample_shape=(16, 32, 3)))
    with pytest.raises(ConfigError, match="is divided by 4; use 12"):
        check_stylegan2(options(256, generator_width=11))
    check_stylegan2(options(64, generator_width=11))


def test_low_precision_keeps_parameters_and_results_in_float32():
    chosen = options(dtype=jnp.bfloat16)
    generator, discriminator, samples, features = shapes(chosen)
    assert {leaf.dtype for leaf in jax.tree.leaves((generator, discriminator))} == {jnp.dtype("float32")}
    assert samples.dtype == features.dtype == jnp.float32


def test_signals_start_at_unit_scale():
    """The start of the equalised layers: images of about unit deviation, features neither vanishing nor exploding."""
    chosen = options(16, generator_width=32, discriminator_width=32, z_dim=32)
    generator, discriminator = SPEC.generator(chosen), SPEC.discriminator(chosen)

    @jax.jit
    def sizes():
        z, labels, rngs = jax.random.normal(KEY, (16, 32)), jnp.arange(16) % 3, {"params": KEY, "noise": KEY}
        samples, _ = generator.init_with_output(rngs, z, labels, train=False)
        features, _ = discriminator.init_with_output(rngs, jax.random.normal(KEY, samples.shape), train=False)
        return jnp.std(samples), jnp.sqrt(jnp.mean(features**2))

    for size in sizes():
        assert 0.3 < float(size) < 3


# --- training ---------------------------------------------------------------------------------------------------------


def test_number_of_devices_does_not_matter():
    """Noise, mixing and the groups of the minibatch deviation are of the whole batch: value and gradient."""
    chosen = options(style_mixing=0.5)
    generator, discriminator = SPEC.generator(chosen), SPEC.discriminator(chosen)
    z, labels = jax.random.normal(KEY, (12, 8)), jnp.arange(12) % 3
    variables = jax.tree.map(lambda leaf: leaf + 0.1, started(generator, z, labels))
    judge = jax.jit(lambda: discriminator.init({"params": KEY}, jnp.zeros((2, 8, 8, 3)), train=False))()

    def loss(variables, z, labels):
        samples = generator.apply(variables, z, labels, train=True, rngs={"noise": KEY})
        return jnp.sum(jnp.tanh(discriminator.apply(judge, samples, train=True)))

    found = []
    for devices in (1, 2):
        mesh = make_mesh(devices, 12)
        layout = (replicated(mesh), batch_sharding(mesh), batch_sharding(mesh))
        found.append(jax.jit(jax.value_and_grad(loss), in_shardings=layout)(variables, z, labels))
    for one, two in zip(leaves(found[0]), leaves(found[1]), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)  # float32 sums in another order


def test_presets_are_published_settings():
    """Kang et al. 2021's released configurations for CIFAR-10, CUB-200 and ImageNet at 128 pixels."""
    config = resolve(GanConfig(method="stylegan2", dataset="cifar10"))
    assert (config.network, config.z_dim, config.depth, config.generator_width) == ("stylegan2", 512, 2, 512)
    assert (config.discriminator_shortcuts, config.style_mixing, config.path_length) == (False, 0.0, 0.0)
    assert (config.conditioning, config.adversarial, config.d_steps) == ("sg2-projection", "non-saturating", 1)
    assert (config.r1_weight, config.r1_every, config.ema_half_life) == (0.01, 16, 500)
    birds = resolve(GanConfig(method="stylegan2-d2dce", dataset="cub200"))
    assert (birds.discriminator_shortcuts, birds.style_mixing, birds.path_length) == (True, 0.9, 2.0)
    assert (birds.path_length_every, birds.r1_weight, birds.ema_half_life) == (4, 0.2048, 20)
    assert (birds.class_weight, birds.positive_margin, birds.temperature) == (0.25, 0.95, 0.25)
    assert (birds.embedding_dim, birds.batch_size, birds.d_steps, birds.steps) == (1024, 64, 2, 100_000)
    imagenet = resolve(GanConfig(method="stylegan2-d2dce", dataset="imagenet128"))
    own = resolve(GanConfig(method="stylegan2-d2dce", dataset="imagenet", data="pictures", image_size=128))
    assert own.embedding_dim == imagenet.embedding_dim
    assert (imagenet.class_weight, imagenet.positive_margin, imagenet.temperature) == (0.5, 0.9, 0.25)
    assert (imagenet.embedding_dim, imagenet.batch_size, imagenet.d_steps) == (2048, 256, 1)
    given = resolve(GanConfig(method="stylegan2-d2dce", dataset="cub200", style_mixing=0.5, network="stylegan2"))
    assert given.style_mixing == 0.5


@pytest.mark.slow
def test_truncation_moves_styles_to_their_mean(tmp_path):
    """A latent's length has no effect on a style, so that nothing but the style can be truncated."""
    experiment = tiny(method="stylegan2", network="stylegan2", embedding_dim=None)
    model = experiment.model(jax.jit(experiment.init)(KEY), "raw")
    labels = np.arange(20) % 10

    def made(truncation):
        context = Context(tmp_path / str(truncation))
        return model.samples(labels, 20, seed=3, context=context, truncation=truncation)

    whole, half, none = made(0.0), made(0.5), made(1e-4)
    np.testing.assert_allclose(made(1.0), whole, rtol=1e-4, atol=1e-5)  # float32
    assert none.std(axis=0).mean() < 1e-3 < half.std(axis=0).mean() < whole.std(axis=0).mean()


@pytest.mark.slow
def test_r1_and_path_length_come_every_so_often_and_every_parameter_moves():
    values: dict[str, Any] = {
        "method": "stylegan2-d2dce", "embedding_dim": 4, "r1_every": 2, "path_length": 2.0, "path_length_every": 2,
        "style_mixing": 0.9,
    }  # fmt: skip
    experiment = tiny(**values)
    fresh = jax.tree.map(np.asarray, experiment.init(jax.random.key(experiment.config.seed)))
    state, rows = run(experiment, [3], 3)
    for name in ("train/r1_term", "train/path_length_term"):
        first, second, third = (float(row[name]) for row in rows)
        assert first > 0
        assert second == 0
        assert third > 0
    assert float(state.path_length) > 0
    assert all(np.isfinite(leaf).all() for leaf in leaves((state.generator.params, state.critic.params)))
    for before, after in ((fresh.generator, state.generator), (fresh.critic, state.critic)):
        moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.params, after.params)
        assert all(jax.tree.leaves(moved)), moved


@pytest.mark.slow
def test_a_run_is_whole_and_its_samples_can_be_truncated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "gan", "--method", "stylegan2-d2dce", "--steps", "4", "--batch-size", "8", "--generator-width", "8",
        "--discriminator-width", "8", "--z-dim", "8", "--eval-samples", "0", "--sampling-batch", "20", "--devices", "1",
        "--out", "run", "--json", "--quiet",
    ]  # fmt: skip
    assert command(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["status"] == "done"
    assert document["step"] == 4
    assert math.isfinite(document["metrics"]["train/loss_generator"])
    assert (tmp_path / "run" / "samples" / "00000004.png").is_file()
    sampling = ["sample", "run", "--num", "4", "--label", "3", "--truncation", "0.5", "--out", "samples"]
    assert command([*sampling, "--json", "--quiet"]) == 0
    assert (tmp_path / "samples" / "grid.png").is_file()
