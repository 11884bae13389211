"""The interface of stores of named byte objects, and their retries, size limits and memory."""

import contextlib
import ctypes
import errno
import logging
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Protocol, Self, TypeVar, runtime_checkable

import numpy as np
from obstore.exceptions import BaseError

from ocelot_em.errors import StorageError

log = logging.getLogger(__name__)


MAX_NBYTES = 2**31
"""Size limit of objects that are read, in bytes; Blosc frames are not larger."""

PAUSES_SECONDS = (0.1, 0.5, 2.0)
"""Pauses before the retries after a transient error."""

_TRANSIENT_ERRORS = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
"""Error numbers of transient errors of file systems, including network ones."""

T = TypeVar("T")


def join(*parts: str) -> str:
    """Join the parts of a key that are not empty."""
    return "/".join(part for part in parts if part)


@runtime_checkable
class Objects(Protocol):
    """Byte objects below one location; keys use ``/``.

    Every method raises :class:`StorageError` with the location and reason if the storage fails.
    """

    url: str

    @property
    def streams(self) -> int:
        """Useful number of concurrent transfers per waiting thread, from the latency so far."""

    requests: int | None
    """Useful number of concurrent requests for small objects; None if each takes no time."""

    can_append: bool
    """Whether :meth:`append_to` is there; buckets have whole objects only."""

    def get(self, key: str, max_nbytes: int = MAX_NBYTES) -> bytes | None:
        """Return the object's bytes, or None if there is none; larger objects are rejected."""

    def get_into(
        self,
        key: str,
        memory: "ReusedMemory",
        max_nbytes: int = MAX_NBYTES,
    ) -> memoryview | None:
        """Read as :meth:`get`, into the given memory, which the caller may change."""

    def ranges(self, key: str) -> "RangeReader":
        """Return a reader of parts of an object, which may keep it open; one replaced is noticed.

        It is called with the memory, the number of bytes and the first of them, and returns fewer
        bytes where the object ends, or None if there is none.
        """

    def append_to(self, key: str, head_nbytes: int) -> "AppendedObject":
        """Begin an object that is written piece by piece, behind a head that is written last."""

    def snapshot(self) -> AbstractContextManager[Self]:
        """Return the store as read once: :meth:`get` and :meth:`children` keep what they read.

        For the metadata that one operation needs. At the end of the context, all is forgotten.
        """

    def prefetch(self, keys: Iterable[str], folders: Iterable[str] = ()) -> None:
        """In a snapshot, read objects and list the children of folders, many at a time.

        Errors are raised by the later :meth:`get` or :meth:`children`. Does nothing where requests
        take no time.
        """

    def put(self, key: str, parts: Sequence[bytes]) -> None:
        """Write the concatenated parts atomically, replacing an existing object."""

    def create(self, key: str, data: bytes) -> bool:
        """Write the object unless it exists; return whether it was written."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return keys and sizes in bytes of all objects below a prefix."""

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes, or None if there is none."""

    def keys(self, prefix: str) -> Iterator[str]:
        """Iterate over all keys below a prefix, without collecting them first."""

    def children(self, prefix: str) -> list[str]:
        """Return names of the folders directly below a prefix."""

    def delete(self, prefix: str, keep: str | None = None) -> None:
        """Delete all objects below a prefix (``""``: everything) except the folder ``keep``."""

    def delete_one(self, key: str) -> None:
        """Delete an object, if it exists."""

    def tidy(self, prefix: str) -> None:
        """Remove partly written files of dead writers below a prefix."""

    def sync(self) -> None:
        """Wait until all writes from this machine survive a power loss."""

    def free_bytes(self) -> int | None:
        """Return free space in bytes, or None if unknown."""

    def free_inodes(self) -> int | None:
        """Return how many more files and folders can be created, or None without a limit."""


class AppendedObject(Protocol):
    """An object that is written piece by piece, and visible once it is published or shared."""

    def append(self, parts: Sequence[bytes]) -> int:
        """Write parts behind what is there; return where they begin. Threads may do so at once."""

    def rest(self) -> None:
        """Release what is kept between two writes; more may be written nevertheless."""

    def publish(self, head: bytes) -> None:
        """Write the head, and give the object its name."""

    def share(self, head: bytes) -> bool:
        """Publish the object before it is complete; False if there already is one of its name."""

    def update(self, head: bytes) -> None:
        """Replace the head of a shared object."""

    def discard(self) -> None:
        """Delete what was written."""


class ReusedMemory:
    """Reusable memory, because new pages cost more than reading into them."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)  # a bytearray would be filled, under Python's lock

    def of(self, nbytes: int) -> memoryview:
        """Return a view of this many bytes, valid until the next call."""
        if len(self._bytes) < nbytes:
            self._bytes = np.empty(nbytes + nbytes // 16, np.uint8)
        return self._bytes.data[:nbytes]

    def filled(self, data: memoryview) -> memoryview:
        """Return a copy of the data in this memory."""
        target = self.of(len(data))
        target[:] = data
        return target


RangeReader = Callable[[ReusedMemory, int, int], memoryview | None]
"""Reader of parts of an object; see :meth:`Objects.ranges`."""


def at_once(objects: Objects, actions: Iterable[Callable[[], T]]) -> list[T]:
    """Call actions that wait for requests, at the same time unless requests take no time."""
    actions = list(actions)
    if objects.requests is None or len(actions) < 2:
        return [action() for action in actions]
    with ThreadPoolExecutor(min(objects.requests, len(actions)), "ocelot-request") as pool:
        futures = [pool.submit(action) for action in actions]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def return_free_memory() -> None:
    """Return freed memory to the system: glibc keeps it where small objects fragment it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def retrying(verb: str, url: str, key: str, action: Callable[[], T]) -> T:
    """Run a storage action, with retries after transient errors; raise ``StorageError``."""
    pauses = iter(PAUSES_SECONDS)
    while True:
        try:
            return action()
        except StorageError:  # from a nested action
            raise
        except (BaseError, OSError) as error:
            failure = storage_error(verb, url, key, error)
            pause = next(pauses, None) if _is_transient(error) else None
            if pause is None:
                raise failure from error
        log.warning("%s; retrying in %g s", failure, pause)
        # Jitter, so that processes do not all retry at once.
        time.sleep(pause * random.uniform(0.5, 1.5))


def _is_transient(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _TRANSIENT_ERRORS
    found = _ERROR_NUMBER.search(str(error))
    return found is not None and int(found[1]) in _TRANSIENT_ERRORS


_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)")
"""Error number in obstore's messages about system errors."""


def refuse_too_large(nbytes: int, max_nbytes: int) -> None:
    """Raise ``OSError`` if an object exceeds the size limit."""
    if nbytes > max_nbytes:
        raise OSError(f"expected at most {max_nbytes:,} bytes, got {nbytes:,}")


def storage_error(verb: str, url: str, key: str, error: Exception) -> StorageError:
    """Return a :class:`StorageError` that names the action, the object and the reason."""
    # obstore appends a debug dump of its internals after the first line.
    reason = str(error).partition("\n")[0].strip() or type(error).__name__
    place = f"{url}/{key}" if key else url
    hint = ""
    if "No space left" in str(error) or "os error 28" in str(error) or "Quota" in str(error):
        hint = "; the disk is full: free some space and run the same command again"
    elif "ermission denied" in str(error):
        hint = "; check the permissions of that place"
    return StorageError(f"cannot {verb} {place}: {reason}{hint}")
