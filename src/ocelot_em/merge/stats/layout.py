"""Storage layout of the tiles' records, and how they are read and checked."""

import threading
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from ocelot_em.errors import (
    CorruptChunkError,
    MissingChunkError,
)
from ocelot_em.merge.overlap import SHOWN_FIELDS
from ocelot_em.merge.plan import MergePlan, PlannedExposure
from ocelot_em.merge.stats.collected import (
    CANDIDATE_FIELDS,
    EDGES,
    EXTREMES,
    N_FLAT,
    TILE_FIELDS,
    Histograms,
    PixelStatistics,
    StatisticsScope,
    candidate_capacity,
    candidate_level,
)
from ocelot_em.model.maps import (
    BEST_PARTIAL,
    COUNT,
    INDEX,
    SCALED_MIP,
    AnyArray,
    Float64,
    MapSet,
    PoseForm,
)
from ocelot_em.model.regions import Region, ceil_div
from ocelot_em.store import arrays as store
from ocelot_em.store import constants
from ocelot_em.store.blosc import max_encoded_nbytes
from ocelot_em.store.contract import Objects, ReusedMemory
from ocelot_em.store.manifest import identity

COUNTS = "counts"
NUMBERS = "numbers"
SHOWN = "shown"
"""Names of the one-dimensional arrays of records, in which each record is one chunk: histograms;
statistics with candidates; pixels shown in a montage."""


class Record(NamedTuple):
    """Contents of a tile's record, other than its histograms.

    Parameters
    ----------
    statistics
        Statistics of its pixels.
    candidates
        Candidates, with columns :data:`CANDIDATE_FIELDS`.
    edges
        z-scores along its edges, :data:`ocelot_em.merge.stats.collected.EDGES`; only in a montage.
    """

    statistics: PixelStatistics
    candidates: Float64
    edges: Float64


_per_thread = threading.local()


def _memory_of_thread(what: str) -> ReusedMemory:
    """Return this thread's memory for one kind of record."""
    if not hasattr(_per_thread, what):
        setattr(_per_thread, what, ReusedMemory())
    memory: ReusedMemory = getattr(_per_thread, what)
    return memory


@dataclass(frozen=True)
class Layout:
    """Paths and structure of the records of an exposure.

    There is one record for each tile that the exposure touches, numbered row by row. Adding another
    exposure later does not change them.

    Parameters
    ----------
    exposure
        The exposure.
    tile
        Height and width of a tile.
    maps
        Maps of the result.
    identity
        Identity of the result's tiles; None in results of versions 1 and 2.
    """

    exposure: PlannedExposure
    tile: tuple[int, int]
    maps: MapSet
    identity: str | None

    @classmethod
    def of(cls, plan: MergePlan, exposure: PlannedExposure) -> "Layout":
        """Return the layout of one of the exposures of a plan."""
        return cls(exposure, plan.tile, plan.maps, plan.identity)

    @property
    def has_parts(self) -> bool:
        """Whether the result is made of exposures or groups."""
        return self.maps.exposures

    @property
    def folder(self) -> str:
        """Path of the group of the records."""
        return (
            f"progress/{constants.EXPOSURES}/{self.exposure.number}"
            if self.has_parts
            else "progress"
        )

    @property
    def paths(self) -> list[str]:
        """Paths of the arrays of the records."""
        kinds = (COUNTS, NUMBERS, SHOWN) if self.has_parts else (COUNTS, NUMBERS)
        return [f"{self.folder}/{what}" for what in kinds]

    @cached_property
    def scope(self) -> StatisticsScope:
        """Pixels of the exposure that count, and related numbers."""
        return StatisticsScope(
            self.exposure.counted,
            candidate_level(self.exposure.total_projections),
            len(self.exposure.contributions),
            len(self.exposure.sources),
            tuple(n for n, s in enumerate(self.exposure.sources) if s.is_counted_by_pixel),
        )

    @property
    def _first(self) -> tuple[int, int]:
        """Row and column of the first touched tile."""
        on_canvas = self.exposure.on_canvas
        return on_canvas.y0 // self.tile[0], on_canvas.x0 // self.tile[1]

    @property
    def counts_of_tiles(self) -> tuple[int, int]:
        """Number of rows and columns of touched tiles."""
        on_canvas, (iy, ix) = self.exposure.on_canvas, self._first
        rows, columns = ceil_div(on_canvas.y1, self.tile[0]), ceil_div(on_canvas.x1, self.tile[1])
        return rows - iy, columns - ix

    def __len__(self) -> int:
        rows, columns = self.counts_of_tiles
        return rows * columns

    def number_of(self, iy: int, ix: int) -> int:
        """Number of a tile's record, which is its chunk number."""
        first_y, first_x = self._first
        return (iy - first_y) * self.counts_of_tiles[1] + ix - first_x

    def tile_of(self, number: int) -> tuple[int, int]:
        """Row and column of the tile of a record."""
        (first_y, first_x), (_, n_columns) = self._first, self.counts_of_tiles
        return first_y + number // n_columns, first_x + number % n_columns

    def region_of(self, number: int) -> Region:
        """Pixels of a record, in exposure coordinates."""
        iy, ix = self.tile_of(number)
        (height, width), (dy, dx) = self.tile, self.exposure.origin
        cell = Region(iy * height, (iy + 1) * height, ix * width, (ix + 1) * width)
        return cell.shifted(-dy, -dx).intersect(self.exposure.region)

    @property
    def n_statistics(self) -> int:
        """Number of values of :class:`PixelStatistics`, which are first in a record."""
        scope = self.scope
        return PixelStatistics.n_flat(scope.n_partials, scope.n_sources, len(scope.with_counts))

    @property
    def candidates_shape(self) -> tuple[int, int]:
        """Shape of the candidates, which come next, row by row."""
        return candidate_capacity(self.tile), len(CANDIDATE_FIELDS)

    @property
    def edges_shape(self) -> tuple[int, int]:
        """Shape of the z-scores along the edges, which are last."""
        return len(EDGES), max(self.tile) if self.has_parts else 0

    @cached_property
    def n_numbers(self) -> int:
        """Number of values in a whole record."""
        (rows, columns), (n_edges, length) = self.candidates_shape, self.edges_shape
        return self.n_statistics + rows * columns + n_edges * length

    def length(self, what: str) -> int:
        """Return the number of stored values of one kind of record, with its identity."""
        own = {COUNTS: N_FLAT, NUMBERS: self.n_numbers, SHOWN: len(SHOWN_FIELDS)}[what]
        return own + (self.identity is not None)

    def encode(self, what: str, number: int, record: AnyArray) -> tuple[str, list[bytes]]:
        """Return the object of a record: key and parts of its bytes.

        The last value of ``record`` is room for the identity, and is overwritten.
        """
        key = f"{self.folder}/{what}/c/{number}"
        if self.identity is None:
            return key, store.encode_chunk(record[:-1])
        record[-1] = identity(self.identity, key)
        return key, store.encode_chunk(record)

    def counts(self, objects: Objects, number: int) -> Histograms:
        """Read the histograms of a record; valid until this thread reads the next one."""
        return Histograms.from_flat(self._read(objects, COUNTS, number, "uint32"))

    def statistics(self, objects: Objects, number: int) -> PixelStatistics:
        """Read the statistics of a record."""
        flat = self._read(objects, NUMBERS, number, "float64")
        return self._statistics(objects, number, flat[: self.n_statistics].copy())

    def record(self, objects: Objects, number: int) -> Record:
        """Read the statistics, the candidates and the edges of a record."""
        flat = self._read(objects, NUMBERS, number, "float64").copy()
        rows, columns = self.candidates_shape
        own, candidates, edges = np.split(
            flat, [self.n_statistics, self.n_statistics + rows * columns]
        )
        candidates = candidates.reshape(self.candidates_shape)
        candidates = candidates[~np.isnan(candidates[:, 0])]
        statistics = self._statistics(objects, number, own)
        if wrong := self._wrong_candidates(candidates, number):
            label = self._label(objects, NUMBERS, number)
            raise CorruptChunkError(f"{label}: {wrong}; merge again")
        return Record(statistics, candidates, edges.reshape(self.edges_shape))

    def _statistics(self, objects: Objects, number: int, own: Float64) -> PixelStatistics:
        n_partials = len(self.exposure.contributions)
        counts = own[len(EXTREMES) : len(TILE_FIELDS) + n_partials]
        wrong = counts[~_are_integers(counts, 0, 2**53)]
        if wrong.size:
            raise CorruptChunkError(
                f"{self._label(objects, NUMBERS, number)}: expected counts of pixels, got "
                f"{wrong[0]}; merge again"
            )
        return PixelStatistics.from_flat(own, n_partials, len(self.scope.with_counts))

    def _wrong_candidates(self, rows: Float64, number: int) -> str:
        """Describe the first invalid value of the candidates; empty if there is none."""
        region, n_partials = self.region_of(number), len(self.exposure.contributions)
        bounds = [
            ("y", region.y0, region.y1 - 1),
            ("x", region.x0, region.x1 - 1),
            (BEST_PARTIAL, 0, n_partials - 1),
        ]
        if self.maps.form is PoseForm.INDEXED:
            bounds.append((INDEX, 0, 2**31 - 2))
        if self.maps.counts:
            bounds.append((COUNT, 0, 2**62))
        for name, low, high in bounds:
            values = rows[:, CANDIDATE_FIELDS.index(name)]
            wrong = values[~_are_integers(values, low, high)]
            if wrong.size:
                return f"{name} of candidates: expected {low} to {high}, got {wrong[0]}"
        if np.isnan(rows[:, CANDIDATE_FIELDS.index(SCALED_MIP)]).any():
            return "expected z-scores of candidates, got NaN"
        return ""

    def shown(self, objects: Objects, number: int) -> Float64:
        """Read the statistics of a record's pixels that a montage shows."""
        return self._read(objects, SHOWN, number, "float64").copy()

    def check(self, objects: Objects, number: int) -> None:
        """Raise unless a record can be read.

        Raises
        ------
        ChunkError
        """
        self.counts(objects, number)
        self.statistics(objects, number)
        if self.has_parts:
            self.shown(objects, number)

    def _read(self, objects: Objects, what: str, number: int, dtype: str) -> AnyArray:
        path = f"{self.folder}/{what}"
        key = f"{path}/c/{number}"
        nbytes = self.length(what) * np.dtype(dtype).itemsize
        encoded = objects.get(key, max_encoded_nbytes(nbytes))
        if encoded is None:
            raise MissingChunkError(
                f"{objects.url}: {path}: the record of pixels {self.region_of(number)} is missing: "
                f"expected an object {key}; merge again"
            )
        # Allocating memory for each of thousands of records would fragment the heap.
        memory, label = _memory_of_thread(what), partial(self._label, objects, what, number)
        record = np.frombuffer(store.decode_chunk(encoded, nbytes, memory, label), dtype)
        if self.identity is None:
            return record
        if record[-1] != identity(self.identity, key):
            raise CorruptChunkError(f"{label()}: belongs to another tile or result; merge again")
        return record[:-1]

    def _label(self, objects: Objects, what: str, number: int) -> str:
        """Return a record's name for errors."""
        path = f"{self.folder}/{what}"
        return f"{objects.url}: {path}: record {number}, pixels {self.region_of(number)}"


def _are_integers(values: Float64, low: int, high: int) -> AnyArray:
    """Whether each value is an integer within these bounds; NaN is not."""
    integers: AnyArray = (values >= low) & (values <= high) & (values == np.floor(values))
    return integers
