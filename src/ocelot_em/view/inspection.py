"""Description and validation of a store."""

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, repeat
from os import PathLike

import numpy as np

from ocelot_em.errors import OcelotError
from ocelot_em.merge.marks import done_tiles, require_packed
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats.records import record_problems
from ocelot_em.model.control_groups import n_cpus
from ocelot_em.model.maps import BEST_PARTIAL, INDEX, MIP, NOT_SEARCHED, AnyArray
from ocelot_em.model.regions import Region
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.model.text import count_text, partial_text, shape_text
from ocelot_em.model.threads import map_in_threads
from ocelot_em.store import attributes as fmt
from ocelot_em.store import search as searches
from ocelot_em.store.arrays import ChunkedMap
from ocelot_em.store.constants import FIRST_SEALED_VERSION
from ocelot_em.store.contract import Objects, join
from ocelot_em.store.correlations import n_rows, open_table
from ocelot_em.store.objects import open_objects
from ocelot_em.store.progress import (
    SearchProgress,
    combined,
    overlap_problems,
    progress_of_partials,
)
from ocelot_em.store.roster import exposure_problems, read_roster, roster_problems
from ocelot_em.store.search_info import SearchInfo
from ocelot_em.store.sources import prefetch_partials, prefetch_search
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
    stored_nbytes
        Total size of all objects in bytes.
    partials
        Name, state and number of projections of each partial of a search, or of each input of a
        merged result (all complete). In a montage, names start with the exposure's id and a slash.
        The state of partials that are only on the search's list is ``missing``.
    exposures
        Exposures, if the store has several.
    without_manifest
        Complete partials, or the result, that have no manifest, as in format versions 1 and 2.
    tiles_done, n_tiles
        Progress of a merge; 0 for a search.
    merged
        The merged result, if it is one and finished.
    progress
        How much has been searched; None if the partials do not state their orientations.
    correlation_tables
        Name of each partial of a search that has a correlation table, its threshold and number of
        rows.
    with_counts
        Names of the partials with a map of counts; ``partials`` has an upper bound of each.

    Examples
    --------
    >>> from ocelot_em import describe
    >>> about = describe("MERGED.zarr")
    >>> about.tiles_done, about.n_tiles
    (4, 4)
    >>> about.partials[0]
    ('device_0', 'complete', 8242560)
    >>> about
    <merged result ...MERGED.zarr: 245 × 345 valid pixels, 3 partials, 4 of 4 tiles done>
    """

    url: str
    attributes: fmt.SearchAttributes | fmt.MergedAttributes
    stored_nbytes: int
    partials: tuple[tuple[str, str, int], ...]
    exposures: tuple[fmt.ExposureAttributes | fmt.MergedExposure, ...]
    without_manifest: tuple[str, ...]
    tiles_done: int = 0
    n_tiles: int = 0
    merged: MergedResult | None = field(default=None, repr=False, compare=False)
    progress: SearchProgress | None = None
    correlation_tables: tuple[tuple[str, float, int], ...] = ()
    with_counts: tuple[str, ...] = ()

    def __repr__(self) -> str:
        is_search = isinstance(self.attributes, fmt.SearchAttributes)
        valid = self.attributes.valid_shape
        facts = [
            *([f"{shape_text(valid)} valid pixels"] if valid else []),
            *([count_text(len(self.exposures), "exposure")] if self.exposures else []),
            count_text(len(self.partials), "partial"),
            *([] if is_search else [f"{self.tiles_done} of {self.n_tiles} tiles done"]),
        ]
        kind = "search" if is_search else "merged result"
        return f"<{kind} {self.url}: {', '.join(facts)}>"

    @property
    def unfinished_text(self) -> str:
        """Which partials were never finished, and what to do; empty without any."""
        names = [name for name, state, _ in self.partials if state in ("writing", "missing")]
        if not names:
            return ""
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        return (
            f"{len(names)} of {count_text(len(self.partials), 'partial')}: {shown}; unless they "
            "are being written, run the command that writes them again, such as the same ocelot "
            "import, or merge without them (--without NAME)"
        )


def describe(store: str | PathLike[str]) -> StoreInfo:
    """Read the description of a store; no map is read.

    Raises
    ------
    StoreNotFoundError, FormatError

    Examples
    --------
    >>> from ocelot_em import describe
    >>> describe("SEARCH.zarr").attributes.shape
    (300, 400)
    """
    objects = open_objects(store)
    with objects.snapshot() as known:
        return _description(objects, known)


def _description(objects: Objects, known: Objects) -> StoreInfo:
    prefetch_search(known)
    attributes = searches.read_attributes(known)
    about = partial(StoreInfo, objects.url, attributes, sum(objects.sizes("").values()))
    if isinstance(attributes, fmt.SearchAttributes):
        exposures = searches.read_exposures(known, attributes)
        prefetch_partials(known, exposures, lists=True)
        found = [(own.id, searches.read_partials(known, own.id)) for own in exposures]
        read = [(partial_text(owner, name), own) for owner, owns in found for name, own in owns]
        missing = [
            (partial_text(owner, name), "missing", 0)
            for owner, owns in found
            for name in read_roster(known, owner, len(owns)).keys() - dict(owns).keys()
        ]
        return about(
            (*((name, own.state, own.total_projections) for name, own in read), *sorted(missing)),
            tuple(exposures) if attributes.has_exposures else (),
            tuple(name for name, own in read if own.state == "complete" and own.manifest is None),
            progress=combined([progress_of_partials(owns) for _, owns in found]),
            with_counts=tuple(name for name, own in read if own.has_counts),
            correlation_tables=tuple(
                (partial_text(owner, name), own.correlation_threshold, n_rows(known, path))
                for owner, owns in found
                for name, own in owns
                if own.correlation_threshold is not None and own.is_readable
                for path in [join(searches.partial_path(name, owner), own.folder)]
            ),
        )
    owners = [exposure.id for exposure in attributes.exposures for _ in range(exposure.n_partials)]
    result, is_complete = MergedResult(objects, attributes), attributes.state == "complete"
    grid = result.plan.grid
    return about(
        tuple(
            (partial_text(owner, own.name), "complete", own.total_projections)
            for owner, own in zip(owners or repeat(""), attributes.partials, strict=False)
        ),
        attributes.exposures,
        (objects.url,) if is_complete and attributes.manifest is None else (),
        tiles_done=int(done_tiles(objects, grid).sum()),
        n_tiles=len(grid),
        merged=result if is_complete else None,
        progress=result.plan.progress,
        with_counts=tuple(
            partial_text(exposure.id, source.name)
            for exposure in result.plan.exposures
            for source in exposure.sources
            if source.is_counted_by_pixel
        ),
    )


def check(
    store: str | PathLike[str], on_progress: Callable[[float], None] | None = None
) -> list[str]:
    """Read a whole store and report all problems.

    Checks the metadata, that every chunk exists and holds the bytes that were written, that no
    partial has NaN or an index outside the search space, that partials and merges are finished, and
    that counts add up. Returns one sentence per problem, for the first :data:`MAX_PROBLEMS`.
    ``on_progress`` is called with the finished fraction, 0 to 1.

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
        attributes = searches.read_attributes(objects)
    except OcelotError as error:
        yield str(error)
        return
    spaces: dict[int, SearchSpace | None] = {0: None}
    try:
        if isinstance(attributes, fmt.MergedAttributes):
            spaces = MergedResult(objects, attributes).search_spaces
        else:
            spaces = {0: searches.read_search_space(objects, attributes.search_space_digest)}
    except OcelotError as error:
        yield str(error)
    groups: list[tuple[searches.MapGroup, tuple[int, int]]] = []
    try:
        if isinstance(attributes, fmt.MergedAttributes):
            yield from _merge_problems(objects, attributes)
            groups.append((searches.open_result(objects, attributes), attributes.shape))
        else:
            exposures = searches.read_exposures(objects, attributes)
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
    infos = {
        number: SearchInfo(search_space=space, has_pixel_size=attributes.has_pixel_size)
        for number, space in spaces.items()
    }
    without_manifest += [opened.place for opened, _ in groups if opened.manifest is None]
    for number, (group, shape) in enumerate(groups, 1):
        yield from _group_problems(group, shape, attributes, infos)
        yield from _table_problems(group, next(iter(spaces.values())))
        if on_progress is not None:
            on_progress(number / len(groups))


def _search_problems(
    objects: Objects, exposure: fmt.ExposureAttributes, *, has_roster: bool
) -> tuple[list[str], list[searches.MapGroup]]:
    """Return problems of the partials' attributes, and the maps of those that can be read."""
    problems, complete, total = list[str](), list[searches.MapGroup](), 0
    names = searches.partial_names(objects, exposure.id)
    place = f"{objects.url}: exposure {exposure.id!r}" if exposure.id else objects.url
    found: dict[str, fmt.PartialAttributes | None] = dict.fromkeys(names)
    for name in names:
        try:
            found[name] = own = searches.read_partial_attributes(objects, name, exposure.id)
            if own.state == "complete":
                total += own.total_projections
            if own.is_readable:
                complete.append(searches.open_partial(objects, name, exposure.id, own))
            if own.state == "writing":
                problems.append(f"{place}: partial {name!r} was never finished")
        except OcelotError as error:
            problems.append(str(error))
    known = [(name, own) for name, own in found.items() if own is not None]
    searched = progress_of_partials(known)
    if searched is not None and not searched.is_whole:
        problems.append(f"{place}: the search is incomplete: {searched.text}")
    problems += overlap_problems(
        (f"{place}: partial {name!r}", own.coverage) for name, own in known
    )
    if has_roster:
        problems += roster_problems(objects, exposure.id, found)
    what, who = ("exposure", "exposure") if exposure.id else ("search", "root")
    if not names:
        problems.append(f"{place}: the {what} has no partials")
    if total != exposure.total_projections:
        problems.append(
            f"{place}: total_projections: the partials add up to {total}, the {who} has "
            f"{exposure.total_projections}; a writer died just before its end"
        )
    return problems, complete


def _merge_problems(objects: Objects, attributes: fmt.MergedAttributes) -> Iterator[str]:
    done = "0 of 0"
    try:
        plan = MergedResult(objects, attributes).plan
        done = f"{int(done_tiles(objects, plan.grid).sum())} of {len(plan.grid)}"
        if attributes.state == "complete":
            yield from record_problems(objects, plan)
            require_packed(objects, plan)
    except OcelotError as error:
        yield str(error)
    if attributes.state != "complete":
        yield (
            f"{objects.url}: the merge was never finished: {done} tiles are done; run the command "
            "that made it again"
        )
    total = sum(own.total_projections for own in attributes.partials)
    if total != attributes.total_projections:
        yield (
            f"{objects.url}: total_projections: its partials add up to {total}, the root has "
            f"{attributes.total_projections}"
        )


def _group_problems(
    opened: searches.MapGroup,
    shape: tuple[int, int],
    attributes: fmt.SearchAttributes | fmt.MergedAttributes,
    infos: Mapping[int, SearchInfo],
) -> Iterator[str]:
    """Yield all problems of a group of maps, chunk by chunk; ``infos`` are by exposure number."""
    merged = attributes if isinstance(attributes, fmt.MergedAttributes) else None
    own_maps = replace(attributes.maps, counts=opened.has_counts)
    keys = attributes.maps.merged if merged else own_maps.partial
    maps: dict[str, ChunkedMap] = {}
    for key in keys:
        try:
            chunked = opened.open((key,), shape)[key]
        except OcelotError as error:
            yield str(error)
            continue
        if wrong := searches.chunk_problem(chunked, next(iter(maps.values()), chunked)):
            yield wrong
        else:
            maps[key] = chunked
    if not maps:
        return
    first = next(iter(maps.values()))
    grid = first.grid
    # One is enough where all exposures have one search space.
    several = len({info.search_space for info in infos.values()}) > 1
    distinct = infos if several else dict([next(iter(infos.items()))])

    def at_chunk(region: Region) -> list[str]:
        found, arrays = [], {}
        for key, chunked in maps.items():
            try:
                arrays[key], _ = chunked.read(region)
            except OcelotError as error:
                found.append(str(error))
        place = first.place.rpartition(": ")[0]
        for number, info in distinct.items():
            own = arrays
            if merged and merged.maps.source in arrays:
                shown = arrays[merged.maps.source]
                is_other = shown != number if len(distinct) > 1 else shown == NOT_SEARCHED
                own = _as_unsearched(arrays, is_other)
            if set(info.maps.partial) <= set(arrays):
                found += value_problems(own, region, info, place, opened.total_projections)
        if merged and BEST_PARTIAL in arrays:
            numbers = arrays[BEST_PARTIAL]
            n = max((e.n_partials for e in merged.exposures), default=len(merged.partials))
            if numbers.min() < NOT_SEARCHED or numbers.max() >= n:
                found.append(
                    f"{maps[BEST_PARTIAL].place}: expected -1 to {n - 1} for "
                    f"{count_text(n, 'partial')}, got {numbers.min()} to {numbers.max()} in "
                    f"{region}"
                )
        return found

    nbytes = sum(grid.cell[0] * grid.cell[1] * chunked.dtype.itemsize for chunked in maps.values())
    n_threads = max(min(n_cpus(), MAX_NBYTES // nbytes), 1)
    for found in map_in_threads(at_chunk, (cell.region for cell in grid), n_threads):
        yield from found


def _table_problems(group: searches.MapGroup, space: SearchSpace | None) -> Iterator[str]:
    """Yield all problems of the correlation table of a partial, if it has one."""
    try:
        table = open_table(group)
        if table is not None:
            yield from table.problems(space)
    except OcelotError as error:
        yield str(error)


def _as_unsearched(arrays: dict[str, AnyArray], which: AnyArray) -> dict[str, AnyArray]:
    """Return maps in which pixels of other groups, or of no exposure, look like unsearched ones."""
    unsearched = {MIP: -np.inf, INDEX: NOT_SEARCHED}
    return arrays | {
        name: np.where(which, unsearched.get(name, 0), values)
        for name, values in arrays.items()
        if values.dtype.kind == "f" or name == INDEX
    }
