"""The merge on a CUDA device: one fused pass over all maps of several partials.

Same interface as :mod:`ocelot_em.kernels.reference`, with bit-identical results, for arrays on a
:class:`ocelot_em.kernels.device.Device`. The arithmetic is in ``merge.cu``; this module passes
addresses to it.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ocelot_em.kernels.addresses import (
    F4,
    I4,
    I8,
    MISSING,
    checked,
    of_finalise,
    of_fold,
    of_partial,
    outside_space,
)
from ocelot_em.kernels.device import Device
from ocelot_em.kernels.reference import merged_maps, reset
from ocelot_em.model.maps import NOT_SEARCHED, POSES, Accumulator, AnyArray, MapSet, PartialMaps
from ocelot_em.model.search_space import TABLES, SearchSpace

PIXELS_PER_THREAD = 4
"""Pixels per thread, equal to ``VECTOR`` in ``merge.cu``."""

MAX_SOURCES = 16
"""Maximum number of partials per pass, as in ``merge.cu``."""

_ALIGNMENT = 16
"""Alignment in bytes that all maps need for wide loads."""

assert NOT_SEARCHED == -1, "merge.cu has it as a number"


def structure(*values: int) -> AnyArray:
    """Return a structure of ``merge.cu``, all of whose fields are 64-bit integers."""
    return np.array(values, np.int64).view([("fields", I8, (len(values),))])


def _table(addresses: Sequence[int]) -> list[int]:
    """Return a table of addresses with columns for all poses."""
    return [*addresses, *[MISSING] * (5 + len(POSES) - len(addresses))]


class CudaKernels:
    """Kernels of one device, which holds all arrays; see :class:`ocelot_em.kernels.Kernels`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._tables: tuple[SearchSpace, tuple[AnyArray, ...]] | None = None

    def identity(self, shape: tuple[int, int], maps: MapSet) -> Accumulator:
        n = shape[0] * shape[1]
        acc = Accumulator.allocate(maps, lambda _, t: self._device.empty(n, t).reshape(shape))
        reset(acc)
        return acc

    def fold_all(
        self,
        acc: Accumulator,
        partials: Sequence[PartialMaps],
        space: SearchSpace | None,
        *,
        fresh: bool = False,
    ) -> bool:
        n, address_of = acc.mip.size, self._device.address
        kept, rows, numbers = of_fold(acc, partials, space, address_of)
        if not partials:
            if fresh:
                reset(acc)
            return False
        kernel = "fold_indexed" if space is not None else f"fold_{len(acc.pose)}_poses"
        is_aligned = not any(address % _ALIGNMENT for row in (kept, *rows) for address in row)
        sources = [[*_table(row), *own] for row, own in zip(rows, numbers, strict=True)]
        empty = [0] * len(sources[0])
        found = self._zero()
        for start in range(0, len(sources), MAX_SOURCES):
            group = sources[start : start + MAX_SOURCES]
            filled = [*group, *[empty] * (MAX_SOURCES - len(group))]
            arguments = (
                structure(*_table(kept)),
                structure(*(value for source in filled for value in source)),
                np.int32(len(group)),
                np.int32(0 if space is None else space.n_poses),
                np.int32(fresh and start == 0),
                np.int64(n),
                np.int32(is_aligned),
                found,
            )
            self._device.launch(kernel, -(-n // PIXELS_PER_THREAD), arguments)
        if acc.count_map is None:
            acc.count = (0 if fresh else acc.count) + sum(
                p.count for p in partials if isinstance(p.count, int)
            )
        return bool(self._read(found))

    def finalise(
        self,
        acc: Accumulator,
        maps: MapSet,
        space: SearchSpace | None,
        out: Mapping[str, AnyArray] | None = None,
    ) -> dict[str, AnyArray]:
        """Compute the merged maps from an accumulator; ``out`` must be on the device, too."""
        n, shape, address_of = acc.mip.size, acc.mip.shape, self._device.address
        computed, inputs, targets = of_finalise(
            acc, maps, out, lambda: self._device.empty(n, F4).reshape(shape), address_of
        )
        decoded = space if maps.computed_poses else None
        index, tables, sizes = MISSING, [MISSING] * len(TABLES), [0] * len(TABLES)
        if decoded is not None:
            index = address_of(checked(acc.pose[0], n, I4))
            # Kept until the kernel has ended: another thread may use another search space.
            kept = self._on_device(decoded)
            tables = [address_of(table) for table in kept]
            sizes = [len(getattr(decoded, name)) for name in TABLES]
        addresses = structure(*inputs, index, *_table(targets), *tables, *sizes)
        outside = self._zero()
        arguments = addresses, np.float64(acc.count), np.int64(n), outside
        self._device.launch("finalise", n, arguments)
        if decoded is not None and (n_outside := self._read(outside)):
            raise outside_space(n_outside, decoded)
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
            count=self._device.empty(n, I8).reshape(shape),
            best_partial=partial.best_partial,
        )
        structures = []
        for maps in (partial, masked):
            row, own = of_partial(maps, n, I4 if indexed else F4, self._device.address)
            structures.append(structure(*_table(row), *own))
        arguments = *structures, np.int32(len(partial.pose)), np.int32(indexed), np.int64(n)
        self._device.launch("mask_nan", n, arguments)
        return masked

    def _on_device(self, space: SearchSpace) -> tuple[AnyArray, ...]:
        """Return the tables of a search space on the device, copied unless it was the last one."""
        last = self._tables
        if last is None or last[0] is not space:
            copies = []
            for name in TABLES:
                flat = np.ascontiguousarray(getattr(space, name)).reshape(-1)
                copy = self._device.empty(flat.size, flat.dtype)
                self._device.copy_in(flat, copy).synchronize()
                copies.append(copy)
            last = self._tables = space, tuple(copies)
        return last[1]

    def _zero(self) -> AnyArray:
        zero = self._device.empty(1, I8)
        zero.fill(0)
        return zero

    def _read(self, value: AnyArray) -> int:
        """Copy a number to the host and wait."""
        host = np.empty(1, I8)
        self._device.copy_out(value, host).synchronize()
        return int(host[0])
