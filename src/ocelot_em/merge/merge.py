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
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice, tee
from typing import Protocol

from ocelot_em.merge.job import Job, JobSpec, close_job, group_of, open_job
from ocelot_em.merge.outcome import (
    MergeReport,
    OnOutcome,
    Outcomes,
    Tally,
    Tiles,
    failure,
    unfinished,
)
from ocelot_em.merge.resume import Gathered, PreparedMerge, complete_output, create_output
from ocelot_em.merge.tile import MemoryWriter, TileWriter, Writer
from ocelot_em.merge.warm_up import CompileListener
from ocelot_em.model.maps import AnyArray
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.regions import Region, Tile
from ocelot_em.store.lock import OutputLock
from ocelot_em.store.transfer import ReadAhead

log = logging.getLogger(__name__)

MAX_RETRIES = 1
"""Extra attempts for a tile that failed with a transient error, after all other tiles."""

MAX_TILES_BEHIND = 16
"""Maximum number of merged tiles of a thread that are not known to be written and marked."""

MAX_FAILED_TOGETHER = 16
"""Number of tiles that fail if not even the job can be opened, before that is tried again."""


class Executor(Protocol):
    """Runs tiles in threads of this process or on a Dask cluster."""

    def run(
        self, spec: JobSpec, tiles: Tiles, on_outcome: OnOutcome, stopping: threading.Event
    ) -> None:
        """Call :func:`attempt_tiles` with all tiles, in parts, and pass on the outcomes.

        ``on_outcome`` is called in this thread, perhaps with an early outcome of a tile before.
        Once ``stopping`` is set, no batch starts, and the running ones are awaited.

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
    gathered = Gathered(ready.plan)
    tally = Tally(on_outcome, lock.stop, gathered.add)
    tiles = ready.missing
    cost, held = ready.forecast, (objects.url, attributes.id, lock.key, lock.id)
    spec = JobSpec(*held, cost.partials_on_device, streams=cost.streams)
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
        complete_output(objects, ready, attributes, gathered)
    return MergeReport(
        output=objects.url,
        n_tiles=len(ready.plan.grid),
        n_merged=tally.n_merged,
        seconds=time.perf_counter() - started - compile_seconds,
        totals=tally.totals,
        compile_seconds=compile_seconds,
        incomplete_search=ready.plan.incomplete_text,
    )


def attempt_tiles(
    spec: JobSpec, tiles: Iterable[tuple[int, int]], on_compile: CompileListener | None = None
) -> Outcomes:
    """Merge some tiles of a prepared output; never raises, so that the other tiles are merged.

    This is the task of a worker, which reads the plan from the output, once. Tiles are taken when
    their first chunks can be prefetched, and each has one outcome, in order. Those that did not
    start, because the run has ended or is stopping, have none.
    """
    remaining, taken = iter(tiles), deque[tuple[int, int]]()
    where = f"{socket.gethostname()}:{os.getpid()}"

    def take(job: Job) -> Iterator[Tile]:
        for iy, ix in remaining:
            taken.append((iy, ix))
            yield job.plan.grid.at(iy, ix)

    while True:
        try:
            job = open_job(spec, on_compile)
            for outcome in merge_tiles(job, take(job)):
                taken.popleft()
                yield replace(outcome, where=where)
            return
        except Exception as error:
            taken.extend(islice(remaining, 0 if taken else MAX_FAILED_TOGETHER))
            if not taken:
                return
            log.debug("several tiles failed, the first is %s", taken[0], exc_info=True)
            yield from (replace(failure(iy, ix, error), where=where) for iy, ix in taken)
            taken.clear()


def merge_tiles(job: Job, tiles: Iterable[Tile]) -> Outcomes:
    """Merge tiles in order, while the next ones are read and earlier ones written and marked."""
    tiles, announced = tee(tiles)
    with job.read_ahead(announced) as reader, job.write_behind() as storage:
        behind: deque[TileWriter] = deque()
        for tile in tiles:
            if not job.may_begin:
                break
            with TileWriter(job, tile, reader, storage) as writer:
                merge_tile(tile, job, reader, writer)
            behind.append(writer)
            while behind and (len(behind) > MAX_TILES_BEHIND or behind[0].has_ended):
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
    if job.plan.has_parts:
        valid = Region.whole(job.plan.valid_shape).relative_to(tile.region)
        for piece in pieces:
            counted = piece.in_tile.intersect(valid)
            counted = counted if counted.size else Region(0, 0, 0, 0)  # no negative slices
            writer.shown(piece, canvas.shown(job.open(piece).number, counted))


def merge_in_memory(job: Job, tile: Tile) -> dict[str, AnyArray]:
    """Return the merged maps of a tile; nothing is written."""
    kept = MemoryWriter(job, tile)
    try:
        with job.read_ahead([tile]) as reader:
            merge_tile(tile, job, reader, kept)
    finally:
        job.release_memory()
    return {name: kept.maps[name] for name in job.plan.maps.merged}
