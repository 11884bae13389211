"""Particles from merged results: independent of tiles, equal to looking at whole maps."""

import csv

import numpy as np
import pandas as pd
import pytest

import ocelot_em
from builders import unsealed
from conftest import SHARED
from exact_ranks import from_maps, histogram_of
from helpers import make_result, read_maps, write_search
from ocelot_em.errors import FormatError, IncompleteError, InvalidInputError
from ocelot_em.io.parquet import read_parquet, write_parquet
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats.candidates import Candidates
from ocelot_em.model.histograms import Z_AXIS
from ocelot_em.model.maps import MIP, POSES, SCALED_MIP
from ocelot_em.particles.gaussian import gaussian_cutoff
from ocelot_em.particles.peaks import select_peaks
from ocelot_em.particles.picking import find_peaks
from ocelot_em.particles.significance import gev_cutoff
from ocelot_em.particles.table import ParticleTable
from ocelot_em.store.arrays import write_chunk
from ocelot_em.store.objects import open_objects

SHAPE, COUNTS = (150, 190), (1000, 700, 300)
METHODS = ("gaussian", "gev", "pvalue")


def particles_of(rng):
    """Noise as maxima of Gaussian correlations, with a few particles several pixels wide."""
    results = []
    for count in COUNTS:
        result = make_result(rng, SHAPE, count)
        draws = rng.standard_normal((count // 50, *SHAPE)).max(axis=0) * 1.6 + 1
        result["mip"] = draws.astype(np.float32)
        result["correlation_sum"] = (count * rng.normal(0, 0.05, SHAPE)).astype(np.float32)
        result["correlation_squared_sum"] = np.full(SHAPE, 1.01 * count, np.float32)
        results.append(result)
    yy, xx = np.indices(SHAPE)
    for y, x in ((0, 0), (16, 15), (31, 33), (75, 95), (149, 189), (100, 4), (64, 64)):
        bump = np.float32(16) * np.exp(-((yy - y) ** 2 + (xx - x) ** 2) / 6)
        results[1]["mip"] += bump.astype(np.float32)
    return results


@pytest.fixture(
    scope="module",
    params=["explicit", pytest.param("decoded", marks=pytest.mark.slow), "index"],
)
def merged(request, tmp_path_factory):
    """The same search merged in one tile and in small ones; nobody may change them."""
    place, rng = tmp_path_factory.mktemp("merged"), np.random.default_rng(20260101)
    indexed = request.param != "explicit"
    search = write_search(place / "RUN.zarr", particles_of(rng), COUNTS, indexed=indexed)
    poses = "index" if request.param == "index" else "decoded"
    for tile_size in (None, 16, 33):
        output = place / f"{tile_size}.zarr"
        ocelot_em.merge(search, output, threads=2, tile_size=tile_size, poses=poses)
    return place


def tables_equal(one, other):
    assert list(one.columns) == list(other.columns)
    for name, values in one.columns.items():
        if name == "micrograph":  # that of the store
            continue
        np.testing.assert_array_equal(values, other.columns[name], err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_no_matter_how_it_was_tiled(merged, method):
    whole = find_peaks(merged / "None.zarr", method=method)
    assert len(whole) >= 5
    for tile_size in (16, 33):
        tables_equal(find_peaks(merged / f"{tile_size}.zarr", method=method), whole)


@pytest.mark.parametrize("cutoff", [2.0, 4.0, 7.0])
def test_candidates_and_maps_say_the_same(merged, cutoff, monkeypatch):
    """Low cutoffs read the maps, high ones the records."""
    picked = find_peaks(merged / "33.zarr", cutoff=cutoff)
    monkeypatch.setattr(MergedResult, "candidates", lambda *_: Candidates.unknown())
    tables_equal(find_peaks(merged / "33.zarr", cutoff=cutoff), picked)
    maps = {n: m.to_numpy() for n, m in ocelot_em.open_merged(merged / "33.zarr").items()}
    y, x = np.nonzero(maps[SCALED_MIP] >= np.float32(cutoff))
    best = select_peaks(y, x, maps[SCALED_MIP][y, x], 10.0)
    np.testing.assert_array_equal(picked.columns["pos_y"], y[best])
    np.testing.assert_array_equal(picked.columns["pos_x"], x[best])
    y, x = y[best], x[best]
    names = ("phi", "theta", "psi", "relative_defocus", "pixel_size_offset")
    for column, name in zip(names, POSES, strict=True):
        np.testing.assert_array_equal(picked.columns[column], maps[name][y, x])
    for name in (MIP, SCALED_MIP, "correlation_mean", "correlation_std", "best_partial"):
        np.testing.assert_array_equal(picked.columns[name], maps[name][y, x], err_msg=name)
    assert (picked.columns["total_correlations"] == sum(COUNTS)).all()
    for axis in ("y", "x"):
        off = picked.columns[f"pos_{axis}_subpixel"] - picked.columns[f"pos_{axis}"]
        assert np.abs(off).max() <= 0.5
        assert np.abs(off).max() > 0


def test_cutoffs_are_those_of_the_whole_map(merged):
    maps = read_maps(merged / "33.zarr")
    z, mip = maps[SCALED_MIP], maps[MIP]
    cutoffs = {m: find_peaks(merged / "33.zarr", method=m).about.cutoff for m in METHODS}
    assert cutoffs["gaussian"] == gaussian_cutoff(z.size, sum(COUNTS))
    assert cutoffs["gev"] == gev_cutoff(histogram_of(z, Z_AXIS))
    picked = find_peaks(merged / "33.zarr", method="pvalue")
    exact = from_maps(mip, z).neg_log_p(mip, z)
    y, x = picked.columns["pos_y"], picked.columns["pos_x"]
    assert cutoffs["pvalue"] == 8.0
    np.testing.assert_allclose(picked.columns["neg_log_p"], exact[y, x], rtol=1e-9)
    found = select_peaks(*np.nonzero(exact >= 8), exact[exact >= 8], 10.0)
    assert len(found) == len(picked)


@pytest.mark.parametrize(("mip_scale", "spread"), [(0.01, 0.1), (1, 0.01), (1, 0.3), (50, 0.1)])
def test_p_values_of_small_maps_are_exact_whatever_their_spread(tmp_path, mip_scale, spread):
    rng, shape, count = np.random.default_rng(3), (100, 100), 1000
    result = make_result(rng, shape, count)
    std = np.clip(rng.normal(1, spread, shape), 0.2, None) * mip_scale
    result["mip"] = (std * rng.gumbel(4, 0.25, shape)).astype(np.float32)
    result["correlation_sum"][:] = 0
    result["correlation_squared_sum"] = (count * std**2).astype(np.float32)
    search = write_search(tmp_path / "RUN.zarr", [result], [count])
    ocelot_em.merge(search, tmp_path / "OUT.zarr")
    picked = find_peaks(tmp_path / "OUT.zarr", method="pvalue", min_distance=0)
    maps = read_maps(tmp_path / "OUT.zarr")
    exact = from_maps(maps[MIP], maps[SCALED_MIP]).neg_log_p(maps[MIP], maps[SCALED_MIP])
    np.testing.assert_allclose(picked.columns["neg_log_p"], np.sort(exact[exact >= 8])[::-1])
    assert len(picked) > 0


def test_counts_that_float64_cannot_hold_are_exact_in_tables(tmp_path):
    """Also where a NaN left a device out, and where another exposure is shown."""
    rng, shape, counts = np.random.default_rng(4), (30, 30), (2**55 + 1, 2**54 + 3)
    search = tmp_path / "R.zarr"
    for number, origin in enumerate([(0, 0), (3, 5)]):
        info = ocelot_em.SearchInfo(exposure=ocelot_em.Exposure(f"e{number}", origin, number))
        for k, count in enumerate(counts):
            result = make_result(rng, shape, count)
            ocelot_em.write_partial(search, f"p{k}", result, total_projections=count, search=info)
    result["mip"][10:20] = np.nan
    for folder in unsealed(search).glob("**/p1/mip/c/0"):
        write_chunk(open_objects(folder), "0", result["mip"])
    ocelot_em.merge(search, tmp_path / "M.zarr", nan="mask")
    table = find_peaks(tmp_path / "M.zarr", cutoff=5.0, same_distance=0)
    is_masked = (table.columns["pos_y"] >= 10) & (table.columns["pos_y"] < 20)
    expected = np.where(is_masked, counts[0], sum(counts))
    assert 0 < is_masked.sum() < len(table)
    assert set(table.columns["exposure"]) == {"e0", "e1"}
    table.to_csv(tmp_path / "P.csv")
    write_parquet(table, tmp_path / "P.parquet")
    microscope, defocus = (300.0, 2.7, 0.07, 2.5), (5200.0, 4900.0, 25.0, 0.0)
    optics = ocelot_em.Optics(*microscope, *defocus, "micrograph.mrc", "60S.mrc", 1)
    ocelot_em.write_leopard_csv(table.of_exposure("e1"), tmp_path / "L.csv", optics=optics)
    own = expected[table.columns["exposure"] == "e1"]
    for counted, wanted in (
        (table.columns["total_correlations"], expected),
        (ParticleTable.read_csv(tmp_path / "P.csv").columns["total_correlations"], expected),
        (read_parquet(tmp_path / "P.parquet").columns["total_correlations"], expected),
        (pd.read_csv(tmp_path / "L.csv")["total_correlations"].to_numpy(), own),
    ):
        assert counted.dtype == np.int64
        np.testing.assert_array_equal(counted, wanted)


def test_only_valid_pixels(tmp_path, rng):
    results = particles_of(rng)
    info = ocelot_em.SearchInfo(template_box=40)
    for number, (result, count) in enumerate(zip(results, COUNTS, strict=True)):
        name = f"p{number}"
        ocelot_em.write_partial(
            tmp_path / "R.zarr", name, result, total_projections=count, search=info
        )
    ocelot_em.merge(tmp_path / "R.zarr", tmp_path / "M.zarr", tile_size=32, threads=2)
    for method in METHODS:
        columns = find_peaks(tmp_path / "M.zarr", method=method).columns
        assert columns["pos_y"].max() < 111
        assert columns["pos_x"].max() < 151
    assert {(75, 95), (0, 0)} <= set(zip(columns["pos_y"], columns["pos_x"], strict=True))


def test_masked_pixels_have_their_own_counts(tmp_path, rng):
    import zarr

    search = unsealed(write_search(tmp_path / "RUN.zarr", particles_of(rng), COUNTS))
    zarr.open_array(search / "partials/p0/correlation_sum", mode="r+")[70:80] = np.nan
    ocelot_em.merge(search, tmp_path / "M.zarr", nan="mask", tile_size=32, threads=2)
    columns = find_peaks(tmp_path / "M.zarr", cutoff=7).columns
    counts = dict(zip(columns["pos_y"], columns["total_correlations"], strict=True))
    assert counts[75] == sum(COUNTS[1:])
    assert counts[149] == sum(COUNTS)


def test_what_cannot_be_picked(tmp_path, rng):
    search = write_search(tmp_path / "RUN.zarr", particles_of(rng), COUNTS)
    with pytest.raises(FormatError, match="merge it first"):
        find_peaks(search)
    ocelot_em.merge(search, tmp_path / "M.zarr", threads=2)
    with pytest.raises(InvalidInputError, match=r"option method: .*got 'luck'"):
        find_peaks(tmp_path / "M.zarr", method="luck")
    with pytest.raises(InvalidInputError, match="false_positives"):
        find_peaks(tmp_path / "M.zarr", false_positives=0)
    assert len(find_peaks(tmp_path / "M.zarr", cutoff=1e6)) == 0
    (tmp_path / "M.zarr/statistics/zarr.json").unlink()
    with pytest.raises(IncompleteError, match="without statistics"):
        find_peaks(tmp_path / "M.zarr")


@pytest.fixture(scope="module", params=["explicit", "indexed"])
def real(request, tmp_path_factory):
    """The merged result of a real search."""
    place, indexed = tmp_path_factory.mktemp("real"), request.param == "indexed"
    options = ocelot_em.ImportOptions(
        search_space=SHARED / "search_space.npz" if indexed else None, template_box=56
    )
    shards = [SHARED / f"A_shard{number}.npz" for number in range(4)]
    ocelot_em.import_results(shards, place / "RUN.zarr", options)
    ocelot_em.merge(place / "RUN.zarr", place / "M.zarr", tile_size=100, threads=2)
    return place / "M.zarr"


@pytest.mark.skipif(not SHARED.exists(), reason=f"the larger real data is not at {SHARED}")
@pytest.mark.parametrize(
    ("method", "file"), [("gaussian", "zscore"), ("gev", "gev"), ("pvalue", "pvalue")]
)
def test_the_particles_of_a_real_search(real, method, file):
    picked = find_peaks(real, method=method, min_distance=5)  # that of the version which ran
    with (SHARED / f"A_official_peaks_{file}.csv").open() as lines:
        theirs = list(csv.DictReader(lines))
    assert len(picked) == len(theirs) == (24 if file == "pvalue" else 16)
    if method == "gaussian":
        assert picked.about.cutoff == pytest.approx(6.4726, abs=5e-5)
    if method == "gev":
        assert picked.about.cutoff == pytest.approx(6.2776, abs=0.05)
    names = {name: name for name in theirs[0]} | {"correlation_variance": "correlation_std"}
    for their_name, our_name in names.items():
        expected = np.array([float(row[their_name]) for row in theirs])
        np.testing.assert_allclose(
            picked.columns[our_name].astype(float), expected, rtol=2e-6, atol=1e-5
        )
    # Leopard-EM's own function finds as many with its later radius of 10 pixels.
    assert len(find_peaks(real, method=method)) == (19 if file == "pvalue" else 16)
