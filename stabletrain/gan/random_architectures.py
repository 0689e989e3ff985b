"""Which method trains more of many random architectures: success over a grid of thresholds, with tests.

A run trains one architecture with one method; an architecture that both methods trained is a pair. A run that diverged
or failed is a result: it reaches no threshold. Source: Gulrajani et al. 2017, Section 5.1, Tables 2 and 5, Appendix C.
Beyond the paper: McNemar's test of each threshold, the sign test of all scores, bootstrap intervals over
architectures, and the scores of real data and of noise on the same scale.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from stabletrain.errors import ConfigError, DataError, nearest
from stabletrain.training.run_directory import RunDirectory, is_run

BOOTSTRAP_DRAWS = 10_000
METRIC_COLUMN = "metric"
ENDED = ("done", "diverged", "failed")
Scores = Mapping[int, float]
"""Architecture -> final score; minus infinity where the training broke down."""


@dataclass(frozen=True)
class Threshold:
    """How many architectures reach a score with only the first method, only the second, both, or neither.

    `p`: McNemar's exact test that the first and the second succeed alone equally often; NaN when none succeeds alone.
    `difference`: share of successes of the second minus that of the first, with its 95 % interval over architectures.
    """

    minimum: float
    only_first: int
    only_second: int
    both: int
    neither: int
    p: float
    difference: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """Two methods over the architectures that both trained to an end."""

    first: str
    second: str
    architectures: tuple[int, ...]
    broken: tuple[int, int]
    """Architectures of each on which the training diverged or failed."""
    second_better: int
    first_better: int
    sign_p: float
    """Two-sided sign test of which method scores higher; equal scores (both broken) are left out."""
    unbroken: int
    """Architectures that both trained without breaking down; over these are the means and the difference."""
    means: tuple[float, float]
    deviations: tuple[float, float]
    difference: float
    """Mean score of the second minus that of the first; NaN when each architecture broke one of them."""
    interval: tuple[float, float]
    """Its 95 % bootstrap interval over architectures."""
    thresholds: tuple[Threshold, ...]


def read_scores(study: Path, metric: str) -> dict[str, dict[int, float]]:
    """By row (`<row>-s<seed>` is a run's name): the last value of `metric` of each architecture that came to an end.

    Raises: `ConfigError` when the folder holds no run of `--network random`, two runs of a row have one architecture,
    or a finished run never logged the metric (the message names those that it logged).
    """
    found: dict[str, dict[int, float]] = {}
    runs = sorted(path for path in study.iterdir() if is_run(path)) if study.is_dir() else []
    for path in runs:
        run = RunDirectory.open(path)
        if run.config_values.get("network") != "random" or run.status.get("state") not in ENDED:
            continue
        row = path.name.rpartition("-s")[0] or path.name
        architecture = int(run.config_values["architecture"])
        of_row = found.setdefault(row, {})
        if architecture in of_row:
            raise ConfigError(f"{study}: two runs of {row} train architecture {architecture}")
        of_row[architecture] = _final_score(run, metric)
    if not found:
        raise ConfigError(f"{study} holds no finished run of `stabletrain gan --network random`")
    return found


def join_scores(parts: Sequence[Mapping[str, Scores]]) -> dict[str, dict[int, float]]:
    """The rows of several studies, which share no architecture of a row.

    Raises: `ConfigError` when two of them have the same architecture under the same row.
    """
    joined: dict[str, dict[int, float]] = {}
    for part in parts:
        for row, scores in part.items():
            of_row = joined.setdefault(row, {})
            if twice := sorted(set(of_row) & set(scores)):
                raise ConfigError(f"two studies have architecture {twice[0]} of {row}")
            of_row.update(scores)
    return joined


def _final_score(run: RunDirectory, metric: str) -> float:
    if run.status.get("state") != "done":
        return -math.inf
    rows = run.rows()
    values = [row[metric] for row in rows if metric in row]
    if not values:
        names = {name for row in rows for name in row if name.startswith("eval/")}
        raise ConfigError(f"{run.path} never logged {metric}: {nearest(metric, names) if names else 'no evaluation'}")
    return float(values[-1]) if values[-1] is not None and math.isfinite(values[-1]) else -math.inf


def compare(
    scores: Mapping[str, Scores], first: str, second: str, minimums: Sequence[float], *, seed: int = 0
) -> Comparison:
    """Compares two rows over the architectures that both have.

    Raises: `ConfigError` for an unknown row, or rows without a common architecture.
    """
    for name in (first, second):
        if name not in scores:
            raise ConfigError(f"no row {name!r}: {nearest(name, scores)}")
    common = tuple(sorted(set(scores[first]) & set(scores[second])))
    if not common:
        raise ConfigError(f"{first} and {second} have no architecture in common")
    one, two = (np.array([scores[name][number] for number in common]) for name in (first, second))
    better, worse = int((two > one).sum()), int((two < one).sum())
    finite = np.isfinite(one) & np.isfinite(two)
    left, right = one[finite], two[finite]
    spread = (float(left.std(ddof=1)), float(right.std(ddof=1))) if finite.sum() > 1 else (math.nan, math.nan)
    means = (float(left.mean()), float(right.mean())) if finite.any() else (math.nan, math.nan)
    return Comparison(
        first=first,
        second=second,
        architectures=common,
        broken=(int(np.isneginf(one).sum()), int(np.isneginf(two).sum())),
        second_better=better,
        first_better=worse,
        sign_p=_two_sided(better, worse),
        unbroken=int(finite.sum()),
        means=means,
        deviations=spread,
        difference=means[1] - means[0],
        interval=_interval(right - left, seed),
        thresholds=tuple(threshold(one, two, minimum, seed=seed) for minimum in minimums),
    )


def threshold(one: np.ndarray, two: np.ndarray, minimum: float, *, seed: int = 0) -> Threshold:
    """Success of paired scores [N] at one minimum; a score above it is a success, as in the paper."""
    first, second = one > minimum, two > minimum
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    gains = second.astype(float) - first.astype(float)
    return Threshold(
        minimum=float(minimum),
        only_first=only_first,
        only_second=only_second,
        both=int((first & second).sum()),
        neither=int((~first & ~second).sum()),
        p=_two_sided(only_second, only_first),
        difference=float(gains.mean()),
        interval=_interval(gains, seed),
    )


def _interval(gains: np.ndarray, seed: int) -> tuple[float, float]:
    if not len(gains):
        return (math.nan, math.nan)
    draws = np.random.default_rng(seed).integers(0, len(gains), (BOOTSTRAP_DRAWS, len(gains)))
    low, high = np.percentile(gains[draws].mean(axis=1), [2.5, 97.5])
    return (float(low), float(high))


def _two_sided(wins: int, losses: int) -> float:
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else float("nan")


def grid(real: float, noise: float, count: int = 12) -> list[float]:
    """`count` thresholds above the score of noise and below that of real data, evenly; the noise's own is the first.

    Below the score of noise a threshold asks for nothing.
    """
    return [noise + (real - noise) * place / count for place in range(count)]


def classifier_anchors(dataset: str, data: str | None = None) -> tuple[float, float]:
    """The classifier score (one split) of the real test images and of as many images of uniform noise.

    Raises: as `load_dataset`; `DataError` for a data set without labels to train a classifier on.
    """
    from stabletrain.data.load import load_dataset
    from stabletrain.metrics.classifier import dataset_classifier
    from stabletrain.metrics.inception_score import inception_score

    loaded = load_dataset(dataset, data=data)
    classifier = dataset_classifier(loaded)
    split = loaded.test if len(loaded.test) else loaded.train
    real = split.images.read(np.arange(min(len(split), 10_000)))
    noise = np.random.default_rng(0).integers(0, 256, real.shape, np.uint8)
    scored = [inception_score(np.asarray(classifier.logits(images)), splits=1).mean for images in (real, noise)]
    return scored[0], scored[1]


# --- as text ----------------------------------------------------------------------------------------------------------


def to_markdown(comparison: Comparison, metric: str, anchors: tuple[float, float] | None) -> str:
    """The comparison as a table like the paper's Table 5, with the tests beside the counts."""
    first, second, total = comparison.first, comparison.second, len(comparison.architectures)
    lines = [
        f"| min. score | only {first} | only {second} | both | neither | McNemar p | difference [95 %] |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in comparison.thresholds:
        low, high = each.interval
        shown = "-" if math.isnan(each.p) else f"{each.p:.2g}"
        lines.append(
            f"| {each.minimum:.2f} | {each.only_first} | {each.only_second} | {each.both} | {each.neither} | {shown} "
            f"| {each.difference:+.2f} [{low:+.2f}, {high:+.2f}] |"
        )
    sign = "-" if math.isnan(comparison.sign_p) else f"{comparison.sign_p:.2g}"
    lines += [
        "",
        f"{total} architectures; success is `{metric}` above the minimum, and a run that broke down has none "
        f"({comparison.broken[0]} of {first}, {comparison.broken[1]} of {second}). {second} scores higher on "
        f"{comparison.second_better} and {first} on {comparison.first_better}; sign test p = {sign}.",
    ]
    if comparison.unbroken:
        (low, high), (mean, other) = comparison.interval, comparison.means
        lines.append(
            f"Mean over {comparison.unbroken} unbroken: {first} {mean:.2f} ± {comparison.deviations[0]:.2f}, {second} "
            f"{other:.2f} ± {comparison.deviations[1]:.2f}; difference {comparison.difference:+.2f} "
            f"[{low:+.2f}, {high:+.2f}]."
        )
    if anchors is not None:
        lines.append(f"Real test images score {anchors[0]:.2f}, uniform noise {anchors[1]:.2f}.")
    return "\n".join(lines) + "\n"


def to_document(comparison: Comparison, metric: str, anchors: tuple[float, float] | None) -> dict[str, Any]:
    """Plain values; NaN as None."""
    values = _without_nan(asdict(comparison))
    return {"metric": metric, "real": anchors and anchors[0], "noise": anchors and anchors[1], **values}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def to_csv(scores: Mapping[str, Scores], metric: str) -> str:
    """A line per architecture: what it is, the metric's name, and its value in every row; empty where a run is missing.

    `scores_from_csv` reads it back.
    """
    from stabletrain.gan.networks.random_architecture import architecture

    numbers = sorted({number for each in scores.values() for number in each})
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["architecture", *asdict(architecture(0)), METRIC_COLUMN, *scores])
    for number in numbers:
        described = asdict(architecture(number)).values()
        writer.writerow([number, *described, metric, *(each.get(number, "") for each in scores.values())])
    return stream.getvalue()


def scores_from_csv(path: Path, metric: str) -> dict[str, dict[int, float]]:
    """By row: the scores that `to_csv` wrote.

    Raises: `DataError` when the file cannot be read, is not such a table, or is one of another metric.
    """
    try:
        header, *lines = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
        first = header.index(METRIC_COLUMN) + 1
        if any(line[first - 1] != metric for line in lines):
            raise DataError(f"{path} holds scores of {lines[0][first - 1]}, not of {metric}")
        return {
            row: {int(line[0]): float(line[place]) for line in lines if line[place]}
            for place, row in enumerate(header[first:], first)
        }
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    except (ValueError, IndexError) as error:
        raise DataError(f"{path} is no table of scores of random architectures: {error}") from error
