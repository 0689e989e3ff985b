"""The stability monitor: what one optimiser step looked like, whether it was a spike or not finite, and what was done.

`guarded_update` stands where `optimizer.update` and `optax.apply_updates` would. It runs inside `jit`, once per network,
and everything that it must remember is a `MonitorState` in the experiment's state, so a resumed run decides as an
uninterrupted one would.

**What triggers.** A *spike* is a loss, or a global gradient norm, far above the running level of the same quantity; either
one alone is enough (a spike of the gradient usually comes a step before that of the loss). *Non-finite* is a loss, a
gradient, an update or a parameter that holds a NaN or an infinity.

**How a spike is told.** Of each quantity a window of the last accepted values is kept: the loss as it is (it may be
negative), the gradient norm as its logarithm (its noise is multiplicative). A robust line through the window (median slope,
median offset) gives the level, 1.4826 times the median absolute deviation from the line gives the scale; a value more than
`threshold` scales above the level is a spike. A spike never enters the window, so it widens no threshold. When half of the
last `patience` steps were spikes, the level has moved for good: the window is filled anew from those steps, and the event
`rebaselined` says so.

**What is done.** `log` applies the update all the same. `skip` leaves parameters and optimiser as they were. `clip` scales
the gradient to its running median norm; a gradient that is not finite cannot be clipped, so that step is skipped and counted
as skipped. `rollback` and `stop` are the loop's: here the update is only held back, so that the state stays good
until the loop reads the flag. Nothing happens without a flag and a counter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from stabletrain.training.config import TrainConfig

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
    "blowup",  # the loss has left for good; true at one step per excursion
    "exhausted",  # more interventions than allowed
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
"""Metrics `monitor/<prefix><value>`: the numbers that the decision was taken on. Before the end of the warm-up the levels
and thresholds are infinite."""

MONITOR_VECTORS = ("nonfinite_gradients", "nonfinite_params")
"""Metrics `monitor/<prefix><vector>`: one entry per leaf, in the order of `leaf_names`."""

REFRESH = 8
"""Steps between two estimates of the thresholds. They move slowly, and a sort costs as much as a small layer."""

MAD_TO_SIGMA = 1.4826  # the median absolute deviation of a normal distribution is sigma / 1.4826
LOSS_SCALE_FLOOR = (
    0.02  # of the level: a noiseless loss may wander by threshold x 2 % before it counts as a spike
)
LOG_NORM_SCALE_FLOOR = 0.1  # at threshold 8 a gradient norm must exceed exp(0.8) = 2.2 times its level
LOST_SCALES = 10.0  # a loss that has left is at least this many scales above its best level, and ...
LOST_FACTOR = 3.0  # ... either this many times the best level above it, ...
LOST_SHARE = 0.9  # ... or back up by this share of all that had been gained since the start


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
    """Off for losses that rise by design: of adversaries, or when the task changes."""

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
        """Steps that decide whether a level has moved; also the accepted steps before anything counts as a spike."""
        return max(8, self.window // 4)

    @property
    def blowup_patience(self) -> int:
        """Steps in a row that the loss must be far above its best before the run counts as blown up."""
        return self.window


@struct.dataclass
class MonitorState:
    """What the monitor remembers of one network. W: window, P: patience, G: groups.

    Row 0 of the windows is the loss, row 1 the logarithm of the global gradient norm. Newest values are last.
    """

    steps: Array  # int32
    window: Array  # [2, W] accepted values
    accepted: Array  # int32, how many of the window's last entries are filled
    recent: Array  # [2, P] finite values, accepted or not
    recent_spikes: Array  # bool [P]
    level: Array  # [2]; +inf during the warm-up, so that nothing is above it
    scale: Array  # [2]
    start_level: Array  # of the loss, at the end of the warm-up; NaN before
    best_level: Array  # lowest windowed median of the loss
    best_scale: Array
    nonfinite_steps: Array  # int32, in a row
    steps_far: Array  # int32, in a row
    counts: Array  # int32 [len(MONITOR_COUNTERS)]
    leaf_names: tuple[str, ...] = struct.field(pytree_node=False)
    prefix: str = struct.field(pytree_node=False, default="")


@struct.dataclass
class GuardedUpdate:
    """The result of `guarded_update`. `applied` is False where the update was skipped or held back."""

    params: Params
    optimizer_state: Any
    monitor: MonitorState
    metrics: dict[str, Array]
    applied: Array

    def choose(self, new: Any, old: Any) -> Any:
        """`new` where the update was applied, else `old`: for statistics and averages that must stand still as well."""
        return jax.tree.map(lambda a, b: jnp.where(self.applied, a, b), new, old)


# --- names ------------------------------------------------------------------------------------------------------------


def leaf_names(params: Params) -> tuple[str, ...]:
    """Names such as `down_0/conv/kernel`, in the order of `jax.tree.leaves`."""
    return tuple("/".join(_key(k) for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params))


def group_names(params: Params) -> tuple[str, ...]:
    """The parameter groups: the first key of each parameter's path, each once, in the order of the leaves."""
    return tuple(dict.fromkeys(name.split("/")[0] for name in leaf_names(params)))


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def monitors_of(state: Any) -> dict[str, MonitorState]:
    """The monitors in an experiment's state, by prefix ("" where there is one network).

    Raises: `ValueError` when two of them have the same prefix, whose metrics would overwrite each other.
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, MonitorState))
    monitors: dict[str, MonitorState] = {}
    for node in nodes:
        if isinstance(node, MonitorState):
            if node.prefix in monitors:
                raise ValueError(f"two monitors in one state have the prefix {node.prefix!r}")
            monitors[node.prefix] = node
    return monitors


def nonfinite_tensors(metrics: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> list[str]:
    """The tensors that were not finite in one step's metrics, e.g. `["loss", "gradient of critic/conv_0/kernel"]`.

    `names`: `{prefix: monitor.leaf_names}` of `monitors_of(state)`.
    """
    found = []
    for prefix, leaves in names.items():
        if metrics.get(f"{MONITOR_PREFIX}{prefix}nonfinite_loss"):
            found.append(f"{prefix}loss")
        for vector, what in zip(MONITOR_VECTORS, ("gradient", "parameter")):
            flags = metrics.get(f"{MONITOR_PREFIX}{prefix}{vector}", ())
            found += [f"{what} of {prefix}{leaf}" for leaf, flag in zip(leaves, flags) if flag]
    return found


def merge_inner_metrics(metrics: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """One step's metrics from those of its inner updates (a critic's): the largest of each, so no flag is lost."""
    return {name: jnp.max(jnp.stack([m[name] for m in metrics]), axis=0) for name in metrics[0]}


# --- norms ------------------------------------------------------------------------------------------------------------


def sum_of_squares(x: Array) -> Array:
    """float32 sum of squares, not finite if an entry is not (or is beyond about 1e19, which is as good as lost)."""
    flat = x.astype(jnp.float32).reshape(-1)
    lanes = 256
    whole = flat.size // lanes * lanes
    # Sums along the leading axis vectorise on CPU; one long sum is a chain of dependent additions.
    total = jnp.sum(jnp.sum(jnp.square(flat[:whole].reshape(-1, lanes)), axis=0))
    return total + jnp.sum(jnp.square(flat[whole:])) if whole < flat.size else total


def _squares(tree: Params) -> Array:
    return jnp.stack([sum_of_squares(leaf) for leaf in jax.tree.leaves(tree)])  # (leaves,)


def norms_by_group(tree: Params) -> dict[str, Array]:
    """The float32 norm of each group of `group_names(tree)`."""
    return _group_norms(_squares(tree), leaf_names(tree))


def _group_norms(squares: Array, names: Sequence[str]) -> dict[str, Array]:
    groups = [name.split("/")[0] for name in names]
    return {
        group: jnp.sqrt(sum(squares[i] for i, other in enumerate(groups) if other == group))
        for group in dict.fromkeys(groups)
    }


# --- the level of a noisy, drifting quantity --------------------------------------------------------------------------


def masked_median(values: Array, count: Array) -> Array:
    """Median along the last axis of the last `count` entries (at least one)."""
    size = values.shape[-1]
    ordered = jnp.sort(jnp.where(jnp.arange(size) >= size - count, values, jnp.inf), axis=-1)
    middle = jnp.take(ordered, jnp.stack([(count - 1) // 2, count // 2]), axis=-1)
    return jnp.mean(middle, axis=-1)


def level_and_scale(window: Array, count: Array) -> tuple[Array, Array]:
    """Where the next value should be and how far it may stray: a robust line through the last `count` values.

    Shapes: `window` [..., W] -> two arrays [...]. The slope is the median of the differences between points half
    a window apart (Theil-Sen over W/2 pairs); it is zero until the window is full.
    """
    size = window.shape[-1]
    half = size // 2
    rises = window[..., half : 2 * half] - window[..., :half]
    slope = jnp.where(count >= size, jnp.median(rises, axis=-1) / half, 0.0)
    age = jnp.arange(size, dtype=window.dtype) - (size - 1)  # 0 for the newest
    flat = window - slope[..., None] * age
    level = masked_median(flat, count)
    spread = masked_median(jnp.abs(flat - level[..., None]), count)
    return level, MAD_TO_SIGMA * spread


# --- the monitor ------------------------------------------------------------------------------------------------------


def init_monitor(params: Params, policy: Policy, prefix: str = "") -> MonitorState:
    """The monitor before the first step. `prefix` ("generator/") tells the networks of one experiment apart."""
    f32, i32 = jnp.float32, jnp.int32
    return MonitorState(
        steps=jnp.zeros((), i32),
        window=jnp.zeros((2, policy.window), f32),
        accepted=jnp.zeros((), i32),
        recent=jnp.zeros((2, policy.patience), f32),
        recent_spikes=jnp.zeros((policy.patience,), bool),
        level=jnp.full((2,), jnp.inf, f32),
        scale=jnp.ones((2,), f32),
        start_level=jnp.full((), jnp.nan, f32),
        best_level=jnp.full((), jnp.inf, f32),
        best_scale=jnp.zeros((), f32),
        nonfinite_steps=jnp.zeros((), i32),
        steps_far=jnp.zeros((), i32),
        counts=jnp.zeros((len(MONITOR_COUNTERS),), i32),
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

    Metrics: `stability/<prefix>grad_norm`, and for each group `stability/<prefix>grad_norm|update_norm|param_norm|
    update_ratio/<group>`, where the parameters are those before the step and the ratio is update over parameter norm;
    a skipped or held update has norm 0. Then `monitor/<prefix>*` as listed at the top of this module.

    Parameters and updates are checked without reading the result: if both sums of squares are finite in float32, no entry
    of either exceeds 1.9e19, and so their sum is finite.

    Raises: `ValueError` while tracing when `monitor` was made for other parameters or another prefix.
    """
    names = leaf_names(params)
    if (names, prefix) != (monitor.leaf_names, monitor.prefix):
        raise ValueError(
            f"the monitor with prefix {monitor.prefix!r} was made for {len(monitor.leaf_names)} other parameters, "
            f"not for the {len(names)} of prefix {prefix!r}: pass the same to init_monitor and guarded_update"
        )
    loss = loss.astype(jnp.float32)
    gradient_squares = _squares(gradients)  # (leaves,)
    norm = jnp.sqrt(jnp.sum(gradient_squares))
    log_norm = jnp.log(jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    observed = jnp.stack([loss, log_norm])

    measurable = jnp.isfinite(loss) & jnp.isfinite(norm)
    limit = monitor.level + policy.threshold * monitor.scale
    spikes = measurable & (observed > limit)
    spike = jnp.any(spikes)

    clip_factor = jnp.ones((), jnp.float32)
    if policy.on_spike == "clip":
        clip_factor = jnp.where(spike, jnp.minimum(1.0, jnp.exp(monitor.level[1] - log_norm)), 1.0)
        gradients = jax.tree.map(lambda g: g * clip_factor.astype(g.dtype), gradients)

    updates, new_optimizer_state = optimizer.update(gradients, optimizer_state, params)
    update_squares = _squares(updates)
    param_squares = _squares(params)
    nonfinite_gradients = ~jnp.isfinite(gradient_squares)
    nonfinite_params = ~jnp.isfinite(update_squares + param_squares)
    nonfinite = ~measurable | jnp.any(nonfinite_params)

    acted_on_spike = spike & ~nonfinite
    skipped = held = jnp.zeros((), bool)
    if policy.on_nonfinite in ("skip", "clip"):
        skipped = skipped | nonfinite
    elif policy.on_nonfinite in ("rollback", "stop"):
        held = held | nonfinite
    if policy.on_spike == "skip":
        skipped = skipped | acted_on_spike
    elif policy.on_spike in ("rollback", "stop"):
        held = held | acted_on_spike
    clipped = acted_on_spike & (clip_factor < 1.0)
    applied = ~(skipped | held)

    new_params = optax.apply_updates(params, updates)
    if (policy.on_spike, policy.on_nonfinite) not in (("log", "log"), ("clip", "log")):
        new_params, new_optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(applied, new, old),
            (new_params, new_optimizer_state),
            (params, optimizer_state),
        )

    flags = {
        "spike": spike,
        "loss_spike": spikes[0],
        "gradient_spike": spikes[1],
        "nonfinite": nonfinite,
        "nonfinite_loss": ~jnp.isfinite(loss),
        "skipped": skipped,
        "clipped": clipped,
        "held": held,
    }
    monitor, flags = _remember(monitor, observed, flags, policy)

    out: dict[str, Array] = {f"{STABILITY_PREFIX}{prefix}grad_norm": norm}
    gradient_norms, update_norms, param_norms = (
        _group_norms(squares, names) for squares in (gradient_squares, update_squares, param_squares)
    )
    for group in gradient_norms:
        update_norm = jnp.where(applied, update_norms[group], 0.0)
        out[f"{STABILITY_PREFIX}{prefix}grad_norm/{group}"] = gradient_norms[group]
        out[f"{STABILITY_PREFIX}{prefix}update_norm/{group}"] = update_norm
        out[f"{STABILITY_PREFIX}{prefix}param_norm/{group}"] = param_norms[group]
        out[f"{STABILITY_PREFIX}{prefix}update_ratio/{group}"] = update_norm / jnp.maximum(
            param_norms[group], 1e-12
        )
    values = {
        "loss": loss,
        "loss_level": monitor.level[0],
        "loss_threshold": limit[0],
        "gradient_level": jnp.exp(monitor.level[1]),
        "gradient_threshold": jnp.exp(limit[1]),
        "clip_factor": clip_factor,
        "steps_far": monitor.steps_far,
        "nonfinite_gradients": nonfinite_gradients,
        "nonfinite_params": nonfinite_params,
        **{counter: monitor.counts[i] for i, counter in enumerate(MONITOR_COUNTERS)},
    }
    out |= {f"{MONITOR_PREFIX}{prefix}{name}": value for name, value in (flags | values).items()}
    return GuardedUpdate(new_params, new_optimizer_state, monitor, out, applied)


def _remember(
    monitor: MonitorState, observed: Array, flags: dict[str, Array], policy: Policy
) -> tuple[MonitorState, dict[str, Array]]:
    """The monitor after a step: windows, levels, counters; and the flags with those that only now are known."""
    measurable = jnp.all(jnp.isfinite(observed))
    accept = measurable & ~flags["spike"]
    steps = monitor.steps + 1

    window = jnp.where(accept, _push(monitor.window, observed), monitor.window)
    accepted = jnp.minimum(monitor.accepted + accept, policy.window)
    recent = jnp.where(measurable, _push(monitor.recent, observed), monitor.recent)
    recent_spikes = jnp.where(measurable, _push(monitor.recent_spikes, flags["spike"]), monitor.recent_spikes)

    rebaselined = jnp.sum(recent_spikes) >= policy.patience // 2
    refilled = jnp.concatenate([window[:, : policy.window - policy.patience], recent], axis=1)
    window = jnp.where(rebaselined, refilled, window)
    accepted = jnp.where(rebaselined, policy.patience, accepted)
    recent_spikes = recent_spikes & ~rebaselined
    nonfinite_steps = jnp.where(flags["nonfinite"], monitor.nonfinite_steps + 1, 0)

    monitor = dataclasses.replace(
        monitor,
        steps=steps,
        window=window,
        accepted=accepted,
        recent=recent,
        recent_spikes=recent_spikes,
        nonfinite_steps=nonfinite_steps,
    )
    far_before = monitor.steps_far
    monitor = lax.cond(
        (steps % REFRESH == 0) | rebaselined, lambda m: _refresh(m, policy), lambda m: m, monitor
    )

    blowup = (monitor.steps_far >= policy.blowup_patience) & (far_before < policy.blowup_patience)
    counted = [
        flags["spike"],
        flags["nonfinite"],
        flags["skipped"],
        flags["clipped"],
        flags["held"],
        rebaselined,
        blowup,
    ]
    interventions = flags["skipped"] | flags["clipped"]
    counts = monitor.counts + jnp.stack([*counted, interventions]).astype(jnp.int32)
    exhausted = counts[MONITOR_COUNTERS.index("interventions")] > policy.max_interventions
    return dataclasses.replace(monitor, counts=counts), {
        **flags,
        "rebaselined": rebaselined,
        "blowup": blowup,
        "exhausted": exhausted,
    }


def _push(window: Array, value: Array) -> Array:
    return jnp.concatenate([window[..., 1:], value[..., None]], axis=-1)


def _refresh(monitor: MonitorState, policy: Policy) -> MonitorState:
    """New levels and scales from the window, and whether the loss is far above its best."""
    count = jnp.maximum(monitor.accepted, 1)
    ready = monitor.accepted >= policy.patience
    level, scale = level_and_scale(monitor.window, count)
    floor = jnp.stack([LOSS_SCALE_FLOOR * jnp.abs(level[0]), jnp.full((), LOG_NORM_SCALE_FLOOR, level.dtype)])
    scale = jnp.maximum(scale, jnp.maximum(floor, jnp.finfo(jnp.float32).tiny))
    monitor = dataclasses.replace(
        monitor, level=jnp.where(ready, level, jnp.inf), scale=jnp.where(ready, scale, 1.0)
    )
    if not policy.watch_blowup:
        return monitor

    median = masked_median(monitor.window[0], count)
    start = jnp.where(jnp.isnan(monitor.start_level) & ready, median, monitor.start_level)
    better = ready & (median < monitor.best_level)
    best = jnp.where(better, median, monitor.best_level)
    best_scale = jnp.where(better, scale[0], monitor.best_scale)

    now = jnp.median(monitor.recent[0])
    gained = start - best
    out_of_reach = now > best + LOST_FACTOR * jnp.abs(best)
    lost = (gained > LOST_SCALES * best_scale) & (now > best + LOST_SHARE * gained)
    far = (now > best + LOST_SCALES * best_scale) & (out_of_reach | lost) | (
        monitor.nonfinite_steps >= REFRESH
    )
    return dataclasses.replace(
        monitor,
        start_level=start,
        best_level=best,
        best_scale=best_scale,
        steps_far=jnp.where(far, monitor.steps_far + REFRESH, 0),
    )


def is_blown_up(monitor: MonitorState, policy: Policy) -> bool:
    """Whether the loss is, now, far above its best and has been for long (on the host)."""
    return int(monitor.steps_far) >= policy.blowup_patience and math.isfinite(policy.blowup_patience)
