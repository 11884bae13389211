"""Merge of a tile on a device: partials are copied map by map, and one pass folds several of them.

This is the device version of :mod:`ocelot_em.merge.fold`, for the same caller. A thread copies an
encoded chunk to pinned memory and starts its copy to the device, which decodes it; during the copy
it prepares the next map in other pinned memory. What the device does not decode (regions that are
not one chunk, other codecs than LZ4) is decoded into the pinned memory instead. Merged maps return
encoded, each while the next is encoded, or as values where these are needed. Every thread has its
own device memory, allocated once, and its own stream, so the threads of a worker also overlap.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from typing import NamedTuple

import numpy as np

from ocelot_em.errors import DeviceMemoryError, OcelotError
from ocelot_em.kernels.cuda import CudaKernels
from ocelot_em.kernels.cuda_codec import (
    CHUNK_BUFFERS,
    HEADER_NBYTES,
    ChunkCodec,
    Window,
    max_frame_nbytes,
    pack,
    packed_nbytes,
)
from ocelot_em.kernels.device import Device, DeviceEvent
from ocelot_em.kernels.streams import find_streams
from ocelot_em.merge.fold import Merged, PieceReport, partial_maps, whole_map
from ocelot_em.model.maps import (
    BEST_PARTIAL,
    COUNT,
    MAPS,
    MIP,
    SCALED_MIP,
    SQUARED_SUM,
    STD,
    SUM,
    Accumulator,
    AnyArray,
    MapSet,
)
from ocelot_em.model.regions import TileGrid
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.model.streams import LZ4Streams
from ocelot_em.model.workspace import Workspace
from ocelot_em.store.arrays import ChunkedMap
from ocelot_em.store.blosc import EncodedChunks
from ocelot_em.store.sources import Source
from ocelot_em.store.transfer import Arrival, ReadAhead

log = logging.getLogger(__name__)

PINNED_PLANES = 4
"""Maps of a tile in pinned memory per thread: one is decoded or encoded, the others are copied."""

MAPS_FOR_STATISTICS = (MIP, SCALED_MIP, STD, BEST_PARTIAL)
"""Maps of a whole tile that its statistics need on the host at the same time."""

CHUNK_NBYTES = 9
"""Bytes per pixel of the memory for a chunk: 8 of the widest map, and room for a frame that did not
become smaller."""


def accumulator_nbytes_per_pixel(maps: MapSet) -> int:
    """Device bytes per thread and pixel of a tile, excluding those of its partials."""
    computed = len(maps.computed)
    counts = 8 if maps.counts else 0
    chunk = CHUNK_BUFFERS * CHUNK_NBYTES
    return 4 + 4 * len(maps.pose) + 4 + 8 + 8 + counts + 4 * computed + chunk


def partial_nbytes_per_pixel(maps: MapSet, sum_nbytes: int, *, mask_nan: bool) -> int:
    """Device bytes per thread, pixel of a tile and partial on the device."""
    read = 4 + 4 * len(maps.pose) + 2 * sum_nbytes
    masked = read + 8 if mask_nan else 0
    return read + masked + 4 + (8 if maps.counts else 0)  # merged results have numbers and counts


class DeviceFold:
    """Merges the pieces of an exposure on a device, as :class:`ocelot_em.merge.fold.Fold` does."""

    def __init__(
        self,
        sources: Sequence[Source],
        maps: MapSet,
        space: SearchSpace | None,
        device_memory: "DeviceMemory",
        *,
        mask_nan: bool,
    ) -> None:
        self.sources, self.maps, self.space = sources, maps, space
        self._mask_nan, self._memory = mask_nan, device_memory
        self._kernels = device_memory.kernels

    def order(self) -> Iterator[tuple[int, str]]:
        """Yield source number and map name, in the order in which maps are read."""
        for number, source in enumerate(self.sources):
            yield from ((number, name) for name in source.map_names(self.maps))

    def merge(self, reader: ReadAhead, work: Workspace, report: PieceReport) -> Merged:
        """Merge one piece; it is a DeviceMemoryError if not even one partial fits."""
        memory, n = self._memory.for_this_thread(work.max_pixels), work.n_pixels
        accumulator = memory.accumulator(n)
        for start in range(0, len(self.sources), memory.max_partials):
            numbers = range(len(self.sources))[start : start + memory.max_partials]
            incoming, partials = Incoming(memory, work.shape, report), []
            for slot, number in enumerate(numbers):
                source, on_device = self.sources[number], {}
                for name in source.map_names(self.maps):
                    with reader.take(1) as (arrival,):
                        on_device[name] = incoming.receive(arrival, name, slot, (number, source))
                partials.append(partial_maps(source, self.maps, on_device))
            if self._mask_nan:
                partials = [self._kernels.mask_nan(partial) for partial in partials]
            if self._kernels.fold_all(accumulator, partials, self.space, fresh=start == 0):
                report.suspect(*numbers)
            incoming.finish()
        maps, computed = self.maps.with_derived, memory.computed(n)
        merged = self._kernels.finalise(accumulator, maps, self.space, computed)
        if not self.maps.derived:
            merged[SUM] = accumulator.correlation_sum
            merged[SQUARED_SUM] = accumulator.correlation_squared_sum
        statistics, on_host = report.statistics, {}
        first = MAPS_FOR_STATISTICS if statistics is not None else (MIP,)
        for name, values in memory.fetch(merged, [name for name in first if name in merged]):
            on_host[name] = work.array(name, merged[name].dtype)
            on_host[name][...] = values.reshape(work.shape)
        report.searched_pixels = int(np.count_nonzero(on_host[MIP] > -np.inf))
        if statistics is not None:
            statistics.find_candidates(on_host)
        encoded = memory.encodable(merged) if report.as_planes else {}
        for name in merged:
            if name not in encoded and name in on_host:
                yield name, on_host[name]
            elif name in encoded and name not in on_host and statistics is not None:
                statistics.keep(name, partial(memory.codec.look_up, merged[name]))
        others = [name for name in merged if name not in encoded and name not in on_host]
        for name, values in memory.fetch(merged, others):
            shaped = values.reshape(work.shape)
            report.keep_candidates(name, shaped)
            yield name, shaped
        yield from memory.encode(merged, encoded, work.shape)


class Incoming:
    """Maps of the partials of a piece on their way to the device."""

    def __init__(self, memory: "ThreadMemory", shape: tuple[int, int], report: PieceReport) -> None:
        self._memory, self._shape, self._report = memory, shape, report
        self._n = shape[0] * shape[1]
        self._complaints: list[Callable[[ValueError], OcelotError]] = []
        self._measured: list[tuple[int, str, AnyArray]] = []
        memory.findings.fill(0)

    def receive(
        self, arrival: Arrival, name: str, slot: int, numbered_source: tuple[int, Source]
    ) -> AnyArray:
        """Copy a map to the device, encoded if the device decodes it; return its device array."""
        memory, statistics = self._memory, self._report.statistics
        values = memory.plane(slot, name, arrival.dtype.name, self._n)
        # Numbers of partials become those of the result on the host, where counts are collected.
        if name in (BEST_PARTIAL, COUNT) or not self._decode(arrival, values):
            host = memory.pinned(self._n, arrival.dtype)
            whole_map(name, arrival, numbered_source, self._report, host)
            memory.send(host, values)
        elif statistics is not None and name in (SUM, SQUARED_SUM):
            rows = memory.codec.measure_rows(values, self._shape, statistics.n_valid_columns)
            kept = memory.keep(len(self._measured), rows)
            self._measured.append((numbered_source[0], name, kept))
        return values

    def _decode(self, arrival: Arrival, values: AnyArray) -> bool:
        """Start to decode a map on the device; return False if it must be decoded on the host."""
        memory, chunk = self._memory, arrival.chunk
        streams = None if chunk is None else chunk.streams(find_streams)
        if chunk is None or streams is None:
            return False
        nbytes = packed_nbytes(len(chunk.frame), streams)
        if streams.itemsize != values.itemsize or nbytes > memory.codec.max_nbytes:
            return False
        packed = memory.pinned(nbytes, np.dtype(np.uint8))
        pack(chunk.frame, streams, packed)
        finding = memory.findings[len(self._complaints) :]
        memory.sent(memory.codec.decode(packed, streams, values, finding))
        self._complaints.append(arrival.corrupt)
        return True

    def finish(self) -> None:
        """Wait for all maps, and add what was measured; a malformed chunk is a CorruptChunkError.

        Nothing may be received afterwards.
        """
        n_malformed = self._memory.read_findings(len(self._complaints))
        for complain, n in zip(self._complaints, n_malformed, strict=True):
            if n:
                raise complain(ValueError(f"{n} of its LZ4 streams cannot be decoded"))
        statistics = self._report.statistics
        for number, name, rows in self._measured:
            assert statistics is not None
            statistics.add_measured(number, name, rows.reshape(-1, 2))


class Encoding(NamedTuple):
    """How chunks of a map are encoded: start of a frame, streams, and what a window is made of."""

    header: bytes
    streams: LZ4Streams
    cell: tuple[int, int]
    fill: float | int
    dtype: "np.dtype[np.generic]"


class DeviceMemory:
    """A device and the memory of every thread on it; shared by all exposures of a merge.

    Each thread has memory for ``max_partials`` at a time, or for fewer if memory is short. Chunks
    of the maps ``written`` can be encoded on the device.
    """

    def __init__(
        self,
        device: Device,
        maps: MapSet,
        max_partials: int,
        sum_dtype: str,
        written: Mapping[str, ChunkedMap],
    ) -> None:
        self._device, self._maps, self._written = device, maps, written
        self._max_partials, self._sum_dtype = max_partials, sum_dtype
        self.kernels = CudaKernels(device)
        self._per_thread = threading.local()

    def for_this_thread(self, max_pixels: int) -> "ThreadMemory":
        """Return this thread's memory."""
        if not hasattr(self._per_thread, "memory"):
            self._per_thread.memory = ThreadMemory(
                self._maps,
                self._device,
                max_pixels,
                self._max_partials,
                self._sum_dtype,
                self._encodings,
            )
        memory: ThreadMemory = self._per_thread.memory
        return memory

    @cached_property
    def _encodings(self) -> dict[str, Encoding]:
        """Encodings by name, where the device has one: those of Blosc for a chunk of fill values.

        Readers decode chunks together only if their blocks are equally long.
        """
        found = {}
        for name, target in self._written.items():
            blank = target.blank()
            if (streams := blank.streams(find_streams)) is not None:
                header = bytes(blank.frame[:HEADER_NBYTES])
                cell = target.grid.cell
                found[name] = Encoding(header, streams, cell, target.fill, target.dtype)
        return found


class ThreadMemory:
    """One thread's memory for one tile at a time: on the device, and pinned on the host.

    The attribute ``max_partials`` is the number of partials that fit.
    """

    def __init__(
        self,
        maps: MapSet,
        device: Device,
        max_pixels: int,
        max_partials: int,
        sum_dtype: str,
        encodings: Mapping[str, Encoding],
    ) -> None:
        self._maps, self._device, self._max_pixels = maps, device, max_pixels
        self._encodings = encodings
        self._on_device: dict[tuple[int, str, str], AnyArray] = {}
        self.max_partials = max_partials
        nbytes = max_pixels * CHUNK_NBYTES
        self.codec = ChunkCodec(device, nbytes)
        while True:
            try:
                self._allocate(sum_dtype)
                break
            except DeviceMemoryError:
                self._on_device.clear()
                if self.max_partials == 1:
                    raise
                self.max_partials = -(-self.max_partials // 2)
                log.warning(
                    "the device has less free memory than planned: %d partials at a time",
                    self.max_partials,
                )
        self.findings = device.empty(self.max_partials * len(MAPS), "i8")
        """Numbers of malformed streams of the chunks of a piece."""
        self._kept: dict[int, AnyArray] = {}
        self._start = device.pinned(HEADER_NBYTES + 4)
        self._buffers = [device.pinned(nbytes) for _ in range(PINNED_PLANES)]
        self._events: list[DeviceEvent | None] = [None] * PINNED_PLANES
        self._current = 0

    def _allocate(self, sum_dtype: str) -> None:
        """Allocate all memory in advance, so that a merge does not run out of it."""
        self.accumulator(1)
        self.computed(1)
        for slot in range(self.max_partials):
            for name in self._maps.partial:
                is_sum = name in (SUM, SQUARED_SUM)
                self.plane(slot, name, sum_dtype if is_sum else MAPS[name].dtypes[0], 1)

    def accumulator(self, n: int) -> Accumulator:
        """Return the accumulator of the first ``n`` pixels, with its previous contents."""
        return Accumulator.allocate(self._maps, lambda name, t: self.plane(-1, name, t, n))

    def computed(self, n: int) -> dict[str, AnyArray]:
        """Return memory for the maps computed at the end."""
        return {name: self.plane(-2, name, "float32", n) for name in self._maps.computed}

    def pinned(self, n: int, dtype: "np.dtype[np.generic]") -> AnyArray:
        """Return pinned memory for a map, after waiting for the last copy from or to it."""
        self._current = (self._current + 1) % PINNED_PLANES
        event = self._events[self._current]
        if event is not None:
            event.synchronize()
            self._events[self._current] = None
        return self._buffers[self._current][: n * dtype.itemsize].view(dtype)

    def send(self, values: AnyArray, on_device: AnyArray) -> None:
        """Start copying the last :meth:`pinned` memory to the device."""
        self.sent(self._device.copy_in(values, on_device))

    def sent(self, event: DeviceEvent) -> None:
        """Reuse the last :meth:`pinned` memory only after an event."""
        self._events[self._current] = event

    def keep(self, number: int, values: AnyArray) -> AnyArray:
        """Start copying values to numbered host memory, to read after :meth:`read_findings`."""
        if number not in self._kept or self._kept[number].nbytes < values.nbytes:
            self._kept[number] = self._device.pinned(values.nbytes)
        kept = self._kept[number][: values.nbytes].view(values.dtype)
        self._device.copy_out(values, kept)
        return kept

    def read_findings(self, n: int) -> AnyArray:
        """Wait for everything that was started; return the first ``n`` findings."""
        findings = np.empty(len(self.findings), np.int64)
        self._device.copy_out(self.findings, findings).synchronize()
        return findings[:n]

    def fetch(
        self, maps: Mapping[str, AnyArray], names: Sequence[str]
    ) -> Iterator[tuple[str, AnyArray]]:
        """Copy the named maps to the host; each is valid until the next one is requested."""
        in_flight: deque[tuple[str, AnyArray, DeviceEvent]] = deque()
        for name in names:
            on_device = maps[name]
            if len(in_flight) == PINNED_PLANES - 1:
                yield _completed(in_flight.popleft())
            host = self.pinned(on_device.size, on_device.dtype)
            in_flight.append((name, host, self._device.copy_out(on_device, host)))
        while in_flight:
            yield _completed(in_flight.popleft())

    def encodable(self, maps: Mapping[str, AnyArray]) -> dict[str, Encoding]:
        """Return the encodings of the maps that the device can encode."""
        return {
            name: own
            for name, own in self._encodings.items()
            if name in maps
            and maps[name].dtype == own.dtype
            and max_frame_nbytes(own.streams) <= self.codec.max_nbytes
        }

    def encode(
        self,
        maps: Mapping[str, AnyArray],
        encodings: Mapping[str, Encoding],
        shape: tuple[int, int],
    ) -> Iterator[tuple[str, EncodedChunks]]:
        """Encode the chunks of maps of this shape; all of one map are taken before the next."""
        chunks = {name: list(TileGrid(shape, own.cell)) for name, own in encodings.items()}
        frames = self._frames(
            (maps[name], Window(shape, (tile.region.y0, tile.region.x0), own.cell, own.fill), own)
            for name, own in encodings.items()
            for tile in chunks[name]
        )
        for name in encodings:
            yield name, EncodedChunks(islice(frames, len(chunks[name])))

    def _frames(self, steps: Iterable[tuple[AnyArray, Window, Encoding]]) -> Iterator[AnyArray]:
        """Encode chunk after chunk; one is copied and yielded while the next is encoded."""
        copied: tuple[AnyArray, DeviceEvent, bytes] | None = None
        for values, window, own in steps:
            self.codec.encode(values, window, own.streams)
            sized = self._device.copy_out(self.codec.frame[: self._start.size], self._start)
            if copied is not None:
                yield _finished(*copied)
            sized.synchronize()
            size = int(self._start[len(own.header) :].view("<u4")[0])
            frame = self.pinned(size, np.dtype(np.uint8))
            copied = frame, self._device.copy_out(self.codec.frame[:size], frame), own.header
            self.sent(copied[1])
        if copied is not None:
            yield _finished(*copied)

    def plane(self, slot: int, name: str, dtype: str, n: int) -> AnyArray:
        """Return the first ``n`` values of a map on the device, allocated once."""
        key = slot, name, dtype
        if key not in self._on_device:
            self._on_device[key] = self._device.empty(self._max_pixels, dtype)
        return self._on_device[key][:n]


def _completed(copy: tuple[str, AnyArray, DeviceEvent]) -> tuple[str, AnyArray]:
    """Wait for the copy of a map to the host; return its name and values."""
    name, host, event = copy
    event.synchronize()
    return name, host


def _finished(frame: AnyArray, copied: DeviceEvent, header: bytes) -> AnyArray:
    """Wait for a frame; return it with its header, in memory of its own."""
    copied.synchronize()
    frame = frame.copy()
    frame[: len(header)] = np.frombuffer(header, np.uint8)
    return frame
