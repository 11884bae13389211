"""What a merge costs does not grow: memory, scheduling, planning; nothing is read twice."""

import gc
import itertools
import threading
import time
import tracemalloc
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from benchmarks.common import do_nothing, merge_alone, repeated, resident_nbytes
from benchmarks.memory import Memory, measure

import ocelot_em
from helpers import assert_same_maps, make_result, read_maps, write_search
from ocelot_em import store
from ocelot_em.cluster import open_cluster
from ocelot_em.errors import TilesFailedError
from ocelot_em.execute import ClientExecutor, ThreadExecutor
from ocelot_em.format import PARTIALS
from ocelot_em.maps import MAPS, PoseForm
from ocelot_em.objects import _LocalObjects, open_objects
from ocelot_em.pipeline import Tiles, Work, attempt_tiles, prepare
from ocelot_em.plan import MergeOptions
from ocelot_em.simulation import Simulation, simulate
from ocelot_em.store import ChunkedMap

FORMS = [form.value for form in PoseForm]
SIDES = 8192, 32768
N_ROWS = 2
"""Rows of chunks that the first tiles need."""

MOST_NBYTES = 10**9
MOST_SECONDS_PER_TILE = 0.002


def rechunk(search: Path, place: Path, chunk: tuple[int, int]) -> Path:
    """A copy of a search whose maps have other chunks."""
    source, target = open_objects(search), open_objects(place)
    for key in source.sizes(""):
        if key.endswith("zarr.json") or key.startswith("search_space"):
            target.put(key, [source.get(key)])
    for path in search.glob(f"{PARTIALS}/*/*/zarr.json"):
        key, name = str(path.parent.relative_to(search)), path.parent.name
        old = store.open_map(source, key, key, MAPS[name].dtypes)
        store.create_map(target, key, name, old.shape, chunk, old.dtype.name)
        new = store.open_map(target, key, key, MAPS[name].dtypes)
        for cell in new.grid:
            new.write(cell.region, old.read(cell.region)[0])
    return place


# Scheduling.


@pytest.fixture(scope="module", params=["threads", "local"])
def idle_executor(request):
    """An executor whose tiles do nothing, after a few thousand of them."""
    options = MergeOptions(cluster=request.param, threads=1)
    if request.param == "threads":
        executor = ThreadExecutor(2, do_nothing)
        run_idle_tiles(executor, 4000)
        yield executor
        return
    with open_cluster(options.model_copy(update={"workers": 2})) as cluster:
        executor = ClientExecutor(cluster.executor.client, do_nothing)
        run_idle_tiles(executor, 4000)
        yield executor


def run_idle_tiles(executor, n_tiles):
    """Seconds that each of so many tiles takes, and the most memory meanwhile."""
    ended = most_nbytes = 0

    def count(outcome):
        nonlocal ended, most_nbytes
        ended += 1
        if ended % 4000 == 0:
            most_nbytes = max(most_nbytes, resident_nbytes())

    started = time.perf_counter()
    work, tiles = Work("nowhere", "no-run"), Tiles(1000, np.arange(n_tiles))
    executor.run(work, tiles, count, threading.Event())
    seconds = time.perf_counter() - started
    assert ended == n_tiles
    return seconds / n_tiles, most_nbytes


def check_idle_tiles(executor, n_tiles, most_grown_nbytes):
    gc.collect()
    before = resident_nbytes()
    seconds, most_nbytes = run_idle_tiles(executor, n_tiles)
    assert most_nbytes - before < most_grown_nbytes
    if seconds >= MOST_SECONDS_PER_TILE:  # something else may have had the processor
        seconds, _ = run_idle_tiles(executor, n_tiles)
    assert seconds < MOST_SECONDS_PER_TILE


def test_tiles_that_do_nothing_cost_little_and_leave_nothing_behind(idle_executor):
    check_idle_tiles(idle_executor, 40_000, 50 * 10**6)


def test_so_do_ten_times_as_many():
    executor = ThreadExecutor(2, do_nothing)
    run_idle_tiles(executor, 4000)
    check_idle_tiles(executor, 400_000, 20 * 10**6)


# Planning.


def test_a_canvas_of_a_million_times_a_million_pixels_is_planned(tmp_path, rng):
    side = 10**6
    shape = (64, 64)
    small = write_search(
        tmp_path / "S.zarr", [make_result(rng, shape, 10) for _ in range(4)], [10] * 4
    )
    search = repeated(small, tmp_path / "EMPTY.zarr", side, n_partials=4, n_rows=0)
    options = MergeOptions(threads=2)
    prepare([small], tmp_path / "OUT.zarr", options)  # imports
    tracemalloc.start()
    try:
        started = time.perf_counter()
        ready = prepare([search], tmp_path / "OUT.zarr", options)
        seconds = time.perf_counter() - started
        allocated = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seconds < 60
    assert allocated < 50 * 10**6  # a list of all tiles takes 115 MB
    grid, missing = ready.plan.grid, ready.missing
    assert grid.counts == (977, 977)
    assert ready.forecast.n_tiles == len(grid) == len(missing) == 977**2
    pixels = 0
    for number, place in enumerate(missing):
        tile = grid.at(*place)
        assert (tile.iy, tile.ix) == place == divmod(number, 977)
        pixels += tile.region.size
    assert pixels == side**2
    assert missing[len(missing) - 1] == (976, 976)
    assert list(missing[977:979]) == [(1, 0), (1, 1)]
    assert grid[5 * 977 + 3] == grid.at(5, 3)


# Memory.


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """Measures what merging the first tiles of a search takes; the same one only once."""
    place = tmp_path_factory.mktemp("memory")

    @cache
    def small_search(form, side, chunk):
        folder = place / f"{form}-{side}-{chunk}"
        simulation = Simulation((side, side), 4, 0, seed=1, form=PoseForm(form))
        search = simulate(folder, simulation, n_threads=2)
        return rechunk(search, folder / "C.zarr", (chunk, chunk)) if chunk != 1024 else search

    compiled = set()

    def compile_for(search, form, nan):
        """Keep the compiler's memory out of what is measured."""
        if (form, nan) not in compiled:
            measure(search, 1, threads=1, nan=nan)
            compiled.add((form, nan))

    @cache
    def measured(form, side, n_partials, chunk=1024, n_tiles=4, **options):
        small = small_search(form, chunk, chunk)
        search = place / f"{form}-{side}-{n_partials}-{chunk}.zarr"
        if not search.exists():
            repeated(small, search, side, n_partials=n_partials, n_rows=N_ROWS)
        compile_for(search, form, options.get("nan", "raise"))
        return measure(search, n_tiles, **{"threads": 2, **options})

    return measured


def check_memory(found: Memory) -> None:
    assert found.peak <= found.predicted
    assert found.peak <= MOST_NBYTES


@pytest.mark.parametrize("n_partials", [4, 64])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("form", FORMS)
def test_memory_is_as_predicted(memory, form, side, n_partials):
    check_memory(memory(form, side, n_partials))


@pytest.mark.parametrize("form", FORMS)
def test_memory_does_not_grow_with_partials_or_size(memory, form):
    small, many, large, both = (
        memory(form, side, n_partials).peak for side in SIDES for n_partials in (4, 64)
    )
    assert many <= 1.15 * small
    assert both <= 1.15 * large
    assert large <= 1.15 * small
    assert both <= 1.15 * many


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "case",
    [
        {"n_tiles": 1, "threads": 1, "tile_size": 2048},
        {"nan": "mask"},
        {"chunk": 2048, "n_tiles": 2},
        {"chunk": 2048, "tile_size": 1024},
        {"chunk": 2048, "tile_size": 1024, "nan": "mask"},
        {"cluster": "local", "workers": 1, "threads": 1},
    ],
    ids=lambda case: "-".join(map(str, case.values())),
)
def test_memory_is_as_predicted_with_other_tiles_chunks_and_options(memory, form, case):
    check_memory(memory(form, SIDES[0], 4, **case))


# Reading.


@pytest.fixture
def fetched(monkeypatch):
    """How often each chunk of each map was fetched."""
    counts, lock, fetch = Counter(), threading.Lock(), ChunkedMap.fetch

    def counting(self, chunk, memory):
        with lock:
            counts[self.path, chunk.iy, chunk.ix] += 1
        return fetch(self, chunk, memory)

    monkeypatch.setattr(ChunkedMap, "fetch", counting)
    return counts


def chunks_needed(search, tiles):
    """How many tiles need each chunk of each map."""
    counts = Counter()
    objects = open_objects(search)
    for path in search.glob(f"{PARTIALS}/*/*/zarr.json"):
        key = str(path.parent.relative_to(search))
        chunked = store.open_map(objects, key, key, MAPS[path.parent.name].dtypes)
        for tile in tiles:
            counts.update((key, c.iy, c.ix) for c in chunked.grid.touching(tile.region))
    return counts


@pytest.mark.parametrize("nan", ["raise", "mask"])
@pytest.mark.parametrize("tile_size", [64, 1024])
@pytest.mark.parametrize("chunk", [(96, 80), (100, 70)], ids=["96x80", "100x70"])
@pytest.mark.parametrize("indexed", [False, True], ids=FORMS)
def test_a_tile_reads_each_chunk_once(tmp_path, rng, fetched, indexed, chunk, tile_size, nan):
    shape, counts = (330, 290), (1000, 300, 25)
    results = [make_result(rng, shape, count, ties=True) for count in counts]
    aligned = write_search(tmp_path / "A.zarr", results, counts, indexed=indexed)
    search = rechunk(aligned, tmp_path / "C.zarr", chunk)
    fetched.clear()
    options = {"tile_size": tile_size, "threads": 2, "nan": nan}
    ocelot_em.merge(search, tmp_path / "OUT.zarr", **options)
    grid = prepare([search], tmp_path / "NEW.zarr", MergeOptions(**options)).plan.grid
    assert len(grid) == (30 if tile_size == 64 else 1)
    # At least once for every tile that needs it, so not twice for any of them.
    assert fetched == chunks_needed(search, grid)
    ocelot_em.merge(aligned, tmp_path / "EXPECTED.zarr", **options)
    assert_same_maps(read_maps(tmp_path / "OUT.zarr"), read_maps(tmp_path / "EXPECTED.zarr"))


# Overlap.


class OneRun:
    """An executor that merges all tiles in one task, in this thread."""

    def run(self, work, tiles, on_outcome, stopping):
        for outcome in attempt_tiles(work, list(tiles)):
            on_outcome(outcome)


class SlowStorage:
    """Makes every chunk that is read or written take its time; keeps what was asked for."""

    def __init__(self, monkeypatch, seconds):
        self.asked = []
        self._seconds = seconds
        for name in ("get_into", "put"):
            monkeypatch.setattr(_LocalObjects, name, self._slowed(name))

    def _slowed(self, name):
        method = getattr(_LocalObjects, name)

        def slow(objects, key, data, *limits):
            path, is_chunk, place = key.partition("/c/")
            if is_chunk and not path.startswith("statistics/"):  # those are of no tile
                parts = [*map(int, place.split("/"))]  # records are numbered through
                tile = tuple(parts[:2]) if len(parts) > 1 else divmod(parts[0], 3)
                self.asked.append((name, "progress" in path, tile))
                time.sleep(self._seconds)
            return method(objects, key, data, *limits)

        return slow

    @property
    def seconds(self):
        """That it made others wait."""
        return self._seconds * len(self.asked)

    def places(self, name, *, of_record, tile):
        """When, counted in what was asked for, a tile's chunks were."""
        wanted = name, of_record, tile
        return [number for number, found in enumerate(self.asked) if found == wanted]


def merge_in_one_run(search, output):
    options = MergeOptions(tile_size=128, threads=1, overwrite=True)
    return merge_alone(prepare([search], output, options), options, OneRun())


@pytest.fixture(params=[False, True], ids=FORMS)
def search_of_many_tiles(request, tmp_path, rng):
    """Chunks are tiles: 2 rows and 3 columns."""
    counts = [1000, 300]
    results = [make_result(rng, (256, 384), count) for count in counts]
    search = write_search(tmp_path / "RUN.zarr", results, counts, indexed=request.param)
    return rechunk(search, tmp_path / "C.zarr", (128, 128))


def test_reading_folding_and_writing_take_less_than_one_after_another(
    search_of_many_tiles, tmp_path, monkeypatch
):
    output = tmp_path / "OUT.zarr"
    merge_in_one_run(search_of_many_tiles, output)  # compiles
    report = merge_in_one_run(search_of_many_tiles, output)
    computing = report.seconds - report.totals.waited_seconds
    ratios = []
    for _ in range(2):  # something else may have had the processor
        with monkeypatch.context() as patched:
            storage = SlowStorage(patched, 0.015)
            report = merge_in_one_run(search_of_many_tiles, output)
        ratios.append(report.seconds / (storage.seconds + computing))
    assert min(ratios) < 0.85


def test_neighbouring_tiles_overlap(search_of_many_tiles, tmp_path, monkeypatch):
    merge_in_one_run(search_of_many_tiles, tmp_path / "OUT.zarr")
    storage = SlowStorage(monkeypatch, 0.015)
    merge_in_one_run(search_of_many_tiles, tmp_path / "SLOW.zarr")
    tiles = list(np.ndindex(2, 3))
    for tile, following in itertools.pairwise(tiles):
        written = storage.places("put", of_record=False, tile=tile)
        *_, recorded = storage.places("put", of_record=True, tile=tile)  # the done-mark
        read_next = storage.places("get_into", of_record=False, tile=following)
        written_next = storage.places("put", of_record=False, tile=following)
        # The next tile is fetched while this one is written, and folded before this one is done.
        assert min(read_next) < max(written) < recorded
        assert min(written_next) < recorded


def test_long_runs_come_first_and_cover_every_tile_once():
    runs = []

    def note(_work, tiles):
        runs.append([*tiles])
        return []

    tiles = Tiles(30, np.arange(900))
    ThreadExecutor(1, note).run(Work("out", "run"), tiles, print, threading.Event())
    assert [tile for run in runs for tile in run] == list(tiles)
    lengths = [len(run) for run in runs]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 16
    assert lengths[-1] == 1


@pytest.mark.parametrize("damaged", ["best_psi", "mip", "correlation_squared_sum"])
def test_many_failed_tiles_of_one_task_leave_the_others_alone(tmp_path, rng, damaged):
    results = [make_result(rng, (32, 32 * 40), 100) for _ in range(5)]
    search = write_search(tmp_path / "RUN.zarr", results, [100] * 5)
    search = rechunk(search, tmp_path / "CHUNKED.zarr", (32, 32))
    bad = [number for number in range(40) if number % 4]
    for number in bad:
        path = search / f"partials/p{number % 5}/{damaged}/c/0/{number}"
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TilesFailedError, match="30 of 40 tiles failed") as error:
        ocelot_em.merge(search, tmp_path / "OUT.zarr", tile_size=32, threads=1)
    assert "is corrupt" in str(error.value)
    assert "announced" not in str(error.value)
    assert ocelot_em.describe(tmp_path / "OUT.zarr").tiles_done == 10
