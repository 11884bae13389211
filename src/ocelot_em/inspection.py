"""What a store is, and everything that is wrong with it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike

from ocelot_em import format as fmt
from ocelot_em.canvas import Region
from ocelot_em.errors import FormatError, OcelotError
from ocelot_em.maps import BEST_PARTIAL, NOT_SEARCHED
from ocelot_em.objects import Objects, open_objects
from ocelot_em.pipeline import done_tiles
from ocelot_em.plan import read_plan
from ocelot_em.records import record_problems
from ocelot_em.search import (
    SearchInfo,
    open_partial_maps,
    partial_names,
    partial_path,
    read_attributes,
    read_partial_attributes,
    read_partials,
    read_search_space,
    value_problems,
)
from ocelot_em.search_space import SearchSpace
from ocelot_em.store import ChunkedMap


@dataclass(frozen=True)
class StoreInfo:
    """What a store says of itself.

    Parameters
    ----------
    url
        Where it is.
    attributes
        Of its root.
    partials
        Of a search: name, state, count. Of a merged result: what
        went into it, all complete.
    tiles_done, n_tiles
        Progress of a merge; 0 for a search.
    stored_nbytes
        Size of all its objects.
    """

    url: str
    attributes: fmt.SearchAttributes | fmt.MergedAttributes
    partials: tuple[tuple[str, str, int], ...]
    tiles_done: int
    n_tiles: int
    stored_nbytes: int


def describe(store: str | PathLike[str]) -> StoreInfo:
    """Read what a store says of itself; reads no maps.

    Raises
    ------
    StoreNotFoundError, FormatError
    """
    objects = open_objects(store)
    attributes = read_attributes(objects)
    tiles_done = n_tiles = 0
    if isinstance(attributes, fmt.MergedAttributes):
        partials = tuple((c.name, "complete", c.total_projections) for c in attributes.partials)
        grid = read_plan(attributes, objects.url).grid
        n_tiles, tiles_done = len(grid), int(done_tiles(objects, grid).sum())
    else:
        partials = tuple((name, p.state, p.total_projections) for name, p in read_partials(objects))
    return StoreInfo(
        url=objects.url,
        attributes=attributes,
        partials=partials,
        tiles_done=tiles_done,
        n_tiles=n_tiles,
        stored_nbytes=sum(objects.sizes("").values()),
    )


def check(
    store: str | PathLike[str], on_progress: Callable[[float], None] | None = None
) -> list[str]:
    """Read a whole store and name everything that is wrong with it.

    Checked are the metadata, that every chunk is there and holds the bytes that were written, that
    no partial has NaN or an index outside the search space, that partials and merges are finished,
    and that counts add up.

    Parameters
    ----------
    store
        Path or URL of a search or a merged result.
    on_progress
        Called with the share done, 0 to 1.

    Returns
    -------
    list of str
        One sentence per problem; empty if there is none.
    """
    objects = open_objects(store)
    try:
        attributes = read_attributes(objects)
    except OcelotError as error:
        return [str(error)]
    problems: list[str] = []
    space: SearchSpace | None = None
    try:
        space = read_search_space(objects, attributes.search_space_digest)
    except OcelotError as error:
        problems.append(str(error))
    groups: list[tuple[str, str]] = []
    if isinstance(attributes, fmt.MergedAttributes):
        problems += _merge_problems(objects, attributes)
        groups.append(("", ""))
    else:
        found, names = _search_problems(objects, attributes)
        problems += found
        groups += [(partial_path(name), name) for name in names]
    info = SearchInfo(search_space=space, has_pixel_size=attributes.has_pixel_size)
    for number, (path, name) in enumerate(groups):
        problems += _group_problems(objects, path, name, attributes, info)
        if on_progress is not None:
            on_progress((number + 1) / len(groups))
    return problems


def _search_problems(
    objects: Objects, attributes: fmt.SearchAttributes
) -> tuple[list[str], list[str]]:
    """Problems of the partials' attributes, and names of the partials whose maps can be read."""
    problems: list[str] = []
    complete: dict[str, int] = {}
    names = partial_names(objects)
    for name in names:
        try:
            partial = read_partial_attributes(objects, name)
        except OcelotError as error:
            problems.append(str(error))
            continue
        if partial.state == "complete":
            complete[name] = partial.total_projections
        else:
            problems.append(f"{objects.url}: partial {name!r} was never finished")
    if not names:
        problems.append(f"{objects.url}: the search has no partials")
    total = sum(complete.values())
    if total != attributes.total_projections:
        problems.append(
            f"{objects.url}: total_projections: the partials add up to {total}, the root says "
            f"{attributes.total_projections}; a writer died just before its end"
        )
    return problems, list(complete)


def _merge_problems(objects: Objects, attributes: fmt.MergedAttributes) -> list[str]:
    problems: list[str] = []
    n_tiles = n_done = 0
    try:
        plan = read_plan(attributes, objects.url)
        n_tiles, n_done = len(plan.grid), int(done_tiles(objects, plan.grid).sum())
        if attributes.state == "complete":
            problems += record_problems(objects, plan)
    except FormatError as error:
        problems.append(str(error))
    if attributes.state != "complete":
        problems.append(
            f"{objects.url}: the merge was never finished: {n_done} of {n_tiles} "
            "tiles are done; run the command that made it again"
        )
    total = sum(partial.total_projections for partial in attributes.partials)
    if total != attributes.total_projections:
        problems.append(
            f"{objects.url}: total_projections: its partials add up to {total}, the root says "
            f"{attributes.total_projections}"
        )
    return problems


def _group_problems(
    objects: Objects,
    path: str,
    name: str,
    attributes: fmt.SearchAttributes | fmt.MergedAttributes,
    info: SearchInfo,
) -> list[str]:
    """Everything that is wrong with a group of maps, chunk by chunk."""
    shape, problems = attributes.shape, list[str]()
    merged = attributes if isinstance(attributes, fmt.MergedAttributes) else None
    keys = attributes.maps.merged if merged else attributes.maps.partial
    maps: dict[str, ChunkedMap] = {}
    for key in keys:
        try:
            maps |= open_partial_maps(objects, path, name, (key,), shape)
        except OcelotError as error:
            problems.append(str(error))
    if not maps:
        return problems
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
            found += value_problems(arrays, region, info, place)
        if merged and BEST_PARTIAL in arrays:
            numbers, n = arrays[BEST_PARTIAL], len(merged.partials)
            if numbers.min() < NOT_SEARCHED or numbers.max() >= n:
                found.append(
                    f"{maps[BEST_PARTIAL].place}: expected -1 to {n - 1} for {n} partials, got "
                    f"{numbers.min()} to {numbers.max()} in {region}"
                )
        return found

    with ThreadPoolExecutor() as pool:
        for found in pool.map(at_chunk, [cell.region for cell in grid]):
            problems += found
    return problems
