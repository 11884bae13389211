"""Blosc frames, as chunks are stored: encoded whole, decoded whole or block by block.

A frame (version 1 of the format) is a header of 16 bytes, a table with the offset of every block,
and the blocks, each compressed by itself. Here a block is decoded without the others: with a header
of its own written in front of it, it is a frame that numcodecs decodes. So decoded values can be
used while they are in the caches, before the next block is decoded over them.
"""

import struct
from itertools import pairwise
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.blosc import decompress

from ocelot_em.model.maps import AnyArray

_CRC_OF_DATA_WITH_ITS_CRC = 0x48674BC7
"""CRC32C of any bytes followed by their own CRC32C, little-endian: checks without slicing."""

_HEADER = struct.Struct("<4B3I")
"""Version, that of the compressor, flags, bytes of a value; sizes decoded, of a block, encoded."""

_BLOCK_HEADER = struct.Struct("<4B4I")
"""The same, with a table of one offset."""

_SMALLEST_BLOCK = 1024
"""Bytes of a block that is worth decoding alone; tables of smaller ones would be longer than what
they are of."""

_STORED_RAW = 0x02
"""Flag of a frame whose values are not compressed, and have no table of offsets."""


def encode(values: AnyArray, codec: Any) -> list[bytes]:
    """Encode C-contiguous values; the parts of a chunk's object: a frame and its CRC32C."""
    frame: bytes = codec.encode(values)
    return [frame, google_crc32c.value(frame).to_bytes(4, "little")]


def most_encoded_nbytes(nbytes: int) -> int:
    """Return the size of the largest object that a chunk of this size may be, in bytes.

    Blosc stores what does not shrink as it is, behind a header; there is room for foreign ones.
    """
    return nbytes + nbytes // 16 + 2**16


class BloscChunk:
    """The object of a chunk.

    Parameters
    ----------
    encoded
        Its bytes, in memory that may be changed; no copy is made. A few bytes in front of a block
        are borrowed while it is decoded, and put back.
    nbytes
        Bytes that it has to have when it is decoded.

    Raises
    ------
    ValueError
        The bytes are not what was written: too few, a wrong checksum, sizes that do not agree.
    """

    def __init__(self, encoded: memoryview, nbytes: int) -> None:
        if len(encoded) < _HEADER.size + 4:
            raise ValueError(f"expected a Blosc frame with its CRC32C, got {len(encoded)} bytes")
        # google_crc32c takes bytes, and arrays, but no memoryviews; its annotations know of bytes.
        data: Any = np.frombuffer(encoded, np.uint8)
        if google_crc32c.value(data) != _CRC_OF_DATA_WITH_ITS_CRC:
            raise ValueError("its CRC32C does not match its bytes")
        self._frame = encoded[:-4]
        self.encoded_nbytes = len(encoded)
        self._kind = encoded[:4]
        *_, flags, _, decoded, block, size = _HEADER.unpack_from(encoded)
        if decoded != nbytes or size != len(self._frame):
            raise ValueError(f"expected {nbytes} bytes decoded, got {decoded}")
        self._flags, self._block_nbytes = flags, block
        self.n_blocks = self._count_blocks(nbytes)
        """Equal parts in which it can be decoded; 1 where it can only be decoded whole."""

    def _count_blocks(self, nbytes: int) -> int:
        block = self._block_nbytes
        if (
            block < _SMALLEST_BLOCK
            or nbytes % block
            or self._flags & _STORED_RAW
            or self._frame.readonly
        ):
            return 1
        n_blocks = nbytes // block
        table_end = _HEADER.size + 4 * n_blocks
        if len(self._frame) < table_end:
            return 1
        starts = struct.unpack_from(f"<{n_blocks}I", self._frame, _HEADER.size)
        self._bounds = [*starts, len(self._frame)]
        # Written by several threads, blocks may stand in another order.
        in_order = all(start < end for start, end in pairwise(self._bounds))
        return n_blocks if in_order and starts[0] >= table_end else 1

    def decode(self, out: AnyArray) -> None:
        """Decode everything into a C-contiguous array.

        Raises
        ------
        ValueError
            It cannot be decoded.
        """
        _decode(self._frame, out)

    def decode_block(self, number: int, out: AnyArray) -> None:
        """Decode one of the blocks into a C-contiguous array of its size.

        Raises
        ------
        ValueError
            It cannot be decoded.
        """
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
        """Decode at least some of the bytes, to their places in a C-contiguous array of all.

        Parameters
        ----------
        start, end
            Of the decoded bytes; the rest of ``out`` may keep what is in it.
        out
            Of the size of everything.

        Raises
        ------
        ValueError
            It cannot be decoded.
        """
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
