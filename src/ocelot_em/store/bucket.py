"""Objects in a bucket, through obstore."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from typing import Any, ClassVar, Self

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import MemoryStore

from ocelot_em.errors import StorageError
from ocelot_em.store.contract import (
    MAX_NBYTES,
    AppendedObject,
    RangeReader,
    ReusedMemory,
    T,
    at_once,
    refuse_too_large,
    retrying,
    storage_error,
)
from ocelot_em.store.result_shards import chunk_nbytes, read_chunk

PREFETCHED_NBYTES = 64 * 2**20
"""Size limit of objects that are prefetched into a snapshot; larger ones are read when needed."""

STREAMS = 16, 64
"""Least and most concurrent transfers of a thread."""

SECONDS_PER_CHUNK = 0.002
"""A thread waits for no chunk if it has one in flight for each such part of the latency. It merges
one in about twice the time, but its transfer takes longer than the fastest request."""


class BucketObjects:
    """Objects in a bucket; methods as in :class:`ocelot_em.store.contract.Objects`."""

    can_append = False
    requests: int | None = 64
    _known: dict[tuple[str, str], Any] | None = None  # of a snapshot
    _used_by: ClassVar[int | None] = None  # the process that started obstore's threads

    def __init__(self, url: str) -> None:
        self.url = url
        self._fastest = [0.0]  # seconds of the fastest request so far; shared with snapshots

    @property
    def streams(self) -> int:
        """As many as hide the latency of the fastest request so far."""
        least, most = STREAMS
        return min(max(math.ceil(self._fastest[0] / SECONDS_PER_CHUNK), least), most)

    @classmethod
    @lru_cache(maxsize=256)
    def opened(cls, url: str) -> Self:
        """Return the store at a normalised URL; cached, with its state."""
        return cls(url)

    def __reduce__(self) -> tuple[Callable[[str], Self], tuple[str]]:
        return self.opened, (self.url,)

    @property
    def _store(self) -> Any:
        cls = BucketObjects
        cls._used_by = cls._used_by or os.getpid()
        if cls._used_by != os.getpid() and not isinstance(self, MemoryObjects):
            raise StorageError(
                f"cannot open {self.url}: this process was forked from one that used a bucket, "
                "and connections do not survive that; start processes with "
                "multiprocessing.get_context('spawn')"
            )
        if not hasattr(self, "_opened"):
            self._opened = self._guard("open", "", self._connect)
        return self._opened

    def _connect(self) -> Any:
        return obstore.store.from_url(self.url)

    def _guard(self, verb: str, key: str, action: Callable[[], T]) -> T:
        started = time.perf_counter()
        found = retrying(verb, self.url, key, action)
        if verb != "open":
            seconds = time.perf_counter() - started
            self._fastest[0] = min(self._fastest[0] or seconds, seconds)
        return found

    @contextmanager
    def snapshot(self) -> Iterator[Self]:
        own = object.__new__(type(self))
        if self.requests is not None:
            _ = self._store  # which both use
        own.__dict__.update(self.__dict__, _known={} if self._known is None else self._known)
        try:
            yield own
        finally:
            own._known = None

    def prefetch(self, keys: Iterable[str], folders: Iterable[str] = ()) -> None:
        def quietly(read: Callable[[], object]) -> None:
            with suppress(StorageError):
                read()

        if self.requests is not None and self._known is not None:
            reads: list[Callable[[], object]] = []
            reads += [partial(self.get, key, PREFETCHED_NBYTES) for key in dict.fromkeys(keys)]
            reads += [partial(self.children, folder) for folder in dict.fromkeys(folders)]
            at_once(self, [partial(quietly, read) for read in reads])

    def _once(self, verb: str, key: str, read: Callable[[], T]) -> T:
        """Read, or return what this snapshot has read before."""
        if self._known is None:
            return read()
        if (verb, key) not in self._known:
            self._known[verb, key] = read()
        found: T = self._known[verb, key]
        return found

    def get(self, key: str, max_nbytes: int = MAX_NBYTES) -> bytes | None:
        def read() -> bytes | None:
            found = self.get_into(key, ReusedMemory(), max_nbytes)
            return None if found is None else bytes(found)

        found = self._once("read", key, read)
        if found is not None and len(found) > max_nbytes:
            self._guard("read", key, lambda: refuse_too_large(len(found), max_nbytes))
        return found

    def get_into(
        self,
        key: str,
        memory: ReusedMemory,
        max_nbytes: int = MAX_NBYTES,
    ) -> memoryview | None:
        def action() -> memoryview | None:
            try:
                found = obstore.get(self._store, key)
            except FileNotFoundError:
                return None
            refuse_too_large(found.meta["size"], max_nbytes)
            return memory.filled(memoryview(found.bytes()))

        found = self._guard("read", key, action)
        return found if found is not None else read_chunk(self, key, memory, max_nbytes)

    def ranges(self, key: str) -> RangeReader:
        def read(memory: ReusedMemory, nbytes: int, start: int) -> memoryview | None:
            def action() -> memoryview | None:
                try:
                    found = memoryview(
                        obstore.get_range(self._store, key, start=start, length=nbytes)
                    )
                except FileNotFoundError:
                    return None
                except BaseError:
                    if start < obstore.head(self._store, key)["size"]:
                        raise
                    found = memoryview(b"")  # the object ends before
                return memory.filled(found)

            return self._guard("read", key, action)

        return read

    def append_to(self, key: str, head_nbytes: int) -> AppendedObject:
        raise NotImplementedError(f"{self.url}: {key}: objects here cannot grow")

    def put(self, key: str, parts: Sequence[bytes]) -> None:
        # A single put is atomic everywhere; multipart uploads would need an abort path.
        def action() -> None:
            obstore.put(self._store, key, b"".join(parts), use_multipart=False)

        self._guard("write", key, action)

    def create(self, key: str, data: bytes) -> bool:
        def action() -> bool:
            try:
                obstore.put(self._store, key, data, mode="create")
            except (AlreadyExistsError, FileExistsError):
                return False
            return True

        return self._guard("create", key, action)

    def sizes(self, prefix: str) -> dict[str, int]:
        def action() -> dict[str, int]:
            batches = obstore.list(self._store, prefix or None)
            return {meta["path"]: meta["size"] for batch in batches for meta in batch}

        return self._guard("list", prefix, action)

    def size(self, key: str) -> int | None:
        def action() -> int | None:
            try:
                return int(obstore.head(self._store, key)["size"])
            except FileNotFoundError:
                return None

        found = self._guard("look up", key, action)
        return found if found is not None else chunk_nbytes(self, key)

    def keys(self, prefix: str) -> Iterator[str]:
        batches = iter(self._guard("list", prefix, lambda: obstore.list(self._store, prefix)))
        while batch := self._next(prefix, batches):
            yield from (meta["path"] for meta in batch)

    def _next(self, prefix: str, batches: Iterator[Any]) -> Any:
        # No retry: an interrupted listing must not look complete.
        try:
            return next(batches, None)
        except (BaseError, OSError) as error:
            raise storage_error("list", self.url, prefix, error) from error

    def children(self, prefix: str) -> list[str]:
        return self._once("list", prefix, lambda: self._children(prefix))

    def _children(self, prefix: str) -> list[str]:
        def action() -> list[str]:
            found = obstore.list_with_delimiter(self._store, prefix)["common_prefixes"]
            return [path.rstrip("/").rpartition("/")[2] for path in found]

        return self._guard("list", prefix, action)

    def delete(self, prefix: str, keep: str | None = None) -> None:
        keys = [key for key in self.sizes(prefix) if keep is None or not key.startswith(f"{keep}/")]

        if keys:
            self._guard("delete", prefix, lambda: obstore.delete(self._store, keys))

    def delete_one(self, key: str) -> None:
        def action() -> None:
            with suppress(FileNotFoundError):
                obstore.delete(self._store, key)

        self._guard("delete", key, action)

    def tidy(self, prefix: str) -> None:
        """Do nothing: buckets have no partly written objects."""

    def sync(self) -> None:
        """Do nothing: a write request returns when the data is safe."""

    def free_bytes(self) -> int | None:
        return None

    def free_inodes(self) -> int | None:
        return None


class MemoryObjects(BucketObjects):
    """Objects in the memory of this process, for trials and tests."""

    streams = 1
    requests: int | None = None
    _stores: ClassVar[dict[str, MemoryStore]] = {}

    def _connect(self) -> Any:
        return self._stores.setdefault(self.url, MemoryStore())
