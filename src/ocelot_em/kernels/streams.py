"""Encoded chunks as the compiled kernels read them: tables of LZ4 streams.

A Blosc frame holds blocks of ``n`` values. Where its codec is LZ4 and its values were shuffled, a
block consists of one stream for each byte of a value, which decodes to ``n`` bytes: the first bytes
of all values, then the second ones, and so on, or, of shuffled bits, eight planes of bits each.
Kernels join the bytes while they merge, and merge bits as planes.

A call takes one row for each map: the address and size of its frame, or the address of decoded
values and 0; and the bytes per value. The streams of a block are found, and checked to be inside of
the frame, when the block is decoded. LZ4's function is passed by its address, so that compiled code
which is cached on disk contains none.
"""

from typing import Any

import numpy as np

from ocelot_em.kernels.compiling import compiled, decompress, plane

ADDRESS, ENCODED, ITEMSIZE = range(3)
"""Columns of a row."""

RUN = 16384
"""Values that are joined and merged together, while they are in the first caches."""

_HEADER_NBYTES = 16
"""Bytes of a frame before its table of blocks."""


@compiled
def find_streams(frame: Any, nbytes: int, block_nbytes: int, n_split: int, table: Any) -> int:
    """Find the streams of a Blosc frame; return their number, 0 if one is not inside of the frame.

    Parameters
    ----------
    frame
        Bytes of the frame, uint8, which contain the table of its blocks.
    nbytes, block_nbytes
        Decoded size of the frame, and of its blocks but for the last one.
    n_split
        Number of streams in a block; a shorter last block has one.
    table
        Output, see :class:`ocelot_em.model.streams.LZ4Streams`.
    """
    n = 0
    for start in range(0, nbytes, block_nbytes):
        at = _int32_at(frame, _HEADER_NBYTES + 4 * (start // block_nbytes))
        decoded = min(block_nbytes, nbytes - start)
        n_streams = n_split if decoded == block_nbytes else 1
        decoded //= n_streams
        for stream in range(n_streams):
            encoded = _encoded_at(frame, at)
            if encoded == 0:
                return 0
            at += 4
            table[n, 0], table[n, 1] = at, encoded
            table[n, 2], table[n, 3] = start + stream * decoded, decoded
            at += encoded
            n += 1
    return n


@compiled
def _encoded_at(frame: Any, at: Any) -> Any:
    """Return the size of the stream whose size is stored at an offset; 0 if it is not inside."""
    if at < _HEADER_NBYTES or at + 4 > frame.size:
        return 0
    encoded = _int32_at(frame, at)
    return encoded if 0 < encoded <= frame.size - at - 4 else 0


@compiled
def _int32_at(data: Any, at: Any) -> Any:
    low = np.int64(data[at]) | np.int64(data[at + 1]) << 8 | np.int64(data[at + 2]) << 16
    number = low | np.int64(data[at + 3]) << 24
    return number - (1 << 32) if number >= 1 << 31 else number


@compiled
def decode_bytes(lz4: int, row: Any, block: int, n: int, target: int, parts: Any) -> bool:
    """Decode the streams of a block, with space for them at ``target``; False if one is corrupt.

    ``parts`` are the addresses of the decoded streams, which may be in the frame.
    """
    frame = plane(row[ADDRESS], np.uint8, 0, row[ENCODED])
    at = _int32_at(frame, _HEADER_NBYTES + 4 * block)
    for stream in range(row[ITEMSIZE]):
        nbytes = _encoded_at(frame, at)
        if nbytes == 0:
            return False
        source = row[ADDRESS] + at + 4
        parts[stream] = source
        if nbytes != n:
            parts[stream] = target + stream * n
            if decompress(lz4, source, parts[stream], nbytes, n) != n:
                return False
        at += 4 + nbytes
    return True


@compiled
def decode_planes(lz4: int, row: Any, block: int, n: int, target: int, parts: Any) -> bool:
    """Decode the streams of a block to ``target``, one after another; False if one is corrupt."""
    if not decode_bytes(lz4, row, block, n, target, parts):
        return False
    for stream in range(row[ITEMSIZE]):
        if parts[stream] != target + stream * n:
            stored = plane(parts[stream], np.uint8, 0, n)
            copied = plane(target, np.uint8, stream * n, n)
            for i in range(n):  # an assignment of whole arrays takes a second more to compile
                copied[i] = stored[i]
    return True


@compiled
def values_at(row: Any, parts: Any, start: int, at: int, size: int, target: int) -> int:
    """Return the address of ``size`` values of a block that starts at value ``start``, from ``at``.

    They are joined at ``target`` from the decoded bytes at ``parts``, unless the row has values.
    """
    if row[ENCODED] == 0:
        return row[ADDRESS] + (start + at) * row[ITEMSIZE]  # type: ignore[no-any-return]
    if row[ITEMSIZE] == 4:
        _join_four(parts, at, plane(target, np.uint32, 0, size))
    else:
        _join_eight(parts, at, plane(target, np.uint64, 0, size))
    return target


@compiled
def _join_four(parts: Any, at: int, out: Any) -> None:
    a, b = plane(parts[0], np.uint8, at, out.size), plane(parts[1], np.uint8, at, out.size)
    c, d = plane(parts[2], np.uint8, at, out.size), plane(parts[3], np.uint8, at, out.size)
    for i in range(out.size):
        low = np.uint32(a[i]) | np.uint32(np.uint32(b[i]) << np.uint32(8))
        high = np.uint32(np.uint32(c[i]) << np.uint32(16))
        out[i] = low | high | np.uint32(np.uint32(d[i]) << np.uint32(24))


@compiled
def _join_eight(parts: Any, at: int, out: Any) -> None:
    for stream in range(8):
        own, shift = plane(parts[stream], np.uint8, at, out.size), np.uint64(8 * stream)
        for i in range(out.size):
            before = np.uint64(0) if stream == 0 else out[i]
            out[i] = before | np.uint64(own[i]) << shift
