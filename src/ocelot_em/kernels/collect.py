"""Statistics over the pixels of a tile, compiled by numba.

They are explained in ``ocelot_em.merge.stats.collected``.

Maps are passed as flat runs of a tile's pixels with their ``position``: number of the first pixel
in the tile, width of the tile, and (rows, columns) of its valid pixels. Additions may be reordered
here, because these numbers only describe a map.

Casts keep values at 32 bits: numba defaults to 64, which halves the values per vector.
"""

from typing import Any

import numpy as np

from ocelot_em.kernels.by_map import add
from ocelot_em.kernels.compiling import compiled, not_finite, on_stack, plane, summed

NAN, ZERO_STD, UNSEARCHED = 0, 1, 2
"""Positions in the counts of :func:`count_pixels`."""

_MAX_VECTORISED_PARTIALS = 8
"""Maximum number of partials whose wins are counted by one vectorised pass each."""

_RUN_PIXELS = 1024
"""Pixels counted together: all intermediate values fit the first-level cache."""

_CANDIDATE_RUN = 128
"""Pixels that are tested together for candidates."""

_ALL_BUT_SIGN = np.int32(0x7FFFFFFF)

_HIGHEST_RANK = np.int32(0x7F800000)
"""Rank of infinity; see :func:`_ranks`. Positive NaN ranks above it."""

_LOWEST_RANK = np.int32(-0x7F800001)
"""Rank of -infinity. Negative NaN ranks below it."""


def no_ranks() -> Any:
    """Return the initial lowest and highest ranks of two maps; see :func:`_ranks`."""
    return np.array([_HIGHEST_RANK, _LOWEST_RANK] * 2)


def values_of(ranks: Any) -> Any:
    """Return the float32 values with these ranks; see :func:`_ranks`."""
    return (ranks ^ ((ranks >> 31) & _ALL_BUT_SIGN)).view(np.float32)


@compiled
def _row(at: Any, size: Any, most: Any, position: Any) -> Any:
    """Return the number of pixels up to the end of a row, at most ``most``, and the valid end."""
    start, width, (n_rows, n_columns) = position
    y, x = divmod(start + at, width)
    n = min(width - x, size - at, most)
    return n, at + (min(max(n_columns - x, 0), n) if y < n_rows else 0)


@compiled
def count_pixels(maps: Any, position: Any, axes: Any, into: Any, found: Any) -> int:
    """Add the valid pixels of a run to histograms and counts, and record candidates.

    ``maps`` are ``mip``, z-score and standard deviation. ``axes`` are those of ``mip``, of z-score,
    and of both for the joint histogram, each given by the first bin (its lower edge times the bins
    per unit), the number of bins, and the bins per unit.

    ``into`` are outputs: the two histograms, with underflow first and overflow last; the joint
    histogram, where outliers go to the nearest bin and rows may be longer than the axis; the
    counts; and the lowest and highest ranks of both maps, see :func:`_ranks`. ``found`` has the
    lowest z-score of a candidate, the output for pixel numbers in the tile (when it is full,
    further candidates are only counted), and the number of candidates so far; return that number
    including this run.
    """
    mips, zs, stds = maps
    bins = on_stack(_RUN_PIXELS, np.int32)
    special = on_stack(_RUN_PIXELS, np.float32), on_stack(_RUN_PIXELS, np.float32)
    level, where, n_found = found
    at = 0
    while at < mips.size:
        n, end = _row(at, mips.size, _RUN_PIXELS, position)
        if end > at:
            n_found = _find_above(zs[at:end], level, position[0] + at, where, n_found)
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
        mips, zs = kept[0][:n], kept[1][:n]
        lowest_mip, highest_mip = _ranks(mips)
        lowest_z, highest_z = _ranks(zs)
    extremes[0], extremes[1] = min(extremes[0], lowest_mip), max(extremes[1], highest_mip)
    extremes[2], extremes[3] = min(extremes[2], lowest_z), max(extremes[3], highest_z)
    # One histogram at a time: the lines of all three do not fit the cache.
    bins = bins[: mips.size]
    _bins(mips, mip_axis, bins)
    _increment(mip_counts, bins)
    _bins(zs, z_axis, bins)
    _increment(z_counts, bins)
    _joint_bins(mips, zs, joint_mip_axis, joint_z_axis, (np.float32(joint_counts.shape[1]), bins))
    _increment(plane(joint_counts.ctypes.data, np.uint32, 0, joint_counts.size), bins)


@compiled
def _ranks(values: Any) -> Any:
    """Return the lowest and highest rank: an integer with the same order as the value.

    A rank is the bits of a float32, with all but the sign inverted if negative. Extremes of
    integers can be vectorised, because there is no NaN.
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
    """Count special pixels of a run; copy the others to ``kept`` and return their number."""
    (kept_mips, kept_zs), n = kept, 0
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
    return n


@compiled
def _bins(values: Any, axis: Any, numbers: Any) -> None:
    """Look up bin numbers, from 1; 0 is underflow, and the number of bins plus 1 is overflow.

    Rates are powers of two, so products and floors of float32 are exact.
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
    """Look up flat bin numbers of the joint histogram; outliers go to the nearest bin.

    Uses float32, which is exact up to 2**24.
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
def count_wins(numbers: Any, position: Any, wins: Any) -> None:
    """Count the valid pixels of a run that each partial won; -1 means no winner."""
    at = 0
    while at < numbers.size:
        n, end = _row(at, numbers.size, _RUN_PIXELS, position)
        if end > at:
            own = numbers[at:end]
            # Several vectorised passes are faster than one scalar pass.
            if wins.size <= _MAX_VECTORISED_PARTIALS:
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
def _find_above(zs: Any, level: Any, first: int, where: Any, n: int) -> int:
    """Record the numbers of pixels with a z-score of at least ``level``, from position ``n``."""
    for start in range(0, zs.size, _CANDIDATE_RUN):
        some = zs[start : start + _CANDIDATE_RUN]
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
def look_up_neighbours(numbers: Any, zs: Any, width: int, valid: Any, into: Any) -> None:
    """Look up positions and neighbours of pixels by their numbers.

    ``numbers`` are those in the tile, and ``zs`` its flat z-scores; ``valid`` has its (rows,
    columns) of valid pixels. The outputs have one row per pixel: position (y, x), and the z-scores
    above, below, left and right of it, NaN where not valid.
    """
    (n_rows, n_columns), (positions, neighbours) = valid, into
    for i in range(numbers.size):
        number = numbers[i]
        y, x = divmod(number, width)
        positions[i, 0], positions[i, 1] = y, x
        neighbours[i, 0] = zs[number - width] if y > 0 else np.nan
        neighbours[i, 1] = zs[number + width] if y + 1 < n_rows else np.nan
        neighbours[i, 2] = zs[number - 1] if x > 0 else np.nan
        neighbours[i, 3] = zs[number + 1] if x + 1 < n_columns else np.nan


@summed
def _moments(values: Any) -> Any:
    """Return the sum and the sum of squares."""
    total, squared_total = 0.0, 0.0
    for i in range(values.size):
        value = np.float64(values[i])
        total += value
        squared_total += value * value
    return total, squared_total


@summed
def _add_with_moments(values: Any, first: Any, into: Any) -> Any:
    """Add values to totals as in ``by_map``; return their sum and sum of squares."""
    total, squared_total = 0.0, 0.0
    for i in range(values.size):
        value, old = np.float64(values[i]), into[i]
        old = 0.0 if first else old
        into[i] = old + value
        total += value
        squared_total += value * value
    return total, squared_total


@compiled
def add_moments(values: Any, position: Any, into: Any) -> None:
    """Add the number, sum and sum of squares of the valid pixels of a run.

    A row of pixels with NaN is left out.
    """
    at = 0
    while at < values.size:
        n, end = _row(at, values.size, values.size, position)
        if end > at:
            total, squared_total = _moments(values[at:end])
            if total == total:
                into[0] += end - at
                into[1] += total
                into[2] += squared_total
        at += n


@compiled
def add_and_measure(values: Any, total: Any, first: Any, position: Any, into: Any) -> Any:
    """Add to totals as in ``by_map``, and to moments; return whether any may be unusable."""
    start, width, (n_rows, n_columns) = position
    if n_columns < width or start + values.size > n_rows * width:
        bad = add(values, first, total)
        add_moments(values, position, into)
        return bad
    own, own_squared = _add_with_moments(values, first, total)
    if not_finite(own):  # a value is NaN or infinite, or the sum overflows
        add_moments(values, position, into)
        return np.int32(1)
    into[0] += values.size
    into[1] += own
    into[2] += own_squared
    return np.int32(0)
