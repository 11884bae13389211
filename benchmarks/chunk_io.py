"""What chunks cost: reading and writing them here and with zarr's arrays, and their codecs.

``python -m benchmarks.chunk_io [--quick] [--data FOLDER] [--repeats N]`` reads and writes one map
chunk by chunk, all ways in turn, with one thread and with all cores; page cache warm. Then it
encodes and decodes one chunk of every map of a merge with other settings of the codec, in the
processor time of one thread.
"""

import importlib.util
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import zarr
from numcodecs.blosc import Blosc

import ocelot_em
from benchmarks import common
from ocelot_em.model.maps import MAPS, MIP, AnyArray, PoseForm
from ocelot_em.model.regions import Region, Tile
from ocelot_em.store import arrays as store
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import MapGroup

N_PARTIALS = 4

CODECS = {
    "lz4 5, bytes": Blosc("lz4", 5, Blosc.SHUFFLE),
    "lz4 5, bits": Blosc("lz4", 5, Blosc.BITSHUFFLE),
    "lz4 1, bits": Blosc("lz4", 1, Blosc.BITSHUFFLE),
    "lz4 9, bits": Blosc("lz4", 9, Blosc.BITSHUFFLE),
    "zstd 1, bits": Blosc("zstd", 1, Blosc.BITSHUFFLE),
}


def compare_io(side: int, repeats: int, folder: Path) -> None:
    """Read and write one map."""
    chunk = min(side // 2, 1024)
    objects = open_objects(folder / "bench.zarr")
    store.create_map(objects, "mip", MIP, (side, side), (chunk, chunk))
    ours = store.open_map(objects, "mip", "bench", MAPS[MIP].dtypes)
    values = np.random.default_rng(0).gumbel(5, 1, (side, side)).astype(np.float32)
    cells = list(ours.grid)
    of_thread = threading.local()

    def read_ours(cell: Tile) -> None:
        if not hasattr(of_thread, "memory"):
            of_thread.memory = np.empty((chunk, chunk), np.float32)
        ours.read(cell.region, of_thread.memory)

    def write_ours(cell: Tile) -> None:
        ours.write(cell.region, values[cell.region.slices])

    ways: dict[tuple[str, int], Callable[[], object]] = {}
    counts = sorted({1, os.cpu_count() or 1})

    def add(name: str, way: Callable[[Tile], None], pipeline: str = "") -> None:
        for n_threads in counts:
            ways[name, n_threads] = lambda n=n_threads: in_threads(way, cells, n, pipeline)

    add("write, here", write_ours)
    add("read, here", read_ours)
    pipelines = {"zarr": "zarr.core.codec_pipeline.BatchedCodecPipeline"}
    if importlib.util.find_spec("zarrs"):
        pipelines["zarr with zarrs"] = "zarrs.ZarrsCodecPipeline"
    for name, path in pipelines.items():
        with zarr.config.set({"codec_pipeline.path": path}):
            theirs = zarr.open_array(folder / "bench.zarr", path="mip", mode="r+")

        def read_theirs(cell: Tile, array: "zarr.Array" = theirs) -> None:  # type: ignore[type-arg]
            array[cell.region.slices]

        def write_theirs(cell: Tile, array: "zarr.Array" = theirs) -> None:  # type: ignore[type-arg]
            array[cell.region.slices] = values[cell.region.slices]

        add(f"write, {name}", write_theirs, path)
        add(f"read, {name}", read_theirs, path)
    measured = common.in_turn({f"{name}|{n}": way for (name, n), way in ways.items()}, repeats)
    rows = []
    for name in dict.fromkeys(name for name, _ in ways):
        rates = [values.nbytes / measured[f"{name}|{n}"].median / 1e9 for n in counts]
        rows.append([name, *(f"{rate:.2f}" for rate in rates)])
    print(f"\none float32 map of {side}^2, chunks of {chunk}^2, GB/s, medians of {repeats}\n")
    common.table(["way", *(f"{n} threads" for n in counts)], rows)


def in_threads(
    way: Callable[[Tile], None], cells: list[Tile], n_threads: int, pipeline: str
) -> None:
    """Do something with all chunks."""
    with (
        zarr.config.set({"codec_pipeline.path": pipeline} if pipeline else {}),
        ThreadPoolExecutor(n_threads) as pool,
    ):
        list(pool.map(way, cells))


def compare_codecs(search: Path, repeats: int, folder: Path) -> None:
    """Encode and decode one chunk of every map of a merge."""
    merged = folder / "merged.zarr"
    ocelot_em.merge(search, merged)
    names = sorted({path.parent.name for path in merged.glob("*/zarr.json")} & {*MAPS})
    rows = []
    for name in [name for name in MAPS if name in names]:
        chunked = MapGroup(open_objects(merged)).open((name,))[name]
        values, _ = chunked.read(Region(0, *chunked.grid.cell[:1], 0, *chunked.grid.cell[1:]))
        rows.append([f"`{name}`", *(cost(values, codec, repeats) for codec in CODECS.values())])
    side = values.shape[0]
    print(f"\none chunk of {side}^2: ratio, milliseconds to encode, to decode; {repeats} times\n")
    common.table(["map", *CODECS], rows)


def cost(values: AnyArray, codec: Blosc, repeats: int) -> str:
    """Ratio, and the processor time of one thread, in milliseconds."""
    out = np.empty_like(values)
    encoded, decoded = [], []
    for repeat in range(repeats + 1):
        started = time.thread_time()
        frame = codec.encode(values)
        between = time.thread_time()
        codec.decode(frame, out)
        if repeat:
            encoded.append(between - started)
            decoded.append(time.thread_time() - between)
    milliseconds = [statistics.median(seconds) * 1e3 for seconds in (encoded, decoded)]
    return f"{values.nbytes / len(frame):.2f}, {milliseconds[0]:.1f}, {milliseconds[1]:.2f}"


def main() -> None:
    asked = common.arguments(__doc__).parse_args()
    side, repeats = (512, 1) if asked.quick else (6144, asked.repeats)
    print(common.machine())
    with tempfile.TemporaryDirectory(prefix="ocelot-bench-") as name:
        compare_io(side, repeats, Path(name))
        search = common.search_of(min(side, 2048), N_PARTIALS, PoseForm.INDEXED, folder=asked.data)
        compare_codecs(search, repeats, Path(name))


if __name__ == "__main__":
    main()
