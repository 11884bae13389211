"""The right to write an output, which ends for good when another run takes the output over.

A run proves that it holds its lock by reading it. Between that and a write, its process can be
stopped for any time. In a directory, each write therefore ends with a single system call that fails
unless the run's own folder, ``lock/#ID``, exists: new files are renamed out of it, and deleted ones
into it. Whoever takes over moves that folder into its own first. Buckets have no such call; there,
what a stopped process had already sent can still arrive, and the manifest reveals it.
"""

import contextlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

from ocelot_em.errors import LockLostError
from ocelot_em.store.bucket import BucketObjects, MemoryObjects
from ocelot_em.store.contract import Objects, T
from ocelot_em.store.local import NEW_FILE, LocalObjects, new_suffix
from ocelot_em.store.result_shards import OwnShards

FOLDER = "lock"

CHECK_SECONDS = 1.0
"""Age of a proof, in seconds, from which on the next write needs a new one; also the time between
two checks of a possibly stale lock."""

MAX_NBYTES = 2**16
"""Size limit of a lock's object; this package writes smaller ones."""

_KEY = re.compile(f"{FOLDER}/([0-9]{{1,15}})")
_OWN_FOLDER = re.compile(r"#\d+")
_REPLACED = "replaced"
"""Folder in a run's own folder for a result that it replaces."""


def now() -> float:
    """Return seconds of a clock that never goes back, and also counts while a machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class RunLease:
    """The proof that a run holds the lock of its output, for its driver and its workers.

    Parameters
    ----------
    objects
        The output.
    key, holder
        Key of the run's lock and id of its holder.
    """

    def __init__(self, objects: Objects, key: str, holder: str) -> None:
        self._objects, self.key, self.holder = objects, key, holder
        self._checking = threading.Lock()
        self._lost: LockLostError | None = None
        self._stops = False
        self._proved_at = self._valid_from = float("-inf")

    def expire(self) -> None:
        """Make the next write prove the lock again, by a proof that begins from now on."""
        self._valid_from = now()

    def proved(self, started: float) -> None:
        """Note a proof that began at a time of :func:`now`."""
        self._proved_at = max(started, self._proved_at)

    def _is_proved(self, since: float) -> bool:
        is_fresh = now() - self._proved_at < CHECK_SECONDS
        return self._lost is None and is_fresh and self._proved_at >= since

    def prove(self) -> None:
        """Read the lock.

        Raises
        ------
        LockLostError
            It is another one, or gone; it stays lost.
        StorageError
            The lock cannot be read.
        """
        if self._lost is not None:
            raise self._lost
        started = now()
        content = parsed(self._objects.get(self.key, MAX_NBYTES) or b"{}")
        if content.get("id") != self.holder:
            raise self.lost()
        self._stops = bool(content.get("stops", True))
        self.proved(started)

    def refresh(self) -> None:
        """Prove the lock, unless that has just been done.

        Raises
        ------
        LockLostError, StorageError
        """
        # What expires while this thread waits concerns later writes: if it counted here as well,
        # each of many threads would need a proof of its own, one after the other.
        since = self._valid_from
        with self._checking:
            if not self._is_proved(since):
                self.prove()

    def lost(self) -> LockLostError:
        """Return the error of a run that holds its lock no more."""
        if self._lost is None:
            number = highest(self._objects)
            found = self._objects.get(f"{FOLDER}/{number}", MAX_NBYTES)
            who = "its lock is gone, because another run has written or deleted the output"
            if found is not None:
                who = f"{named(parsed(found))} has taken it over"
            self._lost = LockLostError(
                f"{self._objects.url}: this run no longer holds the output, and writes nothing "
                f"more: {who}; a run that cannot renew its lock, because it was suspended or "
                "disconnected, is replaced; wait until no run writes the output, then run the same "
                "command again"
            )
        return self._lost

    @property
    def is_held(self) -> bool:
        """Whether the run still holds its lock and is not stopping.

        Raises
        ------
        StorageError
            The lock cannot be read.
        """
        try:
            if not self._is_proved(float("-inf")):  # no tile waits for the proof of another's mark
                self.refresh()
        except LockLostError:
            return False
        return not self._stops


class HeldObjects(Objects, Protocol):
    """An output that a run holds: every write needs the lock, and raises LockLostError without."""

    lease: RunLease
    appends: bool
    """Whether chunks are appended to shards."""

    def commit(self) -> None:
        """Make all chunks visible that were written before."""

    def rest(self) -> None:
        """Close the files of shards; more may be written nevertheless."""

    def claim(self) -> None:
        """Prepare to hold the output, before the lock is created."""

    def take_over(self) -> None:
        """End the right of all earlier holders to write."""

    def set_aside(self) -> None:
        """Take the present result away, so that a new one can be written in its place."""

    def delete_replaced(self) -> None:
        """Delete the result that was set aside, once the new one exists."""

    def release(self) -> None:
        """End the right of this run to write."""


class _Held(BucketObjects):
    """Proves the lock before each attempt to write."""

    def __init__(self, url: str, lease: RunLease) -> None:
        super().__init__(url)
        self.lease, self.appends, self._shards = lease, False, OwnShards(self)

    def put(self, key: str, parts: Sequence[bytes]) -> None:
        if not (self.appends and self._shards.put(key, parts)):
            super().put(key, parts)

    def commit(self) -> None:
        """Make all chunks visible that were written before."""
        self._shards.commit()

    def rest(self) -> None:
        """Close the files of shards; more may be written nevertheless."""
        self._shards.rest()

    def _guard(self, verb: str, key: str, action: Callable[[], T]) -> T:
        def proven() -> T:
            if verb in ("write", "create", "delete"):
                self.lease.refresh()
            return action()

        return super()._guard(verb, key, proven)


class _HeldBucket(_Held):
    """A bucket; a request that was sent before the lock was lost cannot be called back."""

    def claim(self) -> None:
        """Do nothing."""

    def take_over(self) -> None:
        """Do nothing: proofs of earlier holders fail."""

    def set_aside(self) -> None:
        """Delete all but the root, so that a run that is killed meanwhile can be repeated."""
        for folder in self.children(""):
            if folder != FOLDER:
                self.delete(folder)

    def delete_replaced(self) -> None:
        """Do nothing."""

    def release(self) -> None:
        """Do nothing."""


class _HeldMemory(_HeldBucket, MemoryObjects):
    """Memory, as a bucket."""


class _HeldFolder(_Held, LocalObjects):
    """A directory, in which a write is a rename out of the run's own folder."""

    @cached_property
    def _own(self) -> Path:
        return Path(self.url, FOLDER, f"#{int(self.lease.holder, 16)}")

    def claim(self) -> None:
        def action() -> None:
            self._path(f"{FOLDER}/")  # which must not be a link that leads elsewhere
            self._own.mkdir(parents=True, exist_ok=True)

        super(_Held, self)._guard("open", "", action)

    def take_over(self) -> None:
        """Move the folders of earlier holders into this one's, and restore what they replaced."""

        def action() -> None:
            for other in Path(self.url, FOLDER).iterdir():
                if other == self._own or not _OWN_FOLDER.fullmatch(other.name):
                    continue
                replaced = other / _REPLACED
                with contextlib.suppress(FileNotFoundError):  # its run gave up meanwhile
                    if replaced.is_dir() and not (other.is_symlink() or replaced.is_symlink()):
                        self._while_held(partial(replaced.rename, self._aside))
                    self._discard(other)
                if self._aside.is_dir():
                    self._restore()

        self._guard("write", FOLDER, action)

    @property
    def _aside(self) -> Path:
        return self._own / _REPLACED

    def set_aside(self) -> None:
        """Move everything but the lock into this run's folder; the root first."""

        def action() -> None:
            self._while_held(lambda: self._aside.mkdir(exist_ok=True))
            for path in sorted(Path(self.url).iterdir(), key=_is_root, reverse=True):
                if path.name != FOLDER:
                    self._while_held(partial(path.rename, self._aside / path.name))

        self._guard("write", "", action)

    def _restore(self) -> None:
        """Move back what a run had set aside that was killed before it wrote a new root."""
        if not Path(self.url, "zarr.json").exists():
            for path in sorted(self._aside.iterdir(), key=_is_root):
                path.rename(Path(self.url, path.name))
        shutil.rmtree(self._aside)

    def delete_replaced(self) -> None:
        if self._aside.is_dir():
            self._guard("delete", FOLDER, lambda: shutil.rmtree(self._aside))

    def release(self) -> None:
        with contextlib.suppress(OSError):
            if self._aside.is_dir():
                self._restore()
            shutil.rmtree(self._own)
        with contextlib.suppress(OSError):
            for folder in (self._own.parent, self.url):
                Path(folder).rmdir()

    def _stage(self, _target: str) -> tuple[str, int]:
        staged = f"{self._own}/{new_suffix()}"
        return staged, self._while_held(lambda: os.open(staged, NEW_FILE, 0o666))

    def _publish(self, move: Callable[[], object], target: str) -> None:
        try:
            move()
        except FileNotFoundError:
            self._require_own()
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            self._while_held(move)

    def _discard(self, path: Path) -> None:
        aside = self._own / new_suffix()
        self._while_held(lambda: path.rename(aside))
        super()._discard(aside)

    def _while_held(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except FileNotFoundError:
            self._require_own()
            raise

    def _require_own(self) -> None:
        if not self._own.is_dir():
            raise self.lease.lost()


def hold(objects: Objects, lease: RunLease) -> HeldObjects:
    """Return an output whose every write needs a run's lock."""
    if isinstance(objects, LocalObjects):
        return _HeldFolder(objects.url, lease)
    kind = _HeldMemory if isinstance(objects, MemoryObjects) else _HeldBucket
    return kind(objects.url, lease)


def _is_root(path: Path) -> bool:
    return path.name == "zarr.json"


def was_being_replaced(objects: Objects) -> bool:
    """Whether a run was killed while it set a result aside, which the next run restores."""
    if not isinstance(objects, LocalObjects):
        return False
    return any(Path(objects.url, FOLDER).glob(f"#*/{_REPLACED}/zarr.json"))


def numbers(objects: Objects) -> list[int]:
    """Return the numbers of all locks, in order."""
    return sorted(int(match[1]) for match in map(_KEY.fullmatch, objects.keys(FOLDER)) if match)


def highest(objects: Objects) -> int | None:
    """Return the highest lock number, or None if there is no lock."""
    return max(numbers(objects), default=None)


def parsed(content: bytes) -> dict[str, object]:
    """Return the content of a lock; empty if it is damaged."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def named(holder: dict[str, object]) -> str:
    """Name the process that holds a lock, and since when."""
    since = f" since {holder['since']}" if "since" in holder else ""
    host = holder.get("host", "an unknown host")
    return f"process {holder.get('pid', '?')} on {host}{since}"
