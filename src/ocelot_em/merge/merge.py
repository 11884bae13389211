"""The story of a merge, read top to bottom: partials -> tiles -> merged maps.

:func:`merge` plans, prepares the output and hands the missing tiles to an executor;
:func:`merge_tiles` is what a worker does with those it is given. In a tile, the partials of each
exposure are merged, and what comes out is laid on the canvas; a search that is not of several
exposures is one, which covers the canvas alone. Nothing here knows of executors, Dask or Zarr.
"""

import logging
import os
import socket
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from os import PathLike
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray

from ocelot_em.errors import (
    ChunkError,
    FormatError,
    InvalidDataError,
    InvalidInputError,
    OcelotError,
    OutputExistsError,
    StoppedError,
    StoreNotFoundError,
    TilesFailedError,
)
from ocelot_em.kernels.device import open_device
from ocelot_em.merge.device_fold import DeviceFold, Lanes
from ocelot_em.merge.fold import Fold, Workspace
from ocelot_em.merge.overlap import Canvas, shown_alone
from ocelot_em.merge.plan import (
    ON_CPU,
    DeviceChoice,
    Forecast,
    MergeOptions,
    MergePlan,
    Piece,
    PlannedExposure,
    forecast,
    make_plan,
    plan_differences,
    read_plan,
    tile_size_of,
    tiles_changed,
)
from ocelot_em.merge.stats import records
from ocelot_em.merge.stats.collected import Collection
from ocelot_em.merge.warm_up import Compiling, Logged, compile_kernels
from ocelot_em.model.maps import SCALED_MIP, SOURCE_EXPOSURE, SUM, AnyArray, Float64
from ocelot_em.model.markup import pairs, seconds_text
from ocelot_em.model.regions import Region, Tile, TileGrid
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.store import arrays as store
from ocelot_em.store import attributes as fmt
from ocelot_em.store.lock import FOLDER as LOCK_FOLDER
from ocelot_em.store.lock import STALE_SECONDS, Leave, OutputLock
from ocelot_em.store.objects import Objects, ReusedMemory, open_objects
from ocelot_em.store.search import (
    SearchInfo,
    now,
    open_one,
    open_partial_maps,
    open_source_maps,
    provenance,
    read_attributes,
    read_search_space,
    value_problems,
    write_search_space,
)
from ocelot_em.store.transfer import Arrival, ReadAhead, Request, WriteBehind, chunks_ahead

log = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW = 50
"""A run whose tiles only fail is given up: the disk is full or the network is gone."""

MAX_FAILURES_SHOWN = 20

TRIED_AGAIN = 1
"""So often tiles are tried again, after all others, that failed for a reason that may pass."""


@dataclass(frozen=True, slots=True)
class TileSummary:
    """What is known about a tile after it was written; kept in the output as its done-mark.

    Seconds are of the thread that merged it. Reading includes decoding, writing includes encoding,
    and ``waited_seconds`` is the part of both in which there was nothing to do but wait for the
    storage.
    """

    pixels: int
    searched_pixels: int
    read_seconds: float
    fold_seconds: float
    write_seconds: float
    waited_seconds: float
    read_nbytes: int
    decoded_nbytes: int
    written_nbytes: int

    @property
    def seconds(self) -> dict[str, float]:
        """By what they were spent on; ``waited`` is a part of the others."""
        names = "read", "fold", "write", "waited"
        return {name: getattr(self, f"{name}_seconds") for name in names}

    @property
    def nbytes(self) -> dict[str, int]:
        """By what was done with them."""
        return {name: getattr(self, f"{name}_nbytes") for name in ("read", "decoded", "written")}


SUMMARY_FIELDS = tuple(TileSummary.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one tile ended: with a summary, or with an error in words."""

    iy: int
    ix: int
    summary: TileSummary | None
    error: str = ""
    may_pass: bool = False
    """Whether another try may go better: not for what lies in the data."""
    where: str = ""
    """Host and process that merged it."""


@dataclass(frozen=True, slots=True)
class Work:
    """Which merge a task belongs to; all that a worker is told besides the tiles.

    Parameters
    ----------
    output
        The prepared output, which holds the plan.
    run_id
        Its identity.
    lock, holder
        Key of the lock that the run holds, and its id; tasks stop without it. Empty: there is none.
    partials_on_device
        How many partials a thread has on the GPU at a time; 0 to merge on the CPU.
    """

    output: str
    run_id: str
    lock: str = ""
    holder: str = ""
    partials_on_device: int = 0


class Executor(Protocol):
    """Runs tiles somewhere: in threads here, or on a Dask cluster."""

    def run(
        self,
        work: Work,
        tiles: "Tiles",
        on_outcome: Callable[[Outcome], None],
        stopping: threading.Event,
    ) -> None:
        """Call :func:`attempt_tiles` for runs of tiles, each once, and pass on what it returns.

        ``on_outcome`` is called in this thread. Once ``stopping`` is set nothing more starts, and
        what has started is waited for.

        Raises
        ------
        ClusterLostError
            There is nothing left to run tiles on.
        """
        ...


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Parameters
    ----------
    output
        The merged store.
    n_tiles, n_merged
        Tiles in all, and those merged by this run (the others were done before).
    seconds
        Wall-clock time of this run, after compiling.
    totals
        Sums over the tiles of this run.
    compile_seconds
        What compiling kernels in this process took before, once after an installation.
    """

    output: str
    n_tiles: int
    n_merged: int
    seconds: float
    totals: TileSummary
    compile_seconds: float = 0.0

    @property
    def gigabytes_per_second(self) -> float:
        """Decoded input bytes over wall-clock time."""
        return self.totals.decoded_nbytes / max(self.seconds, 1e-9) / 1e9

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the workers' time spent in reading, folding and writing."""
        seconds = {
            "read": self.totals.read_seconds,
            "fold": self.totals.fold_seconds,
            "write": self.totals.write_seconds,
        }
        total = sum(seconds.values()) or 1.0
        return {name: value / total for name, value in seconds.items()}

    @property
    def waiting_share(self) -> float:
        """Share of the same time in which workers only waited for the storage."""
        totals = self.totals
        busy = totals.read_seconds + totals.fold_seconds + totals.write_seconds
        return totals.waited_seconds / (busy or 1.0)

    def _repr_html_(self) -> str:
        """Summarise the merge for a notebook."""
        shares = [f"{name} {share:.0%}" for name, share in self.shares.items()]
        return pairs(
            (
                ("merged", self.output),
                ("tiles", f"{self.n_merged:,} of {self.n_tiles:,} by this run"),
                ("time", f"{seconds_text(self.seconds)}: {', '.join(shares)}"),
                ("rate", f"{self.gigabytes_per_second:.3g} GB/s of decoded input"),
            )
        )


@dataclass(frozen=True)
class Preparation:
    """A merge that can start: its plan, its forecast and the tiles that are missing.

    Parameters
    ----------
    existing
        What an earlier run left at the output, if anything, to go on with.
    overwrites
        Whether whatever is at the output is replaced.
    stale
        Tiles that it did, of which there is more to merge now.
    """

    plan: MergePlan
    output: str
    forecast: Forecast
    existing: fmt.MergedAttributes | None
    missing: "Tiles"
    stale: "Tiles"
    overwrites: bool = False


class Tiles(Sequence[tuple[int, int]]):
    """Rows and columns of some tiles of a grid, in eight bytes each.

    Parameters
    ----------
    n_columns
        Of the grid.
    numbers
        Of the tiles, counted row by row.
    """

    def __init__(self, n_columns: int, numbers: NDArray[np.int64]) -> None:
        self._n_columns, self._numbers = n_columns, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> "Tiles": ...
    def __getitem__(self, index: int | slice) -> "tuple[int, int] | Tiles":
        if isinstance(index, slice):
            return Tiles(self._n_columns, self._numbers[index])
        return divmod(int(self._numbers[index]), self._n_columns)


def prepare(
    inputs: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    options: MergeOptions,
    device: DeviceChoice = ON_CPU,
) -> Preparation:
    """Plan a merge and find out what an interrupted run has done already; writes nothing.

    Raises
    ------
    OcelotError
        As :func:`ocelot_em.merge.plan.make_plan`; and :class:`OutputExistsError` where something
        else is at the output.
    """
    objects = open_objects(output)
    found = _existing_output(objects)  # also refuses to overwrite what is no merged result
    existing = None if options.overwrite else found
    if existing is not None and options.tile_size is None:
        # The tile size was chosen by the run that is resumed.
        earlier = tile_size_of(read_plan(existing, objects.url))
        options = options.model_copy(update={"tile_size": earlier})
    plan = make_plan(inputs, output, options, device)
    done = np.zeros(plan.grid.counts, np.bool_)
    stale = np.zeros(plan.grid.counts, np.bool_)
    if existing is not None:
        earlier_plan = read_plan(existing, objects.url)
        differences = plan_differences(earlier_plan, plan)
        if differences:
            raise OutputExistsError(
                f"{objects.url}: is already there, from another merge: {'; '.join(differences)}; "
                "choose another output, or --overwrite to replace it"
            )
        for tile in tiles_changed(earlier_plan, plan):
            stale[tile.iy, tile.ix] = True
        # What an early version left unfinished has no records, without which it cannot be finished.
        if existing.state == "complete" or records.has_records(objects, earlier_plan):
            done = done_tiles(objects, plan.grid) & ~stale
    n_columns = plan.grid.counts[1]
    missing = Tiles(n_columns, np.flatnonzero(~done))
    n_done = len(plan.grid) - len(missing)
    prediction = forecast(plan, output, options, n_done, device)
    return Preparation(
        plan,
        objects.url,
        prediction,
        existing,
        missing,
        Tiles(n_columns, np.flatnonzero(stale)),
        options.overwrite,
    )


def confirm(ready: Preparation, lock: OutputLock) -> Preparation:
    """Look again, now that nobody else writes, at what an earlier run has done.

    Returns
    -------
    Preparation
        With all tiles as missing that are marked as done but are not on the disk, after a machine
        lost its power.

    Raises
    ------
    OutputExistsError
        Another run has changed the output since the merge was planned.
    """
    objects = open_objects(ready.output)
    there = None if ready.overwrites else _existing_output(objects)
    if not ready.overwrites and there != ready.existing:
        raise OutputExistsError(
            f"{objects.url}: another run has changed it meanwhile; run the same command again"
        )
    if there is None or there.state == "complete" or not lock.power_was_lost:
        return ready
    earlier = read_plan(there, objects.url)
    done = done_tiles(objects, earlier.grid)
    torn = _torn_tiles(objects, earlier, Tiles(earlier.grid.counts[1], np.flatnonzero(done)))
    for iy, ix in torn:
        log.warning("tile (%d, %d) did not reach the disk, and is merged again", iy, ix)
        objects.delete(mark_of(iy, ix))
        done[iy, ix] = False
    if torn:
        missing = ready.plan.grid.counts[1], np.flatnonzero(~done)
        n_done = len(ready.plan.grid) - len(missing[1])
        ready = replace(
            ready, missing=Tiles(*missing), forecast=replace(ready.forecast, n_done=n_done)
        )
    return ready


class Tally:
    """Counts how tiles end.

    Parameters
    ----------
    on_outcome
        Is told, too.
    give_up
        Called when nothing but failures come.
    """

    def __init__(self, on_outcome: Callable[[Outcome], None], give_up: Callable[[], None]) -> None:
        self._on_outcome, self._give_up = on_outcome, give_up
        self._in_a_row = 0
        self.totals = TileSummary(*(0 for _ in SUMMARY_FIELDS))
        self.n_merged = 0
        self.failed: dict[tuple[int, int], Outcome] = {}
        self.has_given_up = False

    def count(self, outcome: Outcome) -> None:
        """Count a tile, which may have failed before."""
        where = outcome.iy, outcome.ix
        if outcome.summary is None:
            self.failed[where] = outcome
            self._in_a_row += 1
            log.error("tile (%d, %d): %s", *where, outcome.error)
        else:
            self.failed.pop(where, None)
            self.totals = _sum(self.totals, outcome.summary)
            self.n_merged += 1
            self._in_a_row = 0
        self._on_outcome(outcome)
        if self._in_a_row == MAX_FAILURES_IN_A_ROW:
            self.has_given_up = True
            self._give_up()

    def may_pass(self, n_columns: int) -> "Tiles":
        """Tiles that are worth another try."""
        numbers = [iy * n_columns + ix for (iy, ix), end in self.failed.items() if end.may_pass]
        return Tiles(n_columns, np.array(sorted(numbers), np.int64))

    def in_words(self) -> str:
        """Name the tiles that failed."""
        shown = [
            f"\n  - tile ({end.iy}, {end.ix}): {end.error}"
            for end in islice(self.failed.values(), MAX_FAILURES_SHOWN)
        ]
        more = len(self.failed) - len(shown)
        return "".join(shown) + (f"\n  ... and {more} more" if more else "")


def merge(
    ready: Preparation,
    options: MergeOptions,
    executor: Executor,
    lock: OutputLock,
    on_outcome: Callable[[Outcome], None],
    compiling: Compiling | None = None,
) -> MergeReport:
    """Merge all missing tiles, and mark the output complete.

    Tiles that fail for a reason that may pass are tried again when all others are done. Where tiles
    run in this process, ``compiling`` is told if kernels have to be compiled first.

    Raises
    ------
    TilesFailedError
        Naming the tiles that failed; all others are done, and a later run does only these.
    StoppedError
        The lock was told to stop, or was lost; or there is nothing left to run tiles on. Tiles that
        were in hand are done.
    """
    started = time.perf_counter()
    objects = open_objects(ready.output)
    attributes = _create_output(objects, ready, options)
    tally = Tally(on_outcome, lock.stop)
    tiles = ready.missing
    on_device = ready.forecast.partials_on_device
    work = Work(objects.url, attributes.id, lock.key, lock.id, on_device)
    compile_seconds = 0.0
    try:
        if tiles and compiling is not None:
            with suppress(Exception):  # the tiles will say what is wrong
                compile_seconds = open_job(work, compiling).compile_seconds
        for _ in range(1 + TRIED_AGAIN):
            if tiles and not lock.stopping.is_set():
                executor.run(work, tiles, tally.count, lock.stopping)
                tiles = tally.may_pass(ready.plan.grid.counts[1])
    finally:
        _open_job.cache_clear()  # gives this process's tile buffers back
    if n_left := len(ready.missing) - tally.n_merged:
        raise _unfinished(ready, lock, tally, n_left)
    if attributes.state != "complete":
        records.finish(objects, ready.plan)
        objects.tidy("")
        objects.sync()  # so that what is called complete stays complete
        finished = attributes.model_copy(update={"state": "complete", "finished": now()})
        store.update_attributes(objects, "", fmt.dump_attributes(finished))
    return MergeReport(
        output=objects.url,
        n_tiles=len(ready.plan.grid),
        n_merged=tally.n_merged,
        seconds=time.perf_counter() - started - compile_seconds,
        totals=tally.totals,
        compile_seconds=compile_seconds,
    )


def _unfinished(
    ready: Preparation, lock: OutputLock, tally: Tally, n_left: int
) -> StoppedError | TilesFailedError:
    """Say why tiles are left."""
    n_tiles, n_failed = len(ready.plan.grid), len(tally.failed)
    if lock.lost.is_set():
        return StoppedError(
            f"{ready.output}: another run has taken the output over, because this one did not "
            f"touch its lock for {STALE_SECONDS:.0f} s; {n_left} of {n_tiles} tiles were left"
        )
    if lock.stopping.is_set() and not tally.has_given_up:
        return StoppedError(
            f"{ready.output}: stopped; {n_left} of {n_tiles} tiles are left, the others are done "
            f"and kept; the same command goes on{tally.in_words()}"
        )
    given_up = n_left - n_failed
    stopped = f"; {given_up} more were not tried" if given_up else ""
    return TilesFailedError(
        f"{ready.output}: {n_failed} of {n_tiles} tiles failed{stopped}; the others are done and "
        f"kept; mend the cause and run the same command again:{tally.in_words()}"
    )


def attempt_tiles(work: Work, tiles: Sequence[tuple[int, int]]) -> list[Outcome]:
    """Merge some tiles of a prepared output; never raises, so that the other tiles go on.

    Of tiles that were not begun, because the run has ended or is being stopped, nothing is told.
    This is the task that workers run. It takes names only: the worker reads the plan from the
    output, once.
    """
    try:
        job = open_job(work)
        outcomes = list(merge_tiles(job, [job.plan.grid.at(iy, ix) for iy, ix in tiles]))
    except Exception as error:
        log.debug("tiles from %s on failed", tiles[0], exc_info=True)
        outcomes = [_failure(iy, ix, error) for iy, ix in tiles]
    where = f"{socket.gethostname()}:{os.getpid()}"
    return [replace(outcome, where=where) for outcome in outcomes]


def merge_tiles(job: "Job", tiles: Sequence[Tile]) -> Iterator[Outcome]:
    """Merge tiles one after another: one is folded while the next is read and the last written."""
    with (
        ReadAhead(job.requests(tiles), job.streams_in, job.chunk_memory()) as incoming,
        WriteBehind(job.streams_out) as outgoing,
    ):
        last: TileInWork | None = None
        for tile in tiles:
            if not job.goes_on:
                break
            current = TileInWork(job, tile, incoming, outgoing)
            current.merge()
            if last is not None:
                yield last.finish()
            last = current
        if last is not None:
            yield last.finish()


class TileInWork:
    """A tile between storage and memory; see :class:`ocelot_em.merge.fold.TileMaps`.

    Parameters
    ----------
    job
        The merge it belongs to.
    tile
        Which one.
    incoming, outgoing
        Chunks on their way.
    """

    def __init__(self, job: "Job", tile: Tile, incoming: ReadAhead, outgoing: WriteBehind) -> None:
        self.job, self._tile, self._incoming, self._outgoing = job, tile, incoming, outgoing
        self._clock = Clock()
        self._written: list[Future[None]] = []
        self._searched_pixels = self._read_nbytes = self._written_nbytes = 0
        self._error: Exception | None = None

    def merge(self) -> None:
        """Merge the tile and have its maps written, soon; an error is kept for :meth:`finish`."""
        waited, nbytes = self._waited(), self._incoming.read_nbytes
        try:
            self._merge()
        except Exception as error:
            log.debug("%s failed", self._tile, exc_info=True)
            self._error = error
            self._incoming.close()  # what it had open when it failed
        self._clock.lap("fold")
        self._clock.seconds["waited"] += self._waited() - waited
        self._read_nbytes = self._incoming.read_nbytes - nbytes

    def _merge(self) -> None:
        """Merge every exposure that touches the tile, and lay what comes out on the canvas."""
        job, tile, pieces = self.job, self._tile, self.job.plan.pieces(self._tile)
        if not pieces:
            self._write_blank()
            return
        if covers_alone(pieces, tile):
            self._merge_alone(pieces[0])
            return
        canvas = job.laid(tile, pieces, self._merge_piece)
        for name, values in canvas.maps():
            self.write(name, values)
        for piece in pieces:
            shown = canvas.shown(job.plan.exposures[piece.exposure].number, piece.within)
            self._keep_shown(piece, shown)

    def _merge_piece(self, piece: Piece, write: Callable[[str, AnyArray], None]) -> None:
        """Merge the partials of one exposure."""
        opened = self.job.opened(piece)
        work = self.job.workspace(piece.region.shape)
        collection = self.job.collection(piece)
        inside = PieceInWork(self, piece, collection, write)
        self._searched_pixels += opened.fold.merge(inside, work)
        if collection is not None:
            self._clock.lap("fold")
            number = opened.layout.number_of(self._tile.iy, self._tile.ix)
            for key, parts in records.encode_records(opened.layout, collection, number):
                self._put(key, parts)
            self._clock.lap("write")

    def _merge_alone(self, piece: Piece) -> None:
        """Merge the one exposure of the tile, whose maps need no canvas."""
        if not self.job.plan.is_montage:
            self._merge_piece(piece, self.write)
            return

        def write(name: str, values: AnyArray) -> None:
            self.write(name, values)
            if name == SCALED_MIP:
                self._keep_shown(piece, shown_alone(values))

        self._merge_piece(piece, write)
        number = self.job.plan.exposures[piece.exposure].number
        self.write(SOURCE_EXPOSURE, np.full(self._tile.region.shape, number, np.int32))

    def _write_blank(self) -> None:
        """Write a tile where nothing lies."""
        for name, target in self.job.written.items():
            for chunk in target.grid.touching(self._tile.region):
                self._put(target.key(chunk), self.job.blank_chunk(name))

    def _keep_shown(self, piece: Piece, shown: Float64) -> None:
        layout = self.job.opened(piece).layout
        number = layout.number_of(self._tile.iy, self._tile.ix)
        self._put(*records.encode_shown(layout, shown, number))

    def _put(self, key: str, parts: Sequence[bytes]) -> None:
        self._written_nbytes += sum(map(len, parts))
        self._written.append(self.job.put_behind(self._outgoing, key, parts))

    def finish(self) -> Outcome:
        """Wait until everything is written, and mark the tile as done."""
        tile, seconds = self._tile, self._clock.seconds
        self._clock.lap("elsewhere")
        waited = self._waited()
        try:
            self._outgoing.wait(self._written)
            if self._error is not None:
                return _failure(tile.iy, tile.ix, self._error)
            self._clock.lap("write")
            summary = TileSummary(
                pixels=tile.region.size,
                searched_pixels=self._searched_pixels,
                read_seconds=seconds["read"],
                fold_seconds=seconds["fold"],
                write_seconds=seconds["write"],
                waited_seconds=seconds["waited"] + self._waited() - waited,
                read_nbytes=self._read_nbytes,
                decoded_nbytes=self.job.decoded_nbytes(tile),
                written_nbytes=self._written_nbytes,
            )
            self.job.mark_done(tile, summary)
        except Exception as error:
            log.debug("%s failed", tile, exc_info=True)
            return _failure(tile.iy, tile.ix, self._error or error)
        return Outcome(tile.iy, tile.ix, summary)

    def open(self, piece: Piece, number: int, name: str, spare: str) -> "TimedArrival":
        """Wait for a map of a source."""
        self._clock.lap("fold")
        request = self.job.opened(piece).request(self._tile, piece, number, name)
        memory = self.job.workspace(piece.region.shape).array(spare, request.source.dtype)
        arrival = self._incoming.open(request, memory)
        self._clock.lap("read")
        return TimedArrival(arrival, self._clock)

    def close(self) -> None:
        """Be done with the maps that are open."""
        self._incoming.close()

    def write(self, name: str, values: AnyArray) -> None:
        """Encode a map of the tile."""
        self._clock.lap("fold")
        target = self.job.written[name]
        for chunk, parts in target.encode(self._tile.region, values):
            self._written_nbytes += sum(map(len, parts))
            self._written.append(self._outgoing.put(target.objects, target.key(chunk), parts))
        self._clock.lap("write")

    def _waited(self) -> float:
        return self._incoming.waited_seconds + self._outgoing.waited_seconds


class PieceInWork:
    """What an exposure has of a tile; see :class:`ocelot_em.merge.fold.TileMaps`.

    Parameters
    ----------
    tile
        Which reads and writes for it.
    piece
        Which part of the exposure.
    collection
        Where its statistics are collected.
    write
        Takes its merged maps.
    """

    def __init__(
        self,
        tile: "TileInWork | TileInMemory",
        piece: Piece,
        collection: Collection | None,
        write: Callable[[str, AnyArray], None],
    ) -> None:
        self._tile, self._piece, self.collection, self.write = tile, piece, collection, write
        self._looked_at: set[int] = set()

    def open(self, number: int, name: str, spare: str) -> "TimedArrival | Arrival":
        """Wait for a map of a source."""
        return self._tile.open(self._piece, number, name, spare)

    def close(self) -> None:
        """Be done with the maps that are open."""
        self._tile.close()

    def look_closer(self, number: int) -> None:
        """Raise if a source really has values that cannot be merged."""
        if number not in self._looked_at:
            self._tile.job.opened(self._piece).look_closer(self._piece.region, number)
            self._looked_at.add(number)


def covers_alone(pieces: Sequence[Piece], tile: Tile) -> bool:
    """Whether one exposure has all pixels of a tile, and no other has any."""
    return len(pieces) == 1 and pieces[0].within.shape == tile.region.shape


class TimedArrival:
    """A map that has arrived, whose decoding counts as reading."""

    def __init__(self, arrival: Arrival, clock: "Clock") -> None:
        self._arrival, self._clock = arrival, clock
        self.dtype, self.n_parts = arrival.dtype, arrival.n_parts

    def decode(self, part: int, n_parts: int, out: AnyArray) -> None:
        """Decode a part."""
        self._clock.lap("fold")
        self._arrival.decode(part, n_parts, out)
        self._clock.lap("read")


class TileInMemory:
    """A tile whose merged maps stay in memory."""

    def __init__(self, job: "Job", tile: Tile) -> None:
        self.job, self._tile = job, tile
        self._work = Workspace(tile.region.size)
        self._merged: dict[str, AnyArray] = {}

    def merge(self) -> dict[str, AnyArray]:
        """Return the merged maps.

        Raises
        ------
        OcelotError
            A chunk cannot be read, or holds what cannot be merged.
        """
        job, tile, pieces = self.job, self._tile, self.job.plan.pieces(self._tile)
        if covers_alone(pieces, tile):
            self._merge_piece(pieces[0], self._keep)
            number = job.plan.exposures[pieces[0].exposure].number
            self._merged[SOURCE_EXPOSURE] = np.full(tile.region.shape, number, np.int32)
        else:
            for name, values in job.laid(tile, pieces, self._merge_piece).maps():
                self._keep(name, values)
        return {name: self._merged[name] for name in job.plan.maps.merged}

    def _merge_piece(self, piece: Piece, write: Callable[[str, AnyArray], None]) -> None:
        self._work.shape = piece.region.shape
        self.job.opened(piece).fold.merge(PieceInWork(self, piece, None, write), self._work)

    def open(self, piece: Piece, number: int, name: str, spare: str) -> Arrival:
        """Read a map of a source."""
        request = self.job.opened(piece).request(self._tile, piece, number, name)
        out = self._work.array(spare, request.source.dtype)
        request.source.read(request.region, out)
        return Arrival(request, None, None, out)

    def close(self) -> None:
        """Nothing is kept open."""

    def _keep(self, name: str, values: AnyArray) -> None:
        self._merged[name] = values.copy()


class OpenedExposure:
    """An exposure as a worker sees it: everything opened that its pieces need.

    Parameters
    ----------
    plan
        The merge.
    exposure
        Which one of it.
    space
        The search space of indexed poses.
    lanes
        The device on which it is merged, with its memory; None: the CPU.
    """

    def __init__(
        self,
        plan: MergePlan,
        exposure: PlannedExposure,
        space: SearchSpace | None,
        lanes: Lanes | None,
    ) -> None:
        self._plan, self._exposure, self._space = plan, exposure, space
        maps, mask_nan = plan.maps_of_exposure, plan.nan == "mask"
        self._maps = [open_source_maps(source, maps, exposure.shape) for source in exposure.sources]
        self.fold: Fold | DeviceFold = Fold(exposure.sources, maps, space, mask_nan=mask_nan)
        if lanes is not None:
            self.fold = DeviceFold(exposure.sources, maps, space, mask_nan=mask_nan, lanes=lanes)
        self.layout = records.Layout.of(plan, exposure)
        self.decoded_nbytes_per_pixel = sum(
            chunked.dtype.itemsize for maps in self._maps for chunked in maps.values()
        )

    def request(self, tile: Tile, piece: Piece, number: int, name: str) -> Request:
        """Name a map of a source in a piece of a tile, for reading."""
        source = self._maps[number][name]
        return Request((tile.iy, tile.ix, piece.exposure, number, name), source, piece.region)

    def dtype_of(self, number: int, name: str) -> "np.dtype[np.generic]":
        """Type of the values of a map of a source."""
        return self._maps[number][name].dtype

    def requests(self, tile: Tile, piece: Piece) -> Iterator[Request]:
        """All that a piece reads, in order."""
        return (self.request(tile, piece, number, name) for number, name in self.fold.order())

    def look_closer(self, region: Region, number: int) -> None:
        """Raise if a source has NaN or an invalid index in a region: by map, with the first pixel.

        Raises
        ------
        InvalidDataError
        """
        maps = {name: chunked.read(region)[0] for name, chunked in self._maps[number].items()}
        info = SearchInfo(search_space=self._space, has_pixel_size=self._plan.maps.pixel_size)
        place = self._exposure.sources[number].place
        wanted = {name: maps[name] for name in info.maps.partial}
        if problems := value_problems(wanted, region, info, place):
            hint = "use nan='mask' (--nan mask) to leave the partial out at pixels with NaN"
            raise InvalidDataError(f"pixels {region}: {'; '.join(problems)}; {hint}")


MOST_OPENED = 64
"""Exposures that a worker has open; more are opened again when they are needed again."""


class Job:
    """A merge as a worker sees it: the plan, and everything opened that its tiles need.

    Parameters
    ----------
    plan
        Which exposures, which tiles.
    objects
        The prepared output; None to merge without writing.
    work
        As the task names it.
    """

    def __init__(self, plan: MergePlan, objects: Objects | None, work: Work | None = None) -> None:
        self.plan = plan
        partials_on_device = 0 if work is None else work.partials_on_device
        self._leave = None
        if objects is not None and work is not None and work.lock:
            self._leave = Leave(objects, work.lock, work.holder)
        first = plan.exposures[0].sources[0]
        self._space = read_search_space(open_objects(first.url), plan.search_space_digest)
        self._lanes = None
        if partials_on_device:
            dtype = open_one(first, SUM).dtype.name
            self._lanes = Lanes(open_device(), plan.maps_of_exposure, partials_on_device, dtype)
        self._objects = objects
        self.written = (
            {} if objects is None else open_partial_maps(objects, "", "", plan.maps.merged)
        )
        urls = {source.url for source in plan.sources}
        self.streams_in = max(open_objects(url).streams for url in urls)
        self.streams_out = 1 if objects is None else objects.streams
        self._of_thread = threading.local()
        self._blank: dict[str, list[bytes]] = {}
        self._opened: OrderedDict[int, OpenedExposure] = OrderedDict()
        self._opening = threading.Lock()
        self._is_compiled = False
        self.compile_seconds = 0.0

    @property
    def goes_on(self) -> bool:
        """Whether another tile may be begun."""
        return self._leave is None or self._leave.goes_on

    def opened(self, piece: Piece) -> OpenedExposure:
        """Return the exposure of a piece, opened; the last ones that were used are kept."""
        with self._opening:
            found = self._opened.get(piece.exposure)
            if found is None:
                exposure = self.plan.exposures[piece.exposure]
                found = OpenedExposure(self.plan, exposure, self._space, self._lanes)
                self._opened[piece.exposure] = found
                if len(self._opened) > MOST_OPENED:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(piece.exposure)
            return found

    def compile(self, watcher: Compiling) -> None:
        """Have the kernels at hand, so that no tile's time is that of compiling them."""
        if self._is_compiled:
            return
        self._is_compiled = True
        if self._lanes is None:  # most of those of a GPU are others
            exposure = self.plan.exposures[0]
            opened = self.opened(Piece(0, exposure.region, exposure.region))
            self.compile_seconds = compile_kernels(
                self.plan, exposure, self._space, opened.dtype_of, watcher
            )

    def requests(self, tiles: Sequence[Tile]) -> Iterator[Request]:
        """All that some tiles read, in order."""
        for tile in tiles:
            for piece in self.plan.pieces(tile):
                # The tile in hand is not to blame for an exposure that a later one needs; that one
                # will say what is wrong.
                with suppress(OcelotError):
                    yield from self.opened(piece).requests(tile, piece)

    def decoded_nbytes(self, tile: Tile) -> int:
        """Decoded bytes that a tile reads."""
        return sum(
            self.opened(piece).decoded_nbytes_per_pixel * piece.region.size
            for piece in self.plan.pieces(tile)
        )

    def laid(
        self,
        tile: Tile,
        pieces: Sequence[Piece],
        merge: Callable[[Piece, Callable[[str, AnyArray], None]], None],
    ) -> Canvas:
        """Return this thread's canvas with all pieces of a tile, as ``merge`` writes their maps."""
        if not hasattr(self._of_thread, "canvas"):
            most_pixels = self.plan.tile[0] * self.plan.tile[1]
            self._of_thread.canvas = Canvas(self.plan.maps, self.plan.overlap, most_pixels)
        canvas: Canvas = self._of_thread.canvas
        canvas.begin(tile.region.shape, [piece.within for piece in pieces])
        for piece in pieces:
            exposure = self.plan.exposures[piece.exposure]
            canvas.lay(exposure.number, piece.within, (piece.region, exposure.region))
            merge(piece, canvas.put)
        return canvas

    def workspace(self, shape: tuple[int, int]) -> Workspace:
        """Return this thread's memory, laid out for a piece of this shape."""
        if not hasattr(self._of_thread, "workspace"):
            self._of_thread.workspace = Workspace(self.plan.tile[0] * self.plan.tile[1])
        work: Workspace = self._of_thread.workspace
        work.shape = shape
        return work

    def collection(self, piece: Piece) -> Collection | None:
        """Return this thread's place for statistics and candidates, for a piece."""
        if not hasattr(self._of_thread, "collection"):
            self._of_thread.collection = records.new_collection(self.plan)
        collection: Collection | None = self._of_thread.collection
        if collection is not None:
            collection.begin(piece.region, self.opened(piece).layout.counting)
        return collection

    def chunk_memory(self) -> Sequence[ReusedMemory]:
        """Return this thread's memory for encoded chunks."""
        if not hasattr(self._of_thread, "chunks"):
            n_chunks = chunks_ahead(self.streams_in)
            self._of_thread.chunks = [ReusedMemory() for _ in range(n_chunks)]
        chunks: Sequence[ReusedMemory] = self._of_thread.chunks
        return chunks

    def blank_chunk(self, name: str) -> list[bytes]:
        """Return the encoded chunk of a map where nothing lies; made once."""
        if name not in self._blank:
            self._blank[name] = self.written[name].encode_blank()
        return self._blank[name]

    def put_behind(self, outgoing: WriteBehind, key: str, parts: Sequence[bytes]) -> "Future[None]":
        """Write an object of the output, soon."""
        assert self._objects is not None
        return outgoing.put(self._objects, key, parts)

    def mark_done(self, tile: Tile, summary: TileSummary) -> None:
        """Record that a tile is written; comes after its last chunk."""
        assert self._objects is not None
        values = np.array([[[getattr(summary, name) for name in SUMMARY_FIELDS]]], np.float64)
        store.write_chunk(self._objects, f"{mark_of(tile.iy, tile.ix)}/0", values)


def mark_of(iy: int, ix: int) -> str:
    """Where the done-mark of a tile is."""
    return f"{fmt.TILE_SUMMARY}/c/{iy}/{ix}"


def open_job(work: Work, watcher: Compiling | None = None) -> Job:
    """Open a prepared output once per process; the run's id keeps old ones from being taken."""
    with _opening:
        job = _open_job(work)
        with suppress(OcelotError):  # of the first exposure, which other tiles may not need
            job.compile(watcher or Logged())
        return job


_opening = threading.Lock()


@lru_cache(maxsize=1)
def _open_job(work: Work) -> Job:
    objects = open_objects(work.output)
    attributes = read_attributes(objects)
    if not isinstance(attributes, fmt.MergedAttributes) or attributes.id != work.run_id:
        raise StoreNotFoundError(
            f"{work.output}: expected the output of run {work.run_id[:8]}, got something else; "
            "workers must see the same storage as the driver"
        )
    return Job(read_plan(attributes, work.output), objects, work)


def _create_output(
    objects: Objects, ready: Preparation, options: MergeOptions
) -> fmt.MergedAttributes:
    """Write all metadata of the output; only this driver does, workers fill in chunks."""
    plan = ready.plan
    attributes = ready.existing
    if attributes is None:
        if options.overwrite:
            objects.delete("", keep=LOCK_FOLDER)
        attributes = _attributes_of(ready, options)
        if not store.create_group(objects, "", fmt.dump_attributes(attributes)):
            raise OutputExistsError(f"{objects.url}: another run has just created it")
    elif ready.stale:
        # Whoever reads now, or goes on after a crash, finds an unfinished merge without marks at
        # tiles that are not what they will be.
        unfinished = attributes.model_copy(update={"state": "writing", "finished": None})
        store.update_attributes(objects, "", fmt.dump_attributes(unfinished))
        for iy, ix in ready.stale:
            objects.delete(mark_of(iy, ix))
        attributes = _attributes_of(ready, options)
        store.update_attributes(objects, "", fmt.dump_attributes(attributes))
    elif attributes.state == "complete":
        return attributes
    for name in plan.maps.merged:
        store.create_map(objects, name, name, plan.shape, plan.chunk)
    if plan.search_space_digest is not None:
        first = open_objects(plan.sources[0].url)
        space = read_search_space(first, plan.search_space_digest)
        if space is not None:
            write_search_space(objects, space)
    store.create_group(objects, fmt.TILE_SUMMARY.partition("/")[0], {})
    records.create_records(objects, plan)
    store.create_array(
        objects,
        fmt.TILE_SUMMARY,
        shape=(*plan.grid.counts, len(SUMMARY_FIELDS)),
        chunk=(1, 1, len(SUMMARY_FIELDS)),
        dtype="float64",
        fill=float("nan"),
        dimensions=("tile_y", "tile_x", "field"),
        attributes={"fields": list(SUMMARY_FIELDS)},
    )
    objects.sync()
    return attributes


def _attributes_of(ready: Preparation, options: MergeOptions) -> fmt.MergedAttributes:
    """What an output that nothing is written of yet says of itself."""
    plan, device = ready.plan, ready.forecast.device
    return fmt.MergedAttributes(
        format_version=fmt.FORMAT_VERSION,
        kind="merged",
        id=uuid.uuid4().hex,
        state="writing",
        shape=plan.shape,
        valid_shape=plan.valid_shape,
        exposures=plan.merged_exposures(),
        canvas_origin=plan.canvas_origin,
        pixel_size_angstrom=plan.pixel_size_angstrom,
        pose_form=plan.pose_form,
        has_pixel_size=plan.has_pixel_size,
        has_counts=plan.has_counts,
        has_decoded_poses=plan.has_decoded_poses,
        search_space_digest=plan.search_space_digest,
        total_projections=plan.total_projections,
        partials=plan.contributions,
        plan=plan.model_dump(mode="json"),
        provenance=provenance(
            inputs=list(dict.fromkeys(source.url for source in plan.sources)),
            options=options.model_dump(mode="json")
            | {"device": device.kind, "device_reason": device.reason},
        ),
    )


def _existing_output(objects: Objects) -> fmt.MergedAttributes | None:
    """Read what an earlier run left at the output; None if there is nothing."""
    try:
        attributes = read_attributes(objects)
    except StoreNotFoundError:
        if any(not key.startswith(f"{LOCK_FOLDER}/") for key in objects.sizes("")):
            raise OutputExistsError(
                f"{objects.url}: expected nothing or a merged result, got other files; choose "
                "another output"
            ) from None
        return None
    if not isinstance(attributes, fmt.MergedAttributes):
        raise OutputExistsError(
            f"{objects.url}: is a search, not a merged result; choose another output"
        )
    return attributes


def done_tiles(objects: Objects, grid: TileGrid) -> NDArray[np.bool_]:
    """Which tiles are marked as done, by row and column; other files there are ignored."""
    done = np.zeros(grid.counts, np.bool_)
    prefix = f"{fmt.TILE_SUMMARY}/c/"
    for key in objects.keys(prefix.rstrip("/")):
        record = key.removeprefix(prefix).split("/")
        if len(record) == 3 and all(part.isdecimal() for part in record):
            with suppress(IndexError):
                done[int(record[0]), int(record[1])] = True
    return done


def _torn_tiles(objects: Objects, plan: MergePlan, tiles: Tiles) -> list[tuple[int, int]]:
    """Which of some tiles are marked as done but cannot be read."""
    maps = open_partial_maps(objects, "", "", plan.maps.merged)
    layouts = [records.Layout.of(plan, exposure) for exposure in plan.exposures]

    def is_torn(where: tuple[int, int]) -> bool:
        tile, memory = plan.grid.at(*where), ReusedMemory()
        try:
            for chunked in maps.values():
                for chunk in chunked.grid.touching(tile.region):
                    chunked.fetch(chunk, memory)
            for piece in plan.pieces(tile):
                layout = layouts[piece.exposure]
                layout.check(objects, layout.number_of(*where))
        except ChunkError:
            return True
        return False

    with ThreadPoolExecutor() as pool:
        found = pool.map(is_torn, tiles)
        return [where for where, torn in zip(tiles, found, strict=True) if torn]


def _sum(one: TileSummary, other: TileSummary) -> TileSummary:
    added = {name: getattr(one, name) + getattr(other, name) for name in SUMMARY_FIELDS}
    return replace(one, **added)


def _failure(iy: int, ix: int, error: Exception) -> Outcome:
    in_data = isinstance(error, (InvalidInputError, FormatError))
    return Outcome(iy, ix, None, f"{type(error).__name__}: {error}", may_pass=not in_data)


class Clock:
    """Adds up the seconds between calls, by what they were spent on."""

    def __init__(self) -> None:
        names = "read", "fold", "write", "waited", "elsewhere"
        self.seconds = dict.fromkeys(names, 0.0)
        self._last = time.perf_counter()

    def lap(self, what: str) -> None:
        """Book the time since the last call."""
        now = time.perf_counter()
        self.seconds[what] += now - self._last
        self._last = now
