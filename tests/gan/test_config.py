"""The family's options: what makes no sense is refused with the reason, and open values are filled in."""

from __future__ import annotations

import subprocess
import sys

import pytest

from stabletrain.errors import ConfigError
from stabletrain.gan.config import ADVERSARIAL_NAMES, CONDITIONING_NAMES, GanConfig
from stabletrain.gan.presets import PRESETS
from stabletrain.gan.resolution import problems, resolve
from stabletrain.training.config import make_config, to_dict


def resolved(**values) -> GanConfig:
    return resolve(make_config(GanConfig, values))


NONSENSE = [
    ({"conditioning": "projection", "temperature": 0.1}, "--temperature needs --conditioning ac-normalized, 2c, d2dce"),
    ({"conditioning": "2c", "positive_margin": 0.9}, "--positive-margin needs --conditioning d2dce"),
    ({"conditioning": "projection", "class_weight": 0.1}, "--class-weight needs a class loss"),
    ({"conditioning": "projection", "auxiliary": "tac"}, "doubles a class loss"),
    ({"auxiliary": "adc", "class_loss_on": "real-and-fake"}, "real and fake samples by design"),
    ({"conditioning": "multi-hinge", "adversarial": "least-squares"}, "takes the place of the adversarial loss"),
    ({"method": "wgan", "weight_clip": 0.0}, "needs a bound on the critic"),
    ({"gradient_penalty": 10.0, "weight_clip": 0.01}, "is what replaces --weight-clip"),
    ({"gradient_penalty": 10.0, "dragan": 10.0}, "both hold the gradient's norm at 1"),
    ({"weight_clip": 0.01, "discriminator_spectral": True}, "divides the size of the weights out"),
    ({"one_sided": True}, "--one-sided needs --gradient-penalty"),
    ({"clip_kernels_only": True}, "--clip-kernels-only needs --weight-clip"),
    ({"dataset": "swissroll", "method": "wgan-gp", "train_limit": 9}, "--train-limit is of images"),
    ({"dataset": "swissroll", "method": "wgan-gp", "class_limit": 3}, "--class-limit is of images"),
    ({"r1_every": 4}, "--r1-every needs --r1-weight"),
    ({"lecam_start": 10}, "--lecam-start needs --lecam"),
    ({"zcr_radius": 0.1}, "--zcr-radius needs --zcr-discriminator or --zcr-generator"),
    ({"path_length": 2.0}, "--path-length needs a network with styles"),
    ({"cr_weight": 10.0, "bcr_real": 10.0}, "count the same distance twice"),
    ({"diffaug_policy": ["color"]}, "--diffaug-policy needs --augmentation diffaug"),
    ({"augment_target": 0.5}, "--augment-target needs --augmentation ada or apa"),
    ({"method": "wgan-gp", "augmentation": "ada"}, "no meaningful zero"),
    ({"horizontal_flip": True}, "a mirrored character is another one or none"),
    ({"method": "wgan", "beta1": 0.5}, "--beta1 needs --optimizer adam; here: optimizer rmsprop"),
    ({"ema_decay": 0.9, "ema_half_life": 10.0}, "both say how fast the average forgets"),
    ({"standing_batches": 4}, "--standing-batches needs --batch-norm standing"),
    ({"generator_norm": "none", "batch_norm": "batch"}, "--batch-norm needs a generator with batch normalisation"),
    ({"discriminator_attention": [1]}, "--discriminator-attention does nothing with --network mlp"),
    ({"inception_resize": "pytorch-fid"}, "--inception-resize is of the 2015 Inception's features"),
    ({"method": "wgan-gp", "scores": ["intra-fd"]}, "needs samples with labels"),
    ({"dataset": "swissroll", "method": "wgan-gp", "augmentation": "diffaug"}, "is of images"),
    ({"dataset": "swissroll", "method": "wgan-gp", "network": "random"}, "makes no points"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "reason"), NONSENSE, ids=[" ".join(values) for values, _ in NONSENSE])
def test_nonsense_is_refused_with_the_reason(values, reason):
    with pytest.raises(ConfigError, match=reason.replace("(", r"\(")):
        make_config(GanConfig, values)


@pytest.mark.parametrize("method", PRESETS)
def test_every_method_resolves_on_digits_to_something_without_problems(method):
    config = resolved(method=method)
    assert not list(problems(config))
    assert config.network
    assert config.steps > 0 < config.batch_size
    assert resolve(config) == config
    assert make_config(GanConfig, {k: v for k, v in to_dict(config).items() if v is not None}) == config


def test_a_method_is_its_parts_and_any_can_be_exchanged():
    default = resolved()
    assert (default.method, default.conditioning, default.adversarial) == ("reacgan", "d2dce", "hinge")
    assert (default.class_weight, default.temperature, default.positive_margin) == (0.5, 0.5, 0.98)
    assert default.d2dce_variant == "released"
    for conditioning in CONDITIONING_NAMES:
        for adversarial in ADVERSARIAL_NAMES:
            if conditioning == "multi-hinge" and adversarial != "hinge":
                continue
            extra = {"r1_weight": 1.0} if adversarial == "wasserstein" else {}
            config = resolved(conditioning=conditioning, adversarial=adversarial, **extra)
            assert (config.conditioning, config.adversarial) == (conditioning, adversarial)
            # What belongs to another part is gone with it.
            assert (config.temperature is not None) == (conditioning in ("ac-normalized", "2c", "d2dce"))
            assert (config.positive_margin is not None) == (conditioning == "d2dce")


def test_the_users_values_win():
    config = resolved(method="wgan-gp", generator_lr=0.5, z_dim=7, d_steps=2, ema_half_life=3.0)
    assert (config.generator_lr, config.z_dim, config.d_steps) == (0.5, 7, 2)
    assert (config.ema_half_life, config.ema_decay) == (3.0, 0.0)
    assert resolved(method="wgan", weight_clip=0.0, gradient_penalty=10.0).gradient_penalty == 10.0


def test_data_without_labels_take_unconditional_methods_only():
    with pytest.raises(ConfigError, match="needs labels, and celeba64 has none"):
        resolved(dataset="celeba64", network="mlp")
    with pytest.raises(ConfigError, match="needs labels, and swissroll has none"):
        resolved(dataset="swissroll", method="sngan")
    assert resolved(dataset="swissroll", method="wgan-gp").network == "mlp"


def test_the_command_line_reads_the_options_without_jax():
    code = "import sys; import stabletrain.gan.family; assert 'jax' not in sys.modules, 'JAX was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("method", ["reacgan", "acgan", "biggan", "contragan", "sngan"])
def test_published_settings_on_cifar10(method):
    """Kang et al. 2021 as PyTorch-StudioGAN configures it: note the larger batch and rate of ReACGAN."""
    values = resolved(dataset="cifar10", method=method, network="mlp", generator_width=4)
    batch, rate = (128, 2.8284271e-4) if method == "reacgan" else (64, 2e-4)
    assert (values.batch_size, values.generator_lr, values.d_steps) == (batch, rate, 5)
    assert (values.beta1, values.beta2, values.adam_epsilon, values.steps) == (0.5, 0.999, 1e-6, 100_000)
    assert values.ema_decay == (0.9999 if method in ("reacgan", "biggan", "contragan") else 0.0)


def test_sizes_and_data_sets_have_the_settings_of_their_own_configurations():
    tiny, birds = resolved(dataset="tiny-imagenet"), resolved(dataset="cub200")
    assert (tiny.batch_size, tiny.d_steps, tiny.class_weight, tiny.positive_margin) == (1024, 1, 0.75, 1.0)
    assert (tiny.temperature, tiny.embedding_dim, tiny.generator_width) == (0.75, 768, 80)
    assert (birds.steps, birds.class_weight, birds.positive_margin, birds.temperature) == (40_000, 0.25, 0.95, 0.25)
    assert (birds.embedding_dim, birds.discriminator_width, birds.batch_size) == (1024, 80, 256)
    contrastive = resolved(method="contragan", dataset="tiny-imagenet")
    assert (contrastive.class_weight, contrastive.temperature, contrastive.embedding_dim) == (1.0, 1.0, 768)
    assert resolved(dataset="cub200", network="dcgan").generator_width == 64  # the width 80 is that of BigGAN's


def test_a_discriminator_without_spectral_normalisation_has_batch_normalisation_where_its_paper_does():
    assert resolved(method="acgan", dataset="cifar10").discriminator_norm == "batch"
    assert resolved(method="acgan", dataset="cifar10", discriminator_norm="none").discriminator_norm == "none"
    assert resolved(method="acgan", dataset="cifar10", discriminator_spectral=True).discriminator_norm == "none"
    penalised = resolved(method="acgan", dataset="cifar10", network="mlp", gradient_penalty=10.0)
    assert penalised.discriminator_norm is None  # this network has none, and so nothing is refused
