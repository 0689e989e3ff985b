"""The command `stabletrain`."""

from __future__ import annotations


def main() -> None:
    """Entry point."""
    raise SystemExit("stabletrain: the command line is being laid out")
