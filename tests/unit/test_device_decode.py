"""Chunks decoded by the CUDA source, on the stand-in for a device, against numcodecs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numcodecs.blosc import Blosc

from host_device import HostDevice, LateDevice, host_kernels
from ocelot_em.kernels.cuda_decode import ChunkDecoder, pack, packed_nbytes
from ocelot_em.kernels.streams import find_streams
from ocelot_em.store.blosc import BloscChunk, encode

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
    decoder = ChunkDecoder(device, max(packed.size, values.nbytes))
    decoder.decode(packed, streams, out, finding)
    device.copy_out(finding, back).synchronize()
    assert (guarded[:GUARD] == 0x5A).all()
    assert (guarded[-GUARD:] == 0x5A).all()
    return out, int(back[0])


KINDS = {
    "noise": lambda rng, n: rng.standard_normal(n),
    "steps": lambda rng, n: rng.integers(0, 40, n) * 7.5,
    "runs": lambda rng, n: np.repeat(rng.integers(0, 9, n // 100 + 1), 100)[:n],
    "constant": lambda _, n: np.zeros(n),
}


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
