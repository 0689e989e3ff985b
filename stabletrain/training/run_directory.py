"""The run directory: the public file format that the loop writes and everything else reads.

    config.toml      fully resolved            record.json    command, versions, devices, data, times
    status.json      state, step, heartbeat    metrics.jsonl  one object per logged step
    events.jsonl     what happened when        incidents/     the steps before something went wrong
    checkpoints/     samples/   eval/   report.html

An event has a `step`, a `time` and a `kind`: spike, nonfinite, blowup, rebaseline (what the monitor saw); skip, clip,
rollback, stop, exhausted, diverged (what was done); evaluation, best, checkpoint; resume, restart, interrupted,
damaged-checkpoint, changed-option, changed-devices (what happened to the process).

metrics.jsonl and events.jsonl only grow, but for one case: what stands beyond the point from which a run goes on
(after a crash, or a rollback) is cut off, so that no step stands there twice.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import socket
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from stabletrain.errors import ConfigChangedError, RunDirectoryError
from stabletrain.training.config import TrainConfig, difference, fields_of, read_toml, to_dict, to_toml
from stabletrain.training.lock import LOCK_FILE, RunLock

STATES = ("running", "done", "failed", "preempted", "diverged")


class RunDirectory:
    """One run's folder. Made by `create` (a new run, or the same one continued) or `open` (an existing one).

    `create` holds the folder for this process until `release`, or until the process ends.
    """

    def __init__(self, path: Path, family: str, config_values: Mapping[str, Any], changed: Mapping[str, Any]) -> None:
        self.path = path
        self.family = family
        self.config_values = dict(config_values)
        self.changed = dict(changed)
        """Options that may change and did, since the run was last started: name -> (before, now)."""
        self._lock = RunLock(path)

    @classmethod
    def create(cls, path: Path, family: str, config: TrainConfig, *, fresh: bool = False) -> Self:
        """The folder for this config: made if it is not there, continued if it holds the same run.

        `fresh` moves an old run aside to `<name>.old-<n>` first; nothing is ever deleted.

        Raises: `ConfigChangedError` with the difference when it holds a run of another config; `RunDirectoryError`
        when it holds another family's run or something that is no run, is in use, or cannot be written.
        """
        path = path.absolute()
        with readable_errors(path):
            if fresh and _content(path):
                _move_aside(path)
            if not is_run(path) and _content(path):
                raise RunDirectoryError(f"{path} is not empty and is no run of stabletrain: choose another --out")
            changed = _changes(path, family, config) if is_run(path) else {}
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, family, to_dict(config), changed)
            run.hold()
            try:
                run.write_file("config.toml", to_toml(config, family).encode())
            except BaseException:
                run.release()
                raise
            return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """An existing run, to read. Raises: `RunDirectoryError` when it is none."""
        path = path.absolute()
        if not is_run(path):
            raise RunDirectoryError(f"{path} is not a run directory (a run has a config.toml)")
        values = read_toml(path / "config.toml")
        return cls(path, str(values.pop("family", "unknown")), values, {})

    def hold(self) -> None:
        """Makes sure that no other process works here. Raises: `RunDirectoryError` when one does."""
        with readable_errors(self.path):
            self._lock.acquire()

    def release(self) -> None:
        """Lets other processes work here again."""
        self._lock.release()

    # --- whole files, replaced atomically ---------------------------------------------------------------------

    def write_file(self, name: str, content: bytes) -> Path:
        """Writes a file below the run directory; readers see the old content or the new, never a part."""
        target = self.path / name
        with readable_errors(self.path):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.tmp")
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(target)
        return target

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; empty where there is none. Raises: `RunDirectoryError` when it is damaged."""
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RunDirectoryError(f"{path} is damaged: {error}") from error

    @property
    def status(self) -> dict[str, Any]:
        """status.json."""
        return self.read_json("status.json")

    def write_status(self, state: str, step: int, total_steps: int, reason: str = "", **facts: Any) -> None:
        """status.json with a fresh heartbeat. `state` is one of `STATES`."""
        if state not in STATES:
            raise ValueError(f"unknown state {state!r}")
        status = {
            "state": state,
            "step": step,
            "total_steps": total_steps,
            "reason": reason,
            "heartbeat": now(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            **facts,
        }
        content = (json.dumps(status, indent=2) + "\n").encode()
        try:
            self.write_file("status.json", content)
        except RunDirectoryError:
            if state == "running" or not (self.path / "status.json").is_file():
                raise
            # On a full disk there is no room for a new file, but there is in the place of the old one.
            with readable_errors(self.path), (self.path / "status.json").open("r+b") as stream:
                stream.write(content)
                stream.truncate()

    @property
    def record(self) -> dict[str, Any]:
        """record.json."""
        return self.read_json("record.json")

    def update_record(self, **facts: Any) -> None:
        """Adds or replaces facts of record.json."""
        self.write_file("record.json", (json.dumps({**self.record, **facts}, indent=2, default=str) + "\n").encode())

    # --- lines ------------------------------------------------------------------------------------------------

    def append_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Adds a row to metrics.jsonl; non-finite values become null and are named in "nonfinite". Returns it so."""
        encoded = encode_row(row)
        self._append("metrics.jsonl", encoded)
        return encoded

    def append_event(self, step: int, kind: str, **details: Any) -> dict[str, Any]:
        """Adds an event to events.jsonl and returns it."""
        event = encode_row({"step": step, "time": now(), "kind": kind, **details})
        self._append("events.jsonl", event)
        return event

    def _append(self, name: str, value: Mapping[str, Any]) -> None:
        with readable_errors(self.path), (self.path / name).open("ab") as stream:
            stream.write((json.dumps(value, default=str) + "\n").encode())
            stream.flush()

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a torn last line is left out."""
        return list(self._lines("metrics.jsonl"))

    def events(self) -> list[dict[str, Any]]:
        """The events of events.jsonl; a torn last line is left out."""
        return list(self._lines("events.jsonl"))

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.path / name
        if not path.is_file():
            return
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):
                    return
                raise RunDirectoryError(f"{path}, line {number} is damaged: {error}") from error

    def count_events(self) -> int:
        """How many events there are."""
        path = self.path / "events.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def cut_rows(self, *, after: int) -> int:
        """Drops the rows of later steps, and a torn last line. Returns how many rows were dropped."""
        rows = self.rows()
        kept = [row for row in rows if row["step"] <= after]
        self._rewrite("metrics.jsonl", kept)
        return len(rows) - len(kept)

    def cut_events(self, *, after: int, but: Collection[str] = ()) -> None:
        """Keeps the first `after` events and, of the others, those of the kinds `but`; drops a torn last line."""
        events = self.events()
        self._rewrite("events.jsonl", events[:after] + [event for event in events[after:] if event["kind"] in but])

    def _rewrite(self, name: str, values: list[dict[str, Any]]) -> None:
        content = "".join(json.dumps(value) + "\n" for value in values).encode()
        path = self.path / name
        if path.is_file() and path.read_bytes() != content:
            self.write_file(name, content)


def encode_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Plain JSON values: non-finite numbers as null, their names in "nonfinite"."""
    bad = sorted(key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value))
    encoded = {key: None if key in bad else value for key, value in row.items()}
    return {**encoded, "nonfinite": bad} if bad else encoded


def now() -> str:
    """The time in UTC to the millisecond, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def is_run(path: Path) -> bool:
    """True for a folder with a run's config in it."""
    return (path / "config.toml").is_file()


def _content(path: Path) -> list[Path]:
    """What is in a folder, but for what a run leaves that was killed while it was being created."""
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"{path} is a file: choose another --out")
    ours = {LOCK_FILE, ".config.toml.tmp"}
    return [child for child in path.iterdir() if child.name not in ours] if path.is_dir() else []


def _move_aside(path: Path) -> None:
    if is_run(path):
        lock = RunLock(path)
        lock.acquire()  # a run at work is not taken away from under its process
        lock.release()
    number = 1
    while (target := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(target)


def _changes(path: Path, family: str, config: TrainConfig) -> dict[str, Any]:
    """The options that may change and did. Raises: as `RunDirectory.create`."""
    stored = read_toml(path / "config.toml")
    stored_family = stored.pop("family", "unknown")
    if stored_family != family:
        raise RunDirectoryError(f"{path} holds a run of {stored_family!r}, not of {family!r}: choose another --out")
    values = {key: value for key, value in to_dict(config).items() if value is not None}
    fields = fields_of(type(config))
    changed = difference(stored, values)
    refused = {key: pair for key, pair in changed.items() if key not in fields or fields[key].metadata["identity"]}
    if refused:
        shown = ", ".join(f"{key}: {_show(old)} -> {_show(new)}" for key, (old, new) in refused.items())
        raise ConfigChangedError(
            f"{path} was made with another configuration ({shown}): use its values, another --out, or --fresh"
        )
    return changed


def _show(value: Any) -> str:
    return "unset" if value is None else repr(value)


@contextlib.contextmanager
def readable_errors(path: Path) -> Iterator[None]:
    """Turns errors of the file system into one readable line (`RunDirectoryError`)."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunDirectoryError(
                f"the disk is full: cannot write to {path}. Make room and repeat the command, which goes on from the "
                "last complete checkpoint"
            ) from error
        raise RunDirectoryError(f"cannot write the run directory {path}: {error.strerror or error}") from error
