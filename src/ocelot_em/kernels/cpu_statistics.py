"""Statistics and decoded poses of merged pixels, compiled by numba."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ocelot_em.kernels.addresses import F4, I4, MISSING, checked, of_finalise, outside_space
from ocelot_em.kernels.compiling import address_of, compiled, on_stack, plane
from ocelot_em.kernels.reference import merged_maps
from ocelot_em.model.maps import Accumulator, AnyArray, MapSet
from ocelot_em.model.search_space import TABLES, SearchSpace

_SMALL_BLOCK = 1024
"""Pixels per block: all reused data fit the first-level cache."""


def finalise(
    acc: Accumulator,
    maps: MapSet,
    space: SearchSpace | None,
    out: Mapping[str, AnyArray] | None = None,
) -> dict[str, AnyArray]:
    """Compute the merged maps; see :func:`ocelot_em.kernels.reference.finalise`."""
    computed, finish = finish_of(acc, maps, space, out)
    compute(0, acc.mip.size, finish)
    decode_poses(acc.mip.size, space, finish)
    return merged_maps(acc, maps, computed)


def decode_poses(n: int, space: SearchSpace | None, finish: tuple[Any, ...]) -> None:
    """Decode the pose maps of ``n`` pixels, if poses are indexed and decoded.

    It is a call of its own, so that merges of explicit poses need not compile it.
    """
    _, _, targets, (index, tables, sizes) = finish
    if index == MISSING or space is None:
        return
    if outside := _decode(n, index, tables, sizes, targets[5:]):
        raise outside_space(outside, space)


def finish_of(
    acc: Accumulator,
    maps: MapSet,
    space: SearchSpace | None,
    out: Mapping[str, AnyArray] | None = None,
) -> tuple[dict[str, AnyArray], tuple[Any, ...]]:
    """Return the computed maps, of ``out`` or new ones, and the arguments of :func:`compute`."""
    n, shape = acc.mip.size, acc.mip.shape
    computed, inputs, addresses = of_finalise(
        acc, maps, out, lambda: np.empty(shape, F4), address_of
    )
    index = MISSING
    starts, sizes = (MISSING, MISSING, MISSING), (0, 0, 0)
    if space is not None and maps.computed_poses:
        a, b, c = (getattr(space, name) for name in TABLES)
        sizes = len(a), len(b), len(c)
        x, y, z = (address_of(checked(table, table.size, F4)) for table in (a, b, c))
        starts = x, y, z
        index = address_of(checked(acc.pose[0], n, I4))
    targets = np.array(addresses, np.int64)
    return computed, (tuple(inputs), float(acc.count), targets, (index, starts, sizes))


@compiled
def compute(start: int, n: int, finish: Any) -> None:
    """Compute all maps but poses for ``n`` pixels from ``start``.

    ``finish``: addresses of ``mip``, of both sums and of the counts; their one count; addresses of
    the computed maps; and address of the index, addresses and lengths of the tables of poses.
    """
    (mips, sums, squared_sums, counts), one_count, addresses, _ = finish
    counts = counts + 8 * start if counts != MISSING else counts
    inputs = mips + 4 * start, sums + 8 * start, squared_sums + 8 * start, counts
    _statistics(n, inputs, one_count, (addresses, start))


@compiled
def _statistics(n: Any, inputs: Any, one_count: float, targets: Any) -> None:
    """Write z-score, mean, standard deviation and float32 sums to the first five targets."""
    mip_address, sum_address, squared_sum_address, count_address = inputs
    addresses, first = targets
    counts_scratch = on_stack(_SMALL_BLOCK, np.float64)
    for i in range(_SMALL_BLOCK):
        counts_scratch[i] = one_count
    for start in range(0, n, _SMALL_BLOCK):
        size = min(n - start, _SMALL_BLOCK)
        counts = counts_scratch[:size]
        if count_address != MISSING:
            count_map = plane(count_address, np.int64, start, size)
            for i in range(size):
                counts[i] = count_map[i]
        total = plane(sum_address, np.float64, start, size)
        squared_total = plane(squared_sum_address, np.float64, start, size)
        _z_mean_std(
            plane(addresses[0], np.float32, first + start, size),
            plane(addresses[1], np.float32, first + start, size),
            plane(addresses[2], np.float32, first + start, size),
            plane(mip_address, np.float32, start, size),
            (total, squared_total, counts),
        )
        _round(plane(addresses[3], np.float32, first + start, size), total)
        _round(plane(addresses[4], np.float32, first + start, size), squared_total)


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
    """Decode the pose maps; return the number of indices beyond the tables (pose NaN)."""
    n_orientations, n_defocus, n_pixel_sizes = sizes
    n_poses = n_orientations * n_defocus * n_pixel_sizes
    angles = plane(tables[0], np.float32, 0, 3 * n_orientations)
    defocus = plane(tables[1], np.float32, 0, n_defocus)
    pixel_sizes = plane(tables[2], np.float32, 0, n_pixel_sizes)
    poses, orientations = on_stack(_SMALL_BLOCK, np.int32), on_stack(_SMALL_BLOCK, np.int32)
    rests, numbers = on_stack(_SMALL_BLOCK, np.int32), on_stack(_SMALL_BLOCK, np.int32)
    outside = 0
    for start in range(0, n, _SMALL_BLOCK):
        size = min(n - start, _SMALL_BLOCK)
        index = plane(index_address, np.int32, start, size)
        pose, orientation = poses[:size], orientations[:size]
        rest, number = rests[:size], numbers[:size]
        any_unknown = _usable(index, np.int32(n_poses), pose)
        _divide(pose, np.int32(n_orientations), rest, orientation)
        phi = plane(targets[0], np.float32, start, size)
        theta = plane(targets[1], np.float32, start, size)
        psi = plane(targets[2], np.float32, start, size)
        for i in range(size):
            row = np.int64(3) * np.int64(orientation[i])
            phi[i], theta[i], psi[i] = angles[row], angles[row + 1], angles[row + 2]
        _divide(rest, np.int32(n_defocus), number, orientation)
        _look_up(plane(targets[3], np.float32, start, size), defocus, orientation)
        _look_up(plane(targets[4], np.float32, start, size), pixel_sizes, number)
        if any_unknown:
            for i in range(size):
                outside += int(index[i] >= n_poses)
            for column in range(5):
                _blank(plane(targets[column], np.float32, start, size), index, pose)
    return outside


@compiled
def _usable(index: Any, n_poses: Any, pose: Any) -> Any:
    """Replace invalid indices by 0 for the lookup; return whether there were any."""
    any_replaced, first = np.int32(0), np.int32(0)
    for i in range(index.size):
        number = index[i]
        pose[i] = first if (number < 0) | (number >= n_poses) else number
        any_replaced |= np.int32((number < 0) | (number >= n_poses))
    return any_replaced


@compiled
def _divide(numbers: Any, divisor: Any, quotients: Any, rests: Any) -> None:
    """Divide non-negative integers.

    Uses float64, as there is no vector instruction for integer division: with 53 bits, the quotient
    of two 31-bit integers is never rounded up to the next integer.
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
    """Set values to NaN where :func:`_usable` replaced the index."""
    nan = np.float32(np.nan)
    for i in range(target.size):
        value, given, used = target[i], index[i], pose[i]
        target[i] = value if given == used else nan
