"""Partials whose pixels were correlated with different numbers of projections, end to end."""

import re
from functools import partial

import numpy as np
import pytest

import ocelot_em
import oracle
from builders import flip_byte
from helpers import SPACE, assert_same_maps, make_result, read_maps, write_search
from ocelot_em.cli.main import run
from ocelot_em.errors import (
    InvalidDataError,
    InvalidInputError,
    TilesFailedError,
)
from ocelot_em.io.hdf5 import write_hdf5
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.maps import COUNT, INDEX, MIP, POSES, SQUARED_SUM, SUM, PartialMaps
from ocelot_em.particles.estimates import expected_above
from ocelot_em.particles.population import Population
from ocelot_em.run.observer import Observer
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import read_partial_attributes

SHAPE = (37, 52)
FORMS = ["explicit", "indexed"]


@pytest.fixture(scope="module")
def made():
    """Results and counts of three devices: two with a map of counts, one without."""
    rng = np.random.default_rng(138)
    results = [make_result(rng, SHAPE, 3000, ties=True) for _ in range(3)]
    counts = [rng.integers(1, 3000, SHAPE).astype("u2"), 2**31 + 7, np.full(SHAPE, 3000)]
    counts[2][:, 30:] = 750
    for number, idle in ((0, np.s_[:9]), (2, np.s_[5:20])):
        result, count = results[number], counts[number]
        count[idle] = result[SUM][idle] = result[SQUARED_SUM][idle] = 0
        result[MIP][idle], result[INDEX][idle] = -np.inf, -1
        for name in POSES:
            result[name][idle] = np.nan
    return results, counts


@pytest.fixture(scope="module")
def merged(made, tmp_path_factory):
    """Searches of both forms, and what they merge to; nobody may change them."""
    place = tmp_path_factory.mktemp("counts")
    for form in FORMS:
        write_search(place / form, *made, indexed=form == "indexed")
        ocelot_em.merge(place / form, place / f"{form}-merged", tile_size=16, threads=2)
    return place


def expected_of(results, counts, *, indexed):
    """What the oracle merges, with counts as a map."""
    tables = (SPACE.euler_angles, SPACE.defocus_values, SPACE.pixel_values) if indexed else None
    partials = [
        PartialMaps(
            result[MIP],
            (result[INDEX],) if indexed else tuple(result[name] for name in POSES),
            result[SUM],
            result[SQUARED_SUM],
            count,
            number,
        )
        for number, (result, count) in enumerate(zip(results, counts, strict=True))
    ]
    found = oracle.merge(partials, tables)
    return found | {COUNT: found[COUNT].astype(np.int64)}


@pytest.mark.parametrize("form", FORMS)
def test_a_mixed_search_equals_the_oracle_bit_for_bit(made, merged, form):
    expected = expected_of(*made, indexed=form == "indexed")
    assert_same_maps(read_maps(merged / f"{form}-merged"), expected)
    for store in (form, f"{form}-merged"):
        assert ocelot_em.check(merged / store) == []
    about = ocelot_em.describe(merged / form)
    assert about.with_counts == ("p0", "p2")
    highest = int(made[1][0].max())
    assert about.partials[0] == ("p0", "complete", highest)
    assert about.attributes.total_projections == highest + 2**31 + 7 + 3000


def test_statistics_and_the_cutoff_are_of_the_counts(made, merged):
    results, counts = made
    result = MergedResult.open(merged / "explicit-merged")
    maps = read_maps(merged / "explicit-merged")
    searched = maps[MIP] > -np.inf
    own = Population(result, 0)
    assert own.correlations == int(maps[COUNT][searched].sum())
    particles = ocelot_em.find_peaks(result)
    assert particles.about.cutoff == ocelot_em.gaussian_cutoff(own.correlations, 1)
    noise = expected_above(result, particles, np.array([particles.about.cutoff]))
    assert noise == pytest.approx([1], rel=1e-3)
    for number in (0, 2):
        source, n = result.statistics.sources[number], counts[number].sum(dtype=float)
        mean = results[number][SUM].sum(dtype=float) / n
        square = results[number][SQUARED_SUM].sum(dtype=float) / n
        assert (source.mean, source.std) == pytest.approx((mean, (square - mean**2) ** 0.5))
        assert result.statistics.partials[number].mean_projections == n / maps[MIP].size
    assert result.statistics.partials[1].mean_projections is None


def test_lazily_as_stored_and_counts_are_maps(made, merged):
    maps = ocelot_em.open_partials(merged / "explicit")
    assert maps[COUNT].dims == ("partial", "y", "x")
    for number, count in enumerate(made[1]):
        np.testing.assert_array_equal(maps[COUNT][number], np.broadcast_to(count, SHAPE))
    assert not (maps[SUM].sum("partial") / maps[COUNT].sum("partial")).isnull().any()
    lazy = ocelot_em.lazy_merge(merged / "explicit")
    np.testing.assert_array_equal(lazy[COUNT], read_maps(merged / "explicit-merged")[COUNT])


def test_merging_in_two_steps_resuming_and_leaving_out(made, merged, tmp_path):
    results, counts = made

    class Interrupting(Observer):
        def tile_ended(self, outcome):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ocelot_em.merge(merged / "indexed", tmp_path / "M", tile_size=16, observer=Interrupting())
    assert ocelot_em.merge(merged / "indexed", tmp_path / "M").n_merged < 12
    once = read_maps(merged / "indexed-merged")
    assert_same_maps(read_maps(tmp_path / "M"), once)
    write_search(tmp_path / "a", results[:1], counts[:1], indexed=True)
    write_search(tmp_path / "b", results[1:], counts[1:], indexed=True, first=1)
    ocelot_em.merge(tmp_path / "a", tmp_path / "A", derived="none")
    ocelot_em.merge([tmp_path / "A", tmp_path / "b"], tmp_path / "TWO")
    assert_same_maps(read_maps(tmp_path / "TWO"), once)
    ocelot_em.merge(merged / "indexed", tmp_path / "W", without=["p0"])
    assert_same_maps(read_maps(tmp_path / "W"), expected_of(results[1:], counts[1:], indexed=True))


def test_groups_have_counts_of_their_own(made, merged, tmp_path):
    ocelot_em.merge(merged / "indexed", tmp_path / "G", group_by="sector", threads=2)
    found = read_maps(tmp_path / "G")
    each = [
        expected_of([result], [count], indexed=True) for result, count in zip(*made, strict=True)
    ]
    z = np.stack([own["scaled_mip"] for own in each])
    best = np.where(np.isnan(z), -np.inf, z).argmax(axis=0)
    np.testing.assert_array_equal(found["best_group"], best)
    for name in (COUNT, "scaled_mip", "correlation_std"):
        own = np.take_along_axis(np.stack([one[name] for one in each]), best[None], axis=0)[0]
        np.testing.assert_array_equal(found[name], own)
    means = [own.mean_projections for own in MergedResult.open(tmp_path / "G").statistics.exposures]
    assert means == [made[1][0].mean(), None, made[1][2].mean()]
    assert ocelot_em.check(tmp_path / "G") == []


def test_damage_of_a_map_of_counts_is_found(made, tmp_path):
    results, counts = made
    search = write_search(tmp_path / "RUN", results, counts)
    flip_byte(search / "partials/p2" / COUNT / "c/0/0", 40)
    (problem,) = ocelot_em.check(search)
    assert f"partial 'p2': {COUNT}: chunk (0, 0)" in problem
    with pytest.raises(TilesFailedError, match=f"'p2': {COUNT}"):
        ocelot_em.merge(search, tmp_path / "OUT")


def changed(counts, value, at=(30, 40)):
    """A map of counts with another value at a pixel where something was searched."""
    found = counts.astype(np.int64)
    found[at] = value
    return found


WRONG = [
    (lambda c: changed(c, 0), rf"{COUNT}: 0 where mip was searched at 1 pixel, first \(30, 40\)"),
    (lambda c: changed(c, -3), rf"{COUNT}: expected 0 to \d+, got -3 to -3 at 1 pixel, first"),
    (lambda c: c.astype("f4"), rf"{COUNT}: expected .*, got float32"),
    (lambda c: c[:-1], rf"{COUNT}: expected .*shape \(37, 52\).*, got .*\(36, 52\)"),
    (lambda c: changed(c, 2**62 + 1), "expected a count from 0 to 2[*][*]62"),
]


@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize(("spoil", "problem"), WRONG)
def test_wrong_maps_of_counts_are_refused(made, tmp_path, spoil, problem, imported):
    result, counts = made[0][0], spoil(made[1][0])
    if imported:
        np.savez(tmp_path / "gpu0.npz", **result, total_projections=counts)
        add = partial(ocelot_em.import_results, tmp_path / "gpu0.npz", tmp_path / "R")
    else:
        options = {"total_projections": counts}
        add = partial(ocelot_em.write_partial, tmp_path / "R", "p", result, **options)
    with pytest.raises((InvalidDataError, InvalidInputError), match=problem):
        add()
    assert not (tmp_path / "R").exists()


@pytest.mark.parametrize("imported", [False, True])
def test_an_upper_bound_may_be_given_and_must_be_one(made, tmp_path, imported):
    result = made[0][0] | {COUNT: made[1][0]}
    np.savez(tmp_path / "gpu0.npz", **result)

    def add(store, count):
        if imported:
            ocelot_em.import_results(tmp_path / "gpu0.npz", store, total_projections=count)
        else:
            ocelot_em.write_partial(store, "gpu0", result, total_projections=count)

    add(tmp_path / "R", 4000)
    found = read_partial_attributes(open_objects(tmp_path / "R"), "gpu0")
    assert (found.total_projections, found.has_counts) == (4000, True)
    with pytest.raises(InvalidDataError, match=f"{COUNT}: expected 0 to 100, got"):
        add(tmp_path / "S", 100)


def test_a_writer_needs_to_know_of_a_map_of_counts(made, tmp_path):
    region, plain = ocelot_em.Region(0, 37, 0, 52), made[0][0]
    for has_counts, maps, problem in (
        (False, plain | {COUNT: made[1][0]}, "expected one count for all pixels, got a map"),
        (True, plain, "missing; expected a map"),
    ):
        info = ocelot_em.SearchInfo(has_counts=has_counts)
        writer = ocelot_em.PartialWriter(
            tmp_path / "R", "p", SHAPE, total_projections=3000, search=info
        )
        with pytest.raises(InvalidDataError, match=f"p: {COUNT}: {problem}"), writer:
            writer.write(region, maps)


def test_values_that_another_writer_got_wrong_are_found_by_merge_and_check(made, tmp_path):
    options = {"total_projections": 3000, "search": ocelot_em.SearchInfo(has_counts=True)}
    with ocelot_em.PartialWriter(tmp_path / "R", "p", SHAPE, **options) as writer:
        maps = made[0][0] | {COUNT: changed(made[1][0], 0)}
        writer.write(ocelot_em.Region(0, 37, 0, 52), maps, validated=True)
    problem = f"{COUNT}: 0 where mip was searched at 1 pixel, first (30, 40)"
    assert [found for found in ocelot_em.check(tmp_path / "R") if problem in found]
    with pytest.raises(TilesFailedError, match=re.escape(problem)):
        ocelot_em.merge(tmp_path / "R", tmp_path / "M")


@pytest.mark.parametrize("kind", ["npz", pytest.param("pt", marks=pytest.mark.slow)])
def test_files_with_maps_of_counts_are_imported(made, merged, tmp_path, kind, capsys):
    files = []
    for number, (result, count) in enumerate(zip(*made, strict=True)):
        files.append(tmp_path / f"p{number}.{kind}")
        maps = result | {COUNT: np.asarray(count)}
        if kind == "npz":
            np.savez_compressed(files[-1], **maps)
        else:
            torch = pytest.importorskip("torch")
            maps[COUNT] = maps[COUNT].astype(np.int64)
            torch.save({name: torch.as_tensor(values) for name, values in maps.items()}, files[-1])
    words = [*map(str, files), "--output", str(tmp_path / "RUN")]
    for _ in range(2):  # the second time, nothing is left to do
        assert run(["import", *words]) == 0
    assert run(["info", str(tmp_path / "RUN")]) == 0
    assert "counts        differ from pixel to pixel in p0, p2" in capsys.readouterr().out
    ocelot_em.merge(tmp_path / "RUN", tmp_path / "M", tile_size=16)
    assert_same_maps(read_maps(tmp_path / "M"), read_maps(merged / "explicit-merged"))


def test_an_hdf5_file_keeps_the_counts(merged, tmp_path):
    """Also of pixels that nothing searched, whose mean is NaN."""
    pytest.importorskip("h5py")
    ocelot_em.merge(merged / "explicit", tmp_path / "ONE", without=["p1", "p2"])
    write_hdf5(tmp_path / "ONE", tmp_path / "one.h5")
    ocelot_em.import_finished(
        tmp_path / "one.h5", tmp_path / "RUN", total_projections=5000, pixel_size_offset_angstrom=0
    )
    ocelot_em.merge(tmp_path / "RUN", tmp_path / "M")
    before, after = read_maps(tmp_path / "ONE"), read_maps(tmp_path / "M")
    np.testing.assert_array_equal(after[COUNT], before[COUNT])
    for name in (MIP, "correlation_mean", "correlation_std"):
        np.testing.assert_array_equal(after[name], before[name])
