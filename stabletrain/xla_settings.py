"""Settings of XLA that it reads from the environment. Imports no JAX: they have to stand before JAX is imported."""

from __future__ import annotations

import os

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
