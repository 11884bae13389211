"""Shards: files that hold all chunks of a map, behind an index of their places in the file.

They are those of Zarr's ``sharding_indexed`` codec with the index at the start: offset and size in
bytes of each chunk, row by row, as little-endian uint64, then the CRC32C of these.
"""

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ocelot_em.store.blosc import checksum
from ocelot_em.store.contract import AppendedObject, Objects, ReusedMemory

_ABSENT = 2**64 - 1
"""Offset and size of a chunk that the shard does not have."""


class Shard:
    """The shard of a map; its index is read once, when the first chunk is read."""

    def __init__(self, objects: Objects, key: str, n_chunks: int) -> None:
        self._objects, self._key, self._n = objects, key, n_chunks
        self._index: NDArray[np.uint64] | None = None
        self._file: AppendedObject | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Shard"], tuple[Objects, str, int]]:
        return Shard, (self._objects, self._key, self._n)

    @property
    def _index_nbytes(self) -> int:
        return 16 * self._n + 4

    def read(self, number: int, memory: ReusedMemory, max_nbytes: int) -> memoryview | None:
        """Read an encoded chunk; None if the shard or the chunk is missing.

        ``ValueError`` if the index is corrupt or the chunk larger than ``max_nbytes``.
        """
        with self._lock:
            index = self._index = self._index if self._index is not None else self._read_index()
        if index is None or index[number, 1] == _ABSENT:
            return None
        start, nbytes = map(int, index[number])
        if not self._index_nbytes <= start < 2**62 or not 0 < nbytes <= max_nbytes:
            raise ValueError(
                f"expected at most {max_nbytes} bytes behind the index of the shard, got "
                f"{nbytes} bytes at {start}"
            )
        encoded = self._objects.get_into(self._key, memory, nbytes, start)
        if encoded is not None and len(encoded) < nbytes:
            raise ValueError(
                f"expected {nbytes} bytes at {start} of the shard, got {len(encoded)}: it is "
                "truncated"
            )
        return encoded

    def _read_index(self) -> NDArray[np.uint64] | None:
        size = self._index_nbytes
        found = self._objects.get_into(self._key, ReusedMemory(), size, 0)
        if found is None:
            return None
        encoded = bytes(found)
        entries, crc = encoded[:-4], int.from_bytes(encoded[-4:], "little")
        if len(encoded) < size or checksum(entries) != crc:
            raise ValueError("the index of the shard is truncated, or its CRC32C does not match")
        return np.frombuffer(entries, "<u8").reshape(self._n, 2).astype(np.uint64)

    def append(self, number: int, parts: Sequence[bytes]) -> None:
        """Write a chunk; several threads may write different chunks."""
        with self._lock:
            if self._file is None:
                self._index = np.full((self._n, 2), _ABSENT, np.uint64)
                self._file = self._objects.append_to(self._key, self._index_nbytes)
        assert self._index is not None
        self._index[number] = self._file.append(parts), sum(map(len, parts))

    def publish(self) -> None:
        """Make the shard, whose chunks are written, visible to readers."""
        if self._file is not None:
            assert self._index is not None
            entries = self._index.astype("<u8").tobytes()
            self._file.publish(entries + checksum(entries).to_bytes(4, "little"))
            self._file = None

    def discard(self) -> None:
        """Delete what was written, if it is not published."""
        if self._file is not None:
            self._file.discard()
            self._file = None
