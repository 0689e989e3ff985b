"""The nnip family as the command line sees it. Imports no JAX until one of its functions is called."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from stabletrain.nnip.config import NnipConfig, base_path, default_base, default_base_path, resolve
from stabletrain.nnip.simulate import SUBCOMMANDS
from stabletrain.training.experiment import Experiment, Family, Needed


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
    """The preferred weights of the run that `--base` names, from its newest checkpoint.

    Raises: `DataError` when it was trained on other frames; `CheckpointError`.
    """
    from stabletrain.nnip.stored import check_frames
    from stabletrain.training.checkpoints import load_state
    from stabletrain.training.config import make_config
    from stabletrain.training.run_directory import RunDirectory

    assert config.base is not None
    path = base_path(config.base)
    stored = make_config(NnipConfig, dict(RunDirectory.open(path).config_values), source=str(path / "config.toml"))
    where = {name: getattr(config, name) for name in ("data", "energy_unit", "length_unit")}  # the file may have moved
    base: Any = build(dataclasses.replace(stored, **where), mesh=mesh)
    check_frames(path, base.data_spec)
    state, _ = load_state(base, path)
    return next(iter(base.weights(state).values()))


def needs(config: NnipConfig) -> Needed | None:
    """The base of StABlE Training that no --base named, where it is not there yet."""
    if not config.stable:
        return None
    base = default_base(config)
    path = default_base_path(base)
    if config.base != path.as_posix() or is_done(path):
        return None
    return Needed(base, path, f"--stable without --base: the base {path} is not there and is trained first")


def is_done(path: Path) -> bool:
    """Whether a run there came to its end."""
    status = path / "status.json"
    return status.is_file() and json.loads(status.read_text(encoding="utf-8")).get("state") == "done"


FAMILY = Family(
    name="nnip",
    help="Train an interatomic potential; StABlE Training makes simulations with it stable.",
    config=NnipConfig,
    build=build,
    resolve=resolve,
    needs=needs,
    by_seed=("base", "split_seed"),
    subcommands=SUBCOMMANDS,
    next_commands=("nnip benchmark {run}", "simulate {run}"),
)
