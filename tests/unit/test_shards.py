"""Partials whose maps are files of many chunks."""

import shutil
import struct
from dataclasses import replace

import numpy as np
import pytest
import zarr

from helpers import chunk_bytes
from ocelot_em import PartialWriter, Region, SearchInfo, check, merge, write_partial
from ocelot_em.errors import CorruptChunkError, FormatError, MissingChunkError, PlanError
from ocelot_em.merge.forecast import require_resources
from ocelot_em.merge.resume import prepare
from ocelot_em.model.options import MergeOptions
from ocelot_em.store import arrays, local
from ocelot_em.store.blosc import checksum
from ocelot_em.store.metadata import parse_array
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import MapGroup, open_partial, read_partial_attributes

SHAPE, CHUNK = (70, 90), 32
NAMES = (
    *("best_pixel_size", "mip", "best_phi", "best_theta", "best_psi", "best_defocus"),
    *("correlation_sum", "correlation_squared_sum"),
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Maps of 3 x 3 chunks in 2 x 2 shards."""
    monkeypatch.setattr("ocelot_em.store.constants.DEFAULT_CHUNK", CHUNK)
    monkeypatch.setattr("ocelot_em.store.constants.SHARD_CHUNKS", 2)


def _maps(seed=0):
    values = np.random.default_rng(seed).normal(9, 1, (len(NAMES), *SHAPE)).astype(np.float32)
    maps = dict(zip(NAMES, values, strict=True))
    maps["correlation_squared_sum"] *= 1000
    return maps


@pytest.fixture
def written(tmp_path):
    maps, store = _maps(), tmp_path / "s.zarr"
    with PartialWriter(store, "p0", SHAPE, total_projections=10) as writer:
        for top in (64, 0, 32, 64):  # in any order, and more than once
            rows = Region(top, min(top + CHUNK, SHAPE[0]), 0, SHAPE[1])
            writer.write(rows, {name: maps[name][rows.slices] for name in NAMES})
    return store, maps


def _opened(store):
    objects = open_objects(store)
    return open_partial(objects, "p0", "", read_partial_attributes(objects, "p0", "")).open(NAMES)


def _files(store):
    return sorted(str(p.relative_to(store)) for p in store.rglob("*") if p.is_file())


def test_each_map_is_few_files_that_zarr_reads_and_that_stay_open(written, monkeypatch):
    store, maps = written
    group = zarr.open_group(store / "partials/p0", mode="r")
    opened, n_opened = _opened(store), []
    open_to_read = local.LocalObjects._open_to_read
    monkeypatch.setattr(
        *(local.LocalObjects, "_open_to_read"),
        lambda self, key: n_opened.append(key) or open_to_read(self, key),
    )
    for name, values in maps.items():
        shards = [f"c/{y}/{x}" for y in range(2) for x in range(2)]
        assert _files(store / "partials/p0" / name) == [*shards, "zarr.json"]
        np.testing.assert_array_equal(group[name][...], values)
        part = Region(5, 69, 30, 88)
        for _ in range(2):
            np.testing.assert_array_equal(opened[name].read(part)[0], values[part.slices])
    of_shards = [key for key in n_opened if "/c/" in key and "manifest" not in key]
    assert len(of_shards) == len({*of_shards}) == 4 * len(NAMES)
    assert check(store) == []


def test_no_more_files_stay_open_than_may(written, monkeypatch):
    store, maps = written
    before = len(local._RangeFile.kept)
    monkeypatch.setattr(local, "_max_kept", lambda: before + 3)
    opened = _opened(store)
    for _ in range(2):
        for name, values in maps.items():
            np.testing.assert_array_equal(opened[name].read(Region.whole(SHAPE))[0], values)
    assert len(local._RangeFile.kept) == before + 3
    del opened
    assert len(local._RangeFile.kept) == before


def test_shards_and_files_of_chunks_merge_to_the_same_bytes(tmp_path):
    merged = {}
    for name, chunk_files in {"S": (False, False), "P": (True, True), "M": (False, True)}.items():
        for number, separate in enumerate(chunk_files):
            write_partial(
                *(tmp_path / name, f"p{number}", _maps(number)),
                total_projections=10 + number,
                order=number,
                search=SearchInfo(chunk_files=separate),
            )
            per_map = 9 if separate else 4
            folder = tmp_path / name / f"partials/p{number}"
            assert len(_files(folder)) == len(NAMES) * (per_map + 1) + 4  # and the manifest
        merge(tmp_path / name, tmp_path / f"{name}_OUT")
        merged[name] = chunk_bytes(tmp_path / f"{name}_OUT")
        cost = prepare([tmp_path / name], tmp_path / f"{name}_OUT", MergeOptions()).forecast
        everything = [*(tmp_path / f"{name}_OUT").rglob("*")]
        assert cost.n_files == len(_files(tmp_path / f"{name}_OUT"))
        assert cost.n_inodes == len(everything) + 1
    assert merged["S"] == merged["P"] == merged["M"]
    few = replace(cost, n_done=0, free_inodes=cost.n_inodes - 1)
    with pytest.raises(PlanError, match=f"about {cost.n_inodes:,} more files and folders"):
        require_resources(few, str(tmp_path / "OUT"), 1, 2**60)


def _with_entries(content, change):
    """Change the index of four chunks, which keeps a right checksum."""
    entries = [list(struct.unpack_from("<2Q", content, 16 * n)) for n in range(4)]
    change(entries)
    index = b"".join(struct.pack("<2Q", *entry) for entry in entries)
    return index + checksum(index).to_bytes(4, "little") + content[68:]


def _swap(entries):
    entries[0], entries[1] = entries[1], entries[0]


def _set(*entry):
    return lambda entries: entries.__setitem__(0, entry)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda _: None, MissingChunkError, "is missing"),
        (lambda c: c[:50], CorruptChunkError, "index of the shard is truncated"),
        (lambda c: b"\1" + c[1:], CorruptChunkError, "its CRC32C does not match"),
        (lambda c: c[:100], CorruptChunkError, "truncated"),
        (lambda c: _with_entries(c, _swap), CorruptChunkError, "belongs elsewhere"),
        (lambda c: _with_entries(c, _set(2**64 - 1, 2**64 - 1)), MissingChunkError, "is missing"),
        (lambda c: _with_entries(c, _set(2**63, 99)), CorruptChunkError, "behind the index"),
        (lambda c: _with_entries(c, _set(68, 2**40)), CorruptChunkError, "at most"),
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


def test_a_shard_that_is_replaced_or_deleted_while_it_is_open_is_noticed(written):
    store, maps = written
    opened, region = _opened(store)["mip"], Region(0, 32, 0, 32)
    folder = store / "partials/p0/mip/c/0"
    np.testing.assert_array_equal(opened.read(region)[0], maps["mip"][region.slices])
    shutil.copy(store / "partials/p0/best_phi/c/0/0", folder / "new")
    (folder / "new").rename(folder / "0")
    with pytest.raises(CorruptChunkError, match="mip: chunk"):
        opened.read(region)
    (folder / "0").unlink()
    with pytest.raises(MissingChunkError, match="mip: chunk"):
        opened.read(region)


def test_shards_are_of_whole_chunks_and_of_partials_only(tmp_path):
    layout, objects = arrays.map_layout("mip", SHAPE, (CHUNK, CHUNK)), open_objects(tmp_path)
    arrays.create_array(objects, "mip", replace(layout, per_shard=(2, 2)))
    with pytest.raises(FormatError, match="expected no shards of a partial in a merged result"):
        MapGroup(objects).open(("mip",))
    encoded = objects.get("mip/zarr.json")
    for shard, message in ((b"63", "of whole chunks"), (b"131072", "at most 65,536 chunks in a")):
        other = encoded.replace(b"64", shard)
        with pytest.raises(FormatError, match=f"here: .*{message}"):
            parse_array(other, "file", "here", ("float32",))


def _interrupted(writer, rows, maps):
    with writer:
        writer.write(rows, {name: maps[name][rows.slices] for name in NAMES})
        raise OSError("search failed")


def test_a_writer_that_fails_leaves_no_shard(written):
    store, maps = written
    writer = PartialWriter(store, "p1", SHAPE, total_projections=10)
    with pytest.raises(OSError, match="search failed"):
        _interrupted(writer, Region(0, 32, 0, SHAPE[1]), maps)
    assert {file.rpartition("/")[2] for file in _files(store / "partials/p1")} == {"zarr.json"}
