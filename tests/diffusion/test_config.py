"""Options of the diffusion family: what is chosen, what is refused and why, and that no JAX is needed for it."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from stabletrain.cli.options import resolve as resolve_preset
from stabletrain.diffusion.backbones import BACKBONES, build_network
from stabletrain.diffusion.choices import (
    BACKBONE_NAMES,
    BLOCK_STYLE_NAMES,
    PROCESS_NAMES,
    PUBLISHED,
    RESAMPLING_STYLES,
    SAMPLER_NAMES,
    SKIP_SCALING_NAMES,
)
from stabletrain.diffusion.config import DiffusionConfig, resolve
from stabletrain.diffusion.contradictions import ONLY_FOR, TAKES_KAPPA
from stabletrain.diffusion.family import FAMILY
from stabletrain.diffusion.processes import PROCESSES
from stabletrain.diffusion.samplers import SAMPLERS
from stabletrain.diffusion.skips import SKIP_SCALINGS, skip_scales
from stabletrain.diffusion.unet import STYLES
from stabletrain.errors import ConfigError
from stabletrain.runs.experiments import read_table
from stabletrain.training.config import config_hash, fields_of, make_config, replace, run_name, to_dict


def configured(**values) -> DiffusionConfig:
    return make_config(DiffusionConfig, values)


def test_choices_are_those_of_the_code():
    """The names are written out in the configuration, which must not import JAX; here both lists meet."""
    assert set(BACKBONE_NAMES) == {*BACKBONES, *PUBLISHED}
    assert set(SKIP_SCALING_NAMES) == set(SKIP_SCALINGS)
    assert set(PROCESS_NAMES) == set(PROCESSES)
    assert set(SAMPLER_NAMES) == set(SAMPLERS)
    reading = {name for name in SKIP_SCALINGS if skip_scales(name, range(3), 0.5) != skip_scales(name, range(3), 0.9)}
    assert set(TAKES_KAPPA) == reading
    assert set(BLOCK_STYLE_NAMES) == set(STYLES)
    assert set(RESAMPLING_STYLES) == {name for name, style in STYLES.items() if style.residual_resampling}


def test_the_inception_s_resize_is_chosen_with_the_inception():
    assert resolve(configured(extractor="inception")).inception_resize == "tf1-bilinear"
    assert (
        resolve(configured(inception="weights.pth", inception_resize="pytorch-fid")).inception_resize == "pytorch-fid"
    )


@pytest.mark.parametrize("dataset", ["digits", "mnist", "cifar10", "celeba64", "imagenet64"])
@pytest.mark.parametrize("backbone", ["unet", "uvit", "mlp"])
@pytest.mark.parametrize("scaling", SKIP_SCALING_NAMES)
def test_a_resolved_config_leaves_nothing_open_that_applies(dataset, backbone, scaling):
    config = resolve(configured(dataset=dataset, backbone=backbone, skip_scaling=scaling))
    values = to_dict(config)
    for name in ("steps", "image_size", "width", "depth", "learning_rate"):
        assert values[name] > 0, name
    not_applicable = {
        "data", "best_metric", "inception", "inception_resize", "kappa_indexing", "churn", "gate", "diffusion_steps",
        "latent_scale",
        *(() if scaling in TAKES_KAPPA else ("kappa",)),
        *(() if config.class_conditional else ("guidance",)),
        *(name for name, backbones in ONLY_FOR.items() if backbone not in backbones),
    }  # fmt: skip
    for name, value in values.items():
        if name not in not_applicable:
            assert value is not None, name
    assert resolve(configured(process="ddpm-cosine", backbone=backbone)).diffusion_steps == 1000
    if backbone == "unet" and scaling == "cs":
        # twelve skips counted one by one would reach kappa^11; four may be
        assert config.kappa_indexing == ("per-skip" if dataset == "digits" else "per-level")


def test_resolving_twice_changes_nothing():
    for config in (configured(), configured(backbone="mlp", skip_scaling="cs"), configured(dataset="celeba64")):
        assert resolve(resolve(config)) == resolve(config)


def test_explicit_values_win_over_chosen_ones():
    values = {
        "steps": 7, "width": 48, "heads": 3, "patch_size": 4, "learning_rate": 0.5, "warmup_steps": 0,
        "weight_decay": 0.0, "ema_decay": 0.0, "label_dropout": 0.0, "guidance": 1.0, "eval_samples": 0,
        "horizontal_flip": False, "backbone": "uvit", "depth": 2,
    }  # fmt: skip
    config = resolve(configured(**values))
    for name, value in values.items():
        assert getattr(config, name) == value
    assert config.ema_ramp is False, "without an average there is nothing to ramp"


def test_the_paper_s_networks_are_chosen_for_the_paper_s_data():
    uvit = resolve(configured(dataset="cifar10", backbone="uvit"))
    assert (uvit.width, uvit.depth, uvit.heads, uvit.patch_size) == (512, 12, 8, 2)
    assert (uvit.learning_rate, uvit.beta1, uvit.beta2, uvit.weight_decay) == (2e-4, 0.99, 0.999, 0.03)
    assert resolve(configured(dataset="celeba64", backbone="uvit")).patch_size == 4
    unet = resolve(configured(dataset="cifar10", backbone="unet"))
    assert (unet.width, unet.channel_multipliers, unet.depth, unet.attention) == (128, (1, 2, 2, 2), 2, (16,))
    assert (unet.dropout, unet.gradient_clip, unet.warmup_steps) == (0.1, 1.0, 5000)


def test_a_short_run_warms_up_for_a_tenth_of_it():
    assert resolve(configured(steps=50)).warmup_steps == 5
    assert resolve(configured(steps=50, warmup_steps=40)).warmup_steps == 40


def test_labels_and_flips_follow_the_data():
    assert resolve(configured()).class_conditional
    assert not resolve(configured()).horizontal_flip
    assert resolve(configured(dataset="cifar10")).horizontal_flip
    celeba = resolve(configured(dataset="celeba64"))
    assert (celeba.class_conditional, celeba.guidance, celeba.label_dropout, celeba.eval_samples) == (False, None, 0, 0)
    own = resolve(configured(data="mine.npz"))
    assert (own.class_conditional, own.image_size, own.patch_size) == (False, 0, 0)
    named = resolve(configured(data="cifar.npz", dataset="cifar10"))
    assert (named.image_size, named.width) == (0, 128), "the file says its size; one that is not 32 is then refused"


def test_judging_follows_the_data():
    digits = resolve(configured())
    assert (digits.eval_samples, digits.scores, digits.score_split, digits.extractor) == (
        1000, ("fd",), "test", "classifier",
    )  # fmt: skip
    assert resolve(configured(dataset="celeba64", extractor="inception")).eval_samples == 1000
    assert resolve(configured(data="mine.npz", inception="weights.pth")).extractor == "inception"
    assert resolve(configured(data="mine.npz")).score_split is None, "only the file knows whether it has a test split"


@pytest.mark.parametrize(
    ("values", "asked"),
    [
        ({"eval_samples": 0, "inception": "w.pth"}, "--inception w.pth"),
        ({"eval_samples": 0, "scores": ("fd", "pr")}, "--scores fd,pr"),
        ({"eval_samples": 0, "extractor": "inception"}, "--extractor inception"),
        ({"dataset": "celeba64", "scores": ("pr",)}, "--scores pr"),
        ({"data": "mine.npz", "scores": ("pr",)}, "--scores pr"),
        ({"backbone": "mlp", "scores": ("pr",)}, "--scores pr"),
    ],
)
def test_how_to_judge_is_refused_where_no_samples_are_judged(values, asked):
    with pytest.raises(ConfigError, match=f"{asked} does nothing where no samples are judged.*add --eval-samples N"):
        resolve(configured(**values))


def test_the_inception_is_asked_for_to_judge_samples():
    for values in ({"backbone": "mlp"}, {"dataset": "celeba64"}, {"data": "mine.npz"}):
        assert resolve(configured(**values)).eval_samples == 0
        assert resolve(configured(**values, extractor="inception", scores=("pr",))).eval_samples == 1000
    assert resolve(configured(backbone="mlp", scores=("pr",), eval_samples=50)).eval_samples == 50


@pytest.mark.parametrize("values", [{"scores": ("kd",)}, {"extractor": "inception"}, {"inception": "w.pth"}])
def test_latents_are_not_judged(values):
    with pytest.raises(ConfigError, match="makes no sense for coco-latents: latents are no pictures"):
        resolve(configured(dataset="coco-latents", backbone="uvit", process="ddpm-scaled-linear", **values))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"skip_scaling": "cs", "kappa": 1.5}, "at most 1"),
        ({"skip_scaling": "cs", "kappa": 0.0}, "above 0"),
        ({"skip_scaling": "sqrt2", "kappa": 0.5}, "--kappa does nothing with --skip-scaling sqrt2"),
        ({"kappa": 0.5}, "--kappa does nothing with --skip-scaling none"),
        ({"backbone": "unet", "skip_scaling": "const", "kappa_indexing": "per-skip"}, "--kappa-indexing does nothing"),
        ({"backbone": "uvit", "skip_scaling": "cs", "kappa_indexing": "per-level"}, "belongs to unet"),
        ({"backbone": "uvit", "block_style": "adm"}, "--block-style does nothing with --backbone uvit"),
        ({"heads": 2, "head_channels": 8}, "--heads 2 does nothing with --head-channels 8"),
        ({"channel_multipliers": (0,)}, "'channel_multipliers' is 0, but must be at least 1"),
        ({"channel_multipliers": (1, -2)}, "'channel_multipliers' is -2, but must be at least 1"),
        ({"attention": (0,)}, "'attention' is 0, but must be at least 1"),
        ({"head_channels": 9, "width": 16, "channel_multipliers": (1, 2)}, "32 channels at level 2 are no multiple"),
        ({"block_style": "iddpm", "resample_filter": (1, 3, 3, 1)}, "it belongs to adm and ddpm"),
        ({"block_style": "adm", "resample_filter": (1, 2, 1)}, "an even number"),
        ({"backbone": "mlp", "patch_size": 2}, "--patch-size does nothing with --backbone mlp"),
        ({"backbone": "uvit", "attention": (8,)}, "--attention does nothing with --backbone uvit"),
        ({"backbone": "uvit", "dropout": 0.1}, "--dropout does nothing"),
        ({"backbone": "uvit", "depth": 5}, "odd"),
        ({"backbone": "uvit", "image_size": 8, "patch_size": 3}, "patch size 3 does not divide the image size 8"),
        ({"backbone": "uvit", "width": 50, "heads": 4}, "not divisible by 4 attention heads"),
        ({"backbone": "unet", "image_size": 10, "channel_multipliers": (1, 2, 2)}, "not divisible by 4"),
        ({"backbone": "unet", "image_size": 8, "channel_multipliers": (1, 2), "attention": (16,)}, "sizes are 8, 4"),
        ({"class_conditional": False, "guidance": 2.0}, "--guidance does nothing"),
        ({"class_conditional": False, "label_dropout": 0.1}, "--label-dropout does nothing"),
        ({"class_conditional": False, "scores": ("fd", "cas")}, "--scores cas needs samples with labels"),
        ({"inception": "w.pth", "extractor": "classifier"}, "--inception does nothing"),
        ({"eval_samples": 9}, "too few"),
        ({"scores": ("fd", "kd", "fd")}, "names one twice"),
        ({"scores": ("fid",)}, "did you mean 'fd'"),
        ({"label_dropout": 0.0, "guidance": 2.0}, "raise --label-dropout"),
        ({"sampler": "euler-maruyama", "process": "ddpm-linear"}, "needs --process vp-sde"),
        ({"sampler": "dpm-solver-fast", "process": "ddpm-cosine"}, "needs --process vp-sde or edm"),
        ({"sampler": "heun", "process": "ddpm-linear", "sampling_steps": 2003}, "more than the 1000 levels"),
        ({"churn": 10.0}, "--churn does nothing with --sampler ddim"),
        ({"process": "ddpm-cosine", "sampling_steps": 1001}, "1000 levels"),
        ({"process": "ddpm-linear", "diffusion_steps": 20, "sampling_steps": 5}, "too few for ddpm-linear.*least 21"),
        ({"process": "ddpm-scaled-linear", "diffusion_steps": 12, "sampling_steps": 5}, "use at least 13"),
        ({"sampler": "ddpm", "ddim_eta": 0.5}, "--ddim-eta does nothing"),
        ({"horizontal_flip": True}, "mirrored character"),
        ({"ema_decay": 0.0, "ema_ramp": True}, "--ema-ramp does nothing"),
        ({"steps": 100, "warmup_steps": 100, "lr_decay": "linear"}, "leaves nothing"),
        ({"backbone": "vit"}, "did you mean 'uvit'"),
        ({"skip_scaling": "css"}, "did you mean 'cs'"),
    ],
)  # fmt: skip
def test_senseless_combinations_are_refused_with_the_reason(values, reason):
    with pytest.raises(ConfigError, match=reason):
        configured(**values)


def test_problems_that_show_only_after_resolving_are_refused_too():
    with pytest.raises(ConfigError, match="patch size 3 does not divide the image size 32"):
        resolve(configured(dataset="cifar10", backbone="uvit", patch_size=3))
    with pytest.raises(ConfigError, match="--guidance does nothing"):
        resolve(configured(dataset="celeba64", guidance=2.0))
    with pytest.raises(ConfigError, match="not divisible by"):
        resolve(configured(backbone="uvit", width=50))


def test_scalelong_is_a_shorthand_for_constant_scaling():
    assert FAMILY.shorthands["scalelong"].values == {"skip_scaling": "cs"}
    assert resolve(configured(skip_scaling="cs")).kappa == 0.7
    with pytest.raises(ConfigError, match="--scalelong stands for --skip-scaling cs and does nothing with"):
        resolve_preset(FAMILY, {"skip_scaling": "none"}, shorthands=["scalelong"])


def test_runs_are_named_after_the_scaling():
    config = resolve(configured())
    assert run_name(config, "diffusion").startswith("diffusion-unscaled-digits-")
    scaled = resolve(configured(skip_scaling="cs"))
    assert run_name(scaled, "diffusion").startswith("diffusion-cs-digits-")
    assert config_hash(config, "diffusion") != config_hash(scaled, "diffusion")


def test_every_option_has_a_panel_and_a_help_that_ends_a_sentence():
    for name, field in fields_of(DiffusionConfig).items():
        assert field.metadata["help"].endswith("."), name
        assert field.metadata["panel"], name


def test_family_and_config_import_no_jax():
    code = (
        "import sys; from stabletrain.diffusion.family import FAMILY; FAMILY.resolve(FAMILY.config());"
        "sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- published networks by name ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "dataset", "count"),
    [
        ("uvit-s2", "cifar10", 44_255_328),
        ("uvit-s2-deep", "cifar10", 57_908_320),
        ("uvit-s4", "celeba64", 44_292_228),
        # published with 1,000 embeddings; trained with hidden labels ours has one more, of the network's width
        ("uvit-m4", "imagenet64", 130_940_292 + 768),
        ("uvit-l4", "imagenet64", 286_827_652 + 1024),
        ("unet-ddpm", "cifar10", 35_746_307),
        # published with a learned variance, in three channels more: 9 * 128 * 3 weights and 3 biases of the last layer
        ("unet-iddpm", "cifar10", 52_546_438 - (9 * 128 + 1) * 3),
        ("unet-iddpm64", "celeba64", 121_063_942 - (9 * 128 + 1) * 3),
        # as EDM trains ADM, without learned variance; with an embedding of "none" of width 4 * 192
        ("unet-adm64", "imagenet64", 295_899_267 + 768),
        # published with a bias-free projection of nine augmentation labels to 128 channels, which ours has not
        ("unet-ddpmpp", "cifar10", 55_733_891 - 9 * 128),
        ("unet-ddpmpp-song", "cifar10", 61_804_419),
    ],
)
def test_a_published_name_builds_the_published_network(backbone, dataset, count):
    conditional = dataset == "imagenet64"
    config = resolve(configured(backbone=backbone, dataset=dataset, class_conditional=conditional))
    assert config.backbone in BACKBONES
    assert resolve(config) == config
    assert parameters_of(config, 1000) == count


@functools.cache
def parameters_of(config: DiffusionConfig, classes: int) -> int:
    """Parameters of a resolved configuration's network for colour images of so many classes."""
    size, classes = config.image_size, classes if config.class_conditional else 0
    network = build_network(config, (size, size, 3), num_classes=classes, dtype=None)
    labels = jnp.zeros(1, jnp.int32) if classes else None
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, size, size, 3)), jnp.zeros(1), labels)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


EXPERIMENTS = Path(__file__).parents[2] / "experiments"
GATE = 2 * 257 * 16 + 257 + 16  # the one of all skips: 257 tokens to a sixteenth and back, with biases


@pytest.mark.parametrize("table", ["feature-norm", "fid", "kappa", "steps-to-score"])
def test_the_rows_of_a_table_train_the_paper_s_network_without_labels(table):
    """Published counts of U-ViT-S/2 at both depths and of DDPM's UNet, plus the gate of LS."""
    spec = read_table(EXPERIMENTS, f"scalelong/{table}")
    judged = any("fid" in column.metric for column in spec.columns["paper"])
    for row in spec.rows:
        config = resolve_preset(FAMILY, {}, preset=row.path, scale="paper").config
        assert isinstance(config, DiffusionConfig)
        assert (config.dataset, config.class_conditional, config.guidance) == ("cifar10", False, None), row.key
        assert config.eval_samples == (50_000 if judged else 0), f"{row.key}: a score is made where a column shows one"
        learned = config.skip_scaling == "ls"
        if not learned:  # a constant has no parameters: such rows are counted once
            config = replace(config, skip_scaling="none", kappa=None, kappa_indexing=None)
        if config.backbone == "uvit":
            published = {12: 44_255_328, 16: 57_908_320}[config.depth] + learned * GATE
            assert (parameters_of(config, 10), config.process) == (published, "vp-sde"), row.key
        else:
            assert (config.process, config.diffusion_steps) == ("ddpm-linear", 1000)
            assert (config.sampler, config.sampling_steps) == ("ddpm-large", 1000)
            assert learned or parameters_of(config, 10) == 35_746_307, row.key


def test_published_unets_have_the_published_skips_heads_and_training():
    """Skips: 1 + levels * blocks + levels - 1."""
    skips = {"unet-iddpm": 16, "unet-iddpm64": 16, "unet-adm64": 16, "unet-ddpmpp": 15, "unet-ddpmpp-song": 20}
    for name, count in skips.items():
        config = resolve(configured(backbone=name, dataset="cifar10" if "64" not in name else "imagenet64"))
        size = config.image_size
        assert build_network(config, (size, size, 3), num_classes=0, dtype=None).num_skips == count
    adm = resolve(configured(backbone="unet-adm64", dataset="imagenet64"))
    assert (adm.heads, adm.head_channels, adm.resample_filter, adm.dropout) == (0, 64, (1, 1), 0.1)
    edm = resolve(configured(backbone="unet-ddpmpp", dataset="cifar10"))
    assert pytest.approx(edm.ema_decay, abs=1e-5) == 0.5 ** (512 / 0.5e6)
    assert (edm.learning_rate, edm.warmup_steps, edm.dropout) == (1e-3, 19_531, 0.13)


@pytest.mark.parametrize(
    ("backbone", "dataset", "expected"),
    [
        ("uvit-s2", "cifar10", (500_000, 2e-4, 2500, 0.99, 0.999)),
        ("uvit-s4", "celeba64", (500_000, 2e-4, 5000, 0.99, 0.99)),
        ("uvit-m4", "imagenet64", (300_000, 3e-4, 5000, 0.99, 0.99)),
        ("uvit-l4", "imagenet64", (300_000, 3e-4, 5000, 0.99, 0.99)),
    ],
)
def test_a_published_uvit_is_trained_as_its_released_configuration_says(backbone, dataset, expected):
    """Bao et al. 2023, released configurations: steps, learning rate, warm-up and AdamW's betas."""
    config = resolve(configured(backbone=backbone, dataset=dataset))
    assert (config.steps, config.learning_rate, config.warmup_steps, config.beta1, config.beta2) == expected
    assert (config.weight_decay, config.ema_decay, config.gradient_clip) == (0.03, 0.9999, 0.0)


def test_a_resampling_filter_reaches_the_network():
    config = resolve(configured(block_style="ddpm++", resample_filter=(1, 3, 3, 1)))
    assert build_network(config, (8, 8, 1), num_classes=0, dtype=None).style.resample_filter == (1, 3, 3, 1)


def test_attention_of_own_data_is_chosen_when_their_size_is_known():
    for values in ({"data": "mine.npz"}, {"data": "mine.npz", "head_channels": 16}):
        config = resolve(configured(**values))
        assert config.attention is None, "no file has been opened yet"
        for size, attention in ((24, (12,)), (32, (16,)), (64, (16,)), (8, (4,))):
            assert build_network(config, (size, size, 3), num_classes=0, dtype=None).attention_resolutions == attention
    assert resolve(configured(data="mine.npz", image_size=24)).attention == (12,)
    assert resolve(configured(dataset="celeba64", channel_multipliers=(1, 2))).attention == (32,)
    none = resolve(configured(data="mine.npz", attention=()))
    assert build_network(none, (32, 32, 3), num_classes=0, dtype=None).attention_resolutions == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channel_multipliers": (1, 2), "attention": (16,)}, "--attention 16 names no feature map.*are 24, 12$"),
        ({"backbone": "unet-iddpm64"}, "--attention 16 names no feature map.*are 24, 12, 6, 3$"),
        ({"channel_multipliers": (1, 2, 2, 2, 2)}, "24 pixels are not divisible by 16: use fewer"),
        ({"channel_multipliers": (1, 4), "attention": (24,), "width": 8}, "8 channels at level 1 are no multiple of"),
        ({"channel_multipliers": (1, 2), "attention": (24,), "width": 24}, "24 channels at level 1 are no multiple"),
    ],
)
def test_what_own_data_of_24_pixels_do_not_allow_is_refused_once_they_are_read(values, message):
    if "width" in values:
        values = {**values, "head_channels": 16}
    config = resolve(configured(data="mine.npz", **values))
    with pytest.raises(ConfigError, match=message):
        build_network(config, (24, 24, 3), num_classes=0, dtype=None)


def test_a_published_name_keeps_the_paper_s_training_on_small_images_too():
    assert resolve(configured(backbone="uvit-s2")).learning_rate == 2e-4
    assert resolve(configured(backbone="uvit")).learning_rate == 2e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone": "uvit-s2", "width": 96}, "--width 96 is not that of uvit-s2, which has 512: use --backbone uvit"),
        ({"backbone": "uvit-s2", "attention": (4,)}, "--attention does nothing with --backbone uvit"),
        ({"backbone": "unet-adm64", "heads": 4}, "--heads 4 does nothing with --head-channels 64"),
        ({"backbone": "unet-iddpm", "block_style": "adm"}, "--block-style adm is not that of unet-iddpm"),
        ({"backbone": "unet-ddpm", "dataset": "digits"}, "--attention 16 names no feature map"),
        ({"backbone": "uvit-s2", "gate": "pooled"}, "--gate does nothing with --skip-scaling none"),
    ],
)
def test_what_a_published_network_is_not_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        resolve(configured(**values))


def test_the_pooled_gate_reaches_the_network():
    config = resolve(configured(backbone="uvit", skip_scaling="ls", gate="pooled"))
    assert build_network(config, (8, 8, 1), num_classes=0, dtype=None).gate_form == "pooled"
    assert resolve(configured(backbone="uvit", skip_scaling="ls")).gate == "token"
