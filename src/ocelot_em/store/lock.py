"""One run at a time writes an output: a lock that a crash does not leave behind for ever.

A lock is an object ``lock/N`` of the output. Whoever creates it, atomically, holds it; where there
are several, the highest number does. Its holder writes it anew every few seconds, so that a lock
whose content no longer changes was left behind, and the next number may be taken. No clocks are
compared. Workers look at it before every tile: those of a run that has ended, or was replaced,
stop by themselves.
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

BEAT_SECONDS = 10.0
"""Between two writings of a lock by its holder."""

STALE_SECONDS = 90.0
"""So long a lock must not change before it counts as left behind: longer than file systems of a
network keep what they have read before they look again."""

LOOK_SECONDS = 1.0
"""Between two looks at a lock that may be left behind, and at one's own by workers."""

_KEY = re.compile(f"{FOLDER}/([0-9]{{1,15}})")

_MAX_NBYTES = 2**16
"""Of a lock; whatever is larger was not written here."""


class OutputLock:
    """The right to write an output; a context manager.

    Parameters
    ----------
    objects
        The output, which need not exist.
    on_wait
        Is told, once, that a lock may have been left behind and how long it is watched.
    """

    def __init__(
        self, objects: Objects, on_wait: Callable[[str], None] = lambda _says: None
    ) -> None:
        self._objects, self._on_wait = objects, on_wait
        self.id = uuid.uuid4().hex
        """Of this holder: numbers come again."""
        self._holder = {"id": self.id, **_this_process()}
        self._number = 0
        self._beat = 0
        self._wake = threading.Event()
        self._ended = False
        self._beating: threading.Thread | None = None
        self.left_behind: dict[str, object] | None = None
        """What a lock said that was left behind and is replaced."""
        self.lost = threading.Event()
        """Another run has replaced the lock, while this one was suspended or cut off."""
        self.stopping = threading.Event()
        """Workers are told to stop after the tile that they have in hand."""

    @property
    def key(self) -> str:
        """Key of the lock's object: what workers are told."""
        return f"{FOLDER}/{self._number}"

    @property
    def power_was_lost(self) -> bool:
        """Whether what an earlier run wrote may not have reached the disk.

        It ended without giving its lock back, and not on this machine since it was started.
        """
        return self.left_behind is not None and self.left_behind.get("boot") != _boot()

    def stop(self) -> None:
        """Tell all workers to stop after the tile that they have in hand; returns at once."""
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
        self._beating = threading.Thread(target=self._keep, name="ocelot-lock", daemon=True)
        self._beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lock back."""
        try:
            # Without a lock nobody would doubt, after a loss of power, what was written under it.
            self._objects.sync()
        except StorageError as error:
            log.warning("the lock stays: %s", error)
        else:
            self._end_beating()
            with contextlib.suppress(StorageError):  # it will be found left behind
                self._objects.delete_one(self.key)
        finally:
            self._end_beating()

    def _end_beating(self) -> None:
        self._ended = True
        self._wake.set()
        if self._beating is not None:
            self._beating.join()

    def _taken(self) -> bool:
        """Try to take the lock."""
        held = _highest(self._objects)
        if held is not None:
            self._wait_until_left_behind(held)
        self._number = 0 if held is None else held + 1
        # A request may be answered with an error after it was carried out, and be sent again.
        if not self._objects.create(self.key, self._content()) and not self._is_mine():
            return False
        if _highest(self._objects) != self._number:  # others were faster, twice
            return False
        for number in range(self._number):
            self._objects.delete_one(f"{FOLDER}/{number}")
        return True

    def _wait_until_left_behind(self, number: int) -> None:
        """Return when a lock is known to be left behind, or was given back.

        Raises
        ------
        OutputLockedError
            It is not: its holder lives.
        """
        key = f"{FOLDER}/{number}"
        first = self._objects.get(key, _MAX_NBYTES)
        if first is None:
            return
        holder = _parsed(first)
        alive = _lives(holder)
        deadline = time.monotonic() + STALE_SECONDS
        told = False
        while alive is None and time.monotonic() < deadline:
            if not told:
                told = True
                self._on_wait(
                    f"{self._objects.url}: locked by {_named(holder)}; waiting up to "
                    f"{STALE_SECONDS:.0f} s to see whether that run still lives"
                )
            time.sleep(LOOK_SECONDS)
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
        log.warning("%s: the lock of %s was left behind", self._objects.url, _named(holder))
        self.left_behind = holder

    def _is_mine(self) -> bool:
        found = self._objects.get(self.key, _MAX_NBYTES)
        return found is not None and _parsed(found).get("id") == self.id

    def _content(self) -> bytes:
        state = {"beat": self._beat, "stops": self.stopping.is_set()}
        return json.dumps({**self._holder, **state}).encode()

    def _keep(self) -> None:
        """Write the lock anew, again and again, until it is given back or lost."""
        while True:
            self._wake.wait(BEAT_SECONDS)
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
                log.warning("the lock could not be written: %s", error)


class RunLease:
    """What a worker may do: whether the run that it works for still goes on.

    Parameters
    ----------
    objects
        The output.
    key, holder
        Of the run's lock.
    """

    def __init__(self, objects: Objects, key: str, holder: str) -> None:
        self._objects, self._key, self._holder = objects, key, holder
        self._looking = threading.Lock()
        self._looked = float("-inf")
        self._goes_on = True

    @property
    def is_held(self) -> bool:
        """As of a moment ago.

        Raises
        ------
        StorageError
            That cannot be told.
        """
        with self._looking:
            if self._goes_on and time.monotonic() - self._looked > LOOK_SECONDS:
                content = _parsed(self._objects.get(self._key, _MAX_NBYTES) or b"{}")
                stops = content.get("stops", True)
                self._goes_on = content.get("id") == self._holder and not stops
                self._looked = time.monotonic()
            return self._goes_on


def _highest(objects: Objects) -> int | None:
    """Return the number of the lock that counts."""
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
    """Name the time since this machine was started, and the space of its process numbers."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return f"{psutil.boot_time():.0f}"


def _lives(holder: dict[str, object]) -> bool | None:
    """Whether the process that wrote a lock lives; None if that cannot be known here."""
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
