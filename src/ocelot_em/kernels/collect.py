"""Counts over the pixels of a tile, compiled by numba; what they mean: ``ocelot_em.collected``.

All maps are C-contiguous float32 arrays (y, x) of one shape, of which the first rows and columns
count. Additions may be reordered here: these numbers describe a map, they are not part of it.
"""

from typing import Any

import numpy as np

from ocelot_em.kernels.by_map import add, add_first
from ocelot_em.kernels.cpu import compiled, summed

NAN, ZERO_STD, UNSEARCHED, N_COUNTS = 0, 1, 2, 3
"""Places in the counts of :func:`count_pixels`."""

_FEW = 8
"""Partials."""


@compiled
def count_pixels(mips: Any, zs: Any, stds: Any, axes: Any, into: Any) -> None:
    """Count pixels by ``mip``, by z-score and by both; and those that are special.

    ``axes``: the first bin (its lower edge times the bins per unit) and the number of bins, of
    ``mip`` and of z-score; the bins per unit; how many bins make one of both together, as a shift
    of bits. ``into``: the histogram of each, with what lies below and beyond the axis in the first
    and last place; that of both, in which it is in the nearest bin; and the counts.
    """
    (first_mip, n_mip), (first_z, n_z), rate, shift = axes
    mip_counts, z_counts, joint_counts, counts = into
    both_counts = joint_counts.reshape(-1)
    rows, columns = np.empty(mips.shape[1], np.int32), np.empty(mips.shape[1], np.int32)
    both = np.empty(mips.shape[1], np.int32)
    for y in range(mips.shape[0]):
        mip_row, z_row = mips[y], zs[y]
        if _any_special(mip_row, z_row):
            mip_row, z_row = _without_special(mip_row, z_row, stds[y], counts)
        _bins(mip_row, first_mip, n_mip, rate, rows)
        _bins(z_row, first_z, n_z, rate, columns)
        _joint_bins(rows, columns, np.int32(shift), joint_counts.shape, both)
        for x in range(mip_row.size):
            mip_counts[np.uint32(rows[x])] += np.uint32(1)
            z_counts[np.uint32(columns[x])] += np.uint32(1)
            both_counts[np.uint32(both[x])] += np.uint32(1)


@compiled
def _any_special(mips: Any, zs: Any) -> Any:
    """Whether any pixel was not searched, is NaN, or may have no variance."""
    special = np.int32(0)
    for x in range(mips.size):
        mip, z = mips[x], zs[x]
        special |= np.int32(not mip > -np.inf) | np.int32(z != z) | np.int32(z == 0)
    return special != 0


@compiled
def _without_special(mips: Any, zs: Any, stds: Any, counts: Any) -> Any:
    """Count what is special in a row of pixels; the others."""
    n = 0
    kept_mips, kept_zs = np.empty_like(mips), np.empty_like(zs)
    for x in range(mips.size):
        mip, z = mips[x], zs[x]
        if mip == -np.inf:
            counts[UNSEARCHED] += 1
        elif mip != mip or z != z:
            counts[NAN] += 1
        else:
            counts[ZERO_STD] += int(stds[x] == 0)
            kept_mips[n], kept_zs[n] = mip, z
            n += 1
    return kept_mips[:n], kept_zs[:n]


@compiled
def _bins(values: Any, first: Any, n_bins: Any, rate: Any, numbers: Any) -> None:
    """Look up bins, from 1; 0 below the axis and ``n_bins + 1`` beyond it.

    Rates are powers of two, so that products and floors of float32 are exact.
    """
    lowest, highest = np.float32(first - 1) / rate, np.float32(first + n_bins) / rate
    for x in range(values.size):
        value = values[x]
        value = value if value > lowest else lowest
        value = value if value < highest else highest
        numbers[x] = np.int32(np.floor(value * rate)) - first + np.int32(1)


@compiled
def _joint_bins(rows: Any, columns: Any, shift: Any, shape: Any, numbers: Any) -> None:
    """Look up bins of both, row by row; what lies beyond is in the nearest."""
    last_row, last_column = np.int32(shape[0] - 1), np.int32(shape[1] - 1)
    width, zero, one = np.int32(shape[1]), np.int32(0), np.int32(1)
    for x in range(rows.size):
        row, column = (rows[x] - one) >> shift, (columns[x] - one) >> shift
        row = row if row > zero else zero
        row = row if row < last_row else last_row
        column = column if column > zero else zero
        column = column if column < last_column else last_column
        numbers[x] = row * width + column


@compiled
def count_wins(numbers: Any, wins: Any) -> None:
    """Count the pixels that each partial won; -1 is nobody."""
    for y in range(numbers.shape[0]):
        if wins.size <= _FEW:  # several vectorised looks are faster than one of pixel by pixel
            for number in range(wins.size):
                wins[number] += _count_equal(numbers[y], np.int32(number))
        else:
            for x in range(numbers.shape[1]):
                number = numbers[y, x]
                if number >= 0:
                    wins[number] += 1


@compiled
def _count_equal(values: Any, wanted: Any) -> Any:
    n = np.int32(0)
    for x in range(values.size):
        n += np.int32(values[x] == wanted)
    return n


@summed
def _moments(values: Any) -> Any:
    """Sum and sum of squares."""
    total, squared_total = 0.0, 0.0
    for i in range(values.size):
        value = np.float64(values[i])
        total += value
        squared_total += value * value
    return total, squared_total


@summed
def _add_with_moments(values: Any, into: Any) -> Any:
    """Add to float64 totals, each by itself; sum and sum of squares of what was added."""
    total, squared_total = 0.0, 0.0
    for i in range(values.size):
        value, old = np.float64(values[i]), into[i]
        into[i] = old + value
        total += value
        squared_total += value * value
    return total, squared_total


@summed
def _add_first_with_moments(values: Any, into: Any) -> Any:
    """As :func:`_add_with_moments` to totals of 0 everywhere, whatever is in their memory."""
    total, squared_total = 0.0, 0.0
    for i in range(values.size):
        value = np.float64(values[i])
        into[i] = 0.0 + value  # -0.0 becomes 0.0, as if it were added
        total += value
        squared_total += value * value
    return total, squared_total


@compiled
def add_moments(values: Any, place: Any, into: Any) -> None:
    """Add number, sum and sum of squares of a run of pixels, of those that count.

    ``place``: number of the first pixel in its tile, width of the tile, and the rows and columns
    that count. A run with NaN leaves its row of pixels out.
    """
    start, width, (n_rows, n_columns) = place
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
def add_and_measure(values: Any, total: Any, first: Any, place: Any, into: Any) -> Any:
    """Add to the totals as ``by_map`` does, and as :func:`add_moments`; whether any is NaN."""
    start, width, (n_rows, n_columns) = place
    if n_columns < width or start + values.size > n_rows * width:
        bad = add_first(values, total) if first else add(values, total)
        add_moments(values, place, into)
        return bad
    if first:
        own, own_squared = _add_first_with_moments(values, total)
    else:
        own, own_squared = _add_with_moments(values, total)
    if own != own:  # a NaN, or infinities of both signs
        add_moments(values, place, into)
        return True
    into[0] += values.size
    into[1] += own
    into[2] += own_squared
    return False


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
