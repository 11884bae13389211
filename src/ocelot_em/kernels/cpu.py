"""CPU merge kernels compiled by numba: one pass over the maps in cache-sized blocks.

Same interface as :mod:`ocelot_em.kernels.reference`, with bit-identical results. The compiled
functions release the GIL, so threads can merge regions in parallel. They are compiled at first use
and cached on disk.

Each block is processed in groups of four partials: the winners are computed as a mask, then one
simple loop per map reads that map of all four partials. Memory thus delivers four streams at once,
and the accumulator is read and written a quarter as often. Two rules keep the loops vectorised
(otherwise they are four to five times slower): operands are loaded into locals before one of them
is selected, and a loop writes one array and reads few, because the compiler does not vectorise a
loop that needs more than eight overlap tests between arrays. ``fastmath`` stays off because it
would fuse and reorder the float64 arithmetic.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ocelot_em.kernels.addresses import MISSING, of_fold
from ocelot_em.kernels.by_map import add
from ocelot_em.kernels.compiling import (
    address_of,
    compiled,
    not_a_mip,
    not_finite,
    on_stack,
    plane,
    planes,
)
from ocelot_em.kernels.cpu_statistics import finalise
from ocelot_em.kernels.reference import identity, mask_nan, reset
from ocelot_em.model.maps import NOT_SEARCHED, Accumulator, PartialMaps
from ocelot_em.model.search_space import SearchSpace

__all__ = ["finalise", "fold_all", "identity", "mask_nan"]

_BLOCK = 16384
"""Pixels per block of a fold: long enough for memory streaming, short enough for the cache."""

_GROUP = 4
"""Partials per pass over the accumulator, named a, b, c, d in the code."""

_A, _B, _C, _D = np.int32(1), np.int32(2), np.int32(4), np.int32(8)
"""Mask bits that mark which partial of a group won a pixel."""

_SEARCHED_SHIFT = np.int32(4)
"""Shift of the mask bits that mark which partials of a group searched a pixel."""

_MIP, _BEST_PARTIAL, _SUM, _SQUARED_SUM, _COUNT, _POSE = range(6)
"""Columns of :mod:`ocelot_em.kernels.addresses`; pose maps start at the last of these."""

_NUMBER, _ONE_COUNT, _SUM_BYTES, _SQUARED_SUM_BYTES = range(4)
"""Columns of the numbers of partials."""


def fold_all(
    acc: Accumulator,
    partials: Sequence[PartialMaps],
    space: SearchSpace | None,
    *,
    fresh: bool = False,
) -> bool:
    """Fold partials into the accumulator; see :func:`ocelot_em.kernels.reference.fold_all`."""
    kept, rows, numbers = of_fold(acc, partials, space, address_of)
    if fresh:
        reset(acc)
    if not partials:
        return False
    found = _fold(
        acc.mip.size,
        np.array(kept, np.int64),
        np.array(rows, np.int64),
        np.array(numbers, np.int64),
        0 if space is None else space.n_poses,
    )
    if acc.count_map is None:
        acc.count += sum(partial.count for partial in partials if isinstance(partial.count, int))
    return bool(found)


@compiled
def _explicit_winners(state: Any, best: Any, mips: Any) -> Any:
    """Mark the winners and the partials that searched; return whether any value is unusable."""
    a_mips, b_mips, c_mips, d_mips = mips
    bad, none = np.int32(0), np.int32(0)
    for i in range(state.size):
        highest, a, b, c, d = best[i], a_mips[i], b_mips[i], c_mips[i], d_mips[i]
        won = _A if a > highest else none
        highest = a if a > highest else highest
        won = _B if b > highest else won
        highest = b if b > highest else highest
        won = _C if c > highest else won
        highest = c if c > highest else highest
        won = _D if d > highest else won
        searched = (_A if a > -np.inf else none) | (_B if b > -np.inf else none)
        searched |= (_C if c > -np.inf else none) | (_D if d > -np.inf else none)
        state[i] = won | (searched << _SEARCHED_SHIFT)
        bad |= not_a_mip(a) | not_a_mip(b) | not_a_mip(c) | not_a_mip(d)
    return bad


@compiled
def _indexed_winners(state: Any, kept: Any, new: Any, n_poses: Any, second: Any) -> Any:
    """Mark wins of two partials, keep other marks; return whether any value is unusable."""
    (best, best_index), (a_mips, b_mips, a_indices, b_indices) = kept, new
    none, yes, lowest = np.int32(0), np.int32(1), np.int32(NOT_SEARCHED)
    a_bit, b_bit = (_C, _D) if second else (_A, _B)
    keep_mark = np.int32(-1) if second else none
    bad = none
    for i in range(state.size):
        highest, index, earlier = best[i], best_index[i], state[i] & keep_mark
        a, b, a_index, b_index = a_mips[i], b_mips[i], a_indices[i], b_indices[i]
        a_searched, b_searched = (yes if a > -np.inf else none), (yes if b > -np.inf else none)
        tie = (yes if a == highest else none) & (yes if a_index < index else none) & a_searched
        a_won = tie | (yes if a > highest else none)
        highest, index = (a if a_won else highest), (a_index if a_won else index)
        tie = (yes if b == highest else none) & (yes if b_index < index else none) & b_searched
        b_won = tie | (yes if b > highest else none)
        won = a_bit if a_won else earlier
        state[i] = b_bit if b_won else won
        bad |= not_a_mip(a) | not_a_mip(b)
        bad |= (yes if a_index < lowest else none) | (yes if a_index >= n_poses else none)
        bad |= (yes if b_index < lowest else none) | (yes if b_index >= n_poses else none)
        bad |= (yes if a_index == lowest else none) & a_searched
        bad |= (yes if b_index == lowest else none) & b_searched
    return bad


@compiled
def _take(state: Any, kept: Any, new: Any) -> None:
    """Replace the kept values with those of the winners."""
    a_values, b_values, c_values, d_values = new
    for i in range(state.size):
        won, value = state[i], kept[i]
        a, b, c, d = a_values[i], b_values[i], c_values[i], d_values[i]
        value = a if won & _A else value
        value = b if won & _B else value
        value = c if won & _C else value
        kept[i] = d if won & _D else value


@compiled
def _take_pose(state: Any, kept: Any, new: Any) -> Any:
    """Do the same as :func:`_take`; return whether any value is unusable."""
    a_values, b_values, c_values, d_values = new
    bad, none = np.int32(0), np.int32(0)
    for i in range(state.size):
        won, value = state[i], kept[i]
        a, b, c, d = a_values[i], b_values[i], c_values[i], d_values[i]
        value = a if won & _A else value
        value = b if won & _B else value
        value = c if won & _C else value
        kept[i] = d if won & _D else value
        unusable = (_A if not_finite(a) else none) | (_B if not_finite(b) else none)
        unusable |= (_C if not_finite(c) else none) | (_D if not_finite(d) else none)
        bad |= unusable & (won >> _SEARCHED_SHIFT)
    return bad


@compiled
def _take_numbers(state: Any, kept: Any, numbers: Any) -> None:
    """Replace the kept values with the number of the winner."""
    a, b, c, d = numbers
    for i in range(state.size):
        won, value = state[i], kept[i]
        value = a if won & _A else value
        value = b if won & _B else value
        value = c if won & _C else value
        kept[i] = d if won & _D else value


@compiled
def _take_map(state: Any, kept: Any, bit: Any, new: Any) -> None:
    """Replace the kept values where the partial with this bit won."""
    for i in range(state.size):
        won, value, other = state[i], kept[i], new[i]
        kept[i] = other if won & bit else value


@compiled
def _add_four(total: Any, new: Any) -> Any:
    """Add four maps in float64, in order; return whether any value is unusable."""
    a_values, b_values, c_values, d_values = new
    bad = np.int32(0)
    for i in range(total.size):
        value, a, b, c, d = total[i], a_values[i], b_values[i], c_values[i], d_values[i]
        total[i] = value + np.float64(a) + np.float64(b) + np.float64(c) + np.float64(d)
        bad |= not_finite(a) | not_finite(b) | not_finite(c) | not_finite(d)
    return bad


@compiled
def _fold(n: Any, kept: Any, rows: Any, numbers: Any, n_poses: Any) -> Any:
    """Fold partials; return whether any value is unusable.

    ``kept`` and ``rows`` hold addresses; ``n_poses`` is 0 for explicit poses.
    """
    state = on_stack(_BLOCK, np.int32)
    found = np.int32(0)
    for start in range(0, n, _BLOCK):
        block = state[: min(n - start, _BLOCK)]
        for first in range(0, len(rows), _GROUP):
            group = rows[first : first + _GROUP]
            values = numbers[first : first + _GROUP]
            if n_poses:
                found |= _pick_indexed(block, start, kept, group, n_poses)
            else:
                found |= _pick_explicit(block, start, kept, group)
            _pick_best_partial(block, start, kept, group, values)
            found |= _add_sums(block, start, kept, group, values)
            if kept[_COUNT] != MISSING:
                _add_counts(block, start, kept, group, values)
    return found


@compiled
def _pick_explicit(state: Any, start: Any, kept: Any, rows: Any) -> Any:
    """Mark the winners and copy their mips and poses; return whether any value is unusable."""
    size = state.size
    best = plane(kept[_MIP], np.float32, start, size)
    bad = _explicit_winners(state, best, planes(rows, _MIP, np.float32, start, size))
    _pick_bits(state, start, kept, rows, _MIP)
    for column in range(_POSE, len(kept)):
        pose = plane(kept[column], np.float32, start, size)
        bad |= _take_pose(state, pose, planes(rows, column, np.float32, start, size))
    return bad


@compiled
def _pick_indexed(state: Any, start: Any, kept: Any, rows: Any, n_poses: Any) -> Any:
    """Mark winners, copy mips and indices; return whether any value is unusable."""
    size = state.size
    best = plane(kept[_MIP], np.float32, start, size)
    best_index = plane(kept[_POSE], np.int32, start, size)
    bad = np.int32(0)
    # In pairs: a loop over the arrays of four partials would not be vectorised.
    for second in range(2 if len(rows) > 2 else 1):
        a, b = 2 * second, min(2 * second + 1, len(rows) - 1)
        new = (
            plane(rows[a, _MIP], np.float32, start, size),
            plane(rows[b, _MIP], np.float32, start, size),
            plane(rows[a, _POSE], np.int32, start, size),
            plane(rows[b, _POSE], np.int32, start, size),
        )
        bad |= _indexed_winners(state, (best, best_index), new, np.int32(n_poses), second)
        _pick_bits(state, start, kept, rows, _MIP)
        _pick_bits(state, start, kept, rows, _POSE)
    return bad


@compiled
def _pick_bits(state: Any, start: Any, kept: Any, rows: Any, column: Any) -> None:
    """Copy the winners' values of a map of any four-byte dtype."""
    new = planes(rows, column, np.int32, start, state.size)
    _take(state, plane(kept[column], np.int32, start, state.size), new)


@compiled
def _pick_best_partial(state: Any, start: Any, kept: Any, rows: Any, numbers: Any) -> None:
    """Store the winner's number: the partial's own, or from its ``best_partial`` map."""
    best, last = plane(kept[_BEST_PARTIAL], np.int32, start, state.size), len(rows) - 1
    a, b = np.int32(numbers[0, _NUMBER]), np.int32(numbers[min(1, last), _NUMBER])
    c, d = np.int32(numbers[min(2, last), _NUMBER]), np.int32(numbers[last, _NUMBER])
    _take_numbers(state, best, (a, b, c, d))
    for number in range(len(rows)):
        address = rows[number, _BEST_PARTIAL]
        if address != MISSING:
            new = plane(address, np.int32, start, state.size)
            _take_map(state, best, np.int32(1 << number), new)


@compiled
def _add_sums(state: Any, start: Any, kept: Any, rows: Any, numbers: Any) -> Any:
    """Add both sums; return whether any value is unusable."""
    bad, size = np.int32(0), state.size
    for number in range(2):
        column, width = _SUM + number, _SUM_BYTES + number
        total = plane(kept[column], np.float64, start, size)
        widest = numbers[0, width]
        for row in range(1, len(rows)):
            widest = max(widest, numbers[row, width])
        if len(rows) == _GROUP and widest == 4:
            bad |= _add_four(total, planes(rows, column, np.float32, start, size))
        else:
            for row in range(len(rows)):
                if numbers[row, width] == 4:
                    new = plane(rows[row, column], np.float32, start, size)
                    bad |= add(new, False, total)
                else:
                    wide = plane(rows[row, column], np.float64, start, size)
                    bad |= add(wide, False, total)
    return bad


@compiled
def _add_counts(state: Any, start: Any, kept: Any, rows: Any, numbers: Any) -> None:
    """Add each partial's count, a map or one number, to the count map."""
    total = plane(kept[_COUNT], np.int64, start, state.size)
    for number in range(len(rows)):
        if rows[number, _COUNT] != MISSING:
            counts = plane(rows[number, _COUNT], np.int64, start, state.size)
            for i in range(total.size):
                total[i] += counts[i]
        else:
            one_count = numbers[number, _ONE_COUNT]
            for i in range(total.size):
                total[i] += one_count
