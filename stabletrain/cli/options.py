"""Config dataclasses as command-line options: every field is one, with its help, choices, default and panel.

Values arrive as text and are typed here, so that a preset file and the command line are checked by the same rules and
give the same messages. Precedence: defaults < preset file < shorthands < explicit options.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from stabletrain.errors import ConfigError, nearest
from stabletrain.training.config import TrainConfig, checked_values, flag, read_toml
from stabletrain.training.experiment import Family

SCALES = ("small", "paper")
"""Tables of a preset file of which `--scale` selects one."""
DESCRIPTION = "row"
"""The table of a preset file that describes it to the papers' tables; it holds no options."""

FIRST_PANELS = ("Data", "Training")
LAST_PANELS = ("Stability", "Run directory", "Devices")
SHORT_NAMES = {"seed": "-s"}

Fields = Mapping[str, tuple[dataclasses.Field, Any]]
"""Option name -> its field and the type of its value."""


def fields_with_types(options: type) -> dict[str, tuple[dataclasses.Field, Any]]:
    """The `option(...)` fields of a dataclass with their types resolved."""
    hints = typing.get_type_hints(options)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(options)}


# --- fields -> options of Typer ---------------------------------------------------------------------------------------


def parameters(fields: Fields, panel: str | None = None) -> list[inspect.Parameter]:
    """A Typer option per field, all with the default None, which means "not given".

    Panels are ordered: data and training, then the family's own, then what every run has. `panel` replaces them.
    """

    def place(name: str) -> tuple[int, int]:
        own = fields[name][0].metadata["panel"]
        if own in FIRST_PANELS:
            return 0, FIRST_PANELS.index(own)
        return (2, LAST_PANELS.index(own)) if own in LAST_PANELS else (1, 0)

    ordered = list(fields) if panel else sorted(fields, key=place)
    return [_parameter(name, *fields[name], panel) for name in ordered]


def _parameter(name: str, field: dataclasses.Field, annotation: Any, panel: str | None) -> inspect.Parameter:
    metadata = field.metadata
    kind, _ = _without_none(annotation)
    names = [flag(name)]
    accepted: Any = str | None
    metavar = None if kind is bool else _metavar(kind, metadata)
    if kind is bool:
        names, accepted = [f"{flag(name)}/--no-{flag(name)[2:]}"], bool | None
    elif typing.get_origin(kind) is tuple:
        accepted = list[str] | None
    if name in SHORT_NAMES:
        names.append(SHORT_NAMES[name])
    choices = metadata["choices"]
    info = typer.Option(
        None,
        *names,
        help=metadata["help"] + _default_text(field),
        rich_help_panel=panel or metadata["panel"],
        metavar=metavar,
        show_default=False,
        autocompletion=_completion(choices) if choices else None,
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=accepted)


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """`(X, True)` for `X | None`, else `(annotation, False)`."""
    if isinstance(annotation, types.UnionType) and type(None) in annotation.__args__:
        return next(member for member in annotation.__args__ if member is not type(None)), True
    return annotation, False


def _metavar(kind: Any, metadata: Mapping[str, Any]) -> str:
    if metadata["choices"]:
        return "|".join(metadata["choices"])
    if typing.get_origin(kind) is tuple:
        return f"{_metavar(typing.get_args(kind)[0], metadata)},..."
    return {int: "N", float: "X", str: "TEXT"}[kind]


def _default_text(field: dataclasses.Field) -> str:
    default = field.default
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return f" [default: {'yes' if default else 'no'}]"
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f" [default: {shown}]"


def _completion(choices: Sequence[str]) -> Any:
    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def shorthand_parameters(family: Family) -> list[inspect.Parameter]:
    """A flag per shorthand of the family."""
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=typer.Option(False, flag(name), help=shorthand.help, rich_help_panel="Method", show_default=False),
            annotation=bool,
        )
        for name, shorthand in family.shorthands.items()
    ]


def union_of(fields_by_family: Mapping[str, Fields]) -> dict[str, tuple[dataclasses.Field, Any]]:
    """The options of commands that take a run of any family: which ones hold is known when the run has been read."""
    union: dict[str, tuple[dataclasses.Field, Any]] = {}
    for fields in fields_by_family.values():
        union |= {name: entry for name, entry in fields.items() if name not in union}
    return union


# --- text -> values ---------------------------------------------------------------------------------------------------


def typed_values(fields: Fields, given: Mapping[str, Any], *, what: str = "option") -> dict[str, Any]:
    """The options that were given, each as a value of its field's type.

    Raises: `ConfigError` for text that is no such value, naming the nearest valid one, and for an option that is none
    of `fields`, called `what` ("an option of sampling from a gan run").
    """
    values: dict[str, Any] = {}
    for name, text in given.items():
        if text is None:
            continue
        if name not in fields:
            hint = nearest(flag(name), map(flag, fields)) if fields else "it takes none"
            raise ConfigError(f"{flag(name)} is no {what}: {hint}")
        field, annotation = fields[name]
        values[name] = _typed(flag(name), text, annotation, field.metadata["choices"])
    return values


def _typed(name: str, text: Any, annotation: Any, choices: Sequence[str] | None) -> Any:
    kind, optional = _without_none(annotation)
    if optional and text == "none" and "none" not in (choices or ()):
        return None
    if kind is bool:
        return text
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        items = [item.strip() for part in text for item in part.split(",")]
        return tuple(_typed(name, item, element, choices) for item in items if item)
    if kind in (int, float):
        return _number(name, text, kind)
    if choices and text not in choices:
        raise ConfigError(f"unknown value {text!r} for {name}: {nearest(text, choices)}")
    return text


def _number(name: str, text: str, kind: type) -> int | float:
    try:
        value = float(text)
        if kind is float:
            return value
        # 1e5 is a whole number too; long ones must not pass through a float.
        return int(text) if text.strip().lstrip("+-").replace("_", "").isdecimal() else _whole(value)
    except (ValueError, OverflowError):
        wanted = "a number" if kind is float else "a whole number"
        raise ConfigError(f"{name} takes {wanted}, not {text!r}") from None


def _whole(value: float) -> int:
    if value != int(value):
        raise ValueError(value)
    return int(value)


# --- preset files -----------------------------------------------------------------------------------------------------


def read_preset(path: Path, family: Family, scale: str | None) -> dict[str, Any]:
    """The values of a preset file for this family: its top-level keys, then those of the table that `scale` names.

    Raises: `ConfigError` for a missing or broken file, another family's preset, an unknown key or value, and for a
    scale that is missing, superfluous, or not chosen.
    """
    content = read_toml(path)
    written_for = content.pop("family", family.name)
    if written_for != family.name:
        raise ConfigError(
            f"{path} is a preset of the family {written_for!r}: run `stabletrain {written_for} -c {path}`"
        )
    content.pop(DESCRIPTION, None)
    scales = [name for name in SCALES if isinstance(content.get(name), dict)]
    tables = {name: content.pop(name) for name in scales}
    for key, value in content.items():
        if isinstance(value, dict):
            raise ConfigError(f"unknown table [{key}] in {path}: {nearest(key, (*SCALES, DESCRIPTION))}")
    if scale is None and scales:
        raise ConfigError(f"{path} has settings for several scales: choose with --scale {' or --scale '.join(scales)}")
    if scale is not None and scale not in scales:
        known = nearest(scale, scales) if scales else "it has no table of that kind; leave out --scale"
        raise ConfigError(f"{path} has no scale {scale!r}: {known}")
    values = checked_values(family.config, content, source=str(path))
    if scale is not None:
        values |= checked_values(family.config, tables[scale], source=f"{path} [{scale}]")
    return values


# --- precedence -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resolved:
    """A complete configuration, and where each value that is no default came from."""

    config: TrainConfig
    origin: Mapping[str, str]
    asked: TrainConfig
    """Before open values were filled in."""


def resolve(
    family: Family,
    given: Mapping[str, Any],
    *,
    preset: Path | None = None,
    scale: str | None = None,
    shorthands: Iterable[str] = (),
) -> Resolved:
    """The configuration from a preset file, shorthands and explicit options, checked, open values filled in.

    Raises: `ConfigError` for anything unknown or contradictory, before any work.
    """
    if scale is not None and preset is None:
        raise ConfigError("--scale chooses between the settings of a preset file: name one with --config")
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if preset is not None:
        from_file = read_preset(preset, family, scale)
        values |= from_file
        origin |= dict.fromkeys(from_file, f"{preset} [{scale}]" if scale else str(preset))
    explicit = checked_values(family.config, typed_values(fields_with_types(family.config), given), named=flag)
    shorthand_values = _shorthand_values(family, shorthands, explicit)
    for name, (value, shorthand) in shorthand_values.items():
        values[name], origin[name] = value, shorthand
    values |= explicit
    origin |= dict.fromkeys(explicit, "command line")
    config = family.config(**values)
    config.check()
    resolved = family.resolve(config)
    for field in dataclasses.fields(family.config):
        if getattr(resolved, field.name) != getattr(config, field.name):
            origin[field.name] = "chosen"
    return Resolved(resolved, origin, config)


def _shorthand_values(family: Family, names: Iterable[str], explicit: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Raises: `ConfigError` for shorthands that contradict each other, and for one of which nothing is left."""
    chosen: dict[str, tuple[Any, str]] = {}
    for name in names:
        values = checked_values(family.config, family.shorthands[name].values)
        if all(key in explicit and explicit[key] != value for key, value in values.items()):
            others = " and ".join(f"{flag(key)} {explicit[key]}" for key in values)
            meant = " ".join(f"{flag(key)} {value}" for key, value in values.items())
            raise ConfigError(f"{flag(name)} stands for {meant} and does nothing with {others}: leave one of them out")
        for key, value in values.items():
            if key in chosen and chosen[key][0] != value and key not in explicit:
                raise ConfigError(f"{chosen[key][1]} and {flag(name)} both set {flag(key)}: give one of them")
            chosen[key] = value, flag(name)
    return chosen
