"""Paths, attributes and maps of searches, their exposures and partials, and merged results."""

import re
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from os.path import isfile

from ocelot_em.errors import FormatError, InvalidInputError, StoreNotFoundError
from ocelot_em.model.maps import MAPS
from ocelot_em.model.search_space import TABLES, SearchSpace
from ocelot_em.store import arrays as store
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants, groups
from ocelot_em.store.contract import Objects, at_once, join
from ocelot_em.store.manifest import MANIFEST, Manifest, find_manifest, read_manifest
from ocelot_em.store.tables import read_table
from ocelot_em.store.validation import name_problems


def exposure_path(exposure: str) -> str:
    """Path of an exposure's group; empty for a search without named exposures."""
    return f"{constants.EXPOSURES}/{exposure}" if exposure else ""


def partials_path(exposure: str = "") -> str:
    """Path of the group of an exposure's partials."""
    return f"{exposure_path(exposure)}/{constants.PARTIALS}" if exposure else constants.PARTIALS


def partial_path(name: str, exposure: str = "") -> str:
    """Path of a partial's group."""
    return f"{partials_path(exposure)}/{name}"


def read_exposure(objects: Objects, exposure: str) -> fmt.ExposureAttributes:
    """Read the attributes of one exposure."""
    path = exposure_path(exposure)
    where, attributes = f"{objects.url}/{path}", groups.group_attributes(objects, path)
    found = fmt.parse_attributes(fmt.ExposureAttributes, attributes, where)
    if found.id != exposure:
        raise FormatError(f"{where}: expected the exposure {exposure!r}, got {found.id!r}")
    return found


def read_exposures(
    objects: Objects, attributes: fmt.SearchAttributes | fmt.MergedAttributes
) -> list[fmt.ExposureAttributes]:
    """Read a store's exposures, by number; a store that has a shape is itself one."""
    if attributes.shape is not None and attributes.valid_shape is not None:
        return [
            fmt.ExposureAttributes(
                id="",
                number=0,
                origin=(0, 0),
                acquired=0,
                shape=attributes.shape,
                valid_shape=attributes.valid_shape,
                total_projections=attributes.total_projections,
            )
        ]
    with objects.snapshot() as known:
        names = names_of_groups(known, constants.EXPOSURES, "exposure id")
        found = [read_exposure(known, name) for name in names]
    found.sort(key=lambda exposure: exposure.number)
    for one, other in pairwise(found):
        if one.number == other.number:
            raise FormatError(
                f"{objects.url}: exposures {one.id!r} and {other.id!r} have the same number "
                f"{one.number}"
            )
    return found


def read_search_space(
    objects: Objects, digest: str | None, path: str = constants.SEARCH_SPACE
) -> SearchSpace | None:
    """Read the tables, and check them against the recorded digest."""
    if digest is None:
        return None
    paths = [f"{path}/{name}" for name in TABLES]
    try:
        with objects.snapshot() as known:
            known.prefetch(f"{path}/{key}" for path in paths for key in _TABLE_KEYS)
            space = SearchSpace.from_tables(*(read_table(known, path) for path in paths))
    except InvalidInputError as error:
        raise FormatError(f"{objects.url}/{path}: {error}") from None
    if space.digest != digest:
        raise FormatError(
            f"{objects.url}/{path}: the tables are not the ones the search was "
            f"written with: expected digest {digest[:12]}, got {space.digest[:12]}"
        )
    return space


_TABLE_KEYS = "zarr.json", "c/0", "c/0/0"
"""Objects of a table of one chunk, with one or two axes."""


def read_attributes(objects: Objects) -> fmt.SearchAttributes | fmt.MergedAttributes:
    """Read the root attributes of a search or a merged result."""
    attributes = groups.group_attributes(objects, "")
    if attributes is None:
        got = "nothing there"
        if isfile(objects.url):  # noqa: PTH113 - Path.is_file raises for long names
            got = "a file; results of other programs are read by ocelot import"
        raise StoreNotFoundError(f"{objects.url}: expected an ocelot-em store, got {got}")
    content = attributes.get(constants.ATTRIBUTE_KEY)
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind == "merged":
        return fmt.parse_attributes(fmt.MergedAttributes, attributes, objects.url)
    return fmt.parse_attributes(fmt.SearchAttributes, attributes, objects.url)


def read_partial_attributes(
    objects: Objects, name: str, exposure: str = ""
) -> fmt.PartialAttributes:
    """Read the attributes of one partial."""
    return read_partial_at(objects, partial_path(name, exposure))


def read_partial_at(objects: Objects, path: str) -> fmt.PartialAttributes:
    """Read the attributes of the partial at a path, as :func:`find_partial_at` does.

    Raises
    ------
    FormatError
        It does not exist, or is damaged.
    """
    found = find_partial_at(objects, path)
    where = f"{objects.url}/{path}"
    return found or fmt.parse_attributes(fmt.PartialAttributes, None, where)


def find_partial_at(objects: Objects, path: str) -> fmt.PartialAttributes | None:
    """Read the attributes of a partial, None if there is none; with a manifest, it is complete.

    A writer may have been killed before it changed the attributes, and one that came too late may
    have changed them back.
    """
    where = f"{objects.url}/{path}"
    attributes = groups.group_attributes(objects, path)
    if attributes is None:
        return None
    found = fmt.parse_attributes(fmt.PartialAttributes, attributes, where)
    if found.state == "complete":
        return found
    written = find_manifest(objects, path)
    return found if written is None else completed(written, where)


def completed(manifest: Manifest, where: str) -> fmt.PartialAttributes:
    """Return the attributes of a complete partial from its manifest.

    Raises
    ------
    FormatError
    """
    content = {**manifest.attributes, "manifest": manifest.digest}
    return fmt.validated(fmt.PartialAttributes, content, f"{where}/{MANIFEST}")


def partial_names(objects: Objects, exposure: str = "") -> list[str]:
    """Names of all partials of an exposure, complete or not, in alphabetical order."""
    return names_of_groups(objects, partials_path(exposure), "partial name")


def names_of_groups(objects: Objects, path: str, what: str) -> list[str]:
    """Return the names of the groups below a path."""
    folders = objects.children(path)
    objects.prefetch(f"{path}/{name}/zarr.json" for name in folders)
    names = {name for name in folders if objects.get(f"{path}/{name}/zarr.json") is not None}
    problems = [problem for name in names for problem in name_problems(name, what)]
    if problems:
        raise FormatError(f"{objects.url}/{path}: {'; '.join(sorted(problems)[:20])}")
    return sorted(names)


def read_partials(objects: Objects, exposure: str = "") -> list[tuple[str, fmt.PartialAttributes]]:
    """Names and attributes of an exposure's partials in the stated order: ``order``, then name.

    Names sort naturally: ``gpu9`` before ``gpu10``.
    """
    with objects.snapshot() as known:
        names = partial_names(known, exposure)
        # At once: of one that is not complete, the manifest is read as well.
        reads = [partial(read_partial_attributes, known, name, exposure) for name in names]
        found = list(zip(names, at_once(known, reads), strict=True))
    return sorted(found, key=lambda item: (item[1].order, _natural(item[0])))


def _natural(name: str) -> list[tuple[int, int, str]]:
    pieces = re.findall(r"\d+|\D+", name)
    return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in pieces]


@dataclass(frozen=True)
class MapGroup:
    """The maps of a partial or of a merged result, which has no path and no name.

    ``folder`` has the arrays within the group; chunks are compared with the manifest, if there is
    one.
    """

    objects: Objects
    path: str = ""
    name: str = ""
    folder: str = ""
    manifest: Manifest | None = None
    total_projections: int | None = None
    correlation_threshold: float | None = None
    has_counts: bool = False

    @property
    def place(self) -> str:
        """Name of the partial or of the merged result in error messages."""
        return place_of(self.objects.url, self.path, self.name)

    def path_of(self, key: str) -> str:
        """Path of the array of a map."""
        return join(self.path, self.folder, key)

    def open(
        self, keys: tuple[str, ...], shape: tuple[int, int] | None = None
    ) -> dict[str, store.ChunkedMap]:
        """Open some maps, which must have the given shape, and be those of the manifest."""
        with self.objects.snapshot() as known:
            known.prefetch(self.metadata_keys(keys))
            maps = {key: self._open_one(known, key) for key in keys}
        for chunked in maps.values():
            if shape is not None and chunked.shape != shape:
                raise FormatError(f"{chunked.place}: expected shape {shape}, got {chunked.shape}")
            if wrong := chunk_problem(chunked, next(iter(maps.values()))):
                raise FormatError(wrong)
        return maps

    def metadata_keys(self, keys: tuple[str, ...]) -> list[str]:
        """Keys of the metadata of some maps."""
        return [f"{self.path_of(key)}/zarr.json" for key in keys]

    def _open_one(self, objects: Objects, key: str) -> store.ChunkedMap:
        place, expected = f"{self.place}: {key}", None
        if self.manifest is not None:
            expected = self.manifest.arrays.get(key)
            if expected is None:
                raise FormatError(f"{place}: expected the map in the manifest, it is not there")
        opened = store.open_map(objects, self.path_of(key), place, MAPS[key].dtypes, expected)
        if opened.shards is not None and opened.shards.separator == "/" and not self.path:
            raise FormatError(
                f"{place}: codecs: expected no shards of a partial in a merged result; merge again"
            )
        return opened


def open_partial(
    objects: Objects, name: str, exposure: str, attributes: fmt.PartialAttributes
) -> MapGroup:
    """Return the maps of a partial, with its manifest if it has one."""
    path = partial_path(name, exposure)
    return MapGroup(
        objects,
        path,
        name,
        attributes.folder,
        _manifest(objects, join(path, attributes.manifest_folder), attributes),
        attributes.total_projections,
        attributes.correlation_threshold,
        attributes.has_counts,
    )


def open_result(objects: Objects, attributes: fmt.MergedAttributes) -> MapGroup:
    """Return the maps of a merged result, with its manifest if it has one."""
    manifest, count = _manifest(objects, "", attributes), attributes.total_projections
    return MapGroup(objects, manifest=manifest, total_projections=count)


def _manifest(
    objects: Objects, path: str, attributes: fmt.PartialAttributes | fmt.MergedAttributes
) -> Manifest | None:
    if attributes.manifest is None:
        return None
    return read_manifest(objects, path, attributes.id, attributes.manifest)


def chunk_problem(chunked: store.ChunkedMap, other: store.ChunkedMap) -> str:
    """Describe a difference in chunks between two maps of one partial or merged result."""
    if chunked.grid == other.grid:
        return ""
    return (
        f"{chunked.place}: expected chunks of {other.grid.cell} pixels in {other.shape}, as "
        f"{other.path} has them, got {chunked.grid.cell} in {chunked.shape}"
    )


def place_of(url: str, path: str, name: str) -> str:
    """Name of a partial or a merged result in error messages."""
    if not path:
        return url
    folder = path.removesuffix(f"/{constants.PARTIALS}/{name}")
    of = f"exposure {folder.removeprefix(f'{constants.EXPOSURES}/')!r}: " if folder != path else ""
    return f"{url}: {of}partial {name!r}"
