"""Checkpoints: Orbax writes and reads the arrays; here is what it leaves open.

A checkpoint is the folder `checkpoints/<step>/`. It appears whole or not at all, and is never changed afterwards. It
holds the state, and as metadata the loop's clock, the layout of the state (name, shape and type of every leaf), a
checksum of every leaf, and a digest of all that. Reading checks every one of them: Orbax itself casts silently
to the asked type, and does not see flipped bits.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from stabletrain.errors import CheckpointError, RunDirectoryError
from stabletrain.training.devices import replicated
from stabletrain.training.experiment import Experiment, State
from stabletrain.training.state import abstract_state, checksums, named_leaves

SCHEMA = 1
FOLDER = "checkpoints"
UNFINISHED = "*.orbax-checkpoint-tmp"  # how Orbax names a checkpoint until it is complete
DELETING = ".deleting"
BEST = "best"
SECONDS_FOR_READS_UNDER_WAY = 0.2


@dataclass(frozen=True)
class Restored:
    """A state from a checkpoint, and what the loop had put beside it."""

    step: int
    state: State
    clock: dict[str, Any]
    damaged: tuple[tuple[int, str], ...] = ()
    """Newer checkpoints that could not be read, and why; they were set aside."""


class Checkpoints:
    """The checkpoints of one run.

    `keep`: how many of the newest scheduled ones to keep; `scheduled(step)` says which are. Those written because
    the run was interrupted, or because they were the best so far, do not count: what a rollback finds must not depend
    on them. `restore` and `save` are for the one process that trains; anybody may `read`.
    """

    def __init__(self, run_dir: Path, *, keep: int = 2, scheduled: Callable[[int], bool] = lambda step: True) -> None:
        self.folder = run_dir.absolute() / FOLDER
        self._keep = keep
        self._scheduled = scheduled
        self._in_progress: Any = None
        self._protected: Collection[int] = ()
        # Orbax writes an info line for each phase of each save, and warns of arrays that are whole on every device.
        logging.getLogger("absl").setLevel(logging.ERROR)

    @property
    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def clean(self) -> None:
        """Removes what a killed process left unfinished."""
        for pattern in (UNFINISHED, f"*{DELETING}"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    # --- writing ----------------------------------------------------------------------------------------------

    def save(
        self, step: int, state: State, clock: Mapping[str, Any], *, protect: Collection[int] = (), wait: bool = False
    ) -> None:
        """Saves in the background; with `wait` it is on disk when this returns. Then older ones are rotated away.

        `protect`: steps that are kept whatever their age (the best). The state may be donated right afterwards.

        Raises: `RunDirectoryError` when the disk is full or cannot be written, at the latest with the next `save`
        or `wait`; `CheckpointError` for any other failure.
        """
        self.wait()
        target = self.folder / str(step)
        if target.exists():
            raise CheckpointError(f"{target} already exists: a checkpoint is never changed")
        self._protected = protect
        metadata = _signed({"clock": dict(clock), "layout": _layout(state), "checksums": checksums(state)})
        with _readable_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._in_progress = ocp.save_async(target, _without_empty(state), custom_metadata=metadata)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Waits for a save in progress, then rotates. Raises as `save` does."""
        response, self._in_progress = self._in_progress, None
        if response is not None:
            with _readable_errors(self.folder):
                response.result()
            self._rotate()

    def point_to_best(self, step: int | None) -> None:
        """Names the best checkpoint in `checkpoints/best`; None when there is none (yet)."""
        with _readable_errors(self.folder):
            if step is None:
                (self.folder / BEST).unlink(missing_ok=True)
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = self.folder / f".{BEST}.tmp"
            unfinished.write_text(f"{step}\n")
            unfinished.replace(self.folder / BEST)

    @property
    def best(self) -> int | None:
        """The step that `checkpoints/best` names, if its checkpoint is there."""
        file = self.folder / BEST
        named = file.read_text().strip() if file.is_file() else ""
        return int(named) if named.isdecimal() and int(named) in self.steps else None

    def _rotate(self) -> None:
        steps = self.steps
        newest = [step for step in steps if self._scheduled(step)][-self._keep :]
        for step in set(steps) - {*newest, *self._protected, steps[-1]}:
            self._remove(step)

    def discard_after(self, step: int) -> None:
        """Removes the checkpoints beyond `step`: after a rollback they belong to a course that was given up."""
        self.wait()
        for newer in reversed(self.steps):
            if newer > step:
                self._remove(newer)

    def _remove(self, step: int) -> None:
        # Renamed first: a half-deleted folder must not look like a checkpoint.
        doomed = self.folder / f"{step}{DELETING}"
        with _readable_errors(self.folder):
            (self.folder / str(step)).rename(doomed)
            shutil.rmtree(doomed)

    # --- reading ----------------------------------------------------------------------------------------------

    def restore(
        self, abstract: State, sharding: Any = None, *, at: Callable[[int], bool] = lambda step: True
    ) -> Restored | None:
        """The newest readable checkpoint among the steps that `at` admits; None when there is none at all.

        `abstract`: shapes and types of the state. A damaged checkpoint is renamed to `<step>.damaged` and the one
        before it is taken.

        Raises: `CheckpointError` when there are checkpoints and none can be read, or when one is of another model.
        """
        damaged: list[tuple[int, str]] = []
        for step in reversed(self.steps):
            if not at(step):
                continue
            try:
                state, clock = self.read(step, abstract, sharding)
            except DamagedCheckpointError as error:
                damaged.append((step, error.why))
                self._set_aside(step)
            else:
                return Restored(step, state, clock, tuple(damaged))
        if damaged:
            listed = "; ".join(f"step {step}: {why}" for step, why in damaged)
            raise CheckpointError(f"no checkpoint in {self.folder} can be read ({listed}); --fresh begins a new run")
        if self.folder.is_dir() and any(self.folder.glob("*.damaged*")) and not self.steps:
            raise CheckpointError(f"every checkpoint in {self.folder} is damaged; --fresh begins a new run")
        return None

    def read(self, step: int, abstract: State, sharding: Any = None) -> tuple[State, dict[str, Any]]:
        """The state and the clock of one checkpoint, every byte of it checked. Changes nothing on disk.

        `sharding`: where to put each array; None: on the first device.

        Raises: `CheckpointError` when it is of another model or format, or there is none;
        `DamagedCheckpointError` (one of those) when it cannot be read.
        """
        path = self.folder / str(step)
        metadata = self._metadata(step)
        _compare_layouts(path, metadata["layout"], _layout(abstract))
        where = sharding or SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract)
        state = _attempt(path, lambda: ocp.load(path, _without_empty(abstract)))
        # Copied because Orbax may hand out buffers that it shares, and a state is donated.
        state = jax.tree.map(
            lambda leaf, found: found.copy() if leaf.size else jnp.zeros(leaf.shape, leaf.dtype, device=where),
            abstract,
            _with_empty(abstract, state),
        )
        if checksums(state) != metadata["checksums"]:
            raise DamagedCheckpointError(path, "its arrays do not match their checksums")
        return state, metadata["clock"]

    def clock(self, step: int) -> dict[str, Any]:
        """What the loop put beside the state. Raises: as `read`."""
        return self._metadata(step)["clock"]

    def _metadata(self, step: int) -> dict[str, Any]:
        path = self.folder / str(step)
        if not path.is_dir():
            steps = ", ".join(map(str, self.steps)) or "none"
            raise CheckpointError(f"no checkpoint of step {step} in {self.folder} (there are: {steps})")

        def stored() -> dict[str, Any]:
            found = ocp.metadata(path).custom_metadata
            return {key: found[key] for key in ("schema", "digest", "clock", "layout", "checksums")}

        metadata = _attempt(path, stored)
        schema, digest = metadata.pop("schema"), metadata.pop("digest")
        if schema != SCHEMA:
            raise CheckpointError(f"{path} has the format {schema!r}; this version of stabletrain reads {SCHEMA}")
        if digest != _signed(metadata)["digest"]:
            raise DamagedCheckpointError(path, "its metadata does not match its digest")
        return metadata

    def _set_aside(self, step: int) -> None:
        number, target = 1, self.folder / f"{step}.damaged"
        while target.exists():
            number += 1
            target = self.folder / f"{step}.damaged-{number}"
        with _readable_errors(self.folder):
            (self.folder / str(step)).rename(target)


def load_state(experiment: Experiment, run_dir: Path, which: str | int = "newest") -> tuple[State, int]:
    """The state of a run for sampling, evaluation or export, and its step. Changes nothing on disk.

    `which`: a step, `newest`, or `best` (the best by the run's `--best-metric`).

    Raises: `CheckpointError` when there is no such checkpoint, or it is damaged or of another model.
    """
    checkpoints = Checkpoints(run_dir)
    steps = checkpoints.steps
    if not steps:
        raise CheckpointError(f"{run_dir} has no checkpoint yet")
    if which == "newest":
        step = steps[-1]
    elif which == "best":
        if checkpoints.best is None:
            raise CheckpointError(f"{run_dir} has no best checkpoint: that needs --best-metric, and an evaluation")
        step = checkpoints.best
    elif str(which).isdecimal():
        step = int(which)
    else:
        raise CheckpointError(f"unknown checkpoint {which!r}: a step, newest or best")
    state, _ = checkpoints.read(step, abstract_state(experiment), replicated(experiment.mesh))
    return state, step


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that cannot be read, or whose content is not what was written."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"the checkpoint {path} is damaged: {why}")
        self.why = why


def _signed(metadata: Mapping[str, Any]) -> dict[str, Any]:
    canonical = json.dumps(metadata, sort_keys=True)
    return {"schema": SCHEMA, "digest": hashlib.sha256(canonical.encode()).hexdigest(), **metadata}


def _without_empty(tree: Any) -> Any:
    """Orbax refuses arrays without elements; they are left out, and made anew on reading."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)


def _with_empty(abstract: Any, tree: Any) -> Any:
    found = iter(jax.tree.leaves(tree))
    return jax.tree.map(lambda leaf: next(found) if leaf.size else leaf, abstract)


def _layout(tree: Any) -> dict[str, list[Any]]:
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in named_leaves(tree)}


def _compare_layouts(path: Path, stored: Mapping[str, list[Any]], wanted: Mapping[str, list[Any]]) -> None:
    for name in [*wanted, *stored]:
        if stored.get(name) != wanted.get(name):
            found, expected = _describe(stored.get(name)), _describe(wanted.get(name))
            raise CheckpointError(f"{path} holds another model: {name} is {found} there, {expected} is expected")


def _describe(layout: list[Any] | None) -> str:
    return "missing" if layout is None else f"{layout[1]}{layout[0]}"


def _attempt(path: Path, read: Callable[[], Any]) -> Any:
    """Whatever a damaged file makes Orbax raise becomes one error; a lack of memory is no damage."""
    with _leftovers_of_a_failure():
        try:
            return read()
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            lines = str(error).strip().splitlines()
            why = f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
        raise DamagedCheckpointError(path, why)


@contextlib.contextmanager
def _leftovers_of_a_failure() -> Iterator[None]:
    """Takes in what Orbax's other reads raise outside any call, when one of them failed.

    It reads all arrays at once and closes its event loop at the first failure. Reads under way then find the loop
    closed, in TensorStore's threads; coroutines never awaited warn when they are collected. Without this, Python
    prints all that at some later moment. After a success everything is passed on.
    """
    before, caught = sys.unraisablehook, list["sys.UnraisableHookArgs"]()
    sys.unraisablehook = caught.append
    try:
        yield
    except DamagedCheckpointError:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            time.sleep(SECONDS_FOR_READS_UNDER_WAY)
            gc.collect()
        caught.clear()
        raise
    finally:
        sys.unraisablehook = before
        for unraisable in caught:
            before(unraisable)


@contextlib.contextmanager
def _readable_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        text = str(error)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "ENOSPC" in text
        if full:
            raise RunDirectoryError(
                f"the disk is full: a checkpoint could not be written to {folder}. Earlier ones are intact: make room "
                "and repeat the command"
            ) from error
        if isinstance(error, OSError):
            raise RunDirectoryError(f"cannot write a checkpoint to {folder}: {error.strerror or error}") from error
        raise CheckpointError(f"a checkpoint could not be written to {folder}: {text}") from error
