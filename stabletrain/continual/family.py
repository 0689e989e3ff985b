"""The continual family as the command line sees it. Imports no JAX until one of its functions is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stabletrain.continual.config import ContinualConfig, resolve
from stabletrain.training.experiment import Family

if TYPE_CHECKING:
    from stabletrain.continual.experiment import ContinualExperiment


def build(config: ContinualConfig, *, mesh: Any, data_spec: Any = None) -> ContinualExperiment:
    """The experiment. The data are loaded in any case: the timeline, and with it the shape of the state, is theirs."""
    from stabletrain.continual.experiment import ContinualExperiment

    del data_spec
    return ContinualExperiment(config, mesh=mesh)


FAMILY = Family(
    name="continual",
    help="Learn tasks whose data overlap in time; SPCL keeps layers and gradients well conditioned.",
    config=ContinualConfig,
    build=build,
    resolve=resolve,
)
