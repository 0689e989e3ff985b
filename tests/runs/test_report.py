"""The HTML report: one file, nothing from elsewhere, every value escaped, all that happened in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from stabletrain.runs.reading import read_run
from stabletrain.runs.report import run_report, study_report, write_report
from tests.runs.written import write_run

VOID = {"meta", "img", "br", "path", "use", "rect", "line", "circle"}


class Balance(HTMLParser):
    """Collects tags that are opened and never closed, or closed and never opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    events = [
        {"step": 12, "kind": "spike", "message": "loss <b>9</b>"},
        {"step": 12, "kind": "rollback", "to": 10},
        {"step": 20, "kind": "checkpoint"},
    ]
    curves = {"train/loss": [1.0, None, 0.25], "eval/score": [0.3, 0.2, 0.1], "stability/grad_norm": [1.0, 50.0, 0.5]}
    path = write_run(tmp_path / "cs-s0", curves=curves, events=events, skip_scaling="cs")
    (path / "samples").mkdir()
    for step in (5, 10, 100):
        Image.new("RGB", (4, 4), (step, 0, 0)).save(path / "samples" / f"{step}.png")
    return path


def check_page(page: str) -> None:
    parser = Balance()
    parser.feed(page)
    assert not parser.wrong
    assert not parser.open
    # Namespaces of SVG are names, not addresses; nothing else may point outside the file.
    addresses = [
        url for url in re.findall(r"https?://[^\s\"'<)]+", page) if "w3.org" not in url and "purl.org" not in url
    ]
    assert [url for url in addresses if "creativecommons" not in url and "matplotlib.org" not in url] == []
    assert "<script" not in page
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_report_of_a_run_says_what_happened(run_path: Path) -> None:
    page = run_report(read_run(run_path))
    check_page(page)
    assert "loss &lt;b&gt;9&lt;/b&gt;" in page
    assert "rollback" in page
    assert "1 checkpoints" in page
    assert page.count("data:image/png;base64,") == 3
    assert page.index(">5<") < page.index(">10<") < page.index(">100<")


def test_report_of_a_study_pairs_groups_and_counts_the_diverged(tmp_path: Path) -> None:
    paths = [
        write_run(
            tmp_path / f"{method}-s{seed}",
            seed=seed,
            skip_scaling=method,
            state="diverged" if (method, seed) == ("none", 1) else "done",
            curves={"train/loss": [1.0, 0.5, 0.2 + seed], "eval/score": [1.0, 0.5, 0.2 + seed]},
        )
        for method in ("none", "cs")
        for seed in range(3)
    ]
    page = study_report("a study", [read_run(path) for path in paths])
    check_page(page)
    assert "1/3" in page
    assert "skip_scaling=cs" in page


def test_report_of_a_run_without_anything_still_stands(tmp_path: Path) -> None:
    path = write_run(tmp_path / "empty", state="failed")
    for name in ("metrics.jsonl", "events.jsonl", "record.json"):
        (path / name).unlink()
    check_page(run_report(read_run(path)))


def test_write_is_atomic_and_leaves_no_other_file(run_path: Path) -> None:
    write_report(run_path / "report.html", "<p>x</p>")
    assert (run_path / "report.html").read_text() == "<p>x</p>"
    assert not list(run_path.glob("*.tmp"))
