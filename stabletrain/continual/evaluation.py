"""The evaluation of a continual run: numbers made of the accuracy matrix, layers and features, and two pictures.

`eval/accuracy_now`: mean test accuracy of the tasks that have begun. With the accuracy of task t at its own end e_t and
at the last step e, once all are measured:

- `eval/accuracy_own_end` (A_e): mean_t a_t(e_t);
- `eval/accuracy_final` (A_ebar): mean_t a_t(e);
- `eval/accuracy_change` (F_ebar): mean_t [a_t(e) - a_t(e_t)], negative = forgetting;
- `eval/backward_transfer`: the same sum over T - 1, negative = forgetting;
- `eval/peak_forgetting`: positive = forgetting;
- `eval/start_dip`: how far the accuracy of the tasks that are there falls when another one starts, within four updates,
  in the mean over starts; positive = it fell.

The protocol (scenario) is in the names: `..._class` for class-incremental, `..._task` for task-incremental accuracy.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from stabletrain.continual.forward import orthogonality_gap
from stabletrain.continual.indicators import layer_spectrum, subspace_overlap, transition_dips
from stabletrain.continual.networks import kernel_of
from stabletrain.continual.pictures import accuracy_picture, timeline_picture
from stabletrain.continual.schedule import DIP_WINDOW
from stabletrain.metrics.continual import AccuracyMatrix
from stabletrain.training.experiment import Evaluation, EvaluationContext

if TYPE_CHECKING:
    from stabletrain.continual.experiment import ContinualExperiment, ContinualState

NAMES = {
    "average_accuracy_at_own_end": "accuracy_own_end",
    "average_accuracy_final": "accuracy_final",
    "accuracy_change": "accuracy_change",
    "backward_transfer": "backward_transfer",
    "peak_forgetting": "peak_forgetting",
}
SPECTRUM_SIZE = 8
SPECTRUM_CHANNELS = 128
"""Layers with more input or output channels are left out: their spectrum takes minutes."""
OVERLAP_RANK = 5
OVERLAP_IMAGES = 200


def accuracy_matrix(experiment: ContinualExperiment, state: ContinualState) -> AccuracyMatrix:
    """All accuracies measured so far; steps count updates, so that a task's end is its last step and one."""
    matrix = AccuracyMatrix(tuple(end + 1 for end in experiment.timeline.ends))
    measured = experiment.schedule.measured
    for step, row in zip(measured, np.asarray(state.accuracy, np.float64)[: len(measured)], strict=True):
        if (row >= 0).any():
            matrix.record(step, np.where(row >= 0, np.minimum(row, 1.0), np.nan))
    return matrix


def evaluate_run(
    experiment: ContinualExperiment, state: ContinualState, step: int, context: EvaluationContext
) -> Evaluation:
    """Scalars as above; the accuracy matrix as JSON, the timeline as TOML, and the pictures."""
    import tomli_w

    protocol = experiment.config.scenario
    timeline, matrix = experiment.timeline, accuracy_matrix(experiment, state)
    parts = 3
    context.tick("accuracy", 0, parts)
    now = np.asarray(experiment.measure_now(state, step), np.float64)
    scalars = {f"eval/accuracy_now_{protocol}": float(now[now >= 0].mean())}
    scalars |= {f"eval/accuracy_task_{t}_{protocol}": float(value) for t, value in enumerate(now) if value >= 0}
    if not matrix.missing:
        found = matrix.scalars()
        if experiment.config.restart:  # earlier tasks' networks are gone: only their own ends mean anything
            found = {"average_accuracy_at_own_end": found["average_accuracy_at_own_end"]}
        scalars |= {f"eval/{NAMES[name]}_{protocol}": value for name, value in found.items()}
    dips = transition_dips(np.array(matrix.steps), matrix.values, np.array(timeline.starts), DIP_WINDOW)
    known = [dip for dip in dips if dip is not None]
    if known:
        scalars[f"eval/start_dip_{protocol}"] = float(np.mean(known))
    context.tick("layers", 1, parts)
    scalars |= layer_scalars(experiment, state)
    context.tick("features", 2, parts)
    overlap = feature_overlap(experiment, state, step)
    if overlap is not None:
        scalars["eval/feature_overlap"] = overlap
    document = {**matrix.to_dict(), "scenario": protocol, "start_dips": dips, "starts": list(timeline.starts)}
    document["classes"] = [list(own) for own in timeline.classes]
    files = {
        "eval/accuracy.json": json.dumps(document, indent=1).encode(),
        "eval/timeline.toml": tomli_w.dumps(timeline.to_dict()).encode(),
        "eval/timeline.png": timeline_picture(timeline, experiment.schedule),
        f"eval/accuracy_{step:08d}.png": accuracy_picture(timeline, matrix, protocol),
    }
    context.tick("pictures", parts, parts)
    return Evaluation(scalars=scalars, files=files)


def layer_scalars(experiment: ContinualExperiment, state: ContinualState) -> dict[str, float]:
    """`eval/singular_largest/<layer>` and `eval/singular_spread/<layer>` (largest over smallest) of each layer, and
    `eval/orthogonality_gap/<layer>`, its SPCL loss less the least that its shape allows: 0 = orthogonal.

    Convolutions as circular ones over 8x8 pixels. Layers of more than 128 channels are left out.
    """
    scalars = {}
    for layer in experiment.network.layers():
        kernel = np.asarray(kernel_of(state.params, layer.path))
        if kernel.ndim == 4 and max(kernel.shape[2:]) > SPECTRUM_CHANNELS:
            continue
        values = layer_spectrum(kernel, SPECTRUM_SIZE)
        scalars[f"eval/singular_largest/{layer.name}"] = float(values[0])
        scalars[f"eval/singular_spread/{layer.name}"] = float(values[0] / max(values[-1], 1e-12))
        scalars[f"eval/orthogonality_gap/{layer.name}"] = orthogonality_gap(jnp.asarray(kernel), layer)
    return scalars


def feature_overlap(experiment: ContinualExperiment, state: ContinualState, step: int) -> float | None:
    """Mean over pairs of begun tasks of the overlap of their features' leading directions; None for fewer than two."""
    owner = experiment.owner[experiment.test_labels]
    features = []
    for task in experiment.timeline.begun(step - 1):
        own = np.flatnonzero(owner == task)[:OVERLAP_IMAGES]
        if len(own) > 1:
            features.append(np.asarray(experiment.features(state, own)))
    pairs = [(a, b) for i, a in enumerate(features) for b in features[:i]]
    return float(np.mean([subspace_overlap(a, b, OVERLAP_RANK) for a, b in pairs])) if pairs else None
