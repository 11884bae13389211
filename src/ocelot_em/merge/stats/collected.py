"""Statistics collected while a tile is merged, so that the maps need not be read again.

They are histograms, extremes and counts of special pixels; the number of pixels that each partial
won, and the sums of each source; and the *candidates*: pixels whose z-score is high enough for a
particle, with the values of all maps. Only valid pixels count. Tiles add up to the whole map.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from ocelot_em.model.histograms import (
    JOINT_MIP_AXIS,
    JOINT_Z_AXIS,
    MIP_AXIS,
    Z_AXIS,
    Axis,
    Histogram1D,
    JointHistogram,
)
from ocelot_em.model.maps import (
    BEST_PARTIAL,
    COUNT,
    INDEX,
    MEAN,
    MIP,
    POSES,
    SCALED_MIP,
    STD,
    SUM,
    AnyArray,
    Float64,
)
from ocelot_em.model.regions import Region

CANDIDATE_SHARE = 1e-3
"""Expected fraction of candidates in pixels of Gaussian noise: small enough for small records, and
large enough that all usual thresholds are above the candidate level."""

PIXELS_PER_CANDIDATE = 512
"""Pixels of a tile for each candidate that its record can hold."""

MIN_CANDIDATES = 64
"""Minimum number of candidates that a record can hold, for small tiles."""

_AXES = tuple(
    (np.int32(round(axis.low / axis.width)), np.int32(axis.bins), np.float32(1 / axis.width))
    for axis in (MIP_AXIS, Z_AXIS, JOINT_MIP_AXIS, JOINT_Z_AXIS)
)
"""First bin, number of bins and bins per unit of each axis, for
:func:`ocelot_em.kernels.collect.count_pixels`."""

_JOINT_SHAPE = (JOINT_MIP_AXIS.bins, JOINT_Z_AXIS.bins + 16)
"""Shape of the joint histogram while pixels are counted. Each row has an extra cache line: most
pixels are in a few columns, which would share few cache sets if rows were a power of two long."""

NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""Offsets (y, x) of the pixels whose z-score is kept with a candidate."""

NEIGHBOUR_FIELDS = ("z_above", "z_below", "z_left", "z_right")
GATHERED = (MIP, SCALED_MIP, MEAN, STD, BEST_PARTIAL, COUNT, INDEX, *POSES)
CANDIDATE_FIELDS = ("y", "x", *GATHERED, *NEIGHBOUR_FIELDS)
"""Columns of a candidate: pixel, values of all maps there, z-scores of the neighbours."""

EXTREMES = ("lowest_mip", "highest_mip", "lowest_z", "highest_z")
IS_MINIMUM = np.array([name.startswith("lowest") for name in EXTREMES])
COUNTS = ("nan_pixels", "zero_std_pixels", "unsearched_pixels")
TILE_FIELDS = (*EXTREMES, *COUNTS, "n_candidates")
MOMENTS = ("n", "total", "squared_total")
"""Moments of one sum map of a source: number of pixels, their sum, the sum of their squares."""


def candidate_level(total_projections: int) -> float:
    """Lowest z-score of a candidate; infinite if nothing was searched."""
    if total_projections <= 0:
        return float("inf")
    return -NormalDist().inv_cdf(CANDIDATE_SHARE / max(total_projections, 1))


def candidate_capacity(tile: tuple[int, int]) -> int:
    """Maximum number of candidates in a tile's record."""
    return max(tile[0] * tile[1] // PIXELS_PER_CANDIDATE, MIN_CANDIDATES)


def tile_statistics_nbytes(tile: tuple[int, int]) -> int:
    """Memory of a tile's statistics, in bytes."""
    numbers = candidate_capacity(tile) * len(CANDIDATE_FIELDS) + len(EDGES) * max(tile)
    return 4 * (N_FLAT + prod(_JOINT_SHAPE)) + 8 * numbers


@dataclass
class Histograms:
    """Histograms of valid, searched pixels by ``mip``, by z-score, and by both.

    Parameters
    ----------
    mip, z
        Counts over :data:`ocelot_em.model.histograms.MIP_AXIS` and ``Z_AXIS``, with the underflow
        first and the overflow last.
    joint
        Counts over ``JOINT_MIP_AXIS`` (rows) and ``JOINT_Z_AXIS`` (columns).
    """

    mip: AnyArray
    z: AnyArray
    joint: AnyArray

    @classmethod
    def empty(cls, dtype: str) -> "Histograms":
        """Return histograms without counts."""
        return cls.from_flat(np.zeros(N_FLAT, dtype))

    @classmethod
    def from_flat(cls, flat: AnyArray) -> "Histograms":
        """Return views of all counts in one dimension."""
        n_mip, n_z = MIP_AXIS.bins + 2, Z_AXIS.bins + 2
        mip, z, joint = np.split(flat, [n_mip, n_mip + n_z])
        return cls(mip, z, joint.reshape(JOINT_MIP_AXIS.bins, JOINT_Z_AXIS.bins))

    def add(self, other: "Histograms", extremes: Float64) -> None:
        """Add the counts of other pixels, whose values have these :data:`EXTREMES`.

        Few of all bins are between them, so most of the memory need not be touched.
        """
        mips, zs = extremes[:2], extremes[2:]
        both = _bins_between(JOINT_MIP_AXIS, mips), _bins_between(JOINT_Z_AXIS, zs)
        self.joint[both] += other.joint[both]
        for own, counts, axis, ends in (
            (self.mip, other.mip, MIP_AXIS, mips),
            (self.z, other.z, Z_AXIS, zs),
        ):
            used = _bins_between(axis, ends)
            used = slice(used.start, used.stop + 2)  # with underflow or overflow beside them
            own[used] += counts[used]

    def of_mip(self) -> Histogram1D:
        """Return the histogram of ``mip``."""
        return Histogram1D(MIP_AXIS, self.mip[1:-1], int(self.mip[0]), int(self.mip[-1]))

    def of_z(self) -> Histogram1D:
        """Return the histogram of z-scores."""
        return Histogram1D(Z_AXIS, self.z[1:-1], int(self.z[0]), int(self.z[-1]))

    def of_both(self) -> JointHistogram:
        """Return the joint histogram."""
        return JointHistogram(JOINT_MIP_AXIS, JOINT_Z_AXIS, self.joint)


N_FLAT = MIP_AXIS.bins + 2 + Z_AXIS.bins + 2 + JOINT_MIP_AXIS.bins * JOINT_Z_AXIS.bins
"""Number of all counts of :class:`Histograms`."""


@dataclass
class PixelStatistics:
    """Statistics of one tile, or of several tiles together.

    Parameters
    ----------
    extremes
        Extremes in the order of :data:`EXTREMES`; infinite if there are no pixels.
    counts
        Counts in the order of :data:`COUNTS`.
    n_candidates
        Number of pixels at or above the candidate level, including those not in the record.
    wins
        Number of pixels won, by number of the partial.
    moments
        Moments by source, kind of sum (plain, squared) and :data:`MOMENTS`.
    projections
        Sums of the maps of counts, by partial that has one.
    """

    extremes: Float64
    counts: AnyArray
    n_candidates: int
    wins: AnyArray
    moments: Float64
    projections: Float64

    @classmethod
    def empty(cls, n_partials: int, n_sources: int, n_maps: int) -> "PixelStatistics":
        """Return the statistics of no pixels."""
        return cls(
            extremes=np.array([np.inf, -np.inf, np.inf, -np.inf]),
            counts=np.zeros(len(COUNTS), np.int64),
            n_candidates=0,
            wins=np.zeros(n_partials, np.int64),
            moments=np.zeros((n_sources, 2, len(MOMENTS))),
            projections=np.zeros(n_maps),
        )

    @property
    def flat(self) -> Float64:
        """All numbers in one dimension; pixel counts are far below 2**53."""
        own = [*self.extremes, *self.counts, self.n_candidates]
        return np.concatenate([own, self.wins, self.moments.reshape(-1), self.projections])

    @classmethod
    def from_flat(cls, flat: AnyArray, n_partials: int, n_maps: int) -> "PixelStatistics":
        """Restore statistics from :attr:`flat`."""
        n_own, n_extremes, end = len(TILE_FIELDS), len(EXTREMES), len(flat) - n_maps
        moments = flat[n_own + n_partials : end].reshape(-1, 2, len(MOMENTS))
        return cls(
            extremes=flat[:n_extremes],
            counts=flat[n_extremes : n_own - 1].astype(np.int64),
            n_candidates=int(flat[n_own - 1]),
            wins=flat[n_own : n_own + n_partials].astype(np.int64),
            moments=moments,
            projections=flat[end:],
        )

    @staticmethod
    def n_flat(n_partials: int, n_sources: int, n_maps: int) -> int:
        """Length of :attr:`flat`."""
        return len(TILE_FIELDS) + n_partials + n_sources * 2 * len(MOMENTS) + n_maps


class StatisticsScope(NamedTuple):
    """What the statistics of an exposure cover.

    Parameters
    ----------
    region
        Pixels of the exposure that count; others are omitted.
    level
        Lowest z-score of a candidate.
    n_partials, n_sources
        Numbers of merged partials and sources.
    with_counts
        Numbers of the sources that are partials with a map of counts.
    """

    region: Region
    level: float
    n_partials: int
    n_sources: int
    with_counts: tuple[int, ...] = ()


KernelMoments = tuple[bool, tuple[Any, ...], tuple[AnyArray, int]]
"""Whether statistics are collected, (width, valid (rows, columns)) of the region, moments by source
and kind, and the kind of the sums."""

KernelWins = tuple[bool, tuple[Any, ...], AnyArray]
"""Whether statistics are collected, the same of the region, and wins by partial."""

KernelCounting = tuple[Any, tuple[AnyArray, ...], tuple[Any, ...]]
"""Axes, outputs, and candidates of :func:`ocelot_em.kernels.collect.count_pixels`."""

EDGES = ("top", "bottom", "left", "right")
"""Order of the outermost rows and columns of a piece of an exposure. Their z-scores are kept as
neighbours of candidates in the adjacent piece, since the merged map may show another exposure."""


@dataclass
class TileStatistics:
    """Statistics of one tile after another, collected during the merge in reused memory.

    The order of calls: :meth:`begin` for a tile; :meth:`add_sums` for every source,
    :meth:`count_wins` and :meth:`count_pixels` for runs of pixels, or kernels that do the same with
    :meth:`moments`, :meth:`wins` and :meth:`counting`; then :meth:`find_candidates`; then
    :meth:`keep_values` for every map that was not passed to :meth:`find_candidates`.

    Parameters
    ----------
    capacity
        Maximum number of candidates.
    longest_edge
        Maximum length of the edge of a piece; 0 if edges are not kept.
    """

    capacity: int
    longest_edge: int = 0
    statistics: PixelStatistics = field(init=False)
    counts: AnyArray = field(init=False)
    counts_with_room: AnyArray = field(init=False)
    """The counts of all histograms, and room for the identity of their record."""
    candidates: Float64 = field(init=False)

    def __post_init__(self) -> None:
        from ocelot_em.kernels import collect  # on demand

        self._kernel = collect
        self.counts_with_room = np.zeros(N_FLAT + 1, np.uint32)
        self.counts = self.counts_with_room[:-1]
        self._histograms = Histograms.from_flat(self.counts)
        self._joint = np.zeros(_JOINT_SHAPE, np.uint32)
        self._joint_used: tuple[slice, ...] = (slice(None), slice(JOINT_Z_AXIS.bins))
        self.candidates = np.empty((self.capacity, len(CANDIDATE_FIELDS)))
        self.edges = np.empty((len(EDGES), self.longest_edge), np.float64)
        self._found = np.empty(4 * self.capacity, np.int32)

    def begin(self, region: Region, scope: StatisticsScope) -> None:
        """Reset all statistics, and start with a region of an exposure."""
        self.region, self._level = region, np.float32(scope.level)
        self._with_counts = scope.with_counts
        self.statistics = PixelStatistics.empty(
            scope.n_partials, scope.n_sources, len(scope.with_counts)
        )
        self._histograms.mip.fill(0)
        self._histograms.z.fill(0)
        self._histograms.joint[self._joint_used] = self._joint[self._joint_used] = 0
        # The range that contains counts is not known before find_candidates().
        self._joint_used = slice(None), slice(JOINT_Z_AXIS.bins)
        self._ranks = self._kernel.no_ranks()
        self.candidates.fill(np.nan)
        self.edges.fill(np.nan)
        valid = scope.region.intersect(region).relative_to(region)
        # Counted pixels start at the first pixel of the region: eroded edges are not merged either.
        self._valid = valid.shape
        self._any_counted = False
        self._where = np.empty(0, np.intp)

    def add_sums(self, number: int, name: str, values: AnyArray) -> None:
        """Add a source's sums of the whole region to its moments."""
        into = self.statistics.moments[number, 0 if name == SUM else 1]
        self._kernel.add_moments(values, self._position(0), into)

    def add_counts(self, number: int, values: AnyArray) -> None:
        """Add up the map of counts of a source, if it is a partial."""
        if number in self._with_counts:
            n_rows, n_columns = self._valid
            counted = values.reshape(self.region.shape)[:n_rows, :n_columns]
            place = self._with_counts.index(number)
            self.statistics.projections[place] = counted.sum(dtype=np.float64)

    def moments(self, name: str) -> KernelMoments:
        """Arguments of a kernel that adds sums."""
        kind = 0 if name == SUM else 1
        return True, self._position(0)[1:], (self.statistics.moments, kind)

    def wins(self) -> KernelWins:
        """Arguments of a kernel that finds winners."""
        return True, self._position(0)[1:], self.statistics.wins

    def counting(self) -> KernelCounting:
        """Arguments of kernels that count pixels: axes, outputs, and candidates."""
        own, histograms = self.statistics, self._histograms
        into = (histograms.mip, histograms.z, self._joint, own.counts, self._ranks)
        return _AXES, into, (self._level, self._found, own.n_candidates)

    def counted(self, n_candidates: int) -> None:
        """Note that a kernel has counted all pixels, and their candidates."""
        self.statistics.n_candidates, self._any_counted = n_candidates, True

    def add_measured(self, number: int, name: str, rows: Float64) -> None:
        """Add to a source's moments as :meth:`add_sums` does, from the sums of each row.

        ``rows`` (shape: rows x 2) has the sum and the sum of squares of the valid columns of each
        row of the piece, NaN where a value is.
        """
        n_rows, n_columns = self._valid
        usable = rows[:n_rows][~np.isnan(rows[:n_rows, 0])]
        into = self.statistics.moments[number, 0 if name == SUM else 1]
        into += len(usable) * n_columns, *usable.sum(axis=0)

    @property
    def n_valid_columns(self) -> int:
        """Number of columns of the piece that count."""
        return self._valid[1]

    def _position(self, start: int) -> tuple[int, int, tuple[int, int]]:
        return start, self.region.shape[1], self._valid

    def count_pixels(self, start: int, maps: Mapping[str, AnyArray]) -> None:
        """Count a run of the tile's pixels, starting at ``start``, and find its candidates.

        Runs come in the order of the pixels, ideally while their maps are still in the cache.

        Parameters
        ----------
        maps
            Maps of the run, including ``mip``, z-score and standard deviation; C-contiguous, of any
            shape.
        """
        counted = tuple(maps[name].reshape(-1) for name in (MIP, SCALED_MIP, STD))
        self.counted(self._kernel.count_pixels(counted, self._position(start), *self.counting()))

    def count_wins(self, start: int, numbers: AnyArray) -> None:
        """Count the pixels that each partial won in a run starting at ``start``."""
        self._kernel.count_wins(numbers.reshape(-1), self._position(start), self.statistics.wins)

    def find_candidates(self, maps: Mapping[str, AnyArray]) -> None:
        """Find the candidates after all pixels have been counted.

        If none has been counted, all pixels and the wins of the partials are counted first.

        Parameters
        ----------
        maps
            The z-score and all maps that are not passed to :meth:`keep_values`; if nothing has been
            counted, also ``mip``, standard deviation and number of the partial. C-contiguous, of
            the tile's shape.
        """
        if not self._any_counted:
            self.count_pixels(0, maps)
            self.count_wins(0, maps[BEST_PARTIAL])
        extremes = self.statistics.extremes
        extremes[:] = self._kernel.values_of(self._ranks)
        # All other counts are 0 in both arrays.
        axes = (JOINT_MIP_AXIS, extremes[:2]), (JOINT_Z_AXIS, extremes[2:])
        self._joint_used = tuple(_bins_between(*own) for own in axes)
        self._histograms.joint[self._joint_used] = self._joint[self._joint_used]
        n_rows, n_columns = self._valid
        if not n_rows or not n_columns:
            return
        self._locate_candidates(maps[SCALED_MIP])
        z = maps[SCALED_MIP][:n_rows, :n_columns]
        if self.longest_edge:
            for kept, edge in zip(self.edges, (z[0], z[-1], z[:, 0], z[:, -1]), strict=True):
                kept[: edge.size] = edge
        for name, values in maps.items():
            self.keep_values(name, values)

    def _locate_candidates(self, z: AnyArray) -> None:
        found, width, (n_rows, n_columns) = self.statistics.n_candidates, z.shape[1], self._valid
        where = self._found[:found].astype(np.intp)
        if found > self.capacity:  # keep the highest
            if found > self._found.size:
                y, x = np.nonzero(z[:n_rows, :n_columns] >= self._level)
                where = y * width + x
            heights = z.reshape(-1)[where]
            best = np.argpartition(-heights, self.capacity - 1)[: self.capacity]
            where = np.sort(where[best])
        self._where, rows = where, self.candidates[: len(where)]
        positions, neighbours = rows[:, :2], rows[:, -len(NEIGHBOUR_FIELDS) :]
        self._kernel.look_up_neighbours(
            where, z.reshape(-1), width, self._valid, (positions, neighbours)
        )
        positions += self.region.y0, self.region.x0

    def keep_values(self, name: str, values: AnyArray) -> None:
        """Keep a map's values at the candidates."""
        self.keep(name, lambda where: values.reshape(-1).take(where))  # without Python's lock

    def keep(self, name: str, look_up: Callable[[AnyArray], AnyArray]) -> None:
        """Keep a map's values at the candidates, as a function returns them by pixel."""
        if name in GATHERED and len(self._where):
            column = CANDIDATE_FIELDS.index(name)
            self.candidates[: len(self._where), column] = look_up(self._where)


def none_collected() -> tuple[KernelMoments, KernelWins, KernelCounting]:
    """Arguments of kernels that collect no statistics."""
    one = TileStatistics(0)
    one.begin(Region(0, 1, 0, 1), StatisticsScope(Region(0, 1, 0, 1), np.inf, 0, 0))
    moments, wins = one.moments(SUM), one.wins()
    return (False, *moments[1:]), (False, *wins[1:]), one.counting()


def _bins_between(axis: Axis, ends: Float64) -> slice:
    """Bins from the lowest to the highest value; values off the axis are in the nearest bin."""
    places = ((end - axis.low) / axis.width for end in ends.tolist())
    first, last = (int(min(max(0.0, place), axis.bins - 1)) for place in places)
    return slice(first, last + 1)


def used_ranges(extremes: Float64) -> Iterator[tuple[int, int]]:
    """Yield ranges of all counts in one dimension that contain pixels with these extremes."""
    first = 0
    for axis, ends in ((MIP_AXIS, extremes[:2]), (Z_AXIS, extremes[2:])):
        used = _bins_between(axis, ends)
        yield first + used.start, first + used.stop + 2  # with underflow or overflow beside them
        first += axis.bins + 2
    rows, width = _bins_between(JOINT_MIP_AXIS, extremes[:2]), JOINT_Z_AXIS.bins
    yield first + rows.start * width, first + rows.stop * width


def neighbours_of(z: AnyArray, y: AnyArray, x: AnyArray) -> Iterator[tuple[str, Float64]]:
    """Yield neighbours of pixels by name in :data:`NEIGHBOUR_FIELDS`; NaN outside the map."""
    for name, (dy, dx) in zip(NEIGHBOUR_FIELDS, NEIGHBOURS, strict=True):
        inside = (y + dy >= 0) & (y + dy < z.shape[0]) & (x + dx >= 0) & (x + dx < z.shape[1])
        values = np.full(len(y), np.nan)
        values[inside] = z[y[inside] + dy, x[inside] + dx]
        yield name, values
