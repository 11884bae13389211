"""Writers of a merged tile, to storage or to memory."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cached_property

import numpy as np

from ocelot_em.merge.fold import PieceReport
from ocelot_em.merge.job import Job
from ocelot_em.merge.marks import no_checksums, write_mark
from ocelot_em.merge.outcome import Outcome, TileSummary, failure
from ocelot_em.merge.plan import Piece
from ocelot_em.merge.stats import layout as layout_module
from ocelot_em.merge.stats import records
from ocelot_em.merge.stats.totals import TileTotals
from ocelot_em.model.maps import MAPS, AnyArray, Float64
from ocelot_em.model.regions import Tile, ceil_div
from ocelot_em.store.blosc import MergedMap
from ocelot_em.store.manifest import checksum_of
from ocelot_em.store.transfer import Meter, ReadAhead, WriteBehind

log = logging.getLogger(__name__)


class Writer:
    """Receives the maps and statistics of one tile; ignores what a subclass does not override."""

    takes_planes = False
    """Whether maps may be bit planes, or encoded."""

    def map(self, name: str, values: MergedMap) -> None:
        """Accept a merged map, whose memory is reused afterwards."""

    def statistics(self, piece: Piece, report: PieceReport) -> None:
        """Accept the statistics of a piece."""

    def shown(self, piece: Piece, shown: Float64) -> None:
        """Accept statistics of the pixels in which a montage shows a piece."""

    def blank(self) -> None:
        """Accept a tile without exposures."""


class MemoryWriter(Writer):
    """Keeps the maps of a tile in memory."""

    def __init__(self, job: Job, tile: Tile) -> None:
        self._names, self._shape = job.plan.maps.merged, tile.region.shape
        self.maps: dict[str, AnyArray] = {}

    def map(self, name: str, values: MergedMap) -> None:
        """Keep a copy, if the map is wanted."""
        if name in self._names and isinstance(values, np.ndarray):
            self.maps[name] = values.copy()

    def blank(self) -> None:
        """Fill all maps with their fill values."""
        for name in self._names:
            self.maps[name] = np.full(self._shape, MAPS[name].fill, MAPS[name].dtypes[0])


class TileWriter(Writer):
    """Writes one tile to ``storage``, in the background, and measures the time spent on it."""

    takes_planes = True

    def __init__(self, job: Job, tile: Tile, reader: ReadAhead, storage: WriteBehind) -> None:
        self._job, self._tile, self._reader, self._storage = job, tile, reader, storage
        self._written: list[Future[None]] = []
        self._searched_pixels = 0
        self._read, self._write = Meter(), Meter()
        self._fold_seconds = 0.0
        self._error: Exception | None = None
        self._marked: Future[None] | None = None
        self._checksums = no_checksums(job.plan)
        self._statistics: TileTotals | None = None

    def __enter__(self) -> "TileWriter":
        """Start the tile; an error within the context is kept for :meth:`outcome`."""
        self._started = time.perf_counter()
        self._before = self._reader.meter.copy(), self._storage.meter.copy()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        read, write = self._before
        self._read = self._reader.meter.since(read)
        self._write = self._storage.meter.since(write)
        seconds = time.perf_counter() - self._started
        self._fold_seconds = seconds - self._read.seconds - self._write.seconds
        if isinstance(error, Exception):
            log.debug("%s failed", self._tile, exc_info=error)
            self._error = error
        elif error is None:
            self._marked = self._storage.after(self._written, self._mark_done)
        return self._error is not None

    def map(self, name: str, values: MergedMap) -> None:
        """Encode a map of the tile and queue it for writing, if it is stored."""
        target = self._job.written.get(name)
        if target is None:
            return
        with self._storage.metered():
            for chunk, parts in target.encode(self._tile.region, values):
                self._put_chunk(name, chunk, parts)

    def statistics(self, piece: Piece, report: PieceReport) -> None:
        """Encode the statistics of a piece and queue them for writing."""
        self._searched_pixels += report.searched_pixels
        if report.statistics is not None:
            if not self._job.plan.has_parts:
                self._statistics = TileTotals.of(report.statistics)
            with self._storage.metered():
                layout, number = self._record_of(piece)
                for key, parts in records.encode_records(layout, report.statistics, number):
                    self._put(key, parts)

    def shown(self, piece: Piece, shown: Float64) -> None:
        """Encode statistics of the shown pixels of a piece and queue them for writing."""
        with self._storage.metered():
            layout, number = self._record_of(piece)
            self._put(*records.encode_shown(layout, shown, number))

    def blank(self) -> None:
        """Queue the chunks of a tile without exposures for writing."""
        with self._storage.metered():
            for name, target in self._job.written.items():
                for chunk in target.grid.touching(self._tile.region):
                    self._put_chunk(name, chunk, self._job.blank_chunk(name))

    @cached_property
    def _summary(self) -> TileSummary:
        return TileSummary(
            pixels=self._tile.region.size,
            searched_pixels=self._searched_pixels,
            read_seconds=self._read.seconds,
            fold_seconds=self._fold_seconds,
            write_seconds=self._write.seconds,
            waited_seconds=self._read.waited_seconds + self._write.waited_seconds,
            read_nbytes=self._read.nbytes,
            decoded_nbytes=self._job.decoded_nbytes(self._tile),
            written_nbytes=self._write.nbytes,
        )

    def _mark_done(self) -> None:
        """Write the done-mark of the tile; all its chunks are written."""
        assert self._job.objects is not None
        self._job.commit()
        self._job.sync()
        self._job.require_proof()
        write_mark(self._job.objects, self._job.plan, self._tile, self._summary, self._checksums)
        self._job.commit()

    @property
    def has_ended(self) -> bool:
        """Whether :meth:`outcome` need not wait."""
        return self._marked is not None and self._marked.done()

    def outcome(self) -> Outcome:
        """Wait until the tile is marked as done, or has failed and its writes have ended."""
        tile = self._tile
        try:
            self._storage.wait(self._written, quietly=True)
            if self._error is not None:
                raise self._error
            assert self._marked is not None
            self._marked.result()
        except Exception as error:
            log.debug("%s failed", tile, exc_info=True)
            return failure(tile.iy, tile.ix, error)
        return Outcome(
            tile.iy,
            tile.ix,
            self._summary,
            checksums=self._checksums,
            statistics=self._statistics,
        )

    def _put_chunk(self, name: str, chunk: Tile, parts: Sequence[bytes]) -> None:
        """Queue a chunk of a map for writing, and note its checksum."""
        target, region = self._job.written[name], self._tile.region
        height, width = target.grid.cell
        row, column = chunk.iy - region.y0 // height, chunk.ix - region.x0 // width
        number = row * ceil_div(region.shape[1], width) + column
        self._checksums[self._job.plan.maps.merged.index(name), number] = checksum_of(parts)
        self._put(target.key(chunk), parts)

    def _put(self, key: str, parts: Sequence[bytes]) -> None:
        assert self._job.objects is not None
        if not self._written:
            self._job.require_proof()
        self._written.append(self._storage.put(self._job.objects, key, parts))

    def _record_of(self, piece: Piece) -> tuple[layout_module.Layout, int]:
        """Return the layout of a piece's exposure, and the record number of this tile."""
        layout = self._job.open(piece).layout
        return layout, layout.number_of(self._tile.iy, self._tile.ix)
