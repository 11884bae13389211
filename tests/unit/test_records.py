"""What a merge collects, against scope in the finished maps."""

import dataclasses
import importlib
import math
from itertools import pairwise

import numpy as np
import pytest

import ocelot_em
from exact_ranks import histogram_of, joint_histogram_of
from helpers import SPACE, combinations, make_result, read_maps, write_search
from host_device import LateDevice, host_kernels
from ocelot_em.errors import FormatError, MissingChunkError
from ocelot_em.kernels.collect import count_wins
from ocelot_em.kernels.device import DeviceFacts
from ocelot_em.merge import job
from ocelot_em.merge.outcome import Outcome, Tally, TileSummary, joined
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats import collected
from ocelot_em.merge.stats.collected import (
    CANDIDATE_FIELDS,
    Histograms,
    StatisticsScope,
    TileStatistics,
    neighbours_of,
)
from ocelot_em.merge.stats.totals import ExactSum, TileTotals, Totals
from ocelot_em.model.histograms import MIP_AXIS, Z_AXIS
from ocelot_em.model.maps import MapSet
from ocelot_em.model.regions import Region
from ocelot_em.particles.picking import all_candidates, find_peaks
from ocelot_em.run import clusters as cluster
from ocelot_em.store.partials import write_partial
from ocelot_em.store.search_info import SearchInfo

COUNTS = (1000, 2**31 + 7, 300, 25)
SHAPE, BOX = (70, 90), 11
VALID = (60, 80)


def make_search(place, rng, *, indexed=False):
    """Wrapped-around maps, with pixels that nobody, or one, searched, and one without variance."""
    results = [make_result(rng, SHAPE, count) for count in COUNTS]
    for number, result in enumerate(results):
        idle = (slice(0, 4), slice(0, 9)) if number else (slice(0, 5), slice(None))
        result["mip"][idle], result["best_global_index"][idle] = -np.inf, -1
        result["correlation_sum"][9, 9] = result["correlation_squared_sum"][9, 9] = 0
    info = SearchInfo(template_box=BOX, search_space=SPACE if indexed else None)
    for number, (result, count) in enumerate(zip(results, COUNTS, strict=True)):
        write_partial(
            place, f"p{number}", result, total_projections=count, order=number, search=info
        )
    return place, results


@pytest.fixture
def low_level(monkeypatch):
    """Makes a fortieth of the pixels candidates, with room for all."""
    for name in ("layout", "summary", "candidates"):
        module = importlib.import_module(f"ocelot_em.merge.stats.{name}")
        monkeypatch.setattr(module, "candidate_level", lambda _: 6.5)
    monkeypatch.setattr(collected, "MIN_CANDIDATES", 6300)


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch):
    if request.param == "cuda":
        host_kernels()
        device = LateDevice()
        monkeypatch.setattr(cluster, "find_devices", lambda: [DeviceFacts("stand-in", 2**30)])
        monkeypatch.setattr(cluster, "open_device", lambda: device)
        monkeypatch.setattr(job, "open_device", lambda: device)
    return request.param


def valid_of(maps):
    return {name: values[: VALID[0], : VALID[1]] for name, values in maps.items()}


@pytest.mark.parametrize(
    ("device", "form", "tile_size", "nan"),
    combinations(
        *(["cpu", "cuda"], ["explicit", "indexed"], [16, 33, None], ["raise", "mask"]),
        fast=[
            ("cpu", "explicit", 16, "raise"),
            ("cpu", "indexed", 33, "mask"),
            ("cuda", "explicit", None, "mask"),
            ("cuda", "indexed", 33, "raise"),
        ],
    ),
    indirect=["device"],
)
def test_everything_is_what_the_finished_maps_say(
    tmp_path, rng, low_level, device, form, tile_size, nan
):
    indexed = form == "indexed"
    search, results = make_search(tmp_path / "RUN.zarr", rng, indexed=indexed)
    output = tmp_path / "OUT.zarr"
    ocelot_em.merge(search, output, threads=2, tile_size=tile_size, device=device, nan=nan)
    maps, summary = valid_of(read_maps(output)), MergedResult.open(output).summary
    about, searched = summary.attributes, maps["mip"] > -np.inf
    z, mip = maps["scaled_mip"], maps["mip"]
    assert about.valid_pixels == 60 * 80
    assert about.unsearched_pixels == np.count_nonzero(~searched) == 4 * 9
    assert about.searched_pixels == np.count_nonzero(searched)
    assert about.zero_std_pixels == np.count_nonzero(maps["correlation_std"] == 0) == 1
    assert about.nan_pixels == 0
    assert about.mip_range == (mip[searched].min(), mip[searched].max())
    assert about.scaled_mip_range == (z[searched].min(), z[searched].max())
    for values, found, axis in (
        (mip, summary.histograms.of_mip(), MIP_AXIS),
        (z, summary.histograms.of_z(), Z_AXIS),
    ):
        expected = histogram_of(values[searched], axis)
        np.testing.assert_array_equal(found.counts, expected.counts)
        assert (found.underflow, found.overflow) == (expected.underflow, expected.overflow)
    joint = joint_histogram_of(mip[searched], z[searched])
    np.testing.assert_array_equal(summary.histograms.of_both().counts, joint.counts)
    wins = [np.count_nonzero(maps["best_partial"] == number) for number in range(4)]
    assert [partial.won_pixels for partial in about.partials] == wins
    for source, result, count in zip(about.sources, results, COUNTS, strict=True):
        own = result["correlation_sum"][: VALID[0], : VALID[1]].astype(float) / count
        energy = result["correlation_squared_sum"][: VALID[0], : VALID[1]].astype(float) / count
        assert source.mean == pytest.approx(own.mean(), rel=1e-9, abs=1e-12)
        assert source.mean_spread == pytest.approx(own.std(), rel=1e-6)
        assert source.std == pytest.approx(np.sqrt((energy - own**2).mean()), rel=1e-6)
    assert_candidates(output, maps, indexed)


def assert_candidates(output, maps, indexed):
    candidates, level = all_candidates(output)
    z = maps["scaled_mip"]
    assert level == 6.5
    expected = np.argwhere(z >= np.float32(6.5))
    assert len(expected) > 20
    order = np.lexsort((candidates[:, 1], candidates[:, 0]))
    candidates = candidates[order]
    np.testing.assert_array_equal(candidates[:, :2], expected)
    y, x = expected.T
    names = MapSet("indexed" if indexed else "explicit").merged
    for name in collected.GATHERED:
        column = candidates[:, CANDIDATE_FIELDS.index(name)]
        if name in maps:
            np.testing.assert_array_equal(column, maps[name][y, x], err_msg=name)
        else:
            assert name not in names
            assert np.isnan(column).all()
    inside = (y > 0) & (y < VALID[0] - 1) & (x > 0) & (x < VALID[1] - 1)
    for field, (dy, dx) in zip(collected.NEIGHBOUR_FIELDS, collected.NEIGHBOURS, strict=True):
        column = candidates[:, CANDIDATE_FIELDS.index(field)]
        known = ~np.isnan(column)
        assert known[~inside].mean() < 1
        np.testing.assert_array_equal(column[known], z[y[known] + dy, x[known] + dx])


def test_a_record_without_room_keeps_the_highest_and_says_from_where_on(tmp_path, rng, monkeypatch):
    for name in ("layout", "summary", "candidates"):
        module = importlib.import_module(f"ocelot_em.merge.stats.{name}")
        monkeypatch.setattr(module, "candidate_level", lambda _: 4.0)
    search, _ = make_search(tmp_path / "RUN.zarr", rng)
    ocelot_em.merge(search, tmp_path / "OUT.zarr", threads=2, tile_size=33)
    z = valid_of(read_maps(tmp_path / "OUT.zarr"))["scaled_mip"]
    candidates, level = all_candidates(tmp_path / "OUT.zarr")
    assert level > 4
    found = candidates[:, CANDIDATE_FIELDS.index("scaled_mip")]
    np.testing.assert_array_equal(np.sort(found[found >= level]), np.sort(z[z >= level]))
    about = MergedResult.open(tmp_path / "OUT.zarr").statistics
    assert about.n_candidates == np.count_nonzero(z >= 4)


def test_pixels_that_tie_with_the_lowest_of_a_full_record_are_found(tmp_path):
    result = make_result(np.random.default_rng(1), (40, 40), 1000)
    result["mip"][:] = 3
    result["mip"][10:27, 10:27] = 9
    result["correlation_sum"][:], result["correlation_squared_sum"][:] = 0, 1000
    search = write_search(tmp_path / "RUN.zarr", [result], [1000])
    ocelot_em.merge(search, tmp_path / "OUT.zarr")
    rows, level = all_candidates(tmp_path / "OUT.zarr")
    assert len(rows) == 64
    assert level == np.nextafter(np.float32(9), np.float32(10))
    assert len(find_peaks(tmp_path / "OUT.zarr", cutoff=9.0, min_distance=0)) == 17 * 17


def test_a_missing_or_damaged_record_is_named(tmp_path, rng):
    search, _ = make_search(tmp_path / "RUN.zarr", rng)
    ocelot_em.merge(search, tmp_path / "OUT.zarr")
    record = tmp_path / "OUT.zarr/progress/numbers/c/0"
    data = record.read_bytes()
    record.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"numbers: record 0, pixels \[0:.*corrupt.*CRC32C"):
        all_candidates(tmp_path / "OUT.zarr")
    record.unlink()
    with pytest.raises(MissingChunkError, match=r"record of pixels .* is missing"):
        all_candidates(tmp_path / "OUT.zarr")
    with pytest.raises(FormatError, match="merge it first"):
        MergedResult.open(search)


def test_check_looks_at_records_too(tmp_path, rng):
    search, _ = make_search(tmp_path / "RUN.zarr", rng)
    output = tmp_path / "OUT.zarr"
    ocelot_em.merge(search, output, tile_size=64, threads=2)
    assert ocelot_em.check(output) == []
    (output / "progress/counts/c/1").unlink()
    (output / "progress/numbers/c/2").write_bytes(b"nothing")
    (output / "statistics/mip_histogram/c/0").unlink()
    problems = ocelot_em.check(output)
    assert len(problems) == 3
    for problem, part in zip(problems, ("counts", "numbers", "mip_histogram"), strict=True):
        assert part in problem
    (output / "statistics/zarr.json").unlink()
    assert "'statistics' is missing" in ocelot_em.check(output)[-1]


def test_nothing_searched(tmp_path, rng):
    result = make_result(rng, (5, 6), 0)
    result["mip"][...] = -np.inf
    result["correlation_sum"][...] = result["correlation_squared_sum"][...] = 0
    write_search(tmp_path / "RUN.zarr", [result], [0])
    ocelot_em.merge(tmp_path / "RUN.zarr", tmp_path / "OUT.zarr")
    about = MergedResult.open(tmp_path / "OUT.zarr").statistics
    assert (about.searched_pixels, about.unsearched_pixels) == (0, 30)
    assert about.mip_range is None
    assert about.candidate_level is None
    assert about.sources[0].mean is None
    assert len(all_candidates(tmp_path / "OUT.zarr")[0]) == 0


def test_statistics_survive_storing(rng):
    one = collected.PixelStatistics.from_flat(rng.integers(0, 99, 23).astype(float), 2, 1)
    again = collected.PixelStatistics.from_flat(one.flat, 2, 1)
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(one, field.name))


def statistics_of(output):
    folder = output / "statistics"
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.json")}


@pytest.mark.parametrize("n_lost", [0, 4])
def test_statistics_have_the_same_bits_whatever_a_run_has_merged(tmp_path, rng, n_lost):
    """Of tiles that an earlier run has merged, records are read; the digests cover histograms."""
    search, _ = make_search(tmp_path / "RUN.zarr", rng)
    one, two = tmp_path / "ONE.zarr", tmp_path / "TWO.zarr"
    for output, threads in ((one, 1), (two, 2)):
        ocelot_em.merge(search, output, tile_size=32, threads=threads)
    assert MergedResult.open(one).statistics.searched_pixels == 60 * 80 - 4 * 9
    marks = sorted((two / "progress").rglob("c/*/*/0"))
    for mark in rng.permutation(marks)[:n_lost]:
        mark.unlink()
    (two / "statistics/zarr.json").unlink()
    report = ocelot_em.merge(search, two, tile_size=32, threads=2)
    assert report.n_merged == n_lost
    assert statistics_of(two) == statistics_of(one)


def test_sums_are_exact_whatever_their_order(rng):
    rows = rng.normal(size=(50, 2, 3)) * 10.0 ** rng.integers(-320, 200, (50, 2, 3))
    rows[0, 0, 1], rows[7, 0, 2], rows[8, 1, 2] = np.inf, np.nan, 1e308
    sums = []
    for order in (rng.permutation(50), np.arange(50)):
        total = ExactSum((2, 3))
        for row in rows[order]:
            total.add(row)
        sums.append(total.rounded)
    np.testing.assert_array_equal(*sums)
    exact = [math.fsum(column) for column in rows.reshape(50, -1).T]
    np.testing.assert_array_equal(sums[0].flat, exact)


TILE, COUNTED, LEVEL = Region(0, 8, 100, 1300), Region(0, 7, 100, 1290), 8.0


def tile_maps(rng, n_partials=3):
    """Maps of a tile, with all that is special, each in a row of its own."""
    shape = TILE.shape
    maps = {
        "mip": rng.normal(6, 2, shape).astype(np.float32),
        "scaled_mip": 0.1 + abs(rng.normal(5, 2, shape)).astype(np.float32),
        "correlation_std": np.ones(shape, np.float32),
        "best_partial": rng.integers(-1, n_partials, shape, dtype=np.int32),
    }
    mip, z = maps["mip"], maps["scaled_mip"]
    mip[0, :3], z[0, :3], mip[0, 1100] = -np.inf, np.nan, -np.inf  # nobody searched
    mip[1, 6:9], z[1, 6:9] = (-40, 40, 3e38), (70, 20, 3e38)  # beyond histograms
    z[2, 10:12], maps["correlation_std"][2, 10] = 0, 0
    z[3, 5] = np.nan
    mip[4, 5] = np.nan
    z[5, 5], maps["correlation_std"][5, 5] = -0.0, 0
    z[6, 5], z[6, 6] = -3, np.copysign(np.nan, -1)
    return maps


def collect(collection, maps, cuts):
    """Hand a tile over in runs of pixels."""
    collection.begin(TILE, StatisticsScope(COUNTED, LEVEL, 3, 1))
    flat = {name: values.reshape(-1) for name, values in maps.items()}
    for start, end in pairwise((0, *cuts, TILE.size)):
        run = {name: values[start:end] for name, values in flat.items()}
        collection.count_pixels(start, run)
        collection.count_wins(start, run["best_partial"])
    collection.find_candidates(maps)


@pytest.mark.parametrize("capacity", [2000, 300, 100], ids=["room", "some room", "little room"])
@pytest.mark.parametrize("cuts", [(), (1200, 6000), (7, 1201, 7111)], ids=str)
def test_a_tile_is_counted_at_once_or_in_runs(rng, cuts, capacity):
    collection = TileStatistics(capacity)
    collect(collection, tile_maps(rng), (600,))  # what an earlier tile left behind
    maps = tile_maps(rng)
    collect(collection, maps, cuts)
    own = {name: values[:7, :1190] for name, values in maps.items()}
    mip, z = own["mip"], own["scaled_mip"]
    counted = (mip > -np.inf) & ~np.isnan(z)
    histograms = Histograms.from_flat(collection.counts.astype(np.int64))
    for values, found, axis in (
        (mip, histograms.of_mip(), MIP_AXIS),
        (z, histograms.of_z(), Z_AXIS),
    ):
        expected = histogram_of(values[counted], axis)
        np.testing.assert_array_equal(found.counts, expected.counts)
        assert (found.underflow, found.overflow) == (expected.underflow, expected.overflow)
        assert found.overflow > 0
    joint = joint_histogram_of(mip[counted], z[counted])
    np.testing.assert_array_equal(histograms.joint, joint.counts)
    statistics = collection.statistics
    assert list(statistics.extremes) == [
        -40,
        mip[counted].max(),
        z[counted].min(),
        z[counted].max(),
    ]
    assert list(statistics.counts) == [3, 2, 4]
    wins = [np.count_nonzero(own["best_partial"] == number) for number in range(3)]
    assert list(statistics.wins) == wins
    places = np.argwhere(z >= LEVEL)
    assert 4 * 100 < statistics.n_candidates == len(places) < 4 * 300
    if len(places) > capacity:
        order = np.argsort(-z[z >= LEVEL], kind="stable")[:capacity]
        places = places[np.sort(order)]
    rows = collection.candidates[: len(places)]
    assert np.isnan(collection.candidates[len(places) :]).all()
    np.testing.assert_array_equal(rows[:, :2] - (0, 100), places)
    y, x = places.T
    np.testing.assert_array_equal(rows[:, CANDIDATE_FIELDS.index("mip")], mip[y, x])
    for name, beside in neighbours_of(z, y, x):
        np.testing.assert_array_equal(rows[:, CANDIDATE_FIELDS.index(name)], beside)


def test_a_tile_that_failed_leaves_nothing_behind(rng):
    collection, maps = TileStatistics(2000), tile_maps(rng)
    plain = {**maps, "mip": np.full(TILE.shape, 6, np.float32)}
    collect(collection, maps, ())
    expected = collection.counts.copy()
    collect(collection, plain, ())
    collection.begin(TILE, StatisticsScope(COUNTED, LEVEL, 3, 1))
    collection.count_pixels(0, maps)  # and it is never looked at
    collect(collection, maps, ())
    np.testing.assert_array_equal(collection.counts, expected)
    collection.begin(
        TILE, StatisticsScope(Region(50, 60, 0, 9), LEVEL, 3, 1)
    )  # no pixel of it counts
    collection.find_candidates(maps)
    assert not collection.counts.any()
    assert not np.isfinite(collection.statistics.extremes).any()


@pytest.mark.parametrize("n", [0, 1, 3])
def test_outcomes_of_a_task_have_their_histograms_together(rng, n):
    collection, flat = TileStatistics(300), np.zeros(collected.N_FLAT, np.int64)
    outcomes, wins = [Outcome(9, 9, None, "failed")], np.zeros(3, np.int64)
    for ix in range(n):
        collect(collection, tile_maps(rng), ())
        flat += collection.counts
        wins += collection.statistics.wins
        done = Outcome(0, ix, TileSummary(*range(9)))
        outcomes.append(dataclasses.replace(done, statistics=TileTotals.of(collection)))
    together = joined(outcomes)
    assert together == outcomes
    assert [len(one.statistics.bins) > 0 for one in together[1:]] == [True, False, False][:n]
    for several in (outcomes, together):
        totals = Totals(StatisticsScope(COUNTED, LEVEL, 3, 1), np.zeros_like(flat))
        tally = Tally(lambda _: None, lambda: None, lambda one: totals.add(one.statistics))  # noqa: B023
        for one in several:
            tally.count(one)
        np.testing.assert_array_equal(totals.flat, flat)
        np.testing.assert_array_equal(totals.statistics.wins, wins)


@pytest.mark.parametrize("n_partials", [1, 8, 9, 40])
def test_wins_of_few_and_of_many(rng, n_partials):
    numbers = tile_maps(rng, n_partials)["best_partial"]
    wins = np.zeros(n_partials, np.int64)
    count_wins(numbers.reshape(-1), (0, 1200, (7, 1190)), wins)
    expected = np.bincount(numbers[:7, :1190].ravel() + 1, minlength=n_partials + 1)[1:]
    np.testing.assert_array_equal(wins, expected)
