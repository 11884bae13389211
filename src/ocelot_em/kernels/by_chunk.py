"""Merge of one map of a tile in one call: chunks are decoded block by block, and merged at once.

Every function takes the chunks of a few sources as a table of :mod:`ocelot_em.kernels.streams`, and
is called again for the next sources. A block of the merged values stays in the caches until it is
complete. There is one signature for all inputs, so that each function is compiled once.

``chunks`` are: ``tools``, the address of LZ4's function, and memory for decoded streams and for
values that are joined; the rows of the table; the pixels of the piece and those of a block; and
``found``, the output, one number for each row: :data:`SUSPECT` or :data:`CORRUPT`. ``position`` is
the width of the piece and its valid (rows, columns).
"""

from typing import Any

import numpy as np

from ocelot_em.kernels.by_map import (
    add,
    count_unsearched,
    number_winners,
    update_winner,
    update_winner_indexed,
)
from ocelot_em.kernels.collect import add_and_measure, count_pixels, count_wins
from ocelot_em.kernels.compiling import compiled, on_stack, plane
from ocelot_em.kernels.cpu_statistics import compute
from ocelot_em.kernels.streams import (
    ENCODED,
    ITEMSIZE,
    RUN,
    decode_bytes,
    decode_planes,
    values_at,
)

SUSPECT, CORRUPT = np.int32(1), np.int32(2)
"""A value may be unusable; a stream cannot be decoded, and the call has ended."""

_LANES = 64
"""Pixels in a word of a plane of bits."""


@compiled
def fold_winners(chunks: Any, sources: Any, kept: Any, wins: Any) -> int:
    """Find the winners of the sources; return the number of unsearched pixels after the last ones.

    Parameters
    ----------
    chunks
        Chunks of ``mip``; if poses are indexed, each is followed by that of the indices.
    sources
        Number of the first source of this call, whether it has the last one, the number of poses (0
        if they are explicit), and the number of the first partial of every source.
    kept
        ``mip``, index, winner and number of the partial.
    wins
        Whether wins are counted, the position of the piece, and the counts of all partials.
    """
    (lz4, streams, joined), rows, (n_pixels, n), found = chunks
    (first_number, is_last, n_poses, firsts), (mip, index, winner, best_partial) = sources, kept
    (is_counted, (width, valid), won), n_maps = wins, 2 if n_poses else 1
    target, run, bad, unsearched = streams.ctypes.data, joined.ctypes.data, np.int32(0), 0
    parts = on_stack(16, np.int64)
    for start in range(0, n_pixels, n):
        m = min(n, n_pixels - start)
        for k in range(0, len(rows), n_maps):
            for j in range(k, k + n_maps):
                to = target + (j - k) * 4 * n
                own = parts[8 * (j - k) :]
                if rows[j, ENCODED] and not decode_bytes(lz4, rows[j], start // n, n, to, own):
                    found[j] = CORRUPT
                    return 0
            number, is_first = np.int16(first_number + k // n_maps), first_number + k == 0
            for at in range(0, m, RUN):
                some = min(RUN, m - at)
                here = slice(start + at, start + at + some)
                address = values_at(rows[k], parts, start, at, some, run)
                new = plane(address, np.float32, 0, some)
                if n_poses:
                    to = run + 4 * min(RUN, n)
                    address = values_at(rows[k + 1], parts[8:], start, at, some, to)
                    new_index = plane(address, np.int32, 0, some)
                    into = mip[here], index[here], winner[here]
                    bad = update_winner_indexed(
                        new, new_index, number, is_first, np.int32(n_poses), into
                    )
                else:
                    bad = update_winner(new, number, is_first, mip[here], winner[here])
                if bad:
                    found[k] = SUSPECT
        if is_last:
            here = slice(start, start + m)
            unsearched += count_unsearched(winner[here])
            number_winners(winner[here], firsts, best_partial[here])
            if is_counted:
                count_wins(best_partial[here], (start, width, valid), won)
    return unsearched


@compiled
def fold_sums(
    chunks: Any, first_number: int, total: Any, moments: Any, finish: Any, counting: Any
) -> Any:
    """Add sums in float64; complete each block that has all of them.

    Parameters
    ----------
    first_number
        Number of the first source of this call.
    moments
        Whether statistics are collected, the position of the piece, moments by source and kind of
        sums, and the kind of these.
    finish
        Whether this call has the last chunks of the last sums, and the arguments of
        :func:`ocelot_em.kernels.cpu_statistics.compute` for the whole piece.
    counting
        Arguments of :func:`ocelot_em.kernels.collect.count_pixels`: axes, outputs, and candidates.

    Returns
    -------
    int
        Number of candidates.
    """
    (is_counted, (width, valid), _), (is_last, computing) = moments, finish
    (_tools, _rows, (n_pixels, n), _found), (inputs, _, targets, _) = chunks, computing
    axes, into, (level, where, n_candidates) = counting
    for start in range(0, n_pixels, n):
        m = min(n, n_pixels - start)
        if not _add_block(chunks, (start, m), first_number, total, moments):
            break
        if is_last:
            compute(start, m, computing)
        if is_last and is_counted:
            maps = (
                plane(inputs[0], np.float32, start, m),
                plane(targets[0], np.float32, start, m),
                plane(targets[2], np.float32, start, m),
            )
            found = level, where, n_candidates
            n_candidates = count_pixels(maps, (start, width, valid), axes, into, found)
    return n_candidates


@compiled
def _add_block(chunks: Any, block: Any, first_number: int, total: Any, moments: Any) -> bool:
    ((lz4, streams, joined), rows, (_, n), found), (start, m) = chunks, block
    is_counted, (width, valid), (into, kind) = moments
    target, run, parts = streams.ctypes.data, joined.ctypes.data, on_stack(8, np.int64)
    for k in range(len(rows)):
        row, is_first, bad = rows[k], first_number + k == 0, np.int32(0)
        if row[ENCODED] and not decode_bytes(lz4, row, start // n, n, target, parts):
            found[k] = CORRUPT
            return False
        for at in range(0, m, RUN):
            some = min(RUN, m - at)
            address = values_at(row, parts, start, at, some, run)
            own = total[start + at : start + at + some]
            position = start + at, width, valid
            if row[ITEMSIZE] == 4:
                new = plane(address, np.float32, 0, some)
                if is_counted:
                    bad |= add_and_measure(
                        new, own, is_first, position, into[first_number + k, kind]
                    )
                else:
                    bad |= add(new, is_first, own)
            else:
                wide = plane(address, np.float64, 0, some)
                if is_counted:
                    bad |= add_and_measure(
                        wide, own, is_first, position, into[first_number + k, kind]
                    )
                else:
                    bad |= add(wide, is_first, own)
        if bad:
            found[k] = SUSPECT
    return True


@compiled
def plane_winners(winner: Any, planes: Any) -> None:
    """Write the bits of the winners' numbers to planes, lowest bit first.

    There is a plane for each bit that a number may have, and a last one, set where there is no
    winner. Pixels are the bits of 64-bit words, lowest first.
    """
    for p in range(len(planes)):
        bit = np.int16(p if p < len(planes) - 1 else 15)
        words = planes[p]
        for w in range(words.size):
            word = np.uint64(0)
            own = winner[w * _LANES : (w + 1) * _LANES]
            for i in range(_LANES):
                word |= np.uint64((own[i] >> bit) & 1) << np.uint64(i)
            words[w] = word


@compiled
def fold_planes(chunks: Any, first_number: int, winners: Any, kept: Any) -> None:
    """Take float32 values where their source won, as planes of bits.

    ``winners`` are planes of :func:`plane_winners`; ``kept`` are words, block by block 32 planes.
    """
    (lz4, streams, masks), rows, (n_pixels, n), found = chunks
    target, words, parts = streams.ctypes.data, n // _LANES, on_stack(8, np.int64)
    mask = plane(masks.ctypes.data, np.uint64, 0, words)
    for block in range(n_pixels // n):
        own_winners = winners[:, block * words : (block + 1) * words]
        start = block * 32 * words
        for k in range(len(rows)):
            is_first = first_number + k == 0
            own = kept.ctypes.data + 8 * start if is_first else target
            if not decode_planes(lz4, rows[k], block, n, own, parts):
                found[k] = CORRUPT
                return
            new = plane(own, np.uint64, 0, 32 * words)
            if _any_not_finite(new, words):
                found[k] = SUSPECT
            if not is_first:  # the first one's values are correct wherever no other wins
                _won_by(own_winners, first_number + k, mask)
                for p in range(32):
                    here = slice(start + p * words, start + (p + 1) * words)
                    _take(new[p * words : (p + 1) * words], mask, kept[here])


@compiled
def _won_by(winners: Any, number: int, mask: Any) -> None:
    unsearched = winners[len(winners) - 1]
    for w in range(mask.size):
        mask[w] = ~unsearched[w]
    for p in range(len(winners) - 1):
        plane_of_bit, flip = winners[p], np.uint64(0) if number >> p & 1 else ~np.uint64(0)
        for w in range(mask.size):
            mask[w] &= plane_of_bit[w] ^ flip


@compiled
def _take(new: Any, mask: Any, kept: Any) -> None:
    for w in range(kept.size):
        old = kept[w]
        kept[w] = old ^ ((old ^ new[w]) & mask[w])


@compiled
def _any_not_finite(planes: Any, words: int) -> Any:
    found = np.uint64(0)
    a, b = planes[23 * words : 24 * words], planes[24 * words : 25 * words]
    c, d = planes[25 * words : 26 * words], planes[26 * words : 27 * words]
    e, f = planes[27 * words : 28 * words], planes[28 * words : 29 * words]
    g, h = planes[29 * words : 30 * words], planes[30 * words : 31 * words]
    for w in range(words):
        found |= a[w] & b[w] & c[w] & d[w] & e[w] & f[w] & g[w] & h[w]
    return found != 0


@compiled
def blank_planes(winners: Any, n: int, kept: Any) -> None:
    """Set NaN where there is no winner."""
    words, unsearched = n // _LANES, winners[len(winners) - 1]
    for start in range(0, unsearched.size, words):
        own = unsearched[start : start + words]
        for p in range(32):
            values = kept[32 * start + p * words : 32 * start + (p + 1) * words]
            if 22 <= p < 31:
                for w in range(words):
                    values[w] |= own[w]
            else:
                for w in range(words):
                    values[w] &= ~own[w]


@compiled
def values_in_planes(kept: Any, n: int, where: Any, out: Any) -> None:
    """Look up the bits of 32-bit values by their pixels, in planes of blocks of ``n`` pixels."""
    words = n // _LANES
    for i in range(where.size):
        block, at = divmod(where[i], n)
        word, shift = block * 32 * words + at // _LANES, np.uint64(at % _LANES)
        value = np.uint32(0)
        for p in range(32):
            bit = (kept[word + p * words] >> shift) & np.uint64(1)
            value |= np.uint32(np.uint32(bit) << np.uint32(p))
        out[i] = value
