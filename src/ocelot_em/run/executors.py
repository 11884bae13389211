"""Run the tiles of a merge with Dask: its threaded scheduler, or a cluster.

Work in flight is bounded: a canvas of a million tiles takes the driver no more memory than one of
a hundred.
"""

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import dask
import dask.threaded
from dask.callbacks import Callback

from ocelot_em.errors import ClusterLostError
from ocelot_em.merge.job import Work
from ocelot_em.merge.merge import attempt_tiles
from ocelot_em.merge.outcome import Outcome, Tiles
from ocelot_em.run.metrics import Metrics

log = logging.getLogger(__name__)

TASK_NAME = "merge_tiles"

MAX_TILES_PER_TASK = 16
"""Maximum number of tiles per task. A task costs Dask about as much as a small tile costs us; tiles
of one task overlap in time."""

RUNS_PER_THREAD = 2
"""Number of tasks per thread into which the remaining tiles are split: the last tasks are short, so
that all threads end together."""

TASKS_PER_GRAPH = 256
"""Tasks in one graph of the threaded scheduler; its cost per task grows with their number."""

TASKS_IN_FLIGHT = 2
"""Submitted tasks per thread of a cluster: one running, one queued."""

LOOK_SECONDS = 1.0
"""Interval between checks of the cluster's state and number of threads."""

RESULT_SECONDS = 60.0
"""Timeout for fetching the result of a finished task."""

STOP_SECONDS = 60.0
"""Timeout for the running tiles when a run is stopped; longer than any tile takes."""

WORKER_TIMEOUT_SECONDS = 300.0
"""Default timeout while there are no workers."""

Run = tuple[tuple[int, int], ...]
"""Grid positions (iy, ix) of the tiles of one task."""

Attempt = Callable[[Work, Run], list[Outcome]]
"""Function that a task calls: :func:`ocelot_em.merge.merge.attempt_tiles`, or an empty one to
measure the overhead."""


class ThreadExecutor:
    """Run tiles on Dask's threaded scheduler in this process, without a server."""

    def __init__(self, n_threads: int, attempt: Attempt = attempt_tiles) -> None:
        self.n_threads, self._attempt = n_threads, attempt

    def run(
        self,
        work: Work,
        tiles: Tiles,
        on_outcome: Callable[[Outcome], None],
        stopping: threading.Event,
    ) -> None:
        """See :class:`ocelot_em.merge.merge.Executor`."""

        def posttask(_key: object, value: object, *_: object) -> None:
            if isinstance(value, list):
                for outcome in value:
                    on_outcome(outcome)

        def attempt(work: Work, run: Run) -> list[Outcome]:
            return [] if stopping.is_set() else self._attempt(work, run)

        runs = cut_into_runs(tiles, lambda: self.n_threads)
        while batch := tuple(itertools.islice(runs, TASKS_PER_GRAPH)):
            # The scheduler starts with the last key in text order, so the first run gets that key.
            graph = {
                f"{TASK_NAME}-{TASKS_PER_GRAPH - number:06d}": (attempt, work, [*run])
                for number, run in enumerate(batch)
            }
            with Callback(posttask=posttask):
                dask.threaded.get(graph, list(graph), num_workers=self.n_threads)
            if stopping.is_set():
                return


class ClientExecutor:
    """Run tiles on a Dask cluster, in a sliding window of tasks that are released as they end.

    Parameters
    ----------
    client
        Client connected to the cluster.
    attempt
        Function that a task calls.
    worker_timeout_seconds
        Timeout while there are no workers.
    """

    def __init__(
        self,
        client: Any,
        attempt: Attempt = attempt_tiles,
        worker_timeout_seconds: float = WORKER_TIMEOUT_SECONDS,
    ) -> None:
        self.client, self.attempt = client, attempt
        self._worker_timeout = worker_timeout_seconds
        self._n_threads_then, self._asked = 0, float("-inf")
        self._had_workers = time.monotonic()

    def run(
        self,
        work: Work,
        tiles: Tiles,
        on_outcome: Callable[[Outcome], None],
        stopping: threading.Event,
    ) -> None:
        """See :class:`ocelot_em.merge.merge.Executor`."""
        metrics = Metrics(work.run_id[:12], self.client.run_on_scheduler)

        def tell(outcome: Outcome) -> None:
            metrics.count(outcome)
            on_outcome(outcome)

        self._had_workers = time.monotonic()
        window = _Window(self, work, cut_into_runs(tiles, self.n_threads), tell)
        stop_by = float("inf")
        while True:
            self._require_workers()
            if self.client.status != "running":  # it is reconnecting
                time.sleep(LOOK_SECONDS)
                continue
            all_submitted = stopping.is_set() or window.fill()
            if stopping.is_set():
                stop_by = min(stop_by, time.monotonic() + STOP_SECONDS)
            if (all_submitted and not window.in_flight) or time.monotonic() > stop_by:
                break
            window.take_one()
            metrics.publish()
        metrics.publish(at_once=True)

    def _require_workers(self) -> None:
        """Raise if the scheduler is lost, or there have been no workers for too long.

        Raises
        ------
        ClusterLostError
        """
        if self.client.status in ("closing", "closed"):
            raise ClusterLostError(
                "the Dask scheduler is gone, or cannot be reached; what was done is kept: run the "
                "same command again, with a cluster that lives"
            )
        if self.n_threads() > 0:
            self._had_workers = time.monotonic()
        elif time.monotonic() - self._had_workers > self._worker_timeout:
            raise ClusterLostError(
                f"the cluster has had no workers for {self._worker_timeout:.0f} s; what was done "
                "is kept: run the same command again when there are some, or allow for a longer "
                "wait with --worker-timeout"
            )

    def n_threads(self) -> int:
        """Return the cached number of threads of all workers: a query costs as much as a task."""
        now = time.monotonic()
        if now - self._asked > LOOK_SECONDS:
            self._asked = now
            # A lost connection is detected elsewhere.
            with contextlib.suppress(OSError, TimeoutError, ValueError, RuntimeError):
                self._n_threads_then = sum(self.client.nthreads().values())
        return self._n_threads_then


class _Window:
    """The submitted tasks of a cluster.

    Parameters
    ----------
    executor
        Executor of the cluster.
    work
        Work that the tasks belong to.
    runs
        Tiles of each task.
    on_outcome
        Called with the outcome of each tile.
    """

    def __init__(
        self,
        executor: ClientExecutor,
        work: Work,
        runs: Iterator[Run],
        on_outcome: Callable[[Outcome], None],
    ) -> None:
        self._executor, self._work, self._runs = executor, work, runs
        self._on_outcome = on_outcome
        self._again: deque[Run] = deque()
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.in_flight: dict[str, tuple[Run, Any]] = {}

    def fill(self) -> bool:
        """Submit tasks until all current workers are busy.

        Returns
        -------
        bool
            Whether all tasks have been submitted.
        """
        while len(self.in_flight) < TASKS_IN_FLIGHT * max(self._executor.n_threads(), 1):
            run = self._again.popleft() if self._again else next(self._runs, None)
            if run is None:
                return True
            number = next(_numbers)
            try:
                future = self._executor.client.submit(
                    self._executor.attempt,
                    self._work,
                    run,
                    key=(f"{TASK_NAME}-{self._work.run_id[:12]}", *run[0], len(run), number),
                    pure=False,
                )
            except Exception:
                if self._executor.client.status == "running":
                    raise
                self._again.append(run)  # the connection was lost just now
                return False
            self.in_flight[str(future.key)] = run, future
            future.add_done_callback(self._ended.put)
        return False

    def take_one(self) -> None:
        """Wait briefly for a task to end, and report its tiles or put them back in the queue."""
        try:
            future = self._ended.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            # Tasks lost in a restart of the scheduler never end.
            lost = [key for key, (_, future) in self.in_flight.items() if future.status == "lost"]
            self._again.extend(self.in_flight.pop(key)[0] for key in lost)
            return
        run, _ = self.in_flight.pop(str(future.key), (None, None))
        if run is None:
            return
        if future.status == "error":
            error = future.exception()
            if len(run) > 1:
                # A single tile may be the cause: retry each one in a task of its own.
                self._again.extend((tile,) for tile in run)
            else:
                reason = f"{type(error).__name__}: {error}"
                if type(error).__name__ == "KilledWorker":
                    reason += (
                        "; mostly that is want of memory: try fewer threads, or a smaller "
                        "--memory-limit, which makes tiles smaller"
                    )
                self._on_outcome(Outcome(*run[0], None, f"its task was lost: {reason}"))
            return
        try:
            outcomes = future.result(timeout=RESULT_SECONDS)
        except Exception as error:
            # Its worker died, or the scheduler forgot it: run it again.
            log.info("the result of a task was lost: %r", error)
            self._again.append(run)
            return
        for outcome in outcomes:
            self._on_outcome(outcome)


_numbers = itertools.count()
"""Numbers that keep task keys unique: the scheduler may remember a released key."""


def cut_into_runs(tiles: Sequence[tuple[int, int]], n_threads: Callable[[], int]) -> Iterator[Run]:
    """Split tiles into runs of consecutive ones: long runs first, single tiles at the end."""
    start = 0
    while start < len(tiles):
        share = (len(tiles) - start) // (RUNS_PER_THREAD * max(n_threads(), 1))
        stop = start + min(max(share, 1), MAX_TILES_PER_TASK)
        yield tuple(tiles[start:stop])
        start = stop
