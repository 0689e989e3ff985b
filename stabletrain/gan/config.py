"""The options of `stabletrain gan`. Imports no JAX: the command line reads it to answer `--help`.

Values left open are filled in by `stabletrain.gan.resolution`, from the method, the network and the data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from stabletrain.errors import ConfigError
from stabletrain.gan.networks import NETWORKS
from stabletrain.gan.presets import PRESETS
from stabletrain.metrics.score_config import ScoreConfig
from stabletrain.training.config import option

METHOD_NAMES = tuple(PRESETS)
ADVERSARIAL_NAMES = ("non-saturating", "least-squares", "hinge", "wasserstein")
CONDITIONING_NAMES = (
    "none", "ac", "ac-normalized", "projection", "sg2-projection", "2c", "d2dce", "multi-hinge",
)  # fmt: skip
AUXILIARY_NAMES = ("none", "tac", "adc")
AUGMENTATION_NAMES = ("none", "diffaug", "ada", "apa")
BATCH_NORM_NAMES = ("running", "batch", "standing")

METHOD, CONDITION, REGULARISE, AUGMENT = "Method", "Conditioning", "Regularisation", "Augmentation"
NETWORK, OPTIMISER, EVALUATION = "Network", "Optimiser", "Evaluation"


@dataclass(frozen=True, kw_only=True)
class GanConfig(ScoreConfig):
    """A GAN. Values not given are the method's, the network's or the data set's; see `resolve`."""

    steps: int = option(0, "Number of training steps (generator updates); 0 chooses.", minimum=0)
    batch_size: int = option(0, "Examples in an update, over all devices; 0 chooses.", minimum=0)
    generator_batch: int = option(0, "Fakes in a generator update; 0: as many as --batch-size.", minimum=0)
    image_size: int = option(
        0, "Crop and resize images to this many pixels; 0: as the data set has them.", panel="Data", minimum=0
    )
    train_limit: int = option(
        0, "Train on this many of the training images, always the same ones; 0: on all.", panel="Data", minimum=0
    )
    class_limit: int = option(0, "Only the first so many classes of the data; 0: all of them.", panel="Data", minimum=0)
    horizontal_flip: bool | None = option(None, "Mirror training images at random; chosen by data set.", panel="Data")
    dequantize: bool | None = option(None, "Add uniform noise of one grey level to training images.", panel="Data")

    method: str = option(
        "reacgan", "Method by name; each of its parts can be exchanged by its own option.", panel=METHOD,
        choices=METHOD_NAMES,
    )  # fmt: skip
    adversarial: str | None = option(None, "Adversarial loss.", panel=METHOD, choices=ADVERSARIAL_NAMES)
    d_steps: int | None = option(None, "Updates of the discriminator per generator update.", panel=METHOD, minimum=1)

    conditioning: str | None = option(
        None, "How the discriminator learns the labels.", panel=CONDITION, choices=CONDITIONING_NAMES
    )
    auxiliary: str | None = option(
        None, "A second classifier of fakes (tac), or one of classes, real and fake (adc).", panel=CONDITION,
        choices=AUXILIARY_NAMES,
    )  # fmt: skip
    class_weight: float | None = option(None, "Weight of the class loss (lambda).", panel=CONDITION, minimum=0.0)
    generator_class_weight: float | None = option(
        None, "The generator's, where it is another one.", panel=CONDITION, minimum=0.0
    )
    class_loss_on: str | None = option(
        None, "Samples that the discriminator's class loss is of.", panel=CONDITION, choices=("real", "real-and-fake")
    )
    temperature: float | None = option(None, "Temperature of cosines (tau).", panel=CONDITION, minimum=1e-3)
    positive_margin: float | None = option(
        None, "d2dce: cosine to its proxy above which a sample is left alone (m_p).", panel=CONDITION, minimum=-1.0,
        maximum=1.0,
    )  # fmt: skip
    d2dce_variant: str | None = option(
        None, "d2dce: the loss of the released code or as printed.", panel=CONDITION, choices=("released", "as_written")
    )
    embedding_dim: int | None = option(None, "2c, d2dce: size of embeddings and proxies.", panel=CONDITION, minimum=1)

    gradient_penalty: float | None = option(
        None, "Weight of WGAN-GP's gradient penalty (lambda).", panel=REGULARISE, minimum=0.0
    )
    one_sided: bool | None = option(
        None, "Penalise only gradients of a norm above 1 (--gradient-penalty).", panel=REGULARISE
    )
    weight_clip: float | None = option(
        None, "Clip the discriminator's parameters to this size after each update.", panel=REGULARISE, minimum=0.0
    )
    clip_kernels_only: bool | None = option(
        None, "Clip only the kernels, not biases and the scales of normalisation (--weight-clip).", panel=REGULARISE
    )
    dragan: float | None = option(None, "Weight of DRAGAN's penalty around the data.", panel=REGULARISE, minimum=0.0)
    r1_weight: float | None = option(
        None, "Weight of the squared gradient at real samples (R1, gamma).", panel=REGULARISE, minimum=0.0
    )
    r1_every: int | None = option(
        None, "Discriminator updates from one R1 term to the next.", panel=REGULARISE, minimum=1
    )
    lecam: float | None = option(None, "Weight of LeCam's regulariser.", panel=REGULARISE, minimum=0.0)
    lecam_start: int | None = option(None, "Step at which LeCam's regulariser begins.", panel=REGULARISE, minimum=0)
    lecam_decay: float | None = option(
        None, "Decay of LeCam's averages of scores.", panel=REGULARISE, minimum=0.0, maximum=0.999999
    )
    cr_weight: float | None = option(
        None, "Weight of consistency of real samples under flips and shifts (CR).", panel=REGULARISE, minimum=0.0
    )
    bcr_real: float | None = option(
        None, "Balanced consistency (bCR): weight of real samples.", panel=REGULARISE, minimum=0.0
    )
    bcr_fake: float | None = option(
        None, "Balanced consistency: weight of fake samples.", panel=REGULARISE, minimum=0.0
    )
    zcr_radius: float | None = option(
        None, "Latent consistency (zCR): deviation of the shift of z.", panel=REGULARISE, minimum=0.0
    )
    zcr_discriminator: float | None = option(
        None, "Latent consistency: the discriminator's weight.", panel=REGULARISE, minimum=0.0
    )
    zcr_generator: float | None = option(
        None, "Latent consistency: the generator's weight, which asks for different samples.", panel=REGULARISE,
        minimum=0.0,
    )  # fmt: skip
    orthogonality: float | None = option(
        None, "Weight of BigGAN's orthogonal regularisation of the generator's filters.", panel=REGULARISE, minimum=0.0
    )
    path_length: float | None = option(
        None, "Weight of path length regularisation of the styles.", panel=REGULARISE, minimum=0.0
    )
    path_length_every: int | None = option(
        None, "Generator updates from one path length term to the next.", panel=REGULARISE, minimum=1
    )

    augmentation: str | None = option(
        None, "What the discriminator sees of every sample.", panel=AUGMENT, choices=AUGMENTATION_NAMES
    )
    diffaug_policy: tuple[str, ...] = option(
        (), "diffaug: operations; all by default.", panel=AUGMENT, choices=("color", "translation", "cutout")
    )
    augment_target: float | None = option(
        None, "ada, apa: mean sign of real scores that the probability follows.", panel=AUGMENT, minimum=-1.0,
        maximum=1.0,
    )  # fmt: skip
    augment_interval: int | None = option(
        None, "ada, apa: discriminator updates between two steps of the probability.", panel=AUGMENT, minimum=1
    )
    augment_images: float | None = option(
        None, "ada, apa: thousands of images in which the probability can go from 0 to 1.", panel=AUGMENT, minimum=1e-3
    )

    network: str | None = option(None, "Pair of networks.", panel=NETWORK, choices=tuple(NETWORKS))
    z_dim: int | None = option(None, "Size of the latent.", panel=NETWORK, minimum=1)
    generator_width: int | None = option(
        None, "Channels (features) that the widths multiply.", panel=NETWORK, minimum=1
    )
    discriminator_width: int | None = option(None, "The same of the discriminator.", panel=NETWORK, minimum=1)
    depth: int | None = option(None, "Layers, or blocks per resolution.", panel=NETWORK, minimum=1)
    shared_dim: int | None = option(
        None, "Size of the class embedding that the layers share; 0: one-hot labels.", panel=NETWORK, minimum=0
    )
    generator_attention: tuple[int, ...] | None = option(
        None, "Generator blocks that self-attention follows, counted from 1.", panel=NETWORK
    )
    discriminator_attention: tuple[int, ...] | None = option(
        None, "Discriminator blocks that self-attention follows, counted from 1.", panel=NETWORK
    )
    generator_spectral: bool | None = option(None, "Spectral normalisation of the generator.", panel=NETWORK)
    discriminator_spectral: bool | None = option(None, "Spectral normalisation of the discriminator.", panel=NETWORK)
    generator_norm: str | None = option(
        None, "Normalisation in the generator.", panel=NETWORK, choices=("none", "batch")
    )
    discriminator_norm: str | None = option(
        None, "Normalisation in the discriminator.", panel=NETWORK, choices=("none", "batch", "layer")
    )
    inplace_relu: bool | None = option(
        None, "Shortcuts of the discriminator see ReLU(x), as in PyTorch-StudioGAN.", panel=NETWORK
    )
    style_mixing: float | None = option(
        None, "Probability of mixing the styles of two latents.", panel=NETWORK, minimum=0.0, maximum=1.0
    )
    discriminator_shortcuts: bool | None = option(
        None, "stylegan2: residual blocks in the discriminator; from 64 pixels on by default.", panel=NETWORK
    )
    architecture: int | None = option(
        None, "random: number of the architecture; the seed's by default.", panel=NETWORK, minimum=0
    )
    scan_blocks: bool | None = option(None, "Equal blocks as one compiled loop.", panel=NETWORK)
    remat: bool | None = option(None, "Compute activations again in the backward pass.", panel=NETWORK)

    optimizer: str | None = option(
        None, "Optimiser; rmsprop is TensorFlow 1's, as WGAN uses it.", panel=OPTIMISER, choices=("adam", "rmsprop")
    )
    generator_lr: float | None = option(None, "Learning rate of the generator.", panel=OPTIMISER, minimum=0.0)
    discriminator_lr: float | None = option(None, "Learning rate of the discriminator.", panel=OPTIMISER, minimum=0.0)
    lr_decay: str | None = option(
        None, "Course of both learning rates.", panel=OPTIMISER, choices=("constant", "linear")
    )
    beta1: float | None = option(
        None, "adam: decay of the first moment.", panel=OPTIMISER, minimum=0.0, maximum=0.9999999
    )
    beta2: float | None = option(
        None, "adam: decay of the second moment.", panel=OPTIMISER, minimum=0.0, maximum=0.9999999
    )
    adam_epsilon: float | None = option(None, "adam: epsilon beside the root.", panel=OPTIMISER, minimum=0.0)
    ema_decay: float | None = option(
        None, "Decay of the generator's moving average; 0: none is kept.", panel=OPTIMISER, minimum=0.0,
        maximum=0.9999999,
    )  # fmt: skip
    ema_half_life: float | None = option(
        None, "Half-life of the average in thousands of images, in place of a decay.", panel=OPTIMISER, minimum=0.0
    )
    ema_rampup: float | None = option(
        None, "With a half-life: at most this share of the images seen so far; 0: no limit.", panel=OPTIMISER,
        minimum=0.0,
    )  # fmt: skip
    ema_start: int | None = option(None, "Step before which the average is a copy.", panel=OPTIMISER, minimum=0)

    batch_norm: str | None = option(
        None, "Statistics of batch normalisation in samples: running averages, each batch's own, or standing ones.",
        panel=EVALUATION, choices=BATCH_NORM_NAMES,
    )  # fmt: skip
    standing_batches: int | None = option(
        None, "standing: batches of samples that the statistics are of.", panel=EVALUATION, minimum=1
    )
    sampling_batch: int = option(250, "Samples generated at once.", panel=EVALUATION, minimum=1, identity=False)

    def check(self) -> None:
        """Raises: `ConfigError` for options that contradict each other or would do nothing."""
        from stabletrain.gan.resolution import problems

        for problem in problems(self):
            raise ConfigError(problem)


Value = TypeVar("Value")


def filled(value: Value | None) -> Value:
    """An option's value after `resolve`. Raises: `ValueError` for a configuration that was not resolved."""
    if value is None:
        raise ValueError("the configuration has open values: call resolve(config) first")
    return value
