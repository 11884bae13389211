"""How fast a GPU merges: its kernels against copying on it, whole merges against what limits them.

``python -m benchmarks.gpu [--quick] [--data FOLDER] [--repeats N]``. Without a GPU it says why and
ends.

Kernels: 8 partials on the device, bytes that must move (every input read once, every result written
once) against a copy from device to device, which is counted in the same way. Chunks: decoded and
encoded by 1 to 16 threads, and copied over PCIe encoded. Whole merges: 4 explicit partials, 1 to 16
threads, against the same threads without a GPU, against what those must do in any case, and against
the slowest of reading and writing the files, PCIe, and decoding and encoding on the device. Page
cache warm.

Results that are on the device already: merging 8 of them there and writing one partial, against
writing all 8.
"""

import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.blosc import Blosc

import ocelot_em
from benchmarks import _floor, common
from benchmarks.common import Run
from benchmarks.merge import merge_once
from ocelot_em.errors import OcelotError
from ocelot_em.kernels.cuda import CudaKernels
from ocelot_em.kernels.cuda_codec import (
    HEADER_NBYTES,
    ChunkCodec,
    Window,
    max_frame_nbytes,
    pack,
    packed_nbytes,
)
from ocelot_em.kernels.device import Device, find_devices, open_device
from ocelot_em.kernels.streams import find_streams
from ocelot_em.merge import merge as pipeline
from ocelot_em.merge.device_fold import MAPS_FOR_STATISTICS
from ocelot_em.model.maps import MapSet, PartialMaps, PoseForm
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.run.executors import ThreadExecutor
from ocelot_em.store.blosc import BloscChunk, encode
from ocelot_em.store.constants import shuffle_of

N_IN_KERNEL, N_PARTIALS = 8, 4
THREADS = (1, 2, 4, 8, 16)


def device_seconds(way: Callable[[], object], repeats: int) -> float:
    """Median of the device's own seconds for what a call starts on it."""
    import cupy

    seconds = []
    for number in range(repeats + 2):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        way()
        end.record()
        end.synchronize()
        if number >= 2:  # the first ones compile and warm up
            seconds.append(cupy.cuda.get_elapsed_time(start, end) / 1e3)
    return statistics.median(seconds)


def random_partials(device: Device, side: int, form: PoseForm) -> list[PartialMaps]:
    """Partials on the device."""
    import cupy

    device.empty(1, "i8")  # makes the device's stream the current one
    rng = cupy.random.default_rng(0)
    maps = MapSet(form)

    def plane() -> Any:
        return rng.standard_normal((side, side), dtype="f4")

    def pose() -> tuple[Any, ...]:
        if form is PoseForm.EXPLICIT:
            return tuple(plane() for _ in maps.pose)
        return (rng.integers(0, 129_600, (side, side), dtype="i4"),)

    return [
        PartialMaps(plane() + 5, pose(), plane(), plane(), 1000 + number, number)
        for number in range(N_IN_KERNEL)
    ]


def copy_rate(device: Device, repeats: int) -> float:
    """Bytes per second, read and written, of a copy on the device."""
    import cupy

    device.empty(1, "i8")  # makes the device's stream the current one
    source = cupy.ones(2**28, "f4")
    target = cupy.empty_like(source)
    return float(2 * source.nbytes / device_seconds(partial(cupy.copyto, target, source), repeats))


def kernel_table(side: int, repeats: int) -> None:
    """Print how fast the kernels are."""
    import cupy

    device = open_device()
    kernels = CudaKernels(device)
    copied = copy_rate(device, repeats) / 1e9
    rows = [("copy on the device", "", f"{copied:.0f}", "1.00")]
    space = SearchSpace.from_tables(
        np.random.default_rng(0).uniform(0, 360, (8640, 3)), np.arange(5.0), np.arange(3.0)
    )
    for form in PoseForm:
        maps, partials = MapSet(form), random_partials(device, side, form)
        of_form = space if form is PoseForm.INDEXED else None
        acc, n = kernels.identity((side, side), maps), side * side
        read = n * sum(4 for _ in maps.partial)
        kept = n * (8 + 16 + 4 * len(maps.pose))

        def one_by_one(
            acc: Any = acc, partials: Any = partials, space: SearchSpace | None = of_form
        ) -> None:
            for number, one in enumerate(partials):
                kernels.fold_all(acc, (one,), space, fresh=number == 0)

        out = kernels.finalise(acc, maps, of_form)
        finished = {name: a for name, a in out.items() if a.dtype == np.float32 and name != "mip"}
        ways = {
            "fold, all at once": (
                partial(kernels.fold_all, acc, partials, of_form, fresh=True),
                len(partials) * read + kept,
            ),
            "fold, one by one": (one_by_one, len(partials) * (read + 2 * kept) - kept),
            "finalise": (
                partial(kernels.finalise, acc, maps, of_form, finished),
                n * (4 + 16 + 4 * (5 + (6 if of_form else 0))),
            ),
        }
        for name, (way, nbytes) in ways.items():
            seconds = device_seconds(way, repeats)
            rate = nbytes / seconds / 1e9
            label = f"{name}, {form.value}"
            rows.append((label, f"{seconds * 1e3:.2f}", f"{rate:.0f}", f"{rate / copied:.2f}"))
        del acc, partials, out, finished
        cupy.get_default_memory_pool().free_all_blocks()
    print(f"\nkernels, {N_IN_KERNEL} partials x {side}^2, medians of {repeats}\n")
    common.table(("way", "ms", "GB/s", "of the copy"), rows)


def pcie_rates(repeats: int) -> tuple[float, float]:
    """Bytes per second from and to pinned host memory."""
    device = open_device()
    host, there = device.pinned(2**28), device.empty(2**28, "u1")
    rates = []
    for copy in (partial(device.copy_in, host, there), partial(device.copy_out, there, host)):
        ways: dict[str, Callable[[], object]] = {"copy": lambda copy=copy: copy().synchronize()}
        rates.append(host.nbytes / common.in_turn(ways, repeats)["copy"].median)
    return rates[0], rates[1]


class ChunkLoop:
    """Copies, decodes and encodes one chunk again and again, as a thread of a merge does."""

    def __init__(self, device: Device, values: Any, *, bits: bool) -> None:
        codec = Blosc("lz4", 5, Blosc.BITSHUFFLE if bits else Blosc.SHUFFLE)
        chunk = BloscChunk(memoryview(bytearray(b"".join(encode(values, codec)))), values.nbytes)
        streams = chunk.streams(find_streams)
        if streams is None:
            raise OcelotError("expected a chunk that the device decodes")
        self.device, self.streams, self.nbytes = device, streams, values.nbytes
        self._packed = device.pinned(packed_nbytes(len(chunk.frame), streams))
        pack(chunk.frame, streams, self._packed)
        self._values, self._finding = device.empty(values.size, "f4"), device.empty(1, "i8")
        self._finding.fill(0)
        room = max(self._packed.size, max_frame_nbytes(streams))
        self._codec = ChunkCodec(device, room)
        self._window = Window(values.shape, (0, 0), values.shape, 0)
        self._frame = device.pinned(room)

    def decode(self, n: int) -> None:
        """Copy and decode it."""
        for _ in range(n):
            done = self._codec.decode(self._packed, self.streams, self._values, self._finding)
        done.synchronize()
        self.frame_nbytes()

    def encode(self, n: int) -> None:
        """Encode it, and copy the frame."""
        for _ in range(n):
            self._codec.encode(self._values, self._window, self.streams)
            size = self.frame_nbytes()
            self.device.copy_out(self._codec.frame[:size], self._frame[:size]).synchronize()

    def frame_nbytes(self) -> int:
        """Wait for the device; return the size of the frame that it has encoded last."""
        start = self._frame[: HEADER_NBYTES + 4]
        self.device.copy_out(self._codec.frame[: start.size], start).synchronize()
        return int(start[HEADER_NBYTES:].view("<u4")[0])


def codec_table(side: int, repeats: int, *, n_chunks: int) -> dict[str, float]:
    """Print how fast threads decode and encode chunks, which cross PCIe encoded.

    Returns the most decoded bytes per second of each, of maps as a merge has them.
    """
    device, best = open_device(), dict[str, float]()
    rng = np.random.default_rng(0)
    angles = rng.choice(np.arange(0, 360, 1.5, dtype="f4"), (side, side))
    maps = {"mip": rng.standard_normal((side, side), dtype="f4") + 5, "best_psi": angles}
    rows = []
    for n_threads in THREADS:
        for name, values in maps.items():
            bits = shuffle_of(name) == "bitshuffle"
            with ThreadPoolExecutor(n_threads) as pool:
                # Each thread has its own stream, on which its memory is allocated.
                barrier = threading.Barrier(n_threads)

                def started(values: Any = values, bits: bool = bits, wait: Any = barrier) -> Any:
                    wait.wait()
                    return ChunkLoop(device, values, bits=bits)

                loops = [job.result() for job in [pool.submit(started) for _ in range(n_threads)]]

                def run(
                    way: str, pool: Any = pool, loops: Any = loops, wait: Any = barrier
                ) -> None:
                    def turn(loop: ChunkLoop) -> None:
                        wait.wait()
                        getattr(loop, way)(n_chunks)

                    for job in [pool.submit(turn, loop) for loop in loops]:
                        job.result()

                ways = {way: partial(run, way) for way in ("decode", "encode")}
                run("decode")
                run("encode")
                measured = common.in_turn(ways, repeats)
                nbytes = n_threads * n_chunks * values.nbytes
                rates = {way: nbytes / measured[way].median for way in ways}
                ratio = loops[0].frame_nbytes() / values.nbytes
            shown = (f"{rates[way] / 1e9:.1f}" for way in ways)
            rows.append((n_threads, name, len(loops[0].streams.table), *shown, f"{ratio:.3f}"))
            for way, rate in rates.items():
                best[way] = max(best.get(way, 0.0), rate)
    print(f"\n{n_chunks} chunks of {side}^2 per thread, GB/s decoded, medians of {repeats}\n")
    header = ("threads", "map", "streams", "copied, decoded", "encoded, copied", "encoded size")
    common.table(header, rows)
    return best


def disk_seconds(search: Path, folder: Path, nbytes_out: int) -> float:
    """Seconds to read all files of a search, and to write as many bytes as its result has."""
    names = [path for path in search.rglob("*") if path.is_file()]
    each = bytes(2**22)
    target = folder / "copied"
    target.mkdir()
    started = time.perf_counter()
    with ThreadPoolExecutor(max(THREADS)) as pool:
        for _ in pool.map(lambda path: len(path.read_bytes()), names):
            pass
        paths = [target / str(number) for number in range(-(-nbytes_out // len(each)))]
        for _ in pool.map(lambda path: path.write_bytes(each), paths):
            pass
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def merge_table(
    side: int, repeats: int, data: Path, coded: Mapping[str, float], *, quick: bool
) -> None:
    """Print how fast whole merges are, and what limits them; ``coded`` as :func:`codec_table`."""
    search = common.search_of(side, N_PARTIALS, PoseForm.EXPLICIT, folder=data)
    way_in, way_out = pcie_rates(repeats)
    rows = []
    with (
        common.full_memory(data, quick=quick) as fill,
        tempfile.TemporaryDirectory(prefix="ocelot-bench-", dir=data) as name,
    ):
        folder = Path(name)
        totals = ocelot_em.merge(search, folder / _floor.FINISHED).totals
        nbytes_in = common.decoded_nbytes(side, N_PARTIALS, PoseForm.EXPLICIT)
        nbytes_out = side * side * 4 * len(MapSet(PoseForm.EXPLICIT).merged)
        on_host = side * side * 4 * len(MAPS_FOR_STATISTICS)
        pcie = totals.read_nbytes / way_in + (totals.written_nbytes + on_host) / way_out
        device = nbytes_in / coded["decode"] + nbytes_out / coded["encode"]

        def before() -> None:
            fill()
            common.warm(search)

        for n_threads in THREADS:
            options = MergeOptions(threads=n_threads)

            def on_gpu(n_threads: int = n_threads) -> Run:
                output = folder / "gpu.zarr"
                report = ocelot_em.merge(search, output, threads=n_threads, device="cuda")
                shutil.rmtree(output)
                return Run(report.seconds)

            def here(attempt: Any, options: MergeOptions = options) -> Run:
                executor = ThreadExecutor(options.threads or 1, attempt)
                return Run(merge_once(search, folder, executor, options).seconds)

            measured = common.in_turn(
                {
                    "gpu": on_gpu,
                    "cpu": partial(here, pipeline.attempt_tiles),
                    "floor": partial(here, _floor.attempt_floor),
                },
                repeats,
                before=before,
            )
            disk = statistics.median(
                disk_seconds(search, folder, totals.written_nbytes) for _ in range(repeats)
            )
            floor = max(disk, pcie, device)
            gpu, cpu = measured["gpu"].median, measured["cpu"].median
            rows.append(
                (
                    n_threads,
                    f"{gpu:.2f} ({measured['gpu'].spread})",
                    f"{nbytes_in / gpu / 1e9:.2f}",
                    f"{cpu:.2f}",
                    f"{measured['floor'].median:.2f}",
                    f"{disk:.2f}",
                    f"{floor / gpu:.2f}",
                    f"{cpu / gpu:.2f}",
                )
            )
    print(f"\nmerges of {N_PARTIALS} partials x {side}^2, medians of {repeats}")
    print(f"PCIe: {way_in / 1e9:.1f} GB/s to the device, {way_out / 1e9:.1f} back")
    print(f"of the chunks: PCIe {pcie:.2f} s, decoding and encoding on the device {device:.2f} s\n")
    header = ("threads", "GPU: seconds", "GB/s in", "CPU", "floor of the CPU", "disk alone")
    common.table((*header, "slowest part to GPU", "CPU to GPU"), rows)


def arrays_table(side: int, repeats: int, data: Path) -> None:
    """Print what merging results on the device, before anything is written, is worth."""
    import cupy

    maps = MapSet(PoseForm.EXPLICIT)
    results = [
        dict(
            zip(
                maps.partial,
                (p.mip, *p.pose, p.correlation_sum, p.correlation_squared_sum),
                strict=True,
            )
        )
        | {"total_projections": p.count}
        for p in random_partials(open_device(), side, PoseForm.EXPLICIT)
    ]
    cupy.cuda.Device().synchronize()

    with tempfile.TemporaryDirectory(prefix="ocelot-bench-", dir=data) as name:
        store = Path(name, "run.zarr")

        def merge_there() -> dict[str, Any]:
            merged = ocelot_em.merge_arrays(results)
            cupy.cuda.Device().synchronize()
            return merged

        def write(several: list[dict[str, Any]]) -> None:
            shutil.rmtree(store, ignore_errors=True)
            for number, result in enumerate(several):
                ocelot_em.write_partial(store, f"p{number}", result, total_projections=1000)

        measured = common.in_turn(
            {
                "merge_arrays": merge_there,
                "merge_arrays, write one partial": lambda: write([merge_there()]),
                "write all partials": lambda: write(results),
            },
            repeats,
        )
    rows = [(way, f"{m.median:.3f}", m.spread) for way, m in measured.items()]
    print(f"\n{N_IN_KERNEL} results x {side}^2 on the device, medians of {repeats}\n")
    common.table(("way", "seconds", "shortest - longest"), rows)


def main() -> None:
    asked = common.arguments(__doc__).parse_args()
    print(common.machine())
    try:
        facts = find_devices()[0]
    except OcelotError as error:
        print(f"nothing was measured: {error}")
        return
    print(f"{facts.name}, {facts.memory_nbytes / 2**30:.0f} GiB")
    repeats = 1 if asked.quick else asked.repeats
    asked.data.mkdir(parents=True, exist_ok=True)
    kernel_table(512 if asked.quick else 4096, repeats)
    coded = codec_table(512 if asked.quick else 1024, repeats, n_chunks=2 if asked.quick else 50)
    merge_table(1024 if asked.quick else 8192, repeats, asked.data, coded, quick=asked.quick)
    arrays_table(512 if asked.quick else 4096, repeats, asked.data)


if __name__ == "__main__":
    main()
