"""Merging from partials to maps: bits, order, resumption, refusals, damage."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ocelot_em
from builders import unsealed
from helpers import (
    assert_same_maps,
    chunk_bytes,
    combinations,
    expensive,
    make_result,
    read_maps,
    unfinish,
    write_search,
)
from ocelot_em.errors import (
    ClusterLostError,
    FormatError,
    IncompleteError,
    InvalidInputError,
    OcelotError,
    OutputExistsError,
    PlanError,
    TilesFailedError,
)
from ocelot_em.merge.job import JobSpec
from ocelot_em.merge.outcome import SUMMARY_FIELDS, MergeReport, Outcome, Tiles, TileSummary
from ocelot_em.model.maps import (
    BEST_PARTIAL,
    COUNT,
    INDEX,
    MEAN,
    POSES,
    SCALED_MIP,
    SQUARED_SUM,
    STD,
    SUM,
)
from ocelot_em.run.clusters import Cluster
from ocelot_em.run.executors import ClientExecutor
from ocelot_em.run.observer import Observer
from ocelot_em.store import arrays as store
from ocelot_em.store.objects import open_objects

SUMMED = (SCALED_MIP, MEAN, STD, SUM, SQUARED_SUM)
COUNTS = (1000, 2**31 + 7, 300, 25)
SHAPE = (45, 60)


FORMS = ["explicit", "indexed"]
both_forms = pytest.mark.parametrize("search", FORMS, indirect=True)
"""For what may depend on the form of the poses; of all else the second tier has both."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Searches by form, and what they merge to; nobody may change them."""
    place, rng = tmp_path_factory.mktemp("written"), np.random.default_rng(20260101)
    results = [make_result(rng, SHAPE, count, ties=True) for count in COUNTS]
    for form in FORMS:
        search = write_search(place / form, results, COUNTS, indexed=form == "indexed")
        merge(search, place / f"{form}-merged")
    return place


@pytest.fixture(params=["explicit", pytest.param("indexed", marks=pytest.mark.slow)])
def search(request: pytest.FixtureRequest, written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written / request.param, tmp_path / "RUN.zarr"))


def merge(inputs: object, output: Path, **options: object) -> MergeReport:
    return ocelot_em.merge(inputs, output, threads=2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("form", "tile_size"), [("explicit", 16), ("indexed", 16), ("explicit", 33), ("indexed", 60)]
)
def test_any_tile_size_gives_the_same_bits(
    written: Path, form: str, tmp_path: Path, tile_size: int
) -> None:
    merge(written / form, tmp_path / "B.zarr", tile_size=tile_size)
    assert_same_maps(read_maps(written / f"{form}-merged"), read_maps(tmp_path / "B.zarr"))


def test_equals_stacking_everything(tmp_path: Path, rng: np.random.Generator) -> None:
    results = [make_result(rng, SHAPE, count, ties=True) for count in COUNTS]
    write_search(tmp_path / "RUN.zarr", results, COUNTS)
    merge(tmp_path / "RUN.zarr", tmp_path / "OUT.zarr", tile_size=32)
    maps = read_maps(tmp_path / "OUT.zarr")
    mips = np.stack([result["mip"] for result in results])
    winner = mips.argmax(axis=0)
    np.testing.assert_array_equal(maps["mip"], mips.max(axis=0))
    np.testing.assert_array_equal(maps[BEST_PARTIAL], winner)
    for name in POSES:
        poses = np.stack([result[name] for result in results])
        expected = np.take_along_axis(poses, winner[None], axis=0)[0]
        np.testing.assert_array_equal(maps[name], expected)
    total = sum(COUNTS)
    mean = sum(result[SUM].astype(np.float64) for result in results) / total
    second = sum(result[SQUARED_SUM].astype(np.float64) for result in results) / total
    std = np.sqrt(np.maximum(second - mean**2, 0))
    np.testing.assert_allclose(maps[MEAN], mean, rtol=1e-7)
    np.testing.assert_allclose(maps[STD], std, rtol=1e-7)
    np.testing.assert_allclose(maps[SCALED_MIP], (maps["mip"] - mean) / std, rtol=3e-7)


@pytest.mark.parametrize(
    ("form", "split"),
    combinations(FORMS, [1, 2, 3], fast=[("explicit", 2), ("indexed", 1), ("indexed", 3)]),
)
def test_two_steps_equal_one(
    tmp_path: Path, rng: np.random.Generator, form: str, split: int
) -> None:
    indexed = form == "indexed"
    results = [make_result(rng, SHAPE, count, ties=True) for count in COUNTS]
    write_search(tmp_path / "all.zarr", results, COUNTS, indexed=indexed)
    write_search(tmp_path / "a.zarr", results[:split], COUNTS[:split], indexed=indexed)
    write_search(tmp_path / "b.zarr", results[split:], COUNTS[split:], indexed=indexed, first=split)
    merge(tmp_path / "all.zarr", tmp_path / "ONE.zarr")
    merge(tmp_path / "a.zarr", tmp_path / "A.zarr", tile_size=40)
    merge([tmp_path / "A.zarr", tmp_path / "b.zarr"], tmp_path / "TWO.zarr", tile_size=64)
    one, two = read_maps(tmp_path / "ONE.zarr"), read_maps(tmp_path / "TWO.zarr")
    assert_same_maps(one, two, rounded=SUMMED)
    attributes = [ocelot_em.describe(tmp_path / f"{n}.zarr").attributes for n in ("ONE", "TWO")]
    assert attributes[0].total_projections == attributes[1].total_projections == sum(COUNTS)
    assert [p.name for p in attributes[1].partials] == ["p0", "p1", "p2", "p3"]


@pytest.mark.parametrize("most_tiles", [6, pytest.param(12, marks=pytest.mark.slow)])
@expensive
@given(
    shape=st.sampled_from([(1, 1), (1, 6), (5, 4), (1, 77), (53, 1), (3, 1030), (40, 41)]),
    n=st.integers(1, 4),
    tile_size=st.sampled_from((1, 2, 13, 64)),
    seed=st.integers(0, 99),
)
def test_thin_maps_and_tiny_tiles(
    tmp_path_factory: pytest.TempPathFactory,
    most_tiles: int,
    shape: tuple[int, int],
    n: int,
    tile_size: int,
    seed: int,
) -> None:
    """At most so many in each direction, for every tile is several files."""
    tile_size = max(tile_size, max(shape) // most_tiles)
    place, rng = tmp_path_factory.mktemp("thin"), np.random.default_rng(seed)
    results = [make_result(rng, shape, 10, ties=True) for _ in range(n)]
    counts = [rng.integers(1, 10, shape) if seed % 3 == number else 10 for number in range(n)]
    write_search(place / "RUN.zarr", results, counts)
    merge(place / "RUN.zarr", place / "A.zarr", tile_size=tile_size)
    merge(place / "RUN.zarr", place / "B.zarr")
    assert_same_maps(read_maps(place / "A.zarr"), read_maps(place / "B.zarr"))
    shutil.rmtree(place)


def test_idle_devices_change_nothing_and_unsearched_pixels_are_nan(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    result = make_result(rng, SHAPE, 100)
    unsearched = np.zeros(SHAPE, bool)
    unsearched[:10] = True
    result["mip"][unsearched] = -np.inf
    result["best_global_index"][unsearched] = -1
    idle = {name: np.zeros_like(values) for name, values in result.items()}
    idle["mip"][:], idle["best_global_index"][:] = -np.inf, -1
    write_search(tmp_path / "a.zarr", [result], [100], indexed=True)
    write_search(tmp_path / "b.zarr", [idle, result, idle], [0, 100, 0], indexed=True)
    merge(tmp_path / "a.zarr", tmp_path / "A.zarr")
    merge(tmp_path / "b.zarr", tmp_path / "B.zarr")
    alone, among_idle = read_maps(tmp_path / "A.zarr"), read_maps(tmp_path / "B.zarr")
    np.testing.assert_array_equal(alone.pop(BEST_PARTIAL) < 0, unsearched)
    np.testing.assert_array_equal(among_idle.pop(BEST_PARTIAL), np.where(unsearched, -1, 1))
    assert_same_maps(alone, among_idle)
    assert np.isnan(alone[SCALED_MIP][unsearched]).all()
    assert np.isnan(alone["best_psi"][unsearched]).all()
    assert (alone["best_global_index"][unsearched] == -1).all()
    assert np.isfinite(alone[SCALED_MIP][~unsearched]).all()


class Interrupting(Observer):
    """Stops a merge after some tiles."""

    def __init__(self, after: int) -> None:
        self.left = after

    def tile_ended(self, outcome: Outcome) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@both_forms
def test_resuming_does_only_what_is_missing_and_gives_the_same_bytes(
    search: Path, tmp_path: Path
) -> None:
    merge(search, tmp_path / "A.zarr", tile_size=10)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            merge(search, tmp_path / "B.zarr", tile_size=10, observer=Interrupting(after=5))
    with pytest.raises(IncompleteError, match="never finished"):
        ocelot_em.open_merged(tmp_path / "B.zarr")
    with pytest.raises(IncompleteError, match="never finished"):
        merge(tmp_path / "B.zarr", tmp_path / "C.zarr")
    report = merge(search, tmp_path / "B.zarr")  # the tile size of the first run is kept
    assert report.n_tiles == 30
    assert 0 < report.n_merged <= 15
    assert chunk_bytes(tmp_path / "A.zarr") == chunk_bytes(tmp_path / "B.zarr")
    again = merge(search, tmp_path / "B.zarr", tile_size=10)
    assert again.n_merged == 0


@pytest.mark.parametrize("when", ["interrupted", "complete"])
def test_resuming_with_other_inputs_or_options_is_refused(
    search: Path, tmp_path: Path, rng: np.random.Generator, when: str
) -> None:
    output = tmp_path / "OUT.zarr"
    if when == "complete":
        merge(search, output, tile_size=32)
    else:
        with pytest.raises(KeyboardInterrupt):
            merge(search, output, tile_size=32, observer=Interrupting(after=1))
    # What is only half-written at the interruption has a name of its own, and goes.
    before = {name: data for name, data in chunk_bytes(output).items() if "#" not in name}
    with pytest.raises(OutputExistsError, match=r"tile: the output has \(32, 32\)"):
        merge(search, output, tile_size=16)
    with pytest.raises(OutputExistsError, match="nan: the output has raise"):
        merge(search, output, tile_size=32, nan="mask")
    indexed = (search / "search_space").exists()
    write_search(search, [make_result(rng, SHAPE, 5)], [5], indexed=indexed, first=9)
    with pytest.raises(OutputExistsError, match="inputs: the output was made from"):
        merge(search, output, tile_size=32)
    # Tiles that were in hand at the interruption may still have ended.
    assert before.items() <= chunk_bytes(output).items()
    merge(search, output, tile_size=32, overwrite=True)
    assert ocelot_em.describe(output).attributes.total_projections == sum(COUNTS) + 5


def test_outputs_that_are_not_ours_are_left_alone(search: Path, tmp_path: Path) -> None:
    other = tmp_path / "precious"
    other.mkdir()
    (other / "file").write_text("precious")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(OutputExistsError, match="other files"):
            merge(search, other, **options)
        with pytest.raises(OcelotError, match=r"is a search|is an input"):
            merge(search, search, **options)
    copy = tmp_path / "copy.zarr"
    shutil.copytree(search, copy)
    with pytest.raises(OutputExistsError, match="is a search"):
        merge(search, copy, overwrite=True)
    assert (other / "file").read_text() == "precious"
    assert chunk_bytes(copy) == chunk_bytes(search)


def test_inputs_are_never_changed(search: Path, tmp_path: Path) -> None:
    def snapshot() -> dict[str, tuple[bytes, int]]:
        files = (path for path in search.rglob("*") if path.is_file())
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = snapshot()
    merge(search, tmp_path / "OUT.zarr")
    assert snapshot() == before


def damage(search: Path, how: str) -> str:
    """Damage one chunk or partial; what an error about it must say."""
    chunk = search / "partials/p1/correlation_sum/c/0/0"
    content = bytearray(chunk.read_bytes())
    if how == "flipped byte":
        content[len(content) // 2] ^= 4
        chunk.write_bytes(content)
        return r"RUN.zarr: partial 'p1': correlation_sum: chunk \(0, 0\).* is corrupt"
    if how == "truncated chunk":
        chunk.write_bytes(content[:-100])
        return r"RUN.zarr: partial 'p1': correlation_sum: chunk \(0, 0\).* is corrupt"
    if how == "deleted chunk":
        chunk.unlink()
        return r"RUN.zarr: partial 'p1': correlation_sum: chunk \(0, 0\).* is missing"
    values = np.full(SHAPE, 1, np.float32)
    values[40, 50] = np.nan if how == "NaN" else -np.inf
    kind = "NaN" if how == "NaN" else "NaN or infinite"
    unsealed(search)
    store.write_chunk(open_objects(chunk.parent), chunk.name, values)
    return rf"RUN.zarr: partial 'p1': correlation_sum: {kind} at 1 pixel, first \(40, 50\)"


@pytest.mark.parametrize("how", ["flipped byte", "truncated chunk", "deleted chunk", "NaN", "-inf"])
def test_damage_is_refused_with_its_place(search: Path, tmp_path: Path, how: str) -> None:
    place = damage(search, how)
    with pytest.raises(TilesFailedError, match=place) as error:
        merge(search, tmp_path / "OUT.zarr")
    assert "tile (0, 0)" in str(error.value)
    assert ocelot_em.check(search)


def test_a_failed_tile_is_named_and_the_others_finish(search: Path, tmp_path: Path) -> None:
    chunk = search / "partials/p2/mip/c/0/0"
    unsealed(search)
    good = chunk.read_bytes()
    values = np.asarray(read_maps(search / "partials/p2")["mip"]).copy()
    values[5, 5] = np.inf
    store.write_chunk(open_objects(chunk.parent), chunk.name, values)
    output = tmp_path / "OUT.zarr"
    with pytest.raises(TilesFailedError, match=r"1 of 12 tiles failed") as error:
        merge(search, output, tile_size=16)
    assert "partial 'p2': mip: NaN or infinite at 1 pixel, first (5, 5)" in str(error.value)
    assert ocelot_em.describe(output).tiles_done == 11
    chunk.write_bytes(good)
    assert merge(search, output).n_merged == 1
    merge(search, tmp_path / "B.zarr", tile_size=16)
    assert chunk_bytes(output) == chunk_bytes(tmp_path / "B.zarr")


def test_masking_nan_drops_the_partial_and_its_count_there(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    results = [make_result(rng, SHAPE, count) for count in COUNTS]
    write_search(tmp_path / "RUN.zarr", results, COUNTS)
    values = results[1]["mip"].copy()
    bad = rng.random(SHAPE) < 0.1
    values[bad] = rng.choice([np.nan, np.inf], bad.sum())
    folder = open_objects(unsealed(tmp_path / "RUN.zarr") / "partials/p1/mip/c/0")
    store.write_chunk(folder, "0", values)
    merge(tmp_path / "RUN.zarr", tmp_path / "M.zarr", nan="mask", tile_size=32)
    without = [results[i] for i in (0, 2, 3)]
    write_search(tmp_path / "three.zarr", without, [COUNTS[i] for i in (0, 2, 3)])
    write_search(tmp_path / "four.zarr", results, COUNTS)
    merge(tmp_path / "three.zarr", tmp_path / "3.zarr")
    merge(tmp_path / "four.zarr", tmp_path / "4.zarr")
    masked, three, four = (read_maps(tmp_path / f"{n}.zarr") for n in ("M", "3", "4"))
    np.testing.assert_array_equal(
        masked[COUNT], np.where(bad, sum(COUNTS) - COUNTS[1], sum(COUNTS))
    )
    for name in set(three) - {BEST_PARTIAL}:
        np.testing.assert_array_equal(masked[name], np.where(bad, three[name], four[name]))
    # A masked result keeps its map of counts when it is merged again.
    merge(tmp_path / "M.zarr", tmp_path / "N.zarr")
    assert_same_maps(masked, read_maps(tmp_path / "N.zarr"), rounded=SUMMED)


def test_unfinished_partials_are_refused_by_name(search: Path, tmp_path: Path) -> None:
    unfinish(search, "p1")
    unfinish(search, "p3")
    with pytest.raises(IncompleteError, match="p1, p3"):
        merge(search, tmp_path / "OUT.zarr")
    assert not (tmp_path / "OUT.zarr").exists()


def test_the_same_partial_twice_is_refused(search: Path, tmp_path: Path) -> None:
    merge(search, tmp_path / "A.zarr")
    with pytest.raises(InvalidInputError, match="counted each time") as error:
        merge([tmp_path / "A.zarr", search], tmp_path / "B.zarr")
    assert len(error.value.problems) == 4
    copies = [shutil.copytree(search, tmp_path / f"{n}.zarr") for n in range(7)]
    with pytest.raises(InvalidInputError, match=r"given 7 times.*4\.zarr.*; and 2 more") as error:
        merge(copies, tmp_path / "B.zarr")
    assert "5.zarr" not in str(error.value)
    with pytest.raises(InvalidInputError, match="more than once"):
        merge([search, search], tmp_path / "B.zarr")


def test_inputs_that_do_not_belong_together_are_refused_with_all_differences(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    write_search(tmp_path / "a.zarr", [make_result(rng, SHAPE, 1)], [1])
    write_search(tmp_path / "b.zarr", [make_result(rng, (9, 9), 1)], [1], indexed=True)
    with pytest.raises(InvalidInputError) as error:
        merge([tmp_path / "a.zarr", tmp_path / "b.zarr"], tmp_path / "OUT.zarr")
    text = str(error.value)
    assert all(name in text for name in ("shape", "valid_shape", "pose_form", "digest"))


def test_plans_that_cannot_work_are_refused_with_numbers(search: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="1500; use 1024 or 2048"):
        merge(search, tmp_path / "OUT.zarr", tile_size=1500)
    with pytest.raises(PlanError, match="100,000,000 bytes"):
        merge(search, tmp_path / "OUT.zarr", memory_limit="100MB")
    with pytest.raises(PlanError, match="expected threads, local"):
        merge(search, tmp_path / "OUT.zarr", cluster="thread")
    with pytest.raises(InvalidInputError, match="tile_size"):
        merge(search, tmp_path / "OUT.zarr", tile_size=0)
    with pytest.raises(InvalidInputError, match="tile_sise"):
        merge(search, tmp_path / "OUT.zarr", tile_sise=64)
    assert not (tmp_path / "OUT.zarr").exists()


class Noting(Observer):
    def __init__(self) -> None:
        self.clusters: list[Cluster] = []
        self.outcomes: list[Outcome] = []

    def started(self, cluster: Cluster) -> None:
        self.clusters.append(cluster)

    def tile_ended(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


@pytest.mark.slow
@pytest.mark.parametrize("search", ["explicit"], indirect=True)
def test_worker_processes_and_an_attached_cluster_give_the_same_bytes(
    search: Path, tmp_path: Path
) -> None:
    merge(search, tmp_path / "A.zarr", tile_size=20)
    noted, environment = Noting(), dict(os.environ)
    ocelot_em.merge(
        search, tmp_path / "B.zarr", tile_size=20, cluster="local", workers=2, observer=noted
    )
    # Dask marks the process in which it begins to start others, and leaves the mark.
    assert dict(os.environ) | environment == {**os.environ}
    assert set(os.environ) - set(environment) <= {"__DASK_PARENT_PID"}
    assert len(noted.outcomes) == 9
    dashboard = noted.clusters[0].dashboard
    assert dashboard is not None
    assert dashboard.startswith("http://127.0.0.1:")
    assert chunk_bytes(tmp_path / "A.zarr") == chunk_bytes(tmp_path / "B.zarr")

    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0"
    ) as cluster:
        address = cluster.scheduler_address
        ocelot_em.merge(search, tmp_path / "C.zarr", tile_size=20, cluster=address)
    assert chunk_bytes(tmp_path / "A.zarr") == chunk_bytes(tmp_path / "C.zarr")


def test_no_scheduler_at_the_address_is_said_plainly(
    search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A scheduler may be about to start: a refused connection is tried again all that time.
    monkeypatch.setattr("ocelot_em.run.connect.CONNECT_SECONDS", 0.5)
    with pytest.raises(PlanError, match=r"no Dask scheduler responds at tcp://127.0.0.1:9"):
        merge(search, tmp_path / "OUT.zarr", cluster="tcp://127.0.0.1:9")


def test_the_output_says_what_it_is(search: Path, tmp_path: Path) -> None:
    merge(search, tmp_path / "OUT.zarr")
    attributes = json.loads((tmp_path / "OUT.zarr/zarr.json").read_text())["attributes"]["ocelot"]
    assert attributes["kind"] == "merged"
    assert attributes["format_version"] == 3
    assert attributes["total_projections"] == sum(COUNTS)
    assert attributes["valid_shape"] == list(SHAPE)
    assert attributes["state"] == "complete"
    assert [p["name"] for p in attributes["partials"]] == ["p0", "p1", "p2", "p3"]
    assert attributes["provenance"]["versions"]["ocelot-em"] == ocelot_em.__version__
    assert ocelot_em.check(tmp_path / "OUT.zarr") == []


def test_float64_sums_keep_what_float32_would_round(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    result = make_result(rng, SHAPE, 100)
    result[SUM] = np.full(SHAPE, 16_777_217.0)
    result[SQUARED_SUM] = np.full(SHAPE, 1e12)
    write_search(tmp_path / "RUN.zarr", [result], [2**25])
    partials = ocelot_em.open_partials(tmp_path / "RUN.zarr")
    assert (partials[SUM].to_numpy() == 16_777_217.0).all()
    merge(tmp_path / "RUN.zarr", tmp_path / "OUT.zarr", tile_size=32)
    mean = read_maps(tmp_path / "OUT.zarr")[MEAN]
    np.testing.assert_array_equal(mean, np.float32(16_777_217.0 / 2**25))


def test_stray_files_among_the_tile_records_are_ignored(search: Path, tmp_path: Path) -> None:
    output = tmp_path / "OUT.zarr"
    merge(search, output, tile_size=32)
    for stray in (".DS_Store", "0/.nfs001", "0/0/0.partial"):
        (output / "progress/tile_summary/c" / stray).write_text("stray")
    assert merge(search, output).n_merged == 0
    assert ocelot_em.describe(output).tiles_done == 4


def test_a_damaged_plan_is_named(search: Path, tmp_path: Path) -> None:
    output = tmp_path / "OUT.zarr"
    merge(search, output, tile_size=32)
    unsealed(output)
    metadata = json.loads((output / "zarr.json").read_text())
    del metadata["attributes"]["ocelot"]["plan"]["tile"]
    (output / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(FormatError, match=r"OUT.zarr: plan: tile: missing"):
        merge(search, output)
    assert any("plan: tile" in problem for problem in ocelot_em.check(output))


class FakeFuture:
    """A Dask future that has ended, with its outcomes or with an error."""

    def __init__(self, key: object, outcomes: list[Outcome] | BaseException) -> None:
        self.key, self._outcomes = key, outcomes
        self.status = "finished"

    def add_done_callback(self, call: Callable[[Self], None]) -> None:
        call(self)

    def result(self, timeout: float) -> list[Outcome]:
        if isinstance(self._outcomes, BaseException):
            raise self._outcomes
        return self._outcomes


class FakeClient:
    """A cluster of one thread, which loses the result of every third task."""

    status = "running"
    scheduler = SimpleNamespace(ncores_running=None)

    def __init__(self) -> None:
        self.n_tasks = 0

    def submit(self, _: object, *args: Any, key: object, **options: object) -> FakeFuture:
        self.n_tasks += 1
        if self.n_tasks % 3 == 1:
            return FakeFuture(key, CancelledError("its worker died"))
        summary = TileSummary(*(0 for _ in SUMMARY_FIELDS))
        return FakeFuture(key, [Outcome(iy, ix, summary) for iy, ix in args[1]])

    def nthreads(self) -> dict[str, int]:
        return {"worker": 1}

    def sync(self, _ask: object) -> dict[str, int]:
        return self.nthreads()

    def subscribe_topic(self, *_: object) -> None:
        """It has no workers that send anything."""

    unsubscribe_topic = subscribe_topic


def test_tasks_whose_result_is_lost_with_its_worker_are_done_again() -> None:
    client, ended = FakeClient(), list[Outcome]()
    work, tiles = JobSpec("out", "run"), Tiles(9, np.arange(9))
    ClientExecutor(client).run(work, tiles, ended.append, threading.Event())
    assert sorted(outcome.ix for outcome in ended) == list(range(9))
    assert all(outcome.summary for outcome in ended)


def test_a_cluster_without_workers_is_waited_for_only_so_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0

    def ask() -> dict[str, int]:
        """There are workers for a while, and each question takes a minute."""
        nonlocal now
        now += 60
        return {"worker": 1} if now <= 1180 else {}

    client = FakeClient()
    client.nthreads = dict  # type: ignore[method-assign]
    client.sync = lambda _: ask()  # type: ignore[method-assign]
    client.submit = lambda *_, key, **__: Unending(key)  # type: ignore[method-assign, misc]
    monkeypatch.setattr("ocelot_em.run.executors.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr("ocelot_em.run.executors.POLL_SECONDS", 0.001)
    executor = ClientExecutor(client, worker_timeout_seconds=150)
    with pytest.raises(ClusterLostError, match="had no workers for 150 s"):
        executor.run(JobSpec("out", "r"), Tiles(9, np.arange(9)), print, threading.Event())
    assert 1180 + 150 < now <= 1180 + 150 + 2 * 60  # two questions in a round, at most


class Unending(FakeFuture):
    """A task that nobody does."""

    def __init__(self, key: object) -> None:
        super().__init__(key, [])
        self.status = "pending"

    def add_done_callback(self, call: Callable[[Self], None]) -> None:
        """It never ends."""


def test_a_large_tile_that_the_map_cuts_short_is_kept_when_resuming(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    write_search(tmp_path / "RUN.zarr", [make_result(rng, (3, 1500), 10)], [10])
    merge(tmp_path / "RUN.zarr", tmp_path / "OUT.zarr", tile_size=2048)
    assert merge(tmp_path / "RUN.zarr", tmp_path / "OUT.zarr").n_merged == 0


def test_poses_that_are_not_stored_are_decoded_by_who_reads_them(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    results = [make_result(rng, SHAPE, count, ties=True) for count in COUNTS]
    results[0]["mip"][0], results[0][INDEX][0] = -np.inf, -1
    search = write_search(tmp_path / "RUN.zarr", results, COUNTS, indexed=True)
    merge(search, tmp_path / "FULL.zarr", tile_size=32)
    merge(search, tmp_path / "LEAN.zarr", tile_size=32, poses="index")
    full, lean = read_maps(tmp_path / "FULL.zarr"), read_maps(tmp_path / "LEAN.zarr")
    assert set(full) - set(lean) == set(POSES)
    assert_same_maps(lean, {name: full[name] for name in lean})
    opened = ocelot_em.open_merged(tmp_path / "LEAN.zarr")
    assert list(opened) == list(ocelot_em.open_merged(tmp_path / "FULL.zarr"))
    assert_same_maps({name: values.to_numpy() for name, values in opened.items()}, full)
    assert ocelot_em.check(tmp_path / "LEAN.zarr") == []
    with pytest.raises(OutputExistsError, match="poses: the output has index"):
        merge(search, tmp_path / "LEAN.zarr", tile_size=32)
    again = merge(tmp_path / "LEAN.zarr", tmp_path / "AGAIN.zarr")
    assert again.n_merged
    assert_same_maps(read_maps(tmp_path / "AGAIN.zarr"), full, rounded=SUMMED)


def test_explicit_poses_are_stored_whatever_is_asked_for(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    write_search(tmp_path / "RUN.zarr", [make_result(rng, SHAPE, 10)], [10])
    merge(tmp_path / "RUN.zarr", tmp_path / "OUT.zarr", poses="index")
    assert set(POSES) < set(read_maps(tmp_path / "OUT.zarr"))
