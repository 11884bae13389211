"""Preparation of an output, new or of an interrupted merge that is resumed, and its completion."""

import logging
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from os import PathLike
from typing import Any

import numpy as np

from ocelot_em.errors import (
    ChunkError,
    FormatError,
    IncompleteError,
    InvalidInputError,
    OcelotError,
    OutputExistsError,
    StoreNotFoundError,
)
from ocelot_em.merge.forecast import Forecast, forecast
from ocelot_em.merge.grouping import write_own_spaces
from ocelot_em.merge.marks import (
    ResultChecksums,
    create_marks,
    delete_marks,
    done_tiles,
    pack_result,
    require_appendable,
    require_marks,
    require_packed,
    verified,
)
from ocelot_em.merge.memory_model import ON_CPU, DeviceChoice
from ocelot_em.merge.outcome import Outcome, TileChecksums, Tiles
from ocelot_em.merge.plan import (
    REPEATED,
    MergePlan,
    changed_tiles,
    plan_differences,
    read_plan,
    tile_size_of,
)
from ocelot_em.merge.planning import make_plan
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats import layout as layout_module
from ocelot_em.merge.stats import records, summary
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.model.threads import map_in_threads
from ocelot_em.store import arrays as store
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants, groups
from ocelot_em.store.contract import Objects, at_once
from ocelot_em.store.creation import now, provenance, write_search_space
from ocelot_em.store.distinct import require_no_store_within
from ocelot_em.store.fence import FOLDER as LOCK_FOLDER
from ocelot_em.store.fence import HeldObjects, was_being_replaced
from ocelot_em.store.manifest import ArrayManifest, Manifest, write_manifest
from ocelot_em.store.objects import Stores, normalise_url, open_objects, snapshots
from ocelot_em.store.search import MapGroup, read_attributes, read_search_space
from ocelot_em.store.sources import check_unchanged, prefetch_search

log = logging.getLogger(__name__)

MIN_NBYTES_IN_SHARDS = 16 * 2**20
"""Decoded size of a map from which on results are in shards, if one process merges them."""

PIXEL_NBYTES = 4
"""Decoded size of a pixel of most maps."""


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
    checksums
        Checksums of the tiles that earlier runs have written, and that were verified.
    """

    plan: MergePlan
    output: str
    forecast: Forecast
    existing: fmt.MergedAttributes | None
    missing: Tiles
    stale: Tiles
    overwrites: bool = False
    checksums: Mapping[tuple[int, int], TileChecksums] = field(default_factory=dict)


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
    with snapshots() as stores:
        return _prepared(inputs, output, options, device, stores)


def _prepared(
    inputs: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    options: MergeOptions,
    device: DeviceChoice,
    stores: Stores,
) -> PreparedMerge:
    objects = open_objects(output)

    def prefetch_inputs() -> None:
        with suppress(OcelotError):  # the plan reports it, unless the output is refused
            for url in map(normalise_url, inputs):
                prefetch_search(stores(url))

    # The first also raises if there is something else to overwrite.
    actions: list[Callable[[], Any]] = [
        partial(_existing_output, objects, options.overwrite),
        prefetch_inputs,
    ]
    found = at_once(objects, actions)[0]
    existing = None if options.overwrite else found
    earlier = None if existing is None else read_plan(existing, objects.url)
    if earlier is not None and options.tile_size is None:
        # The tile size was chosen by the run that is resumed.
        options = options.model_copy(update={"tile_size": tile_size_of(earlier)})
    plan = make_plan(inputs, output, options, device, stores)
    if found is not None and found.id in {source.id for source in plan.sources}:
        raise InvalidInputError(
            f"{objects.url}: is also an input, under another name; choose another output"
        )
    if options.overwrite:
        require_no_store_within(objects)
    is_large = prod(plan.shape) * PIXEL_NBYTES >= MIN_NBYTES_IN_SHARDS
    in_shards = is_large and objects.can_append and options.cluster == "threads"
    plan = plan.model_copy(update={"identity": uuid.uuid4().hex, "in_shards": in_shards})
    done = np.zeros(plan.grid.counts, np.bool_)
    stale = np.zeros(plan.grid.counts, np.bool_)
    if existing is not None and earlier is not None:
        kept = {"identity": earlier.identity, "in_shards": earlier.in_shards}
        plan = plan.model_copy(update=kept)
        is_update = _is_interim(existing, earlier) and _is_of(earlier, plan)
        if differences := plan_differences(earlier, plan, is_update=is_update):
            raise OutputExistsError(
                f"{objects.url}: already exists, from another merge: {'; '.join(differences)}; "
                "choose another output, or --overwrite to replace it"
            )
        for tile in changed_tiles(earlier, plan):
            stale[tile.iy, tile.ix] = True
        # An unfinished merge of an early version has no records and cannot be resumed.
        if existing.state == "complete" or records.has_records(objects, earlier):
            done = done_tiles(objects, plan.grid) & ~stale
    if not done.all():
        require_appendable(objects, plan)
    n_columns = plan.grid.counts[1]
    return PreparedMerge(
        plan,
        objects.url,
        forecast(plan, output, options, int(done.sum()), device, stores),
        existing,
        missing=Tiles(n_columns, np.flatnonzero(~done)),
        stale=Tiles(n_columns, np.flatnonzero(stale)),
        overwrites=options.overwrite,
    )


def _is_interim(existing: fmt.MergedAttributes, plan: MergePlan) -> bool:
    """Whether an output is of a search that was incomplete, as far as is known."""
    if plan.progress is not None:
        return not plan.progress.is_whole
    options = existing.provenance.options
    return bool(options.get("so_far") or options.get("complete_only"))


def _is_of(earlier: MergePlan, plan: MergePlan) -> bool:
    """Whether a plan has all inputs of an earlier one, whatever has been searched since then."""
    return _searches(earlier) <= _searches(plan)


def _searches(plan: MergePlan) -> set[tuple[str, str | None]]:
    """Return the stores of a plan, with what identifies the search that was recorded there."""
    return {
        (source.url, contribution.coverage.data_sha256 if contribution.coverage else None)
        for source in plan.sources
        for contribution in source.contributions
    }


def confirm(ready: PreparedMerge, objects: Objects) -> PreparedMerge:
    """Check the existing output again, now that this run holds the lock.

    Returns
    -------
    PreparedMerge
        Tiles that are marked as done, but are not there as they were written, are now missing. If
        metadata, statistics or the manifest are damaged, the output is unfinished.

    Raises
    ------
    OutputExistsError
        Another run has changed the output since the merge was planned, or a copy in a bucket is
        damaged that is in shards.
    """
    found = _existing_output(objects, ready.overwrites)
    existing = None if ready.overwrites else found
    if not ready.overwrites and existing != ready.existing:
        raise OutputExistsError(
            f"{objects.url}: changed by another run in the meantime; run the same command again"
        )
    if existing is None:
        return ready
    plan = read_plan(existing, objects.url)
    if (problem := _damage(objects, existing, plan)) is not None:
        require_appendable(objects, plan)
        log.warning("%s; it is written again", problem)
        changes = {"state": "writing", "finished": None, "manifest": None}
        unfinished = existing.model_copy(update=changes)
        groups.update_attributes(objects, "", fmt.dump_attributes(unfinished))
        ready = replace(ready, existing=unfinished)
        _create_maps(objects, plan)
    n_columns = ready.plan.grid.counts[1]
    numbers = np.setdiff1d(np.arange(len(ready.plan.grid)), ready.missing.numbers)
    done = Tiles(n_columns, numbers)
    checksums = _verified_tiles(objects, plan, done)
    damaged = [iy * n_columns + ix for iy, ix in done if (iy, ix) not in checksums]
    if damaged:
        require_appendable(objects, plan)
        missing = Tiles(n_columns, np.union1d(ready.missing.numbers, damaged))
        prediction = replace(ready.forecast, n_done=len(ready.plan.grid) - len(missing))
        stale = Tiles(n_columns, np.union1d(ready.stale.numbers, damaged))
        ready = replace(ready, missing=missing, stale=stale, forecast=prediction)
    return replace(ready, checksums=checksums)


def create_output(
    objects: HeldObjects, ready: PreparedMerge, options: MergeOptions
) -> fmt.MergedAttributes:
    """Write all metadata of the output; only the driver does this, workers write chunks."""
    plan = ready.plan
    attributes, space = ready.existing, None
    if attributes is None:
        if options.overwrite:
            objects.set_aside()
        attributes = _attributes_of(ready, options)
        content = fmt.dump_attributes(attributes)
        steps: list[Callable[[], Any]] = [
            partial(groups.create_group, objects, "", content),
            partial(_search_space_of, plan),
        ]
        is_new, space = at_once(objects, steps)
        if not is_new:
            if not options.overwrite:
                raise OutputExistsError(f"{objects.url}: was just created by another run")
            groups.replace_attributes(objects, "", content)
        objects.delete_replaced()
    elif ready.stale or (ready.missing and attributes.state == "complete"):
        # A reader, or a run resumed after a crash, must see an unfinished merge without done-marks
        # of stale tiles.
        unfinished = attributes.model_copy(update={"state": "writing", "finished": None})
        groups.update_attributes(objects, "", fmt.dump_attributes(unfinished))
        delete_marks(objects, ready.plan, ready.stale)
        attributes = _attributes_of(ready, options)
        groups.update_attributes(objects, "", fmt.dump_attributes(attributes))
    elif attributes.state == "complete":
        return attributes
    elif read_plan(attributes, objects.url) != plan:  # the inputs were moved
        attributes = attributes.model_copy(update={"plan": plan.model_dump(mode="json")})
        groups.update_attributes(objects, "", fmt.dump_attributes(attributes))
    if ready.existing is not None and plan.in_shards:
        pack_result(objects, plan, ready.missing)
    space = space or _search_space_of(plan)
    steps = [
        partial(_create_maps, objects, plan),
        partial(groups.create_group, objects, constants.TILE_SUMMARY.partition("/")[0], {}),
        partial(records.create_records, objects, plan),
        partial(create_marks, objects, plan),
    ]
    if space is not None:
        steps.append(partial(write_search_space, objects, space))
    at_once(objects, steps)
    write_own_spaces(objects, plan)
    objects.sync()
    return attributes


def _search_space_of(plan: MergePlan) -> SearchSpace | None:
    """Read the search space that all inputs share, or that of the first group."""
    return read_search_space(open_objects(plan.sources[0].url), plan.search_space_digest)


class Gathered:
    """What a run knows of all tiles that it has merged, when they are done.

    Parameters
    ----------
    plan
        Plan of the merge.
    """

    def __init__(self, plan: MergePlan) -> None:
        self.checksums = ResultChecksums(plan)
        self.statistics = summary.new_totals(plan)
        self.to_read: list[tuple[int, int]] = []
        """Tiles whose statistics have to be read from their records."""

    def add(self, outcome: Outcome) -> None:
        """Add the outcome of a merged tile."""
        tile = outcome.iy, outcome.ix
        if outcome.checksums is not None:
            self.checksums.put(*tile, outcome.checksums)
        if self.statistics is not None and outcome.statistics is not None:
            self.statistics.add(outcome.statistics)
        elif self.statistics is not None:
            self.to_read.append(tile)


def complete_output(
    objects: HeldObjects,
    ready: PreparedMerge,
    attributes: fmt.MergedAttributes,
    gathered: Gathered,
) -> None:
    """Write the statistics and the manifest of an output, and mark it as complete.

    Raises
    ------
    MissingChunkError
        A tile is not marked as done here: its worker wrote elsewhere.
    InputChangedError
        An input is no longer the one that was planned, so that tiles may be of different data.
    LockLostError
        Another run has taken over the output.
    """
    plan = ready.plan
    for where, own in ready.checksums.items():
        gathered.checksums.put(*where, own)
    arrays = {
        name: ArrayManifest(store.digest_of(plan.layout(name)), table)
        for name, table in gathered.checksums.maps.items()
    }
    manifest = Manifest(attributes.id, arrays)
    objects.lease.prove()
    if plan.in_shards:
        pack_result(objects, plan)
    to_read = [*ready.checksums, *gathered.to_read]
    steps: list[Callable[[], Any]] = [
        partial(summary.finish, objects, plan, gathered.statistics, to_read),
        partial(_check_inputs, plan),
        partial(require_marks, objects, plan),
        partial(write_manifest, objects, "", manifest),
    ]
    at_once(objects, steps)
    objects.tidy("")
    objects.sync()  # data must be on disk before the output is marked complete
    changes = {"format_version": constants.FORMAT_VERSION, "manifest": manifest.digest}
    changes |= {"state": "complete", "finished": now()}
    finished = attributes.model_copy(update=changes)
    objects.lease.prove()
    groups.replace_attributes(objects, "", fmt.dump_attributes(finished))


def _check_inputs(plan: MergePlan) -> None:
    """Raise ``InputChangedError`` if an input is no longer the one that was planned."""
    # Of a running partial, only the planned checkpoint was read; there may be later ones.
    final = [source for source in plan.sources if not source.manifest_folder]
    n_threads = max((open_objects(source.url).requests or 0 for source in final), default=0)
    deque(map_in_threads(check_unchanged, final, n_threads or None), maxlen=0)


def _attributes_of(ready: PreparedMerge, options: MergeOptions) -> fmt.MergedAttributes:
    """Return the attributes of a new output."""
    plan, device = ready.plan, ready.forecast.device
    return fmt.MergedAttributes(
        format_version=constants.FORMAT_VERSION,
        kind="merged",
        id=uuid.uuid4().hex,
        state="writing",
        **{name: getattr(plan, name) for name in REPEATED},
        exposures=plan.merged_exposures(),
        total_projections=plan.total_projections,
        partials=plan.contributions,
        plan=plan.model_dump(mode="json"),
        provenance=provenance(
            inputs=list(dict.fromkeys(source.url for source in plan.sources)),
            options=options.model_dump(mode="json")
            | {"device": device.kind, "device_reason": device.reason},
        ),
    )


def _existing_output(objects: Objects, overwrites: bool) -> fmt.MergedAttributes | None:
    """Read the attributes of an existing merged result; None if there is nothing to keep."""

    def has_others() -> bool:
        return any(not key.startswith(f"{LOCK_FOLDER}/") for key in objects.keys(""))

    with objects.snapshot() as known:
        may_exist = True
        if known.requests is not None:  # usually there is nothing
            reads: list[Callable[[], Any]] = [has_others, partial(known.prefetch, ["zarr.json"])]
            may_exist = at_once(known, reads)[0]
        attributes, problem = None, None
        try:
            attributes = read_attributes(known)
        except (StoreNotFoundError, FormatError) as error:
            problem = error
    if problem is not None:
        found = objects.sizes("") if may_exist else {}
        others = [key for key in found if not key.startswith(f"{LOCK_FOLDER}/")]
        if not others or was_being_replaced(objects):
            return None
        if not any(key.startswith(f"{constants.TILE_SUMMARY}/") for key in others):
            if isinstance(problem, FormatError):
                raise problem
            raise OutputExistsError(
                f"{objects.url}: expected nothing or a merged result, got other files; choose "
                "another output"
            )
        if overwrites:
            return None
        raise OutputExistsError(
            f"{objects.url}: the metadata of this merged result, zarr.json, cannot be read "
            f"({problem}); restore that file, or merge again with --overwrite"
        )
    if not isinstance(attributes, fmt.MergedAttributes):
        raise OutputExistsError(
            f"{objects.url}: is a search, not a merged result; choose another output"
        )
    return attributes


def _create_maps(objects: Objects, plan: MergePlan) -> None:
    """Write the metadata of all maps, keeping existing chunks."""
    layouts = [(name, plan.layout(name)) for name in plan.maps.merged]
    at_once(objects, [partial(store.create_array, objects, *layout) for layout in layouts])


def _damage(
    objects: Objects, attributes: fmt.MergedAttributes, plan: MergePlan
) -> OcelotError | None:
    """Return what is wrong with the metadata, manifest or statistics of an existing output."""
    try:
        if attributes.state == "complete":  # so that readers look into the shards only
            require_packed(objects, plan)
        if attributes.manifest is None:
            MapGroup(objects).open(plan.maps.merged, plan.shape)
        else:
            merged = MergedResult(objects, attributes)
            _ = merged.maps, merged.search_spaces, merged.summary
            deque(map_in_threads(merged.summary_of, plan.exposures), maxlen=0)
    except (FormatError, ChunkError, IncompleteError, StoreNotFoundError) as error:
        return error
    return None


def _verified_tiles(
    objects: Objects, plan: MergePlan, tiles: Tiles
) -> dict[tuple[int, int], TileChecksums]:
    """Read all that is written of done tiles; return the checksums of those that are intact."""
    if not len(tiles):
        return {}
    maps = MapGroup(objects).open(plan.maps.merged)
    layouts = [layout_module.Layout.of(plan, exposure) for exposure in plan.exposures]

    def verify(where: tuple[int, int]) -> TileChecksums | None:
        tile = plan.grid.at(*where)
        try:
            checksums = verified(objects, plan, tile, maps)
            for piece in plan.pieces(tile):
                layout = layouts[piece.exposure]
                layout.check(objects, layout.number_of(*where))
        except ChunkError as error:
            log.warning("tile (%d, %d) is merged again: %s", *where, error)
            return None
        return checksums

    found = zip(tiles, map_in_threads(verify, tiles), strict=True)
    return {where: checksums for where, checksums in found if checksums is not None}
