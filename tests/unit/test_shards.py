"""Partials whose maps are one file each."""

import struct

import numpy as np
import pytest
import zarr

from ocelot_em import PartialWriter, Region, check
from ocelot_em.errors import CorruptChunkError, MissingChunkError
from ocelot_em.store.blosc import checksum
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import open_partial, read_partial_attributes

SHAPE, CHUNK = (70, 90), 32
NAMES = (
    *("best_pixel_size", "mip", "best_phi", "best_theta", "best_psi", "best_defocus"),
    *("correlation_sum", "correlation_squared_sum"),
)


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setattr("ocelot_em.store.constants.DEFAULT_CHUNK", CHUNK)
    values = np.random.default_rng(0).normal(9, 1, (len(NAMES), *SHAPE)).astype(np.float32)
    maps = dict(zip(NAMES, values, strict=True))
    maps["correlation_squared_sum"] *= 1000
    store = tmp_path / "s.zarr"
    writer = PartialWriter(store, "p0", SHAPE, total_projections=10)
    writer.in_shards()
    with writer:
        for top in (64, 0, 32):  # in any order
            rows = Region(top, min(top + CHUNK, SHAPE[0]), 0, SHAPE[1])
            writer.write(rows, {name: maps[name][rows.slices] for name in NAMES})
    return store, maps


def _opened(store):
    objects = open_objects(store)
    return open_partial(objects, "p0", "", read_partial_attributes(objects, "p0", "")).open(NAMES)


def test_each_map_is_one_file_that_zarr_reads(written):
    store, maps = written
    group = zarr.open_group(store / "partials/p0", mode="r")
    opened = _opened(store)
    for name, values in maps.items():
        files = [f for f in (store / "partials/p0" / name).rglob("*") if f.is_file()]
        assert sorted(f.name for f in files) == ["0", "zarr.json"]
        np.testing.assert_array_equal(group[name][...], values)
        part = Region(5, 69, 30, 88)
        np.testing.assert_array_equal(opened[name].read(part)[0], values[part.slices])
    assert check(store) == []


def _with_entries(content, change):
    """Change the index of nine chunks, which keeps a right checksum."""
    entries = [list(struct.unpack_from("<2Q", content, 16 * n)) for n in range(9)]
    change(entries)
    index = b"".join(struct.pack("<2Q", *entry) for entry in entries)
    return index + checksum(index).to_bytes(4, "little") + content[148:]


def _swap(entries):
    entries[0], entries[1] = entries[1], entries[0]


def _set(*entry):
    return lambda entries: entries.__setitem__(0, entry)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda _: None, MissingChunkError, "is missing"),
        (lambda c: c[:100], CorruptChunkError, "index of the shard is truncated"),
        (lambda c: b"\1" + c[1:], CorruptChunkError, "its CRC32C does not match"),
        (lambda c: c[:200], CorruptChunkError, "truncated"),
        (lambda c: _with_entries(c, _swap), CorruptChunkError, "belongs elsewhere"),
        (lambda c: _with_entries(c, _set(2**64 - 1, 2**64 - 1)), MissingChunkError, "is missing"),
        (lambda c: _with_entries(c, _set(2**63, 99)), CorruptChunkError, "behind the index"),
        (lambda c: _with_entries(c, _set(148, 2**40)), CorruptChunkError, "at most"),
        (lambda c: _with_entries(c, _set(2**61, 99)), CorruptChunkError, "truncated"),
        (lambda c: _with_entries(c, _set(0, 99)), CorruptChunkError, "behind the index"),
    ],
)
def test_a_shard_that_was_changed_is_refused(written, damage, error, message):
    store, _ = written
    file = store / "partials/p0/mip/c/0/0"
    content = damage(file.read_bytes())
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        _opened(store)["mip"].read(Region(0, 32, 0, 32))
    for place in (str(store), "p0", "mip", "chunk (0, 0)"):
        assert place in str(caught.value)


def _interrupted(writer, rows, maps):
    with writer:
        writer.write(rows, {name: maps[name][rows.slices] for name in NAMES})
        raise OSError("search failed")


def test_a_writer_that_fails_leaves_no_shard(written):
    store, maps = written
    writer = PartialWriter(store, "p1", SHAPE, total_projections=10)
    writer.in_shards()
    with pytest.raises(OSError, match="search failed"):
        _interrupted(writer, Region(0, 32, 0, SHAPE[1]), maps)
    files = [f.name for f in (store / "partials/p1").rglob("*") if f.is_file()]
    assert {*files} == {"zarr.json"}
