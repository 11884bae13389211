"""A merge, and other ways to get the same maps.

``python -m benchmarks.peers [--quick] [--data FOLDER] [--repeats N]`` merges one simulated search
of explicit poses with this package, with a dask.array program, with a Dask and zarr program that is
tuned as far as these libraries allow, and with everything in memory, each in a process of its own
and in turn. Page cache warm, start-up and compiling left out, two threads
or worker processes, all outputs compared. GB/s are decoded bytes of the input.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import zarr

import ocelot_em
from benchmarks import common
from benchmarks.common import Measured, Run
from ocelot_em.model.maps import (
    BEST_PARTIAL,
    COUNT,
    MAPS,
    MEAN,
    MIP,
    POSES,
    SCALED_MIP,
    SQUARED_SUM,
    STD,
    SUM,
    AnyArray,
    MapSet,
    PoseForm,
)
from ocelot_em.run.clusters import WORKER_ENVIRONMENT
from ocelot_em.store import arrays as store
from ocelot_em.store.objects import open_objects

N_PARTIALS, N_WORKERS = 4, 2
SIDES = (8192, 4096, 2048)
IN_MEMORY_SIDE = 4096
QUICK_SIDE = TINY_SIDE = 256
MAP_SET = MapSet(PoseForm.EXPLICIT)
LEOPARD_MAPS = (MIP, SCALED_MIP, MEAN, STD, *POSES[:4])
MRC_HEADER_NBYTES = 1024
SAVED_AS = "mrc" if importlib.util.find_spec("mrcfile") else "raw"
TOLERANCE = 1e-4
"""Of z-scores, where sums are added in float32."""

Merge = Callable[[Path, Path], object]
"""Reads the first place and writes merged maps to the second, which is not there yet."""


@dataclass(frozen=True)
class Way:
    """One way to merge.

    Parameters
    ----------
    label
        What it is, for people.
    opened
        Starts what it needs, and gives the merge itself.
    in_memory
        Whether it starts from ``.npz`` files and holds everything.
    needs
        The package without which it is left out.
    """

    label: str
    opened: Callable[[], AbstractContextManager[Merge]]
    in_memory: bool = False
    needs: str = "zarr"


# This package.


@contextmanager
def our_threads() -> Iterator[Merge]:
    yield partial(ocelot_em.merge, cluster="threads", threads=N_WORKERS)


@contextmanager
def our_processes() -> Iterator[Merge]:
    from distributed import LocalCluster

    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ": WORKER_ENVIRONMENT}),
        LocalCluster(
            n_workers=N_WORKERS,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address=None,
            memory_limit=0,
        ) as cluster,
    ):
        yield partial(ocelot_em.merge, cluster=cluster.scheduler_address)


# The dask.array program.


@contextmanager
def with_dask(merge: Merge) -> Iterator[Merge]:
    with (
        dask.config.set(scheduler="threads", num_workers=N_WORKERS),
        # Faster, and this package's stores have every chunk.
        zarr.config.set({"array.write_empty_chunks": True}),
    ):
        yield merge


@contextmanager
def with_zarrs(merge: Merge) -> Iterator[Merge]:
    import zarrs  # type: ignore[import-not-found, unused-ignore]  # noqa: F401 - optional

    pipeline = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
    with zarr.config.set(pipeline), with_dask(merge) as way:
        yield way


def opened_partials(search: Path) -> tuple[list[zarr.Group], int]:
    """The partials in order, and their total count."""
    groups = dict(zarr.open_group(search / "partials", mode="r").groups())
    partials = [groups[name] for name in sorted(groups)]
    return partials, sum(map(count_of, partials))


def merge_with_dask(search: Path, output: Path) -> None:
    """All maps as lazy arrays of the stored chunks, written by one computation."""
    partials, count = opened_partials(search)
    maps = {name: [da.from_zarr(p[name]) for p in partials] for name in MAP_SET.partial}
    merged = lazy_maps(maps, count)
    da.store(
        [merged[name] for name in MAP_SET.merged],
        [new_array(output, name, merged[name]) for name in MAP_SET.merged],
        lock=False,
    )


def count_of(partial_result: zarr.Group) -> int:
    about: Any = partial_result.attrs["ocelot"]
    return int(about["total_projections"])


def lazy_maps(maps: dict[str, list[Any]], count: int) -> dict[str, Any]:
    """Merged maps, from a list of every map's lazy arrays."""
    winner = da.stack(maps[MIP]).rechunk({0: -1}).argmax(axis=0)
    merged = {name: da.choose(winner, maps[name]) for name in (MIP, *POSES)}
    merged[BEST_PARTIAL] = winner
    merged[SUM] = sum(x.astype("float64") for x in maps[SUM])
    merged[SQUARED_SUM] = sum(x.astype("float64") for x in maps[SQUARED_SUM])
    merged[MEAN] = merged[SUM] / count
    merged[STD] = da.sqrt(da.maximum(merged[SQUARED_SUM] / count - merged[MEAN] ** 2, 0))
    z = (merged[MIP] - merged[MEAN]) / merged[STD]
    merged[SCALED_MIP] = da.where(merged[STD] == 0, 0, z)
    return {name: array.astype(MAPS[name].dtypes[0]) for name, array in merged.items()}


def new_array(output: Path, name: str, like: Any) -> "zarr.Array[Any]":
    """An empty stored array with the codecs of this package, for zarr to write."""
    chunk = getattr(like, "chunksize", None) or like.chunks  # of dask.array and zarr
    store.create_map(open_objects(output), name, name, like.shape, chunk)
    return zarr.open_array(output / name, mode="r+")


# The tuned Dask and zarr program: a task for each tile of one chunk, which works in place.


def merge_tiles_with_dask(search: Path, output: Path) -> None:
    partials, count = opened_partials(search)
    maps: list[dict[str, Any]] = [{name: p[name] for name in MAP_SET.partial} for p in partials]
    like = maps[0][MIP]
    merged = {name: new_array(output, name, like) for name in MAP_SET.merged}
    task = dask.delayed(merge_one_tile, pure=False, traverse=False)
    height, width = like.chunks
    dask.compute(
        *(
            task(maps, count, merged, np.s_[y : y + height, x : x + width])
            for y in range(0, like.shape[0], height)
            for x in range(0, like.shape[1], width)
        )
    )


def merge_one_tile(
    partials: list[dict[str, Any]], count: int, merged: dict[str, Any], where: tuple[slice, slice]
) -> None:
    """Read, merge and write one map after another: few arrays, each of which stays in the cache."""
    mip = partials[0][MIP][where]
    winner, wins = np.zeros(mip.shape, np.int32), []
    for number, maps in enumerate(partials[1:], 1):
        new = maps[MIP][where]
        wins.append(new > mip)
        np.maximum(mip, new, out=mip)
        np.copyto(winner, np.int32(number), where=wins[-1])
    merged[MIP][where], merged[BEST_PARTIAL][where] = mip, winner
    sums = []
    for name in (SUM, SQUARED_SUM):
        total = partials[0][name][where].astype(np.float64)
        for maps in partials[1:]:
            total += maps[name][where]
        merged[name][where] = total
        total /= count
        sums.append(total)
    mean, variance = sums
    variance -= mean * mean
    std = np.sqrt(np.maximum(variance, 0, out=variance), out=variance)
    z = np.zeros_like(mean)
    np.divide(mip - mean, std, out=z, where=std != 0)
    for name, values in ((MEAN, mean), (STD, std), (SCALED_MIP, z)):
        merged[name][where] = values.astype(np.float32)
    for name in POSES:
        pose = partials[0][name][where]
        for maps, won in zip(partials[1:], wins, strict=True):
            np.copyto(pose, maps[name][where], where=won)
        merged[name][where] = pose


# Everything in memory, with loading and saving, as Leopard-EM has it.


@contextmanager
def in_memory() -> Iterator[Merge]:
    yield merge_in_memory


def merge_in_memory(folder: Path, output: Path) -> None:
    results = []
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as loaded:
            results.append({name: loaded[name] for name in loaded.files})
    maps = stacked_maps(results)
    output.mkdir()
    for name in LEOPARD_MAPS:
        save_map(output / name, maps[name])


def stacked_maps(results: list[dict[str, AnyArray]]) -> dict[str, AnyArray]:
    """Merged maps, by stacking every map of all results."""
    mips = np.stack([result[MIP] for result in results])
    winner = mips.argmax(axis=0)[None]
    merged = {MIP: mips.max(axis=0)}
    for name in POSES:
        stacked = np.stack([result[name] for result in results])
        merged[name] = np.take_along_axis(stacked, winner, axis=0)[0]
    count = np.float32(sum(int(result[COUNT]) for result in results))
    merged[SUM] = np.stack([result[SUM] for result in results]).sum(axis=0)
    merged[SQUARED_SUM] = np.stack([result[SQUARED_SUM] for result in results]).sum(axis=0)
    merged[MEAN] = merged[SUM] / count
    variance = merged[SQUARED_SUM] / count - merged[MEAN] ** 2
    merged[STD] = np.sqrt(np.maximum(variance, 0))
    difference = merged[MIP] - merged[MEAN]
    zero = np.zeros_like(difference)
    merged[SCALED_MIP] = np.divide(difference, merged[STD], out=zero, where=merged[STD] != 0)
    return merged


def save_map(path: Path, values: AnyArray) -> None:
    """Write an MRC file, or only the values if there is no mrcfile."""
    file = path.with_suffix(f".{SAVED_AS}")
    if SAVED_AS == "mrc":
        with importlib.import_module("mrcfile").new(file) as mrc:
            mrc.set_data(values)
    else:
        values.tofile(file)


def npz_of(search: Path) -> Path:
    """The same search as one uncompressed ``.npz`` per partial, made once beside the store."""
    folder = search.with_name("npz")
    if not folder.exists():
        unfinished = folder.with_name("npz-unfinished")
        unfinished.mkdir(exist_ok=True)
        for name, group in zarr.open_group(search / "partials", mode="r").groups():
            maps: dict[str, Any] = {
                key: zarr.open_array(search / "partials" / name / key, mode="r")[...]
                for key in MAP_SET.partial
            }
            maps[COUNT] = count_of(group)
            np.savez(unfinished / f"{name}.npz", allow_pickle=False, **maps)
        unfinished.rename(folder)
    return folder


WAYS = {
    "threads": Way(f"ocelot_em, {N_WORKERS} threads", our_threads),
    "processes": Way(f"ocelot_em, cluster of {N_WORKERS} processes", our_processes),
    "dask": Way(f"dask.array program, {N_WORKERS} threads", partial(with_dask, merge_with_dask)),
    "dask-zarrs": Way(
        "the same, zarrs codec pipeline", partial(with_zarrs, merge_with_dask), needs="zarrs"
    ),
    "tuned": Way(
        f"tuned Dask and zarr program, {N_WORKERS} threads",
        partial(with_dask, merge_tiles_with_dask),
    ),
    "tuned-zarrs": Way(
        "the same, zarrs codec pipeline", partial(with_zarrs, merge_tiles_with_dask), needs="zarrs"
    ),
    "memory": Way(f"all in memory, npz to {SAVED_AS}", in_memory, in_memory=True),
}
OURS = "threads"


def run_one(way: Way, search: Path, output: Path, tiny: Path) -> float:
    """Seconds of a merge, once a tiny one has imported, compiled and connected everything."""
    with way.opened() as merge:
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:
            merge(tiny, Path(folder, "OUT"))
        started = time.perf_counter()
        merge(search, output)
        return time.perf_counter() - started


def measure(name: str, search: Path, tiny: Path, reference: Path) -> Run:
    """Run a way in a process of its own, compare what it wrote, and delete it."""
    way = WAYS[name]
    output = reference.with_name("OUT")
    if way.in_memory:
        search, tiny = npz_of(search), npz_of(tiny)
    common.warm(search)
    os.sync()  # or what earlier runs wrote would be written out during this one
    command = [sys.executable, "-m", "benchmarks.peers", "--way", name]
    run = common.run_and_watch([*command, "--places", str(search), str(output), str(tiny)])
    compare(output, reference)
    shutil.rmtree(output)
    return replace(run, seconds=json.loads(run.output.splitlines()[-1])["seconds"])


def compare(output: Path, reference: Path) -> None:
    """Raise AssertionError unless ``mip`` is equal and z-scores are close."""
    for name, tolerance in ((MIP, 0.0), (SCALED_MIP, TOLERANCE)):
        expected: Any = zarr.open_array(reference / name, mode="r")
        found = open_result(output, name, expected.shape)
        for y in range(0, expected.shape[0], 1024):
            rows = slice(y, y + 1024)
            np.testing.assert_allclose(
                found[rows], expected[rows], rtol=tolerance, atol=tolerance, err_msg=name
            )


def open_result(output: Path, name: str, shape: tuple[int, ...]) -> Any:
    file = output / f"{name}.{SAVED_AS}"
    if file.exists():
        offset = MRC_HEADER_NBYTES if SAVED_AS == "mrc" else 0
        return np.memmap(file, np.float32, "r", offset, shape)
    return zarr.open_array(output / name, mode="r")


def side_that_fits(folder: Path) -> int:
    """Largest side whose decoded search is half of the memory at most, and half of the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    room = min(common.memory_nbytes(), shutil.disk_usage(folder).free) // 2
    fitting = (n for n in SIDES if nbytes_of(n) <= room)
    return next(fitting, SIDES[-1])


def nbytes_of(side: int) -> int:
    return common.decoded_nbytes(side, N_PARTIALS, PoseForm.EXPLICIT)


def compete(side: int, options: argparse.Namespace) -> dict[tuple[str, int], Measured]:
    """All ways in turn, by name and side."""
    found = [name for name, way in WAYS.items() if importlib.util.find_spec(way.needs)]
    memory_side = min(side, IN_MEMORY_SIDE)
    pairs = [(name, memory_side if WAYS[name].in_memory else side) for name in found]
    pairs += [(OURS, memory_side)] if memory_side != side else []
    with tempfile.TemporaryDirectory(prefix="peers-", dir=options.data) as folder:
        places = {}
        for n in {TINY_SIDE, side, memory_side}:
            search = common.search_of(n, N_PARTIALS, PoseForm.EXPLICIT, folder=options.data)
            places[n] = search, Path(folder, str(n), "REFERENCE")
        for n in {side, memory_side}:
            ocelot_em.merge(*places[n])
        ways = {
            f"{name} {n}": partial(measure, name, places[n][0], places[TINY_SIDE][0], places[n][1])
            for name, n in pairs
        }
        repeats = 1 if options.quick else options.repeats
        with common.full_memory(options.data, quick=options.quick) as fill:
            measured = common.in_turn(ways, repeats, warm_up=not options.quick, before=fill)
    return dict(zip(pairs, measured.values(), strict=True))


def report(results: dict[tuple[str, int], Measured]) -> None:
    header = ("way", "pixels", "seconds", "lowest - highest", "GB/s")
    rows = []
    for (name, side), measured in results.items():
        ours = results[OURS, side]
        rows.append(
            (
                WAYS[name].label,
                f"{side}^2",
                f"{measured.median:.2f}",
                measured.spread,
                f"{nbytes_of(side) / measured.median / 1e9:.2f}",
                f"{measured.total_nbytes / 1e6:,.0f}",
                f"{measured.process_nbytes / 1e6:,.0f}",
                f"{measured.median / ours.median:.2f}",
            )
        )
    common.table((*header, "MB, all processes", "MB, largest", "time to ours"), rows)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--side", type=int, help="height and width of the maps in pixels")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--places", type=Path, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps({"seconds": run_one(WAYS[options.way], *options.places)}))
        return
    side = QUICK_SIDE if options.quick else options.side or side_that_fits(options.data)
    options.data.mkdir(parents=True, exist_ok=True)
    results = compete(side, options)
    print(f"{common.machine()}\n{N_PARTIALS} explicit partials\n")
    report(results)
    absent = [w for w in WAYS.values() if not importlib.util.find_spec(w.needs)]
    for way in absent:
        print(f"\nleft out, as {way.needs} is not installed: {way.label}")


if __name__ == "__main__":
    main()
