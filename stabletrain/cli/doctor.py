"""`stabletrain doctor`: whether this machine is ready, and for each thing that is not, what to do."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from stabletrain import xla_settings
from stabletrain.cli.text import print_json, size
from stabletrain.cli.train import RUNS
from stabletrain.errors import EXIT_FAILURE, EXIT_OK
from stabletrain.paths import cache_home

OK, NOTE, WARNING, BLOCKER = "ok", "note", "warning", "blocker"
MARKS = {OK: "ok", NOTE: "--", WARNING: "!", BLOCKER: "X"}

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "scikit-learn", "typer", "rich")
TESTED = {
    (3, 11): {"jax": "0.10.1", "flax": "0.12.8"},
    (3, 12): {"jax": "0.11.2", "flax": "0.12.12"},
}
"""The versions that the test suite is run with, by Python; the same as in constraints.txt."""
WRONG_JAX = {
    "0.10.2": "computes wrong numbers under jit on CPU (jax#39103)",
    "0.11.0": "crashes on CPU and is slow on GPU (jax#38806)",
    "0.11.1": "does not work with flax",
}
LOW_MEMORY, LOW_DISK = 2e9, 2e9


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis. `state`: ok, note (nothing wrong), warning, or blocker."""

    what: str
    state: str
    found: str
    fix: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Look at this machine: versions, devices, memory, disk, caches, data, weights, network.

    Exit code 1 when something stands in the way of training.
    """
    findings: list[Finding] = []
    for check in CHECKS:
        for finding in check():
            findings.append(finding)
            if not as_json:
                _say(finding)
    blocked = [finding for finding in findings if finding.state == BLOCKER]
    if as_json:
        print_json({"ok": not blocked, "findings": [asdict(finding) for finding in findings]})
    elif blocked:
        print(f"\n{len(blocked)} thing{'s' * (len(blocked) != 1)} to mend before training.")
    else:
        print("\nReady to train: stabletrain diffusion --scalelong")
    return EXIT_FAILURE if blocked else EXIT_OK


def _say(finding: Finding) -> None:
    print(f"{MARKS[finding.state]:>2}  {finding.what.ljust(12)}  {finding.found}", flush=True)
    if finding.fix and finding.state != OK:
        print(f"{'':18}-> {finding.fix}", flush=True)


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] not in TESTED:
        tested = " and ".join(".".join(map(str, known)) for known in TESTED)
        yield Finding("Python", NOTE, f"{version}; tested with {tested}")
    else:
        yield Finding("Python", OK, version)


def _versions() -> Iterator[Finding]:
    from importlib import metadata

    tested = TESTED.get(sys.version_info[:2], {})
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, BLOCKER, "not installed", "pip install --constraint constraints.txt stabletrain")
    if reason := WRONG_JAX.get(found.get("jax", "")):
        wanted = tested.get("jax", "another version")
        yield Finding("jax", BLOCKER, f"{found['jax']} {reason}", f"pip install jax=={wanted} jaxlib=={wanted}")
    if found.get("jax") != found.get("jaxlib"):
        fix = f"pip install jaxlib=={found.get('jax')}"
        yield Finding("jaxlib", WARNING, f"{found.get('jaxlib')} beside jax {found.get('jax')}", fix)
    others = {name: version for name, version in tested.items() if found.get(name) not in (version, None)}
    shown = ", ".join(f"{name} {version}" for name, version in found.items())
    if others:
        wanted = " ".join(f"{name}=={version}" for name, version in others.items())
        yield Finding("packages", NOTE, f"{shown}; not the tested {wanted}", f"pip install {wanted}")
    else:
        yield Finding("packages", OK, shown)


def _devices() -> Iterator[Finding]:
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # a broken installation fails in many ways, and each is a blocker
        said = " ".join(str(error).split())[:200]
        yield Finding("devices", BLOCKER, f"JAX does not start: {said}", "JAX_PLATFORMS=cpu uses the processor only")
        return
    kind, platform = devices[0].device_kind, devices[0].platform
    yield Finding("devices", OK, f"{len(devices)} x {kind} ({platform})")
    if platform == "cpu" and Path("/proc/driver/nvidia/version").exists():
        yield Finding(
            "GPU", WARNING, "an NVIDIA driver is here, but JAX uses the CPU", "pip install 'stabletrain[cuda]'"
        )


def _machine() -> Iterator[Finding]:
    from stabletrain.training.devices import cpu_cores, cpu_model

    yield Finding("cores", OK, f"{cpu_cores()} ({cpu_model()})")
    import psutil

    memory = psutil.virtual_memory()
    found = f"{size(memory.available)} free of {size(memory.total)}"
    low = memory.available < LOW_MEMORY
    yield Finding("memory", WARNING if low else OK, found, "close other programs, or use a smaller --batch-size")


def _writable(what: str, folder: Path, fix: str, *, blocks: bool) -> Iterator[Finding]:
    """Tries the folder, or the nearest one above it that exists; leaves nothing behind."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    trouble = BLOCKER if blocks else WARNING
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        yield Finding(what, trouble, f"{folder}: cannot write ({error.strerror or error})", fix)
        return
    free = shutil.disk_usage(nearest).free
    low = free < LOW_DISK
    yield Finding(what, WARNING if low else OK, f"{folder}: writable, {size(free)} free", f"make room, or {fix}")


def _disk() -> Iterator[Finding]:
    yield from _writable("runs", RUNS.absolute(), "name another place with --out", blocks=True)
    elsewhere = "set STABLETRAIN_HOME to a folder that can be written"
    yield from _writable("cache", cache_home(), elsewhere, blocks=False)


def _data() -> Iterator[Finding]:
    from stabletrain.data.catalogue import list_datasets
    from stabletrain.data.locate import locate

    here = [info.name for info in list_datasets() if locate(info) is not None]
    missing = [info.name for info in list_datasets() if info.name not in here]
    fix = f"stabletrain data info {missing[0]}" if missing else ""
    yield Finding(
        "data", NOTE if missing else OK, f"here: {', '.join(here)}; not here: {', '.join(missing) or 'none'}", fix
    )


def _weights() -> Iterator[Finding]:
    from stabletrain.metrics.weights import weights_status

    for status in weights_status():
        if status.state == "ready":
            yield Finding("weights", OK, f"{status.name}: {status.path}")
        elif status.state == "damaged":
            fix = f"remove it, then stabletrain weights fetch {status.name}"
            yield Finding("weights", WARNING, f"{status.name}: {status.path} is damaged", fix)
        else:
            fix = f"for FID and the Inception Score: stabletrain weights fetch {status.name}"
            yield Finding("weights", NOTE, f"{status.name}: not here", fix)


def _network() -> Iterator[Finding]:
    from stabletrain.data.tfds import PROBE_HOST, online

    if online():
        yield Finding("network", OK, f"{PROBE_HOST[0]} answers")
    else:
        fix = "nothing to do for digits; for other data see stabletrain data info NAME"
        yield Finding("network", NOTE, f"{PROBE_HOST[0]} does not answer within a second: offline", fix)


def _environment() -> Iterator[Finding]:
    named = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID")
    given = [f"{name}={os.environ[name]}" for name in named if name in os.environ]
    if flags := xla_settings.flags_of_the_user():
        given = [f"XLA_FLAGS={flags}", *given]
    if given:
        yield Finding("environment", NOTE, ", ".join(given))
    if os.environ.get("JAX_ENABLE_X64", "").lower() in ("1", "true"):
        yield Finding("environment", WARNING, "JAX_ENABLE_X64 is set: everything in float64", "unset JAX_ENABLE_X64")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python, _versions, _devices, _machine, _disk, _data, _weights, _network, _environment,
)  # fmt: skip
