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
from collections.abc import Callable, Mapping, Sequence
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

MAD_TO_SIGMA = 1.4826  # the median absolute deviation of a normal distribution is sigma / 1.4826
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


# --- names ----------------------------------------------------------------------------------------------------


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


# --- norms ----------------------------------------------------------------------------------------------------

_LANES = 256


def _squares(tree: Params) -> Array:
    """float32 sums of squares of the leaves, [leaves].

    Not finite where an entry is not finite, or beyond about 1e19, which is as good as lost. Partial sums run along a
    leading axis: that vectorises on CPU, where one long sum is a chain of dependent additions.
    """

    def partial_sums(leaf: Array) -> Array:
        flat = leaf.astype(jnp.float32).reshape(-1)
        whole = flat.size // _LANES * _LANES
        rest = jnp.square(jnp.pad(flat[whole:], (0, _LANES - (flat.size - whole))))
        if not whole:
            return rest
        sums = jnp.sum(jnp.square(flat[:whole].reshape(-1, _LANES)), axis=0)
        return sums if whole == flat.size else sums + rest

    squares = jnp.sum(jnp.stack([partial_sums(leaf) for leaf in jax.tree.leaves(tree)]), axis=-1)
    # Without the barrier a sum over leaves is merged with the sums within them, and all is summed twice.
    return lax.optimization_barrier(squares)


def _group_norms(squares: Array, names: Sequence[str]) -> Array:
    """[..., leaves] -> [..., groups]. A sum with a mask, not a matrix product: 0 x inf would spoil every group."""
    groups = [name.split("/")[0] for name in names]
    member = jnp.array([[group == other for other in dict.fromkeys(groups)] for group in groups])  # (leaves, groups)
    return jnp.sqrt(jnp.sum(jnp.where(member, squares[..., None], 0.0), axis=-2))


def norms_by_group(tree: Params) -> dict[str, Array]:
    """The float32 norm of each group of `group_names(tree)`."""
    norms = _group_norms(_squares(tree), leaf_names(tree))
    return {group: norms[i] for i, group in enumerate(group_names(tree))}


# --- the level of a noisy, drifting quantity ------------------------------------------------------------------


def masked_median(values: Array, count: Array) -> Array:
    """Median along the last axis of the last `count` entries (at least one). `values` [..., W], `count` [...] or []."""
    size = values.shape[-1]
    count = jnp.broadcast_to(count, values.shape[:-1])[..., None]
    ordered = jnp.sort(jnp.where(jnp.arange(size) >= size - count, values, jnp.inf), axis=-1)
    middle = jnp.concatenate([(count - 1) // 2, count // 2], axis=-1)  # (..., 2)
    return jnp.mean(jnp.take_along_axis(ordered, middle, axis=-1), axis=-1)


def level_and_scale(window: Array, count: Array) -> tuple[Array, Array]:
    """Where the next value should be and how far it may stray: a robust line through the last `count` values.

    Shapes: `window` [..., W] -> two arrays [...]. The slope is the median rise between points half a window apart
    (Theil and Sen's estimate over W/2 pairs); it is zero until the window is full.
    """
    size = window.shape[-1]
    half = size // 2
    rises = window[..., half : 2 * half] - window[..., :half]
    slope = jnp.where(count >= size, masked_median(rises, jnp.asarray(half)) / half, 0.0)
    age = jnp.arange(size, dtype=window.dtype) - (size - 1)  # 0 for the newest
    flat = window - slope[..., None] * age
    level = masked_median(flat, count)
    return level, MAD_TO_SIGMA * masked_median(jnp.abs(flat - level[..., None]), count)


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
    loss = loss.astype(jnp.float32)
    gradient_squares = _squares(gradients)  # (leaves,)
    norm = jnp.sqrt(jnp.sum(gradient_squares))
    log_norm = jnp.log(jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    observed = jnp.stack([loss, log_norm])
    limits = monitor.thresholds(policy)

    measurable = jnp.isfinite(loss) & jnp.isfinite(norm)
    spikes = measurable & (observed > limits)
    spike = spikes[0] | spikes[1]

    clip_factor = jnp.ones((), jnp.float32)
    if policy.on_spike == "clip":
        clip_factor = jnp.where(spike, jnp.minimum(1.0, jnp.exp(monitor.levels[1] - log_norm)), 1.0)
        gradients = jax.tree.map(lambda g: g * clip_factor.astype(g.dtype), gradients)

    hold = jnp.zeros((), bool)
    if policy.on_nonfinite != "log":
        hold = hold | ~measurable
    if policy.on_spike in ("skip", "rollback", "stop"):
        hold = hold | spike
    step = monitor.clock("steps") + 1
    measure = spike | (step % MEASURE_EVERY == 0) | (step % policy.log_every == 0) | (step == 1)
    new_params, new_optimizer_state, squares, measured = _update(
        optimizer, gradients, params, optimizer_state, hold=hold, measure=measure, policy=policy
    )

    nonfinite_params = ~jnp.isfinite(squares[0] + squares[1])  # (leaves,)
    nonfinite_after = jnp.any(nonfinite_params)
    nonfinite = ~measurable | nonfinite_after
    clipped = spike & ~nonfinite & (clip_factor < 1.0)
    held_back = hold | (nonfinite_after if policy.on_nonfinite != "log" else False)
    skips_nonfinite = policy.on_nonfinite in ("skip", "clip")
    skipped = held_back & jnp.where(nonfinite, skips_nonfinite, policy.on_spike == "skip")
    held = held_back & ~skipped

    norms = jnp.where(measured & ~nonfinite, _group_norms(squares, names), monitor.norms)
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
    monitor = dataclasses.replace(monitor, norms=norms)
    monitor, stacked = _in_one_kernel(
        lambda: _remember(monitor, observed, flags, policy),
        (monitor, jnp.zeros((len(MONITOR_FLAGS),), bool)),
        once=jnp.minimum(step, 1),
    )
    flags = {name: stacked[i] for i, name in enumerate(MONITOR_FLAGS)}

    group_norms = _group_norms(gradient_squares, names)
    update_norms = jnp.where(held_back, 0.0, norms[0])
    ratios = update_norms / jnp.maximum(norms[1], jnp.finfo(jnp.float32).tiny)
    values = {
        "loss": loss,
        "loss_level": monitor.levels[0],
        "loss_threshold": limits[0],
        "gradient_level": jnp.exp(monitor.levels[1]),
        "gradient_threshold": jnp.exp(limits[1]),
        "clip_factor": clip_factor,
        "steps_far": monitor.clock("steps_far"),
        "nonfinite_gradients": ~jnp.isfinite(gradient_squares),
        "nonfinite_params": nonfinite_params,
        **{name: monitor.count(name) for name in MONITOR_COUNTERS},
    }
    # In the order of the vectors that they come from, so that packing them again is one copy per vector.
    metrics = {f"{STABILITY_PREFIX}{prefix}grad_norm": norm}
    per_group = {
        "grad_norm": group_norms,
        "update_norm": update_norms,
        "param_norm": norms[1],
        "update_ratio": ratios,
    }
    for quantity, vector in per_group.items():
        for i, group in enumerate(group_names(params)):
            metrics[f"{STABILITY_PREFIX}{prefix}{quantity}/{group}"] = vector[i]
    metrics |= {f"{MONITOR_PREFIX}{prefix}{name}": value for name, value in (flags | values).items()}
    return GuardedUpdate(new_params, new_optimizer_state, monitor, metrics, ~held_back)


def _update(
    optimizer: optax.GradientTransformation,
    gradients: Params,
    params: Params,
    optimizer_state: Any,
    *,
    hold: Array,
    measure: Array,
    policy: Policy,
) -> tuple[Params, Any, Array, Array]:
    """(parameters, optimiser state, squares [2, leaves] of updates and parameters, whether those were measured).

    An unmeasured step has squares 0. One that turns out not to be finite is dropped unless the policy is `log`.
    """

    def apply(measured: bool) -> tuple[Params, Any, Array]:
        updates, new_state = optimizer.update(gradients, optimizer_state, params)
        new_params = optax.apply_updates(params, updates)
        if not measured:
            return new_params, new_state, unmeasured
        squares = jnp.stack([_squares(updates), _squares(params)])
        if policy.on_nonfinite != "log":
            finite = jnp.all(jnp.isfinite(squares))
            new_params, new_state = _select(finite, (new_params, new_state), (params, optimizer_state))
        return new_params, new_state, squares

    unmeasured = jnp.zeros((2, len(jax.tree.leaves(params))), jnp.float32)
    if jax.default_backend() == "cpu":
        branches = (lambda: (params, optimizer_state, unmeasured), lambda: apply(False), lambda: apply(True))
        index = jnp.where(hold, 0, jnp.where(measure, 2, 1))
        return *lax.switch(index, branches), measure & ~hold
    new_params, new_state, squares = apply(True)
    new_params, new_state = _select(hold, (params, optimizer_state), (new_params, new_state))
    return new_params, new_state, jnp.where(hold, 0.0, squares), ~hold


def _select(condition: Array, chosen: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, other)


def _remember(
    monitor: MonitorState, observed: Array, flags: dict[str, Array], policy: Policy
) -> tuple[MonitorState, Array]:
    """The monitor after a step, and all of `MONITOR_FLAGS`, some of which are known only now."""
    measurable = jnp.all(jnp.isfinite(observed))
    accept = measurable & ~flags["spike"]
    steps = monitor.clock("steps") + 1

    seen = jnp.append(observed, flags["spike"].astype(jnp.float32))
    recent = jnp.where(measurable, _push(monitor.recent, seen), monitor.recent)
    rebaselined = jnp.sum(recent[2]) >= policy.patience // 2
    recent = recent.at[2].multiply(~rebaselined)
    window = jnp.where(accept, _push(monitor.window, observed), monitor.window)
    refilled = jnp.concatenate([window[:, : policy.window - policy.patience], recent[:2]], axis=1)
    window = jnp.where(rebaselined, refilled, window)
    accepted = jnp.minimum(monitor.clock("accepted") + accept, policy.window)
    accepted = jnp.where(rebaselined, policy.patience, accepted)
    nonfinite_steps = jnp.where(flags["nonfinite"], monitor.clock("nonfinite_steps") + 1, 0)

    refresh = (steps % MEASURE_EVERY == 0) | rebaselined
    levels = lax.cond(
        refresh,
        lambda: _levels(window, recent, accepted, nonfinite_steps, monitor.levels, policy),
        lambda: monitor.levels,
    )
    far_before = monitor.clock("steps_far")
    still_far = jnp.where(levels[_LEVELS.index("far")] > 0, far_before + MEASURE_EVERY, 0)
    steps_far = jnp.where(steps % MEASURE_EVERY == 0, still_far, far_before)
    blowup = (steps_far >= policy.blowup_patience) & (far_before < policy.blowup_patience)

    events = [flags[name] for name in ("spike", "nonfinite", "skipped", "clipped", "held")]
    events += [rebaselined, blowup, flags["skipped"] | flags["clipped"]]
    monitor = dataclasses.replace(
        monitor,
        window=window,
        recent=recent,
        clocks=jnp.stack([steps, accepted, nonfinite_steps, steps_far]).astype(jnp.int32),
        counts=monitor.counts + jnp.stack(events),
        levels=levels,
    )
    exhausted = monitor.count("interventions") > policy.max_interventions
    flags = {**flags, "rebaselined": rebaselined, "blowup": blowup, "exhausted": exhausted}
    return monitor, jnp.stack([flags[name] for name in MONITOR_FLAGS])


def _in_one_kernel(compute: Callable[[], Any], like: Any, *, once: Array) -> Any:
    """`compute()`, which has the structure of `like`. `once` is a 1 that the compiler cannot know to be one.

    XLA:CPU compiles a loop over small arrays into a single function; outside of a loop it launches each of the forty
    operations on its own, which takes longer than a small network's whole step.
    """
    if jax.default_backend() != "cpu":
        return compute()
    return lax.fori_loop(0, once, lambda _, carry: compute(), like)


def _push(window: Array, value: Array) -> Array:
    return jnp.concatenate([window[..., 1:], value[..., None]], axis=-1)


def _levels(window: Array, recent: Array, accepted: Array, nonfinite_steps: Array, old: Array, policy: Policy) -> Array:
    """New levels and scales from the window, and whether the loss is now far above the best it has been."""
    count = jnp.maximum(accepted, 1)
    ready = accepted >= policy.patience
    level, scale = level_and_scale(window, count)  # (2,), (2,)
    scale = jnp.maximum(scale, jnp.stack([LOSS_SCALE_FLOOR * jnp.abs(level[0]), LOG_NORM_SCALE_FLOOR]))
    scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    level, scale = jnp.where(ready, level, jnp.inf), jnp.where(ready, scale, 1.0)

    start, best, best_scale = old[4], old[5], old[6]
    far = jnp.zeros((), bool)
    if policy.watch_blowup:
        padded = jnp.pad(recent[0], (policy.window - policy.patience, 0))
        median, now = masked_median(jnp.stack([window[0], padded]), jnp.stack([count, policy.patience]))
        start = jnp.where(jnp.isnan(start) & ready, median, start)
        better = ready & (median < best)
        best, best_scale = jnp.where(better, median, best), jnp.where(better, scale[0], best_scale)
        gained = start - best
        out_of_reach = now > best + LOST_FACTOR * jnp.abs(best)
        lost = (gained > LOST_SCALES * best_scale) & (now > best + LOST_SHARE * gained)
        far = ((now > best + LOST_SCALES * best_scale) & (out_of_reach | lost)) | (nonfinite_steps >= MEASURE_EVERY)
    return jnp.concatenate([level, scale, jnp.stack([start, best, best_scale, far.astype(jnp.float32)])])


def is_blown_up(monitor: MonitorState, policy: Policy) -> bool:
    """Whether, at the end of a run, the loss is far above its best and has been for long."""
    return int(monitor.clock("steps_far")) >= policy.blowup_patience
