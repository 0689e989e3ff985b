"""What the parity tests compute on both sides: GANs of a few thousand parameters, and their inputs by formula."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stabletrain.data.spec import DataSpec
from stabletrain.gan.conditioning import Head
from stabletrain.gan.config import GanConfig
from stabletrain.gan.experiment import GanExperiment
from stabletrain.gan.objectives import Objectives
from stabletrain.gan.resolution import resolve
from stabletrain.gan.state import Critic, Generator
from stabletrain.training.config import make_config, to_dict
from stabletrain.training.devices import make_mesh
from tests.diffusion.weights import by_name, value_of, wave

CLASSES = 3
BATCH = 5
CRITIC_STEPS = 5
SPEC = DataSpec("waves", 8, 3, CLASSES, tuple(map(str, range(CLASSES))), "", 0, 0)

COMMON: dict[str, Any] = {
    "batch_size": BATCH, "d_steps": CRITIC_STEPS, "steps": 10, "generator_lr": 2.0**-9, "discriminator_lr": 2.0**-8,
    "beta1": 0.5, "beta2": 0.999, "adam_epsilon": 1e-6, "ema_decay": 0.75, "ema_start": 0, "generator_width": 8,
    "discriminator_width": 8, "eval_samples": 0,
}  # fmt: skip

STEPS: dict[str, dict[str, Any]] = {
    "reacgan": {
        "method": "reacgan", "network": "biggan", "z_dim": 6, "shared_dim": 4, "embedding_dim": 5, "inplace_relu": True,
        "generator_attention": (1,), "discriminator_attention": (1,), "generator_spectral": True,
        "discriminator_spectral": True,
    },
    "acgan": {"method": "acgan", "network": "sngan", "z_dim": 4, "discriminator_norm": "batch"},
}  # fmt: skip
"""Whole steps. The widths of 8 pixels: 4 w at the bottom and behind the generator's block, 2 w in the discriminator."""


def step_experiment(name: str) -> GanExperiment:
    """The experiment of one case, without data."""
    config = resolve(make_config(GanConfig, {**COMMON, **STEPS[name]}))
    return GanExperiment(config, mesh=make_mesh(1, BATCH), data_spec=SPEC)


def step_shapes(name: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes by name of the parameters and statistics: `generator/params`, `critic/spectral`, ..."""
    experiment = step_experiment(name)
    state = jax.eval_shape(experiment.init, jax.random.key(0))
    networks = {"generator": state.generator, "critic": state.critic}
    trees = {
        f"{which}/{collection}": tree
        for which, network in networks.items()
        for collection, tree in {"params": network.params, **network.statistics}.items()
    }
    return {name: {key: leaf.shape for key, leaf in by_name(tree).items()} for name, tree in trees.items()}


def start_value(kind: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One parameter or statistic before the first update. `kind`: `generator/params`, ... as in `step_shapes`."""
    name = f"{kind}/{name}"
    if kind.endswith("/batch_stats"):
        return 1.0 + 0.3 * wave(name, shape) if name.endswith("/var") else 0.2 * wave(name, shape)
    values = value_of(name, shape)
    if kind.endswith("/spectral"):
        return values / np.linalg.norm(values)
    return values + 0.4 if name.endswith("/sigma") else values


def step_inputs() -> dict[str, np.ndarray]:
    """Real samples and labels, latents and labels of fakes of each critic update, and the generator's own."""
    labels = np.arange((CRITIC_STEPS + 1) * BATCH).reshape(CRITIC_STEPS + 1, BATCH)
    return {
        "real": wave("real", (CRITIC_STEPS, BATCH, 8, 8, 3)),
        "real_labels": labels[:-1] * 2 % CLASSES,
        "z": 1.5 * wave("z", (CRITIC_STEPS + 1, BATCH, 6)),
        "labels": labels // 2 % CLASSES,
    }


LOSSES: dict[str, dict[str, Any]] = {
    "non-saturating": {"conditioning": "none", "adversarial": "non-saturating"},
    "least-squares": {"conditioning": "none", "adversarial": "least-squares"},
    "hinge": {"conditioning": "none", "adversarial": "hinge"},
    "wasserstein": {"conditioning": "none", "adversarial": "wasserstein", "weight_clip": 1.0},
    "lecam": {"conditioning": "none", "adversarial": "hinge", "lecam": 0.3, "lecam_start": 0},
    "ac": {"conditioning": "ac", "class_weight": 0.7},
    "ac, real and fake": {"conditioning": "ac", "class_weight": 0.7, "class_loss_on": "real-and-fake"},
    "ac-normalized": {"conditioning": "ac-normalized", "temperature": 0.4},
    "projection": {"conditioning": "projection"},
    "sg2-projection": {"conditioning": "sg2-projection"},
    "2c": {"conditioning": "2c", "temperature": 0.8, "embedding_dim": 4},
    "d2dce released": {"conditioning": "d2dce", "temperature": 0.5, "positive_margin": 0.9, "embedding_dim": 4},
    "d2dce as written": {"conditioning": "d2dce", "d2dce_variant": "as_written", "embedding_dim": 4},
    "multi-hinge": {"conditioning": "multi-hinge"},
    "tac": {"conditioning": "ac", "auxiliary": "tac", "class_weight": 0.7},
    "adc": {"conditioning": "ac", "auxiliary": "adc", "class_weight": 0.7},
    "adc of d2dce": {"conditioning": "d2dce", "auxiliary": "adc", "embedding_dim": 4},
}
"""The losses of both networks, each on features [B, 6] that a linear map makes of samples [B, 2]."""
FEATURES = 6


class Linear(nn.Module):
    """tanh of a linear map with the leaf names of every other network."""

    features: int

    @nn.compact
    def __call__(self, samples: jax.Array, labels: jax.Array | None = None, *, train: bool) -> jax.Array:
        return jnp.tanh(nn.Dense(self.features, name="linear")(samples))


def loss_settings(name: str) -> dict[str, Any]:
    """The resolved options of one case."""
    given = {"method": "biggan", "dataset": "digits", **LOSSES[name]}
    return to_dict(resolve(make_config(GanConfig, given)))


def loss_objectives(name: str) -> Objectives:
    """The objectives of one case over linear networks of samples [B, 2]."""
    config = make_config(GanConfig, loss_settings(name))
    kind = config.conditioning or ""
    classes = CLASSES if kind != "none" else 0
    head = Head(
        kind=kind, num_classes=classes, auxiliary=config.auxiliary or "none",
        embedding_dim=config.embedding_dim or 1, equalized=kind == "sg2-projection",
    )  # fmt: skip
    labels = loss_inputs()["labels"]
    return Objectives(
        config,
        Generator(Linear(2), 3, classes, styles=False),
        Critic(Linear(FEATURES), head, (2,)),
        num_classes=classes,
        mixes_samples=False,
        draw=lambda key, count: (loss_inputs()["z"][:count], labels[:count]),
    )


def loss_start(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Parameters of the discriminator and of the generator by name."""
    objectives = loss_objectives(name)
    critic, generator = jax.eval_shape(
        lambda key: (objectives.critic.init(key)[0], objectives.generator.init(key)[0]), jax.random.key(0)
    )
    return tuple(  # type: ignore[return-value]
        {key: value_of(f"{which}/{key}", leaf.shape) for key, leaf in by_name(tree).items()}
        for which, tree in (("critic", critic), ("generator", generator))
    )


def loss_inputs() -> dict[str, np.ndarray]:
    """Samples, labels, latents, and averages of scores."""
    return {
        "real": wave("real", (BATCH, 2)),
        "fake": wave("fake", (BATCH, 2)),
        "real_labels": np.array([0, 2, 1, 0, 2]),
        "labels": np.array([1, 1, 0, 2, 0]),
        "z": 1.5 * wave("latent", (BATCH, 3)),
        "lecam": np.array([0.3, -0.2]),
    }
