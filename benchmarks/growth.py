"""How the cost of a merge grows: with the size, the number of partials, and that of tiles.

``python -m benchmarks.growth [--quick] [--data FOLDER] [--repeats N]`` prints four tables: whole
merges of larger and larger searches; of more and more partials; tasks that do nothing, which is
what scheduling costs; and the plan of a canvas of 10^12 pixels. Large searches are hard links to
the chunks of a small one, so that the page cache is equally warm for all sizes. Outputs are
written to the data folder and deleted. Linux only.
"""

import argparse
import gc
import json
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import ocelot_em
from benchmarks import common
from benchmarks.common import Run
from ocelot_em.merge.job import JobSpec
from ocelot_em.merge.marks import done_mark_path
from ocelot_em.merge.merge import Executor, merge
from ocelot_em.merge.outcome import Outcome, Outcomes, Tiles
from ocelot_em.merge.plan import MergePlan
from ocelot_em.merge.resume import complete_output, prepare
from ocelot_em.merge.stats.collected import StatisticsScope, TileStatistics
from ocelot_em.merge.stats.totals import TileTotals
from ocelot_em.model.maps import BEST_PARTIAL, MIP, SCALED_MIP, STD, MapSet, PoseForm
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.regions import Region
from ocelot_em.run.clusters import open_cluster
from ocelot_em.run.executors import ClientExecutor, ThreadExecutor
from ocelot_em.store.constants import DEFAULT_CHUNK
from ocelot_em.store.objects import open_objects
from ocelot_em.store.result_shards import OwnShards

N_THREADS = 2
N_PARTIALS = 4
LARGEST_NEEDS_NBYTES = 45 * 10**9
CANVAS_SIDE = 10**6
TINY_SIDE = 256
"""Of a search whose chunks are not looked at."""


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Parameters
    ----------
    simulated_side
        Of the searches that are simulated and repeated.
    sides
        Of whole merges.
    largest
        Of one more, if there is enough free disk.
    partials
        Their numbers, at the first of the sides.
    tiles
        That do nothing.
    """

    simulated_side: int
    sides: tuple[int, ...]
    largest: int | None
    partials: tuple[int, ...]
    tiles: tuple[int, ...]


FULL = Sizes(
    2048, (4096, 8192, 16384), 32768, (2, 4, 8, 16, 32, 64), (50 * 50, 200 * 200, 632 * 632)
)
QUICK = Sizes(256, (256, 512), None, (1, 2), (10 * 10,))


def timed_merge(search: Path) -> Run:
    """Merge a whole search; the output is deleted afterwards."""
    output = search.with_name("OUT.zarr")
    started = time.perf_counter()
    ocelot_em.merge(search, output, cluster="threads", threads=N_THREADS)
    seconds = time.perf_counter() - started
    shutil.rmtree(output)
    os.sync()  # the next one should not wait for the pages of this one
    return Run(seconds)


def fill_and_warm(fill: Callable[[], None], search: Path) -> None:
    """Make the page cache what it is on a machine that has just run the search."""
    fill()
    common.warm(search)


# Size.


def size_table(sizes: Sizes, data: Path, repeats: int) -> None:
    """Print seconds per gigapixel of whole merges."""
    print(f"\nwhole merges of {N_PARTIALS} partials, {N_THREADS} threads\n")
    sides = sizes.sides
    if sizes.largest and shutil.disk_usage(data).free > LARGEST_NEEDS_NBYTES:
        sides += (sizes.largest,)
    elif sizes.largest:
        needed = f"{LARGEST_NEEDS_NBYTES / 1e9:.0f} GB of free disk"
        print(f"{sizes.largest}^2 is left out: it needs {needed}\n")
    rows = []
    for form in PoseForm:
        small = common.search_of(sizes.simulated_side, N_PARTIALS, form, folder=data)
        with (
            tempfile.TemporaryDirectory(dir=data) as folder,
            common.full_memory(data, quick=sizes is QUICK) as fill,
        ):
            ways: dict[str, Callable[[], Run]] = {}
            for side in sides:
                place = Path(folder, f"{side}.zarr")
                common.repeated(small, place, side, n_partials=N_PARTIALS)
                ways[f"{side}"] = partial(timed_merge, place)
            ways[f"{sides[0]}"]()  # compiles
            before = partial(fill_and_warm, fill, small)
            measured = common.in_turn(ways, repeats, warm_up=False, before=before)
        smallest = measured[f"{sides[0]}"].median / sides[0] ** 2
        for side, found in zip(sides, measured.values(), strict=True):
            per_pixel = found.median / side**2
            figures = f"{found.median:.2f}", found.spread, f"{per_pixel * 1e9:.1f}"
            rows.append((form.value, f"{side}^2", *figures, f"{per_pixel / smallest:.2f}"))
    header = ("poses", "size", "seconds", "lowest - highest", "s per gigapixel", "ratio")
    common.table(header, rows)


# Partials.


def partials_table(sizes: Sizes, data: Path, repeats: int) -> None:
    """Print seconds per partial, without what is the same for any number of them."""
    side, numbers = sizes.sides[0], sizes.partials
    small = common.search_of(sizes.simulated_side, numbers[-1], PoseForm.INDEXED, folder=data)
    with (
        tempfile.TemporaryDirectory(dir=data) as folder,
        common.full_memory(data, quick=sizes is QUICK) as fill,
    ):
        ways: dict[str, Callable[[], Run]] = {}
        for n_partials in numbers:
            place = Path(folder, f"{n_partials}.zarr")
            common.repeated(small, place, side, n_partials=n_partials)
            ways[f"{n_partials}"] = partial(timed_merge, place)
        ways[f"{numbers[0]}"]()  # compiles
        before = partial(fill_and_warm, fill, small)
        measured = common.in_turn(ways, repeats, warm_up=False, before=before)
    seconds = [found.median for found in measured.values()]
    slope, constant = line_through(numbers, seconds)
    rows = []
    for n_partials, found in zip(numbers, measured.values(), strict=True):
        each = (found.median - constant) / n_partials
        off = found.median / (constant + slope * n_partials) - 1
        figures = f"{found.median:.2f}", found.spread, f"{each:.3f}", f"{off:+.1%}"
        rows.append((n_partials, *figures))
    print(f"\nindexed poses, {side}^2, {N_THREADS} threads")
    print(f"fit: {constant:.2f} s + {slope:.3f} s for each partial\n")
    header = ("partials", "seconds", "lowest - highest", "s per partial", "off the fit")
    common.table(header, rows)


def line_through(numbers: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Slope and constant of the line with the smallest relative errors."""
    slope, constant = np.polyfit(numbers, seconds, 1, w=1 / np.array(seconds))
    return float(slope), float(constant)


# Tiles.


def scheduling_table(sizes: Sizes, data: Path) -> None:
    """Print what tiles cost that do nothing but return the statistics of noise."""
    rows = []
    for n_tiles in sizes.tiles:
        for where in ("threads", "local"):
            found = common.in_own_process(
                "benchmarks.growth", "scheduling", str(data), where, str(n_tiles)
            )
            times = f"{found['milliseconds']:.3f}", f"{found['end']:.4f}"
            memory = f"{found['grown'] / 1e6:+.1f}", f"{found['peak'] / 1e6:+.1f}"
            rows.append((f"{n_tiles:,}", f"{where} x 2", *times, *memory))
    print("\ntiles that do nothing but return statistics\n")
    header = ("tiles", "where", "ms per tile", "of these at the end", "driver MB", "its peak MB")
    common.table(header, rows)


@cache
def noise() -> TileTotals:
    """Statistics of a tile of a search without particles."""
    tile = TileStatistics(0)
    region, rng = Region(0, DEFAULT_CHUNK, 0, DEFAULT_CHUNK), np.random.default_rng(0)
    tile.begin(region, StatisticsScope(region, np.inf, N_PARTIALS, N_PARTIALS))
    shape, names = region.shape, (MIP, SCALED_MIP, STD)
    maps = {name: rng.normal(7, 0.7, shape).astype(np.float32) for name in names}
    tile.find_candidates(maps | {BEST_PARTIAL: np.zeros(shape, np.int32)})
    return TileTotals.of(tile)


def collect_noise(work: JobSpec, tiles: Iterable[tuple[int, int]]) -> Outcomes:
    """A task that merges nothing, and returns the statistics and checksums of as many tiles."""
    n_maps = len(MapSet(PoseForm.EXPLICIT).merged)
    for outcome in common.do_nothing(work, tiles):
        checksums = np.zeros((n_maps, 1), np.uint32)
        yield replace(outcome, statistics=noise(), checksums=checksums)


def measure_scheduling(data: Path, where: str, n_tiles: int) -> dict[str, float]:
    """Milliseconds per tile, and by how many bytes this process grew meanwhile."""
    small = common.search_of(TINY_SIDE, N_PARTIALS, PoseForm.EXPLICIT, folder=data)
    options = MergeOptions(cluster=where, **({"workers": 2} if where == "local" else {}), threads=1)
    with tempfile.TemporaryDirectory(dir=data) as folder, open_cluster(options) as cluster:
        executor: Executor = ThreadExecutor(2, collect_noise)
        if isinstance(cluster.executor, ClientExecutor):
            executor = ClientExecutor(cluster.executor.client, collect_noise)
        run_tiles(executor, 1000)
        side = math.isqrt(n_tiles) * DEFAULT_CHUNK
        search = Path(folder, "EMPTY.zarr")
        common.repeated(small, search, side, n_partials=N_PARTIALS, n_rows=0)
        ready = prepare([search], Path(folder, "OUT.zarr"), options)
        gc.collect()
        before = common.resident_nbytes()
        ended, marking = [], []

        def complete(*args: Any) -> None:
            started = time.perf_counter()
            mark_all(ready.plan, Path(ready.output))
            marking.append(time.perf_counter() - started)
            complete_output(*args)
            ended.append(time.perf_counter() - started - marking[0])

        started = time.perf_counter()
        with mock.patch.object(sys.modules[merge.__module__], "complete_output", complete):
            report = common.merge_alone(ready, options, executor)
        seconds = time.perf_counter() - started - marking[0]
        grown, peak = common.resident_nbytes() - before, common.peak_nbytes() - before
    assert report.n_merged == n_tiles
    milliseconds, end = (1e3 * each / n_tiles for each in (seconds, ended[0]))
    return {"milliseconds": milliseconds, "end": end, "grown": grown, "peak": peak}


def mark_all(plan: MergePlan, output: Path) -> None:
    """Mark all tiles as done, with empty marks."""
    objects = open_objects(output)
    shards = OwnShards(objects)
    for iy in range(plan.grid.counts[0]):
        for ix in range(plan.grid.counts[1]):
            key = f"{done_mark_path(iy, ix)}/0"
            if not (plan.in_shards and shards.put(key, [b"mark"])):
                objects.put(key, [b"mark"])
    shards.commit()
    shards.rest()


def run_tiles(executor: Executor, n_tiles: int) -> int:
    """Run tiles that do nothing; how many ended."""
    ended = 0

    def count(_: Outcome) -> None:
        nonlocal ended
        ended += 1

    work, tiles = JobSpec("nowhere", "no-run"), Tiles(1000, np.arange(n_tiles))
    executor.run(work, tiles, count, threading.Event())
    return ended


# Planning.


def planning_table(data: Path) -> None:
    """Print what planning a very large canvas costs."""
    found = common.in_own_process("benchmarks.growth", "planning", str(data))
    print(f"\nplanning {N_PARTIALS} partials of {CANVAS_SIDE:,} x {CANVAS_SIDE:,} pixels\n")
    row = f"{found['tiles']:,}", f"{found['seconds']:.2f}", f"{found['peak'] / 1e6:+.1f}"
    common.table(("tiles", "seconds", "peak MB"), [row])


def measure_planning(data: Path) -> dict[str, float]:
    """Seconds, and by how many bytes this process grew at most."""
    small = common.search_of(TINY_SIDE, N_PARTIALS, PoseForm.EXPLICIT, folder=data)
    options = MergeOptions(threads=N_THREADS)
    with tempfile.TemporaryDirectory(dir=data) as folder:
        search, output = Path(folder, "EMPTY.zarr"), Path(folder, "OUT.zarr")
        prepare([small], output, options)  # imports
        common.repeated(small, search, CANVAS_SIDE, n_partials=N_PARTIALS, n_rows=0)
        gc.collect()
        before = common.resident_nbytes()
        started = time.perf_counter()
        ready = prepare([search], output, options)
        seconds = time.perf_counter() - started
    peak = common.peak_nbytes() - before
    return {"seconds": seconds, "peak": peak, "tiles": len(ready.missing)}


def run_one(what: str, data: str, *rest: str) -> dict[str, float]:
    if what == "planning":
        return measure_planning(Path(data))
    return measure_scheduling(Path(data), rest[0], int(rest[1]))


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(*options.one)))
        return
    sizes, repeats = (QUICK, 1) if options.quick else (FULL, options.repeats)
    options.data.mkdir(parents=True, exist_ok=True)
    common.search_of(TINY_SIDE, N_PARTIALS, PoseForm.EXPLICIT, folder=options.data)
    print(f"{common.machine()}\nmedians of {repeats}")
    size_table(sizes, options.data, repeats)
    partials_table(sizes, options.data, repeats)
    scheduling_table(sizes, options.data)
    planning_table(options.data)


if __name__ == "__main__":
    main()
