"""The networks by name, and what a network of this family is. Imports no JAX until one is built.

**Generator** (a Flax Linen module)

    generator.apply(variables, z [B, z_dim], labels int32 [B] | None, train=..., rngs={"noise": key})
        -> samples [B, *sample_shape], images in [-1, 1]

**Discriminator** (the trunk; `stabletrain.gan.conditioning.Head` makes scores of its features)

    discriminator.apply(variables, samples, train=...) -> features [B, F] after the last activation and pooling

Collections of both: `params`; `batch_stats`, the running statistics of batch normalisation; `spectral`, the vectors of
the power iteration, kept apart from the raw kernels. With `train=True` batch normalisation takes the batch's own
statistics and the power iteration goes on by one step; both are kept where the caller makes their collection mutable
and forgotten where not. With `train=False` nothing evolves and running statistics are used. A network without one of
the collections simply has none.

The stream `noise` is there in every call of a generator, in training and in sampling: layers that need noise take it
from there (`self.make_rng("noise")`), the others ignore it.

A generator that has styles (`NetworkSpec.styles`) also has the methods `styles(z, labels, *, train) -> [B, L, D]` and
`synthesize(styles, *, train) -> samples`, which `__call__` joins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class NetworkOptions:
    """What networks are built from: the shape of the data and the options of the command line."""

    sample_shape: tuple[int, ...]
    """(H, W, C) of images; a domain's own otherwise."""
    num_classes: int
    """Classes that the generator is told of; 0: it is told of none."""
    z_dim: int
    generator_width: int
    """Channels (features of an MLP) that the widths of all layers are multiples of."""
    discriminator_width: int
    depth: int = 0
    """Blocks per resolution, or layers, where a network has a choice."""
    shared_dim: int = 0
    """Size of the class embedding that the layers share; 0: labels enter as one-hot vectors."""
    generator_attention: tuple[int, ...] = ()
    """Blocks that self-attention follows, counted from 1."""
    discriminator_attention: tuple[int, ...] = ()
    generator_spectral: bool = False
    """Spectral normalisation of the generator's layers."""
    discriminator_spectral: bool = False
    generator_norm: str = "batch"
    """`batch` (with class-conditional scale and shift where labels are known) or `none`."""
    discriminator_norm: str = "none"
    """`none`, `batch` or `layer`."""
    inplace_relu: bool = False
    """Shortcuts of the discriminator receive ReLU(x), as StudioGAN's in-place activation makes them."""
    style_mixing: float = 0.0
    """Probability of mixing two latents' styles in training, where there are styles."""
    discriminator_shortcuts: bool = True
    """Shortcuts beside the discriminator's convolutions, where there is a choice."""
    architecture: int = 0
    """Number of a random architecture."""
    scan_blocks: bool = False
    """Equal blocks as one compiled loop: less to compile, and slower on a CPU."""
    remat: bool = False
    """Activations are computed again in the backward pass: less memory, and slower."""
    dtype: Any = None
    """Type of matrix products and convolutions; None: float32."""


Builder = Callable[[NetworkOptions], Any]


def _accepted(options: NetworkOptions) -> None:
    del options


def _any_size(size: int) -> Mapping[str, Any]:
    del size
    return {}


@dataclass(frozen=True)
class NetworkSpec:
    """A pair of networks as the configuration knows it. The builders import JAX when they are called."""

    help: str
    generator: Builder
    discriminator: Builder
    follows: frozenset[str]
    """The fields of `NetworkOptions` beyond shapes, z_dim and widths that change it; giving another one is refused."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of `NetworkOptions` fields where neither the method nor the user says otherwise."""
    sized: Callable[[int], Mapping[str, Any]] = _any_size
    """What differs from `defaults` for images of so many pixels along a side (0: not known yet)."""
    convolutional: bool = True
    """Convolutions inside a loop are slow on a CPU, so inner steps are unrolled there."""
    deep: bool = False
    """So many layers that the discriminator's updates in a step stay a loop: unrolled they compile for minutes."""
    styles: bool = False
    """The generator has styles: mixing and path length regularisation are possible."""
    mixes_samples: bool = False
    """A feature of the discriminator depends on the whole batch whatever the options (minibatch statistics)."""
    kinds: frozenset[str] = frozenset({"images"})
    """The kinds of domain (`stabletrain.gan.domains.DomainSpec.kind`) whose samples it makes and judges."""
    check: Callable[[NetworkOptions], None] = _accepted
    """Raises `ConfigError` for options that it cannot be built with, naming valid ones."""


def _mlp_generator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.mlp import MLPGenerator

    return MLPGenerator.of(options)


def _mlp_discriminator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.mlp import MLPDiscriminator

    return MLPDiscriminator.of(options)


def _lsun(name: str, about: str) -> NetworkSpec:
    """One of the pairs that WGAN-GP's paper trains on LSUN bedrooms."""

    def generator(options: NetworkOptions) -> Any:
        from stabletrain.gan.networks.lsun import lsun_generator

        return lsun_generator(name, options)

    def discriminator(options: NetworkOptions) -> Any:
        from stabletrain.gan.networks.lsun import lsun_critic

        return lsun_critic(name, options)

    def check(options: NetworkOptions) -> None:
        from stabletrain.gan.networks.lsun import check_lsun

        check_lsun(options)

    unnormalised = {"plain-g": {"discriminator_norm"}, "mlp-g": {"discriminator_norm"}, "no-norm": set()}
    return NetworkSpec(
        help=about,
        generator=generator,
        discriminator=discriminator,
        follows=frozenset(unnormalised.get(name, {"generator_norm", "discriminator_norm"})),
        defaults={"z_dim": 128, "generator_width": 64, "discriminator_width": 64},
        check=check,
    )


def _resnet101_generator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.resnet101 import resnet101_generator

    return resnet101_generator(options)


def _resnet101_discriminator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.resnet101 import resnet101_critic

    return resnet101_critic(options)


def _check_resnet101(options: NetworkOptions) -> None:
    from stabletrain.gan.networks.resnet101 import check_resnet101

    check_resnet101(options)


def _wgan_gp_resnet_generator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.wgan_gp_resnet import resnet_generator

    return resnet_generator(options)


def _wgan_gp_resnet_discriminator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.wgan_gp_resnet import resnet_critic

    return resnet_critic(options)


def _check_wgan_gp_resnet(options: NetworkOptions) -> None:
    from stabletrain.gan.networks.wgan_gp_resnet import check_wgan_gp_resnet

    check_wgan_gp_resnet(options)


def _random_generator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.random_architecture import random_generator

    return random_generator(options)


def _random_discriminator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.random_architecture import random_critic

    return random_critic(options)


def _check_random(options: NetworkOptions) -> None:
    from stabletrain.gan.networks.random_architecture import check_random

    check_random(options)


def _text_generator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.text_resnet import text_generator

    return text_generator(options)


def _text_discriminator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.text_resnet import text_critic

    return text_critic(options)


def _check_text(options: NetworkOptions) -> None:
    from stabletrain.gan.networks.text_resnet import check_text

    check_text(options)


def _dcgan_generator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.dcgan import DCGANGenerator

    return DCGANGenerator(options)


def _dcgan_discriminator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.dcgan import DCGANDiscriminator

    return DCGANDiscriminator(options)


def _check_images(options: NetworkOptions) -> None:
    from stabletrain.gan.networks.blocks import check_images

    check_images(options)


def _resnet_generator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.resnet import ResNetGenerator

    return ResNetGenerator(options)


def _resnet_discriminator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.resnet import ResNetDiscriminator

    return ResNetDiscriminator(options)


def _check_resnet(options: NetworkOptions) -> None:
    from stabletrain.gan.networks.resnet import check_resnet

    check_resnet(options)


def _biggan_generator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.biggan import BigGANGenerator

    return BigGANGenerator(options)


def _check_biggan(options: NetworkOptions) -> None:
    from stabletrain.gan.networks.biggan import check_biggan

    check_biggan(options)


def _deep_generator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.biggan_deep import DeepGenerator

    return DeepGenerator(options)


def _deep_discriminator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.biggan_deep import DeepDiscriminator

    return DeepDiscriminator(options)


def _check_deep(options: NetworkOptions) -> None:
    from stabletrain.gan.networks.biggan_deep import check_biggan_deep

    check_biggan_deep(options)


def _stylegan2_generator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.stylegan2 import StyleGAN2Generator

    return StyleGAN2Generator(options)


def _stylegan2_discriminator(options: NetworkOptions) -> Any:
    from stabletrain.gan.networks.stylegan2 import StyleGAN2Discriminator

    return StyleGAN2Discriminator(options)


def _check_stylegan2(options: NetworkOptions) -> None:
    from stabletrain.gan.networks.stylegan2 import check_stylegan2

    check_stylegan2(options)


_ATTENTION: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    8: ((1,), (1,)), 16: ((2,), (1,)), 32: ((2,), (1,)), 64: ((3,), (1,)), 128: ((4,), (1,)), 256: ((5,), (2,)),
}  # fmt: skip
"""Blocks of generator and discriminator that attention follows: 16 to 64 pixels from 32 on, as BigGAN has it."""


def _attention_sized(size: int) -> Mapping[str, Any]:
    generator, discriminator = _ATTENTION.get(size, ((), ()))
    return {"generator_attention": generator, "discriminator_attention": discriminator}


def _biggan_sized(size: int) -> Mapping[str, Any]:
    parts = {8: 2, 16: 3, 32: 4, 64: 5, 128: 6, 256: 7}.get(size)  # 20 numbers of the latent for each
    widths = {64: 80}.get(size, 96)
    sized = {**_attention_sized(size), "generator_width": widths, "discriminator_width": widths}
    return {**sized, "z_dim": 20 * parts} if parts else sized


def _stylegan2_sized(size: int) -> Mapping[str, Any]:
    return {"discriminator_shortcuts": not 0 < size <= 32}  # without on CIFAR-10: Karras et al. 2020a


_CONVOLUTIONAL = frozenset({"generator_spectral", "discriminator_spectral", "generator_norm", "discriminator_norm"})
_ATTENTIVE = frozenset({"generator_attention", "discriminator_attention"})
_RESIDUAL = _CONVOLUTIONAL | _ATTENTIVE | {"inplace_relu"}

NETWORKS: dict[str, NetworkSpec] = {
    "dcgan": NetworkSpec(
        help="Transposed and strided convolutions, for images of 8 to 256 pixels.",
        generator=_dcgan_generator,
        discriminator=_dcgan_discriminator,
        follows=_CONVOLUTIONAL,
        defaults={"z_dim": 128, "generator_width": 64, "discriminator_width": 64},
        check=_check_images,
    ),
    "sngan": NetworkSpec(
        help="Residual networks of SNGAN, for images of 8 to 256 pixels.",
        generator=_resnet_generator,
        discriminator=_resnet_discriminator,
        follows=_RESIDUAL,
        defaults={"z_dim": 128, "generator_width": 64, "discriminator_width": 64},
        check=_check_resnet,
    ),
    "sagan": NetworkSpec(
        help="SNGAN's with self-attention.",
        generator=_resnet_generator,
        discriminator=_resnet_discriminator,
        follows=_RESIDUAL,
        defaults={"z_dim": 128, "generator_width": 64, "discriminator_width": 64},
        sized=_attention_sized,
        check=_check_resnet,
    ),
    "biggan": NetworkSpec(
        help="Residual networks with a shared class embedding and a latent in parts.",
        generator=_biggan_generator,
        discriminator=_resnet_discriminator,
        follows=_RESIDUAL | {"shared_dim"},
        defaults={"z_dim": 120, "generator_width": 96, "discriminator_width": 96, "shared_dim": 128},
        sized=_biggan_sized,
        check=_check_biggan,
    ),
    "biggan-deep": NetworkSpec(
        help="BigGAN with bottleneck blocks, --depth of them per resolution.",
        generator=_deep_generator,
        discriminator=_deep_discriminator,
        follows=_RESIDUAL | {"shared_dim", "depth"},
        defaults={"z_dim": 128, "generator_width": 128, "discriminator_width": 128, "shared_dim": 128, "depth": 2},
        sized=_attention_sized,
        check=_check_deep,
    ),
    "stylegan2": NetworkSpec(
        help="Convolutions scaled by styles, for images of 8 to 256 pixels; --depth layers make the styles.",
        generator=_stylegan2_generator,
        discriminator=_stylegan2_discriminator,
        follows=frozenset({"depth", "style_mixing", "discriminator_shortcuts"}),
        defaults={"z_dim": 512, "generator_width": 512, "discriminator_width": 512, "depth": 2},
        sized=_stylegan2_sized,
        styles=True,
        mixes_samples=True,
        check=_check_stylegan2,
    ),
    "mlp": NetworkSpec(
        help="Fully connected, for images of up to 32 pixels and for points.",
        generator=_mlp_generator,
        discriminator=_mlp_discriminator,
        follows=frozenset({"depth", "generator_norm", "generator_spectral", "discriminator_spectral"}),
        defaults={"z_dim": 32, "generator_width": 256, "discriminator_width": 256, "depth": 2},
        convolutional=False,
        kinds=frozenset({"images", "points"}),
    ),
    "lsun-dcgan": _lsun("dcgan", "DCGAN of the LSUN comparison: 5x5 convolutions, widths doubling."),
    "lsun-plain-g": _lsun("plain-g", "LSUN comparison: generator of constant width without normalisation."),
    "lsun-mlp-g": _lsun("mlp-g", "LSUN comparison: generator of four fully connected layers of 512."),
    "lsun-no-norm": _lsun("no-norm", "LSUN comparison: DCGAN without any normalisation."),
    "lsun-gated": _lsun("gated", "LSUN comparison: tanh times a sigmoid gate after every layer."),
    "lsun-tanh": _lsun("tanh", "LSUN comparison: tanh for every nonlinearity."),
    "cifar-dcgan": _lsun("cifar", "DCGAN of WGAN-GP's CIFAR-10 curves: started as He et al., 128 wide as published."),
    "resnet101": NetworkSpec(
        help="101-layer bottleneck residual networks, for images of 64 pixels.",
        generator=_resnet101_generator,
        discriminator=_resnet101_discriminator,
        follows=frozenset({"generator_norm", "discriminator_norm", "scan_blocks", "remat"}),
        defaults={"z_dim": 128, "generator_width": 64, "discriminator_width": 64},
        deep=True,
        check=_check_resnet101,
    ),
    "wgan-gp-resnet": NetworkSpec(
        help="Residual networks of WGAN-GP on CIFAR-10, for images of 16, 32, 64, ... pixels.",
        generator=_wgan_gp_resnet_generator,
        discriminator=_wgan_gp_resnet_discriminator,
        follows=frozenset({"generator_norm"}),
        defaults={"z_dim": 128, "generator_width": 128, "discriminator_width": 128},
        check=_check_wgan_gp_resnet,
    ),
    "random": NetworkSpec(
        help="One of 9,216 random architectures (--architecture), for images of 8 to 32 pixels.",
        generator=_random_generator,
        discriminator=_random_discriminator,
        follows=frozenset({"generator_norm", "discriminator_norm", "architecture"}),
        defaults={"z_dim": 128, "generator_width": 64, "discriminator_width": 64},
        check=_check_random,
    ),
    "text-resnet": NetworkSpec(
        help="Residual networks over characters, for --dataset text.",
        generator=_text_generator,
        discriminator=_text_discriminator,
        follows=frozenset({"depth"}),
        defaults={"z_dim": 128, "generator_width": 512, "discriminator_width": 512, "depth": 5},
        convolutional=False,
        kinds=frozenset({"text"}),
        check=_check_text,
    ),
}
"""Every pair of networks, by the name that `--network` takes."""
