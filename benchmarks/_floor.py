"""The floor of a merge: the same chunks read and decoded, encoded and written, with no merge.

Same plan, executors, read-ahead, codecs and number of bytes as a merge; only the arithmetic is
left out. What is written is one tile of a finished merge, again and again, so that it compresses
as results do.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ocelot_em.merge import merge as pipeline
from ocelot_em.merge.fold import Fold, Merged, PieceReport, ReadAhead
from ocelot_em.merge.job import JobSpec, open_job
from ocelot_em.merge.outcome import Outcome
from ocelot_em.model.maps import COUNT, SQUARED_SUM, SUM, AnyArray
from ocelot_em.model.regions import Region
from ocelot_em.model.workspace import Workspace
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import MapGroup

FINISHED = "finished.zarr"
"""Name of the finished merge, beside the outputs."""


class Copy(Fold):
    """Decodes all that comes in, and writes what it has."""

    def __init__(self, fold: Fold, written: dict[str, AnyArray]) -> None:
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
        for _ in self._parts(reader, work, names, range(len(self.sources))):
            pass


def attempt_copy(spec: JobSpec, tiles: Sequence[tuple[int, int]]) -> list[Outcome]:
    """Do as :func:`ocelot_em.merge.merge.attempt_tiles` does, without merging."""
    job = open_job(spec)
    (piece,) = job.plan.pieces(job.plan.grid[0])
    opened = job.open(piece)
    if not isinstance(opened.fold, Copy):
        assert COUNT not in job.plan.maps.merged
        finished = str(Path(spec.output).with_name(FINISHED))
        assert isinstance(opened.fold, Fold)
        opened.fold = Copy(opened.fold, first_tile(finished, job.plan.maps.merged, job.plan.tile))
    return pipeline.attempt_tiles(spec, tiles)


@lru_cache(maxsize=2)
def first_tile(store: str, names: tuple[str, ...], tile: tuple[int, int]) -> dict[str, AnyArray]:
    """Maps of the upper left tile of a merged result."""
    maps = MapGroup(open_objects(store)).open(names)
    region = Region(0, tile[0], 0, tile[1])
    return {name: chunked.read(region)[0] for name, chunked in maps.items()}
