"""How long work says how far it is: the `tick` of an evaluation context, without the context."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""`progress(what, done, total)`; it may raise to stop the work."""


def silent(label: str, done: int, total: int) -> None:
    """A `Progress` that tells nobody."""
