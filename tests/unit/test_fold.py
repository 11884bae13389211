"""Merging a tile in memory: map by map and partial by partial, against the kernels' reference."""

from contextlib import contextmanager
from dataclasses import fields, replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numcodecs.blosc import Blosc

from ocelot_em import kernels
from ocelot_em.kernels import by_map
from ocelot_em.merge import fold as fold_module
from ocelot_em.merge.fold import Fold, PieceReport
from ocelot_em.model.maps import BEST_PARTIAL, COUNT, MIP, POSES, SQUARED_SUM, SUM, MapSet, PoseForm
from ocelot_em.model.workspace import Workspace
from ocelot_em.store.attributes import Contribution
from ocelot_em.store.blosc import BitPlanes, BloscChunk, encode, lz4_address
from ocelot_em.store.constants import shuffle_of
from ocelot_em.store.sources import Source
from ocelot_em.store.transfer import READ_TOGETHER
from stacks import (
    assert_same_bits,
    draw_partial,
    fold_each,
    map_sets,
    space_of,
    stacks,
)

REFERENCE = kernels.load("reference")


def source_of(partial, number):
    several = not isinstance(partial.best_partial, int)
    return Source(
        url="memory",
        path="" if several else f"partials/p{number}",
        name=f"p{number}",
        id=str(number),
        total_projections=partial.count if isinstance(partial.count, int) else 0,
        first_number=0 if several else number,
        contributions=(Contribution(name=f"p{number}", id=str(number), total_projections=0),),
        has_counts=not isinstance(partial.count, int),
    )


class MemoryArrival:
    def __init__(self, values, codec=None):
        self._values, self.dtype = values.reshape(-1), values.dtype
        self.chunk = None
        if codec is not None:
            frame = memoryview(bytearray(b"".join(encode(self._values, codec))))
            self.chunk = BloscChunk(frame, values.nbytes)

    def decode(self, out):
        out[...] = self._values

    def values(self, memory):
        self.decode(memory)
        return memory


class MemoryPiece:
    """Hands out the maps of partials, strictly in the order that the fold states."""

    def __init__(self, fold, partials, codec=None):
        self.announced = list(fold.order())
        self.partials, self.maps = partials, fold.maps
        self.codec = codec

    @contextmanager
    def take(self, n):
        assert n <= READ_TOGETHER
        yield [self.next_one() for _ in range(n)]

    def next_one(self):
        number, name = self.announced.pop(0)
        partial = self.partials[number]
        maps = dict(zip(self.maps.pose, partial.pose, strict=True)) | {
            MIP: partial.mip,
            SUM: partial.correlation_sum,
            SQUARED_SUM: partial.correlation_squared_sum,
            COUNT: partial.count,
            BEST_PARTIAL: partial.best_partial,
        }
        values = maps[name]
        if self.codec is None:
            return MemoryArrival(values)
        return MemoryArrival(values, self.codec(number, name, values.itemsize))


def merge(maps, partials, *, mask_nan=False, codec=None, as_planes=False):
    fold = Fold(
        [source_of(partial, number) for number, partial in enumerate(partials)],
        maps,
        space_of(maps),
        mask_nan=mask_nan,
    )
    work = Workspace(partials[0].mip.size + 3)
    for use, dtype in (("incoming", "f4"), (MIP, "f4"), (SUM, "f8"), ("winner", "i2")):
        work.array(use, dtype).fill(7)  # what an earlier tile left behind
    work.shape = partials[0].mip.shape
    piece, report = MemoryPiece(fold, partials, codec), PieceReport(as_planes=as_planes)
    merged = {}
    for name, values in fold.merge(piece, work, report):
        assert name not in merged
        if isinstance(values, BitPlanes):
            assert name in POSES
            assert as_planes
            values = values.values(np.dtype("f4")).reshape(work.shape)
        merged[name] = values.copy()
    assert piece.announced == []
    assert set(merged) == set(maps.merged)
    return merged, report


def enlarged(partial):
    """The same values again and again, in enough pixels for several blocks."""
    return replace(
        partial,
        **{
            field.name: tuple(np.resize(pose, (32, 64)) for pose in value)
            if isinstance(value, tuple)
            else np.resize(value, (32, 64))
            for field in fields(partial)
            if not isinstance(value := getattr(partial, field.name), int)
        },
    )


@given(
    stack=stacks(nan=True, max_partials=10),
    kinds=st.lists(
        st.sampled_from([None, ("lz4", 256), ("lz4", 512), ("zstd", 256), ("lz4", 96)]),
        min_size=1,
        max_size=10,
    ),
    as_planes=st.booleans(),
    exported=st.booleans(),
)
def test_map_by_map_is_partial_by_partial(stack, kinds, as_planes, exported):
    maps, partials = stack
    partials = [enlarged(partial) for partial in partials]

    def codec(number, name, itemsize):
        kind = kinds[number % len(kinds)]
        if kind is None:
            return None
        shuffle = Blosc.SHUFFLE if shuffle_of(name) == "shuffle" else Blosc.BITSHUFFLE
        return Blosc(kind[0], 5, shuffle, kind[1] * itemsize)

    acc, reports = fold_each(REFERENCE, maps, partials)
    with mock.patch.object(fold_module, "lz4_address", lz4_address if exported else int):
        merged, report = merge(maps, partials, codec=codec, as_planes=as_planes)
    for name, expected in REFERENCE.finalise(acc, maps, space_of(maps)).items():
        assert_same_bits(merged[name], expected, name)
    assert report.searched_pixels == np.count_nonzero(acc.mip > -np.inf)
    reported = {n for n, is_bad in enumerate(reports) if is_bad}
    assert reported <= set(report.suspects)
    for number in set(report.suspects) - reported:  # a pose may be NaN where nothing was searched
        assert any(np.isnan(pose).any() for pose in partials[number].pose)


@given(stack=stacks(nan=True, sets=map_sets.filter(lambda m: m.counts)))
def test_masking_nan_folds_what_is_left(stack):
    maps, partials = stack
    masked = [REFERENCE.mask_nan(partial) for partial in partials]
    acc, _ = fold_each(REFERENCE, maps, masked)
    merged, report = merge(maps, partials, mask_nan=True)
    for name, expected in REFERENCE.finalise(acc, maps, space_of(maps)).items():
        assert_same_bits(merged[name], expected, name)
    assert not report.suspects


def test_an_invalid_index_is_looked_at():
    new = np.ones(3, np.float32)
    for bad in (np.array([0, 5, 2]), np.array([0, -2, 2]), np.array([0, -1, 2])):
        kept = np.full(3, -np.inf, np.float32), np.full(3, -1, np.int32), np.full(3, -1, np.int16)
        index = bad.astype(np.int32)
        assert by_map.update_winner_indexed(new, index, np.int16(0), True, np.int32(5), kept)


def test_memory_of_a_tile_does_not_grow_with_the_partials():
    rng = np.random.default_rng(0)
    maps = MapSet(PoseForm.EXPLICIT)
    held = []
    for n in (2, 40):
        partials = [draw_partial(rng, (8, 8), maps, number) for number in range(n)]
        fold = Fold([source_of(p, i) for i, p in enumerate(partials)], maps, None, mask_nan=False)
        work = Workspace(64)
        work.shape = (8, 8)
        for _ in fold.merge(MemoryPiece(fold, partials), work, PieceReport()):
            pass
        held.append(work.nbytes)
    assert held[0] == pytest.approx(held[1], rel=0.2)
