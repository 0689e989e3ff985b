"""Writes run directories in the public format, for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w


def write_run(
    path: Path,
    *,
    seed: int = 0,
    state: str = "done",
    curves: Mapping[str, Sequence[float | None]] | None = None,
    events: Sequence[Mapping[str, Any]] = (),
    fingerprint: str = "f00d",
    **config: Any,
) -> Path:
    """One run whose rows stand at steps 10, 20, ... with the given metric values."""
    path.mkdir(parents=True)
    values = {"family": "diffusion", "seed": seed, "steps": 30, **config}
    (path / "config.toml").write_text(tomli_w.dumps(values))
    (path / "record.json").write_text(json.dumps({"data": {"fingerprint": fingerprint}, "wall_seconds": 12.0}))
    curves = curves or {"train/loss": [1.0, 0.5, 0.25]}
    length = max(len(curve) for curve in curves.values())
    rows = [
        {"step": 10 * (i + 1), **{name: curve[i] for name, curve in curves.items() if i < len(curve)}}
        for i in range(length)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (path / "status.json").write_text(json.dumps({"state": state, "step": 10 * length, "total_steps": 30}))
    return path
