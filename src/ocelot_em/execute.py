"""Runs the tiles of a merge with Dask: its threaded scheduler here, or a cluster.

Work in flight is bounded, so that a canvas of a million tiles costs the driver no more memory
than one of a hundred.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import dask
import dask.threaded
from dask.callbacks import Callback

from ocelot_em.pipeline import Outcome, attempt_tile

log = logging.getLogger(__name__)

TASK_NAME = "merge_tile"

TILES_PER_GRAPH = 64
"""Tiles per thread in one graph of the threaded scheduler; its cost grows with the graph."""

TILES_IN_FLIGHT = 3
"""Tasks per thread that a cluster has at a time: one running, the next ones at hand."""

RETRIES = 3
"""How often a tile is tried again after its worker died or lost its connection."""


class ThreadExecutor:
    """Dask's threaded scheduler in this process; needs no server."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads

    def run(
        self,
        output: str,
        run_id: str,
        tiles: Iterable[tuple[int, int]],
        on_outcome: Callable[[Outcome], bool],
    ) -> None:
        """See :class:`ocelot_em.pipeline.Executor`."""
        go_on = True

        def posttask(_key: object, value: object, *_: object) -> None:
            nonlocal go_on
            if isinstance(value, Outcome):
                go_on = on_outcome(value) and go_on

        for batch in _batched(tiles, TILES_PER_GRAPH * self.n_threads):
            graph = {
                (TASK_NAME, iy, ix): (attempt_tile, output, run_id, iy, ix) for iy, ix in batch
            }
            with Callback(posttask=posttask):
                dask.threaded.get(graph, list(graph), num_workers=self.n_threads)
            if not go_on:
                return


class ClientExecutor:
    """A Dask cluster, through its client: a sliding window of tasks, released as they end."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def run(
        self,
        output: str,
        run_id: str,
        tiles: Iterable[tuple[int, int]],
        on_outcome: Callable[[Outcome], bool],
    ) -> None:
        """See :class:`ocelot_em.pipeline.Executor`."""
        from distributed import as_completed

        todo = iter(tiles)
        running = as_completed(with_results=False)
        where: dict[str, tuple[int, int]] = {}

        def submit_up_to(n_more: int) -> None:
            for iy, ix in itertools.islice(todo, n_more):
                future = self.client.submit(
                    attempt_tile,
                    output,
                    run_id,
                    iy,
                    ix,
                    key=(f"{TASK_NAME}-{run_id[:12]}", iy, ix),
                    retries=RETRIES,
                    pure=False,
                )
                where[str(future.key)] = (iy, ix)
                running.add(future)

        window = TILES_IN_FLIGHT * max(self._n_threads(), 1)
        submit_up_to(window)
        for future in running:
            if future.status not in ("finished", "error", "cancelled"):
                # Its worker died with the result before it got here; it is computed again.
                running.add(future)
                continue
            iy, ix = where.pop(str(future.key))
            if future.status == "finished":
                outcome = future.result()
            else:
                outcome = Outcome(iy, ix, None, f"its task was lost: {_reason(future)}")
            del future  # the scheduler forgets what nobody holds
            if not on_outcome(outcome):
                running.clear()
                return
            # Workers may have come or gone meanwhile.
            window = TILES_IN_FLIGHT * max(self._n_threads(), 1)
            submit_up_to(max(window - len(where), 0))

    def _n_threads(self) -> int:
        return sum(self.client.nthreads().values())


def _batched(tiles: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Cut into tuples of at most this size (itertools.batched needs Python 3.12)."""
    rest = iter(tiles)
    while batch := tuple(itertools.islice(rest, size)):
        yield batch


def _reason(future: Any) -> str:
    if future.status == "cancelled":
        return "it was cancelled"
    error = future.exception()
    return f"{type(error).__name__}: {error}"
