"""Keeps XLA's own log lines off the user's terminal. Imports no JAX: it has to run before JAX is imported."""

from __future__ import annotations

import os

VARIABLE = "TF_CPP_MIN_LOG_LEVEL"
LEFT_BY_JAX = "1"
"""What importing JAX leaves in the environment of a process, and so of its children, where the user chose nothing."""


def silence() -> None:
    """Asks XLA for fatal messages only, unless the user asked for others (0 or 2).

    XLA:CPU takes tuning hints for processor features, and so prints kilobytes of errors for each program that it reads
    from the cache on the very machine that wrote it (openxla/xla#44565).
    """
    if os.environ.get(VARIABLE, LEFT_BY_JAX) == LEFT_BY_JAX:
        os.environ[VARIABLE] = "3"
