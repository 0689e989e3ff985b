"""Facts about the machine, the program and the process, for record.json."""

from __future__ import annotations

import os
import platform
import resource
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from stabletrain.training.devices import cpu_model

PACKAGES = (
    "stabletrain",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "jax-md",
    "numpy",
    "scipy",
    "scikit-learn",
)


def command_line() -> list[str]:
    """The command that was given, with the program's name instead of its path."""
    program = Path(sys.argv[0])
    ours = program.name == "stabletrain" or program.parent.name == "stabletrain"
    return ["stabletrain" if ours else str(program), *sys.argv[1:]]


def machine_facts() -> dict[str, Any]:
    """Versions, devices, host, and the state of the repository in the working directory."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "processor": cpu_model(),
        "cores": os.cpu_count(),
        "devices": {"kind": devices[0].device_kind, "platform": devices[0].platform, "available": len(devices)},
        "git": _git_state(),
    }


def peak_memory_bytes() -> int:
    """Peak memory of the accelerator where it says, else of this process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of the repository in the working directory, and whether it has changes (None: git did not say)."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    changes = git("status", "--porcelain")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


class CompileClock:
    """Counts the seconds that JAX spends on tracing, lowering and compiling, while it is entered."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> CompileClock:
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs
