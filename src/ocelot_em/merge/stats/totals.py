"""Statistics of tiles added up in any order: the sums have the same bits.

Pixels are counted in integers, and moments are added exactly and rounded once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ocelot_em.merge.stats.collected import (
    IS_MINIMUM,
    N_FLAT,
    Histograms,
    PixelStatistics,
    StatisticsScope,
    TileStatistics,
    used_ranges,
)
from ocelot_em.model.maps import AnyArray, Float64

_MAX_EXACT = 1e290
"""Values below this are added exactly: no number of them overflows."""

_DIGITS = 53
"""Binary digits of a float64."""

_UNITS = 2 ** (1073 + _DIGITS)
"""Units in 1.0, of the size of the lowest digit of the smallest value."""


class ExactSum:
    """Sums of float64 arrays of one shape, each rounded once, so that their order has no effect."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._units = np.zeros(shape, object)
        self._others = np.zeros(shape)

    def add(self, values: Float64) -> None:
        """Add an array."""
        exact = np.abs(values) < _MAX_EXACT  # NaN is not
        digits, exponents = np.frexp(np.where(exact, values, 0))
        whole = np.ldexp(digits, _DIGITS).astype(np.int64).astype(object)
        self._units += whole << (exponents + 1073).astype(object)
        if not exact.all():
            self._others += np.where(exact, 0, values)

    @property
    def rounded(self) -> Float64:
        """The sums."""
        exact: Float64 = (self._units / _UNITS).astype(np.float64)
        return exact + self._others


class TileTotals(NamedTuple):
    """What a tile adds to the statistics of a result.

    Parameters
    ----------
    statistics
        :attr:`PixelStatistics.flat` of the tile.
    bins, counts
        Numbers of the bins of :class:`Histograms`, in one dimension, that are not empty, and their
        counts.
    """

    statistics: Float64
    bins: AnyArray
    counts: AnyArray

    @classmethod
    def of(cls, tile: TileStatistics) -> "TileTotals":
        """Return what was collected of a tile; its memory may be reused afterwards."""
        statistics, counts = tile.statistics, tile.counts
        bins = np.concatenate(
            [
                np.flatnonzero(counts[start:end] != 0) + start
                for start, end in used_ranges(statistics.extremes)
            ]
        )
        return cls(statistics.flat, bins, counts[bins].astype(np.int64))

    @classmethod
    def joined(cls, several: Sequence["TileTotals"]) -> list["TileTotals"]:
        """Return the same with the counts of all in the first one, in far fewer bytes."""
        total = np.zeros(N_FLAT, np.int64)
        for own in several:
            total[own.bins] += own.counts
        used = np.flatnonzero(total != 0)
        first = used.astype(np.int32), total[used].astype(np.uint32)  # of at most 2**32 pixels
        rest = used[:0], used[:0]
        return [cls(own.statistics, *(rest if n else first)) for n, own in enumerate(several)]


class Totals:
    """Sums of the statistics of an exposure's tiles.

    Parameters
    ----------
    scope
        What they cover.
    flat
        All counts of its histograms, int64, which are added to.
    """

    def __init__(self, scope: StatisticsScope, flat: AnyArray) -> None:
        self.flat, self.histograms = flat, Histograms.from_flat(flat)
        n_maps = len(scope.with_counts)
        self._sums = PixelStatistics.empty(scope.n_partials, scope.n_sources, n_maps)
        self._moments = ExactSum(self._sums.moments.shape)
        self._projections = ExactSum((n_maps,))

    def add(self, tile: TileTotals) -> None:
        """Add the statistics and the counts of a tile."""
        bins, counts = (own.astype(np.int64, copy=False) for own in (tile.bins, tile.counts))
        self.flat[bins] += counts  # several times as fast with these types
        sizes = len(self._sums.wins), len(self._sums.projections)
        self.add_statistics(PixelStatistics.from_flat(tile.statistics, *sizes))

    def add_statistics(self, other: PixelStatistics) -> None:
        """Add the statistics of other pixels."""
        sums = self._sums
        both = np.stack([sums.extremes, other.extremes])
        sums.extremes = np.where(IS_MINIMUM, both.min(axis=0), both.max(axis=0))
        sums.counts += other.counts
        sums.n_candidates += other.n_candidates
        sums.wins += other.wins
        self._moments.add(other.moments)
        self._projections.add(other.projections)

    @property
    def statistics(self) -> PixelStatistics:
        """The sums."""
        self._sums.moments = self._moments.rounded
        self._sums.projections = self._projections.rounded
        return self._sums
