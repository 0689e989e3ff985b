"""A family for the tests of the command line: the real toy experiment of the loop's tests, with options and samples."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stabletrain.errors import ConfigError, DataError
from stabletrain.training.config import TrainConfig, option, replace
from stabletrain.training.experiment import EvaluationContext, Family, Shorthand
from tests.training.toy import ToyConfig, ToyExperiment, ToyState

PANEL = "Toy"


@dataclass(frozen=True, kw_only=True)
class CommandToyConfig(ToyConfig):
    """The toy with an option of each kind."""

    eval_parts: int = option(1, "Parts of an evaluation.", panel=PANEL)
    colour: str = option("red", "A choice.", panel=PANEL, choices=("red", "green", "blue"))
    width: int = option(0, "A number that is chosen when it is 0.", panel=PANEL, minimum=0)
    bonus: float | None = option(None, "A number that may be missing.", panel=PANEL, maximum=2.0)
    sizes: tuple[int, ...] = option((1, 2), "Several numbers.", panel=PANEL)
    mirror: bool = option(False, "A switch.", panel=PANEL)
    trouble: str = option("none", "What goes wrong.", panel=PANEL, choices=("none", "data", "bug", "memory"))
    threads: int = option(1, "Nothing that matters.", panel=PANEL, identity=False)

    def check(self) -> None:
        if self.mirror and self.colour == "blue":
            raise ConfigError("--mirror does nothing with --colour blue")


@dataclass(frozen=True, kw_only=True)
class ToySampleOptions:
    num: int = option(3, "Number of samples.", minimum=1)
    label: str | None = option(None, "What to make.")
    pause: float = option(0.0, "Seconds that each one takes.")


class CommandToy(ToyExperiment):
    def __init__(self, config: CommandToyConfig, *, mesh: Any, data_spec: Any = None) -> None:
        if config.trouble == "data":
            raise DataError("no toys at all: buy some")
        if config.trouble == "memory":
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
        self.has_data = data_spec is None
        super().__init__(config, mesh=mesh)

    def batch(self, position: int) -> Any:
        if self.config.trouble == "bug":  # type: ignore[attr-defined]
            raise ZeroDivisionError("a bug\nin two lines")
        return super().batch(position)

    def weights(self, state: ToyState) -> Mapping[str, Any]:
        return {"ema": state.ema, "raw": state.params}


def sample(
    experiment: CommandToy, state: ToyState, options: ToySampleOptions, context: EvaluationContext
) -> Mapping[str, bytes]:
    assert not experiment.has_data, "sampling must not load the data"
    if str(options.label) == "99":
        raise ConfigError("no label 99")
    made = {}
    for number in range(options.num):
        context.tick("sampling", number, options.num)
        part = context.scratch / f"{number}.npy"
        if not part.exists():
            time.sleep(options.pause)
            np.save(part, np.full(2, number))
        made[f"{number}.txt"] = f"{options.label} {np.load(part)}".encode()
    return made


def resolve(config: CommandToyConfig) -> TrainConfig:
    return replace(config, width=config.width or 8)


FAMILY = Family(
    name="toy",
    help="Train a toy.",
    config=CommandToyConfig,
    build=CommandToy,
    resolve=resolve,
    shorthands={
        "grass": Shorthand("Green and wide.", {"colour": "green", "width": 16}),
        "sky": Shorthand("Blue.", {"colour": "blue"}),
    },
    sample=sample,
    sample_options=ToySampleOptions,
)
