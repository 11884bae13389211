"""Shards: files that hold many chunks of a map, behind an index of their places in the file.

They are those of Zarr's ``sharding_indexed`` codec with the index at the start: offset and size in
bytes of each chunk, row by row, as little-endian uint64, then the CRC32C of these.
"""

import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ocelot_em.model.regions import Tile
from ocelot_em.store.blosc import checksum
from ocelot_em.store.contract import AppendedObject, Objects, RangeReader, ReusedMemory

ABSENT = 2**64 - 1
"""Offset and size of a chunk that the shard does not have."""

_MAX_OPEN = 4
"""Maximum number of shards of a map that stay open for reading."""

_MAX_WRITTEN = 64
"""Maximum number of shards of a map whose files stay open between two writes."""


class _Open(NamedTuple):
    entries: NDArray[np.uint64]
    read: RangeReader


class _Begun(NamedTuple):
    entries: NDArray[np.uint64]
    file: AppendedObject


def encoded_index(entries: NDArray[np.uint64]) -> bytes:
    """Return the bytes of an index: offsets and sizes, and their CRC32C."""
    index = entries.astype("<u8").tobytes()
    return index + checksum(index).to_bytes(4, "little")


def read_index(read: RangeReader, n_chunks: int) -> NDArray[np.uint64] | None:
    """Read the offsets and sizes of a shard's chunks; None if there is no such object.

    ``ValueError`` if the index is corrupt.
    """
    size = 16 * n_chunks + 4
    found = read(ReusedMemory(), size, 0)
    if found is None:
        return None
    encoded = bytes(found)
    entries, crc = encoded[:-4], int.from_bytes(encoded[-4:], "little")
    if len(encoded) < size or checksum(entries) != crc:
        raise ValueError("the index of the shard is truncated, or its CRC32C does not match")
    return np.frombuffer(entries, "<u8").reshape(n_chunks, 2).astype(np.uint64)


def read_entry(
    read: RangeReader,
    entries: NDArray[np.uint64],
    number: int,
    memory: ReusedMemory,
    max_nbytes: int,
) -> memoryview | None:
    """Read a chunk that an index has; None if the shard is gone.

    ``ValueError`` if the index is wrong or the chunk larger than ``max_nbytes``.
    """
    start, nbytes = map(int, entries[number])
    if not 16 * len(entries) + 4 <= start < 2**62 or not 0 < nbytes <= max_nbytes:
        raise ValueError(
            f"expected at most {max_nbytes} bytes behind the index of the shard, got "
            f"{nbytes} bytes at {start}"
        )
    encoded = read(memory, nbytes, start)
    if encoded is not None and len(encoded) < nbytes:
        raise ValueError(
            f"expected {nbytes} bytes at {start} of the shard, got {len(encoded)}: it is truncated"
        )
    return encoded


class Shards:
    """The shards of a map of ``counts`` chunks, each of which has room for ``per_shard``.

    The index of a shard is read and checked once, when its first chunk is read. ``separator`` is
    in the keys of shards: a slash in partials, a dot in merged results.
    """

    def __init__(
        self,
        objects: Objects,
        path: str,
        counts: tuple[int, int],
        per_shard: tuple[int, int],
        separator: str = "/",
    ) -> None:
        self._objects, self._path, self._counts = objects, path, counts
        self.separator = separator
        self._per_shard, self._n = per_shard, math.prod(per_shard)
        self._open: dict[str, _Open] = {}
        self._begun: dict[str, _Begun] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Shards"], tuple[object, ...]]:
        layout = self._counts, self._per_shard, self.separator
        return Shards, (self._objects, self._path, *layout)

    def key(self, chunk: Tile) -> str:
        """Key of the shard that holds a chunk."""
        height, width = self._per_shard
        return self.separator.join(
            (f"{self._path}/c", str(chunk.iy // height), str(chunk.ix // width))
        )

    def _number(self, chunk: Tile) -> int:
        height, width = self._per_shard
        return chunk.iy % height * width + chunk.ix % width

    def read(self, chunk: Tile, memory: ReusedMemory, max_nbytes: int) -> memoryview | None:
        """Read an encoded chunk; None if the shard or the chunk is missing.

        ``ValueError`` if the index is corrupt or the chunk larger than ``max_nbytes``.
        """
        key, number = self.key(chunk), self._number(chunk)
        with self._lock:
            found = self._open.get(key) or self._opened(key)
        if found is None or found.entries[number, 1] == ABSENT:
            return None
        return read_entry(found.read, found.entries, number, memory, max_nbytes)

    def _opened(self, key: str) -> _Open | None:
        read = self._objects.ranges(key)
        index = read_index(read, self._n)
        if index is None:
            return None
        while len(self._open) >= _MAX_OPEN:
            self._open.pop(next(iter(self._open)))
        return self._open.setdefault(key, _Open(index, read))

    def append(self, chunk: Tile, parts: Sequence[bytes]) -> None:
        """Write a chunk; several threads may write different chunks."""
        key, number = self.key(chunk), self._number(chunk)
        with self._lock:
            begun = self._begun.get(key)
            if begun is None:
                index = np.full((self._n, 2), ABSENT, np.uint64)
                begun = _Begun(index, self._objects.append_to(key, 16 * self._n + 4))
                self._begun[key] = begun
        begun.entries[number] = begun.file.append(parts), sum(map(len, parts))
        is_full = np.count_nonzero(begun.entries[:, 1] != ABSENT) == self._n_in_shard(chunk)
        if is_full or len(self._begun) > _MAX_WRITTEN:
            begun.file.rest()

    def _n_in_shard(self, chunk: Tile) -> int:
        """Number of chunks of a chunk's shard, which is cut at the lower and right edge."""
        (iy, ix), (ny, nx), (height, width) = (chunk.iy, chunk.ix), self._counts, self._per_shard
        return min(height, ny - iy // height * height) * min(width, nx - ix // width * width)

    def publish(self) -> None:
        """Make the shards, whose chunks are written, visible to readers."""
        for begun in self._begun.values():
            begun.file.publish(encoded_index(begun.entries))
        self._begun.clear()

    def discard(self) -> None:
        """Delete what was written and is not published."""
        for begun in self._begun.values():
            begun.file.discard()
        self._begun.clear()
