"""The merge on a CUDA device: one fused pass over all maps of several partials.

Same interface as :mod:`ocelot_em.kernels.reference`, with bit-identical results, for arrays on a
:class:`ocelot_em.kernels.device.Device`. The arithmetic is in ``merge.cu``; this module passes
addresses to it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ocelot_em.kernels.device import Device
from ocelot_em.kernels.reference import check_counts, merged_maps, reset
from ocelot_em.model.maps import (
    MEAN,
    NOT_SEARCHED,
    POSES,
    SCALED_MIP,
    SQUARED_SUM,
    STD,
    SUM,
    Accumulator,
    AnyArray,
    MapSet,
    PartialMaps,
)
from ocelot_em.model.search_space import TABLES, SearchSpace

PIXELS_PER_THREAD = 4
"""Pixels per thread, equal to ``VECTOR`` in ``merge.cu``."""

MAX_SOURCES = 16
"""Maximum number of partials per pass, as in ``merge.cu``."""

_ALIGNMENT = 16
"""Alignment in bytes that all maps need for wide loads."""

_i8 = np.dtype("i8")
_KEPT = np.dtype(
    [(name, _i8) for name in ("mip", "best_partial", "sum", "squared_sum", "count")]
    + [("pose", _i8, (len(POSES),))]
)
_SOURCE = np.dtype(
    [
        *(_KEPT.descr[:-1]),
        ("pose", _i8, (len(POSES),)),
        *((name, _i8) for name in ("number", "one_count", "sum_nbytes", "squared_sum_nbytes")),
    ]
)
_SOURCES = np.dtype([("source", _SOURCE, (MAX_SOURCES,))])
_FINISHED = np.dtype(
    [
        *((name, _i8) for name in ("mip", "sum", "squared_sum", "count", "index")),
        *((name, _i8) for name in (SCALED_MIP, MEAN, STD, SUM, SQUARED_SUM)),
        ("pose", _i8, (len(POSES),)),
        *((name, _i8) for name in TABLES),
        *((f"n_{name}", _i8) for name in TABLES),
    ]
)
"""Structures of ``merge.cu``, field by field."""

_F4, _F8, _I4, _I8 = (np.dtype(kind) for kind in ("f4", "f8", "i4", "i8"))


class CudaKernels:
    """Kernels of one device, which holds all arrays; see :class:`ocelot_em.kernels.Kernels`."""

    reset = staticmethod(reset)

    def __init__(self, device: Device) -> None:
        self._device = device
        self._tables: tuple[SearchSpace, tuple[AnyArray, ...]] | None = None

    def identity(self, shape: tuple[int, int], maps: MapSet) -> Accumulator:
        n = shape[0] * shape[1]
        acc = Accumulator.allocate(maps, lambda _, t: self._device.empty(n, t).reshape(shape))
        reset(acc)
        return acc

    def fold(self, acc: Accumulator, partial: PartialMaps, space: SearchSpace | None) -> bool:
        return self.fold_all(acc, (partial,), space)

    def fold_all(
        self,
        acc: Accumulator,
        partials: Sequence[PartialMaps],
        space: SearchSpace | None,
        *,
        fresh: bool = False,
    ) -> bool:
        kept, n = np.zeros(1, _KEPT), acc.mip.size
        pose_type = _F4 if space is None else _I4
        addresses = [
            *self._fill(kept[0], "mip", acc.mip, n, _F4),
            *self._fill(kept[0], "best_partial", acc.best_partial, n, _I4),
            *self._fill(kept[0], "sum", acc.correlation_sum, n, _F8),
            *self._fill(kept[0], "squared_sum", acc.correlation_squared_sum, n, _F8),
            *self._fill_poses(kept[0], acc.pose, n, pose_type),
        ]
        if acc.count_map is not None:
            addresses += self._fill(kept[0], "count", acc.count_map, n, _I8)
        tables = []
        for partial in partials:
            check_counts(acc, partial)
            if len(partial.pose) != len(acc.pose):
                raise ValueError(f"expected {len(acc.pose)} pose maps, got {len(partial.pose)}")
            table = np.zeros((), _SOURCE)
            addresses += self._fill_source(table, partial, n, pose_type)
            tables.append(table)
        if not partials:
            if fresh:
                reset(acc)
            return False
        kernel = "fold_indexed" if space is not None else _FOLDS[len(acc.pose)]
        findings = self._zeros(1)
        for start in range(0, len(tables), MAX_SOURCES):
            group = tables[start : start + MAX_SOURCES]
            sources = np.zeros(1, _SOURCES)
            for number, table in enumerate(group):
                sources[0]["source"][number] = table
            arguments = (
                kept,
                sources,
                np.int32(len(group)),
                np.int32(0 if space is None else space.n_poses),
                np.int32(fresh and start == 0),
                np.int64(n),
                np.int32(not any(address % _ALIGNMENT for address in addresses)),
                findings,
            )
            self._device.launch(kernel, -(-n // PIXELS_PER_THREAD), arguments)
        found = bool(self._read(findings)[0])
        if acc.count_map is None:
            acc.count = (0 if fresh else acc.count) + sum(
                p.count for p in partials if isinstance(p.count, int)
            )
        return found

    def finalise(
        self,
        acc: Accumulator,
        maps: MapSet,
        space: SearchSpace | None,
        out: Mapping[str, AnyArray] | None = None,
    ) -> dict[str, AnyArray]:
        """Compute the merged maps from an accumulator; ``out`` must be on the device, too."""
        n, shape, given = acc.mip.size, acc.mip.shape, out or {}
        names = (SCALED_MIP, MEAN, STD, SUM, SQUARED_SUM, *maps.computed_poses)
        decoding = space is not None and bool(maps.computed_poses)
        computed = {
            name: given[name] if name in given else self._device.empty(n, _F4).reshape(shape)
            for name in names
        }
        table = np.zeros(1, _FINISHED)
        self._fill(table[0], "mip", acc.mip, n, _F4)
        self._fill(table[0], "sum", acc.correlation_sum, n, _F8)
        self._fill(table[0], "squared_sum", acc.correlation_squared_sum, n, _F8)
        if acc.count_map is not None:
            self._fill(table[0], "count", acc.count_map, n, _I8)
        for name in names[:5]:
            self._fill(table[0], name, computed[name], n, _F4)
        if space is not None and decoding:
            self._fill(table[0], "index", acc.pose[0], n, _I4)
            self._fill_poses(table[0], [computed[name] for name in names[5:]], n, _F4)
            tables = self._on_device(space)
            for name, values in zip(TABLES, tables, strict=True):
                table[0][name] = self._device.address(values)
                table[0][f"n_{name}"] = len(getattr(space, name))
        findings = self._zeros(1)
        count = np.float64(acc.count)
        self._device.launch("finalise", n, (table, count, np.int64(n), findings))
        if space is not None and decoding and (outside := self._read(findings)[0]):
            raise IndexError(
                f"{outside} pixels have an index beyond the search space of {space.n_poses} poses"
            )
        return merged_maps(acc, maps, computed)

    def mask_nan(self, partial: PartialMaps) -> PartialMaps:
        """Copy a partial, made idle (count included) where any of its maps is NaN or infinite."""
        n, shape = partial.mip.size, partial.mip.shape
        indexed = partial.pose[0].dtype.kind == "i"

        def like(values: AnyArray) -> AnyArray:
            return self._device.empty(n, values.dtype).reshape(shape)

        masked = PartialMaps(
            mip=like(partial.mip),
            pose=tuple(map(like, partial.pose)),
            correlation_sum=like(partial.correlation_sum),
            correlation_squared_sum=like(partial.correlation_squared_sum),
            count=self._device.empty(n, _I8).reshape(shape),
            best_partial=partial.best_partial,
        )
        before, after = np.zeros(1, _SOURCE), np.zeros(1, _SOURCE)
        for table, maps in ((before, partial), (after, masked)):
            self._fill_source(table[0], maps, n, _I4 if indexed else _F4)
        arguments = before, after, np.int32(len(partial.pose)), np.int32(indexed), np.int64(n)
        self._device.launch("mask_nan", n, arguments)
        return masked

    def _fill_source(
        self, table: Any, partial: PartialMaps, n: int, pose_type: "np.dtype[Any]"
    ) -> list[int]:
        """Fill a table from a partial; return the addresses of its maps."""
        addresses = self._fill(table, "mip", partial.mip, n, _F4)
        addresses += self._fill_poses(table, partial.pose, n, pose_type)
        sums = partial.correlation_sum, partial.correlation_squared_sum
        for name, values in zip(("sum", "squared_sum"), sums, strict=True):
            addresses += self._fill(table, name, values, n, _F8 if values.dtype == _F8 else _F4)
            table[f"{name}_nbytes"] = values.dtype.itemsize
        if isinstance(partial.best_partial, int):
            table["number"] = partial.best_partial
        else:
            addresses += self._fill(table, "best_partial", partial.best_partial, n, _I4)
        if isinstance(partial.count, int):
            table["one_count"] = partial.count
        else:
            addresses += self._fill(table, "count", partial.count, n, _I8)
        return addresses

    def _fill_poses(
        self, table: Any, poses: Sequence[AnyArray], n: int, dtype: "np.dtype[Any]"
    ) -> list[int]:
        for number, pose in enumerate(poses):
            table["pose"][number] = self._address(pose, n, dtype)
        return [int(address) for address in table["pose"][: len(poses)]]

    def _fill(
        self, table: Any, name: str, values: AnyArray, n: int, dtype: "np.dtype[Any]"
    ) -> list[int]:
        table[name] = self._address(values, n, dtype)
        return [int(table[name])]

    def _address(self, values: AnyArray, n: int, dtype: "np.dtype[Any]") -> int:
        """Return the address of an array after checking its layout, size and dtype."""
        if not values.flags.c_contiguous or values.size != n or values.dtype != dtype:
            raise ValueError(
                f"expected a C-contiguous array of {n} values of {dtype}, got {values.dtype}, "
                f"shape {values.shape}, strides {values.strides}"
            )
        return self._device.address(values)

    def _on_device(self, space: SearchSpace) -> tuple[AnyArray, ...]:
        """Return the tables of a search space on the device, copied only once."""
        if self._tables is None or self._tables[0] is not space:
            copies = []
            for name in TABLES:
                flat = np.ascontiguousarray(getattr(space, name)).reshape(-1)
                copy = self._device.empty(flat.size, flat.dtype)
                self._device.copy_in(flat, copy).synchronize()
                copies.append(copy)
            self._tables = space, tuple(copies)
        return self._tables[1]

    def _zeros(self, n: int) -> AnyArray:
        zeros = self._device.empty(n, _I8)
        zeros.fill(0)
        return zeros

    def _read(self, values: AnyArray) -> list[int]:
        """Copy numbers to the host and wait."""
        host = np.empty(values.size, values.dtype)
        self._device.copy_out(values, host).synchronize()
        return [int(number) for number in host]


_FOLDS = {4: "fold_four_poses", 5: "fold_five_poses"}

assert NOT_SEARCHED == -1, "merge.cu has it as a number"
