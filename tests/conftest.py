"""Settings that all tests share: four virtual CPU devices, a compile cache, no reach into the user's home."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stabletrain import xla_settings

CACHE = Path(__file__).resolve().parents[1] / ".cache"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("STABLETRAIN_HOME", str(CACHE / "stabletrain"))
os.environ.setdefault("MPLBACKEND", "Agg")

AS_FOR_USERS = os.environ.get("STABLETRAIN_TEST_OPTIMISED") == "1" or os.environ["JAX_PLATFORMS"] != "cpu"
QUICK_XLA = {
    "0.10.1": "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
    "0.11.2": "--xla_cpu_parallel_codegen_split_count=1",
}
"""Compiling takes nearly all of the time of the tests, so it is done without LLVM's optimisations, by XLA's older
emitters and in one thread (two workers share two cores): in about half the time. Commands that tests start as processes
inherit it. By release of jaxlib, as XLA ends a process at a flag that it does not know."""
if not AS_FOR_USERS:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    quick_flags = QUICK_XLA.get(importlib.metadata.version("jaxlib"), "")
    if quick_flags not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick_flags}".strip()
xla_settings.apply()
# JAX makes many objects and few cycles: a tenth of the time would go into looking for them.
gc.set_threshold(100_000, 50, 100)


WHOLE_NETWORKS = {
    *("continual/test_experiment.py", "diffusion/test_experiment.py", "diffusion/test_learned_variance.py"),
    *("diffusion/test_skip_mlp.py", "diffusion/test_text_to_image.py", "diffusion/test_theory.py"),
    *("diffusion/test_training_parity.py", "diffusion/test_trajectories.py", "diffusion/test_unet.py"),
    *("diffusion/test_unet_import.py", "diffusion/test_uvit.py", "diffusion/test_uvit_import.py"),
    *("gan/networks/test_stylegan2.py", "gan/test_commands.py", "gan/test_depth_gradients.py"),
    *("gan/test_experiment.py", "gan/test_step_parity.py", "gan/test_wgan_commands.py", "nnip/test_networks.py"),
    *("nnip/test_painn.py", "nnip/test_potential.py", "nnip/test_stable_experiment.py", "nnip/test_training.py"),
    *("training/test_resume.py",),
}
"""Files that compile whole networks and train them: `slow` with all of their tests, hence not among the units."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Real data and GPUs are used where they are; elsewhere those tests are skipped, and say so."""
    skip_data = pytest.mark.skip(reason="STABLETRAIN_TEST_DATA names no folder of real data")
    skip_gpu = pytest.mark.skip(reason="no NVIDIA GPU (JAX_PLATFORMS=cpu)")
    data = os.environ.get("STABLETRAIN_TEST_DATA")
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix() in WHOLE_NETWORKS:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("realdata") and not (data and Path(data).is_dir()):
            item.add_marker(skip_data)
        if item.get_closest_marker("gpu") and os.environ["JAX_PLATFORMS"] == "cpu":
            item.add_marker(skip_gpu)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets (marker `realdata`)."""
    return Path(os.environ["STABLETRAIN_TEST_DATA"])


@pytest.fixture
def optimised() -> Iterator[None]:
    """Programs with all of XLA's optimisations: without them two programs may round differently."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Programs compiled for one module are dropped at its end; kept, they fill several GiB in each process."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
