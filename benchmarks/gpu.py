"""How fast a GPU merges: its kernels against copying on it, whole merges against what limits them.

``python -m benchmarks.gpu [--quick] [--data FOLDER] [--repeats N]``. Without a GPU it says why and
ends.

Kernels: 8 partials on the device, bytes that must move (every input read once, every result written
once) against a copy from device to device, which is counted in the same way. Whole merges: 4
explicit partials, 1 to 8 threads, against the same threads without a GPU, against the same chunks
decoded and encoded with nothing in between, and against the copies over PCIe alone. Page cache
warm. Decoding: one chunk, copied encoded over PCIe.

Results that are on the device already: merging 8 of them there and writing one partial, against
writing all 8.
"""

import shutil
import statistics
import tempfile
from collections.abc import Callable
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
from ocelot_em.kernels.cuda_codec import ChunkCodec, pack, packed_nbytes
from ocelot_em.kernels.device import Device, find_devices, open_device
from ocelot_em.kernels.streams import find_streams
from ocelot_em.merge import merge as pipeline
from ocelot_em.model.maps import MapSet, PartialMaps, PoseForm
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.run.executors import ThreadExecutor
from ocelot_em.store.blosc import BloscChunk, encode
from ocelot_em.store.constants import shuffle_of

N_IN_KERNEL, N_PARTIALS = 8, 4
THREADS = (1, 2, 4, 8)


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


def decode_table(side: int, repeats: int) -> None:
    """Print how fast the chunk of a map is copied to the device and decoded there."""
    device = open_device()
    rng = np.random.default_rng(0)
    angles = rng.choice(np.arange(0, 360, 1.5, dtype="f4"), (side, side))
    maps = {"mip": rng.standard_normal((side, side), dtype="f4") + 5, "best_psi": angles}
    rows = []
    for name, values in maps.items():
        bits = shuffle_of(name) == "bitshuffle"
        codec = Blosc("lz4", 5, Blosc.BITSHUFFLE if bits else Blosc.SHUFFLE)
        chunk = BloscChunk(memoryview(bytearray(b"".join(encode(values, codec)))), values.nbytes)
        streams = chunk.streams(find_streams)
        if streams is None:
            raise OcelotError(f"{name}: expected a chunk that the device decodes")
        packed = device.pinned(packed_nbytes(len(chunk.frame), streams))
        pack(chunk.frame, streams, packed)
        out, finding = device.empty(values.size, "f4"), device.empty(1, "i8")
        finding.fill(0)
        decoder = ChunkCodec(device, max(values.nbytes, packed.size))
        seconds = device_seconds(partial(decoder.decode, packed, streams, out, finding), repeats)
        rate = values.nbytes / seconds / 1e9
        rows.append((name, len(streams.table), f"{seconds * 1e3:.2f}", f"{rate:.1f}"))
    print(f"\none chunk of {side}^2, copied encoded and decoded, medians of {repeats}\n")
    common.table(("map", "streams", "ms", "GB/s decoded"), rows)


def merge_table(side: int, repeats: int, data: Path, *, quick: bool) -> None:
    """Print how fast whole merges are, and what limits them."""
    search = common.search_of(side, N_PARTIALS, PoseForm.EXPLICIT, folder=data)
    way_in, way_out = pcie_rates(repeats)
    rows = []
    with (
        common.full_memory(data, quick=quick) as fill,
        tempfile.TemporaryDirectory(prefix="ocelot-bench-", dir=data) as name,
    ):
        folder = Path(name)
        ocelot_em.merge(search, folder / _floor.FINISHED)

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
            nbytes_in = common.decoded_nbytes(side, N_PARTIALS, PoseForm.EXPLICIT)
            nbytes_out = side * side * 4 * len(MapSet(PoseForm.EXPLICIT).merged)
            pcie = nbytes_in / way_in + nbytes_out / way_out
            floor = max(measured["floor"].median, pcie)
            gpu, cpu = measured["gpu"].median, measured["cpu"].median
            rows.append(
                (
                    n_threads,
                    f"{gpu:.2f} ({measured['gpu'].spread})",
                    f"{nbytes_in / gpu / 1e9:.2f}",
                    f"{cpu:.2f}",
                    f"{measured['floor'].median:.2f}",
                    f"{pcie:.2f}",
                    f"{floor / gpu:.2f}",
                    f"{cpu / gpu:.2f}",
                )
            )
    print(f"\nmerges of {N_PARTIALS} partials x {side}^2, medians of {repeats}")
    print(f"PCIe: {way_in / 1e9:.1f} GB/s to the device, {way_out / 1e9:.1f} back\n")
    header = ("threads", "GPU: seconds", "GB/s in", "CPU", "copy of the chunks", "PCIe alone")
    common.table((*header, "floor to GPU", "CPU to GPU"), rows)


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
    for side in (512,) if asked.quick else (1024, 4096):
        decode_table(side, repeats)
    merge_table(1024 if asked.quick else 8192, repeats, asked.data, quick=asked.quick)
    arrays_table(512 if asked.quick else 4096, repeats, asked.data)


if __name__ == "__main__":
    main()
