"""Published weights that metrics need: where they lie, whether they are whole, and how to get them.

Nothing is bundled. A file is looked for where the user says, in `cache_home()/"weights"`, in PyTorch's download folders
(pytorch-fid and torch-fidelity leave it there), and is fetched when the network answers within a second. What is found
without being named by the user is only used when its SHA-256 is the published file's.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import http.client
import logging
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stabletrain.errors import ConfigError, DataError, nearest
from stabletrain.paths import cache_home

PROBE_SECONDS = 1.0
READ_SECONDS = 30.0
ATTEMPTS = 3
CHUNK = 1 << 20

Progress = Callable[[str, int, int], None]
"""Called with (label, bytes done, bytes in all)."""

log = logging.getLogger("stabletrain")


@dataclass(frozen=True)
class WeightsFile:
    """A published file."""

    name: str
    what: str
    file_name: str
    other_names: tuple[str, ...]
    """Names under which other programs keep the same bytes."""
    sha256: str
    size: int
    url: str


INCEPTION = WeightsFile(
    name="inception2015",
    what="Inception of 2015-12-05 as PyTorch state dict: the features of FID, KID, precision and the Inception Score",
    file_name="pt_inception-2015-12-05-6726825d.pth",
    other_names=("weights-inception-2015-12-05-6726825d.pth",),
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    size=95_628_359,
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)
KNOWN = {INCEPTION.name: INCEPTION}


@dataclass(frozen=True)
class WeightsStatus:
    """What `weights_status` found of one published file."""

    name: str
    what: str
    state: str
    """`ready`, `damaged` (a file of that name has another content) or `missing`."""
    path: Path | None
    """The file in use, or the damaged one."""
    sha256: str
    size: int
    url: str
    looked_in: tuple[Path, ...]


# --- finding --------------------------------------------------------------------------------------------------


def weights_folder() -> Path:
    """Where fetched and added files are kept."""
    return cache_home() / "weights"


def search_folders() -> tuple[Path, ...]:
    """The folders that are looked into, in order: our own, then PyTorch's."""
    torch_home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch"
    torch = Path(torch_home).expanduser().absolute()
    return weights_folder(), torch / "hub" / "checkpoints", torch / "checkpoints"


def find_inception(path: str | None = None, *, progress: Progress | None = None) -> Path:
    """The file of the 2015 Inception. A `path` given by the user may hold other weights of the same network.

    Without one, `search_folders` are looked through; then the file is fetched if the network answers.

    Raises: `DataError` of one line that says what to put where.
    """
    return _given(Path(path).expanduser(), INCEPTION) if path else _find(INCEPTION, progress)


def _given(path: Path, weights: WeightsFile) -> Path:
    if not path.is_file():
        raise DataError(f"{path} is not a file; wanted: {weights.file_name}, or an .npz or .safetensors with its names")
    if path.name in (weights.file_name, *weights.other_names) and sha256_of(path) != weights.sha256:
        raise DataError(f"{path} bears the name of the published file, but its content is another: {_how(weights)}")
    return path


def _find(weights: WeightsFile, progress: Progress | None) -> Path:
    path, damaged = _on_disk(weights)
    if path is not None:
        return path
    if damaged is not None:
        log.warning("%s is not the published file (cut short or damaged) and is not used", damaged)
    if online(weights.url):
        return fetch_weights(weights.name, progress=progress)
    raise DataError(f"the weights {weights.name} are not on this machine: {_how(weights)}")


def _how(weights: WeightsFile) -> str:
    return (
        f"download {weights.url} ({weights.size / 1e6:.0f} MB) where there is a network, "
        f"then `stabletrain weights add {weights.file_name}`"
    )


def _on_disk(weights: WeightsFile) -> tuple[Path | None, Path | None]:
    """(the whole file, None), or (None, the first damaged one), or (None, None)."""
    damaged = None
    for folder in search_folders():
        for name in (weights.file_name, *weights.other_names):
            path = folder / name
            if path.is_file():
                if path.stat().st_size == weights.size and sha256_of(path) == weights.sha256:
                    return path, None
                damaged = damaged or path
    return None, damaged


def weights_status() -> list[WeightsStatus]:
    """For each published file: is it here, where, and where it was looked for. Asks no network."""
    statuses = []
    for weights in KNOWN.values():
        path, damaged = _on_disk(weights)
        state = "ready" if path else "damaged" if damaged else "missing"
        statuses.append(
            WeightsStatus(
                weights.name,
                weights.what,
                state,
                path or damaged,
                weights.sha256,
                weights.size,
                weights.url,
                search_folders(),
            )
        )
    return statuses


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex. Raises: `DataError` when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


# --- getting --------------------------------------------------------------------------------------------------


@functools.cache
def online(url: str) -> bool:
    """True when the host of `url` (or the proxy for it) answers within a second.

    Asked once a process: a run whose network comes and goes should not change its metrics in between.
    """
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = parts.port or (80 if parts.scheme == "http" else 443)
    with contextlib.suppress(OSError), socket.create_connection((parts.hostname or "", port), timeout=PROBE_SECONDS):
        return True
    return False


def fetch_weights(
    name: str = INCEPTION.name, *, url: str | None = None, progress: Progress | None = None, folder: Path | None = None
) -> Path:
    """Downloads a published file into `folder` (default: `weights_folder()`), checks its hash, and returns its path.

    `url` names a mirror; the hash must be the published one all the same. A file that is already there and whole is
    returned as it is. A second process that wants the same waits for the first.

    Raises: `ConfigError` for an unknown name; `DataError` when the network does not answer within a second, the
    transfer breaks three times, or the content is another.
    """
    weights = _known(name)
    url = url or weights.url
    folder = weights_folder() if folder is None else folder
    target = folder / weights.file_name
    with _only_one_process(folder, weights):
        if target.is_file() and sha256_of(target) == weights.sha256:
            return target
        if not online(url):
            host = urllib.parse.urlsplit(url).hostname
            raise DataError(f"cannot fetch {weights.file_name}: {host} does not answer; {_how(weights)}")
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with urllib.request.urlopen(url, timeout=READ_SECONDS) as answer:
                    return _store(iter(lambda: answer.read(CHUNK), b""), weights, target, url, progress)
            except (OSError, http.client.HTTPException) as error:
                final = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if final or attempt == ATTEMPTS:
                    raise DataError(f"cannot fetch {url}: {error}") from error
                log.warning("fetching %s broke off (%s): trying again", url, error)
    raise AssertionError("unreachable")


def add_weights(file: str | Path) -> Path:
    """Copies a published file, told by its hash, to where it is found from now on; returns the new path.

    Raises: `DataError` when the file cannot be read or is none of the published ones.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise DataError(f"{file} is not a file")
    sha256 = sha256_of(file)
    weights = next((known for known in KNOWN.values() if known.sha256 == sha256), None)
    if weights is None:
        published = ", ".join(f"{known.file_name} ({known.size:,} bytes)" for known in KNOWN.values())
        raise DataError(
            f"{file} ({file.stat().st_size:,} bytes, SHA-256 {sha256[:8]}...) is not a published file: {published}; "
            "other weights of the same network are given with --inception FILE, and their scores are not called FID"
        )
    target = weights_folder() / weights.file_name
    with _only_one_process(target.parent, weights):
        try:
            with file.open("rb") as source:
                return _store(iter(lambda: source.read(CHUNK), b""), weights, target, str(file), None)
        except OSError as error:
            raise DataError(f"cannot copy {file} to {target}: {error.strerror or error}") from error


def _known(name: str) -> WeightsFile:
    if name not in KNOWN:
        raise ConfigError(f"unknown weights {name!r}: {nearest(name, KNOWN)}")
    return KNOWN[name]


def _store(chunks: Iterator[bytes], weights: WeightsFile, target: Path, source: str, progress: Progress | None) -> Path:
    """Writes beside the target and moves it there when whole, so that no reader meets half a file."""
    digest, done = hashlib.sha256(), 0
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(f"fetching {weights.file_name}", done, weights.size)
                if done > weights.size:
                    break
        if done < weights.size:
            raise ConnectionError(f"{done:,} of {weights.size:,} bytes came")
        if digest.hexdigest() != weights.sha256:
            raise DataError(
                f"{source} is not {weights.file_name}: its SHA-256 does not begin with {weights.sha256[:8]}"
            )
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


@contextlib.contextmanager
def _only_one_process(folder: Path, weights: WeightsFile) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f".{weights.name}.lock").open("w")
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror or error}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
