"""Stopping on request: SIGTERM and SIGINT ask once; the run finishes its step, checkpoints, and ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

from stabletrain.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, Interrupted

EXIT_CODES = {signal.SIGTERM: EXIT_PREEMPTED, signal.SIGINT: EXIT_INTERRUPTED}


class StopRequest:
    """Remembers the first SIGTERM or SIGINT. A second one ends the process at once, as it would without us.

    A context manager, which may be entered again inside itself: handlers are installed on entering (in the main
    thread only, where Python allows it) and the former ones put back on leaving.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._depth = 0
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in EXIT_CODES}
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, former in self._former.items():
                signal.signal(number, former)
            self._former = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.exit_code is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.exit_code = EXIT_CODES[signal.Signals(number)]

    @property
    def requested(self) -> bool:
        """True once the run was asked to stop."""
        return self.exit_code is not None

    def check(self) -> None:
        """Raises: `Interrupted` once the run was asked to stop. To be called often in everything that takes long."""
        if self.exit_code is not None:
            raise Interrupted(self.exit_code)
