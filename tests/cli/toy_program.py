"""The command line with the toy family among the others, as a program of its own: what the engine starts in tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from stabletrain.cli import families
from stabletrain.cli.main import run
from tests.cli.toy import FAMILY

if __name__ == "__main__":
    families.FAMILIES["toy"] = lambda: FAMILY
    sys.exit(run(sys.argv[1:]))
