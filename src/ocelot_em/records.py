"""Statistics and candidates of a merged result, as stored: a record for each tile, then the sums.

Workers write a tile's records before its done-mark; the driver adds them up when the last tile is
done. Readers need no maps.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from typing import TypeVar

import numpy as np

from ocelot_em import format as fmt
from ocelot_em import store
from ocelot_em.canvas import Tile
from ocelot_em.collected import (
    CANDIDATE_FIELDS,
    N_FLAT,
    TILE_FIELDS,
    Collection,
    Histograms,
    TileStatistics,
    add_up,
    candidate_capacity,
    candidate_level,
)
from ocelot_em.errors import ChunkError, FormatError, IncompleteError, MissingChunkError
from ocelot_em.maps import SCALED_MIP, AnyArray, Float64
from ocelot_em.objects import Objects, open_objects
from ocelot_em.plan import MergePlan, read_plan
from ocelot_em.search import read_attributes
from ocelot_em.significance import JOINT_MIP_AXIS, JOINT_Z_AXIS, MIP_AXIS, Z_AXIS, Axis

_T = TypeVar("_T")

COUNTS = "progress/counts"
NUMBERS = "progress/numbers"
"""Arrays of records, one after another in one dimension, so that a record is one file in a folder
of all: histograms, and statistics with candidates."""

MIP_HISTOGRAM = "statistics/mip_histogram"
Z_HISTOGRAM = "statistics/scaled_mip_histogram"
JOINT_HISTOGRAM = "statistics/joint_histogram"


def new_collection(plan: MergePlan) -> Collection:
    """Make a place for what is collected of tiles, one after another."""
    return Collection(
        plan.valid_shape,
        candidate_level(plan.total_projections),
        candidate_capacity(plan.tile),
        len(plan.contributions),
        len(plan.sources),
    )


@dataclass(frozen=True)
class Layout:
    """Where numbers are in the records of a merge.

    Parameters
    ----------
    plan
        The merge.
    """

    plan: MergePlan

    @property
    def n_statistics(self) -> int:
        """Numbers of :class:`TileStatistics`, at the beginning of a record."""
        return TileStatistics.n_flat(len(self.plan.contributions), len(self.plan.sources))

    @property
    def candidates_shape(self) -> tuple[int, int]:
        """Of the candidates, which are the rest of the record, row by row."""
        return candidate_capacity(self.plan.tile), len(CANDIDATE_FIELDS)

    @property
    def n_numbers(self) -> int:
        """Of a whole record."""
        rows, columns = self.candidates_shape
        return self.n_statistics + rows * columns

    def number_of(self, tile: Tile) -> int:
        """Number of a tile, counted row by row: the chunk that its records are."""
        return tile.iy * self.plan.grid.counts[1] + tile.ix

    def counts(self, objects: Objects, tile: Tile) -> Histograms:
        """Read the histograms of a tile."""
        return Histograms.from_flat(self._read(objects, COUNTS, tile, N_FLAT, "uint32"))

    def numbers(self, objects: Objects, tile: Tile) -> tuple[TileStatistics, Float64]:
        """Read the statistics and candidates of a tile."""
        flat = self._read(objects, NUMBERS, tile, self.n_numbers, "float64")
        candidates = flat[self.n_statistics :].reshape(self.candidates_shape)
        statistics = TileStatistics.from_flat(
            flat[: self.n_statistics], len(self.plan.contributions)
        )
        return statistics, candidates[~np.isnan(candidates[:, 0])]

    def _read(self, objects: Objects, path: str, tile: Tile, n: int, dtype: str) -> AnyArray:
        key = f"{path}/c/{self.number_of(tile)}"
        values = np.empty(n, dtype)
        encoded = objects.get(key)
        if encoded is None:
            raise MissingChunkError(
                f"{objects.url}: {path}: the record of {tile} is missing: expected an object "
                f"{key}; merge again"
            )
        store.decode_chunk(encoded, values, f"{objects.url}: {path}: {tile}")
        return values


def create_records(objects: Objects, plan: MergePlan) -> None:
    """Write the metadata of the tiles' records."""
    layout, n_tiles = Layout(plan), len(plan.grid)
    fields = {"tile_fields": list(TILE_FIELDS), "candidate_fields": list(CANDIDATE_FIELDS)}
    for path, n, dtype in ((COUNTS, N_FLAT, "uint32"), (NUMBERS, layout.n_numbers, "float64")):
        store.create_array(
            objects,
            path,
            shape=(n_tiles * n,),
            chunk=(n,),
            dtype=dtype,
            fill=0 if path == COUNTS else float("nan"),
            dimensions=("record",),
            attributes={} if path == COUNTS else fields,
        )


def encode_records(
    layout: Layout, collection: Collection, tile: Tile
) -> Iterator[tuple[str, list[bytes]]]:
    """Give the objects of a tile's records: keys, and parts of their bytes."""
    numbers = np.concatenate([collection.statistics.flat, collection.candidates.reshape(-1)])
    for path, record in ((COUNTS, collection.counts), (NUMBERS, numbers)):
        yield f"{path}/c/{layout.number_of(tile)}", store.encode_chunk(record)


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
    """Add up the records of all tiles, and write the sums."""
    layout = Layout(plan)

    def read(tile: Tile) -> tuple[TileStatistics, Histograms]:
        return layout.numbers(objects, tile)[0], layout.counts(objects, tile)

    n_partials, n_sources = len(plan.contributions), len(plan.sources)
    total, histograms = add_up(_in_threads(read, plan), n_partials, n_sources)
    store.create_group(objects, "statistics", {})
    for path, counts, axes in (
        (MIP_HISTOGRAM, histograms.mip, (MIP_AXIS,)),
        (Z_HISTOGRAM, histograms.z, (Z_AXIS,)),
        (JOINT_HISTOGRAM, histograms.joint, (JOINT_MIP_AXIS, JOINT_Z_AXIS)),
    ):
        _write_histogram(objects, path, counts, axes)
    about = _attributes(plan, total, searched=int(histograms.z.sum()))
    store.update_attributes(objects, "statistics", fmt.dump_attributes(about))


def _in_threads(read: Callable[[Tile], _T], plan: MergePlan) -> Iterator[_T]:
    """Read records of all tiles, a bounded number of them ahead."""
    n_threads = min(os.cpu_count() or 1, 8)
    tiles = iter(plan.grid)
    with ThreadPoolExecutor(n_threads) as pool:
        while batch := [tile for _, tile in zip(range(16 * n_threads), tiles, strict=False)]:
            yield from pool.map(read, batch)


def _write_histogram(objects: Objects, path: str, counts: AnyArray, axes: Sequence[Axis]) -> None:
    store.create_array(
        objects,
        path,
        shape=counts.shape,
        chunk=counts.shape,
        dtype="int64",
        fill=0,
        dimensions=("mip", "scaled_mip")[-counts.ndim :] if path != MIP_HISTOGRAM else ("mip",),
        attributes={"low": [axis.low for axis in axes], "width": [axis.width for axis in axes]},
    )
    key = "/".join([path, "c", *("0" for _ in counts.shape)])
    store.write_chunk(objects, key, np.ascontiguousarray(counts))


def _attributes(plan: MergePlan, total: TileStatistics, searched: int) -> fmt.StatisticsAttributes:
    lowest_mip, highest_mip, lowest_z, highest_z = map(float, total.extremes)
    nan, zero_std, unsearched = map(int, total.counts)
    level = candidate_level(plan.total_projections)
    return fmt.StatisticsAttributes(
        valid_pixels=plan.valid_shape[0] * plan.valid_shape[1],
        searched_pixels=searched,
        unsearched_pixels=unsearched,
        nan_pixels=nan,
        zero_std_pixels=zero_std,
        mip_range=(lowest_mip, highest_mip) if searched else None,
        scaled_mip_range=(lowest_z, highest_z) if searched else None,
        candidate_level=level if np.isfinite(level) else None,
        n_candidates=total.n_candidates,
        partials=tuple(
            fmt.PartialStatistics(
                name=contribution.name,
                total_projections=contribution.total_projections,
                won_pixels=int(won),
            )
            for contribution, won in zip(plan.contributions, total.wins, strict=True)
        ),
        sources=tuple(
            _source_statistics(source.name, source.total_projections, moments)
            for source, moments in zip(plan.sources, total.moments, strict=True)
        ),
    )


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


def read_summary(place: str | PathLike[str]) -> Summary | None:
    """Read the statistics of a merged result; None if it was merged without.

    Raises
    ------
    StoreNotFoundError, FormatError
        It is not a merged result.
    IncompleteError
        It was never finished.
    """
    objects = open_objects(place)
    open_merged_result(objects)
    attributes = store.group_attributes(objects, "statistics")
    if attributes is None:
        return None
    where = f"{objects.url}/statistics"
    paths = MIP_HISTOGRAM, Z_HISTOGRAM, JOINT_HISTOGRAM
    return Summary(
        fmt.parse_attributes(fmt.StatisticsAttributes, attributes, where),
        Histograms(*(store.read_table(objects, path) for path in paths)),
    )


def read_candidates(place: str | PathLike[str]) -> tuple[Float64, float]:
    """Read the candidates of a merged result.

    Returns
    -------
    candidates : array of float64
        One row each, columns :data:`CANDIDATE_FIELDS`; NaN in maps that the result has not.
    level : float
        They are all pixels with a z-score of at least this; infinite if there are no records.

    Raises
    ------
    StoreNotFoundError, FormatError, IncompleteError, MissingChunkError
    """
    objects = open_objects(place)
    attributes = open_merged_result(objects)
    plan = read_plan(attributes, objects.url)
    if objects.get(f"{NUMBERS}/zarr.json") is None:
        return np.empty((0, len(CANDIDATE_FIELDS))), float("inf")
    layout, level = Layout(plan), candidate_level(plan.total_projections)
    z = CANDIDATE_FIELDS.index(SCALED_MIP)

    def read(tile: Tile) -> tuple[Float64, float]:
        _, rows = layout.numbers(objects, tile)
        full = len(rows) == layout.candidates_shape[0]
        return rows, float(rows[:, z].min()) if full else level

    found, levels = [np.empty((0, len(CANDIDATE_FIELDS)))], [level]
    for rows, complete_from in _in_threads(read, plan):
        found.append(rows)
        levels.append(complete_from)
    return np.concatenate(found), max(levels)


def record_problems(objects: Objects, plan: MergePlan) -> Iterator[str]:
    """Everything that is wrong with the statistics of a finished merged result, in words."""
    if objects.get(f"{NUMBERS}/zarr.json") is None:
        return  # merged by an earlier version
    layout = Layout(plan)

    def look(tile: Tile) -> list[str]:
        found = []
        for read in (layout.counts, layout.numbers):
            try:
                read(objects, tile)
            except ChunkError as error:
                found.append(str(error))
        return found

    for found in _in_threads(look, plan):
        yield from found
    try:
        if read_summary(objects.url) is None:
            yield f"{objects.url}: the group 'statistics' is missing; merge again"
    except FormatError as error:
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
