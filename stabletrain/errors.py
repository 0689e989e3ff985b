"""Errors that a user can meet. Each is one readable line and carries the exit code of the command line.

A message says what failed, where, what was expected, the nearest valid value and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_DIVERGED = 4
EXIT_MISMATCH = 5
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class StableTrainError(Exception):
    """Base of every error that is the user's to read: shown as one line, without a traceback."""

    exit_code = EXIT_FAILURE


class ConfigError(StableTrainError):
    """An unknown option or value, or a combination of options that makes no sense."""

    exit_code = EXIT_USAGE


class DataError(StableTrainError):
    """A data set or a weights file that is missing, damaged, or of the wrong shape."""

    exit_code = EXIT_DATA


class RunDirectoryError(StableTrainError):
    """A run directory that cannot be written, or that belongs to something else."""


class ConfigChangedError(RunDirectoryError, ConfigError):
    """The run directory was made with another configuration; the message shows the difference."""

    exit_code = EXIT_USAGE


class CheckpointError(StableTrainError):
    """No complete checkpoint could be read, or it does not fit the model."""


class NotFiniteError(StableTrainError):
    """Samples that hold numbers which are not finite."""


class VerificationError(StableTrainError):
    """A recomputed result differs from the recorded one."""

    exit_code = EXIT_MISMATCH


class Interrupted(Exception):
    """Raised at the next safe point after SIGTERM or SIGINT; `exit_code` is 75 or 130."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"interrupted (exit code {exit_code})")
        self.exit_code = exit_code


def nearest(value: str, valid: Iterable[str]) -> str:
    """A sentence fragment naming the valid value closest to `value`, or all valid values if none is close."""
    choices = [str(choice) for choice in valid]
    close = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "valid values: " + ", ".join(choices)
