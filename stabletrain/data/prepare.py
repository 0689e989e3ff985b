"""Getting a named data set ready: `stabletrain data prepare`."""

from __future__ import annotations

from typing import Any

from stabletrain.data import tfds
from stabletrain.data.check import Tick, dataset_info
from stabletrain.data.locate import locate, named, what_to_put
from stabletrain.errors import DataError


def prepare_dataset(name: str, tick: Tick | None = None) -> dict[str, Any]:
    """Makes a named data set ready to train on and returns its `dataset_info`.

    What is here already is only read once (which unpacks compressed batches); what is not is downloaded and prepared
    by TFDS, where TensorFlow is installed and the network answers.

    Raises: `ConfigError` for an unknown name, `DataError` when it cannot be had, within about a second without a
    network, saying what to put where.
    """
    report = tick or (lambda label, done, total: None)
    info = named(name)
    if locate(info) is None:
        if info.tfds_name is None or not tfds.can_prepare():
            raise DataError(f"{name} cannot be prepared on this machine: {what_to_put(info)}")
        report(f"downloading and preparing {info.tfds_name} with TFDS", 0, 1)
        try:
            tfds.prepare(info)
        except DataError as error:
            raise DataError(f"{error}; or {what_to_put(info)}") from error
    report(f"reading {name}", 0, 1)
    return dataset_info(name)
