"""Statistics and candidates of a merged result, as stored: a record for each tile, then the sums.

Of a montage, every exposure has records of its own, of all its pixels, shown or not.

Workers write a tile's records before its done-mark; the driver adds them up when the last tile is
done. Readers need no maps.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from os import PathLike
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ocelot_em.errors import (
    CorruptChunkError,
    FormatError,
    IncompleteError,
    MissingChunkError,
    OcelotError,
)
from ocelot_em.merge.overlap import SHOWN_FIELDS
from ocelot_em.merge.plan import MergePlan, PlannedExposure
from ocelot_em.merge.stats.collected import (
    CANDIDATE_FIELDS,
    EDGES,
    EXTREMES,
    N_FLAT,
    NEIGHBOUR_FIELDS,
    NEIGHBOURS,
    TILE_FIELDS,
    Counting,
    Histograms,
    TileNumbers,
    TileStatistics,
    candidate_capacity,
    candidate_level,
)
from ocelot_em.model.histograms import JOINT_MIP_AXIS, JOINT_Z_AXIS, MIP_AXIS, Z_AXIS, Axis
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
from ocelot_em.store import attributes as fmt
from ocelot_em.store.blosc import most_encoded_nbytes
from ocelot_em.store.objects import Objects, ReusedMemory, open_objects, return_free_memory
from ocelot_em.store.search import read_attributes

_T = TypeVar("_T")

COUNTS = "counts"
NUMBERS = "numbers"
SHOWN = "shown"
"""Arrays of records, one after another in one dimension, so that a record is one file in a folder
of all: histograms; statistics with candidates; what a montage shows."""

EXPOSURES_BETWEEN_TIDYING = 32
"""While the statistics of exposures are written, each leaves some hundred kB of freed memory."""

MIP_HISTOGRAM = "mip_histogram"
Z_HISTOGRAM = "scaled_mip_histogram"
JOINT_HISTOGRAM = "joint_histogram"


def new_tile_statistics(plan: MergePlan) -> TileStatistics:
    """Make a place for what is collected of pieces of exposures, one after another."""
    return TileStatistics(candidate_capacity(plan.tile), max(plan.tile) if plan.is_montage else 0)


class Numbers(NamedTuple):
    """What a record holds besides histograms.

    Parameters
    ----------
    statistics
        Of its pixels.
    candidates
        Columns :data:`CANDIDATE_FIELDS`.
    edges
        z-scores along its edges, :data:`ocelot_em.merge.stats.collected.EDGES`; not of a whole
        search.
    """

    statistics: TileNumbers
    candidates: Float64
    edges: Float64


_of_thread = threading.local()


def _memory_of_thread(what: str) -> ReusedMemory:
    """Return this thread's memory for one kind of record."""
    if not hasattr(_of_thread, what):
        setattr(_of_thread, what, ReusedMemory())
    memory: ReusedMemory = getattr(_of_thread, what)
    return memory


@dataclass(frozen=True)
class Layout:
    """Where the records of an exposure are, and numbers in them.

    There is one record for each tile that the exposure touches, numbered row by row. Another
    exposure that comes later changes nothing of this.

    Parameters
    ----------
    exposure
        Which one.
    tile
        Height and width of a tile.
    maps
        Which maps the result has.
    """

    exposure: PlannedExposure
    tile: tuple[int, int]
    maps: MapSet

    @classmethod
    def of(cls, plan: MergePlan, exposure: PlannedExposure) -> "Layout":
        """Return the layout of one of the exposures of a plan."""
        return cls(exposure, plan.tile, plan.maps)

    @property
    def is_montage(self) -> bool:
        """Whether there are other exposures."""
        return self.maps.exposures

    @property
    def folder(self) -> str:
        """Path of the group that the records are in."""
        return f"progress/{fmt.EXPOSURES}/{self.exposure.number}" if self.is_montage else "progress"

    @property
    def counting(self) -> Counting:
        """What counts of the exposure."""
        return Counting(
            self.exposure.counted,
            candidate_level(self.exposure.total_projections),
            len(self.exposure.contributions),
            len(self.exposure.sources),
        )

    @property
    def _first(self) -> tuple[int, int]:
        """Row and column of the first tile that is touched."""
        on_canvas = self.exposure.on_canvas
        return on_canvas.y0 // self.tile[0], on_canvas.x0 // self.tile[1]

    @property
    def counts_of_tiles(self) -> tuple[int, int]:
        """Rows and columns of tiles that are touched."""
        on_canvas, (iy, ix) = self.exposure.on_canvas, self._first
        rows, columns = ceil_div(on_canvas.y1, self.tile[0]), ceil_div(on_canvas.x1, self.tile[1])
        return rows - iy, columns - ix

    def __len__(self) -> int:
        rows, columns = self.counts_of_tiles
        return rows * columns

    def number_of(self, iy: int, ix: int) -> int:
        """Number of the record of a tile: the chunk that it is."""
        first_y, first_x = self._first
        return (iy - first_y) * self.counts_of_tiles[1] + ix - first_x

    def region_of(self, number: int) -> Region:
        """Pixels that a record is of, in the exposure."""
        (first_y, first_x), (_, n_columns) = self._first, self.counts_of_tiles
        iy, ix = first_y + number // n_columns, first_x + number % n_columns
        (height, width), (dy, dx) = self.tile, self.exposure.origin
        cell = Region(iy * height, (iy + 1) * height, ix * width, (ix + 1) * width)
        return cell.shifted(-dy, -dx).intersect(self.exposure.region)

    @property
    def n_statistics(self) -> int:
        """Numbers of :class:`TileNumbers`, at the beginning of a record."""
        of = self.counting
        return TileNumbers.n_flat(of.n_partials, of.n_sources)

    @property
    def candidates_shape(self) -> tuple[int, int]:
        """Of the candidates, which come next, row by row."""
        return candidate_capacity(self.tile), len(CANDIDATE_FIELDS)

    @property
    def edges_shape(self) -> tuple[int, int]:
        """Of the z-scores along the edges, which are the rest."""
        return len(EDGES), max(self.tile) if self.is_montage else 0

    @property
    def n_numbers(self) -> int:
        """Of a whole record."""
        (rows, columns), (n_edges, length) = self.candidates_shape, self.edges_shape
        return self.n_statistics + rows * columns + n_edges * length

    def counts(self, objects: Objects, number: int) -> Histograms:
        """Read the histograms of a record; valid until this thread reads the next."""
        return Histograms.from_flat(self._read(objects, COUNTS, number, N_FLAT, "uint32"))

    def statistics(self, objects: Objects, number: int) -> TileNumbers:
        """Read the statistics of a record."""
        flat = self._read(objects, NUMBERS, number, self.n_numbers, "float64")
        return self._statistics(objects, number, flat[: self.n_statistics].copy())

    def numbers(self, objects: Objects, number: int) -> Numbers:
        """Read the statistics, the candidates and the edges of a record."""
        flat = self._read(objects, NUMBERS, number, self.n_numbers, "float64").copy()
        rows, columns = self.candidates_shape
        own, candidates, edges = np.split(
            flat, [self.n_statistics, self.n_statistics + rows * columns]
        )
        candidates = candidates.reshape(self.candidates_shape)
        candidates = candidates[~np.isnan(candidates[:, 0])]
        statistics = self._statistics(objects, number, own)
        if wrong := self._wrong_candidates(candidates, number):
            place = self._place(objects, NUMBERS, number)
            raise CorruptChunkError(f"{place}: {wrong}; merge again")
        return Numbers(statistics, candidates, edges.reshape(self.edges_shape))

    def _statistics(self, objects: Objects, number: int, own: Float64) -> TileNumbers:
        n_partials = len(self.exposure.contributions)
        counts = own[len(EXTREMES) : len(TILE_FIELDS) + n_partials]
        wrong = counts[~_are_integers(counts, 0, 2**53)]
        if wrong.size:
            raise CorruptChunkError(
                f"{self._place(objects, NUMBERS, number)}: expected counts of pixels, got "
                f"{wrong[0]}; merge again"
            )
        return TileNumbers.from_flat(own, n_partials)

    def _wrong_candidates(self, rows: Float64, number: int) -> str:
        """Say where a candidate lies, or what it points to, if that cannot be."""
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
        """Read what is shown of a record's pixels; of a montage only."""
        return self._read(objects, SHOWN, number, len(SHOWN_FIELDS), "float64").copy()

    def check(self, objects: Objects, number: int) -> None:
        """Raise unless a record can be read.

        Raises
        ------
        ChunkError
        """
        self.counts(objects, number)
        self.statistics(objects, number)
        if self.is_montage:
            self.shown(objects, number)

    def _read(self, objects: Objects, what: str, number: int, n: int, dtype: str) -> AnyArray:
        path = f"{self.folder}/{what}"
        key = f"{path}/c/{number}"
        nbytes = n * np.dtype(dtype).itemsize
        encoded = objects.get(key, most_encoded_nbytes(nbytes))
        if encoded is None:
            raise MissingChunkError(
                f"{objects.url}: {path}: the record of pixels {self.region_of(number)} is missing: "
                f"expected an object {key}; merge again"
            )
        # Fresh memory for each of thousands of records would be scattered, and add up.
        memory, place = _memory_of_thread(what), self._place(objects, what, number)
        return np.frombuffer(store.decode_chunk(encoded, nbytes, memory, place), dtype)

    def _place(self, objects: Objects, what: str, number: int) -> str:
        """How errors call a record."""
        path = f"{self.folder}/{what}"
        return f"{objects.url}: {path}: record {number}, pixels {self.region_of(number)}"


def _are_integers(values: Float64, low: int, high: int) -> AnyArray:
    """Which values are integers within these bounds; NaN is none."""
    integers: AnyArray = (values >= low) & (values <= high) & (values == np.floor(values))
    return integers


def create_records(objects: Objects, plan: MergePlan) -> None:
    """Write the metadata of the tiles' records."""
    fields = {"tile_fields": list(TILE_FIELDS), "candidate_fields": list(CANDIDATE_FIELDS)}
    if plan.is_montage:
        store.create_group(objects, f"progress/{fmt.EXPOSURES}", {})

    def create(exposure: PlannedExposure) -> None:
        layout = Layout.of(plan, exposure)
        arrays: list[tuple[str, int, str, dict[str, Any]]] = [
            (COUNTS, N_FLAT, "uint32", {}),
            (NUMBERS, layout.n_numbers, "float64", fields),
        ]
        if plan.is_montage:
            store.create_group(objects, layout.folder, {})
            arrays.append((SHOWN, len(SHOWN_FIELDS), "float64", {"fields": list(SHOWN_FIELDS)}))
        for path, n, dtype, attributes in arrays:
            store.create_array(
                objects,
                f"{layout.folder}/{path}",
                shape=(len(layout) * n,),
                chunk=(n,),
                dtype=dtype,
                fill=0 if path == COUNTS else float("nan"),
                dimensions=("record",),
                attributes=attributes,
            )

    with ThreadPoolExecutor(_n_threads()) as pool:
        deque(pool.map(create, plan.exposures), maxlen=0)


def has_records(objects: Objects, plan: MergePlan) -> bool:
    """Whether tiles of a merge have records; those of early versions have none."""
    first = Layout.of(plan, plan.exposures[0])
    return objects.get(f"{first.folder}/{NUMBERS}/zarr.json") is not None


def encode_records(
    layout: Layout, collection: TileStatistics, number: int
) -> Iterator[tuple[str, list[bytes]]]:
    """Give the objects of a record: keys, and parts of their bytes."""
    numbers = np.concatenate(
        [
            collection.statistics.flat,
            collection.candidates.reshape(-1),
            collection.edges.reshape(-1),
        ]
    )
    for what, record in ((COUNTS, collection.counts), (NUMBERS, numbers)):
        yield f"{layout.folder}/{what}/c/{number}", store.encode_chunk(record)


def encode_shown(layout: Layout, shown: Float64, number: int) -> tuple[str, list[bytes]]:
    """Give the object that says what is shown of a record's pixels: key, and parts of its bytes."""
    return f"{layout.folder}/{SHOWN}/c/{number}", store.encode_chunk(shown)


@dataclass(frozen=True)
class Summary:
    """What is known of a merged map without reading it.

    Parameters
    ----------
    attributes
        Counts of pixels, ranges, partials.
    histograms
        Of all valid, searched pixels.
    """

    attributes: fmt.StatisticsAttributes
    histograms: Histograms


def finish(objects: Objects, plan: MergePlan) -> None:
    """Add up the records of all tiles, and write the sums: of exposures, and of all together."""
    # The same memory for all exposures: new one for each would be scattered, and add up.
    everything, histograms = Histograms.empty("int64"), Histograms.empty("int64")
    totals, about = [], []
    for place, exposure in enumerate(plan.exposures, 1):
        layout = Layout.of(plan, exposure)
        histograms.clear()
        total = _add_up(objects, layout, histograms)
        totals.append((exposure, total))
        everything.add(histograms)
        if not plan.is_montage:
            continue
        _write_summary(
            objects, statistics_path(exposure.number), histograms, [(exposure, total)], ()
        )
        shown = np.zeros(len(SHOWN_FIELDS))
        for own in _in_threads(partial(layout.shown, objects), len(layout)):
            shown += own
        about.append(_exposure_statistics(exposure, int(histograms.z.sum()), shown))
        if place % EXPOSURES_BETWEEN_TIDYING == 0:
            return_free_memory()
    _write_summary(objects, "statistics", everything, totals, tuple(about))


def _add_up(objects: Objects, layout: Layout, histograms: Histograms) -> TileNumbers:
    """Add the records of an exposure up, its histograms to those that are given."""
    lock = threading.Lock()

    def read(number: int) -> TileNumbers:
        counted = layout.counts(objects, number)
        with lock:
            histograms.add(counted)
        return layout.statistics(objects, number)

    of = layout.counting
    total = TileNumbers.empty(of.n_partials, of.n_sources)
    for statistics in _in_threads(read, len(layout)):
        total.add(statistics)
    return total


def statistics_path(number: int) -> str:
    """Path of the group with the statistics of an exposure."""
    return f"statistics/{fmt.EXPOSURES}/{number}"


def _write_summary(
    objects: Objects,
    path: str,
    histograms: Histograms,
    totals: Sequence[tuple[PlannedExposure, TileNumbers]],
    exposures: tuple[fmt.ExposureStatistics, ...],
) -> None:
    groups = path.split("/")
    for depth in range(1, len(groups) + 1):
        store.create_group(objects, "/".join(groups[:depth]), {})
    for name, counts, axes in (
        (MIP_HISTOGRAM, histograms.mip, (MIP_AXIS,)),
        (Z_HISTOGRAM, histograms.z, (Z_AXIS,)),
        (JOINT_HISTOGRAM, histograms.joint, (JOINT_MIP_AXIS, JOINT_Z_AXIS)),
    ):
        _write_histogram(objects, f"{path}/{name}", counts, axes)
    about = _attributes(totals, int(histograms.z.sum()), exposures)
    store.update_attributes(objects, path, fmt.dump_attributes(about))


def _n_threads() -> int:
    return min(os.cpu_count() or 1, 8)


@lru_cache(maxsize=1)
def _readers() -> ThreadPoolExecutor:
    """Threads that read records; the same for all exposures, since each new one takes memory."""
    return ThreadPoolExecutor(_n_threads(), "ocelot-records")


def _in_threads(read: Callable[[int], _T], n: int) -> Iterator[_T]:
    """Read records by number, a bounded number of them ahead."""
    numbers = iter(range(n))
    while batch := list(islice(numbers, 16 * _n_threads())):
        yield from _readers().map(read, batch)


def _write_histogram(objects: Objects, path: str, counts: AnyArray, axes: Sequence[Axis]) -> None:
    is_mip = path.endswith(f"/{MIP_HISTOGRAM}")
    dimensions = ("mip",) if is_mip else ("mip", "scaled_mip")[-counts.ndim :]
    store.create_array(
        objects,
        path,
        shape=counts.shape,
        chunk=counts.shape,
        dtype="int64",
        fill=0,
        dimensions=dimensions,
        attributes={"low": [axis.low for axis in axes], "width": [axis.width for axis in axes]},
    )
    key = "/".join([path, "c", *("0" for _ in counts.shape)])
    store.write_chunk(objects, key, np.ascontiguousarray(counts))


def _attributes(
    totals: Sequence[tuple[PlannedExposure, TileNumbers]],
    searched: int,
    exposures: tuple[fmt.ExposureStatistics, ...],
) -> fmt.StatisticsAttributes:
    """Put into words what was counted of exposures together."""
    extremes = np.array([total.extremes for _, total in totals])
    lowest_mip, lowest_z = map(float, extremes[:, (0, 2)].min(axis=0))
    highest_mip, highest_z = map(float, extremes[:, (1, 3)].max(axis=0))
    counts = np.sum([total.counts for _, total in totals], axis=0)
    nan, zero_std, unsearched = map(int, counts)
    level = max(candidate_level(exposure.total_projections) for exposure, _ in totals)
    return fmt.StatisticsAttributes(
        valid_pixels=sum(exposure.counted.size for exposure, _ in totals),
        searched_pixels=searched,
        unsearched_pixels=unsearched,
        nan_pixels=nan,
        zero_std_pixels=zero_std,
        mip_range=(lowest_mip, highest_mip) if searched else None,
        scaled_mip_range=(lowest_z, highest_z) if searched else None,
        candidate_level=level if np.isfinite(level) else None,
        n_candidates=sum(total.n_candidates for _, total in totals),
        partials=tuple(
            fmt.PartialStatistics(
                name=contribution.name,
                total_projections=contribution.total_projections,
                won_pixels=int(won),
            )
            for exposure, total in totals
            for contribution, won in zip(exposure.contributions, total.wins, strict=True)
        ),
        sources=tuple(
            _source_statistics(source.name, source.total_projections, moments)
            for exposure, total in totals
            for source, moments in zip(exposure.sources, total.moments, strict=True)
        ),
        exposures=exposures,
    )


def _exposure_statistics(
    exposure: PlannedExposure, searched: int, shown: Float64
) -> fmt.ExposureStatistics:
    alone, overlap = shown.reshape(2, -1)
    return fmt.ExposureStatistics(
        id=exposure.id,
        number=exposure.number,
        total_projections=exposure.total_projections,
        valid_pixels=exposure.counted.size,
        searched_pixels=searched,
        alone=_shown_statistics(alone),
        overlap=_shown_statistics(overlap),
    )


def _shown_statistics(sums: Float64) -> fmt.ShownStatistics:
    pixels, total, squared_total = map(float, sums)
    if not pixels:
        return fmt.ShownStatistics(pixels=0)
    mean = total / pixels
    variance = max(squared_total / pixels - mean * mean, 0.0)
    return fmt.ShownStatistics(pixels=int(pixels), mean=mean, std=variance**0.5)


def _source_statistics(name: str, count: int, moments: Float64) -> fmt.SourceStatistics:
    """Turn sums over the pixels of a source's maps into statistics of its correlations."""
    (n, total, squared_total), (n_squared, energy, _) = moments
    known = n > 0 and n_squared > 0 and count > 0
    if not known:
        return fmt.SourceStatistics(name=name, total_projections=count)
    mean = total / n
    spread = max(squared_total / n - mean * mean, 0.0) ** 0.5
    # Mean over pixels of Q / N - (S / N)**2.
    variance = energy / n_squared / count - squared_total / n / count**2
    return fmt.SourceStatistics(
        name=name,
        total_projections=count,
        mean=mean / count,
        mean_spread=spread / count,
        std=max(variance, 0.0) ** 0.5,
        correlation_sum=float(total),
        correlation_squared_sum=float(energy),
    )


def read_summary(place: str | PathLike[str], exposure: int | None = None) -> Summary | None:
    """Read the statistics of a merged result; None if it was merged without.

    Parameters
    ----------
    place
        Path or URL of the result.
    exposure
        Number of one of the exposures of a montage; None: of all together.

    Raises
    ------
    StoreNotFoundError, FormatError
        It is not a merged result.
    IncompleteError
        It was never finished.
    """
    objects = open_objects(place)
    open_merged_result(objects)
    return summary_at(objects, "statistics" if exposure is None else statistics_path(exposure))


def summary_at(objects: Objects, path: str) -> Summary | None:
    """Read the statistics of a group of a finished merged result; None if it is not there.

    Raises
    ------
    FormatError
    """
    attributes = store.group_attributes(objects, path)
    if attributes is None:
        return None
    about = fmt.parse_attributes(fmt.StatisticsAttributes, attributes, f"{objects.url}/{path}")
    names, expected = (MIP_HISTOGRAM, Z_HISTOGRAM, JOINT_HISTOGRAM), Histograms.empty("int64")
    tables = []
    for name, like in zip(names, (expected.mip, expected.z, expected.joint), strict=True):
        table = store.read_table(objects, f"{path}/{name}", max_nbytes=like.nbytes)
        if (table.shape, table.dtype) != (like.shape, like.dtype) or (table < 0).any():
            raise FormatError(
                f"{objects.url}/{path}/{name}: expected {like.dtype} counts of shape {like.shape}, "
                f"got {table.dtype} of shape {table.shape}, the lowest {table.min()}"
            )
        tables.append(table)
    return Summary(about, Histograms(*tables))


def read_exposure_statistics(
    place: str | PathLike[str], statistics: fmt.StatisticsAttributes
) -> dict[str, fmt.StatisticsAttributes]:
    """Read what was counted of each exposure of a montage, by their ids.

    Raises
    ------
    FormatError
        It is missing, or cannot be read.
    """
    objects, found = open_objects(place), {}
    for exposure in statistics.exposures:
        path = statistics_path(exposure.number)
        found[exposure.id] = fmt.parse_attributes(
            fmt.StatisticsAttributes,
            store.group_attributes(objects, path),
            f"{objects.url}/{path}",
        )
    return found


class Candidates(NamedTuple):
    """The candidates of an exposure.

    Parameters
    ----------
    rows
        One each, columns :data:`CANDIDATE_FIELDS`; pixels are those of the exposure. NaN in maps
        that the result has not.
    level
        They are all pixels with a z-score of at least this; infinite if there are no records.
    """

    rows: Float64
    level: float


def read_candidates(objects: Objects, layout: Layout) -> Candidates:
    """Read the candidates of an exposure of a merged result.

    Neighbours that lie in another record are looked up there, if it has the edges of its pixels.

    Raises
    ------
    FormatError, MissingChunkError
    """
    if objects.get(f"{layout.folder}/{NUMBERS}/zarr.json") is None:
        return Candidates(np.empty((0, len(CANDIDATE_FIELDS))), float("inf"))
    level = candidate_level(layout.exposure.total_projections)
    z = CANDIDATE_FIELDS.index(SCALED_MIP)

    def read(number: int) -> tuple[Float64, float, Float64]:
        _, rows, edges = layout.numbers(objects, number)
        full = len(rows) == layout.candidates_shape[0]
        return rows, float(rows[:, z].min()) if full else level, edges

    found, levels, edges = [np.empty((0, len(CANDIDATE_FIELDS)))], [level], []
    for rows, complete_from, own_edges in _in_threads(read, len(layout)):
        found.append(rows)
        levels.append(complete_from)
        edges.append(own_edges)
    candidates = np.concatenate(found)
    if layout.is_montage:
        _look_beyond(candidates, layout, edges)
    return Candidates(candidates, max(levels))


_EDGE_BESIDE = {"z_above": "bottom", "z_below": "top", "z_left": "right", "z_right": "left"}
"""Edge of the next record that a neighbour beyond the edge of a record lies on."""


def _look_beyond(candidates: Float64, layout: Layout, edges: Sequence[Float64]) -> None:
    """Fill in the neighbours of candidates that lie in other records of the exposure."""
    (dy, dx), (height, width) = layout.exposure.origin, layout.tile
    ys, xs = (candidates[:, CANDIDATE_FIELDS.index(n)].astype(np.int64) for n in ("y", "x"))
    for name, (step_y, step_x) in zip(NEIGHBOUR_FIELDS, NEIGHBOURS, strict=True):
        column = candidates[:, CANDIDATE_FIELDS.index(name)]
        edge = EDGES.index(_EDGE_BESIDE[name])
        for k in np.flatnonzero(np.isnan(column)).tolist():
            y, x = int(ys[k]) + step_y, int(xs[k]) + step_x
            if Region(y, y + 1, x, x + 1).intersect(layout.exposure.region).size:
                number = layout.number_of((y + dy) // height, (x + dx) // width)
                region = layout.region_of(number)
                if region.y0 <= ys[k] < region.y1 and region.x0 <= xs[k] < region.x1:
                    continue  # of the same record, so that it is NaN
                along = x - region.x0 if step_y else y - region.y0
                column[k] = edges[number][edge, along]


def record_problems(objects: Objects, plan: MergePlan) -> Iterator[str]:
    """Everything that is wrong with the statistics of a finished merged result, in words."""
    if not has_records(objects, plan):
        return  # merged by an earlier version
    for exposure in plan.exposures:
        layout = Layout.of(plan, exposure)
        reads: list[Callable[[Objects, int], object]] = [layout.counts, layout.numbers]
        if plan.is_montage:
            reads.append(layout.shown)

        def look(
            number: int, reads: Sequence[Callable[[Objects, int], object]] = reads
        ) -> list[str]:
            found = []
            for read in reads:
                try:
                    read(objects, number)
                except OcelotError as error:
                    found.append(str(error))
            return found

        for found in _in_threads(look, len(layout)):
            yield from found
    numbers = [exposure.number for exposure in plan.exposures] if plan.is_montage else []
    for number in (None, *numbers):
        try:
            if read_summary(objects.url, number) is None:
                path = "statistics" if number is None else statistics_path(number)
                yield f"{objects.url}: the group {path!r} is missing; merge again"
        except OcelotError as error:
            yield str(error)


def open_merged_result(objects: Objects) -> fmt.MergedAttributes:
    """Read the attributes of a finished merged result.

    Raises
    ------
    StoreNotFoundError, FormatError, IncompleteError
    """
    attributes = read_attributes(objects)
    if not isinstance(attributes, fmt.MergedAttributes):
        raise FormatError(f"{objects.url}: is a search, not a merged result; merge it first")
    if attributes.state != "complete":
        raise IncompleteError(f"{objects.url}: this merge was never finished; run it again")
    return attributes
