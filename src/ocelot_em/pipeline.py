"""The story of a merge, read top to bottom: partials -> tiles -> merged maps.

:func:`merge` plans, prepares the output and hands every missing tile to an executor;
:func:`merge_tile` is what each of them does. Nothing here knows of threads, Dask or Zarr.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from typing import Protocol

import numpy as np

from ocelot_em import format as fmt
from ocelot_em import kernels, store
from ocelot_em.canvas import Region, Tile
from ocelot_em.errors import (
    InvalidDataError,
    OutputExistsError,
    StoreNotFoundError,
    TilesFailedError,
)
from ocelot_em.maps import (
    BEST_PARTIAL,
    COUNT,
    MAPS,
    MIP,
    SQUARED_SUM,
    SUM,
    Accumulator,
    AnyArray,
    MapSet,
)
from ocelot_em.objects import Objects, open_objects
from ocelot_em.plan import (
    Forecast,
    MergeOptions,
    MergePlan,
    forecast,
    make_plan,
    plan_differences,
    read_plan,
    tile_size_of,
)
from ocelot_em.search import (
    SearchInfo,
    SourceReader,
    now,
    open_partial_maps,
    provenance,
    read_attributes,
    read_search_space,
    value_problems,
    write_search_space,
)

log = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW = 50
"""A run whose tiles only fail is given up: the disk is full or the network is gone."""


@dataclass(frozen=True, slots=True)
class TileSummary:
    """What is known about a tile after it was written; kept in the output as its done-mark."""

    pixels: int
    searched_pixels: int
    read_seconds: float
    fold_seconds: float
    write_seconds: float
    read_nbytes: int
    decoded_nbytes: int
    written_nbytes: int


SUMMARY_FIELDS = tuple(TileSummary.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one tile ended: with a summary, or with an error in words."""

    iy: int
    ix: int
    summary: TileSummary | None
    error: str = ""


class Executor(Protocol):
    """Runs tiles somewhere: in threads here, or on a Dask cluster."""

    def run(
        self,
        output: str,
        run_id: str,
        tiles: Iterable[tuple[int, int]],
        on_outcome: Callable[[Outcome], bool],
    ) -> None:
        """Call :func:`attempt_tile` once for every tile and pass on what it returns.

        ``on_outcome`` is called in this thread; when it returns False no further tiles start.
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
        Wall-clock time of this run.
    totals
        Sums over the tiles of this run.
    """

    output: str
    n_tiles: int
    n_merged: int
    seconds: float
    totals: TileSummary

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


@dataclass(frozen=True)
class Preparation:
    """A merge that can start: its plan, its forecast and the tiles that are missing."""

    plan: MergePlan
    output: str
    forecast: Forecast
    existing: fmt.MergedAttributes | None
    missing: Sequence[tuple[int, int]]


def prepare(
    inputs: Sequence[str | PathLike[str]], output: str | PathLike[str], options: MergeOptions
) -> Preparation:
    """Plan a merge and find out what an interrupted run has done already; writes nothing.

    Raises
    ------
    OcelotError
        As :func:`ocelot_em.plan.make_plan`; and :class:`OutputExistsError` where something else is
        at the output.
    """
    objects = open_objects(output)
    found = _existing_output(objects)  # also refuses to overwrite what is no merged result
    existing = None if options.overwrite else found
    if existing is not None and options.tile_size is None:
        # The tile size was chosen by the run that is resumed.
        earlier = tile_size_of(read_plan(existing, objects.url))
        options = options.model_copy(update={"tile_size": earlier})
    plan = make_plan(inputs, output, options)
    done: set[tuple[int, int]] = set()
    if existing is not None:
        differences = plan_differences(existing.plan, plan.model_dump(mode="json"))
        if differences:
            raise OutputExistsError(
                f"{objects.url}: is already there, from another merge: {'; '.join(differences)}; "
                "choose another output, or --overwrite to replace it"
            )
        done = done_tiles(objects)
    missing = [(tile.iy, tile.ix) for tile in plan.grid if (tile.iy, tile.ix) not in done]
    prediction = forecast(plan, output, options, n_done=len(plan.grid) - len(missing))
    return Preparation(plan, objects.url, prediction, existing, missing)


def merge(
    ready: Preparation,
    options: MergeOptions,
    executor: Executor,
    on_outcome: Callable[[Outcome], None],
) -> MergeReport:
    """Merge all missing tiles, and mark the output complete.

    Raises
    ------
    TilesFailedError
        Naming the tiles that failed; all others are done, and a later run does only these.
    """
    started = time.perf_counter()
    objects = open_objects(ready.output)
    attributes = _create_output(objects, ready, options)
    summaries: list[TileSummary] = []
    failed: list[Outcome] = []
    in_a_row = 0

    def collect(outcome: Outcome) -> bool:
        nonlocal in_a_row
        if outcome.summary is None:
            failed.append(outcome)
            in_a_row += 1
            log.error("tile (%d, %d): %s", outcome.iy, outcome.ix, outcome.error)
        else:
            summaries.append(outcome.summary)
            in_a_row = 0
        on_outcome(outcome)
        return in_a_row < MAX_FAILURES_IN_A_ROW

    if ready.missing:
        try:
            executor.run(objects.url, attributes.id, ready.missing, collect)
        finally:
            _open_job.cache_clear()  # gives this process's tile buffers back
    n_left = len(ready.missing) - len(summaries)
    if n_left:
        shown = "\n".join(f"  - tile ({f.iy}, {f.ix}): {f.error}" for f in failed[:20])
        more = f"\n  ... and {len(failed) - 20} more" if len(failed) > 20 else ""
        given_up = n_left - len(failed)
        stopped = f"; {given_up} more were not tried" if given_up else ""
        raise TilesFailedError(
            f"{ready.output}: {len(failed)} of {len(ready.plan.grid)} tiles failed{stopped}; the "
            f"others are done and kept; mend the cause and run the same command again:\n"
            f"{shown}{more}"
        )
    if attributes.state != "complete":
        finished = attributes.model_copy(update={"state": "complete", "finished": now()})
        store.update_attributes(objects, "", fmt.dump_attributes(finished))
    return MergeReport(
        output=objects.url,
        n_tiles=len(ready.plan.grid),
        n_merged=len(summaries),
        seconds=time.perf_counter() - started,
        totals=_total(summaries),
    )


def attempt_tile(output: str, run_id: str, iy: int, ix: int) -> Outcome:
    """Merge one tile of a prepared output; never raises, so that the other tiles go on.

    This is the task that workers run. It takes names only: the worker reads the plan from the
    output, once.
    """
    try:
        return Outcome(iy, ix, merge_tile(_open_job(output, run_id), iy, ix))
    except Exception as error:
        log.debug("tile (%d, %d) failed", iy, ix, exc_info=True)
        return Outcome(iy, ix, None, f"{type(error).__name__}: {error}")


def merge_tile(job: "Job", iy: int, ix: int) -> TileSummary:
    """Read a tile of every partial, fold them into one, finalise, write, mark as done."""
    tile, clock = job.plan.grid.at(iy, ix), Clock()
    work = job.workspace(tile.region)
    merged, read_nbytes = merge_region(job, tile, work, clock)
    written_nbytes = sum(
        job.written[name].write(tile.region, values) for name, values in merged.items()
    )
    clock.lap("write")
    summary = TileSummary(
        pixels=tile.region.size,
        searched_pixels=int(np.count_nonzero(merged[MIP] > -np.inf)),
        read_seconds=clock.seconds["read"],
        fold_seconds=clock.seconds["fold"],
        write_seconds=clock.seconds["write"],
        read_nbytes=read_nbytes,
        decoded_nbytes=job.decoded_nbytes_per_pixel * tile.region.size,
        written_nbytes=written_nbytes,
    )
    job.mark_done(tile, summary)
    return summary


def merge_region(
    job: "Job", tile: Tile, work: "Workspace", clock: "Clock"
) -> tuple[dict[str, AnyArray], int]:
    """Fold the partials one after another; the merged maps (over ``work``) and the bytes read.

    Raises
    ------
    InvalidDataError
        NaN or an invalid index, naming partial, map and pixel.
    ChunkError
        A chunk is missing or corrupt.
    """
    accumulator = work.accumulator
    job.kernel.reset(accumulator)
    read_nbytes = 0
    for reader in job.readers:
        partial, nbytes = reader.read(tile.region, work.incoming)
        read_nbytes += nbytes
        clock.lap("read")
        if job.plan.nan == "mask":
            partial = job.kernel.mask_nan(partial)
        report = job.kernel.fold(accumulator, partial, job.space)
        clock.lap("fold")
        if report.nan_pixels or report.invalid_indices:
            raise job.explain(reader, tile)
    merged = job.kernel.finalise(accumulator, job.maps, job.space, work.outgoing)
    clock.lap("fold")
    return merged, read_nbytes


class Workspace:
    """Reused memory of one thread for one tile: accumulator, incoming and outgoing maps."""

    def __init__(self, maps: MapSet, shape: tuple[int, int]) -> None:
        size = shape[0] * shape[1]
        self._maps = maps
        self._flat: dict[tuple[str, str], AnyArray] = {}
        for name in (*maps.partial, BEST_PARTIAL):
            wide = {SUM: "float64", SQUARED_SUM: "float64"}.get(name, MAPS[name].dtypes[0])
            self._flat["accumulator", name] = np.empty(size, wide)
            self._flat["incoming", name] = np.empty(size, MAPS[name].dtypes[0])
        for name in maps.merged:
            if name not in (*maps.partial, BEST_PARTIAL) or name in (SUM, SQUARED_SUM):
                self._flat["outgoing", name] = np.empty(size, MAPS[name].dtypes[0])
        self.cut(shape)

    def cut(self, shape: tuple[int, int]) -> None:
        """Lay contiguous arrays of this shape into the memory."""
        size = shape[0] * shape[1]
        cut = {key: flat[:size].reshape(shape) for key, flat in self._flat.items()}
        self.incoming = {name: array for (use, name), array in cut.items() if use == "incoming"}
        self.outgoing = {name: array for (use, name), array in cut.items() if use == "outgoing"}
        self.accumulator = Accumulator(
            mip=cut["accumulator", "mip"],
            pose=tuple(cut["accumulator", name] for name in self._maps.pose),
            best_partial=cut["accumulator", BEST_PARTIAL],
            correlation_sum=cut["accumulator", SUM],
            correlation_squared_sum=cut["accumulator", SQUARED_SUM],
            count_map=cut["accumulator", COUNT] if self._maps.counts else None,
        )


class Job:
    """A merge as a worker sees it: the plan, and everything opened that its tiles need.

    Parameters
    ----------
    plan
        Which sources, which tiles.
    objects
        The prepared output; None to merge without writing.
    kernel
        What does the arithmetic.
    """

    def __init__(self, plan: MergePlan, objects: Objects | None, kernel: kernels.Kernels) -> None:
        self.plan, self.maps, self.kernel = plan, plan.maps, kernel
        self.readers = [SourceReader(source, plan.maps) for source in plan.sources]
        first = open_objects(plan.sources[0].url)
        self.space = read_search_space(first, plan.search_space_digest)
        self.decoded_nbytes_per_pixel = sum(
            chunked.dtype.itemsize for reader in self.readers for chunked in reader.maps.values()
        )
        self._objects = objects
        self.written = (
            {} if objects is None else open_partial_maps(objects, "", "", plan.maps.merged)
        )
        self._of_thread = threading.local()

    def workspace(self, region: Region) -> Workspace:
        """Return this thread's memory, laid out for a region."""
        if not hasattr(self._of_thread, "workspace"):
            self._of_thread.workspace = Workspace(self.maps, self.plan.tile)
        work: Workspace = self._of_thread.workspace
        work.cut(region.shape)
        return work

    def explain(self, reader: SourceReader, tile: Tile) -> InvalidDataError:
        """Say what a kernel did not like in a partial: map by map, with the first pixel."""
        partial, _ = reader.read(tile.region, {})
        names = (*self.maps.pose, SUM, SQUARED_SUM)
        values = (*partial.pose, partial.correlation_sum, partial.correlation_squared_sum)
        maps = {MIP: partial.mip, **dict(zip(names, values, strict=True))}
        info = SearchInfo(search_space=self.space, has_pixel_size=self.maps.pixel_size)
        problems = value_problems(maps, tile.region, info, reader.source.place)
        hint = "use nan='mask' (--nan mask) to leave the partial out at pixels with NaN"
        return InvalidDataError(f"{tile}: {'; '.join(problems)}; {hint}")

    def mark_done(self, tile: Tile, summary: TileSummary) -> None:
        """Record that a tile is written; comes after its last chunk."""
        assert self._objects is not None
        values = np.array([[[getattr(summary, name) for name in SUMMARY_FIELDS]]], np.float64)
        store.write_chunk(self._objects, f"{fmt.TILE_SUMMARY}/c/{tile.iy}/{tile.ix}/0", values)


@lru_cache(maxsize=1)
def _open_job(output: str, run_id: str) -> Job:
    """Open a prepared output once per process; the run's id keeps old ones from being taken."""
    objects = open_objects(output)
    attributes = read_attributes(objects)
    if not isinstance(attributes, fmt.MergedAttributes) or attributes.id != run_id:
        raise StoreNotFoundError(
            f"{output}: expected the output of run {run_id[:8]}, got something else; workers must "
            "see the same storage as the driver"
        )
    plan = read_plan(attributes, output)
    return Job(plan, objects, kernels.load("cpu"))


def _create_output(
    objects: Objects, ready: Preparation, options: MergeOptions
) -> fmt.MergedAttributes:
    """Write all metadata of the output; only this driver does, workers fill in chunks."""
    plan = ready.plan
    attributes = ready.existing
    if attributes is None:
        if options.overwrite:
            objects.delete("")
        attributes = fmt.MergedAttributes(
            format_version=fmt.FORMAT_VERSION,
            kind="merged",
            id=uuid.uuid4().hex,
            state="writing",
            shape=plan.shape,
            valid_shape=plan.valid_shape,
            pixel_size_angstrom=plan.pixel_size_angstrom,
            pose_form=plan.pose_form,
            has_pixel_size=plan.has_pixel_size,
            has_counts=plan.has_counts,
            search_space_digest=plan.search_space_digest,
            total_projections=plan.total_projections,
            partials=plan.contributions,
            plan=plan.model_dump(mode="json"),
            provenance=provenance(
                inputs=list(dict.fromkeys(source.url for source in plan.sources)),
                options=options.model_dump(mode="json"),
            ),
        )
        if not store.create_group(objects, "", fmt.dump_attributes(attributes)):
            raise OutputExistsError(f"{objects.url}: another run has just created it")
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
    return attributes


def _existing_output(objects: Objects) -> fmt.MergedAttributes | None:
    """Read what an earlier run left at the output; None if there is nothing."""
    try:
        attributes = read_attributes(objects)
    except StoreNotFoundError:
        if objects.sizes(""):
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


def done_tiles(objects: Objects) -> set[tuple[int, int]]:
    """Rows and columns of the tiles that are marked as done; other files there are ignored."""
    prefix = f"{fmt.TILE_SUMMARY}/c/"
    records = (key.removeprefix(prefix).split("/") for key in objects.sizes(prefix.rstrip("/")))
    return {
        (int(record[0]), int(record[1]))
        for record in records
        if len(record) == 3 and all(part.isdecimal() for part in record)
    }


def _total(summaries: Sequence[TileSummary]) -> TileSummary:
    return TileSummary(*(sum(getattr(s, name) for s in summaries) for name in SUMMARY_FIELDS))


class Clock:
    """Adds up the seconds between calls, by what they were spent on."""

    def __init__(self) -> None:
        self.seconds = {"read": 0.0, "fold": 0.0, "write": 0.0}
        self._last = time.perf_counter()

    def lap(self, what: str) -> None:
        """Book the time since the last call."""
        now = time.perf_counter()
        self.seconds[what] += now - self._last
        self._last = now
