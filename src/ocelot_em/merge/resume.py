"""PreparedMerge of an output: new, or resumed from an interrupted merge."""

import logging
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from os import PathLike

import numpy as np
from numpy.typing import NDArray

from ocelot_em.errors import ChunkError, OutputExistsError, StoreNotFoundError
from ocelot_em.merge.forecast import Forecast, forecast
from ocelot_em.merge.memory_model import ON_CPU, DeviceChoice
from ocelot_em.merge.outcome import SUMMARY_FIELDS, Tiles
from ocelot_em.merge.plan import MergePlan, changed_tiles, plan_differences, read_plan, tile_size_of
from ocelot_em.merge.planning import make_plan
from ocelot_em.merge.stats import layout as layout_module
from ocelot_em.merge.stats import records
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.regions import TileGrid
from ocelot_em.model.threads import map_in_threads
from ocelot_em.store import arrays as store
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants
from ocelot_em.store.contract import Objects, ReusedMemory
from ocelot_em.store.creation import provenance, write_search_space
from ocelot_em.store.lock import FOLDER as LOCK_FOLDER
from ocelot_em.store.lock import OutputLock
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import open_partial_maps, read_attributes, read_search_space

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedMerge:
    """A merge that can start: its plan, its forecast and the missing tiles.

    Parameters
    ----------
    existing
        Attributes of the output of an earlier run that is resumed; None if there is none.
    stale
        Tiles to merge again, because their exposures are new or have changed.
    overwrites
        Whether an existing output is replaced.
    """

    plan: MergePlan
    output: str
    forecast: Forecast
    existing: fmt.MergedAttributes | None
    missing: Tiles
    stale: Tiles
    overwrites: bool = False


def prepare(
    inputs: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    options: MergeOptions,
    device: DeviceChoice = ON_CPU,
) -> PreparedMerge:
    """Plan a merge and find the tiles that an interrupted run has done; writes nothing.

    Raises
    ------
    OcelotError
        As in :func:`ocelot_em.merge.planning.make_plan`; also :class:`OutputExistsError` if
        the output already holds something else.
    """
    objects = open_objects(output)
    found = _existing_output(objects)  # also raises if there is something else to overwrite
    existing = None if options.overwrite else found
    earlier = None if existing is None else read_plan(existing, objects.url)
    if earlier is not None and options.tile_size is None:
        # The tile size was chosen by the run that is resumed.
        options = options.model_copy(update={"tile_size": tile_size_of(earlier)})
    plan = make_plan(inputs, output, options, device)
    done = np.zeros(plan.grid.counts, np.bool_)
    stale = np.zeros(plan.grid.counts, np.bool_)
    if existing is not None and earlier is not None:
        if differences := plan_differences(earlier, plan):
            raise OutputExistsError(
                f"{objects.url}: already exists, from another merge: {'; '.join(differences)}; "
                "choose another output, or --overwrite to replace it"
            )
        for tile in changed_tiles(earlier, plan):
            stale[tile.iy, tile.ix] = True
        # An unfinished merge of an early version has no records and cannot be resumed.
        if existing.state == "complete" or records.has_records(objects, earlier):
            done = done_tiles(objects, plan.grid) & ~stale
    n_columns = plan.grid.counts[1]
    return PreparedMerge(
        plan,
        objects.url,
        forecast(plan, output, options, int(done.sum()), device),
        existing,
        missing=Tiles(n_columns, np.flatnonzero(~done)),
        stale=Tiles(n_columns, np.flatnonzero(stale)),
        overwrites=options.overwrite,
    )


def confirm(ready: PreparedMerge, lock: OutputLock) -> PreparedMerge:
    """Check the existing output again, now that this run holds the lock.

    Returns
    -------
    PreparedMerge
        After a power loss, ``missing`` also has the tiles marked as done that are not on disk.

    Raises
    ------
    OutputExistsError
        Another run has changed the output since the merge was planned.
    """
    objects = open_objects(ready.output)
    existing = None if ready.overwrites else _existing_output(objects)
    if not ready.overwrites and existing != ready.existing:
        raise OutputExistsError(
            f"{objects.url}: changed by another run in the meantime; run the same command again"
        )
    if existing is None or existing.state == "complete" or not lock.power_was_lost:
        return ready
    earlier = read_plan(existing, objects.url)
    done = done_tiles(objects, earlier.grid)
    torn = _torn_tiles(objects, earlier, Tiles(earlier.grid.counts[1], np.flatnonzero(done)))
    for iy, ix in torn:
        log.warning("tile (%d, %d) was lost in a power failure, and will be merged again", iy, ix)
        objects.delete(done_mark_path(iy, ix))
        done[iy, ix] = False
    if torn:
        missing = Tiles(done.shape[1], np.flatnonzero(~done))
        n_done = done.size - len(missing)
        ready = replace(ready, missing=missing, forecast=replace(ready.forecast, n_done=n_done))
    return ready


def done_mark_path(iy: int, ix: int) -> str:
    """Return the path of a tile's done-mark."""
    return f"{constants.TILE_SUMMARY}/c/{iy}/{ix}"


def create_output(
    objects: Objects, ready: PreparedMerge, options: MergeOptions
) -> fmt.MergedAttributes:
    """Write all metadata of the output; only the driver does this, workers write chunks."""
    plan = ready.plan
    attributes = ready.existing
    if attributes is None:
        if options.overwrite:
            objects.delete("", keep=LOCK_FOLDER)
        attributes = _attributes_of(ready, options)
        if not store.create_group(objects, "", fmt.dump_attributes(attributes)):
            raise OutputExistsError(f"{objects.url}: was just created by another run")
    elif ready.stale:
        # A reader, or a run resumed after a crash, must see an unfinished merge without done-marks
        # of stale tiles.
        unfinished = attributes.model_copy(update={"state": "writing", "finished": None})
        store.update_attributes(objects, "", fmt.dump_attributes(unfinished))
        for iy, ix in ready.stale:
            objects.delete(done_mark_path(iy, ix))
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
    store.create_group(objects, constants.TILE_SUMMARY.partition("/")[0], {})
    records.create_records(objects, plan)
    n = len(SUMMARY_FIELDS)
    summaries = store.ArrayLayout(
        shape=(*plan.grid.counts, n),
        chunk=(1, 1, n),
        dtype="float64",
        fill=float("nan"),
        dimensions=("tile_y", "tile_x", "field"),
        attributes={"fields": list(SUMMARY_FIELDS)},
    )
    store.create_array(objects, constants.TILE_SUMMARY, summaries)
    objects.sync()
    return attributes


def _attributes_of(ready: PreparedMerge, options: MergeOptions) -> fmt.MergedAttributes:
    """Return the attributes of a new output."""
    plan, device = ready.plan, ready.forecast.device
    return fmt.MergedAttributes(
        format_version=constants.FORMAT_VERSION,
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
    """Read the attributes of an existing merged result; None if there is nothing."""
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
    """Whether each tile is marked as done, by row and column; other files are ignored."""
    done = np.zeros(grid.counts, np.bool_)
    prefix = f"{constants.TILE_SUMMARY}/c/"
    for key in objects.keys(prefix.rstrip("/")):
        record = key.removeprefix(prefix).split("/")
        if len(record) == 3 and all(part.isdecimal() for part in record):
            with suppress(IndexError):
                done[int(record[0]), int(record[1])] = True
    return done


def _torn_tiles(objects: Objects, plan: MergePlan, tiles: Tiles) -> list[tuple[int, int]]:
    """Find the tiles that are marked as done but cannot be read."""
    maps = open_partial_maps(objects, "", "", plan.maps.merged)
    layouts = [layout_module.Layout.of(plan, exposure) for exposure in plan.exposures]

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

    found = map_in_threads(is_torn, tiles)
    return [where for where, torn in zip(tiles, found, strict=True) if torn]
