"""Histograms of whole maps, which add up over tiles and give ranks and normal scores.

:mod:`ocelot_em.particles.significance` computes cutoffs and p-values from them.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ocelot_em.errors import InvalidInputError
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

    def __post_init__(self) -> None:
        problems = []
        if not math.isfinite(self.low):
            problems.append(f"low: expected a finite number, got {self.low}")
        if not 0 < self.width < math.inf:
            problems.append(f"width: expected a finite number above 0, got {self.width}")
        if self.bins < 1:
            problems.append(f"bins: expected 1 or more, got {self.bins}")
        if problems:
            raise InvalidInputError(problems)

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

    def __post_init__(self) -> None:
        problems = _count_problems(self.counts, (self.axis.bins,))
        problems += [
            f"{name}: expected 0 or more pixels, got {value}"
            for name, value in (("underflow", self.underflow), ("overflow", self.overflow))
            if value < 0
        ]
        if problems:
            raise InvalidInputError(problems)

    @classmethod
    def of(cls, values: ArrayLike, axis: Axis) -> "Histogram1D":
        """Count the finite pixels of a whole map of any shape; this is the definition."""
        numbers = np.asarray(values, np.float64)
        bins = axis.bin_of(numbers[np.isfinite(numbers)])
        counts = np.bincount(bins + 1, minlength=axis.bins + 2)
        return cls(axis, counts[1:-1], int(counts[0]), int(counts[-1]))

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

    def normal_scores(self) -> tuple[Float64, Int64]:
        """Median normal score of and pixels in the underflow, each bin and the overflow."""
        first, counts = self._ranked()
        return normal_score(first + counts / 2, self.pixels), counts


@dataclass(frozen=True, eq=False)
class JointHistogram:
    """Joint histogram of ``mip`` and ``scaled_mip`` of a map's valid pixels.

    A pixel off an axis is counted in the nearest bin. Counts are (mip_axis.bins, z_axis.bins).
    """

    mip_axis: Axis
    z_axis: Axis
    counts: Int64

    def __post_init__(self) -> None:
        problems = _count_problems(self.counts, (self.mip_axis.bins, self.z_axis.bins))
        if problems:
            raise InvalidInputError(problems)

    @classmethod
    def of(
        cls,
        mip: ArrayLike,
        z: ArrayLike,
        mip_axis: Axis = JOINT_MIP_AXIS,
        z_axis: Axis = JOINT_Z_AXIS,
    ) -> "JointHistogram":
        """Count the pixels of whole maps where both are finite; this is the definition."""
        mips, zs = searched_pixels(mip, z)
        row = np.clip(mip_axis.bin_of(mips), 0, mip_axis.bins - 1)
        column = np.clip(z_axis.bin_of(zs), 0, z_axis.bins - 1)
        counts = np.bincount(
            row * z_axis.bins + column, minlength=mip_axis.bins * z_axis.bins
        ).reshape(mip_axis.bins, z_axis.bins)
        return cls(mip_axis, z_axis, counts)

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


def searched_pixels(mip: ArrayLike, z: ArrayLike) -> tuple[Float64, Float64]:
    """Values of the pixels where both maps are finite, one-dimensional float64."""
    mips, zs = np.asarray(mip, np.float64), np.asarray(z, np.float64)
    if mips.shape != zs.shape:
        raise InvalidInputError(
            f"mip and z: expected equal shapes, got {mips.shape} and {zs.shape}"
        )
    both = np.isfinite(mips) & np.isfinite(zs)
    return mips[both], zs[both]


def _count_problems(counts: Int64, shape: tuple[int, ...]) -> list[str]:
    if counts.shape != shape:
        return [f"counts: expected the axes' shape {shape}, got {counts.shape}"]
    if counts.dtype.kind not in "iu":
        return [f"counts: expected integers, got {counts.dtype}"]
    if counts.min() < 0:
        return [f"counts: expected 0 or more pixels in each bin, got {counts.min()}"]
    return []
