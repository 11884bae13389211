"""How long the tiles of a merge hold Python's lock, and what threads and processes gain.

``python -m benchmarks.lock [--quick] [--data FOLDER] [--repeats N]`` merges simulated searches of
four partials, 4096 x 4096 pixels, explicit and indexed, in turn on 1, 2, 4, ... threads up to twice
the number of cores, and on worker processes of one thread. Only the time is counted in which tiles
are worked on, not planning and closing the output.

The share of this time in which the lock is held is that of gilknocker (``pip install gilknocker``),
which requests the lock every 100 microseconds and measures how long it waits. It may also wait for
a core, or for a thread that holds the lock and waits for one. As a null measurement, as many
threads compute for as long, without the lock.
"""

import importlib.util
import os
import statistics
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import Run
from benchmarks.merge import cluster_of_processes, merge_once
from ocelot_em.kernels.compiling import compiled
from ocelot_em.merge.job import JobSpec
from ocelot_em.merge.merge import Executor
from ocelot_em.merge.outcome import OnOutcome, Tiles
from ocelot_em.model.maps import PoseForm
from ocelot_em.model.options import MergeOptions
from ocelot_em.run.executors import ClientExecutor, ThreadExecutor

N_PARTIALS = 4
INTERVAL_MICROSECONDS, SAMPLING_SECONDS = 100, 0.1
SPINS = 10**6


@compiled
def spin(word: Any, n: int) -> Any:
    """Compute without Python's lock, and without memory."""
    for _ in range(n):
        word ^= word << np.uint64(13)
        word ^= word >> np.uint64(7)
        word ^= word << np.uint64(17)
    return word


@dataclass
class Tiled:
    """An executor that measures the time of the tiles, and the lock meanwhile.

    Parameters
    ----------
    inner
        Runs the tiles.
    n_threads
        Threads of the null measurement; 0 for none.
    knocker
        A running gilknocker, or None.
    """

    inner: Executor
    n_threads: int
    knocker: Any
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    null: list[float] = field(default_factory=list)

    def run(
        self, spec: JobSpec, tiles: Tiles, on_outcome: OnOutcome, stopping: threading.Event
    ) -> None:
        """See :class:`ocelot_em.merge.merge.Executor`."""
        self._reset()
        before, started = time.process_time(), time.perf_counter()
        self.inner.run(spec, tiles, on_outcome, stopping)
        self.seconds.append(time.perf_counter() - started)
        self.processor_seconds.append(time.process_time() - before)
        if self.knocker is None or not self.n_threads:
            return
        self.held.append(self.knocker.contention_metric)
        self._reset()
        until = time.perf_counter() + self.seconds[-1]
        with ThreadPoolExecutor(self.n_threads) as pool:
            deque(pool.map(self._compute, [until] * self.n_threads), maxlen=0)
        self.null.append(self.knocker.contention_metric)

    def _reset(self) -> None:
        if self.knocker is not None:
            self.knocker.reset_contention_metric()

    @staticmethod
    def _compute(until: float) -> None:
        word = np.uint64(1)
        while time.perf_counter() < until:
            word = np.uint64(spin(word, SPINS))


def started_knocker() -> Any:
    """Return a running gilknocker, or None if it is not installed."""
    if importlib.util.find_spec("gilknocker") is None:
        return None
    import gilknocker  # type: ignore[import-not-found, unused-ignore]

    sampling = int(1e6 * SAMPLING_SECONDS)
    knocker = gilknocker.KnockKnock(
        polling_interval_micros=INTERVAL_MICROSECONDS,
        sampling_interval_micros=sampling,
        sleeping_interval_micros=1000,
    )
    knocker.start()
    return knocker


def shares(values: list[float]) -> str:
    """Median of shares of time, lowest and highest, without the warm-up's."""
    if not (kept := sorted(values[1:])):
        return "-"
    return f"{statistics.median(kept):.1%} ({kept[0]:.1%} - {kept[-1]:.1%})"


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    side, repeats = (256, 1) if options.quick else (4096, options.repeats)
    n_cores = len(os.sched_getaffinity(0))
    several = [2**k for k in range(n_cores.bit_length() + 1) if 2**k <= max(2 * n_cores, 2)]
    print(common.machine())
    options.data.mkdir(parents=True, exist_ok=True)
    spin(np.uint64(1), 1)
    knocker = started_knocker()
    with cluster_of_processes(n_cores) as client:
        for form in PoseForm:
            search = common.search_of(side, N_PARTIALS, form, folder=options.data)
            ways = {f"{n} threads": Tiled(ThreadExecutor(n), n, knocker) for n in several}
            ways[f"{n_cores} processes"] = Tiled(ClientExecutor(client), 0, None)
            with tempfile.TemporaryDirectory(prefix="ocelot-bench-", dir=search.parent) as name:
                folder = Path(name)

                def run(way: Tiled, search: Path = search, folder: Path = folder) -> Run:
                    merge_once(search, folder, way, MergeOptions())
                    return Run(way.seconds[-1])

                calls = {name: partial(run, way) for name, way in ways.items()}
                measured = common.in_turn(calls, repeats, before=partial(common.warm, search))
            first = measured["1 threads"].median
            rows = []
            for name, way in ways.items():
                cpu = statistics.median(way.processor_seconds[1:]) if way.n_threads else None
                own = measured[name]
                rows.append(
                    (
                        name,
                        shares(way.held),
                        shares(way.null),
                        f"{own.median:.2f} ({own.spread})",
                        "-" if cpu is None else f"{cpu:.2f}",
                        f"{first / own.median:.2f}",
                    )
                )
            print(f"\n{form.value}, {N_PARTIALS} partials x {side}^2, medians of {repeats}\n")
            header = ("tiles on", "lock held", "null", "seconds", "processor seconds", "gain")
            common.table(header, rows)
    if knocker is None:
        print("\nlock held: not measured, as gilknocker is not installed (pip install gilknocker)")
    else:
        knocker.stop()
        time.sleep(10 * SAMPLING_SECONDS)  # its thread may not ask for the lock of an ended process


if __name__ == "__main__":
    main()
