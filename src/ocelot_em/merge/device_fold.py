"""Merge of a tile on a device: partials are copied map by map, and one pass folds several of them.

This is the device version of :mod:`ocelot_em.merge.fold`, for the same caller. A thread decodes a
map into pinned memory and starts its copy; during the copy it decodes the next map into other
pinned memory. Merged maps return the same way, each encoded while the next is copied. Every thread
has its own device memory, allocated once, and its own stream, so the threads of a worker also
overlap.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ocelot_em import kernels
from ocelot_em.errors import DeviceMemoryError
from ocelot_em.kernels.device import Device, Mark
from ocelot_em.merge.fold import Incoming, Merged, Notes, look_up_candidates
from ocelot_em.model.maps import (
    BEST_PARTIAL,
    COUNT,
    MAPS,
    MIP,
    NOT_SEARCHED,
    SCALED_MIP,
    SQUARED_SUM,
    STD,
    SUM,
    Accumulator,
    AnyArray,
    MapSet,
    PartialMaps,
    PoseForm,
)
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.model.workspace import Workspace
from ocelot_em.store.sources import Source

log = logging.getLogger(__name__)

PINNED_PLANES = 4
"""Maps of a tile in pinned memory per thread: one is decoded or encoded, the others are copied."""

LOOKED_AT = (MIP, SCALED_MIP, STD, BEST_PARTIAL)
"""Maps of a whole tile that its statistics need on the host at the same time."""

WIDEST_NBYTES = 8
"""Bytes per pixel of the widest map."""


def accumulator_nbytes_per_pixel(maps: MapSet) -> int:
    """Device bytes per thread and pixel of a tile, excluding those of its partials."""
    computed = len(maps.computed)
    counts = 8 if maps.counts else 0
    return 4 + 4 * len(maps.pose) + 4 + 8 + 8 + counts + 4 * computed


def partial_nbytes_per_pixel(maps: MapSet, sum_nbytes: int, *, mask_nan: bool) -> int:
    """Device bytes per thread, pixel of a tile and partial on the device."""
    read = 4 + 4 * len(maps.pose) + 2 * sum_nbytes
    masked = read + 8 if mask_nan else 0
    return read + masked + 4 + (8 if maps.counts else 0)  # merged results have numbers and counts


class DeviceFold:
    """Merges the pieces of an exposure on a device; shared by all tiles and threads.

    Parameters
    ----------
    sources, maps, space, mask_nan
        As for :class:`ocelot_em.merge.fold.Fold`.
    lanes
        The device and its memory.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        maps: MapSet,
        space: SearchSpace | None,
        *,
        mask_nan: bool,
        lanes: "Lanes",
    ) -> None:
        self.sources, self.maps, self.space = sources, maps, space
        self._mask_nan, self._lanes = mask_nan, lanes
        self._kernels = lanes.kernels

    def order(self) -> Iterator[tuple[int, str]]:
        """Yield source number and map name, in the order in which maps are read."""
        for number, source in enumerate(self.sources):
            yield from ((number, name) for name in source.map_names(self.maps))

    def merge(self, incoming: Incoming, work: Workspace, notes: Notes) -> Merged:
        """Merge one piece, like :meth:`ocelot_em.merge.fold.Fold.merge`.

        Raises
        ------
        StorageError
            Raised by ``incoming``.
        DeviceMemoryError
            Not even one partial fits.
        """
        lane, n = self._lanes.of_thread(work.max_pixels), work.n_pixels
        accumulator = lane.accumulator(n)
        for start in range(0, len(self.sources), lane.together):
            numbers = range(len(self.sources))[start : start + lane.together]
            partials = [
                self._send((number, slot), incoming, lane, n, notes)
                for slot, number in enumerate(numbers)
            ]
            if self._mask_nan:
                partials = [self._kernels.mask_nan(partial) for partial in partials]
            report = self._kernels.fold_all(accumulator, partials, self.space, fresh=start == 0)
            if report.nan_pixels or report.invalid_indices:
                notes.suspect(*numbers)
        merged = self._kernels.finalise(accumulator, self.maps, self.space, lane.computed(n))
        first = [name for name in LOOKED_AT if name in merged]
        if notes.statistics is not None:
            looked_at = {name: work.array(name, merged[name].dtype) for name in first}
            for name, values in lane.fetch(merged, first):
                looked_at[name][...] = values.reshape(work.shape)
            notes.statistics.look(looked_at)
        for name, values in lane.fetch(merged, list(merged)):
            if name == MIP:
                notes.searched_pixels = int(np.count_nonzero(values > -np.inf))
            yield name, look_up_candidates(notes, name, values.reshape(work.shape))

    def _send(
        self, which: tuple[int, int], incoming: Incoming, lane: "Lane", n: int, notes: Notes
    ) -> PartialMaps:
        """Read a partial (source number, device slot) and start its copy to the device."""
        (number, slot), there = which, {}
        source = self.sources[number]
        for name in source.map_names(self.maps):
            with incoming.take(1) as (arrival,):
                values = lane.pinned(n, arrival.dtype)
                arrival.decode(0, 1, values)
            if notes.statistics is not None and name in (SUM, SQUARED_SUM):
                notes.statistics.add(number, name, 0, values)
            if name == BEST_PARTIAL:
                np.add(values, source.first_number, out=values, where=values != NOT_SEARCHED)
            there[name] = lane.send(values, slot, name)
        return PartialMaps(
            mip=there[MIP],
            pose=tuple(there[name] for name in self.maps.pose),
            correlation_sum=there[SUM],
            correlation_squared_sum=there[SQUARED_SUM],
            count=there.get(COUNT, source.total_projections),
            best_partial=there.get(BEST_PARTIAL, source.first_number),
        )


class Lanes:
    """A device and the memory of every thread on it; shared by all exposures of a merge.

    Parameters
    ----------
    device
        The device that merges.
    maps
        Maps of the result.
    together
        Number of partials on the device at a time, per thread; fewer if memory is short.
    sum_dtype
        Stored dtype of the sums.
    """

    def __init__(
        self, device: Device, maps: MapSet, together: int, sum_dtype: str = "float32"
    ) -> None:
        self._device, self._maps, self._together, self._sums = device, maps, together, sum_dtype
        self.kernels = kernels.load_cuda(device)
        self._of_thread = threading.local()

    def of_thread(self, most_pixels: int) -> "Lane":
        """Return this thread's memory.

        Raises
        ------
        DeviceMemoryError
            Not even one partial fits.
        """
        if not hasattr(self._of_thread, "lane"):
            self._of_thread.lane = Lane(
                self._maps, self._device, most_pixels, self._together, self._sums
            )
        lane: Lane = self._of_thread.lane
        return lane


class Lane:
    """One thread's memory for one tile at a time: on the device, and pinned on the host.

    Parameters
    ----------
    maps
        Maps of the result.
    device
        The device that has the memory.
    most_pixels
        Maximum number of pixels of a tile.
    together
        Maximum number of partials at a time; :attr:`together` is the number that fits.
    sum_dtype
        Stored dtype of the sums.

    Raises
    ------
    DeviceMemoryError
        Not even one partial fits.
    """

    def __init__(
        self, maps: MapSet, device: Device, most_pixels: int, together: int, sum_dtype: str
    ) -> None:
        self._maps, self._device, self._most_pixels = maps, device, most_pixels
        self._there: dict[tuple[int, str, str], AnyArray] = {}
        self.together = together
        while True:
            try:
                self._allocate(sum_dtype)
                break
            except DeviceMemoryError:
                self._there.clear()
                if self.together == 1:
                    raise
                self.together = -(-self.together // 2)
                log.warning(
                    "the device has less free memory than planned: %d partials at a time",
                    self.together,
                )
        nbytes = most_pixels * WIDEST_NBYTES
        self._slabs = [device.pinned(nbytes) for _ in range(PINNED_PLANES)]
        self._marks: list[Mark | None] = [None] * PINNED_PLANES
        self._turn = 0

    def _allocate(self, sum_dtype: str) -> None:
        """Allocate all memory in advance, so that a merge does not run out of it."""
        self.accumulator(1)
        self.computed(1)
        for slot in range(self.together):
            for name in self._maps.partial:
                is_sum = name in (SUM, SQUARED_SUM)
                self._plane(slot, name, sum_dtype if is_sum else MAPS[name].dtypes[0], 1)

    def accumulator(self, n: int) -> Accumulator:
        """Return the accumulator of the first ``n`` pixels, with its previous contents."""
        indexed = self._maps.form is PoseForm.INDEXED
        return Accumulator(
            mip=self._plane(-1, MIP, "float32", n),
            pose=tuple(
                self._plane(-1, name, "int32" if indexed else "float32", n)
                for name in self._maps.pose
            ),
            best_partial=self._plane(-1, BEST_PARTIAL, "int32", n),
            correlation_sum=self._plane(-1, SUM, "float64", n),
            correlation_squared_sum=self._plane(-1, SQUARED_SUM, "float64", n),
            count_map=self._plane(-1, COUNT, "int64", n) if self._maps.counts else None,
        )

    def computed(self, n: int) -> dict[str, AnyArray]:
        """Return memory for the maps computed at the end."""
        return {name: self._plane(-2, name, "float32", n) for name in self._maps.computed}

    def pinned(self, n: int, dtype: "np.dtype[np.generic]") -> AnyArray:
        """Return pinned memory for a map, after waiting for the last copy from or to it."""
        self._turn = (self._turn + 1) % PINNED_PLANES
        mark = self._marks[self._turn]
        if mark is not None:
            mark.synchronize()
            self._marks[self._turn] = None
        return self._slabs[self._turn][: n * dtype.itemsize].view(dtype)

    def send(self, values: AnyArray, slot: int, name: str) -> AnyArray:
        """Start copying the last :meth:`pinned` memory; return its device array."""
        there = self._plane(slot, name, values.dtype.name, values.size)
        self._marks[self._turn] = self._device.copy_in(values, there)
        return there

    def fetch(
        self, maps: Mapping[str, AnyArray], names: Sequence[str]
    ) -> Iterator[tuple[str, AnyArray]]:
        """Copy the named maps to the host; each is valid until the next one is requested."""
        on_the_way: deque[tuple[str, AnyArray, Mark]] = deque()
        for name in names:
            there = maps[name]
            if len(on_the_way) == PINNED_PLANES - 1:
                yield self._arrived(on_the_way.popleft())
            host = self.pinned(there.size, there.dtype)
            on_the_way.append((name, host, self._device.copy_out(there, host)))
        while on_the_way:
            yield self._arrived(on_the_way.popleft())

    def _arrived(self, one: tuple[str, AnyArray, Mark]) -> tuple[str, AnyArray]:
        name, host, mark = one
        mark.synchronize()
        return name, host

    def _plane(self, slot: int, name: str, dtype: str, n: int) -> AnyArray:
        key = slot, name, dtype
        if key not in self._there:
            self._there[key] = self._device.empty(self._most_pixels, dtype)
        return self._there[key][:n]
