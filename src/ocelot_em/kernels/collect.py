"""Counts over the pixels of a tile, compiled by numba; what they mean: ``ocelot_em.collected``.

All maps are C-contiguous float32 arrays (y, x) of one shape, of which the first rows and columns
count. Additions may be reordered here: these numbers describe a map, they are not part of it.
"""

from typing import Any

import numpy as np
from numba import njit

from ocelot_em.kernels.cpu import compiled

NAN, ZERO_STD, UNSEARCHED, N_COUNTS = 0, 1, 2, 3
"""Places in the counts of :func:`count_pixels`."""


@compiled
def count_pixels(mips: Any, zs: Any, stds: Any, axes: Any, into: Any) -> None:
    """Count pixels by ``mip``, by z-score and by both; and those that are special.

    ``axes``: lowest value, bins per unit and number of bins, of ``mip``, z-score and, with the
    same lowest values, of both coarser axes. What lies beyond is counted in the first and last
    bins. ``into``: the three histograms, extremes (lowest and highest ``mip``, then z-score) and
    counts.
    """
    (mip_low, mip_rate, n_mip), (z_low, z_rate, n_z), (joint_rate, n_joint_mip, n_joint_z) = axes
    mip_counts, z_counts, joint_counts, extremes, counts = into
    lowest_mip, highest_mip, lowest_z, highest_z = extremes
    for y in range(mips.shape[0]):
        for x in range(mips.shape[1]):
            mip, z = mips[y, x], zs[y, x]
            if mip == -np.inf:
                counts[UNSEARCHED] += 1
                continue
            if np.isnan(z) or np.isnan(mip):
                counts[NAN] += 1
                continue
            if z == 0 and stds[y, x] == 0:
                counts[ZERO_STD] += 1
            from_mip = min(max(np.float64(mip) - mip_low, 0.0), 1e6)
            from_z = min(max(np.float64(z) - z_low, 0.0), 1e6)
            mip_counts[min(int(from_mip * mip_rate), n_mip - 1)] += 1
            z_counts[min(int(from_z * z_rate), n_z - 1)] += 1
            row = min(int(from_mip * joint_rate), n_joint_mip - 1)
            joint_counts[row, min(int(from_z * joint_rate), n_joint_z - 1)] += 1
            lowest_mip, highest_mip = min(lowest_mip, mip), max(highest_mip, mip)
            lowest_z, highest_z = min(lowest_z, z), max(highest_z, z)
    extremes[0], extremes[1], extremes[2], extremes[3] = (
        lowest_mip,
        highest_mip,
        lowest_z,
        highest_z,
    )


@compiled
def count_wins(numbers: Any, wins: Any) -> None:
    """Count the pixels that each partial won; -1 is nobody."""
    for y in range(numbers.shape[0]):
        for x in range(numbers.shape[1]):
            number = numbers[y, x]
            if number >= 0:
                wins[number] += 1


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})  # type: ignore[untyped-decorator,unused-ignore]
def _moments(values: Any) -> Any:
    """Sum and sum of squares."""
    total, squared_total = 0.0, 0.0
    for i in range(values.size):
        value = np.float64(values[i])
        total += value
        squared_total += value * value
    return total, squared_total


@compiled
def add_moments(values: Any, start: int, width: int, valid: Any, into: Any) -> None:
    """Add number, sum and sum of squares of a run of pixels, of those that count.

    ``values`` are the pixels of a tile of this width from number ``start`` on; ``valid`` are the
    rows and columns that count. A run with NaN leaves its row of pixels out.
    """
    n_rows, n_columns = valid
    at = 0
    while at < values.size:
        y, x = divmod(start + at, width)
        n = min(width - x, values.size - at)
        n_valid = min(max(n_columns - x, 0), n)
        if y < n_rows and n_valid > 0:
            total, squared_total = _moments(values[at : at + n_valid])
            if total == total:
                into[0] += n_valid
                into[1] += total
                into[2] += squared_total
        at += n


@compiled
def find_above(zs: Any, level: float, where: Any) -> int:
    """Note the numbers of the pixels with a z-score of at least ``level``; how many there are.

    Where there are more than ``where`` has room for, only as many are noted.
    """
    n, width = 0, zs.shape[1]
    for y in range(zs.shape[0]):
        for x in range(width):
            if zs[y, x] >= level:
                if n < where.size:
                    where[n] = y * width + x
                n += 1
    return n
