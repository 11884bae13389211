"""The independently compressed parts of a chunk, for decoders that take many of them at a time."""

from typing import NamedTuple

from ocelot_em.model.maps import AnyArray


class LZ4Streams(NamedTuple):
    """The LZ4 streams of a Blosc frame, and how the values are shuffled that they contain.

    ``table`` (int64, shape n x 4) has for each stream its offset and size in the frame, and its
    offset and size in the decoded, still shuffled chunk, all in bytes. If both sizes are equal, the
    stream is not compressed. Bytes are shuffled, or ``bits``, in blocks of ``block_nbytes``.
    """

    table: AnyArray
    block_nbytes: int
    itemsize: int
    bits: bool


class LZ4Blocks(NamedTuple):
    """The blocks of a Blosc frame, ``n`` of ``nbytes`` decoded bytes, in ``n_streams`` each.

    Bytes of values are shuffled, or ``bits``. Unless they ``are_alike``, the last block is shorter.
    """

    n: int
    nbytes: int
    n_streams: int
    itemsize: int
    bits: bool
    are_alike: bool
