"""Frames decoded whole and block by block, against numcodecs; damaged ones."""

import struct

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import blosc
from numcodecs.blosc import Blosc

from ocelot_em.store import blosc as module
from ocelot_em.store.blosc import BitPlanes, BloscChunk, checksum, encode, encode_planes


def stored(values, **how):
    return memoryview(bytearray(b"".join(encode(values, Blosc(**how)))))


def by_blocks(frame, like):
    out = np.empty_like(like).reshape(frame.n_blocks, -1)
    for number in np.random.default_rng(0).permutation(frame.n_blocks):
        frame.decode_block(number, out[number])
    return out.reshape(like.shape)


@given(
    seed=st.integers(0, 99),
    dtype=st.sampled_from(["f4", "f8", "i4", "i8", "i2"]),
    side=st.sampled_from([(1, 1), (1, 16), (64, 64), (256, 256), (512, 512), (100, 77)]),
    shuffle=st.sampled_from([Blosc.NOSHUFFLE, Blosc.SHUFFLE, Blosc.BITSHUFFLE]),
    cname=st.sampled_from(["lz4", "zstd", "blosclz", "zlib", "lz4hc"]),
    blocksize=st.sampled_from([0, 1024, 16384, 65536]),
    kind=st.sampled_from(["noise", "few", "zero"]),
)
def test_blocks_are_the_whole(seed, dtype, side, shuffle, cname, blocksize, kind):
    rng = np.random.default_rng(seed)
    values = {
        "noise": rng.bytes(np.dtype(dtype).itemsize * side[0] * side[1]),
        "few": rng.integers(0, 7, side).astype(dtype).tobytes(),
        "zero": np.zeros(side, dtype).tobytes(),
    }[kind]
    values = np.frombuffer(values, dtype).reshape(side)
    encoded = stored(values, cname=cname, clevel=3, shuffle=shuffle, blocksize=blocksize)
    before = bytes(encoded)
    frame = BloscChunk(encoded, values.nbytes)
    whole = np.empty_like(values)
    frame.decode(whole)
    assert whole.tobytes() == values.tobytes()
    assert by_blocks(frame, values).tobytes() == values.tobytes()
    assert bytes(encoded) == before


@given(
    st.integers(0, 99),
    st.sampled_from([0, 16384]),
    st.tuples(st.integers(0, 2**20), st.integers(0, 2**20)).map(sorted),
)
def test_a_part_is_that_part_of_the_whole(seed, blocksize, bounds):
    values = np.random.default_rng(seed).integers(0, 9, 2**18).astype(np.int32)
    start, end = bounds
    out = np.full_like(values, -1)
    frame = BloscChunk(
        stored(values, cname="lz4", clevel=3, shuffle=1, blocksize=blocksize), values.nbytes
    )
    frame.decode_part(start, end, out)
    assert out.tobytes()[start:end] == values.tobytes()[start:end]
    assert set(np.unique(out[out != values])) <= {-1}
    if blocksize and end - start < 2**19:
        assert frame.n_blocks == 16
        assert (out == -1).any()  # not everything was decoded


def test_our_chunks_have_several_blocks(rng):
    values = rng.normal(size=(1024, 1024)).astype(np.float32)
    assert BloscChunk(stored(values, cname="lz4", clevel=5, shuffle=1), values.nbytes).n_blocks == 8


def test_frames_written_by_several_threads(rng):
    values = rng.integers(0, 100, (1024, 1024)).astype(np.float32)
    blosc.set_nthreads(4)
    before = blosc.use_threads
    blosc.use_threads = True
    try:
        encoded = [stored(values, cname="lz4", clevel=5, shuffle=2) for _ in range(10)]
    finally:
        blosc.use_threads = before
    for one in encoded:
        assert by_blocks(BloscChunk(one, values.nbytes), values).tobytes() == values.tobytes()


def with_crc(data):
    return memoryview(bytearray(data + google_crc32c.value(bytes(data)).to_bytes(4, "little")))


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [(4, 12, "expected 1048576 bytes"), (12, 99, "expected 1048576 bytes")],
)
def test_sizes_that_do_not_agree_are_refused(rng, offset, value, message):
    values = rng.normal(size=(512, 512)).astype(np.float32)
    data = bytearray(stored(values, cname="lz4")[:-4])
    struct.pack_into("<I", data, offset, value)
    with pytest.raises(ValueError, match=message):
        BloscChunk(with_crc(data), values.nbytes)


def planes_of(values, block_nbytes):
    """Bit planes of values, made without Blosc."""
    bits = np.unpackbits(values.reshape(-1, block_nbytes // 4).view(np.uint8), bitorder="little")
    by_bit = bits.reshape(-1, block_nbytes // 4, 32).swapaxes(1, 2)
    packed = np.packbits(by_bit, axis=2, bitorder="little")
    return BitPlanes(packed.reshape(-1).view(np.uint64), block_nbytes)


@pytest.mark.parametrize("kind", ["angles", "noise", "zeros"])
@pytest.mark.parametrize(("block", "shuffle"), [(8192, 2), (16384, 2), (8192, 1)])
def test_bit_planes_are_encoded_as_their_values_are(rng, kind, block, shuffle):
    values = {
        "angles": rng.integers(0, 240, 2**14).astype(np.float32) * 1.5,
        "noise": np.frombuffer(rng.bytes(2**16), np.float32),  # stored as it is, not compressed
        "zeros": np.zeros(2**14, np.float32),
    }[kind]
    codec, planes = Blosc("lz4", 5, shuffle, 8192), planes_of(values, block)
    assert planes.values(values.dtype).tobytes() == values.tobytes()
    expected = b"".join(encode(values, codec))
    assert b"".join(encode_planes(planes, values.dtype, codec)) == expected


def test_checksums_without_the_lock_are_those_of_google_crc32c(rng, monkeypatch):
    data = rng.bytes(1000)
    parts = [data[:7], memoryview(data)[7:], data, memoryview(bytearray(data)), b""]
    expected = google_crc32c.value(data)
    assert (module._extend is not None) == (google_crc32c.implementation == "c")
    for extend in (module._extend, None):
        monkeypatch.setattr(module, "_extend", extend)
        assert checksum(parts[1], checksum(parts[0])) == expected
        assert [checksum(part) for part in parts[2:]] == [expected, expected, 0]


def test_a_flipped_bit_is_refused(rng):
    encoded = stored(rng.normal(size=(64, 64)).astype(np.float32))
    encoded[100] ^= 1
    with pytest.raises(ValueError, match="CRC32C"):
        BloscChunk(encoded, 64 * 64 * 4)


@given(where=st.integers(16, 16 + 4 * 32), value=st.integers(0, 2**32 - 1))
def test_wild_offsets_with_a_good_checksum_do_no_harm(where, value):
    values = np.arange(2**18, dtype=np.float32)
    data = bytearray(stored(values, cname="lz4", blocksize=8192)[:-4])
    struct.pack_into("<I", data, where, value)
    frame = BloscChunk(with_crc(data), values.nbytes)
    out = np.empty(values.size // frame.n_blocks, values.dtype)
    for number in range(frame.n_blocks):
        try:
            frame.decode_block(number, out)
        except ValueError:
            continue


@pytest.mark.parametrize("block", [0, 1, 3, 1023, 2**31, 2**32 - 1])
def test_a_table_of_blocks_that_nobody_needs_is_not_made(block):
    values = np.zeros(2**20, np.uint8)
    data = bytearray(stored(values, cname="lz4", blocksize=1024)[:-4]) + bytes(2**22)
    struct.pack_into("<I", data, 8, block)
    struct.pack_into("<I", data, 12, len(data))
    assert BloscChunk(with_crc(data), values.nbytes).n_blocks == 1


def test_read_only_bytes_are_decoded_whole(rng):
    values = rng.normal(size=(1024, 1024)).astype(np.float32)
    frame = BloscChunk(memoryview(bytes(stored(values, cname="lz4", clevel=5))), values.nbytes)
    assert frame.n_blocks == 1
    assert by_blocks(frame, values).tobytes() == values.tobytes()
