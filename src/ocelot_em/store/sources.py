"""Inputs of a merge: partials of a search, or an earlier merged result."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Annotated

from pydantic import StringConstraints

from ocelot_em.errors import FormatError, IncompleteError, InputChangedError, StoreNotFoundError
from ocelot_em.model.maps import BEST_PARTIAL, SUM, MapSet
from ocelot_em.model.text import count_text, exposure_prefix, partial_text
from ocelot_em.store import arrays as store
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants
from ocelot_em.store.contract import Objects, join
from ocelot_em.store.lock import has_ended
from ocelot_em.store.manifest import manifest_key, read_manifest
from ocelot_em.store.objects import Stores, open_objects, snapshots
from ocelot_em.store.progress import progress_of
from ocelot_em.store.roster import (
    check_exposures,
    check_roster,
    exposure_number_keys,
    listed_exposures,
    read_roster,
    roster_keys,
)
from ocelot_em.store.search import (
    MapGroup,
    partial_names,
    partial_path,
    partials_path,
    place_of,
    read_attributes,
    read_exposures,
    read_partial_at,
    read_partials,
)

_NAME = r"[A-Za-z0-9][A-Za-z0-9._\-]{0,127}"


_GROUP = rf"^(({constants.EXPOSURES}/{_NAME}/)?{constants.PARTIALS}/{_NAME})?$"
"""Pattern of mergeable group paths: a partial, or the root of a merged result."""


class Source(fmt.Attributes):
    """One input of a merge: a partial of a search, or an earlier merged result, without a path.

    ``first_number`` is the number of its first contribution in the stated order of the merge.
    """

    url: str
    path: Annotated[str, StringConstraints(pattern=_GROUP)]
    name: str
    id: fmt.Id
    total_projections: fmt.Count
    first_number: fmt.Number
    contributions: fmt.Several[fmt.Contribution]
    has_counts: bool
    folder: fmt.Folder = ""
    manifest: fmt.Digest | None = None
    manifest_folder: fmt.Folder = ""

    @property
    def place(self) -> str:
        """Name of the source in error messages."""
        return place_of(self.url, self.path, self.name)

    @property
    def is_counted_by_pixel(self) -> bool:
        """Whether it is a partial with a map of counts, whose mean is collected."""
        return self.has_counts and bool(self.path)

    def map_names(self, maps: MapSet) -> tuple[str, ...]:
        """Names of the source's maps that a merge with these maps needs."""
        names = MapSet(maps.form, maps.pixel_size, self.has_counts).partial
        return names if self.path else (*names, BEST_PARTIAL)


_OF_PARTIAL = "id", "total_projections", "has_counts", "folder", "manifest", "manifest_folder"
"""Attributes of a partial that its source repeats."""


def open_one(source: Source, name: str, stores: Stores = open_objects) -> store.ChunkedMap:
    """Open one map of a source; all its maps have the same shape and chunks."""
    objects = stores(source.url)
    return MapGroup(objects, source.path, source.name, source.folder).open((name,))[name]


def open_several(
    sources: Sequence[Source], maps: MapSet, shape: tuple[int, int]
) -> list[dict[str, store.ChunkedMap]]:
    """Open the maps of some sources, as :func:`open_source_maps`, all metadata at once."""
    keys: dict[str, list[str]] = {}
    with snapshots() as stores:
        for source in sources:
            group = MapGroup(stores(source.url), source.path, source.name, source.folder)
            own = keys.setdefault(source.url, [])
            own += group.metadata_keys(source.map_names(maps))
            if source.manifest is not None:
                own.append(manifest_key(join(source.path, source.manifest_folder)))
        for url, wanted in keys.items():
            stores(url).prefetch(wanted)
        return [open_source_maps(source, maps, shape, stores) for source in sources]


def open_source_maps(
    source: Source, maps: MapSet, shape: tuple[int, int], stores: Stores = open_objects
) -> dict[str, store.ChunkedMap]:
    """Open the maps of a planned source that a merge needs; they must have this shape."""
    return open_source(source, stores).open(source.map_names(maps), shape)


def open_source(source: Source, stores: Stores = open_objects) -> MapGroup:
    """Open a planned source, with its manifest if it has one."""
    objects = stores(source.url)
    manifest = None
    if source.manifest is None:
        check_unchanged(source)
    else:
        try:
            where = join(source.path, source.manifest_folder)
            manifest = read_manifest(objects, where, source.id, source.manifest)
        except FormatError as error:
            check_unchanged(source)
            raise error
    return MapGroup(objects, source.path, source.name, source.folder, manifest)


def check_unchanged(source: Source) -> None:
    """Raise ``InputChangedError`` unless a source is still the one that was planned."""
    objects = open_objects(source.url)
    found: fmt.Attributes
    try:
        path = source.path
        found = read_partial_at(objects, path) if path else read_attributes(objects)
    except (FormatError, StoreNotFoundError) as error:
        raise InputChangedError(
            f"{source.place}: changed since the merge was planned: {error}"
        ) from error
    state = "running" if source.manifest_folder else "complete"
    expected = source.id, state, source.total_projections, source.manifest
    names = "id", "state", "total_projections", "manifest"
    got = tuple(getattr(found, name, None) for name in names)
    if got != expected:
        raise InputChangedError(
            f"{source.place}: changed since the merge was planned: expected id, state, number of "
            f"projections and manifest {expected}, got {got}; workers must see the same storage "
            "as the driver, and inputs must not change during a merge; run the same command again"
        )


def open_sources(
    objects: Objects,
    without: Collection[str] = (),
    *,
    so_far: bool = False,
    complete_only: bool = False,
) -> tuple[
    fmt.SearchAttributes | fmt.MergedAttributes, list[tuple[fmt.ExposureAttributes, list[Source]]]
]:
    """Read the sources of a store and its exposures, by number, in the stated order.

    Partials ``without`` are left out (``EXPOSURE/NAME`` in a search with exposures), as are
    exposures of which only the number is left (``EXPOSURE``). ``so_far`` leaves out partials that
    are being created or written. Those that are recorded while their search runs are sources, with
    ``complete_only`` if they can no longer change. ``IncompleteError`` lists all partials that are
    missing or incomplete.
    """
    with objects.snapshot() as known:
        return _open_sources(known, without, so_far=so_far, complete_only=complete_only)


def _open_sources(
    objects: Objects, without: Collection[str], *, so_far: bool, complete_only: bool
) -> tuple[
    fmt.SearchAttributes | fmt.MergedAttributes, list[tuple[fmt.ExposureAttributes, list[Source]]]
]:
    prefetch_search(objects)
    attributes = read_attributes(objects)
    exposures = read_exposures(objects, attributes)
    if isinstance(attributes, fmt.MergedAttributes):
        if attributes.state != "complete":
            raise IncompleteError(
                f"{objects.url}: this merge was never finished; run the command that made it again"
            )
        if attributes.exposures:
            what = "result of groups" if attributes.group_by else "montage"
            raise FormatError(
                f"{objects.url}: is a merged {what}, in which {attributes.part}s have lost the "
                "pixels that others won; merge their searches instead"
            )
        source = Source(
            url=objects.url,
            path="",
            name=objects.url.rpartition("/")[2],
            id=attributes.id,
            total_projections=attributes.total_projections,
            first_number=0,
            contributions=attributes.partials,
            has_counts=attributes.has_counts,
            manifest=attributes.manifest,
        )
        return attributes, [(exposures[0], [source])]
    prefetch_partials(objects, exposures, lists=True, sums=True)
    is_sealed = attributes.format_version >= constants.FIRST_SEALED_VERSION
    if is_sealed and attributes.has_exposures and not so_far:
        check_exposures(objects, exposures, without)
    opened, problems, n_partials = [], [], 0
    for exposure in exposures:
        before = f"{exposure.id}/" if exposure.id else ""
        left_out = {name.removeprefix(before) for name in without if name.startswith(before)}
        partials = read_partials(objects, exposure.id)
        if is_sealed:
            check_roster(objects, exposure.id, partials, left_out, all_created=not so_far)
        partials = [(name, partial) for name, partial in partials if name not in left_out]
        n_partials += len(partials)
        unfinished = [name for name, partial in partials if partial.state == "writing"]
        # A running partial without maps has searched nothing yet.
        partials = [(name, partial) for name, partial in partials if partial.is_readable]
        if not so_far:
            problems += [partial_text(exposure.id, name) for name in unfinished]
            if exposure.id and not partials and not unfinished:
                problems.append(f"{exposure_prefix(exposure.id)}has no partials yet")
        if complete_only:
            searched = progress_of(partial.coverage for _, partial in partials)
            if searched is None or not searched.is_whole:
                partials = [(name, partial) for name, partial in partials if _is_final(partial)]
        sources = [
            Source(
                url=objects.url,
                path=partial_path(name, exposure.id),
                name=name,
                first_number=number,
                contributions=(
                    fmt.Contribution(
                        name=name,
                        id=partial.id,
                        total_projections=partial.total_projections,
                        coverage=partial.coverage,
                        correlation_histogram=partial.correlation_histogram,
                    ),
                ),
                **{key: getattr(partial, key) for key in _OF_PARTIAL},
            )
            for number, (name, partial) in enumerate(partials)
        ]
        if sources:
            opened.append((exposure, sources))
    if problems:
        what = "partials" if not attributes.has_exposures else "partials of exposures"
        raise IncompleteError(
            f"{objects.url}: {len(problems)} of {n_partials} {what} were never finished: "
            f"{', '.join(problems)}; their writer died or still runs: write them again, or "
            "leave them out (--without NAME)"
        )
    if not opened:
        has = "the search has no partials yet; run this again when a device has written one"
        if n_partials and complete_only:
            has = (
                f"of {count_text(n_partials, 'partial')}, none is complete, or of a process that "
                "is known to have ended; wait for one, or merge checkpoints, too (--so-far)"
            )
        elif n_partials:
            has = (
                f"of {count_text(n_partials, 'partial')}, none can be read yet; run this again "
                "when a device has written its first checkpoint"
            )
        raise IncompleteError(f"{objects.url}: {has}")
    return attributes, opened


def prefetch_search(objects: Objects) -> None:
    """Read the root of a search, and list its partials or exposures."""
    objects.prefetch(["zarr.json"], [partials_path(), constants.EXPOSURES])


def prefetch_partials(
    objects: Objects,
    exposures: Sequence[fmt.ExposureAttributes],
    *,
    lists: bool = False,
    sums: bool = False,
) -> None:
    """Read the metadata of all partials, with the lists of partials and exposures, and of sums."""
    ids, keys = [exposure.id for exposure in exposures], list[str]()
    objects.prefetch([], map(partials_path, ids))
    if lists and any(ids):
        keys += exposure_number_keys(len(ids))
    for exposure in ids:
        names = objects.children(partials_path(exposure))
        if lists:
            keys += roster_keys(exposure, len(names))
        folders = [partial_path(name, exposure) for name in names]
        keys += [f"{folder}/zarr.json" for folder in folders]
        if sums:  # for the memory that a merge needs, which depends on their chunks
            keys += [f"{folder}/{SUM}/zarr.json" for folder in folders]
    objects.prefetch(keys)


def _is_final(partial: fmt.PartialAttributes) -> bool:
    """Whether a partial is complete, or its process is known to have ended."""
    about = partial.recording
    return partial.state == "complete" or (about is not None and has_ended(about.process))


def is_current(source: Source) -> bool:
    """Whether a source has had no checkpoint since the merge was planned."""
    if not source.manifest_folder:
        return True
    with suppress(FormatError, StoreNotFoundError):
        return read_partial_at(open_objects(source.url), source.path).id == source.id
    return False


def names_of_partials(objects: Objects) -> set[str]:
    """Return what ``without`` may name: partials, there or only listed, and lost exposures."""
    attributes = read_attributes(objects)
    if isinstance(attributes, fmt.MergedAttributes):
        return set()
    exposures = read_exposures(objects, attributes)
    return {
        partial_text(exposure.id, name)
        for exposure in exposures
        for name in {*partial_names(objects, exposure.id), *read_roster(objects, exposure.id)}
    } | ({*listed_exposures(objects)} - {exposure.id for exposure in exposures})
