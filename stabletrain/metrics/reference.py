"""Reference statistics: mean and covariance of real features, in a file that people can look into and share.

An `.npz` of `mu` [D], `sigma` [D, D] (float64) and `record`, JSON text: number of images, extractor with hash, resize,
split, data set with fingerprint, version of the library, and the hash of the numbers.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain import __version__
from stabletrain.errors import DataError
from stabletrain.metrics.files import UNREADABLE, read_npz, write_whole
from stabletrain.metrics.frechet import Moments
from stabletrain.metrics.protocol import Protocol

FORMAT = 1
COMPARED = {
    "extractor": "extractor",
    "extractor_sha256": "extractor hash",
    "resize": "resize",
    "split": "split",
    "dataset": "data set",
    "fingerprint": "data fingerprint",
}
"""Fields that have to agree, and what they are called in a message."""


@dataclass(frozen=True)
class Reference:
    """Moments of real features, and what they were made of."""

    moments: Moments
    extractor: str
    extractor_sha256: str
    resize: str
    split: str
    dataset: str
    fingerprint: str
    version: str = __version__


def reference_for(protocol: Protocol, moments: Moments) -> Reference:
    """Moments with the fields that the protocol says."""
    return Reference(moments, **{name: getattr(protocol, name) for name in COMPARED})


def save_reference(path: Path, reference: Reference) -> None:
    """Writes the file whole, or not at all; the same bytes for the same reference."""
    moments = reference.moments
    record = {
        "format": FORMAT,
        "count": moments.count,
        **{name: getattr(reference, name) for name in COMPARED},
        "stabletrain": reference.version,
        "sha256": _digest(moments),
    }
    stream = io.BytesIO()
    np.savez(stream, mu=moments.mean, sigma=moments.covariance, record=np.array(json.dumps(record, indent=1)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, stream.getvalue())


def load_reference(path: Path) -> Reference:
    """Reads what `save_reference` wrote.

    Raises: `DataError` when the file is missing, damaged, or says nothing about how it was made.
    """
    try:
        arrays = read_npz(path)
        if "record" not in arrays:
            raise DataError(
                f"{path} does not say which network, resize, split and data it was made with, so it cannot be "
                "compared with: make the statistics again from the images"
            )
        record: dict[str, Any] = json.loads(str(arrays["record"]))
        moments = Moments(int(record["count"]), arrays["mu"], arrays["sigma"])
        if record["format"] != FORMAT:
            raise DataError(f"{path} has format {record['format']}; this version reads {FORMAT}")
        if _digest(moments) != record["sha256"]:
            raise ValueError("the numbers are not those that the hash was made of")
        fields = {name: str(record[name]) for name in COMPARED}
        return Reference(moments, version=str(record["stabletrain"]), **fields)
    except FileNotFoundError as error:
        raise DataError(f"no reference statistics {path}") from error
    except UNREADABLE as error:
        raise DataError(f"the reference statistics {path} are damaged ({error})") from error


def check_reference(reference: Reference, protocol: Protocol, source: str) -> None:
    """Whether these statistics are of the same network, resize, split and data.

    Raises: `DataError`, one line that says what differs. `source` names the file.
    """
    differing = [
        f"{label} {getattr(reference, name)} instead of {getattr(protocol, name)}"
        for name, label in COMPARED.items()
        if getattr(reference, name) != getattr(protocol, name)
    ]
    if differing:
        raise DataError(f"the reference statistics {source} do not fit: {'; '.join(differing)}")


def _digest(moments: Moments) -> str:
    digest = hashlib.sha256(str(moments.count).encode())
    for array in (moments.mean, moments.covariance):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
