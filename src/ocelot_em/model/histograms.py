"""Histograms of whole maps, which add up over tiles and give ranks and normal scores.

:mod:`ocelot_em.particles.significance` computes cutoffs and p-values from them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ocelot_em.model.maps import Float64, Int64


@dataclass(frozen=True, slots=True)
class Axis:
    """Uniform bins: bin ``i`` holds ``low + i * width <= value < low + (i + 1) * width``.

    The bin is ``floor((value - low) / width)``, evaluated in float64, since float32 could round the
    difference across an edge.
    """

    low: float
    width: float
    bins: int

    @property
    def high(self) -> float:
        """Upper edge of the last bin, which excludes it."""
        return self.low + self.width * self.bins

    @property
    def edges(self) -> Float64:
        """Edges of the bins, (bins + 1,) float64."""
        return self.low + self.width * np.arange(self.bins + 1, dtype=np.float64)

    def bin_of(self, values: ArrayLike) -> Int64:
        """Bin of each finite value, int64; -1 below the axis and ``bins`` above it."""
        position = np.floor((np.asarray(values, np.float64) - self.low) / self.width)
        return np.clip(position, -1, self.bins).astype(np.int64)


MIP_AXIS = Axis(-4.0, 1 / 1024, 64 * 1024)
"""Bins for the ranks of ``mip``; narrow, since the order of single pixels matters in the tail."""

Z_AXIS = Axis(0.0, 1 / 1024, 64 * 1024)
"""Bins for the ranks of ``scaled_mip``, which is not negative, since a maximum exceeds the mean."""

JOINT_MIP_AXIS = Axis(-4.0, 1 / 16, 32 * 16)
"""Bins of ``mip`` in a joint histogram."""

JOINT_Z_AXIS = Axis(0.0, 1 / 16, 32 * 16)
"""Bins of ``scaled_mip`` in a joint histogram."""


@dataclass(frozen=True, eq=False)
class Histogram1D:
    """Histogram of a map's valid pixels; under- and overflow are those below and above the axis."""

    axis: Axis
    counts: Int64
    underflow: int = 0
    overflow: int = 0

    @property
    def pixels(self) -> int:
        """Number of counted pixels, including those off the axis."""
        return int(self.counts.sum()) + self.underflow + self.overflow

    def below(self, values: ArrayLike) -> Float64:
        """Number of pixels with a lower value plus half of those with the same value.

        This is the rank minus one half. Pixels are assumed to be evenly distributed within a bin,
        and equal off the axis. A bin of one pixel is exact. The result is ascending with the
        (finite) values, from 0 to :attr:`pixels`.
        """
        bins = self.axis.bin_of(values)
        position = (np.asarray(values, np.float64) - self.axis.low) / self.axis.width - bins
        share = np.where((bins >= 0) & (bins < self.axis.bins), position, 0.5)
        first, counts = self._ranked()
        mine = counts[bins + 1]
        within = np.where(mine > 0, np.clip(share * mine, 0.5, np.maximum(mine - 0.5, 0.5)), 0.0)
        return np.asarray(first[bins + 1] + within, np.float64)

    def _ranked(self) -> tuple[Int64, Int64]:
        """Numbers of pixels below and in the underflow, each bin and the overflow."""
        counts = np.concatenate(([self.underflow], self.counts, [self.overflow])).astype(np.int64)
        return np.cumsum(counts) - counts, counts

    def normal_scores(self) -> tuple[Int64, Float64, Int64]:
        """Bins with pixels, their median normal scores and numbers of pixels.

        The underflow is bin -1, and the overflow is the one after the last.
        """
        first, counts = self._ranked()
        used = np.flatnonzero(counts)  # few of all bins
        first, counts = first[used], counts[used]
        return used - 1, normal_score(first + counts / 2, self.pixels), counts


@dataclass(frozen=True, eq=False)
class JointHistogram:
    """Joint histogram of ``mip`` and ``scaled_mip`` of a map's valid pixels.

    A pixel off an axis is counted in the nearest bin. Counts are (mip_axis.bins, z_axis.bins).
    """

    mip_axis: Axis
    z_axis: Axis
    counts: Int64

    @property
    def pixels(self) -> int:
        """Number of counted pixels."""
        return int(self.counts.sum())


def normal_score(below: Float64, pixels: int) -> Float64:
    """Standard normal quantile of a rank minus one half, clipped to the first and last pixel."""
    from scipy.special import ndtri

    # Counted from the upper end, so that the highest of 10^9 pixels keeps its precision.
    above = np.clip(pixels - below, 0.5, pixels - 0.5)
    return np.asarray(-ndtri(above / pixels), np.float64)
