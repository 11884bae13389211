"""Memory of a worker, predicted and measured: the same for any number of partials and any size.

``python -m benchmarks.memory [--quick] [--data FOLDER]`` merges the first tiles of searches of 4
and of 64 partials, small and large, each in a process of its own. Measured is the most resident
memory of the process that merges (VmHWM): the whole program with threads, the worker with a
cluster. Linux only.
"""

import argparse
import json
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import common
from ocelot_em.errors import TilesFailedError
from ocelot_em.merge.job import JobSpec
from ocelot_em.merge.merge import Executor
from ocelot_em.merge.outcome import Outcome, Tiles
from ocelot_em.merge.resume import prepare
from ocelot_em.model.maps import PoseForm
from ocelot_em.model.options import MergeOptions
from ocelot_em.run.clusters import open_cluster
from ocelot_em.run.executors import ClientExecutor

N_PARTIALS, QUICK_N_PARTIALS = (4, 64), (4,)
SIDES, QUICK_SIDES = (8192, 32768), (1024,)
N_SIMULATED, SIMULATED_SIDE = 4, 1024
N_TILES, QUICK_N_TILES = 24, 1
N_ROWS = 3
"""Rows of chunks that hold as many tiles in the smaller search."""

CLUSTERS: dict[str, dict[str, object]] = {
    "threads x 2": {"threads": 2},
    "local, 1 worker x 1": {"cluster": "local", "workers": 1, "threads": 1},
}


@dataclass(frozen=True)
class Memory:
    """Of one worker, in bytes."""

    predicted: int
    peak: int


class FirstTiles:
    """An executor that stops after some tiles.

    Parameters
    ----------
    executor
        Runs them.
    n_tiles
        How many.
    """

    def __init__(self, executor: Executor, n_tiles: int) -> None:
        self._executor, self._n_tiles = executor, n_tiles

    def run(
        self,
        work: JobSpec,
        tiles: Tiles,
        on_outcome: Callable[[Outcome], None],
        stopping: threading.Event,
    ) -> None:
        """See :class:`ocelot_em.merge.merge.Executor`."""
        self._executor.run(work, tiles[: self._n_tiles], on_outcome, stopping)


def measure(search: Path, n_tiles: int, **options: object) -> Memory:
    """Merge the first tiles of a search in a fresh process.

    Parameters
    ----------
    search
        A store.
    n_tiles
        How many tiles.
    **options
        Of :class:`ocelot_em.model.options.MergeOptions`.
    """
    found = common.in_own_process(
        "benchmarks.memory", str(search), str(n_tiles), json.dumps(options)
    )
    return Memory(**found)


def run_one(search: str, n_tiles: int, chosen: Mapping[str, Any]) -> Memory:
    """Merge the first tiles here."""
    options = MergeOptions.parse(chosen)
    outcomes: list[Outcome] = []
    with (
        tempfile.TemporaryDirectory(dir=Path(search).parent) as folder,
        open_cluster(options) as cluster,
    ):
        ready = prepare([search], Path(folder, "OUT.zarr"), options)
        executor = FirstTiles(cluster.executor, n_tiles)
        try:
            common.merge_alone(ready, options, executor, outcomes.append)
        except TilesFailedError:
            if len(outcomes) != n_tiles or any(outcome.error for outcome in outcomes):
                raise
        peak = common.peak_nbytes()
        if isinstance(cluster.executor, ClientExecutor):
            peak = max(cluster.executor.client.run(common.peak_nbytes).values())
    return Memory(ready.forecast.worker_nbytes, peak)


def searches(
    form: PoseForm, sizes: Iterable[tuple[int, int]], data: Path
) -> Iterator[tuple[int, int, Path]]:
    """Numbers of partials, sizes, and searches that have both; each is there until the next."""
    small = common.search_of(SIMULATED_SIDE, N_SIMULATED, form, folder=data)
    for n_partials, side in sizes:
        with tempfile.TemporaryDirectory(dir=data) as folder:
            place = Path(folder, "LARGE.zarr")
            common.repeated(small, place, side, n_partials=n_partials, n_rows=N_ROWS)
            yield n_partials, side, place


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        search, n_tiles, chosen = options.one
        print(json.dumps(vars(run_one(search, int(n_tiles), json.loads(chosen)))))
        return
    sides = QUICK_SIDES if options.quick else SIDES
    sizes = [*product(QUICK_N_PARTIALS if options.quick else N_PARTIALS, sides)]
    n_tiles = QUICK_N_TILES if options.quick else N_TILES
    options.data.mkdir(parents=True, exist_ok=True)
    rows = []
    for form in PoseForm:
        for n_partials, side, search in searches(form, sizes, options.data):
            if not options.quick and (not rows or rows[-1][2] != form):
                measure(search, 1, threads=1)  # compiles, which takes memory
            for name, where in CLUSTERS.items():
                found = measure(search, n_tiles, **where)
                megabytes = f"{found.predicted / 1e6:.0f}", f"{found.peak / 1e6:.0f}"
                rows.append((n_partials, f"{side}^2", form.value, name, *megabytes))
    print(f"{common.machine()}\nfirst {n_tiles} tiles\n")
    header = ("partials", "size", "poses", "cluster", "predicted MB", "measured peak MB")
    common.table(header, sorted(rows, key=lambda row: row[2:4]))


if __name__ == "__main__":
    main()
