"""The continual family as the command line sees it. Imports no JAX until one of its functions is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stabletrain.continual.config import ContinualConfig, resolve
from stabletrain.training.experiment import Family

if TYPE_CHECKING:
    from stabletrain.continual.experiment import ContinualExperiment


def build(config: ContinualConfig, *, mesh: Any, data_spec: Any = None) -> ContinualExperiment:
    """The experiment; with `data_spec` (a `DataSpec` or its dictionary) no data set is loaded."""
    from stabletrain.continual.experiment import ContinualExperiment
    from stabletrain.data.spec import DataSpec

    if isinstance(data_spec, Mapping):
        data_spec = DataSpec.from_dict(data_spec)
    return ContinualExperiment(config, mesh=mesh, data_spec=data_spec)


FAMILY = Family(
    name="continual",
    help="Learn tasks whose data overlap in time; SPCL keeps layers and gradients well conditioned.",
    config=ContinualConfig,
    build=build,
    resolve=resolve,
)
