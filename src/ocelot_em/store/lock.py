"""A lock that lets one run at a time write an output, and that becomes stale after a crash.

A lock is an object ``lock/N`` of the output. The run that creates it, atomically, holds it; if
there are several, the highest number counts. Its holder rewrites it every few seconds as a
heartbeat. A lock without a heartbeat is stale, and another run may take the next number. No clocks
are compared. Workers check the lock before every tile and stop if their run has ended or was
replaced.
"""

import contextlib
import json
import logging
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Self

import psutil

from ocelot_em.errors import OutputLockedError, StorageError
from ocelot_em.store.contract import Objects

log = logging.getLogger(__name__)

FOLDER = "lock"

HEARTBEAT_SECONDS = 10.0
"""Time between two heartbeats of a lock's holder."""

STALE_SECONDS = 90.0
"""Time without a heartbeat after which a lock is stale; longer than network file systems cache."""

CHECK_SECONDS = 1.0
"""Time between two checks of a possibly stale lock, and of a worker's own."""

_KEY = re.compile(f"{FOLDER}/([0-9]{{1,15}})")

_MAX_NBYTES = 2**16
"""Size limit of a lock's object; this package writes smaller ones."""


class OutputLock:
    """The exclusive right to write an output; a context manager.

    Parameters
    ----------
    objects
        The output, which need not exist.
    on_wait
        Called once with a message when a lock may be stale and is watched.
    """

    def __init__(
        self, objects: Objects, on_wait: Callable[[str], None] = lambda _message: None
    ) -> None:
        self._objects, self._on_wait = objects, on_wait
        self.id = uuid.uuid4().hex
        """Unique id of this holder; lock numbers are reused."""
        self._holder = {"id": self.id, **_this_process()}
        self._number = 0
        self._beat = 0
        self._wake = threading.Event()
        self._ended = False
        self._heartbeat_thread: threading.Thread | None = None
        self.replaced_holder: dict[str, object] | None = None
        """Content of the stale lock that this one replaces."""
        self.lost = threading.Event()
        """Set if another run replaced the lock while this one was suspended or disconnected."""
        self.stopping = threading.Event()
        """Set if workers must stop after their current tile."""

    @property
    def key(self) -> str:
        """Key of the lock's object, which workers receive."""
        return f"{FOLDER}/{self._number}"

    @property
    def power_was_lost(self) -> bool:
        """Whether the data of an earlier run may not have reached the disk.

        True if it ended without releasing its lock, and not on this machine since the last boot.
        """
        return self.replaced_holder is not None and self.replaced_holder.get("boot") != _boot()

    def stop(self) -> None:
        """Ask all workers to stop after their current tile, without waiting for them."""
        self.stopping.set()
        self._wake.set()

    def __enter__(self) -> Self:
        """Take the lock.

        Raises
        ------
        OutputLockedError
            Another run holds it.
        """
        while not self._taken():
            pass
        self._heartbeat_thread = threading.Thread(
            target=self._write_heartbeats, name="ocelot-lock", daemon=True
        )
        self._heartbeat_thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        try:
            # Sync first: once the lock is gone, later runs trust the data, even after a power loss.
            self._objects.sync()
        except StorageError as error:
            log.warning("the lock is not released: %s", error)
        else:
            self._end_heartbeat()
            with contextlib.suppress(StorageError):  # it becomes stale
                self._objects.delete_one(self.key)
        finally:
            self._end_heartbeat()

    def _end_heartbeat(self) -> None:
        self._ended = True
        self._wake.set()
        if self._heartbeat_thread is not None:
            self._heartbeat_thread.join()

    def _taken(self) -> bool:
        """Try to take the lock."""
        held = _highest(self._objects)
        if held is not None:
            self._wait_until_stale(held)
        self._number = 0 if held is None else held + 1
        # A request may succeed but return an error, and then be retried.
        if not self._objects.create(self.key, self._content()) and not self._is_mine():
            return False
        if _highest(self._objects) != self._number:  # another run took a higher number
            return False
        for number in range(self._number):
            self._objects.delete_one(f"{FOLDER}/{number}")
        return True

    def _wait_until_stale(self, number: int) -> None:
        """Wait until a lock is known to be stale, or was released.

        Raises
        ------
        OutputLockedError
            Its holder is alive.
        """
        key = f"{FOLDER}/{number}"
        first = self._objects.get(key, _MAX_NBYTES)
        if first is None:
            return
        holder = _parsed(first)
        alive = _is_alive(holder)
        deadline = time.monotonic() + STALE_SECONDS
        has_notified = False
        while alive is None and time.monotonic() < deadline:
            if not has_notified:
                has_notified = True
                self._on_wait(
                    f"{self._objects.url}: locked by {_named(holder)}; waiting up to "
                    f"{STALE_SECONDS:.0f} s for a heartbeat of that run"
                )
            time.sleep(CHECK_SECONDS)
            content = self._objects.get(key, _MAX_NBYTES)
            if content is None:
                return
            if content != first:
                alive = True
        if alive:
            raise OutputLockedError(
                f"{self._objects.url}: another run is writing it: {_named(holder)}; wait until it "
                "has ended, or stop it"
            )
        log.warning("%s: replacing the stale lock of %s", self._objects.url, _named(holder))
        self.replaced_holder = holder

    def _is_mine(self) -> bool:
        found = self._objects.get(self.key, _MAX_NBYTES)
        return found is not None and _parsed(found).get("id") == self.id

    def _content(self) -> bytes:
        state = {"beat": self._beat, "stops": self.stopping.is_set()}
        return json.dumps({**self._holder, **state}).encode()

    def _write_heartbeats(self) -> None:
        """Write heartbeats until the lock is released or lost."""
        while True:
            self._wake.wait(HEARTBEAT_SECONDS)
            self._wake.clear()
            if self._ended:
                return
            try:
                if _highest(self._objects) not in (None, self._number):
                    self.lost.set()
                    self.stopping.set()
                    return
                self._beat += 1
                self._objects.put(self.key, [self._content()])
            except StorageError as error:
                log.warning("the heartbeat could not be written: %s", error)


class RunLease:
    """A worker's view of its run's lock: whether the run is still active.

    Parameters
    ----------
    objects
        The output.
    key, holder
        Key of the run's lock and id of its holder.
    """

    def __init__(self, objects: Objects, key: str, holder: str) -> None:
        self._objects, self._key, self._holder = objects, key, holder
        self._checking = threading.Lock()
        self._checked_at = float("-inf")
        self._is_held = True

    @property
    def is_held(self) -> bool:
        """Whether the run still holds its lock and is not stopping; cached briefly.

        Raises
        ------
        StorageError
            The lock cannot be read.
        """
        with self._checking:
            if self._is_held and time.monotonic() - self._checked_at > CHECK_SECONDS:
                content = _parsed(self._objects.get(self._key, _MAX_NBYTES) or b"{}")
                stops = content.get("stops", True)
                self._is_held = content.get("id") == self._holder and not stops
                self._checked_at = time.monotonic()
            return self._is_held


def _highest(objects: Objects) -> int | None:
    """Return the highest lock number, or None if there is no lock."""
    found = map(_KEY.fullmatch, objects.keys(FOLDER))
    return max((int(match[1]) for match in found if match), default=None)


def _this_process() -> dict[str, object]:
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": process.pid,
        "process_started": process.create_time(),
    }


def _boot() -> str:
    """Identify the boot of this machine and its process id namespace."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return f"{psutil.boot_time():.0f}"


def _is_alive(holder: dict[str, object]) -> bool | None:
    """Whether the process that wrote a lock is alive; None if unknown on this machine."""
    this, pid = _this_process(), holder.get("pid")
    if any(holder.get(name) != this[name] for name in ("host", "boot")) or not isinstance(pid, int):
        return None
    try:
        return bool(psutil.Process(pid).create_time() == holder.get("process_started"))
    except (psutil.Error, ValueError, OverflowError):
        return False


def _parsed(content: bytes) -> dict[str, object]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _named(holder: dict[str, object]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"
