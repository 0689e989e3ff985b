"""Settings that XLA finds in its process: environment, allocator. Imports no JAX: they stand before it is imported."""

from __future__ import annotations

import ctypes
import os
import sys

LOG_LEVEL, FLAGS = "TF_CPP_MIN_LOG_LEVEL", "XLA_FLAGS"
LOG_LEVEL_OF_JAX = "1"
"""What importing JAX leaves in the environment of a process, and so of its children, where the user chose nothing."""

EXTRA_OPTIONS = "--xla_backend_extra_options"
SMALL_LOOPS = f"{EXTRA_OPTIONS}=xla_cpu_small_while_loop_byte_threshold=32768"
"""XLA:CPU compiles a loop that moves fewer bytes than this into one function. Its default, 1024, is below what the
stability monitor remembers, whose forty operations would be launched one by one."""


def apply() -> None:
    """Sets what is missing, for this process and its children.

    Messages: fatal ones only, unless the user asked for others (0 or 2). XLA:CPU takes tuning hints for processor
    features, and so prints kilobytes of errors for each program that it reads from the cache on the very machine that
    wrote it (openxla/xla#44565). Small loops: `SMALL_LOOPS`, unless XLA_FLAGS has such options already.
    """
    if os.environ.get(LOG_LEVEL, LOG_LEVEL_OF_JAX) == LOG_LEVEL_OF_JAX:
        os.environ[LOG_LEVEL] = "3"
    given = os.environ.get(FLAGS, "")
    if EXTRA_OPTIONS not in given:
        os.environ[FLAGS] = f"{given} {SMALL_LOOPS}".strip()


def flags_of_the_user() -> str:
    """XLA_FLAGS without what `apply` added."""
    return os.environ.get(FLAGS, "").replace(SMALL_LOOPS, "").strip()


ALLOCATOR_VARIABLES = ("MALLOC_", "GLIBC_TUNABLES")
"""What environment variables begin with by which a user chooses how glibc allocates."""

_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1  # of mallopt(3)
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Makes glibc keep memory that was freed, up to the process's peak, and tells whether it does.

    XLA:CPU allocates the temporaries of a program at each call. By default glibc maps such blocks anew each time and
    gives them back, and the system fills every page with zeros: 800 MB in a step of U-ViT-S/2. So: no mapping of single
    blocks, one arena (the heaps of further ones are too small for such blocks), and nothing given back. The price is
    memory that one large block has left in pieces (`docs/diffusion.md`, speed).

    Left alone: other allocators and systems, and what the user says with `ALLOCATOR_VARIABLES`.
    """
    if any(name.startswith(ALLOCATOR_VARIABLES) for name in os.environ) or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    return all(mallopt(*each) for each in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _LARGEST_INT)))
