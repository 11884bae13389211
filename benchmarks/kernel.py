"""How fast the CPU kernel is, against a copy of the same bytes and against stacking.

``python -m benchmarks.kernel [--quick]``. Bytes are those of the inputs and the outputs; a copy
counts what it reads and what it writes. All ways run in turn, so that a noisy machine hits them
alike; compare the ratios, not the figures. The memory is what a way allocates beyond the inputs
and the merged maps, which are there before.
"""

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ocelot_em.kernels import cpu, cpu_statistics
from ocelot_em.model.maps import BEST_PARTIAL, MIP, SUM, Accumulator, MapSet, PartialMaps, PoseForm
from ocelot_em.model.search_space import SearchSpace

N_PARTIALS, REPEATS, BAND_PIXELS = 8, 5, 64 * 1024


def make_partials(side: int, maps: MapSet, space: SearchSpace | None) -> list[PartialMaps]:
    rng = np.random.default_rng(0)

    def noise() -> np.ndarray:
        return rng.standard_normal((side, side), dtype=np.float32)

    def pose() -> tuple[np.ndarray, ...]:
        if space is None:
            return tuple(noise() for _ in maps.pose)
        return (rng.integers(0, space.n_poses, (side, side), dtype=np.int32),)

    return [
        PartialMaps(noise(), pose(), noise(), noise() + 5, 20_500_000, number)
        for number in range(N_PARTIALS)
    ]


def arrays_of(partial: PartialMaps) -> tuple[np.ndarray, ...]:
    return (
        *(partial.mip, *partial.pose),
        *(partial.correlation_sum, partial.correlation_squared_sum),
    )


def cut(partial: PartialMaps, rows: slice) -> PartialMaps:
    pose = tuple(array[rows] for array in partial.pose)
    sums = partial.correlation_sum[rows], partial.correlation_squared_sum[rows]
    return PartialMaps(partial.mip[rows], pose, *sums, partial.count, partial.best_partial)


def merge_rows(
    rows: slice,
    partials: list[PartialMaps],
    maps: MapSet,
    space: SearchSpace | None,
    out: dict[str, np.ndarray],
) -> None:
    """Fold and finalise these rows band by band, picks and results straight into ``out``."""
    width = partials[0].mip.shape[1]
    step = max(BAND_PIXELS // width, 1)
    sums = np.empty((2, step, width))
    for start in range(rows.start, rows.stop, step):
        band = slice(start, min(start + step, rows.stop))
        here = {name: array[band] for name, array in out.items()}
        total, squared_total = sums[:, : band.stop - band.start]
        picks = tuple(here[name] for name in maps.pose)
        acc = Accumulator(here[MIP], picks, here[BEST_PARTIAL], total, squared_total, None)
        cpu.fold_all(acc, [cut(partial, band) for partial in partials], space, fresh=True)
        cpu_statistics.finalise(acc, maps, space, here)


def stack(partials: list[PartialMaps]) -> list[np.ndarray]:
    """Merge as Leopard-EM does: everything in one array, then pick."""
    mips = np.stack([p.mip for p in partials])
    winner = mips.argmax(axis=0)[None]
    out = [mips.max(axis=0)]
    for maps in zip(*(p.pose for p in partials), strict=True):
        out.append(np.take_along_axis(np.stack(maps), winner, axis=0)[0])
    total = np.stack([p.correlation_sum for p in partials]).sum(axis=0)
    squared_total = np.stack([p.correlation_squared_sum for p in partials]).sum(axis=0)
    count = sum(p.count for p in partials)
    mean = total / count
    std = np.sqrt(np.maximum(squared_total / count - mean**2, 0))
    return [*out, mean, std, (out[0] - mean) / np.where(std == 0, 1, std), total, squared_total]


def measure(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(REPEATS + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if repeat:  # the first compiles and maps memory
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def extra_nbytes(way: Callable[[], object]) -> int:
    tracemalloc.start()
    way()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def run(form: PoseForm, side: int) -> None:
    space = None
    if form is PoseForm.INDEXED:
        angles = np.random.default_rng(1).uniform(0, 360, (100_000, 3))
        space = SearchSpace.from_tables(angles, np.linspace(-1000, 1000, 13), [0.0])
    maps = MapSet(form)
    partials = make_partials(side, maps, space)
    inputs = [array for partial in partials for array in arrays_of(partial)]
    copies = [np.zeros_like(array) for array in inputs]
    out = {
        name: np.zeros((side, side), np.int32 if name.endswith(("partial", "index")) else "f4")
        for name in maps.merged
    }
    pool = ThreadPoolExecutor(2)
    halves = slice(0, side // 2), slice(side // 2, side)

    def copy_rows(rows: slice) -> None:
        for target, source in zip(copies, inputs, strict=True):
            np.copyto(target[rows], source[rows])

    def merge(rows: slice) -> None:
        merge_rows(rows, partials, maps, space, out)

    ways: dict[str, Callable[[], object]] = {
        "copy (np.copyto), one thread": lambda: copy_rows(slice(0, side)),
        "copy (np.copyto), two threads": lambda: list(pool.map(copy_rows, halves)),
        "cpu kernel, one thread": lambda: merge(slice(0, side)),
        "cpu kernel, two threads": lambda: list(pool.map(merge, halves)),
        "stack, argmax, take_along_axis": lambda: stack(partials),
    }
    merge(slice(0, side))
    assert np.allclose(out[SUM], sum(p.correlation_sum for p in partials), atol=1e-4)
    seconds = measure(ways)
    extra = {name: extra_nbytes(way) for name, way in ways.items()}
    pool.shutdown()
    n_in = sum(array.nbytes for array in inputs)
    n_merged = n_in + sum(array.nbytes for array in out.values())
    rates = {
        name: (2 * n_in if name.startswith("copy") else n_merged) / value / 1e9
        for name, value in seconds.items()
    }
    copies_of = [rates[name] for name in ways if name.startswith("copy")]
    print(f"\n{form}, {N_PARTIALS} partials x {side}^2, {n_in / 1e9:.2f} GB in")
    print(
        f"{'way':32} {'ms':>8} {'GB/s':>7} {'of copy':>8} {'of two':>8} {'of stack':>9}"
        f" {'extra MB':>9}"
    )
    for name, rate in rates.items():
        of_stack = rate / rates["stack, argmax, take_along_axis"]
        of_one, of_two = (rate / copied for copied in copies_of)
        print(
            f"{name:32} {seconds[name] * 1e3:8.1f} {rate:7.2f} {of_one:8.2f} {of_two:8.2f}"
            f" {of_stack:9.2f} {extra[name] / 1e6:9.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="256^2 instead of 2048^2")
    side = 256 if parser.parse_args().quick else 2048
    for form in (PoseForm.EXPLICIT, PoseForm.INDEXED):
        run(form, side)


if __name__ == "__main__":
    main()
