"""Chunks: what we write zarr reads, what zarr writes we read, and damage never passes unseen."""

import contextlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec

from builders import flip_byte, same_bits, snapshot, write_explicit_search
from ocelot_em import merge, open_merged
from ocelot_em.errors import (
    ChunkError,
    CorruptChunkError,
    FormatError,
    MissingChunkError,
    StorageError,
)
from ocelot_em.model.maps import COUNT, INDEX, MAPS, MIP
from ocelot_em.model.regions import Region, TileGrid
from ocelot_em.store import arrays as store
from ocelot_em.store import groups
from ocelot_em.store.objects import open_objects
from ocelot_em.store.tables import read_table, write_table

NAMES = [MIP, INDEX, COUNT]
PLACE = "RUN.zarr: partial 'gpu0': mip"

sizes = st.one_of(
    st.sampled_from([(1, 1), (1, 37), (37, 1)]), st.tuples(st.integers(1, 40), st.integers(1, 40))
)
chunks = st.tuples(st.integers(1, 17), st.integers(1, 17))


@contextlib.contextmanager
def empty_objects():
    """A store of its own for each drawn example."""
    with tempfile.TemporaryDirectory() as folder:
        yield open_objects(folder)


def random_map(name, shape, seed=0):
    rng = np.random.default_rng(seed)
    dtype = np.dtype(MAPS[name].dtypes[0])
    values = rng.integers(-100, 100, shape)
    return (values / 8).astype(dtype) if dtype.kind == "f" else values.astype(dtype)


def open_as(objects, name, path="m"):
    return store.open_map(objects, path, PLACE, MAPS[name].dtypes)


def written(objects, name, values, chunk):
    store.create_map(objects, "m", name, values.shape, chunk)
    chunked = open_as(objects, name)
    chunked.write(Region.whole(values.shape), values)
    return chunked


def zarr_array(objects, **changes):
    """An array as zarr itself makes it, with our codecs unless changed."""
    arguments = {
        "name": "m",
        "shape": (8, 10),
        "chunks": (4, 5),
        "dtype": "float32",
        "filters": None,
        "serializer": BytesCodec(endian="little"),
        "compressors": [BloscCodec(typesize=4, cname="lz4", shuffle="bitshuffle"), Crc32cCodec()],
        "fill_value": np.nan,
        "dimension_names": ("y", "x"),
        "config": {"write_empty_chunks": True},
    } | changes
    return zarr.create_array(objects.url, **arguments)


# What is written is read


@given(st.sampled_from(NAMES), sizes, chunks)
def test_zarr_reads_what_we_write(name, shape, chunk):
    values = random_map(name, shape)
    with empty_objects() as objects:
        chunked = written(objects, name, values, chunk)
        array = zarr.open_array(objects.url, path="m", mode="r")
        assert same_bits(array[...], values)
        assert array.metadata.dimension_names == ("y", "x")
        assert objects.sizes("m/c").keys() == {chunked.key(cell) for cell in chunked.grid}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("per_shard", [None, (2, 3)])
def test_metadata_are_those_that_zarr_writes(name, per_shard):
    layout = replace(store.map_layout(name, (100, 90), (32, 40)), per_shard=per_shard)
    typesize = np.dtype(layout.dtype).itemsize
    blosc = BloscCodec(
        typesize=typesize, cname="lz4", clevel=5, shuffle=layout.shuffle, blocksize=0
    )
    with empty_objects() as objects:
        store.create_array(objects, "ours", layout)
        zarr_array(
            objects,
            name="zarrs",
            shape=layout.shape,
            chunks=layout.chunk,
            shards={"shape": (64, 120), "index_location": "start"} if per_shard else None,
            dtype=layout.dtype,
            compressors=[blosc, Crc32cCodec()],
            fill_value=layout.fill,
            attributes=layout.attributes,
        )
        assert objects.get("ours/zarr.json") == objects.get("zarrs/zarr.json")


@given(sizes, chunks)
def test_we_read_what_zarr_writes(shape, chunk):
    values = random_map(MIP, shape)
    with empty_objects() as objects:
        zarr_array(objects, shape=shape, chunks=chunk)[...] = values
        assert same_bits(open_as(objects, MIP).read(Region.whole(shape))[0], values)


@given(sizes, chunks, st.data())
def test_any_region_is_read_like_a_slice_into_given_memory_or_new(shape, chunk, data):
    y0, y1 = sorted(data.draw(st.tuples(*[st.integers(0, shape[0])] * 2)))
    x0, x1 = sorted(data.draw(st.tuples(*[st.integers(0, shape[1])] * 2)))
    region, values = Region(y0, y1, x0, x1), random_map(MIP, shape)
    with empty_objects() as objects:
        chunked = written(objects, MIP, values, chunk)
        new, nbytes = chunked.read(region)
        mine = np.full(region.shape, 77, np.float32)
        given_back, _ = chunked.read(region, mine)
        touched = [chunked.key(tile) for tile in chunked.grid.touching(region)]
        stored = objects.sizes("m/c")
    assert given_back is mine
    assert same_bits(new, values[region.slices])
    assert same_bits(mine, values[region.slices])
    assert nbytes == sum(stored[key] for key in touched)


@given(sizes, chunks, st.randoms())
def test_a_map_written_chunk_by_chunk_in_any_order_is_the_same(shape, chunk, random):
    values = random_map(MIP, shape)
    with empty_objects() as objects:
        store.create_map(objects, "m", MIP, shape, chunk)
        chunked = open_as(objects, MIP)
        cells = list(chunked.grid)
        random.shuffle(cells)
        for cell in cells:
            # Not contiguous, and of another byte order: both are brought into the stored form.
            chunked.write(cell.region, values[cell.region.slices].astype(">f4", order="F"))
        assert same_bits(chunked.read(Region.whole(shape))[0], values)


@pytest.mark.parametrize("name", [MIP, INDEX, COUNT])
def test_constant_maps_leave_all_their_chunks_on_disk(tmp_path, name):
    fill = np.full((9, 7), MAPS[name].fill, MAPS[name].dtypes[0])
    chunked = written(open_objects(tmp_path), name, fill, (4, 4))
    assert len(snapshot(tmp_path / "m" / "c")) == 6
    assert same_bits(chunked.read(Region.whole((9, 7)))[0], fill)


def test_nan_payloads_and_signed_zeros_survive(tmp_path):
    bits = np.array([[0x7FC00001, 0xFFC12345, 0x80000000, 0x00000001, 0xFF800000]], np.uint32)
    chunked = written(open_objects(tmp_path), MIP, bits.view(np.float32), (1, 2))
    assert same_bits(chunked.read(Region.whole((1, 5)))[0].view(np.uint32), bits)


@pytest.mark.parametrize(
    "region", [Region(0, 3, 0, 5), Region(1, 4, 0, 5), Region(0, 12, 0, 5), Region(-4, 4, 0, 10)]
)
def test_a_region_that_is_not_made_of_whole_chunks_is_not_written(tmp_path, region):
    objects = open_objects(tmp_path)
    chunked = written(objects, MIP, random_map(MIP, (8, 10)), (4, 5))
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="not made of whole chunks"):
        chunked.write(region, np.zeros(region.shape, np.float32))
    assert snapshot(tmp_path) == before


# Damage


SHAPE, CHUNK = (8, 10), (4, 5)
DAMAGED = Region(4, 8, 5, 10)


@contextlib.contextmanager
def one_map():
    """A map, its values, and the file of its chunk (1, 1)."""
    with empty_objects() as objects:
        values = random_map(MIP, SHAPE)
        chunked = written(objects, MIP, values, CHUNK)
        yield chunked, values, Path(objects.url, "m/c/1/1")


def assert_refused(chunked, values, error):
    """Reading the damaged chunk fails and says where; the others are as they were."""
    with pytest.raises(error) as refusal:
        chunked.read(Region.whole(SHAPE))
    assert issubclass(error, ChunkError)
    message = str(refusal.value)
    assert all(part in message for part in (PLACE, "chunk (1, 1)", str(DAMAGED), "m/c/1/1"))
    for region in (Region(0, 4, 0, 10), Region(4, 8, 0, 5)):
        assert same_bits(chunked.read(region)[0], values[region.slices])


@given(st.data())
def test_a_flipped_byte_anywhere_in_a_chunk_is_noticed(data):
    with one_map() as (chunked, values, file):
        position = data.draw(st.integers(0, file.stat().st_size - 1))
        flip_byte(file, position, data.draw(st.integers(1, 255)))
        assert_refused(chunked, values, CorruptChunkError)


@given(st.data())
def test_a_truncated_or_empty_chunk_is_noticed(data):
    with one_map() as (chunked, values, file):
        kept = data.draw(st.integers(0, file.stat().st_size - 1))
        file.write_bytes(file.read_bytes()[:kept])
        assert_refused(chunked, values, CorruptChunkError)


def test_a_chunk_with_more_bytes_than_written_is_noticed():
    with one_map() as (chunked, values, file):
        file.write_bytes(file.read_bytes() + b"\0")
        assert_refused(chunked, values, CorruptChunkError)


@given(st.binary(min_size=16, max_size=80))
def test_foreign_bytes_with_a_right_checksum_are_noticed(frame):
    with one_map() as (chunked, values, file):
        file.write_bytes(frame + google_crc32c.value(frame).to_bytes(4, "little"))
        assert_refused(chunked, values, CorruptChunkError)


def test_a_chunk_of_another_size_is_noticed():
    with one_map() as (chunked, values, _):
        store.write_chunk(chunked.objects, chunked.key(chunked.grid.at(1, 1)), values)
        assert_refused(chunked, values, CorruptChunkError)


def test_a_deleted_chunk_is_noticed():
    with one_map() as (chunked, values, file):
        file.unlink()
        assert_refused(chunked, values, MissingChunkError)


def test_a_chunk_that_cannot_be_read_is_an_error_of_the_storage():
    with one_map() as (chunked, _, file):
        file.unlink()
        file.mkdir()
        (file / "x").touch()
        with pytest.raises((StorageError, MissingChunkError), match="m/c/1/1"):
            chunked.read(DAMAGED)


# Metadata


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        (
            {"compressors": [GzipCodec()]},
            ["codecs.1.name: expected 'blosc', got 'gzip'", "codecs.2: missing"],
        ),
        ({"compressors": None}, ["codecs.1: missing"]),
        (
            {"serializer": BytesCodec(endian="big")},
            ["codecs.0.configuration.endian: expected 'little', got 'big'"],
        ),
        ({"dtype": "float64"}, ["data_type: expected float32, got 'float64'"]),
        ({"dtype": "int32", "fill_value": 0}, ["data_type: expected float32, got 'int32'"]),
        (
            {"shape": (2, 8, 10), "chunks": (1, 4, 5), "dimension_names": ("p", "y", "x")},
            ["expected dimensions ('y', 'x'), got shape (2, 8, 10) named ('p', 'y', 'x')"],
        ),
        ({"dimension_names": None}, ["expected dimensions ('y', 'x')"]),
        ({"shards": (8, 10)}, ["index_location: expected 'start', got 'end'"]),
        (
            {"shape": (2**20, 2**20), "chunks": (2**20, 2**20)},
            ["chunk_grid: expected chunks of at most 268,435,456 bytes, got"],
        ),
        (
            {"chunk_key_encoding": {"name": "v2", "separator": "."}},
            ["chunk_key_encoding.name: expected 'default', got 'v2'"],
        ),
        (
            {"chunk_key_encoding": {"name": "default", "separator": "."}},
            ["chunk_key_encoding.configuration.separator: expected '/', got '.'"],
        ),
        (
            {"dtype": "int16", "fill_value": 0, "compressors": None, "dimension_names": None},
            ["expected dimensions", "data_type: expected float32, got 'int16'", "codecs.1"],
        ),
    ],
)
def test_foreign_arrays_are_refused_with_all_problems(tmp_path, changes, problems):
    objects = open_objects(tmp_path)
    zarr_array(objects, **changes)
    with pytest.raises(FormatError) as refusal:
        open_as(objects, MIP)
    assert str(refusal.value).startswith(PLACE)
    assert all(problem in str(refusal.value) for problem in problems)


def json_places(value, place=()):
    """Paths to everything within a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*place, key)
        if isinstance(inner, (dict, list)):
            yield from json_places(inner, (*place, key))


@given(
    st.data(),
    st.sampled_from([None, "x", -1, 0, 1.5, 10**30, [], {}, [1, 2, 3], {"name": "x"}, "delete"]),
)
def test_mangled_metadata_opens_or_is_a_format_error(data, value):
    with one_map() as (chunked, _, _):
        file = Path(chunked.objects.url, "m/zarr.json")
        metadata = json.loads(file.read_text())
        *parents, last = data.draw(st.sampled_from(list(json_places(metadata))))
        inner = metadata
        for key in parents:
            inner = inner[key]
        if value == "delete":
            del inner[last]
        else:
            inner[last] = value
        file.write_text(json.dumps(metadata))
        with contextlib.suppress(FormatError):
            open_as(chunked.objects, MIP)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{}", b"\xff", b"{", b'{"zarr_format":2}']
)
def test_metadata_that_is_no_metadata_is_a_format_error(tmp_path, content):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "zarr.json").write_bytes(content)
    objects = open_objects(tmp_path)
    with pytest.raises(FormatError):
        open_as(objects, MIP)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b"{"])
def test_a_group_that_is_no_group_is_a_format_error(tmp_path, content):
    (tmp_path / "zarr.json").write_bytes(content)
    with pytest.raises(FormatError):
        groups.group_attributes(open_objects(tmp_path), "")


def test_a_missing_array_is_a_format_error_that_names_it(tmp_path):
    with pytest.raises(FormatError, match=r"the array is missing.*m/zarr\.json"):
        open_as(open_objects(tmp_path), MIP)


def test_the_first_to_create_a_group_keeps_it(tmp_path):
    objects = open_objects(tmp_path)
    assert groups.create_group(objects, "g", {"who": "first"})
    assert not groups.create_group(objects, "g", {"who": "second"})
    assert groups.group_attributes(objects, "g") == {"who": "first"}
    assert groups.group_attributes(objects, "other") is None


# Tables


def test_tables_round_trip_with_any_dimensions(tmp_path, rng):
    objects = open_objects(tmp_path)
    for path, shape in {"a": (7, 3), "b": (5,), "c": (1,)}.items():
        values = rng.normal(size=shape).astype(np.float32)
        write_table(objects, path, values, ("i", "j")[: len(shape)])
        assert same_bits(read_table(objects, path), values)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete", "large"])
def test_a_damaged_table_is_a_format_error_that_names_it(tmp_path, damage):
    objects = open_objects(tmp_path)
    write_table(objects, "table", np.arange(50, dtype=np.float32), ("i",))
    file = tmp_path / "table" / "c" / "0"
    {
        "flip": lambda: flip_byte(file, 20),
        "truncate": lambda: file.write_bytes(file.read_bytes()[:10]),
        "empty": lambda: file.write_bytes(b""),
        "delete": file.unlink,
        "large": lambda: None,
    }[damage]()
    with pytest.raises(FormatError, match="table"):
        read_table(objects, "table", max_nbytes=100 if damage == "large" else 1000)


# Other readers


def test_xarray_opens_a_partial_and_a_merged_result(tmp_path, small_chunks):
    run, out = write_explicit_search(tmp_path / "RUN.zarr", (40, 70)), tmp_path / "OUT.zarr"
    partial = xr.open_zarr(run, group="partials/gpu1", consolidated=False)
    assert partial[MIP].dims == ("y", "x")
    assert partial["best_phi"].attrs["units"] == "degree"
    assert {values.dtype.name for values in partial.data_vars.values()} == {"float32"}
    merge(run, out)
    merged, ours = xr.open_zarr(out, consolidated=False), open_merged(out)
    assert set(merged.data_vars) == set(ours.data_vars)
    for name in ours:
        assert merged[name].dims == ours[name].dims
        assert same_bits(merged[name], ours[name])
        assert merged[name].attrs["long_name"] == ours[name].attrs["long_name"]
    assert merged.attrs["ocelot"]["kind"] == "merged"


def test_opening_a_map_says_its_grid(tmp_path):
    chunked = written(open_objects(tmp_path), MIP, random_map(MIP, SHAPE), CHUNK)
    assert chunked.grid == TileGrid(SHAPE, CHUNK)
    assert chunked.shape == SHAPE
    assert chunked.dtype == np.float32
