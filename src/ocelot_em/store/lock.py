"""A lock that lets one run at a time write an output, and that becomes stale after a crash.

A lock is an object ``lock/N`` of the output. The run that creates it, atomically, holds it; if
there are several, the highest number counts. Its holder rewrites it every few seconds as a
heartbeat. A lock without a heartbeat is stale, and another run may take the next number. No clocks
are compared. Workers check the lock before every tile and stop if their run has ended or was
replaced.
"""

import contextlib
import datetime
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Self

from ocelot_em.errors import LockLostError, OutputLockedError, StorageError
from ocelot_em.store import fence
from ocelot_em.store.contract import Objects
from ocelot_em.store.fence import (
    CHECK_SECONDS,
    FOLDER,
    MAX_NBYTES,
    RunLease,
    highest,
    hold,
    named,
    numbers,
    parsed,
)

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
"""Time between two heartbeats of a lock's holder."""

STALE_SECONDS = 90.0
"""Time without a heartbeat after which a lock is stale; longer than network file systems cache."""

_held_here: set[str] = set()
"""Ids of the locks that this process holds or is about to take."""


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
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._holder = {"id": self.id, "since": since, **this_process()}
        self._lease = RunLease(objects, f"{FOLDER}/0", self.id)
        self.objects = hold(objects, self._lease)
        """The output, in which each write needs this lock."""
        self._beat = 0
        self._wake = threading.Event()
        self._ended = False
        self._heartbeat_thread: threading.Thread | None = None
        self._stale: dict[str, object] = {}
        self.lost = threading.Event()
        """Set if another run replaced the lock while this one was suspended or disconnected."""
        self.stopping = threading.Event()
        """Set if workers must stop after their current tile."""

    @property
    def key(self) -> str:
        """Key of the lock's object, which workers receive."""
        return self._lease.key

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
        _held_here.add(self.id)
        try:
            # Usually there is no lock. A bucket is not asked first: that takes a round trip. In a
            # directory, whoever takes a stale lock over ends the rights of all that try, too.
            if self._objects.requests is None or not self._taken(None):
                while not self._taken(highest(self._objects)):
                    pass
        except BaseException:
            self._end()
            raise
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
            # If it cannot be deleted, it becomes stale; this process can take it at once.
            with contextlib.suppress(StorageError, LockLostError):
                self.objects.delete_one(self.key)
        finally:
            self._end_heartbeat()
            self._end()

    def _end(self) -> None:
        _held_here.discard(self.id)
        self.objects.release()

    def _end_heartbeat(self) -> None:
        self._ended = True
        self._wake.set()
        if self._heartbeat_thread is not None:
            self._heartbeat_thread.join()

    def prove(self) -> None:
        """Check that this run still holds the lock.

        Raises
        ------
        LockLostError, StorageError
        """
        try:
            self._lease.prove()
        except LockLostError:
            self.lost.set()
            self.stopping.set()
            raise

    def _taken(self, held: int | None) -> bool:
        """Try to take the lock; ``held`` is the highest number there is, as far as is known."""
        if held is not None:
            self._wait_until_stale(held)
        own = 0 if held is None else held + 1
        self._lease.key = f"{FOLDER}/{own}"
        # Before the lock exists, so that whoever takes this lock over finds it.
        self.objects.claim()
        started = fence.now()
        # A request may succeed but return an error, and then be retried.
        if not self._objects.create(self.key, self._content()) and self._id_of(own) != self.id:
            return False
        others = [number for number in numbers(self._objects) if number != own]
        if others and (max(others) != held or self._id_of(max(others)) != self._stale.get("id")):
            # Another run took a lock after this one had looked.
            self._objects.delete_one(self.key)
            return False
        self._lease.proved(started)  # with the list that was read since then
        self.objects.take_over()
        for number in others:
            self.objects.delete_one(f"{FOLDER}/{number}")
        return True

    def _wait_until_stale(self, number: int) -> None:
        """Wait until a lock is known to be stale, or was released.

        Raises
        ------
        OutputLockedError
            Its holder is alive.
        """
        key = f"{FOLDER}/{number}"
        first = self._objects.get(key, MAX_NBYTES)
        self._stale = holder = parsed(first or b"{}")
        if first is None:
            return
        alive = _is_alive(holder)
        deadline = time.monotonic() + STALE_SECONDS
        has_notified = False
        while alive is None and time.monotonic() < deadline:
            if not has_notified:
                has_notified = True
                self._on_wait(
                    f"{self._objects.url}: locked by {named(holder)}; waiting up to "
                    f"{STALE_SECONDS:.0f} s for a heartbeat of that run"
                )
            time.sleep(CHECK_SECONDS)
            content = self._objects.get(key, MAX_NBYTES)
            if content is None:
                return
            if content != first:
                alive = True
        if alive:
            raise OutputLockedError(
                f"{self._objects.url}: another run is writing it: {named(holder)}; wait until it "
                "has ended, or stop it"
            )
        log.warning("%s: replacing the stale lock of %s", self._objects.url, named(holder))

    def _id_of(self, number: int) -> object:
        return parsed(self._objects.get(f"{FOLDER}/{number}", MAX_NBYTES) or b"{}").get("id")

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
                if highest(self._objects) not in (None, int(self.key.rpartition("/")[2])):
                    self._lease.lost()
                self.prove()
                self._beat += 1
                self.objects.put(self.key, [self._content()])
            except LockLostError as error:
                log.error("%s", error)
                self.lost.set()
                self.stopping.set()
                return
            except StorageError as error:
                log.warning("the heartbeat could not be written: %s", error)


def this_process() -> dict[str, object]:
    """Identify this process among those of all machines."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "started": _started(pid)}


def _boot() -> str:
    """Identify the boot of this machine and its process id namespace."""
    with contextlib.suppress(OSError):
        return f"{kernel_id()} {Path('/proc/self/ns/pid').readlink()}"
    return kernel_id()


def kernel_id() -> str:
    """Identify the running kernel, in whose memory files are until they are on the disk."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    import psutil

    return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _started(pid: int) -> float | None:
    """Return when a process started; None if it cannot be looked up, or has ended.

    On Linux in ticks since the boot, which do not change when the clock is set. Elsewhere in
    seconds, as the system recorded them then.
    """
    if not Path("/proc/self/stat").exists():
        import psutil

        try:
            return float(psutil.Process(pid).create_time())
        except (psutil.Error, ValueError, OverflowError):
            return None
    try:
        # Fields 3 and 22; field 2 is a name, which may contain anything.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _is_alive(holder: dict[str, object]) -> bool | None:
    """Whether the process that wrote a lock is alive; None if unknown on this machine."""
    this, pid = this_process(), holder.get("pid")
    if (
        any(holder.get(name) != this[name] for name in ("host", "boot"))
        or type(pid) is not int
        or pid < 1
    ):
        return None
    if "started" not in holder:  # written by an earlier version
        return None
    started = _started(pid)
    if pid == os.getpid() and started == holder["started"]:
        return holder.get("id") in _held_here
    return None if started is None and _is_hidden(pid) else started == holder["started"]


def has_ended(process: dict[str, object]) -> bool:
    """Whether a process, as :func:`this_process` described it, is known to have ended."""
    return process != this_process() and _is_alive(process) is False


def _is_hidden(pid: int) -> bool:
    """Whether a process exists, but belongs to another user; its start may be hidden."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return False
