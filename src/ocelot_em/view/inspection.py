"""Description and validation of a store."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from os import PathLike

import numpy as np

from ocelot_em.errors import OcelotError
from ocelot_em.merge.marks import done_tiles
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats.records import record_problems
from ocelot_em.model.control_groups import n_cpus
from ocelot_em.model.maps import BEST_PARTIAL, MIP, NOT_SEARCHED, SOURCE_EXPOSURE, AnyArray
from ocelot_em.model.regions import Region
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.model.text import partial_text
from ocelot_em.model.threads import map_in_threads
from ocelot_em.store import attributes as fmt
from ocelot_em.store.arrays import ChunkedMap
from ocelot_em.store.constants import FIRST_SEALED_VERSION
from ocelot_em.store.contract import Objects
from ocelot_em.store.objects import open_objects
from ocelot_em.store.progress import (
    SearchProgress,
    combined,
    overlap_problems,
    progress_of_partials,
)
from ocelot_em.store.roster import exposure_problems, roster_problems
from ocelot_em.store.search import (
    MapGroup,
    chunk_problem,
    open_partial,
    open_result,
    partial_names,
    read_attributes,
    read_exposures,
    read_partial_attributes,
    read_partials,
    read_search_space,
)
from ocelot_em.store.search_info import SearchInfo
from ocelot_em.store.validation import value_problems


@dataclass(frozen=True)
class StoreInfo:
    """Description of a store.

    Parameters
    ----------
    url
        URL of the store.
    attributes
        Attributes of the root group.
    partials
        Name, state and number of projections of each partial of a search, or of each input of a
        merged result (all complete). In a montage, names start with the exposure's id and a slash.
    exposures
        Exposures, if the store has several.
    tiles_done, n_tiles
        Progress of a merge; 0 for a search.
    stored_nbytes
        Total size of all objects in bytes.
    merged
        The merged result, if it is one and finished.
    without_manifest
        Complete partials, or the result, that have no manifest, as in format versions 1 and 2.
    progress
        How much has been searched; None if the partials do not state their orientations.

    Examples
    --------
    >>> from ocelot_em import describe
    >>> describe("SEARCH.zarr").attributes.shape
    (300, 400)
    """

    url: str
    attributes: fmt.SearchAttributes | fmt.MergedAttributes
    partials: tuple[tuple[str, str, int], ...]
    exposures: tuple[fmt.ExposureAttributes | fmt.MergedExposure, ...]
    tiles_done: int
    n_tiles: int
    stored_nbytes: int
    merged: MergedResult | None = field(default=None, repr=False, compare=False)
    without_manifest: tuple[str, ...] = ()
    progress: SearchProgress | None = None


def describe(store: str | PathLike[str]) -> StoreInfo:
    """Read the description of a store; no map is read.

    Raises
    ------
    StoreNotFoundError, FormatError

    Examples
    --------
    >>> from ocelot_em import describe
    >>> about = describe("MERGED.zarr")
    >>> about.tiles_done, about.n_tiles
    (4, 4)
    >>> about.partials[0]
    ('device_0', 'complete', 8242560)
    """
    objects = open_objects(store)
    attributes = read_attributes(objects)
    tiles_done = n_tiles = 0
    without_manifest: tuple[str, ...] = ()
    merged: MergedResult | None = None
    exposures: tuple[fmt.ExposureAttributes | fmt.MergedExposure, ...] = ()
    if isinstance(attributes, fmt.MergedAttributes):
        exposures = attributes.exposures
        owners = [f"{e.id}/" for e in attributes.exposures for _ in range(e.n_partials)]
        partials = tuple(
            (f"{owner}{c.name}", "complete", c.total_projections)
            for owner, c in zip_longest(owners, attributes.partials, fillvalue="")
            if not isinstance(c, str)
        )
        result = MergedResult(objects, attributes)
        merged = result if attributes.state == "complete" else None
        grid = result.plan.grid
        n_tiles, tiles_done = len(grid), int(done_tiles(objects, grid).sum())
        is_bare = attributes.state == "complete" and attributes.manifest is None
        without_manifest = (objects.url,) if is_bare else ()
        progress = result.plan.progress
    else:
        found = read_exposures(objects, attributes)
        exposures = tuple(found) if attributes.has_exposures else ()
        read, searched = [], list[SearchProgress | None]()
        for exposure in found:
            own = read_partials(objects, exposure.id)
            searched.append(progress_of_partials(own))
            read += [(partial_text(exposure.id, name), partial) for name, partial in own]
        progress = combined(searched)
        partials = tuple((name, p.state, p.total_projections) for name, p in read)
        without_manifest = tuple(
            name for name, p in read if p.state == "complete" and p.manifest is None
        )
    return StoreInfo(
        url=objects.url,
        attributes=attributes,
        partials=partials,
        exposures=exposures,
        tiles_done=tiles_done,
        n_tiles=n_tiles,
        stored_nbytes=sum(objects.sizes("").values()),
        merged=merged,
        without_manifest=without_manifest,
        progress=progress,
    )


def check(
    store: str | PathLike[str], on_progress: Callable[[float], None] | None = None
) -> list[str]:
    """Read a whole store and report all problems.

    Checks the metadata, that every chunk exists and holds the bytes that were written, that no
    partial has NaN or an index outside the search space, that partials and merges are finished, and
    that counts add up.

    Parameters
    ----------
    store
        Path or URL of a search or a merged result.
    on_progress
        Called with the finished fraction, 0 to 1.

    Returns
    -------
    list of str
        One sentence per problem, empty if there are none; the first :data:`MAX_PROBLEMS` only.

    Examples
    --------
    >>> from ocelot_em import check
    >>> check("MERGED.zarr")
    []
    """
    return examine(store, on_progress)[0]


def examine(
    store: str | PathLike[str], on_progress: Callable[[float], None] | None = None
) -> tuple[list[str], list[str]]:
    """Return the problems of a store as :func:`check`, and what has no manifest."""
    objects, without_manifest = open_objects(store), list[str]()
    found = _problems(objects, on_progress, without_manifest)
    problems = list(islice(found, MAX_PROBLEMS))
    if next(found, None) is not None:
        problems.append(
            f"{objects.url}: there are more than {MAX_PROBLEMS:,} problems; the rest was not "
            "looked at"
        )
    found.close()
    return problems, without_manifest


MAX_NBYTES = 2**30
"""Maximum size of decoded chunks in memory, unless those of one region alone are larger."""

MAX_PROBLEMS = 1000
"""Maximum number of problems reported; a hostile store may declare any number of chunks."""


def _problems(
    objects: Objects, on_progress: Callable[[float], None] | None, without_manifest: list[str]
) -> Generator[str, None, None]:
    """Yield all problems of a store, and append what has no manifest to a list."""
    try:
        attributes = read_attributes(objects)
    except OcelotError as error:
        yield str(error)
        return
    space: SearchSpace | None = None
    try:
        space = read_search_space(objects, attributes.search_space_digest)
    except OcelotError as error:
        yield str(error)
    groups: list[_Group] = []
    try:
        if isinstance(attributes, fmt.MergedAttributes):
            yield from _merge_problems(objects, attributes)
            groups.append((open_result(objects, attributes), attributes.shape))
        else:
            exposures = read_exposures(objects, attributes)
            if not exposures:
                yield f"{objects.url}: the search has no exposures"
            has_roster = attributes.format_version >= FIRST_SEALED_VERSION
            if has_roster and attributes.has_exposures:
                yield from exposure_problems(objects, exposures)
            for exposure in exposures:
                found, opened = _search_problems(objects, exposure, has_roster=has_roster)
                groups += [(group, exposure.shape) for group in opened]
                yield from found
    except OcelotError as error:
        yield str(error)
    info = SearchInfo(search_space=space, has_pixel_size=attributes.has_pixel_size)
    without_manifest += [opened.place for opened, _ in groups if opened.manifest is None]
    for number, group in enumerate(groups):
        yield from _group_problems(group, attributes, info)
        if on_progress is not None:
            on_progress((number + 1) / len(groups))


_Group = tuple[MapGroup, tuple[int, int]]
"""A group of maps, and their expected shape."""


def _search_problems(
    objects: Objects, exposure: fmt.ExposureAttributes, *, has_roster: bool
) -> tuple[list[str], list[MapGroup]]:
    """Return problems of the partials' attributes, and the maps of those that can be read."""
    problems: list[str] = []
    complete: list[MapGroup] = []
    total = 0
    names = partial_names(objects, exposure.id)
    place = f"{objects.url}: exposure {exposure.id!r}" if exposure.id else objects.url
    found: dict[str, fmt.PartialAttributes | None] = dict.fromkeys(names)
    for name in names:
        try:
            found[name] = partial = read_partial_attributes(objects, name, exposure.id)
            if partial.state == "complete":
                total += partial.total_projections
            if partial.is_readable:
                complete.append(open_partial(objects, name, exposure.id, partial))
        except OcelotError as error:
            problems.append(str(error))
            continue
        if partial.state == "writing":
            problems.append(f"{place}: partial {name!r} was never finished")
    known = [(name, partial) for name, partial in found.items() if partial is not None]
    searched = progress_of_partials(known)
    if searched is not None and not searched.is_whole:
        problems.append(f"{place}: the search is incomplete: {searched.text}")
    problems += overlap_problems(
        (f"{place}: partial {name!r}", partial.coverage) for name, partial in known
    )
    if has_roster:
        problems += roster_problems(objects, exposure.id, found)
    if not names:
        what = "exposure" if exposure.id else "search"
        problems.append(f"{place}: the {what} has no partials")
    if total != exposure.total_projections:
        who = "exposure" if exposure.id else "root"
        problems.append(
            f"{place}: total_projections: the partials add up to {total}, the {who} has "
            f"{exposure.total_projections}; a writer died just before its end"
        )
    return problems, complete


def _merge_problems(objects: Objects, attributes: fmt.MergedAttributes) -> Iterator[str]:
    n_tiles = n_done = 0
    try:
        plan = MergedResult(objects, attributes).plan
        n_tiles, n_done = len(plan.grid), int(done_tiles(objects, plan.grid).sum())
        if attributes.state == "complete":
            yield from record_problems(objects, plan)
    except OcelotError as error:
        yield str(error)
    if attributes.state != "complete":
        yield (
            f"{objects.url}: the merge was never finished: {n_done} of {n_tiles} "
            "tiles are done; run the command that made it again"
        )
    total = sum(partial.total_projections for partial in attributes.partials)
    if total != attributes.total_projections:
        yield (
            f"{objects.url}: total_projections: its partials add up to {total}, the root has "
            f"{attributes.total_projections}"
        )


def _group_problems(
    group: _Group,
    attributes: fmt.SearchAttributes | fmt.MergedAttributes,
    info: SearchInfo,
) -> Iterator[str]:
    """Yield all problems of a group of maps, chunk by chunk."""
    opened, shape = group
    merged = attributes if isinstance(attributes, fmt.MergedAttributes) else None
    keys = attributes.maps.merged if merged else attributes.maps.partial
    maps: dict[str, ChunkedMap] = {}
    for key in keys:
        try:
            chunked = opened.open((key,), shape)[key]
        except OcelotError as error:
            yield str(error)
            continue
        if wrong := chunk_problem(chunked, next(iter(maps.values()), chunked)):
            yield wrong
        else:
            maps[key] = chunked
    if not maps:
        return
    grid = next(iter(maps.values())).grid

    def at_chunk(region: Region) -> list[str]:
        found, arrays = [], {}
        for key, chunked in maps.items():
            try:
                arrays[key], _ = chunked.read(region)
            except OcelotError as error:
                found.append(str(error))
        if set(info.maps.partial) <= set(arrays):
            place = next(iter(maps.values())).place.rpartition(": ")[0]
            if merged and merged.exposures:
                arrays = _blanks_as_unsearched(arrays)
            found += value_problems(arrays, region, info, place, opened.total_projections)
        if merged and BEST_PARTIAL in arrays:
            numbers, n = arrays[BEST_PARTIAL], len(merged.partials)
            if merged.exposures:
                n = max(exposure.n_partials for exposure in merged.exposures)
            if numbers.min() < NOT_SEARCHED or numbers.max() >= n:
                found.append(
                    f"{maps[BEST_PARTIAL].place}: expected -1 to {n - 1} for {n} partials, got "
                    f"{numbers.min()} to {numbers.max()} in {region}"
                )
        return found

    nbytes = sum(grid.cell[0] * grid.cell[1] * chunked.dtype.itemsize for chunked in maps.values())
    n_threads = max(min(n_cpus(), MAX_NBYTES // nbytes), 1)
    for found in map_in_threads(at_chunk, (cell.region for cell in grid), n_threads):
        yield from found


def _blanks_as_unsearched(arrays: dict[str, AnyArray]) -> dict[str, AnyArray]:
    """Return maps of a montage in which pixels without an exposure look like unsearched ones."""
    if SOURCE_EXPOSURE not in arrays:
        return arrays
    blank = arrays[SOURCE_EXPOSURE] == NOT_SEARCHED
    filled = dict(arrays)
    for name, values in arrays.items():
        if values.dtype.kind == "f":
            filled[name] = np.where(blank, -np.inf if name == MIP else 0, values)
    return filled
