"""The diffusion experiment: its step, its exactness over devices and grouping, its probe, evaluation and samples."""

from __future__ import annotations

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from stabletrain.data.catalogue import CATALOGUE
from stabletrain.data.spec import DataSpec
from stabletrain.diffusion import experiment as experiment_module
from stabletrain.diffusion import sampling
from stabletrain.diffusion.config import DiffusionConfig, resolve
from stabletrain.diffusion.experiment import DiffusionExperiment, learning_rate_at, optimizer_for
from stabletrain.diffusion.family import FAMILY, SampleOptions
from stabletrain.diffusion.sampling import grid_labels, sample_settings, shown_classes
from stabletrain.errors import ConfigError, DataError, NotFiniteError
from stabletrain.metrics import scoring
from stabletrain.training.config import make_config
from stabletrain.training.devices import compile_step, make_mesh, replicated

TINY = {
    "mlp": {"backbone": "mlp", "width": 16, "depth": 2, "class_conditional": True, "ema_decay": 0.9},
    "uvit": {"backbone": "uvit", "width": 16, "depth": 2, "heads": 2, "patch_size": 4},
    "unet": {"backbone": "unet", "width": 8, "depth": 1, "channel_multipliers": (1,)},
}
"""Networks that compile in a second or two; the mlp where the network does not matter."""


def tiny(backbone: str = "mlp", *, devices: int = 1, **values) -> DiffusionExperiment:
    common = {"batch_size": 8, "steps": 20, "warmup_steps": 0, "sampling_steps": 3, "eval_pairs": 16, "eval_samples": 0}
    config = resolve(make_config(DiffusionConfig, {**common, **TINY[backbone], **values}))
    return DiffusionExperiment(config, mesh=make_mesh(devices, config.batch_size))


def run(experiment: DiffusionExperiment, groups: list[int], inner_steps: int, state=None, position: int = 0):
    """The state and all rows after groups of steps."""
    if state is None:
        state = experiment.init(jax.random.key(experiment.config.seed))
    state = jax.device_put(state, replicated(experiment.mesh), may_alias=False)
    program = compile_step(experiment, experiment.mesh, inner_steps)
    rows = []
    for count in groups:
        state, metrics = program(state, [experiment.batch(position + i) for i in range(count)])
        rows += metrics.rows()
        position += count
    return state, rows


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_equal(first, second) -> None:
    """Bitwise."""
    for a, b in zip(leaves(first), leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


class Context:
    """An evaluation's context that counts its ticks and, if asked, interrupts at one."""

    def __init__(self, scratch, stop_at: int | None = None) -> None:
        self.scratch, self.ticks, self.stop_at = scratch, 0, stop_at

    def tick(self, label: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        self.ticks += 1
        if self.ticks == self.stop_at:
            raise KeyboardInterrupt


# --- the step ---------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss():
    """From about 1 (the variance of the noise) to well below it on real digits, within 150 steps."""
    experiment = tiny(width=64, steps=150, batch_size=32, learning_rate=3e-3, skip_scaling="cs")
    _, rows = run(experiment, [10] * 15, 10)
    losses = [row["train/loss"] for row in rows]
    assert np.mean(losses[-30:]) < 0.75 * np.mean(losses[:10])


@pytest.mark.parametrize("backbone", TINY)
def test_a_step_reports_finite_numbers_and_moves_the_parameters(backbone):
    experiment = tiny(backbone, learning_rate=1e-3)  # as below: the compiled program is found in the cache
    before = experiment.init(jax.random.key(0))
    after, rows = run(experiment, [1, 1], 1)
    assert experiment.parameter_count == sum(leaf.size for leaf in leaves(before.params))
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves(after.params))
    assert any(np.any(a != b) for a, b in zip(leaves(before.params), leaves(after.params)))
    assert {"train/loss", "train/learning_rate", "stability/grad_norm"} <= rows[0].keys()


@pytest.mark.parametrize(
    ("backbone", "dataset", "count"),
    [("uvit", "cifar10", 44_255_328), ("uvit", "celeba64", 44_292_228), ("unet", "cifar10", 35_746_307)],
)
def test_the_paper_s_data_get_the_paper_s_networks_to_the_last_parameter(backbone, dataset, count):
    """Published U-ViT-S/2, U-ViT-S/4 and the DDPM UNet; built without data."""
    info = CATALOGUE[dataset]
    spec = DataSpec(dataset, info.image_size, 3, info.num_classes, (), "", 1, 1)
    config = resolve(
        make_config(DiffusionConfig, {"backbone": backbone, "dataset": dataset, "class_conditional": False})
    )
    experiment = FAMILY.build(config, mesh=make_mesh(1, config.batch_size), data_spec=spec)
    assert experiment.parameter_count == count


def test_the_first_step_of_a_warm_up_changes_nothing():
    """The rate starts at 0, as in the official code."""
    experiment = tiny(warmup_steps=4)
    before = leaves(experiment.init(jax.random.key(0)).params)
    after, rows = run(experiment, [1], 1)
    assert rows[0]["train/learning_rate"] == 0
    for a, b in zip(before, leaves(after.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_batches_are_a_function_of_seed_and_position():
    one, other = tiny(), tiny()
    one.batch(3)
    assert_equal(one.batch(7), other.batch(7))
    assert np.any(one.batch(7)["index"] != tiny(seed=1).batch(7)["index"])


@pytest.mark.usefixtures("optimised")
def test_resident_and_streamed_images_give_the_same_run(monkeypatch):
    resident, rows = run(tiny(), [1, 1, 1], 1)
    monkeypatch.setattr(experiment_module, "RESIDENT_BYTES", 0)
    streaming = tiny()
    assert "images" not in streaming.resident
    assert streaming.batch(0)["image"].dtype == np.uint8
    streamed, streamed_rows = run(streaming, [1, 1, 1], 1)
    assert_equal(resident, streamed)
    assert rows == streamed_rows


def test_grouping_of_steps_does_not_change_a_bit():
    """2 + 1 + 3 steps in one compiled loop equal 3 + 3, also when the state went to the host in between."""
    whole, rows = run(tiny(), [3, 3], 3)
    parts, first = run(tiny(), [2, 1], 3)
    resumed = jax.tree.map(np.asarray, parts)
    parts, second = run(tiny(), [3], 3, state=resumed, position=3)
    assert_equal(whole, parts)
    assert rows == first + second


@pytest.mark.parametrize(("backbone", "counts"), [("mlp", (2, 4)), ("uvit", (2,)), ("unet", (4,))])
def test_loss_gradient_and_parameters_do_not_depend_on_the_number_of_devices(backbone, counts):
    """Sums over the batch are taken in another order: float32 rounding (1e-7), after three steps of Adam.

    Adam divides by the gradient's own size, so a gradient that is zero up to rounding moves its parameter by up to
    the learning rate either way; hence the absolute tolerance of two updates, and a check on the mean.
    """
    one, rows = run(tiny(backbone, learning_rate=1e-3), [1] * 3, 1)
    for devices in counts:
        many, other_rows = run(tiny(backbone, devices=devices, learning_rate=1e-3), [1] * 3, 1)
        for a, b in zip(rows, other_rows):
            assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
            assert a["stability/grad_norm"] == pytest.approx(b["stability/grad_norm"], rel=1e-4)
        for a, b in zip(leaves(one.params), leaves(many.params), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3)
            assert np.mean(np.abs(a - b)) < 1e-5


def test_average_follows_the_updates():
    experiment = tiny(ema_decay=0.5, ema_ramp=False)
    start = leaves(experiment.init(jax.random.key(0)).params)
    state, _ = run(experiment, [1], 1)
    for a, p, e in zip(start, leaves(state.params), leaves(state.ema), strict=True):
        np.testing.assert_allclose(e, (a + p) / 2, atol=1e-6)
    assert tiny(ema_decay=0.0).init(jax.random.key(0)).ema is None


def test_learning_rate_schedules_have_their_closed_forms():
    def rates(decay):
        config = resolve(
            make_config(DiffusionConfig, {"learning_rate": 2.0, "warmup_steps": 10, "steps": 110, "lr_decay": decay})
        )
        return np.array([float(learning_rate_at(config, jnp.uint32(n))) for n in (0, 5, 10, 60, 85, 110)])

    np.testing.assert_allclose(rates("constant"), [0, 1, 2, 2, 2, 2], atol=1e-6)
    np.testing.assert_allclose(rates("linear"), [0, 1, 2, 1, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(rates("cosine"), [0, 1, 2, 1, 1 - np.sqrt(0.5), 0], atol=1e-6)


def test_optimiser_is_adamw_with_decay_on_everything():
    config = tiny(beta1=0.8, beta2=0.9, weight_decay=0.1, gradient_clip=0.0).config
    ours, reference = optimizer_for(config, 0.01), optax.adamw(0.01, b1=0.8, b2=0.9, eps=1e-8, weight_decay=0.1)
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([3.0])}
    states = [ours.init(params), reference.init(params)]
    for scale in (1.0, -0.5, 3.0):
        gradients = jax.tree.map(lambda leaf, s=scale: s * leaf, params)
        updates = []
        for i, optimizer in enumerate((ours, reference)):
            update, states[i] = optimizer.update(gradients, states[i], params)
            updates.append(update)
        for a, b in zip(leaves(updates[0]), leaves(updates[1])):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_gradients_are_clipped_by_their_global_norm():
    """With plain momentum-free Adam the first update is sign-like; so look at Adam's first moment instead."""
    config = tiny(beta1=0.0, gradient_clip=1.0).config
    optimizer = optimizer_for(config, 1.0)
    gradients = {"w": jnp.array([3.0, 4.0])}
    _, state = optimizer.update(gradients, optimizer.init(gradients), gradients)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["w"], [0.6, 0.8], rtol=1e-6)


# --- examples ---------------------------------------------------------------------------------------------------------


def examples(experiment: DiffusionExperiment, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed))
    batch = experiment.batch(0)
    images, labels = experiment._examples(batch, *keys)
    return batch["index"], np.asarray(images), None if labels is None else np.asarray(labels)


def test_examples_are_the_training_images_in_plus_minus_one_with_their_labels():
    experiment = tiny(label_dropout=0.0)
    index, images, labels = examples(experiment)
    raw = experiment.dataset.train
    np.testing.assert_allclose(images, raw.images.read(index) / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(labels, raw.labels[index])


def test_flips_mirror_about_half_of_the_images_left_to_right(tmp_path):
    """On the user's own data a flip is allowed, whatever they are called."""
    rng = np.random.default_rng(0)
    path = tmp_path / "own.npz"
    np.savez(path, train_x=rng.integers(0, 256, (64, 8, 8, 3), np.uint8), test_x=np.zeros((2, 8, 8, 3), np.uint8))
    experiment = tiny(data=str(path), horizontal_flip=True, batch_size=64, class_conditional=False)
    index, images, labels = examples(experiment)
    raw = experiment.dataset.train.images.read(index) / 127.5 - 1
    flipped = [np.allclose(a, b[:, ::-1], atol=1e-6) for a, b in zip(images, raw)]
    straight = [np.allclose(a, b, atol=1e-6) for a, b in zip(images, raw)]
    assert np.array_equal(flipped, np.logical_not(straight))
    assert 16 <= sum(flipped) <= 48  # four standard deviations around 32
    assert labels is None


def test_labels_are_hidden_at_the_asked_rate():
    experiment = tiny(label_dropout=0.25, batch_size=1024)
    index, _, labels = examples(experiment)
    hidden = labels == 10
    assert abs(hidden.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 1024)
    np.testing.assert_array_equal(labels[~hidden], experiment.dataset.train.labels[index][~hidden])


# --- watching and evaluation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", TINY)
def test_probe_names_every_skip_and_repeats_itself(backbone):
    experiment = tiny(backbone, skip_scaling="ls-per-skip")
    state = experiment.init(jax.random.key(0))
    first, second = experiment.probe(state), experiment.probe(state)
    count = experiment.network.num_skips
    for i in range(count):
        assert f"stability/feature_norm/skip_{i}" in first
        assert 0 < float(first[f"stability/gate_mean/skip_{i}"]) < 1
    norms = [float(first[f"stability/feature_norm/skip_{i}"]) for i in range(count)]
    assert float(first["stability/feature_norm/sum"]) == pytest.approx(sum(norms), rel=1e-5)
    assert "stability/feature_norm/middle" in first
    assert {name: float(value) for name, value in first.items()} == {n: float(v) for n, v in second.items()}


def test_fixed_pairs_cover_images_and_times_evenly_and_never_change():
    experiment = tiny(eval_pairs=400)
    fixed, again = experiment.held_out_pairs, tiny(eval_pairs=400).held_out_pairs
    assert_equal(fixed, again)
    assert len(experiment.dataset.test) < 400, "some images come twice, at other times"
    np.testing.assert_array_equal(np.sort(fixed["times"]), (np.arange(400, dtype=np.float32) + 0.5) / 400)
    correlation = np.corrcoef(np.arange(400), fixed["times"])[0, 1]
    assert abs(correlation) < 0.2  # no image order in the times
    assert abs(fixed["noise"].mean()) < 4 / np.sqrt(fixed["noise"].size)


def test_held_out_loss_of_a_network_that_says_nothing_is_the_noise_s_mean_square(tmp_path):
    """The UNet's last convolution starts at zero, so its loss is known exactly."""
    experiment = tiny("unet", eval_pairs=16, ema_decay=0.0)
    state = experiment.init(jax.random.key(0))
    loss = experiment._held_out_loss(state.params, "loss", Context(tmp_path))
    assert loss == pytest.approx(np.mean(experiment.held_out_pairs["noise"].astype(np.float64) ** 2), rel=1e-5)


def test_evaluation_gives_losses_and_a_grid_with_a_row_per_class(tmp_path):
    experiment = tiny()
    context = Context(tmp_path)
    evaluation = experiment.evaluate(experiment.init(jax.random.key(0)), 12, context)
    assert set(evaluation.scalars) == {"eval/loss_test_ema", "eval/loss_test_raw"}
    assert set(evaluation.files) == {"samples/00000012.png"}
    picture = Image.open(io.BytesIO(evaluation.files["samples/00000012.png"]))
    assert picture.height == 10 * 34 + 2  # ten rows of 8 pixels enlarged to 32, with margins of 2
    assert context.ticks >= 4


def test_evaluation_asks_the_dataset_s_classifier(tmp_path, monkeypatch):
    """A classifier that answers 3 to everything agrees with a tenth of the labels."""

    class Threes:
        name = "digits-classifier"

        def logits(self, images):
            assert images.dtype == np.uint8
            return np.eye(10)[np.full(len(images), 3)]

    monkeypatch.setattr(scoring, "dataset_classifier", lambda dataset, seed, context: Threes())
    experiment = tiny(eval_samples=40, scores=())
    scalars = experiment.evaluate(experiment.init(jax.random.key(0)), 0, Context(tmp_path)).scalars
    assert scalars["eval/label_agreement_40_digits-classifier_ema"] == 0.1


def test_samples_that_nothing_could_judge_are_refused_before_training(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "mine.npz", train_x=images)
    with pytest.raises(DataError, match="no labels, so no classifier"):
        tiny(data=str(tmp_path / "mine.npz"), eval_samples=20, class_conditional=False)
    with pytest.raises(DataError, match="is not a file"):
        tiny(eval_samples=20, inception=str(tmp_path / "weights.pth"))


def test_the_user_s_files_under_a_known_name_are_not_resized_unasked(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "mine.npz", train_x=images, train_y=np.arange(30) % 10)
    with pytest.raises(DataError, match="8x8, but cifar10 has 32x32"):
        tiny(dataset="cifar10", data=str(tmp_path / "mine.npz"), image_size=0)


def test_an_interrupted_evaluation_keeps_what_it_has_made(tmp_path, monkeypatch):
    experiment = tiny(sampling_batch=20)
    state = experiment.init(jax.random.key(0))
    uninterrupted = experiment.evaluate(state, 0, Context(tmp_path / "a"))
    ticks = Context(tmp_path / "b")
    experiment.evaluate(state, 0, ticks)

    scratch = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        experiment.evaluate(state, 0, Context(scratch, stop_at=ticks.ticks - 2))
    kept = sorted(scratch.glob("*.npy"))
    assert len(kept) >= 2
    made = []
    original = sampling._save
    monkeypatch.setattr(sampling, "_save", lambda path, images: (made.append(path), original(path, images)))
    finished = experiment.evaluate(state, 0, Context(scratch))
    assert not set(made) & set(kept)
    assert finished == uninterrupted


def test_grid_shows_all_or_twenty_classes():
    np.testing.assert_array_equal(shown_classes(10), np.arange(10))
    assert len(shown_classes(1000)) == 20
    assert (shown_classes(1000)[0], shown_classes(1000)[-1]) == (0, 999)
    assert grid_labels(10).tolist()[:11] == [0] * 10 + [1]
    assert len(grid_labels(0)) == 100


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled():
    """An experiment built without any data, and a state for it."""
    trained = tiny(skip_scaling="cs")
    experiment = FAMILY.build(trained.config, mesh=trained.mesh, data_spec=trained.data_spec.to_dict())
    assert experiment.dataset is None
    return experiment, trained.init(jax.random.key(0))


def draw(sampled, tmp_path, **options) -> tuple[dict[str, bytes], np.ndarray]:
    experiment, state = sampled
    files = FAMILY.sample(experiment, state, SampleOptions(**options), Context(tmp_path / "scratch"))
    return files, np.load(io.BytesIO(files["samples.npz"]))["images"]


def test_samples_are_a_grid_single_images_and_an_archive(sampled, tmp_path):
    files, images = draw(sampled, tmp_path, num=12)
    assert images.shape == (12, 8, 8, 1)
    assert set(files) == {"grid.png", "samples.npz", *(f"{i:02d}-{i % 10}.png" for i in range(12))}
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(files["07-7.png"]))), images[7, ..., 0])


def test_samples_do_not_depend_on_how_many_are_made(sampled, tmp_path):
    _, few = draw(sampled, tmp_path / "a", num=3, label="4")
    _, many = draw(sampled, tmp_path / "b", num=7, label="4")
    # another chunk would be another program; the same chunk size makes even the bits equal
    np.testing.assert_array_equal(few, many[:3])
    assert np.any(few[0] != few[1])


def test_labels_seeds_weights_guidance_and_skips_change_the_samples(sampled, tmp_path):
    experiment, state = sampled
    other = state.replace(params=jax.tree.map(lambda leaf: 1.5 * leaf, state.params))
    _, base = draw(sampled, tmp_path / "0", num=4, label="4")
    for i, options in enumerate(
        (
            {"label": "5"},
            {"label": "4", "seed": 1},
            {"label": "4", "seed": 2**32 - 1},
            {"label": "4", "guidance": 4.0},
            {"label": "4", "skip_multipliers": (0.0,)},
            {"label": "4", "skip_multipliers": (1.0, 0.5)},
            {"label": "4", "sampler": "euler-maruyama"},
            {"label": "4", "sampling_steps": 2},
            {"label": "4", "ddim_eta": 1.0},
            {"label": "4", "clip_denoised": False},
        )
    ):
        assert np.any(draw(sampled, tmp_path / f"{i + 1}", num=4, **options)[1] != base), options
    assert np.any(draw((experiment, other), tmp_path / "raw", num=4, label="4", weights="raw")[1] != base)
    same = draw(sampled, tmp_path / "ones", num=4, label="4", skip_multipliers=(1.0,))[1]
    assert np.max(np.abs(same.astype(int) - base)) <= 1  # another program may round another way


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"label": "eleven"}, "unknown label 'eleven'"),
        ({"label": "10"}, "unknown label '10'"),
        ({"skip_multipliers": (1.0, 1.0, 1.0)}, "1 or 2 numbers"),
        ({"skip_multipliers": (1.0, float("nan"))}, "takes numbers of float32, not 1.0,nan"),
        ({"skip_multipliers": (1e39,)}, r"takes numbers of float32, not 1e\+39"),
        ({"sampler": "ddpm-large", "ddim_eta": 0.5}, "--ddim-eta does nothing with --sampler ddpm-large"),
        ({"sampler": "heun", "churn": 0.0}, "--churn does nothing with --sampler heun on vp-sde"),
    ],
)
def test_samples_that_cannot_be_made_are_refused(sampled, tmp_path, options, reason):
    with pytest.raises(ConfigError, match=reason):
        draw(sampled, tmp_path, num=1, **options)


def test_the_run_s_sampling_options_hold_unless_others_are_given():
    experiment = tiny(process="edm", sampler="heun", churn=20.0, clip_denoised=False)
    own = experiment.settings()
    assert (own.churn, own.clip, own.eta) == (20.0, False, 0.0)
    assert sample_settings(experiment, SampleOptions()) == own
    for options, changes in (
        ({"churn": 0.0}, {"churn": 0.0}),
        ({"churn": 40.0}, {"churn": 40.0}),
        ({"clip_denoised": True}, {"clip": True}),
        ({"sampler": "ddim", "ddim_eta": 0.5}, {"sampler": "ddim", "churn": 0.0, "eta": 0.5}),
    ):
        assert sample_settings(experiment, SampleOptions(**options)) == dataclasses.replace(own, **changes)
    with pytest.raises(ConfigError, match="--churn does nothing with --sampler ddim on edm"):
        sample_settings(experiment, SampleOptions(sampler="ddim", churn=20.0))


def test_samples_that_are_not_finite_are_counted_and_refused(sampled, tmp_path):
    experiment, state = sampled
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), state.params)
    with pytest.raises(NotFiniteError, match="12 of the first 12 samples"):
        draw((experiment, state.replace(params=broken)), tmp_path, num=12, weights="raw")
    (path,) = [
        path
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
        if leaf.shape[0] == 11  # and "none"
    ]
    partly = jax.tree_util.tree_map_with_path(
        lambda place, leaf: leaf.at[4].set(jnp.nan) if place == path else leaf, state.params
    )
    with pytest.raises(NotFiniteError, match="1 of the first 12 samples"):
        draw((experiment, state.replace(params=partly)), tmp_path, num=12, weights="raw")
    assert not list(tmp_path.rglob("*.npy")), "what is refused is not kept"


def test_an_unconditional_model_refuses_labels_and_guidance(tmp_path):
    experiment = tiny(class_conditional=False, ema_decay=0.0, process="ddpm-linear")
    state = experiment.init(jax.random.key(0))
    for options, reason in (
        ({"label": "3"}, "--label does nothing"),
        ({"guidance": 2.0}, "--guidance does nothing"),
        ({"weights": "ema"}, "no moving average"),
        ({"sampler": "euler-maruyama"}, "needs --process vp-sde"),
        ({"sampling_steps": 2000}, "1000 levels"),
    ):
        with pytest.raises(ConfigError, match=reason):
            draw((experiment, state), tmp_path, num=1, **options)
    files, _ = draw((experiment, state), tmp_path, num=2)
    assert set(files) == {"grid.png", "samples.npz", "0.png", "1.png"}


# --- what the data do not allow ---------------------------------------------------------------------------------------


def test_class_condition_without_labels_is_refused(tmp_path):
    path = tmp_path / "unlabelled.npz"
    np.savez(path, train_x=np.zeros((20, 8, 8), np.uint8))
    with pytest.raises(ConfigError, match="has no labels: use --no-class-conditional"):
        tiny(data=str(path), class_conditional=True)


def test_a_shape_that_the_network_cannot_take_is_refused(tmp_path):
    path = tmp_path / "odd.npz"
    np.savez(path, train_x=np.zeros((20, 9, 9), np.uint8))
    with pytest.raises(ConfigError, match="patch size 4 does not divide"):
        tiny("uvit", data=str(path))
    with pytest.raises(ConfigError, match="not divisible by 2"):
        tiny("unet", data=str(path), channel_multipliers=(1, 2))


def test_bfloat16_keeps_parameters_and_loss_in_float32():
    experiment = tiny(precision="bfloat16")
    state, rows = run(experiment, [1], 1)
    assert {leaf.dtype for leaf in leaves(state.params)} == {np.dtype("float32")}
    exact = run(tiny(), [1], 1)[1]
    assert rows[0]["train/loss"] == pytest.approx(exact[0]["train/loss"], rel=0.02)  # eight bits of mantissa
    assert rows[0]["train/loss"] != exact[0]["train/loss"]
