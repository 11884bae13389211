"""Counts over the pixels of a tile, compiled by numba.

What they mean is in ``ocelot_em.merge.stats.collected``.

Maps are handed in as flat runs of a tile's pixels, with a ``place`` that says which: number of the
first pixel in its tile, width of the tile, and the rows and columns that count. Additions may be
reordered here: these numbers describe a map, they are not part of it.

numba computes with 64 bits wherever it is not told to keep 32, and half as many fit a vector.
"""

from typing import Any

import numpy as np

from ocelot_em.kernels.by_map import add, add_first
from ocelot_em.kernels.compiling import compiled, summed

NAN, ZERO_STD, UNSEARCHED = 0, 1, 2
"""Places in the counts of :func:`count_pixels`."""

_FEW = 8
"""Partials."""

_RUN = 1024
"""Pixels that are counted together: all that is computed of them fits the first-level cache."""

_LOOK = 128
"""Pixels of which it is asked first whether any is a candidate."""

_ALL_BUT_SIGN = np.int32(0x7FFFFFFF)

_HIGHEST_RANK = np.int32(0x7F800000)
"""Of infinity; see :func:`_ranks`. NaN lies beyond."""

_LOWEST_RANK = np.int32(-0x7F800001)
"""Of -infinity. NaN of the other sign lies below."""


def no_ranks() -> Any:
    """Lowest and highest rank of nothing, twice; see :func:`_ranks`."""
    return np.array([_HIGHEST_RANK, _LOWEST_RANK] * 2)


def values_of(ranks: Any) -> Any:
    """Return the float32 values that have these ranks; see :func:`_ranks`."""
    return (ranks ^ ((ranks >> 31) & _ALL_BUT_SIGN)).view(np.float32)


@compiled
def count_pixels(maps: Any, place: Any, axes: Any, into: Any, found: Any) -> int:
    """Count what lies in a run of pixels, of those that count; note where candidates are.

    Parameters
    ----------
    maps
        ``mip``, z-score and standard deviation; flat.
    place
        Which pixels they are.
    axes
        Of ``mip``, of z-score, and of both for the joint histogram: the first bin (its lower edge
        times the bins per unit), the number of bins, and the bins per unit.
    into
        The histogram of each, with what lies below and beyond the axis in the first and last
        place; that of both, in which it is in the nearest bin, and whose rows may be longer than
        the axis; the counts; and the lowest and highest ranks of each, see :func:`_ranks`.
    found
        z-score from which on a pixel is a candidate; where to note their numbers in the tile, as
        many as there is room for; and how many there have been.

    Returns
    -------
    int
        How many candidates there have been now.
    """
    mips, zs, stds = maps
    start, width, (n_rows, n_columns) = place
    bins, special = np.empty(_RUN, np.int32), np.empty((2, _RUN), np.float32)
    level, where, n_found = found
    at = 0
    while at < mips.size:
        y, x = divmod(start + at, width)
        n = min(width - x, mips.size - at, _RUN)
        n_valid = min(max(n_columns - x, 0), n)
        if y < n_rows and n_valid > 0:
            end = at + n_valid
            n_found = _note_above(zs[at:end], level, start + at, where, n_found)
            _count_run(mips[at:end], zs[at:end], stds[at:end], axes, into, (bins, special))
        at += n
    return int(n_found)


@compiled
def _count_run(mips: Any, zs: Any, stds: Any, axes: Any, into: Any, memory: Any) -> None:
    mip_axis, z_axis, joint_mip_axis, joint_z_axis = axes
    mip_counts, z_counts, joint_counts, counts, extremes = into
    bins, kept = memory
    lowest_mip, highest_mip = _ranks(mips)
    lowest_z, highest_z = _ranks(zs)
    is_plain = lowest_mip > _LOWEST_RANK and highest_mip <= _HIGHEST_RANK
    if not (is_plain and lowest_z > 0 and highest_z <= _HIGHEST_RANK):
        n = _without_special(mips, zs, stds, counts, kept)
        mips, zs = kept[0, :n], kept[1, :n]
        lowest_mip, highest_mip = _ranks(mips)
        lowest_z, highest_z = _ranks(zs)
    extremes[0], extremes[1] = min(extremes[0], lowest_mip), max(extremes[1], highest_mip)
    extremes[2], extremes[3] = min(extremes[2], lowest_z), max(extremes[3], highest_z)
    # One histogram after the other: the lines of all three together do not fit the cache.
    bins = bins[: mips.size]
    _bins(mips, mip_axis, bins)
    _increment(mip_counts, bins)
    _bins(zs, z_axis, bins)
    _increment(z_counts, bins)
    _joint_bins(mips, zs, joint_mip_axis, joint_z_axis, (np.float32(joint_counts.shape[1]), bins))
    _increment(joint_counts.reshape(-1), bins)


@compiled
def _ranks(values: Any) -> Any:
    """Lowest and highest of the integers that are ordered as the values are.

    That is their bits, all but the sign inverted where it is negative. Of integers the extremes
    are found by vectors, because NaN cannot come between.
    """
    lowest, highest = _HIGHEST_RANK, _LOWEST_RANK
    bits = values.view(np.int32)
    for x in range(bits.size):
        own = bits[x]
        rank = np.int32(own ^ np.int32(np.int32(own >> np.int32(31)) & _ALL_BUT_SIGN))
        lowest, highest = min(lowest, rank), max(highest, rank)
    return lowest, highest


@compiled
def _without_special(mips: Any, zs: Any, stds: Any, counts: Any, kept: Any) -> int:
    """Count what is special in a run of pixels; keep the others, and how many they are."""
    n = 0
    for x in range(mips.size):
        mip, z = mips[x], zs[x]
        if mip == -np.inf:
            counts[UNSEARCHED] += 1
        elif mip != mip or z != z:
            counts[NAN] += 1
        else:
            counts[ZERO_STD] += int(stds[x] == 0)
            kept[0, n], kept[1, n] = mip, z
            n += 1
    return n


@compiled
def _bins(values: Any, axis: Any, numbers: Any) -> None:
    """Look up bins, from 1; 0 below the axis and one more than it has beyond it.

    Rates are powers of two, so that products and floors of float32 are exact.
    """
    first, n_bins, rate = axis
    lowest, highest = np.float32(first - 1) / rate, np.float32(first + n_bins) / rate
    for x in range(values.size):
        value = values[x]
        value = value if value > lowest else lowest
        value = value if value < highest else highest
        numbers[x] = np.int32(np.floor(value * rate)) - first + np.int32(1)


@compiled
def _joint_bins(mips: Any, zs: Any, mip_axis: Any, z_axis: Any, into: Any) -> None:
    """Look up bins of both, row by row; what lies beyond is in the nearest.

    In float32, which is exact up to 2**24.
    """
    (first_row, n_rows, row_rate), (first_column, n_columns, column_rate) = mip_axis, z_axis
    width, numbers = into
    top, bottom = np.float32(first_row), np.float32(first_row + n_rows - 1)
    left, right = np.float32(first_column), np.float32(first_column + n_columns - 1)
    origin = top * width + left
    for x in range(mips.size):
        row, column = np.floor(mips[x] * row_rate), np.floor(zs[x] * column_rate)
        row = row if row > top else top
        row = row if row < bottom else bottom
        column = column if column > left else left
        column = column if column < right else right
        numbers[x] = np.int32(row * width + column - origin)


@compiled
def _increment(counts: Any, bins: Any) -> None:
    for x in range(bins.size):
        counts[np.uint32(bins[x])] += np.uint32(1)


@compiled
def count_wins(numbers: Any, place: Any, wins: Any) -> None:
    """Count how many of a run of pixels each partial won, of those that count; -1 is nobody."""
    start, width, (n_rows, n_columns) = place
    at = 0
    while at < numbers.size:
        y, x = divmod(start + at, width)
        n = min(width - x, numbers.size - at, _RUN)
        n_valid = min(max(n_columns - x, 0), n)
        if y < n_rows and n_valid > 0:
            own = numbers[at : at + n_valid]
            if wins.size <= _FEW:  # several vectorised looks are faster than one of pixel by pixel
                for number in range(wins.size):
                    wins[number] += _count_equal(own, np.int32(number))
            else:
                for i in range(own.size):
                    if own[i] >= 0:
                        wins[own[i]] += 1
        at += n


@compiled
def _count_equal(values: Any, wanted: Any) -> Any:
    n = np.int32(0)
    for x in range(values.size):
        n = np.int32(n + np.int32(values[x] == wanted))
    return n


@compiled
def _note_above(zs: Any, level: Any, first: int, where: Any, n: int) -> int:
    """Note the numbers of the pixels with a z-score of at least ``level``, from ``n`` on."""
    for start in range(0, zs.size, _LOOK):
        some = zs[start : start + _LOOK]
        if _any_above(some, level):
            for x in range(some.size):
                if some[x] >= level:
                    if n < where.size:
                        where[n] = first + start + x
                    n += 1
    return n


@compiled
def _any_above(values: Any, level: Any) -> Any:
    found = np.int32(0)
    for x in range(values.size):
        found |= np.int32(values[x] >= level)
    return found != 0


@compiled
def look_around(numbers: Any, zs: Any, width: int, valid: Any, into: Any) -> None:
    """Look up pixels of a tile by their numbers.

    Parameters
    ----------
    numbers
        Of the pixels that are looked for.
    zs
        z-scores of the tile, flat.
    width, valid
        Of the tile, and the rows and columns of it that count.
    into
        One row a pixel: its place (y, x), and another one with the z-scores above, below, left and
        right of it, NaN where these do not count.
    """
    (n_rows, n_columns), (places, beside) = valid, into
    for i in range(numbers.size):
        number = numbers[i]
        y, x = divmod(number, width)
        places[i, 0], places[i, 1] = y, x
        beside[i, 0] = zs[number - width] if y > 0 else np.nan
        beside[i, 1] = zs[number + width] if y + 1 < n_rows else np.nan
        beside[i, 2] = zs[number - 1] if x > 0 else np.nan
        beside[i, 3] = zs[number + 1] if x + 1 < n_columns else np.nan


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

    A run with NaN leaves its row of pixels out.
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
