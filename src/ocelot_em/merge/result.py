"""The reader of merged results: opened once, then handed on."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from ocelot_em.errors import FormatError, IncompleteError, InvalidInputError
from ocelot_em.kernels.reference import derived_maps
from ocelot_em.merge.plan import MergePlan, PlannedExposure, read_plan
from ocelot_em.merge.stats.candidates import Candidates, read_candidates
from ocelot_em.merge.stats.layout import Layout
from ocelot_em.merge.stats.records import has_records
from ocelot_em.merge.stats.summary import (
    STATISTICS,
    Summary,
    read_histograms,
    read_statistics,
    statistics_path,
)
from ocelot_em.model.correlation_histogram import CorrelationHistogram, added
from ocelot_em.model.maps import (
    BEST_GROUP,
    COUNT,
    DERIVED,
    INDEX,
    MIP,
    POSES,
    SCALED_MIP,
    SOURCE_EXPOSURE,
    SQUARED_SUM,
    SUM,
    AnyArray,
    Int64,
    PoseForm,
)
from ocelot_em.model.regions import Region, TileGrid
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants
from ocelot_em.store.arrays import ChunkedMap
from ocelot_em.store.contract import Objects
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import open_result, read_attributes, read_search_space
from ocelot_em.store.statistics_attributes import StatisticsAttributes

if TYPE_CHECKING:
    from ocelot_em.merge.job import Job


@dataclass(frozen=True)
class DerivedMap:
    """A map of a merged result that is computed when it is read; otherwise like a stored one.

    ``stored`` are the stored maps by name, ``counts`` the numbers of cross-correlations by number
    of the exposure; where the result is no montage, there is one.
    """

    name: str
    stored: Mapping[str, ChunkedMap]
    counts: Mapping[int, int]

    @property
    def path(self) -> str:
        """Path that it would have."""
        return self.name

    @property
    def objects(self) -> Objects:
        """Store of the result."""
        return self.stored[MIP].objects

    @property
    def grid(self) -> TileGrid:
        """Its chunks, which are those of the stored maps."""
        return self.stored[MIP].grid

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.grid.shape

    @property
    def dtype(self) -> "np.dtype[np.float32]":
        """Type of the values."""
        return np.dtype(np.float32)

    def read(self, region: Region) -> tuple[AnyArray, int]:
        """Compute a region; also return the number of bytes read."""
        if self.name not in DERIVED:  # a sum, in float64
            values, nbytes = self.stored[self.name].read(region)
            with np.errstate(over="ignore"):
                return values.astype(np.float32), nbytes
        sources = SOURCE_EXPOSURE, BEST_GROUP
        names = [n for n in (MIP, SUM, SQUARED_SUM, COUNT, *sources) if n in self.stored]
        found = [self.stored[name].read(region) for name in names]
        maps = dict(zip(names, (values for values, _ in found), strict=True))
        count = maps.get(COUNT)
        if count is None:
            count = np.asarray(next(iter(self.counts.values())))
        source = next((maps[name] for name in sources if name in maps), None)
        if COUNT not in maps and source is not None:
            numbers, places = np.unique(source, return_inverse=True)
            counts = np.array([self.counts.get(number, 0) for number in numbers.tolist()], np.int64)
            count = counts[places].reshape(region.shape)
        computed = derived_maps(maps[MIP], maps[SUM], maps[SQUARED_SUM], count)
        return computed[self.name], sum(nbytes for _, nbytes in found)


@dataclass(frozen=True, eq=False, repr=False)
class MergedResult:
    """A finished merged result.

    Metadata is read and validated when it is first needed, each object once.

    Parameters
    ----------
    objects
        The store of the result.
    attributes
        Attributes of its root group.

    Examples
    --------
    >>> from ocelot_em import MergedResult, Region, find_peaks
    >>> merged = MergedResult.open("MERGED.zarr")
    >>> merged
    <merged result ...MERGED.zarr, 245 x 345 valid pixels>
    >>> merged.read(Region(0, 2, 0, 3), "scaled_mip").round(2)
    array([[5.16, 5.13, 5.4 ],
           [4.81, 4.97, 4.9 ]], dtype=float32)
    >>> len(find_peaks(merged))
    20
    """

    objects: Objects
    attributes: fmt.MergedAttributes

    @classmethod
    def open(cls, place: "str | PathLike[str] | Objects | MergedResult") -> "MergedResult":
        """Open a finished merged result by path or URL; an open one is returned as it is."""
        if isinstance(place, MergedResult):
            return place
        objects = place if isinstance(place, Objects) else open_objects(place)
        attributes = read_attributes(objects)
        if not isinstance(attributes, fmt.MergedAttributes):
            raise FormatError(
                f"{objects.url}: is a search, not a merged result; merge it first "
                "(open_partials opens the search itself)"
            )
        if attributes.state != "complete":
            raise IncompleteError(f"{objects.url}: this merge was never finished; run it again")
        return cls(objects, attributes)

    def __repr__(self) -> str:
        height, width = self.valid_shape
        facts = [f"merged result {self.url}", f"{height} x {width} valid pixels"]
        return f"<{', '.join([*facts, *filter(None, [self.incomplete_text])])}>"

    @property
    def incomplete_text(self) -> str:
        """How much was merged of an incomplete search; empty if all, or if it is not known."""
        return self.plan.incomplete_text

    @property
    def url(self) -> str:
        """URL of the result."""
        return self.objects.url

    @property
    def valid_shape(self) -> tuple[int, int]:
        """Height and width of the maps' valid pixels."""
        return self.attributes.valid_shape

    @property
    def chunk(self) -> tuple[int, int]:
        """Height and width of the maps' chunks."""
        return self.maps[MIP].grid.cell

    @property
    def source(self) -> str:
        """Name of the map with the numbers of exposures, or of groups."""
        return self.attributes.maps.source

    @property
    def projections_per_pixel(self) -> int:
        """Number of cross-correlations of every pixel, if all exposures have the same."""
        counts = {exposure.total_projections for exposure in self.attributes.exposures}
        if len(counts) > 1:
            raise InvalidInputError(
                f"total_projections: expected one number for all pixels, got {min(counts):,} to "
                f"{max(counts):,} in different {self.attributes.part}s; merge and export each alone"
            )
        return counts.pop() if counts else self.attributes.total_projections

    @cached_property
    def plan(self) -> MergePlan:
        """Plan of the merge."""
        return read_plan(self.attributes, self.url)

    @cached_property
    def correlation_histogram(self) -> CorrelationHistogram | None:
        """Histogram of all correlations, added exactly; None if one of a partial is missing."""
        searched = [own for own in self.attributes.partials if own.total_projections]
        return added((own.name, own.correlation_histogram) for own in searched)

    @cached_property
    def search_space(self) -> SearchSpace | None:
        """Tables of an indexed search, or of its first group; None if poses are explicit."""
        return read_search_space(self.objects, self.attributes.search_space_digest)

    @cached_property
    def search_spaces(self) -> dict[int, SearchSpace | None]:
        """Tables by number of the group, or of the exposure; 0 if the result has neither."""
        digests = {e.search_space_digest for e in self.attributes.exposures} - {None}
        own = {
            digest: read_search_space(self.objects, digest, constants.own_tables(digest))
            for digest in digests
            if digest is not None
        }
        found = {
            e.number: own.get(e.search_space_digest or "", self.search_space)
            for e in self.attributes.exposures
        }
        return found or {0: self.search_space}

    @cached_property
    def maps(self) -> dict[str, ChunkedMap | DerivedMap]:
        """Maps by name, stored ones and those that follow from them; no decoded poses."""
        group, maps = open_result(self.objects, self.attributes), self.attributes.maps
        stored = group.open(maps.merged, self.attributes.shape)
        if maps.derived:
            return {**stored}
        exposures = self.attributes.exposures
        counts = {exposure.number: exposure.total_projections for exposure in exposures}
        counts = counts or {0: self.attributes.total_projections}
        derived = (*DERIVED, SUM, SQUARED_SUM)
        return {**stored, **{name: DerivedMap(name, stored, counts) for name in derived}}

    @property
    def decoded_names(self) -> tuple[str, ...]:
        """Pose maps that are decoded from the index, in the order of :meth:`SearchSpace.decode`."""
        maps = self.attributes.maps
        return maps.explicit_poses if maps.form is PoseForm.INDEXED and not maps.decoded else ()

    @property
    def has_own_spaces(self) -> bool:
        """Whether groups have search spaces of their own."""
        return any(e.search_space_digest for e in self.attributes.exposures)

    def decode(self, index: AnyArray, numbers: AnyArray | None = None) -> tuple[AnyArray, ...]:
        """Decode poses; ``numbers`` are those of groups, where these have own search spaces."""
        return decoded_by_group(index, index if numbers is None else numbers, self.search_spaces)

    def read(self, region: Region, name: str) -> AnyArray:
        """Read a map over a region; poses that are not stored are decoded from the index."""
        if name in self.decoded_names:
            index = self.maps[INDEX].read(region)[0]
            numbers = self.maps[self.source].read(region)[0] if self.has_own_spaces else None
            return self.decode(index, numbers)[self.decoded_names.index(name)]
        return self.maps[name].read(region)[0]

    def regions(self) -> Iterator[Region]:
        """Yield the regions of valid pixels, chunk by chunk."""
        for chunk in self.maps[SCALED_MIP].grid:
            region = chunk.region.intersect(Region.whole(self.valid_shape))
            if region.size:
                yield region

    def zscore(self, exposure: PlannedExposure, y: int, x: int) -> float:
        """Return the z-score of a pixel of an exposure; NaN if it is not valid or not shown."""
        pixel = Region(y, y + 1, x, x + 1)
        if not pixel.intersect(exposure.counted).size:
            return float("nan")
        pixel = pixel.shifted(*exposure.origin)
        if self.plan.has_parts and self.read(pixel, self.source)[0, 0] != exposure.number:
            return float("nan")
        return float(self.read(pixel, SCALED_MIP)[0, 0])

    def shows(self, exposure: PlannedExposure, y: Int64, x: Int64) -> AnyArray:
        """Return whether canvas pixels show an exposure; only chunks in overlaps are read."""
        own = exposure.on_canvas
        shown = np.ones(len(y), np.bool_)
        for place in self.plan.touching(own) if len(y) else ():
            other = self.plan.exposures[place]
            shared = other.on_canvas.intersect(own)
            if other.number != exposure.number:
                shown &= (y < shared.y0) | (y >= shared.y1) | (x < shared.x0) | (x >= shared.x1)
        doubtful = np.flatnonzero(~shown)
        numbers = self.values_at(self.source, y[doubtful], x[doubtful])
        shown[doubtful] = numbers == exposure.number
        return shown

    def values_at(self, name: str, y: Int64, x: Int64) -> AnyArray:
        """Return the values of a map at some pixels; each chunk is read once."""
        grid, values = self.maps[name].grid, np.empty(len(y), self.maps[name].dtype)
        cells = (y // grid.cell[0]) * grid.counts[1] + x // grid.cell[1]
        for cell in np.unique(cells).tolist():
            region, here = grid[cell].region, np.flatnonzero(cells == cell)
            values[here] = self.read(region, name)[y[here] - region.y0, x[here] - region.x0]
        return values

    @cached_property
    def job_alone(self) -> "Callable[[int, int], Job]":
        """Opens the merge of one exposure alone, in memory; the most recent ones stay open.

        Its arguments are the exposure's position in the plan and the edge of the largest tile.
        """
        from ocelot_em.merge.job import MAX_OPEN_EXPOSURES, Job  # not needed to describe a result

        def open_alone(position: int, edge: int) -> Job:
            alone = {
                "exposures": (self.plan.exposures[position],),
                "tile": (edge, edge),
                "has_derived_maps": True,  # they are needed, and nothing is stored
            }
            return Job(MergePlan(**(dict(self.plan) | alone)), None)

        return lru_cache(MAX_OPEN_EXPOSURES)(open_alone)

    @cached_property
    def statistics(self) -> StatisticsAttributes | None:
        """Counts, ranges and partials of the whole result; None if merged without statistics."""
        return read_statistics(self.objects, STATISTICS)

    @cached_property
    def summary(self) -> Summary:
        """Statistics of the whole result, with histograms."""
        if self.statistics is None:
            raise IncompleteError(
                f"{self.url}: it was merged without statistics, by an earlier version; merge again"
            )
        histograms = read_histograms(self.objects, STATISTICS, self.statistics)
        return Summary(self.statistics, histograms)

    @cached_property
    def statistics_of_exposures(self) -> dict[str, StatisticsAttributes]:
        """Statistics of each exposure of a montage, by id; without histograms."""
        found = {}
        for exposure in self.attributes.exposures:
            path = statistics_path(exposure.number)
            statistics = read_statistics(self.objects, path)
            if statistics is None:
                raise IncompleteError(f"{self.url}: the group {path!r} is missing; merge again")
            found[exposure.id] = statistics
        return found

    def summary_of(self, exposure: PlannedExposure) -> Summary:
        """Return the statistics of an exposure; without a montage, those of the whole result."""
        if not self.plan.has_parts:
            return self.summary
        statistics = self.statistics_of_exposures[exposure.id]
        path = statistics_path(exposure.number)
        return Summary(statistics, read_histograms(self.objects, path, statistics))

    @cached_property
    def has_records(self) -> bool:
        """Whether the merge recorded candidates; early versions did not."""
        return has_records(self.objects, self.plan)

    def candidates(self, exposure: PlannedExposure) -> Candidates:
        """Read the candidates of an exposure; without records there are none."""
        if not self.has_records:
            return Candidates.unknown()
        return read_candidates(self.objects, Layout.of(self.plan, exposure))


def decoded_by_group(
    index: AnyArray, numbers: AnyArray, spaces: Mapping[int, SearchSpace | None]
) -> tuple[AnyArray, ...]:
    """Decode indices, each with the search space of the group that has its number.

    Poses are NaN where no group searched. If all have one search space, ``numbers`` are not used.
    """
    first, *others = set(spaces.values())
    if first is not None and not others:
        return first.decode(index)
    poses = tuple(np.full(index.shape, np.nan, np.float32) for _ in POSES)
    for number in set(np.unique(numbers).tolist()) & set(spaces):
        own, space = numbers == number, spaces[number]
        assert space is not None
        for pose, values in zip(poses, space.decode(index[own]), strict=True):
            pose[own] = values
    return poses
