"""Getting a named data set ready: `stabletrain data prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stabletrain.data import tfds
from stabletrain.data.check import Tick, dataset_info
from stabletrain.data.latents import prepare_latents
from stabletrain.data.locate import locate, named, official_folder, what_to_put
from stabletrain.errors import ConfigError, DataError


def prepare_dataset(name: str, tick: Tick | None = None) -> dict[str, Any]:
    """Makes a named data set ready to train on and returns its `dataset_info`.

    What is here already is only read once (which unpacks compressed batches); what is not is downloaded and prepared
    by TFDS, where TensorFlow is installed and the network answers.

    Raises: `ConfigError` for an unknown name, `DataError` when it cannot be had, within about a second without a
    network, saying what to put where.
    """
    report = tick or (lambda label, done, total: None)
    info = named(name)
    if info.latents and locate(info) is None:
        raise DataError(f"{name} is not on this machine: {what_to_put(info)}")
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


def prepare_features(name: str, features: Path | None, out: Path | None, tick: Tick | None = None) -> dict[str, Any]:
    """Packs a folder of features as a named set of latents, into `out` or the cache; see `prepare_latents`.

    Raises: `ConfigError` for a set that is no latents or without `features`, `DataError` for damaged features.
    """
    info = named(name)
    if not info.latents:
        raise ConfigError(f"--features and --out do nothing for {name}: they are for coco-latents")
    if features is None:
        raise ConfigError("--out needs --features, the folder to pack")
    return prepare_latents(features, out or official_folder(info), tick)
