"""Runs beside each other: what differs in their configs, how they scored, how stable they were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stabletrain.errors import ConfigError, nearest
from stabletrain.runs.reading import RunData
from stabletrain.runs.statistics import PairedDifference, Summary, first_step_reaching, paired_difference, summarize

NOT_COMPARED = ("seed", "out", "devices", "inner_steps", "checkpoint_every", "keep_checkpoints")
"""Config fields that do not make another method."""


@dataclass(frozen=True)
class Group:
    """Runs of one configuration that differ in their seed only."""

    label: str
    runs: tuple[RunData, ...]

    @property
    def diverged(self) -> int:
        """How many of the runs diverged."""
        return sum(run.diverged for run in self.runs)

    @property
    def rescued(self) -> int:
        """How many of the runs a policy intervened in."""
        return sum(bool(run.interventions) for run in self.runs)

    def scores(self, metric: str, seeds: Sequence[int]) -> np.ndarray:
        """The last value per seed; NaN for a seed without a run, and for a run that diverged."""
        by_seed = {run.seed: run for run in self.runs}
        return np.array([by_seed[seed].last(metric) if seed in by_seed else float("nan") for seed in seeds])


@dataclass(frozen=True)
class Score:
    """One metric of one group; `paired` against the first group."""

    metric: str
    group: str
    summary: Summary
    paired: PairedDifference | None


@dataclass(frozen=True)
class Speed:
    """Steps until a score is reached, per run, and the first group's steps over this one's (1.5: half as many again).

    `speedup` is the ratio of medians over runs, where a run that never gets there counts as infinite.
    """

    group: str
    steps: tuple[float, ...]
    reached: int
    speedup: float


@dataclass(frozen=True)
class Comparison:
    """All that `compare` shows. `differences`: config key -> value of each group, in order."""

    groups: tuple[Group, ...]
    differences: dict[str, list[Any]]
    scores: tuple[Score, ...]
    seeds: tuple[int, ...]
    warnings: tuple[str, ...]


def group_runs(runs: Sequence[RunData]) -> list[Group]:
    """Runs grouped by configuration but for the seed, in order of first appearance, labelled by what differs.

    A later run of the same configuration and seed replaces none: both are kept apart by their folder's name.
    """
    keyed: dict[str, list[RunData]] = {}
    for run in runs:
        keyed.setdefault(repr(sorted(_identity(run).items())), []).append(run)
    differing = _differences([members[0] for members in keyed.values()])
    groups = []
    for members in keyed.values():
        first = members[0]
        label = ", ".join(f"{key}={_identity(first)[key]}" for key in differing if key in _identity(first))
        groups.append(Group(label or first.name.rsplit("-s", 1)[0], tuple(sorted(members, key=lambda run: run.seed))))
    labels = [group.label for group in groups]
    if len(set(labels)) == len(labels):
        return groups
    return [Group(f"{group.label} ({group.runs[0].name})", group.runs) for group in groups]


def _identity(run: RunData) -> dict[str, Any]:
    return {key: value for key, value in run.config.items() if key not in NOT_COMPARED}


def _differences(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    identities = [_identity(run) for run in runs]
    keys = list(dict.fromkeys(key for identity in identities for key in identity))
    table = {key: [identity.get(key) for identity in identities] for key in keys}
    return {key: values for key, values in table.items() if any(value != values[0] for value in values)}


def compare(runs: Sequence[RunData], metrics: Sequence[str] = ()) -> Comparison:
    """Compares groups of runs; the first is the baseline. Without `metrics`: every eval/*, and train/loss.

    Raises: `ConfigError` for a metric that no run logged, naming the nearest.
    """
    groups = group_runs(runs)
    logged = sorted({name for run in runs for name in run.metric_names()})
    for metric in metrics:
        if metric not in logged:
            raise ConfigError(f"no run logged {metric!r}: {nearest(metric, logged)}")
    chosen = list(metrics) or [name for name in logged if name.startswith("eval/")] + ["train/loss"]
    seeds = tuple(sorted({run.seed for run in runs}))
    scores = []
    for metric in chosen:
        baseline = groups[0].scores(metric, seeds)
        for group in groups:
            own = group.scores(metric, seeds)
            present = own[[any(run.seed == seed for run in group.runs) for seed in seeds]]
            paired = None if group is groups[0] else paired_difference(own, baseline)
            scores.append(Score(metric, group.label, summarize(present), paired))
    return Comparison(
        groups=tuple(groups),
        differences=_differences([group.runs[0] for group in groups]),
        scores=tuple(scores),
        seeds=seeds,
        warnings=tuple(_warnings(groups)),
    )


def _warnings(groups: Sequence[Group]) -> list[str]:
    found = []
    unfinished = [run.name for group in groups for run in group.runs if run.state not in ("done", "diverged")]
    if unfinished:
        found.append(f"not finished, their last values so far are shown: {', '.join(unfinished)}")
    for group in groups:
        seeds = [run.seed for run in group.runs]
        if len(set(seeds)) < len(seeds):
            found.append(f"{group.label}: several runs share a seed; the last one is paired")
    sets = {frozenset(run.seed for run in group.runs) for group in groups}
    if len(sets) > 1:
        found.append("the groups have different seeds: only the shared ones are paired")
    prints = {str(run.record.get("data", {}).get("fingerprint")) for group in groups for run in group.runs}
    if len(prints) > 1:
        found.append("the runs were trained on different data (fingerprints differ): scores are not comparable")
    return found


def steps_to_score(groups: Sequence[Group], metric: str, threshold: float, mode: str = "min") -> list[Speed]:
    """How many steps each group needs to reach a score: the papers' "1.5 times faster", with runs that never do."""
    speeds: list[Speed] = []
    for group in groups:
        steps = []
        for run in group.runs:
            logged, values = run.curve(metric)
            steps.append(first_step_reaching(logged.tolist(), values.tolist(), threshold, mode=mode))
        median = float(np.median(steps)) if steps else float("nan")
        first = float(np.median(speeds[0].steps)) if speeds else median
        ratio = first / median if math.isfinite(median) and median > 0 and math.isfinite(first) else float("nan")
        speeds.append(Speed(group.label, tuple(steps), sum(map(math.isfinite, steps)), ratio))
    return speeds


ORDINARY_EVENTS = (
    "start", "checkpoint", "evaluation", "best", "done", "resume", "restart", "interrupted", "changed-option",
    "changed-devices", "samples",
)  # fmt: skip
"""Kinds of events that say nothing about the stability of the training."""


def stability_counts(run: RunData) -> dict[str, int]:
    """Events of a run by kind, without those of every run and those about the process that trained it."""
    counts: dict[str, int] = {}
    for event in run.events:
        kind = str(event.get("kind"))
        if kind not in ORDINARY_EVENTS:
            counts[kind] = counts.get(kind, 0) + 1
    return counts
