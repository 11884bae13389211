"""Chunks decoded and encoded by the CUDA source, on the stand-in for a device, and by numcodecs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numcodecs.blosc import Blosc

from host_device import ALL_LANES, ONE_LANE, HostDevice, LateDevice, host_kernels
from ocelot_em.kernels.cuda_codec import (
    HEADER_NBYTES,
    ChunkCodec,
    Window,
    max_frame_nbytes,
    pack,
    packed_nbytes,
)
from ocelot_em.kernels.streams import find_streams
from ocelot_em.store.blosc import BloscChunk, checksum, encode, encoded_parts

GUARD = 64

N_VALUES = 41000
"""A multiple of 8, but not of the blocks."""


@pytest.fixture(scope="module")
def device():
    host_kernels()
    return HostDevice()


def chunk_of(values, shuffle=Blosc.BITSHUFFLE, level=5, blocksize=0):
    codec = Blosc("lz4", level, shuffle, blocksize)
    return BloscChunk(memoryview(bytearray(b"".join(encode(values, codec)))), values.nbytes)


def decoded(device, chunk, values, change=None):
    """What the device makes of a chunk, and the number of malformed streams."""
    streams = chunk.streams(find_streams)
    packed = np.empty(packed_nbytes(len(chunk.frame), streams), np.uint8)
    pack(chunk.frame, streams, packed)
    if change is not None:
        table = packed[-streams.table.nbytes :].view(np.int64).reshape(-1, 4)
        change(packed[: len(chunk.frame)], table)
    guarded = np.full(values.nbytes + 2 * GUARD, 0x5A, np.uint8)
    out = guarded[GUARD:-GUARD].view(values.dtype)
    finding, back = np.zeros(1, np.int64), np.zeros(1, np.int64)
    decoder = ChunkCodec(device, max(packed.size, values.nbytes))
    decoder.decode(packed, streams, out, finding)
    device.copy_out(finding, back).synchronize()
    assert (guarded[:GUARD] == 0x5A).all()
    assert (guarded[-GUARD:] == 0x5A).all()
    return out, int(back[0])


def encoded(device, values, window, blank, codec):
    """A part of a map as the device encodes it: a frame, and the object of a chunk."""
    streams = blank.streams(find_streams)
    nbytes = int(streams.table[:, 3].sum())
    room = max_frame_nbytes(streams)
    device_codec = ChunkCodec(device, room + GUARD)
    for memory in (device_codec._packed, device_codec._shuffled, device_codec.frame):
        memory.fill(0x5A)
    device_codec.encode(values, window, streams)
    back = np.empty(room + GUARD, np.uint8)
    device.copy_out(device_codec.frame, back).synchronize()
    size = int(back[HEADER_NBYTES:][:4].view("<u4")[0])
    assert size <= room
    assert (back[size:] == 0x5A).all()
    assert (device_codec._packed[nbytes:] == 0x5A).all()
    assert (device_codec._shuffled[nbytes:] == 0x5A).all()
    frame = back[:size]
    frame[:HEADER_NBYTES] = np.frombuffer(blank.frame[:HEADER_NBYTES], np.uint8)
    return frame, b"".join(encoded_parts(frame, values.dtype, codec))


KINDS = {
    "noise": lambda rng, n: rng.standard_normal(n),
    "steps": lambda rng, n: rng.integers(0, 40, n) * 7.5,
    "runs": lambda rng, n: np.repeat(rng.integers(0, 9, n // 100 + 1), 100)[:n],
    "constant": lambda _, n: np.zeros(n),
}
ANY_KIND = KINDS | {"incompressible": lambda rng, n: rng.integers(-(2**31), 2**31, n)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["f4", "f8", "i4", "i8"])
@pytest.mark.parametrize("shuffle", [Blosc.SHUFFLE, Blosc.BITSHUFFLE], ids=["bytes", "bits"])
def test_chunks_are_those_that_numcodecs_decodes(device, kind, dtype, shuffle):
    values = KINDS[kind](np.random.default_rng(3), N_VALUES).astype(dtype)
    for blocksize in (0, 8192):
        out, n_malformed = decoded(device, chunk_of(values, shuffle, 5, blocksize), values)
        assert n_malformed == 0
        np.testing.assert_array_equal(out, values)


def test_copies_and_kernels_may_be_as_late_as_their_event(device):
    values = KINDS["steps"](np.random.default_rng(4), 4096).astype("f4")
    out, n_malformed = decoded(LateDevice(), chunk_of(values), values)
    assert n_malformed == 0
    np.testing.assert_array_equal(out, values)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (np.arange(4096, dtype="f4"), {"shuffle": Blosc.NOSHUFFLE}),
        (np.arange(1001, dtype="f4"), {}),
        (np.arange(4096, dtype="u2"), {}),
        (np.random.default_rng(5).integers(0, 2**32, 4096, np.uint32), {"level": 0}),
    ],
    ids=["not shuffled", "odd size", "two bytes", "stored as it is"],
)
def test_what_the_device_does_not_decode_is_left_to_the_host(values, options):
    assert chunk_of(values, **options).streams(find_streams) is None


@given(data=st.data())
def test_malformed_streams_are_counted_and_write_nowhere_else(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    values = KINDS[kind](rng, 8192).astype("f4")
    chunk = chunk_of(values, data.draw(st.sampled_from([Blosc.SHUFFLE, Blosc.BITSHUFFLE])), 5, 8192)

    def change(frame, table):
        for row in table[rng.integers(0, len(table), 2)]:
            own = frame[row[0] : row[0] + row[1]]
            for _ in range(3):
                own[rng.integers(0, min(own.size, 64))] = rng.integers(0, 256)

    decoded(HostDevice(), chunk, values, change)


@pytest.mark.parametrize(
    ("stream", "is_malformed"),
    [
        (b"\x10A\x01\x00" + b"\x00" * 4, True),  # ends with a match
        (b"\xf0" + b"\xff" * 200, True),  # a length without an end
        (b"\x10A\x00\x00" + b"\x10A", True),  # distance 0
        (b"\x10A\x02\x00" + b"\x10A", True),  # in front of the output
        (b"\x1fA\x01\x00" + b"\xff" * 90 + b"\x10A", True),  # more than the output holds
        (b"\x10A", True),  # less than the output holds
        (b"\x1fA\x01\x00" + b"\xff" * 7 + b"\xf2" + b"\x10B", False),  # 2048 bytes
    ],
)
def test_streams_by_hand(device, stream, is_malformed):
    values = np.arange(2048, dtype="f4")
    chunk = chunk_of(values, Blosc.SHUFFLE, 5, values.nbytes)

    def change(frame, table):
        table[0] = 0, len(stream), 0, 2048
        frame[: len(stream)] = np.frombuffer(stream, np.uint8)

    out, n = decoded(device, chunk, values, change)
    assert (n > 0) == is_malformed
    if not is_malformed:
        assert out.view(np.uint8)[0::4].tobytes() == b"A" * 2047 + b"B"


CELLS = {"blocks": (64, 96, 8192), "short last block": (20, 44, 2048), "one": (16, 40, 0)}
"""Chunks: height, width, bytes of a block."""


@pytest.mark.parametrize(
    ("lanes", "cell"),
    [*((ONE_LANE, cell) for cell in CELLS), (ALL_LANES, "short last block")],
    ids=[*CELLS, "all lanes of a warp"],
)
@given(data=st.data())
def test_encoded_chunks_are_those_that_all_decode(lanes, cell, data):
    device = HostDevice(lanes=lanes)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    height, width, blocksize = CELLS[cell]
    shape = height + 3, width + 5
    first = data.draw(st.sampled_from([(0, 0), (3, 5), (20, 30)]))
    dtype = np.dtype(data.draw(st.sampled_from(["f4", "i8", "f8", "i4"])))
    fill = np.nan if dtype.kind == "f" else -1
    kind = ANY_KIND[data.draw(st.sampled_from(sorted(ANY_KIND)))]
    values = kind(rng, shape[0] * shape[1]).astype(dtype).reshape(shape)
    codec = Blosc(
        "lz4", 5, data.draw(st.sampled_from([Blosc.SHUFFLE, Blosc.BITSHUFFLE])), blocksize
    )
    expected = np.full((height, width), fill, dtype)
    inside = values[first[0] :, first[1] :][:height, :width]
    expected[: inside.shape[0], : inside.shape[1]] = inside
    blank = chunk_of(np.full((height, width), fill, dtype), codec.shuffle, 5, blocksize)
    window = Window(shape, first, (height, width), fill)
    frame, stored = encoded(device, values, window, blank, codec)
    assert Blosc().decode(stored[:-4]) == expected.tobytes()
    assert len(stored) <= expected.nbytes + 16 + 4
    # Also the frame itself, if numcodecs would rather store these values as they are.
    whole = memoryview(bytearray(frame.tobytes() + checksum(frame.data).to_bytes(4, "little")))
    out, n_malformed = decoded(device, BloscChunk(whole, expected.nbytes), expected.reshape(-1))
    assert n_malformed == 0
    assert out.tobytes() == expected.tobytes()


def test_encoded_chunks_are_about_as_large_as_those_of_numcodecs(device):
    rng, shape = np.random.default_rng(6), (256, 512)
    cases = [
        (KINDS["steps"](rng, 2**17), Blosc.BITSHUFFLE),
        (KINDS["noise"](rng, 2**17), Blosc.SHUFFLE),
    ]
    # Repeated too far away for LZ4, whose distances have 16 bits.
    cases.append((np.tile(KINDS["noise"](rng, 70_000), 2)[: 2**17], Blosc.SHUFFLE))
    for plain, shuffle in cases:
        values = plain.astype("f4").reshape(shape)
        codec, window = Blosc("lz4", 5, shuffle), Window(shape, (0, 0), shape, 0)
        _, stored = encoded(device, values, window, chunk_of(values, shuffle), codec)
        assert Blosc().decode(stored[:-4]) == values.tobytes()
        assert len(stored) < 1.02 * len(codec.encode(values))
