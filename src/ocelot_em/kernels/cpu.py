"""The merge for the CPU, compiled by numba: one pass over the maps in blocks that stay in cache.

Same interface and same bits as :mod:`ocelot_em.kernels.reference`. The compiled functions release
the GIL, so threads can merge different regions at once. They are compiled at first use, and the
machine code is kept on disk.

Per block and four partials, first the winners as a mask, then one simple loop per map that reads
the map of all four: so memory delivers four streams at once, and the accumulator is read and
written a quarter as often. Two things keep the loops vectorised, without which they are four to
five times slower: operands are loaded into locals before one of them is chosen, and a loop writes
one array and reads few, because the compiler gives up when it would have to test more than eight
pairs of arrays for overlap. ``fastmath`` stays off, because it would fuse and reorder the float64
arithmetic.

Compiled functions take the arrays as tables of addresses, so that one compilation serves every
number of partials and every combination of optional maps.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from numba import carray, njit, types
from numba.core import event
from numba.extending import intrinsic

from ocelot_em.kernels.reference import identity, mask_nan, merged_maps, reset
from ocelot_em.model.maps import (
    MEAN,
    NOT_SEARCHED,
    SCALED_MIP,
    SQUARED_SUM,
    STD,
    SUM,
    Accumulator,
    AnyArray,
    FoldReport,
    MapSet,
    PartialMaps,
)
from ocelot_em.model.search_space import SearchSpace

__all__ = ["finalise", "fold", "fold_all", "identity", "mask_nan", "reset"]

_BLOCK = 16384
"""Pixels per block of a fold: long enough for memory to stream, short enough to stay in cache."""

_SMALL_BLOCK = 1024
"""Pixels per block where everything that is read again fits the first-level cache."""

_GROUP = 4
"""Partials per pass over the accumulator; the names a, b, c, d stand for them."""

_A, _B, _C, _D = np.int32(1), np.int32(2), np.int32(4), np.int32(8)
"""Bits of a pixel in a block's mask: which of a group won, if any did."""

_SEARCHED_SHIFT = np.int32(4)
"""The same bits, shifted by this, say which of a group searched the pixel."""

_MIP, _BEST_PARTIAL, _SUM, _SQUARED_SUM, _COUNT, _POSE = range(6)
"""Columns of a table of addresses, one row a partial; the pose takes the last and all after it."""

_NUMBER, _ONE_COUNT, _SUM_BYTES, _SQUARED_SUM_BYTES = range(4)
"""Columns of the table of numbers: what stands for a map that is not there, and sizes."""

_MISSING = 0
"""Address of a map that is not there."""

_F4, _F8, _I4, _I8 = (np.dtype(kind) for kind in ("f4", "f8", "i4", "i8"))

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile for use without the GIL; division by zero gives what NumPy gives."""
    return cast("_Function", njit(nogil=True, cache=True, error_model="numpy")(function))


def summed(function: _Function) -> _Function:
    """Compile as :func:`compiled` does, but add the terms of a sum in any order."""
    jit = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
    return cast("_Function", jit(function))


class _FirstStart(event.Listener):  # type: ignore[misc]
    """Notes when the first function is compiled that was not on the disk."""

    def __init__(self, compiling: Callable[[], None]) -> None:
        self._compiling, self.at = compiling, 0.0

    def on_start(self, _event: Any) -> None:
        if not self.at:
            self.at = time.perf_counter()
            self._compiling()

    def on_end(self, _event: Any) -> None:
        pass


def seconds_compiling(work: Callable[[], None], compiling: Callable[[], None]) -> float:
    """See :func:`ocelot_em.kernels.seconds_compiling`."""
    first = _FirstStart(compiling)
    with event.install_listener("numba:compile", first):
        work()
    return time.perf_counter() - first.at if first.at else 0.0


def fold(acc: Accumulator, partial: PartialMaps, space: SearchSpace | None) -> FoldReport:
    """Take one more partial into the accumulator: :func:`fold_all` of one."""
    return fold_all(acc, (partial,), space)


def fold_all(
    acc: Accumulator,
    partials: Sequence[PartialMaps],
    space: SearchSpace | None,
    *,
    fresh: bool = False,
) -> FoldReport:
    """Take more partials into the accumulator, in place, in their order.

    The higher ``mip`` wins a pixel with its pose. Equal: explicit poses keep the earlier partial,
    indexed poses the lower global index. -inf never wins. Sums and counts add.

    NaN: a NaN ``mip`` never wins and NaN sums stay NaN; both are counted in the report, and the
    caller decides.

    Parameters
    ----------
    acc
        Changed in place.
    partials
        Maps of the accumulator's shape.
    space
        The search space of an indexed search, None for explicit poses.
    fresh
        Take the accumulator as the merge of nothing, whatever is in its memory.

    Returns
    -------
    FoldReport
        The sums over all partials: a pixel that is NaN in two partials counts twice.

    Raises
    ------
    TypeError
        If a partial's count is a map and the accumulator's is not; nothing is changed then.
    ValueError
        If an array is not C-contiguous, not of the accumulator's size or not of the dtype that
        :class:`PartialMaps` states; nothing is changed then.
    """
    if not partials:
        if fresh:
            reset(acc)
        return FoldReport(0, 0)
    n, pose_type = acc.mip.size, _F4 if space is None else _I4
    kept = [
        _address(acc.mip, n, _F4, changed=True),
        _address(acc.best_partial, n, _I4, changed=True),
        _address(acc.correlation_sum, n, _F8, changed=True),
        _address(acc.correlation_squared_sum, n, _F8, changed=True),
        _MISSING if acc.count_map is None else _address(acc.count_map, n, _I8, changed=True),
        *(_address(pose, n, pose_type, changed=True) for pose in acc.pose),
    ]
    rows, numbers, count = [], [], 0
    for partial in partials:
        total, squared_total = partial.correlation_sum, partial.correlation_squared_sum
        number, number_map, one_count, count_map = 0, _MISSING, 0, _MISSING
        if isinstance(partial.best_partial, int):
            number = partial.best_partial
        else:
            number_map = _address(partial.best_partial, n, _I4)
        if isinstance(partial.count, int):
            one_count = partial.count
            count += one_count
        elif acc.count_map is not None:
            count_map = _address(partial.count, n, _I8)
        else:
            raise TypeError("a map of counts needs an accumulator made with MapSet(counts=True)")
        if len(partial.pose) != len(acc.pose):
            raise ValueError(f"expected {len(acc.pose)} pose maps, got {len(partial.pose)}")
        rows.append(
            (
                _address(partial.mip, n, _F4),
                number_map,
                _address(total, n, _F8 if total.dtype == _F8 else _F4),
                _address(squared_total, n, _F8 if squared_total.dtype == _F8 else _F4),
                count_map,
                *[_address(pose, n, pose_type) for pose in partial.pose],
            )
        )
        one_count = one_count if acc.count_map is not None else 0
        numbers.append((number, one_count, total.itemsize, squared_total.itemsize))
    if fresh:
        reset(acc)
    nan_pixels, invalid_indices = _fold(
        n,
        np.array(kept, np.int64),
        np.array(rows, np.int64),
        np.array(numbers, np.int64),
        0 if space is None else space.n_poses,
    )
    if acc.count_map is None:
        acc.count += count
    return FoldReport(nan_pixels, invalid_indices)


def finalise(
    acc: Accumulator,
    maps: MapSet,
    space: SearchSpace | None,
    out: Mapping[str, AnyArray] | None = None,
) -> dict[str, AnyArray]:
    """Turn an accumulator into the merged maps.

    ``mean = S / N``, ``std = sqrt(max(Q / N - mean**2, 0))``, ``z = (mip - mean) / std``, all in
    float64 and rounded to float32 once. z is 0 where std is 0, and NaN where no device searched;
    mean and std are NaN where the count is 0. Sums beyond float32 become infinite.

    Parameters
    ----------
    acc
        Left as it is.
    maps
        Which maps the result has.
    space
        The search space of an indexed search, None for explicit poses.
    out
        C-contiguous float32 arrays of the accumulator's shape to write computed maps into, by name:
        z-score, mean, standard deviation, sums, decoded poses. Those not named are allocated.

    Returns
    -------
    dict
        The maps of :attr:`MapSet.merged`. Maps that need no computing are the accumulator's own.

    Raises
    ------
    IndexError
        If an index lies beyond the search space.
    ValueError
        If an array is not C-contiguous, or not of the accumulator's size or the right dtype.
    """
    n, shape = acc.mip.size, acc.mip.shape
    names = [SCALED_MIP, MEAN, STD, SUM, SQUARED_SUM, *maps.computed_poses]
    given = out or {}
    computed = {
        name: given[name] if name in given else np.empty(shape, np.float32) for name in names
    }
    targets = np.array(
        [_address(array, n, _F4, changed=True) for array in computed.values()], np.int64
    )
    count_map = _MISSING if acc.count_map is None else _address(acc.count_map, n, _I8)
    sums = acc.correlation_sum, acc.correlation_squared_sum
    inputs = _address(acc.mip, n, _F4), *(_address(total, n, _F8) for total in sums), count_map
    _statistics(n, inputs, float(acc.count), targets)
    if space is not None and maps.computed_poses:
        tables = space.euler_angles, space.defocus_values, space.pixel_values
        addresses = tuple(_address(table, table.size, _F4) for table in tables)
        sizes = tuple(len(table) for table in tables)
        outside = _decode(n, _address(acc.pose[0], n, _I4), addresses, sizes, targets[5:])
        if outside:
            raise IndexError(
                f"{outside} pixels have an index beyond the search space of {space.n_poses} poses"
            )
    return merged_maps(acc, maps, computed)


def _address(array: AnyArray, size: int, dtype: np.dtype[Any], changed: bool = False) -> int:
    """Return where an array's values are, after checking that compiled code may go there."""
    flags = array.flags
    fit = flags.c_contiguous and flags.aligned and (flags.writeable or not changed)
    if not fit or array.size != size or array.dtype != dtype:
        raise ValueError(
            f"expected a C-contiguous array of {size} values of {dtype}, got {array.dtype}, "
            f"shape {array.shape}, strides {array.strides}, writeable: {flags.writeable}"
        )
    return _start_of(array)


@compiled
def _start_of(array: Any) -> int:
    """Several times faster than asking NumPy, which makes an object for it."""
    address: int = array.ctypes.data
    return address


@intrinsic
def _pointer(_context: Any, _at: Any, _start: Any, dtype: Any) -> Any:
    """Turn an address and a number of values beyond it into a pointer."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = builder.inttoptr(args[0], context.get_value_type(signature.return_type))
        return builder.gep(first, [args[1]])

    return types.CPointer(dtype.dtype)(types.int64, types.int64, dtype), generate


@compiled
def _plane(address: Any, dtype: Any, start: Any, size: Any) -> Any:
    """Return ``size`` values of a map from ``start`` as an array."""
    return carray(_pointer(address, start, dtype), size)


@compiled
def _planes(rows: Any, column: Any, dtype: Any, start: Any, size: Any) -> Any:
    """Return one map of a group; a short group repeats its last, which never wins over itself."""
    last = len(rows) - 1
    return (
        _plane(rows[0, column], dtype, start, size),
        _plane(rows[min(1, last), column], dtype, start, size),
        _plane(rows[min(2, last), column], dtype, start, size),
        _plane(rows[last, column], dtype, start, size),
    )


@compiled
def _explicit_winners(state: Any, best: Any, mips: Any) -> Any:
    """Mark who wins and who searched; whether any mip is NaN."""
    a_mips, b_mips, c_mips, d_mips = mips
    any_nan, none = np.int32(0), np.int32(0)
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
        any_nan |= np.int32(a != a) | np.int32(b != b) | np.int32(c != c) | np.int32(d != d)
    return any_nan


@compiled
def _indexed_winners(state: Any, kept: Any, new: Any, n_poses: Any, second: Any) -> Any:
    """Mark who of two wins, the earlier mark stays elsewhere; whether NaN or an invalid index."""
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
        bad |= np.int32(a != a) | np.int32(b != b)
        bad |= (yes if a_index < lowest else none) | (yes if a_index >= n_poses else none)
        bad |= (yes if b_index < lowest else none) | (yes if b_index >= n_poses else none)
        bad |= (yes if a_index == lowest else none) & a_searched
        bad |= (yes if b_index == lowest else none) & b_searched
    return bad


@compiled
def _take(state: Any, kept: Any, new: Any) -> None:
    """Replace the kept values by those of the winners."""
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
    """Replace as :func:`_take` does; whether any value of a searched pixel is NaN."""
    a_values, b_values, c_values, d_values = new
    any_nan, none = np.int32(0), np.int32(0)
    for i in range(state.size):
        won, value = state[i], kept[i]
        a, b, c, d = a_values[i], b_values[i], c_values[i], d_values[i]
        value = a if won & _A else value
        value = b if won & _B else value
        value = c if won & _C else value
        kept[i] = d if won & _D else value
        nan = (_A if a != a else none) | (_B if b != b else none)
        nan |= (_C if c != c else none) | (_D if d != d else none)
        any_nan |= nan & (won >> _SEARCHED_SHIFT)
    return any_nan


@compiled
def _take_numbers(state: Any, kept: Any, numbers: Any) -> None:
    """Replace the kept values by the number of the winner."""
    a, b, c, d = numbers
    for i in range(state.size):
        won, value = state[i], kept[i]
        value = a if won & _A else value
        value = b if won & _B else value
        value = c if won & _C else value
        kept[i] = d if won & _D else value


@compiled
def _take_map(state: Any, kept: Any, bit: Any, new: Any) -> None:
    """Replace the kept values by those of the partial of this bit where it won."""
    for i in range(state.size):
        won, value, other = state[i], kept[i], new[i]
        kept[i] = other if won & bit else value


@compiled
def _add_four(total: Any, new: Any) -> Any:
    """Add in float64, one after another; whether any new value is NaN."""
    a_values, b_values, c_values, d_values = new
    any_nan = np.int32(0)
    for i in range(total.size):
        value, a, b, c, d = total[i], a_values[i], b_values[i], c_values[i], d_values[i]
        total[i] = value + np.float64(a) + np.float64(b) + np.float64(c) + np.float64(d)
        any_nan |= np.int32(a != a) | np.int32(b != b) | np.int32(c != c) | np.int32(d != d)
    return any_nan


@compiled
def _add(total: Any, new: Any) -> Any:
    """Add in float64; whether any new value is NaN."""
    any_nan = np.int32(0)
    for i in range(total.size):
        value, a = total[i], new[i]
        total[i] = value + np.float64(a)
        any_nan |= np.int32(a != a)
    return any_nan


@compiled
def _fold(n: Any, kept: Any, rows: Any, numbers: Any, n_poses: Any) -> tuple[int, int]:
    """Fold; the number of pixels with NaN and of those with an invalid index.

    ``kept`` and ``rows`` are addresses, ``n_poses`` is 0 for explicit poses.
    """
    state = np.empty(min(n, _BLOCK), np.int32)
    nan_pixels = invalid_indices = 0
    for start in range(0, n, _BLOCK):
        block = state[: min(n - start, _BLOCK)]
        for first in range(0, len(rows), _GROUP):
            group = rows[first : first + _GROUP]
            values = numbers[first : first + _GROUP]
            if n_poses:
                bad = _pick_indexed(block, start, kept, group, n_poses)
            else:
                bad = _pick_explicit(block, start, kept, group)
            _pick_best_partial(block, start, kept, group, values)
            bad |= _add_sums(block, start, kept, group, values)
            if kept[_COUNT] != _MISSING:
                _add_counts(block, start, kept, group, values)
            if bad:  # rare: only then is it worth finding out in how many pixels
                for number in range(len(group)):
                    nan_pixels += _count_nan(block, start, group[number], values[number], n_poses)
                    if n_poses:
                        invalid_indices += _count_invalid(block, start, group[number], n_poses)
    return nan_pixels, invalid_indices


@compiled
def _pick_explicit(state: Any, start: Any, kept: Any, rows: Any) -> Any:
    """Mark the winners, take their mips and poses; whether anything is NaN."""
    size = state.size
    best = _plane(kept[_MIP], np.float32, start, size)
    bad = _explicit_winners(state, best, _planes(rows, _MIP, np.float32, start, size))
    _pick_bits(state, start, kept, rows, _MIP)
    for column in range(_POSE, len(kept)):
        pose = _plane(kept[column], np.float32, start, size)
        bad |= _take_pose(state, pose, _planes(rows, column, np.float32, start, size))
    return bad


@compiled
def _pick_indexed(state: Any, start: Any, kept: Any, rows: Any, n_poses: Any) -> Any:
    """Mark the winners, take their mips and indices; whether NaN or an invalid index."""
    size = state.size
    best = _plane(kept[_MIP], np.float32, start, size)
    best_index = _plane(kept[_POSE], np.int32, start, size)
    bad = np.int32(0)
    # In pairs: four partials would be too many arrays in one loop to be vectorised.
    for second in range(2 if len(rows) > 2 else 1):
        a, b = 2 * second, min(2 * second + 1, len(rows) - 1)
        new = (
            _plane(rows[a, _MIP], np.float32, start, size),
            _plane(rows[b, _MIP], np.float32, start, size),
            _plane(rows[a, _POSE], np.int32, start, size),
            _plane(rows[b, _POSE], np.int32, start, size),
        )
        bad |= _indexed_winners(state, (best, best_index), new, np.int32(n_poses), second)
        _pick_bits(state, start, kept, rows, _MIP)
        _pick_bits(state, start, kept, rows, _POSE)
    return bad


@compiled
def _pick_bits(state: Any, start: Any, kept: Any, rows: Any, column: Any) -> None:
    """Take a map of four bytes a value, whatever they mean, from the winners."""
    new = _planes(rows, column, np.int32, start, state.size)
    _take(state, _plane(kept[column], np.int32, start, state.size), new)


@compiled
def _pick_best_partial(state: Any, start: Any, kept: Any, rows: Any, numbers: Any) -> None:
    """Take the number of the winner: the partial's own, or from its map."""
    best, last = _plane(kept[_BEST_PARTIAL], np.int32, start, state.size), len(rows) - 1
    a, b = np.int32(numbers[0, _NUMBER]), np.int32(numbers[min(1, last), _NUMBER])
    c, d = np.int32(numbers[min(2, last), _NUMBER]), np.int32(numbers[last, _NUMBER])
    _take_numbers(state, best, (a, b, c, d))
    for number in range(len(rows)):
        address = rows[number, _BEST_PARTIAL]
        if address != _MISSING:
            new = _plane(address, np.int32, start, state.size)
            _take_map(state, best, np.int32(1 << number), new)


@compiled
def _add_sums(state: Any, start: Any, kept: Any, rows: Any, numbers: Any) -> Any:
    """Add both sums; whether any new value is NaN."""
    any_nan, size = np.int32(0), state.size
    for number in range(2):
        column, width = _SUM + number, _SUM_BYTES + number
        total = _plane(kept[column], np.float64, start, size)
        if len(rows) == _GROUP and numbers[:, width].max() == 4:
            any_nan |= _add_four(total, _planes(rows, column, np.float32, start, size))
        else:
            for row in range(len(rows)):
                if numbers[row, width] == 4:
                    new = _plane(rows[row, column], np.float32, start, size)
                    any_nan |= _add(total, new)
                else:
                    wide = _plane(rows[row, column], np.float64, start, size)
                    any_nan |= _add(total, wide)
    return any_nan


@compiled
def _add_counts(state: Any, start: Any, kept: Any, rows: Any, numbers: Any) -> None:
    """Add to the map of counts: from the partial's map, or its one count everywhere."""
    total = _plane(kept[_COUNT], np.int64, start, state.size)
    for number in range(len(rows)):
        if rows[number, _COUNT] != _MISSING:
            counts = _plane(rows[number, _COUNT], np.int64, start, state.size)
            for i in range(total.size):
                total[i] += counts[i]
        else:
            one_count = numbers[number, _ONE_COUNT]
            for i in range(total.size):
                total[i] += one_count


@compiled
def _count_nan(bad: Any, start: Any, row: Any, numbers: Any, n_poses: Any) -> int:
    """Count the pixels where any map of a partial is NaN; a pose only where it searched."""
    size = bad.size
    mip = _plane(row[_MIP], np.float32, start, size)
    for i in range(size):
        bad[i] = np.isnan(mip[i])
    for number in range(2):
        address = row[_SUM + number]
        if numbers[_SUM_BYTES + number] == 4:
            new = _plane(address, np.float32, start, size)
            for i in range(size):
                bad[i] |= np.isnan(new[i])
        else:
            wide = _plane(address, np.float64, start, size)
            for i in range(size):
                bad[i] |= np.isnan(wide[i])
    if not n_poses:
        for column in range(_POSE, len(row)):
            pose = _plane(row[column], np.float32, start, size)
            for i in range(size):
                bad[i] |= np.isnan(pose[i]) & (mip[i] > -np.inf)
    return int(bad.sum())


@compiled
def _count_invalid(state: Any, start: Any, row: Any, n_poses: Any) -> int:
    """Count the pixels whose index is in no search space, or missing where it searched."""
    mip = _plane(row[_MIP], np.float32, start, state.size)
    index = _plane(row[_POSE], np.int32, start, state.size)
    invalid = 0
    for i in range(state.size):
        missing = (index[i] == NOT_SEARCHED) & (mip[i] > -np.inf)
        invalid += int((index[i] < NOT_SEARCHED) | (index[i] >= n_poses) | missing)
    return invalid


@compiled
def _statistics(n: Any, inputs: Any, one_count: float, targets: Any) -> None:
    """Z-score, mean, standard deviation, and the sums in float32, into the first five targets."""
    mip_address, sum_address, squared_sum_address, count_address = inputs
    counts_scratch = np.full(_SMALL_BLOCK, one_count)
    for start in range(0, n, _SMALL_BLOCK):
        size = min(n - start, _SMALL_BLOCK)
        counts = counts_scratch[:size]
        if count_address != _MISSING:
            count_map = _plane(count_address, np.int64, start, size)
            for i in range(size):
                counts[i] = count_map[i]
        total = _plane(sum_address, np.float64, start, size)
        squared_total = _plane(squared_sum_address, np.float64, start, size)
        _z_mean_std(
            _plane(targets[0], np.float32, start, size),
            _plane(targets[1], np.float32, start, size),
            _plane(targets[2], np.float32, start, size),
            _plane(mip_address, np.float32, start, size),
            (total, squared_total, counts),
        )
        _round(_plane(targets[3], np.float32, start, size), total)
        _round(_plane(targets[4], np.float32, start, size), squared_total)


@compiled
def _z_mean_std(z_map: Any, mean_map: Any, std_map: Any, mips: Any, sums: Any) -> None:
    total, squared_total, counts = sums
    for i in range(z_map.size):
        mip, count = np.float64(mips[i]), counts[i]
        mean = total[i] / count
        variance = squared_total[i] / count - mean * mean
        std = np.sqrt(0.0 if variance < 0 else variance)
        ratio = (mip - mean) / std
        z = 0.0 if std == 0 else ratio
        z_map[i] = np.nan if mip == -np.inf else z
        mean_map[i] = np.nan if count == 0 else mean
        std_map[i] = np.nan if count == 0 else std


@compiled
def _round(target: Any, values: Any) -> None:
    for i in range(target.size):
        target[i] = values[i]


@compiled
def _decode(n: Any, index_address: Any, tables: Any, sizes: Any, targets: Any) -> int:
    """Look up the pose maps; the number of indices beyond the tables, which become NaN."""
    n_orientations, n_defocus, n_pixel_sizes = sizes
    n_poses = n_orientations * n_defocus * n_pixel_sizes
    angles = _plane(tables[0], np.float32, 0, 3 * n_orientations)
    defocus = _plane(tables[1], np.float32, 0, n_defocus)
    pixel_sizes = _plane(tables[2], np.float32, 0, n_pixel_sizes)
    scratch = np.empty((4, _SMALL_BLOCK), np.int32)
    outside = 0
    for start in range(0, n, _SMALL_BLOCK):
        size = min(n - start, _SMALL_BLOCK)
        index = _plane(index_address, np.int32, start, size)
        pose, orientation = scratch[0, :size], scratch[1, :size]
        rest, number = scratch[2, :size], scratch[3, :size]
        any_unknown = _usable(index, np.int32(n_poses), pose)
        _divide(pose, np.int32(n_orientations), rest, orientation)
        phi = _plane(targets[0], np.float32, start, size)
        theta = _plane(targets[1], np.float32, start, size)
        psi = _plane(targets[2], np.float32, start, size)
        for i in range(size):
            row = np.int64(3) * np.int64(orientation[i])
            phi[i], theta[i], psi[i] = angles[row], angles[row + 1], angles[row + 2]
        _divide(rest, np.int32(n_defocus), number, orientation)
        _look_up(_plane(targets[3], np.float32, start, size), defocus, orientation)
        _look_up(_plane(targets[4], np.float32, start, size), pixel_sizes, number)
        if any_unknown:
            for i in range(size):
                outside += int(index[i] >= n_poses)
            for column in range(5):
                _blank(_plane(targets[column], np.float32, start, size), index, pose)
    return outside


@compiled
def _usable(index: Any, n_poses: Any, pose: Any) -> Any:
    """Replace what is no index by 0, which can be looked up; whether there was any."""
    any_replaced, first = np.int32(0), np.int32(0)
    for i in range(index.size):
        number = index[i]
        pose[i] = first if (number < 0) | (number >= n_poses) else number
        any_replaced |= np.int32((number < 0) | (number >= n_poses))
    return any_replaced


@compiled
def _divide(numbers: Any, divisor: Any, quotients: Any, rests: Any) -> None:
    """Divide integers from 0.

    In float64, as there is no vector instruction for integers: 53 bits are enough for the quotient
    of two of 31 bits never to be rounded up to the next integer.
    """
    wide_divisor = np.float64(divisor)
    for i in range(numbers.size):
        number = numbers[i]
        quotient = np.int32(np.float64(number) / wide_divisor)
        quotients[i] = quotient
        rests[i] = number - quotient * divisor


@compiled
def _look_up(target: Any, table: Any, numbers: Any) -> None:
    for i in range(target.size):
        target[i] = table[np.uint64(numbers[i])]


@compiled
def _blank(target: Any, index: Any, pose: Any) -> None:
    """Make NaN what :func:`_usable` replaced."""
    nan = np.float32(np.nan)
    for i in range(target.size):
        value, given, used = target[i], index[i], pose[i]
        target[i] = value if given == used else nan
