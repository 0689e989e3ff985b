"""The monitor on sequences of losses and gradients whose events are known."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from stabletrain.training.config import TrainConfig
from stabletrain.training.robust_level import level_and_scale, masked_median
from stabletrain.training.stability import (
    MEASURE_EVERY,
    MONITOR_COUNTERS,
    MONITOR_FLAGS,
    MONITOR_VALUES,
    MONITOR_VECTORS,
    GuardedUpdate,
    MonitorState,
    Policy,
    guarded_update,
    init_monitor,
    is_blown_up,
    merge_inner_metrics,
    monitors_of,
    nonfinite_tensors,
)
from stabletrain.training.tensor_norms import group_names, group_norms, leaf_names, sums_of_squares

PARAMS = {"a": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "b": {"kernel": jnp.full((2, 2), 2.0)}}
WINDOW = 32
PATIENCE = 8


SGD = optax.sgd(0.01)
ADAM = optax.adam(0.01)


@functools.partial(jax.jit, static_argnames=("optimizer", "policy"))
def scan(params: Any, monitor: Any, losses: Any, norms: Any, *, optimizer: Any, policy: Policy) -> Any:
    """Compiled once for each policy and number of steps."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))

    def body(carry: Any, xs: Any) -> Any:
        params, state, monitor = carry
        loss, norm = xs
        update = guarded_update(
            optimizer,
            loss=loss,
            gradients=jax.tree.map(lambda p: jnp.full(p.shape, norm / np.sqrt(size), p.dtype), params),
            params=params,
            optimizer_state=state,
            monitor=monitor,
            policy=policy,
        )
        bias = update.params["a"]["bias"]
        return (update.params, update.optimizer_state, update.monitor), {**update.metrics, "bias": bias}

    return lax.scan(body, (params, optimizer.init(params), monitor), (losses, norms))


def drive(
    losses: Any, norms: Any = None, *, optimizer: Any = SGD, params: Any = PARAMS, monitor: Any = None, **policy: Any
) -> tuple[dict[str, np.ndarray], Any, MonitorState]:
    """One update per loss, with a gradient of the given norm. Returns metrics [steps], parameters, monitor."""
    static = Policy(**{"window": WINDOW, "on_nonfinite": "skip", **policy})
    losses = jnp.asarray(losses, jnp.float32)
    norms = jnp.ones_like(losses) if norms is None else jnp.asarray(norms, jnp.float32)
    monitor = init_monitor(params, static) if monitor is None else monitor
    (params, _, monitor), metrics = scan(params, monitor, losses, norms, optimizer=optimizer, policy=static)
    return jax.tree.map(np.asarray, metrics), params, monitor


def noisy(steps: int, seed: int = 0, level: float = 1.0, noise: float = 0.1) -> np.ndarray:
    return level * np.exp(noise * np.random.default_rng(seed).normal(size=steps))


def flagged(metrics: dict[str, np.ndarray], flag: str) -> list[int]:
    return np.flatnonzero(metrics[f"monitor/{flag}"]).tolist()


# --- names and numbers ----------------------------------------------------------------------------------------


def norms_by_group(tree: Any) -> dict[str, jax.Array]:
    return dict(zip(group_names(tree), group_norms(sums_of_squares(tree), leaf_names(tree)), strict=True))


def test_names_follow_the_order_of_the_leaves() -> None:
    assert leaf_names(PARAMS) == ("a/bias", "a/kernel", "b/kernel")
    assert group_names(PARAMS) == ("a", "b")
    assert leaf_names([jnp.ones(1), (jnp.ones(1),)]) == ("0", "1/0")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(), (5,), (256,), (1000,), (3, 3, 64, 8)])
def test_group_norms_agree_with_numpy_in_float64(shape: tuple[int, ...], dtype: Any) -> None:
    random = np.random.default_rng(0)
    tree = {"x": {"u": random.normal(size=shape), "v": random.normal(size=(7,))}, "y": random.normal(size=(2,))}
    tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)
    norms = norms_by_group(tree)
    exact = jax.tree.map(lambda leaf: np.sum(np.asarray(leaf, np.float64) ** 2), tree)
    # Sums of at most 4,608 squares in float32.
    np.testing.assert_allclose(norms["x"], np.sqrt(exact["x"]["u"] + exact["x"]["v"]), rtol=1e-5)
    np.testing.assert_allclose(norms["y"], np.sqrt(exact["y"]), rtol=1e-5)
    assert norms["x"].dtype == jnp.float32


def test_an_infinite_group_does_not_spoil_the_norm_of_another() -> None:
    norms = norms_by_group({"a": jnp.array([jnp.inf, 1.0]), "b": jnp.array([3.0, 4.0]), "c": jnp.array([jnp.nan])})
    assert np.isinf(norms["a"])
    assert norms["b"] == 5.0
    assert np.isnan(norms["c"])


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_masked_median_is_the_median_of_the_last_entries(count: int) -> None:
    values = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    got = masked_median(jnp.asarray(values), jnp.asarray(count))
    np.testing.assert_allclose(got, np.median(values[:, -count:], axis=1), rtol=1e-6)


def test_level_follows_a_trend_and_scale_is_that_of_the_noise_alone() -> None:
    size, slope, sigma = 128, -0.05, 0.1
    random = np.random.default_rng(2)
    windows = slope * np.arange(size) + sigma * random.normal(size=(200, size))
    levels, scales = level_and_scale(jnp.asarray(windows, jnp.float32), jnp.asarray(size))
    # The trend alone would give a scale of 47 |slope| = 2.4 and a level 64 |slope| = 3.2 too high.
    # Median over 200 windows; one level has a standard error of about 2.5 sigma / sqrt(128).
    assert np.median(levels) == pytest.approx(slope * (size - 1), abs=0.02)
    assert np.median(scales) == pytest.approx(sigma, rel=0.1)


def test_what_the_monitor_does_besides_norms_is_three_functions() -> None:
    """On CPU each of its operations by itself would take longer than the update of a small network."""

    def step(monitor: MonitorState, loss: Any, params: Any) -> Any:
        return guarded_update(
            SGD, loss=loss, gradients=params, params=params, optimizer_state=SGD.init(params), monitor=monitor,
            policy=Policy(),
        )  # fmt: skip

    program = jax.jit(step).lower(init_monitor(PARAMS, Policy()), jnp.ones(()), PARAMS).compile()
    assert program.as_text().count('xla_cpu_small_call="true"') == 3


def test_metrics_hold_the_norms_of_each_group() -> None:
    metrics, _, _ = drive([1.0], [3.0], optimizer=optax.sgd(0.5), log_every=1)
    share_a, share_b = np.sqrt(8 / 12), np.sqrt(4 / 12)  # of the entries
    expected = {
        "stability/grad_norm": 3.0,
        "stability/grad_norm/a": 3.0 * share_a,
        "stability/grad_norm/b": 3.0 * share_b,
        "stability/update_norm/a": 1.5 * share_a,
        "stability/param_norm/a": np.sqrt(8.0),
        "stability/param_norm/b": 4.0,
        "stability/update_ratio/b": 1.5 * share_b / 4.0,
    }
    for name, value in expected.items():
        assert metrics[name][0] == pytest.approx(value, rel=1e-6), name


def test_every_metric_is_listed_and_every_listed_metric_is_there() -> None:
    metrics, _, _ = drive([1.0])
    names = {name.removeprefix("monitor/") for name in metrics if name.startswith("monitor/")}
    assert names == {*MONITOR_FLAGS, *MONITOR_COUNTERS, *MONITOR_VALUES, *MONITOR_VECTORS}


def test_updates_are_measured_at_logged_steps_at_spikes_and_now_and_then() -> None:
    losses, norms = noisy(60), np.linspace(1, 2, 60)
    losses[50] = 100.0
    metrics, _, _ = drive(losses, norms, log_every=10)
    changed = 1 + np.flatnonzero(np.diff(metrics["stability/update_norm/a"]))
    expected = {i for i in range(60) if (i + 1) % MEASURE_EVERY == 0 or (i + 1) % 10 == 0 or i == 50} - {0}
    assert set(changed) == expected


# --- spikes ---------------------------------------------------------------------------------------------------


def test_a_spike_of_the_loss_or_of_the_gradient_is_flagged_at_its_step() -> None:
    losses, norms = noisy(100), noisy(100, seed=1)
    losses[60], norms[80] = 5.0, 30.0
    metrics, _, monitor = drive(losses, norms)
    assert flagged(metrics, "spike") == [60, 80]
    assert flagged(metrics, "loss_spike") == [60]
    assert flagged(metrics, "gradient_spike") == [80]
    assert monitor.count("spikes") == 2
    assert flagged(metrics, "rebaselined") == []


def test_nothing_is_a_spike_during_the_warm_up() -> None:
    losses = noisy(PATIENCE)
    losses[3] = 1e6
    metrics, _, _ = drive(losses)
    assert flagged(metrics, "spike") == []
    assert np.isinf(metrics["monitor/loss_threshold"]).all()


def test_spikes_do_not_widen_their_own_threshold() -> None:
    losses, norms = noisy(200), noisy(200, seed=1)
    spiky_losses, spiky_norms = losses.copy(), norms.copy()
    at = [100, 105, 111, 118, 126]
    spiky_losses[at], spiky_norms[at] = 1e6, 1e6
    clean = drive(np.delete(losses, at), np.delete(norms, at))[2]
    spiky_metrics, _, spiky = drive(spiky_losses, spiky_norms)
    assert flagged(spiky_metrics, "spike") == at
    np.testing.assert_array_equal(spiky.window, clean.window)  # as if the spikes had never been
    before, after = (spiky_metrics["monitor/loss_threshold"][i] for i in (99, 140))
    # Estimates from 32 values each; one spike in the window of a mean-and-deviation rule would raise it 1e5-fold.
    assert after == pytest.approx(before, rel=0.35)


@pytest.mark.parametrize("kind", ["decreasing", "heavy", "negative", "increasing"])
def test_false_alarms_are_rare_on_clean_losses(kind: str) -> None:
    steps, random = 6000, np.random.default_rng(3)
    progress = np.arange(steps)
    losses = {
        "decreasing": (0.05 + np.exp(-progress / 300)) * np.exp(0.15 * random.normal(size=steps)),
        "heavy": 0.3 + 0.02 * random.standard_t(df=5, size=steps),
        "negative": -2.0 + 0.5 * random.normal(size=steps) - progress / 1000,
        "increasing": 0.7 + progress / 6000 + 0.1 * random.normal(size=steps),
    }[kind]
    norms = (0.2 + np.exp(-progress / 500)) * np.exp(0.3 * random.normal(size=steps))
    metrics, _, _ = drive(losses, norms, window=128)
    allowed = 6 if kind == "heavy" else 1  # Student's t with 5 degrees of freedom: 8 sigma once in 4,000
    assert len(flagged(metrics, "spike")) <= allowed
    assert flagged(metrics, "rebaselined") == flagged(metrics, "blowup") == []


def test_a_drop_of_the_loss_is_no_spike() -> None:
    losses = np.concatenate([noisy(150), noisy(150, seed=1, level=0.05)])
    metrics, _, _ = drive(losses, losses)
    assert flagged(metrics, "spike") == []


def test_a_lasting_rise_is_flagged_for_a_while_and_then_is_the_new_level() -> None:
    losses = np.concatenate([noisy(100), noisy(100, seed=1, level=3.0)])
    losses[180] = 30.0
    metrics, _, monitor = drive(losses, watch_blowup=False)
    # Half of the last `patience` steps decide; spikes are found again at once, from the new level.
    assert flagged(metrics, "rebaselined") == [100 + PATIENCE // 2 - 1]
    assert flagged(metrics, "spike") == [100, 101, 102, 103, 180]
    assert monitor.count("rebaselines") == 1
    assert metrics["monitor/loss_level"][-1] == pytest.approx(3.0, rel=0.2)


def test_the_threshold_is_a_number_of_robust_deviations() -> None:
    losses = noisy(300, noise=0.05)
    monitor = drive(losses, window=128)[2]
    low, high = (float(monitor.thresholds(Policy(threshold=t))[0]) for t in (4.0, 8.0))
    assert high - low == pytest.approx(4 * float(monitor.levels[2]), rel=1e-5)
    assert float(monitor.levels[2]) == pytest.approx(0.05, rel=0.4)  # 128 values of deviation 0.05


# --- policies -------------------------------------------------------------------------------------------------


def spiky() -> tuple[np.ndarray, np.ndarray]:
    losses, norms = noisy(70), noisy(70, seed=1)
    losses[60], norms[60] = 50.0, 100.0
    return losses, norms


def test_policy_log_applies_a_spike_and_says_so() -> None:
    metrics, _, monitor = drive(*spiky(), on_spike="log")
    assert flagged(metrics, "spike") == [60]
    step = metrics["bias"][60] - metrics["bias"][59]
    np.testing.assert_allclose(step, -0.01 * 100.0 / np.sqrt(12), rtol=1e-5)
    assert not monitor.counts[MONITOR_COUNTERS.index("interventions")]


@pytest.mark.parametrize(("policy", "flag"), [("skip", "skipped"), ("rollback", "held"), ("stop", "held")])
def test_policies_that_hold_back_a_spike_leave_everything_as_it_was(policy: str, flag: str) -> None:
    losses, norms = spiky()
    metrics, params, monitor = drive(losses, norms, optimizer=ADAM, on_spike=policy)
    assert flagged(metrics, flag) == [60]
    np.testing.assert_array_equal(metrics["bias"][60], metrics["bias"][59])
    assert metrics["stability/update_norm/a"][60] == 0.0
    assert monitor.count("interventions") == (policy == "skip")
    # As if the step had not been, to the bit: the optimiser did not move either.
    without = drive(np.delete(losses, 60), np.delete(norms, 60), optimizer=ADAM, on_spike=policy)[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, params, without))


def test_policy_clip_scales_the_gradient_to_its_running_median() -> None:
    metrics, _, monitor = drive(*spiky(), on_spike="clip")
    assert flagged(metrics, "clipped") == [60]
    level = metrics["monitor/gradient_level"][59]
    assert level == pytest.approx(1.0, rel=0.2)
    step = np.linalg.norm(metrics["bias"][60] - metrics["bias"][59]) / np.sqrt(2 / 12) / 0.01
    assert step == pytest.approx(level, rel=1e-4)
    assert metrics["monitor/clip_factor"][60] == pytest.approx(level / 100.0, rel=1e-5)
    assert monitor.count("clips") == monitor.count("interventions") == 1


def test_a_loss_spike_with_a_small_gradient_is_not_called_clipped() -> None:
    losses, norms = noisy(70), noisy(70, seed=1)
    losses[60], norms[60] = 50.0, 0.1
    metrics, _, monitor = drive(losses, norms, on_spike="clip")
    assert flagged(metrics, "spike") == [60]
    assert flagged(metrics, "clipped") == []
    assert monitor.count("interventions") == 0


@pytest.mark.parametrize("policy", ["skip", "clip", "rollback", "stop"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_gradient_is_never_applied(policy: str, bad: float) -> None:
    norms = noisy(30)
    norms[20] = bad
    metrics, params, monitor = drive(noisy(30), norms, optimizer=ADAM, on_nonfinite=policy, on_spike="clip")
    assert flagged(metrics, "nonfinite") == [20]
    assert flagged(metrics, "skipped" if policy in ("skip", "clip") else "held") == [20]
    assert flagged(metrics, "clipped") == flagged(metrics, "nonfinite_loss") == []
    assert np.isfinite(jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])).all()
    assert np.isfinite(monitor.window).all()
    assert metrics["monitor/nonfinite_gradients"][20].all()
    assert not metrics["monitor/nonfinite_gradients"][21].any()


def test_a_non_finite_loss_with_finite_gradients_is_held_too() -> None:
    losses = noisy(30)
    losses[20] = np.nan
    metrics, _, _ = drive(losses)
    assert flagged(metrics, "skipped") == flagged(metrics, "nonfinite_loss") == [20]
    np.testing.assert_array_equal(metrics["bias"][20], metrics["bias"][19])


def test_policy_log_applies_a_nan_and_says_so() -> None:
    norms = noisy(30)
    norms[20] = np.nan
    metrics, params, _ = drive(noisy(30), norms, on_nonfinite="log")
    assert np.isnan(params["a"]["bias"]).all()
    assert flagged(metrics, "nonfinite")[0] == 20
    assert flagged(metrics, "skipped") == flagged(metrics, "held") == []


def test_an_update_that_is_not_finite_is_caught_though_its_gradient_was() -> None:
    def explode(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda u: u * jnp.inf, updates), state

    optimizer = optax.GradientTransformation(lambda params: optax.EmptyState(), explode)
    metrics, params, _ = drive([1.0], optimizer=optimizer, log_every=1)
    assert flagged(metrics, "skipped") == [0]
    assert metrics["monitor/nonfinite_params"].all()
    assert not metrics["monitor/nonfinite_gradients"].any()
    assert jax.tree.all(jax.tree.map(np.array_equal, params, PARAMS))


def test_a_gradient_that_is_not_finite_is_named() -> None:
    def step(monitor: MonitorState, gradients: Any) -> dict[str, Any]:
        return guarded_update(
            optax.sgd(0.1),
            loss=jnp.asarray(jnp.nan),
            gradients=gradients,
            params=PARAMS,
            optimizer_state=optax.sgd(0.1).init(PARAMS),
            monitor=monitor,
            policy=Policy(window=WINDOW),
            prefix="critic/",
        ).metrics

    monitor = init_monitor(PARAMS, Policy(window=WINDOW), "critic/")
    gradients = {**PARAMS, "b": {"kernel": jnp.array([[0.0, jnp.inf], [0.0, 0.0]])}}
    metrics = {name: np.asarray(value).tolist() for name, value in jax.jit(step)(monitor, gradients).items()}
    names = {prefix: m.leaf_names for prefix, m in monitors_of({"x": [monitor]}).items()}
    assert nonfinite_tensors(metrics, names) == ["critic/loss", "gradient of critic/b/kernel"]


def test_the_cap_is_flagged_and_still_nothing_bad_is_applied() -> None:
    norms = noisy(60)
    norms[[30, 40, 50]] = np.nan
    metrics, params, monitor = drive(noisy(60), norms, max_interventions=2)
    assert flagged(metrics, "skipped") == [30, 40, 50]
    assert flagged(metrics, "exhausted")[0] == 50
    assert monitor.count("interventions") == 3
    assert np.isfinite(params["a"]["bias"]).all()


def test_choose_keeps_what_belongs_to_a_dropped_update() -> None:
    update = GuardedUpdate(None, None, init_monitor(PARAMS, Policy()), {}, jnp.asarray(False))
    assert update.choose({"mean": 2.0}, {"mean": 1.0})["mean"] == 1.0
    assert dataclasses.replace(update, applied=jnp.asarray(True)).choose(2.0, 1.0) == 2.0


# --- blow-up --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "why"),
    [
        (noisy(150, seed=1, level=1e10), "out of all proportion"),
        (noisy(150, seed=1, level=1.0, noise=0.01), "as at the start: a network that predicts zero"),
        (np.full(150, np.nan), "never finite again"),
    ],
)
def test_a_loss_that_leaves_for_good_is_a_blowup(after: np.ndarray, why: str) -> None:
    learned = 0.4 + 0.6 * np.exp(-np.arange(200) / 30) + 0.005 * np.random.default_rng(4).normal(size=200)
    metrics, _, monitor = drive(np.concatenate([learned, after]), on_nonfinite="log")
    found = flagged(metrics, "blowup")
    assert len(found) == 1
    # Recent steps must turn over to the new level, then it must last.
    assert 200 + WINDOW <= found[0] + 1 <= 200 + WINDOW + PATIENCE + 2 * MEASURE_EVERY
    assert is_blown_up(monitor, Policy(window=WINDOW))


def test_a_loss_that_comes_back_is_no_blowup() -> None:
    losses = noisy(300, level=0.1)
    losses[150:170] = 10.0
    metrics, _, monitor = drive(losses, on_spike="log")
    assert flagged(metrics, "blowup") == []
    assert not is_blown_up(monitor, Policy(window=WINDOW))


def test_a_rise_by_design_is_no_blowup_when_not_watched_for() -> None:
    losses = np.concatenate([noisy(100, level=0.1), noisy(200, level=5.0)])
    assert flagged(drive(losses)[0], "blowup") != []
    assert flagged(drive(losses, watch_blowup=False)[0], "blowup") == []


# --- as a part of an experiment -------------------------------------------------------------------------------


def test_policy_takes_the_users_options() -> None:
    config = TrainConfig(on_spike="skip", on_nonfinite="log", spike_threshold=5.0, spike_window=64, max_interventions=3)
    policy = Policy.from_config(config, watch_blowup=False)
    assert policy == Policy("skip", "log", 5.0, 64, 3, config.log_every, watch_blowup=False)
    assert policy.patience == 16
    assert Policy(window=8).patience == 8


def test_the_state_holds_no_buffer_twice() -> None:
    leaves = jax.tree.leaves(init_monitor(PARAMS, Policy()))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_two_monitors_are_told_apart_by_their_prefix() -> None:
    policy = Policy()
    pair = {"g": init_monitor(PARAMS, policy, "generator/"), "c": init_monitor(PARAMS, policy, "critic/")}
    assert set(monitors_of(pair)) == {"generator/", "critic/"}
    with pytest.raises(ValueError, match="prefix ''"):
        monitors_of([init_monitor(PARAMS, policy), init_monitor(PARAMS, policy)])


def test_a_monitor_of_other_parameters_is_refused() -> None:
    monitor = init_monitor({"other": jnp.ones(2)}, Policy(window=WINDOW))
    with pytest.raises(ValueError, match="does not fit"):
        drive([1.0], monitor=monitor)


def test_inner_updates_lose_no_flag() -> None:
    inner = [{"monitor/critic/spike": jnp.asarray(i == 1), "x": jnp.asarray(float(i))} for i in range(3)]
    merged = merge_inner_metrics(inner)
    assert bool(merged["monitor/critic/spike"])
    assert merged["x"] == 2.0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision_gradients_have_float32_norms(dtype: Any) -> None:
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    metrics, after, _ = drive(noisy(20), 1e-3 * noisy(20), params=params, on_spike="clip")
    assert metrics["stability/grad_norm"].dtype == np.float32
    assert after["a"]["bias"].dtype == dtype
    # bfloat16 keeps 8 bits of each entry of the gradient.
    np.testing.assert_allclose(metrics["stability/grad_norm"], 1e-3 * noisy(20), rtol=5e-3)


def test_networks_that_are_vmapped_are_watched_one_by_one() -> None:
    policy = Policy(window=WINDOW, on_nonfinite="skip")
    optimizer = optax.sgd(0.1)

    def step(params: Any, loss: Any) -> Any:
        update = guarded_update(
            optimizer,
            loss=loss,
            gradients=params,
            params=params,
            optimizer_state=optimizer.init(params),
            monitor=init_monitor(params, policy),
            policy=policy,
        )
        return update.params, update.metrics["monitor/skipped"]

    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PARAMS)
    params, skipped = jax.jit(jax.vmap(step))(stacked, jnp.array([1.0, jnp.nan]))
    assert skipped.tolist() == [False, True]
    np.testing.assert_allclose(params["a"]["bias"], [[0.9, 0.9], [1.0, 1.0]])
