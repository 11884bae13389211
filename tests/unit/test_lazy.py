"""Lazy datasets: the same bits as a merge, and no more read than asked for."""

import inspect
import pickle
import shutil

import numpy as np
import pytest
import xarray as xr
from distributed import Client, LocalCluster

from builders import (
    explicit_maps,
    flip_byte,
    indexed_maps,
    same_bits,
    unsealed,
    write_explicit_search,
    write_indexed_search,
)
from ocelot_em import (
    PickOptions,
    Region,
    SearchInfo,
    Simulation,
    find_peaks,
    lazy_merge,
    merge,
    open_merged,
    open_partials,
    write_partial,
)
from ocelot_em.errors import (
    CorruptChunkError,
    FormatError,
    IncompleteError,
    InvalidInputError,
    MissingChunkError,
    PlanError,
    StoreNotFoundError,
)
from ocelot_em.merge import lazy
from ocelot_em.model.maps import MIP, SCALED_MIP

SHAPE, EDGE = (70, 60), 32
WRITERS = {"explicit": write_explicit_search, "indexed": write_indexed_search}
MAKERS = {"explicit": explicit_maps, "indexed": indexed_maps}

pytestmark = pytest.mark.usefixtures("small_chunks")


def break_all_chunks_but(store, iy, ix):
    """Delete or damage every chunk of every map except one place of the grid."""
    others = [
        file
        for file in store.rglob("c/*/*")
        if file.is_file() and "search_space" not in file.parts and "progress" not in file.parts
        if file.parts[-2:] != (str(iy), str(ix))
    ]
    assert others
    for number, file in enumerate(others):
        if number % 2:
            file.unlink()
        else:
            flip_byte(file)


@pytest.mark.parametrize("form", WRITERS)
def test_open_partials_gives_what_was_written(tmp_path, form):
    search = open_partials(WRITERS[form](tmp_path / "R", SHAPE))
    assert search[MIP].dims == ("partial", "y", "x")
    assert search.partial.values.tolist() == ["gpu0", "gpu1", "gpu2"]
    assert search.total_projections.values.tolist() == [1000, 1001, 1002]
    assert search.attrs["total_projections"] == 3003
    assert search.attrs["valid_shape"] == SHAPE
    for number in range(3):
        maps = MAKERS[form](SHAPE, number)
        assert set(search.data_vars) == set(maps)
        for key in maps:
            assert same_bits(search[key][number], maps[key])


@pytest.mark.parametrize("form", WRITERS)
def test_a_lazy_merge_equals_a_merge_bit_for_bit(tmp_path, form):
    run = WRITERS[form](tmp_path / "R", SHAPE)
    merge(run, tmp_path / "M")
    eager = open_merged(tmp_path / "M")
    assert eager.attrs["partials"] == ["gpu0", "gpu1", "gpu2"]
    for tile_size in (None, 64):
        result = lazy_merge(run, **({} if tile_size is None else {"tile_size": tile_size}))
        assert list(result.data_vars) == list(eager.data_vars)
        result.attrs["store"] = str(tmp_path / "M")
        assert result.attrs == eager.attrs
        xr.testing.assert_identical(result.coords.to_dataset(), eager.coords.to_dataset())
        computed = result.compute()
        for key in eager.data_vars:
            assert result[key].dtype == eager[key].dtype
            assert same_bits(computed[key], eager[key]), key
            assert result[key].attrs == eager[key].attrs


def test_a_lazy_merge_of_several_stores_equals_a_merge_of_all(tmp_path):
    run = write_explicit_search(tmp_path / "R", SHAPE)
    shutil.copytree(run, tmp_path / "S")
    for name in ("gpu0", "gpu1"):
        shutil.rmtree(unsealed(tmp_path / "S") / "partials" / name)
    merge(run, tmp_path / "M", without=["gpu2"])
    whole = lazy_merge(run).compute()
    in_two = lazy_merge([tmp_path / "M", tmp_path / "S"]).compute()
    for key in ("mip", "best_phi", "best_partial"):
        assert same_bits(whole[key], in_two[key])
    assert in_two.attrs["total_projections"] == 3003


def test_maps_of_a_tile_are_merged_once(tmp_path, monkeypatch):
    calls = []

    def counted(plan, iy, ix, real=lazy._merge_for_dask):
        calls.append((iy, ix))
        return real(plan, iy, ix)

    monkeypatch.setattr(lazy, "_merge_for_dask", counted)
    lazy_merge(write_explicit_search(tmp_path / "R", SHAPE), tile_size=EDGE).compute()
    assert sorted(calls) == [(iy, ix) for iy in range(3) for ix in range(2)]


INDICES = [
    np.s_[5, 7],
    np.s_[-1, :],
    np.s_[:, -60],
    np.s_[::7, 3::5],
    np.s_[::-1, ::-3],
    np.s_[60:10:-9, 59:0:-13],
    np.s_[40:40, :],
    np.s_[[3, 65, 1], :],
    np.s_[:, np.array([59, 0, 31, 32])],
    np.s_[31:33, 31:33],
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_any_index_gives_what_numpy_gives(tmp_path, index):
    run, maps = write_explicit_search(tmp_path / "R", SHAPE, n_partials=1), explicit_maps(SHAPE)
    picked = open_partials(run)[MIP].data[0][index].compute()
    assert same_bits(np.asarray(picked), np.asarray(maps[MIP][index]))


def test_blocks_and_masks_give_what_numpy_gives(tmp_path):
    run, maps = write_explicit_search(tmp_path / "R", SHAPE, n_partials=1), explicit_maps(SHAPE)
    values = open_partials(run)[MIP].data[0]
    assert same_bits(values.rechunk((50, 17))[3:, 5:].compute(), maps[MIP][3:, 5:])
    assert same_bits(values[values > 6].compute(), maps[MIP][maps[MIP] > 6])


CORNER = {"y": slice(64, None), "x": slice(32, None)}


@pytest.fixture
def broken_but_for_a_corner(tmp_path):
    """A search and its merge, of which only the last chunk of each map is left, and the truth."""
    run = write_explicit_search(tmp_path / "R", SHAPE, search=SearchInfo(chunk_files=True))
    merge(run, tmp_path / "M", tile_size=EDGE)
    truth = {
        "partials": open_partials(run).isel(CORNER).compute(),
        "merged": open_merged(tmp_path / "M").isel(CORNER).compute(),
    }
    break_all_chunks_but(run, 2, 1)
    break_all_chunks_but(tmp_path / "M", 2, 1)
    return run, tmp_path / "M", truth


def assert_only_the_corner_is_read(run, merged, truth):
    lazily = {
        "partials": [open_partials(run)],
        "merged": [open_merged(merged), lazy_merge(run, tile_size=EDGE)],
    }
    for kind, datasets in lazily.items():
        for dataset in datasets:
            corner = dataset.isel(CORNER).compute()
            for key in truth[kind].data_vars:
                assert same_bits(corner[key], truth[kind][key]), key
            with pytest.raises((MissingChunkError, CorruptChunkError), match=r"chunk \("):
                dataset[MIP].compute()


def test_a_corner_reads_only_its_own_chunks(broken_but_for_a_corner):
    assert_only_the_corner_is_read(*broken_but_for_a_corner)


def test_a_corner_reads_only_its_own_chunks_on_a_cluster(broken_but_for_a_corner):
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster),
    ):
        assert_only_the_corner_is_read(*broken_but_for_a_corner)


def test_datasets_cross_processes_small(tmp_path):
    run = write_explicit_search(tmp_path / "R", SHAPE)
    for dataset in (open_partials(run), lazy_merge(run)):
        sent = pickle.dumps(dataset)
        assert len(sent) < 100_000
        assert same_bits(pickle.loads(sent)[MIP], dataset[MIP])


def test_a_rewritten_store_is_not_taken_for_the_old_one(tmp_path):
    run, out = write_explicit_search(tmp_path / "R", SHAPE), tmp_path / "M"
    merge(run, out)
    old = open_merged(out)[MIP].data.name
    assert open_merged(out)[MIP].data.name == old
    merge(run, out, without=["gpu0"], overwrite=True)
    assert open_merged(out)[MIP].data.name != old


def test_what_cannot_be_opened_is_refused_at_once(tmp_path):
    run = write_explicit_search(tmp_path / "R")
    merge(run, tmp_path / "M")
    with pytest.raises(FormatError, match="open_partials"):
        open_merged(run)
    with pytest.raises(FormatError, match="use open_merged"):
        open_partials(tmp_path / "M")
    for call in (open_partials, open_merged, lazy_merge):
        with pytest.raises(StoreNotFoundError):
            call(tmp_path / "nothing")
    for store in (run, tmp_path / "M"):
        unsealed(store)
    attributes = run / "partials" / "gpu1" / "zarr.json"
    attributes.write_text(attributes.read_text().replace('"complete"', '"writing"'))
    for call in (open_partials, lazy_merge):
        with pytest.raises(IncompleteError, match="gpu1"):
            call(run)
    attributes = tmp_path / "M" / "zarr.json"
    attributes.write_text(attributes.read_text().replace('"complete"', '"writing"'))
    with pytest.raises(IncompleteError, match="never finished"):
        open_merged(tmp_path / "M")


def test_bad_options_of_a_lazy_merge_are_refused(tmp_path):
    run = write_explicit_search(tmp_path / "R")
    with pytest.raises(InvalidInputError, match="option nan"):
        lazy_merge(run, nan="ignore")
    with pytest.raises(InvalidInputError, match="option tile_size"):
        lazy_merge(run, tile_size=0)
    with pytest.raises(PlanError, match="tile size"):
        lazy_merge(run, tile_size=EDGE + 1)
    with pytest.raises(InvalidInputError, match="given more than once"):
        lazy_merge([run, run])


def test_nan_is_masked_where_asked_for(tmp_path):
    run = write_explicit_search(tmp_path / "R", SHAPE)
    masked, plain = lazy_merge(run, nan="mask"), lazy_merge(run)
    assert "total_projections" in masked.data_vars
    assert same_bits(masked[SCALED_MIP], plain[SCALED_MIP])


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A result with known particles, with a pixel size, and with pixels that are not valid."""
    place = tmp_path_factory.mktemp("merged")
    simulation = Simulation((150, 120), n_partials=2, n_particles=4, seed=3)
    blocks = [simulation.partial_block(k, Region(0, 150, 0, 120)) for k in range(2)]
    about = SearchInfo(template_box=11, pixel_size_angstrom=2.5)
    for k, (block, count) in enumerate(zip(blocks, simulation.counts, strict=True)):
        write_partial(place / "S", f"gpu{k}", block, total_projections=count, order=k, search=about)
    merge(place / "S", place / "M")
    return place


def test_coordinates_are_positions_with_units(merged, tmp_path):
    for maps in (open_merged(merged / "M"), lazy_merge(merged / "S"), open_partials(merged / "S")):
        assert maps.y.values.tolist() == [2.5 * row for row in range(150)]
        assert maps.x.attrs == {"long_name": "x", "units": "Å"}
        assert maps.valid_y.values.tolist() == [True] * 140 + [False] * 10
        nearest = maps[MIP].sel(y=20.9, x=[51.0, 3.1], method="nearest")
        assert same_bits(nearest, maps[MIP].isel(y=8, x=[20, 1]))
    pixels = lazy_merge(write_explicit_search(tmp_path / "R", SHAPE))
    assert (pixels.y.units, pixels.y.values.tolist()) == ("pixel", [*range(70)])
    assert pixels.ocelot.valid.sizes == pixels.sizes


def test_the_valid_part_is_that_of_any_part(merged):
    maps = open_merged(merged / "M")
    assert dict(maps.ocelot.valid.sizes) == {"y": 140, "x": 110}
    part = maps.isel(y=slice(145, 100, -5), x=slice(100, None)).ocelot.valid
    assert (part.y.values / 2.5).tolist() == [135, 130, 125, 120, 115, 110, 105]
    assert (part.x.values / 2.5).tolist() == [*range(100, 110)]
    assert maps.isel(y=slice(145, None)).ocelot.valid.sizes["y"] == 0


def test_peaks_are_those_of_the_part(merged):
    maps, everywhere = open_merged(merged / "M"), find_peaks(merged / "M", min_distance=5)
    assert list(maps.ocelot.peaks(min_distance=5)) == list(everywhere)
    assert [*inspect.signature(maps.ocelot.peaks).parameters] == [*PickOptions.model_fields]
    with pytest.raises(InvalidInputError, match="got 'scaled_mp'; did you mean scaled_mip"):
        maps.ocelot.plot("scaled_mp")
    assert len(everywhere) == 5
    for particle in everywhere:
        y, x = particle["pos_y"], particle["pos_x"]
        part = maps.isel(y=slice(y, y + 1), x=slice(max(x - 2, 0), x + 2))
        assert list(part.ocelot.peaks(min_distance=5)) == [particle]
        assert float(maps.sel(y=2.5 * y, x=2.5 * x)[SCALED_MIP]) == particle[SCALED_MIP]
    with pytest.raises(InvalidInputError, match="expected maps from open_merged"):
        lazy_merge(merged / "S").ocelot.peaks()


def test_a_plot_has_the_first_row_on_top_and_particles_on_their_peaks(merged):
    maps, particles = open_merged(merged / "M"), find_peaks(merged / "M")
    best = particles[0]
    for left in (0, best["pos_x"] - 2):
        part = maps.isel(x=slice(left, None))
        ax = part.ocelot.plot(particles=particles)
        assert ax.get_ylabel() == "y (Å)"
        assert ax.get_xlim() == (2.5 * (left - 0.5), 2.5 * 109.5)
        assert ax.get_ylim() == (2.5 * 139.5, -1.25)
        (image,), (circles,) = ax.images, ax.collections
        drawn = circles.get_offsets()[0]
        assert drawn.tolist() == [2.5 * best["pos_x"], 2.5 * best["pos_y"]]
        assert image.get_array()[best["pos_y"], best["pos_x"] - left] == best[SCALED_MIP]
        assert image.origin == "upper"


def test_a_large_map_is_pooled_so_that_peaks_stay(merged, monkeypatch):
    monkeypatch.setattr("ocelot_em.view.figures.OVERVIEW_PX", 40)
    maps = open_merged(merged / "M")
    for name, highest in (
        (SCALED_MIP, float(maps.ocelot.valid[SCALED_MIP].max())),
        ("best_psi", 0),
    ):
        ax = maps.ocelot.plot(name)
        (image,) = ax.images
        assert image.get_array().shape == (35, 28)
        assert image.get_extent()[0] < 0
        assert not highest or image.get_array().max() == np.float32(highest)
    assert ax.get_title() == "best_psi"
