"""What reading and writing chunks directly gains over zarr's own arrays.

``python -m benchmarks.chunk_io [--quick]`` reads and writes one map chunk by chunk, both ways in
turn, with one thread and with all cores, and prints medians. Page cache warm.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import zarr

from ocelot_em import store
from ocelot_em.canvas import Tile
from ocelot_em.maps import MAPS, MIP
from ocelot_em.objects import open_objects


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a small size, once")
    arguments = parser.parse_args()
    size, repeats = (512, 1) if arguments.quick else (6144, 5)
    chunk = min(size // 2, 1024)
    with tempfile.TemporaryDirectory(prefix="ocelot-bench-") as folder:
        objects = open_objects(Path(folder, "bench.zarr"))
        store.create_map(objects, "mip", MIP, (size, size), (chunk, chunk))
        ours = store.open_map(objects, "mip", "bench", MAPS[MIP].dtypes)
        theirs = zarr.open_array(Path(folder, "bench.zarr"), path="mip", mode="r+")
        values = np.random.default_rng(0).gumbel(5, 1, (size, size)).astype(np.float32)
        cells = list(ours.grid)
        buffer = np.empty((chunk, chunk), np.float32)

        def read_ours(cell: Tile) -> None:
            ours.read(cell.region, np.empty_like(buffer))

        def write_ours(cell: Tile) -> None:
            ours.write(cell.region, values[cell.region.slices])

        def read_theirs(cell: Tile) -> None:
            theirs[cell.region.slices]

        def write_theirs(cell: Tile) -> None:
            theirs[cell.region.slices] = values[cell.region.slices]

        ways: dict[tuple[str, int], Callable[[Tile], None]] = {
            (name, threads): way
            for threads in sorted({1, os.cpu_count() or 1})
            for name, way in (
                ("write, here", write_ours),
                ("write, zarr", write_theirs),
                ("read, here", read_ours),
                ("read, zarr", read_theirs),
            )
        }
        rates: dict[tuple[str, int], list[float]] = {key: [] for key in ways}
        for repeat in range(repeats + 1):
            for (name, threads), way in ways.items():
                started = time.perf_counter()
                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(way, cells))
                if repeat:
                    seconds = time.perf_counter() - started
                    rates[name, threads].append(values.nbytes / seconds / 1e9)
    print(f"one float32 map, {size} x {size}, chunks of {chunk}, medians of {repeats}")
    for (name, threads), measured in rates.items():
        print(f"{name:12}  {threads} threads  {statistics.median(measured):5.2f} GB/s")


if __name__ == "__main__":
    main()
