"""Shards of a merged result: files of many chunks that are written tile by tile.

The chunk ``PATH/c/20/3`` of a result in shards is part of the object ``PATH/c.1.0``, which has room
for 16 x 16 chunks (256 of an array of one axis) behind an index as in
:mod:`ocelot_em.store.shards`. A process appends chunks to the shards that it has created itself. It
writes other chunks as objects of their own, which take precedence over the shard until
:func:`pack` moves them there, at the latest when the result is complete.
"""

import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ocelot_em.errors import CorruptChunkError
from ocelot_em.store.contract import AppendedObject, Objects, RangeReader, ReusedMemory
from ocelot_em.store.shards import ABSENT, encoded_index, read_entry, read_index

EDGE = 16
"""Number of chunks of a shard along each of the first two axes."""

N_CHUNKS = EDGE**2
"""Number of chunks of a shard."""

_CHUNK = re.compile(r"(.+)/c/(\d+(?:/\d+)*)")
_SHARD = re.compile(r"(.+)/c\.(\d+(?:\.\d+)*)")

_READS = 3
"""Attempts to read an index, which another process may be writing."""

_MAX_WRITTEN = 256
"""Maximum number of shards whose files stay open between two writes."""

Place = tuple[int, ...]
"""Position of a chunk along the first two axes of its array, or along its only one."""


class Slot(NamedTuple):
    """A chunk's key of the shard, and its number in the index."""

    shard: str
    number: int


def chunks_per_shard(n_axes: int) -> tuple[int, ...]:
    """Return the number of chunks of a shard along each axis."""
    return (N_CHUNKS,) if n_axes == 1 else (EDGE, EDGE, *(1 for _ in range(n_axes - 2)))


def slot_of(key: str) -> Slot | None:
    """Return the slot of a chunk, or None if the key is not that of a chunk."""
    match = _CHUNK.fullmatch(key)
    if match is None:
        return None
    place = tuple(map(int, match[2].split("/")))
    cells = chunks_per_shard(len(place))
    number = 0
    for n, cell in zip(place, cells, strict=True):
        number = number * cell + n % cell
    shard = ".".join(str(n // cell) for n, cell in zip(place, cells, strict=True))
    return Slot(f"{match[1]}/c.{shard}", number)


def _place(slot: Slot) -> Place:
    """Return the position of a slot's chunk."""
    numbers = [int(n) for n in slot.shard.rpartition("/c.")[2].split(".")]
    if len(numbers) == 1:
        return (numbers[0] * N_CHUNKS + slot.number,)
    return numbers[0] * EDGE + slot.number // EDGE, numbers[1] * EDGE + slot.number % EDGE


def read_chunk(
    objects: Objects, key: str, memory: ReusedMemory, max_nbytes: int
) -> memoryview | None:
    """Read a chunk from its shard; None if it is not there.

    Raises
    ------
    CorruptChunkError
    """
    slot = slot_of(key)
    if slot is None:
        return None
    read = objects.ranges(slot.shard)
    try:
        entries = _index(read)
        if entries is None or entries[slot.number, 1] == ABSENT:
            return None
        return read_entry(read, entries, slot.number, memory, max_nbytes)
    except ValueError as error:
        raise CorruptChunkError(f"{objects.url}/{slot.shard}: {error}; merge again") from error


def chunk_nbytes(objects: Objects, key: str) -> int | None:
    """Return the size of a chunk in its shard in bytes; None if it is not there."""
    slot = slot_of(key)
    entries = None if slot is None else _index(objects.ranges(slot.shard))
    if slot is None or entries is None or entries[slot.number, 1] == ABSENT:
        return None
    return int(entries[slot.number, 1])


def _index(read: RangeReader) -> NDArray[np.uint64] | None:
    """Read the index of a shard; None if there is no such object, ``ValueError`` if corrupt."""
    for n_left in reversed(range(_READS)):
        try:
            return read_index(read, N_CHUNKS)
        except ValueError:
            if not n_left:
                raise
            time.sleep(0.01)
    raise AssertionError


def places_of_chunks(objects: Objects, path: str) -> Iterator[Place]:
    """Yield the positions of the chunks that an array has, some of them perhaps twice.

    Those of shards whose index is corrupt are left out.
    """
    for key in objects.keys(path):
        if slot := slot_of(key):
            yield _place(slot)
        elif _SHARD.fullmatch(key):
            numbers = _numbers(_intact(objects.ranges(key)))
            yield from (_place(Slot(key, number)) for number in numbers)


def _intact(read: RangeReader) -> NDArray[np.uint64]:
    """Return the index of a shard; without chunks if there is no intact one."""
    with suppress(ValueError):
        if (entries := _index(read)) is not None:
            return entries
    return _new_index()


def _new_index() -> NDArray[np.uint64]:
    """Return an index without chunks."""
    return np.full((N_CHUNKS, 2), ABSENT, np.uint64)


def _numbers(entries: NDArray[np.uint64]) -> list[int]:
    """Return the numbers of the chunks of an index."""
    found: list[int] = np.flatnonzero(entries[:, 1] != ABSENT).tolist()
    return found


class _OwnShard:
    """A shard that this process has created."""

    def __init__(self, file: AppendedObject) -> None:
        self.file, self._entries = file, _new_index()

    def put(self, number: int, parts: Sequence[bytes]) -> None:
        """Append a chunk, which the index on the disk does not have yet."""
        self._entries[number] = self.file.append(parts), sum(map(len, parts))

    def commit(self) -> None:
        """Write the index."""
        self.file.update(encoded_index(self._entries))


class OwnShards:
    """The shards of a result that this process has created, and may append to."""

    def __init__(self, objects: Objects) -> None:
        self._objects, self._lock, self._committing = objects, threading.Lock(), threading.Lock()
        self._shards: dict[str, _OwnShard | None] = {}
        self._open: dict[str, _OwnShard] = {}  # the least recently used first
        self._changed: dict[str, _OwnShard] = {}

    def put(self, key: str, parts: Sequence[bytes]) -> bool:
        """Append a chunk to its shard; False if it has none, or another process created that.

        Readers find the chunk after :meth:`commit`. Several threads may write different chunks.
        """
        slot = slot_of(key)
        if slot is None:
            return False
        with self._lock:
            if slot.shard not in self._shards:
                self._shards[slot.shard] = self._created(slot.shard)
            own = self._shards[slot.shard]
            if own is None:
                return False
            self._open.pop(slot.shard, None)
            self._open[slot.shard] = own
            if len(self._open) > _MAX_WRITTEN:
                self._open.pop(next(iter(self._open))).file.rest()
        own.put(slot.number, parts)
        with self._lock:
            self._changed[slot.shard] = own
        return True

    def _created(self, shard: str) -> _OwnShard | None:
        if self._objects.size(shard) is not None:
            return None
        head = encoded_index(_new_index())
        own = _OwnShard(self._objects.append_to(shard, len(head)))
        return own if own.file.share(head) else None

    def commit(self) -> None:
        """Make all chunks visible that were put before; after an error, the next call does."""
        with self._committing:  # of another thread, which may be writing what this one has put
            with self._lock:
                changed, self._changed = self._changed, {}
            try:
                while changed:
                    name, own = next(iter(changed.items()))
                    own.commit()
                    del changed[name]
                    if name not in self._open:
                        own.file.rest()
            finally:
                with self._lock:
                    self._changed |= changed

    def rest(self) -> None:
        """Close all files; more may be written nevertheless."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].file.rest()


def pack(
    objects: Objects,
    path: str,
    is_kept: Callable[[Place], bool] | None = None,
    *,
    drops: bool = False,
) -> None:
    """Move the chunks of an array that are objects of their own into its shards.

    Parameters
    ----------
    is_kept
        Whether a chunk, by its position, is still needed; None: all are. Shards without any that is
        are deleted, so that they can be created again.
    drops
        Whether each chunk that is not needed is removed. All shards are then other files, to which
        no earlier run appends.
    """
    loose: dict[str, dict[int, str]] = defaultdict(dict)
    for key in objects.keys(path):
        if slot := slot_of(key):
            loose[slot.shard][slot.number] = key
        elif _SHARD.fullmatch(key):
            _ = loose[key]
    for shard, keys in loose.items():
        if not keys and is_kept is None:
            continue
        found = {*_numbers(_intact(objects.ranges(shard))), *keys}
        needed = (n for n in found if is_kept is None or is_kept(_place(Slot(shard, n))))
        wanted = set(needed) if drops or next(needed, None) is None else found
        if not wanted:
            objects.delete_one(shard)
        elif keys or drops:
            _rewrite(objects, shard, keys, sorted(wanted))
    if any(loose.values()):
        objects.delete(f"{path}/c")


def _rewrite(objects: Objects, shard: str, keys: dict[int, str], numbers: Sequence[int]) -> None:
    """Replace a shard by one with these chunks: of objects with these keys, or of the present one.

    What cannot be read is left out, and then missing.
    """
    read, memory, entries = objects.ranges(shard), ReusedMemory(), _new_index()
    present = _intact(read)
    file = objects.append_to(shard, len(encoded_index(entries)))
    for number in numbers:
        start, nbytes = map(int, present[number])
        stored = keys.get(number)
        chunk = objects.get(stored) if stored is not None else read(memory, nbytes, start)
        if chunk:
            entries[number] = file.append([bytes(chunk)]), len(chunk)
    file.publish(encoded_index(entries))
