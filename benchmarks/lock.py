"""How long a merge holds Python's lock, and what threads gain.

``python -m benchmarks.lock [--quick] [--data FOLDER] [--repeats N]`` merges simulated searches of
four partials, 4096 x 4096 pixels, explicit and indexed, on 1, 2, 4, ... threads up to the number of
cores (2 at least). The share of the time in which the lock is held is that of gilknocker
(``pip install gilknocker``), which asks for the lock every 100 microseconds. Page cache warm,
compiling left out; planning and closing the output are counted in both.
"""

import importlib.util
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Run
from benchmarks.merge import merge_once
from ocelot_em.model.maps import PoseForm
from ocelot_em.model.options import MergeOptions
from ocelot_em.run.executors import ThreadExecutor

N_PARTIALS = 4
INTERVAL_MICROSECONDS, SAMPLING_SECONDS = 100, 0.1


class Merge:
    """Merges of one search on some threads: their shares of the lock, and processor seconds."""

    def __init__(self, search: Path, folder: Path, n_threads: int, knocker: Any) -> None:
        self._search, self._folder, self._n_threads = search, folder, n_threads
        self._knocker = knocker
        self.shares: list[float] = []
        self.processor_seconds: list[float] = []

    def __call__(self) -> Run:
        executor, options = ThreadExecutor(self._n_threads), MergeOptions()
        if self._knocker is not None:
            self._knocker.reset_contention_metric()
        before = time.process_time()
        report = merge_once(self._search, self._folder, executor, options)
        self.processor_seconds.append(time.process_time() - before)
        if self._knocker is not None:
            self.shares.append(self._knocker.contention_metric)
        return Run(report.seconds)


def started_knocker() -> Any:
    """Return a running gilknocker, or None if it is not installed."""
    if importlib.util.find_spec("gilknocker") is None:
        return None
    import gilknocker  # type: ignore[import-not-found, unused-ignore]

    sampling = int(1e6 * SAMPLING_SECONDS)
    knocker = gilknocker.KnockKnock(
        polling_interval_micros=INTERVAL_MICROSECONDS,
        sampling_interval_micros=sampling,
        sleeping_interval_micros=sampling,
    )
    knocker.start()
    return knocker


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    side, repeats = (256, 1) if options.quick else (4096, options.repeats)
    n_cores = len(os.sched_getaffinity(0))
    threads = [2**k for k in range(max(n_cores, 2).bit_length()) if 2**k <= max(n_cores, 2)]
    print(common.machine())
    options.data.mkdir(parents=True, exist_ok=True)
    knocker = started_knocker()
    for form in PoseForm:
        search = common.search_of(side, N_PARTIALS, form, folder=options.data)
        with tempfile.TemporaryDirectory(prefix="ocelot-bench-", dir=search.parent) as name:
            ways = {str(n): Merge(search, Path(name), n, knocker) for n in threads}
            measured = common.in_turn(ways, repeats, before=partial(common.warm, search))
        rows = []
        for n, way in ways.items():
            shares = sorted(way.shares[1:])
            cpu = sorted(way.processor_seconds[1:])
            held = "not measured"
            if shares:
                middle = shares[len(shares) // 2]
                held = f"{middle:.1%} ({shares[0]:.1%} - {shares[-1]:.1%})"
            gain = measured[str(threads[0])].median / measured[n].median
            seconds = f"{measured[n].median:.2f} ({measured[n].spread})"
            rows.append((n, held, seconds, f"{cpu[len(cpu) // 2]:.2f}", f"{gain:.2f}"))
        print(f"\n{form.value}, {N_PARTIALS} partials x {side}^2, medians of {repeats}\n")
        header = ("threads", "lock held", "seconds (lowest - highest)", "processor seconds", "gain")
        common.table(header, rows)
    if knocker is None:
        print("\nlock held: not measured, as gilknocker is not installed (pip install gilknocker)")
    else:
        knocker.stop()
        time.sleep(10 * SAMPLING_SECONDS)  # its thread may not ask for the lock of an ended process


if __name__ == "__main__":
    main()
