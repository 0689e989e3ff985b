"""Settings of a command that draws a figure: a dataclass of options, filled from a file with a part for each scale.

Imports no JAX: the command line reads it to answer `--help`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from stabletrain.errors import ConfigError
from stabletrain.training.config import checked_values, flag, read_toml

SCALES = ("small", "paper")
Options = TypeVar("Options")


def settings_from(options: type[Options], preset: Path | None, scale: str, given: Mapping[str, Any]) -> Options:
    """Defaults < the file's own values < those of its [small] or [paper] < what was given (values that are not None).

    Raises: `ConfigError` for an unknown scale, key or value, and for a file without the scale.
    """
    if scale not in SCALES:
        raise ConfigError(f"unknown scale {scale!r}: {' or '.join(SCALES)}")
    values: dict[str, Any] = {}
    if preset is not None:
        content = read_toml(preset)
        overlays = {name: content.pop(name) for name in SCALES if name in content}
        if scale not in overlays:
            raise ConfigError(f"{preset} has no [{scale}]")
        values = {**content, **overlays[scale]}
    elif scale != "small":
        raise ConfigError(f"without --config FILE.toml there are the settings of the small scale only, not {scale!r}")
    typed = {name: value for name, value in given.items() if value is not None}
    checked = checked_values(options, values, source=str(preset or ""))
    return options(**checked | checked_values(options, typed, named=flag))
