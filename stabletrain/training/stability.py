"""The stability monitor: how one optimiser step went, whether it was a spike or not finite, and what was done.

`guarded_update` stands where `optimizer.update` and `optax.apply_updates` would. It runs inside `jit`, once per
network, and all that it must remember is a `MonitorState` in the experiment's state, so that a resumed run
decides as an uninterrupted one would.

**What triggers.** A *spike* is a loss, or a global gradient norm, far above the running level of the same quantity.
Either alone is enough: the gradient often jumps a step before the loss does. *Non-finite* is a loss, a gradient, an
update or a parameter with a NaN or an infinity in it.

**How a spike is told.** Of each quantity a window of the last accepted values is kept: the loss as it is (it may be
negative), the gradient norm as its logarithm (its noise is multiplicative). A robust line through the window gives
the level, 1.4826 times the median absolute deviation from that line the scale; more than `threshold` scales above
the level is a spike. A spike never enters the window, so it cannot widen its own threshold. When half of the last
`patience` steps were spikes, the level has moved for good: the window is filled anew from those steps, and the flag
`rebaselined` says so. Nothing is a spike before `patience` steps were accepted.

**What is done.** `log` applies the update all the same. `skip` leaves parameters and optimiser as they were. `clip`
scales the gradient down to its running median norm; a gradient that is not finite cannot be clipped, so that step is
skipped, and counted as skipped. `rollback` and `stop` are the loop's: here the update is only held back, so that the
state stays good until the loop reads the flag. Nothing happens without a flag and a counter.

**What it costs.** One pass over the gradient at each step. Updates and parameters are measured at each logged step,
at spikes, and at each `MEASURE_EVERY`-th step; in between the last values stand. On accelerators, where a pass costs
next to nothing and a branch makes the host wait, they are measured at every step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from stabletrain.training.config import TrainConfig
from stabletrain.training.robust_level import level_and_scale, masked_median
from stabletrain.training.tensor_norms import group_names, group_norms, leaf_names, sums_of_squares

Array = jax.Array
Params = Any

MONITOR_PREFIX = "monitor/"
STABILITY_PREFIX = "stability/"

MONITOR_FLAGS = (
    "spike",  # the loss or the gradient norm spiked: the policy `on_spike` applies
    "loss_spike",
    "gradient_spike",
    "nonfinite",  # the loss, a gradient, an update or a parameter: the policy `on_nonfinite` applies
    "nonfinite_loss",
    "skipped",  # the update was dropped by policy skip (or by clip, where there was nothing to scale)
    "clipped",  # the gradient was scaled down by policy clip
    "held",  # the update was held back for the loop, which is to stop or to roll back
    "rebaselined",  # the level moved for good; the thresholds start again from the new one
    "blowup",  # the loss has left for good; true at one step of each excursion
    "exhausted",  # more interventions than `max_interventions`
)
"""Metrics `monitor/<prefix><flag>`: 0 or 1 at each step."""

MONITOR_COUNTERS = (
    "spikes",
    "nonfinites",
    "skips",
    "clips",
    "holds",
    "rebaselines",
    "blowups",
    "interventions",  # skips and clips, which `max_interventions` limits; rollbacks are counted by the loop
)
"""Metrics `monitor/<prefix><counter>`: how often since the start of the run."""

MONITOR_VALUES = (
    "loss",
    "loss_level",
    "loss_threshold",
    "gradient_level",
    "gradient_threshold",
    "clip_factor",
    "steps_far",  # steps in a row that the loss has been far above its best
)
"""Metrics `monitor/<prefix><value>`: what the decision was taken on. Levels and thresholds are infinite until the
warm-up is over."""

MONITOR_VECTORS = ("nonfinite_gradients", "nonfinite_params")
"""Metrics `monitor/<prefix><vector>`: one entry per leaf, in the order of `leaf_names`."""

MEASURE_EVERY = 8
"""Steps between two estimates of the thresholds, and between two measurements of updates and parameters on CPU."""

LOSS_SCALE_FLOOR = 0.02  # of the level: at threshold 8 a loss without noise may still wander by 16 %
LOG_NORM_SCALE_FLOOR = 0.1  # at threshold 8 a gradient norm must exceed exp(0.8) = 2.2 times its level
LOST_SCALES = 10.0  # a loss that has left is at least this many scales above its best level, and ...
LOST_FACTOR = 3.0  # ... either this many times the best level above it, ...
LOST_SHARE = 0.9  # ... or back up by this share of all that had been gained since the start

_CLOCKS = ("steps", "accepted", "nonfinite_steps", "steps_far")
_LEVELS = ("loss_level", "log_norm_level", "loss_scale", "log_norm_scale", "start", "best", "best_scale", "far")


@dataclasses.dataclass(frozen=True)
class Policy:
    """What the monitor does, all of it static under `jit`."""

    on_spike: str = "log"
    on_nonfinite: str = "stop"
    threshold: float = 8.0
    window: int = 128
    max_interventions: int = 20
    log_every: int = 50
    watch_blowup: bool = True
    """Off for losses that rise by design: those of adversaries, or when the task changes."""

    @classmethod
    def from_config(cls, config: TrainConfig, *, watch_blowup: bool = True) -> Policy:
        """The policy that the user's options ask for."""
        return cls(
            on_spike=config.on_spike,
            on_nonfinite=config.on_nonfinite,
            threshold=config.spike_threshold,
            window=config.spike_window,
            max_interventions=config.max_interventions,
            log_every=config.log_every,
            watch_blowup=watch_blowup,
        )

    @property
    def patience(self) -> int:
        """Steps that decide whether a level has moved; also the accepted steps of the warm-up."""
        return max(8, self.window // 4)

    @property
    def blowup_patience(self) -> int:
        """Steps in a row that the loss must be far above its best before the run counts as blown up."""
        return self.window


@struct.dataclass
class MonitorState:
    """What the monitor remembers of one network. W: window, P: patience, G: groups.

    Few arrays, because each array costs a kernel and a buffer per step. In the windows the newest value comes last;
    row 0 is the loss, row 1 the logarithm of the global gradient norm.
    """

    window: Array  # [2, W] accepted values
    recent: Array  # [3, P] the last finite values, accepted or not; row 2: whether it was a spike
    clocks: Array  # int32 [len(_CLOCKS)]
    counts: Array  # int32 [len(MONITOR_COUNTERS)]
    levels: Array  # [len(_LEVELS)]
    norms: Array  # [2, G] of updates and parameters, as last measured
    leaf_names: tuple[str, ...] = struct.field(pytree_node=False)
    prefix: str = struct.field(pytree_node=False, default="")

    def clock(self, name: str) -> Array:
        """One of `steps` seen, `accepted` values in the window, `nonfinite_steps` and `steps_far` in a row."""
        return self.clocks[_CLOCKS.index(name)]

    def count(self, name: str) -> Array:
        """One of `MONITOR_COUNTERS`."""
        return self.counts[MONITOR_COUNTERS.index(name)]

    def thresholds(self, policy: Policy) -> Array:
        """[2]: the loss, and the logarithm of the gradient norm, above which the next step is a spike."""
        return self.levels[0:2] + policy.threshold * self.levels[2:4]


@struct.dataclass
class GuardedUpdate:
    """The result of `guarded_update`. `applied` is False where the update was skipped or held back."""

    params: Params
    optimizer_state: Any
    monitor: MonitorState
    metrics: dict[str, Array]
    applied: Array

    def choose(self, new: Any, old: Any) -> Any:
        """`new` if the update was applied, else `old`: for statistics and averages that must stand still too."""
        return jax.tree.map(lambda a, b: jnp.where(self.applied, a, b), new, old)


# --- what is in a state and in its metrics ----------------------------------------------------------------------


def monitors_of(state: Any) -> dict[str, MonitorState]:
    """The monitors in an experiment's state, by prefix ("" where there is one network).

    Raises: `ValueError` when two of them have the same prefix: their metrics would overwrite each other.
    """
    monitors: dict[str, MonitorState] = {}
    for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, MonitorState)):
        if isinstance(node, MonitorState):
            if node.prefix in monitors:
                raise ValueError(f"two monitors in one state have the prefix {node.prefix!r}")
            monitors[node.prefix] = node
    return monitors


def nonfinite_tensors(metrics: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> list[str]:
    """What was not finite in one step's metrics, e.g. `["loss", "gradient of critic/conv_0/kernel"]`.

    `names`: `{prefix: monitor.leaf_names}` of `monitors_of(state)`. A parameter (after the update) is named only where
    its gradient was finite: otherwise it follows from the gradient.
    """
    found = []
    for prefix, leaves in names.items():
        start = f"{MONITOR_PREFIX}{prefix}"
        if metrics.get(f"{start}nonfinite_loss"):
            found.append(f"{prefix}loss")
        gradients = [bool(flag) for flag in metrics.get(f"{start}nonfinite_gradients", ())]
        params = [bool(flag) for flag in metrics.get(f"{start}nonfinite_params", ())]
        found += [f"gradient of {prefix}{leaf}" for leaf, bad in zip(leaves, gradients) if bad]
        found += [
            f"parameter {prefix}{leaf}"
            for leaf, bad, explained in zip(leaves, params, gradients)
            if bad and not explained
        ]
    return found


def merge_inner_metrics(metrics: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """One step's metrics from those of its inner updates (a critic's): the largest of each, so no flag is lost."""
    return {name: jnp.max(jnp.stack([m[name] for m in metrics]), axis=0) for name in metrics[0]}


# --- the monitor ----------------------------------------------------------------------------------------------


def init_monitor(params: Params, policy: Policy, prefix: str = "") -> MonitorState:
    """The monitor before the first step. `prefix` ("generator/") tells the networks of one experiment apart."""
    infinite, unknown = jnp.inf, jnp.nan
    return MonitorState(
        window=jnp.zeros((2, policy.window), jnp.float32),
        recent=jnp.zeros((3, policy.patience), jnp.float32),
        clocks=jnp.zeros((len(_CLOCKS),), jnp.int32),
        counts=jnp.zeros((len(MONITOR_COUNTERS),), jnp.int32),
        # During the warm-up the level is infinite, so that nothing is above it.
        levels=jnp.array([infinite, infinite, 1.0, 1.0, unknown, infinite, 0.0, 0.0], jnp.float32),
        norms=jnp.zeros((2, len(group_names(params))), jnp.float32),
        leaf_names=leaf_names(params),
        prefix=prefix,
    )


def guarded_update(
    optimizer: optax.GradientTransformation,
    *,
    loss: Array,
    gradients: Params,
    params: Params,
    optimizer_state: Any,
    monitor: MonitorState,
    policy: Policy,
    prefix: str = "",
) -> GuardedUpdate:
    """One optimiser step under watch.

    Metrics: `stability/<prefix>grad_norm`; for each group `stability/<prefix>X/<group>` with X one of `grad_norm`,
    `update_norm`, `param_norm` (before the step) and `update_ratio` (update over parameter norm), where an update that
    was not applied has norm 0; and `monitor/<prefix>*` as listed at the top of this module.

    Updated parameters are checked without being read: where the sums of squares of a parameter and of its update are
    both finite in float32, no entry of either exceeds 1.9e19, and their sum is finite.

    Raises: `ValueError` while tracing when `monitor` was made for other parameters or another prefix.
    """
    names = leaf_names(params)
    if (names, prefix) != (monitor.leaf_names, monitor.prefix):
        raise ValueError(
            f"the monitor of prefix {monitor.prefix!r} and {len(monitor.leaf_names)} tensors does not fit the "
            f"{len(names)} tensors of prefix {prefix!r}: give init_monitor and guarded_update the same"
        )
    gradient_squares = sums_of_squares(gradients)  # (leaves,)
    once = jnp.minimum(monitor.clock("steps") + 1, 1)  # the compiler cannot know that no count is negative
    seen = _in_one_kernel(
        functools.partial(_look, policy=policy),
        (monitor, loss.astype(jnp.float32), gradient_squares),
        once=once,
    )
    if policy.on_spike == "clip":
        gradients = jax.tree.map(lambda g: g * seen.clip_factor.astype(g.dtype), gradients)
    squares, gradients = _measured(optimizer, gradients, params, optimizer_state, seen.measure)
    monitor, verdict = _in_one_kernel(functools.partial(_remember, policy=policy), (monitor, seen, squares), once=once)

    updates, new_optimizer_state = optimizer.update(gradients, optimizer_state, params)
    new_params = optax.apply_updates(params, updates)
    new_params, new_optimizer_state = jax.tree.map(
        lambda old, new: jnp.where(verdict.held_back, old, new),
        (params, optimizer_state),
        (new_params, new_optimizer_state),
    )

    levels, steps_far, blowup = lax.cond(
        verdict.refresh,
        lambda: _new_levels(monitor, policy),
        lambda: (monitor.levels, monitor.clock("steps_far"), jnp.zeros((), bool)),
    )
    monitor, report = _in_one_kernel(
        functools.partial(_conclude, policy=policy),
        (monitor, seen, verdict, squares, levels, steps_far, blowup),
        once=once,
    )
    # In the order of the vectors that they come from, so that packing them again is one copy per vector.
    metrics = {f"{STABILITY_PREFIX}{prefix}grad_norm": seen.norm}
    for quantity, vector in report.by_group.items():
        for i, group in enumerate(group_names(params)):
            metrics[f"{STABILITY_PREFIX}{prefix}{quantity}/{group}"] = vector[i]
    start = f"{MONITOR_PREFIX}{prefix}"
    for labels, vector in ((MONITOR_FLAGS, report.flags), (MONITOR_VALUES, report.values)):
        metrics |= {start + label: vector[i] for i, label in enumerate(labels)}
    metrics |= {start + label: report.by_leaf[i] for i, label in enumerate(MONITOR_VECTORS)}
    metrics |= {start + label: report.counters[i] for i, label in enumerate(MONITOR_COUNTERS)}
    return GuardedUpdate(new_params, new_optimizer_state, monitor, metrics, ~verdict.held_back)


# --- the parts of a step --------------------------------------------------------------------------------------


@struct.dataclass
class _Seen:
    """What loss and gradient say, before the update."""

    loss: Array
    norm: Array
    log_norm: Array
    limits: Array  # [2]: of the loss and of the logarithm of the norm
    gradient_squares: Array  # [leaves]
    spikes: Array  # bool [2]: of the loss, of the norm
    spike: Array  # bool []
    measurable: Array  # bool []: both are finite
    clip_factor: Array
    hold: Array  # bool []
    measure: Array  # bool []: whether updates and parameters are to be measured


@struct.dataclass
class _Verdict:
    """What is done about it; `flags` are the first of `MONITOR_FLAGS`, those that are known by now."""

    held_back: Array  # bool []
    flags: dict[str, Array]
    refresh: Array  # bool []: whether the levels are due


@struct.dataclass
class _Report:
    """What the metrics show, as float32 vectors."""

    by_group: dict[str, Array]  # of [groups]
    flags: Array  # [MONITOR_FLAGS]
    values: Array  # [MONITOR_VALUES]
    counters: Array  # [MONITOR_COUNTERS]
    by_leaf: tuple[Array, ...]  # MONITOR_VECTORS of [leaves]


def _look(monitor: MonitorState, loss: Array, gradient_squares: Array, policy: Policy) -> _Seen:
    """Whether this step is a spike or not finite, and what that asks for."""
    norm = jnp.sqrt(jnp.sum(gradient_squares))
    log_norm = jnp.log(jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    limits = monitor.thresholds(policy)
    measurable = jnp.isfinite(loss) & jnp.isfinite(norm)
    spikes = measurable & (jnp.stack([loss, log_norm]) > limits)
    spike = spikes[0] | spikes[1]
    clip_factor = jnp.ones((), jnp.float32)
    if policy.on_spike == "clip":
        clip_factor = jnp.where(spike, jnp.minimum(1.0, jnp.exp(monitor.levels[1] - log_norm)), 1.0)
    hold = jnp.zeros((), bool)
    if policy.on_nonfinite != "log":
        hold = hold | ~measurable
    if policy.on_spike in ("skip", "rollback", "stop"):
        hold = hold | spike
    step = monitor.clock("steps") + 1
    due = spike | (step % MEASURE_EVERY == 0) | (step % policy.log_every == 0) | (step == 1)
    return _Seen(
        loss=loss,
        norm=norm,
        log_norm=log_norm,
        limits=limits,
        gradient_squares=gradient_squares,
        spikes=spikes,
        spike=spike,
        measurable=measurable,
        clip_factor=clip_factor,
        hold=hold,
        measure=due & ~hold if jax.default_backend() == "cpu" else ~hold,
    )


def _measured(
    optimizer: optax.GradientTransformation, gradients: Params, params: Params, optimizer_state: Any, measure: Array
) -> tuple[Array, Params]:
    """Sums of squares [2, leaves] of updates and parameters, 0 unless `measure`; and the gradients.

    On CPU only this is in a branch, and it works the updates out for itself: to update within a branch takes longer
    than to select outside of it. The gradients come back behind a barrier, so that it happens while the old parameters
    are still there.
    """

    def squares_of_both() -> Array:
        updates, _ = optimizer.update(gradients, optimizer_state, params)
        return jnp.stack([sums_of_squares(updates), sums_of_squares(params)])

    if jax.default_backend() != "cpu":
        return jnp.where(measure, squares_of_both(), 0.0), gradients
    nothing = jnp.zeros((2, len(jax.tree.leaves(params))), jnp.float32)
    squares = lax.cond(measure, squares_of_both, lambda: nothing)
    gradients, squares = lax.optimization_barrier((gradients, squares))
    return squares, gradients


def _remember(monitor: MonitorState, seen: _Seen, squares: Array, policy: Policy) -> tuple[MonitorState, _Verdict]:
    """The monitor after a step but for its levels and counters, and the verdict."""
    nonfinite_update = jnp.any(~jnp.isfinite(squares))
    nonfinite = ~seen.measurable | nonfinite_update
    clipped = seen.spike & ~nonfinite & (seen.clip_factor < 1.0)
    held_back = seen.hold | (nonfinite_update if policy.on_nonfinite != "log" else False)
    skips_nonfinite = jnp.asarray(policy.on_nonfinite in ("skip", "clip"))
    skipped = held_back & jnp.where(nonfinite, skips_nonfinite, policy.on_spike == "skip")
    flags = {
        "spike": seen.spike,
        "loss_spike": seen.spikes[0],
        "gradient_spike": seen.spikes[1],
        "nonfinite": nonfinite,
        "nonfinite_loss": ~jnp.isfinite(seen.loss),
        "skipped": skipped,
        "clipped": clipped,
        "held": held_back & ~skipped,
    }

    observed = jnp.stack([seen.loss, seen.log_norm])
    accept = seen.measurable & ~seen.spike
    steps = monitor.clock("steps") + 1
    pushed = _push(monitor.recent, jnp.append(observed, seen.spike.astype(jnp.float32)))
    recent = jnp.where(seen.measurable, pushed, monitor.recent)
    rebaselined = jnp.sum(recent[2]) >= policy.patience // 2
    recent = jnp.concatenate([recent[:2], recent[2:] * ~rebaselined])
    window = jnp.where(accept, _push(monitor.window, observed), monitor.window)
    refilled = jnp.concatenate([window[:, : policy.window - policy.patience], recent[:2]], axis=1)
    window = jnp.where(rebaselined, refilled, window)
    accepted = jnp.minimum(monitor.clock("accepted") + accept, policy.window)
    accepted = jnp.where(rebaselined, policy.patience, accepted)
    nonfinite_steps = jnp.where(nonfinite, monitor.clock("nonfinite_steps") + 1, 0)
    monitor = dataclasses.replace(
        monitor,
        window=window,
        recent=recent,
        clocks=jnp.stack([steps, accepted, nonfinite_steps, monitor.clock("steps_far")]).astype(jnp.int32),
        norms=jnp.where(seen.measure & ~nonfinite, group_norms(squares, monitor.leaf_names), monitor.norms),
    )
    refresh = (steps % MEASURE_EVERY == 0) | rebaselined
    return monitor, _Verdict(held_back, {**flags, "rebaselined": rebaselined}, refresh)


def _new_levels(monitor: MonitorState, policy: Policy) -> tuple[Array, Array, Array]:
    """(levels, steps that the loss has been far, whether it counts as blown up from now on)."""
    levels = _levels(monitor, policy)
    far_before = monitor.clock("steps_far")
    still_far = jnp.where(levels[_LEVELS.index("far")] > 0, far_before + MEASURE_EVERY, 0)
    steps_far = jnp.where(monitor.clock("steps") % MEASURE_EVERY == 0, still_far, far_before)
    return levels, steps_far, (steps_far >= policy.blowup_patience) & (far_before < policy.blowup_patience)


def _conclude(
    monitor: MonitorState,
    seen: _Seen,
    verdict: _Verdict,
    squares: Array,
    levels: Array,
    steps_far: Array,
    blowup: Array,
    policy: Policy,
) -> tuple[MonitorState, _Report]:
    """The monitor with everything in it, and what there is to tell."""
    flags = verdict.flags | {"blowup": blowup}
    events = [flags[name] for name in ("spike", "nonfinite", "skipped", "clipped", "held", "rebaselined", "blowup")]
    counts = monitor.counts + jnp.stack([*events, flags["skipped"] | flags["clipped"]])
    monitor = dataclasses.replace(
        monitor, clocks=jnp.append(monitor.clocks[:-1], steps_far), counts=counts, levels=levels
    )
    flags["exhausted"] = monitor.count("interventions") > policy.max_interventions

    update_norms = jnp.where(verdict.held_back, 0.0, monitor.norms[0])
    values = {
        "loss": seen.loss,
        "loss_level": levels[0],
        "loss_threshold": seen.limits[0],
        "gradient_level": jnp.exp(levels[1]),
        "gradient_threshold": jnp.exp(seen.limits[1]),
        "clip_factor": seen.clip_factor,
        "steps_far": steps_far.astype(jnp.float32),
    }
    return monitor, _Report(
        by_group={
            "grad_norm": group_norms(seen.gradient_squares, monitor.leaf_names),
            "update_norm": update_norms,
            "param_norm": monitor.norms[1],
            "update_ratio": update_norms / jnp.maximum(monitor.norms[1], jnp.finfo(jnp.float32).tiny),
        },
        flags=jnp.stack([flags[name] for name in MONITOR_FLAGS]).astype(jnp.float32),
        values=jnp.stack([values[name] for name in MONITOR_VALUES]),
        counters=counts.astype(jnp.float32),
        by_leaf=tuple(
            (~jnp.isfinite(found)).astype(jnp.float32) for found in (seen.gradient_squares, squares[0] + squares[1])
        ),
    )


def _in_one_kernel(compute: Callable[..., Any], given: tuple[Any, ...], *, once: Array) -> Any:
    """`compute(*given)`, all of it small arrays, none of it sorting or scattering. `once` is a 1.

    XLA:CPU compiles a loop over small arrays into a single function; outside of a loop it launches each of the forty
    operations on its own, which together takes longer than a small network's update. So this is a loop of one turn.
    The compiler must not know that it is one, and what goes in must depend on the turn, or the work is moved out.
    """
    if jax.default_backend() != "cpu":
        return compute(*given)
    result = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, *given))

    def turn(i: Array, _: Any) -> Any:  # i is 0
        return compute(*jax.tree.map(lambda x: x ^ (i > 0) if x.dtype == bool else x + i.astype(x.dtype), given))

    return lax.fori_loop(0, once, turn, result)


def _push(window: Array, value: Array) -> Array:
    return jnp.concatenate([window[..., 1:], value[..., None]], axis=-1)


def _levels(monitor: MonitorState, policy: Policy) -> Array:
    """New levels and scales from the window, and whether the loss is now far above the best it has been."""
    window, old = monitor.window, monitor.levels
    count = jnp.maximum(monitor.clock("accepted"), 1)
    ready = monitor.clock("accepted") >= policy.patience
    level, scale = level_and_scale(window, count)  # (2,), (2,)
    scale = jnp.maximum(scale, jnp.stack([LOSS_SCALE_FLOOR * jnp.abs(level[0]), LOG_NORM_SCALE_FLOOR]))
    scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    level, scale = jnp.where(ready, level, jnp.inf), jnp.where(ready, scale, 1.0)

    start, best, best_scale = old[4], old[5], old[6]
    far = jnp.zeros((), bool)
    if policy.watch_blowup:
        padded = jnp.pad(monitor.recent[0], (policy.window - policy.patience, 0))
        median, now = masked_median(jnp.stack([window[0], padded]), jnp.stack([count, policy.patience]))
        start = jnp.where(jnp.isnan(start) & ready, median, start)
        better = ready & (median < best)
        best, best_scale = jnp.where(better, median, best), jnp.where(better, scale[0], best_scale)
        gained = start - best
        out_of_reach = now > best + LOST_FACTOR * jnp.abs(best)
        lost = (gained > LOST_SCALES * best_scale) & (now > best + LOST_SHARE * gained)
        far = (now > best + LOST_SCALES * best_scale) & (out_of_reach | lost)
        far = far | (monitor.clock("nonfinite_steps") >= MEASURE_EVERY)
    return jnp.concatenate([level, scale, jnp.stack([start, best, best_scale, far.astype(jnp.float32)])])


def is_blown_up(monitor: MonitorState, policy: Policy) -> bool:
    """Whether, at the end of a run, the loss is far above its best and has been for long."""
    return int(monitor.clock("steps_far")) >= policy.blowup_patience
