"""Chunks on their way: fetched before they are asked for, written while the next are made.

Threads of their own wait for the storage, so that a worker's processor always has bytes to decode.
What is under way is bounded, in chunks.
"""

import time
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple, Self

from ocelot_em.canvas import Region, Tile
from ocelot_em.maps import AnyArray
from ocelot_em.objects import Objects, ReusedMemory
from ocelot_em.store import ChunkedMap


def chunks_ahead(streams: int) -> int:
    """Most encoded chunks that a :class:`ReadAhead` of so many streams holds."""
    return 1 + streams


def chunks_behind(streams: int) -> int:
    """Most encoded chunks that a :class:`WriteBehind` of so many streams holds."""
    return 1 + streams


class Request(NamedTuple):
    """A region of a map that will be asked for, under a name that no other request has."""

    name: Hashable
    source: ChunkedMap
    region: Region


class _Piece(NamedTuple):
    request: Request
    chunk: Tile
    memory: ReusedMemory
    encoded: "Future[memoryview]"


class ReadAhead:
    """Reads regions in a known order; the next ones are fetched meanwhile.

    Parameters
    ----------
    requests
        In the order in which they will be read. Some may be left out then, but none be repeated.
    streams
        Chunks fetched at a time.
    """

    def __init__(self, requests: Iterable[Request], streams: int) -> None:
        self._pool = ThreadPoolExecutor(streams, "ocelot-read")
        self._todo = self._pieces(requests)
        self._free = [ReusedMemory() for _ in range(chunks_ahead(streams))]
        self._under_way: deque[_Piece] = deque()
        self.waited_seconds = 0.0
        """Time in which the reader had nothing to decode."""

    def read(self, request: Request, out: AnyArray) -> int:
        """Decode a region.

        Parameters
        ----------
        request
            One of the announced ones, not before the last one that was read.
        out
            C-contiguous, of the region's shape and the map's dtype.

        Returns
        -------
        int
            Encoded bytes read.

        Raises
        ------
        MissingChunkError, CorruptChunkError, StorageError
        """
        self._top_up()
        while self._under_way and self._under_way[0].request.name != request.name:
            self._leave_out(self._under_way.popleft())
        nbytes = 0
        while self._under_way and self._under_way[0].request.name == request.name:
            piece = self._under_way.popleft()
            started = time.perf_counter()
            try:
                encoded = piece.encoded.result()
                self.waited_seconds += time.perf_counter() - started
                request.source.decode(encoded, piece.chunk, request.region, out)
                nbytes += len(encoded)
            finally:
                self._free.append(piece.memory)
                self._top_up()
        if nbytes == 0:
            raise LookupError(f"{request.name}: was not announced, or has been read before")
        return nbytes

    def _pieces(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Tile]]:
        for request in requests:
            for chunk in request.source.grid.touching(request.region):
                yield request, chunk

    def _top_up(self) -> None:
        while self._free:
            request, chunk = next(self._todo, (None, None))
            if request is None or chunk is None:
                return
            memory = self._free.pop()
            encoded = self._pool.submit(request.source.fetch, chunk, memory)
            self._under_way.append(_Piece(request, chunk, memory, encoded))

    def _leave_out(self, piece: _Piece) -> None:
        if not piece.encoded.cancel():
            with suppress(Exception):  # nobody asks for it, so nobody needs to know
                piece.encoded.result()
        self._free.append(piece.memory)
        self._top_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


class WriteBehind:
    """Writes objects on threads of its own, a bounded number of them at a time.

    Parameters
    ----------
    streams
        Objects written at a time.
    """

    def __init__(self, streams: int) -> None:
        self._pool = ThreadPoolExecutor(streams, "ocelot-write")
        self._most = chunks_behind(streams)
        self._under_way: deque[Future[None]] = deque()
        self.waited_seconds = 0.0
        """Time in which the writer could take no more."""

    def put(self, objects: Objects, key: str, parts: Sequence[bytes]) -> "Future[None]":
        """Write an object, soon; the result says that it is written, or raises."""
        while len(self._under_way) >= self._most:
            self.wait([self._under_way.popleft()], quietly=True)
        written = self._pool.submit(objects.put, key, parts)
        self._under_way.append(written)
        return written

    def wait(self, written: Sequence["Future[None]"], *, quietly: bool = False) -> None:
        """Wait until these are written.

        Raises
        ------
        StorageError
            Unless ``quietly``.
        """
        started = time.perf_counter()
        try:
            for future in written:
                error = future.exception()
                if error is not None and not quietly:
                    raise error
        finally:
            self.waited_seconds += time.perf_counter() - started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
