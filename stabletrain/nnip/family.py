"""The nnip family as the command line sees it. Imports no JAX until one of its functions is called."""

from __future__ import annotations

import dataclasses
from typing import Any

from stabletrain.nnip.config import NnipConfig, base_path, resolve
from stabletrain.nnip.simulate import SUBCOMMANDS
from stabletrain.training.experiment import Experiment, Family


def build(config: NnipConfig, *, mesh: Any, data_spec: Any = None) -> Experiment:
    """The experiment: energies and forces, or StABlE Training; either may start from `--base`.

    The frames are always read: what a potential is for stands in them. Raises: `DataError`, `CheckpointError`.
    """
    from stabletrain.nnip.experiment import NnipExperiment
    from stabletrain.nnip.stable_experiment import StableExperiment

    if config.base is None:
        return NnipExperiment(config, mesh=mesh)
    params = base_params(config, mesh=mesh)
    if not config.stable:
        return NnipExperiment(config, mesh=mesh, base_params=params)
    like = NnipExperiment(config, mesh=mesh)
    return StableExperiment(
        config,
        mesh=mesh,
        potential=like.potential,
        params=params,
        train=like.train,
        test=like.test,
        loss=like.loss,
        data_spec=like.data_spec,
    )


def base_params(config: NnipConfig, *, mesh: Any) -> Any:
    """The preferred weights of the run that `--base` names, from its newest checkpoint."""
    from stabletrain.training.checkpoints import load_state
    from stabletrain.training.config import make_config
    from stabletrain.training.run_directory import RunDirectory

    assert config.base is not None
    path = base_path(config.base)
    stored = make_config(NnipConfig, dict(RunDirectory.open(path).config_values), source=str(path / "config.toml"))
    base: Any = build(dataclasses.replace(stored, data=stored.data or config.data), mesh=mesh)
    state, _ = load_state(base, path)
    return next(iter(base.weights(state).values()))


FAMILY = Family(
    name="nnip",
    help="Train an interatomic potential; StABlE Training makes simulations with it stable.",
    config=NnipConfig,
    build=build,
    resolve=resolve,
    subcommands=SUBCOMMANDS,
    next_commands=("nnip benchmark {run}", "simulate {run}"),
)
