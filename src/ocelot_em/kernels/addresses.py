"""Maps as tables of addresses, which the compiled kernels and those of a GPU take.

One compilation thus serves any number of partials and any combination of optional maps.

Columns of a table: ``mip``, best partial, both sums, count, and the poses. Columns of the numbers
of a partial: its own number and count, which replace absent maps, and the bytes per value of its
sums.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ocelot_em.kernels.reference import check_counts
from ocelot_em.model.maps import (
    MEAN,
    SCALED_MIP,
    SQUARED_SUM,
    STD,
    SUM,
    Accumulator,
    AnyArray,
    MapSet,
    PartialMaps,
)
from ocelot_em.model.search_space import SearchSpace

MISSING = 0
"""Address that stands for an absent map."""

F4, F8, I4, I8 = (np.dtype(kind) for kind in ("f4", "f8", "i4", "i8"))

AddressOf = Callable[[AnyArray], int]
"""Returns the address of an array's first value."""


def checked(
    array: AnyArray, size: int, dtype: np.dtype[Any], *, is_output: bool = False
) -> AnyArray:
    """Return an array; it is a ValueError if a kernel cannot use its layout, size or dtype."""
    flags: Any = array.flags  # those of CuPy are always aligned and writable
    if (
        array.dtype != dtype
        or array.size != size
        or not flags.c_contiguous
        or not getattr(flags, "aligned", True)
        or (is_output and not getattr(flags, "writeable", True))
    ):
        raise ValueError(
            f"expected a C-contiguous array of {size} values of {dtype}, got {array.dtype}, "
            f"shape {array.shape}, strides {array.strides}, "
            f"writeable: {getattr(flags, 'writeable', True)}"
        )
    return array


def of_fold(
    acc: Accumulator,
    partials: Sequence[PartialMaps],
    space: SearchSpace | None,
    address_of: AddressOf,
) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """Return the table of an accumulator, and the tables and numbers of partials."""
    n, pose_type = acc.mip.size, F4 if space is None else I4
    count = acc.count_map

    def kept_at(array: AnyArray, dtype: np.dtype[Any]) -> int:
        return address_of(checked(array, n, dtype, is_output=True))

    kept = [
        kept_at(acc.mip, F4),
        kept_at(acc.best_partial, I4),
        kept_at(acc.correlation_sum, F8),
        kept_at(acc.correlation_squared_sum, F8),
        MISSING if count is None else kept_at(count, I8),
        *(kept_at(pose, pose_type) for pose in acc.pose),
    ]
    rows, numbers = [], []
    for partial in partials:
        check_counts(acc, partial)
        if len(partial.pose) != len(acc.pose):
            raise ValueError(f"expected {len(acc.pose)} pose maps, got {len(partial.pose)}")
        row, own = of_partial(partial, n, pose_type, address_of)
        rows.append(row)
        if count is None:
            own[1] = 0  # it is added outside, where it may have any size
        numbers.append(own)
    return kept, rows, numbers


def of_partial(
    partial: PartialMaps, n: int, pose_type: np.dtype[Any], address_of: AddressOf
) -> tuple[list[int], list[int]]:
    """Return the table and the numbers of a partial."""
    total, squared_total = partial.correlation_sum, partial.correlation_squared_sum
    number, number_map, count, count_map = 0, MISSING, 0, MISSING
    if isinstance(partial.best_partial, int):
        number = partial.best_partial
    else:
        number_map = address_of(checked(partial.best_partial, n, I4))
    if isinstance(partial.count, int):
        count = partial.count
    else:
        count_map = address_of(checked(partial.count, n, I8))
    row = [
        address_of(checked(partial.mip, n, F4)),
        number_map,
        address_of(checked(total, n, F8 if total.dtype == F8 else F4)),
        address_of(checked(squared_total, n, F8 if squared_total.dtype == F8 else F4)),
        count_map,
        *[address_of(checked(pose, n, pose_type)) for pose in partial.pose],
    ]
    return row, [number, count, total.itemsize, squared_total.itemsize]


def of_finalise(
    acc: Accumulator,
    maps: MapSet,
    out: Mapping[str, AnyArray] | None,
    empty: Callable[[], AnyArray],
    address_of: AddressOf,
) -> tuple[dict[str, AnyArray], list[int], list[int]]:
    """Return the computed maps, of ``out`` or new ones, and two tables.

    They are those of ``mip``, both sums and the count, and of the computed maps.
    """
    n, given = acc.mip.size, out or {}
    names = SCALED_MIP, MEAN, STD, SUM, SQUARED_SUM, *maps.computed_poses
    computed = {name: given[name] if name in given else empty() for name in names}
    targets = [address_of(checked(a, n, F4, is_output=True)) for a in computed.values()]
    inputs = [
        address_of(checked(acc.mip, n, F4)),
        address_of(checked(acc.correlation_sum, n, F8)),
        address_of(checked(acc.correlation_squared_sum, n, F8)),
        MISSING if acc.count_map is None else address_of(checked(acc.count_map, n, I8)),
    ]
    return computed, inputs, targets


def outside_space(n_pixels: int, space: SearchSpace) -> IndexError:
    """Return the error for pixels whose index no pose has."""
    return IndexError(
        f"{n_pixels} pixels have an index beyond the search space of {space.n_poses} poses"
    )
