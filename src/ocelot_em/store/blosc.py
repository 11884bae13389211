"""Blosc frames of stored chunks: encoded whole, decoded whole or block by block.

A frame (version 1 of the format) is a header of 16 bytes, a table of block offsets, and the blocks,
each compressed separately. To decode a single block, a new header is written in front of it, which
makes it a frame that numcodecs decodes.
"""

import ctypes
import struct
from collections.abc import Callable, Iterator
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from ocelot_em.model.maps import AnyArray
from ocelot_em.model.regions import ceil_div
from ocelot_em.model.streams import LZ4Blocks, LZ4Streams

NO_SHUFFLE, BYTE_SHUFFLE, BIT_SHUFFLE = range(3)
"""Blosc's numbers of what it does to values before it encodes them."""


class Codec(NamedTuple):
    """How Blosc encodes chunks; ``blocksize`` in bytes, 0 if it chooses."""

    cname: str
    clevel: int
    shuffle: int
    blocksize: int = 0


@cache
def _numcodecs() -> Any:
    """Return numcodecs' module; importing it takes longer than most errors."""
    from numcodecs import blosc

    # Its threads would compress the blocks of a chunk in any order, so that equal values would not
    # be equal bytes. Importing zarr sets the same.
    blosc.use_threads = False
    return blosc


_VERSIONS = bytes([2, 1])
"""First bytes of a frame: versions of the format, and of LZ4 in it."""

_CRC_OF_DATA_WITH_ITS_CRC = 0x48674BC7
"""CRC32C of any bytes followed by their little-endian CRC32C; avoids slicing in checks."""

_HEADER = struct.Struct("<4B3I")
"""Format and compressor versions, flags, item size; decoded, block and encoded sizes in bytes."""

_BLOCK_HEADER = struct.Struct("<4B4I")
"""A header with a table of one offset."""

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


FindStreams = Callable[[AnyArray, int, int, int, AnyArray], int]
"""Signature of :func:`ocelot_em.kernels.streams.find_streams`."""


@cache
def lz4_address() -> int:
    """Address of the ``LZ4_decompress_safe`` in the extension of numcodecs; 0 if it exports none.

    Compiled kernels call it without Python's lock.
    """
    try:
        function = ctypes.CDLL(_numcodecs().__file__).LZ4_decompress_safe
    except (AttributeError, OSError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _hardware_crc() -> Callable[[int, Any, int], int] | None:
    """Return the function in the extension of google-crc32c: called so, it needs no lock."""
    try:
        function = ctypes.CDLL(google_crc32c._crc32c.__file__).crc32c_extend
    except (AttributeError, OSError):
        return None
    function.argtypes = ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t
    function.restype = ctypes.c_uint32
    return function


_extend = _hardware_crc()


@cache
def _blosc_compress() -> Callable[..., int] | None:
    """Return ``blosc_compress_ctx`` of the extension of numcodecs, called without the lock."""
    try:
        function = ctypes.CDLL(_numcodecs().__file__).blosc_compress_ctx
    except (AttributeError, OSError):
        return None
    number, size, at = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
    target = at, size, ctypes.c_char_p, size, number
    function.argtypes = number, number, size, size, at, *target
    function.restype = number
    return function


def checksum(data: bytes | memoryview, before: int = 0) -> int:
    """Return the CRC32C of some bytes, after bytes that have the CRC32C ``before``.

    The lock is released, unlike by google-crc32c.
    """
    if _extend is None:  # its hints allow only bytes, but it accepts arrays
        values: Any = data if isinstance(data, bytes) else np.frombuffer(data, np.uint8)
        return int(google_crc32c.extend(before, values))
    if isinstance(data, bytes):
        return _extend(before, data, len(data))
    return _extend(before, np.frombuffer(data, np.uint8).ctypes.data, len(data))


class BitPlanes(NamedTuple):
    """Values of four bytes with shuffled bits, as Blosc encodes them.

    A block has the lowest bits of all its values first, then the next bits, and so on. ``words``
    are all planes, uint64, and ``block_nbytes`` the length of a block.
    """

    words: AnyArray
    block_nbytes: int

    def values(self, dtype: "np.dtype[Any]") -> AnyArray:
        """Return the values, flat: decoded by Blosc from a frame of uncompressed streams."""
        n_streams, nbytes, block = dtype.itemsize, self.words.nbytes, self.block_nbytes
        n, n_blocks = block // n_streams, nbytes // block
        streams = np.empty((n_blocks, n_streams, 4 + n), np.uint8)
        streams[:, :, :4] = np.array([n], "<u4").view(np.uint8)
        streams[:, :, 4:] = self.words.view(np.uint8).reshape(n_blocks, n_streams, n)
        start = _HEADER.size + 4 * n_blocks
        flags = _LZ4_FORMAT << 5 | _BIT_SHUFFLED
        sizes = nbytes, block, start + streams.nbytes
        header = _HEADER.pack(*_VERSIONS, flags, n_streams, *sizes)
        offsets = start + np.arange(n_blocks, dtype="<u4") * np.uint32(streams[0].nbytes)
        values = np.empty(nbytes // n_streams, dtype)
        _decode(memoryview(header + offsets.tobytes() + streams.tobytes()), values)
        return values


class EncodedChunks(NamedTuple):
    """The chunks of a region, row by row, as frames (uint8) that a device encodes."""

    frames: Iterator[AnyArray]


MergedMap = AnyArray | BitPlanes | EncodedChunks
"""A merged map: values, or what a chunk of it holds."""


def encode(values: AnyArray, codec: Codec) -> list[bytes]:
    """Encode C-contiguous values; return a chunk's object in parts: a frame and its CRC32C."""
    frame = _frame_of(values, codec, codec.shuffle)
    return [frame, checksum(frame).to_bytes(4, "little")]


def encode_planes(planes: BitPlanes, dtype: "np.dtype[Any]", codec: Codec) -> list[bytes]:
    """Encode values with shuffled bits: the parts that :func:`encode` returns for these values.

    Blosc does not shuffle them again, and a flag in the header says that they are shuffled. If it
    would choose other blocks, or not compress them, they are encoded as values.
    """
    if codec.shuffle == BIT_SHUFFLE:
        frame = _frame_of(planes.words.view(dtype), codec, NO_SHUFFLE)
        *kind, flags, itemsize, nbytes, block, size = _HEADER.unpack_from(frame)
        if block == planes.block_nbytes and not flags & _STORED_RAW:
            flags |= _BIT_SHUFFLED
            head = _HEADER.pack(*kind, flags, itemsize, nbytes, block, size)
            rest = frame[_HEADER.size :]
            crc = checksum(rest, checksum(head))
            return [head, rest, crc.to_bytes(4, "little")]
    return encode(planes.values(dtype), codec)


def encoded_parts(frame: AnyArray, dtype: "np.dtype[Any]", codec: Codec) -> list[bytes]:
    """Return the parts of a chunk's object for a frame in streams.

    One that is larger than Blosc allows is encoded again: it stores the values as they are.
    """
    whole: memoryview = frame.data
    (nbytes,) = struct.unpack_from("<I", whole, 4)
    if len(whole) > nbytes + _HEADER.size:
        values = np.empty(nbytes // dtype.itemsize, dtype)
        _decode(whole, values)
        return encode(values, codec)
    return [whole, checksum(whole).to_bytes(4, "little")]  # type: ignore[list-item]


def _frame_of(values: AnyArray, codec: Codec, shuffle: int) -> bytes:
    """Encode as numcodecs does, which would copy the frame and hold Python's lock meanwhile."""
    blosc, compress = _numcodecs(), _blosc_compress()
    if compress is None:
        return bytes(
            blosc.Blosc(codec.cname, codec.clevel, shuffle, codec.blocksize).encode(values)
        )
    values = np.ascontiguousarray(values)
    memory = np.empty(values.nbytes + blosc.MAX_OVERHEAD, np.uint8)
    sizes = values.itemsize, values.nbytes, values.ctypes.data
    target, name = (memory.ctypes.data, memory.nbytes), codec.cname.encode()
    n = compress(codec.clevel, shuffle, *sizes, *target, name, codec.blocksize, 1)
    if n <= 0:
        raise RuntimeError(f"Blosc cannot encode {values.nbytes} bytes with {codec}: error {n}")
    return memory.data[:n]  # type: ignore[return-value]  # used as bytes are


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
        if checksum(encoded) != _CRC_OF_DATA_WITH_ITS_CRC:
            raise ValueError("its CRC32C does not match its bytes")
        self._frame = encoded[:-4]
        self.checksum = int.from_bytes(encoded[-4:], "little")
        """CRC32C of the frame, as stored."""
        self.encoded_nbytes = len(encoded)
        *self._kind, decoded, self._block_nbytes, size = _HEADER.unpack_from(encoded)
        if decoded != nbytes or size != len(self._frame):
            raise ValueError(f"expected {nbytes} bytes decoded, got {decoded}")
        self._nbytes = nbytes

    def check_place(self, checksum: int) -> None:
        """Raise ``ValueError`` unless this is the chunk that a manifest states for its place."""
        if self.checksum != checksum:
            raise ValueError(
                f"expected the chunk with the CRC32C {checksum:08x} that was written here, got an "
                f"intact one with {self.checksum:08x}, which belongs elsewhere"
            )

    @cached_property
    def n_blocks(self) -> int:
        """Number of blocks that can be decoded separately; 1 if only the whole chunk can."""
        block, is_raw = self._block_nbytes, self._kind[2] & _STORED_RAW
        if block < _SMALLEST_BLOCK or self._nbytes % block or is_raw or self._frame.readonly:
            return 1
        n_blocks = self._nbytes // block
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

    @property
    def blocks(self) -> LZ4Blocks | None:
        """The blocks for decoders that unshuffle, too; None: only numcodecs decodes the chunk.

        The table of blocks is inside of the frame; its content is not checked.
        """
        found = _blocks_of(*self._kind, self._nbytes, self._block_nbytes)
        is_whole = found is not None and len(self._frame) >= _HEADER.size + 4 * found.n
        return found if is_whole else None

    def streams(self, find: FindStreams) -> LZ4Streams | None:
        """Return the streams of :attr:`blocks`, if it has some, all of them inside of the frame.

        ``find`` is :func:`ocelot_em.kernels.streams.find_streams`.
        """
        if (blocks := self.blocks) is None:
            return None
        table = np.empty((blocks.n * blocks.n_streams, 4), np.int64)
        frame = np.frombuffer(self._frame, np.uint8)
        n = find(frame, self._nbytes, blocks.nbytes, blocks.n_streams, table)
        return LZ4Streams(table[:n], blocks.nbytes, blocks.itemsize, blocks.bits) if n else None

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


@lru_cache
def _blocks_of(
    version: int, lz4_version: int, flags: int, itemsize: int, nbytes: int, block: int
) -> LZ4Blocks | None:
    """Return the blocks of frames with such a header."""
    is_shuffled = flags & (_SHUFFLED | _BIT_SHUFFLED) in (_SHUFFLED, _BIT_SHUFFLED)
    is_raw, unit = flags & _STORED_RAW, 8 * itemsize
    if flags >> 5 != _LZ4_FORMAT or not is_shuffled or is_raw or itemsize not in (4, 8):
        return None
    if block < _SMALLEST_BLOCK or block % unit or nbytes % unit:
        return None
    if bytes([version, lz4_version]) != _VERSIONS:
        return None
    is_split = not flags & _WHOLE_BLOCKS and block // itemsize >= _MIN_STREAM_VALUES
    n, n_streams = ceil_div(nbytes, block), itemsize if is_split else 1
    bits, are_alike = bool(flags & _BIT_SHUFFLED), nbytes % block == 0
    return LZ4Blocks(n, block, n_streams, itemsize, bits, are_alike)


def _decode(frame: memoryview, out: AnyArray) -> None:
    try:
        _numcodecs().decompress(frame, out)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
