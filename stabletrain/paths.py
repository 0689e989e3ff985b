"""Where stabletrain keeps what it can make again: compiled programs, classifiers, downloaded weights."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """`$STABLETRAIN_HOME`, else `$XDG_CACHE_HOME/stabletrain`, else `~/.cache/stabletrain`. Not created here."""
    home = os.environ.get("STABLETRAIN_HOME")
    if home:
        return Path(home).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser().absolute() / "stabletrain"
