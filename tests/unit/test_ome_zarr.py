"""Pictures of merged maps: what viewers find in them, and that peaks are seen from any distance."""

import json
import math
import shutil
import tracemalloc
import warnings

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from builders import (
    INDEXED,
    explicit_maps,
    idle_maps,
    indexed_maps,
    same_bits,
    snapshot,
    write_explicit_search,
    write_indexed_search,
)
from helpers import read_maps
from ocelot_em import SearchInfo, merge, write_partial
from ocelot_em.errors import (
    CorruptChunkError,
    FormatError,
    InvalidInputError,
    MissingChunkError,
    OutputExistsError,
    StorageError,
    StoreNotFoundError,
)
from ocelot_em.io import ome_zarr
from ocelot_em.io.ome_zarr import pool, read_level, write_ome_zarr
from ocelot_em.model.maps import MIP, SCALED_MIP

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ome_zarr_models.v05 import Image

SHAPE, BOX = (70, 61), 8
VALID = (63, 54)


@pytest.fixture
def small_pieces(small_chunks, monkeypatch):
    """Chunks of 16 and blocks of 32 pixels, so that small maps have several levels of several."""
    monkeypatch.setattr(ome_zarr, "CHUNK", 16)
    monkeypatch.setattr(ome_zarr, "BLOCK", 32)
    return 16


@pytest.fixture(scope="module")
def merged_once(tmp_path_factory):
    """A merge of explicit partials of which the last rows and columns are not valid."""
    place = tmp_path_factory.mktemp("merged")
    info = SearchInfo(template_box=BOX, pixel_size_angstrom=2.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ocelot_em.store.constants.DEFAULT_CHUNK", 32)
        for number in range(2):
            maps = explicit_maps(SHAPE, number)
            write_partial(place / "R", f"p{number}", maps, total_projections=1000, search=info)
        merge(place / "R", place / "M", tile_size=32)
    return place


@pytest.fixture
def merged(merged_once, tmp_path, small_pieces):
    """A copy of it, beside its search."""
    shutil.copytree(merged_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "M"


def pooled_at_once(values, factor):
    """The same pooling, of a whole map in one step."""
    height, width = (math.ceil(n / factor) for n in values.shape)
    padded = np.full((height * factor, width * factor), np.nan, np.float32)
    padded[: values.shape[0], : values.shape[1]] = values
    blocks = padded.reshape(height, factor, width, factor)
    return np.fmax.reduce(np.fmax.reduce(blocks, axis=3), axis=1)


def levels(picture):
    group = zarr.open_group(picture, mode="r")
    paths = [d["path"] for d in group.attrs["ome"]["multiscales"][0]["datasets"]]
    return [np.asarray(group[path][...]) for path in paths]


def assert_is_picture(picture, expected):
    """Level 0 is what is expected, all others are its maxima, and the last one is small enough."""
    found = levels(picture)
    for level, values in enumerate(found):
        for channel, full in zip(values, expected, strict=True):
            assert same_bits(channel, pooled_at_once(full, 2**level)), level
    assert max(found[-1].shape) <= ome_zarr.CHUNK
    assert len(found) == 1 or max(found[-2].shape) > ome_zarr.CHUNK


def test_levels_are_maxima_of_the_valid_pixels(merged):
    picture = write_ome_zarr(merged, merged.parent / "P.zarr")
    z = read_maps(merged)[SCALED_MIP][: VALID[0], : VALID[1]]
    assert_is_picture(picture, [z])
    assert [values.shape for values in levels(picture)] == [(1, 63, 54), (1, 32, 27), (1, 16, 14)]


def test_a_picture_is_valid_ome_zarr(merged):
    picture = write_ome_zarr(merged, merged.parent / "P.zarr", maps=("scaled_mip", "mip"))
    image = Image.from_zarr(zarr.open_group(picture, mode="r"))
    multiscale = image.ome_attributes.multiscales[0]
    assert image.ome_attributes.version == "0.5"
    assert [(a.name, a.type, a.unit) for a in multiscale.axes] == [
        ("c", "channel", None),
        ("y", "space", "angstrom"),
        ("x", "space", "angstrom"),
    ]
    transforms = [level.coordinateTransformations for level in multiscale.datasets]
    assert [t[0].scale for t in transforms] == [[1, 2.5, 2.5], [1, 5, 5], [1, 10, 10]]
    # Centres of 1, 2 and 4 pixels, counted from the centre of the first one.
    offsets = [[0, 0, 0], [0, 1.25, 1.25], [0, 3.75, 3.75]]
    assert [t[1].translation for t in transforms] == offsets


def test_chunks_are_blosc_and_without_checksums_that_viewers_do_not_know(merged):
    group = zarr.open_group(write_ome_zarr(merged, merged.parent / "P.zarr"), mode="r")
    for _, array in group.arrays():
        codecs = [codec.to_dict()["name"] for codec in array.metadata.codecs]
        assert codecs == ["bytes", "blosc"]
        assert array.chunks == (1, 16, 16)
        assert array.metadata.dimension_names == ("c", "y", "x")
        assert array.dtype == np.float32
        assert np.isnan(array.fill_value)


def test_contrast_goes_from_the_median_to_the_peaks(merged):
    picture = write_ome_zarr(merged, merged.parent / "P.zarr")
    window = zarr.open_group(picture).attrs["ome"]["omero"]["channels"][0]["window"]
    last = levels(picture)[-1]
    assert window["start"] == pytest.approx(np.median(last))
    assert window["end"] == pytest.approx(np.percentile(last.astype("f8"), 99.99))
    assert window["min"] == last.min()
    assert window["max"] == pytest.approx(last.max())


def test_an_unknown_pixel_size_has_no_unit(tmp_path, small_pieces):
    merge(write_explicit_search(tmp_path / "R", (20, 20)), tmp_path / "M")
    picture = write_ome_zarr(tmp_path / "M", tmp_path / "P.zarr")
    multiscale = zarr.open_group(picture).attrs["ome"]["multiscales"][0]
    assert all("unit" not in axis for axis in multiscale["axes"])
    scale = multiscale["datasets"][1]["coordinateTransformations"][0]
    assert scale == {"type": "scale", "scale": [1.0, 2.0, 2.0]}
    Image.from_zarr(zarr.open_group(picture, mode="r"))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (1, 100),
        pytest.param((100, 1), marks=pytest.mark.slow),
        pytest.param((16, 16), marks=pytest.mark.slow),
        (33, 65),
        pytest.param((129, 31), marks=pytest.mark.slow),
    ],
)
def test_pixels_strips_and_uneven_shapes(tmp_path, small_pieces, shape):
    merge(write_explicit_search(tmp_path / "R", shape, 2), tmp_path / "M")
    picture = write_ome_zarr(tmp_path / "M", tmp_path / "P.zarr", maps=("mip", "scaled_mip"))
    maps = read_maps(tmp_path / "M")
    assert_is_picture(picture, [maps[MIP], maps[SCALED_MIP]])
    Image.from_zarr(zarr.open_group(picture, mode="r"))


@pytest.mark.parametrize("poses", ["decoded", "index"])
def test_indexed_searches(tmp_path, small_pieces, poses):
    merge(write_indexed_search(tmp_path / "R", SHAPE), tmp_path / "M", poses=poses)
    picture = write_ome_zarr(tmp_path / "M", tmp_path / "P.zarr")
    assert_is_picture(picture, [read_maps(tmp_path / "M")[SCALED_MIP]])


def test_pixels_that_nobody_searched_are_nan(tmp_path, small_pieces):
    maps = indexed_maps(SHAPE)
    idle = idle_maps(maps)
    for name in maps:
        maps[name][10:50, 3:45] = idle[name][10:50, 3:45]

    write_partial(tmp_path / "R", "p", maps, total_projections=1000, search=INDEXED)
    merge(tmp_path / "R", tmp_path / "M")
    picture = write_ome_zarr(tmp_path / "M", tmp_path / "P.zarr", maps=("scaled_mip", "mip"))
    full = levels(picture)[0]
    assert np.isnan(full[:, 10:50, 3:45]).all()
    assert not np.isinf(full).any()
    stored = read_maps(tmp_path / "M")
    expected = [
        stored[SCALED_MIP],
        np.where(np.isneginf(stored[MIP]), np.float32("nan"), stored[MIP]),
    ]
    assert_is_picture(picture, expected)
    assert np.isnan(levels(picture)[1][:, 5:25, 2:22]).all()


def test_a_map_that_nobody_searched_is_a_picture_too(tmp_path, small_pieces):
    idle = idle_maps(explicit_maps((20, 20)))
    write_partial(tmp_path / "R", "p", idle, total_projections=0)
    merge(tmp_path / "R", tmp_path / "M")
    picture = write_ome_zarr(tmp_path / "M", tmp_path / "P.zarr")
    assert np.isnan(levels(picture)[0]).all()
    window = json.loads((picture / "zarr.json").read_text())["attributes"]["ome"]["omero"]
    assert window["channels"][0]["window"] == {"min": 0.0, "max": 1.0, "start": 0.0, "end": 1.0}


def test_a_map_of_one_value_has_contrast(tmp_path, small_pieces):
    maps = explicit_maps((5, 5)) | {MIP: np.full((5, 5), 7, np.float32)}
    write_partial(tmp_path / "R", "p", maps, total_projections=10)
    merge(tmp_path / "R", tmp_path / "M")
    picture = write_ome_zarr(tmp_path / "M", tmp_path / "P.zarr", maps=("mip",))
    window = zarr.open_group(picture).attrs["ome"]["omero"]["channels"][0]["window"]
    assert window == {"min": 7.0, "max": 8.0, "start": 7.0, "end": 8.0}


def test_a_single_peak_is_on_every_level(tmp_path, small_pieces):
    maps = explicit_maps((130, 50))
    maps[MIP][97, 41] = 100
    write_partial(tmp_path / "R", "p", maps, total_projections=1000)
    merge(tmp_path / "R", tmp_path / "M")
    picture = write_ome_zarr(tmp_path / "M", tmp_path / "P.zarr", maps=("mip",))
    for level, values in enumerate(levels(picture)):
        assert values[0, 97 >> level, 41 >> level] == 100


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.floats(-8, 8, width=32) | st.just(float("nan")),
    )
)
def test_pooling_is_the_maximum_of_what_is_there(values):
    before = values.copy()
    assert same_bits(pool(values) + 0, pooled_at_once(values, 2) + 0)
    assert same_bits(values, before)


def test_every_pixel_of_the_store_is_read_once_and_few_at_a_time(merged, monkeypatch):
    regions = []
    read = ome_zarr.MergedResult.read

    def watched(self, region, name):
        regions.append(region)
        return read(self, region, name)

    monkeypatch.setattr(ome_zarr.MergedResult, "read", watched)
    write_ome_zarr(merged, merged.parent / "P.zarr")
    seen = np.zeros(VALID, int)
    for region in regions:
        assert max(region.shape) <= ome_zarr.BLOCK
        seen[region.slices] += 1
    assert (seen == 1).all()


@pytest.mark.alone
def test_memory_does_not_grow_with_the_map(tmp_path, monkeypatch):
    monkeypatch.setattr(ome_zarr, "CHUNK", 64)
    monkeypatch.setattr(ome_zarr, "BLOCK", 128)
    monkeypatch.setattr("ocelot_em.store.constants.DEFAULT_CHUNK", 128)
    shape = (64, 16384)
    maps = explicit_maps(shape)
    write_partial(tmp_path / "R", "p", maps, total_projections=1000)
    merge(tmp_path / "R", tmp_path / "M", tile_size=128)
    del maps
    write_ome_zarr(tmp_path / "M", tmp_path / "WARM.zarr")
    tracemalloc.start()
    try:
        picture = write_ome_zarr(tmp_path / "M", tmp_path / "P.zarr")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(levels(picture)) == 9
    assert peak < 64 * 16384 * 4 / 2


def test_an_overview_is_the_finest_level_that_fits(merged):
    picture = write_ome_zarr(merged, merged.parent / "P.zarr", maps=("mip", "scaled_mip"))
    z = read_maps(merged)[SCALED_MIP][: VALID[0], : VALID[1]]
    for longest, factor in (
        (1000, 1),
        (63, 1),
        (62, 2),
        (32, 2),
        (31, 4),
        (16, 4),
        (15, 8),
        (1, 64),
    ):
        values, found = read_level(picture, longest)
        assert found == factor
        assert same_bits(values, pooled_at_once(z, factor))
        assert max(values.shape) <= longest
    mip, _ = read_level(picture, 100, "mip")
    assert same_bits(mip, read_maps(merged)[MIP][: VALID[0], : VALID[1]])


def test_what_is_no_picture_is_refused(merged, tmp_path):
    with pytest.raises(StoreNotFoundError, match="nothing there"):
        read_level(tmp_path / "NOTHING", 100)
    with pytest.raises(FormatError, match="expected an image"):
        read_level(merged, 100)
    (tmp_path / "EMPTY").mkdir()
    with pytest.raises(FormatError, match="expected an image"):
        read_level(tmp_path / "EMPTY", 100)
    picture = write_ome_zarr(merged, tmp_path / "P.zarr")
    with pytest.raises(InvalidInputError, match="scaled_mip; got mip"):
        read_level(picture, 100, "mip")
    with pytest.raises(InvalidInputError, match="at least 1 pixel"):
        read_level(picture, 0)


def test_what_cannot_be_pooled_is_refused(merged, tmp_path):
    with pytest.raises(InvalidInputError, match="best_phi") as caught:
        write_ome_zarr(merged, "s3://bucket/P.zarr", maps=("best_phi", "mip", "mip"))
    assert len(caught.value.problems) == 3
    with pytest.raises(InvalidInputError, match="one or more"):
        write_ome_zarr(merged, tmp_path / "P.zarr", maps=())
    with pytest.raises(StoreNotFoundError):
        write_ome_zarr(tmp_path / "NOTHING", tmp_path / "P.zarr")
    assert not (tmp_path / "P.zarr").exists()


def test_only_pictures_are_overwritten(merged, tmp_path):
    picture = write_ome_zarr(merged, tmp_path / "P.zarr")
    before = snapshot(picture)
    with pytest.raises(OutputExistsError, match="already there"):
        write_ome_zarr(merged, picture)
    assert snapshot(picture) == before
    write_ome_zarr(merged, picture, maps=("mip",), overwrite=True)
    assert snapshot(picture) != before
    for other in (merged, tmp_path / "R", tmp_path / "FOLDER", tmp_path / "FILE"):
        if other.name == "FOLDER":
            other.mkdir()
        if other.name == "FILE":
            other.write_text("precious")
        with pytest.raises(OutputExistsError, match="not replaced"):
            write_ome_zarr(merged, other, overwrite=True)
    assert (tmp_path / "FILE").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["FILE", "FOLDER", "M", "P.zarr", "R"]


def test_a_failed_picture_leaves_nothing_behind(merged, tmp_path):
    picture = write_ome_zarr(merged, tmp_path / "P.zarr")
    before = snapshot(picture)
    chunk = merged / "scaled_mip" / "c" / "1" / "1"
    content = chunk.read_bytes()
    chunk.unlink()
    with pytest.raises(MissingChunkError, match=r"scaled_mip: chunk \(1, 1\)"):
        write_ome_zarr(merged, tmp_path / "Q.zarr")
    chunk.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptChunkError, match=r"scaled_mip: chunk \(1, 1\)"):
        write_ome_zarr(merged, picture, overwrite=True)
    assert snapshot(picture) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["M", "P.zarr", "R"]


def test_a_place_that_cannot_be_written_is_named(merged, tmp_path):
    (tmp_path / "FILE").touch()
    with pytest.raises(StorageError, match=r"FILE/P\.zarr: cannot be written"):
        write_ome_zarr(merged, tmp_path / "FILE" / "P.zarr")
