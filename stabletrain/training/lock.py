"""One process at a time in a run directory.

The lock is the operating system's (`flock`): it ends with its process, however that ends. The file's content says who
holds it. Some network file systems do not carry such locks from one machine to another; there the heartbeat of
status.json tells whether another machine is at work. Some have no locks at all; there the process number tells
whether somebody on this machine is.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import weakref
from datetime import UTC, datetime
from pathlib import Path

from stabletrain.errors import RunDirectoryError

LOCK_FILE = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
STALE_SECONDS = 60.0  # a run on another machine that has not written a heartbeat for so long is dead


class RunLock:
    """Held from `acquire` to `release`, or to the end of the process."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._finalizer: weakref.finalize | None = None

    @property
    def held(self) -> bool:
        """True while this object holds the lock."""
        return self._finalizer is not None

    def acquire(self) -> None:
        """Takes the lock. Does nothing when it is already held by this object.

        Raises: `RunDirectoryError` when another process is at work here; `OSError` when the file cannot be written.
        """
        if self.held:
            return
        descriptor = os.open(self._run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunDirectoryError(self._in_use(_holder(descriptor))) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                self._refuse_living(_holder(descriptor))
            self._refuse_other_machine(_holder(descriptor))
            content = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, content, 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._finalizer = weakref.finalize(self, _release, descriptor)

    def release(self) -> None:
        """Gives the lock back. The file stays, empty: removing it could take the lock from somebody else."""
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None

    def _in_use(self, holder: dict[str, object]) -> str:
        who = f"process {holder['pid']} on {holder['host']}" if "pid" in holder else "another process"
        return f"{self._run_dir} is in use by {who}: wait for it, or stop it first"

    def _refuse_living(self, holder: dict[str, object]) -> None:
        pid = holder.get("pid")
        if holder.get("host") == socket.gethostname() and isinstance(pid, int) and _lives(pid):
            raise RunDirectoryError(f"{self._in_use(holder)}; if that is another program, remove {LOCK_FILE} there")

    def _refuse_other_machine(self, holder: dict[str, object]) -> None:
        if holder.get("host", socket.gethostname()) == socket.gethostname():
            return
        try:
            status = json.loads((self._run_dir / "status.json").read_text())
            age = (datetime.now(UTC) - datetime.fromisoformat(status["heartbeat"])).total_seconds()
        except (OSError, ValueError, KeyError, TypeError):
            return
        if status.get("state") == "running" and age < STALE_SECONDS:
            raise RunDirectoryError(
                f"{self._in_use(holder)} (it gave a sign of life {age:.0f} s ago; after {STALE_SECONDS:.0f} s without "
                "one it counts as dead)"
            )


def in_use(run_dir: Path) -> bool:
    """Whether another process of this machine is at work in a run directory, by what the lock file says.

    It takes no lock itself, so that it cannot be in the way of somebody who is about to.
    """
    try:
        with (run_dir / LOCK_FILE).open("rb") as file:
            holder = _holder(file.fileno())
    except OSError:
        return False
    pid = holder.get("pid")
    return holder.get("host") == socket.gethostname() and isinstance(pid, int) and pid != os.getpid() and _lives(pid)


def _holder(descriptor: int) -> dict[str, object]:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        return True
    return True


def _release(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.close(descriptor)
