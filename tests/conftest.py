"""Settings that all tests share: four virtual CPU devices, a compile cache, no reach into the user's home."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parents[1] / ".cache"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("STABLETRAIN_HOME", str(CACHE / "stabletrain"))
os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Real data and GPUs are used where they are; elsewhere those tests are skipped, and say so."""
    skip_data = pytest.mark.skip(reason="STABLETRAIN_TEST_DATA names no folder of real data")
    skip_gpu = pytest.mark.skip(reason="no NVIDIA GPU (JAX_PLATFORMS=cpu)")
    data = os.environ.get("STABLETRAIN_TEST_DATA")
    for item in items:
        if item.get_closest_marker("realdata") and not (data and Path(data).is_dir()):
            item.add_marker(skip_data)
        if item.get_closest_marker("gpu") and os.environ["JAX_PLATFORMS"] == "cpu":
            item.add_marker(skip_gpu)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets (marker `realdata`)."""
    return Path(os.environ["STABLETRAIN_TEST_DATA"])


QUICKLY_COMPILED = {"continual", "diffusion", "gan", "nnip"}
"""Folders whose programs are compiled without LLVM's optimisations, in about half the time; nearly all of the time of
these tests is compilation. Everything else, and every command that runs as a process of its own, is compiled as for
users. STABLETRAIN_TEST_OPTIMISED=1 does so everywhere."""


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """See `QUICKLY_COMPILED`."""
    folder = request.path.relative_to(Path(__file__).parent).parts[0]
    if folder not in QUICKLY_COMPILED or os.environ.get("STABLETRAIN_TEST_OPTIMISED") == "1":
        yield
        return
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Programs compiled for one module are dropped at its end; kept, they fill several GiB in each process."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
