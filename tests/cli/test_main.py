"""The program as a whole: help at once and without JAX, exit codes of a real process, completion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stabletrain import __version__
from stabletrain.cli.families import FAMILIES
from tests.cli.conftest import Command

HEAVY = (
    "jax",
    "jaxlib",
    "numpy",
    "orbax",
    "flax",
    "optax",
    "rich",
    "sklearn",
    "PIL",
    "tensorflow_datasets",
    "pydantic",
)
PROBE = f"""
import sys
from pathlib import Path
from stabletrain.cli.main import run
code = run(sys.argv[1:])
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


def test_without_arguments_it_prints_its_help(command: Command) -> None:
    assert command().out == command("--help").out


@pytest.mark.parametrize("arguments", [["--help"], *[[family, "--help"] for family in FAMILIES], ["sample", "-h"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Usage: stabletrain" in done.stdout
    assert done.stderr.strip() == "[]"


def test_the_program_alone_shows_its_help_and_says_that_a_command_is_missing(command: Command) -> None:
    said = command()
    assert said.code == 2
    assert "Usage: stabletrain" in said.out
    for name in (*FAMILIES, "resume", "runs", "show", "sample", "evaluate", "export", "data", "weights", "doctor"):
        assert f"  {name} " in said.out
    assert "Usage: stabletrain data" in command("data").out


def test_version(command: Command) -> None:
    assert command("--version").out.strip() == f"stabletrain {__version__}"


def test_help_lists_choices_defaults_and_panels(command: Command) -> None:
    text = command("toy", "--help").out
    assert "--colour red|green|blue" in text
    assert "[default: 1,2]" in text
    assert "--mirror / --no-mirror" in text
    panels = [
        line.rstrip(":") for line in text.splitlines() if line and not line.startswith(" ") and line.endswith(":")
    ]
    assert panels[:4] == ["Options", "Method", "Data", "Training"]
    assert panels[-4:] == ["Stability", "Run directory", "Devices", "This command"]


def test_a_usage_error_of_a_real_process_is_exit_code_2_on_stderr() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stabletrain", "diffusion", "--skip-scaling", "css"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "stabletrain: error: unknown value 'css' for --skip-scaling: did you mean 'cs'?\n"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    """`stabletrain ... | head -1`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "stabletrain", "diffusion", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    process.wait()
    assert b"Traceback" not in said


def test_an_error_with_json_is_a_document_too(command: Command) -> None:
    said = command("show", "nothing", "--json")
    assert said.code == 1
    assert said.document == {
        "run_dir": None,
        "status": "failed",
        "step": None,
        "metrics": {},
        "error": said.error.removeprefix("stabletrain: error: "),
        "exit_code": 1,
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("stabletrain diffusion --skip-scaling l", {"ls", "ls-per-skip", "layernorm", "learned-scalar"}),
        ("stabletrain diff", {"diffusion"}),
        ("stabletrain show fi", {"first"}),
        ("stabletrain sample fi", {"first"}),
    ],
)
def test_the_shell_completes_commands_choices_and_runs(toy_run: Path, words: str, expected: set[str]) -> None:
    environment = {
        **os.environ,
        "_STABLETRAIN_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from stabletrain.cli.main import main; main()"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=toy_run.parents[1],
    )
    assert set(done.stdout.split()) == expected
