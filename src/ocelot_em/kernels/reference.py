"""Reference merge in plain NumPy, with which every faster kernel must agree.

A merge is a monoid: :func:`identity` is a device that searched nothing, :func:`fold` adds one
partial, and :func:`finalise` computes mean, standard deviation and z-score from the sums. Arrays
are changed in place only where stated. The interface is :class:`ocelot_em.kernels.Kernels`.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from ocelot_em.errors import InvalidDataError
from ocelot_em.model.maps import (
    BEST_PARTIAL,
    COUNT,
    DERIVED,
    MIP,
    NOT_SEARCHED,
    SQUARED_SUM,
    SUM,
    Accumulator,
    AnyArray,
    Float32,
    Float64,
    MapSet,
    PartialMaps,
)
from ocelot_em.model.search_space import SearchSpace


def identity(shape: tuple[int, int], maps: MapSet) -> Accumulator:
    """Return an empty accumulator: ``mip`` -inf, pose NaN or -1, sums and counts 0."""
    acc = Accumulator.allocate(maps, lambda _, dtype: np.empty(shape, dtype))
    reset(acc)
    return acc


def reset(acc: Accumulator) -> None:
    """Reset an accumulator to the empty state, in place, so that it can be reused."""
    acc.mip.fill(-np.inf)
    for pose in acc.pose:
        pose.fill(NOT_SEARCHED if pose.dtype.kind == "i" else np.nan)
    acc.best_partial.fill(NOT_SEARCHED)
    acc.correlation_sum.fill(0)
    acc.correlation_squared_sum.fill(0)
    if acc.count_map is not None:
        acc.count_map.fill(0)
    acc.count = 0


def fold(acc: Accumulator, partial: PartialMaps, space: SearchSpace | None) -> bool:
    """Fold one partial into the accumulator, in place.

    The higher ``mip`` wins a pixel with its pose. In a tie, the earlier partial wins with explicit
    poses, the lower global index with indexed poses. -inf never wins. Sums and counts are added.

    Return whether the partial has an unusable value: NaN or an infinity (except -inf in ``mip``,
    and any pose where ``mip`` is -inf), an index outside the search space, or -1 where it searched.
    A NaN ``mip`` never wins, and such sums are added; the caller decides.

    ``space`` is None for explicit poses. A partial whose count is a map, when the accumulator's is
    not, is a TypeError; nothing is changed then.
    """
    check_counts(acc, partial)
    mip, searched = partial.mip, partial.mip > -np.inf
    won = mip > acc.mip
    bad = _unusable(partial)
    if space is not None:
        index = partial.pose[0]
        won |= (mip == acc.mip) & (index < acc.pose[0]) & searched
        bad |= (index < NOT_SEARCHED) | (index >= space.n_poses)
        bad |= (index == NOT_SEARCHED) & searched
    np.copyto(acc.mip, mip, where=won)
    for kept, new in zip(acc.pose, partial.pose, strict=True):
        np.copyto(kept, new, where=won)
    np.copyto(acc.best_partial, partial.best_partial, where=won)
    with np.errstate(all="ignore"):  # inf - inf is NaN
        acc.correlation_sum += partial.correlation_sum
        acc.correlation_squared_sum += partial.correlation_squared_sum
    if acc.count_map is not None:
        acc.count_map += partial.count
    elif isinstance(partial.count, int):
        acc.count += partial.count
    return bool(bad.any())


def fold_all(
    acc: Accumulator,
    partials: Sequence[PartialMaps],
    space: SearchSpace | None,
    *,
    fresh: bool = False,
) -> bool:
    """Fold partials into the accumulator, in place and in the given order; see :func:`fold`.

    ``fresh`` resets the accumulator first and ignores its contents. Return whether any partial has
    an unusable value.
    """
    for partial in partials:
        check_counts(acc, partial)
    if fresh:
        reset(acc)
    found = False
    for partial in partials:
        found |= fold(acc, partial, space)
    return found


def finalise(
    acc: Accumulator,
    maps: MapSet,
    space: SearchSpace | None,
    out: Mapping[str, AnyArray] | None = None,
) -> dict[str, AnyArray]:
    """Compute the merged maps from an accumulator.

    ``mean = S / N``, ``std = sqrt(max(Q / N - mean**2, 0))``, ``z = (mip - mean) / std``, all in
    float64, then rounded to float32. z is 0 where std is 0, and NaN where no device searched; mean
    and std are NaN where the count is 0. Sums beyond the float32 range become infinite.

    ``out`` has C-contiguous float32 arrays of the accumulator's shape for computed maps, by name:
    z-score, mean, standard deviation, sums, decoded poses. Missing ones are allocated. Return the
    maps of :attr:`MapSet.merged`; those that are not computed are the accumulator's own. An index
    outside the search space is an IndexError.
    """
    sums = acc.correlation_sum, acc.correlation_squared_sum
    count = np.asarray(acc.count if acc.count_map is None else acc.count_map)
    with np.errstate(all="ignore"):
        computed = derived_maps(acc.mip, *sums, count) | {
            SUM: acc.correlation_sum.astype(np.float32),
            SQUARED_SUM: acc.correlation_squared_sum.astype(np.float32),
        }
    if space is not None and maps.computed_poses:
        try:
            poses = space.decode(acc.pose[0])
        except InvalidDataError as error:
            raise IndexError(str(error)) from None
        computed |= dict(zip(maps.computed_poses, poses, strict=True))
    for name, array in (out or {}).items():
        if name in computed:
            array[...] = computed[name]
            computed[name] = array
    return merged_maps(acc, maps, computed)


def derived_maps(
    mip: Float32, total: Float64, squared_total: Float64, count: AnyArray
) -> dict[str, AnyArray]:
    """Compute z-score, mean and standard deviation as :func:`finalise` does.

    ``count`` has the shape of the others, or is one number.
    """
    with np.errstate(all="ignore"):
        n = count.astype(np.float64)
        mean = total / n
        variance = squared_total / n - mean * mean
        std = np.sqrt(np.where(variance < 0, 0.0, variance))
        z = np.where(std == 0, 0.0, (mip.astype(np.float64) - mean) / std)
        nothing = np.broadcast_to(n == 0, mean.shape)
        mean, std = np.where(nothing, np.nan, mean), np.where(nothing, np.nan, std)
        found = np.where(mip == -np.inf, np.nan, z), mean, std
        return {
            name: values.astype(np.float32) for name, values in zip(DERIVED, found, strict=True)
        }


def check_counts(acc: Accumulator, partial: PartialMaps) -> None:
    """Raise TypeError if a partial's count is a map and the accumulator's is not."""
    if acc.count_map is None and not isinstance(partial.count, int):
        raise TypeError("a map of counts needs an accumulator made with MapSet(counts=True)")


def merged_maps(
    acc: Accumulator, maps: MapSet, computed: Mapping[str, AnyArray]
) -> dict[str, AnyArray]:
    """Join computed maps with the accumulator's own, in the order of :attr:`MapSet.merged`."""
    merged = {MIP: acc.mip, BEST_PARTIAL: acc.best_partial, **computed}
    merged |= zip(maps.pose, acc.pose, strict=True)
    if acc.count_map is not None:
        merged[COUNT] = acc.count_map
    return {name: merged[name] for name in maps.merged}


def _unusable(partial: PartialMaps) -> AnyArray:
    """Mark pixels with NaN or infinities; see :func:`fold`."""
    bad = ~(partial.mip < np.inf) | ~np.isfinite(partial.correlation_sum)
    bad |= ~np.isfinite(partial.correlation_squared_sum)
    for pose in partial.pose:
        bad |= ~np.isfinite(pose) & (partial.mip > -np.inf)
    return cast("AnyArray", bad)


def mask_nan(partial: PartialMaps) -> PartialMaps:
    """Make a partial idle, count included, where any of its maps is NaN or infinite.

    A pose where ``mip`` is -inf is ignored. Return a copy whose count is a map.
    """
    bad = _unusable(partial)
    count = np.broadcast_to(np.asarray(partial.count, np.int64), bad.shape)
    return PartialMaps(
        mip=np.where(bad, np.float32(-np.inf), partial.mip),
        pose=tuple(
            np.where(bad, np.array(NOT_SEARCHED if p.dtype.kind == "i" else np.nan, p.dtype), p)
            for p in partial.pose
        ),
        correlation_sum=np.where(bad, 0, partial.correlation_sum),
        correlation_squared_sum=np.where(bad, 0, partial.correlation_squared_sum),
        count=np.where(bad, np.int64(0), count),
        best_partial=partial.best_partial,
    )
