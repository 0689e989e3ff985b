"""How far the diffusion family is from independent implementations with the same weights, in float64.

Networks, losses, gradients, five training steps and moving averages are compared with PyTorch's (in `tests/diffusion`:
`torch_reference.py`), outputs of U-ViT also with those of the released ScaleLong code, and every sampler's trajectory
with the papers' algorithms in NumPy around PyTorch's network (`sampler_reference.py`). The numbers of the other side
are the fixtures of the tests; where PyTorch is installed, they are computed anew and compared with those too. A
difference is relative to the largest number of its array. The tests assert the same with a tolerance. Some minutes:

    python -m benchmarks.diffusion_parity [--out FILE.json]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.training.devices import configure_backend

RESULT = Path(__file__).parent / "results" / "diffusion_parity.json"
Numbers = dict[str, np.ndarray]
Row = dict[str, Any]


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest number."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def compared(
    cases: Iterable[str], parts: dict[str, str], ours: Callable[[str], Numbers], theirs: Callable[[str], Numbers]
) -> list[Row]:
    """A row for each part: the worst of its cases."""
    pairs = [(name, ours(name), theirs(name)) for name in cases]
    rows = []
    for key, label in parts.items():
        by_case = {name: apart(found[key], expected[key]) for name, found, expected in pairs}
        worst = max(by_case, key=lambda name: by_case[name])
        rows.append({"part": label, "cases": len(pairs), "largest": by_case[worst], "of": worst})
    return rows


def measure() -> list[Row]:
    """All rows of the table."""
    from tests.diffusion.cases import TRAINING, UNET_CASES, UVIT_CASES
    from tests.diffusion.parity import RELEASED, fixture, our_course, our_numbers, our_trajectory, released
    from tests.diffusion.sampler_reference import TRAJECTORIES

    rows: list[Row] = []
    gradients = {"output": "forward", "images": "gradient by the images", "gradients": "gradient by every parameter"}
    for kind, title, cases in (("uvit", "U-ViT", UVIT_CASES), ("unet", "UNet", UNET_CASES)):
        parts = {key: f"{title}: {label}" for key, label in gradients.items()}
        rows += compared(cases, parts, lambda name, k=kind: our_numbers(k, name), lambda name, k=kind: fixture(k, name))
    label = {"output": "U-ViT: forward, against the released ScaleLong code"}
    rows += compared(RELEASED, label, lambda name: released(name)[0], lambda name: released(name)[1])
    courses = {
        "losses": "loss of five training steps",
        "params": "parameters after five AdamW steps with warm-up and clipping",
        "ema": "moving average after five steps",
    }
    rows += compared(TRAINING, courses, our_course, lambda name: fixture("training", name))
    for name in TRAJECTORIES:
        ways = {"shown": f"trajectory: {name}", "end": ""}
        shown, end = compared([name], ways, our_trajectory, lambda name: fixture("trajectories", name))
        rows.append({**shown, "largest": max(shown["largest"], end["largest"])})
    return rows


def fixtures_against_torch() -> float | None:
    """The largest difference between the fixtures and what PyTorch computes here; None without PyTorch."""
    if importlib.util.find_spec("torch") is None:
        return None
    from tests.diffusion import torch_reference as reference
    from tests.diffusion.parity import fixture

    found = 0.0
    for kind, cases in (("uvit", reference.UVIT_CASES), ("unet", reference.UNET_CASES)):
        for name in cases:
            numbers, kept = reference.numbers(kind, name), fixture(kind, name)
            found = max(found, *(apart(numbers[key], kept[key]) for key in kept))
    for kind, cases, compute in (
        ("training", reference.TRAINING, reference.trained),
        ("trajectories", reference.TRAJECTORIES, reference.trajectory),
    ):
        for name in cases:
            numbers, kept = compute(name), fixture(kind, name)
            found = max(found, *(apart(numbers[key], kept[key]) for key in kept))
    return found


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| what | cases | largest difference |", "| --- | --- | --- |"]
    lines += [f"| {row['part']} | {row['cases']} | {row['largest']:.0e} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    configure_backend(1, 1)
    import jax

    rows = measure()
    document = {
        "what": "largest difference in float64, relative to the largest number of the array",
        "rows": rows,
        "fixtures_against_torch": fixtures_against_torch(),
        "versions": {"jax": jax.__version__},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    print(table(rows))
    print(f"fixtures against PyTorch here: {document['fixtures_against_torch']}")


if __name__ == "__main__":
    main()
