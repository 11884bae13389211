"""Eight MRC files out of a merged store, and back in as one partial of a search."""

import os
import shutil
import sys
import tracemalloc
import warnings

import mrcfile
import numpy as np
import pytest

import ocelot_em
from builders import (
    INDEXED,
    explicit_maps,
    flip_byte,
    idle_maps,
    indexed_maps,
    same_bits,
    snapshot,
    unsealed,
    write_explicit_search,
    write_indexed_search,
)
from conftest import SHARED
from helpers import read_maps
from ocelot_em import SearchInfo, describe, merge, open_merged, write_partial
from ocelot_em.errors import (
    CorruptChunkError,
    FormatError,
    InvalidDataError,
    InvalidInputError,
    MissingDependencyError,
    OutputExistsError,
    StorageError,
    StoreNotFoundError,
)
from ocelot_em.io import leopard_maps as map_set
from ocelot_em.io.finished import import_finished
from ocelot_em.io.import_options import ImportOptions, read_search_space_file
from ocelot_em.io.leopard import import_results
from ocelot_em.io.leopard_maps import OUR_NAMES, band_grid
from ocelot_em.io.mrc import write_mrc_set
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.maps import MEAN, MIP, PIXEL_SIZE, SCALED_MIP, SQUARED_SUM, STD, SUM
from ocelot_em.model.regions import Region
from ocelot_em.store.arrays import ChunkedMap, write_chunk
from ocelot_em.store.objects import open_objects

SHAPE, BOX, VALID = (70, 61), 8, (63, 54)
COUNT = 2001

pytestmark = pytest.mark.usefixtures("small_pieces")


def use_small_pieces(monkeypatch):
    """Chunks of 32 pixels and bands of few, so that small maps have many."""
    monkeypatch.setattr("ocelot_em.store.constants.DEFAULT_CHUNK", 32)
    monkeypatch.setattr(map_set, "LEAST_ROWS", 20)
    monkeypatch.setattr(map_set, "BAND_PX", 1500)


@pytest.fixture
def small_pieces(monkeypatch):
    use_small_pieces(monkeypatch)


def merged_store(place, info=None, shape=SHAPE):
    info = info or SearchInfo(template_box=BOX, pixel_size_angstrom=1.06)
    for number in range(2):
        maps = explicit_maps(shape, number)
        count = 1000 + number
        write_partial(place / "R", f"p{number}", maps, total_projections=count, search=info)
    merge(place / "R", place / "M", tile_size=32)
    return place / "M"


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """A search, its merge, and the files of that."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_small_pieces(monkeypatch)
        write_mrc_set(merged_store(place), place / "SET")
    return place


@pytest.fixture
def merged(made_once, tmp_path):
    """A merge of explicit partials of which the last rows and columns are not valid."""
    shutil.copytree(made_once / "R", tmp_path / "R")
    return shutil.copytree(made_once / "M", tmp_path / "M")


@pytest.fixture
def mrc_set(made_once, tmp_path):
    return shutil.copytree(made_once / "SET", tmp_path / "SET")


def read_set(folder, prefix=""):
    return {name: mrcfile.read(folder / f"{prefix}{name}.mrc") for name in OUR_NAMES}


def rewrite(folder, name, change):
    """Replace one file by a changed map; ``change`` may work in place."""
    values = mrcfile.read(folder / f"{name}.mrc").copy()
    changed = change(values)
    values = values if changed is None else changed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mrcfile looks at the values, too
        mrcfile.new(folder / f"{name}.mrc", values, overwrite=True).close()


def given(**more):
    count = more.pop("total_projections", COUNT)
    return ImportOptions(total_projections=(count,), **more)


def test_files_hold_the_valid_pixels_under_leopards_names(merged, tmp_path):
    folder = write_mrc_set(merged, tmp_path / "new" / "folder")
    assert {path.name for path in folder.iterdir()} == {
        "mip.mrc",
        "scaled_mip.mrc",
        "correlation_average.mrc",
        "correlation_variance.mrc",
        "orientation_psi.mrc",
        "orientation_theta.mrc",
        "orientation_phi.mrc",
        "relative_defocus.mrc",
    }
    maps = read_maps(merged)
    for name, ours in OUR_NAMES.items():
        stored = maps[ours][: VALID[0], : VALID[1]]
        assert same_bits(mrcfile.read(folder / f"{name}.mrc"), stored), name
    assert set(OUR_NAMES.values()) >= {MEAN, STD, "best_psi", "best_theta", "best_phi"}


def test_headers_are_those_of_a_picture_with_a_voxel_size(merged, tmp_path, capsys):
    for path in write_mrc_set(merged, tmp_path / "SET").iterdir():
        assert mrcfile.validate(path), capsys.readouterr().out
        with mrcfile.open(path) as file:
            assert file.header.mode == 2
            assert file.is_single_image()
            assert file.voxel_size.x == pytest.approx(1.06)
            assert file.voxel_size.y == pytest.approx(1.06)
            values = file.data.astype("f8")
            assert file.header.dmin == np.float32(values.min()), path
            assert file.header.dmax == np.float32(values.max())
            assert file.header.dmean == pytest.approx(values.mean(), rel=1e-5)
            assert file.header.rms == pytest.approx(values.std(), rel=1e-5)


def test_an_unknown_pixel_size_stays_unknown(tmp_path):
    merge(write_explicit_search(tmp_path / "R"), tmp_path / "M")
    folder = write_mrc_set(tmp_path / "M", tmp_path / "SET")
    with mrcfile.open(folder / "mip.mrc") as file:
        assert file.voxel_size.x == 0


def test_names_can_have_a_prefix(merged, tmp_path):
    write_mrc_set(merged, tmp_path / "SET", prefix="output_")
    names = {path.name for path in (tmp_path / "SET").iterdir()}
    assert names == {f"output_{name}.mrc" for name in OUR_NAMES}
    with pytest.raises(InvalidInputError, match="expected the beginning of file names"):
        write_mrc_set(merged, tmp_path, prefix="sub/")


@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (90, 1), (32, 32), (33, 65)])
def test_pixels_strips_and_uneven_shapes_make_the_round_trip(tmp_path, shape):
    merged = merged_store(tmp_path, SearchInfo(), shape)
    write_mrc_set(merged, tmp_path / "SET")
    maps = read_maps(merged)
    for name, values in read_set(tmp_path / "SET").items():
        assert same_bits(values, maps[OUR_NAMES[name]])
    import_finished(tmp_path / "SET", tmp_path / "BACK", given())
    merge(tmp_path / "BACK", tmp_path / "BACKM")
    back = read_maps(tmp_path / "BACKM")
    for name in OUR_NAMES.values():
        if name != SCALED_MIP:
            assert same_bits(back[name], maps[name]), name


@pytest.mark.parametrize("poses", ["decoded", "index"])
def test_poses_that_are_not_stored_are_decoded(tmp_path, poses):
    merge(write_indexed_search(tmp_path / "R", SHAPE), tmp_path / "M", poses=poses)
    assert ("best_phi" in read_maps(tmp_path / "M")) == (poses == "decoded")
    write_mrc_set(tmp_path / "M", tmp_path / "SET")
    expected = open_merged(tmp_path / "M").compute()
    for name, values in read_set(tmp_path / "SET").items():
        assert same_bits(values, expected[OUR_NAMES[name]].to_numpy()), name


def partly_searched(place, count=1000):
    maps = indexed_maps(SHAPE)
    idle = idle_maps(maps)
    for name in maps:
        maps[name][5:9, 30:40] = idle[name][5:9, 30:40]
    write_partial(place / "R", "p", maps, total_projections=count, search=INDEXED)
    merge(place / "R", place / "M")
    return place / "M"


def test_pixels_that_nobody_searched_are_nan_in_the_files(tmp_path):
    folder = write_mrc_set(partly_searched(tmp_path), tmp_path / "SET")
    for name in ("scaled_mip", "orientation_phi", "relative_defocus"):
        assert np.isnan(mrcfile.read(folder / f"{name}.mrc")[5:9, 30:40]).all()
    mip = mrcfile.read(folder / "mip.mrc")
    assert np.isneginf(mip[5:9, 30:40]).all()
    with mrcfile.open(folder / "mip.mrc") as file:  # of what was searched
        assert file.header.dmin == mip[np.isfinite(mip)].min()


def test_a_map_without_values_has_unknown_statistics(tmp_path, capsys):
    write_partial(tmp_path / "R", "p", idle_maps(explicit_maps()), total_projections=0)
    merge(tmp_path / "R", tmp_path / "M")
    folder = write_mrc_set(tmp_path / "M", tmp_path / "SET")
    with mrcfile.open(folder / "scaled_mip.mrc") as file:
        header = file.header
        assert (header.dmin, header.dmax, header.dmean, header.rms) == (0, -1, -2, -1)


def test_existing_files_are_refused_unless_asked_for(merged, mrc_set):
    before = snapshot(mrc_set)
    (mrc_set / "mip.mrc").unlink()
    with pytest.raises(OutputExistsError, match="already there") as caught:
        write_mrc_set(merged, mrc_set)
    assert "scaled_mip.mrc" in str(caught.value)
    assert "/mip.mrc" not in str(caught.value)
    assert not (mrc_set / "mip.mrc").exists()
    (mrc_set / "scaled_mip.mrc").write_bytes(b"old")
    write_mrc_set(merged, mrc_set, overwrite=True)
    assert set(snapshot(mrc_set)) == set(before)
    assert mrcfile.read(mrc_set / "scaled_mip.mrc").shape == VALID


def test_a_failed_export_leaves_nothing_and_keeps_what_was_there(merged, mrc_set, tmp_path):
    before = snapshot(mrc_set)
    flip_byte(merged / "best_phi" / "c" / "1" / "1")
    with pytest.raises(CorruptChunkError, match="best_phi"):
        write_mrc_set(merged, mrc_set, overwrite=True)
    assert snapshot(mrc_set) == before
    with pytest.raises(CorruptChunkError, match="best_phi"):
        write_mrc_set(merged, tmp_path / "OTHER")
    assert not list((tmp_path / "OTHER").iterdir())


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(merged, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StorageError, match=r"mip\.mrc: cannot be written: No space left"):
        write_mrc_set(merged, tmp_path / "SET")
    assert not list((tmp_path / "SET").iterdir())


def test_places_that_cannot_be_used_are_named(merged, tmp_path):
    (tmp_path / "FILE").touch()
    with pytest.raises(StorageError, match=r"FILE.*: cannot be written"):
        write_mrc_set(merged, tmp_path / "FILE")
    with pytest.raises(StoreNotFoundError):
        write_mrc_set(tmp_path / "NOTHING", tmp_path / "SET")
    with pytest.raises(FormatError, match="merge it first"):
        write_mrc_set(tmp_path / "R", tmp_path / "SET")
    assert not (tmp_path / "SET").exists()


def test_mrcfile_is_named_where_it_is_missing(merged, mrc_set, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mrcfile", None)
    with pytest.raises(MissingDependencyError, match=r"ocelot-em\[maps\]"):
        write_mrc_set(merged, tmp_path / "NEW")
    with pytest.raises(MissingDependencyError, match=r"ocelot-em\[maps\]"):
        import_finished(mrc_set, tmp_path / "BACK", given())


def test_a_finished_search_becomes_a_partial(merged, mrc_set, tmp_path):
    done = import_finished(mrc_set, tmp_path / "BACK", given())
    assert done.name == "SET"
    info = describe(tmp_path / "BACK")
    assert list(info.partials) == [("SET", "complete", COUNT)]
    assert info.attributes.valid_shape == info.attributes.shape == VALID
    assert info.attributes.pixel_size_angstrom == 1.06  # the header's float32 has more digits
    assert not info.attributes.has_pixel_size
    merge(tmp_path / "BACK", tmp_path / "BACKM")
    maps, back = read_maps(merged), read_maps(tmp_path / "BACKM")
    for name in OUR_NAMES.values():
        stored = maps[name][: VALID[0], : VALID[1]]
        if name == SCALED_MIP:
            np.testing.assert_allclose(back[name], stored, rtol=1e-6)
        else:
            assert same_bits(back[name], stored), name
    for name in (SUM, SQUARED_SUM):
        np.testing.assert_allclose(back[name], maps[name][: VALID[0], : VALID[1]], rtol=3e-6)


def test_sums_are_kept_in_float64(mrc_set, tmp_path):
    import_finished(mrc_set, tmp_path / "BACK", given())
    partial = ocelot_em.open_partials(tmp_path / "BACK").isel(partial=0).compute()
    maps = read_set(mrc_set)
    mean, std = (
        maps[name].astype("f8") for name in ("correlation_average", "correlation_variance")
    )
    assert same_bits(partial[SUM].to_numpy(), mean * COUNT)
    assert same_bits(partial[SQUARED_SUM].to_numpy(), (std**2 + mean**2) * COUNT)


def test_it_is_said_what_the_files_lack(mrc_set, tmp_path):
    notes = "\n".join(import_finished(mrc_set, tmp_path / "A", given()).notes)
    assert "correlation_sum, correlation_squared_sum: reconstructed" in notes
    assert "best_pixel_size: the files have no map" in notes
    assert "best_partial: the files do not record" in notes
    assert "template box: not given" in notes
    assert "scaled_mip" not in notes
    assert "pixel size: 1.06 Å, from mip.mrc" in notes
    (mrc_set / "scaled_mip.mrc").unlink()
    about = given(
        template_box=3, pixel_size_offset_angstrom=0.0, pixel_size_angstrom=2.5, name="night1"
    )
    done = import_finished(mrc_set, tmp_path / "B", about)
    notes = "\n".join(done.notes)
    assert done.name == "night1"
    assert "pixel-size offset: 0.0 Å, as given" in notes
    assert "scaled_mip: missing" in notes
    assert "template box" not in notes
    assert "pixel size: 2.5 Å, as given; mip.mrc has 1.06" in notes
    attributes = describe(tmp_path / "B").attributes
    assert attributes.valid_shape == (VALID[0] - 2, VALID[1] - 2)
    assert attributes.pixel_size_angstrom == 2.5


def test_a_given_offset_lets_it_merge_with_other_searches(merged, mrc_set, tmp_path):
    about = given(pixel_size_offset_angstrom=0.01)
    import_finished(mrc_set, tmp_path / "BACK", about)
    other = explicit_maps(VALID, 5)
    info = SearchInfo(pixel_size_angstrom=1.06)
    write_partial(tmp_path / "OTHER", "q", other, total_projections=7, search=info)
    merge([tmp_path / "BACK", tmp_path / "OTHER"], tmp_path / "BOTH")
    both = read_maps(tmp_path / "BOTH")
    won = both["best_partial"] == 0
    assert (both[PIXEL_SIZE][won] == np.float32(0.01)).all()
    assert same_bits(both[PIXEL_SIZE][~won], other[PIXEL_SIZE][~won])
    assert describe(tmp_path / "BOTH").attributes.total_projections == COUNT + 7


def test_finished_searches_are_appended_in_order(mrc_set, tmp_path):
    import_finished(mrc_set, tmp_path / "BACK", given(name="z"))
    shutil.copytree(mrc_set, tmp_path / "SECOND")
    with pytest.raises(InvalidInputError, match="already there as partial 'z'"):
        import_finished(tmp_path / "SECOND", tmp_path / "BACK", given(name="a"))
    before = snapshot(tmp_path / "BACK")
    again = import_finished(mrc_set, tmp_path / "BACK", given(name="z"))
    assert again.notes[0] == "z: was there before, and is unchanged"
    assert snapshot(tmp_path / "BACK") == before
    with pytest.raises(InvalidInputError, match="valid_shape: "):
        import_finished(mrc_set, tmp_path / "BACK", given(name="z", template_box=3))
    rewrite(tmp_path / "SECOND", "orientation_phi", lambda values: values + 1)
    import_finished(
        tmp_path / "SECOND", tmp_path / "BACK", given(name="a", pixel_size_angstrom=1.06)
    )
    partials = ocelot_em.open_partials(tmp_path / "BACK").partial.values.tolist()
    assert partials == ["z", "a"]


def test_any_folder_gives_a_name_of_a_partial(mrc_set, tmp_path):
    shutil.copytree(mrc_set, tmp_path / "grüße [1]")
    done = import_finished(tmp_path / "grüße [1]", tmp_path / "BACK", given())
    assert done.name == "grusse-1"
    assert done.notes[1].startswith("name: 'grusse-1', because")


def test_deviations_of_zero_stay_zero(tmp_path):
    rng = np.random.default_rng(3)
    mean = rng.normal(0.3, 0.2, (50, 50)).astype("f4")
    folder = tmp_path / "SET"
    folder.mkdir()
    maps = dict.fromkeys(OUR_NAMES, np.zeros((50, 50), "f4"))
    maps |= {"mip": mean + np.float32(3), "correlation_average": mean}
    for name, values in maps.items():
        mrcfile.new(folder / f"{name}.mrc", values).close()
    for number, count in enumerate((1, 3, 129_600, 20_500_000, 2**40 + 1)):
        place = tmp_path / f"BACK{number}"
        import_finished(folder, place, given(total_projections=count))
        merge(place, tmp_path / f"M{number}")
        back = read_maps(tmp_path / f"M{number}")
        assert (back[STD] == 0).all()
        assert (back[SCALED_MIP] == 0).all()
        assert same_bits(back[MEAN], mean)


def test_pixels_that_some_device_left_out_are_kept(tmp_path):
    write_mrc_set(partly_searched(tmp_path), tmp_path / "SET")
    import_finished(tmp_path / "SET", tmp_path / "BACK", given(pixel_size_offset_angstrom=0.0))
    merge(tmp_path / "BACK", tmp_path / "BACKM")
    back, maps = read_maps(tmp_path / "BACKM"), read_maps(tmp_path / "M")
    assert np.isneginf(back[MIP][5:9, 30:40]).all()
    assert np.isnan(back[PIXEL_SIZE][5:9, 30:40]).all()
    for name in (MIP, "best_psi", "best_defocus", MEAN, STD):
        assert same_bits(back[name], maps[name]), name


def test_pixels_without_a_count_cannot_become_a_partial(tmp_path):
    maps, info = explicit_maps(SHAPE), SearchInfo(chunk_files=True)
    write_partial(tmp_path / "R", "p", maps, total_projections=10, search=info)
    broken = np.full((32, 32), 5, np.float32)
    broken[7, 8] = np.nan
    run = unsealed(tmp_path / "R")
    write_chunk(open_objects(run / "partials" / "p" / "mip"), "c/0/0", broken)
    merge(tmp_path / "R", tmp_path / "M", nan="mask")
    write_mrc_set(tmp_path / "M", tmp_path / "SET")
    with pytest.raises(InvalidDataError, match=r"cannot be 0 at some") as caught:
        import_finished(tmp_path / "SET", tmp_path / "BACK", given())
    assert "first (7, 8)" in str(caught.value)
    assert not (tmp_path / "BACK").exists()


BAD_VALUES = [
    (name, bad)
    for name in OUR_NAMES
    for bad in (np.nan, np.inf, -np.inf)
    if (name, bad) != ("mip", -np.inf)  # which is how pixels look that were not searched
]


@pytest.mark.parametrize(("name", "bad"), BAD_VALUES)
def test_values_that_no_search_gives_are_refused(mrc_set, tmp_path, name, bad):
    rewrite(mrc_set, name, lambda values: values.__setitem__((60, 33), bad))
    with pytest.raises(InvalidDataError, match=rf"{name}: not a finite number") as caught:
        import_finished(mrc_set, tmp_path / "BACK", given())
    assert "at 1 pixel of" in str(caught.value)
    assert "first (60, 33)" in str(caught.value)
    assert not (tmp_path / "BACK").exists()


def test_maps_that_do_not_belong_together_are_refused(mrc_set, tmp_path):
    rewrite(mrc_set, "mip", lambda values: values[::-1])
    with pytest.raises(InvalidDataError, match="are these files of one search"):
        import_finished(mrc_set, tmp_path / "BACK", given())


def test_a_true_variance_is_noticed(mrc_set, tmp_path):
    rewrite(mrc_set, "correlation_variance", np.square)
    with pytest.raises(InvalidDataError, match="replace it by its square root"):
        import_finished(mrc_set, tmp_path / "BACK", given())
    rewrite(mrc_set, "correlation_variance", lambda values: -np.sqrt(values))
    with pytest.raises(InvalidDataError, match="correlation_variance: below 0"):
        import_finished(mrc_set, tmp_path / "BACK", given())


def test_everything_that_is_wrong_is_listed(mrc_set, tmp_path):
    (mrc_set / "orientation_psi.mrc").unlink()
    rewrite(mrc_set, "orientation_phi", lambda values: values[1:])
    rewrite(mrc_set, "relative_defocus", lambda values: values.astype("i2"))
    rewrite(mrc_set, "orientation_theta", lambda values: np.stack([values, values]))
    with pytest.raises(InvalidInputError) as caught:
        import_finished(mrc_set, tmp_path / "BACK", ImportOptions(name="no/name"))
    problems = "\n".join(caught.value.problems)
    assert "orientation_psi: missing" in problems
    assert f"orientation_phi: expected shape {VALID}, as mip has, got (62, 54)" in problems
    assert "relative_defocus: expected float32 or float16 values, got int16" in problems
    assert "orientation_theta: expected a map (y, x), got shape (2, 63, 54)" in problems
    assert "total_projections: missing" in problems
    assert "partial name 'no/name'" in problems
    assert not (tmp_path / "BACK").exists()


@pytest.mark.parametrize(
    ("count", "message"), [(0, "at least 1"), (-1, "total_projections"), (2.5, "an integer")]
)
def test_counts_that_cannot_be_are_refused(mrc_set, tmp_path, count, message):
    with pytest.raises(InvalidInputError, match=message):
        import_finished(mrc_set, tmp_path / "BACK", given(total_projections=count))


def test_files_that_are_broken_are_refused(mrc_set, tmp_path):
    mip, phi = mrc_set / "mip.mrc", mrc_set / "orientation_phi.mrc"
    psi = mrc_set / "orientation_psi.mrc"
    mip.write_bytes(mip.read_bytes()[:-4])
    phi.write_bytes(phi.read_bytes() + b"more")
    psi.write_bytes(b"no MRC file at all" * 100)
    with pytest.raises(InvalidInputError) as caught:
        import_finished(mrc_set, tmp_path / "BACK", given())
    assert len(caught.value.problems) == 3
    for path, problem in zip((mip, psi, phi), caught.value.problems, strict=True):
        assert problem.startswith(f"{path}: cannot be read as an MRC file: ")
    with pytest.raises(InvalidInputError, match="got nothing there"):
        import_finished(tmp_path / "NOWHERE", tmp_path / "BACK", given())


def test_a_search_that_differs_is_refused(mrc_set, tmp_path):
    write_explicit_search(tmp_path / "R2", (5, 6))
    with pytest.raises(InvalidInputError) as caught:
        import_finished(mrc_set, tmp_path / "R2", given())
    problems = "\n".join(caught.value.problems)
    assert "shape: the search has (5, 6)" in problems
    assert "has_pixel_size: the search has True, the new partial False" in problems


def test_volumes_of_one_section_and_foreign_byte_order_are_read(merged, mrc_set, tmp_path):
    rewrite(mrc_set, "mip", lambda values: values[None])
    rewrite(mrc_set, "orientation_phi", lambda values: values.astype(">f4"))
    assert mrcfile.read(mrc_set / "mip.mrc").ndim == 3
    import_finished(mrc_set, tmp_path / "BACK", given())
    merge(tmp_path / "BACK", tmp_path / "BACKM")
    back, maps = read_maps(tmp_path / "BACKM"), read_maps(merged)
    for name in (MIP, "best_phi"):
        assert same_bits(back[name], maps[name][: VALID[0], : VALID[1]])


def test_progress_is_told(mrc_set, tmp_path):
    steps = []
    import_finished(mrc_set, tmp_path / "BACK", given(), progress=lambda *step: steps.append(step))
    phases = [phase for phase, _ in steps]
    assert phases == sorted(phases)
    for phase in ("check", "convert"):
        shares = [share for p, share in steps if p == phase]
        assert shares == sorted(shares)
        assert len(shares) > 1
        assert shares[-1] == 1


def test_bands_are_whole_blocks_of_bounded_size(monkeypatch):
    monkeypatch.setattr(map_set, "LEAST_ROWS", 1024)
    monkeypatch.setattr(map_set, "BAND_PX", 4 * 2**20)
    for shape in ((4096, 4096), (40_000, 85_000), (1, 10**6), (10**6, 1), (3000, 100)):
        for block in ((1024, 1024), (24, 24), (100, 100), (1, 85_000), (2048, 2048)):
            block = (min(block[0], shape[0]), min(block[1], shape[1]))
            grid = band_grid(shape, block)
            assert grid.cell[0] % block[0] == 0 or grid.cell[0] == shape[0]
            assert grid.cell[1] % block[1] == 0 or grid.cell[1] == shape[1]
            assert grid.cell[0] * grid.cell[1] <= max(4 * 2**20, (1024 + block[0]) * block[1]), (
                shape,
                block,
            )


def test_chunks_are_read_once_per_map(merged, tmp_path, monkeypatch):
    read, fetch = [], ChunkedMap.fetch

    def counted(self, chunk, memory):
        read.append((self.path, chunk.iy, chunk.ix))
        return fetch(self, chunk, memory)

    monkeypatch.setattr(ChunkedMap, "fetch", counted)
    write_mrc_set(merged, tmp_path / "SET")
    assert len(read) == len(set(read)) == 8 * 2 * 2  # the last row and column are not valid


@pytest.mark.slow
def test_memory_does_not_grow_with_the_map(tmp_path, monkeypatch):
    monkeypatch.setattr("ocelot_em.store.constants.DEFAULT_CHUNK", 128)
    monkeypatch.setattr(map_set, "BAND_PX", 2**15)
    shape = (1024, 1024)
    whole = 4 * 1024 * 1024
    write_partial(tmp_path / "R", "p", explicit_maps(shape), total_projections=1000)
    merge(tmp_path / "R", tmp_path / "M", tile_size=128)

    def peak_of(action):
        tracemalloc.start()
        try:
            action()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_of(lambda: write_mrc_set(tmp_path / "M", tmp_path / "SET")) < whole / 2
    # Eight maps and two sums of float64 of each band.
    assert peak_of(lambda: import_finished(tmp_path / "SET", tmp_path / "B", given())) < 2 * whole


def test_the_maps_of_a_store_are_read_in_their_own_chunks(merged):
    result = MergedResult.open(merged)
    assert result.chunk == (32, 32)
    assert result.valid_shape == VALID
    assert result.projections_per_pixel == COUNT
    corner = Region(10, 40, 20, 50)
    assert same_bits(result.read(corner, MIP), read_maps(merged)[MIP][corner.slices])


def test_leopard_em_itself_reads_the_files(merged, tmp_path):
    results = pytest.importorskip("leopard_em.pydantic_models.results")
    folder = write_mrc_set(merged, tmp_path / "SET")
    fields = {f"{name}_path": str(folder / f"{name}.mrc") for name in OUR_NAMES}
    result = results.MatchTemplateResult(allow_file_overwrite=True, **fields)
    result.load_tensors_from_paths()
    maps = read_maps(merged)
    for name, ours in OUR_NAMES.items():
        assert same_bits(getattr(result, name), maps[ours][: VALID[0], : VALID[1]]), name


@pytest.mark.skipif(not SHARED.is_dir(), reason="the whole real search is not on this machine")
@pytest.mark.parametrize(
    "poses",
    [
        pytest.param("explicit", marks=pytest.mark.slow),
        "decoded",
        pytest.param("index", marks=pytest.mark.slow),
    ],
)
def test_a_real_search_is_what_leopard_writes(tmp_path, poses, monkeypatch):
    monkeypatch.setattr("ocelot_em.store.constants.DEFAULT_CHUNK", 128)
    monkeypatch.setattr(map_set, "BAND_PX", 2**15)
    tables = SHARED / "search_space.npz"
    options = ImportOptions(
        search_space=None if poses == "explicit" else tables,
        template_box=56,
        pixel_size_angstrom=2.5,
    )
    import_results([SHARED / f"A_shard{i}.npz" for i in range(4)], tmp_path / "R", options)
    merge(tmp_path / "R", tmp_path / "M", poses="decoded" if poses == "explicit" else poses)
    write_mrc_set(tmp_path / "M", tmp_path / "SET")
    found = read_set(tmp_path / "SET")
    with np.load(SHARED / "A_official_full.npz", allow_pickle=False) as file:
        official = {name: file[name][:377, :425] for name in file if file[name].ndim == 2}
    phi, theta, psi, defocus, _ = read_search_space_file(tables).decode(
        official["best_global_index"]
    )
    assert same_bits(found["mip"], official["mip"])
    assert same_bits(found["orientation_phi"], phi)
    assert same_bits(found["orientation_theta"], theta)
    assert same_bits(found["orientation_psi"], psi)
    assert same_bits(found["relative_defocus"], defocus)
    for name, theirs, tolerance in (
        ("correlation_average", "correlation_mean", 1e-6),
        ("correlation_variance", "correlation_variance", 2e-6),
        ("scaled_mip", "scaled_mip", 1e-5),
    ):
        assert np.abs(found[name] - official[theirs]).max() <= tolerance, name
    import_finished(tmp_path / "SET", tmp_path / "BACK", given(total_projections=129_600))
    merge(tmp_path / "BACK", tmp_path / "BACKM")
    back = read_maps(tmp_path / "BACKM")
    for name, ours in OUR_NAMES.items():
        np.testing.assert_allclose(back[ours], found[name], rtol=0, atol=2e-6, err_msg=name)
