"""`stabletrain gan import`: a BigGAN checkpoint of PyTorch-StudioGAN becomes a run, to sample from and evaluate.

Imports no JAX until it runs.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stabletrain.errors import EXIT_OK, ConfigError, nearest
from stabletrain.gan.config import GanConfig
from stabletrain.gan.resolution import resolve
from stabletrain.training.config import make_config

if TYPE_CHECKING:
    from stabletrain.gan.studiogan_import import ImportedDiscriminator, ImportedGenerator


def import_weights(
    generator: Annotated[Path, typer.Argument(metavar="G.pth", help="The generator: model=G-...pth.")],
    discriminator: Annotated[Path, typer.Argument(metavar="D.pth", help="The discriminator: model=D-...pth.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The run directory to make.")],
    method: Annotated[str, typer.Option(help="What it was trained as: reacgan, contragan, acgan or biggan.")],
    average: Annotated[
        Path | None, typer.Option("--ema", metavar="G_ema.pth", help="The averaged generator: model=G_ema-...pth.")
    ] = None,
    dataset: Annotated[str, typer.Option(metavar="NAME", help="What it was trained on.")] = "cifar10",
    inplace_relu: Annotated[
        bool, typer.Option(help="Shortcuts of the discriminator see ReLU(x), as the released code makes them.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> int:
    """Make a run of a BigGAN checkpoint of PyTorch-StudioGAN (ReACGAN, ContraGAN, ACGAN, BigGAN)."""
    from stabletrain.gan.studiogan_import import HEADS, check_pair, read_discriminator, read_generator

    if method not in HEADS:
        raise ConfigError(f"unknown --method {method!r} of a checkpoint: {nearest(method, tuple(HEADS))}")
    made, critic = read_generator(generator), read_discriminator(discriminator)
    averaged = read_generator(average) if average is not None else None
    check_pair(method, made, averaged, critic)
    spec = _spec(dataset, made)
    values: dict[str, Any] = {
        "method": method,
        "dataset": dataset,
        "network": "biggan",
        "z_dim": made.z_dim,
        "shared_dim": made.shared_dim,
        "generator_width": made.width,
        "discriminator_width": critic.width,
        "generator_attention": made.attention,
        "discriminator_attention": critic.attention,
        "generator_spectral": True,
        "discriminator_spectral": True,
        "inplace_relu": inplace_relu,
        "ema_decay": 0.9999 if averaged else 0.0,
    }
    if critic.embedding_dim:
        values["embedding_dim"] = critic.embedding_dim
    if made.image_size != spec["image_size"]:
        spec["image_size"] = values["image_size"] = made.image_size
    config = resolve(make_config(GanConfig, values))
    _write_run(out, config, spec, made, averaged, critic, [generator, discriminator, *([average] if average else [])])
    if as_json:
        print(json.dumps({"run_dir": str(out), "status": "done", "step": config.steps, "metrics": {}}, indent=2))
    else:
        print(f"{out}: BigGAN of width {made.width} at {made.image_size} pixels, {method}, {spec['name']}")
        print(f"next: stabletrain sample {out}")
    return EXIT_OK


def _spec(name: str, generator: ImportedGenerator) -> dict[str, Any]:
    """The record's description of data that are not at hand: classes are counted, the fingerprint is empty."""
    from stabletrain.data.locate import named

    info = named(name)
    if info.num_classes != generator.num_classes:
        raise ConfigError(f"the checkpoint knows {generator.num_classes} classes, but {name} has {info.num_classes}")
    names = info.class_names or tuple(str(number) for number in range(info.num_classes))
    return {
        "name": name,
        "image_size": info.image_size,
        "channels": generator.channels,
        "num_classes": info.num_classes,
        "class_names": list(names),
        "fingerprint": "",
        "train_count": 0,
        "test_count": 0,
    }


def _write_run(
    out: Path,
    config: GanConfig,
    spec: dict[str, Any],
    generator: ImportedGenerator,
    averaged: ImportedGenerator | None,
    critic: ImportedDiscriminator,
    files: list[Path],
) -> None:
    """The run directory, with the weights as its only checkpoint, at the last step of the configuration.

    Raises: `ConfigError` where our networks have other parameters than the files.
    """
    from stabletrain.training.devices import configure_backend, make_mesh

    configure_backend(1, 1)
    import jax
    import jax.numpy as jnp

    from stabletrain.gan.family import FAMILY, build
    from stabletrain.random_keys import random_key
    from stabletrain.training.checkpoints import Checkpoints
    from stabletrain.training.clock import Clock
    from stabletrain.training.run_directory import RunDirectory

    experiment = build(config, mesh=make_mesh(1, 1), data_spec=spec)
    due = jax.eval_shape(experiment.init, random_key(0))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), due)

    def network(name: str, now: Any, variables: dict[str, Any]) -> Any:
        ours = {"params": now.params, **now.statistics}
        shapes = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (ours, variables))
        if len({json.dumps(tree, sort_keys=True) for tree in shapes}) > 1:
            raise ConfigError(
                f"{', '.join(map(str, files))}: the {name} has other layers than BigGAN's of these widths"
            )
        given = jax.tree.map(jnp.asarray, variables)
        return now.replace(params=given.pop("params"), statistics=given)

    state = state.replace(
        generator=network("generator", state.generator, generator.variables),
        critic=network("discriminator", state.critic, critic.variables),
        ema=None if averaged is None else jax.tree.map(jnp.asarray, averaged.variables),
    )
    run = RunDirectory.create(out, FAMILY.name, config)
    run.update_record(data=spec, imported_from=", ".join(file.name for file in files))
    Checkpoints(run.path).save(config.steps, state, dataclasses.asdict(Clock(step=config.steps)), wait=True)
    run.write_status("done", config.steps, config.steps, reason="imported weights; not trained here")
    run.release()
