"""Memory that XLA frees is there for its next call, unless the user chose otherwise."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from stabletrain import xla_settings

PAGES = """
import resource
from stabletrain.training.devices import configure_backend
import jax, jax.numpy as jnp

configure_backend(0, 1, compile_cache=False)

@jax.jit
def program(x):  # a product of 36 MiB in temporary memory
    return jnp.sum(jnp.abs(x @ x.T) @ x)

x = jnp.ones((3072, 4))
for _ in range(6):
    program(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    program(x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 12 / 2**20)
"""

glibc = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc"
)


def fresh_mebibytes(**variables: str) -> float:
    """MiB that the system has to find and to fill with zeros for each call of a program."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PAGES], env={**environment, **variables}, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@glibc
def test_a_call_takes_the_memory_that_the_last_one_left():
    assert fresh_mebibytes() < 15.0  # now and then a block is needed that no freed one can hold
    assert fresh_mebibytes(MALLOC_ARENA_MAX="8") > 35.0


@pytest.mark.parametrize("variable", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_says_of_the_allocator_stands(variable, monkeypatch):
    monkeypatch.setenv(variable, "131072")
    assert not xla_settings.keep_freed_memory()


def test_other_systems_are_left_alone(monkeypatch):
    for name in [name for name in os.environ if name.startswith(xla_settings.ALLOCATOR_VARIABLES)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not xla_settings.keep_freed_memory()
