"""The floor of a merge: what must be read, decoded, encoded and written, with no merge.

Same plan, executors, read-ahead, checksums, codecs and number of bytes as a merge. Input is decoded
by LZ4 alone, since a merge need not unshuffle bits. What is written is one tile of a finished
merge, again and again, so that it compresses as results do; the bits of its poses are not shuffled
again.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np

from ocelot_em.kernels.streams import decode_planes
from ocelot_em.merge import merge as pipeline
from ocelot_em.merge.fold import ChunkBatch, Fold, Merged, PieceReport, ReadAhead
from ocelot_em.merge.job import JobSpec, open_job
from ocelot_em.merge.outcome import Outcomes
from ocelot_em.model.maps import COUNT, POSES, SQUARED_SUM, SUM, AnyArray
from ocelot_em.model.regions import Region
from ocelot_em.model.workspace import Workspace
from ocelot_em.store.arrays import ChunkedMap
from ocelot_em.store.blosc import BitPlanes, lz4_address
from ocelot_em.store.contract import ReusedMemory
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import MapGroup
from ocelot_em.store.transfer import READ_TOGETHER, Arrival, Meter

FINISHED = "finished.zarr"
"""Name of the finished merge, beside the outputs."""


class Floor(Fold):
    """Decodes all that comes in, and writes what it has."""

    def __init__(self, fold: Fold, written: dict[str, AnyArray | BitPlanes]) -> None:
        vars(self).update(vars(fold))
        self._written = written

    def merge(self, reader: ReadAhead, work: Workspace, report: PieceReport) -> Merged:
        """Read and write in the order of a merge."""
        report.searched_pixels = 0
        left = dict(self._written)
        first, poses = self.maps.phases[0], set(self.maps.pose)
        self._read(reader, work, first)
        for name in first:
            yield name, left.pop(name)
        for name in (SUM, SQUARED_SUM):
            self._read(reader, work, (name,))
        for name, values in left.items():
            if name not in poses:
                yield name, values
        for name in self.maps.pose:
            if name in left:
                self._read(reader, work, (name,))
                yield name, left[name]

    def _read(self, reader: ReadAhead, work: Workspace, names: Sequence[str]) -> None:
        n_left = len(self.sources) * len(names)
        while n_left:
            n = min(READ_TOGETHER, n_left)
            with reader.take(n) as arrivals:
                for arrival in arrivals:
                    decode(arrival, work, work.flat("decoded", "f8"))
            n_left -= n


def decode(arrival: Arrival, work: Workspace, out: AnyArray) -> int:
    """Decode the streams of a chunk, each block to the same place; return its size in pixels."""
    for bits in (False, True):
        batch = ChunkBatch([arrival], work, bits=bits)
        if batch.n and batch.rows[0, 1]:
            for block in range(work.n_pixels // batch.n):
                decode_block(batch, block, out)
            return batch.n
    return 0


def decode_block(batch: ChunkBatch, block: int, out: AnyArray) -> None:
    parts = np.zeros(8, np.int64)
    assert decode_planes(lz4_address(), batch.rows[0], block, batch.n, out.ctypes.data, parts)


def attempt_floor(spec: JobSpec, tiles: Iterable[tuple[int, int]]) -> Outcomes:
    """Do as :func:`ocelot_em.merge.merge.attempt_tiles` does, without merging."""
    job = open_job(spec)
    (piece,) = job.plan.pieces(job.plan.grid[0])
    opened = job.open(piece)
    if not isinstance(opened.fold, Floor):
        assert COUNT not in job.plan.maps.merged
        finished = str(Path(spec.output).with_name(FINISHED))
        assert isinstance(opened.fold, Fold)
        explicit = opened.fold.space is None
        written = first_tile(finished, job.plan.maps.merged, job.plan.tile, explicit)
        opened.fold = Floor(opened.fold, written)
    yield from pipeline.attempt_tiles(spec, tiles)


@lru_cache(maxsize=2)
def first_tile(
    store: str, names: tuple[str, ...], tile: tuple[int, int], explicit: bool
) -> dict[str, AnyArray | BitPlanes]:
    """Maps of the upper left tile of a merged result; explicit poses as bit planes."""
    maps = MapGroup(open_objects(store)).open(names)
    region = Region(0, tile[0], 0, tile[1])
    return {
        name: planes_of(chunked, region) if explicit and name in POSES else chunked.read(region)[0]
        for name, chunked in maps.items()
    }


def planes_of(chunked: ChunkedMap, region: Region) -> BitPlanes | AnyArray:
    """Return the bit planes of a region that is one chunk, or its values."""
    chunks, work = list(chunked.grid.touching(region)), Workspace(region.size)
    if len(chunks) == 1:
        frame = chunked.fetch(chunks[0], ReusedMemory())
        batch = ChunkBatch([Arrival(chunked, Meter(), (chunks[0], frame))], work, bits=True)
        if batch.n:
            words = np.empty(region.size // 2, np.uint64)
            for block in range(region.size // batch.n):
                decode_block(batch, block, words[block * batch.n // 2 :])
            return BitPlanes(words, 4 * batch.n)
    return cast("AnyArray", chunked.read(region)[0])
