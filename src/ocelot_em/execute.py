"""Runs the tiles of a merge with Dask: its threaded scheduler here, or a cluster.

Work in flight is bounded, so that a canvas of a million tiles costs the driver no more memory
than one of a hundred.
"""

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import dask
import dask.threaded
from dask.callbacks import Callback

from ocelot_em.pipeline import Outcome, Tiles, Work, attempt_tiles

log = logging.getLogger(__name__)

TASK_NAME = "merge_tiles"

MOST_TILES_PER_TASK = 16
"""A task costs Dask about as much as a small tile costs us; tiles of one task overlap."""

RUNS_PER_THREAD = 2
"""Into so many tasks for each thread the tiles that are left are cut: the last ones are short, so
that all threads end together."""

TASKS_PER_GRAPH = 256
"""Tasks in one graph of the threaded scheduler; its cost for each grows with their number."""

TASKS_IN_FLIGHT = 2
"""Tasks per thread that a cluster has at a time: one running, the next at hand."""

THREADS_KNOWN_SECONDS = 1.0
"""How long the number of a cluster's threads is believed."""

RETRIES = 3
"""How often a task is tried again after its worker died or lost its connection."""

Run = tuple[tuple[int, int], ...]
"""Rows and columns of the tiles of one task."""

Attempt = Callable[[Work, Run], list[Outcome]]
"""What a task does: :func:`ocelot_em.pipeline.attempt_tiles`, or nothing, to measure the rest."""


class ThreadExecutor:
    """Dask's threaded scheduler in this process; needs no server."""

    def __init__(self, n_threads: int, attempt: Attempt = attempt_tiles) -> None:
        self.n_threads, self._attempt = n_threads, attempt

    def run(self, work: Work, tiles: Tiles, on_outcome: Callable[[Outcome], bool]) -> None:
        """See :class:`ocelot_em.pipeline.Executor`."""
        go_on = True

        def posttask(_key: object, value: object, *_: object) -> None:
            nonlocal go_on
            if isinstance(value, list):
                for outcome in value:
                    go_on = on_outcome(outcome) and go_on

        runs = cut_into_runs(tiles, lambda: self.n_threads)
        while batch := tuple(itertools.islice(runs, TASKS_PER_GRAPH)):
            # The scheduler starts with the last of the keys, as text: let that be the first run.
            graph = {
                f"{TASK_NAME}-{TASKS_PER_GRAPH - number:06d}": (
                    self._attempt,
                    work,
                    [*run],
                )
                for number, run in enumerate(batch)
            }
            with Callback(posttask=posttask):
                dask.threaded.get(graph, list(graph), num_workers=self.n_threads)
            if not go_on:
                return


class ClientExecutor:
    """A Dask cluster, through its client: a sliding window of tasks, released as they end."""

    def __init__(self, client: Any, attempt: Attempt = attempt_tiles) -> None:
        self.client, self._attempt = client, attempt
        self._n_threads_then, self._asked = 0, 0.0

    def run(self, work: Work, tiles: Tiles, on_outcome: Callable[[Outcome], bool]) -> None:
        """See :class:`ocelot_em.pipeline.Executor`."""
        from distributed import as_completed

        runs = cut_into_runs(tiles, self._n_threads)
        one_by_one: deque[Run] = deque()
        running = as_completed(with_results=False)
        in_flight: dict[str, Run] = {}

        def submit() -> None:
            # Workers may have come or gone meanwhile.
            while len(in_flight) < TASKS_IN_FLIGHT * max(self._n_threads(), 1):
                run = one_by_one.popleft() if one_by_one else next(runs, None)
                if run is None:
                    return
                future = self.client.submit(
                    self._attempt,
                    work,
                    run,
                    key=(f"{TASK_NAME}-{work.run_id[:12]}", *run[0], len(run)),
                    retries=RETRIES,
                    pure=False,
                )
                in_flight[str(future.key)] = run
                running.add(future)

        submit()
        for future in running:
            if future.status not in ("finished", "error", "cancelled"):
                # Its worker died with the result before it got here; it is computed again.
                running.add(future)
                continue
            run = in_flight.pop(str(future.key))
            outcomes = []
            if future.status == "finished":
                outcomes = future.result()
            elif len(run) > 1:
                # One of them may be to blame: the others should not share its fate.
                one_by_one.extend((tile,) for tile in run)
            else:
                outcomes = [Outcome(*run[0], None, f"its task was lost: {_reason(future)}")]
            del future  # the scheduler forgets what nobody holds
            go_on = True
            for outcome in outcomes:
                go_on = on_outcome(outcome) and go_on
            if not go_on:
                running.clear()
                return
            submit()

    def _n_threads(self) -> int:
        """Threads of all workers, as of a moment ago: asking takes as long as an empty task."""
        now = time.monotonic()
        if self._n_threads_then == 0 or now - self._asked > THREADS_KNOWN_SECONDS:
            self._n_threads_then, self._asked = sum(self.client.nthreads().values()), now
        return self._n_threads_then


def cut_into_runs(tiles: Sequence[tuple[int, int]], n_threads: Callable[[], int]) -> Iterator[Run]:
    """Cut into runs of neighbours for the tasks: long ones first, single tiles at the end."""
    start = 0
    while start < len(tiles):
        share = (len(tiles) - start) // (RUNS_PER_THREAD * max(n_threads(), 1))
        stop = start + min(max(share, 1), MOST_TILES_PER_TASK)
        yield tuple(tiles[start:stop])
        start = stop


def _reason(future: Any) -> str:
    if future.status == "cancelled":
        return "it was cancelled"
    error = future.exception()
    return f"{type(error).__name__}: {error}"
