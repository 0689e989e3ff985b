"""Configuration: one flat frozen dataclass per family, which is at once the API, the command line and the file.

This module imports no JAX: the command line reads it to answer `--help`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from stabletrain.errors import ConfigError, nearest

LARGEST_SEED = 2**32 - 1
"""Random keys take a seed as 32 bits."""


def option(
    default: Any,
    help: str,
    *,
    panel: str = "Training",
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    identity: bool = True,
) -> Any:
    """A dataclass field that is also a command-line option.

    `panel` is the heading it stands under in `--help`. A field with `identity=False` does not make another run
    of the same experiment (number of devices, how often to save): it is not hashed and may change on resume.
    """
    metadata = {
        "help": help,
        "panel": panel,
        "choices": tuple(choices) if choices else None,
        "minimum": minimum,
        "maximum": maximum,
        "identity": identity,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every family has. A family's config inherits from this and adds its own options."""

    dataset: str = option("digits", "Dataset by name, see `stabletrain data list`.", panel="Data")
    data: str | None = option(
        None, "The user's own data: .npz, image folder, .zip of one, or an official raw archive.", panel="Data"
    )

    steps: int = option(1000, "Number of training steps (optimiser updates).", minimum=0)
    batch_size: int = option(64, "Examples in a step, over all devices.", minimum=1)
    seed: int = option(0, "Seed of initialisation, data order and noise.", minimum=0, maximum=LARGEST_SEED)
    precision: str = option(
        "float32", "Number format of matrix products; statistics and losses stay in float32.",
        choices=("float32", "bfloat16"),
    )  # fmt: skip

    on_spike: str = option(
        "log", "What to do with a loss spike.", panel="Stability", choices=("log", "skip", "clip", "rollback", "stop")
    )
    on_nonfinite: str = option(
        "stop", "What to do with a non-finite loss or gradient.", panel="Stability",
        choices=("log", "skip", "clip", "rollback", "stop"),
    )  # fmt: skip
    spike_threshold: float = option(
        8.0,
        "Loss spike: this many robust standard deviations above the running median.",
        panel="Stability",
        minimum=1.0,
    )
    spike_window: int = option(
        128, "Accepted steps that the running median is taken over.", panel="Stability", minimum=8
    )
    max_interventions: int = option(
        20, "Skips, clips and rollbacks allowed before the run stops as diverged.", panel="Stability", minimum=0
    )

    log_every: int = option(50, "Steps between rows of metrics.jsonl.", panel="Run directory", minimum=1)
    eval_every: int = option(
        0, "Steps between evaluations; 0 evaluates at the end only.", panel="Run directory", minimum=0
    )
    checkpoint_every: int = option(
        500, "Steps between checkpoints; one is also written at the end and when interrupted.",
        panel="Run directory", minimum=1, identity=False,
    )  # fmt: skip
    keep_checkpoints: int = option(
        2, "Newest checkpoints to keep, besides the best.", panel="Run directory", minimum=1, identity=False
    )
    best_metric: str | None = option(
        None,
        "Also keep the checkpoint that is best by this metric, e.g. eval/loss.",
        panel="Run directory",
        identity=False,
    )
    best_mode: str = option(
        "min", "Whether the best metric is the smallest or the largest.", panel="Run directory", choices=("min", "max"),
        identity=False,
    )  # fmt: skip

    devices: int = option(
        0, "Devices to use; 0: as many accelerators as divide the batch, or one CPU device, which uses every core.",
        panel="Devices", minimum=0, identity=False,
    )  # fmt: skip
    inner_steps: int = option(
        0, "Steps per dispatch to the device; 0 chooses (1 for convolutions on CPU, more where it pays).",
        panel="Devices", minimum=0, identity=False,
    )  # fmt: skip

    @property
    def method(self) -> str:
        """The name of the method in run names and tables."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse combinations of values that make no sense; single values are checked before. Families override it."""


Config = typing.TypeVar("Config", bound=TrainConfig)


def fields_of(config_class: type[TrainConfig]) -> dict[str, dataclasses.Field]:
    """The options of a config class by name, in the order of definition."""
    return {field.name: field for field in dataclasses.fields(config_class)}


def make_config(config_class: type[Config], values: Mapping[str, Any], *, source: str = "") -> Config:
    """A checked config from values by field name.

    Raises: `ConfigError` for an unknown key, a value of the wrong type or outside its choices or range, naming the
    nearest valid one; and whatever the family's own `check` refuses. `source` (a file's name) goes into the message.
    """
    config = config_class(**checked_values(config_class, values, source=source))
    config.check()
    return config


def flag(name: str) -> str:
    """What a command line calls an option: `skip_scaling` -> `--skip-scaling`."""
    return "--" + name.replace("_", "-")


def checked_values(
    options: type, values: Mapping[str, Any], *, source: str = "", named: Callable[[str], str] = "option {!r}".format
) -> dict[str, Any]:
    """Values by field name, each of the type of its field. `options` is any dataclass of `option(...)` fields.

    `named` says how messages call a field: options of a command line are called by their flags.

    Raises: `ConfigError` as `make_config` does, except for combinations of values.
    """
    fields = {field.name: field for field in dataclasses.fields(options)}
    types_by_name = typing.get_type_hints(options)
    where = f" in {source}" if source else ""
    checked: dict[str, Any] = {}
    for name, value in values.items():
        key = name.replace("-", "_")
        if key not in fields:
            raise ConfigError(f"unknown option {name!r}{where}: {nearest(key, fields)}")
        checked[key] = _checked_value(named(key), value, types_by_name[key], fields[key].metadata, where)
    return checked


def _checked_value(name: str, value: Any, annotation: Any, metadata: Mapping[str, Any], where: str) -> Any:
    optional = isinstance(annotation, types.UnionType) and type(None) in annotation.__args__
    if optional:
        if value is None:
            return None
        annotation = next(member for member in annotation.__args__ if member is not type(None))
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if typing.get_origin(annotation) is tuple:
        element = typing.get_args(annotation)[0]
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{name}{where} takes a list, not {value!r}")
        return tuple(_checked_value(name, item, element, metadata, where) for item in value)
    if not isinstance(value, annotation) or (annotation is int and isinstance(value, bool)):
        raise ConfigError(f"{name}{where} takes {_type_name(annotation)}, not {value!r}")
    choices = metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"unknown value {value!r} for {name}{where}: {nearest(str(value), choices)}")
    low, high = metadata["minimum"], metadata["maximum"]
    if annotation in (int, float) and not (low is None or value >= low):
        raise ConfigError(f"{name}{where} is {value}, but must be at least {low}")
    if annotation in (int, float) and not (high is None or value <= high):
        raise ConfigError(f"{name}{where} is {value}, but must be at most {high}")
    return value


def _type_name(annotation: type) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[annotation]


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Every field by name; tuples as lists."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in ((name, getattr(config, name)) for name in fields_of(type(config)))
    }


def to_toml(config: TrainConfig, family: str) -> str:
    """The fully resolved config as TOML, with the family's name first. Fields that are None are left out."""
    values = {key: value for key, value in to_dict(config).items() if value is not None}
    return tomli_w.dumps({"family": family, **values})


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a preset or of a run's config.toml (with its `family` key where it has one).

    Raises: `ConfigError` when the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no config file {path}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder, not a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error


def identity(config: TrainConfig) -> dict[str, Any]:
    """The fields that say which experiment this is: all but the seed and those marked `identity=False`."""
    fields = fields_of(type(config))
    return {k: v for k, v in to_dict(config).items() if fields[k].metadata["identity"] and k != "seed"}


def config_hash(config: TrainConfig, family: str) -> str:
    """First eight hex digits of the SHA-256 of the identity. Runs that differ in the seed only share it."""
    canonical = json.dumps({"family": family, **identity(config)}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def run_name(config: TrainConfig, family: str) -> str:
    """`<family>-<method>-<dataset>-<hash>-s<seed>`, the default name of a run directory."""
    dataset = Path(config.data).stem if config.data else config.dataset
    return f"{family}-{config.method}-{dataset}-{config_hash(config, family)}-s{config.seed}"


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with both values."""
    return {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)}


def replace(config: Config, **changes: Any) -> Config:
    """A checked copy with some fields changed."""
    return make_config(type(config), {**to_dict(config), **changes})
