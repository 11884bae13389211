"""The merge for the CPU, compiled by numba: one pass over the maps in blocks that stay in cache.

Same interface and same bits as :mod:`ocelot_em.kernels.reference`. The compiled functions release
the GIL, so threads can merge different regions at once. They are compiled at first use, and the
machine code is kept on disk.

Per block, first the winners as a mask, then one simple loop per map, with operands loaded into
locals before one of them is chosen: anything else does not vectorise and is four to five times
slower. ``fastmath`` stays off, because it would fuse and reorder the float64 arithmetic.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

from ocelot_em.kernels.reference import identity, mask_nan, merged_maps, reset
from ocelot_em.maps import (
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
from ocelot_em.search_space import SearchSpace

__all__ = ["finalise", "fold", "identity", "mask_nan", "reset"]

_BLOCK = 2048
"""Pixels per block: its mask and a few planes of it fit the first-level cache."""

_WON, _SEARCHED = np.int32(1), np.int32(2)
"""Bits of a pixel in a block's mask."""

_NO_COUNTS, _NO_NUMBERS = np.empty(0, np.int64), np.empty(0, np.int32)
"""Stand for a map that is not there, so that one compiled function serves both cases."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _compiled(function: _Function) -> _Function:
    """Compile for use without the GIL; division by zero gives what NumPy gives."""
    return cast("_Function", njit(nogil=True, cache=True, error_model="numpy")(function))


def fold(acc: Accumulator, partial: PartialMaps, space: SearchSpace | None) -> FoldReport:
    """Take one more partial into the accumulator, in place.

    The higher ``mip`` wins a pixel with its pose. Equal: explicit poses keep the earlier partial,
    indexed poses the lower global index. -inf never wins. Sums and counts add.

    NaN: a NaN ``mip`` never wins and NaN sums stay NaN; both are counted in the report, and the
    caller decides.

    Parameters
    ----------
    acc
        Changed in place.
    partial
        Maps of the accumulator's shape.
    space
        The search space of an indexed search, None for explicit poses.

    Raises
    ------
    TypeError
        If the partial's count is a map and the accumulator's is not; nothing is changed then.
    ValueError
        If an array is not C-contiguous or not of the accumulator's size; nothing is changed then.
    """
    n = acc.mip.size
    one_count, counts, count_totals = 0, _NO_COUNTS, _NO_COUNTS
    if acc.count_map is not None:
        count_totals = _flat(acc.count_map, n)
    if not isinstance(partial.count, int):
        if acc.count_map is None:
            raise TypeError("a map of counts needs an accumulator made with MapSet(counts=True)")
        counts = partial.count
    elif acc.count_map is not None:
        one_count = partial.count
    number, numbers = NOT_SEARCHED, _NO_NUMBERS
    if isinstance(partial.best_partial, int):
        number = partial.best_partial
    else:
        numbers = partial.best_partial
    mips = _flat(acc.mip, n), _read_only(partial.mip, n)
    bests = _flat(acc.best_partial, n), np.int32(number), _read_only(numbers, numbers.size and n)
    sums = (
        *(_flat(acc.correlation_sum, n), _flat(acc.correlation_squared_sum, n)),
        *(_read_only(partial.correlation_sum, n), _read_only(partial.correlation_squared_sum, n)),
    )
    counts_of = count_totals, one_count, _read_only(counts, counts.size and n)
    kept = tuple(_flat(pose, n) for pose in acc.pose)
    new = tuple(_read_only(pose, n) for pose in partial.pose)
    if len(kept) != len(new):
        raise ValueError(f"expected {len(kept)} pose maps, got {len(new)}")
    if space is None:
        report = FoldReport(_fold_explicit(mips, kept, new, bests, sums, counts_of), 0)
    else:
        n_poses = np.int32(space.n_poses)
        report = FoldReport(*_fold_indexed(mips, kept[0], new[0], n_poses, bests, sums, counts_of))
    if acc.count_map is None:
        assert isinstance(partial.count, int)
        acc.count += partial.count
    return report


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
        If an array is not C-contiguous or not of the accumulator's size.
    """
    n, shape = acc.mip.size, acc.mip.shape
    names = [SCALED_MIP, MEAN, STD, SUM, SQUARED_SUM]
    if space is not None:
        names += maps.explicit_poses
    given = out or {}
    computed = {
        name: given[name] if name in given else np.empty(shape, np.float32) for name in names
    }
    flat = {name: _flat(array, n) for name, array in computed.items()}
    _statistics(
        _read_only(acc.mip, n),
        (_read_only(acc.correlation_sum, n), _read_only(acc.correlation_squared_sum, n)),
        float(acc.count),
        _read_only(_NO_COUNTS if acc.count_map is None else acc.count_map, None),
        (flat[SCALED_MIP], flat[MEAN], flat[STD]),
        (flat[SUM], flat[SQUARED_SUM]),
    )
    if space is not None:
        outside = _decode(
            _read_only(acc.pose[0], n),
            _read_only(space.euler_angles, None),
            _read_only(space.defocus_values, None),
            _read_only(space.pixel_values, None),
            tuple(flat[name] for name in maps.explicit_poses),
        )
        if outside:
            raise IndexError(
                f"{outside} pixels have an index beyond the search space of {space.n_poses} poses"
            )
    return merged_maps(acc, maps, computed)


def _flat(array: AnyArray, size: int | None) -> AnyArray:
    """Return the array's own memory in one dimension; ``reshape`` alone may return a copy."""
    if not array.flags.c_contiguous or (size is not None and array.size != size):
        raise ValueError(
            f"expected a C-contiguous array of {size} values, "
            f"got shape {array.shape} with strides {array.strides}"
        )
    return array.reshape(-1)


def _read_only(array: AnyArray, size: int | None) -> AnyArray:
    """Return a flat read-only view: inputs then have one type, and are compiled for once."""
    flat = _flat(array, size)
    flat.flags.writeable = False
    return flat


@_compiled
def _explicit_winners(new: Any, best: Any, state: Any) -> Any:
    """Mark where the new mip wins and where something was searched; whether any is NaN."""
    any_nan = np.int32(0)
    for i in range(new.size):
        mip, old = new[i], best[i]
        state[i] = (_WON if mip > old else np.int32(0)) | (
            _SEARCHED if mip > -np.inf else np.int32(0)
        )
        any_nan |= np.int32(mip != mip)
    return any_nan


@_compiled
def _indexed_winners(
    new: Any, best: Any, new_index: Any, best_index: Any, n_poses: Any, state: Any
) -> Any:
    """Mark as :func:`_explicit_winners` does; whether any is NaN, how many indices are invalid."""
    any_nan, invalid = np.int32(0), np.int32(0)
    for i in range(new.size):
        mip, old, index, old_index = new[i], best[i], new_index[i], best_index[i]
        searched = mip > -np.inf
        won = (mip > old) | ((mip == old) & (index < old_index) & searched)
        state[i] = (_WON if won else np.int32(0)) | (_SEARCHED if searched else np.int32(0))
        any_nan |= np.int32(mip != mip)
        invalid += np.int32(
            (index < NOT_SEARCHED) | (index >= n_poses) | ((index == NOT_SEARCHED) & searched)
        )
    return any_nan, invalid


@_compiled
def _take(state: Any, new: Any, kept: Any) -> None:
    """Replace the kept values where the new ones won."""
    for i in range(kept.size):
        old, value = kept[i], new[i]
        kept[i] = value if state[i] & _WON else old


@_compiled
def _take_number(state: Any, number: Any, kept: Any) -> None:
    """Replace the kept values by one number where the new partial won."""
    for i in range(kept.size):
        old = kept[i]
        kept[i] = number if state[i] & _WON else old


@_compiled
def _take_pose(state: Any, new: Any, kept: Any) -> Any:
    """Replace as :func:`_take` does; whether any value of a searched pixel is NaN."""
    any_nan = np.int32(0)
    for i in range(kept.size):
        old, value, bits = kept[i], new[i], state[i]
        kept[i] = value if bits & _WON else old
        any_nan |= np.int32(value != value) & (bits >> 1)
    return any_nan


@_compiled
def _add(new: Any, total: Any) -> Any:
    """Add in float64; whether any new value is NaN."""
    any_nan = np.int32(0)
    for i in range(total.size):
        value, old = new[i], total[i]
        total[i] = old + np.float64(value)
        any_nan |= np.int32(value != value)
    return any_nan


@_compiled
def _fold_common(state: Any, part: Any, bests: Any, sums: Any, counts: Any) -> Any:
    """Best partial, sums and counts of one block; whether any sum is NaN."""
    best, number, numbers = bests
    if numbers.size:
        _take(state, numbers[part], best[part])
    else:
        _take_number(state, number, best[part])
    total, squared_total, new, squared_new = sums
    any_nan = _add(new[part], total[part])
    any_nan |= _add(squared_new[part], squared_total[part])
    count_totals, one_count, count_map = counts
    if count_totals.size:
        block = count_totals[part]
        if count_map.size:
            new_counts = count_map[part]
            for i in range(block.size):
                block[i] += new_counts[i]
        else:
            for i in range(block.size):
                block[i] += one_count
    return any_nan


@_compiled
def _fold_explicit(mips: Any, kept: Any, new: Any, bests: Any, sums: Any, counts: Any) -> int:
    """Fold explicit poses; the number of pixels with NaN."""
    best, mip = mips
    state = np.empty(_BLOCK, np.int32)
    nan_pixels = 0
    for start in range(0, mip.size, _BLOCK):
        part = slice(start, min(start + _BLOCK, mip.size))
        mask = state[: part.stop - start]
        any_nan = _explicit_winners(mip[part], best[part], mask)
        _take(mask, mip[part], best[part])
        for number in range(len(kept)):
            any_nan |= _take_pose(mask, new[number][part], kept[number][part])
        any_nan |= _fold_common(mask, part, bests, sums, counts)
        if any_nan:  # rare: only then is it worth finding out in how many pixels
            for i in range(start, part.stop):
                bad = np.isnan(mip[i]) | np.isnan(sums[2][i]) | np.isnan(sums[3][i])
                for number in range(len(new)):
                    bad |= np.isnan(new[number][i]) & (mip[i] > -np.inf)
                nan_pixels += int(bad)
    return nan_pixels


@_compiled
def _fold_indexed(
    mips: Any, kept: Any, new: Any, n_poses: Any, bests: Any, sums: Any, counts: Any
) -> tuple[int, int]:
    """Fold indexed poses; the number of pixels with NaN and of those with an invalid index."""
    best, mip = mips
    state = np.empty(_BLOCK, np.int32)
    nan_pixels = invalid_indices = 0
    for start in range(0, mip.size, _BLOCK):
        part = slice(start, min(start + _BLOCK, mip.size))
        mask = state[: part.stop - start]
        any_nan, invalid = _indexed_winners(
            mip[part], best[part], new[part], kept[part], n_poses, mask
        )
        invalid_indices += invalid
        _take(mask, mip[part], best[part])
        _take(mask, new[part], kept[part])
        any_nan |= _fold_common(mask, part, bests, sums, counts)
        if any_nan:
            for i in range(start, part.stop):
                bad = np.isnan(mip[i]) | np.isnan(sums[2][i]) | np.isnan(sums[3][i])
                nan_pixels += int(bad)
    return nan_pixels, invalid_indices


@_compiled
def _statistics(
    mip: Any, sums: Any, one_count: float, count_map: Any, statistics: Any, rounded: Any
) -> None:
    """Z-score, mean, standard deviation, and the sums in float32."""
    z_map, mean_map, std_map = statistics
    counts = np.full(_BLOCK, one_count)
    for start in range(0, mip.size, _BLOCK):
        part = slice(start, min(start + _BLOCK, mip.size))
        for i in range(count_map[part].size):
            counts[i] = count_map[start + i]
        _statistics_of_block(
            (mip[part], sums[0][part], sums[1][part], counts),
            (z_map[part], mean_map[part], std_map[part]),
            (rounded[0][part], rounded[1][part]),
        )


@_compiled
def _statistics_of_block(inputs: Any, statistics: Any, rounded: Any) -> None:
    """Compute the maps of :func:`_statistics` in one block."""
    mip, total, squared_total, counts = inputs
    z_map, mean_map, std_map = statistics
    for i in range(mip.size):
        value, count = np.float64(mip[i]), counts[i]
        mean = total[i] / count
        variance = squared_total[i] / count - mean * mean
        std = np.sqrt(0.0 if variance < 0 else variance)
        ratio = (value - mean) / std
        z = 0.0 if std == 0 else ratio
        z_map[i] = np.nan if value == -np.inf else z
        mean_map[i] = np.nan if count == 0 else mean
        std_map[i] = np.nan if count == 0 else std
    for i in range(mip.size):
        rounded[0][i] = total[i]
        rounded[1][i] = squared_total[i]


@_compiled
def _decode(index: Any, angles: Any, defocus: Any, pixel: Any, poses: Any) -> int:
    """Look up the pose maps; the number of indices beyond the tables, which become NaN."""
    # Unsigned 32-bit division is several times faster than Python's rounding down in 64 bits.
    n_orientations, n_defocus = np.uint32(angles.size // 3), np.uint32(defocus.size)
    n_poses = angles.size // 3 * defocus.size * pixel.size
    phi, theta, psi, defocus_map, pixel_map = poses
    outside = 0
    for i in range(index.size):
        if 0 <= index[i] < n_poses:
            number = np.uint32(index[i])
            rest = np.uint32(number // n_orientations)
            row = np.int64(3) * np.int64(np.uint32(number - rest * n_orientations))
            pixel_number = np.uint32(rest // n_defocus)
            phi[i] = angles[row]
            theta[i] = angles[row + 1]
            psi[i] = angles[row + 2]
            defocus_map[i] = defocus[np.int64(np.uint32(rest - pixel_number * n_defocus))]
            pixel_map[i] = pixel[np.int64(pixel_number)]
        else:
            outside += int(index[i] >= n_poses)
            phi[i] = theta[i] = psi[i] = defocus_map[i] = pixel_map[i] = np.nan
    return outside
