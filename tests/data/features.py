"""A small folder of features, laid out as those of the text-to-image experiments are."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_features(folder: Path, *, train: int, held_out: int) -> Path:
    """Latents 8 x 8 x 4 of mean -2 or 2, and one to three texts [5, 6] each that say which (in columns 0 and 1)."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", held_out)):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            kind = number % 2
            mean = 4.0 * kind - 2.0 + 0.1 * generator.standard_normal((4, 8, 8))
            np.save(folder / split / f"{number}.npy", np.concatenate([mean, np.full_like(mean, -4.0)]).astype("f4"))
            for caption in range(1 + number % 3):
                text = 0.1 * generator.standard_normal((5, 6))
                text[:, kind] += 1.0
                np.save(folder / split / f"{number}_{caption}.npy", text.astype("f4"))
    np.save(folder / "empty_context.npy", np.zeros((5, 6), "f4"))
    return folder
