"""Blosc frames of stored chunks: encoded whole, decoded whole or block by block.

A frame (version 1 of the format) is a header of 16 bytes, a table of block offsets, and the blocks,
each compressed separately. To decode a single block, a new header is written in front of it, which
makes it a frame that numcodecs decodes.
"""

import struct
from itertools import pairwise
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.blosc import decompress

from ocelot_em.model.maps import AnyArray
from ocelot_em.model.regions import ceil_div
from ocelot_em.model.streams import LZ4Streams

_CRC_OF_DATA_WITH_ITS_CRC = 0x48674BC7
"""CRC32C of any bytes followed by their little-endian CRC32C; avoids slicing in checks."""

_HEADER = struct.Struct("<4B3I")
"""Format and compressor versions, flags, item size; decoded, block and encoded sizes in bytes."""

_BLOCK_HEADER = struct.Struct("<4B4I")
"""A header with a table of one offset."""

_STREAM_SIZE = struct.Struct("<i")
"""Encoded size in bytes in front of a stream."""

_SMALLEST_BLOCK = 1024
"""Minimum size in bytes of blocks decoded separately; smaller ones could have tables larger than
the data."""

_STORED_RAW = 0x02
"""Flag of a frame with uncompressed values and no offset table."""

_SHUFFLED, _BIT_SHUFFLED, _WHOLE_BLOCKS = 0x01, 0x04, 0x10
"""Flags of a frame whose bytes or bits are shuffled, and whose blocks are single streams."""

_LZ4_FORMAT = 1
"""Format of the streams, in the highest bits of the flags."""

_MIN_STREAM_VALUES = 128
"""Blocks of fewer values are single streams in any case."""


def checksum(data: bytes) -> int:
    """Return the CRC32C of some bytes."""
    return int(google_crc32c.value(data))


def encode(values: AnyArray, codec: Any) -> list[bytes]:
    """Encode C-contiguous values; return a chunk's object in parts: a frame and its CRC32C."""
    frame: bytes = codec.encode(values)
    return [frame, google_crc32c.value(frame).to_bytes(4, "little")]


def max_encoded_nbytes(nbytes: int) -> int:
    """Return the maximum encoded size in bytes of a chunk of this decoded size."""
    return nbytes + nbytes // 16 + 2**16  # Blosc needs less; this allows for other encoders


class BloscChunk:
    """The encoded object of a chunk of ``nbytes`` decoded bytes; ``ValueError`` if it is corrupt.

    While a block is decoded from writable memory, the bytes in front of it are overwritten, and
    then restored.
    """

    def __init__(self, encoded: memoryview, nbytes: int) -> None:
        if len(encoded) < _HEADER.size + 4:
            raise ValueError(f"expected a Blosc frame with its CRC32C, got {len(encoded)} bytes")
        # google_crc32c accepts bytes and arrays, but not memoryviews; its hints allow only bytes.
        data: Any = np.frombuffer(encoded, np.uint8)
        if google_crc32c.value(data) != _CRC_OF_DATA_WITH_ITS_CRC:
            raise ValueError("its CRC32C does not match its bytes")
        self._frame = encoded[:-4]
        self.checksum = int.from_bytes(encoded[-4:], "little")
        """CRC32C of the frame, as stored."""
        self.encoded_nbytes = len(encoded)
        self._kind = encoded[:4]
        *_, flags, itemsize, decoded, block, size = _HEADER.unpack_from(encoded)
        if decoded != nbytes or size != len(self._frame):
            raise ValueError(f"expected {nbytes} bytes decoded, got {decoded}")
        self._flags, self._itemsize, self._block_nbytes = flags, itemsize, block
        self._nbytes = nbytes
        self.n_blocks = self._count_blocks(nbytes)
        """Number of blocks that can be decoded separately; 1 if only the whole chunk can."""

    def check_place(self, checksum: int) -> None:
        """Raise ``ValueError`` unless this is the chunk that a manifest states for its place."""
        if self.checksum != checksum:
            raise ValueError(
                f"expected the chunk with the CRC32C {checksum:08x} that was written here, got an "
                f"intact one with {self.checksum:08x}, which belongs elsewhere"
            )

    def _count_blocks(self, nbytes: int) -> int:
        block, is_raw = self._block_nbytes, self._flags & _STORED_RAW
        if block < _SMALLEST_BLOCK or nbytes % block or is_raw or self._frame.readonly:
            return 1
        n_blocks = nbytes // block
        table_end = _HEADER.size + 4 * n_blocks
        if len(self._frame) < table_end:
            return 1
        starts = struct.unpack_from(f"<{n_blocks}I", self._frame, _HEADER.size)
        self._bounds = [*starts, len(self._frame)]
        # Several threads may write blocks in another order.
        in_order = all(start < end for start, end in pairwise(self._bounds))
        return n_blocks if in_order and starts[0] >= table_end else 1

    @property
    def frame(self) -> memoryview:
        """The frame without its CRC32C."""
        return self._frame

    def streams(self) -> LZ4Streams | None:
        """Return the streams for decoders that unshuffle, too; None: only numcodecs decodes it.

        The streams are inside of the frame, and of the decoded chunk; their content is not checked.
        """
        flags, itemsize, block = self._flags, self._itemsize, self._block_nbytes
        is_shuffled = flags & (_SHUFFLED | _BIT_SHUFFLED) in (_SHUFFLED, _BIT_SHUFFLED)
        is_raw, unit = flags & _STORED_RAW, 8 * itemsize
        if flags >> 5 != _LZ4_FORMAT or not is_shuffled or is_raw or itemsize not in (4, 8):
            return None
        if block < _SMALLEST_BLOCK or block % unit or self._nbytes % unit:
            return None
        n_blocks = ceil_div(self._nbytes, block)
        if len(self._frame) < _HEADER.size + 4 * n_blocks:
            return None
        is_split = not flags & _WHOLE_BLOCKS and block // itemsize >= _MIN_STREAM_VALUES
        table = []
        for number, at in enumerate(struct.unpack_from(f"<{n_blocks}I", self._frame, _HEADER.size)):
            to, decoded = number * block, min(block, self._nbytes - number * block)
            n_streams = itemsize if is_split and decoded == block else 1
            decoded //= n_streams
            for stream in range(n_streams):
                start = at + _STREAM_SIZE.size
                if start > len(self._frame):
                    return None
                (encoded,) = _STREAM_SIZE.unpack_from(self._frame, at)
                at = start + encoded
                if encoded <= 0 or at > len(self._frame):
                    return None
                table.append((start, encoded, to + stream * decoded, decoded))
        return LZ4Streams(np.array(table, np.int64), block, itemsize, bool(flags & _BIT_SHUFFLED))

    def decode(self, out: AnyArray) -> None:
        """Decode the whole chunk into a C-contiguous array."""
        _decode(self._frame, out)

    def decode_block(self, number: int, out: AnyArray) -> None:
        """Decode one block into a C-contiguous array of its size."""
        if self.n_blocks == 1:
            self.decode(out)
            return
        start, end = self._bounds[number] - _BLOCK_HEADER.size, self._bounds[number + 1]
        alone = self._frame[start:end]
        borrowed = bytes(alone[: _BLOCK_HEADER.size])
        nbytes = self._block_nbytes
        _BLOCK_HEADER.pack_into(alone, 0, *self._kind, nbytes, nbytes, len(alone), len(borrowed))
        try:
            _decode(alone, out)
        finally:
            alone[: _BLOCK_HEADER.size] = borrowed

    def decode_part(self, start: int, end: int, out: AnyArray) -> None:
        """Decode at least a range of bytes, in place in a C-contiguous array of the whole chunk."""
        block = self._block_nbytes
        if self.n_blocks == 1 or end - start + block >= out.nbytes:
            self.decode(out)
            return
        flat = out.reshape(-1).view(np.uint8)
        for number in range(start // block, -(-end // block)):
            self.decode_block(number, flat[number * block : (number + 1) * block])


def _decode(frame: memoryview, out: AnyArray) -> None:
    try:
        decompress(frame, out)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
