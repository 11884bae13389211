"""Leopard-EM's HDF5 file out of a merged store, and back in as one partial of a search."""

import errno
import fcntl
import shutil
import sys
import tracemalloc
import zlib

import h5py
import numpy as np
import pytest

from builders import (
    SPACE,
    explicit_maps,
    flip_byte,
    same_bits,
    snapshot,
    write_explicit_search,
    write_indexed_search,
)
from conftest import SHARED
from helpers import read_maps
from ocelot_em import SearchInfo, describe, merge, open_merged, write_partial
from ocelot_em.errors import (
    CorruptChunkError,
    InvalidInputError,
    MissingDependencyError,
    OutputExistsError,
    StorageError,
)
from ocelot_em.io import hdf5
from ocelot_em.io import leopard_maps as map_set
from ocelot_em.io.finished import import_finished
from ocelot_em.io.hdf5 import write_hdf5
from ocelot_em.io.import_options import ImportOptions
from ocelot_em.io.leopard import import_results
from ocelot_em.io.leopard_maps import OUR_NAMES
from ocelot_em.io.map_files import COUNT_FACT
from ocelot_em.io.mrc import write_mrc_set
from ocelot_em.model.maps import SCALED_MIP
from ocelot_em.model.regions import TileGrid

SHAPE, BOX, VALID = (70, 61), 8, (63, 54)
COUNT = 2001

pytestmark = pytest.mark.usefixtures("small_pieces")


def use_small_pieces(monkeypatch):
    """Chunks of 32 pixels, of 16 in files, and bands of few, so that small maps have many."""
    monkeypatch.setattr("ocelot_em.store.constants.DEFAULT_CHUNK", 32)
    monkeypatch.setattr(map_set, "LEAST_ROWS", 20)
    monkeypatch.setattr(map_set, "BAND_PX", 1500)
    monkeypatch.setattr(hdf5, "CHUNK", 16)


@pytest.fixture
def small_pieces(monkeypatch):
    use_small_pieces(monkeypatch)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """A merge of explicit partials of which the last rows and columns are not valid."""
    place = tmp_path_factory.mktemp("made")
    info = SearchInfo(template_box=BOX, pixel_size_angstrom=1.06)
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_small_pieces(monkeypatch)
        for number in range(2):
            maps, count = explicit_maps(SHAPE, number), 1000 + number
            write_partial(place / "R", f"p{number}", maps, total_projections=count, search=info)
        merge(place / "R", place / "M", tile_size=32)
        write_hdf5(place / "M", place / "RESULT.h5")
    return place


@pytest.fixture
def merged(made_once, tmp_path):
    shutil.copytree(made_once / "R", tmp_path / "R")
    return shutil.copytree(made_once / "M", tmp_path / "M")


@pytest.fixture
def file(made_once, tmp_path):
    return shutil.copy(made_once / "RESULT.h5", tmp_path / "RESULT.h5")


def read_as_leopard_does(path):
    """The attributes that its reader takes as numbers, and every map whole."""
    with h5py.File(path) as opened:
        attributes = {
            name: int(opened.attrs[name])
            for name in ("total_projections", "total_orientations", "total_defocus")
        }
        attributes["leopard_em_version"] = str(opened.attrs["leopard_em_version"])
        return attributes, {name: values[:] for name, values in opened["tensors"].items()}


def test_the_file_is_laid_out_as_leopards(merged, file):
    attributes, maps = read_as_leopard_does(file)
    assert attributes.pop("leopard_em_version").startswith("none: ocelot-em ")
    assert attributes == {"total_projections": COUNT, "total_orientations": 0, "total_defocus": 0}
    assert set(maps) == set(OUR_NAMES)
    stored = read_maps(merged)
    for name, ours in OUR_NAMES.items():
        assert same_bits(maps[name], stored[ours][: VALID[0], : VALID[1]]), name
    with h5py.File(file) as opened:
        for values in opened["tensors"].values():
            assert values.dtype == np.float32
            assert values.chunks == (16, 16)
            assert (values.compression, values.shuffle) == ("gzip", True)
        assert opened.attrs["pixel_size_angstrom"] == 1.06


@pytest.mark.parametrize("poses", ["decoded", "index"])
def test_indexed_searches_know_their_size(tmp_path, poses):
    merge(write_indexed_search(tmp_path / "R", SHAPE), tmp_path / "M", poses=poses)
    attributes, maps = read_as_leopard_does(write_hdf5(tmp_path / "M", tmp_path / "RESULT.h5"))
    assert attributes["total_orientations"] == len(SPACE.euler_angles) == 7
    assert attributes["total_defocus"] == len(SPACE.defocus_values) == 3
    expected = open_merged(tmp_path / "M").compute()
    for name, ours in OUR_NAMES.items():
        assert same_bits(maps[name], expected[ours].to_numpy()), name


@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (90, 1), (32, 32), (33, 65)])
def test_pixels_strips_and_uneven_shapes_make_the_round_trip(tmp_path, shape):
    merge(write_explicit_search(tmp_path / "R", shape), tmp_path / "M", tile_size=32)
    write_hdf5(tmp_path / "M", tmp_path / "RESULT.h5")
    done = import_finished(tmp_path / "RESULT.h5", tmp_path / "BACK")
    assert done.name == "RESULT"
    assert describe(tmp_path / "BACK").attributes.total_projections == 3003
    merge(tmp_path / "BACK", tmp_path / "BACKM")
    maps, back = read_maps(tmp_path / "M"), read_maps(tmp_path / "BACKM")
    for name in OUR_NAMES.values():
        if name != SCALED_MIP:
            assert same_bits(back[name], maps[name]), name


def test_a_file_gives_the_same_partial_as_mrc_files(merged, file, tmp_path):
    about = ImportOptions(pixel_size_offset_angstrom=0.0, name="same")
    done = import_finished(file, tmp_path / "A", about)
    assert any(note.startswith("correlation_sum") for note in done.notes)
    write_mrc_set(merged, tmp_path / "SET")
    given = ImportOptions(total_projections=(COUNT,), pixel_size_offset_angstrom=0.0, name="same")
    assert import_finished(tmp_path / "SET", tmp_path / "B", given).name == done.name
    with pytest.raises(InvalidInputError, match="content is already there as partial 'same'"):
        import_finished(tmp_path / "SET", tmp_path / "A", given.model_copy(update={"name": "new"}))
    left, right = (read_maps(tmp_path / store / "partials" / "same") for store in "AB")
    assert set(left) == set(right)
    for name, values in left.items():
        assert same_bits(values, right[name]), name
    assert describe(tmp_path / "A").attributes.pixel_size_angstrom == 1.06


def test_files_of_leopard_itself_are_read(tmp_path):
    rng = np.random.default_rng(1)
    maps = {name: rng.normal(1, 0.1, (40, 37)).astype("f4") for name in OUR_NAMES}
    difference = maps["mip"] - maps["correlation_average"]
    maps["scaled_mip"] = difference / maps["correlation_variance"]
    with h5py.File(tmp_path / "output.h5", "w") as opened:
        opened.attrs["leopard_em_version"] = "1.3"
        opened.attrs["total_projections"] = 129_600
        opened.attrs["total_orientations"] = 8640
        opened.attrs["total_defocus"] = 15
        group = opened.create_group("tensors")
        for name, values in maps.items():
            group.create_dataset(name, data=values, compression="gzip", compression_opts=4)
    done = import_finished(tmp_path / "output.h5", tmp_path / "BACK")
    assert done.name == "output"
    assert any("pixel size: neither in the files nor given" in note for note in done.notes)
    merge(tmp_path / "BACK", tmp_path / "M")
    assert describe(tmp_path / "M").attributes.total_projections == 129_600
    back = read_maps(tmp_path / "M")
    assert same_bits(back["best_psi"], maps["orientation_psi"])
    assert same_bits(back["correlation_std"], maps["correlation_variance"])


def change(path, action):
    with h5py.File(path, "r+") as opened:
        action(opened)


@pytest.mark.parametrize(
    ("options", "is_fast"),
    [
        ({"compression": "gzip", "shuffle": True}, True),
        ({"compression": "gzip", "compression_opts": 9}, True),
        ({"compression": "gzip", "fletcher32": True}, False),
        ({"compression": "lzf", "shuffle": True}, False),
        ({}, False),
    ],
)
def test_maps_are_read_as_hdf5_reads_them(tmp_path, rng, options, is_fast):
    values = np.pad(rng.normal(size=(60, 49)).astype("<f4"), 5)
    with h5py.File(tmp_path / "maps", "w") as file:
        dataset = file.create_dataset("a", data=values, chunks=(16, 20), **options)
        read = hdf5._GzipMap.of(dataset) or dataset
        assert isinstance(read, hdf5._GzipMap) == is_fast
        for region in (np.s_[0:70, 0:59], np.s_[15:33, 3:59], np.s_[69:70, 58:59]):
            assert same_bits(read[region], values[region])
        if is_fast:
            plain = values[16:32, 20:40].tobytes()
            dataset.id.write_direct_chunk((16, 20), plain, filter_mask=0b11)  # not filtered
            assert same_bits(read[0:70, 0:59], values)
            dataset.id.write_direct_chunk((16, 20), zlib.compress(plain)[:-5])
            with pytest.raises(OSError, match="read"):
                read[0:70, 0:59]


def test_counts_must_agree(file, tmp_path):
    done = import_finished(file, tmp_path / "GIVEN", ImportOptions(total_projections=(5,)))
    assert f"{COUNT_FACT}: 5, as given; RESULT.h5 has 2001" in done.notes
    change(file, lambda opened: opened.attrs.__setitem__("total_projections", 0))
    with pytest.raises(InvalidInputError, match="missing: the number of cross-correlations"):
        import_finished(file, tmp_path / "BACK")
    change(file, lambda opened: opened.attrs.__setitem__("total_projections", 2001.5))
    with pytest.raises(InvalidInputError, match="expected an integer"):
        import_finished(file, tmp_path / "BACK")
    change(file, lambda opened: opened.attrs.__delitem__("total_projections"))
    change(file, lambda opened: opened.attrs.__setitem__("pixel_size_angstrom", "unknown"))
    import_finished(file, tmp_path / "BACK", ImportOptions(total_projections=(5,)))
    assert describe(tmp_path / "BACK").attributes.total_projections == 5
    assert describe(tmp_path / "BACK").attributes.pixel_size_angstrom is None


def test_everything_that_is_wrong_is_listed(file, tmp_path):
    def damage(opened):
        group = opened["tensors"]
        del group["mip"]
        group.create_group("mip")
        values = group["relative_defocus"][:]
        del group["relative_defocus"]
        group["relative_defocus"] = values.astype("f8")
        del group["orientation_phi"]
        group["orientation_phi"] = values[1:]

    change(file, damage)
    with pytest.raises(InvalidInputError) as caught:
        import_finished(file, tmp_path / "BACK")
    problems = "\n".join(caught.value.problems)
    assert f"{file}: mip: missing" in problems
    assert "relative_defocus: expected float32 or float16 values, got float64" in problems
    assert f"orientation_phi: expected shape {VALID}, as scaled_mip has, got" in problems
    assert not (tmp_path / "BACK").exists()


def test_files_that_are_broken_are_refused(file, tmp_path):
    with pytest.raises(InvalidInputError, match="nothing there"):
        import_finished(tmp_path / "NOTHING.h5", tmp_path / "BACK")
    (tmp_path / "TEXT.h5").write_text("no HDF5 at all")
    with pytest.raises(InvalidInputError, match="cannot be read as HDF5"):
        import_finished(tmp_path / "TEXT.h5", tmp_path / "BACK")
    with h5py.File(tmp_path / "EMPTY.h5", "w"):
        pass
    with pytest.raises(InvalidInputError, match="mip: missing"):
        import_finished(tmp_path / "EMPTY.h5", tmp_path / "BACK")
    with h5py.File(file) as opened:
        chunk = opened["tensors/orientation_psi"].id.get_chunk_info(3)
    flip_byte(file, chunk.byte_offset + 5)
    with pytest.raises(InvalidInputError, match=r"orientation_psi: pixels .* cannot be read"):
        import_finished(file, tmp_path / "BACK")
    assert not (tmp_path / "BACK").exists()


def test_existing_files_are_refused_unless_asked_for(merged, file):
    file.write_bytes(b"old")
    with pytest.raises(OutputExistsError, match=r"RESULT\.h5: already there"):
        write_hdf5(merged, file)
    assert file.read_bytes() == b"old"
    write_hdf5(merged, file, overwrite=True)
    assert read_as_leopard_does(file)[0]["total_projections"] == COUNT


def test_a_failed_export_leaves_nothing_and_keeps_what_was_there(merged, file, tmp_path):
    flip_byte(merged / "best_phi" / "c" / "1" / "1")
    before = file.read_bytes()
    with pytest.raises(CorruptChunkError, match="best_phi"):
        write_hdf5(merged, file, overwrite=True)
    assert file.read_bytes() == before
    with pytest.raises(CorruptChunkError, match="best_phi"):
        write_hdf5(merged, tmp_path / "new" / "OTHER.h5")
    assert not list((tmp_path / "new").iterdir())


def test_places_that_cannot_be_written_are_named(merged, tmp_path):
    (tmp_path / "FILE").touch()
    with pytest.raises(StorageError, match=r"FILE/OTHER\.h5: cannot be written"):
        write_hdf5(merged, tmp_path / "FILE" / "OTHER.h5")


def test_h5py_is_named_where_it_is_missing(merged, file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingDependencyError, match=r"ocelot-em\[maps\]"):
        write_hdf5(merged, tmp_path / "NEW.h5")
    with pytest.raises(MissingDependencyError, match=r"ocelot-em\[maps\]"):
        import_finished(file, tmp_path / "BACK")


def test_every_chunk_is_written_once(merged, tmp_path, monkeypatch):
    written = []
    write = hdf5._write

    def watched(dataset, region, values):
        cells = TileGrid(dataset.shape, dataset.chunks).touching(region)
        written.extend((dataset.name, cell.iy, cell.ix) for cell in cells)
        write(dataset, region, values)

    monkeypatch.setattr(hdf5, "_write", watched)
    write_hdf5(merged, tmp_path / "RESULT.h5")
    assert len(written) == len(set(written)) == 8 * 4 * 4


@pytest.mark.slow
def test_memory_does_not_grow_with_the_map(tmp_path, monkeypatch):
    monkeypatch.setattr("ocelot_em.store.constants.DEFAULT_CHUNK", 128)
    monkeypatch.setattr(map_set, "BAND_PX", 2**15)
    monkeypatch.setattr(hdf5, "CHUNK", 64)
    shape, whole = (1024, 512), 4 * 1024 * 512
    write_partial(tmp_path / "R", "p", explicit_maps(shape), total_projections=1000)
    merge(tmp_path / "R", tmp_path / "M", tile_size=128)
    tracemalloc.start()
    try:
        write_hdf5(tmp_path / "M", tmp_path / "RESULT.h5")
        assert tracemalloc.get_traced_memory()[1] < whole
    finally:
        tracemalloc.stop()


def test_writing_does_not_touch_the_store(merged, tmp_path):
    before = snapshot(merged)
    write_hdf5(merged, tmp_path / "RESULT.h5")
    assert snapshot(merged) == before


@pytest.mark.skipif(not SHARED.is_dir(), reason="the whole real search is not on this machine")
def test_a_real_search_makes_the_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr("ocelot_em.store.constants.DEFAULT_CHUNK", 128)
    monkeypatch.setattr(map_set, "BAND_PX", 2**15)
    monkeypatch.setattr(hdf5, "CHUNK", 64)
    options = ImportOptions(
        search_space=SHARED / "search_space.npz", template_box=56, pixel_size_angstrom=2.5
    )
    import_results([SHARED / f"A_shard{i}.npz" for i in range(4)], tmp_path / "R", options)
    merge(tmp_path / "R", tmp_path / "M", poses="index")
    attributes, maps = read_as_leopard_does(write_hdf5(tmp_path / "M", tmp_path / "A.h5"))
    assert attributes["total_projections"] == 129_600
    assert attributes["total_orientations"] == 8640
    assert attributes["total_defocus"] == 5
    with np.load(SHARED / "A_official_full.npz", allow_pickle=False) as official:
        assert same_bits(maps["mip"], official["mip"][:377, :425])
    import_finished(tmp_path / "A.h5", tmp_path / "BACK")
    merge(tmp_path / "BACK", tmp_path / "BACKM")
    back = read_maps(tmp_path / "BACKM")
    for name, ours in OUR_NAMES.items():
        np.testing.assert_allclose(back[ours], maps[name], rtol=0, atol=2e-6, err_msg=name)


def test_file_systems_without_locks_are_written_and_read(merged, tmp_path, monkeypatch):
    """As HDF5 reports a file system whose ``flock`` fails."""

    def opened(place, mode, locking=None, opened=h5py.File):
        if locking is None:
            raise OSError(errno.ENOLCK, "Unable to open file (unable to lock file, errno = 37)")
        return opened(place, mode, locking=locking)

    monkeypatch.setattr(h5py, "File", opened)
    write_hdf5(merged, tmp_path / "maps.h5")
    import_finished(tmp_path / "maps.h5", tmp_path / "AGAIN.zarr", ImportOptions())
    assert [p[1] for p in describe(tmp_path / "AGAIN.zarr").partials] == ["complete"]


def test_a_file_that_somebody_else_has_locked_is_refused(file, tmp_path):
    with file.open("rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InvalidInputError, match="unable to lock file"):
            import_finished(file, tmp_path / "AGAIN.zarr", ImportOptions())
