"""The merge from top to bottom: partials -> tiles -> merged maps.

:func:`merge` passes the missing tiles of a prepared output to an executor, :func:`attempt_tiles`
runs on a worker for a batch of tiles, and :func:`merge_tile` merges one tile. Data flow in one
direction: the reader fetches encoded chunks, the fold merges the partials of an exposure, the
canvas places exposures, the writer stores maps. A search without exposures is one exposure that
covers the canvas alone. This module imports neither an executor, nor Dask, nor Zarr.

:mod:`ocelot_em.merge.resume` prepares outputs and resumes interrupted runs.
"""

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from ocelot_em.merge.job import Job, JobSpec, close_job, group_of, open_job
from ocelot_em.merge.outcome import (
    MergeReport,
    OnOutcome,
    Outcome,
    Tally,
    Tiles,
    failure,
    unfinished,
)
from ocelot_em.merge.resume import PreparedMerge, complete_output, create_output
from ocelot_em.merge.tile import MemoryWriter, TileWriter, Writer
from ocelot_em.merge.warm_up import CompileListener
from ocelot_em.model.maps import AnyArray
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.regions import Tile
from ocelot_em.store.lock import OutputLock
from ocelot_em.store.transfer import ReadAhead

log = logging.getLogger(__name__)

MAX_RETRIES = 1
"""Extra attempts for a tile that failed with a transient error, after all other tiles."""


MAX_TILES_BEHIND = 4
"""Maximum number of merged tiles of a thread that are not known to be written and marked."""


class Executor(Protocol):
    """Runs tiles in threads of this process or on a Dask cluster."""

    def run(
        self, spec: JobSpec, tiles: Tiles, on_outcome: OnOutcome, stopping: threading.Event
    ) -> None:
        """Call :func:`attempt_tiles` once for each batch of tiles, and pass on the outcomes.

        ``on_outcome`` is called in this thread. Once ``stopping`` is set, no batch starts, and the
        running ones are awaited.

        Raises
        ------
        ClusterLostError
            No workers are left.
        """
        ...


def merge(
    ready: PreparedMerge,
    options: MergeOptions,
    executor: Executor,
    lock: OutputLock,
    on_outcome: OnOutcome,
    on_compile: CompileListener | None = None,
) -> MergeReport:
    """Merge all missing tiles, and mark the output complete.

    Tiles that fail with a transient error are retried after all others. If tiles run in this
    process, ``on_compile`` is notified when kernels must be compiled first.

    Raises
    ------
    TilesFailedError
        Names tiles that failed; the next run merges only the tiles that are not done.
    StoppedError
        A stop was requested, and the running tiles were finished; or no workers are left.
    LockLostError
        Another run has taken over the output.
    InputChangedError
        All tiles are merged, but an input has changed since the merge was planned.
    """
    started = time.perf_counter()
    objects = lock.objects
    attributes = create_output(objects, ready, options)
    tally = Tally(on_outcome, lock.stop)
    tiles = ready.missing
    on_device = ready.forecast.partials_on_device
    spec = JobSpec(objects.url, attributes.id, lock.key, lock.id, on_device)
    compile_seconds = 0.0
    try:
        if tiles and on_compile is not None:
            with suppress(Exception):  # the tiles will report the error
                compile_seconds = open_job(spec, on_compile).compile_seconds
        for _ in range(1 + MAX_RETRIES):
            if tiles and not lock.stopping.is_set():
                executor.run(spec, tiles, tally.count, lock.stopping)
                tiles = tally.transient_failures(ready.plan.grid.counts[1])
    finally:
        close_job()
    if n_left := len(ready.missing) - tally.n_merged:
        raise unfinished(ready.output, (n_left, len(ready.plan.grid)), tally, lock)
    if attributes.state != "complete":
        complete_output(objects, ready, attributes, tally)
    return MergeReport(
        output=objects.url,
        n_tiles=len(ready.plan.grid),
        n_merged=tally.n_merged,
        seconds=time.perf_counter() - started - compile_seconds,
        totals=tally.totals,
        compile_seconds=compile_seconds,
        incomplete_search=ready.plan.incomplete_text,
    )


def attempt_tiles(spec: JobSpec, tiles: Sequence[tuple[int, int]]) -> list[Outcome]:
    """Merge some tiles of a prepared output; never raises, so that the other tiles are merged.

    This is the task of a worker. Its arguments are small: the worker reads the plan from the
    output, once. Tiles that did not start, because the run has ended or is stopping, have no
    outcome.
    """
    try:
        job = open_job(spec)
        outcomes = list(merge_tiles(job, [job.plan.grid.at(iy, ix) for iy, ix in tiles]))
    except Exception as error:
        log.debug("all tiles of a batch failed, the first is %s", tiles[0], exc_info=True)
        outcomes = [failure(iy, ix, error) for iy, ix in tiles]
    where = f"{socket.gethostname()}:{os.getpid()}"
    return [replace(outcome, where=where) for outcome in outcomes]


def merge_tiles(job: Job, tiles: Sequence[Tile]) -> Iterator[Outcome]:
    """Merge tiles in order, while the next one is read and earlier ones are written and marked."""
    with job.read_ahead(tiles) as reader, job.write_behind() as storage:
        behind: deque[TileWriter] = deque()
        for tile in tiles:
            if not job.may_begin:
                break
            with TileWriter(job, tile, reader, storage) as writer:
                merge_tile(tile, job, reader, writer)
            behind.append(writer)
            if len(behind) > MAX_TILES_BEHIND:
                yield behind.popleft().outcome()
        while behind:
            yield behind.popleft().outcome()


def merge_tile(tile: Tile, job: Job, reader: ReadAhead, writer: Writer) -> None:
    """Merge every exposure that touches a tile, and place the merged maps on the canvas.

    Raises
    ------
    OcelotError
        A chunk cannot be read, or contains invalid values.
    """
    pieces = job.plan.pieces(tile)
    if not pieces:
        writer.blank()
        return
    canvas = job.canvas(tile, pieces)
    for piece in pieces:
        exposure, report, work = job.open(piece), job.report(piece), job.workspace(piece)
        canvas.place(exposure.number, piece.in_tile, (piece.region, exposure.region))
        incoming = reader.group(group_of(tile, piece), work.spare)
        report.as_planes = canvas.takes_planes and writer.takes_planes
        for name, values in exposure.fold.merge(incoming, work, report):
            exposure.check_suspects(piece.region, report)
            for finished in canvas.put(name, values):
                writer.map(*finished)
        writer.statistics(piece, report)
    for finished in canvas.maps():
        writer.map(*finished)
    if job.plan.is_montage:
        for piece in pieces:
            writer.shown(piece, canvas.shown(job.open(piece).number, piece.in_tile))


def merge_in_memory(job: Job, tile: Tile) -> dict[str, AnyArray]:
    """Return the merged maps of a tile; nothing is written."""
    kept = MemoryWriter(job, tile)
    try:
        with job.read_ahead([tile]) as reader:
            merge_tile(tile, job, reader, kept)
    finally:
        job.release_memory()
    return {name: kept.maps[name] for name in job.plan.maps.merged}
