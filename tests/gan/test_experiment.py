"""The GAN experiment: every part trains, updates are exact, nothing depends on devices or grouping, what is watched."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.errors import ConfigError, NotFiniteError
from stabletrain.gan import experiment as experiment_module
from stabletrain.gan.family import FAMILY, SampleOptions, sample
from stabletrain.gan.images import TRUNCATIONS, great_circle
from stabletrain.gan.indicators import oscillation, share_at_limit, singular_values, slope_backwards, spread
from stabletrain.gan.sampling import GanModel
from stabletrain.gan.state import average_decay_at, learning_rate_at
from stabletrain.training.state import abstract_state, fresh_state, state_hash
from tests.gan.cases import Context, assert_equal, leaves, run, tiny, tiny_config

# --- every part trains ------------------------------------------------------------------------------------------------

PARTS = {
    "reacgan": {},
    "acgan, real and fake": {"method": "acgan", "class_loss_on": "real-and-fake"},
    "normalized, tac": {"method": "acgan-normalized", "auxiliary": "tac"},
    "contragan, adc": {"method": "contragan", "auxiliary": "adc"},
    "sngan, orthogonality": {"method": "sngan", "orthogonality": 1e-4},
    "multi-hinge": {"conditioning": "multi-hinge"},
    "stylegan's projection, r1, lecam": {
        "conditioning": "sg2-projection", "adversarial": "non-saturating", "r1_weight": 1.0, "r1_every": 2,
        "lecam": 0.3, "lecam_start": 1,
    },
    "wgan-gp": {"method": "wgan-gp", "d_steps": 2},
    # At WGAN's own rate a scale of 1 moves by less than float32 tells.
    "wgan": {"method": "wgan", "d_steps": 2, "generator_lr": 1e-2, "discriminator_lr": 1e-2},
    "dragan, bcr, zcr": {
        "method": "lsgan", "network": "mlp", "dragan": 10.0, "bcr_real": 10.0, "bcr_fake": 10.0,
        "zcr_discriminator": 20.0, "zcr_generator": 0.5,
    },
    "diffaug, cr": {"method": "reacgan-diffaug", "cr_weight": 10.0},
    "ada": {"method": "reacgan-ada", "augment_interval": 1, "augment_images": 0.05},
    "apa": {"augmentation": "apa", "adversarial": "non-saturating", "augment_interval": 1, "augment_images": 0.05},
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_every_part_trains(part):
    """Finite, both networks moved, and every parameter of the discriminator has a gradient somewhere."""
    experiment = tiny(**PARTS[part])
    before = experiment.init(jax.random.key(experiment.config.seed))
    before = jax.tree.map(np.asarray, before)
    after, rows = run(experiment, [3], 3)
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves((after.generator.params, after.critic.params)))
    for name in ("generator", "critic"):
        old, new = getattr(before, name).params, getattr(after, name).params
        still = [
            jax.tree_util.keystr(path)
            for path, same in jax.tree_util.tree_leaves_with_path(
                jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), old, new)
            )
            if same
        ]
        # The bias of a Wasserstein critic's score cancels between real and fake, so that it has no gradient.
        assert set(still) <= {"['head_score']['bias']"}, still
    assert all(np.isfinite(value).all() for name, value in rows[-1].items() if name.startswith("train/"))
    assert "train/loss_discriminator" in rows[-1]
    assert "stability/critic/grad_norm" in rows[-1]
    probe = {name: float(value) for name, value in experiment.probe(after).items()}
    assert all(np.isfinite(value) for value in probe.values()), probe
    assert {"stability/feature_norm", "stability/score_gap", "stability/intra_class_diversity"} <= set(probe)


def test_adaptive_probability_moves_by_its_step_and_is_remembered():
    """By the images seen: the released code counts steps, and moves once for each update in such a step."""
    experiment = tiny(method="reacgan-ada", d_steps=2, augment_interval=4, augment_images=0.32, augment_target=-1.0)
    state, rows = run(experiment, [6], 6)
    # Target -1: the sign of real scores is above it, so that each interval of 4 * 8 images, two steps, adds 32 / 320.
    # A row has the mean over a step's two updates, of which the second moves.
    found = [row["train/augment_probability"] for row in rows]
    np.testing.assert_allclose(found, [0, 0.05, 0.1, 0.15, 0.2, 0.25], atol=1e-6)
    assert float(state.augment[0]) == pytest.approx(0.3)


def test_weights_stay_clipped():
    state, _ = run(tiny(method="wgan", weight_clip=0.02), [3], 3)
    assert max(np.abs(leaf).max() for leaf in leaves(state.critic.params)) <= np.float32(0.02)
    assert max(np.abs(leaf).max() for leaf in leaves(state.generator.params)) > 0.02


def test_kernels_alone_can_be_clipped():
    def largest(only_kernels: bool) -> dict[bool, float]:
        config = {"method": "wgan", "weight_clip": 1e-5, "clip_kernels_only": only_kernels, "discriminator_lr": 0.01}
        state, _ = run(tiny(**config), [3], 3)
        found = {True: 0.0, False: 0.0}
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.critic.params):
            kernel = "kernel" in jax.tree_util.keystr(path[-1:])
            found[kernel] = max(found[kernel], float(np.abs(leaf).max()))
        return found

    assert max(largest(False).values()) <= np.float32(1e-5)
    only = largest(True)
    assert only[True] <= np.float32(1e-5)
    assert only[False] > 1e-5


# --- exactness --------------------------------------------------------------------------------------------------------


def test_grouping_and_interruption_do_not_matter():
    experiment = tiny(d_steps=2)
    whole, whole_rows = run(experiment, [4], 4)
    parts, part_rows = run(tiny(d_steps=2), [1, 3], 4)
    assert_equal(whole, parts)
    assert whole_rows == part_rows
    halfway, _ = run(tiny(d_steps=2), [2], 4)
    resumed, _ = run(tiny(d_steps=2), [2], 4, state=halfway, position=2)
    assert state_hash(resumed) == state_hash(whole)


@pytest.mark.parametrize("part", ["reacgan", "wgan-gp"])
def test_number_of_devices_does_not_matter(part):
    """Value and gradient are of the whole batch; only the order of float32 sums differs.

    With Adam's usual epsilon rounding would be all that moves a bias in front of a batch normalisation.
    """
    (one, one_rows), (four, four_rows) = (
        run(tiny(devices=devices, adam_epsilon=1e-2, **PARTS[part]), [2], 2) for devices in (1, 4)
    )
    for a, b in zip(
        leaves((one.generator.params, one.critic.params)), leaves((four.generator.params, four.critic.params))
    ):
        np.testing.assert_allclose(a, b, atol=2e-5)
    for name in ("train/loss_discriminator", "train/loss_generator", "stability/critic/grad_norm"):
        np.testing.assert_allclose(one_rows[0][name], four_rows[0][name], rtol=1e-5)


def test_unrolled_and_scanned_updates_agree(monkeypatch):
    scanned = tiny(method="wgan-gp", d_steps=3)
    unrolled = tiny(method="wgan-gp", d_steps=3)
    monkeypatch.setattr(unrolled, "_unrolled", True)
    for a, b in zip(leaves(run(scanned, [2], 2)[0]), leaves(run(unrolled, [2], 2)[0])):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # two programs of the same sums, float32


def test_all_seeds_share_one_compiled_step():
    """A study of five seeds compiles once, from the cache on the disk: the run's key is an argument."""
    texts = []
    for seed in (0, 1):
        experiment = tiny(seed=seed)
        batch = {**experiment.batch(0), **experiment.resident}
        texts.append(jax.jit(experiment.step).lower(abstract_state(experiment), batch).as_text())
    assert texts[0] == texts[1]


def test_state_is_described_without_making_it():
    experiment = tiny(method="sngan")
    described, made = abstract_state(experiment), fresh_state(experiment)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), described) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), made
    )


def test_batches_pass_over_no_example():
    experiment = tiny(d_steps=3)
    batches = [experiment.batch(position) for position in range(4)]
    assert batches[0]["index"].shape == (3, 8)
    seen = np.concatenate([batch["index"].ravel() for batch in batches])
    assert len(set(seen.tolist())) == 4 * 3 * 8
    np.testing.assert_array_equal(batches[2]["index"], experiment.batch(2)["index"])


def test_discriminators_updates_see_real_samples_of_their_own_and_generators_do_not_move():
    """After a step of two updates, the critic is what two single updates on the two halves make of it."""
    experiment = tiny(d_steps=2, method="acgan")
    state = experiment.init(jax.random.key(0))
    batch = {**experiment.batch(0), **experiment.resident}
    after, _ = jax.jit(experiment.step)(state, batch)
    key = jax.random.fold_in(jax.random.key(0), np.uint32(0))
    by_hand = state
    for number in range(2):
        part = {**experiment.resident, "index": batch["index"][number]}
        position, own_key = jnp.uint32(0), jax.random.fold_in(key, number)
        by_hand, _ = jax.jit(experiment._critic_step)(by_hand, part, position, number, own_key)
        assert_equal(by_hand.generator, state.generator)
    for a, b in zip(leaves(after.critic.params), leaves(by_hand.critic.params)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # two programs of the same sums


# --- rates and averages -----------------------------------------------------------------------------------------------


def test_average_is_a_copy_before_its_start_and_then_follows():
    config = tiny_config(ema_decay=0.9, ema_start=10)
    assert float(average_decay_at(config, jnp.uint32(9))) == 0.0
    assert float(average_decay_at(config, jnp.uint32(10))) == pytest.approx(0.9)
    state, _ = run(tiny(ema_decay=0.9, ema_start=10), [2], 2)
    for average, now in zip(leaves(state.ema["params"]), leaves(state.generator.params)):
        np.testing.assert_allclose(average, now, rtol=1e-6, atol=1e-7)  # a + (p - a) rounds
    averaged, _ = run(tiny(ema_decay=0.9), [2], 2)
    assert any(np.any(a != b) for a, b in zip(leaves(averaged.ema["params"]), leaves(averaged.generator.params)))
    assert set(averaged.ema) == {"params", "batch_stats"}  # buffers are averaged too


def test_half_life_in_images():
    config = tiny_config(ema_half_life=0.8, ema_rampup=0.05)
    for position, half_life in ((100, 0.05 * 100 * 8), (10_000, 800)):
        expected = 0.5 ** (8 / half_life)
        assert float(average_decay_at(config, jnp.uint32(position))) == pytest.approx(expected, rel=1e-5)


def test_learning_rates():
    linear = tiny_config(lr_decay="linear", steps=100)
    assert float(learning_rate_at(linear, 0.1, jnp.uint32(25))) == pytest.approx(0.075)
    assert float(learning_rate_at(tiny_config(), 0.1, jnp.uint32(25))) == pytest.approx(0.1)


def test_a_generator_update_draws_as_many_fakes_as_it_is_told():
    """The gradient of a generator update on 3 B fakes is not that on B; the discriminator's updates are the same."""
    assert tiny_config(batch_size=8).generator_batch == 8
    states = [run(tiny(generator_batch=count), [1], 1)[0] for count in (0, 24)]
    critics, generators = (
        [np.concatenate([np.ravel(leaf) for leaf in leaves(getattr(state, part).params)]) for state in states]
        for part in ("critic", "generator")
    )
    np.testing.assert_array_equal(*critics)
    assert np.abs(generators[0] - generators[1]).max() > 0


# --- indicators -------------------------------------------------------------------------------------------------------


def test_singular_values_are_those_of_the_kernels():
    state, _ = run(tiny(method="acgan"), [1], 1)
    found = singular_values(state.critic.params)
    assert set(found) == {"hidden_0", "head_score", "head_classifier"}
    for name, value in found.items():
        kernel = np.asarray(state.critic.params[name]["kernel"], np.float64)
        assert float(value) == pytest.approx(np.linalg.svd(kernel, compute_uv=False)[0], rel=1e-5)  # float32


def test_spread_is_zero_for_a_collapsed_class_and_one_for_unit_noise():
    noise = np.random.default_rng(0).normal(size=(1, 4000, 3)).astype(np.float32)
    assert float(spread(jnp.asarray(noise))[0]) == pytest.approx(1.0, abs=0.03)  # of 12,000 numbers
    assert float(spread(jnp.ones((1, 8, 3)))[0]) == 0.0


def test_slope_of_gradients_that_double_at_each_layer_further_back():
    assert float(slope_backwards(jnp.asarray([8.0, 4.0, 2.0, 1.0]))) == pytest.approx(np.log10(2), rel=1e-5)
    assert np.isnan(float(slope_backwards(jnp.asarray([0.0, 1.0]))))


def test_gradients_by_a_critics_layers_are_those_of_the_chain_rule():
    """A critic of linear layers: by the output of a layer the gradient is the product of the kernels after it."""
    experiment = tiny(method="wgan-gp", depth=2)
    state = experiment.init(jax.random.key(0))
    found = experiment.probe(state)
    params = jax.tree.map(np.asarray, state.critic.params)
    batch = {**experiment.domain.batch(0, 64), **experiment.resident}
    samples, _ = experiment.domain.real(batch, jax.random.key(0))
    hidden = np.asarray(samples).reshape(len(samples), -1) @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"]
    second = np.where(hidden > 0, hidden, 0) @ params["hidden_1"]["kernel"] + params["hidden_1"]["bias"]
    by_second = (second > 0) * params["head_score"]["kernel"][:, 0] / len(samples)
    by_first = (hidden > 0) * (by_second @ params["hidden_1"]["kernel"].T)
    for name, gradient in (("hidden_0", by_first), ("hidden_1", by_second)):
        expected = np.linalg.norm(gradient)
        assert float(found[f"stability/layer_gradient/{name}"]) == pytest.approx(expected, rel=1e-4)  # float32
    slope = np.log10(np.linalg.norm(by_first) / np.linalg.norm(by_second))
    assert float(found["stability/gradient_slope"]) == pytest.approx(slope, rel=1e-3)


def test_oscillation_is_around_the_line_and_of_the_values_that_there_are():
    # the window still lacks four values
    values = np.r_[[50.0] * 4, 2.0 + 0.5 * np.arange(8) + 0.1 * (-1.0) ** np.arange(8)]
    line = np.polyval(np.polyfit(np.arange(8), values[4:], 1), np.arange(8))
    expected = np.std(values[4:] - line)
    swing, relative = oscillation(jnp.asarray(values, jnp.float32), jnp.int32(8))
    assert float(swing) == pytest.approx(expected, rel=1e-4)  # float32
    assert float(relative) == pytest.approx(expected / values[4:].mean(), rel=1e-4)
    assert float(oscillation(jnp.asarray(values, jnp.float32), jnp.int32(2))[0]) == 0.0
    assert float(oscillation(jnp.asarray(values, jnp.float32), jnp.int32(99))[0]) > 10  # older values are seen now


def test_the_probe_sees_how_the_critics_loss_swings():
    experiment = tiny(method="wgan-gp")
    state, _ = run(experiment, [1], 4)
    found = experiment.probe(state)
    losses = np.asarray(state.critic.monitor.window[0])[-int(state.critic.monitor.clock("accepted")) :]
    line = np.polyval(np.polyfit(np.arange(len(losses)), losses, 1), np.arange(len(losses)))
    assert float(found["stability/loss_oscillation"]) == pytest.approx(np.std(losses - line), rel=1e-3)


def test_share_of_weights_at_the_clipping_limit():
    params = {"a": {"kernel": jnp.asarray([[0.1, -0.1], [0.0, 0.05]]), "bias": jnp.asarray([0.1, 0.0])}}
    assert float(share_at_limit(params, 0.1, kernels_only=False)) == pytest.approx(0.5)
    assert float(share_at_limit(params, 0.2, kernels_only=True)) == 0.0
    clipped = tiny(method="wgan", weight_clip=1e-6)
    state, _ = run(clipped, [1], 1)
    assert float(clipped.probe(state)["stability/weights_at_clip"]) > 0.5  # almost all start far above the limit


def test_probe_sees_a_class_that_has_collapsed():
    experiment = tiny(method="acgan")
    state = experiment.init(jax.random.key(0))
    alive = experiment.probe(state)
    params = jax.tree.map(jnp.zeros_like, state.generator.params)
    dead = experiment.probe(dataclasses.replace(state, generator=dataclasses.replace(state.generator, params=params)))
    assert float(alive["stability/intra_class_diversity"]) > 0.01
    assert float(dead["stability/intra_class_diversity"]) == 0.0
    assert {"stability/class_grad_norm", "stability/classifier_grad_norm", "stability/classifier_probability"} <= set(
        alive
    )


# --- evaluation and samples -------------------------------------------------------------------------------------------


@pytest.fixture
def short_evaluation(monkeypatch):
    """Nothing is judged: the classifier that would judge takes minutes to train."""
    monkeypatch.setattr(experiment_module, "STANDING_BATCHES", 2)


def test_evaluation_draws_grids_and_measures_the_gap(tmp_path, short_evaluation):
    experiment = tiny(sampling_batch=60)
    state, _ = run(experiment, [1], 1)
    found = experiment.evaluate(state, 7, Context(tmp_path))
    names = {f"samples/00000007{part}.png" for part in ("", "-interpolation", "-truncation")}
    assert set(found.files) == names
    assert all(content.startswith(b"\x89PNG") for content in found.files.values())
    assert set(found.scalars) == {"eval/discriminator_gap_train_test"}


def test_evaluation_goes_on_where_it_was_interrupted(tmp_path):
    experiment = tiny(sampling_batch=20)
    state, _ = run(experiment, [1], 1)
    model = experiment.model(state)
    whole = model.samples(None, 50, seed=1, context=Context(tmp_path / "a"))
    with pytest.raises(KeyboardInterrupt):
        model.samples(None, 50, seed=1, context=Context(tmp_path / "b", stop_at=3))
    kept = sorted((tmp_path / "b").glob("*.npy"))
    assert len(kept) == 2
    np.testing.assert_array_equal(model.samples(None, 50, seed=1, context=Context(tmp_path / "b")), whole)


def test_samples_do_not_depend_on_the_chunk(tmp_path):
    parts = []
    for chunk in (8, 20):
        experiment = tiny(sampling_batch=chunk)
        state = experiment.init(jax.random.key(0))
        labels = (np.arange(20) % 10).astype(np.int32)
        parts.append(experiment.model(state).samples(labels, 20, seed=3, context=Context(tmp_path / str(chunk))))
    np.testing.assert_allclose(parts[0], parts[1], atol=1e-6)  # float32 products in blocks of another size


def test_truncation_keeps_latents_near_the_middle():
    experiment = tiny()
    programs = experiment._programs
    numbers = np.arange(500, dtype=np.uint32)
    for truncation in TRUNCATIONS[:-1]:
        z = np.asarray(programs.latents(np.uint32(0), numbers, np.float32(truncation), truncated=True))
        assert np.abs(z).max() <= truncation
        # A truncated normal, not a clipped one: almost nothing lies on the limit.
        assert np.mean(np.abs(z) == truncation) < (0.02 if truncation > 0.2 else 0.2)
    free = np.asarray(programs.latents(np.uint32(0), numbers, np.float32(0), truncated=False))
    assert np.abs(free).max() > 2.5


def test_standing_statistics_are_the_mean_of_the_batches_own(tmp_path):
    experiment = tiny(batch_norm="standing", standing_batches=3, sampling_batch=16)
    state, _ = run(experiment, [2], 2)
    model = experiment.model(state)
    assert isinstance(model, GanModel)
    assert model.batch_norm == "standing"
    # Of one batch they are that batch's, so that running statistics then give what the batch's own give.
    single = tiny(batch_norm="standing", standing_batches=1, sampling_batch=16).model(state)
    variables = single._generator
    z = experiment._programs.latents(np.uint32(0xFEED), np.arange(16, dtype=np.uint32), np.float32(0), truncated=False)
    labels = (np.arange(16) % 10).astype(np.int32)
    as_running = experiment._programs.running(variables, z, labels, jax.random.key(0))
    as_batch = experiment._programs.batchwise(variables, z, labels, jax.random.key(0))
    np.testing.assert_allclose(as_running, as_batch, atol=2e-4)  # float32 variance; 1 - momentum divided out


def test_sampling_follows_label_weights_and_seed(tmp_path):
    experiment = tiny()
    state, _ = run(experiment, [1], 1)
    spec = experiment.data_spec
    without_data = FAMILY.build(experiment.config, mesh=experiment.mesh, data_spec=spec.to_dict())
    files = sample(without_data, state, SampleOptions(num=12, label="7"), Context(tmp_path / "a"))
    assert {"grid.png", "samples.npz", "00-7.png", "11-7.png"} <= set(files)
    again = sample(without_data, state, SampleOptions(num=12, label="7"), Context(tmp_path / "b"))
    assert files == again
    other = sample(without_data, state, SampleOptions(num=12, label="7", weights="raw"), Context(tmp_path / "c"))
    assert other["grid.png"] != files["grid.png"]
    last = sample(without_data, state, SampleOptions(num=12, label="7", seed=2**32 - 1), Context(tmp_path / "d"))
    assert last["grid.png"] != files["grid.png"]
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), state)
    with pytest.raises(NotFiniteError, match="12 of the first 12 samples"):
        sample(without_data, broken, SampleOptions(num=12, label="7"), Context(tmp_path / "e"))
    with pytest.raises(ConfigError, match="unknown label 'x'"):
        sample(without_data, state, SampleOptions(num=1, label="x"), Context(tmp_path))
    bare = tiny(ema_decay=0.0)
    start, asked = bare.init(jax.random.key(0)), SampleOptions(num=1, weights="ema")
    with pytest.raises(ConfigError, match="keeps no moving average"):
        sample(bare, start, asked, Context(tmp_path))
    unlabelled = tiny(method="wgan-gp", generator_norm="none")
    start = unlabelled.init(jax.random.key(0))
    for asked, reason in (
        (SampleOptions(num=1, label="1"), "knows no labels"),
        (SampleOptions(num=1, batch_norm="batch"), "has no batch normalisation"),
    ):
        with pytest.raises(ConfigError, match=reason):
            sample(unlabelled, start, asked, Context(tmp_path))


def test_great_circle_keeps_lengths():
    ends = np.random.default_rng(0).normal(size=(2, 3, 50)).astype(np.float32)
    path = great_circle(ends[0], ends[1], 9)
    np.testing.assert_allclose(path[:, 0], ends[0], atol=1e-5)
    np.testing.assert_allclose(path[:, -1], ends[1], atol=1e-5)
    lengths, limits = np.linalg.norm(path, axis=-1), np.linalg.norm(ends, axis=-1)
    expected = np.linspace(limits[0], limits[1], 9).T
    # Ends of normal latents are nearly at right angles; lengths of the sum deviate by their products only.
    np.testing.assert_allclose(lengths, expected, rtol=1e-4)
