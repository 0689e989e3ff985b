"""Configuration of the nnip family. Imports no JAX."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stabletrain.errors import ConfigError
from stabletrain.nnip.stable_options import StableOptions, stable_problems, unused_stable_options
from stabletrain.training.config import (
    LARGEST_SEED,
    TrainConfig,
    identity,
    make_config,
    option,
    read_toml,
    replace,
    run_name,
    to_dict,
)

RUNS = Path("runs")
"""Where the command line keeps runs, below the working directory."""

NETWORK, OPTIMISER, DATA = "Potential", "Optimiser", "Data"
ENERGY_LOSSES, FORCE_LOSSES = ("total", "per-atom"), ("squared", "length")
MODELS = ("schnet", "painn", "nequip", "gemnet-t")

ENERGY_UNITS, LENGTH_UNITS = ("eV", "kcal/mol", "kJ/mol", "hartree"), ("A", "bohr")
"""As `stabletrain.nnip.frames` converts them."""

FROM_BASE = ("dataset", "data", "energy_unit", "length_unit", "train_frames", "test_frames", "model",
             "features", "interactions", "cutoff", "energy_weight", "force_weight", "energy_loss",
             "force_loss")  # fmt: skip
"""What a run that starts from another takes from it where nothing else is given."""


@dataclass(frozen=True, kw_only=True)
class NnipConfig(StableOptions, TrainConfig):
    """Training an interatomic potential on energies and forces, and StABlE Training of one."""

    dataset: str = option(
        "aspirin-xtb",
        "Data set: aspirin-xtb, ethanol-xtb and ac-ala3-xtb are bundled, water-flexible is made once.",
        panel=DATA,
    )
    data: str | None = option(None, "Your own frames: .npz (R, E, F, z) or a file that ASE reads.", panel=DATA)
    energy_unit: str | None = option(
        None,
        "Unit of an .npz file's energies. [default: what the file says, else kcal/mol, as MD17]",
        panel=DATA,
        choices=ENERGY_UNITS,
    )
    length_unit: str | None = option(
        None, "Unit of an .npz file's lengths. [default: A]", panel=DATA, choices=LENGTH_UNITS
    )
    train_frames: int = option(0, "Frames to train on; 0 chooses.", panel=DATA, minimum=0)
    validation_frames: int | None = option(
        None,
        "Held-out frames that choose the weights; 0: none. [default: as many as to train on, at most 50]",
        panel=DATA,
        minimum=0,
    )
    test_frames: int = option(0, "Held-out frames that nothing is chosen by; 0 chooses.", panel=DATA, minimum=0)
    split_seed: int | None = option(
        None, "Seed of the split. [default: that of the base, else --seed]", panel=DATA, minimum=0, maximum=LARGEST_SEED
    )

    model: str = option(
        "schnet", "Network. painn and nequip are equivariant, gemnet-t sees angles.", panel=NETWORK, choices=MODELS
    )
    features: int = option(0, "Features of an atom; 0 chooses.", panel=NETWORK, minimum=0)
    interactions: int = option(0, "Interaction blocks; 0 chooses.", panel=NETWORK, minimum=0)
    cutoff: float = option(5.0, "Cutoff in A.", panel=NETWORK, minimum=1.0)

    steps: int = option(0, "Updates; with --stable windows of dynamics; 0 chooses.", minimum=0)
    batch_size: int = option(0, "Frames in a step; 0 chooses: a fifth of all, at most 25.", minimum=0)
    on_spike: str = option(
        "log", "What to do with a loss spike.", panel="Stability", choices=("log", "skip", "clip", "rollback", "stop")
    )
    learning_rate: float = option(2e-3, "Peak learning rate (Adam).", panel=OPTIMISER, minimum=0.0)
    lr_decay: str = option(
        "cosine",
        "How the learning rate falls; plateau: to 0.8 of it when the validation loss has stopped falling.",
        panel=OPTIMISER,
        choices=("cosine", "plateau", "constant"),
    )
    warmup_steps: int = option(0, "Updates over which the rate grows from a fifth.", panel=OPTIMISER, minimum=0)
    validate_every: int = option(
        0, "Updates between looks at the validation loss; 0 chooses: an epoch, at least 50.", panel=OPTIMISER, minimum=0
    )
    validation_patience: int = option(
        5, "plateau: looks without a lower loss before the rate falls.", panel=OPTIMISER, minimum=0
    )
    minimum_rate: float = option(1e-6, "plateau: the rate falls no lower.", panel=OPTIMISER, minimum=0.0)
    beta2: float = option(0.999, "Adam: decay of the squares' average.", panel=OPTIMISER, minimum=0.0, maximum=0.99999)
    gradient_clip: float = option(
        10.0, "Clip the global gradient norm to this; 0: never.", panel=OPTIMISER, minimum=0.0
    )
    energy_weight: float = option(0.05, "Weight of the squared energy error.", panel=OPTIMISER, minimum=0.0)
    force_weight: float = option(0.95, "Weight of the force error.", panel=OPTIMISER, minimum=0.0)
    energy_loss: str = option(
        "total", "Squared error of the energy, or of the energy per atom.", panel=OPTIMISER, choices=ENERGY_LOSSES
    )
    force_loss: str = option(
        "squared", "Squared error of force components, or the length of the error.", panel=OPTIMISER,
        choices=FORCE_LOSSES,
    )  # fmt: skip
    ema_decay: float = option(
        0.99, "Decay of the parameters' average; 0: none.", panel=OPTIMISER, minimum=0.0, maximum=0.99999
    )

    def given(self) -> set[str]:
        """Names of the options that differ from their defaults."""
        return {field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default}

    @property
    def method(self) -> str:
        """`stable`, its control, or the network's name."""
        if self.stable:
            return "stable" if self.observable != "none" else "stable-control"
        return f"{self.model}-continued" if self.base else self.model

    def check(self) -> None:
        """Raises: `ConfigError` for options that contradict each other or would do nothing."""
        for problem in _problems(self):
            raise ConfigError(problem)


def _problems(config: NnipConfig) -> Iterator[str]:
    yield from stable_problems(config)
    if config.precision != "float32":
        yield f"--precision {config.precision} is not for potentials: their forces need float32"
    for flag, unit in (("--energy-unit", config.energy_unit), ("--length-unit", config.length_unit)):
        if unit and config.data is None:
            yield f"{flag} does nothing without --data"
    if config.energy_weight == 0 and config.force_weight == 0:
        yield "--energy-weight and --force-weight are both 0: there is nothing to learn"
    if config.energy_weight == 0 and config.energy_loss != "total":
        yield f"--energy-loss {config.energy_loss} does nothing with --energy-weight 0"
    if config.force_weight == 0 and config.force_loss != "squared":
        yield f"--force-loss {config.force_loss} does nothing with --force-weight 0"
    if config.lr_decay == "plateau" and config.validation_frames == 0:
        yield "--lr-decay plateau watches the validation loss: it needs --validation-frames"
    if config.validate_every and config.validation_frames == 0:
        yield "--validate-every does nothing with --validation-frames 0"
    if config.lr_decay == "cosine" and config.steps and config.warmup_steps >= config.steps:
        yield f"--warmup-steps {config.warmup_steps} leaves nothing of the {config.steps} steps for the cosine"


OF_THE_BASE = ("learning_rate", "lr_decay", "warmup_steps", "validation_patience", "minimum_rate", "beta2",
               "gradient_clip", "ema_decay", "batch_size", "validate_every", "validation_frames")  # fmt: skip
"""Options of plain training: StABlE Training descends along whole gradients, at its own rate."""


def _unused_options(config: NnipConfig) -> Iterator[str]:
    """Options that were given and would do nothing, each as the sentence that the user reads.

    Asked of new commands only: the configuration of a run that is there may hold what were defaults when it was made.
    """
    given = config.given()
    if config.stable:
        filled_in = {"batch_size": 1, "validation_frames": 0}  # by `resolve`
        for name in OF_THE_BASE:
            if name in given and getattr(config, name) != filled_in.get(name):
                flag = "--" + name.replace("_", "-")
                yield f"{flag} does nothing with --stable: train the base with it and name that with --base"
        if config.devices > 1:
            yield f"--devices {config.devices} does nothing with --stable, whose replicas run on one device"
    elif config.lr_decay != "plateau":
        for name in ("validation_patience", "minimum_rate"):
            if name in given:
                yield f"--{name.replace('_', '-')} does nothing with --lr-decay {config.lr_decay}: it is plateau's"
    yield from unused_stable_options(config, given)


SMALL: dict[str, Any] = {"train_frames": 25, "test_frames": 200}
SMALL_NETWORKS: dict[str, dict[str, Any]] = {
    "schnet": {"features": 32, "interactions": 3},
    "painn": {"features": 32, "interactions": 3},
    "nequip": {"features": 16, "interactions": 3},
    "gemnet-t": {"features": 16, "interactions": 2},
}
"""Sizes that train in a minute or two on two cores."""


def resolve(config: NnipConfig) -> NnipConfig:
    """The same configuration with every open value filled in; what a base run fixes is taken from its config.toml.

    Raises: `ConfigError` for a base that is no run of this family, or that other options contradict, and for options
    that would do nothing.
    """
    for problem in _unused_options(config):
        raise ConfigError(problem)
    chosen: dict[str, Any] = dict(SMALL)
    if config.stable and config.base is None:
        wanted = default_base(config)
        config = replace(config, base=(newest_run_of(wanted) or default_base_path(wanted)).as_posix())
    if config.base is not None:
        config = replace(config, base=config.base.replace("{seed}", str(config.seed)))
        assert config.base is not None
        base = _base_values(config)
        defaults = {f.name: f.default for f in dataclasses.fields(config)}
        for name in FROM_BASE:
            given = getattr(config, name)
            chosen[name] = base.get(name, defaults[name]) if given == defaults[name] else given
            moved = name in ("data", "energy_unit", "length_unit")  # the same frames may lie elsewhere now
            if given != defaults[name] and name in base and given != base[name] and not moved:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} {given} contradicts the base run, which has {base[name]}")
        chosen["split_seed"] = base["split_seed"]
        if config.split_seed not in (None, base["split_seed"]):
            raise ConfigError(
                f"--split-seed {config.split_seed} contradicts the base run, which has {base['split_seed']}: frames "
                "that it was trained on would be among those to test on"
            )
    chosen = {**SMALL_NETWORKS[chosen.get("model", config.model)], **chosen}
    chosen.setdefault("split_seed", config.seed)
    train = config.train_frames or chosen["train_frames"]
    # Not all frames in one step: without the noise of minibatches Adam's second moments fall behind the gradient and
    # the loss bursts again and again.
    batch = config.batch_size or min(25, max(1, train // 5))
    open_values = {
        "steps": 60 if config.stable else 3000,
        "batch_size": 1 if config.stable else batch,
    }
    if config.stable:
        again = config.observable != "bond-lengths" and config.residual == "full-sample"
        open_values["reuse_steps"] = 5 if again else 1
        several = config.window > config.frame_every  # frames of a replica, without which it has no covariance
        within = config.observable == "distances" and config.residual != "released" and several
        open_values["covariance"] = "within-replicas" if within else "total"
    if config.validation_frames is None:
        chosen["validation_frames"] = 0 if config.stable else min(50, train)
    if config.validation_frames != 0 and not config.stable:
        open_values["validate_every"] = max(50, -(-train // batch))
    values = {**open_values, **chosen}
    given = config.given()
    fill = {
        name: value
        for name, value in values.items()
        if name not in given or (config.base is not None and name in FROM_BASE)
    }
    return replace(config, **fill)


def _base_values(config: NnipConfig) -> dict[str, Any]:
    named = config.base
    assert named is not None
    for path in (Path(named), RUNS / named):
        if (path / "config.toml").is_file():
            values = read_toml(path / "config.toml")
            if values.get("family") != "nnip":
                raise ConfigError(f"--base {named} is a run of {values.get('family')}, not of nnip")
            return values
    if config.stable and Path(named) == default_base_path(wanted := default_base(config)):
        return to_dict(wanted)
    raise ConfigError(f"--base {named}: there is no run directory of that name")


def default_base(config: NnipConfig) -> NnipConfig:
    """What `stabletrain nnip` with the same data and network trains: the base of StABlE Training without --base."""
    values = {name: getattr(config, name) for name in (*FROM_BASE, "seed", "split_seed")}
    return resolve(make_config(NnipConfig, values))


def default_base_path(base: NnipConfig) -> Path:
    """Where that run is kept unless --out says otherwise."""
    return RUNS / run_name(base, "nnip")


def newest_run_of(base: NnipConfig) -> Path | None:
    """The newest finished run of this configuration and seed in ./runs or a study there; None where there is none."""
    names = [*identity(base), "seed"]
    wanted = {name: value for name, value in to_dict(base).items() if name in names and value is not None}
    found = []
    for file in (*RUNS.glob("*/config.toml"), *RUNS.glob("*/*/config.toml")):
        status = file.with_name("status.json")
        with contextlib.suppress(ConfigError, OSError, ValueError):  # what cannot be read is no base
            stored = read_toml(file)
            same = stored.get("family") == "nnip" and {n: v for n, v in stored.items() if n in names} == wanted
            if same and json.loads(status.read_text(encoding="utf-8")).get("state") == "done":
                found.append((status.stat().st_mtime, file.parent))
    return max(found)[1] if found else None


def base_path(named: str) -> Path:
    """The run directory that `--base` names. Raises: `ConfigError` where there is none."""
    for path in (Path(named), RUNS / named):
        if (path / "config.toml").is_file():
            return path
    raise ConfigError(f"the base {named} of this run is not there: run this where it is, in the same working directory")
