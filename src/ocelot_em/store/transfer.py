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

from ocelot_em.model.maps import AnyArray
from ocelot_em.model.regions import Region, Tile
from ocelot_em.store.arrays import ChunkedMap
from ocelot_em.store.blosc import Frame
from ocelot_em.store.objects import Objects, ReusedMemory

READ_TOGETHER = 4
"""Most requests of one chunk that can be open at the same time."""


def chunks_ahead(streams: int) -> int:
    """Encoded chunks that a :class:`ReadAhead` holds: one lot is open, another under way."""
    return READ_TOGETHER + max(READ_TOGETHER, streams)


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
    frame: "Future[Frame]"


class Arrival:
    """A region of a map that has arrived, and can be decoded in equal parts of its pixels.

    Parameters
    ----------
    request
        What was asked for.
    frame
        The chunk, if the region is one chunk.
    chunk
        Which one.
    values
        The region's values, if it is not: decoded already.
    """

    def __init__(
        self,
        request: Request,
        frame: Frame | None,
        chunk: Tile | None,
        values: AnyArray | None,
    ) -> None:
        self.dtype = request.source.dtype
        self._source, self._frame, self._chunk, self._values = request.source, frame, chunk, values
        self.n_parts = 1 if frame is None else frame.n_blocks

    def decode(self, part: int, n_parts: int, out: AnyArray) -> None:
        """Decode a part into a flat array of its size.

        Parameters
        ----------
        part
            Number of the part.
        n_parts
            :attr:`n_parts`, or 1 for everything.
        out
            C-contiguous, of the map's dtype.

        Raises
        ------
        CorruptChunkError
        """
        if self._frame is None or self._chunk is None:
            assert self._values is not None
            out[...] = self._values.reshape(-1)
            return
        try:
            if n_parts == 1:
                self._frame.decode(out)
            else:
                self._frame.decode_block(part, out)
        except ValueError as error:
            raise self._source.corrupt(self._chunk, error) from error


class ReadAhead:
    """Reads regions in a known order; the next ones are fetched meanwhile.

    Parameters
    ----------
    requests
        In the order in which they will be read. Some may be left out then, but none be repeated.
    streams
        Chunks fetched at a time.
    memory
        For the encoded chunks: as many as :func:`chunks_ahead` says.
    """

    def __init__(
        self, requests: Iterable[Request], streams: int, memory: Sequence[ReusedMemory]
    ) -> None:
        self._pool = ThreadPoolExecutor(streams, "ocelot-read")
        self._todo = self._pieces(requests)
        self._free = list(memory)
        self._under_way: deque[_Piece] = deque()
        self._open: list[ReusedMemory] = []
        self.waited_seconds = 0.0
        """Time in which the reader had nothing to decode."""
        self.read_nbytes = 0
        """Encoded bytes that were asked for."""

    def open(self, request: Request, spare: AnyArray) -> Arrival:
        """Wait until a region has arrived.

        Parameters
        ----------
        request
            One of the announced ones, not before the last one that was read.
        spare
            Of the region's shape and the map's dtype: for values that have to be decoded at once,
            because the region is not one whole chunk.

        Returns
        -------
        Arrival
            Valid until :meth:`close`; of those of one chunk, at most :data:`READ_TOGETHER` can be
            open.

        Raises
        ------
        MissingChunkError, CorruptChunkError, StorageError
        """
        self._top_up()
        while self._under_way and self._under_way[0].request.name != request.name:
            self._leave_out(self._under_way.popleft())
        if not self._under_way:
            raise LookupError(f"{request.name}: was not announced, or has been read before")
        piece = self._under_way[0]
        if piece.chunk.region == request.region and request.source.grid.is_whole(piece.chunk):
            self._open.append(self._under_way.popleft().memory)
            return Arrival(request, self._arrived(piece), piece.chunk, None)
        while self._under_way and self._under_way[0].request.name == request.name:
            piece = self._under_way.popleft()
            try:
                request.source.decode(self._arrived(piece), piece.chunk, request.region, spare)
            finally:
                self._free.append(piece.memory)
                self._top_up()
        return Arrival(request, None, None, spare)

    def close(self) -> None:
        """Give back what is open, so that more can be fetched."""
        self._free += self._open
        self._open.clear()
        self._top_up()

    def _arrived(self, piece: _Piece) -> Frame:
        started = time.perf_counter()
        frame = piece.frame.result()
        self.waited_seconds += time.perf_counter() - started
        self.read_nbytes += frame.encoded_nbytes
        return frame

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
            frame = self._pool.submit(request.source.fetch, chunk, memory)
            self._under_way.append(_Piece(request, chunk, memory, frame))

    def _leave_out(self, piece: _Piece) -> None:
        if not piece.frame.cancel():
            with suppress(Exception):  # nobody asks for it, so nobody needs to know
                piece.frame.result()
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
