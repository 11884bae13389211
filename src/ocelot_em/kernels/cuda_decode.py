"""Decoding of chunks on a CUDA device, by the kernels of ``decode.cu``.

An encoded chunk is about half as large as its values, so that copying it instead of them leaves
the other half of the bus, and the processor does not decode at all. A thread copies a frame and the
table of its streams, from one piece of pinned memory, and starts the kernels; nothing waits.
"""

import numpy as np

from ocelot_em.kernels.addresses import F8, I8
from ocelot_em.kernels.device import Device, DeviceEvent
from ocelot_em.model.maps import AnyArray
from ocelot_em.model.streams import LZ4Streams

LANES = 32
"""Threads per stream, as in ``decode.cu``."""

_VALUES_PER_THREAD = 8
"""Values that a thread unshuffles, as in ``decode.cu``."""


def packed_nbytes(frame_nbytes: int, streams: LZ4Streams) -> int:
    """Bytes of a frame with the table of its streams."""
    return _table_start(frame_nbytes) + streams.table.nbytes


def pack(frame: memoryview, streams: LZ4Streams, packed: AnyArray) -> None:
    """Copy a frame and the table of its streams into uint8 values of :func:`packed_nbytes`."""
    packed[: len(frame)] = np.frombuffer(frame, np.uint8)
    packed[_table_start(len(frame)) :].view(I8)[:] = streams.table.reshape(-1)


def _table_start(frame_nbytes: int) -> int:
    return -(-frame_nbytes // I8.itemsize) * I8.itemsize


class ChunkDecoder:
    """Decodes the chunks of one thread, one after another, of at most ``max_nbytes`` decoded."""

    def __init__(self, device: Device, max_nbytes: int) -> None:
        self._device, self.max_nbytes = device, max_nbytes
        self._packed, self._shuffled = (device.empty(max_nbytes, "u1") for _ in range(2))

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
        block_values = streams.block_nbytes // streams.itemsize
        sizes = np.int64(out.size), np.int64(block_values), np.int32(streams.itemsize)
        n_threads = -(-out.size // _VALUES_PER_THREAD)
        shuffle = np.int32(streams.bits)
        self._device.launch("unshuffle", n_threads, (self._shuffled, out, *sizes, shuffle))
        return copied

    def measure_rows(self, sums: AnyArray, shape: tuple[int, int], n_columns: int) -> AnyArray:
        """Add up the first columns of each row of a map of sums, and their squares.

        Returns float64 values on the device, two for each row, valid until the next call.
        """
        measured = self._shuffled[: 2 * shape[0] * F8.itemsize].view(F8)
        sizes = (np.int64(size) for size in (sums.dtype.itemsize, *shape, n_columns))
        self._device.launch("measure_rows", shape[0] * LANES, (sums, *sizes, measured))
        return measured
