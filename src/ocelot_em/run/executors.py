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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import dask.threaded
from dask.callbacks import Callback

from ocelot_em.errors import ClusterLostError
from ocelot_em.merge.job import JobSpec
from ocelot_em.merge.merge import attempt_tiles
from ocelot_em.merge.outcome import OnOutcome, Outcome, Outcomes, Tiles, joined
from ocelot_em.merge.warm_up import CompileListener
from ocelot_em.run.tile_events import Event, TileEvents, outcomes_of, topic_of

log = logging.getLogger(__name__)

TASK_NAME = "merge_tiles"

MAX_TILES_PER_TASK = 16
"""Maximum number of tiles per task. A task costs Dask about as much as a small tile costs us; tiles
of one task overlap in time."""

BATCHES_PER_THREAD = 2
"""Number of tasks per thread into which the remaining tiles are split: the last tasks are short, so
that all threads end together."""

REPORT_SECONDS = 0.2
"""Time after which tiles that have ended are reported."""

REPORTS_PER_THREAD = 32
"""Minimum number of times that a thread reports tiles, if it has so many."""

TASKS_PER_GRAPH = 32, 1024
"""Tasks per thread in the first graph of the threaded scheduler, and maximum number of tasks in
one: each graph has twice as many as the one before, and ends when its last task does."""

TASKS_PER_THREAD = 2
"""Submitted tasks per thread of a cluster: one running, one queued."""

POLL_SECONDS = 1.0
"""Interval between checks of the cluster's state and number of threads."""

ENDED = ("finished", "error")
"""States of the futures of tasks that have ended."""

RESULT_SECONDS = 60.0
"""Timeout for fetching the result of a finished task."""

STOP_SECONDS = 60.0
"""Timeout for the running tiles when a run is stopped; longer than any tile takes."""

WORKER_TIMEOUT_SECONDS = 300.0
"""Default timeout while there are no workers."""

TileBatch = tuple[tuple[int, int], ...]
"""Rows and columns of the tiles of one task."""

Attempt = Callable[[JobSpec, Iterable[tuple[int, int]]], Outcomes]
"""Function that merges tiles: :func:`ocelot_em.merge.merge.attempt_tiles`, or an empty one to
measure the overhead."""


class ThreadExecutor:
    """Run tiles on Dask's threaded scheduler in this process, without a server.

    Each thread has a pipeline, which takes batches and merges them without a gap between them: a
    task is whatever a pipeline merges in a fifth of a second, or a small part of the tiles.
    """

    def __init__(self, n_threads: int, attempt: Attempt = attempt_tiles) -> None:
        self.n_threads, self._attempt = n_threads, attempt

    def run(
        self, spec: JobSpec, tiles: Tiles, on_outcome: OnOutcome, stopping: threading.Event
    ) -> None:
        """See :class:`ocelot_em.merge.merge.Executor`."""

        def posttask(_key: object, value: object, *_: object) -> None:
            if isinstance(value, list):
                for outcome in value:
                    on_outcome(outcome)

        batches, taking = split_into_batches(tiles, lambda: self.n_threads), threading.Lock()
        interrupted = threading.Event()

        def taken() -> Iterator[tuple[int, int]]:
            while True:
                with taking:
                    batch = next(batches, ())
                for tile in batch:
                    if stopping.is_set() or interrupted.is_set():
                        return
                    yield tile
                if not batch:
                    return

        idle: queue.SimpleQueue[Outcomes] = queue.SimpleQueue()
        for _ in range(self.n_threads):
            idle.put(self._attempt(spec, taken()))

        def advance() -> list[Outcome]:
            try:
                pipeline = idle.get_nowait()
            except queue.Empty:  # all that are left are running
                return []
            most = max(len(tiles) // (REPORTS_PER_THREAD * self.n_threads), 1)
            outcomes, report_at = list[Outcome](), time.perf_counter() + REPORT_SECONDS
            for outcome in pipeline:
                outcomes.append(outcome)
                if time.perf_counter() >= report_at or len(outcomes) == most:
                    idle.put(pipeline)
                    break
            return outcomes

        # Threads of Dask's own pool would outlive the run, and be missing in forked processes.
        pool = ThreadPoolExecutor(self.n_threads, "ocelot-merge")
        try:
            n_tasks = min(len(tiles), TASKS_PER_GRAPH[0] * self.n_threads) // 2 + self.n_threads
            while not idle.empty():
                n_tasks = min(2 * n_tasks, TASKS_PER_GRAPH[1])
                graph = {f"{TASK_NAME}-{number}": (advance,) for number in range(n_tasks)}
                with Callback(posttask=posttask):
                    dask.threaded.get(graph, list(graph), pool=pool)
        finally:
            interrupted.set()
            pool.shutdown()
            while not idle.empty():
                idle.get().close()


class ClientExecutor:
    """Run tiles on a Dask cluster, in a sliding window of tasks that are released as they end."""

    def __init__(
        self,
        client: Any,
        attempt: Attempt = attempt_tiles,
        worker_timeout_seconds: float = WORKER_TIMEOUT_SECONDS,
    ) -> None:
        self.client, self.attempt = client, attempt
        self._worker_timeout = worker_timeout_seconds
        self.latest_n_threads, self._queried_at = 0, float("-inf")
        """Number of threads at the latest query; any thread may read it."""
        self.on_compile: CompileListener | None = None
        self.had_workers()

    def run(
        self, spec: JobSpec, tiles: Tiles, on_outcome: OnOutcome, stopping: threading.Event
    ) -> None:
        """See :class:`ocelot_em.merge.merge.Executor`."""
        self.had_workers()
        window = _Window(self, spec, split_into_batches(tiles, self.n_threads), on_outcome)
        topic = topic_of(spec.run_id)
        self.client.subscribe_topic(topic, lambda event: window.events.put(event[1]))
        try:
            self._run(window, stopping)
        finally:
            with contextlib.suppress(Exception):  # the connection may be lost
                self.client.unsubscribe_topic(topic)

    def _run(self, window: "_Window", stopping: threading.Event) -> None:
        stop_by = float("inf")
        while True:
            self._require_workers()
            if self.client.status != "running":  # it is reconnecting
                time.sleep(POLL_SECONDS)
                continue
            all_submitted = stopping.is_set() or window.fill()
            if stopping.is_set():
                stop_by = min(stop_by, time.monotonic() + STOP_SECONDS)
                if not self.n_threads() and not self.client.nthreads():
                    break  # no worker is left to run the submitted tasks
            if (all_submitted and not window.in_flight) or time.monotonic() > stop_by:
                break
            window.wait_for_event()

    def had_workers(self) -> None:
        """Note that there are workers; also when a paused one has ended a task."""
        self._had_workers = time.monotonic()

    def _require_workers(self) -> None:
        """Raise if the scheduler is lost, or there have been no workers for too long."""
        if self.client.status in ("closing", "closed"):
            raise ClusterLostError(
                "the connection to the Dask scheduler was lost; finished tiles are kept: run the "
                "same command again when the cluster is available"
            )
        if self.n_threads() > 0:
            self.had_workers()
        elif time.monotonic() - self._had_workers > self._worker_timeout:
            n_paused = len(self.client.nthreads())
            paused = f" ({n_paused} are paused, for lack of memory)" if n_paused else ""
            raise ClusterLostError(
                f"the cluster has had no workers{paused} for {self._worker_timeout:.0f} s; "
                "finished tiles are kept: run the same command again when there are workers, or "
                "set a longer --worker-timeout"
            )

    def n_threads(self) -> int:
        """Return the cached number of threads of all workers: a query costs as much as a task.

        Workers that Dask has paused, because they lack memory, take no tasks and do not count.
        """
        now = time.monotonic()
        if now - self._queried_at > POLL_SECONDS:
            self._queried_at = now
            # A lost connection is detected elsewhere.
            with contextlib.suppress(OSError, TimeoutError, ValueError, RuntimeError):
                self.latest_n_threads = sum(
                    self.client.sync(self.client.scheduler.ncores_running).values()
                )
        return self.latest_n_threads


class _Window:
    """The submitted tasks of a cluster."""

    def __init__(
        self,
        executor: ClientExecutor,
        spec: JobSpec,
        batches: Iterator[TileBatch],
        on_outcome: OnOutcome,
    ) -> None:
        self._executor, self._spec, self._batches = executor, spec, batches
        self._on_outcome = on_outcome
        self._to_retry: deque[TileBatch] = deque()
        self._suspects: deque[TileBatch] = deque()
        """Tiles whose workers died: retried one at a time, so that no other tile is blamed."""
        self._alone: set[TileBatch] = set()
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        """Futures of tasks that have ended, and what workers send while tasks run."""
        self._compiling = set[int]()
        self.in_flight: dict[int, tuple[TileBatch, Any]] = {}

    def fill(self) -> bool:
        """Submit tasks until all workers are busy; return whether all have been submitted."""
        while len(self.in_flight) < TASKS_PER_THREAD * max(self._executor.n_threads(), 1):
            batch = self._to_retry.popleft() if self._to_retry else next(self._batches, None)
            if batch is None:
                if self.in_flight or not self._suspects:
                    return not self._suspects
                batch = self._suspects.popleft()
                self._alone.add(batch)
            number = next(_numbers)
            try:
                future = self._executor.client.submit(
                    partial(_merged, self._executor.attempt),
                    self._spec,
                    batch,
                    number,
                    key=(f"{TASK_NAME}-{self._spec.run_id[:12]}", *batch[0], len(batch), number),
                    pure=False,
                )
            except Exception:
                if self._executor.client.status == "running":
                    raise
                self._to_retry.append(batch)  # the connection was lost just now
                return False
            self.in_flight[number] = batch, future
            future.add_done_callback(self.events.put)
        return False

    def wait_for_event(self) -> None:
        """Wait briefly for a task to end, and report its tiles or put them back in the queue.

        Tiles that a running task has merged are reported early.
        """
        try:
            future = self.events.get(timeout=POLL_SECONDS)
        except queue.Empty:
            # Tasks lost in a restart of the scheduler never end.
            lost = [one for one, (_, future) in self.in_flight.items() if future.status == "lost"]
            self._to_retry.extend(self.in_flight.pop(number)[0] for number in lost)
            # Callbacks need one more thread, and are lost where it cannot be started.
            ended = [one for _, one in self.in_flight.values() if one.status in ENDED]
            if not ended:
                return
            future = ended[0]
        self._executor.had_workers()
        if isinstance(future, dict):
            self._report_early(future)
            return
        batch, _ = self.in_flight.pop(future.key[-1], (None, None))
        if batch is None:
            return
        if future.status == "error":
            error = future.exception()
            killed = type(error).__name__ == "KilledWorker"
            if len(batch) > 1:
                # A single tile may be the cause: retry each one in a task of its own.
                self._to_retry.extend((tile,) for tile in batch)
            elif killed and batch not in self._alone:
                # Dask blames every task that its worker had, also those that only shared it.
                self._suspects.append(batch)
            else:
                reason = f"{type(error).__name__}: {error}"
                if killed:
                    reason += (
                        "; the usual cause is a lack of memory: use fewer threads, or a smaller "
                        "--memory-limit for smaller tiles"
                    )
                self._on_outcome(Outcome(*batch[0], None, f"its task failed: {reason}"))
            return
        try:
            outcomes = future.result(timeout=RESULT_SECONDS)
        except Exception as error:
            # The worker has died, or the scheduler has released the result: repeat the task.
            log.info("the result of a task was lost, and its tiles are merged again: %r", error)
            self._to_retry.append(batch)
            return
        for outcome in outcomes:
            self._on_outcome(outcome)

    def _report_early(self, event: Event) -> None:
        """Report what a worker sends while a task runs; a task that has ended reports itself."""
        number, listener = event["task"], self._executor.on_compile
        if number not in self.in_flight:
            return
        for outcome in outcomes_of(event):
            self._on_outcome(outcome)
        n_before = len(self._compiling)
        if "compiling" in event:
            self._compiling.add(number)
        elif "compiled" in event:
            self._compiling.discard(number)
        if listener is not None and not n_before and self._compiling:
            listener.compiling()
        elif listener is not None and n_before and not self._compiling:
            listener.compiled(event["compiled"])


def _merged(attempt: Attempt, spec: JobSpec, tiles: TileBatch, number: int) -> list[Outcome]:
    """Merge the tiles of a task of a cluster."""
    events, outcomes = TileEvents(spec.run_id, number), list[Outcome]()
    if attempt is attempt_tiles:
        attempt = partial(attempt_tiles, on_compile=events)
    for outcome in attempt(spec, tiles):
        outcomes.append(outcome)
        events.tile_ended(outcome)
    return joined(outcomes)


_numbers = itertools.count()
"""Numbers that keep task keys unique: the scheduler may remember a released key."""


def split_into_batches(
    tiles: Sequence[tuple[int, int]], n_threads: Callable[[], int]
) -> Iterator[TileBatch]:
    """Split tiles into batches of consecutive ones: large batches first, single tiles last."""
    start = 0
    while start < len(tiles):
        share = (len(tiles) - start) // (BATCHES_PER_THREAD * max(n_threads(), 1))
        stop = start + min(max(share, 1), MAX_TILES_PER_TASK)
        yield tuple(tiles[start:stop])
        start = stop
