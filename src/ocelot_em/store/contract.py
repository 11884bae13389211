"""What a store of named byte objects offers, and what all stores share: retries, limits, memory."""

import contextlib
import ctypes
import errno
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from obstore.exceptions import BaseError

from ocelot_em.errors import StorageError

log = logging.getLogger(__name__)


MAX_NBYTES = 2**31
"""Largest object that is read; Blosc frames are not larger."""

PAUSES_SECONDS = (0.1, 0.5, 2.0)
"""Before each of the next tries of what failed for a reason that may pass."""

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
"""Numbers of errors of file systems that may pass; those of the network's among them."""

T = TypeVar("T")


class Objects(Protocol):
    """Byte objects below one place; keys use ``/``.

    Every method raises :class:`StorageError` with the place and the reason when the storage fails.
    """

    url: str

    streams: int
    """Transfers that are worth having at a time, per thread that waits for them."""

    def get(self, key: str, most_nbytes: int = MAX_NBYTES) -> bytes | None:
        """Return the object's bytes, or None where there is none; a larger one is refused."""
        ...

    def get_into(
        self, key: str, memory: "ReusedMemory", most_nbytes: int = MAX_NBYTES
    ) -> memoryview | None:
        """As :meth:`get`, in the given memory, which the caller may change."""
        ...

    def put(self, key: str, parts: Sequence[bytes]) -> None:
        """Write the concatenated parts, replacing what is there; readers see all or nothing."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write the object unless it is there; whether it was written."""
        ...

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return keys and sizes in bytes of all objects below a prefix."""
        ...

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes, or None where there is none."""
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys below a prefix, one after another, however many there are."""
        ...

    def children(self, prefix: str) -> list[str]:
        """Return names of the folders directly below a prefix."""
        ...

    def delete(self, prefix: str, keep: str | None = None) -> None:
        """Delete all objects below a prefix (``""``: everything), but not the folder ``keep``."""
        ...

    def delete_one(self, key: str) -> None:
        """Delete an object, if it is there."""
        ...

    def tidy(self, prefix: str) -> None:
        """Remove what writers that died have left half-written below a prefix."""
        ...

    def sync(self) -> None:
        """Return when all that was written here from this machine survives a loss of power."""
        ...

    def free_bytes(self) -> int | None:
        """Return free space in bytes, or None where the storage does not say."""
        ...


class ReusedMemory:
    """Memory that is used again and again: fresh pages cost more than what is read into them."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def of(self, nbytes: int) -> memoryview:
        """Return this many bytes; valid until they are asked for again."""
        if len(self._bytes) < nbytes:
            self._bytes = bytearray(nbytes + nbytes // 16)
        return memoryview(self._bytes)[:nbytes]

    def filled(self, data: memoryview) -> memoryview:
        """Return a copy of these bytes in this memory."""
        target = self.of(len(data))
        target[:] = data
        return target


def return_free_memory() -> None:
    """Give freed memory back to the system, where the C library is glibc and would keep it.

    For code that makes and frees arrays of some MiB many times among small objects that stay: what
    it frees is scattered, and is not used again.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def retrying(verb: str, url: str, key: str, action: Callable[[], T]) -> T:
    """Do something with a place; again where it fails for a reason that may pass.

    Clients of buckets try requests again themselves.

    Raises
    ------
    StorageError
    """
    for pause in PAUSES_SECONDS:
        try:
            return action()
        except StorageError:  # of something that was done for it
            raise
        except (BaseError, OSError) as error:
            if not _is_transient(error):
                raise storage_error(verb, url, key, error) from error
            log.warning("%s; trying again in %g s", storage_error(verb, url, key, error), pause)
        # Not all at the same moment.
        time.sleep(pause * random.uniform(0.5, 1.5))
    try:
        return action()
    except (BaseError, OSError) as error:
        raise storage_error(verb, url, key, error) from error


def _is_transient(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _TRANSIENT_ERRORS
    found = _ERROR_NUMBER.search(str(error))
    return found is not None and int(found[1]) in _TRANSIENT_ERRORS


_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)")
"""As obstore tells of an error of the system."""


def refuse_too_large(nbytes: int, most_nbytes: int) -> None:
    """Raise if an object is larger than may be read."""
    if nbytes > most_nbytes:
        raise OSError(f"expected at most {most_nbytes:,} bytes, got {nbytes:,}")


def storage_error(verb: str, url: str, key: str, error: Exception) -> StorageError:
    """Return an error of the storage, with what was tried on what."""
    # obstore appends a debug dump of its internals after the first line.
    reason = str(error).partition("\n")[0].strip() or type(error).__name__
    place = f"{url}/{key}" if key else url
    hint = ""
    if "No space left" in str(error) or "os error 28" in str(error) or "Quota" in str(error):
        hint = "; the disk is full: free some space and run the same command again"
    elif "ermission denied" in str(error):
        hint = "; check the permissions of that place"
    return StorageError(f"cannot {verb} {place}: {reason}{hint}")
