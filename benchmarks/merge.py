"""How close a whole merge comes to its floor, and where its time goes.

``python -m benchmarks.merge [--quick] [--data FOLDER] [--repeats N]`` merges simulated searches of
four partials, 8192 x 8192 pixels, explicit, indexed, and indexed without decoded poses in the
result, on two threads and on two running worker
processes, and reads, decodes, encodes and writes the same chunks with no merge in it
(``benchmarks/_floor.py``), all in turn. Page cache
warm; cluster start and compiling left out, planning and closing the output counted.
"""

import contextlib
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask

from benchmarks import _floor, common
from benchmarks.common import Run
from ocelot_em.merge import merge as pipeline
from ocelot_em.merge.merge import Executor
from ocelot_em.merge.outcome import MergeReport
from ocelot_em.merge.resume import prepare
from ocelot_em.model.maps import PoseForm
from ocelot_em.model.options import MergeOptions
from ocelot_em.run.clusters import WORKER_ENVIRONMENT
from ocelot_em.run.executors import Attempt, ClientExecutor, ThreadExecutor

N_PARTIALS, N_WORKERS = 4, 2

CASES: dict[str, tuple[PoseForm, MergeOptions]] = {
    "explicit": (PoseForm.EXPLICIT, MergeOptions()),
    "indexed": (PoseForm.INDEXED, MergeOptions()),
    "indexed, poses not stored": (PoseForm.INDEXED, MergeOptions(poses="index")),
}

MakeExecutor = Callable[[Attempt], Executor]


def merge_once(
    search: Path, folder: Path, executor: Executor, options: MergeOptions
) -> MergeReport:
    """Merge into a new output, which is deleted."""
    output = folder / "output.zarr"
    try:
        ready = prepare([search], output, options)
        return common.merge_alone(ready, options, executor)
    finally:
        shutil.rmtree(output, ignore_errors=True)
        os.sync()  # the next one should not wait for this one's pages to reach the disk


@contextlib.contextmanager
def cluster_of_processes(n_workers: int = N_WORKERS) -> Iterator[Any]:
    """Worker processes of one thread, set up as ``--cluster local`` does it; their client."""
    from distributed import Client, LocalCluster

    environment = {"distributed.nanny.pre-spawn-environ": WORKER_ENVIRONMENT}
    with (
        dask.config.set(environment),
        LocalCluster(
            n_workers=n_workers, threads_per_worker=1, dashboard_address=None, memory_limit=0
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


class Runs:
    """All runs of one way: their reports, in turn with those of the others."""

    def __init__(
        self, search: Path, folder: Path, executor: Executor, options: MergeOptions
    ) -> None:
        self._search, self._folder, self._executor = search, folder, executor
        self._options = options
        self.reports: list[MergeReport] = []

    def __call__(self) -> Run:
        report = merge_once(self._search, self._folder, self._executor, self._options)
        self.reports.append(report)
        return Run(report.seconds)

    def thread_seconds(self, what: str) -> float:
        """Median of the seconds of all threads together."""
        return statistics.median(getattr(r.totals, f"{what}_seconds") for r in self.reports[1:])

    @property
    def gigabytes(self) -> float:
        """Decoded bytes of the input."""
        return self.reports[-1].totals.decoded_nbytes / 1e9


def compare(
    case: str,
    search: Path,
    makers: dict[str, MakeExecutor],
    repeats: int,
    fill: Callable[[], None],
) -> dict[str, float]:
    """Print the tables of one case; the median seconds of a merge by kind of workers."""
    with tempfile.TemporaryDirectory(prefix="ocelot-bench-", dir=search.parent) as name:
        folder, options = Path(name), CASES[case][1]
        ready = prepare([search], folder / _floor.FINISHED, options)
        common.merge_alone(ready, options, ThreadExecutor(N_WORKERS))

        def before() -> None:
            fill()
            common.warm(search)

        ways: dict[str, Runs] = {}
        for workers, make in makers.items():
            ways[f"merge, {workers}"] = Runs(search, folder, make(pipeline.attempt_tiles), options)
            ways[f"floor, {workers}"] = Runs(search, folder, make(_floor.attempt_floor), options)
        measured = common.in_turn(ways, repeats, before=before)
    pixels = ready.plan.shape[0] * ready.plan.shape[1]
    print(f"\n{case}, {N_PARTIALS} partials x {ready.plan.shape[0]}^2, medians of {repeats}\n")
    rows, profile = [], []
    for name, runs in ways.items():
        kind, _, workers = name.partition(", ")
        floor = measured[f"floor, {workers}"].median
        seconds = measured[name].median
        rows.append(
            [
                name,
                f"{seconds:.2f} ({measured[name].spread})",
                f"{runs.gigabytes / seconds:.2f}",
                f"{pixels / seconds / 1e6:.1f}",
                f"{floor / seconds:.2f}" if kind == "merge" else "1",
                f"{runs.reports[-1].totals.written_nbytes / 1e9:.2f}",
            ]
        )
        profile.append([name, *profile_of(runs, len(ready.plan.grid))])
    header = ["way", "seconds (lowest - highest)", "GB/s in", "Mpx/s", "floor / time", "GB written"]
    common.table(header, rows)
    print("\nmilliseconds of a worker's thread for each tile, medians\n")
    common.table(
        ["way", "read", "decode, fold", "encode, write", "waiting of it", "other"], profile
    )
    return {workers: measured[f"merge, {workers}"].median for workers in makers}


def profile_of(runs: Runs, n_tiles: int) -> list[str]:
    """Where the thread time of a tile goes; other is Dask, the start, the end, and idling."""
    parts = [runs.thread_seconds(what) for what in ("read", "fold", "write", "waited")]
    total = N_WORKERS * statistics.median(report.seconds for report in runs.reports[1:])
    parts.append(total - sum(parts[:3]))
    return [f"{seconds / n_tiles * 1e3:.1f}" for seconds in parts]


def main() -> None:
    asked = common.arguments(__doc__).parse_args()
    side, repeats = (256, 1) if asked.quick else (8192, asked.repeats)
    print(common.machine())
    asked.data.mkdir(parents=True, exist_ok=True)
    with (
        common.full_memory(asked.data, quick=asked.quick) as fill,
        cluster_of_processes() as client,
    ):
        makers: dict[str, MakeExecutor] = {
            "2 threads": lambda attempt: ThreadExecutor(N_WORKERS, attempt),
            "2 processes": lambda attempt: ClientExecutor(client, attempt),
        }
        seconds = {
            case: compare(
                case,
                common.search_of(side, N_PARTIALS, form, folder=asked.data),
                makers,
                repeats,
                fill,
            )
            for case, (form, _) in CASES.items()
        }
    for case in list(CASES)[1:]:
        ratios = (
            f"{seconds['explicit'][workers] / seconds[case][workers]:.2f} ({workers})"
            for workers in makers
        )
        print(f"\npixels per second, {case}, to explicit: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
