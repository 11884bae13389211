"""What a merge costs does not grow: memory, scheduling, planning; nothing is read twice.

Costs are counted in calls, tasks, reads and bytes, never in seconds.
"""

import contextlib
import gc
import itertools
import sys
import threading
import tracemalloc
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from benchmarks.common import do_nothing, merge_alone, repeated, resident_nbytes
from benchmarks.memory import Memory, measure
from dask.callbacks import Callback

import ocelot_em
from builders import unsealed
from helpers import assert_same_maps, combinations, make_result, read_maps, write_search
from ocelot_em.errors import TilesFailedError
from ocelot_em.merge.job import JobSpec
from ocelot_em.merge.outcome import Tiles
from ocelot_em.merge.resume import prepare
from ocelot_em.merge.tile import TileWriter
from ocelot_em.model.maps import MAPS, PoseForm
from ocelot_em.model.options import MergeOptions
from ocelot_em.run.clusters import open_cluster
from ocelot_em.run.executors import ClientExecutor, ThreadExecutor, split_into_batches
from ocelot_em.store import arrays as store
from ocelot_em.store.arrays import ChunkedMap
from ocelot_em.store.constants import PARTIALS
from ocelot_em.store.local import LocalObjects
from ocelot_em.store.objects import open_objects
from ocelot_em.testing.simulation import Simulation, simulate

FORMS = [form.value for form in PoseForm]
SIDES = 8192, 32768
N_ROWS = 2
"""Rows of chunks that the first tiles need."""

MAX_NBYTES = 10**9


def maps_of(search: Path) -> list[Path]:
    """The metadata of the maps of all partials."""
    found = search.glob(f"{PARTIALS}/*/*/zarr.json")
    return [path for path in found if path.parent.name in MAPS]


def rechunk(search: Path, place: Path, chunk: tuple[int, int]) -> Path:
    """A copy of a search whose maps have other chunks."""
    source, target = open_objects(search), open_objects(place)
    for key in source.sizes(""):
        if key.endswith("zarr.json") or key.startswith("search_space"):
            target.put(key, [source.get(key)])
    for path in maps_of(search):
        key, name = str(path.parent.relative_to(search)), path.parent.name
        old = store.open_map(source, key, key, MAPS[name].dtypes)
        store.create_map(target, key, name, old.shape, chunk, old.dtype.name)
        new = store.open_map(target, key, key, MAPS[name].dtypes)
        for cell in new.grid:
            new.write(cell.region, old.read(cell.region)[0])
    return unsealed(place)


# Scheduling.


def run_idle_tiles(executor, n_tiles):
    """Run tiles that do nothing; the most memory meanwhile."""
    ended = most_nbytes = 0

    def count(outcome):
        nonlocal ended, most_nbytes
        ended += 1
        if ended % 2000 == 0:
            most_nbytes = max(most_nbytes, resident_nbytes())

    work, tiles = JobSpec("nowhere", "no-run"), Tiles(1000, np.arange(n_tiles))
    executor.run(work, tiles, count, threading.Event())
    assert ended == n_tiles
    return most_nbytes


@contextlib.contextmanager
def idle_executor(cluster):
    """An executor whose tiles do nothing, after a few thousand of them."""
    options = MergeOptions(cluster=cluster, threads=1)
    with contextlib.ExitStack() as stack:
        if cluster == "threads":
            executor = ThreadExecutor(2, do_nothing)
        else:
            local = stack.enter_context(open_cluster(options.model_copy(update={"workers": 2})))
            executor = ClientExecutor(local.executor.client, do_nothing)
        run_idle_tiles(executor, 4000)
        yield executor


@pytest.mark.alone
@pytest.mark.parametrize(
    ("cluster", "n_tiles", "most_grown_nbytes"),
    [
        ("threads", 40_000, 20 * 10**6),
        ("local", 10_000, 20 * 10**6),
        pytest.param("local", 40_000, 50 * 10**6, marks=pytest.mark.exhaustive),
        pytest.param("threads", 400_000, 20 * 10**6, marks=pytest.mark.exhaustive),
    ],
)
def test_tiles_that_do_nothing_leave_nothing_behind(cluster, n_tiles, most_grown_nbytes):
    with idle_executor(cluster) as executor:
        gc.collect()
        before = resident_nbytes()
        assert run_idle_tiles(executor, n_tiles) - before < most_grown_nbytes


class DoneFuture:
    """A Dask future of a task that has ended."""

    status = "finished"

    def __init__(self, key, outcomes):
        self.key, self._outcomes = key, outcomes

    def add_done_callback(self, call):
        call(self)

    def result(self, timeout):
        return self._outcomes


class IdleClient:
    """A cluster of two threads which does every task at once; how many it was given."""

    status = "running"
    scheduler = SimpleNamespace(ncores_running=None)

    def __init__(self):
        self.n_tasks = 0

    def submit(self, _attempt, work, tiles, _number, *, key, **_options):
        self.n_tasks += 1
        return DoneFuture(key, do_nothing(work, tiles))

    def sync(self, _ask):
        return {"worker": 2}

    def subscribe_topic(self, *_):
        """It has no workers that send anything."""

    unsubscribe_topic = subscribe_topic


def calls_for(n_tiles):
    """Python calls that the driver makes for so many tiles, and tasks that it hands out."""
    client, n_calls = IdleClient(), 0

    def count(_frame, event, _argument):
        nonlocal n_calls
        n_calls += event == "call"

    executor, before = ClientExecutor(client, do_nothing), sys.getprofile()
    sys.setprofile(count)
    try:
        run_idle_tiles(executor, n_tiles)
    finally:
        sys.setprofile(before)
    return n_calls, client.n_tasks


def test_scheduling_a_tile_costs_the_same_among_however_many():
    calls_for(100)  # imports
    few, many = 4000, 16_000
    (calls_of_few, _), (calls_of_many, n_tasks) = calls_for(few), calls_for(many)
    assert n_tasks < many / 16 + 100
    assert calls_of_many / many < 1.1 * calls_of_few / few
    assert calls_of_many / many < 20


@pytest.mark.parametrize("n_threads", [1, 2, 7])
def test_threads_take_many_tiles_at_a_time(n_threads):
    tasks = []
    with Callback(pretask=lambda key, *_: tasks.append(key)):
        run_idle_tiles(ThreadExecutor(n_threads, do_nothing), 8000)
    assert len(tasks) < 8000 / 16 + 100 * n_threads


# Planning.


@contextlib.contextmanager
def counting_requests():
    """What is asked of the storage, by method."""
    requests = Counter()

    def counted(name, method):
        def call(*arguments, **options):
            requests[name] += 1
            return method(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patched:
        for name in ("get", "get_into", "size", "sizes", "children", "put"):
            patched.setattr(LocalObjects, name, counted(name, getattr(LocalObjects, name)))
        yield requests


@pytest.mark.parametrize(
    "step", [1009, pytest.param(1, marks=pytest.mark.slow)], ids=["some tiles", "every tile"]
)
def test_a_canvas_of_a_million_times_a_million_pixels_is_planned(tmp_path, rng, step):
    side = 10**6
    shape = (64, 64)
    small = write_search(
        tmp_path / "S.zarr", [make_result(rng, shape, 10) for _ in range(4)], [10] * 4
    )
    search = repeated(unsealed(small), tmp_path / "EMPTY.zarr", side, n_partials=4, n_rows=0)
    options = MergeOptions(threads=2)
    with counting_requests() as of_small:
        prepare([small], tmp_path / "OUT.zarr", options)  # imports
    tracemalloc.start()
    try:
        with counting_requests() as of_large:
            ready = prepare([search], tmp_path / "OUT.zarr", options)
        allocated = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert allocated < 50 * 10**6  # a list of all tiles takes 115 MB
    # The same metadata; and sizes are asked of a sample of the chunks.
    assert of_large["get"] + of_large["get_into"] == of_small["get"] + of_small["get_into"] > 0
    assert of_large.total() < of_small.total() + 3000
    grid, missing = ready.plan.grid, ready.missing
    assert grid.counts == (977, 977)
    assert ready.forecast.n_tiles == len(grid) == len(missing) == 977**2
    pixels = 0
    for number in range(0, len(missing), step):
        place = missing[number]
        tile = grid.at(*place)
        assert (tile.iy, tile.ix) == place == divmod(number, 977)
        pixels += tile.region.size
    assert pixels == side**2 or step > 1
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
    assert found.peak <= MAX_NBYTES


@pytest.mark.alone
@pytest.mark.parametrize("form", FORMS)
def test_memory_is_as_predicted_and_does_not_grow_with_partials_and_size(memory, form):
    small, large = memory(form, SIDES[0], 4), memory(form, SIDES[1], 16)
    check_memory(small)
    check_memory(large)
    assert large.peak <= 1.15 * small.peak


@pytest.mark.alone
@pytest.mark.exhaustive
@pytest.mark.parametrize("n_partials", [4, 64])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("form", FORMS)
def test_memory_is_as_predicted(memory, form, side, n_partials):
    check_memory(memory(form, side, n_partials))


@pytest.mark.alone
@pytest.mark.exhaustive
@pytest.mark.parametrize("form", FORMS)
def test_memory_does_not_grow_with_partials_or_size(memory, form):
    small, many, large, both = (
        memory(form, side, n_partials).peak for side in SIDES for n_partials in (4, 64)
    )
    assert many <= 1.15 * small
    assert both <= 1.15 * large
    assert large <= 1.15 * small
    assert both <= 1.15 * many


CASES = {
    "whole tiles": {"n_tiles": 1, "threads": 1, "tile_size": 2048},
    "mask": {"nan": "mask"},
    "large chunks": {"chunk": 2048, "n_tiles": 2},
    "cut chunks": {"chunk": 2048, "tile_size": 1024},
    "cut chunks, mask": {"chunk": 2048, "tile_size": 1024, "nan": "mask"},
    "worker": {"cluster": "local", "workers": 1, "threads": 1},
}
OF_SECOND_TIER = {
    ("explicit", "whole tiles"),
    ("indexed", "mask"),
    ("explicit", "large chunks"),
    ("explicit", "cut chunks"),
    ("indexed", "cut chunks, mask"),
    ("indexed", "worker"),
}


@pytest.mark.alone
@pytest.mark.parametrize(
    ("form", "case"),
    [
        pytest.param(*one, marks=() if one in OF_SECOND_TIER else pytest.mark.exhaustive)
        for one in itertools.product(FORMS, CASES)
    ],
)
def test_memory_is_as_predicted_with_other_tiles_chunks_and_options(memory, form, case):
    check_memory(memory(form, SIDES[0], 4, **CASES[case]))


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
    for path in maps_of(search):
        key = str(path.parent.relative_to(search))
        chunked = store.open_map(objects, key, key, MAPS[path.parent.name].dtypes)
        for tile in tiles:
            counts.update((key, c.iy, c.ix) for c in chunked.grid.touching(tile.region))
    return counts


@pytest.mark.parametrize(
    ("form", "chunk", "tile_size", "nan"),
    combinations(
        *(FORMS, [(96, 80), (100, 70)], [64, 1024], ["raise", "mask"]),
        fast=[
            ("explicit", (100, 70), 64, "raise"),
            ("indexed", (96, 80), 1024, "mask"),
            ("indexed", (100, 70), 1024, "raise"),
        ],
    ),
    ids=str,
)
def test_a_tile_reads_each_chunk_once(tmp_path, rng, fetched, form, chunk, tile_size, nan):
    indexed = form == "indexed"
    shape, counts = (230, 160), (1000, 300, 25)
    results = [make_result(rng, shape, count, ties=True) for count in counts]
    aligned = write_search(tmp_path / "A.zarr", results, counts, indexed=indexed)
    search = rechunk(aligned, tmp_path / "C.zarr", chunk)
    fetched.clear()
    options = {"tile_size": tile_size, "threads": 2, "nan": nan}
    ocelot_em.merge(search, tmp_path / "OUT.zarr", **options)
    grid = prepare([search], tmp_path / "NEW.zarr", MergeOptions(**options)).plan.grid
    assert len(grid) == (12 if tile_size == 64 else 1)
    # At least once for every tile that needs it, so not twice for any of them.
    assert fetched == chunks_needed(search, grid)
    ocelot_em.merge(aligned, tmp_path / "EXPECTED.zarr", **options)
    assert_same_maps(read_maps(tmp_path / "OUT.zarr"), read_maps(tmp_path / "EXPECTED.zarr"))


# Overlap.


GIVE_UP_SECONDS = 60
"""Only a merge that does one thing after another waits so long; and then it fails."""


class WaitingStorage:
    """Ends the last writes of a tile only when the next one is on its way.

    The last chunk waits until the next tile is read, and the done-mark until it is merged.

    Parameters
    ----------
    monkeypatch
        Puts it in place.
    tiles
        All, in order.
    n_maps
        Written of each tile, of one chunk each; the done-mark comes after them.
    """

    def __init__(self, monkeypatch, tiles, n_maps):
        self.in_vain = []
        self._next, self._n_maps = dict(itertools.pairwise(tiles)), n_maps
        self._n_written, self._lock = Counter(), threading.Lock()
        self._reading = {tile: threading.Event() for tile in tiles}
        self._merged = {tile: threading.Event() for tile in tiles}
        for name, before in (("get_into", self._before_get), ("put", self._before_put)):
            monkeypatch.setattr(LocalObjects, name, self._watched(name, before))
        accept = TileWriter.map

        def accepted(writer, name, values):
            self._merged[writer._tile.iy, writer._tile.ix].set()
            accept(writer, name, values)

        monkeypatch.setattr(TileWriter, "map", accepted)

    def _watched(self, name, before):
        method = getattr(LocalObjects, name)

        def watched(objects, key, data, *limits):
            path, is_chunk, place = key.partition("/c/")
            of_map = is_chunk and place.count("/") == 1  # not of a table, nor a record
            if of_map and path.partition("/")[0] not in ("statistics", "progress"):
                before(tuple(map(int, place.split("/"))))
            elif path == "progress/tile_summary":
                before(tuple(map(int, place.split("/")))[:2], is_mark=True)
            return method(objects, key, data, *limits)

        return watched

    def _before_get(self, tile, *, is_mark=False):
        if not is_mark:
            self._reading[tile].set()

    def _before_put(self, tile, *, is_mark=False):
        following = self._next.get(tile)
        if is_mark:
            if following:
                self._wait(self._merged[following], f"{tile} was done first")
            return
        with self._lock:
            self._n_written[tile] += 1
            is_last = self._n_written[tile] == self._n_maps
        if following and is_last:
            self._wait(self._reading[following], f"{tile} was written first")

    def _wait(self, event, complaint):
        if not event.wait(GIVE_UP_SECONDS):
            self.in_vain.append(complaint)


def merge_by_one_thread(search, output):
    """The tiles are in several batches."""
    options = MergeOptions(tile_size=128, threads=1, overwrite=True)
    return merge_alone(prepare([search], output, options), options, ThreadExecutor(1))


@pytest.fixture(params=[False, True], ids=FORMS)
def search_of_many_tiles(request, tmp_path, rng):
    """Chunks are tiles: 2 rows and 3 columns."""
    counts = [1000, 300]
    results = [make_result(rng, (256, 384), count) for count in counts]
    search = write_search(tmp_path / "RUN.zarr", results, counts, indexed=request.param)
    return rechunk(search, tmp_path / "C.zarr", (128, 128))


def test_neighbouring_tiles_overlap(search_of_many_tiles, tmp_path, monkeypatch):
    """The next is fetched while one is written, and merged before that is done."""
    merge_by_one_thread(search_of_many_tiles, tmp_path / "OUT.zarr")
    maps = [path.parent.name for path in (tmp_path / "OUT.zarr").glob("*/zarr.json")]
    n_maps = len({*maps} & {*MAPS})
    storage = WaitingStorage(monkeypatch, list(np.ndindex(2, 3)), n_maps)
    merge_by_one_thread(search_of_many_tiles, tmp_path / "SLOW.zarr")
    assert storage.in_vain == []
    assert_same_maps(read_maps(tmp_path / "SLOW.zarr"), read_maps(tmp_path / "OUT.zarr"))


def test_long_runs_come_first_and_cover_every_tile_once():
    tiles = Tiles(30, np.arange(900))
    runs = [*split_into_batches(tiles, lambda: 1)]
    assert [tile for run in runs for tile in run] == list(tiles)
    lengths = [len(run) for run in runs]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 16
    assert lengths[-1] == 1


@pytest.mark.parametrize(
    "damaged",
    [
        "best_psi",
        pytest.param("mip", marks=pytest.mark.slow),
        pytest.param("correlation_squared_sum", marks=pytest.mark.slow),
    ],
)
def test_many_failed_tiles_of_one_task_leave_the_others_alone(tmp_path, rng, damaged):
    results = [make_result(rng, (32, 32 * 20), 100) for _ in range(3)]
    search = write_search(tmp_path / "RUN.zarr", results, [100] * 3)
    search = rechunk(search, tmp_path / "CHUNKED.zarr", (32, 32))
    bad = [number for number in range(20) if number % 4]
    for number in bad:
        path = search / f"partials/p{number % 3}/{damaged}/c/0/{number}"
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TilesFailedError, match="15 of 20 tiles failed") as error:
        ocelot_em.merge(search, tmp_path / "OUT.zarr", tile_size=32, threads=1)
    assert "is corrupt" in str(error.value)
    assert "announced" not in str(error.value)
    assert ocelot_em.describe(tmp_path / "OUT.zarr").tiles_done == 5
