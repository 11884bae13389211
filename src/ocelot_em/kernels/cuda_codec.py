"""Decoding and encoding of chunks on a CUDA device, by ``decode.cu`` and ``encode.cu``.

An encoded chunk is about half as large as its values, so that copying it instead of them leaves
the other half of the bus, and the processor neither decodes nor encodes. A thread copies a frame
and the table of its streams, from one piece of pinned memory, and starts the kernels; nothing
waits. Encoding leaves a frame on the device, whose header has its size.
"""

from typing import NamedTuple

import numpy as np

from ocelot_em.kernels.addresses import F8, I8
from ocelot_em.kernels.cuda import structure
from ocelot_em.kernels.device import Device, DeviceEvent
from ocelot_em.model.maps import AnyArray
from ocelot_em.model.streams import LZ4Streams

LANES = 32
"""Threads per stream, as in ``decode.cu``."""

_VALUES_PER_THREAD = 8
"""Values that a thread shuffles or unshuffles, as in ``decode.cu``."""

CHUNK_BUFFERS = 3
"""Buffers of a :class:`ChunkCodec` on the device, each for a whole chunk."""

HEADER_NBYTES = 12
"""Bytes of a frame that an encoder leaves to the caller; its size, in 4 bytes, follows."""


def packed_nbytes(frame_nbytes: int, streams: LZ4Streams) -> int:
    """Bytes of a frame with the table of its streams."""
    return _table_start(frame_nbytes) + streams.table.nbytes


def pack(frame: memoryview, streams: LZ4Streams, packed: AnyArray) -> None:
    """Copy a frame and the table of its streams into uint8 values of :func:`packed_nbytes`."""
    packed[: len(frame)] = np.frombuffer(frame, np.uint8)
    packed[_table_start(len(frame)) :].view(I8)[:] = streams.table.reshape(-1)


def _table_start(frame_nbytes: int) -> int:
    return -(-frame_nbytes // I8.itemsize) * I8.itemsize


def max_frame_nbytes(streams: LZ4Streams) -> int:
    """Maximum size of a frame that is encoded in these streams."""
    *_, start, nbytes = streams.table[-1].tolist()
    n_blocks = -(-(start + nbytes) // streams.block_nbytes)
    return int(HEADER_NBYTES + 4 * (1 + n_blocks + len(streams.table)) + start + nbytes)


class Window(NamedTuple):
    """The part of a map that is a chunk: its first pixel and shape, and the fill value beyond it.

    ``shape`` is that of the map.
    """

    shape: tuple[int, int]
    first: tuple[int, int]
    cell: tuple[int, int]
    fill: float | int


class ChunkCodec:
    """Decodes and encodes the chunks of one thread, one after another.

    They and their frames have at most ``max_nbytes``.
    """

    def __init__(self, device: Device, max_nbytes: int) -> None:
        self._device, self.max_nbytes = device, max_nbytes
        self._packed, self._shuffled, self.frame = (
            device.empty(max_nbytes, "u1") for _ in range(CHUNK_BUFFERS)
        )
        self._tables: dict[tuple[int, ...], AnyArray] = {}

    def decode(
        self, packed: AnyArray, streams: LZ4Streams, out: AnyArray, finding: AnyArray
    ) -> DeviceEvent:
        """Start to decode a chunk from :func:`pack`; ``packed`` may be reused after the event.

        ``out`` are the values on the device; ``finding`` (int64, on the device) is increased by the
        number of malformed streams.
        """
        n_streams = len(streams.table)
        there = self._packed[: packed.size]
        copied = self._device.copy_in(packed, there)
        table = there[packed.size - streams.table.nbytes :]
        arguments = there, table, np.int64(n_streams), self._shuffled, finding
        self._device.launch("decode_streams", n_streams * LANES, arguments)
        self._launch_per_value("unshuffle", (self._shuffled, out), streams, out.size)
        return copied

    def encode(self, values: AnyArray, window: Window, streams: LZ4Streams) -> None:
        """Start to encode a chunk of a map on the device into :attr:`frame`.

        ``streams`` are those of any frame of such a chunk. The first :data:`HEADER_NBYTES` are
        left to the caller; the size of the frame follows.
        """
        (height, width), (y, x), cell = window.shape, window.first, window.cell
        address = self._device.address(values) + (y * width + x) * values.itemsize
        fill = int(np.full(1, window.fill, values.dtype).view(f"i{values.itemsize}")[0])
        part = structure(address, width, height - y, width - x, cell[1], fill)
        self._launch_per_value("shuffle", (part, self._shuffled), streams, cell[0] * cell[1])
        n, table = np.int64(len(streams.table)), self._table_of(streams)
        arguments = self._shuffled, table, n, self._packed
        self._device.launch("encode_streams", int(n) * LANES, arguments)
        packing = self._shuffled, self._packed, table, n, np.int64(streams.block_nbytes), self.frame
        self._device.launch("pack_streams", int(n) * LANES, packing)

    def _launch_per_value(
        self, kernel: str, arrays: tuple[AnyArray, ...], streams: LZ4Streams, n: int
    ) -> None:
        block_values = np.int64(streams.block_nbytes // streams.itemsize)
        sizes = np.int64(n), block_values, np.int32(streams.itemsize), np.int32(streams.bits)
        self._device.launch(kernel, -(-n // _VALUES_PER_THREAD), (*arrays, *sizes))

    def _table_of(self, streams: LZ4Streams) -> AnyArray:
        """Return a table on the device, copied only once, in which sizes are noted."""
        key = *streams[1:], len(streams.table)
        if key not in self._tables:
            self._tables[key] = self._device.empty(streams.table.size, I8)
            flat = streams.table.reshape(-1)
            self._device.copy_in(flat, self._tables[key]).synchronize()
        return self._tables[key]

    def look_up(self, values: AnyArray, where: AnyArray) -> AnyArray:
        """Wait for the values of few pixels, whose numbers are intp, and return them."""
        there = self._packed[: where.nbytes].view(I8)
        found = self._shuffled[: where.size * values.itemsize].view(values.dtype)
        on_host = np.empty(where.size, values.dtype)
        self._device.copy_in(where, there)
        sizes = np.int64(where.size), np.int32(values.itemsize)
        self._device.launch("gather", where.size, (values, there, *sizes, found))
        self._device.copy_out(found, on_host).synchronize()
        return on_host

    def measure_rows(self, sums: AnyArray, shape: tuple[int, int], n_columns: int) -> AnyArray:
        """Add up the first columns of each row of a map of sums, and their squares.

        Returns float64 values on the device, two for each row, valid until the next call.
        """
        measured = self._shuffled[: 2 * shape[0] * F8.itemsize].view(F8)
        sizes = (np.int64(size) for size in (sums.dtype.itemsize, *shape, n_columns))
        self._device.launch("measure_rows", shape[0] * LANES, (sums, *sizes, measured))
        return measured
