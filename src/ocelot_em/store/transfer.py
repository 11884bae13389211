"""Prefetching of chunks, and writing in the background, by threads that wait for the storage."""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple, Self

import numpy as np

from ocelot_em.errors import CorruptChunkError
from ocelot_em.model.maps import AnyArray
from ocelot_em.model.regions import Region, Tile
from ocelot_em.store.arrays import ChunkedMap
from ocelot_em.store.blosc import BloscChunk
from ocelot_em.store.bucket import STREAMS
from ocelot_em.store.contract import Objects, ReusedMemory

READ_TOGETHER = 4
"""Maximum number of single-chunk requests that can be open at the same time."""


def chunks_ahead(streams: int) -> int:
    """Number of encoded chunks that a :class:`ReadAhead` holds, open or in flight."""
    return READ_TOGETHER + max(READ_TOGETHER, streams)


def chunks_behind(streams: int) -> int:
    """Maximum number of encoded chunks that a :class:`WriteBehind` holds."""
    return 1 + writing_streams(streams)


def writing_streams(streams: int) -> int:
    """Number of concurrent writes of a thread; it has at most half as many chunks to write."""
    return max(min(streams, STREAMS[0]), streams // 2)


class Request(NamedTuple):
    """A region of a map to read; the requests of a group are consecutive."""

    group: Hashable
    source: ChunkedMap
    region: Region


class _Piece(NamedTuple):
    """A chunk of a region to read, and its number in a task that reads several."""

    request: Request
    chunk: Tile
    is_last: bool
    memory: ReusedMemory
    number: int
    fetched: "Future[list[BloscChunk | Exception]]"


class Arrival:
    """A region of a map that has been read: an encoded chunk, or the values of several."""

    def __init__(
        self, source: ChunkedMap, meter: "Meter", content: tuple[Tile, BloscChunk] | AnyArray
    ) -> None:
        self.dtype = source.dtype
        self._source, self._meter, self._content = source, meter, content

    @property
    def chunk(self) -> BloscChunk | None:
        """The encoded chunk, if the region is one."""
        return self._content[1] if isinstance(self._content, tuple) else None

    def corrupt(self, complaint: ValueError) -> CorruptChunkError:
        """Return the error for an encoded chunk that cannot be decoded."""
        assert isinstance(self._content, tuple)
        return self._source.corrupt(self._content[0], complaint)

    def decode(self, out: AnyArray) -> None:
        """Decode the region into a flat array of its size."""
        started = time.perf_counter()
        if isinstance(self._content, tuple):
            try:
                self._content[1].decode(out)
            except ValueError as error:
                raise self.corrupt(error) from error
        else:
            out[...] = self._content.reshape(-1)
        self._meter.seconds += time.perf_counter() - started

    def values(self, memory: AnyArray) -> AnyArray:
        """Return the region's values, flat; they are decoded into ``memory`` if they are not."""
        if isinstance(self._content, tuple):
            self.decode(memory)
            return memory
        return self._content.reshape(-1)


@dataclass(slots=True)
class Meter:
    """Encoded bytes of transfers, their seconds with decoding, and those spent waiting."""

    seconds: float = 0.0
    waited_seconds: float = 0.0
    nbytes: int = 0

    def since(self, earlier: "Meter") -> "Meter":
        """Return the increase since an earlier :meth:`copy`."""
        return Meter(
            self.seconds - earlier.seconds,
            self.waited_seconds - earlier.waited_seconds,
            self.nbytes - earlier.nbytes,
        )

    def copy(self) -> "Meter":
        """Return a copy of the current values."""
        return replace(self)


Spare = Callable[[int, "np.dtype[np.generic]"], AnyArray]
"""Returns an array of the region's shape for a region that is not one whole chunk, by number (below
:data:`READ_TOGETHER`) and dtype."""


class ReadAhead:
    """Reads regions in the given order, and prefetches the next ones into ``memory``.

    A reader can only take the next region, so that the given and the actual order never differ.
    """

    def __init__(
        self, requests: Iterable[Request], streams: int, memory: Sequence[ReusedMemory]
    ) -> None:
        self._pool = ThreadPoolExecutor(streams, "ocelot-read")
        # Every hand-over to another thread passes Python's lock; only requests that take time
        # must be open at once.
        self._per_task = READ_TOGETHER if streams == 1 else 1
        self._pending = self._pieces(requests)
        self._free = list(memory)
        self._in_flight: deque[_Piece] = deque()
        self._in_use: list[ReusedMemory] = []
        self.meter = Meter()

    def group(self, group: Hashable, spare: Spare) -> Self:
        """Advance to the requests of a group, skipping unread requests of earlier groups."""
        self._release()
        while self._in_flight and self._in_flight[0].request.group != group:
            self._skip(self._in_flight.popleft())
        self._group, self._spare = group, spare
        return self

    @contextmanager
    def take(self, n: int) -> Iterator[list[Arrival]]:
        """Wait for the next regions of the group, which are valid within the context.

        There are at most :data:`READ_TOGETHER`; ``LookupError`` if the group has fewer left.
        """
        started = time.perf_counter()
        arrivals = [self._next(number) for number in range(n)]
        self.meter.seconds += time.perf_counter() - started
        yield arrivals
        self._release()

    def _next(self, number: int) -> Arrival:
        self._fetch_more()
        if not self._in_flight or self._in_flight[0].request.group != self._group:
            raise LookupError(f"{self._group}: all requests of this group have been read")
        piece = self._in_flight[0]
        source, region = piece.request.source, piece.request.region
        if piece.chunk.region == region and source.grid.is_whole(piece.chunk):
            self._in_use.append(self._in_flight.popleft().memory)
            return Arrival(source, self.meter, (piece.chunk, self._arrived(piece)))
        values = self._spare(number, source.dtype)
        while True:
            piece = self._in_flight.popleft()
            try:
                source.decode(self._arrived(piece), piece.chunk, region, values)
            finally:
                self._free.append(piece.memory)
                self._fetch_more()
            if piece.is_last:
                return Arrival(source, self.meter, values)

    def _arrived(self, piece: _Piece) -> BloscChunk:
        started = time.perf_counter()
        encoded = piece.fetched.result()[piece.number]
        self.meter.waited_seconds += time.perf_counter() - started
        if isinstance(encoded, Exception):
            raise encoded
        self.meter.nbytes += encoded.encoded_nbytes
        return encoded

    def _pieces(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Tile, bool]]:
        for request in requests:
            chunks = list(request.source.grid.touching(request.region))
            for chunk in chunks:
                yield request, chunk, chunk is chunks[-1]

    def _fetch_more(self) -> None:
        while found := list(islice(self._pending, min(len(self._free), self._per_task))):
            reads = [(*one, self._free.pop()) for one in found]
            fetched = self._pool.submit(_fetch, reads)
            self._in_flight += (_Piece(*one, n, fetched) for n, one in enumerate(reads))

    def _release(self) -> None:
        """Reuse the memory of regions that were taken, and fetch more."""
        self._free += self._in_use
        self._in_use.clear()
        self._fetch_more()

    def _skip(self, piece: _Piece) -> None:
        piece.fetched.result()
        self._free.append(piece.memory)
        self._fetch_more()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _fetch(
    reads: Iterable[tuple[Request, Tile, bool, ReusedMemory]],
) -> list[BloscChunk | Exception]:
    """Read chunks one after another; the error of one takes its place."""
    fetched: list[BloscChunk | Exception] = []
    for request, chunk, _, memory in reads:
        try:
            fetched.append(request.source.fetch(chunk, memory))
        except Exception as error:
            fetched.append(error)
    return fetched


class WriteBehind:
    """Writes a bounded number of objects at a time, on ``streams`` threads."""

    def __init__(self, streams: int) -> None:
        self._pool = ThreadPoolExecutor(writing_streams(streams), "ocelot-write")
        self._max_in_flight = chunks_behind(streams)
        self._in_flight: deque[Future[None]] = deque()
        self.meter = Meter()

    @contextmanager
    def metered(self) -> Iterator[None]:
        """Count the time within the context, for encoding and submitting objects."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.meter.seconds += time.perf_counter() - started

    def put(self, objects: Objects, key: str, parts: Sequence[bytes]) -> "Future[None]":
        """Write an object in the background; the future completes or raises."""
        self.meter.nbytes += sum(map(len, parts))
        while len(self._in_flight) >= self._max_in_flight:
            self.wait([self._in_flight.popleft()], quietly=True)
        written = self._pool.submit(objects.put, key, parts)
        self._in_flight.append(written)
        return written

    def after(
        self, written: Sequence["Future[None]"], action: Callable[[], None]
    ) -> "Future[None]":
        """Call an action in the background once all these objects are written.

        The future has the first error of a write, or of the action.
        """

        def act() -> None:
            # These were submitted earlier, so that they have ended or run in other threads.
            for future in written:
                future.result()
            action()

        return self._pool.submit(act)

    def wait(self, written: Sequence["Future[None]"], *, quietly: bool = False) -> None:
        """Wait for writes to finish; raise the error of one that failed, unless ``quietly``."""
        started = time.perf_counter()
        try:
            for future in written:
                error = future.exception()
                if error is not None and not quietly:
                    raise error
        finally:
            self.meter.waited_seconds += time.perf_counter() - started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
