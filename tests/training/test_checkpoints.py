"""Checkpoints: every bit comes back, damage is noticed, and the right ones are kept."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.errors import CheckpointError, RunDirectoryError
from stabletrain.training import checkpoints as module
from stabletrain.training.checkpoints import Checkpoints, load_state
from stabletrain.training.devices import make_mesh, replicated
from stabletrain.training.state import state_hash
from tests.training.toy import ToyConfig, ToyExperiment, run_toy


def some_state(seed: int = 0) -> dict[str, Any]:
    """Every kind of leaf that a state may have."""
    key = jax.random.key(seed)
    return {
        "params": {"w": jax.random.normal(key, (64, 32)), "b": jnp.ones(3, jnp.bfloat16)},
        "key": key,
        "keys": jax.random.split(key, 2),
        "count": jnp.int32(7),
        "flags": jnp.array([True, False]),
        "odd": jnp.array([jnp.nan, jnp.inf, -0.0, 1e-45]),
        "empty": jnp.zeros((0, 4)),
        "nothing": None,
    }


def on_mesh(state: Any) -> Any:
    return jax.device_put(state, replicated(make_mesh(2, 2)))


def test_every_leaf_comes_back_to_the_last_bit(tmp_path: Path):
    state = on_mesh(some_state())
    checkpoints = Checkpoints(tmp_path)
    clock = {"step": 3, "values": [0.1, 1e-300, float("nan"), float("inf")], "none": None, "text": "é"}
    checkpoints.save(3, state, clock, wait=True)
    restored = Checkpoints(tmp_path).restore(jax.eval_shape(lambda: some_state()), replicated(make_mesh(2, 2)))
    assert restored is not None
    assert restored.step == 3
    assert str(restored.clock) == str(clock)
    assert state_hash(restored.state) == state_hash(state)
    assert str(jax.tree.structure(restored.state)) == str(jax.tree.structure(state))
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(restored.state)):
        assert (before.dtype, before.shape, before.sharding) == (after.dtype, after.shape, after.sharding)


def test_state_may_be_donated_while_it_is_being_saved(tmp_path: Path):
    """The next step reuses the buffers at once; the checkpoint must hold what was there before."""
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 3 + 1, state), donate_argnums=0)
    state = {"a": jnp.arange(2.0**18), "b": jnp.ones(2**18, jnp.bfloat16)}
    expected = [np.asarray(leaf, np.float32).copy() for leaf in jax.tree.leaves(state)]
    abstract = jax.eval_shape(lambda: state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    for _ in range(20):
        state = step(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    restored, _ = checkpoints.read(1, abstract)
    for before, after in zip(expected, jax.tree.leaves(restored)):
        np.testing.assert_array_equal(before, np.asarray(after, np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {**s, "count": jnp.zeros((2,), jnp.int32)},
            r"\['count'\] is int32\[\] there, int32\[2\] is expected",
        ),
        (lambda s: {**s, "count": jnp.float32(7)}, r"\['count'\] is int32\[\] there, float32\[\] is expected"),
        (lambda s: {**s, "more": jnp.zeros(2)}, r"\['more'\] is missing there, float32\[2\] is expected"),
        (lambda s: {k: v for k, v in s.items() if k != "odd"}, r"\['odd'\] is float32\[4\] there, missing is expected"),
    ],
)
def test_checkpoint_of_another_model_is_refused_and_stays(tmp_path: Path, change: Callable[..., Any], message: str):
    """Orbax would cast to another type silently."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, some_state(), {}, wait=True)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.restore(change(some_state()))
    assert checkpoints.steps == [1]


# --- damage ---------------------------------------------------------------------------------------------------


def largest_file(path: Path) -> Path:
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip(file: Path, at: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * at)] ^= 0x10
    file.write_bytes(content)


def truncate(path: Path) -> None:
    file = largest_file(path)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change_clock(path: Path) -> None:
    file = next(file for file in path.rglob("*") if file.is_file() and b'"digest"' in file.read_bytes())
    file.write_bytes(file.read_bytes().replace(b'"offset": 12', b'"offset": 13'))


def remove_each_file(path: Path) -> None:
    for file in path.rglob("*"):
        if file.is_file():
            file.unlink()


DAMAGES = {
    "truncated": truncate,
    "flipped bit in the middle": lambda path: flip(largest_file(path), 0.5),
    "flipped bit near the end": lambda path: flip(largest_file(path), 0.9),
    "removed array file": lambda path: largest_file(path).unlink(),
    "removed metadata": lambda path: (path / "_CHECKPOINT_METADATA").unlink(),
    "changed clock": change_clock,
    "emptied": remove_each_file,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(tmp_path: Path, damage: Callable[[Path], None]):
    checkpoints = Checkpoints(tmp_path)
    states = {step: some_state(step) for step in (4, 8)}
    for step, state in states.items():
        checkpoints.save(step, state, {"offset": 12}, wait=True)
    damage(tmp_path / "checkpoints" / "8")
    restored = checkpoints.restore(some_state())
    assert restored is not None
    assert restored.step == 4
    assert state_hash(restored.state) == state_hash(states[4])
    [(step, why)] = restored.damaged
    assert step == 8
    assert why
    assert checkpoints.steps == [4]
    assert (tmp_path / "checkpoints" / "8.damaged").is_dir(), "set aside, not deleted"


def test_no_readable_checkpoint_is_an_error_each_time(tmp_path: Path):
    """To begin again silently would cut off all rows."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, some_state(), {}, wait=True)
    truncate(tmp_path / "checkpoints" / "4")
    with pytest.raises(CheckpointError, match=r"no checkpoint .* can be read \(step 4: .*--fresh"):
        checkpoints.restore(some_state())
    with pytest.raises(CheckpointError, match=r"damaged; --fresh"):
        checkpoints.restore(some_state())


def test_other_format_is_told_apart_from_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "SCHEMA", 99)
        Checkpoints(tmp_path).save(4, some_state(), {}, wait=True)
    with pytest.raises(CheckpointError, match="has the format 99"):
        Checkpoints(tmp_path).restore(some_state())
    assert Checkpoints(tmp_path).steps == [4]


# --- which are kept -------------------------------------------------------------------------------------------


def saved(tmp_path: Path, steps: list[int], *, protect: set[int] = frozenset(), **options: Any) -> Checkpoints:  # type: ignore[assignment]
    checkpoints = Checkpoints(tmp_path, **options)
    for step in steps:
        checkpoints.save(step, {"a": jnp.float32(step)}, {}, protect=protect)
    checkpoints.wait()
    return checkpoints


def test_rotation_keeps_the_newest_and_the_protected(tmp_path: Path):
    assert saved(tmp_path, [10, 20, 30, 40, 50], keep=2, protect={20}).steps == [20, 40, 50]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["20", "40", "50"]


def test_unscheduled_checkpoints_do_not_push_out_scheduled_ones(tmp_path: Path):
    """Else what a rollback finds would depend on how often the run was interrupted."""
    checkpoints = saved(tmp_path, [10, 20, 23, 25], keep=1, scheduled=lambda step: step % 10 == 0)
    assert checkpoints.steps == [20, 25]


def test_checkpoints_of_an_abandoned_course_are_removed(tmp_path: Path):
    checkpoints = saved(tmp_path, [10, 20, 23, 25], keep=9)
    checkpoints.discard_after(20)
    assert checkpoints.steps == [10, 20]


def test_leftovers_are_neither_listed_nor_left(tmp_path: Path):
    checkpoints = saved(tmp_path, [10])
    for name in ("20.orbax-checkpoint-tmp", "5.deleting"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "part").touch()
    assert checkpoints.steps == [10]
    checkpoints.clean()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["10"]


# --- a full disk ----------------------------------------------------------------------------------------------


class Failing:
    """A save whose background part fails, as the array store words it."""

    def result(self) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: [OS error 28: ENOSPC No space left on device]")


@pytest.mark.parametrize("at_once", [True, False])
def test_full_disk_while_saving_is_readable_and_earlier_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
):
    checkpoints = saved(tmp_path, [10])

    def save(*_: Any, **__: Any) -> Failing:
        if at_once:
            raise OSError(errno.ENOSPC, "No space left on device")
        return Failing()

    monkeypatch.setattr(module.ocp, "save_async", save)
    with pytest.raises(RunDirectoryError, match=r"the disk is full.*Earlier ones are intact"):
        checkpoints.save(20, {"a": jnp.float32(1)}, {}, wait=True)
    assert checkpoints.steps == [10]


def test_a_step_is_never_written_twice(tmp_path: Path):
    """Orbax's checkpointer would skip it silently; a state that is not saved must be an error."""
    checkpoints = saved(tmp_path, [10])
    with pytest.raises(CheckpointError, match="already exists"):
        checkpoints.save(10, {"a": jnp.float32(1)}, {}, wait=True)


# --- for other commands ---------------------------------------------------------------------------------------


def test_newest_best_and_numbered_states_of_a_run(tmp_path: Path):
    run_toy(tmp_path / "run", best_metric="eval/loss", eval_every=8, keep_checkpoints=1)
    experiment = ToyExperiment(ToyConfig())
    state, step = load_state(experiment, tmp_path / "run")
    assert step == 24
    best, best_step = load_state(experiment, tmp_path / "run", "best")
    assert best_step in (8, 16, 24)
    assert (state_hash(best) == state_hash(state)) == (best_step == 24)
    assert load_state(experiment, tmp_path / "run", best_step)[1] == best_step
    assert load_state(experiment, tmp_path / "run", str(best_step))[1] == best_step
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 .*there are: .*24"):
        load_state(experiment, tmp_path / "run", 3)
    with pytest.raises(CheckpointError, match="unknown checkpoint 'last'"):
        load_state(experiment, tmp_path / "run", "last")
